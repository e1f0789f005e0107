"""Tell which rows may not be selected, from the columns that say so: `excluded_rows`.

Does: read vetoes, duplicates and contamination; say for each row the first reason that keeps it out.
Does not: find duplicates or contamination, or change a score.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from car_datasets.utils.column_names import ColumnNames
from car_datasets.utils.columns import is_text

if TYPE_CHECKING:
    from datasets import Dataset

# Why a row may not be selected, in this order: the first that applies is named.
DROPPED, CONTAMINATED, DUPLICATE = "drop", "contaminated", "duplicate"
KEEP = "keep"  # in the column `pinned`, of a row that is selected in any case


def excluded_rows(pool: Dataset, *, duplicates: bool = True, pins: bool = True) -> npt.NDArray[np.str_]:
    """Return for each row why it may not be selected, `""` for a row that may be.

    A row that is pinned may always be selected. Contamination counts wherever both of its columns are there.

    Args:
        pool (`Dataset`): rows with any of the columns `pinned`, `contaminated_by` and `duplicate_of`.
        duplicates (`bool`): leave out rows that are copies of another one.
        pins (`bool`): read the column `pinned`; False for a pool whose column of this name means something else.

    Returns:
        `(rows,)` str: `"drop"`, `"contaminated"`, `"duplicate"` or `""`.
    """
    reasons = np.full(len(pool), "", dtype=f"<U{len(CONTAMINATED)}")
    names, columns = ColumnNames, pool.column_names
    if duplicates and names.duplicate_of in columns:
        reasons[_valid(pool, names.duplicate_of)] = DUPLICATE
    # Both columns, so that a column of the data by this name is not mistaken for it.
    if names.contaminated_by in columns and names.contaminated_share in columns:
        reasons[_valid(pool, names.contaminated_by)] = CONTAMINATED
    if pins and names.pinned in columns:
        values = pinned_values(pool)
        reasons[values == DROPPED] = DROPPED
        reasons[values == KEEP] = ""
    return reasons


def excluded_from(pool: Dataset, selected: npt.NDArray[np.int64]) -> npt.NDArray[np.str_]:
    """Return why each row of a pool could not be selected, as far as a selection whose recipe is not known tells.

    Args:
        pool (`Dataset`): rows with any of the columns of [`excluded_rows`].
        selected (`(selected,)` int64): positions of the selected rows. A mark that one of them has kept none out.
    """
    excluded = excluded_rows(pool, pins=getattr(pool.features.get(ColumnNames.pinned), "dtype", None) == "string")
    return np.where(np.isin(excluded, np.unique(excluded[selected])), "", excluded)


def pinned_values(pool: Dataset) -> npt.NDArray[Any]:
    """Return the column `pinned` as an array of text, `""` for null; all of it `""` without the column.

    Raises:
        ValueError: the column holds no text.
    """
    if ColumnNames.pinned not in pool.column_names:
        return np.full(len(pool), "", dtype="<U4")
    values = _read(pool, ColumnNames.pinned)
    if not is_text(values.type) and not pa.types.is_null(values.type):
        raise ValueError(
            f"The column {ColumnNames.pinned!r} holds {values.type}, and not keep, drop or null; rename it "
            f"(dataset.rename_column({ColumnNames.pinned!r}, ...)), since keep= and drop= write a column of this name."
        )
    return np.asarray([value or "" for value in values.to_pylist()], dtype=np.str_)


def _valid(pool: Dataset, column: str) -> npt.NDArray[np.bool_]:
    return np.asarray(_read(pool, column).is_valid().to_numpy(), dtype=bool)


def _read(pool: Dataset, column: str) -> pa.ChunkedArray:
    return pool.with_format(None).select_columns([column]).with_format("arrow")[:][column]
