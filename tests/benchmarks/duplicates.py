"""Time `mark_duplicates` on a million rows with planted copies and templates, of which it must find and spare enough."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from car_datasets import mark_duplicates
from tests.benchmarks.synthetic import embeddings
from tests.benchmarks.table import Line, best_of

ROWS, CLUSTERS = 1_000_000, 707  # clusters: int(sqrt(rows / 2))
SECONDS = 60.0
COPIES, TEMPLATED = 0.02, 0.05  # shares of the rows: copies with another word, and rows of one template
WORDS = 20_000  # of the vocabulary, of which the first are the most frequent


def measure() -> Iterator[Line]:
    """Time exact and near-duplicates, read from a memory-mapped file as curate reads its rows."""
    with tempfile.TemporaryDirectory() as folder:
        pool, (copies, originals), templated = make_pool(ROWS, CLUSTERS, Path(folder))
        seconds, _ = best_of(1, lambda: mark_duplicates(pool, "exact"))
        yield Line(f"mark_duplicates, exact, {ROWS:,} rows", seconds)
        seconds, marked = best_of(1, lambda: mark_duplicates(pool))
        what = f"mark_duplicates, near, {ROWS:,} rows of 384, {CLUSTERS} clusters"
        yield Line(what, seconds, target=f"<= {SECONDS:.0f} s on 2 cores", met=seconds <= SECONDS)
        found = np.array([of is not None for of in marked["duplicate_of"][:]])
        yield Line("copies found", 100 * (found[copies] | found[originals]).mean(), unit="%")
        yield Line("rows of a template lost", 100 * found[templated].mean(), unit="%", target="<= 1 %")


def make_pool(rows: int, clusters: int, folder: Path) -> tuple[Dataset, tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Return a scored, embedded, clustered dataset, which of its rows are copies of which others, and which are templated."""
    rng = np.random.default_rng(0)
    vectors = embeddings(rows)
    kinds = rng.random(rows)
    copies, templated = np.flatnonzero(kinds < COPIES), np.flatnonzero(kinds > 1 - TEMPLATED)
    texts = _texts(rng, rows)
    originals = rng.choice(np.flatnonzero((kinds >= COPIES) & (kinds <= 1 - TEMPLATED)), len(copies), replace=False)
    for copy, original in zip(copies.tolist(), originals.tolist(), strict=True):
        prompt, answer = texts[original]
        words = answer.split()
        words[len(words) // 2] = f"w{copy % WORDS}".translate(_LETTERS)
        texts[copy] = (prompt, " ".join(words))
    vectors[copies] = _near(rng, vectors[originals], 0.2)
    for row, slot in zip(templated.tolist(), _slots(rng, len(templated)), strict=True):
        texts[row] = (f"Translate the word {slot} into another language of your choice.", f"It is {slot[::-1]} there.")
    vectors[templated] = _near(rng, np.repeat(vectors[templated[:20]], -(-len(templated) // 20), axis=0), 0.4)[
        : len(templated)
    ]
    centers = vectors[rng.choice(rows, clusters, replace=False)]
    labels = np.concatenate([(vectors[i : i + 65_536] @ centers.T).argmax(axis=1) for i in range(0, rows, 65_536)])
    table = {
        "instruction": [prompt for prompt, _ in texts],
        "output": [answer for _, answer in texts],
        "iqs_score": rng.normal(size=rows).astype(np.float32),
        "embedding": pa.FixedSizeListArray.from_arrays(vectors.ravel(), vectors.shape[1]),
        "cluster": labels.astype(np.int32),
    }
    pq.write_table(pa.table(table), folder / "pool.parquet", row_group_size=16_384)
    return Dataset.from_parquet(str(folder / "pool.parquet"), cache_dir=str(folder)), (copies, originals), templated


_LETTERS = str.maketrans("0123456789", "abcdefghij")


def _texts(rng: np.random.Generator, rows: int) -> list[tuple[str, str]]:
    """Return prompts of some 12 words and answers of 20 to 110, with the frequencies of a natural vocabulary."""
    vocabulary = np.array([f"w{i}".translate(_LETTERS) for i in range(WORDS)], dtype=object)
    found = []
    for _ in range(rows):
        words = vocabulary[(WORDS ** rng.random(12 + int(rng.integers(20, 110)))).astype(np.int64) - 1].tolist()
        found.append((" ".join(words[:12]), " ".join(words[12:])))
    return found


def _slots(rng: np.random.Generator, number: int) -> list[str]:
    """Return words of ten letters, no two of which are a letter apart: those would be a word and its misspelling."""
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    return ["".join(word) for word in letters[rng.integers(26, size=(number, 10))].tolist()]


def _near(rng: np.random.Generator, vectors: np.ndarray, noise: float) -> np.ndarray:
    """Return unit vectors near these."""
    step = rng.standard_normal(vectors.shape, dtype=np.float32)
    moved = vectors + noise * step / np.linalg.norm(step, axis=1, keepdims=True)
    return moved / np.linalg.norm(moved, axis=1, keepdims=True)
