"""packing.py and packed_encoder.py: packed texts have the scores of padded ones, whatever their neighbours are.

On the CPU each text is attended to in turn; where there is a GPU, one test also runs its own kernel.
"""

import itertools
import logging
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
from car_datasets.scoring.iqs import packing
from car_datasets.scoring.iqs.packed_encoder import PackedEncoder, can_pack
from car_datasets.scoring.iqs.packing import pack
from tests.conftest import tiny_encoder_config

TOLERANCE = 1e-5
CPU = torch.device("cpu")
# The third text spells out both configurations' padding tokens, and with 300 tokens in all they take two blocks.
IDS = [
    [2, 9, 10, 11, 12, 3],
    [2, 30, 3],
    [2, 40, 41, 0, 1, 44, 45, 46, 47, 3],
    [2, 3],
    *([2, *(4 + (i * j) % 60 for j in range(1, 5 + 4 * i)), 3] for i in range(1, 10)),
]
EQUAL = [[2, 9 + i, 20 + i, 40 - i, 3] for i in range(6)]


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
@pytest.mark.parametrize("layer", [None, 0, 2])
@pytest.mark.parametrize("pooling", ["avg", "cls", "max"])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("ids", [IDS, EQUAL], ids=["different", "equal"])
def test_packed_scores_and_states_equal_padded_ones(
    make_config: Any, layer: int | None, pooling: str, norm: bool, ids: list[list[int]]
) -> None:
    config = make_config()
    model = build(config, layer=layer, pooling=pooling, layer_norm=norm)
    input_ids, mask = pad(ids, config.pad_token_id, CPU)
    with torch.inference_mode():
        expected, states = model.member_scores(input_ids, mask)
        packed = pack(ids, config, 48, CPU)
        assert [part.tolist() for part in packed.padded_ids()] == [input_ids.tolist(), mask.tolist()]
        found, last = model.packed_scores(packed, PackedEncoder(model.encoder))
        grid = packed.spread(last.last())
    assert expected.std() > 50 * TOLERANCE or (pooling, layer) == ("cls", 0)  # all texts begin with the same token
    assert torch.allclose(found, expected, atol=TOLERANCE)
    assert torch.allclose(grid * mask.unsqueeze(-1), states[-1] * mask.unsqueeze(-1), atol=TOLERANCE)


@pytest.mark.parametrize("fork_layers", [0, 1, 2])
def test_packed_parts_equal_padded_ones(fork_layers: int) -> None:
    options = {"head": "parts", "hidden_sizes": (8,), "members": 2, "queries": 2, "fork_layers": fork_layers}
    model = build(tiny_encoder_config(), **options)
    starts = [min(2, len(ids) - 1) for ids in IDS]
    with torch.inference_mode():
        expected, states = model.columns(*pad(IDS, 0, CPU), torch.tensor(starts))
        packed = pack(IDS, model.config.encoder_config, 48, CPU, starts)
        found, running = model.packed_scores(packed, PackedEncoder(model.encoder))
        assert torch.allclose(found, expected, atol=TOLERANCE)
        last = packed.spread(running.last())  # the fork has read a lower state only
    mask = pad(IDS, 0, CPU)[1].unsqueeze(-1)
    assert torch.allclose(last * mask, states[-1] * mask, atol=TOLERANCE)


def scores(model: IQSModel, ids: list[list[int]]) -> torch.Tensor:
    config = model.config.encoder_config
    with torch.inference_mode():
        return model.packed_scores(pack(ids, config, 48, CPU), PackedEncoder(model.encoder))[0]


def test_a_text_does_not_see_its_neighbours() -> None:
    model = build(tiny_encoder_config())
    together, alone = scores(model, IDS), torch.cat([scores(model, [ids]) for ids in IDS])
    assert torch.allclose(together, alone, atol=TOLERANCE)
    assert torch.allclose(scores(model, IDS[::-1]).flip(0), together, atol=TOLERANCE)


