"""Select by CaR's rule within bounds: pinned rows, then the best of every cluster, then the best by score.

Does: keep a budget in rows or tokens and quotas by stratum, skip what does not fit, and fill what is left.
Does not: compute quotas, read columns, or select by another rule.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from car_datasets.selection.limits import Limits
from car_datasets.selection.rule import (
    BY_BOTH,
    BY_CLUSTER,
    BY_PIN,
    BY_SCORE,
    Choice,
    Indices,
    ranks_within,
)

UNUSED = 1e-3  # share of a budget in tokens that may be left; above it, rows are exchanged for longer ones
MOST_EXCHANGES = 20  # for each stratum; each but the last takes the row that fills most of what is left


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
    order = np.argsort(-scores, kind="stable")[: int(np.count_nonzero(~np.isnan(scores)))]
    if limits.pinned is not None and np.isnan(scores[limits.pinned]).any():
        rows = np.flatnonzero(limits.pinned & np.isnan(scores))
        raise ValueError(f"{len(rows)} pinned rows have no score, the first at position {rows[0]}; do not pin these.")
    run = _Run(order, clusters, limits)
    picks = run.take_from_clusters(n2)
    last = run.take_by_score()
    if limits.costs is not None:
        run.fill()
    places = np.flatnonzero(run.taken)
    # A cluster's row that score alone would have taken too is there by both. Where strata have quotas, each has a last
    # row by score of its own.
    by_score = places <= last[run.strata[places]]
    reasons = np.where(picks[places] & by_score, BY_BOTH, np.where(picks[places], BY_CLUSTER, BY_SCORE))
    reasons = np.where(run.pinned[places], BY_PIN, reasons)
    return Choice(order[places], reasons.tolist(), places + 1, ranks_within(clusters[order])[places])


class _Run:
    """One selection: rows in order of falling score (their places), and what is left of the bounds."""

    def __init__(self, order: Indices, clusters: Indices, limits: Limits) -> None:
        rows = len(order)
        self.costs = np.ones(rows, dtype=np.int64) if limits.costs is None else limits.costs[order]
        left, quotas = limits.after_pins()
        # One more stratum at the end, which -1 finds: that of rows without a quota, bounded by the budget alone.
        self.quotas = np.append(quotas, left)
        self.strata = np.full(rows, -1, dtype=np.int64) if limits.strata is None else limits.strata[order]
        self.clusters = clusters[order]
        self.pinned = np.zeros(rows, dtype=bool) if limits.pinned is None else limits.pinned[order]
        self.taken = self.pinned.copy()
        self.left, self.budget = left, limits.budget

    def take_from_clusters(self, n2: int) -> npt.NDArray[np.bool_]:
        """Take the best rows of every cluster that fit, and return a mask of them."""
        open_clusters = np.full(int(self.clusters.max(initial=-1)) + 1, n2, dtype=np.int64)
        pinned = self.clusters[self.pinned & (self.clusters >= 0)]
        np.subtract.at(open_clusters, pinned, 1)
        wanted = open_clusters.tolist()
        before = self.taken.copy()
        candidates = np.flatnonzero(~self.taken & (self.clusters >= 0)) if n2 else np.zeros(0, dtype=np.int64)
        costs, strata, quotas = self.costs.tolist(), self.strata.tolist(), self.quotas.tolist()
        clusters = self.clusters.tolist()
        for place in candidates.tolist():
            cost, stratum = costs[place], strata[place]
            if wanted[clusters[place]] > 0 and cost <= self.left and cost <= quotas[stratum]:
                wanted[clusters[place]] -= 1
                self.left -= cost
                quotas[stratum] -= cost
                self.taken[place] = True
        self.quotas = np.asarray(quotas, dtype=np.int64)
        return self.taken & ~before

    def take_by_score(self) -> Indices:
        """Take the best rows that fit, and return the place of the last one of every stratum, -1 without one."""
        costs, strata, quotas = self.costs.tolist(), self.strata.tolist(), self.quotas.tolist()
        last = [-1] * len(quotas)
        for place in np.flatnonzero(~self.taken).tolist():
            cost, stratum = costs[place], strata[place]
            if cost <= self.left and cost <= quotas[stratum]:
                self.left -= cost
                quotas[stratum] -= cost
                self.taken[place] = True
                last[stratum] = place
                if self.left <= 0:
                    break
        self.quotas = np.asarray(quotas, dtype=np.int64)
        return np.asarray(last, dtype=np.int64)

    def fill(self) -> None:
        """Exchange rows for longer ones where much of a budget in tokens is left, the worst rows first."""
        for stratum in range(-1, len(self.quotas) - 1):
            own = self.strata == stratum
            for _ in range(MOST_EXCHANGES):
                left = min(self.left, int(self.quotas[stratum]))
                allowed = int(UNUSED * (int(self.costs[own & self.taken].sum()) + left))
                inside = np.flatnonzero(own & self.taken & ~self.pinned)[::-1]
                outside = np.flatnonzero(own & ~self.taken)
                if (
                    left <= allowed
                    or not len(inside)
                    or not len(outside)
                    or not self._exchange(inside, outside, left, allowed)
                ):
                    break

    def _exchange(self, inside: Indices, outside: Indices, left: int, allowed: int) -> bool:
        """Exchange one row for a longer one; return False if none fills more of what is left.

        Args:
            inside (`(m,)` int64): places of the rows that may leave, worst first.
            outside (`(n,)` int64): places of the rows that may come in, best first.
            left (`int`): what may be added to the cost.
            allowed (`int`): what may be left after it.
        """
        # The first, that is best, row of each cost.
        lengths, first = np.unique(self.costs[outside], return_index=True)
        found = np.searchsorted(lengths, self.costs[inside] + left, side="right") - 1
        gains = np.where(found >= 0, lengths[np.maximum(found, 0)], 0) - self.costs[inside]
        best = int(np.argmax(gains >= left - allowed)) if (gains >= left - allowed).any() else int(np.argmax(gains))
        gain = int(gains[best])
        if gain <= 0:
            return False
        stratum = self.strata[inside[best]]
        self.taken[inside[best]], self.taken[outside[first[found[best]]]] = False, True
        self.left -= gain
        self.quotas[stratum] -= gain
        return True
