"""Compare SELECT on ten million rows with the same rule in pandas; both must choose the same rows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
from datasets import Dataset

from car_datasets import select_car
from car_datasets.selection.rule import choose
from tests.benchmarks.table import Line, best_of

ROWS, CLUSTERS, N1, N2 = 10_000_000, 2_236, 10_000, 2  # clusters: int(sqrt(rows / 2))
RUNS = 3
MOST = 1.5  # times the seconds of pandas: `choose` also ranks every row that it takes, in the pool and in its cluster


def pandas_way(scores: np.ndarray, clusters: np.ndarray, n1: int, n2: int) -> np.ndarray:
    """Select as one would in pandas: sort once, take the head, and the head of every group."""
    ranked = pd.DataFrame({"score": scores, "cluster": clusters}).sort_values("score", ascending=False, kind="stable")
    best, of_clusters = ranked.index[:n1], ranked.groupby("cluster", sort=False).head(n2).index
    return ranked.index[ranked.index.isin(best.union(of_clusters))].to_numpy()


def measure() -> Iterator[Line]:
    """Time `choose` on arrays as `select_car` reads them, without and with many equal scores; then a dataset."""
    rng = np.random.default_rng(0)
    clusters = rng.integers(0, CLUSTERS, ROWS)
    for kind, scores in (
        ("all scores differ", rng.normal(size=ROWS).astype(np.float32)),
        ("100 different scores", rng.integers(0, 100, ROWS).astype(np.float32)),
    ):
        ours, choice = best_of(RUNS, lambda scores=scores: choose(scores, clusters, N1, N2))
        theirs, rows = best_of(1, lambda scores=scores: pandas_way(scores, clusters, N1, N2))
        if not np.array_equal(choice.positions, rows):
            raise AssertionError("choose and pandas chose different rows")
        what = f"choose, {ROWS:,} rows, {CLUSTERS:,} clusters, n1={N1:,}, n2={N2}; {kind}; and in pandas"
        yield Line(what, ours, theirs, target=f"<= {MOST} times", met=ours <= MOST * theirs)
    dataset = Dataset.from_dict({"iqs_score": scores, "cluster": clusters.astype(np.int32)})
    ours, chosen = best_of(RUNS, lambda: select_car(dataset, N1, N2))
    if chosen["source_index"][:] != rows.tolist():
        raise AssertionError("select_car and pandas chose different rows")
    yield Line(f"select_car, a dataset of {ROWS:,} rows, two columns; and pandas on arrays", ours, theirs)
