"""Time how embeddings get into a dataset and out again: as Arrow's fixed-size lists, compared with lists of Python numbers."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value

from car_datasets.utils.columns import join_columns, read_embeddings
from tests.benchmarks.table import Line, best_of

ROWS, SIZE = 20_000, 384


def measure() -> Iterator[Line]:
    """Measure W1 of the targets, and the way back."""
    vectors = np.random.default_rng(0).normal(size=(ROWS, SIZE)).astype(np.float32)
    dataset = Dataset.from_dict({"text": ["an instruction and its answer, of some length " * 10] * ROWS})

    def naive(batch: Mapping[str, Any], places: list[int]) -> dict[str, Any]:
        return {"embedding": vectors[places].tolist()}

    def ours(batch: Mapping[str, Any], places: list[int]) -> dict[str, Any]:
        return {"embedding": vectors[places]}

    # A given fingerprint: else the hash of the vectors, which these functions hold and a model would not, is timed too.
    how: dict[str, Any] = {"batched": True, "with_indices": True, "load_from_cache_file": False}
    how["new_fingerprint"] = "0123456789abcdef"
    with tempfile.TemporaryDirectory() as folder:
        dataset.save_to_disk(folder)
        dataset = Dataset.load_from_disk(folder)
        slow, written = best_of(1, lambda: dataset.map(naive, **how))
        features = Features({"embedding": List(Value("float32"), length=SIZE)})
        fast, found = best_of(
            3, lambda: join_columns(dataset, dataset.map(ours, features=features, remove_columns="text", **how))
        )
        if not np.array_equal(read_embeddings(found, "embedding")[0], vectors):
            raise AssertionError("what was written is not what was read")
        what = f"W1: {ROWS:,} embeddings of {SIZE} numbers added to a dataset; compared with .map giving lists"
        yield Line(what, fast, slow, target="<= 1/10", met=fast <= slow / 10)
        column, _ = best_of(3, lambda: np.asarray(written["embedding"][:]))
        back, _ = best_of(3, lambda: read_embeddings(found, "embedding"))
        yield Line("read them back as one matrix; compared with dataset['embedding']", back, column)