def test_segments_sum_what_a_loop_sums() -> None:
    lengths, starts = [len(ids) for ids in IDS], [min(i, len(ids) - 1) for i, ids in enumerate(IDS)]
    packed = pack(IDS, tiny_encoder_config(), 48, CPU, starts)
    states = torch.randn(len(packed.input_ids), 3)
    halves = [n for length, start in zip(lengths, starts, strict=True) for n in (start, length - start)]
    ends = list(itertools.accumulate(halves, initial=0))
    expected = torch.stack([states[start:end].sum(dim=0) for start, end in itertools.pairwise(ends)])
    assert len(packed.input_ids) % packing.BLOCK == 0
    assert torch.allclose(packed.segments.sum(states, packed.segments.weights()), expected, atol=TOLERANCE)


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
        encoder = PackedEncoder(model.encoder)
        packed = model.packed_scores(pack(ids, config, 512, device), encoder)[0]
        alone = [model.packed_scores(pack([row], config, 512, device), encoder)[0] for row in ids[:8]]
    rounding = (padded - exact).abs().max()
    assert rounding < 0.25 * exact.std()
    assert (packed - exact).abs().max() < 2 * rounding
    assert (torch.cat(alone) - packed[:8]).abs().max() < rounding


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(range(8)), budget=st.sampled_from([1, 20, 60, 5000]))
def test_a_packed_score_does_not_depend_on_its_company(packed_iqs: str, order: list[int], budget: int) -> None:
    texts = [f"Instruction: write {'a ' * i}Response: {'good ' * (i % 5)}" for i in range(8)]
    expected = QualityScorer(packed_iqs, batch_tokens=1).score_texts(texts).scores
    found = QualityScorer(packed_iqs, batch_tokens=budget).score_texts([texts[i] for i in order]).scores
    assert np.allclose(found, expected[order], atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.usefixtures("on_cpu")
def test_a_compiled_scorer_scores_packed_texts_alike(packed_iqs: str, pairs: Dataset) -> None:
    expected = QualityScorer(packed_iqs)(pairs[:])["iqs_score"]
    scorer = QualityScorer(packed_iqs, compile=True)
    assert np.allclose(scorer(pairs[:])["iqs_score"], expected, atol=TOLERANCE)
    assert scorer.load().encoder.is_compiled


@pytest.mark.parametrize("works", [True, False])
def test_layers_are_compiled_once_and_run_without_it_if_that_fails(
    works: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, calls = build(tiny_encoder_config()), []
    encoder = PackedEncoder(model.encoder, compile_after=1e4)
    batches = [pack(ids, model.config.encoder_config, 48, CPU) for ids in (IDS, EQUAL, IDS[:3])]

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append(graph)
        if not works:
            raise NotImplementedError
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile_(function, backend=backend))
    with torch.inference_mode(), caplog.at_level(logging.INFO):
        expected = [model.packed_scores(batch, PackedEncoder(model.encoder))[0] for batch in batches]
        found = [model.packed_scores(batch, encoder)[0] for batch in batches]
    assert [torch.allclose(a, b, atol=TOLERANCE) for a, b in zip(found, expected, strict=True)] == [True] * 3
    assert (len(calls), encoder.is_compiled) == (1, works)  # one for all layers and sizes
    assert not caplog.records


def test_texts_that_overflow_are_scored_again_in_float32(
    on_cpu: None, tiny_iqs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"Instruction: write {'a ' * i}Response: good" for i in range(6)]
    expected = QualityScorer(tiny_iqs).score_texts(texts)
    half = QualityScorer(tiny_iqs, dtype="float16").load()
    forward = inference.LoadedScorer._forward

    def overflowing(self: Any, batch: Any, pooling: Any) -> Any:
        (members,) = forward(self, batch, pooling)
        return (torch.where(members > members.min(), members, torch.inf) if self.exact is not None else members,)

    monkeypatch.setattr(inference.LoadedScorer, "_forward", overflowing)
    found = half.score_texts(texts)
    assert np.isfinite(found.scores).all()
    assert (np.abs(found.scores - expected.scores) < 1e-6).sum() == 1  # that of the text that overflowed


@pytest.mark.slow
def test_a_compiled_encoder_gives_the_same_scores(tiny_iqs: str, pairs: Dataset) -> None:
    expected = QualityScorer(tiny_iqs)(pairs[:])["iqs_score"]
    assert np.allclose(QualityScorer(tiny_iqs, compile=True)(pairs[:])["iqs_score"], expected, atol=TOLERANCE)
