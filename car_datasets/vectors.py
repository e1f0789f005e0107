"""Arrow's list columns as float32 matrices, from Arrow's own buffers: no Python list on the way; columns beside columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

if TYPE_CHECKING:
    from datasets import Dataset

Matrix = npt.NDArray[np.float32]
Positions = npt.NDArray[np.int64]

BATCH = 16_384  # rows in memory at a time: 25 MB of 384 numbers each


def embedding_batches(dataset: Dataset, column: str, rows: range | None = None) -> Iterator[tuple[Matrix, Positions]]:
    """A column of embeddings as float32 matrices of 1 to `BATCH` rows, and the positions of the rows that have one.

    Read from Arrow's own buffers, memory-mapped or not: where a batch lies in one piece as float32 it is a view of them,
    else one batch is copied. No more than that is ever held, so the column may be larger than the memory.

    Args:
        dataset (`Dataset`), column (`str`): what is read.
        rows (`range`, *optional*): read these alone, of which none need have an embedding.

    Raises:
        ValueError: no such column, not lists of numbers, unequal lengths, or values that are not finite (these are counted to
            the end, and nothing is given after the first).
    """
    if column not in dataset.column_names:
        raise ValueError(
            f"The dataset has no column {column!r}; it has {dataset.column_names}. "
            "Map TextEmbedder() over it first, or name your embeddings: embedding_column=..."
        )
    start, width = 0 if rows is None else rows.start, 0
    bad: list[int] = []
    for batch in column_batches(dataset, column, rows):
        matrix, present = _joined(batch, column)
        present += start
        start += len(batch)
        if len(present) == 0:
            continue
        width = width or matrix.shape[1]
        _refuse_unequal({width, matrix.shape[1]}, column)
        bad.extend(present[~_finite(matrix)].tolist())
        if not bad:
            yield matrix, present
    _refuse_not_finite(bad, column)
    if width == 0 and rows is None:
        raise ValueError(f"The column {column!r} holds no embeddings, only nulls.")


def column_batches(dataset: Dataset, column: str, rows: range | None = None) -> Iterator[pa.ChunkedArray]:
    """A column in pieces of `BATCH` rows: where the rows lie in order, without a copy.

    `dataset.iter` takes the rows of a shuffled or filtered dataset one by one, 35 times as long as reading them in order.
    """
    values, rows = dataset.data.column(column), range(len(dataset)) if rows is None else rows
    order = dataset._indices  # of a shuffled or filtered dataset; it has no public name
    for start in range(rows.start, rows.stop, BATCH):
        count = min(BATCH, rows.stop - start)
        if order is None:
            yield values.slice(start, count)
        else:
            yield _taken(values, order.column(0).slice(start, count).to_numpy().astype(np.int64))


def _taken(values: pa.ChunkedArray, places: Positions) -> pa.ChunkedArray:
    """The rows at these places, taken chunk by chunk: `values.take(places)` would copy all chunks into one for it."""
    ends = np.cumsum([len(chunk) for chunk in values.chunks])
    chunk_of = np.searchsorted(ends, places, side="right")
    by_chunk = np.argsort(chunk_of, kind="stable")
    touched, first = np.unique(chunk_of[by_chunk], return_index=True)
    parts = []
    for number, own in zip(touched.tolist(), np.split(by_chunk, first[1:]), strict=True):
        chunk = values.chunk(number)
        parts.append(chunk.take(pa.array(places[own] - (ends[number] - len(chunk)))))
    back = np.empty_like(by_chunk)
    back[by_chunk] = np.arange(len(by_chunk))
    return pa.chunked_array([pa.concat_arrays(parts).take(pa.array(back))], values.type)


def count_vectors(dataset: Dataset, column: str) -> int:
    """How many rows have something other than a null in this column; 0 without the column."""
    if column not in dataset.column_names:
        return 0
    values = dataset.select_columns([column]).with_format("arrow")[:][column]
    return len(values) - int(values.null_count)


def read_embeddings(dataset: Dataset, column: str) -> tuple[Matrix, Positions]:
    """The whole column as one float32 array, and the positions of the rows that have an embedding.

    Raises:
        ValueError: as [`embedding_batches`].
    """
    matrices, positions = zip(*embedding_batches(dataset, column), strict=True)
    return (matrices[0] if len(matrices) == 1 else np.concatenate(matrices)), np.concatenate(positions)


def as_arrow(rows: Sequence[Any]) -> pa.Array:
    """A batch's Python lists or arrays, `None` for rows without a vector, as an Arrow array of float32 lists."""
    return pa.array([None if row is None else np.asarray(row, dtype=np.float32) for row in rows])


def matrix_of(values: pa.ChunkedArray | pa.Array, column: str) -> tuple[Matrix, Positions]:
    """An Arrow array of lists to `(rows that have one, dimension)` float32, and the positions of those rows.

    Raises:
        ValueError: not lists of numbers, unequal lengths, or values that are not finite.
    """
    matrix, present = _joined(values, column)
    _refuse_not_finite(present[~_finite(matrix)].tolist(), column)
    return matrix, present


def unit_rows(matrix: Matrix) -> Matrix:
    """The rows at length 1, as cosines are computed of; rows of zeros stay."""
    return matrix / np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), np.float32(1e-12))


def _joined(values: pa.ChunkedArray | pa.Array, column: str) -> tuple[Matrix, Positions]:
    chunks = values.chunks if hasattr(values, "chunks") else [values]
    parts = [_chunk(chunk, column) for chunk in chunks if len(chunk) > chunk.null_count]
    if not parts:
        return np.zeros((0, 0), dtype=np.float32), np.zeros(0, dtype=np.int64)
    _refuse_unequal({part.shape[1] for part in parts}, column)
    present = np.arange(len(values)) if values.null_count == 0 else np.flatnonzero(np.asarray(values.is_valid()))
    return (parts[0] if len(parts) == 1 else np.concatenate(parts)), present


def _finite(matrix: Matrix) -> npt.NDArray[np.bool_]:
    """Which rows hold finite values only. Their sums tell at the price of one reading; those that overflow are looked at."""
    with np.errstate(over="ignore", invalid="ignore"):
        finite: npt.NDArray[np.bool_] = np.isfinite(matrix @ np.ones(matrix.shape[1], dtype=np.float32))
    finite[~finite] = np.isfinite(matrix[~finite]).all(axis=1)
    return finite


def _refuse_unequal(widths: set[int], column: str) -> None:
    if len(widths) > 1:
        raise ValueError(
            f"The column {column!r} holds embeddings of the lengths {sorted(widths)}; all must have one length."
        )


def _refuse_not_finite(bad: list[int], column: str) -> None:
    if bad:
        raise ValueError(
            f"The column {column!r} holds values that are not finite in {len(bad)} rows, the first {bad[:5]}."
        )


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


def beside(dataset: Dataset, new: Dataset) -> Dataset:
    """One dataset with the columns of both, whose rows belong together in their order."""
    from datasets import Dataset, Features, concatenate_datasets

    form: dict[str, Any] = dataset.format
    if len(dataset) == 0:  # concatenate_datasets drops what has no rows
        types = Features({**dataset.features, **new.features})
        return Dataset.from_dict({name: [] for name in types}, features=types)
    # In Arrow's format: numpy's would turn whole numbers beside a null into floats where selected rows are copied.
    parts = [part.with_format("arrow") for part in (dataset, new)]
    return concatenate_datasets(parts, axis=1).with_format(form["type"], **form["format_kwargs"])
