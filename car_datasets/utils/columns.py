"""Columns of a dataset: numbers and vectors read straight from Arrow, and checks of their presence.

Does: yield vectors batch by batch, refusing those of unequal length or with values that are not finite; read numbers;
join two datasets column-wise; refuse missing and taken columns.
Does not: build Python lists, or copy more than one batch of vectors, unless an entire column is asked for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from datasets import (
    Dataset,
    DatasetBuilder,
    DatasetDict,
    Features,
    IterableDataset,
    IterableDatasetDict,
    Value,
    concatenate_datasets,
)
from datasets.formatting.formatting import LazyBatch

Matrix = npt.NDArray[np.float32]
Positions = npt.NDArray[np.int64]
MOST_COLUMNS = 10_000  # of a source: every step takes time for each column
BATCH = 16_384  # rows in memory at a time: 25 MB at 384 float32 numbers a row


def embedding_batches(dataset: Dataset, column: str, rows: range | None = None) -> Iterator[tuple[Matrix, Positions]]:
    """Yield a column of embeddings as float32 matrices of 1 to `BATCH` rows, and the positions of these rows.

    Rows without an embedding are left out. A matrix is a view of Arrow's buffers, memory-mapped or not, if its batch is
    one piece of float32; otherwise one batch is copied. No more than that is held, so the column may be larger than
    memory.

    Args:
        dataset (`Dataset`): dataset to read.
        column (`str`): column of lists of numbers.
        rows (`range`, *optional*): read these rows only; it is no error if none of them has an embedding.

    Raises:
        ValueError: the column is missing or holds no lists of numbers, lengths are unequal, or values are not finite.
            The latter are counted to the end of the column, but nothing is yielded after the first.
    """
    refuse_no_embeddings(dataset.column_names, column)
    start, width = 0 if rows is None else rows.start, 0
    bad: list[int] = []
    for batch in column_batches(dataset, column, rows):
        matrix, present = _joined(batch, column)
        present += start  # positions in the dataset, not in the batch
        start += len(batch)
        if len(present) == 0:
            continue
        width = width or matrix.shape[1]
        _refuse_unequal({width, matrix.shape[1]}, column)
        # After the first bad row the loop yields nothing and only counts, so that the error states how many rows to fix.
        bad.extend(present[~_finite(matrix)].tolist())
        if not bad:
            yield matrix, present
    _refuse_not_finite(bad, column)
    if width == 0 and rows is None:
        raise ValueError(f"The column {column!r} holds no embeddings, only nulls. Run TextEmbedder over the rows.")


def column_batches(dataset: Dataset, column: str, rows: range | None = None) -> Iterator[pa.ChunkedArray]:
    """Yield a column in pieces of `BATCH` rows, without a copy unless the dataset was shuffled or filtered.

    Used in place of `dataset.iter`, which takes the rows of a shuffled or filtered dataset one by one: 35 times as long
    as reading them in order.

    Args:
        dataset (`Dataset`): dataset to read.
        column (`str`): any column.
        rows (`range`, *optional*): read these rows only.
    """
    values, rows = dataset.data.column(column), range(len(dataset)) if rows is None else rows
    order = dataset._indices  # row numbers in `data` of a shuffled or filtered dataset; it has no public name
    for start in range(rows.start, rows.stop, BATCH):
        count = min(BATCH, rows.stop - start)
        if order is None:
            yield values.slice(start, count)
        else:
            yield take_rows(values, order.column(0).slice(start, count).to_numpy().astype(np.int64))


def take_rows(values: pa.ChunkedArray, places: Positions) -> pa.ChunkedArray:
    """Return the rows at these places, in their order."""
    wheres, parts = zip(*rows_by_chunk(values, places), strict=True)
    by_chunk = np.concatenate(wheres)
    back = np.empty_like(by_chunk)  # the inverse permutation, from the order of chunks to that of `places`
    back[by_chunk] = np.arange(len(by_chunk))
    return pa.chunked_array([pa.concat_arrays(parts).take(pa.array(back))], values.type)


def rows_by_chunk(values: pa.ChunkedArray, places: Positions) -> Iterator[tuple[Positions, pa.Array]]:
    """Yield the rows at these places, those of one chunk at a time, after where these stand in `places`."""
    # Taken chunk by chunk: `values.take(places)` would first copy all chunks into one.
    ends = np.cumsum([len(chunk) for chunk in values.chunks])
    chunk_of = np.searchsorted(ends, places, side="right")
    by_chunk = np.argsort(chunk_of, kind="stable")
    touched, first = np.unique(chunk_of[by_chunk], return_index=True)
    for number, own in zip(touched.tolist(), np.split(by_chunk, first[1:]), strict=True):
        chunk = values.chunk(number)
        yield own, chunk.take(pa.array(places[own] - (ends[number] - len(chunk))))


def read_embeddings(dataset: Dataset, column: str) -> tuple[Matrix, Positions]:
    """Return an entire column of embeddings as one float32 array, and the positions of the rows that have one.

    Raises:
        ValueError: the column is missing or holds no lists of numbers, lengths are unequal, or values are not finite.
    """
    # A single batch is returned as it is, which may be a view of the file.
    matrices, positions = zip(*embedding_batches(dataset, column), strict=True)
    return (matrices[0] if len(matrices) == 1 else np.concatenate(matrices)), np.concatenate(positions)


def count_vectors(dataset: Dataset, column: str) -> int:
    """Return the number of rows that are not null in this column, or 0 if there is no such column."""
    if column not in dataset.column_names:
        return 0
    # Batch by batch: the rows of a filtered dataset are copied when they are read, and the column may exceed memory.
    return sum(len(batch) - batch.null_count for batch in column_batches(dataset, column))


def as_arrow(rows: Sequence[Any]) -> pa.Array:
    """Return Python lists or arrays, `None` for rows without a vector, as an Arrow array of float32 lists."""
    # Through NumPy, because `.map` passes lists, arrays or tensors, depending on the format of the dataset.
    return pa.array([None if row is None else np.asarray(row, dtype=np.float32) for row in rows])


def matrix_of(values: pa.ChunkedArray | pa.Array, column: str) -> tuple[Matrix, Positions]:
    """Return the lists of an Arrow array as a float32 matrix `(rows that have one, dimension)`, and their positions.

    Args:
        values (`pa.ChunkedArray` or `pa.Array`): lists of numbers, or nulls.
        column (`str`): name of the column, for error messages.

    Raises:
        ValueError: the values are not lists of numbers, lengths are unequal, or values are not finite.
    """
    matrix, present = _joined(values, column)
    _refuse_not_finite(present[~_finite(matrix)].tolist(), column)
    return matrix, present


def _joined(values: pa.ChunkedArray | pa.Array, column: str) -> tuple[Matrix, Positions]:
    """Return the chunks as one matrix, and the positions of the rows that are not null; values may not be finite."""
    chunks = values.chunks if hasattr(values, "chunks") else [values]
    parts = [_chunk(chunk, column) for chunk in chunks if len(chunk) > chunk.null_count]
    if not parts:
        return np.zeros((0, 0), dtype=np.float32), np.zeros(0, dtype=np.int64)
    _refuse_unequal({part.shape[1] for part in parts}, column)
    present = np.arange(len(values)) if values.null_count == 0 else np.flatnonzero(np.asarray(values.is_valid()))
    return (parts[0] if len(parts) == 1 else np.concatenate(parts)), present


def _chunk(chunk: pa.Array, column: str) -> Matrix:
    """Return one chunk as a matrix, without a copy if it is float32; nulls are left out."""
    kind = chunk.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        raise ValueError(f"The column {column!r} holds {kind}, not lists of numbers.")
    vectors = chunk.drop_null()
    flat = vectors.flatten()  # unlike `.values`, flatten() honours the offsets of a slice
    lengths = np.unique(np.asarray(vectors.value_lengths()))
    if len(lengths) != 1 or lengths[0] == 0:
        raise ValueError(
            f"The column {column!r} holds embeddings of the lengths {lengths.tolist()}; all must have one length."
        )
    if not pa.types.is_floating(flat.type) and not pa.types.is_integer(flat.type):
        raise ValueError(f"The column {column!r} holds lists of {flat.type}, not of numbers.")
    return np.asarray(flat.to_numpy(zero_copy_only=False), dtype=np.float32).reshape(len(vectors), -1)


def _finite(matrix: Matrix) -> npt.NDArray[np.bool_]:
    """Return a mask of the rows that hold finite values only."""
    # A row's sum is finite unless a value is not, or the sum overflows: only such rows are checked value by value.
    with np.errstate(over="ignore", invalid="ignore"):
        finite: npt.NDArray[np.bool_] = np.isfinite(matrix @ np.ones(matrix.shape[1], dtype=np.float32))
    finite[~finite] = np.isfinite(matrix[~finite]).all(axis=1)
    return finite


def _refuse_unequal(widths: set[int], column: str) -> None:
    if len(widths) > 1:
        raise ValueError(
            f"The column {column!r} holds embeddings of the lengths {sorted(widths)}; all must have one length. "
            "Embed all rows by the same model."
        )


def _refuse_not_finite(bad: list[int], column: str) -> None:
    if bad:
        raise ValueError(
            f"The column {column!r} holds values that are not finite in {len(bad)} rows, the first {bad[:5]}. "
            "Embed these rows again, or set their embedding to null."
        )


def unit_rows(matrix: Matrix) -> Matrix:
    """Return the rows scaled to length 1, so that their products are cosines; rows of zeros stay zeros."""
    return matrix / np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), np.float32(1e-12))


def read_numbers(dataset: Dataset, column: str, missing: float) -> npt.NDArray[Any]:
    """Return a numeric column as one array, without a Python object per row.

    Args:
        dataset (`Dataset`): dataset to read.
        column (`str`): column of numbers.
        missing (`float`): value in place of nulls; NaN gives an array of float64, a number one of int64.

    Raises:
        ValueError: the column is not numeric, or holds fractions where `missing` is a number.
    """
    return numbers_of(dataset.select_columns([column]).with_format("arrow")[:][column], column, missing)


def numbers_of(values: pa.ChunkedArray, column: str, missing: float) -> npt.NDArray[Any]:
    """Return a column that has been read as one array, nulls replaced by `missing`.

    Args:
        values (`pa.ChunkedArray`): the column.
        column (`str`): its name, for error messages.
        missing (`float`): value in place of nulls; NaN gives an array of float64, a number one of int64.

    Raises:
        ValueError: the column is not numeric, or holds fractions where `missing` is a number.
    """
    # Arrow would cast the text "42" to a number.
    if is_text(values.type):
        raise ValueError(f"The column {column!r} holds {values.type}, not numbers.")
    kind = "float64" if math.isnan(missing) else "int64"
    try:
        # pandas stores integers with missing values as floats, the missing ones as NaN.
        if kind == "int64" and pa.types.is_floating(values.type):
            values = pc.if_else(pc.is_nan(values), None, values)
        # Arrow's own memory is read-only, and callers put NaN into what they read.
        return np.require(values.cast(kind).fill_null(missing).to_numpy(), requirements="W")
    except (TypeError, ValueError, NotImplementedError) as error:  # pyarrow's errors derive from these
        wanted = "integers" if kind == "int64" else "numbers"
        raise ValueError(f"The column {column!r} holds {values.type}, not {wanted} throughout: {error}.") from error


def read_clusters(dataset: Dataset, column: str) -> npt.NDArray[np.int64]:
    """Return a column of clusters as one array, as [`clusters_of`] does."""
    return clusters_of(dataset.select_columns([column]).with_format("arrow")[:][column], column)


def clusters_of(values: pa.ChunkedArray, column: str) -> npt.NDArray[np.int64]:
    """Return a column of clusters that has been read as one array, -1 for a row in no cluster.

    A row is in no cluster if its value is null, NaN, -1, -2 or -3: scikit-learn's HDBSCAN labels noise with -1, and
    rows of infinite and of missing values with -2 and -3.

    Args:
        values (`pa.ChunkedArray`): the column.
        column (`str`): its name, for error messages.

    Raises:
        ValueError: the column does not hold integers, or a label below -3, which has no meaning.
    """
    labels = np.asarray(numbers_of(values, column, -1), dtype=np.int64)
    if len(labels) and (least := int(labels.min())) < -3:
        raise ValueError(
            f"The column {column!r} holds the cluster {least} in row {int(labels.argmin())}. Clusters are 0, 1, 2 and so on, "
            "and -1 for a row in no cluster: cluster the rows again, or name the column that holds their clusters."
        )
    return np.maximum(labels, -1)


def is_text(kind: pa.DataType) -> bool:
    """Return True for either of Arrow's types of text, which differ only in the width of their offsets."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def join_columns(dataset: Dataset, new: Dataset) -> Dataset:
    """Join the columns of two datasets of equal length by position; the result has the format of `dataset`."""
    form: dict[str, Any] = dataset.format
    if len(dataset) == 0:  # concatenate_datasets drops what has no rows
        types = Features({**dataset.features, **new.features})
        return Dataset.from_dict({name: [] for name in types}, features=types)
    # In Arrow's format: numpy's would turn integers in a column with nulls into floats where selected rows are copied.
    parts = [part.with_format("arrow") for part in (dataset, new)]
    return concatenate_datasets(parts, axis=1).with_format(form["type"], **form["format_kwargs"])


