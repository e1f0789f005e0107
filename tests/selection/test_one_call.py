"""`cluster_filter` equals clustering and selecting in turn; a stream gives the selection of the same rows in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from car_datasets import ClusterModel, QualityScorer, TextEmbedder, cluster_filter, select_car, select_car_streaming
from car_datasets.scoring.stage import add_columns
from car_datasets.utils.columns import read_embeddings
from tests.clustering.test_model import dataset_of, vectors

ROWS = 300

# cluster_filter -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored() -> Dataset:
    """Return 200 rows, some without a score, some without an embedding."""
    rows: list[Any] = [None if i % 41 == 7 else row for i, row in enumerate(vectors(200, seed=2))]
    scores = np.random.default_rng(3).integers(0, 90, 200) / 8
    return dataset_of(rows, iqs_score=[None if i % 37 == 5 else float(s) for i, s in enumerate(scores)], id=range(200))


def filtered(dataset: Dataset, **options: Any) -> Dataset:
    options = {"num_rows": len(dataset), **options}
    return dataset.filter(cluster_filter, batched=True, batch_size=None, fn_kwargs=options)


OPTIONS: list[dict[str, Any]] = [
    {"n1": 20},
    {"n1": 0.1, "n2": 2, "k": 6, "seed": 1},
    {"budget": 40, "k": 15, "explained_variance": 0.6, "n_init": 3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_cluster_filter_is_cluster_and_select_in_one(scored: Dataset, options: dict[str, Any]) -> None:
    fitting = {name: options[name] for name in ("k", "seed", "explained_variance", "n_init") if name in options}
    labelled = ClusterModel.fit(scored, **fitting).label(scored)
    expected = select_car(labelled, options.get("n1"), options.get("n2", 1), budget=options.get("budget"))
    chosen = cluster_filter(scored, **options)
    assert chosen.features == expected.features
    assert chosen[:] == expected[:]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_filter_keeps_the_rows_that_the_function_selects(scored: Dataset, options: dict[str, Any]) -> None:
    kept = filtered(scored, **options)
    assert kept.features == scored.features
    assert kept["id"][:] == sorted(cluster_filter(scored, **options)["id"])


@pytest.mark.parametrize("kind", ["arrow", "numpy", "torch", "pandas"])
def test_filter_in_any_format(scored: Dataset, kind: str) -> None:
    whole = scored.filter(lambda row: row["iqs_score"] is not None and row["embedding"] is not None)
    assert filtered(whole.with_format(kind), n1=9).with_format(None)["id"][:] == filtered(whole, n1=9)["id"][:]


def test_cluster_filter_with_other_column_names(scored: Dataset) -> None:
    renamed = scored.rename_columns({"iqs_score": "quality", "embedding": "vector"})
    names = {"score_column": "quality", "embedding_column": "vector"}
    assert cluster_filter(renamed, n1=9, **names)["id"][:] == cluster_filter(scored, n1=9)["id"][:]
    assert filtered(renamed, n1=9, **names)["id"][:] == filtered(scored, n1=9)["id"][:]


@pytest.mark.parametrize(
    ("batch_size", "options"),
    [(None, {}), (None, {"num_rows": 199}), (100, {"num_rows": 200}), (100, {})],
    ids=["no num_rows", "another num_rows", "batches", "batches, no num_rows"],
)
def test_filter_refuses_to_see_less_than_the_whole(scored: Dataset, batch_size: int | None, options: Any) -> None:
    with pytest.raises(ValueError, match=r"a batch of \d+ rows with num_rows=.*must see the entire dataset at once"):
        scored.filter(cluster_filter, batched=True, batch_size=batch_size, fn_kwargs={"n1": 9, **options})


@pytest.mark.parametrize("run", [cluster_filter, filtered], ids=["function", "filter"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n1": 201}, "n1=201 must be between 0 and the"),
        ({"n1": 5, "n2": -1}, "n2=-1 must be between 0 and the"),
        ({"budget": 1}, "budget=1 must be between the"),
        ({"n1": 5, "k": 1000}, "k=1000 must be 'sqrt' or"),
        ({"n1": 0, "n2": 0}, "select no rows"),
        ({"n1": 5, "embedding_column": "id"}, "'id' holds int64, not lists of numbers"),
    ],
    ids=str,
)
def test_cluster_filter_refuses(scored: Dataset, run: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(scored, **options)


@pytest.mark.parametrize("run", [cluster_filter, filtered], ids=["function", "filter"])
def test_cluster_filter_refuses_a_selection_worse_than_the_pool(run: Any) -> None:
    rows = np.concatenate([vectors(30) + 50, vectors(3)])
    data = dataset_of(rows, iqs_score=[5.0] * 30 + [1.0] * 3)
    with pytest.raises(ValueError, match=r"mean score 3\.0000 is below the pool's 4\.6364"):
        run(data, n1=0, k=2)
    assert sorted(run(data, n1=0, k=2, allow_worse=True)["iqs_score"]) == [1.0, 5.0]


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda d: d.remove_columns("iqs_score"), {"n1": 2}, "iqs_score"),
        (lambda d: d.add_column("selected_by", ["x"] * 9), {"n1": 2}, "selected_by"),
        (lambda d: d.add_column("cluster", [0] * 9), {"n1": 2}, "cluster"),
        (lambda d: d, {"n1": 10}, "n1=10"),
        (lambda d: d, {"n1": 2, "n2": -1}, "n2=-1"),
        (lambda d: d, {"budget": 10}, "budget=10"),
    ],
    ids=["no score", "selected_by taken", "cluster taken", "n1", "n2", "budget"],
)
def test_cheap_mistakes_are_named_before_the_clustering(change: Any, options: dict[str, Any], message: str) -> None:
    """Pass rows that the fit refuses, which show which check comes first."""
    data = change(dataset_of([[float("nan"), 1.0]] * 9, iqs_score=np.arange(9.0)))
    with pytest.raises(ValueError, match=message):
        cluster_filter(data, **options)


def test_filter_names_a_missing_column(scored: Dataset) -> None:
    with pytest.raises(ValueError, match=r"no column .*iqs_score"):
        filtered(scored.remove_columns("iqs_score"), n1=9)


def test_labels_of_the_fit_are_those_of_the_saved_embeddings(scored: Dataset, tmp_path: Path) -> None:
    """Save the rows in between, as another process would read them; the selection is the same."""
    ClusterModel.fit(scored).save_pretrained(tmp_path / "clusters")
    scored.to_parquet(tmp_path / "scored.parquet")
    again = Dataset.from_parquet(str(tmp_path / "scored.parquet"), cache_dir=str(tmp_path / "cache"))
    matrix, present = read_embeddings(again, "embedding")
    assert (len(matrix), len(present)) == (195, 195)
    labelled = ClusterModel.from_pretrained(tmp_path / "clusters").label(again)
    assert select_car(labelled, 20)[:] == cluster_filter(scored, n1=20)[:]


# select_car_streaming -------------------------------------------------------------------------------------------------


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
    from car_datasets.selection import one_call, rule

    sizes = []
    ordinary = rule.choose

    def watched(scores: Any, *rest: Any) -> Any:
        sizes.append(len(scores))
        return ordinary(scores, *rest)

    monkeypatch.setattr(one_call, "choose", watched)
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
