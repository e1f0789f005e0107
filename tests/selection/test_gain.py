"""gain.py: the choice against a search through all rows at each step, and memberships against their definition."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Features, List, Value

from car_datasets import ClusterModel, ColumnNames
from car_datasets.selection.gain import add_memberships, choose_by_gain, objective_of, percentiles_of, read_memberships
from car_datasets.selection.limits import Limits


def instance(seed: int, rows: int = 40, k: int = 6) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.random.Generator]:
    """Return scores with ties and gaps, near clusters and weights; some rows have no cluster."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=rows).round(1) * 100 - 1000
    scores[rng.random(rows) < 0.1] = math.nan
    near = np.array([rng.choice(k, 3, replace=False) for _ in range(rows)])
    weights = np.sort(rng.dirichlet([1.0] * 3, rows))[:, ::-1].copy()
    near[rng.random(rows) < 0.1] = -1
    return scores, near, weights, rng


def naive(scores: Any, near: Any, weights: Any, limits: Limits, per_cost: bool = False) -> list[int]:
    """Take the row that adds most (per cost), of those that fit, until none does."""
    costs = np.ones(len(scores), int) if limits.costs is None else limits.costs
    chosen = [] if limits.pinned is None else np.flatnonzero(limits.pinned).tolist()
    while True:
        before, best = objective_of(chosen, scores, near, weights), (-1.0, -1)
        for row in range(len(scores)):
            stratum = -1 if limits.strata is None else limits.strata[row]
            held = [r for r in chosen if stratum >= 0 and limits.strata[r] == stratum]
            full = stratum >= 0 and costs[[*held, row]].sum() > limits.quotas[stratum]
            if row in chosen or math.isnan(scores[row]) or full or costs[[*chosen, row]].sum() > limits.budget:
                continue
            gain = round(objective_of([*chosen, row], scores, near, weights) - before, 9)
            best = max(best, (gain / costs[row] if per_cost else gain, -row))
        if best[1] == -1 and best[0] == -1.0:
            return chosen
        chosen.append(-best[1])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bounds", ["budget", "quotas and pins", "costs", "costs, quotas and pins"])
def test_as_good_as_a_search_through_all_rows(seed: int, bounds: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("car_datasets.selection.filling.SPARE", 1.0)  # without the swaps that use the rest of a budget
    scores, near, weights, rng = instance(seed)
    options: dict[str, Any] = {}
    if "costs" in bounds:
        options["costs"] = rng.integers(1, 40, len(scores))
    if "quotas" in bounds:
        unit = 20 if "costs" in bounds else 1
        options |= {"strata": rng.integers(-1, 3, len(scores)), "quotas": np.array([6, 4, 9]) * unit}
        options["pinned"] = np.arange(len(scores)) % 29 == 7
    limits = Limits(300 if "costs" in bounds else 15, **options)
    choice = choose_by_gain(scores, near, weights, limits)
    found = objective_of(choice.positions, scores, near, weights)
    searches = [naive(scores, near, weights, limits, per_cost) for per_cost in {False, "costs" in bounds}]
    assert found >= 0.999 * max(objective_of(rows, scores, near, weights) for rows in searches)
    if "costs" not in bounds:
        assert sorted(choice.positions.tolist()) == sorted(searches[0])
    pinned = options.get("pinned", np.zeros(len(scores), bool))
    assert not np.isnan(scores[choice.positions][~pinned[choice.positions]]).any()
    assert set(np.flatnonzero(pinned)) <= set(choice.positions.tolist())
    assert choice.selected_by == ["pin" if pinned[row] else "gain" for row in choice.positions]


def test_many_rows_are_chosen_as_by_one_heap(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, near, weights, _ = instance(0, rows=3_000, k=40)
    expected = choose_by_gain(scores, near, weights, Limits(700))
    monkeypatch.setattr("car_datasets.selection.gain.CANDIDATES", 50)
    assert np.array_equal(choose_by_gain(scores, near, weights, Limits(700)).positions, expected.positions)


def test_the_scale_of_the_scores_does_not_count() -> None:
    scores, near, weights, _ = instance(1)
    plain = choose_by_gain(scores, near, weights, Limits(20))
    stretched = choose_by_gain(np.exp(scores / 100), near, weights, Limits(20))
    assert [np.array_equal(a, b) for a, b in zip(plain, stretched, strict=True)] == [True] * 4
    assert percentiles_of(np.array([3.0, math.nan, -1.0, 3.0])).tolist()[::2] == [
        pytest.approx(2 / 3),
        pytest.approx(1 / 6),
    ]


def test_a_rare_kind_comes_before_more_of_a_common_one_and_ranks_are_those_of_the_rule() -> None:
    scores = np.array([9.0, 8.0, 7.0, 6.0, 1.0, math.nan])
    near = np.array([[0], [0], [0], [0], [1], [-1]])
    choice = choose_by_gain(scores, near, np.ones((6, 1)), Limits(2, pinned=np.arange(6) == 5))
    assert choice.positions.tolist() == [0, 5]  # the pinned row has no score, and comes last
    choice = choose_by_gain(scores, near, np.ones((6, 1)), Limits(5))
    assert [choice.score_rank.tolist(), choice.cluster_rank.tolist()] == [[1, 2, 3, 4, 5], [1, 2, 3, 4, 1]]
    few = choose_by_gain(np.array([5.0, 4.9, 4.8, 4.7, 4.6]), near[:5], np.ones((5, 1)), Limits(2))
    assert few.positions.tolist() == [
        0,
        1,
    ]  # percentiles .9, .7, .5, .3 and .1: a second good row adds more than the last
    assert choose_by_gain(scores[[0, 1, 4]], near[[0, 1, 4]], np.ones((3, 1)), Limits(2)).positions.tolist() == [0, 1]


@pytest.mark.parametrize("budget", [1_000, 20_000])
def test_a_budget_in_tokens_is_used_and_never_exceeded(budget: int) -> None:
    rng = np.random.default_rng(0)
    costs = np.maximum(20, rng.lognormal(5, 0.8, 3_000)).astype(np.int64)
    scores, near, weights = rng.normal(size=3_000), rng.integers(0, 30, (3_000, 3)), np.full((3_000, 3), 1 / 3)
    pinned = np.arange(3_000) == 17
    chosen = choose_by_gain(scores, near, weights, Limits(budget, costs, pinned=pinned)).positions
    assert len(set(chosen.tolist())) == len(chosen)
    assert 17 in chosen
    assert 0.999 * budget <= costs[chosen].sum() <= budget


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 1, "pinned": np.arange(40) < 3}, "3 .*pinned rows"),
        ({"strata": np.zeros(40, int), "quotas": np.array([2]), "pinned": np.arange(40) < 3}, "quota .*of stratum 0"),
        ({"costs": np.arange(40) - 1}, "limits.costs is -1 in row 0"),
        ({"costs": np.arange(39)}, r"limits.costs has the shape \(39,\)"),
        ({"strata": np.arange(40), "quotas": np.array([2])}, "the stratum 39, but limits.quotas has 1"),
    ],
)
def test_limits_that_cannot_be_kept_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_by_gain(*instance(0)[:3], Limits(**{"budget": 10, **options}))


