"""Attention within each text of a packed row, by the kernel that is fastest on this GPU.

Does: attend by torch's variable-length attention, by FlashAttention 3 or 4 where one is installed, or by cuDNN; time
them once in a process, on rows of its own, and keep the fastest that agrees with torch's.
Does not: read padding, or change a result beyond the rounding of half precision. On the CPU, for tests, each text is
attended to in turn.
"""

from __future__ import annotations

import functools
import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from car_datasets.scoring.iqs.packing import Packed

logger = logging.getLogger(__name__)

# A function of query, key and value of shape (tokens, heads, size), the bounds of the texts, int32, and an upper bound
# of their tokens, that returns a tensor of the shape of the query.
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
Row = tuple[Tensor, Tensor, Tensor, Tensor, int]

IN_TORCH = "torch"  # the kernel that others are compared with, FlashAttention 2
FASTER = 0.95  # of its time, that another one must keep to: nearer times would change the choice from run to run
AGREES = 0.02  # how far two kernels may be apart on standard normal numbers; half precision rounds by some .004
# Texts and tokens of each in the rows of the trial, which are as long as packs are, so that launching takes less time
# than computing. They differ, as a kernel that is prepared for each shape pays for that in every pack; in each, as many
# layers as a small encoder has call the kernel.
TRIALS = ((512, 128), (320, 200), (160, 400))
LAYERS = 12


def attend(projected: Tensor, packed: Packed, heads: int) -> Tensor:
    """Attend within each text.

    Args:
        projected (`Tensor` of shape `(tokens, 3 * units)`): query, key and value of every token.
        packed ([`Packed`]): the texts.
        heads (`int`): of the attention.

    Returns:
        `Tensor` of shape `(tokens, units)`.
    """
    query, key, value = projected.unflatten(-1, (3, heads, -1)).unbind(1)  # each of shape (tokens, heads, size)
    kernel: Kernel = each_in_turn
    if projected.device.type == "cuda":
        kernel = chosen_kernel(projected.device, projected.dtype, heads, query.shape[-1])[1]
    return kernel(query, key, value, packed.bounds, packed.longest).flatten(1)


def each_in_turn(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int) -> Tensor:
    """Attend to one text after another, on any device and in any precision.

    Args:
        query, key, value (`Tensor` of shape `(tokens, heads, size)`): of all texts, end to end.
        bounds (`(texts + 1,)` int32): where each text begins, and the end of the last.
        longest (`int`): not used; kernels are called alike.

    Returns:
        `Tensor` of shape `(tokens, heads, size)`.
    """
    parts = [part.transpose(0, 1) for part in (query, key, value)]
    texts = [
        F.scaled_dot_product_attention(*(part[None, :, start:end] for part in parts))[0]
        for start, end in itertools.pairwise(bounds.tolist())
    ]
    return torch.cat(texts, dim=1).transpose(0, 1)


@functools.lru_cache(maxsize=8)
def chosen_kernel(device: torch.device, dtype: torch.dtype, heads: int, size: int) -> tuple[str, Kernel]:
    """Return the name of the fastest kernel of a GPU for heads of a size, and the kernel; timed once in a process.

    Args:
        device (`torch.device`): the GPU.
        dtype (`torch.dtype`): float16 or bfloat16.
        heads (`int`): of the attention.
        size (`int`): numbers of a head.
    """
    generator = torch.Generator(device).manual_seed(0)
    longest = max(texts * tokens for texts, tokens in TRIALS)
    # One below the other in memory, as the fused layer gives them.
    projected = torch.randn((longest, 3, heads, size), device=device, dtype=dtype, generator=generator)
    rows: list[Row] = []
    for texts, tokens in TRIALS:
        query, key, value = projected[: texts * tokens].unbind(1)
        bounds = torch.arange(0, texts * tokens + 1, tokens, device=device, dtype=torch.int32)
        rows.append((query, key, value, bounds, 512))
    kernels = installed_kernels(torch.cuda.get_device_capability(device))
    name = fastest(kernels, rows, functools.partial(_now, device))
    logger.debug("Attention by %s, of %s.", name, ", ".join(kernels))
    return name, kernels[name]


def _now(device: torch.device) -> float:
    torch.cuda.synchronize(device)
    return time.perf_counter()


def fastest(kernels: Mapping[str, Kernel], rows: Sequence[Row], now: Callable[[], float]) -> str:
    """Return the name of the kernel that takes the least time for rows.

    A kernel that fails, or whose results are not those of torch's, is left out without a word: which of them exist
    depends on what is installed, and torch's is always there.

    Args:
        kernels (`Mapping[str, Kernel]`): name to kernel, that of torch first, which is taken unless another one is
            clearly faster.
        rows (`Sequence`): the arguments of a call, of different shapes. The first one warms each kernel up.
        now (`Callable`): returns the time in seconds after all that was begun is done.
    """
    if len(kernels) == 1:
        return IN_TORCH
    expected: Tensor | None = None
    seconds: dict[str, float] = {}
    for name, kernel in kernels.items():
        try:
            found = kernel(*rows[0]).float()
            expected = found if expected is None else expected
            begun = now()
            for row in rows[1:]:
                for _ in range(LAYERS):
                    kernel(*row)
            taken = now() - begun
            if torch.allclose(found, expected, rtol=0, atol=AGREES):
                seconds[name] = taken
        except Exception as error:  # whatever an extension raises
            logger.debug("Attention by %s is left out: %s", name, error)
    if IN_TORCH not in seconds:
        return IN_TORCH
    best = min(seconds, key=lambda name: seconds[name])
    return best if seconds[best] < FASTER * seconds[IN_TORCH] else IN_TORCH


def installed_kernels(capability: tuple[int, int]) -> dict[str, Kernel]:
    """Return the kernels that may work on a GPU of this compute capability, by name, with torch's own first."""
    found: dict[str, Kernel] = {IN_TORCH: _torch}
    # cuDNN and FlashAttention 3 and 4 are faster from Hopper on. The packages are called directly: torch's registry of
    # FlashAttention would replace the kernel of everything else in this process too.
    if capability >= (9, 0):
        found["cuDNN"] = _cudnn
        for name, module in (("FlashAttention 3", "flash_attn_interface"), ("FlashAttention 4", "flash_attn.cute")):
            if (function := _from_package(module)) is not None:
                found[name] = functools.partial(_flash, function)
    return found


def _from_package(module: str) -> Callable[..., Any] | None:
    import importlib

    try:
        function: Callable[..., Any] = importlib.import_module(module).flash_attn_varlen_func
    except Exception:  # not installed, or built for another version of torch
        return None
    return function


def _torch(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # Queries and keys have the same bounds, as each text attends to itself.
    found: Tensor = varlen_attn(query, key, value, bounds, bounds, longest, longest)
    return found


def _cudnn(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int) -> Tensor:
    # As torch's `varlen_attn` calls it, where its own rule, which no version has switched on so far, allows for it.
    arguments = (query, key, value, None, bounds, bounds, longest, longest, True, 0.0, False, False)
    found: Tensor = torch.ops.aten._cudnn_attention_forward(*arguments)[0]
    return found


def _flash(
    function: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int
) -> Tensor:
    lengths = {"max_seqlen_q": longest, "max_seqlen_k": longest}
    found = function(query, key, value, cu_seqlens_q=bounds, cu_seqlens_k=bounds, **lengths)
    # Some versions return the logarithms of the sums as well.
    result: Tensor = found[0] if isinstance(found, tuple) else found
    return result
