"""Measure one GPU in a run of under eight minutes: `python -m tests.benchmarks gpu --json FILE`.

XLM-RoBERTa-large and MiniLM shapes on the rows at hand; the large one has random weights, which take the same time. Every
figure comes with a reference of the same run. Where there is no GPU this measures nothing, and says so.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars

from car_datasets import IQSConfig, IQSModel, QualityScorer
from car_datasets.scoring.batching import padding_waste, tokenise
from car_datasets.scoring.inference import LoadedScorer, load_scorer
from car_datasets.scoring.iqs.packing import can_pack
from car_datasets.scoring.stage import add_columns
from car_datasets.utils import revisions
from tests.benchmarks.encoding import flop
from tests.benchmarks.gpu_clustering import clustering
from tests.benchmarks.table import Line
from tests.benchmarks.texts import rows, texts

LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
BUDGETS = (8_192, 16_384, 32_768, 65_536)
FEW = 4_000  # texts of a single timing
DEVICE = torch.device("cuda", 0)


def measure(shape: dict[str, int] = LARGE, few: int = FEW) -> Iterator[Line]:
    """Measure G1 to G7 of the targets, as far as one GPU can."""
    if not torch.cuda.is_available():
        print("gpu: not measured, there is no GPU here.", file=sys.stderr)
        return
    disable_progress_bars()
    kind, found = texts()
    limit = matmul_rate()
    yield Line("bf16 matrix product, 8192 cubed", limit, unit="TFLOP/s")
    yield from attention_alone()
    with tempfile.TemporaryDirectory() as folder:
        save_large(Path(folder) / "large", shape)
        yield from large(str(Path(folder) / "large"), kind, found[:few], limit)
    yield from minilm(kind)
    yield from clustering()


def timed(function: Callable[[], Any], runs: int = 2) -> tuple[float, Any]:
    """Return the least seconds until the GPU has done all of it, after a call that warms it up."""
    function()
    seconds, result = [], None
    for _ in range(runs):
        _wait()
        start = time.perf_counter()
        result = function()
        _wait()
        seconds.append(time.perf_counter() - start)
    return min(seconds), result


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def matmul_rate(size: int = 8192, runs: int = 30) -> float:
    """Return the TFLOP/s of a bf16 matrix product."""
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    seconds, _ = timed(lambda: [torch.mm(a, b) for _ in range(runs)])
    return 2 * size**3 * runs / seconds / 1e12


def attention_alone() -> Iterator[Line]:
    """Compare torch's variable-length attention with its padded one, on texts of one length."""
    from torch.nn.attention.varlen import varlen_attn

    tokens = 65_536
    for heads, size in ((16, 64), (12, 32)):
        for length in (100, 200, 512):
            count = tokens // length
            packed = [torch.randn(count * length, heads, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(3)]
            padded = [part.view(count, length, heads, size).transpose(1, 2) for part in packed]
            bounds = torch.arange(0, (count + 1) * length, length, device=DEVICE, dtype=torch.int32)
            ours, _ = timed(lambda p=packed, b=bounds: [varlen_attn(*p, b, b, 512, 512) for _ in range(10)])
            theirs, _ = timed(
                lambda p=padded: [torch.nn.functional.scaled_dot_product_attention(*p) for _ in range(10)]
            )
            yield Line(
                f"varlen_attn, {heads} heads of {size}, {length} tokens; compared with padded SDPA", ours, theirs
            )


def save_large(folder: Path, shape: dict[str, int]) -> None:
    """Return a random IQS model of XLM-RoBERTa-large's shape that reads MiniLM's tokens."""
    from transformers import AutoTokenizer, XLMRobertaConfig

    encoder = XLMRobertaConfig(
        vocab_size=250_002, max_position_embeddings=514, type_vocab_size=1, pad_token_id=0, **shape
    )
    torch.manual_seed(0)
    model = IQSModel(IQSConfig(encoder_config=encoder, template="clean-1"))
    torch.nn.init.normal_(model.layers.weight, std=0.1)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(revisions.default_encoder_folder())
    tokenizer.model_max_length = 510
    tokenizer.save_pretrained(folder)
    tokenizer.save_pretrained(folder / "encoder")
    model.encoder.save_pretrained(folder / "encoder")


def _load(folder: str, dtype: str, compiled: bool = False) -> LoadedScorer:
    return QualityScorer(folder, dtype=dtype, compile=compiled).load(DEVICE)


def large(folder: str, kind: str, found: Sequence[str], limit: float) -> Iterator[Line]:
    """Measure the published model's shape: budgets, packing, compiling, and sentence-transformers on the same texts."""
    loaded = _load(folder, "bfloat16")
    config = loaded.model.config.encoder_config
    lengths = [len(ids) for ids in tokenise(loaded.tokenizer, found, 510).ids]
    work = flop(lengths, config) / 1e12
    for budget in BUDGETS:
        seconds, _ = timed(lambda b=budget: loaded.score_texts(found, b))
        how = "packed" if loaded.packed else "padded"
        what = f"large, bf16, {how}, {budget:,} tokens a batch ({sum(lengths) / seconds:,.0f} tokens/s)"
        yield Line(what, work / seconds, limit, "TFLOP/s")
    seconds, half = timed(lambda: loaded.score_texts(found))
    busy = gpu_busy(lambda: loaded.score_texts(found))
    yield Line("GPU busy while it scores", busy, unit="of the time", target=">= 0.9", met=busy >= 0.9)
    yield from _in_arrow(folder, kind, limit, config)
    yield from _compiled(folder, found, work, limit)
    yield from _compare_with_sentence_transformers(folder, found, seconds)
    load_scorer.cache_clear()
    yield from _compared_with_float32(folder, found, seconds, half.scores)


def _in_arrow(folder: str, kind: str, limit: float, config: Any) -> Iterator[Line]:
    dataset = Dataset.from_list(rows()[1])
    scorer = QualityScorer(folder, dtype="bfloat16", diagnostics=True)
    start = time.perf_counter()
    scored = add_columns(dataset, scorer, "Scoring")
    seconds = time.perf_counter() - start
    lengths = [min(n, 510) for n in scored["iqs_tokens"][:]]
    rate = flop(lengths, config) / seconds / 1e12
    what = (
        f"G1: score {len(dataset):,} {kind}, large, bf16, Arrow in, Arrow out ({sum(lengths) / seconds:,.0f} tokens/s)"
    )
    yield Line(what, rate, limit, "TFLOP/s", ">= 0.5", rate >= 0.5 * limit)


def _compiled(folder: str, found: Sequence[str], work: float, limit: float) -> Iterator[Line]:
    loaded = _load(folder, "bfloat16", compiled=True)
    seconds, _ = timed(lambda: loaded.score_texts(found))
    yield Line("large, bf16, compiled", work / seconds, limit, "TFLOP/s")


def _compare_with_sentence_transformers(folder: str, found: Sequence[str], ours: float) -> Iterator[Line]:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    transformer = modules.Transformer(f"{folder}/encoder", max_seq_length=510, model_kwargs={"dtype": torch.bfloat16})
    pooling = modules.Pooling(transformer.get_embedding_dimension(), "mean")
    sentences = SentenceTransformer(modules=[transformer, pooling], device=str(DEVICE))
    times = {}
    for batch in (32, 64, 128, 256, 512):
        times[batch], _ = timed(lambda b=batch: sentences.encode(list(found), batch_size=b), 1)
    best = min(times, key=lambda batch: times[batch])
    what = f"G2: {len(found):,} texts, large, bf16; compared with sentence-transformers' best batch ({best})"
    yield Line(what, ours, times[best], target="<= 1/1.5", met=ours <= times[best] / 1.5)


def _compared_with_float32(folder: str, found: Sequence[str], ours: float, half: np.ndarray) -> Iterator[Line]:
    from scipy.stats import spearmanr

    loaded = _load(folder, "float32")
    order = np.argsort([len(text) for text in found])

    def sixteen() -> np.ndarray:
        scores = np.empty(len(found))
        with torch.inference_mode():
            for start in range(0, len(order), 16):
                at = order[start : start + 16]
                batch = loaded.tokenizer(
                    [found[i] for i in at], padding=True, truncation=True, max_length=510, return_tensors="pt"
                ).to(DEVICE)
                scores[at] = loaded.model(batch["input_ids"], batch["attention_mask"]).logits[:, 0].cpu().numpy()
        return scores

    seconds, scores = timed(sixteen, 1)
    what = f"G3: {len(found):,} texts, large, bf16; compared with the original's settings, float32 and 16 rows"
    yield Line(what, ours, seconds, target="<= 1/8", met=ours <= seconds / 8)
    agreement = float(spearmanr(half, scores).statistic)
    top = len(found) // 10
    overlap = len(set(np.argsort(-half)[:top]) & set(np.argsort(-scores)[:top])) / top
    yield Line(
        "G7: Spearman of bf16 and float32 scores, large, random", agreement, None, "", ">= 0.9995", agreement >= 0.9995
    )
    yield Line("G7: overlap of their best tenths", overlap, None, "", ">= 0.99", overlap >= 0.99)
    load_scorer.cache_clear()


def minilm(kind: str) -> Iterator[Line]:
    """Compare the embedded scorer in bf16 with float32, and with the tokenizer alone."""
    from scipy.stats import spearmanr

    found = texts()[1]
    exact, fast = QualityScorer(), QualityScorer(dtype="bfloat16")
    slow_seconds, slow = timed(lambda: exact.score_texts(found), 1)
    seconds, half = timed(lambda: fast.score_texts(found))
    packed = can_pack(fast._config().encoder_config, "bfloat16", DEVICE)
    yield Line(
        f"MiniLM, bf16, packed: {packed}, {len(found):,} {kind}; compared with float32, padded", seconds, slow_seconds
    )
    agreement = float(spearmanr(half.scores, slow.scores).statistic)
    yield Line(
        "G7: Spearman of bf16 and float32 scores, the embedded scorer",
        agreement,
        None,
        "",
        ">= 0.9995",
        agreement >= 0.9995,
    )
    loaded = fast.load(DEVICE)
    tokenising, tokens = timed(lambda: tokenise(loaded.tokenizer, found, 512))
    what = f"G5: MiniLM, text to score; compared with the tokenizer alone ({sum(tokens.lengths) / tokenising:,.0f} tokens/s)"
    yield Line(what, seconds, tokenising, target="<= 1/0.8", met=seconds <= tokenising / 0.8)
    waste = padding_waste([len(ids) for ids in tokens.ids], 32_768)
    yield Line("padding that sorted batches of 32,768 tokens would have", waste, unit="of the tokens")


def gpu_busy(function: Callable[[], Any]) -> float:
    """Return the share of wall time in which a kernel runs."""
    from torch.profiler import ProfilerActivity, profile

    function()
    _wait()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        start = time.perf_counter()
        function()
        _wait()
        seconds = time.perf_counter() - start
    return sum(event.self_device_time_total for event in found.key_averages()) / 1e6 / seconds
