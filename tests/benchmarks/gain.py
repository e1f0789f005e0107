"""Time the gain rule on a million rows, its objective against a search through all rows, and the table of rules."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from datasets import Dataset

from car_datasets import ClusterModel, select_car
from car_datasets.reporting.overview import Overview
from car_datasets.reporting.rules import compare_rules
from car_datasets.selection.gain import add_memberships, choose_by_gain, objective_of, read_memberships
from car_datasets.selection.limits import Limits
from tests.benchmarks.synthetic import embeddings
from tests.benchmarks.table import Line

ROWS, CHOSEN, CLUSTERS = 1_000_000, 50_000, 707
POOL, SELECTED = 50_000, 1_000
SEARCHED = 25  # rows that a search through all of 200 chooses


def cpu_seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that all cores together spend on a call, and its result."""
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def members(rows: int, clusters: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return scores, near clusters and memberships; clusters differ in size by some 100 times."""
    rng = np.random.default_rng(0)
    sizes = rng.pareto(1.0, clusters) + 0.1
    near = rng.choice(clusters, (rows, 3), p=sizes / sizes.sum())
    weights = np.sort(rng.dirichlet([3.0] * 3, rows), axis=1)[:, ::-1]
    return rng.normal(size=rows), near, weights


def search(scores: np.ndarray, near: np.ndarray, weights: np.ndarray, count: int) -> list[int]:
    """Choose greedily, by a search through all rows at each step."""
    chosen: list[int] = []
    for _ in range(count):
        open_rows = [row for row in range(len(scores)) if row not in chosen]
        gains = [objective_of([*chosen, row], scores, near, weights) for row in open_rows]
        chosen.append(open_rows[int(np.argmax(gains))])
    return chosen


def measure() -> Iterator[Line]:
    """Time the rule with a budget in rows and in tokens, memberships, and the table of rules; compare objectives."""
    scores, near, weights = members(ROWS, CLUSTERS)
    what = f"choose_by_gain, {CHOSEN:,} of {ROWS:,} rows, k={CLUSTERS}"
    seconds, _ = cpu_seconds(lambda: choose_by_gain(scores, near, weights, Limits(CHOSEN)))
    yield Line(what, seconds, unit="CPU s", target="<= 60 s", met=seconds <= 60)
    costs = np.maximum(5, np.random.default_rng(1).lognormal(5, 0.8, ROWS)).astype(np.int64)
    budget = 10_000_000
    seconds, choice = cpu_seconds(lambda: choose_by_gain(scores, near, weights, Limits(budget, costs)))
    yield Line(f"the same, {budget:,} tokens", seconds, unit="CPU s", target="<= 60 s", met=seconds <= 60)
    used = 100 * costs[choice.positions].sum() / budget
    yield Line("budget used", used, unit="%", target=">= 99.9 %", met=99.9 <= used <= 100)
    few = members(200, 12)
    ours, theirs = choose_by_gain(*few, Limits(SEARCHED)).positions, search(*few, SEARCHED)
    objectives = objective_of(ours, *few), objective_of(theirs, *few)
    met = objectives[0] >= 0.999 * objectives[1]
    yield Line("objective, and that of a search through all rows", *objectives, "", ">= .999 times", met)
    vectors = embeddings(POOL)
    pool = Dataset.from_dict({"embedding": vectors, "iqs_score": np.random.default_rng(2).normal(size=POOL)})
    model = ClusterModel.fit(pool, kmeans_sample=50)
    pool = model.label(pool)
    seconds, marked = cpu_seconds(lambda: add_memberships(pool, model))
    yield Line(f"add_memberships, {POOL:,} rows of 384, k={model.k}", seconds, unit="CPU s")
    read_memberships(marked)
    overview = Overview.of(pool, select_car(pool, budget=SELECTED))
    seconds, _ = cpu_seconds(lambda: compare_rules(overview))
    yield Line(
        f"compare_rules, {SELECTED:,} of {POOL:,} rows", seconds, unit="CPU s", target="<= 5 s", met=seconds <= 5
    )
