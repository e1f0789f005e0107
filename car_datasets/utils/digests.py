"""Tell whether two things are the same: sha256 digests of files, models and rows, and class names that do not change.

Does: hash each file once per process and content; find the checkpoint in a folder of the original CaR project; hash
columns independently of how Arrow stores them; find the first difference of two datasets; name a class after the
package, so that a move of its file changes neither pickles nor the fingerprints of `datasets`.
Does not: access the Hub, or export a class; `car_datasets/__init__.pyi` does.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

T = TypeVar("T")

# The files that make up a model. Pickled weights are not among them: they are converted first.
MODEL_PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
SETTLED = 3.0  # seconds; the coarsest clock of a common file system (FAT) has ticks of 2
WINDOW = 8_192  # rows that are digested together; another number would give other digests
BLOCK = 1_000  # the same for single columns, of which images and long chats take gigabytes sooner


def folder_digest(folder: Path) -> str:
    """Return `"sha256:..."` over the names and contents of a model's files; replacing weights in place changes it.

    Raises:
        ValueError: the folder contains neither a `config.json` nor a checkpoint of the original CaR project.
    """
    if (checkpoint := find_checkpoint(folder)) is not None:
        # The original has this file next to the checkpoint or one folder above, and the model depends on it.
        settings = [f / "hparams.yaml" for f in (checkpoint.parent, checkpoint.parent.parent)]
        return files_digest(checkpoint.parent.parent, [checkpoint, *(f for f in settings if f.is_file())])
    if not (folder / "config.json").is_file():
        names = sorted(p.name for p in folder.iterdir())[:8]
        raise ValueError(
            f"{folder} is not a model folder: it has no config.json (it contains {names}). Pass a folder that "
            "`save_pretrained` wrote."
        )
    # Sorted, because file systems list a folder in different orders.
    files = sorted({p for pattern in MODEL_PATTERNS for p in folder.rglob(pattern) if p.is_file()})
    return files_digest(folder, files)


def weights_digest(folder: Path) -> str:
    """Return `"sha256:..."` over the weights of a model folder alone, whatever its path and its other files."""
    checkpoint = find_checkpoint(folder)
    files = sorted(folder.rglob("*.safetensors")) if checkpoint is None else [checkpoint]
    return files_digest(folder if checkpoint is None else checkpoint.parent, files)


def find_checkpoint(path: Path) -> Path | None:
    """Return the `.ckpt` file in a folder of the original CaR project's layout, or `None` if it has another layout.

    The path may be the file itself, a folder with `checkpoints/` and `hparams.yaml`, or a folder of such folders, as on
    the Hub. There `instruction_score` (IQS) takes precedence; pass `.../instruction_comet` for the ranking variant.

    Raises:
        ValueError: a folder contains more than one checkpoint.
    """
    if path.is_file():
        return path if path.suffix == ".ckpt" else None
    if (path / "config.json").is_file():  # a model in the layout of transformers
        return None
    for folder in (path, path / "instruction_score", path / "instruction_comet"):
        checkpoints = sorted([*folder.glob("*.ckpt"), *folder.glob("checkpoints/*.ckpt")])
        if len(checkpoints) > 1:
            raise ValueError(
                f"{folder} contains {len(checkpoints)} checkpoints: {[p.name for p in checkpoints]}. "
                "Pass the path of one."
            )
        if checkpoints:
            return checkpoints[0]
    return None


def files_digest(folder: Path, files: Iterable[Path]) -> str:
    """Return `"sha256:..."` over the contents of files and their names relative to `folder`, in the order given."""
    lines = [f"{path.relative_to(folder).as_posix()} {file_digest(path)}\n" for path in files]
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal digits, from memory if this process has hashed the same content.

    Remembering is safe because the size and both time stamps are part of the key. A write changes the modification
    time; a tool that restores it (`cp -p`, `rsync -t`) still changes the status time, which no tool can set. Only a
    write in the same tick of the file system's clock as the hashing could go unnoticed, so a file that was changed
    just now, in either way, is hashed without being remembered. Windows has no status time: nothing is remembered there.
    """
    stat = path.stat()
    if os.name == "nt" or time.time() - max(stat.st_mtime, stat.st_ctime) < SETTLED:
        return _sha256(path)
    return _remembered_sha256(path.absolute(), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def contents_digest(paths: Iterable[Path]) -> str:
    """Return the sha256 over the contents of files, in the order given, whatever their names."""
    return hashlib.sha256("".join(map(file_digest, paths)).encode()).hexdigest()


def bound(dataset: Dataset) -> Dataset:
    """Bind a dataset that was opened from Arrow files to their content, by its fingerprint; return it.

    `datasets` takes the fingerprint from the file's metadata, or from its path and time. `.map` finds its cached results
    by it, and would find those of other rows if the file has been replaced.
    """
    content = contents_digest(Path(file["filename"]) for file in dataset.cache_files)
    dataset._fingerprint = hashlib.sha256(f"{dataset._fingerprint} {content}".encode()).hexdigest()[:32]
    return dataset


@functools.lru_cache(maxsize=4096)
def _remembered_sha256(path: Path, size: int, modified: int, changed: int) -> str:
    return _sha256(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):  # 4 MiB: weights may be larger than memory
            digest.update(block)
    return digest.hexdigest()


def content_digest(dataset: Dataset, columns: Sequence[str]) -> str:
    """Return the sha256 of the values of some columns, in row order: equal for equal values, however they are stored.

    Chunks, offsets, memory mapping, `string` or `large_string`, or an index over shuffled rows make no difference.
    """
    import pyarrow as pa  # here, because the command line reads this module for its help

    content = hashlib.sha256()
    for batch in dataset.select_columns(list(columns)).with_format("arrow").iter(batch_size=WINDOW):
        for name in columns:
            # Name and length first, so that values cannot move from one column to the next without a change.
            content.update(f"{name} {len(batch)} ".encode())
            _feed(content, pa.concat_arrays(batch.column(name).chunks))
    return "sha256:" + content.hexdigest()


def column_digests(batches: Iterable[pa.RecordBatch | pa.Table]) -> dict[str, str]:
    """Return the sha256 of the values of each column of a table in row order, by the column's name.

    Equal values have equal digests, however they are stored: in batches of any size, in Arrow or Parquet, as `string` or
    `large_string`, in numbers of 32 or 64 bits. NaN and null differ.

    Args:
        batches (`Iterable`): the rows, in order, such as `dataset.with_format("arrow").iter(1000)` yields them.
    """
    import pyarrow as pa

    columns: dict[str, Any] = {}
    for table in _blocks(batches):
        for name in table.column_names:
            content = columns.setdefault(name, hashlib.sha256())
            content.update(f"{len(table)} ".encode())
            _feed(content, pa.concat_arrays(table.column(name).chunks), _feed_buffers)
    return {name: content.hexdigest() for name, content in columns.items()}


def _blocks(batches: Iterable[pa.RecordBatch | pa.Table]) -> Iterator[pa.Table]:
    """Yield the rows as tables of `BLOCK` rows, the last one shorter."""
    import pyarrow as pa

    waiting: list[pa.Table] = []
    for batch in batches:
        waiting.append(pa.Table.from_batches([batch]) if isinstance(batch, pa.RecordBatch) else batch)
        if sum(map(len, waiting)) < BLOCK:
            continue
        table = pa.concat_tables(waiting)
        whole = len(table) - len(table) % BLOCK
        yield from (table.slice(start, BLOCK) for start in range(0, whole, BLOCK))
        waiting = [table.slice(whole)]
    if sum(map(len, waiting)):
        yield pa.concat_tables(waiting)


def _feed(content: Any, array: pa.Array, feed_buffers: Callable[[Any, pa.Array], bool] | None = None) -> None:
    """Update `content` with the nulls and values of an array, as bytes that differ for arrays that differ.

    Args:
        content: a hash.
        array (`pa.Array`): the values.
        feed_buffers (`Callable`, *optional*): does the same for numbers and bytes without nulls, and returns False for
            what is neither. Without it they are written as Python does, which is slow for embeddings and images, but
            manifests of shards hold digests that were made so.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(array, pa.ExtensionArray):  # types of `datasets`, such as fixed-size arrays and JSON
        array = array.storage
    # Nulls first: what lies in the buffers under a null is undefined, so only the other values are digested.
    content.update(np.packbits(array.is_valid().to_numpy(zero_copy_only=False)))
    array, kind = array.drop_null(), array.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        _feed_bytes(content, array)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        # Lengths as well, or [[1], [2]] would equal [[1, 2]].
        content.update(pc.list_value_length(array).cast(pa.int64()).to_numpy())
        _feed(content, array.flatten(), feed_buffers)
    elif pa.types.is_struct(kind):
        for field, values in zip(kind, array.flatten(), strict=True):
            content.update(f"{field.name} ".encode())
            _feed(content, values, feed_buffers)
    elif feed_buffers is None or not feed_buffers(content, array):
        content.update(repr(array.to_pylist()).encode())


def _feed_bytes(content: Any, array: pa.Array) -> None:
    """Update `content` with the lengths and the bytes of an array of texts or bytes without nulls."""
    import pyarrow as pa
    import pyarrow.compute as pc

    array = array.cast(pa.large_binary())
    content.update(pc.binary_length(array).to_numpy())  # else ["ab", ""] would equal ["a", "b"]
    _, starts, data = array.buffers()
    if len(array) and data is not None:
        ends = np.frombuffer(starts, dtype=np.int64)[array.offset : array.offset + len(array) + 1]
        content.update(memoryview(data)[ends[0] : ends[-1]])


def _feed_buffers(content: Any, array: pa.Array) -> bool:
    """Update `content` with numbers, in one width, or with bytes; return False if the array holds neither."""
    import pyarrow as pa

    if pa.types.is_binary(array.type) or pa.types.is_large_binary(array.type):
        _feed_bytes(content, array)
        return True
    if not pa.types.is_floating(array.type) and not pa.types.is_integer(array.type):
        return len(array) == 0  # a column of nulls has no type of its own
    values = array.to_numpy(zero_copy_only=False)
    wide = values.astype("<f8" if values.dtype.kind == "f" else "<u8" if values.dtype == np.uint64 else "<i8")
    if values.dtype.kind == "f":
        wide[np.isnan(wide)] = np.nan  # one of its many representations
    content.update(wide.dtype.kind.encode() if len(wide) else b"")
    content.update(wide)
    return True


def first_difference(expected: Dataset, seen: Dataset) -> str | None:
    """Return the first difference between two datasets in words, `None` if they are equal; NaN equals NaN."""
    if expected.features != seen.features:
        return f"the columns are {seen.features}, expected {expected.features}"
    if len(expected) != len(seen):
        return f"it has {len(seen)} rows, expected {len(expected)}"
    pair = [each.with_format("arrow").iter(BLOCK) for each in (expected, seen)]
    for number, (one, other) in enumerate(zip(*pair, strict=True)):
        # Arrow compares a block at once; only a block that differs is read row by row.
        if one.equals(other):
            continue
        for row, (wanted, found) in enumerate(zip(one.to_pylist(), other.to_pylist(), strict=True), BLOCK * number):
            for column in wanted:
                # NaN != NaN, but their representations are equal.
                if repr(wanted[column]) != repr(found[column]):
                    return f"row {row}, column {column!r}: {_short(found[column])}, expected {_short(wanted[column])}"
    return None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def rows_digest(dataset: Dataset) -> str:
    """Return the sha256 over the rows as JSON, for rows that no file holds."""
    digest = hashlib.sha256()
    for row in dataset.with_format(None):
        # `default=str` for dates and bytes, which JSON does not have; the order of the columns does not count.
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def indices_digest(indices: list[Any]) -> str:
    """Return the sha256 over the source indices of selected rows, in order, as a JSON list without spaces."""
    return hashlib.sha256(json.dumps(indices, separators=(",", ":")).encode()).hexdigest()


def public(cls: type[T]) -> type[T]:
    """Return the class with `car_datasets` as its module, from which users import it.

    `datasets` puts the module of a callable into the fingerprint that names its cache, and pickles hold it as well.
    Apply this above `@dataclass`, which looks up annotations in the module that the class names.
    """
    # Evaluated now: afterwards `get_type_hints` would look for names such as `Matrix` in `car_datasets`.
    cls.__annotations__ = inspect.get_annotations(cls, eval_str=True)
    cls.__module__ = "car_datasets"
    return cls