def check_columns(existing: Sequence[str], needed: Sequence[str], new: Sequence[str]) -> None:
    """Raise ValueError if a column that is read is missing, or one that would be added exists already."""
    missing = [c for c in needed if c not in existing]
    if "selected_by" in missing:
        raise ValueError(
            f"The selection has no column {missing}; it has {list(existing)}. Pass the pool first, and then the rows that "
            "curate or select_car returned."
        )
    if missing:
        scores = [repr(c) for c in existing if c.endswith("_score") and missing[0].endswith("_score")]
        raise ValueError(
            f"The dataset has no column {missing}; it has {list(existing)}. Run the stage that adds it, or name yours: "
            f"score_column={scores[0] if len(scores) == 1 else '...'}, cluster_column=..."
        )
    taken = [c for c in new if c in existing]
    if taken:
        raise ValueError(
            f"The dataset already has the column(s) {taken} of an earlier selection, which would be overwritten. "
            f"Rename them: dataset.rename_column({taken[0]!r}, ...), or drop them: dataset.remove_columns({taken})."
        )


def refuse_no_embeddings(existing: Collection[str], column: str) -> None:
    """Raise ValueError if the column of embeddings is missing."""
    if column not in existing:
        raise ValueError(
            f"The dataset has no column {column!r}; it has {list(existing)}. Run TextEmbedder over it first, or, if it "
            f"has embeddings, name their column by embedding_column=... or rename it to {column!r}."
        )


