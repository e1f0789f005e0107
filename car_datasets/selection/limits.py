"""`Limits`: how much a rule of selection may take, of what, and which rows it must take.

Does: hold the budget, the cost of each row, quotas by stratum and pinned rows; read a budget in tokens.
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
