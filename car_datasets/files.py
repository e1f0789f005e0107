"""What goes wrong between a data file and `datasets`: files that are not what they say, and readers that change values.

Does: say what is wrong with a JSON or CSV file in one ValueError, and find options (or another reader) with which text stays
text.
Does not: decide what a source is (loading.py).
"""

from __future__ import annotations

import contextlib
import csv
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError

from car_datasets.formatting import SCHEMAS

FORMATS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


@contextlib.contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """A reader's error as one ValueError that names the file, and the reader's own log line kept back."""
    loggers = [logging.getLogger(f"datasets.packaged_modules.{k}.{k}") for k in ("json", "csv", "parquet")]
    levels = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    except (DatasetGenerationError, ValueError, StopIteration, OSError) as error:
        # Unicode's errors are ValueErrors, Arrow's as well, or OSErrors without a number; one with a number is the disk's.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        if "corresponds to no data" in str(error):
            raise ValueError(f"source={str(path)!r} has no rows.") from error
        cause = error.__cause__ or error
        raise ValueError(
            f"source={str(path)!r} cannot be read as {kind}: {type(cause).__name__}: {str(cause)[:200]}"
        ) from error
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)


def needs_rereading(dataset: Dataset) -> bool:
    """Whether `datasets` may have read JSON as something else than it says: text as dates, or columns of mixed types."""
    return any(_holds(kind, _is_date) or _holds(kind, _is_json) for kind in dataset.features.arrow_schema.types)


def _is_date(kind: pa.DataType) -> bool:
    return bool(pa.types.is_temporal(kind))


def _is_json(kind: pa.DataType) -> bool:
    return isinstance(kind, pa.BaseExtensionType)  # datasets' Json, its store for what has no one type


def _holds(kind: pa.DataType, wanted: Callable[[pa.DataType], bool]) -> bool:
    return wanted(kind) or any(_holds(kind.field(i).type, wanted) for i in range(kind.num_fields))


def reread_json(path: Path, opened: Dataset | None) -> Dataset:
    """What `opened` should have been, by Python's reader, which leaves text that looks like a date alone.

    Args:
        path (`Path`): a JSON list of objects, or JSON Lines.
        opened (`Dataset`, *optional*): what `datasets` made of it, kept where it changed nothing.

    Raises:
        ValueError: a row is no object, or a column mixes text with other values: `datasets` would store such a column as
            JSON and give back the text "42" as a number.
    """
    text = path.read_text(encoding="utf-8-sig")
    whole = text.lstrip()[:1] == "["
    parts = [text] if whole else [line for line in text.split("\n") if line.strip()]
    parsed = [json.loads(part, object_pairs_hook=_object) for part in parts]
    rows = parsed[0] if whole else parsed
    wrong = [i for i, row in enumerate(rows) if not isinstance(row, dict)]
    if wrong:
        raise ValueError(f"{len(wrong)} rows are no objects, the first {wrong[:5]}")
    columns = {key: [row.get(key) for row in rows] for key in dict.fromkeys(key for row in rows for key in row)}
    for name, values in columns.items():
        _refuse_mixed(name, values)
    if opened is not None and not any(_holds(kind, _is_date) for kind in opened.features.arrow_schema.types):
        return opened
    return Dataset.from_dict(columns)


def _refuse_mixed(name: str, values: list[Any]) -> None:
    other = [i for i, value in enumerate(values) if value is not None and not isinstance(value, str)]
    if other and any(isinstance(value, str) for value in values):
        raise ValueError(
            f"the column {name!r} holds text and {len(other)} other values (rows {', '.join(map(str, other[:5]))}); one "
            "column cannot hold both. Mend or drop these rows"
        )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"an object names a key twice: {[key for key, _ in pairs]}")
    return found


def check_json_start(path: Path) -> None:
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


def csv_options(path: Path, columns: Mapping[str, str]) -> dict[str, Any]:
    """Text columns are text: pandas would read "42" as a number and "NA", "None" or an empty answer as missing.

    Raises:
        ValueError: a line has more or fewer fields than the header; pandas would shift it, or fill it with empty answers.
    """
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    with reading(path, "csv"), path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=separator)
        header = next(reader, [])
        for row in reader:
            if row and len(row) != len(header):
                raise ValueError(f"line {reader.line_num} has {len(row)} fields, the header has {len(header)}")
    texts = {c for s in SCHEMAS.values() for c in (s.instruction, s.input, s.response)} | set(columns.values())
    return {
        "sep": separator,
        "converters": {c: str for c in header if c in texts},
        "keep_default_na": False,
        "na_values": {c: [""] for c in header if c not in texts},
    }