def refuse_overwrite(seen: Container[str], new_columns: Iterable[str], option: str) -> None:
    """Raise ValueError if the dataset already has one of the new columns.

    Args:
        seen (`Container[str]`): columns of the dataset.
        new_columns (`Iterable[str]`): columns about to be added.
        option (`str`): the argument that gives the new columns other names.
    """
    taken = [name for name in new_columns if name in seen]
    if taken:
        raise ValueError(
            f"The dataset already has the column(s) {taken}, which would be overwritten. Pass {option} to name the new "
            f"ones differently, or drop the old ones: dataset.remove_columns({taken})."
        )


def refuse_tables(batch: Any, instead: str) -> None:
    """Raise ValueError if the batch is not a mapping of columns.

    In the Arrow, pandas and polars formats `.map` keeps the new columns only and drops the others.

    Args:
        batch: what `.map` passes to a stage.
        instead (`str`): a call that works in every format.
    """
    kind = type(batch).__name__
    if isinstance(batch, (Dataset, IterableDataset, DatasetDict, IterableDatasetDict)):
        raise ValueError(
            f"A stage was called with a {kind}, and takes a batch of its columns. Pass the stage to the dataset: "
            "dataset.map(stage, batched=True, with_rank=True)."
        )
    # Tables of pyarrow, pandas and polars have columns; lists, texts and arrays have none.
    if not isinstance(batch, Mapping) and not any(hasattr(batch, name) for name in ("columns", "column_names")):
        raise ValueError(
            f"A stage was called with a {kind}, and takes a batch of columns, such as {{'instruction': [...], 'output': "
            "[...]}. In dataset.map(stage, batched=True, with_rank=True), leave out input_columns."
        )
    if not isinstance(batch, Mapping):
        raise ValueError(
            "A dataset in Arrow, pandas or polars format loses its columns in .map. Map over "
            f"dataset.with_format(None), or call {instead}."
        )
    # Without batched=True, `.map` passes one row: a mapping as well, but of single values, or of one chat. A lazy batch
    # would decode every column if its values were looked at.
    if not isinstance(batch, LazyBatch) and any(
        isinstance(value, (str, int, float)) or _is_chat(name, value) for name, value in batch.items()
    ):
        raise ValueError("This is a row, not a batch of rows: call dataset.map(..., batched=True, with_rank=True).")


