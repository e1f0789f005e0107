"""SELECT: CaR's rule as column arithmetic (CaR sec. 3.3): the n1 best by score, and the n2 best of every cluster.

Does: read two columns, compute ranks, return the chosen rows with the reason for each. Ties go to the earlier row, so
equal input gives an equal selection on any machine.
Does not: touch text, compute scores or clusters, or compare rows by their content (the original does, and merges equal
rows).
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from car_datasets.settings import is_whole_number

if TYPE_CHECKING:
    from datasets import Dataset

SELECTION_COLUMNS = ("selected_by", "score_rank", "cluster_rank")
BY_SCORE, BY_CLUSTER, BY_BOTH = "score", "cluster", "both"
Indices = npt.NDArray[np.int64]
LOOK = 2**20  # rows that are searched at a time for what clusters still lack


class Choice(NamedTuple):
    """Chosen row positions, best score first, and per position why and with which ranks (1 is best)."""

    positions: Indices
    selected_by: list[str]
    score_rank: Indices
    cluster_rank: Indices


def choose(
    scores: npt.ArrayLike,
    clusters: npt.ArrayLike,
    n1: int | float = 1000,
    n2: int = 1,
    budget: int | None = None,
) -> Choice:
    """CaR's selection on two arrays.

    Args:
        scores (`(rows,)` float): higher is better; NaN marks a row that has no score and cannot be chosen.
        clusters (`(rows,)` int): negative marks a row without a cluster; it can be chosen by score only.
        n1 (`int` or `float`): rows taken by score; a float in (0, 1) is that share of the scored rows.
        n2 (`int`): rows taken from every cluster.
        budget (`int`, *optional*): rows in all; n1 then follows from it and from n2.

    Raises:
        ValueError: a number is negative, larger than the rows, or the budget is below what the clusters take.
    """
    score, cluster = np.asarray(scores, dtype=np.float64), np.asarray(clusters, dtype=np.int64)
    if score.shape != cluster.shape or score.ndim != 1:
        raise ValueError(f"scores have the shape {score.shape} and clusters {cluster.shape}; both must be (rows,).")
    scored = int(np.count_nonzero(~np.isnan(score)))
    _check_counts(scored, n2, budget)
    order = _best_first(score)[:scored]
    most = _rows_by_score(n1, scored) if budget is None else min(budget, scored)
    within = _needed_ranks(cluster[order], most, n2)
    from_clusters = (within >= 1) & (within <= n2)
    count = most if budget is None else _rows_for_budget(budget, from_clusters)
    places = np.flatnonzero((np.arange(scored) < count) | from_clusters)
    by_score, by_cluster = places < count, from_clusters[places]
    reasons = np.where(by_score & by_cluster, BY_BOTH, np.where(by_score, BY_SCORE, BY_CLUSTER))
    return Choice(order[places], reasons.tolist(), places + 1, within[places])


def _best_first(score: npt.NDArray[np.float64]) -> Indices:
    """Row positions by falling score, ties by row order, NaN last."""
    with np.errstate(over="ignore"):
        single = -score.astype(np.float32) + np.float32(0)  # no -0.0
    missing = np.isnan(score)
    if not np.all((single == -score) | missing):
        return np.argsort(-score, kind="stable")
    # A third of that time: the bits of float32, as numbers of the same order, packed with the row.
    single[missing] = np.nan  # without a sign
    bits = single.view(np.uint32)
    return _sorted_pairs(np.where(bits >> 31, ~bits, bits | np.uint32(2**31)), np.arange(len(score)))[1]


def ranks_of(scores: npt.NDArray[Any]) -> Indices:
    """The rank of every row, 1 for the best; ties by row order, NaN last."""
    ranks = np.empty(len(scores), dtype=np.int64)
    ranks[_best_first(np.asarray(scores, dtype=np.float64))] = np.arange(1, len(scores) + 1)
    return ranks


def ranks_within(labels: Indices) -> Indices:
    """For the clusters of rows, best row first: the rank of every row in its cluster, 1 for the best, 0 without cluster."""
    ranks = np.zeros(len(labels), dtype=np.int64)
    members = np.flatnonzero(labels >= 0)
    grouped, places = _sorted_pairs(labels[members], members)  # by cluster, best first within each
    starts = np.flatnonzero(np.r_[True, grouped[1:] != grouped[:-1]]) if len(grouped) else np.zeros(0, dtype=np.int64)
    sizes = np.diff(np.r_[starts, len(grouped)])
    ranks[places] = np.arange(len(grouped)) - np.repeat(starts, sizes) + 1
    return ranks


def _needed_ranks(labels: Indices, most: int, n2: int) -> Indices:
    """As [`ranks_within`], for the first `most` rows and, further down, the best `n2` of every cluster; 0 for the others.

    Most clusters have theirs near the top, so the rows below are looked through but not sorted.
    """
    ranks = np.zeros(len(labels), dtype=np.int64)
    if labels.max(initial=0) > len(labels):  # numbers of the user's own, with gaps
        _, codes = np.unique(labels, return_inverse=True)
        labels = np.where(labels < 0, -1, codes)
    sizes = np.bincount(labels[labels >= 0], minlength=1)
    seen = np.zeros_like(sizes)
    start, end = 0, max(most, LOOK)
    while start < len(labels):
        part = labels[start:end]
        rows = np.arange(len(part)) if start == 0 else np.flatnonzero((part >= 0) & (seen[part] < n2))
        found = ranks_within(part[rows])
        members = found > 0
        ranks[start + rows] = np.where(members, found + seen[part[rows]], 0)
        seen += np.bincount(part[rows][members], minlength=len(seen))
        if np.all((seen >= n2) | (seen == sizes)):
            break
        start, end = end, end + LOOK
    return ranks


def _sorted_pairs(first: Indices, second: Indices) -> tuple[Indices, Indices]:
    """Pairs of numbers that are not negative, sorted by the first, then by the second: packed into one number, as numpy
    sorts those with vector instructions."""
    if len(first) == 0 or first.max() >= 2**32 or len(first) >= 2**32:
        order = np.lexsort((second, first))
        return first[order], second[order]
    pairs = (first.astype(np.uint64) << np.uint64(32)) | second.astype(np.uint64)
    pairs.sort()
    return (pairs >> np.uint64(32)).astype(np.int64), (pairs & np.uint64(0xFFFFFFFF)).astype(np.int64)


def _check_counts(rows: int, n2: int, budget: int | None) -> None:
    if not _is_count(n2) or n2 > max(rows, 1):
        raise ValueError(f"n2={n2!r} must be between 0 and the {rows} rows, a whole number.")
    if budget is not None and not _is_count(abs(budget)):
        raise ValueError(f"budget={budget!r} must be a whole number of rows.")


def _is_count(value: Any) -> bool:
    return is_whole_number(value) and int(value) >= 0


def _rows_by_score(n1: int | float, rows: int) -> int:
    if isinstance(n1, numbers.Real) and not isinstance(n1, numbers.Integral):
        if not 0 < n1 < 1:
            raise ValueError(f"n1={n1!r}: a fraction must lie between 0 and 1; for a number of rows pass an int.")
        return max(1, math.floor(float(n1) * rows + 1e-9))  # 0.29 * 100 is 28.999999999999996
    if not _is_count(n1) or n1 > rows:
        raise ValueError(f"n1={n1!r} must be between 0 and the {rows} rows; a share such as 0.05 is fine too.")
    return int(n1)


def _rows_for_budget(budget: int, from_clusters: npt.NDArray[np.bool_]) -> int:
    """The n1 with which score and clusters together take `budget` rows; `from_clusters` is in order of score."""
    taken = int(from_clusters.sum())
    if not taken <= budget <= len(from_clusters):
        raise ValueError(
            f"budget={budget} must be between the {taken} rows that the clusters take (fewer with a smaller n2 or k) "
            f"and the {len(from_clusters)} rows."
        )
    # With n1 rows by score, the union holds n1 rows and the cluster picks that come after them.
    union = np.r_[0, np.cumsum(~from_clusters)] + taken
    return int(np.searchsorted(union, budget, side="left"))


def refuse_impossible(rows: int, clusters: int, n1: int | float, n2: int, budget: int | None) -> None:
    """Raise a ValueError for an n1, n2 or budget that cannot fit, before scores are known (all rows could be scored)."""
    _check_counts(rows, n2, budget)
    if budget is None:
        if _rows_by_score(n1, rows) == n2 == 0:
            raise ValueError(f"n1={n1} and n2={n2} select no rows.")
    elif not (clusters if n2 else 1) <= budget <= rows:
        raise ValueError(
            f"budget={budget} must be between the {clusters if n2 else 1} rows that the clusters take (fewer with n2=0 or a "
            f"smaller k) and the {rows} rows."
        )


def select_car(
    dataset: Dataset,
    n1: int | float = 1000,
    n2: int = 1,
    *,
    budget: int | None = None,
    score_column: str = "iqs_score",
    cluster_column: str = "cluster",
    index_column: str = "source_index",
    allow_worse: bool = False,
) -> Dataset:
    """The selected rows of a scored, clustered dataset, best score first.

    Args:
        dataset (`Dataset`): with a score and a cluster for every row; nulls are never selected (by score, or at all).
        n1, n2, budget: see [`choose`]. The paper's values are n1 = 1000 and n2 = 1.
        score_column, cluster_column (`str`): where score and cluster stand.
        index_column (`str`): kept if the dataset has it, else added: the row's position in `dataset`.
        allow_worse (`bool`): do not refuse a selection whose mean score is below the pool's.

    Returns:
        `Dataset`: all columns of the chosen rows, and `selected_by` (`"score"`, `"cluster"`, `"both"`), `score_rank` and
        `cluster_rank` (1 is best, over the pool and within the cluster; `cluster_rank` 0: no cluster).

    Raises:
        ValueError: a column is missing or would be overwritten, a number does not fit, or the selection is worse than
            the pool. (The original's first release sorted the wrong way round and shipped the worst rows for two
            months.)
    """
    check_columns(dataset.column_names, (score_column, cluster_column), SELECTION_COLUMNS)
    scores = read_numbers(dataset, score_column, np.nan)
    choice = choose(scores, read_numbers(dataset, cluster_column, -1), n1, n2, budget)
    if len(choice.positions) == 0:
        raise ValueError(f"n1={n1} and n2={n2} select no rows.")
    if not allow_worse:
        refuse_worse(scores, choice.positions)
    return add_selection(dataset, choice, index_column)


def add_selection(dataset: Dataset, choice: Choice, index_column: str) -> Dataset:
    """The chosen rows with the columns that say why, see [`select_car`]."""
    # In Arrow's format: numpy's would turn whole numbers beside a null into floats when add_column copies the rows.
    form = dataset.format
    chosen = dataset.with_format("arrow").select(choice.positions.tolist())
    if index_column not in dataset.column_names:
        chosen = chosen.add_column(index_column, choice.positions)
    chosen = chosen.add_column("selected_by", choice.selected_by)
    chosen = chosen.add_column("score_rank", choice.score_rank)
    chosen = chosen.add_column("cluster_rank", choice.cluster_rank)
    return chosen.with_format(form["type"], **form["format_kwargs"])


def refuse_worse(scores: npt.ArrayLike, positions: Indices) -> None:
    """Raise a ValueError if the chosen rows score below the pool on average: then the sign of the score is wrong."""
    values = np.asarray(scores, dtype=np.float64)
    if len(positions) == 0:
        raise ValueError("n1 and n2 select no rows.")
    pool, chosen = float(np.nanmean(values)), float(values[positions].mean())
    if chosen < pool - 1e-9 * max(1.0, abs(pool)):
        raise ValueError(
            f"The selection's mean score {chosen:.4f} is below the pool's {pool:.4f}. Is a higher score better in this "
            "column? If clusters alone (a small n1) pull it down and you mean that, pass allow_worse=True (--allow-worse)."
        )


def read_numbers(dataset: Dataset, column: str, missing: float) -> npt.NDArray[Any]:
    """A numeric column as one array, nulls replaced by `missing`, without a Python object per row.

    Raises:
        ValueError: the column is not numeric.
    """
    return numbers_of(dataset.select_columns([column]).with_format("arrow")[:][column], column, missing)


def numbers_of(values: pa.ChunkedArray, column: str, missing: float) -> npt.NDArray[Any]:
    """As [`read_numbers`], for a column that has been read."""
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        raise ValueError(f"The column {column!r} holds {values.type}, not numbers.")
    kind = "float64" if missing != missing else "int64"
    try:
        if kind == "int64" and pa.types.is_floating(values.type):  # as pandas keeps whole numbers beside missing ones
            values = pc.if_else(pc.is_nan(values), None, values)
        return np.asarray(values.cast(kind).fill_null(missing).to_numpy())
    except (TypeError, ValueError, NotImplementedError) as error:  # pyarrow's errors derive from these
        wanted = "whole numbers" if kind == "int64" else "numbers"
        raise ValueError(f"The column {column!r} holds {values.type}, not {wanted} throughout: {error}.") from error


def check_columns(seen: Sequence[str], needed: Sequence[str], new: Sequence[str]) -> None:
    """Raise a ValueError if a column that is read is missing, or one that is added is taken."""
    missing = [c for c in needed if c not in seen]
    if missing:
        raise ValueError(
            f"The dataset has no column {missing}; it has {list(seen)}. Run the stage that adds it, or name yours: "
            "score_column=..., cluster_column=..."
        )
    taken = [c for c in new if c in seen]
    if taken:
        raise ValueError(
            f"The dataset already has the column(s) {taken} of an earlier selection, which would be overwritten. "
            f"Keep them under other names: dataset.rename_column({taken[0]!r}, ...), or drop them: "
            f"dataset.remove_columns({taken})."
        )
