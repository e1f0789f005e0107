"""LOAD: any source to a checked `Dataset`.

Does: open Hub datasets, JSON lists (the original's files), JSON Lines, CSV, Parquet, `save_to_disk` folders and datasets
in memory; find the schema; refuse rows that cannot be scored, before anything expensive; number the rows.
Does not: rename or change a column, or render text (formatting.py).
"""

from __future__ import annotations

import contextlib
import csv
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from car_datasets.formatting import SCHEMAS, UNSCORABLE, Schema, exchanges_of, find_schema
from car_datasets.rows import ON_INVALID, invalid_rows_message

FORMATS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


def load_instructions(
    source: str | Path | Dataset | DatasetDict,
    name: str | None = None,
    split: str | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    schema: str = "auto",
    columns: Mapping[str, str] | tuple[tuple[str, str], ...] = (),
    on_invalid: str = "error",
    index_column: str = "source_index",
) -> Dataset:
    """Load an instruction dataset and check every row before anything expensive is done with it.

    Args:
        source (`str`, `Path`, `Dataset` or `DatasetDict`): a Hub id, a file (`.json` list of objects as
            `alpaca_data.json`, `.jsonl`, `.csv`, `.tsv`, `.parquet`), a folder (of `save_to_disk`, or of data files), or a
            dataset in memory. A path that exists wins over a Hub id of the same name.
        name, split, revision, token, cache_dir: as in `datasets.load_dataset`. A single split needs no name.
        schema (`str`), columns (`Mapping`): see [`find_schema`].
        on_invalid (`str`): `"error"` refuses rows that cannot be scored; `"mark"` leaves them to the scorer to mark.
        index_column (`str`): the row's number in the source (int64), added unless the dataset has that column.

    Returns:
        `Dataset`: the source's columns and rows, unchanged and in order, and `index_column`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not what its name says; no schema fits; there are no rows; rows cannot be scored; the
            index column holds duplicates.
    """
    if on_invalid not in ON_INVALID:
        raise ValueError(f"on_invalid={on_invalid!r} is not known; choose one of {ON_INVALID}.")
    dataset = open_dataset(source, name, split, revision=revision, token=token, cache_dir=cache_dir, columns=columns)
    found = find_schema(dataset.column_names, schema, columns)
    if on_invalid == "error":
        refuse_invalid_rows(dataset, found)
    return _number_rows(dataset, index_column)


def open_dataset(
    source: str | Path | Dataset | DatasetDict,
    name: str | None = None,
    split: str | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    columns: Mapping[str, str] | tuple[tuple[str, str], ...] = (),
) -> Dataset:
    """Open a source as [`load_instructions`] does, without looking at its rows: for datasets that are scored already.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not what its name says, the split is unclear, or there are no rows.
    """
    dataset = _one_split(_open(source, name, split, revision, token, cache_dir, dict(columns)), split)
    if len(dataset) == 0:
        raise ValueError(f"source={_shown(source)} has no rows.")
    return dataset


def refuse_invalid_rows(dataset: Dataset, schema: Schema) -> None:
    """Raise a ValueError that counts the rows that cannot be scored, by reason, with the first row numbers."""
    if _all_plain_text(dataset, schema):
        return
    wanted = [c for c in (*schema.required, schema.input) if c is not None]
    statuses: list[str] = []
    names: list[int] = []
    position = 0
    for batch in dataset.select_columns(wanted).with_format(None).iter(batch_size=10_000):
        rows = exchanges_of(batch, schema)
        bad = [i for i, row in enumerate(rows) if isinstance(row, str) and row in UNSCORABLE]
        statuses += [str(rows[i]) for i in bad]
        names += [position + i for i in bad]
        position += len(rows)
    if statuses:
        raise ValueError(invalid_rows_message(statuses, names, len(dataset)))


def _all_plain_text(dataset: Dataset, schema: Schema) -> bool:
    """True where Arrow already knows that no row can be bad: string columns without a null."""
    if schema.turns is not None:
        return False
    types = {getattr(dataset.features[c], "dtype", None) for c in schema.required}
    if schema.input is not None:
        types.add(getattr(dataset.features[schema.input], "dtype", None))
    nulls = sum(dataset.data.column(c).null_count for c in schema.required)
    return types <= {"string", "large_string"} and nulls == 0


def _number_rows(dataset: Dataset, index_column: str) -> Dataset:
    if index_column in dataset.column_names:
        values = dataset.with_format("arrow")[:][index_column]
        if values.null_count or len(values.unique()) != len(dataset):
            raise ValueError(
                f"The column {index_column!r} does not tell rows apart: it holds nulls or duplicates. Pass "
                "index_column=<another name> (--index-column) to number the rows there, or drop the column."
            )
        return dataset
    return dataset.add_column(index_column, np.arange(len(dataset), dtype=np.int64))


def _one_split(opened: Any, split: str | None) -> Dataset:
    if isinstance(opened, (IterableDataset, IterableDatasetDict)):
        raise ValueError("source is a streaming dataset; pass a Dataset, or load it without streaming=True.")
    if isinstance(opened, DatasetDict):
        if split is not None and split not in opened:
            raise ValueError(f"split={split!r} is not in the source; it has {sorted(opened)}.")
        if split is None and len(opened) != 1:
            raise ValueError(f"The source has the splits {sorted(opened)}; say which: split='train' (--split train).")
        opened = opened[split if split is not None else next(iter(opened))]
    if not isinstance(opened, Dataset):
        raise ValueError(f"source is a {type(opened).__name__}; pass a path, a Hub id, a Dataset or a DatasetDict.")
    return opened


