"""LOAD: any source to a checked `Dataset`.

Does: open Hub datasets, JSON lists (the original's files), JSON Lines, CSV, Parquet, `save_to_disk` folders and datasets
in memory; find the schema; refuse rows that cannot be scored, before anything expensive; number the rows.
Does not: rename or change a column, or render text (formatting.py).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.config import HF_HUB_OFFLINE
from datasets.exceptions import DatasetGenerationError

from car_datasets import hub
from car_datasets.asking import asking
from car_datasets.files import FORMATS, check_json_start, csv_options, needs_rereading, reading, reread_json
from car_datasets.formatting import UNSCORABLE, Schema, exchanges_of, find_schema
from car_datasets.rows import ON_INVALID, invalid_rows_message

logger = logging.getLogger(__name__)


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
        FileNotFoundError: there is no such file, and no dataset of that name and revision on the Hub that you may see.
        ConnectionError: the Hub does not answer; a cached revision is never taken for the one that was asked for.
        ValueError: the file is not what its name says; the Hub refuses the token; no schema fits; there are no rows; rows
            cannot be scored; the index column holds duplicates.
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
        FileNotFoundError, ConnectionError: see [`load_instructions`].
        ValueError: the file is not what its name says, the split is unclear, or there are no rows.
    """
    dataset = _one_split(_open(source, name, split, revision, token, cache_dir, dict(columns)), split)
    if len(dataset) == 0:
        raise ValueError(f"source={_shown(source)} has no rows.")
    return dataset


def refuse_invalid_rows(dataset: Dataset, schema: Schema) -> None:
    """Raise a ValueError that counts the rows that cannot be scored, by reason, with the first row numbers."""
    bad = unscorable_rows(dataset, schema)
    if bad:
        raise ValueError(invalid_rows_message(list(bad.values()), list(bad), len(dataset)))


def unscorable_rows(dataset: Dataset, schema: Schema) -> dict[int, str]:
    """The rows that cannot be scored, by position, with the reason."""
    if _all_plain_text(dataset, schema):
        return {}
    wanted = [c for c in (*schema.required, schema.input) if c is not None]
    bad: dict[int, str] = {}
    position = 0
    for batch in dataset.select_columns(wanted).with_format(None).iter(batch_size=10_000):
        rows = exchanges_of(batch, schema)
        bad |= {position + i: row for i, row in enumerate(rows) if isinstance(row, str) and row in UNSCORABLE}
        position += len(rows)
    return bad


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
        values = dataset.select_columns([index_column]).with_format("arrow")[:][index_column]
        plain = (
            pa.types.is_integer(values.type) or pa.types.is_string(values.type) or pa.types.is_large_string(values.type)
        )
        if not plain or values.null_count or len(values.unique()) != len(dataset):
            raise ValueError(
                f"The column {index_column!r} does not tell rows apart: it holds nulls, duplicates, or no plain values. Pass "
                "index_column=<another name> (--index-column) to number the rows there, or drop the column."
            )
        return dataset
    return dataset.add_column(index_column, np.arange(len(dataset), dtype=np.int64))


def _one_split(opened: Any, split: str | None) -> Dataset:
    if isinstance(opened, (IterableDataset, IterableDatasetDict)):
        raise ValueError(
            "source is a streaming dataset; load it without streaming=True, or pass the Dataset that "
            "score_in_shards(stream, QualityScorer(), shard_dir) writes."
        )
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
    if path.suffix.lower() in FORMATS or path.is_absolute() or str(source).startswith((".", "~")):
        raise FileNotFoundError(f"source={str(source)!r}: there is no such file or folder.")
    return _open_hub(str(source), name, split, revision, token, cache_dir)


def _open_hub(
    source: str, name: str | None, split: str | None, revision: str | None, token: str | None, cache_dir: str | None
) -> Any:
    """A dataset on the Hub, at the commit that was asked for first.

    Left to itself, `datasets` takes whatever is in its cache, of any revision and without a word, where the Hub fails.
    """
    is_commit = revision is not None and re.fullmatch("[0-9a-f]{40}", revision) is not None
    commit = revision if is_commit or HF_HUB_OFFLINE else hub.pin_dataset(source, revision, token, FileNotFoundError)
    try:
        with asking(f"source={source!r}", "dataset", revision, FileNotFoundError):
            builder = load_dataset_builder(source, name, revision=commit, token=token, cache_dir=cache_dir)
            seen = str(builder.hash)
            if seen != commit and not (HF_HUB_OFFLINE and not is_commit):
                raise ConnectionError(
                    f"source={source!r}: commit {commit} could not be loaded from the Hub, and the cache holds {seen}, which "
                    "is another. Run the same again."
                )
            logger.log(
                logging.WARNING if HF_HUB_OFFLINE else logging.INFO, "source=%r: commit %s is loaded.", source, seen
            )
            builder.download_and_prepare()
            return builder.as_dataset(split)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"source={source!r} is no file or folder here, and as a Hub id: {error}") from error
    except yaml.YAMLError as error:
        raise ValueError(
            f"source={source!r}: the header of its README.md is no YAML ({' '.join(str(error).split())}). Mend it, or download "
            "the data files and name them."
        ) from error


def _open_file(path: Path, columns: Mapping[str, str], cache_dir: str | None) -> DatasetDict:
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"source={str(path)!r}: the ending {path.suffix!r} is not known; known are {sorted(FORMATS)}.")
    if path.stat().st_size == 0:
        raise ValueError(f"source={str(path)!r} is empty.")
    options: dict[str, Any] = {}
    if kind == "json":
        check_json_start(path)
    elif kind == "csv":
        options = csv_options(path, columns)
    with reading(path, kind):
        try:
            opened = load_dataset(kind, data_files=str(path), cache_dir=cache_dir, **options)
        except (DatasetGenerationError, StopIteration):
            if kind != "json":
                raise
            opened = None
        if kind == "json" and (opened is None or needs_rereading(opened["train"])):
            opened = DatasetDict({"train": reread_json(path, None if opened is None else opened["train"])})
    return opened


def _open_folder(path: Path, name: str | None, columns: Mapping[str, str], cache_dir: str | None) -> Any:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return load_from_disk(str(path))
    files = sorted(p for p in path.rglob("*") if p.is_file())
    if not any(p.suffix.lower() in FORMATS for p in files):
        raise ValueError(
            f"source={str(path)!r} is a folder without data: neither of save_to_disk nor with files that end in "
            f"{sorted(FORMATS)}."
        )
    tables = [p for p in files if FORMATS.get(p.suffix.lower()) == "csv"]
    options = [csv_options(table, columns) for table in tables]
    with reading(path, "a folder of data files"):
        opened = load_dataset(str(path), name, cache_dir=cache_dir, **(options[0] if options else {}))
    if any(needs_rereading(split) for split in opened.values()):
        raise ValueError(
            f"source={str(path)!r} holds JSON whose values datasets would change (text that looks like a date, or columns of "
            "mixed types). Load the files one by one."
        )
    return opened


def _shown(source: Any) -> str:
    return repr(str(source)) if isinstance(source, (str, Path)) else type(source).__name__