def _is_chat(name: str, value: Any) -> bool:
    """Return True if the value of a chat's column is one chat, a list of turns, and not a list of chats."""
    turn = value[0] if isinstance(value, list) and value else None
    return name in ("messages", "conversations") and isinstance(turn, Mapping) and ("role" in turn or "from" in turn)


def refuse_other_datasets(dataset: Any, function: str, for_streams: str) -> None:
    """Raise ValueError if this is not a `Dataset`.

    Args:
        dataset: what a function of a `Dataset` was called with.
        function (`str`): its name, for the message.
        for_streams (`str`): the call that works for an `IterableDataset`.
    """
    if isinstance(dataset, IterableDataset):
        raise ValueError(f"{function} reads a Dataset, and this is a stream (IterableDataset). Call {for_streams}.")
    if not isinstance(dataset, Dataset):
        hint = "one of its splits" if isinstance(dataset, (DatasetDict, IterableDatasetDict)) else "a Dataset"
        raise ValueError(f"{function} reads a Dataset, and this is a {type(dataset).__name__}. Pass {hint}.")


def refuse_casts(builder: DatasetBuilder) -> None:
    """Let a builder of Parquet or Arrow files refuse what it would cast: the text "01" of one file to the number 1."""
    cast = builder._cast_table

    def checked(table: pa.Table, *arguments: Any) -> pa.Table:
        refuse_wide("a file", table.num_columns)
        features = builder.info.features or {}
        changed = [f.name for f in table.schema if f.name in features and _is_changed(f.type, features[f.name])]
        if changed:
            seen = {name: [str(table.schema.field(name).type), str(features[name])] for name in changed}
            raise ValueError(
                f"files have columns of different types, or not those of the README.md: {seen}. Write them with equal "
                "types, or read them one by one"
            )
        return cast(table, *arguments)

    builder._cast_table = checked


