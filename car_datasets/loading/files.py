"""Read data files without changing their values, and report broken ones in one error.

Does: report what is wrong with a JSON or CSV file; find options, or a different reader, with which text stays text.
Does not: decide whether a source is a file, a folder or a Hub id.
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

from car_datasets.loading.schemas import SCHEMAS

FORMATS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


@contextlib.contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Turn a reader's error into one ValueError that names the file, and silence the reader's own log line."""
    # The readers of `datasets` log the error before they raise it; the user would see it twice.
    loggers = [logging.getLogger(f"datasets.packaged_modules.{k}.{k}") for k in ("json", "csv", "parquet")]
    levels = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    except (DatasetGenerationError, ValueError, StopIteration, OSError) as error:
        # Errors of decoding and of Arrow are ValueErrors, or OSErrors without an errno. An OSError with an errno comes
        # from the operating system (no permission, disk full): the file itself is not to blame.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        if "corresponds to no data" in str(error):
            raise ValueError(f"source={str(path)!r} has no rows.") from error
        cause = error.__cause__ or error  # DatasetGenerationError says nothing; its cause names the line
        raise ValueError(
            f"source={str(path)!r} cannot be read as {kind}: {type(cause).__name__}: {str(cause)[:200]}"
        ) from error
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)


def check_json_start(path: Path) -> None:
    """Raise ValueError if a file does not begin like a JSON list of objects or JSON Lines.

    A JSON parser would report a syntax error there, without the format that was expected.
    """
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        start = file.read(4096).split(maxsplit=2)
    opening = "".join(start)[:2]
    if opening[:1] == "{" or opening == "[{":
        return
    if opening == "[]":
        raise ValueError(f"source={str(path)!r} is an empty list; pass a file that contains rows.")
    raise ValueError(
        f"source={str(path)!r} is neither a list of objects nor JSON Lines: it starts with {opening!r}. Expected "
        '[{"instruction": ..., "output": ...}, ...] or one object per line.'
    )


def csv_options(path: Path, columns: Mapping[str, str]) -> dict[str, Any]:
    """Return options for `load_dataset` with which the text columns of a CSV or TSV file stay text.

    pandas would read "42" as a number, and "NA", "None" or an empty answer as missing.

    Args:
        path (`Path`): the file, with a header.
        columns (`Mapping[str, str]`): columns that contain text, as values, apart from those of the schemas.

    Raises:
        ValueError: a line has more or fewer fields than the header; pandas would shift it, or fill it with empty
            answers.
    """
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    with reading(path, "csv"), path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=separator)
        header = next(reader, [])
        for row in reader:  # an empty line is an empty row, which pandas skips
            if row and len(row) != len(header):
                raise ValueError(f"line {reader.line_num} has {len(row)} fields, the header has {len(header)}")
    # The schema is recognised only after loading, so every column that is text in some schema is read as text.
    texts = {c for s in SCHEMAS.values() for c in (s.instruction, s.input, s.response)} | set(columns.values())
    return {
        "sep": separator,
        "converters": {c: str for c in header if c in texts},
        "keep_default_na": False,
        "na_values": {c: [""] for c in header if c not in texts},  # an empty number is null, an empty text is ""
    }


def needs_rereading(dataset: Dataset) -> bool:
    """Return True if `datasets` may have changed JSON values: text read as dates, or columns of mixed types."""
    # `datasets` reads JSON by Arrow, which turns "2024-01-01" into a timestamp; the text would not come back unchanged.
    return _has_dates(dataset) or any(_contains(kind, _is_json) for kind in dataset.features.arrow_schema.types)


def _has_dates(dataset: Dataset) -> bool:
    return any(_contains(kind, _is_date) for kind in dataset.features.arrow_schema.types)


def _contains(kind: pa.DataType, wanted: Callable[[pa.DataType], bool]) -> bool:
    """Return True if a type, or one nested in it at any depth, is `wanted`."""
    return wanted(kind) or any(_contains(kind.field(i).type, wanted) for i in range(kind.num_fields))


def _is_date(kind: pa.DataType) -> bool:
    return bool(pa.types.is_temporal(kind))


def _is_json(kind: pa.DataType) -> bool:
    return isinstance(kind, pa.BaseExtensionType)  # the type `Json` of `datasets`, for values without a common type


def reread_json(path: Path, opened: Dataset | None) -> Dataset:
    """Read a JSON file again with Python's parser, which keeps text that looks like a date.

    Args:
        path (`Path`): a JSON list of objects, or JSON Lines.
        opened (`Dataset`, *optional*): what `datasets` read, returned as it is if it contains no dates.

    Raises:
        ValueError: a row is not an object, or a column mixes text with other values: `datasets` would store such a
            column as JSON and return the text "42" as a number.
    """
    rows = _parse_rows(path.read_text(encoding="utf-8-sig"))  # "-sig" drops the byte order mark of Windows editors
    # The union of all keys in order of first appearance: a key that a row lacks is null there.
    columns = {key: [row.get(key) for row in rows] for key in dict.fromkeys(key for row in rows for key in row)}
    for name, values in columns.items():
        _refuse_mixed(name, values)
    # Mixed columns were ruled out above, so without dates the types that `datasets` found are right, and are kept.
    if opened is not None and not _has_dates(opened):
        return opened
    return Dataset.from_dict(columns)


def _parse_rows(text: str) -> list[dict[str, Any]]:
    """Parse a JSON list of objects or JSON Lines; raise ValueError if a row is not an object."""
    if text.lstrip()[:1] == "[":
        rows = json.loads(text, object_pairs_hook=_unique_keys)
    else:
        # Not splitlines(): it would also cut at U+2028 and its like, which JSON allows inside of strings.
        lines = [line for line in text.split("\n") if line.strip()]
        rows = [json.loads(line, object_pairs_hook=_unique_keys) for line in lines]
    wrong = [i for i, row in enumerate(rows) if not isinstance(row, dict)]
    if wrong:
        raise ValueError(f"{len(wrong)} rows are not objects (the first are {wrong[:5]}); correct or drop them")
    return list(rows)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dict; raise ValueError for a repeated key, of which Python would keep only the last."""
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError(f"an object has a key twice: {[key for key, _ in pairs]}")
    return value


def _refuse_mixed(name: str, values: list[Any]) -> None:
    """Raise ValueError if a column contains both text and other values; nulls do not count."""
    other = [i for i, value in enumerate(values) if value is not None and not isinstance(value, str)]
    if other and any(isinstance(value, str) for value in values):
        raise ValueError(
            f"the column {name!r} contains text and {len(other)} other values (rows {', '.join(map(str, other[:5]))}); "
            "one column cannot hold both. Correct or drop these rows"
        )
