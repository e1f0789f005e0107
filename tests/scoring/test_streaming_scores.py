"""`stream.map(QualityScorer())`: scores as in memory, each row once, in the order of its shard, however it is dealt out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader

from car_datasets import QualityScorer, score_in_shards
from car_datasets.scoring.stage import add_columns
from tests.workers import WORKERS

ROWS, SHARDS = 60, 4
ANSWERS = ["Red, green and blue.", "The sea is wide.", "6", "a, b, c", "Bad."]


@pytest.fixture(scope="module")
def whole() -> Dataset:
    """Return 60 rows with their numbers; as a stream, four shards of 15."""
    texts = [(f"Write a list of {i} colours.", ANSWERS[i % 5] * (1 + i % 3), i) for i in range(ROWS)]
    names = ("instruction", "output", "source_index")
    return Dataset.from_dict(dict(zip(names, map(list, zip(*texts, strict=True)), strict=True)))


@pytest.fixture(scope="module")
def expected(whole: Dataset, tiny_iqs: str) -> Any:
    return np.array(add_columns(whole, QualityScorer(tiny_iqs), "Scoring")["iqs_score"][:])


def scored_stream(whole: Dataset, model: str, batch_size: int = 7) -> IterableDataset:
    return whole.to_iterable_dataset(num_shards=SHARDS).map(QualityScorer(model), batched=True, batch_size=batch_size)


def check(*parts: list[dict[str, Any]], expected: Any) -> None:
    """Assert that every row is there once, and the rows of a shard in order in each part."""
    rows = [row for part in parts for row in part]
    places = [row["source_index"] for row in rows]
    assert sorted(places) == list(range(ROWS))
    assert np.allclose([row["iqs_score"] for row in rows], expected[places], atol=1e-5)
    for part in parts:
        for shard in range(SHARDS):
            own = [row["source_index"] for row in part if row["source_index"] // 15 == shard]
            assert own == sorted(own)


@pytest.mark.parametrize("batch_size", [1, 7, 15, 1000])
def test_a_mapped_stream_is_as_in_memory(whole: Dataset, tiny_iqs: str, expected: Any, batch_size: int) -> None:
    rows = list(scored_stream(whole, tiny_iqs, batch_size))
    check(rows, expected=expected)
    assert [row["source_index"] for row in rows] == list(range(ROWS))
    assert list(rows[0]) == ["instruction", "output", "source_index", "iqs_score"]


def test_rows_are_numbered_if_asked(whole: Dataset, tiny_iqs: str, expected: Any) -> None:
    stream = whole.remove_columns("source_index").to_iterable_dataset(num_shards=SHARDS)
    stream = stream.map(lambda row, i: {"source_index": i}, with_indices=True)
    check(list(stream.map(QualityScorer(tiny_iqs), batched=True)), expected=expected)


@pytest.mark.parametrize("nodes", [2, 3, 4])  # of four shards 3 is no factor: there rows are dealt out one by one
@pytest.mark.parametrize("first", ["split", "map"])
def test_split_by_node(whole: Dataset, tiny_iqs: str, expected: Any, nodes: int, first: str) -> None:
    parts = []
    for rank in range(nodes):
        if first == "map":
            part = split_dataset_by_node(scored_stream(whole, tiny_iqs), rank, nodes)
        else:
            part = split_dataset_by_node(whole.to_iterable_dataset(num_shards=SHARDS), rank, nodes)
            part = part.map(QualityScorer(tiny_iqs), batched=True, batch_size=7)
        parts.append(list(part))
    check(*parts, expected=expected)


def test_nodes_with_folders_of_their_own(whole: Dataset, tiny_iqs: str, expected: Any, tmp_path: Path) -> None:
    parts = [split_dataset_by_node(whole.to_iterable_dataset(num_shards=SHARDS), rank, 2) for rank in (0, 1)]
    found = [
        score_in_shards(part, QualityScorer(tiny_iqs), tmp_path / str(rank), shard_rows=8)
        for rank, part in enumerate(parts)
    ]
    check(*map(list, found), expected=expected)
    with pytest.raises(ValueError, match="belongs to another run: content"):
        score_in_shards(parts[1], QualityScorer(tiny_iqs), tmp_path / "0", shard_rows=8)


def test_under_a_data_loader_with_two_workers(whole: Dataset, tiny_iqs: str, expected: Any) -> None:
    stream = scored_stream(whole, tiny_iqs)
    loader = DataLoader(stream, batch_size=None, num_workers=2, multiprocessing_context=WORKERS)
    rows = list(loader)
    check(rows, expected=expected)
    assert [row["source_index"] for row in rows[:4]] == [0, 15, 1, 16]  # a shard of each worker, in turns


def test_a_data_loader_that_forks_after_torch_ran_says_what_to_do(whole: Dataset, tiny_iqs: str) -> None:
    QualityScorer(tiny_iqs).score_texts(["Instruction: a Response: b"])
    loader = DataLoader(scored_stream(whole, tiny_iqs), num_workers=1, batch_size=None, multiprocessing_context="fork")
    with pytest.raises(ValueError, match=r"multiprocessing_context=.spawn"):
        list(loader)
