"""Share a budget out among the values of a column: `parse_quota`, `whole_quotas`, `quotas_of`.

Does: read the text of a quota; divide a budget into whole numbers by shares, pass on what a value cannot use; number the
strata of rows.
Does not: choose rows, or find languages and kinds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from datasets import Dataset

Counts = npt.NDArray[np.int64]
NO_VALUE = "null"  # the stratum of rows whose value is null
MOST_STRATA = 10_000  # values of a column; one with more names rows, and not groups of them
# A column names rows if it has more values than this share of the rows, in a dataset of so many rows or more.
OWN_VALUE, FEW_ROWS = 0.9, 20


class Shares(NamedTuple):
    """A budget that is shared out.

    Args:
        names (`tuple[str, ...]`): the value of each stratum; `""` for all values that a quota does not name.
        strata (`(rows,)` int64): number of the stratum of each row.
        quotas (`(strata,)` int64): the most that may be selected of each, in the unit of the budget.
    """

    names: tuple[str, ...]
    strata: Counts
    quotas: Counts


def parse_quota(text: str) -> tuple[str, dict[str, float]]:
    """Return the column and the shares by value of a text such as `"source=code:0.2,chat:0.5"`.

    Raises:
        ValueError: the text is not of this form, a value is named twice, a share is not a number from 0 to 1, or the
            shares are more than 1 in total.
    """
    column, equals, rest = text.partition("=")
    pairs = [part.rpartition(":") for part in rest.split(",")]
    if not equals or not column.strip() or not all(name.strip() and share.strip() for name, _, share in pairs):
        raise ValueError(f"quota={text!r}: write COLUMN=VALUE:SHARE,..., as in source=code:0.2,chat:0.5.")
    shares: dict[str, float] = {}
    for name, _, share in pairs:
        try:
            value = float(share)
        except ValueError:
            value = math.nan
        if not 0 <= value <= 1:
            raise ValueError(f"quota={text!r}: the share {share.strip()!r} must be a number from 0 to 1, such as 0.2.")
        if name.strip() in shares:
            raise ValueError(f"quota={text!r} names {name.strip()!r} twice; give it one share.")
        shares[name.strip()] = value
    total = math.fsum(shares.values())
    if total > 1 + 1e-9:
        raise ValueError(f"quota={text!r}: the shares are {total:g} in total; they must be at most 1.")
    return column.strip(), shares


def read_strata(dataset: Dataset, column: str) -> list[str]:
    """Return the value of each row in a column as text, `"null"` for null.

    Args:
        dataset (`Dataset`): has the column.
        column (`str`): its name.

    Raises:
        ValueError: the column does not exist, holds other things than text, whole numbers, dates and truth values, or
            has a value of its own in almost every row.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if column not in dataset.column_names:
        raise ValueError(
            f"There is no column {column!r} to tell groups of rows by; the columns are {dataset.column_names}. Name one of "
            "them, or language or kind, which are found (--within, --balance, --quota)."
        )
    values = dataset.with_format(None).select_columns([column]).with_format("arrow")[:][column]
    if pa.types.is_nested(values.type) or pa.types.is_floating(values.type) or pa.types.is_binary(values.type):
        raise ValueError(f"The column {column!r} holds {values.type}; name one of text or whole numbers.")
    if (seen := pc.count_distinct(values).as_py()) > MOST_STRATA:
        raise ValueError(f"The column {column!r} has {seen:,} values, more than {MOST_STRATA:,}: it names no groups.")
    if len(dataset) >= FEW_ROWS and seen > OWN_VALUE * len(dataset):
        raise ValueError(
            f"The column {column!r} has {seen:,} values in {len(dataset):,} rows: it names rows, and not groups of them. Name "
            "a column of which many rows share a value (--within, --balance, --quota)."
        )
    return [NO_VALUE if value is None else str(value) for value in values.to_pylist()]


