"""`what_if`: what another n1, n2 or k would select, from existing scores and embeddings; no model runs.

Does: apply CaR's rule over a grid of settings and compare each result with the present selection.
Does not: return the rows that other settings would select. Another k is an estimate: a run with that k clusters
differently in detail.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from car_datasets.clustering.fitting import Covariance, project
from car_datasets.clustering.kmeans import lloyd, nearest
from car_datasets.reporting.overview import Overview, count_clusters
from car_datasets.selection.rule import Indices, choose
from car_datasets.utils.column_names import ColumnNames
from car_datasets.utils.columns import Matrix
from car_datasets.utils.settings import SEED

if TYPE_CHECKING:
    from datasets import Dataset

# The quick clustering of another k: number of components, and of rows per cluster to fit on.
QUICK_COMPONENTS, QUICK_ROWS = 16, 32
QUICK_COVARIANCE = 8_192  # rows to find the components on; up to twice as many, since every n-th row is taken
HEADER = ("n1", "n2", "k", "rows", "mean score", "clusters covered", "in common", "overlap")


@dataclass(frozen=True)
class WhatIf:
    """A selection that other settings would make, compared with the present one.

    Args:
        n1 (`int`): rows taken by score.
        n2 (`int`): rows taken from every cluster.
        k (`int`): number of clusters.
        rows (`int`): rows it would select.
        mean_score (`float`): mean score of these rows.
        clusters_covered (`int`): clusters, out of k, from which it would select a row.
        in_common (`int`): rows that the present selection has too.
        overlap (`float`): these as a share of all rows that one of the two selects (Jaccard index).
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
        """Return the numbers as text, in the order of `HEADER`."""
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
    names: ColumnNames = ColumnNames(),
    seed: int = SEED,
) -> list[WhatIf]:
    """Compute what other settings would select, without scoring or embedding anything again.

    Example:
    ```python
    >>> [choice.overlap for choice in what_if(scored, selected, n1=[500, 1000], n2=[1, 5])]
    ```

    Args:
        pool (`Dataset`): scored and clustered; another k needs its embeddings.
        selected (`Dataset`): the rows that [`select_car`] took from it.
        n1, n2, k (`Sequence[int]`, *optional*): values to try, in all combinations; one that is left out keeps its
            present value. If all three are left out, values around the present ones are tried: n1 with n2, then k.
        names ([`ColumnNames`]): the columns of score, cluster, row index and embedding.
        seed (`int`): for the k-means of another k.

    Returns:
        `list[WhatIf]`: one entry per combination, in the order of k, n1, n2; without all three the present k first.

    Raises:
        ValueError: n1, n2 or k is not a list of numbers, a number does not fit the pool, a column is missing, or
            another k was asked for and the pool has no embeddings.
    """
    return try_out(Overview.of(pool, selected, names=names, seed=seed), n1, n2, k)


def try_out(
    overview: Overview,
    n1: Sequence[int] | None = None,
    n2: Sequence[int] | None = None,
    k: Sequence[int] | None = None,
) -> list[WhatIf]:
    """Compute what other settings would select.

    Args:
        overview ([`Overview`]): of the pool and its present selection.
        n1, n2, k (`Sequence[int]`, *optional*): values to try, in all combinations; one that is left out keeps its
            present value. If all three are left out, values around the present ones are tried: n1 with n2, then k.

    Raises:
        ValueError: n1, n2 or k is not a list of numbers, a number does not fit the pool, or another k was asked for and
            the pool has no embeddings.
    """
    present = (overview.by_score, overview.by_cluster, overview.cluster_count)
    if n1 is n2 is k is None:
        grid = _around(present, len(overview.scored), overview.embedded)
    else:
        for name, values in (("n1", n1), ("n2", n2), ("k", k)):
            if values is not None and (not isinstance(values, (Sequence, np.ndarray)) or len(values) == 0):
                raise ValueError(f"{name}={values!r} must be the numbers to try, such as {name}=[1, 10].")
        given = zip((n1, n2, k), present, strict=True)
        n1s, n2s, ks = (list(values) if values is not None else [value] for values, value in given)
        grid = [(a, b, c) for c, a, b in itertools.product(ks, n1s, n2s)]
    # The present k keeps its own clusters; only other numbers are clustered anew.
    labels = quick_clusters(overview, {c for *_, c in grid} - {present[2]})
    labels[present[2]] = overview.clusters
    return [_try(overview, a, b, c, labels[c]) for a, b, c in grid]


