"""Choose rows by an expression of splits, such as `"train"`, `"train[:10%]+test"` or `"all"`.

Does: read the expression as `datasets` does, for rows from any source; keep the numbers that rows have in their split.
Does not: open a source.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from datasets import Dataset, ReadInstruction, concatenate_datasets

from car_datasets.utils.hub import reason

ALL_SPLITS = "all"
SPLIT_COLUMN = "split"  # the column that says which split a row of ALL_SPLITS is from


def named_splits(split: str | None, available: Sequence[str]) -> list[str]:
    """Return the names of the splits that an expression such as `"train[:10%]+test"` reads, in order.

    Raises:
        ValueError: the expression is missing, cannot be read, or names a split that the source does not have.
    """
    shown = sorted(available)
    # No guess such as "train": the rows of the other splits would be left out without a word.
    if split is None and len(available) != 1:
        raise ValueError(
            f"The source has the splits {shown}; say which, such as split={shown[-1]!r} (--split {shown[-1]}), or "
            f"split={ALL_SPLITS!r} for all of them, with a column {SPLIT_COLUMN!r}."
        )
    if split is None or split == ALL_SPLITS:
        return [*available] if split is None or split not in available else [split]
    if split in available:
        return [split]
    try:
        instruction = ReadInstruction.from_spec(split)
    except ValueError as error:
        raise ValueError(
            f"split={split!r} cannot be read ({reason(error)}). The source has {shown}; slices are written as "
            "'train[:10%]', 'train[10:20]' or 'train+test'."
        ) from error
    try:
        # The lengths are not known yet, and do not matter for the names.
        return list(dict.fromkeys(part.splitname for part in instruction.to_absolute(dict.fromkeys(available, 10**6))))
    except ValueError as error:
        raise ValueError(
            f"split={split!r} is not in the source; it has {shown}. Pass one of these, or a slice of one."
        ) from error


def choose_rows(tables: dict[str, Dataset], split: str | None, available: Iterable[str]) -> Dataset:
    """Return the rows of an expression of splits; those of a slice keep their numbers in the split."""
    if split == ALL_SPLITS and ALL_SPLITS not in available:
        if taken := [name for name, table in tables.items() if SPLIT_COLUMN in table.column_names]:
            raise ValueError(
                f"split={ALL_SPLITS!r} adds a column {SPLIT_COLUMN!r}, which the splits {taken} have already. Pass one "
                "split, or a Dataset without this column."
            )
        return _joined({name: t.add_column(SPLIT_COLUMN, [name] * len(t)) for name, t in tables.items()})
    base = _joined(tables)
    if split is None or split in tables:
        return base
    lengths = {name: len(table) for name, table in tables.items()}
    starts = dict(zip(tables, np.cumsum([0, *lengths.values()]).tolist(), strict=False))
    try:
        parts = ReadInstruction.from_spec(split).to_absolute(lengths)
    except ValueError as error:  # such as a rounding that fewer than 100 rows do not have
        raise ValueError(f"split={split!r} cannot be read: {reason(error)}") from error
    rows = np.concatenate([np.arange(p.from_, max(p.from_, p.to)) + starts[p.splitname] for p in parts])
    if len(np.unique(rows)) < len(rows):
        raise ValueError(f"split={split!r} names some rows twice; a row is read once.")
    if np.array_equal(rows, np.arange(len(base))):
        return base
    # Not `select`, which copies contiguous rows to a table of their own and so loses their numbers in the split.
    return base._select_with_indices_mapping(rows, keep_in_memory=True) if len(rows) else base.select([])


def _joined(tables: Mapping[str, Dataset]) -> Dataset:
    if len(tables) == 1:
        return next(iter(tables.values()))
    columns = {name: sorted(table.column_names) for name, table in tables.items()}
    if len({tuple(names) for names in columns.values()}) > 1:
        raise ValueError(f"The splits have different columns: {columns}. Pass one split.")
    try:
        return concatenate_datasets(list(tables.values()))
    except ValueError as error:
        raise ValueError(f"The splits {sorted(tables)} have columns of different types: {reason(error)}") from error
