"""Selection over a stream equals selection of the whole, whatever the batches."""

from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from car_datasets import ClusterModel, QualityScorer, TextEmbedder, select_car, select_car_streaming
from car_datasets.scoring.stage import add_columns

ROWS = 300


def pool(seed: int, ties: bool = False, missing: bool = False) -> Dataset:
    rng = np.random.default_rng(seed)
    scores: list[Any] = (rng.integers(0, 9, ROWS) if ties else rng.normal(size=ROWS)).astype(np.float32).tolist()
    clusters: list[Any] = rng.integers(0, 7, ROWS).tolist()
    if missing:
        scores[::7] = [None] * len(scores[::7])
        clusters[::11] = [None] * len(clusters[::11])
    texts = [f"row {i}" for i in range(ROWS)]
    return Dataset.from_dict({"instruction": texts, "iqs_score": scores, "cluster": clusters})


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 99),
    n1=st.integers(0, 60),
    n2=st.integers(0, 5),
    batch_size=st.sampled_from([1, 7, 50, 1000]),
    ties=st.booleans(),
    missing=st.booleans(),
    shards=st.sampled_from([1, 4]),
)
def test_a_stream_gives_the_selection_of_the_whole(
    seed: int, n1: int, n2: int, batch_size: int, ties: bool, missing: bool, shards: int
) -> None:
    if n1 + n2 == 0:
        n1 = 1
    whole = pool(seed, ties, missing)
    expected = select_car(whole, n1, n2, allow_worse=True)
    stream = whole.to_iterable_dataset(num_shards=shards)
    found = select_car_streaming(stream, n1=n1, n2=n2, batch_size=batch_size, allow_worse=True)
    assert found.to_dict() == expected.to_dict()


@pytest.mark.parametrize("options", [{}, {"cluster_column": "group"}], ids=["name of the model", "name given"])
def test_rows_are_clustered_on_the_way(options: dict[str, str]) -> None:
    rng = np.random.default_rng(0)
    whole = (
        pool(1).remove_columns("cluster").add_column("embedding", list(rng.normal(size=(ROWS, 8)).astype(np.float32)))
    )
    clusters = ClusterModel.fit(whole.select(range(100)), k=5, output_column="group", distance_column="far")
    expected = select_car(clusters.label(whole), 20, 3, cluster_column="group")
    found = select_car_streaming(whole.to_iterable_dataset(), clusters, n1=20, n2=3, batch_size=64, **options)
    assert found.remove_columns("embedding").to_dict() == expected.remove_columns("embedding").to_dict()


def test_a_mapped_stream_with_a_row_that_cannot_be_scored(tiny_iqs: str, tiny_embedder: str) -> None:
    rows = [
        {"instruction": "write", "input": None if i % 3 else "a", "output": None if i == 2 else "good " * i}
        for i in range(30)
    ]
    whole = Dataset.from_list(rows)
    scorer = QualityScorer(tiny_iqs, on_invalid="mark")
    embedder = TextEmbedder(tiny_embedder, on_invalid="mark")
    scored = add_columns(add_columns(whole, scorer, "Scoring"), embedder, "Embedding")
    clusters = ClusterModel.fit(scored, k=4)
    stream = (
        whole.to_iterable_dataset().map(scorer, batched=True, batch_size=1).map(embedder, batched=True, batch_size=1)
    )
    expected = select_car(clusters.label(scored), 6, 2, allow_worse=True)
    for batch_size in (4, 100):
        found = select_car_streaming(stream, clusters, n1=6, n2=2, batch_size=batch_size, allow_worse=True)
        assert found["source_index"][:] == expected["source_index"][:]
        assert found["selected_by"][:] == expected["selected_by"][:]
    taken = stream.map(lambda batch: {"cluster_distance": [0.0] * len(batch["output"])}, batched=True)
    with pytest.raises(ValueError, match="cluster_distance"):
        select_car_streaming(taken, clusters, n1=6, n2=2)


def test_memory_holds_what_can_be_chosen_and_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    from car_datasets.selection import rule, streaming

    sizes = []
    ordinary = rule.choose

    def watched(scores: Any, *rest: Any) -> Any:
        sizes.append(len(scores))
        return ordinary(scores, *rest)

    monkeypatch.setattr(streaming, "choose", watched)
    select_car_streaming(pool(2).to_iterable_dataset(), n1=10, n2=2, batch_size=20)
    assert len(sizes) == ROWS / 20 + 1
    assert max(sizes) <= 10 + 2 * 7 + 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n1": 0.1}, "n1=0.1"),
        ({"n1": -1}, "n1=-1"),
        ({"n1": 0, "n2": 0}, "n1=0, n2=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"n1": 301}, "the 300 rows"),
        ({"score_column": "quality"}, "quality"),
        ({"n1": 0, "n2": 300, "cluster_column": "iqs_score"}, "iqs_score"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_car_streaming(pool(3).to_iterable_dataset(), **{"n1": 10, **options})


def test_a_selection_worse_than_the_pool_is_refused() -> None:
    whole = pool(4)
    low = np.asarray(whole["iqs_score"][:])
    alone = np.where(low < np.quantile(low, 0.05), np.arange(ROWS), 1000).astype(np.int64)  # bad rows, each a cluster
    stream = whole.remove_columns("cluster").add_column("cluster", alone).to_iterable_dataset()
    with pytest.raises(ValueError, match="allow_worse"):
        select_car_streaming(stream, n1=0, n2=1)
    assert len(select_car_streaming(stream, n1=0, n2=1, allow_worse=True)) == 16


def test_an_empty_stream_is_refused() -> None:
    nothing = Dataset.from_dict({"iqs_score": [None], "cluster": [0]}).to_iterable_dataset()
    with pytest.raises(ValueError, match="no rows with a score"):
        select_car_streaming(nothing)
