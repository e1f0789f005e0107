"""Load an instruction dataset from any source and check its rows.

Does: open Hub datasets, JSON lists, JSON Lines, CSV, Parquet, `save_to_disk` folders and datasets in memory; find the
schema; refuse rows that cannot be scored, before anything expensive runs; number the rows.
Does not: rename or change a column, or render text.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from datasets import (
    Dataset,
    DatasetBuilder,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.config import HF_HUB_OFFLINE
from datasets.exceptions import DatasetsError

from car_datasets.loading.files import FORMATS, DataFile, reading
from car_datasets.loading.reading import read_csv, read_json
from car_datasets.loading.schemas import (
    ON_INVALID,
    SCHEMAS,
    Schema,
    exchanges_of,
    find_schema,
    invalid_rows_message,
)
from car_datasets.loading.values import as_written, carried
from car_datasets.utils import revisions
from car_datasets.utils.column_names import ColumnNames
from car_datasets.utils.columns import is_text
from car_datasets.utils.hub import READING_WAITS, asking, clean_token, reason, retry

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
    index_column: str = ColumnNames.index,
) -> Dataset:
    """Load an instruction dataset and check every row before anything expensive runs.

    The two halves are [`open_dataset`] and [`check_rows`].

    Args:
        source (`str`, `Path`, `Dataset` or `DatasetDict`): a Hub id, a file (`.json`, a list of objects like
            `alpaca_data.json`; `.jsonl`, `.csv`, `.tsv`, `.parquet`), a folder (written by `save_to_disk`, or of data
            files), or a dataset in memory. An existing path takes precedence over a Hub id of the same name.
        name (`str`, *optional*): the configuration of a Hub dataset.
        split (`str`, *optional*): the split to load. Needed only if the source has more than one.
        revision (`str`, *optional*): branch, tag or commit of a Hub dataset. Defaults to its main branch.
        token (`str`, *optional*): a token for a private Hub dataset. Defaults to `HF_TOKEN` or `hf auth login`.
        cache_dir (`str`, *optional*): where `datasets` keeps its Arrow files.
        schema (`str`, defaults to `"auto"`): a key of [`SCHEMAS`]. `"auto"` recognises the schema from the column
            names.
        columns (`Mapping[str, str]`, *optional*): columns whose names differ from the schema's, such as
            `{"instruction": "task", "response": "answer"}`.
        on_invalid (`str`, defaults to `"error"`): `"error"` refuses a dataset with rows that cannot be scored; `"mark"`
            keeps them, and the scorer writes the reason into their status column.
        index_column (`str`, defaults to `"source_index"`): the row number in the source (int64). It is added unless the
            dataset has a column of this name, which must then be unique for each row.

    Returns:
        `Dataset`: the columns and rows of the source, unchanged and in order, and `index_column`.

    Raises:
        FileNotFoundError: the file does not exist, and the Hub has no such dataset or revision that you may see.
        ConnectionError: the Hub cannot be reached; a cached revision never replaces the requested one.
        ValueError: the file does not have the format that its name promises; the Hub rejects the token; no schema fits;
            there are no rows; rows cannot be scored; the index column contains duplicates.
    """
    _check_on_invalid(on_invalid)  # before a download that may take an hour
    dataset = open_dataset(source, name, split, revision=revision, token=token, cache_dir=cache_dir, columns=columns)
    return check_rows(dataset, schema=schema, columns=columns, on_invalid=on_invalid, index_column=index_column)


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
    """Open a source without checking its rows.

    Use it alone for datasets that are scored already; [`load_instructions`] calls it and then [`check_rows`].

    Args:
        source (`str`, `Path`, `Dataset` or `DatasetDict`): a Hub id, a file, a folder, or a dataset in memory.
        name (`str`, *optional*): the configuration of a Hub dataset.
        split (`str`, *optional*): the split to load. Needed only if the source has more than one.
        revision (`str`, *optional*): branch, tag or commit of a Hub dataset. Defaults to its main branch.
        token (`str`, *optional*): a token for a private Hub dataset. Defaults to `HF_TOKEN` or `hf auth login`.
        cache_dir (`str`, *optional*): where `datasets` keeps its Arrow files.
        columns (`Mapping[str, str]`, *optional*): columns of a CSV file that are text, apart from those of the schemas;
            keys are ignored.

    Returns:
        `Dataset`: the columns and rows of the source.

    Raises:
        FileNotFoundError: the file does not exist, and the Hub has no such dataset or revision that you may see.
        ConnectionError: the Hub cannot be reached; a cached revision never replaces the requested one.
        ValueError: the file does not have the format that its name promises, `split` is missing or unknown, or there
            are no rows.
    """
    # No rows is an error here, before a model is downloaded for them.
    dataset = _one_split(_open(source, name, split, revision, token, cache_dir, dict(columns)), split)
    if len(dataset) == 0:
        shown = repr(str(source)) if isinstance(source, (str, Path)) else type(source).__name__
        raise ValueError(f"source={shown} has no rows.")
    return as_written(dataset)


def check_rows(
    dataset: Dataset,
    *,
    schema: str | Schema = "auto",
    columns: Mapping[str, str] | tuple[tuple[str, str], ...] = (),
    on_invalid: str = "error",
    index_column: str = ColumnNames.index,
) -> Dataset:
    """Find the schema of an open dataset, check that its rows can be scored, and number them.

    Args:
        dataset (`Dataset`): a dataset from [`open_dataset`].
        schema (`str` or [`Schema`], defaults to `"auto"`): a key of [`SCHEMAS`], or what [`find_schema`] returned for
            this dataset. `"auto"` recognises the schema from the column names.
        columns (`Mapping[str, str]`, *optional*): columns whose names differ from the schema's; not used with a
            [`Schema`].
        on_invalid (`str`, defaults to `"error"`): `"error"` refuses rows that cannot be scored; `"mark"` keeps them.
        index_column (`str`, defaults to `"source_index"`): the row number in the source, added if it is not there.

    Returns:
        `Dataset`: the same columns and rows, and `index_column`.

    Raises:
        ValueError: no schema fits, rows cannot be scored, or the index column contains duplicates.
    """
    _check_on_invalid(on_invalid)
    known = schema if isinstance(schema, Schema) else find_schema(dataset.column_names, schema, columns)
    # With "mark" the scorer finds the same rows again, and writes the reason into their status column.
    if on_invalid == "error":
        refuse_invalid_rows(dataset, known)
    return _number_rows(dataset, index_column)


def _open(
    source: Any,
    name: str | None,
    split: str | None,
    revision: str | None,
    token: str | None,
    cache_dir: str | None,
    columns: Mapping[str, str],
) -> Any:
    """Open a source before a split is chosen: an object in memory, else a path that exists, else a Hub id."""
    if not isinstance(source, (str, Path)):
        return source
    if not str(source).strip():
        raise ValueError("source is empty; pass a path, a Hub id, a Dataset or a DatasetDict.")
    path = Path(source).expanduser()
    if path.is_file():
        return _open_file(path, columns, cache_dir)
    if path.is_dir():
        return _open_folder(path, name, columns, cache_dir)
    # These can only mean a path; asking the Hub would hide a misspelt file name behind an error about repositories.
    if path.suffix.lower() in FORMATS or path.is_absolute() or str(source).startswith((".", "~")):
        raise FileNotFoundError(f"source={str(source)!r}: no such file or folder. Check the path.")
    return _open_hub(str(source), name, split, revision, token, cache_dir)


def _open_file(path: Path, columns: Mapping[str, str], cache_dir: str | None) -> DatasetDict:
    """Load a data file with options that keep its text as it is."""
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(
            f"source={str(path)!r}: the file extension {path.suffix!r} is not known; use one of {sorted(FORMATS)}."
        )
    if path.stat().st_size == 0:
        raise ValueError(f"source={str(path)!r} is an empty file; pass one that contains rows.")
    if kind == "parquet":
        with reading(path, kind):
            return load_dataset(kind, data_files=str(path), cache_dir=cache_dir)
    return DatasetDict(train=_read([DataFile(str(path), str(path), kind)], columns, cache_dir))


def _read(files: list[DataFile], columns: Mapping[str, str], cache_dir: str | None) -> Dataset:
    """Read JSON or CSV files, which must be of one kind."""
    if files[0].kind == "json":
        return read_json(files, cache_dir)
    # The schema is recognised only after loading, so every column that is text in some schema is read as text.
    texts = {c for s in SCHEMAS.values() for c in (s.instruction, s.input, s.response) if c} | set(columns.values())
    return read_csv(files, texts, cache_dir)


def _open_folder(path: Path, name: str | None, columns: Mapping[str, str], cache_dir: str | None) -> Any:
    """Load a folder that `save_to_disk` wrote, or one of data files."""
    # The files by which `datasets` itself tells a saved Dataset and a saved DatasetDict apart.
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return load_from_disk(str(path))
    files = sorted(p for p in path.rglob("*") if p.is_file())
    if not any(p.suffix.lower() in FORMATS for p in files):
        raise ValueError(
            f"source={str(path)!r} is a folder without data. Pass one that save_to_disk wrote, or one with files that "
            f"end in {sorted(FORMATS)}."
        )
    data = [DataFile(str(p), str(p), FORMATS[p.suffix.lower()]) for p in files if p.suffix.lower() in FORMATS]
    if len({file.kind for file in data}) == 1 and data[0].kind != "parquet":
        return DatasetDict(train=_read(data, columns, cache_dir))
    with reading(path, "a folder of data files"):
        return load_dataset(str(path), name, cache_dir=cache_dir)


def _open_hub(
    source: str, name: str | None, split: str | None, revision: str | None, token: str | None, cache_dir: str | None
) -> Any:
    """Load a dataset from the Hub at the commit that `revision` means now.

    The commit is resolved before anything is loaded, so that a branch which moves meanwhile makes no difference.
    """
    resolved = revisions.is_commit(revision) or HF_HUB_OFFLINE  # offline, `datasets` looks the branch up in its cache
    commit = revision if resolved else revisions.pin_dataset(source, revision, token, FileNotFoundError)
    try:
        with asking(f"source={source!r}", "dataset", revision, FileNotFoundError):
            builder = builder_at_commit(source, name, commit, token, cache_dir)
            # Offline this may be an old commit, which the user should see without asking for it.
            level = logging.WARNING if HF_HUB_OFFLINE else logging.INFO
            logger.log(level, "source=%r: commit %s is loaded.", source, builder.hash)
            builder.download_and_prepare()
            return builder.as_dataset(split)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"source={source!r} is not a local file or folder, and as a Hub id: {error}") from error
    except yaml.YAMLError as error:
        raise ValueError(
            f"source={source!r}: the header of its README.md is not valid YAML ({' '.join(str(error).split())}). "
            "Correct it, or download the data files and pass their paths."
        ) from error


def load_split(
    repo_id: str, config_name: str, split: str, sha: str, token: str | None = None, cache_dir: str | None = None
) -> Dataset:
    """Load a split of a dataset repository at a commit, retrying on transient errors.

    Raises:
        ValueError: the configuration or split does not exist, the Hub refuses it, or its files cannot be read.
        ConnectionError: the Hub does not answer.
    """
    shown = f"{repo_id!r}, split {split!r}"

    def load() -> Dataset:
        builder = builder_at_commit(repo_id, config_name, sha, clean_token(token), cache_dir)
        builder.download_and_prepare()
        return builder.as_dataset(split)

    try:
        with asking(shown, "dataset", sha):
            return retry(load, READING_WAITS)
    except DatasetsError as error:
        raise ValueError(f"{shown}: its files cannot be read ({reason(error)}).") from error


def builder_at_commit(
    repo_id: str, name: str | None, revision: str | None, token: str | None = None, cache_dir: str | None = None
) -> DatasetBuilder:
    """Return the builder of a Hub dataset at exactly the commit `revision`, never at another one from the cache.

    If the Hub fails, `datasets` falls back to any revision in its cache without a warning; that fallback is refused.

    Args:
        repo_id (`str`): `"owner/name"`.
        name (`str`, *optional*): the configuration.
        revision (`str`, *optional*): a commit. A branch, a tag or `None` is not checked: offline, its current commit
            cannot be known.
        token (`str`, *optional*): a token for a private dataset.
        cache_dir (`str`, *optional*): where `datasets` keeps its Arrow files.

    Raises:
        ConnectionError: the cache holds another commit, and the Hub did not provide this one.
    """
    builder = load_dataset_builder(repo_id, name, revision=revision, token=token, cache_dir=cache_dir)
    # For a Hub dataset `hash` is the commit that the builder reads; a cached builder carries that of its own commit.
    if revisions.is_commit(revision) and str(builder.hash) != revision:
        raise ConnectionError(
            f"commit {revision} could not be loaded, and the cache holds {builder.hash}, which is a different commit"
        )
    return builder


def _one_split(opened: Any, split: str | None) -> Dataset:
    """Return the only split, or the one that was named; raise ValueError if it is unclear."""
    if isinstance(opened, (IterableDataset, IterableDatasetDict)):
        raise ValueError(
            "source is a streaming dataset; load it without streaming=True, or pass the Dataset that "
            "score_in_shards(stream, QualityScorer(), shard_dir) returns."
        )
    if isinstance(opened, DatasetDict):
        if split is not None and split not in opened:
            raise ValueError(f"split={split!r} is not in the source; it has {sorted(opened)}. Pass one of these.")
        # No guess such as "train": the rows of the other splits would be left out without a word.
        if split is None and len(opened) != 1:
            raise ValueError(
                f"The source has the splits {sorted(opened)}; say which, such as split='train' (--split train)."
            )
        opened = opened[split if split is not None else next(iter(opened))]
    if not isinstance(opened, Dataset):
        raise ValueError(f"source is a {type(opened).__name__}; pass a path, a Hub id, a Dataset or a DatasetDict.")
    return opened


def _check_on_invalid(on_invalid: str) -> None:
    if on_invalid not in ON_INVALID:
        raise ValueError(f"on_invalid={on_invalid!r} is not known; choose one of {ON_INVALID}.")


def refuse_invalid_rows(dataset: Dataset, schema: Schema) -> None:
    """Raise ValueError if rows cannot be scored, with their number, the reasons and the first row numbers."""
    reasons = unscorable_rows(dataset, schema)
    if reasons:
        raise ValueError(invalid_rows_message(list(reasons.values()), list(reasons), len(dataset)))


def unscorable_rows(dataset: Dataset, schema: Schema) -> dict[int, str]:
    """Return the positions of the rows that cannot be scored, each with its reason."""
    if _all_plain_text(dataset, schema):
        return {}
    reasons: dict[int, str] = {}
    position = 0
    # Without a format: a NumPy or PyTorch format would turn nulls and lists into other values.
    columns = list(schema.read_columns)
    for batch in carried(dataset.select_columns(columns).with_format(None)).iter(batch_size=10_000):
        rows = exchanges_of(batch, schema)
        reasons |= {position + i: row for i, row in enumerate(rows) if isinstance(row, str)}
        position += len(rows)
    return reasons


def _all_plain_text(dataset: Dataset, schema: Schema) -> bool:
    """Return True if the Arrow types and null counts prove that every row can be scored.

    This spares most datasets a pass over all their rows: text columns without a null cannot contain an invalid row. A
    null input counts as an empty one, so only the required columns must be free of nulls.
    """
    if schema.turns is not None or schema.history is not None:
        return False  # the roles of a chat are values, which types say nothing about
    read = [c for c in (*schema.required, schema.input, schema.system) if c is not None]
    types = {getattr(dataset.features[c], "dtype", None) for c in read}
    # `data` ignores the indices of a filtered dataset: nulls of dropped rows may count as well, but none is missed.
    nulls = sum(dataset.data.column(c).null_count for c in schema.required)
    return types <= {"string", "large_string"} and nulls == 0


def _number_rows(dataset: Dataset, index_column: str) -> Dataset:
    """Add the row number as `index_column`, or check the column of that name which the dataset has."""
    if index_column not in dataset.column_names:
        return dataset.add_column(index_column, np.arange(len(dataset), dtype=np.int64))
    # Arrow keeps the types apart that NumPy merges: a nullable integer column would arrive as floats.
    values = dataset.select_columns([index_column]).with_format("arrow")[:][index_column]
    kind = values.type
    plain = pa.types.is_integer(kind) or is_text(kind)
    if not plain or values.null_count or len(values.unique()) != len(dataset):
        raise ValueError(
            f"The column {index_column!r} does not tell rows apart: it contains nulls, duplicates, or values that are "
            "neither integers nor text. Pass index_column=<another name> (--index-column) to number the rows there, or "
            "drop the column."
        )
    return dataset