def refuse_unknown_values(values: Sequence[str], column: str, shares: Mapping[str, float]) -> None:
    """Raise ValueError if a quota names a value that no row has in a column.

    Args:
        values (`Sequence[str]`): of all rows, as [`read_strata`] returns them.
        column (`str`): where they are from.
        shares (`Mapping[str, float]`): of the quota, by value.
    """
    known = sorted(set(values))
    if missing := [name for name in shares if name not in known]:
        raise ValueError(
            f"quota: no row has {missing[0]!r} in the column {column!r}, which has {known[:20]}"
            f"{' and more' if len(known) > 20 else ''}. Name one of these."
        )


def whole_quotas(budget: int, weights: Sequence[float], capacities: Sequence[int] | Counts) -> Counts:
    """Divide a budget into whole numbers in proportion to weights, by largest remainder.

    What a stratum cannot use is passed on to those that can, in proportion to their weights.

    Args:
        budget (`int`): what to divide.
        weights (`(strata,)` float): not negative, in any unit. A weight of 0 gets nothing.
        capacities (`(strata,)` int): the most that each can use.

    Returns:
        `(strata,)` int64: of the sum `budget`, or less if the strata of a weight cannot use it.
    """
    weight, capacity = np.asarray(weights, dtype=np.float64), np.asarray(capacities, dtype=np.int64)
    full = weight <= 0
    capacity = np.where(full, 0, capacity)
    # Those that cannot use their part are set aside, and the rest is divided anew: each round sets at least one aside.
    while True:
        parts = np.where(
            full, capacity, _largest_remainder(budget - int(capacity[full].sum()), np.where(full, 0, weight))
        )
        if not (over := parts > capacity).any():
            return np.asarray(parts, dtype=np.int64)
        full |= over


def _largest_remainder(total: int, weights: npt.NDArray[np.float64]) -> Counts:
    """Divide `total`, 0 or more, into whole numbers; ties go to the first, and no weight gets nothing."""
    if total <= 0 or not weights.any():
        return np.zeros(len(weights), dtype=np.int64)
    exact = total * weights / weights.sum()
    # 0.29 * 100 is 28.999999999999996, which is 29 rows and not 28 with a remainder of almost 1.
    whole = np.floor(exact + 1e-9).astype(np.int64)
    order = np.argsort(-np.where(weights > 0, exact - whole, -1.0).round(9), kind="stable")
    whole[order[: total - int(whole.sum())]] += 1
    return whole


def quotas_of(
    values: Sequence[str],
    costs: Counts | None,
    eligible: npt.NDArray[np.bool_],
    budget: int,
    shares: Mapping[str, float] | None,
) -> Shares:
    """Share a budget out among the values of a column.

    Args:
        values (`(rows,)` str): the value of each row.
        costs (`(rows,)` int64, *optional*): cost of each row in the unit of the budget; None counts each as 1.
        eligible (`(rows,)` bool): rows that may be selected.
        budget (`int`): what to share out.
        shares (`Mapping[str, float]`, *optional*): share by value; all values that are not in it share the rest. Unused
            budget goes to that rest first, then to the others in proportion to their shares. None gives each value an
            equal part, and passes on what it cannot use.
    """
    names = tuple(sorted(set(values)) if shares is None else shares)
    number = {name: i for i, name in enumerate(names)}
    strata = np.array([number.get(value, len(names)) for value in values], dtype=np.int64)
    cost = np.ones(len(strata), dtype=np.int64) if costs is None else costs
    capacities = np.zeros(len(names) + 1, dtype=np.int64)
    np.add.at(capacities, strata[eligible], cost[eligible])
    if shares is None:
        return Shares(names, strata, whole_quotas(budget, [1.0] * len(names), capacities[:-1]))
    weights = [*shares.values(), max(0.0, 1 - math.fsum(shares.values()))]
    parts = _largest_remainder(budget, np.asarray(weights, dtype=np.float64))
    named = np.minimum(parts, capacities)[:-1]
    rest = min(int(capacities[-1]), budget - int(named.sum())) if weights[-1] > 1e-9 else 0
    if named.sum() + rest < budget:
        named = whole_quotas(budget - rest, weights[:-1], capacities[:-1])
    return Shares((*names, ""), strata, np.array([*named, rest], dtype=np.int64))
