"""rule.py: the rule against a slow reference written from its definition, and what `select_car` does to a dataset."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from car_datasets import Recipe, select_car, select_car_streaming
from car_datasets.choosing import select_by
from car_datasets.selection.published import select_as_published
from car_datasets.selection.rule import choose, refuse_impossible, refuse_worse, shares_within
from car_datasets.utils.columns import read_numbers

NAN = math.nan
LEVELS = (
    -math.inf,
    -2.5,
    -0.0,
    0.0,
    0.1,
    0.5,
    3.0,
    math.inf,
    NAN,
)  # few values, so that ties are common; 0.1 is no float32
prove = settings(deadline=None, max_examples=150, derandomize=True)


def reference(scores: list[float], clusters: list[int], n1: int, n2: int) -> list[tuple[int, str, int, int]]:
    """Apply the rule in plain Python, and return (row, why, rank in the pool, rank in the cluster), best score first."""
    ranking = sorted((i for i, s in enumerate(scores) if not math.isnan(s)), key=lambda i: (-scores[i], i))
    members = {c: [i for i in ranking if clusters[i] == c] for c in set(clusters) if c >= 0}
    by_score = set(ranking[:n1])
    by_cluster = {i for rows in members.values() for i in rows[:n2]}
    chosen = []
    for i in ranking:
        if i in by_score | by_cluster:
            why = "both" if i in by_score & by_cluster else "score" if i in by_score else "cluster"
            chosen.append((i, why, ranking.index(i) + 1, members[clusters[i]].index(i) + 1 if clusters[i] >= 0 else 0))
    return chosen


def as_tuples(choice: Any) -> list[tuple[int, str, int, int]]:
    return list(zip(*(c if isinstance(c, list) else c.tolist() for c in choice), strict=True))


@st.composite
def pools(draw: st.DrawFn) -> tuple[list[float], list[int], int]:
    """Draw scores, clusters, and how many rows have a score."""
    rows = draw(st.lists(st.tuples(st.sampled_from(LEVELS), st.integers(-1, 5)), max_size=30))
    return [s for s, _ in rows], [c for _, c in rows], sum(not math.isnan(s) for s, _ in rows)


@prove
@given(pools(), st.data())
def test_choose_follows_the_rule(pool: tuple[list[float], list[int], int], data: st.DataObject) -> None:
    scores, clusters, scored = pool
    n1, n2 = data.draw(st.integers(0, scored)), data.draw(st.integers(0, scored))
    assert as_tuples(choose(scores, clusters, n1, n2)) == reference(scores, clusters, n1, n2)


@prove
@given(pools(), st.data())
def test_numbers_of_clusters_may_have_gaps(pool: tuple[list[float], list[int], int], data: st.DataObject) -> None:
    scores, clusters, scored = pool
    clusters = [c * data.draw(st.sampled_from([1, 10**12])) if c > 0 else c for c in clusters]  # names with gaps
    n1, n2 = data.draw(st.integers(0, scored)), data.draw(st.integers(0, scored))
    assert as_tuples(choose(scores, clusters, n1, n2)) == reference(scores, clusters, n1, n2)


@prove
@given(pools(), st.data())
def test_budget_gives_exactly_that_many_rows(pool: tuple[list[float], list[int], int], data: st.DataObject) -> None:
    scores, clusters, scored = pool
    n2 = data.draw(st.integers(0, scored))
    budget = data.draw(st.integers(len(reference(scores, clusters, 0, n2)), scored))
    fitting = [n1 for n1 in range(scored + 1) if len(reference(scores, clusters, n1, n2)) == budget]
    chosen = as_tuples(choose(scores, clusters, n2=n2, budget=budget))
    assert len(chosen) == budget
    assert chosen == reference(scores, clusters, fitting[0], n2)


@prove
@given(pools(), st.floats(0.001, 0.999))
def test_a_fraction_is_that_share_of_the_scored_rows(pool: tuple[list[float], list[int], int], share: float) -> None:
    scores, clusters, scored = pool
    if scored:
        rows = len(choose(scores, clusters, share, 0).positions)
        assert rows == 1 or abs(rows - share * scored) < 1


@pytest.mark.parametrize(("share", "rows"), [(0.05, 5), (0.29, 29), (0.57, 57), (0.001, 1), (0.999, 99)])
def test_a_fraction_of_100_rows(share: float, rows: int) -> None:
    assert len(choose(np.arange(100.0), np.zeros(100, int), share, 0).positions) == rows


@prove
@given(pools(), st.data())
def test_nothing_that_works_is_refused_early(pool: tuple[list[float], list[int], int], data: st.DataObject) -> None:
    scores, clusters, _ = pool
    scores = [0.0 if math.isnan(s) else s for s in scores]
    n1, n2 = data.draw(st.integers(0, 31)), data.draw(st.integers(0, 31))
    budget = data.draw(st.none() | st.integers(0, 31))
    given_n1 = n1 if budget is None else None
    try:
        possible = len(choose(scores, clusters, given_n1, n2, budget).positions) > 0
    except ValueError:
        possible = False
    if possible:
        refuse_impossible(len(scores), len({c for c in clusters if c >= 0}), given_n1, n2, budget)


@pytest.mark.parametrize(
    ("n1", "n2", "budget", "message"),
    [
        (-1, 1, None, "n1=-1 must be between 0 and the 10 rows"),
        (11, 1, None, "n1=11 must be between 0 and the 10 rows"),
        (1, -1, None, "n2=-1 must be between 0 and the 10 rows"),
        (1, 11, None, "n2=11 must be between 0 and the 10 rows"),
        (None, 1, 3, "budget=3 must be between the 4 rows"),
        (None, 0, 0, "budget=0 must be between the 1 rows"),
        (None, 1, 11, "budget=11 .* and the 10 rows"),
        (1, 1, 5, "n1=1 and budget=5: with a budget, n1 follows from it. Leave one of the two out"),
    ],
)
def test_numbers_that_cannot_fit_are_refused_before_scores_are_known(
    n1: int | None, n2: int, budget: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        refuse_impossible(rows=10, clusters=4, n1=n1, n2=n2, budget=budget)


def test_equal_scores_go_to_the_earlier_row() -> None:
    assert choose([1.0, 2.0, 2.0, 2.0], [0, 1, 1, 1], 1, 1).positions.tolist() == [1, 0]


def test_adding_a_constant_or_another_number_type_changes_nothing() -> None:
    scores, clusters = np.random.default_rng(0).integers(0, 50, 400), np.arange(400) % 17
    plain = as_tuples(choose(scores, clusters, 30, 3))
    assert as_tuples(choose(scores.astype(np.float32) - 1000, clusters.astype(np.uint8), 30, 3)) == plain


@pytest.mark.parametrize(
    ("scores", "clusters"), [([1.0, 2.0], [0]), ([[1.0], [2.0]], [[0], [0]])], ids=["lengths", "dimensions"]
)
def test_choose_refuses_arrays_that_do_not_match(scores: Any, clusters: Any) -> None:
    with pytest.raises(ValueError, match=r"both must be \(rows,\)"):
        choose(scores, clusters, 1, 1)


# select_car -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pool() -> Dataset:
    """Return a pool in which two rows have no score and two no cluster, and cluster 1 is weak."""
    columns = {
        "text": ["a", "b", "c", "d", "e", "f", "g", "h"],
        "iqs_score": [0.9, None, 0.5, 0.9, NAN, 0.1, 0.8, 0.2],
        "cluster": [0, 0, None, 0, 1, 1, None, 1],
        "embedding": [[float(i), 0.5] for i in range(8)],
        "turns": [[{"role": "user", "content": str(i)}] for i in range(8)],
    }
    types = {
        "text": Value("large_string"),
        "iqs_score": Value("float32"),
        "cluster": Value("int32"),
        "embedding": List(Value("float32"), length=2),
        "turns": List({"role": Value("string"), "content": Value("string")}),
    }
    return Dataset.from_dict(columns, features=Features(types))


def test_chosen_rows_come_best_first_with_reason_and_ranks(pool: Dataset) -> None:
    chosen = select_car(pool, n1=3, n2=1)
    assert chosen.select_columns(["text", "selected_by", "score_rank", "cluster_rank", "source_index"])[:] == {
        "text": ["a", "d", "g", "h"],
        "selected_by": ["both", "score", "score", "cluster"],
        "score_rank": [1, 2, 3, 5],
        "cluster_rank": [1, 2, 0, 1],
        "source_index": [0, 3, 6, 7],
    }


def test_rows_without_a_score_are_never_chosen_and_without_a_cluster_only_by_score(pool: Dataset) -> None:
    everything = select_car(pool, n1=6, n2=0)
    assert everything["text"][:] == ["a", "d", "g", "c", "h", "f"]
    assert select_car(pool, n1=0, n2=6, allow_worse=True)["text"][:] == ["a", "d", "h", "f"]


def test_all_other_columns_survive_with_their_types(pool: Dataset) -> None:
    chosen = select_car(pool, n1=3, n2=1)
    rows = pool.select(chosen["source_index"])
    assert chosen.select_columns(pool.column_names)[:] == rows[:]
    added = {name: kind for name, kind in chosen.features.items() if name not in pool.features}
    assert {name: chosen.features[name] for name in pool.features} == dict(pool.features)
    assert {name: kind.dtype for name, kind in added.items()} == {
        "source_index": "int64",
        "selected_by": "string",
        "score_rank": "int64",
        "cluster_rank": "int64",
    }


@pytest.mark.parametrize("name", ["source_index", "id"])
def test_an_index_column_that_is_there_is_kept(pool: Dataset, name: str) -> None:
    named = pool.add_column(name, [f"row-{i}" for i in range(8)])
    chosen = select_car(named, n1=2, n2=0, index_column=name)
    assert chosen[name][:] == ["row-0", "row-3"]
    assert set(chosen.column_names) - set(named.column_names) == {"selected_by", "score_rank", "cluster_rank"}


def test_source_index_points_into_the_dataset_that_was_passed(pool: Dataset) -> None:
    for given_rows in (pool.shuffle(seed=3), pool.select([7, 6, 5, 0, 2]), pool.select(range(2, 8))):
        chosen = select_car(given_rows, n1=2, n2=1, allow_worse=True)
        assert [given_rows[i]["text"] for i in chosen["source_index"]] == chosen["text"][:]
        scores = read_numbers(given_rows, "iqs_score", NAN)
        clusters = read_numbers(given_rows, "cluster", -1)
        expected = reference(scores.tolist(), clusters.tolist(), 2, 1)
        assert chosen["source_index"][:] == [row for row, *_ in expected]


def test_order_of_the_rows_only_decides_ties(pool: Dataset) -> None:
    distinct = pool.select([0, 1, 2, 4, 5, 6, 7])  # without the second 0.9
    chosen = select_car(distinct, n1=2, n2=2, allow_worse=True)["text"][:]
    for seed in range(5):
        assert select_car(distinct.shuffle(seed=seed), n1=2, n2=2, allow_worse=True)["text"][:] == chosen


# A null in a column of integers is where a passage through numpy shows: it makes floats of them.
@pytest.mark.parametrize("kind", ["arrow", "numpy", "torch", "pandas"])
def test_the_format_of_the_dataset_changes_nothing(pool: Dataset, kind: str) -> None:
    chosen = select_car(pool.with_format(kind), n1=3, n2=1)
    assert chosen.format["type"] == kind
    assert chosen.with_format(None)[:] == select_car(pool, n1=3, n2=1)[:]


def test_a_format_of_some_columns_is_no_hindrance(pool: Dataset) -> None:
    chosen = select_car(pool.with_format("numpy", columns=["embedding"]), n1=3, n2=1)
    assert chosen.with_format(None)[:] == select_car(pool, n1=3, n2=1)[:]


def test_columns_may_have_other_names(pool: Dataset) -> None:
    renamed = pool.rename_columns({"iqs_score": "quality", "cluster": "topic"})
    chosen = select_car(renamed, n1=3, n2=1, score_column="quality", cluster_column="topic", index_column="place")
    assert chosen["place"][:] == [0, 3, 6, 7]


def test_the_pool_is_left_as_it_was(pool: Dataset) -> None:
    before = repr(pool[:])
    select_car(pool, n1=3, n2=1)
    assert repr(pool[:]) == before


@pytest.mark.parametrize(("rows", "n1"), [(1, 1), (5, 3), (999, 500), (1999, 1000), (2000, 1000), (5000, 1000)])
def test_an_n1_that_nobody_gave_fits_any_pool(rows: int, n1: int) -> None:
    """Expect the paper's number from 2000 rows on, and half of a smaller pool, by every way to select."""
    scores = np.random.default_rng(0).random(rows)
    pool = Dataset.from_dict({"iqs_score": scores, "cluster": [0] * rows, "output": [str(i) for i in range(rows)]})
    expected = select_car(pool, n1, 1)[:]
    assert select_car(pool)[:] == expected
    assert select_car_streaming(pool.to_iterable_dataset(), batch_size=700)[:] == expected
    assert len(select_as_published(pool)) == n1
    assert len(select_by(Recipe(), pool)) == n1