def test_arrays_that_do_not_match_are_refused() -> None:
    scores, near, weights, _ = instance(0)
    with pytest.raises(ValueError, match=r"weights \(40, 2\)"):
        choose_by_gain(scores, near, weights[:, :2], Limits(10))
    with pytest.raises(ValueError, match="weights must be finite and not negative"):
        choose_by_gain(scores, near, -weights, Limits(10))


# memberships ----------------------------------------------------------------------------------------------------------


def test_memberships_are_those_of_the_nearest_centres() -> None:
    rng = np.random.default_rng(0)
    vectors: list[Any] = rng.normal(size=(50, 8)).astype(np.float32).tolist()
    vectors[7] = None
    kinds = Features({"embedding": List(Value("float32"))})
    model = ClusterModel.fit(Dataset.from_dict({"embedding": vectors}, features=kinds), k=5, explained_variance=0.8)
    pool = model.label(Dataset.from_dict({"embedding": vectors}, features=kinds))
    found = add_memberships(pool, model)
    assert {name: found.features[name].feature.dtype for name in ("near_clusters", "near_weights")} == {
        "near_clusters": "int32",
        "near_weights": "float32",
    }
    near, weights = read_memberships(found)
    assert found[7]["near_clusters"] is found[7]["near_weights"] is None
    assert near[7].tolist() == [-1, -1, -1]
    rows = np.delete(np.arange(50), 7)
    points = (np.array([vectors[i] for i in rows]) - model.mean) @ model.components.T
    squares = ((points[:, None] - model.centers) ** 2).sum(axis=2)
    expected = np.argsort(squares, axis=1)[:, :3]
    assert np.array_equal(near[rows], expected)
    assert near[rows, 0].tolist() == [pool["cluster"][i] for i in rows]
    inverse = 1 / np.take_along_axis(squares, expected, axis=1)
    assert np.allclose(weights[rows], inverse / inverse.sum(axis=1, keepdims=True), atol=1e-4)
    with pytest.raises(ValueError, match=r"already has the column\(s\) \['near_clusters'"):
        add_memberships(found, model)
    with pytest.raises(ValueError, match="has no column"):
        read_memberships(pool, ColumnNames())


def test_memberships_need_the_model_of_the_embeddings() -> None:
    model = ClusterModel(np.zeros(4), np.eye(4), np.eye(2, 4), 1.0, 0.0, 0)
    narrow = Dataset.from_dict({"embedding": [[0.0, 1.0]]})
    with pytest.raises(ValueError, match="embeddings of 2 numbers, the cluster model was fitted on 4"):
        add_memberships(narrow, model)
    exact = add_memberships(Dataset.from_dict({"embedding": [[1.0, 0.0, 0.0, 0.0]]}), model)
    assert exact[0] == {
        "embedding": [1.0, 0.0, 0.0, 0.0],
        "near_clusters": [0, 1],
        "near_weights": [1.0, pytest.approx(0, abs=1e-6)],
    }