def _is_changed(kind: pa.DataType, feature: Any) -> bool:
    """Return True if values of an Arrow type are others as plain values of a feature."""
    if isinstance(feature, Value):
        wanted = feature.pa_type
        if pa.types.is_floating(kind) and pa.types.is_floating(wanted):
            return bool(kind.bit_width > wanted.bit_width)
        groups = {_group(kind), _group(wanted)}
        return len(groups) > 1 and None not in groups
    if isinstance(feature, Mapping):
        return pa.types.is_struct(kind) and any(_is_changed(f.type, feature[f.name]) for f in kind if f.name in feature)
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return is_list and hasattr(feature, "feature") and _is_changed(kind.value_type, feature.feature)


def _group(kind: pa.DataType) -> str | None:
    """Return which values a type has, or `None` if it is not among those that a cast makes others."""
    if pa.types.is_dictionary(kind):
        return _group(kind.value_type)
    tests = {
        "text": is_text,
        "booleans": pa.types.is_boolean,
        "numbers": lambda t: pa.types.is_integer(t) or pa.types.is_floating(t),
        "decimals": pa.types.is_decimal,
        "times": pa.types.is_temporal,
    }
    return next((name for name, test in tests.items() if test(kind)), None)


def refuse_wide(shown: str, columns: int) -> None:
    """Raise ValueError if a source, named in the message as `shown`, has more columns than are read."""
    if columns > MOST_COLUMNS:
        raise ValueError(
            f"{shown} has {columns:,} columns, and at most {MOST_COLUMNS:,} are read. Drop some, or put them into one "
            "column of objects."
        )


def refuse_deep_json(shown: str, dataset: Dataset, deepest: int) -> None:
    """Raise ValueError if a column of JSON text has a value that is nested deeper than Python's parser can follow.

    Args:
        shown (`str`): the source in the message.
        dataset (`Dataset`): its `Json` columns are read, at any depth; rows that were filtered out do not count.
        deepest (`int`): levels of lists and objects that a value may have.
    """
    kept = None if dataset._indices is None else set(dataset._indices.column(0).to_pylist())
    for name in dataset.column_names:
        start = 0
        for chunk in dataset.data.column(name).chunks:
            for row, text in _json_with_brackets(chunk, deepest):
                if (kept is None or start + row in kept) and _depth(text) > deepest:
                    raise ValueError(
                        f"{shown}: the column {name!r} holds JSON that is nested more than {deepest} levels deep (row "
                        f"{start + row}). Drop the row, or shorten its value."
                    )
            start += len(chunk)


def _json_with_brackets(array: pa.Array, least: int) -> Iterator[tuple[int, str]]:
    """Yield the JSON texts in an array that have more opening brackets than `least`, each with its row."""
    if isinstance(array, pa.ExtensionArray):
        if getattr(array.type, "extension_name", "") == "arrow.json":
            texts = array.storage
            counts = pc.add(pc.count_substring(texts, "["), pc.count_substring(texts, "{"))
            for row in pc.indices_nonzero(pc.greater(counts, least)).to_pylist():
                yield row, texts[row].as_py()
    elif pa.types.is_struct(array.type):
        for part in array.flatten():
            yield from _json_with_brackets(part, least)
    elif pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        parents = pc.list_parent_indices(array)
        for position, text in _json_with_brackets(array.flatten(), least):
            yield parents[position].as_py(), text


_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*(?:"|\Z)|[\[{]|[\]}]', re.DOTALL)


def _depth(text: str) -> int:
    depth = deepest = 0
    for found in _BRACKETS.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
        deepest = max(deepest, depth)
    return deepest