def _around(present: tuple[int, int, int], rows: int, embedded: int) -> list[tuple[int, int, int]]:
    """Return `(n1, n2, k)` to try around the present ones, for a number of scored and of embedded rows."""
    n1, n2, k = present
    n1s = sorted({min(max(1, int(n1 * f)), rows) for f in (0.25, 0.5, 1, 2)} | {n1})
    n2s = sorted({0, 1, n2, *(b for b in (2, 5, 10) if b <= rows)})
    others = sorted({c for c in (k // 2, 2 * k) if 1 < c <= embedded // 2} - {k})
    # All pairs of n1 and n2 at the present k, then other k alone: each of those costs a clustering. n1 = n2 = 0 would
    # select nothing.
    return [(a, b, k) for a, b in itertools.product(n1s, n2s) if a or b] + [(n1, n2, c) for c in others]


def _try(overview: Overview, n1: int, n2: int, k: int, clusters: Indices) -> WhatIf:
    choice = choose(overview.ranking, clusters, n1, n2).positions
    if len(choice) == 0:
        raise ValueError(f"n1={n1} and n2={n2} select no rows.")
    common = len(np.intersect1d(choice, overview.positions))
    covered = count_clusters(clusters[choice])
    overlap = common / (len(choice) + len(overview.positions) - common)
    return WhatIf(n1, n2, k, len(choice), float(overview.scores[choice].mean()), covered, common, overlap)


def quick_clusters(overview: Overview, ks: set[int]) -> dict[int, Indices]:
    """Cluster the pool by k-means on few components, fitted on a sample of the rows.

    Args:
        overview ([`Overview`]): of the pool, whose embeddings are read.
        ks (`set[int]`): numbers of clusters.

    Returns:
        `dict[int, (rows,) int64]`: for every k the label of every row, -1 for a row without an embedding.

    Raises:
        ValueError: a k does not fit the number of embeddings, or the pool has none.
    """
    if not ks:
        return {}
    matrix, present = _few_components(overview)
    wrong = sorted(k for k in ks if not 1 <= k <= len(present))
    if wrong:
        raise ValueError(f"k={wrong[0]} must be between 1 and the {len(present)} rows that have an embedding.")
    points = torch.from_numpy(matrix)
    labels = {}
    for k in sorted(ks):
        # Seeded anew for every k, so that the labels do not depend on which others are tried.
        rng = np.random.default_rng(overview.seed)
        rows = np.sort(rng.choice(len(points), min(len(points), QUICK_ROWS * k), replace=False))
        fitted_on = points[torch.from_numpy(rows)]
        # Random first centres: on embeddings they do as well as k-means++, which is slower.
        first = torch.from_numpy(rng.choice(len(fitted_on), k, replace=False))
        centers = lloyd(fitted_on, fitted_on[first]).centers
        labels[k] = np.full(len(overview.scores), -1)  # "no cluster", for rows without an embedding
        labels[k][present] = nearest(points, centers)[0].numpy()
    return labels


def _few_components(overview: Overview) -> tuple[Matrix, Indices]:
    """Project all embeddings on their first components; return the points, and the rows that have an embedding."""
    every = max(1, len(overview.scores) // QUICK_COVARIANCE)  # rows from all over the column
    covariance = Covariance.of_all(part[::every] for part, _ in overview.embedding_batches())
    assert covariance is not None  # a column without embeddings was refused by embedding_batches
    components = covariance.principal_components(1.0)[0][:QUICK_COMPONENTS].astype(np.float32)
    mean = covariance.mean.astype(np.float32)
    parts = [(project(part, mean, components), rows) for part, rows in overview.embedding_batches()]
    return np.concatenate([points for points, _ in parts]), np.concatenate([rows for _, rows in parts])
