"""Select the n1 best rows by score and the n2 best rows of every cluster (CaR sec. 3.3), from two columns.

Does: compute ranks, return the chosen rows with the reason for each. Ties go to the earlier row, so that equal input
gives an equal selection on any machine.
Does not: read text, compute scores or clusters, or leave out rows of equal content, as the original does.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from car_datasets.scoring.named import refuse_raw_numbers
from car_datasets.utils.column_names import ColumnNames
from car_datasets.utils.columns import check_columns, read_clusters, read_numbers, refuse_other_datasets
from car_datasets.utils.settings import default_n1, is_integer, refuse_two_amounts

if TYPE_CHECKING:
    from datasets import Dataset

SELECTION_COLUMNS = ("selected_by", "score_rank", "cluster_rank")
REASONS = BY_SCORE, BY_CLUSTER, BY_BOTH = "score", "cluster", "both"  # values of the column `selected_by`
OTHER_REASONS = BY_PIN, BY_GAIN, BY_LIKE = "pin", "gain", "like"  # those that bounds and other rules add
Indices = npt.NDArray[np.int64]


class Choice(NamedTuple):
    """The chosen rows, best score first.

    Args:
        positions (`(chosen,)` int64): row positions.
        selected_by (`list[str]`): per position, `"score"`, `"cluster"` or `"both"`; by other rules, and within bounds,
            also `"pin"`, `"gain"` or `"like"`.
        score_rank (`(chosen,)` int64): rank in the pool, 1 for the best.
        cluster_rank (`(chosen,)` int64): rank within the cluster, 1 for the best, 0 without a cluster.
    """

    positions: Indices
    selected_by: list[str]
    score_rank: Indices
    cluster_rank: Indices


def select_car(
    dataset: Dataset,
    n1: int | float | None = None,
    n2: int = 1,
    *,
    budget: int | None = None,
    score_column: str = ColumnNames.score,
    cluster_column: str = ColumnNames.cluster,
    index_column: str = ColumnNames.index,
    allow_worse: bool = False,
) -> Dataset:
    """Return the selected rows of a scored, clustered dataset, best score first.

    Args:
        dataset (`Dataset`): pool with a score and a cluster for every row. Rows without a score are never selected;
            rows without a cluster can only be selected by score.
        n1 (`int` or `float`, *optional*): number of rows taken by score; a float in (0, 1) is that share of the scored
            rows. Without n1 and budget it is 1000 as in the paper, but at most half of the scored rows.
        n2 (`int`): number of rows taken from every cluster, 1 in the paper.
        budget (`int`, *optional*): number of rows in total; n1 then follows from it and from n2, and must not be given.
        score_column (`str`): column of scores.
        cluster_column (`str`): column of clusters: 0, 1, 2, ...; null, -1, -2 or -3 for a row without a cluster.
        index_column (`str`): kept if the dataset has it, otherwise added: the row's position in `dataset`.
        allow_worse (`bool`): accept a selection whose mean score is below the pool's.

    Returns:
        `Dataset`: all columns of the chosen rows, and `selected_by` (`"score"`, `"cluster"`, `"both"`), `score_rank`
        and `cluster_rank` (1 is best, over the pool and within the cluster; `cluster_rank` is 0 without a cluster).

    Raises:
        ValueError: a column is missing or would be overwritten, a number does not fit, or the selection is worse than
            the pool on average.
    """
    refuse_other_datasets(dataset, "select_car", "select_car_streaming(dataset, clusters)")
    check_columns(dataset.column_names, (score_column, cluster_column), SELECTION_COLUMNS)
    refuse_raw_numbers(score_column, dataset.column_names)
    scores = read_numbers(dataset, score_column, np.nan)
    if n1 is None and budget is None and np.isnan(scores).all():
        raise ValueError(f"No row has a score in the column {score_column!r}, so there is nothing to select.")
    choice = choose(scores, read_clusters(dataset, cluster_column), n1, n2, budget)
    if len(choice.positions) == 0:
        raise ValueError(f"n1={n1} and n2={n2} select no rows; pass at least one of them above 0.")
    # The original's first release sorted the wrong way round, and shipped the worst rows for two months.
    if not allow_worse:
        refuse_worse(scores, choice.positions)
    return add_selection(dataset, choice, index_column)


def add_selection(dataset: Dataset, choice: Choice, index_column: str) -> Dataset:
    """Return the chosen rows with `index_column`, if it is missing, and the columns `SELECTION_COLUMNS`."""
    # In Arrow's format: numpy's would turn integers in a column with nulls into floats when add_column copies the rows.
    form = dataset.format
    chosen = dataset.with_format("arrow").select(choice.positions.tolist())
    if index_column not in dataset.column_names:
        chosen = chosen.add_column(index_column, choice.positions)
    chosen = chosen.add_column("selected_by", choice.selected_by)
    chosen = chosen.add_column("score_rank", choice.score_rank)
    chosen = chosen.add_column("cluster_rank", choice.cluster_rank)
    return chosen.with_format(form["type"], **form["format_kwargs"])


def choose(
    scores: npt.ArrayLike,
    clusters: npt.ArrayLike,
    n1: int | float | None = None,
    n2: int = 1,
    budget: int | None = None,
) -> Choice:
    """Return CaR's selection from two arrays.

    Args:
        scores (`(rows,)` float): quality scores, higher is better; NaN marks a row without a score, which is never
            chosen.
        clusters (`(rows,)` int): labels; a negative one marks a row without a cluster, which can only be chosen by
            score.
        n1 (`int` or `float`, *optional*): number of rows taken by score; a float in (0, 1) is that share of the scored
            rows. Without n1 and budget it is 1000, but at most half of the scored rows.
        n2 (`int`): number of rows taken from every cluster.
        budget (`int`, *optional*): number of rows in total; n1 then follows from it and from n2, and must not be given.

    Raises:
        ValueError: n1 and budget are both given, a number is negative or larger than the number of rows, or the budget
            is below what the clusters take.
    """
    score, cluster = np.asarray(scores, dtype=np.float64), np.asarray(clusters, dtype=np.int64)
    if score.shape != cluster.shape or score.ndim != 1:
        raise ValueError(f"scores have the shape {score.shape} and clusters {cluster.shape}; both must be (rows,).")
    scored = int(np.count_nonzero(~np.isnan(score)))
    refuse_two_amounts(n1, budget)
    _check_counts(scored, n2, budget)
    # From here on rows are in order of falling score: the rows taken by score are the first `count`.
    order = _best_first(score)[:scored]
    most = _rows_by_score(n1, scored) if budget is None else min(budget, scored)
    within = ranks_within(cluster[order])
    from_clusters = (within >= 1) & (within <= n2)
    count = most if budget is None else _rows_for_budget(budget, from_clusters)
    places = np.flatnonzero((np.arange(scored) < count) | from_clusters)
    by_score, by_cluster = places < count, from_clusters[places]
    reasons = np.where(by_score & by_cluster, BY_BOTH, np.where(by_score, BY_SCORE, BY_CLUSTER))
    return Choice(order[places], reasons.tolist(), places + 1, within[places])


def ranks_of(scores: npt.NDArray[Any]) -> Indices:
    """Return the rank of every row, 1 for the best; ties by row order, NaN last."""
    ranks = np.empty(len(scores), dtype=np.int64)
    ranks[_best_first(np.asarray(scores, dtype=np.float64))] = np.arange(1, len(scores) + 1)
    return ranks


def ranks_within(labels: Indices) -> Indices:
    """Return the rank of every row in its cluster, 1 for the best, 0 without a cluster.

    Args:
        labels (`(rows,)` int): clusters of the rows, best row first; negative without a cluster.
    """
    # The rows come best first, so counting within each cluster is ranking. NumPy has no cumulative count by group.
    ranks: Indices = pd.Series(labels).groupby(labels).cumcount().to_numpy() + 1
    ranks[labels < 0] = 0
    return ranks


def shares_within(scores: npt.NDArray[np.float64], groups: Sequence[str]) -> npt.NDArray[np.float64]:
    """Return for every row the share of its group that it outranks, from 0 to 1; NaN without a score.

    The row of rank r among n is at 1 - (r - 0.5) / n. The best rows by this number are thus divided among the groups in
    proportion to their rows (Sainte-Lague's rule), whatever the scale of the scores in each; standardised scores would
    give more rows to the group with the longer tail.

    Args:
        scores (`(rows,)` float64): higher is better; NaN without a score.
        groups (`(rows,)` str): such as the language of each row.
    """
    order = _best_first(scores)[: int(np.count_nonzero(~np.isnan(scores)))]
    labels = pd.Series(pd.factorize(np.asarray(groups, dtype=object))[0][order])
    within = labels.groupby(labels)
    shares = np.full(len(scores), np.nan)
    shares[order] = 1 - (within.cumcount().to_numpy() + 0.5) / within.transform("size").to_numpy()
    return shares


def _best_first(score: npt.NDArray[np.float64]) -> Indices:
    """Return row positions by falling score; ties by row order, NaN last."""
    return np.argsort(-score, kind="stable")


def refuse_infinite(scores: npt.NDArray[np.float64], column: str) -> None:
    """Raise ValueError for scores of which no mean, quantile or histogram can be computed; NaN is no score."""
    if len(rows := np.flatnonzero(np.abs(scores) > 1e100)):
        raise ValueError(
            f"The column {column!r} holds infinite or absurd scores in {len(rows)} rows, the first {rows[:5].tolist()}. "
            "Score these rows again, or make their scores null, which leaves them out."
        )


def _rows_by_score(n1: int | float | None, rows: int) -> int:
    """Return n1 as a number of rows; a fraction is rounded down, but to 1 at least."""
    if n1 is None:
        return default_n1(rows)
    if not isinstance(n1, numbers.Real):
        raise ValueError(f"n1={n1!r} is a {type(n1).__name__}; pass a number of rows, or a share such as 0.05.")
    # numpy's floats are Real too; 1.0 is refused, since it could mean one row or all rows.
    if isinstance(n1, numbers.Real) and not isinstance(n1, numbers.Integral):
        if not 0 < n1 < 1:
            raise ValueError(f"n1={n1!r}: a fraction must lie between 0 and 1; for a number of rows pass an int.")
        return max(1, math.floor(float(n1) * rows + 1e-9))  # 0.29 * 100 is 28.999999999999996
    if not _is_count(n1) or n1 > rows:
        raise ValueError(f"n1={n1!r} must be between 0 and the {rows} rows; a share such as 0.05 is fine too.")
    return int(n1)


def _rows_for_budget(budget: int, from_clusters: npt.NDArray[np.bool_]) -> int:
    """Return the n1 with which score and clusters together take `budget` rows.

    Args:
        budget (`int`): number of rows in total.
        from_clusters (`(rows,)` bool): rows that the clusters take, in order of falling score.
    """
    taken = int(from_clusters.sum())
    if not taken <= budget <= len(from_clusters):
        raise ValueError(
            f"budget={budget} must be between the {taken} rows that the clusters take (fewer with a smaller n2 or k) "
            f"and the {len(from_clusters)} rows."
        )
    # With n1 rows by score, the union holds these and the cluster picks that come after them.
    # union[n1] = taken + (rows among the first n1 that no cluster takes): it never falls, so the n1 can be searched.
    union = np.r_[0, np.cumsum(~from_clusters)] + taken
    return int(np.searchsorted(union, budget, side="left"))


def _check_counts(rows: int, n2: int, budget: int | None) -> None:
    """Raise ValueError if n2 or the budget is not a number of rows."""
    if not _is_count(n2) or n2 > max(rows, 1):
        raise ValueError(f"n2={n2!r} must be between 0 and the {rows} rows, an integer.")
    # A negative budget is refused later, together with the number of rows that the clusters take.
    if budget is not None and not is_integer(budget):
        raise ValueError(f"budget={budget!r} must be an integer.")


def _is_count(value: Any) -> bool:
    return is_integer(value) and int(value) >= 0


def refuse_impossible(rows: int, clusters: int, n1: int | float | None, n2: int, budget: int | None) -> None:
    """Raise ValueError for an n1, n2 or budget that cannot fit, before any row is scored.

    Args:
        rows (`int`): number of rows that may get a score.
        clusters (`int`): number of clusters that will have rows.
        n1 (`int` or `float`, *optional*): number of rows taken by score, or their share.
        n2 (`int`): number of rows taken from every cluster.
        budget (`int`, *optional*): number of rows in total, in place of n1.
    """
    refuse_two_amounts(n1, budget)
    _check_counts(rows, n2, budget)
    # Every cluster gives at least one row if n2 > 0, so a budget below the number of clusters can never be met.
    if budget is None:
        if _rows_by_score(n1, rows) == n2 == 0:
            raise ValueError(f"n1={n1} and n2={n2} select no rows; pass at least one of them above 0.")
    elif not (clusters if n2 else 1) <= budget <= rows:
        raise ValueError(
            f"budget={budget} must be between the {clusters if n2 else 1} rows that the clusters take (fewer with n2=0 "
            f"or a smaller k) and the {rows} rows."
        )


def refuse_worse(scores: npt.ArrayLike, positions: Indices) -> None:
    """Raise ValueError if the chosen rows score below the pool on average: the sign of the score is likely wrong."""
    values = np.asarray(scores, dtype=np.float64)
    if len(positions) == 0:
        raise ValueError("n1 and n2 select no rows; pass at least one of them above 0.")
    # Rows without a score count neither in the pool (nanmean) nor in the selection, which has none.
    pool, chosen = float(np.nanmean(values)), float(values[positions].mean())
    # Equal means may differ in their last digits: 0.1 + 0.1 + 0.1 is not 0.3 in floats.
    if chosen < pool - 1e-9 * max(1.0, abs(pool)):
        raise ValueError(
            f"The selection's mean score {chosen:.4f} is below the pool's {pool:.4f}. Is a higher score better in this "
            "column? If clusters alone (a small n1) pull it down and you mean that, pass "
            "allow_worse=True (--allow-worse)."
        )
