"""What another n1, n2 or k would select, from the scores and embeddings that are there: no model runs.

Does: the rule of [`choose`] over a grid, each choice beside the present one. Another k is a quick k-means on 16 components of a
sample, which tells how the selection would move; the clusters of a run with that k will differ in detail.
Does not: select, or keep what it tries.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from car_datasets.covariance import Covariance
from car_datasets.kmeans import lloyd, nearest
from car_datasets.overview import Overview
from car_datasets.selection import Indices, choose
from car_datasets.vectors import Matrix, count_vectors, embedding_batches

if TYPE_CHECKING:
    from datasets import Dataset

QUICK_COMPONENTS, QUICK_ROWS = 16, 32  # components, and rows per cluster to fit on
QUICK_COVARIANCE = 8_192  # rows, or up to twice as many, to find the components on
HEADER = ("n1", "n2", "k", "rows", "mean score", "clusters covered", "in common", "overlap")


@dataclass(frozen=True)
class WhatIf:
    """A selection that could be made, beside the present one.

    Args:
        n1, n2, k (`int`): by score, from every cluster, clusters.
        rows (`int`): that it would take.
        mean_score (`float`): of them.
        clusters_covered (`int`): of its k.
        in_common (`int`): rows that the present selection has too.
        overlap (`float`): these as a share of all rows that one of the two takes (Jaccard).
    """

    n1: int
    n2: int
    k: int
    rows: int
    mean_score: float
    clusters_covered: int
    in_common: int
    overlap: float

    def cells(self) -> list[str]:
        """As text, in the order of `HEADER`."""
        counts = [f"{n:,}" for n in (self.n1, self.n2, self.k, self.rows)]
        shares = [f"{self.clusters_covered:,} of {self.k:,}", f"{self.in_common:,}", f"{100 * self.overlap:.0f} %"]
        return [*counts, f"{self.mean_score:.3f}", *shares]


def what_if(
    pool: Dataset,
    selected: Dataset,
    n1: Sequence[int] | None = None,
    n2: Sequence[int] | None = None,
    k: Sequence[int] | None = None,
    *,
    score_column: str = "iqs_score",
    cluster_column: str = "cluster",
    index_column: str = "source_index",
    embedding_column: str = "embedding",
    seed: int = 42,
) -> list[WhatIf]:
    """What other settings would select, without scoring or embedding anything again.

    Example:

    ```python
    >>> [choice.overlap for choice in what_if(scored, selected, n1=[500, 1000], n2=[1, 5])]
    ```

    Args:
        pool (`Dataset`), selected (`Dataset`): as for [`SelectionReport.from_selection`].
        n1, n2, k (`Sequence[int]`, *optional*): to try, each with each; without all three, around the present ones: n1 with n2,
            then k alone. k needs the pool's embeddings.
        score_column, cluster_column, index_column, embedding_column (`str`): as in [`select_car`].
        seed (`int`): of the k-means for another k.

    Returns:
        `list[WhatIf]`: one entry per combination, in the order of k, n1, n2; without all three the present k first.

    Raises:
        ValueError: n1, n2 or k is no list of numbers, one does not fit, a column is missing, or another k was asked for without
            embeddings.
    """
    names = {"score_column": score_column, "cluster_column": cluster_column, "index_column": index_column}
    seen = Overview.of(pool, selected, **names, seed=seed)
    return try_out(pool, seen, n1, n2, k, embedding_column)


def try_out(
    pool: Dataset,
    seen: Overview,
    n1: Sequence[int] | None = None,
    n2: Sequence[int] | None = None,
    k: Sequence[int] | None = None,
    embedding_column: str = "embedding",
) -> list[WhatIf]:
    """As [`what_if`], of columns that have been read."""
    present = (seen.by_score, seen.by_cluster, seen.cluster_count)
    if n1 is n2 is k is None:
        grid = _around(present, len(seen.scored), count_vectors(pool, embedding_column))
    else:
        for name, values in (("n1", n1), ("n2", n2), ("k", k)):
            if values is not None and (not isinstance(values, (Sequence, np.ndarray)) or len(values) == 0):
                raise ValueError(f"{name}={values!r} must be the numbers to try, such as {name}=[1, 10].")
        given = zip((n1, n2, k), present, strict=True)
        n1s, n2s, ks = (list(values) if values is not None else [value] for values, value in given)
        grid = [(a, b, c) for c, a, b in itertools.product(ks, n1s, n2s)]
    labels = quick_clusters(pool, embedding_column, {c for *_, c in grid} - {present[2]}, seen.seed)
    labels[present[2]] = seen.clusters
    return [_try(seen, a, b, c, labels[c]) for a, b, c in grid]


def _around(present: tuple[int, int, int], rows: int, embedded: int) -> list[tuple[int, int, int]]:
    n1, n2, k = present
    n1s = sorted({min(max(1, int(n1 * f)), rows) for f in (0.25, 0.5, 1, 2)} | {n1})
    grid = [
        (a, b, k) for a, b in itertools.product(n1s, sorted({0, 1, 2, 5, 10, n2} - {b for b in (2, 5, 10) if b > rows}))
    ]
    others = sorted({c for c in (k // 2, 2 * k) if 1 < c <= embedded // 2} - {k})
    return [(a, b, c) for a, b, c in grid if a or b] + [(n1, n2, c) for c in others]


def _try(seen: Overview, n1: int, n2: int, k: int, clusters: Indices) -> WhatIf:
    choice = choose(seen.scores, clusters, n1, n2).positions
    if len(choice) == 0:
        raise ValueError(f"n1={n1} and n2={n2} select no rows.")
    common = len(np.intersect1d(choice, seen.positions))
    covered = len(np.unique(clusters[choice][clusters[choice] >= 0]))
    overlap = common / (len(choice) + len(seen.positions) - common)
    return WhatIf(n1, n2, k, len(choice), float(seen.scores[choice].mean()), covered, common, overlap)


def quick_clusters(pool: Dataset, column: str, ks: set[int], seed: int) -> dict[int, Indices]:
    """Labels of all rows for every k of `ks`, -1 without an embedding, by k-means on few components and a sample."""
    if not ks:
        return {}
    matrix, present = _few_components(pool.with_format(None), column)
    wrong = sorted(k for k in ks if not 1 <= k <= len(present))
    if wrong:
        raise ValueError(f"k={wrong[0]} must be between 1 and the {len(present)} rows that have an embedding.")
    points = torch.from_numpy(matrix)
    found = {}
    for k in sorted(ks):
        rng = np.random.default_rng(seed)
        held = points[
            torch.from_numpy(np.sort(rng.choice(len(points), min(len(points), QUICK_ROWS * k), replace=False)))
        ]
        centers = lloyd(held, held[torch.from_numpy(rng.choice(len(held), k, replace=False))]).centers
        found[k] = np.full(len(pool), -1)
        found[k][present] = nearest(points, centers)[0].numpy()
    return found


def _few_components(pool: Dataset, column: str) -> tuple[Matrix, Indices]:
    """The first components of all embeddings, found on rows from all over the column, and the rows that have one."""
    every = max(1, len(pool) // QUICK_COVARIANCE)
    covariance = Covariance.of_all(part[::every] for part, _ in embedding_batches(pool, column))
    assert covariance is not None  # a column without embeddings was refused by embedding_batches
    components = covariance.principal_components(1.0)[0][:QUICK_COMPONENTS].astype(np.float32)
    mean = covariance.mean.astype(np.float32)
    parts = [((part - mean) @ components.T, rows) for part, rows in embedding_batches(pool, column)]
    return np.concatenate([points for points, _ in parts]), np.concatenate([rows for _, rows in parts])
