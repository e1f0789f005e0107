"""Lay out the splits of a pushed selection, all with the same columns.

Does: give `selected`, `scored` and the report's two controls one set of columns, as one configuration of a Hub dataset needs.
Does not: push; choose rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from datasets import Dataset, Features

from car_datasets.column_names import ColumnNames
from car_datasets.overview import draw_controls, positions_in_pool, row_lengths
from car_datasets.selection import read_numbers
from car_datasets.vectors import beside

SCORED = "scored"
CONTROLS = ("random_control", "length_matched_control")


def selection_splits(
    selected: Dataset,
    scored: Dataset | None,
    also: Sequence[str] = (),
    *,
    split: str = "selected",
    names: ColumnNames = ColumnNames(),
    left_out: str | None = "embedding",
    seed: int = 42,
) -> dict[str, Dataset]:
    """Return a selection as a split, and further splits, all with the same columns and types.

    In `scored` and the controls, columns that only the selection has (`selected_by`, ...) are null for rows that were not
    selected; `selected` gets the columns that only the pool has.

    Args:
        selected (`Dataset`), scored (`Dataset`, *optional*): the selected rows and their pool, from [`curate`].
        also (`Sequence[str]`): further splits, out of `"scored"`, `"random_control"` and `"length_matched_control"`.
        split (`str`): name of the split of `selected`.
        names ([`ColumnNames`]): the names of the added columns.
        left_out (`str`, *optional*): a column of `scored` to leave out if `selected` does not have it.
        seed (`int`): seed of the controls; with that of a report they are the rows that the report measured.

    Returns:
        `dict[str, Dataset]`: split to its rows.

    Raises:
        ValueError: a split is unknown, has the name of another or needs `scored`, or a selected row is not in the pool.
    """
    refuse_split_names(split, also)
    selected = selected.with_format(None)
    if scored is None:
        if also:
            raise ValueError(f"also={tuple(also)} need the scored pool: pass scored=...")
        return {split: selected}
    scored = _pool_columns(scored, selected, names.index, left_out)
    positions = positions_in_pool(scored, selected, names.index)
    added = [name for name in selected.column_names if name not in scored.column_names]
    pool = _with_columns_of(scored, selected, positions, added)
    rest = [name for name in scored.column_names if name not in selected.column_names]
    order = [*selected.column_names, *rest]
    features = Features({name: pool.features[name] for name in order})
    filled = selected if not rest else beside(selected, pool.select(positions.tolist()).select_columns(rest))
    splits = {split: filled, SCORED: pool}
    if set(also) & set(CONTROLS):
        scores = read_numbers(pool, names.score, np.nan)
        lengths = row_lengths(scored, names)[0]
        drawn = draw_controls(lengths, positions, np.flatnonzero(~np.isnan(scores)), seed)
        splits |= {name: pool.select(rows.tolist()) for name, rows in zip(CONTROLS, drawn, strict=True)}
    return {name: splits[name].select_columns(order).cast(features) for name in (split, *also)}


def _pool_columns(scored: Dataset, selected: Dataset, index_column: str, left_out: str | None) -> Dataset:
    """Return the pool with a row index, and without the column that is left out."""
    scored = scored.with_format(None)
    if left_out in scored.column_names and left_out not in selected.column_names:
        scored = scored.remove_columns(left_out)
    if index_column not in scored.column_names:
        scored = scored.add_column(index_column, np.arange(len(scored), dtype=np.int64))
    return scored


def refuse_split_names(split: str, also: Sequence[str]) -> None:
    """Raise ValueError for names of splits that cannot be, before anything is read or requested.

    Raises:
        ValueError: `also` is one string or holds an unknown name, or `split` is the name of the pool or of a control, which
            would then be taken for the selection.
    """
    known = (SCORED, *CONTROLS)
    if isinstance(also, str):
        raise ValueError(f"also={also!r} is one text, and a list of names is needed: also=[{also!r}].")
    if not set(also) <= set(known):
        raise ValueError(f"also={tuple(also)}: choose out of {known}.")
    if split in known:
        raise ValueError(
            f"split={split!r} is the name of the pool or of a control, which also= adds. Give the selected rows another name, "
            "such as split='selected' (--split selected)."
        )


def _with_columns_of(pool: Dataset, selected: Dataset, positions: npt.NDArray[np.int64], names: list[str]) -> Dataset:
    """Return the pool with further columns of its selected rows, null for the others."""
    if not names:
        return pool
    places = np.full(len(pool), -1, dtype=np.int64)
    places[positions] = np.arange(len(positions))
    taken = pa.array(places, mask=places < 0)
    table = selected.select_columns(names).with_format("arrow")[:]
    columns: dict[str, Any] = {name: table[name].combine_chunks().take(taken) for name in names}
    features = Features({name: selected.features[name] for name in names})
    return beside(pool, Dataset(pa.table(columns, schema=features.arrow_schema)))
