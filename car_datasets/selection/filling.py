"""Fill a budget with rows under quotas: `Room` keeps count of what is left, whatever rule names the next row.

Does: take pinned rows first; take rows that fit, one by one or in an order; swap rows at the end, so that a budget in
tokens is used up; return what was taken as a [`Choice`].
Does not: rank rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import numpy as np
import numpy.typing as npt

from car_datasets.selection.limits import Limits
from car_datasets.selection.rule import BY_PIN, Choice, Indices, ranks_of, ranks_within

Floats = npt.NDArray[np.float64]
SPARE = 0.001  # share of a budget that may stay unused without a search for rows to swap
SWAPPED = 1_000  # rows that may be given back again for others
MOST_LOST = 0.05  # share of the scored rows by which a row may rank behind the one that it replaces


class Room:
    """What is left of a budget and of its quotas while rows are taken; the pinned rows are taken from the start.

    Args:
        limits ([`Limits`]): the bounds.
        scores (`(rows,)` float64): NaN for a row that must not be taken, unless it is pinned.

    Raises:
        ValueError: the arrays are not of one length, a cost is negative, or the pinned rows exceed budget or quota.
    """

    def __init__(self, limits: Limits, scores: Floats) -> None:
        _check(limits, len(scores))
        self.limits, self.left = limits, int(limits.budget)
        self.costs = np.ones(len(scores), dtype=np.int64) if limits.costs is None else limits.costs
        self.strata = np.full(len(scores), -1) if limits.strata is None or limits.quotas is None else limits.strata
        self.quotas_left: list[int] = [] if limits.quotas is None else limits.quotas.tolist()
        self.scores, self.open = scores, ~np.isnan(scores)  # `open`: a mask of the rows that may still be taken
        self.taken: list[int] = []  # in the order of taking, pinned rows first
        # Numbers of Python, since the loops over rows read one at a time.
        self._costs, self._strata = self.costs.tolist(), self.strata.tolist()
        self._swapped: list[int] = []  # taken in a swap, and never given back, so that swapping ends
        self.pinned = [] if limits.pinned is None else np.flatnonzero(limits.pinned).tolist()
        for row in self.pinned:
            self.take(row)
        _refuse_pins(self)

    def fits(self, row: int) -> bool:
        """Return True if budget and quota have room for a row; what does not fit now never will."""
        cost, stratum = self._costs[row], self._strata[row]
        return bool(cost <= self.left and (stratum < 0 or cost <= self.quotas_left[stratum]))

    def take(self, row: int) -> None:
        """Take a row, whether it fits or not."""
        self.taken.append(row)
        self.open[row] = False
        self._spend(row, self._costs[row])

    def take_in_order(self, rows: Iterable[int]) -> None:
        """Take of these open rows each one that fits when its turn comes."""
        least = int(self.costs[self.open].min(initial=np.iinfo(np.int64).max))
        for row in rows:
            if self.left < least:
                break
            if self.fits(row):
                self.take(row)

    def _spend(self, row: int, cost: int) -> None:
        self.left -= cost
        if self._strata[row] >= 0:
            self.quotas_left[self._strata[row]] -= cost

    def use_rest(self) -> None:
        """Swap taken rows for dearer ones while more than `SPARE` of the budget is unused and a swap of two rows helps.

        A swap stays within a stratum and gives back one of the `SWAPPED` rows taken last, never a pinned one or one that
        came by a swap. The new row ranks behind the one that it replaces by `MOST_LOST` of the scored rows at most: a few
        tokens are not worth a good row, so a small budget of a small pool may keep a rest.
        """
        if self.limits.costs is None:  # rows of one cost leave a rest only where rows run out
            return
        for stratum in np.unique(self.strata).tolist():
            while self.left > SPARE * self.limits.budget and (swap := self._best_swap(stratum)) is not None:
                out, new = swap
                self.taken.remove(out)
                self.open[out] = True
                self._spend(out, -self._costs[out])
                self.take(new)
                self._swapped.append(new)

    def _best_swap(self, stratum: int) -> tuple[int, int] | None:
        """Return the row to give back and the one to take for it, or None if no swap uses more of the budget.

        Of the swaps that use enough, it is the one that loses the fewest places in the order of the scores.
        """
        rest = self.left if stratum < 0 else min(self.left, self.quotas_left[stratum])
        held = np.array(self.taken[len(self.pinned) :][-SWAPPED:], dtype=np.int64)
        held = held[~np.isin(held, self._swapped)]
        out = self._first_of_each_cost(held[self.strata[held] == stratum], -self._ranks)
        new = self._first_of_each_cost(np.flatnonzero(self.open & (self.strata == stratum)), self._ranks)
        more = self.costs[new] - self.costs[out][:, None]
        lost = self._ranks[new] - self._ranks[out][:, None]
        fits = (more > 0) & (more <= rest) & (lost <= MOST_LOST * np.count_nonzero(~np.isnan(self.scores)))
        if not fits.any():
            return None
        enough = fits & (more >= self.left - SPARE * self.limits.budget)
        # Without a swap that uses enough, one that uses the most, and another after it.
        merit = np.where(enough, -lost, np.iinfo(np.int64).min) if enough.any() else np.where(fits, more, 0)
        place = np.unravel_index(int(np.argmax(merit)), merit.shape)
        return int(out[place[0]]), int(new[place[1]])

    @cached_property
    def _ranks(self) -> Indices:
        return ranks_of(self.scores)

    def _first_of_each_cost(self, rows: Indices, order: Indices) -> Indices:
        """Return of the rows of each cost the one that comes first in an order."""
        rows = rows[np.lexsort((order[rows], self.costs[rows]))]
        return rows[np.unique(self.costs[rows], return_index=True)[1]]


def choice_of(room: Room, clusters: Indices, reason: str) -> Choice:
    """Return the rows that were taken as a choice, best score first.

    Args:
        room ([`Room`]): of the scores by which the rows are ranked. A pinned row without a score comes last.
        clusters (`(rows,)` int64): negative for a row without a cluster.
        reason (`str`): `selected_by` of the rows that were not pinned.
    """
    ranks = ranks_of(room.scores)
    scored = np.argsort(ranks)[: int(np.count_nonzero(~np.isnan(room.scores)))]
    within = np.zeros(len(ranks), dtype=np.int64)
    within[scored] = ranks_within(clusters[scored])
    rows = np.array(room.taken, dtype=np.int64)
    rows = rows[np.argsort(ranks[rows])]
    pinned = set(room.pinned)
    return Choice(rows, [BY_PIN if row in pinned else reason for row in rows.tolist()], ranks[rows], within[rows])


def _check(limits: Limits, rows: int) -> None:
    """Raise ValueError for limits of other rows, negative costs, or a stratum without a quota."""
    for name in ("costs", "strata", "pinned"):
        array = getattr(limits, name)
        if array is not None and np.shape(array) != (rows,):
            raise ValueError(
                f"limits.{name} has the shape {np.shape(array)}; it must have one number for each of {rows} rows."
            )
    if limits.costs is not None and rows and int(limits.costs.min()) < 0:
        row = int(limits.costs.argmin())
        raise ValueError(f"limits.costs is {limits.costs[row]} in row {row}; a cost must not be negative.")
    if limits.strata is not None and limits.quotas is not None and rows and limits.strata.max() >= len(limits.quotas):
        raise ValueError(
            f"limits.strata has the stratum {limits.strata.max()}, but limits.quotas has {len(limits.quotas)} entries; "
            "give each stratum a quota, or -1 to the rows of one that needs none."
        )


def _refuse_pins(room: Room) -> None:
    """Raise ValueError if the pinned rows, which have just been taken, exceed the budget or a quota."""
    if room.left < 0:
        # Costs other than one per row are tokens.
        name = "budget" if room.limits.costs is None else "budget_tokens"
        raise ValueError(
            f"{name}={room.limits.budget} is below the {room.limits.budget - room.left} that the {len(room.pinned)} "
            "pinned rows cost. Raise the budget, or pin fewer rows."
        )
    if over := [(stratum, left) for stratum, left in enumerate(room.quotas_left) if left < 0]:
        stratum, left = over[0]
        quota = 0 if room.limits.quotas is None else int(room.limits.quotas[stratum])
        raise ValueError(
            f"The quota {quota} of stratum {stratum} is below the {quota - left} that its pinned rows cost. Raise the "
            "quota, or pin fewer rows of it."
        )