def test_a_pool_without_scores_says_so() -> None:
    with pytest.raises(ValueError, match="No row has a score in the column 'iqs_score'"):
        select_car(Dataset.from_dict({"iqs_score": [NAN, NAN], "cluster": [0, 0]}))


@pytest.mark.parametrize(
    ("made_of", "message"),
    [
        (lambda d: d.to_iterable_dataset(), r"is a stream.*Call select_car_streaming\(dataset, clusters\)"),
        (lambda d: DatasetDict(train=d), "is a DatasetDict. Pass one of its splits"),
        (lambda d: d.to_list(), "is a list. Pass a Dataset"),
    ],
)
def test_what_is_no_dataset_is_told_the_call_that_works(made_of: Any, message: str, pool: Dataset) -> None:
    with pytest.raises(ValueError, match=message):
        select_car(made_of(pool))


def test_budget_counts_all_rows(pool: Dataset) -> None:
    assert [select_car(pool, budget=b, n2=1, allow_worse=True).num_rows for b in range(2, 7)] == [2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n1": -1}, "n1=-1 must be between 0 and the 6 rows"),
        ({"n1": 7}, "n1=7 must be between 0 and the 6 rows"),  # 8 rows, 6 scores
        ({"n1": 1.5}, "n1=1.5: a fraction must lie between 0 and 1"),
        ({"n1": -0.5}, "n1=-0.5: a fraction must lie between 0 and 1"),
        ({"n1": NAN}, "n1=nan: a fraction"),
        ({"n1": 1, "n2": -1}, "n2=-1 must be between 0 and the 6 rows"),
        ({"n1": 1, "n2": 7}, "n2=7 must be between 0 and the 6 rows"),
        ({"n1": 0, "n2": 0}, "select no rows"),
        ({"budget": 1, "n2": 1}, "budget=1 must be between the 2 rows that the clusters take"),
        ({"budget": True}, "budget=True must be an integer"),
        ({"budget": "5"}, "budget='5' must be an integer"),
        ({"budget": 7}, "budget=7 .* and the 6 rows"),
        ({"budget": -1, "n2": 0}, "budget=-1 must be between the 0 rows"),
        ({"n1": 1, "score_column": "quality"}, r"no column \['quality'\]; it has .*'iqs_score'"),
        ({"n1": 1, "cluster_column": "topic"}, r"no column \['topic'\]; it has .*'cluster'"),
        ({"n1": 1, "score_column": "text"}, "'text' holds large_string, not numbers"),
        ({"n1": 1, "cluster_column": "text"}, "'text' holds large_string, not numbers"),
        ({"n1": 1, "score_column": "embedding"}, "'embedding' holds fixed_size_list.*, not numbers"),
        ({"n1": 1, "score_column": "turns"}, "'turns' holds list.*, not numbers"),
        ({"n1": 1, "cluster_column": "iqs_score"}, "'iqs_score' holds float"),  # 0.9 is no cluster
    ],
    ids=str,
)
def test_select_car_refuses(pool: Dataset, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_car(pool, **options)


@pytest.mark.parametrize("taken", ["selected_by", "score_rank", "cluster_rank"])
def test_an_earlier_selection_is_not_overwritten(pool: Dataset, taken: str) -> None:
    with pytest.raises(ValueError, match=rf"already has the column\(s\) \['{taken}'\].*rename_column\('{taken}'"):
        select_car(pool.add_column(taken, [0] * 8), n1=1)


def test_a_pool_without_any_score_is_refused(pool: Dataset) -> None:
    with pytest.raises(ValueError, match="n1=1 must be between 0 and the 0 rows"):
        select_car(pool.select([1, 4]), n1=1, n2=0)


def test_a_selection_worse_than_the_pool_is_refused_unless_meant() -> None:
    pool = Dataset.from_dict({"iqs_score": [5.0, 4.0, 5.0, 0.0], "cluster": [0, 0, 0, 1]})
    with pytest.raises(ValueError, match=r"mean score 2\.5000 is below the pool's 3\.5000.*allow_worse=True"):
        select_car(pool, n1=0, n2=1)
    assert select_car(pool, n1=0, n2=1, allow_worse=True)["iqs_score"][:] == [5.0, 0.0]
    assert select_car(pool, n1=2, n2=0)["iqs_score"][:] == [5.0, 5.0]


def test_a_selection_as_good_as_the_pool_is_not_worse() -> None:
    refuse_worse([0.1, 0.1, 0.1, NAN], np.array([0, 1]))  # 0.1 + 0.1 + 0.1 is not 0.3 in floats
    refuse_worse([7.0, 8.0], np.array([0, 1]))
    with pytest.raises(ValueError, match="below the pool's"):
        refuse_worse([7.0, 8.0], np.array([0]))


def test_clusters_as_pandas_keeps_them_among_missing_ones(pool: Dataset) -> None:
    clusters = [None if c is None else float(c) for c in pool["cluster"][:]]
    floats = pool.remove_columns("cluster").add_column("cluster", [math.nan if c is None else c for c in clusters])
    assert select_car(floats, 2, 1)["source_index"][:] == select_car(pool, 2, 1)["source_index"][:]


def test_shares_within_groups_divide_n1_in_proportion() -> None:
    """Hold ranks within groups on other scales, ties by row order, and rows without a score."""
    groups = ["a"] * 6 + ["b"] * 3
    shares = shares_within(np.array([1.0, 3.0, NAN, 2.0, 2.0, 0.0, 70.0, 90.0, 80.0]), groups)
    np.testing.assert_allclose(shares, [0.3, 0.9, NAN, 0.7, 0.5, 0.1, 1 / 6, 5 / 6, 1 / 2])
    many = shares_within(np.random.default_rng(0).normal(size=100), ["a"] * 60 + ["b"] * 30 + ["c"] * 10)
    best = choose(many, np.zeros(100), n1=20, n2=0).positions
    assert np.histogram(best, bins=[0, 60, 90, 100])[0].tolist() == [12, 6, 2]


def test_n1_that_is_no_number() -> None:
    scored = Dataset.from_dict({"iqs_score": [0.1, 0.2], "cluster": [0, 1]})
    with pytest.raises(ValueError, match="n1='1' is a str; pass a number of rows, or a share"):
        select_car(scored, n1="1")  # type: ignore[arg-type]
