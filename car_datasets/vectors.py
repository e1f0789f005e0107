"""Arrow's list columns as float32 matrices, from Arrow's own buffers: no Python list on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

if TYPE_CHECKING:
    from datasets import Dataset

Matrix = npt.NDArray[np.float32]


def read_embeddings(dataset: Dataset, column: str) -> tuple[Matrix, npt.NDArray[np.int64]]:
    """A column of embeddings as one float32 array, and the positions of the rows that have one.

    Read from Arrow's own buffers: no Python list on the way, one copy only where chunks must be joined.

    Raises:
        ValueError: no such column, not lists of numbers, unequal lengths, or values that are not finite.
    """

    if column not in dataset.column_names:
        raise ValueError(
            f"The dataset has no column {column!r}; it has {dataset.column_names}. "
            "Map TextEmbedder() over it first, or name your embeddings: embedding_column=..."
        )
    matrix, present = matrix_of(dataset.select_columns([column]).with_format("arrow")[:][column], column)
    if len(present) == 0:
        raise ValueError(f"The column {column!r} holds no embeddings, only nulls.")
    return matrix, present


def as_arrow(rows: Sequence[Any]) -> pa.Array:
    """A batch's Python lists or arrays, `None` for rows without a vector, as an Arrow array of float32 lists."""
    return pa.array([None if row is None else np.asarray(row, dtype=np.float32) for row in rows])


def matrix_of(values: pa.ChunkedArray | pa.Array, column: str) -> tuple[Matrix, npt.NDArray[np.int64]]:
    """An Arrow array of lists to `(rows that have one, dimension)` float32, and the positions of those rows."""
    chunks = values.chunks if hasattr(values, "chunks") else [values]
    parts = [_chunk(chunk, column) for chunk in chunks if len(chunk) > chunk.null_count]
    if not parts:
        return np.zeros((0, 0), dtype=np.float32), np.zeros(0, dtype=np.int64)
    widths = {part.shape[1] for part in parts}
    if len(widths) != 1:
        raise ValueError(
            f"The column {column!r} holds embeddings of the lengths {sorted(widths)}; all must have one length."
        )
    matrix = parts[0] if len(parts) == 1 else np.concatenate(parts)
    present = np.flatnonzero(np.asarray(values.is_valid()))
    finite = np.isfinite(matrix).all(axis=1)
    if not finite.all():
        bad = present[~finite]
        raise ValueError(
            f"The column {column!r} holds values that are not finite in {len(bad)} rows, the first {bad[:5].tolist()}."
        )
    return matrix, present


def _chunk(chunk: pa.Array, column: str) -> Matrix:
    kind = chunk.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        raise ValueError(f"The column {column!r} holds {kind}, not lists of numbers.")
    flat = chunk.drop_null().flatten()  # flatten() skips nulls and honours offsets
    rows = len(chunk) - chunk.null_count
    lengths = np.unique(np.asarray(chunk.drop_null().value_lengths()))
    if len(lengths) != 1 or lengths[0] == 0:
        raise ValueError(
            f"The column {column!r} holds embeddings of the lengths {lengths.tolist()}; all must have one length."
        )
    if not pa.types.is_floating(flat.type) and not pa.types.is_integer(flat.type):
        raise ValueError(f"The column {column!r} holds lists of {flat.type}, not of numbers.")
    return np.asarray(flat.to_numpy(zero_copy_only=False), dtype=np.float32).reshape(rows, -1)
