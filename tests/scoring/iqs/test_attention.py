"""attention.py: the fastest kernel that agrees with torch's is kept, and whatever cannot run is left out in silence."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from car_datasets.scoring.iqs import attention
from car_datasets.scoring.iqs.attention import IN_TORCH, Kernel, each_in_turn, fastest, installed_kernels

Clock = list[float]


def rows() -> list[Any]:
    found = []
    for texts in (2, 3):
        query, key, value = torch.randn(3, 8 * texts, 2, 4, generator=torch.Generator().manual_seed(0)).unbind()
        found.append((query, key, value, torch.arange(0, 8 * texts + 1, 8, dtype=torch.int32), 8))
    return found


def taking(seconds: float, clock: Clock, change: Callable[[Tensor], Tensor] = lambda found: found) -> Kernel:
    """Return a kernel that takes so long by a clock, and whose result is changed."""

    def kernel(*row: Any) -> Tensor:
        clock[0] += seconds
        return change(each_in_turn(*row))

    return kernel


def failing(*row: Any) -> Tensor:
    raise RuntimeError("no kernel image is available")


@pytest.mark.parametrize(
    ("seconds", "change", "chosen"),
    [
        (0.5, lambda found: found + 0.01, "other"),
        (0.99, lambda found: found, IN_TORCH),  # within what two runs may differ by
        (0.5, lambda found: found + 0.1, IN_TORCH),
        (0.5, lambda found: found * torch.nan, IN_TORCH),
        (0.5, lambda found: found[:-1], IN_TORCH),
    ],
    ids=["fastest", "hardly faster", "wrong", "not finite", "another shape"],
)
def test_another_kernel_is_kept_if_it_is_clearly_faster_and_agrees(
    seconds: float, change: Callable[[Tensor], Tensor], chosen: str, caplog: pytest.LogCaptureFixture
) -> None:
    clock = [0.0]
    kernels = {IN_TORCH: taking(1, clock), "broken": failing, "other": taking(seconds, clock, change)}
    with caplog.at_level(logging.INFO):
        assert fastest(kernels, rows(), lambda: clock[0]) == chosen
    assert not caplog.records


def test_torch_is_kept_if_it_is_alone_or_fails() -> None:
    clock = [0.0]
    assert fastest({IN_TORCH: failing}, rows(), lambda: clock[0]) == IN_TORCH
    assert fastest({IN_TORCH: failing, "other": taking(1, clock)}, rows(), lambda: clock[0]) == IN_TORCH


def test_packages_that_are_not_installed_are_no_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_from_package", lambda module: None)
    assert list(installed_kernels((8, 0))) == [IN_TORCH]
    assert list(installed_kernels((9, 0))) == [IN_TORCH, "cuDNN"]
    clock = [0.0]

    def function(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, None]:
        assert options["cu_seqlens_q"] is options["cu_seqlens_k"]
        assert options["max_seqlen_q"] == options["max_seqlen_k"] == 8
        return taking(1, clock)(query, key, value, options["cu_seqlens_q"], 8), None

    monkeypatch.setattr(attention, "_from_package", lambda module: function)
    kernels = installed_kernels((9, 0))
    assert list(kernels) == [IN_TORCH, "cuDNN", "FlashAttention 3", "FlashAttention 4"]
    row = rows()[0]
    assert torch.equal(kernels["FlashAttention 3"](*row), each_in_turn(*row))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, whose kernels are timed")
def test_the_kernel_of_this_gpu_attends_as_each_text_alone_does() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    if torch.cuda.get_device_capability(device) < (8, 0):
        pytest.skip("torch's variable-length attention needs a GPU from Ampere on")
    _, kernel = attention.chosen_kernel(device, torch.bfloat16, 4, 64)
    query, key, value = torch.randn(3, 300, 4, 64, device=device, dtype=torch.bfloat16).unbind()
    bounds = torch.tensor([0, 7, 120, 300], device=device, dtype=torch.int32)
    found, expected = (each(query, key, value, bounds, 512).float() for each in (kernel, each_in_turn))
    assert torch.allclose(found, expected, atol=attention.AGREES)
