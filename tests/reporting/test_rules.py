"""rules.py: the figures against their definitions, and every rule at the budget of the selection."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from rich.console import Console

from car_datasets import ClusterModel, select_car
from car_datasets.reporting.overview import Overview
from car_datasets.reporting.rules import (
    _in_turns,
    compare_rules,
    effective_number,
    neighbour_distance,
    rules_lines,
    rules_table,
)
from car_datasets.selection.gain import add_memberships

NAMES = ["this selection", "CaR's rule", "gain", "random", "random, equal shares of clusters", "best by score"]


@pytest.fixture(scope="module")
def pool() -> Dataset:
    """Return a pool of two clusters; the second is rare, and scored lower."""
    rng = np.random.default_rng(0)
    rare = np.arange(400) % 20 == 0
    vectors = rng.normal(size=(400, 8)) * 0.3 + np.where(rare[:, None], [[4.0] + [0.0] * 7], [[0.0] * 7 + [4.0]])
    scores = [None if i == 3 else float(score) for i, score in enumerate(rng.normal(size=400) - 3 * rare)]
    vectors[4] *= 0
    rows: dict[str, Any] = {"iqs_score": scores, "embedding": vectors.tolist(), "output": [str(i) for i in range(400)]}
    dataset = Dataset.from_dict(rows)
    return ClusterModel.fit(dataset, k=2, explained_variance=1.0).label(dataset)


@pytest.mark.parametrize("costs", [False, True])
@pytest.mark.parametrize("memberships", [False, True])
def test_every_rule_gets_the_budget_of_the_selection(pool: Dataset, costs: bool, memberships: bool) -> None:
    if memberships:
        pool = add_memberships(pool, ClusterModel.fit(pool, k=2, explained_variance=1.0))
    overview = Overview.of(pool, select_car(pool, budget=40))
    cost = np.random.default_rng(1).integers(1, 9, len(pool)) if costs else None
    found = compare_rules(overview, costs=cost)
    assert found == compare_rules(overview, costs=cost)
    assert [figures.rule for figures in found] == NAMES
    assert found[0].rows == 40
    by_rule = dict(zip(NAMES, found, strict=True))
    # The rare cluster scores lower: score alone leaves it out.
    assert [by_rule[name].clusters for name in (NAMES[1], NAMES[4], NAMES[5])] == [2, 2, 1]
    assert by_rule[NAMES[4]].effective_number > by_rule["best by score"].effective_number
    if not costs:
        assert {figures.rows for figures in found} == {40}
        assert found[1] == found[0].__class__(**{**vars(found[0]), "rule": "CaR's rule"})
        assert max(figures.mean_score for figures in found) == by_rule["best by score"].mean_score
        assert by_rule["random"].mean_score == pytest.approx(overview.scores[overview.random_control].mean())


def test_equal_shares_are_those_of_the_groups_that_are_named(pool: Dataset) -> None:
    """Give each of two groups half, and what the small one cannot fill to the other."""
    overview = Overview.of(pool.remove_columns("embedding"), select_car(pool.remove_columns("embedding"), budget=100))
    few = np.arange(len(pool)) % 40 == 0
    assert few.sum() == 10
    found = compare_rules(overview, groups=np.where(few, "few", "many").tolist())
    assert [figures.rule for figures in found] == [
        name.replace("clusters", "groups") for name in NAMES if name != "gain"
    ]
    order = _in_turns(np.where(few, "few", "many"), np.random.default_rng(0).permutation(400), None)
    assert few[order[:20]].sum() == few[order[:400]].sum() == 10
    assert found[3].rows == 100
    assert math.isnan(found[0].effective_number)
    assert rules_lines(found)[1][-2:] == ["-", "-"]


def test_spread_by_its_definition() -> None:
    rng = np.random.default_rng(0)
    for shape in ((5, 8), (30, 4)):
        matrix = rng.normal(size=shape).astype(np.float32)
        unit = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
        values = np.linalg.eigvalsh(unit.astype(float) @ unit.T / len(unit))
        values = values[values > 1e-9]
        assert effective_number(matrix) == pytest.approx(math.exp(-(values * np.log(values)).sum()), rel=1e-4)
        nearest = [min(1 - unit[i] @ unit[j] for j in range(len(unit)) if j != i) for i in range(len(unit))]
        assert neighbour_distance(matrix) == pytest.approx(np.mean(nearest), rel=1e-4)
    assert effective_number(np.eye(7, dtype=np.float32)) == pytest.approx(7)
    assert effective_number(np.ones((7, 3), dtype=np.float32)) == pytest.approx(1)
    assert neighbour_distance(np.ones((2, 3), dtype=np.float32)) == pytest.approx(0, abs=1e-6)
    assert math.isnan(neighbour_distance(np.ones((1, 3), dtype=np.float32)))


def test_the_table_has_a_line_for_each_rule(pool: Dataset) -> None:
    console = Console(width=140, file=io.StringIO())
    console.print(rules_table(compare_rules(Overview.of(pool, select_car(pool, budget=40)))))
    text = console.file.getvalue()
    assert all(name in text for name in NAMES)
