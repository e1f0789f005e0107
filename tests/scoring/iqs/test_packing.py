"""packing.py: packed texts have the scores of padded ones, whatever their neighbours are.

On the CPU each text is attended to in turn; where there is a GPU, one test also runs its own kernel.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import BertConfig

from car_datasets import IQSConfig, IQSModel, QualityScorer
from car_datasets.scoring import inference
from car_datasets.scoring.batching import pad
from car_datasets.scoring.iqs.packing import ATTENTION, attend_packed, can_pack, first_position, pack, use_packing
from tests.conftest import tiny_encoder_config

TOLERANCE = 1e-5
CPU = torch.device("cpu")
IDS = [[2, 9, 10, 11, 12, 3], [2, 30, 3], [2, 40, 41, 42, 43, 44, 45, 46, 47, 3], [2, 3]]


def roberta_config() -> Any:
    from transformers import XLMRobertaConfig

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return XLMRobertaConfig(vocab_size=64, max_position_embeddings=66, pad_token_id=1, type_vocab_size=1, **sizes)


def build(encoder_config: Any, **options: Any) -> IQSModel:
    torch.manual_seed(0)
    model = IQSModel(IQSConfig(encoder_config=encoder_config, **{"hidden_sizes": (16,), "max_tokens": 48, **options}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("make_config", [tiny_encoder_config, roberta_config], ids=["bert", "xlm-roberta"])
@pytest.mark.parametrize("options", [{}, {"pooling": "cls", "layer": 2}, {"pooling": "max", "layer_norm": True}])
def test_packed_scores_and_states_equal_padded_ones(make_config: Any, options: dict[str, Any]) -> None:
    config = make_config()
    model = build(config, **options)
    input_ids, mask = pad(IDS, config.pad_token_id, CPU)
    with torch.inference_mode():
        expected, states = model.member_scores(input_ids, mask)
        use_packing(model.encoder)
        packed = pack(IDS, config.pad_token_id, first_position(config), 48, CPU)
        found, packed_states = model.member_scores(input_ids, mask, packed=packed)
    assert expected.std() > 50 * TOLERANCE
    assert torch.allclose(found, expected, atol=TOLERANCE)
    for padded, unpadded in zip(states, packed_states, strict=True):
        assert torch.allclose(unpadded, padded * mask.unsqueeze(-1), atol=TOLERANCE)


def test_a_text_does_not_see_its_neighbours() -> None:
    model = build(tiny_encoder_config())
    use_packing(model.encoder)

    def scores(ids: list[list[int]]) -> torch.Tensor:
        with torch.inference_mode():
            return model.member_scores(*pad(ids, 0, CPU), packed=pack(ids, 0, 0, 48, CPU))[0]

    together, alone = scores(IDS), torch.cat([scores([ids]) for ids in IDS])
    assert torch.allclose(together, alone, atol=TOLERANCE)
    assert torch.allclose(scores(IDS[::-1]).flip(0), together, atol=TOLERANCE)


def test_a_filler_changes_nothing() -> None:
    """Add by hand the text of padding that fills a row on a GPU."""
    model = build(tiny_encoder_config())
    use_packing(model.encoder)
    packed = pack(IDS, 0, 0, 48, CPU)
    longer = pack([*IDS, [0] * 7], 0, 0, 48, CPU)._replace(grid=packed.grid)
    input_ids, mask = pad(IDS, 0, CPU)
    with torch.inference_mode():
        expected, found = (model.member_scores(input_ids, mask, packed=p)[0] for p in (packed, longer))
    assert torch.allclose(found, expected, atol=TOLERANCE)


@pytest.fixture
def packed_iqs(on_cpu: None, tiny_iqs: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Return a model that reads packed texts in float32, which only the CPU can."""
    inference.load_scorer.cache_clear()
    monkeypatch.setattr(inference, "can_pack", lambda *_: True)
    yield tiny_iqs
    inference.load_scorer.cache_clear()


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("head", [{}, {"head": "segments", "hidden_sizes": (4, 3), "members": 2, "word_bits": 6}])
def test_a_packed_scorer_scores_as_a_padded_one(
    head: dict[str, Any], make_tiny_iqs: Any, pairs: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny_iqs(**head)
    expected = QualityScorer(folder)(pairs[:])["iqs_score"]
    inference.load_scorer.cache_clear()
    monkeypatch.setattr(inference, "can_pack", lambda *_: True)
    scorer = QualityScorer(folder)
    found = scorer(pairs[:])["iqs_score"]
    assert scorer.load().packed
    assert np.allclose(found, expected, atol=TOLERANCE)
    assert len(np.unique(np.round(expected, 3))) > 3
    inference.load_scorer.cache_clear()


def test_a_gpu_and_half_precision_are_needed() -> None:
    assert not can_pack(tiny_encoder_config(), "bfloat16", CPU)
    assert not can_pack(tiny_encoder_config(), "float32", torch.device("cuda"))


NEEDS_KERNEL = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason="needs a GPU that torch's variable-length attention runs on",
)


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=NEEDS_KERNEL)])
def test_in_half_precision_packed_scores_are_as_exact_as_padded_ones(kind: str) -> None:
    """Compare both with float32, because they round in another order; wrong positions would move scores by far more."""
    device = torch.device(kind)
    config = BertConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
    )
    ids = [[2, *(4 + (i * j) % 60 for j in range(1 + 3 * i)), 3] for i in range(40)]
    model = build(config, max_tokens=512).to(device)
    assert can_pack(config, "bfloat16", device) == (kind == "cuda")
    grid = pad(ids, 0, device)
    with torch.inference_mode():
        exact = model.member_scores(*grid)[0]
        model.encoder.to(torch.bfloat16)
        padded = model.member_scores(*grid)[0]
        use_packing(model.encoder)
        packed = model.member_scores(*grid, packed=pack(ids, 0, 0, 512, device))[0]
        alone = [
            model.member_scores(*pad([row], 0, device), packed=pack([row], 0, 0, 512, device))[0] for row in ids[:8]
        ]
    rounding = (padded - exact).abs().max()
    assert rounding < 0.25 * exact.std()
    assert (packed - exact).abs().max() < 2 * rounding
    assert (torch.cat(alone) - packed[:8]).abs().max() < rounding