def _open(
    source: Any,
    name: str | None,
    split: str | None,
    revision: str | None,
    token: str | None,
    cache_dir: str | None,
    columns: Mapping[str, str],
) -> Any:
    if not isinstance(source, (str, Path)):
        return source
    if not str(source).strip():
        raise ValueError("source is empty text; pass a path, a Hub id, a Dataset or a DatasetDict.")
    path = Path(source).expanduser()
    if path.is_file():
        return _open_file(path, columns, cache_dir)
    if path.is_dir():
        return _open_folder(path, name, columns, cache_dir)
    if path.suffix in FORMATS or path.is_absolute() or str(source).startswith((".", "~")):
        raise FileNotFoundError(f"source={str(source)!r}: there is no such file or folder.")
    return load_dataset(str(source), name, split=split, revision=revision, token=token, cache_dir=cache_dir)


def _open_file(path: Path, columns: Mapping[str, str], cache_dir: str | None) -> DatasetDict:
    if path.suffix not in FORMATS:
        raise ValueError(f"source={str(path)!r}: the ending {path.suffix!r} is not known; known are {sorted(FORMATS)}.")
    if path.stat().st_size == 0:
        raise ValueError(f"source={str(path)!r} is empty.")
    options: dict[str, Any] = {}
    if FORMATS[path.suffix] == "json":
        _check_json_start(path)
    elif FORMATS[path.suffix] == "csv":
        options = _csv_options(path, columns)
    with _reading(path, FORMATS[path.suffix]):
        try:
            opened = load_dataset(FORMATS[path.suffix], data_files=str(path), cache_dir=cache_dir, **options)
        except (DatasetGenerationError, StopIteration):
            if FORMATS[path.suffix] != "json":
                raise
            opened = None
        if FORMATS[path.suffix] == "json" and (opened is None or _has_dates(opened["train"])):
            opened = DatasetDict({"train": _json_as_written(path)})
    return opened


def _open_folder(path: Path, name: str | None, columns: Mapping[str, str], cache_dir: str | None) -> Any:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return load_from_disk(str(path))
    tables = sorted(p for p in path.rglob("*") if FORMATS.get(p.suffix) == "csv")
    with _reading(path, "a folder of data files"):
        return load_dataset(
            str(path), name, cache_dir=cache_dir, **(_csv_options(tables[0], columns) if tables else {})
        )


@contextlib.contextmanager
def _reading(path: Path, kind: str) -> Iterator[None]:
    """A reader's error as one ValueError that names the file, and the reader's own log line kept back."""
    loggers = [logging.getLogger(f"datasets.packaged_modules.{k}.{k}") for k in ("json", "csv", "parquet")]
    levels = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    except (DatasetGenerationError, ValueError, StopIteration) as error:  # Arrow's and Unicode's errors are ValueErrors
        if "corresponds to no data" in str(error):
            raise ValueError(f"source={str(path)!r} has no rows.") from error
        cause = error.__cause__ or error
        raise ValueError(
            f"source={str(path)!r} cannot be read as {kind}: {type(cause).__name__}: {str(cause)[:200]}"
        ) from error
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)


def _has_dates(dataset: Dataset) -> bool:
    return any(str(getattr(f, "dtype", "")).startswith("timestamp") for f in dataset.features.values())


def _json_as_written(path: Path) -> Dataset:
    """Arrow's JSON reader turns text that looks like a date into one, or stumbles over it; Python's does neither."""
    text = path.read_text(encoding="utf-8-sig")
    parts = [text] if text.lstrip()[:1] == "[" else [line for line in text.splitlines() if line.strip()]
    parsed = [json.loads(part, object_pairs_hook=_object) for part in parts]
    rows = parsed[0] if text.lstrip()[:1] == "[" else parsed
    wrong = [i for i, row in enumerate(rows) if not isinstance(row, dict)]
    if wrong:
        raise ValueError(f"{len(wrong)} rows are no objects, the first {wrong[:5]}")
    return Dataset.from_list(rows)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"an object names a key twice: {[key for key, _ in pairs]}")
    return found


def _check_json_start(path: Path) -> None:
    """A JSON file is a list of objects or one object per line; say so before a parser says something else."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        start = file.read(4096).split(maxsplit=2)
    opening = "".join(start)[:2]
    if opening[:1] == "{" or opening == "[{":
        return
    if opening == "[]":
        raise ValueError(f"source={str(path)!r} is an empty list.")
    raise ValueError(
        f"source={str(path)!r} is no list of objects and no JSON Lines: it starts with {opening!r}. Expected "
        '[{"instruction": ..., "output": ...}, ...] or one object per line.'
    )


def _csv_options(path: Path, columns: Mapping[str, str]) -> dict[str, Any]:
    """Text columns are text: pandas would read "42" as a number and "NA", "None" or an empty answer as missing."""
    separator = "\t" if path.suffix == ".tsv" else ","
    with _reading(path, "csv"), path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=separator)
        header, first = next(reader, []), next(reader, [])
        if len(first) > len(header):  # pandas would take the first column for row labels, and shift the others
            raise ValueError(f"line {reader.line_num} has {len(first)} fields, the header has {len(header)}")
    texts = {c for s in SCHEMAS.values() for c in (s.instruction, s.input, s.response)} | set(columns.values())
    return {
        "sep": separator,
        "converters": {c: str for c in header if c in texts},
        "keep_default_na": False,
        "na_values": {c: [""] for c in header if c not in texts},
    }


def _shown(source: Any) -> str:
    return repr(str(source)) if isinstance(source, (str, Path)) else type(source).__name__
