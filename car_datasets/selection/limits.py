"""`Limits`: how much a rule of selection may take, of what, and which rows it must take.

Does: hold the budget, the cost of each row, quotas by stratum and pinned rows; say what the pinned rows leave of them;
read a budget in tokens.
Does not: choose rows.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from car_datasets.utils.settings import is_integer

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}


@dataclass(frozen=True)
class Limits:
    """The bounds that every rule keeps.

    Rows that must not be selected are not listed here: their score is NaN.

    Args:
        budget (`int`): the sum of the costs that may be selected at most, pinned rows included: rows or tokens.
        costs (`(rows,)` int64, *optional*): cost of each row, such as its tokens; None counts each row as 1.
        strata (`(rows,)` int64, *optional*): number of the row's stratum, -1 for a row in none, which has no quota.
        quotas (`(strata,)` int64, *optional*): the sum of the costs that may be selected from each stratum at most.
        pinned (`(rows,)` bool, *optional*): rows that are selected first, whatever their score. They count towards
            budget and quotas.
    """

    budget: int
    costs: npt.NDArray[np.int64] | None = None
    strata: npt.NDArray[np.int64] | None = None
    quotas: npt.NDArray[np.int64] | None = None
    pinned: npt.NDArray[np.bool_] | None = None

    def after_pins(self) -> tuple[int, npt.NDArray[np.int64]]:
        """Return what the pinned rows leave of the budget, and of the quota of each stratum.

        Raises:
            ValueError: the pinned rows cost more than the budget or a quota.
        """
        quotas = np.zeros(0, dtype=np.int64) if self.quotas is None else self.quotas.copy()
        if self.pinned is None or not self.pinned.any():
            return self.budget, quotas
        rows = np.flatnonzero(self.pinned)
        costs = np.ones(len(rows), dtype=np.int64) if self.costs is None else self.costs[rows]
        left = self.budget - int(costs.sum())
        if left < 0:
            raise ValueError(
                f"The {len(rows)} pinned rows cost {costs.sum()} of a budget of {self.budget}; raise the budget, or pin "
                "fewer rows (--keep)."
            )
        if self.strata is not None and self.quotas is not None:
            strata = self.strata[rows]
            np.subtract.at(quotas, strata[strata >= 0], costs[strata >= 0])
            if (quotas < 0).any():
                over = int(np.flatnonzero(quotas < 0)[0])
                raise ValueError(
                    f"The pinned rows of stratum {over} cost {self.quotas[over] - quotas[over]}, more than its quota of "
                    f"{self.quotas[over]}; give it a larger share, or pin fewer of its rows (--keep)."
                )
        return left, quotas


def parse_tokens(budget: int | str) -> int:
    """Return a budget in tokens as a number.

    Args:
        budget (`int` or `str`): a number, or text such as `"500k"`, `"1.5M"` or `"2B"`; `"_"` and `","` are not read.

    Raises:
        ValueError: it is neither, or is not above 0.
    """
    if is_integer(budget) and budget > 0:
        return int(budget)
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmbg]?)", str(budget).replace("_", "").replace(",", "").strip().lower())
    # round, as 1.1 * 10 ** 6 is 1100000.0000000002 in floats.
    tokens = round(float(match[1]) * _UNITS[match[2]]) if match else 0
    if tokens < 1:
        raise ValueError(f"budget_tokens={budget!r}: pass a number of tokens above 0, such as 500000, 500k or 2M.")
    return tokens
