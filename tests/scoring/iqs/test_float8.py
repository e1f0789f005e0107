"""float8.py: products of 8 bits are near those of 32, rows keep their order, and what cannot compute them is refused."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from car_datasets import QualityScorer, TextEmbedder
from car_datasets.loading.templates import Exchange, render
from car_datasets.scoring.inference import LoadedScorer
from car_datasets.scoring.iqs import float8
from car_datasets.scoring.iqs.float8 import FLOAT8, linear, refuse_float8_on, to_float8
from car_datasets.scoring.iqs.packed_encoder import PackedEncoder
from tests.conftest import tiny_encoder_config

AGREEMENT, OVERLAP = 0.99, 0.95  # Spearman, and share of the best tenth; .996 and 1 were seen on the sample


def can_multiply() -> bool:
    """Return True if torch multiplies float8 on the CPU, which not every version does."""
    try:
        linear(torch.ones(16, 16, dtype=torch.bfloat16), to_float8(torch.ones(16, 16)), torch.zeros(16))
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return True


NEEDS_FLOAT8 = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
    reason="needs a GPU with float8, from Ada or Hopper on",
)
NEEDS_PRODUCT = pytest.mark.skipif(not can_multiply(), reason="needs a torch that multiplies float8 on the CPU")


def product(rows: Tensor, columns: Tensor, scale: Tensor, by: Any, other: Tensor, *_: Any, **options: Any) -> Tensor:
    """Multiply as `torch.nn.functional.scaled_mm` does, in a fraction of the time that it takes on a processor."""
    return ((rows.float() * scale) @ (columns.float() * other)).to(options["output_dtype"])


@NEEDS_PRODUCT
def test_a_product_in_float8_is_near_that_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    # Rows of very different sizes, each of which has a scale of its own; a row of zeros stays one.
    states = torch.randn(64, 128, generator=draw) * torch.logspace(-6, 3, 64)[:, None]
    states[5] = 0
    weight, bias = torch.randn(48, 128, generator=draw), torch.randn(48, generator=draw)
    found = linear(states.bfloat16(), to_float8(weight), torch.zeros(48, dtype=torch.bfloat16)).float()
    expected = states.bfloat16().float() @ weight.T
    size = expected.std(dim=1)
    assert ((found - expected).abs().mean(dim=1) <= 0.05 * size).all()
    assert (found[5] == 0).all()
    monkeypatch.setattr(float8.F, "scaled_mm", product)
    again = linear(states.bfloat16(), to_float8(weight), torch.zeros(48, dtype=torch.bfloat16)).float()
    assert ((found - again).abs().amax(dim=1) <= 0.03 * size).all()
    assert torch.equal(linear(states, weight, bias), torch.nn.functional.linear(states, weight, bias))


def text_of(row: dict[str, Any]) -> str:
    return render(Exchange(row["instruction"], row["input"] or "", row["output"])).whole


def agree(exact: LoadedScorer, rounded: LoadedScorer, texts: list[str]) -> None:
    """Check that two scorers put texts into nearly the same order."""
    one, other = (loaded.score_texts(texts).scores for loaded in (exact, rounded))
    assert not np.array_equal(one, other)
    assert spearmanr(one, other).statistic >= AGREEMENT
    best = max(20, len(texts) // 10)
    assert len(set(np.argsort(-one)[:best]) & set(np.argsort(-other)[:best])) >= OVERLAP * best


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.skipif(not hasattr(float8.F, "scaled_mm"), reason="needs torch's names for the scales of a product")
def test_scores_in_float8_keep_the_order_of_rows(
    sample_rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(float8.F, "scaled_mm", product)
    exact = QualityScorer().load()
    model = copy.deepcopy(exact.model)
    model.encoder.to(torch.bfloat16)
    texts = sorted(map(text_of, sample_rows), key=len)[:60]
    agree(exact, exact._replace(model=model, encoder=PackedEncoder(model.encoder, None, float8=True)), texts)


@NEEDS_FLOAT8
def test_scores_in_float8_keep_the_order_of_rows_on_a_gpu(sample_rows: list[dict[str, Any]]) -> None:
    rounded = QualityScorer(dtype=FLOAT8).load()
    assert rounded.packed
    agree(QualityScorer().load(), rounded, list(map(text_of, sample_rows)))


def test_what_cannot_compute_in_float8_is_refused_with_the_mend(tiny_iqs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"dtype='float8' needs a GPU, and none is visible. Pass dtype='float32'"):
        QualityScorer(tiny_iqs, dtype=FLOAT8)
    with pytest.raises(ValueError, match=r"dtype='float8' is for scorers; pass dtype='float16' or 'bfloat16'"):
        TextEmbedder(dtype=FLOAT8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    config, gpu = tiny_encoder_config(), torch.device("cuda")
    with pytest.raises(ValueError, match=r"and this process is to use cpu. Pass dtype='float32'"):
        refuse_float8_on(torch.device("cpu"), config, True)
    with pytest.raises(ValueError, match=r"from Ada or Hopper on; cuda is an older one. Pass dtype='float16'"):
        refuse_float8_on(gpu, config, True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    refuse_float8_on(gpu, config, True)
    with pytest.raises(ValueError, match=r"with multiples of 16 units; this one is 'bert' with 32 and 64"):
        refuse_float8_on(gpu, config, False)
    monkeypatch.delattr(float8.F, "scaled_mm", raising=False)
    with pytest.raises(ValueError, match=r"dtype='float8' needs torch 2.10 or newer.*pip install --upgrade torch"):
        QualityScorer(tiny_iqs, dtype=FLOAT8)
