"""Select by CaR's rule within bounds: pinned rows, then the best of every cluster, then the best by score.

Does: keep a budget in rows or tokens and quotas by stratum, and pass over what does not fit.
Does not: compute quotas, read columns, or select by another rule.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from car_datasets.selection.filling import Room, choice_of
from car_datasets.selection.limits import Limits
from car_datasets.selection.rule import BY_BOTH, BY_CLUSTER, BY_PIN, BY_SCORE, Choice, Indices, ranks_of


def choose_within(scores: npt.NDArray[np.float64], clusters: Indices, n2: int, limits: Limits) -> Choice:
    """Return CaR's selection within bounds.

    First all pinned rows are taken, then the `n2` best rows of every cluster (a pinned row is one of them), then the
    best by score until the budget is used. A row that does not fit into what is left of the budget, or of the quota of
    its stratum, is passed over, and the next best of its cluster is tried. With a budget in rows alone, the result is
    that of [`choose`] with this budget, as long as the clusters do not give more than it.

    Args:
        scores (`(rows,)` float64): quality scores, higher is better; NaN for a row that must not be selected.
        clusters (`(rows,)` int64): labels; a negative one marks a row without a cluster.
        n2 (`int`): number of rows taken from every cluster.
        limits ([`Limits`]): the bounds.

    Returns:
        [`Choice`]: the chosen rows, best score first. The reason of a pinned row is `"pin"`.

    Raises:
        ValueError: the pinned rows cost more than the budget or a quota, or one of them has no score.
    """
    if limits.pinned is not None and len(rows := np.flatnonzero(limits.pinned & np.isnan(scores))):
        raise ValueError(f"{len(rows)} pinned rows have no score, the first at position {rows[0]}; do not pin these.")
    room = Room(limits, scores)
    ranks = ranks_of(scores)
    order = np.argsort(ranks)[: int(np.count_nonzero(~np.isnan(scores)))]
    picks = _take_from_clusters(room, order[clusters[order] >= 0], clusters, n2)
    before = len(room.taken)
    room.take_in_order(order[room.open[order]].tolist())
    # The last row that score took: one of a cluster's rows that is no worse is there by both. Where strata have quotas,
    # each has a last row of its own.
    last = np.zeros(int(room.strata.max(initial=-1)) + 2, dtype=np.int64)
    by_score = np.asarray(room.taken[before:], dtype=np.int64)
    np.maximum.at(last, room.strata[by_score], ranks[by_score])
    room.use_rest()
    choice = choice_of(room, clusters, BY_SCORE)
    rows = choice.positions
    both = np.where(ranks[rows] <= last[room.strata[rows]], BY_BOTH, BY_CLUSTER)
    reasons = np.where(picks[rows], both, BY_SCORE)
    if limits.pinned is not None:
        reasons = np.where(limits.pinned[rows], BY_PIN, reasons)
    return choice._replace(selected_by=reasons.tolist())


def _take_from_clusters(room: Room, order: Indices, clusters: Indices, n2: int) -> npt.NDArray[np.bool_]:
    """Take the best rows of every cluster that fit, and return a mask of the rows taken.

    Args:
        room ([`Room`]): holds the pinned rows already.
        order (`(rows in a cluster,)` int64): positions of the rows that have a score and a cluster, best first.
        clusters (`(rows,)` int64): of all rows.
        n2 (`int`): number of rows to take from every cluster, pinned rows included.
    """
    picks = np.zeros(len(clusters), dtype=bool)
    wanted = np.full(int(clusters.max(initial=-1)) + 1, n2, dtype=np.int64)
    pinned = clusters[room.pinned] if room.pinned else np.zeros(0, dtype=np.int64)
    np.subtract.at(wanted, pinned[pinned >= 0], 1)
    left = wanted.tolist()
    candidates = order[room.open[order]] if n2 else order[:0]
    for row, cluster in zip(candidates.tolist(), clusters[candidates].tolist(), strict=True):
        if left[cluster] > 0 and room.fits(row):
            left[cluster] -= 1
            room.take(row)
            picks[row] = True
    return picks
