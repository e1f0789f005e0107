"""Load an instruction dataset from any source and check its rows.

Does: open Hub datasets, data files, folders, addresses and datasets in memory by the same readers; choose splits; find
the schema; refuse rows that cannot be scored, before anything expensive runs; number the rows.
Does not: rename or change a column, or render text.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    load_from_disk,
)

from car_datasets.loading.files import (
    SPLIT,
    STANDARD_INPUT,
    DataFile,
    find_files,
    folder_files,
    naming_broken,
    read_parquet,
)
from car_datasets.loading.hub_datasets import download_splits, find_dataset
from car_datasets.loading.reading import read_csv, read_json
from car_datasets.loading.schemas import (
    ON_INVALID,
    SCHEMAS,
    Schema,
    check_schema,
    exchanges_of,
    find_schema,
    invalid_rows_message,
)
from car_datasets.loading.splits import choose_rows, named_splits
from car_datasets.loading.templates import DEEPEST_READ
from car_datasets.loading.values import as_written, carried, dataset_from_pandas, dataset_from_rows
from car_datasets.utils.column_names import ColumnNames
from car_datasets.utils.columns import is_text, refuse_deep_json, refuse_wide
from car_datasets.utils.digests import bound, file_digest
from car_datasets.utils.files import user_path
from car_datasets.utils.processes import launched_rank
from car_datasets.utils.revisions import hub_address

logger = logging.getLogger(__name__)

# What one can pass: where rows are, or the rows.
Source: TypeAlias = (
    str | Path | Sequence[str | Path] | Sequence[Mapping[str, Any]] | pd.DataFrame | Dataset | DatasetDict
)


def load_instructions(
    source: Source,
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
    glob: bool = False,
) -> Dataset:
    """Load an instruction dataset and check every row before anything expensive runs.

    The two halves are [`open_dataset`] and [`check_rows`].

    Args:
        source (`str`, `Path`, a list of these, a list of rows, `DataFrame`, `Dataset` or `DatasetDict`): a Hub id; a
            file (`.json`, a list of objects like `alpaca_data.json`; `.jsonl`, `.csv`, `.tsv`, `.parquet`; text may end
            in `.gz`, `.bz2`, `.xz` or `.zst`); a folder (written by `save_to_disk`, or of data files); the address of a
            file (`https://`, `hf://datasets/`, ...); `"-"`, standard input; or rows in memory. An existing path means
            that path, whatever characters it contains, and takes precedence over a Hub id of the same name.
        name (`str`, *optional*): the configuration of a Hub dataset, or of a folder whose README.md has some.
        split (`str`, *optional*): the split to load, or a slice such as `"train[:10%]"`, `"train[10:20]"` or
            `"train+test"`; `"all"` loads all splits and adds a column `split`. Needed only if there are several.
        revision (`str`, *optional*): branch, tag or commit of a Hub dataset. Defaults to its main branch.
        token (`str`, *optional*): a token for a private Hub dataset. Defaults to `HF_TOKEN` or `hf auth login`.
        cache_dir (`str`, *optional*): where `datasets` keeps its Arrow files.
        schema (`str`, defaults to `"auto"`): a key of [`SCHEMAS`]. `"auto"` recognises the schema from the column
            names.
        columns (`Mapping[str, str]`, *optional*): columns whose names differ from the schema's, such as
            `{"instruction": "task", "response": "answer"}`.
        on_invalid (`str`, defaults to `"error"`): `"error"` refuses a dataset with rows that cannot be scored; `"mark"`
            keeps them, and the scorer writes the reason into their status column.
        index_column (`str`, defaults to `"source_index"`): the row number in the source (int64), as [`check_rows`]
            explains. It is added unless the dataset has a column of this name, which must then be unique for each row.
        glob (`bool`): if there is no such path, `source` is a pattern with `*`, `?` or `[...]`, and all files that fit
            it are read, sorted by name.

    Returns:
        `Dataset`: the columns and rows of the source, unchanged and in order, and `index_column`.

    Raises:
        FileNotFoundError: the file does not exist, and the Hub has no such dataset or revision that you may see.
        ConnectionError: the Hub cannot be reached; a cached revision never replaces the requested one.
        ValueError: the file does not have the format that its name promises; the Hub rejects the token; no schema fits;
            there are no rows; rows cannot be scored; the index column contains duplicates.
    """
    _check_on_invalid(on_invalid)  # before a download that may take an hour
    check_schema(schema, columns)
    reading = Reading(name, split, revision, token, cache_dir, dict(columns), glob)
    dataset = open_rows(source, reading).dataset
    return check_rows(dataset, schema=schema, columns=columns, on_invalid=on_invalid, index_column=index_column)


def open_dataset(
    source: Source,
    name: str | None = None,
    split: str | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    columns: Mapping[str, str] | tuple[tuple[str, str], ...] = (),
    glob: bool = False,
) -> Dataset:
    """Open a source without checking its rows.

    Use it alone for datasets that are scored already; [`load_instructions`] calls it and then [`check_rows`].

    Args:
        source, name, split, revision, token, cache_dir, glob: as in [`load_instructions`].
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
    return open_rows(source, Reading(name, split, revision, token, cache_dir, dict(columns), glob)).dataset


