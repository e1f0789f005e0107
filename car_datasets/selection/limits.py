"""`Limits`: how much a rule of selection may take, of what, and which rows it must take.

Does: hold the budget, the cost of each row, quotas by stratum and pinned rows, checked once.
Does not: choose rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


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
