"""Mark the rows that must be selected and those that must not be: `mark_pins`.

Does: read a boolean column, or find the rows of a file in the data by index or by content; refuse contradictions.
Does not: select rows.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from car_datasets.loading.sources import open_dataset
from car_datasets.loading.values import carried
from car_datasets.selection.marks.exclusions import DROPPED, KEEP
from car_datasets.utils.column_names import ColumnNames
from car_datasets.utils.columns import refuse_overwrite
from car_datasets.utils.files import user_path

if TYPE_CHECKING:
    from datasets import Dataset

Rows = npt.NDArray[np.bool_]


def mark_pins(
    dataset: Dataset,
    keep: str | None = None,
    drop: str | None = None,
    *,
    index_column: str = ColumnNames.index,
    text_columns: Collection[str] = (),
    unscorable: Collection[int] = (),
) -> Dataset:
    """Add the column `pinned`: `"keep"` for rows that must be selected, `"drop"` for rows that must not be, else null.

    Example:
    ```python
    >>> dataset = mark_pins(dataset, keep="gold.jsonl", drop="is_broken")
    ```

    Args:
        dataset (`Dataset`): checked rows.
        keep, drop (`str`, *optional*): a boolean column of the dataset, or a file of rows. The rows of a file are found
            by the index column if the file has it, else by the content of all columns that both have. Of several equal
            rows, `keep` takes as many as the file has, and `drop` all.
        index_column (`str`): the column that identifies a row.
        text_columns (`Collection[str]`): columns that a file must have for its rows to be found by content; those of
            the schema. By default one column in common is enough.
        unscorable (`Collection[int]`): positions of rows that cannot be scored, which cannot be kept.

    Returns:
        `Dataset`: the dataset with the column `pinned`.

    Raises:
        ValueError: there is neither such a column nor such a file, the column is not boolean, rows of the file are not
            in the dataset, a row is in both, or a row to keep cannot be scored.
    """
    refuse_overwrite(
        dataset.column_names, (ColumnNames.pinned,), "dataset.rename_column(...) on it; keep= and drop= add it"
    )
    kept, dropped = (
        _marked(dataset, value, name, index_column, text_columns) for name, value in (("keep", keep), ("drop", drop))
    )
    if len(both := np.flatnonzero(kept & dropped)):
        raise ValueError(
            f"{len(both)} rows are in both keep={keep!r} and drop={drop!r}, the first {_named(dataset, both[0], index_column)}. "
            "Take each out of one of the two."
        )
    if lost := sorted(row for row in unscorable if kept[row]):
        raise ValueError(
            f"keep={keep!r}: {len(lost)} of its rows cannot be scored, the first {_named(dataset, lost[0], index_column)}. "
            "Mend them in the source, or take them out of keep."
        )
    from datasets import Value

    values = [word or None for word in np.where(kept, KEEP, np.where(dropped, DROPPED, "")).tolist()]
    # The type is given, since a column of nulls alone has none.
    return dataset.add_column(ColumnNames.pinned, values, feature=Value("string"))


def _named(dataset: Dataset, row: int, index_column: str) -> str:
    """Return a row in words: its index, or its position without one."""
    if index_column in dataset.column_names:
        return f"with {index_column}={dataset.with_format(None)[index_column][int(row)]!r}"
    return f"at position {row}"


def _marked(dataset: Dataset, value: str | None, name: str, index_column: str, text_columns: Collection[str]) -> Rows:
    """Return a mask of the rows that a setting names."""
    if value is None:
        return np.zeros(len(dataset), dtype=bool)
    if value in dataset.column_names:
        return read_flags(dataset, value, name)
    if not user_path(value).exists():
        raise ValueError(
            f"{name}={value!r} is neither a column of the data ({dataset.column_names}) nor a file. Name a boolean column, "
            "or a file of rows in JSON, JSON Lines, CSV or Parquet."
        )
    try:
        rows = open_dataset(value).with_format(None)
    except ValueError as error:
        raise ValueError(f"{name}={value!r}: {error}") from error
    if index_column in rows.column_names and index_column in dataset.column_names:
        return _by_index(dataset, rows, value, name, index_column)
    columns = [column for column in rows.column_names if column in dataset.column_names]
    missing = [c for c in text_columns if c in dataset.column_names and c not in columns]
    if not columns or missing:
        raise ValueError(
            f"{name}={value!r} has the columns {rows.column_names}; to find its rows it needs the column {index_column!r}, or "
            f"{missing or list(text_columns) or dataset.column_names} as the data has them."
        )
    return _by_content(dataset, rows, columns, value, name)


def read_flags(dataset: Dataset, column: str, name: str) -> Rows:
    """Return a boolean column as a mask, null as False.

    Args:
        dataset (`Dataset`): has the column.
        column (`str`): its name.
        name (`str`): the setting that names it, for the message.

    Raises:
        ValueError: the column is not boolean.
    """
    import pyarrow as pa

    values = dataset.with_format(None).select_columns([column]).with_format("arrow")[:][column]
    if not pa.types.is_boolean(values.type):
        raise ValueError(
            f"{name}={column!r}: the column holds {values.type}, not true and false. Name a boolean column, or a file that "
            "is not called like a column."
        )
    return np.asarray(values.fill_null(False).to_numpy(), dtype=bool)


def _by_index(dataset: Dataset, rows: Dataset, value: str, name: str, index_column: str) -> Rows:
    # As text, because a CSV file may give numbers for what is text in the data.
    known = {str(index): row for row, index in enumerate(dataset.with_format(None)[index_column][:])}
    wanted = rows[index_column][:]
    _refuse_missing([index for index in wanted if str(index) not in known], len(wanted), value, name, index_column)
    mask = np.zeros(len(dataset), dtype=bool)
    mask[[known[str(index)] for index in wanted]] = True
    return mask


def _by_content(dataset: Dataset, rows: Dataset, columns: Sequence[str], value: str, name: str) -> Rows:
    # The file's rows are held, and the data is read batch by batch, because it may be larger than memory.
    wanted: dict[str, list[int]] = defaultdict(list)
    for row, values in enumerate(carried(rows.select_columns(list(columns)))):
        wanted[_as_key(values)].append(row)
    left = {key: len(found) for key, found in wanted.items()}
    found: set[str] = set()
    mask = np.zeros(len(dataset), dtype=bool)
    for row, values in enumerate(carried(dataset.with_format(None).select_columns(list(columns)))):
        key = _as_key(values)
        if key in wanted:
            found.add(key)
            # Of equal rows, as many as the file has are kept; a copy of a dropped row must not come in.
            mask[row] = name == "drop" or left[key] > 0
            left[key] -= 1
    missing = sorted(row for key, positions in wanted.items() if key not in found for row in positions)
    _refuse_missing(missing, len(rows), value, name, "row")
    return mask


def _as_key(values: Any) -> str:
    return json.dumps(values, sort_keys=True, default=str)


def _refuse_missing(missing: Sequence[Any], rows: int, value: str, name: str, what: str) -> None:
    if missing:
        raise ValueError(
            f"{name}={value!r}: {len(missing)} of its {rows} rows are not in the data, the first {what} {missing[0]!r}. Take "
            "them out of the file, or make their text and their other columns equal to the data's."
        )