def check_rows(
    dataset: Dataset,
    *,
    schema: str | Schema = "auto",
    columns: Mapping[str, str] | tuple[tuple[str, str], ...] = (),
    on_invalid: str = "error",
    index_column: str = ColumnNames.index,
) -> Dataset:
    """Find the schema of an open dataset, check that its rows can be scored, and number them.

    A row has the number that it has in the source. With several files or splits, the number counts through them in the
    order in which they are read. A slice (`split="train[10:20]"`) and a dataset in memory after `.filter`, `.shuffle`,
    `.sort` or `.select` keep the numbers that their rows had before. `datasets` forgets these numbers after `.map`, and
    after a `.select` of adjacent rows: then rows are numbered from 0, with a warning if that can be seen.

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
    return number_rows(dataset, index_column)


class Reading(NamedTuple):
    """How a source is opened: the arguments of [`open_dataset`] apart from the source."""

    name: str | None = None
    split: str | None = None
    revision: str | None = None
    token: str | None = None
    cache_dir: str | None = None
    columns: Mapping[str, str] = {}
    glob: bool = False


READING = Reading()


class Origin(NamedTuple):
    """Where rows come from, as a receipt says it.

    Args:
        kind (`str`): `"hub"`, `"folder"`, `"file"`, `"files"` or `"memory"`.
        name (`str`): the Hub id or the path.
        files (`tuple`): name and sha256 of each file that was read, in the order of the rows; empty for rows in memory
            and for what `datasets` read.
        commit (`str`, *optional*): the commit of a Hub dataset.
    """

    kind: str
    name: str = ""
    files: tuple[tuple[str, str], ...] = ()
    commit: str | None = None


class Opened(NamedTuple):
    """The rows of a source, and where they come from."""

    dataset: Dataset
    origin: Origin


class _Found(NamedTuple):
    """The splits of a source before any file is parsed: rows that are there, or the files that contain them."""

    origin: Origin
    splits: dict[str, Dataset | list[DataFile]]


def open_rows(source: Source, reading: Reading = READING) -> Opened:
    """Open a source, and say where its rows come from; [`open_dataset`] returns the rows alone."""
    opened = _read_splits(_find_source(source, reading), reading)
    # No rows is an error here, before a model is downloaded for them.
    if len(opened.dataset) == 0:
        shown = repr(str(source)) if isinstance(source, (str, Path)) else type(source).__name__
        part = "" if reading.split is None else f" in split={reading.split!r}"
        raise ValueError(f"source={shown} has no rows{part}.")
    return opened


def find_origin(source: str | Path, reading: Reading = READING) -> Origin:
    """Return where the rows of a source would come from, without parsing its files."""
    found = _find_source(source, reading)
    return _with_digests(found, named_splits(reading.split, list(found.splits)))


def _find_source(source: Any, reading: Reading) -> _Found:
    """Return the splits of an object in memory, a path that exists, an address or a Hub id, in this order."""
    if isinstance(source, (IterableDataset, IterableDatasetDict)):
        raise ValueError(
            "source is a streaming dataset; load it without streaming=True, or pass the Dataset that "
            "score_in_shards(stream, QualityScorer(), shard_dir) returns."
        )
    if isinstance(source, (Dataset, DatasetDict)):
        return _Found(Origin("memory"), _splits_of(source))
    if isinstance(source, pd.DataFrame):
        return _Found(Origin("memory"), {SPLIT: dataset_from_pandas(source)})
    if isinstance(source, (list, tuple)) and _are(source[:1], Mapping):
        return _Found(Origin("memory"), {SPLIT: dataset_from_rows(source)})
    if isinstance(source, (list, tuple)) and _are(source, (str, Path)):
        return _find_all(source, reading)
    if not isinstance(source, (str, Path)):
        what = "an empty list" if isinstance(source, (list, tuple)) and not source else f"a {type(source).__name__}"
        raise ValueError(
            f"source is {what}; pass a path, a Hub id, a list of paths or of rows, a DataFrame, a "
            "Dataset or a DatasetDict."
        )
    if not (text := str(source)).strip():
        raise ValueError("source is empty; pass a path, a Hub id, a Dataset or a DatasetDict.")
    if text == STANDARD_INPUT and launched_rank()[1] > 1:
        raise ValueError("source='-': several processes cannot share standard input; pass a file.")
    folder = user_path(text)
    if folder.is_dir():
        return _find_folder(folder, reading)
    at = hub_address(text)
    if at is not None and not at.path:
        if at.revision and reading.revision and at.revision != reading.revision:
            raise ValueError(f"source={text!r} names another revision than revision={reading.revision!r}; pass one.")
        return _find_on_hub(at.repo_id, reading._replace(revision=reading.revision or at.revision))
    if files := find_files(text, reading.glob, reading.token, reading.cache_dir):
        return _Found(Origin("file" if len(files) == 1 else "files", text), {SPLIT: files})
    return _find_on_hub(text, reading)


def _are(values: Sequence[Any], kinds: Any) -> bool:
    return len(values) > 0 and all(isinstance(value, kinds) for value in values)


def _splits_of(rows: Dataset | DatasetDict, shown: str = "source") -> dict[str, Dataset | list[DataFile]]:
    for split in rows.values() if isinstance(rows, DatasetDict) else (rows,):
        refuse_wide(shown, len(split.column_names))
    if isinstance(rows, DatasetDict):
        return {str(name): split for name, split in rows.items()}
    name = str(rows.split or SPLIT)
    return {name if name.isidentifier() else SPLIT: rows}  # a slice that `datasets` loaded is called "train[:10]"


def _find_all(sources: Sequence[str | Path], reading: Reading) -> _Found:
    """Return the files of a list of paths, in its order."""
    files: list[DataFile] = []
    for each in map(str, sources):
        found = [] if user_path(each).is_dir() else find_files(each, reading.glob, reading.token, reading.cache_dir)
        if not found:
            raise ValueError(f"source={each!r}, in a list of {len(sources)}, is not a file. Pass a list of files.")
        files += found
    return _Found(Origin("file" if len(files) == 1 else "files", str(sources[0])), {SPLIT: files})


def _find_folder(folder: Path, reading: Reading) -> _Found:
    """Return the splits of a folder that `save_to_disk` wrote, or of one of data files."""
    origin = Origin("folder", str(folder))
    # The files by which `datasets` itself tells a saved Dataset and a saved DatasetDict apart.
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        splits = _splits_of(load_from_disk(str(folder)), f"source={str(folder)!r}")
        return _Found(origin, {name: bound(part) for name, part in splits.items() if isinstance(part, Dataset)})
    return _Found(origin, dict(folder_files(folder, reading.name)))


def _read_splits(found: _Found, reading: Reading) -> Opened:
    """Read the splits that were asked for, and no others."""
    names = named_splits(reading.split, list(found.splits))
    origin = _with_digests(found, names)
    texts = text_columns(reading.columns)
    tables = {}
    for name in names:
        part = found.splits[name]
        rows = part if isinstance(part, Dataset) else _read_files(part, texts, reading.cache_dir)
        if isinstance(part, Dataset) or part[0].kind == "parquet":  # the readers of other files have checked it
            refuse_deep_json(f"source={found.origin.name!r}" if found.origin.name else "source", rows, DEEPEST_READ)
        tables[name] = as_written(rows)
    if len({repr(table.features) for table in tables.values()}) > 1:
        tables = _typed_together(tables, found, texts, reading.cache_dir)
    # Each is hashed again only if it was written to meanwhile.
    if _with_digests(found, names) != origin:
        raise ValueError(f"source={origin.name!r} was changed while it was read. Run the same again.")
    return Opened(choose_rows(tables, reading.split, found.splits), origin)


def _with_digests(found: _Found, names: Sequence[str]) -> Origin:
    parts = [found.splits[name] for name in names]
    files = [file for part in parts if not isinstance(part, Dataset) for file in part]
    return found.origin._replace(files=tuple((file.shown, file_digest(Path(file.path))) for file in files))


def text_columns(columns: Mapping[str, str]) -> set[str]:
    """Return the columns of a table that are read as text: those of every schema, and those that the user named."""
    # The schema is recognised only after loading.
    known = {name for s in SCHEMAS.values() for name in (s.instruction, s.input, s.response, s.system) if name}
    return known | set(columns.values())


def _read_files(files: Sequence[DataFile], texts: Collection[str], cache_dir: str | None) -> Dataset:
    """Read files of one kind into one dataset, in order."""
    by_kind = {file.kind: file.shown for file in files}
    if len(by_kind) > 1:
        raise ValueError(f"source has files of several formats: {sorted(by_kind.values())}. Pass those of one format.")
    with naming_broken(files):
        if files[0].kind == "json":
            return read_json(files, cache_dir)
        return read_csv(files, texts, cache_dir) if files[0].kind == "csv" else read_parquet(files, cache_dir)


def _typed_together(
    tables: dict[str, Dataset], found: _Found, texts: Collection[str], cache_dir: str | None
) -> dict[str, Dataset]:
    """Return splits with types that hold the values of all, if their files are read by our own readers."""
    parts = [found.splits[name] for name in tables]
    files = [file for part in parts if not isinstance(part, Dataset) for file in part]
    if any(isinstance(part, Dataset) for part in parts) or {file.kind for file in files} not in ({"json"}, {"csv"}):
        return tables
    every, start = _read_files(files, texts, cache_dir), 0
    typed = {}
    for name, table in tables.items():
        typed[name] = every.select(range(start, start + len(table)))
        start += len(table)
    return typed


def _find_on_hub(repo_id: str, reading: Reading) -> _Found:
    """Return the splits of a dataset on the Hub, with the files of those that are read."""
    found = find_dataset(repo_id, reading.name, reading.revision, reading.token, reading.cache_dir)
    origin = Origin("hub", repo_id, commit=found.commit)
    if found.rows is not None:
        return _Found(origin, _splits_of(found.rows, f"source={repo_id!r}"))
    wanted = named_splits(reading.split, list(found.files))  # before a download
    return _Found(origin, {**{n: [] for n in found.files}, **download_splits(repo_id, found, wanted, reading.token)})


# --- rows


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
    columns = list(schema.read_columns)
    reasons: dict[int, str] = {}
    position = 0
    # Without a format: a NumPy or PyTorch format would turn nulls and lists into other values.
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


def number_rows(dataset: Dataset, index_column: str) -> Dataset:
    """Add the row number as `index_column`, or check the column of that name which the dataset has."""
    if index_column not in dataset.column_names:
        numbers = source_numbers(dataset)
        return dataset.add_column(index_column, np.arange(len(dataset)) if numbers is None else numbers)
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


def source_numbers(dataset: Dataset) -> npt.NDArray[np.int64] | None:
    """Return the number that each row had before `.filter`, `.shuffle` and the like, or `None` if rows are in place.

    A warning is logged if rows lost their numbers.
    """
    lost = None
    if dataset._indices is not None:
        numbers = dataset._indices.column(0).to_numpy().astype(np.int64)
        if len(np.unique(numbers)) == len(numbers):
            return None if np.array_equal(numbers, np.arange(len(numbers))) else numbers
        lost = "some of its rows occur more than once"
    elif dataset.data.num_columns and dataset.data.num_rows and dataset.data.column(0).chunk(0).offset:
        lost = "it is a part of a larger one, of which `datasets` does not tell the start"
    if lost:
        logger.warning(
            "The dataset in memory has no row numbers of its own source (%s): its rows are numbered from 0. Add a "
            "column that identifies a row before you choose rows, and pass index_column=<its name>.",
            lost,
        )
    return None