def test_texts_that_are_not_packed_are_refused() -> None:
    model = build(tiny_encoder_config())
    use_packing(model.encoder)
    with pytest.raises(ValueError, match=ATTENTION), torch.inference_mode():
        model.member_scores(*pad(IDS, 0, CPU))
    states = torch.randn(1, 2, 3, 16)
    bounds = torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(ValueError, match="sqrt"):
        attend_packed(model, states, states, states, None, scaling=0.5, cu_seq_lens_q=bounds)


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(range(8)), budget=st.sampled_from([1, 20, 60, 5000]))
def test_a_packed_score_does_not_depend_on_its_company(packed_iqs: str, order: list[int], budget: int) -> None:
    texts = [f"Instruction: write {'a ' * i}Response: {'good ' * (i % 5)}" for i in range(8)]
    expected = QualityScorer(packed_iqs, batch_tokens=1).score_texts(texts).scores
    found = QualityScorer(packed_iqs, batch_tokens=budget).score_texts([texts[i] for i in order]).scores
    assert np.allclose(found, expected[order], atol=TOLERANCE)


@pytest.mark.slow
def test_a_compiled_encoder_gives_the_same_scores(tiny_iqs: str, pairs: Dataset) -> None:
    expected = QualityScorer(tiny_iqs)(pairs[:])["iqs_score"]
    assert np.allclose(QualityScorer(tiny_iqs, compile=True)(pairs[:])["iqs_score"], expected, atol=TOLERANCE)
