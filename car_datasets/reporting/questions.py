"""Answer questions about a selection: `explain`, why a row was selected or not, and `what_if`, with other numbers.

Does: find a row's place among the scores and in its cluster, the rows nearest to it, and the rule that decided; apply
CaR's rule to existing scores and embeddings over a grid of n1, n2 and k, and compare each result with the selection.
Does not: run a model, or return the rows that other numbers would select. Another k is an estimate: a run with that k
clusters differently in detail.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from car_datasets.clustering.fitting import Covariance, project
from car_datasets.clustering.kmeans import lloyd, nearest
from car_datasets.loading.chats import OK, TRUNCATED
from car_datasets.reporting.ledger import why
from car_datasets.reporting.neighbours import Neighbour, nearest_rows
from car_datasets.reporting.overview import Overview, count_clusters
from car_datasets.selection.constrained import choose_within
from car_datasets.selection.limits import Limits
from car_datasets.selection.rule import Indices, choose
from car_datasets.selection.strata import quotas_of
from car_datasets.utils.column_names import ColumnNames
from car_datasets.utils.columns import Matrix
from car_datasets.utils.files import printable
from car_datasets.utils.settings import SEED, is_integer

if TYPE_CHECKING:
    from datasets import Dataset

# The quick clustering of another k: number of components, and of rows per cluster to fit on.
QUICK_COMPONENTS, QUICK_ROWS = 16, 32
QUICK_COVARIANCE = 8_192  # rows to find the components on; up to twice as many, since every n-th row is taken
HEADER = ("n1", "n2", "k", "rows", "mean score", "clusters covered", "in common", "overlap")


# explain --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Explanation:
    """Why a row was selected or not.

    Args:
        row (`int` or `str`): its value in the index column, or its position if the pool has no such column.
        selected_by (`str`, *optional*): `"score"`, `"cluster"`, `"both"`, `"pin"`, `"gain"`, `"like"`, or `None` if it was not
            selected.
        why (`str`): the same in a sentence.
        score (`float`, *optional*): its score.
        score_rank (`int`): rank by score in the pool, 1 for the best; 0 without a score.
        percentile (`float`): share of the scored rows, in %, that score no better; 0 without a score.
        length (`float`): its length in `length_unit`.
        length_unit (`str`): `"tokens"` of the scored text, or `"characters"` of the row's strings.
        truncated (`bool`): True if the text was longer than the scorer reads.
        status (`str`): `"ok"`, `"truncated"`, ..., or why there is no score (`"unknown"` without a status column).
        cluster (`int`, *optional*): its cluster.
        cluster_size (`int`): scored rows in the cluster.
        cluster_rank (`int`): rank by score among them, 1 for the best; 0 without a cluster or a score.
        neighbours (`tuple[Neighbour, ...]`): rows of its cluster that are most similar to it, nearest first.
        nearest_selected ([`Neighbour`], *optional*): the selected row, other than itself, that is most similar to it.
    """

    row: int | str
    selected_by: str | None
    why: str
    score: float | None
    score_rank: int
    percentile: float
    length: float
    length_unit: str
    truncated: bool
    status: str
    cluster: int | None
    cluster_size: int
    cluster_rank: int
    neighbours: tuple[Neighbour, ...]
    nearest_selected: Neighbour | None

    def __str__(self) -> str:
        """Return everything in words, over several lines."""
        lines = [f"row {self.row}: {self.why}"]
        if self.score is not None:
            lines.append(f"score {self.score:.3f}, rank {self.score_rank:,}, percentile {self.percentile:.1f}")
        lines.append(f"{self.length:,.0f} {self.length_unit}{', cut before its end' if self.truncated else ''}")
        if self.cluster is not None:
            place = (
                f"{self.cluster_rank:,} of {self.cluster_size:,} by score" if self.cluster_rank else "without a score"
            )
            lines.append(f"cluster {self.cluster}: {place}")
        near = [_in_words(n) for n in self.neighbours]
        lines += [f"nearest in its cluster: {'; '.join(near)}"] if near else []
        lines += [f"nearest selected row: {_in_words(self.nearest_selected)}"] if self.nearest_selected else []
        return printable("\n  ".join(lines))


def _in_words(n: Neighbour) -> str:
    score = "no score" if n.score is None else f"score {n.score:.3f}"
    return f"row {n.row} (similarity {n.similarity:.3f}, {score}, {'kept' if n.selected else 'not kept'})"


def explain(
    pool: Dataset,
    selected: Dataset,
    row: int | str,
    *,
    neighbours: int = 3,
    names: ColumnNames = ColumnNames(),
) -> Explanation:
    """Explain why a row was selected or not.

    Example:
    ```python
    >>> print(explain(scored, selected, 17))
    ```

    Args:
        pool (`Dataset`): scored and clustered. Without embeddings there are no neighbours.
        selected (`Dataset`): the rows that [`select_car`] took from it.
        row (`int` or `str`): the row's value in the index column, or its position if the pool has no such column.
        neighbours (`int`): how many rows of its cluster to name.
        names ([`ColumnNames`]): the columns of score, cluster, row index and embedding.

    Returns:
        [`Explanation`]: `print` it to read it in words.

    Raises:
        ValueError: the row does not exist, or a column is missing.
    """
    if not is_integer(neighbours) or neighbours < 0:
        raise ValueError(f"neighbours={neighbours!r} must be an integer, 0 or more.")
    overview = Overview.of(pool, selected, names=names)
    return explain_rows(overview, [position_of(overview, row)], neighbours)[0]


def position_of(overview: Overview, row: int | str) -> int:
    """Return the position of a row in the pool; raise ValueError if it does not exist."""
    rows = len(overview.scores)
    if overview.ids is None:
        if is_integer(row) and 0 <= row < rows:
            return int(row)
        raise ValueError(f"row={row!r} does not exist: the pool has the rows 0 to {rows - 1}.")
    # pandas compares values of any type without raising; the index column may hold text, numbers or dates.
    matches = np.flatnonzero(np.asarray(overview.ids.to_pandas() == row))
    if len(matches) == 0 or isinstance(row, bool):  # True == 1 in Python
        raise ValueError(
            f"row={row!r} is not in the pool's column {overview.names.index!r}, which starts with "
            f"{overview.ids[:3].to_pylist()} and ends with {overview.ids[-1].as_py()!r}."
        )
    return int(matches[0])


def explain_rows(overview: Overview, rows: Sequence[int], neighbours: int = 3) -> list[Explanation]:
    """Explain the rows at several positions, with one pass over the embeddings.

    Args:
        overview ([`Overview`]): of the pool and its selection.
        rows (`Sequence[int]`): positions in the pool.
        neighbours (`int`): how many rows of its cluster to name for each.
    """
    # All rows in one pass over the embeddings, which may be larger than memory: a page explains hundreds.
    # Scored rows only, because the others have no rank in their cluster.
    sizes = dict(zip(*np.unique(overview.clusters[overview.scored], return_counts=True), strict=True))
    of_cluster, of_selection = nearest_rows(overview, np.asarray(rows, dtype=np.int64), neighbours)
    explanations = []
    for i, row in enumerate(rows):
        scored, cluster = not np.isnan(overview.scores[row]), int(overview.clusters[row])
        rank, within = int(overview.score_ranks[row]), int(overview.cluster_ranks[row])
        status = _status(overview, row, scored)
        explanations.append(
            Explanation(
                row=overview.name_of(row),
                selected_by=overview.reasons[row].item() or None,  # "" if not selected
                why=why(overview, row, status),
                score=float(overview.scores[row]) if scored else None,
                score_rank=rank if scored else 0,
                percentile=float(overview.percentiles[row]),
                length=float(overview.lengths[row]),
                length_unit=overview.length_unit,
                truncated=status == TRUNCATED,
                status=status,
                cluster=cluster if cluster >= 0 else None,
                cluster_size=int(sizes.get(cluster, 0)),
                cluster_rank=within,
                neighbours=tuple(of_cluster[i]),
                nearest_selected=next(iter(of_selection[i]), None),
            )
        )
    return explanations


def _status(overview: Overview, row: int, scored: bool) -> str:
    if overview.statuses is not None:
        return str(overview.statuses[row].as_py())
    return OK if scored else "unknown"


# what_if --------------------------------------------------------------------------------------------------------------


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
            present value. If all three are left out, values around the present ones are tried: n1 with n2, then k. Where
            the recipe shares the budget out among groups, each group keeps its share of the present selection.
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
    present = (overview.by_score, overview.by_cluster, overview.k)
    if n1 is n2 is k is None:
        grid = _around(present, overview.eligible_rows, overview.embedded)
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
    # The present values are among them, so that the table has a line for the selection itself.
    n1s = sorted({min(max(1, int(n1 * f)), rows) for f in (0.25, 0.5, 1, 2)} | {n1})
    n2s = sorted({0, 1, n2, *(b for b in (2, 5, 10) if b <= rows)})
    others = sorted({c for c in (k // 2, 2 * k) if 1 < c <= embedded // 2} - {k})
    # All pairs of n1 and n2 at the present k, then other k alone: each of those costs a clustering. n1 = n2 = 0 would
    # select nothing.
    return [(a, b, k) for a, b in itertools.product(n1s, n2s) if a or b] + [(n1, n2, c) for c in others]


def _try(overview: Overview, n1: int, n2: int, k: int, clusters: Indices) -> WhatIf:
    # By the ranking: rows that were ranked within their languages are not in the order of their scores.
    choice = choose(overview.eligible, clusters, n1, n2).positions
    if overview.groups is not None:
        is_present = (n1, n2, k) == (overview.by_score, overview.by_cluster, overview.k)
        choice = _in_shares(overview, len(overview.positions) if is_present else len(choice), n2, clusters)
    if len(choice) == 0:
        raise ValueError(f"n1={n1} and n2={n2} select no rows.")
    common = len(np.intersect1d(choice, overview.positions))
    covered = count_clusters(clusters[choice])
    overlap = common / (len(choice) + len(overview.positions) - common)
    return WhatIf(n1, n2, k, len(choice), float(overview.scores[choice].mean()), covered, common, overlap)


def _in_shares(overview: Overview, budget: int, n2: int, clusters: Indices) -> Indices:
    """Return so many rows by CaR's rule, of each group the share that the present selection has of it."""
    groups = overview.groups or []
    counts = Counter(groups[row] for row in overview.positions.tolist())
    shares = {name: n / counts.total() for name, n in sorted(counts.items())}
    shared = quotas_of(groups, None, ~np.isnan(overview.eligible), budget, shares)
    return choose_within(overview.eligible, clusters, n2, Limits(budget, None, shared.strata, shared.quotas)).positions


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
    # Few of them: another k is an estimate, for which speed counts more than the last clusters.
    components = covariance.principal_components(1.0)[0][:QUICK_COMPONENTS].astype(np.float32)
    mean = covariance.mean.astype(np.float32)
    # A second pass over the column: only the projected rows are held, as the vectors may exceed memory.
    parts = [(project(part, mean, components), rows) for part, rows in overview.embedding_batches()]
    return np.concatenate([points for points, _ in parts]), np.concatenate([rows for _, rows in parts])
