"""STAND-IN until the merge: today's readers behind the agreed signatures. The other branch's module replaces it."""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
from datasets import Dataset, concatenate_datasets

if TYPE_CHECKING:
    from car_datasets.loading.files import DataFile


def read_json(files: Sequence[DataFile], cache_dir: str | None = None) -> Dataset:
    """STAND-IN."""
    rows = [row for file in files for row in _rows_of(file)]
    columns = {key: [row.get(key) for row in rows] for key in dict.fromkeys(key for row in rows for key in row)}
    try:
        for name, values in columns.items():
            _refuse_mixed(name, values)
        return Dataset.from_dict(columns, on_mixed_types="use_json")
    except ValueError as error:
        raise ValueError(f"source={files[0].shown!r} cannot be read as json: {error}") from error


def _rows_of(file: DataFile) -> list[dict[str, Any]]:
    """STAND-IN."""
    with file.open() as stream:
        text = stream.read().decode("utf-8-sig", "replace")
    opening = "".join(text.split(maxsplit=2))[:2]
    if opening == "[]":
        raise ValueError(f"source={file.shown!r} is an empty list; pass a file that contains rows.")
    if not (opening[:1] == "{" or opening == "[{"):
        raise ValueError(
            f"source={file.shown!r} is neither a list of objects nor JSON Lines: it starts with {opening!r}."
        )
    try:
        return _parse_rows(text)
    except ValueError as error:
        raise ValueError(f"source={file.shown!r} cannot be read as json: {error}") from error


def read_csv(files: Sequence[DataFile], texts: Collection[str], cache_dir: str | None = None) -> Dataset:
    """STAND-IN."""
    return concatenate_datasets([_table_of(file, texts) for file in files])


def _table_of(file: DataFile, texts: Collection[str]) -> Dataset:
    """STAND-IN."""
    separator = "\t" if ".tsv" in file.shown.lower() else ","
    try:
        with file.open() as stream:
            lines = stream.read().decode("utf-8-sig").splitlines(keepends=True)
        reader = csv.reader(lines, delimiter=separator)
        header = next(reader, [])
        for row in reader:
            if row and len(row) != len(header):
                raise ValueError(f"line {reader.line_num} has {len(row)} fields, the header has {len(header)}")
        with file.open() as stream:
            frame = pd.read_csv(
                stream,
                sep=separator,
                encoding="utf-8-sig",
                converters={c: str for c in header if c in texts},
                keep_default_na=False,
                na_values={c: [""] for c in header if c not in texts},
            )
        return Dataset.from_pandas(frame, preserve_index=False)
    except ValueError as error:
        raise ValueError(f"source={file.shown!r} cannot be read as csv: {error}") from error


def _parse_rows(text: str) -> list[dict[str, Any]]:
    """STAND-IN."""
    if "\n" in text.strip() and text.lstrip()[:2] in ("{\n", "{\r"):
        return [json.loads(text)]
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
    """STAND-IN."""
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError(f"an object has a key twice: {[key for key, _ in pairs]}")
    return value


def _refuse_mixed(name: str, values: list[Any]) -> None:
    """STAND-IN."""
    other = [i for i, value in enumerate(values) if value is not None and not isinstance(value, str)]
    if other and any(isinstance(value, str) for value in values):
        raise ValueError(
            f"the column {name!r} contains text and {len(other)} other values (rows {', '.join(map(str, other[:5]))}); "
            "one column cannot hold both. Correct or drop these rows"
        )
