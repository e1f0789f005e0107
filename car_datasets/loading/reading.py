"""Read JSON, JSON Lines and CSV files into a Dataset without changing a value.

Does: parse with Python's own parsers; find types that hold every value of all files; write Arrow once per content, into
the cache of `datasets`; report what is broken in one error, with the file's line number.
Does not: find files, download or decompress them.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import functools
import hashlib
import io
import json
import logging
import math
import re
import sys
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from datasets import Dataset, Features, Value

from car_datasets.loading.files import OPENERS, DataFile
from car_datasets.loading.values import Kind, as_written, batch_of, readable, warn_of_halves, warn_of_json
from car_datasets.utils.columns import refuse_wide
from car_datasets.utils.digests import file_digest
from car_datasets.utils.files import cache_folder, write_whole

logger = logging.getLogger(__name__)

READER = 1  # part of the name of the cached file: raise it if equal bytes would give other values or types
BATCH_ROWS, BATCH_CHARACTERS = 1_000, 1 << 26  # of a record batch, whichever comes first
SHOWN = 5  # rows that a warning names
NOTES = b"car_datasets"  # the key of the warnings in the cached file, so that a second reading gives them as well


class Row(NamedTuple):
    """A row as it was parsed.

    Args:
        values (`dict`): its values by column.
        size (`int`): the characters that it was parsed from.
        halved (`bool`): it held half of a surrogate pair, which was replaced.
    """

    values: dict[str, Any]
    size: int
    halved: bool = False


def read_json(files: Sequence[DataFile], cache_dir: str | None = None) -> Dataset:
    """Read JSON files, each a list of objects or one object per line, into one dataset.

    A value that no Arrow type holds exactly is kept as JSON (the feature `Json`), with a warning that says where and
    why. A key that a row lacks is null there. Half of a surrogate pair becomes U+FFFD, with a warning.

    Args:
        files (`Sequence[DataFile]`): the files, whose rows follow each other.
        cache_dir (`str`, *optional*): where `datasets` keeps its Arrow files.

    Returns:
        `Dataset`: the rows, memory-mapped; its fingerprint follows from the content of the files.

    Raises:
        ValueError: a file is not UTF-8, is no list of objects and no JSON Lines, has a broken line or an object with a
            key twice; or there are no rows.
    """

    def rows() -> Iterator[Row]:
        for file in files:
            yield from _json_rows(file)

    def types() -> tuple[Features, dict[str, Any]]:
        kind, halves = Kind(), []
        for number, row in enumerate(rows()):
            kind.see(row.values)
            if row.halved:
                halves.append(number)
        if kind.seen == 0:
            _refuse_no_rows(files)
        refuse_wide(shown, len(kind.fields))
        reasons: dict[str, str] = {}
        return kind.features(reasons), {"json": reasons, "halves": halves[:SHOWN], "halved": len(halves)}

    shown = _named(files)
    dataset, notes = _cached("json", files, cache_dir, types, lambda _: rows())
    warn_of_json(shown, notes["json"])
    warn_of_halves(shown, notes["halves"], notes["halved"])
    return dataset


def read_csv(files: Sequence[DataFile], texts: Collection[str], cache_dir: str | None = None) -> Dataset:
    """Read CSV or TSV files with a header into one dataset.

    A column is a number (int64 or float64) only if every cell of it, read as a number and written again, is the same
    text; an empty cell is then null. All other columns are text, and so are those in `texts`; an empty cell is then an
    empty text, and "NA", "None" and "nan" are what they are.

    Args:
        files (`Sequence[DataFile]`): files of equal columns, whose rows follow each other.
        texts (`Collection[str]`): columns that are text in any case.
        cache_dir (`str`, *optional*): where `datasets` keeps its Arrow files.

    Returns:
        `Dataset`: the rows, memory-mapped; its fingerprint follows from the content of the files.

    Raises:
        ValueError: a file is not UTF-8, a line has more or fewer fields than the header, a quote is not closed, the
            header has a name twice or an empty one, or files have different columns.
    """
    tables = [_Table(file, *_header(file)) for file in files]
    names = tables[0].names
    for table in tables[1:]:
        if sorted(table.names) != sorted(names):
            raise ValueError(
                f"source={table.file.shown!r} has the columns {table.names}, and {tables[0].file.shown!r} has {names}: "
                "name files of equal columns, or read them one by one."
            )

    def types() -> tuple[Features, dict[str, Any]]:
        columns = {name: _Column(name in texts) for name in names}
        for table in tables:
            for row in _csv_rows(table):
                for name, cell in row.values.items():
                    columns[name].see(cell)
        return Features({name: column.feature() for name, column in columns.items()}), {}

    def rows(features: Features) -> Iterator[Row]:
        parse = {name: _PARSERS[feature.dtype] for name, feature in features.items()}
        for table in tables:
            for row in _csv_rows(table):
                yield row._replace(values={name: parse[name](cell) for name, cell in row.values.items()})

    salt = json.dumps(["csv", sorted(texts), [table.separator for table in tables]])
    return _cached(salt, files, cache_dir, types, rows)[0]


def _cached(
    salt: str,
    files: Sequence[DataFile],
    cache_dir: str | None,
    types: Callable[[], tuple[Features, dict[str, Any]]],
    rows: Callable[[Features], Iterable[Row]],
) -> tuple[Dataset, dict[str, Any]]:
    """Return the rows as a dataset, written by the first call for these bytes, and the notes to warn of."""
    key = _content_key(salt, files)
    path = cache_folder(cache_dir) / "read" / key / "rows.arrow"  # `.map` writes its results into this folder
    if not path.is_file():
        features, notes = types()
        path.parent.mkdir(parents=True, exist_ok=True)

        def write(temporary: str) -> None:
            _write(temporary, features, rows(features), {"fingerprint": key[:32]}, notes)
            if _content_key(salt, files) != key:
                raise ValueError(f"{_named(files)} was changed while it was read. Run the same again.")

        write_whole(path, write)
    dataset = as_written(Dataset.from_file(str(path)))
    with pa.memory_map(str(path)) as stored:
        metadata = pa.ipc.open_stream(stored).schema.metadata
    return dataset, json.loads(metadata[NOTES])


def _write(path: str, features: Features, rows: Iterable[Row], more: dict[str, str], notes: dict[str, Any]) -> None:
    """Write rows as an Arrow file that `Dataset.from_file` reads, some of them in memory at a time."""
    schema = features.arrow_schema
    own = json.dumps(json.loads(schema.metadata[b"huggingface"]) | more)
    schema = schema.with_metadata({b"huggingface": own.encode(), NOTES: json.dumps(notes).encode()})
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        waiting: list[dict[str, Any]] = []
        size = 0
        for row in rows:
            waiting.append(row.values)
            size += row.size
            if len(waiting) == BATCH_ROWS or size > BATCH_CHARACTERS:
                writer.write_batch(batch_of(waiting, features))
                waiting, size = [], 0
        if waiting:
            writer.write_batch(batch_of(waiting, features))


def _content_key(salt: str, files: Sequence[DataFile]) -> str:
    """Return the sha256 over the bytes of all files, whatever their names, and what decides how they are read."""
    key = hashlib.sha256(f"{READER} {salt}".encode())
    for file in files:
        # Of the file as it lies there: the receipt names the same digest, so each file is hashed once.
        opened_by = Path(file.path).suffix.lower()
        key.update(f" {file_digest(Path(file.path))} {opened_by if opened_by in OPENERS else ''}".encode())
    return key.hexdigest()


def _named(files: Sequence[DataFile]) -> str:
    """Return how warnings name the files."""
    return f"source={files[0].shown!r}" + (f" and {len(files) - 1} more files" if len(files) > 1 else "")


def _refuse_no_rows(files: Sequence[DataFile]) -> None:
    with files[0].open() as stream:
        what = "file" if not stream.read(1) else "list"
    raise ValueError(f"{_named(files)} is an empty {what}; pass a file that contains rows.")


def _broken(file: DataFile, what: str, line: int | None = None) -> ValueError:
    where = "" if line is None else f"line {line}: "
    what = what if len(what) <= 1_000 else f"{what[:1_000]} ..."  # names and values may be of any length
    return ValueError(f"source={file.shown!r} cannot be read as {file.kind}: {where}{what}.")


def _decoded(file: DataFile, raw: bytes, line: int) -> str:
    """Return bytes that begin at a line as text, without a byte order mark at the start of the file.

    Raises:
        ValueError: they are not UTF-8; the message names the line.
    """
    try:
        return raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        kind = "UTF-16" if line == 1 and raw[:2] in _UTF_16 else "not UTF-8"
        line += raw.count(b"\n", 0, error.start)
        raise _broken(file, f"it is {kind} (byte 0x{raw[error.start]:02X}); save it as UTF-8", line) from error


_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


# --- JSON


def _json_rows(file: DataFile) -> Iterator[Row]:
    """Yield the rows of a JSON list or of JSON Lines, parsed one at a time."""
    start = opening = b""
    with file.open() as stream:
        while len(opening) < 2 and (block := stream.read(4096)):
            start += block
            opening = b"".join(start.removeprefix(codecs.BOM_UTF8).split(maxsplit=2))[:2]
    if not start or opening == b"[]":
        return
    if start[:2] in _UTF_16:
        _decoded(file, start, 1)
    if opening == b"[{":
        yield from _list_rows(file)
    elif opening[:1] == b"{":
        yield from _line_rows(file)
    else:
        shown = opening.decode("utf-8", "replace")
        raise ValueError(
            f"source={file.shown!r} is neither a list of objects nor JSON Lines: it starts with {shown!r}. Expected "
            '[{"instruction": ..., "output": ...}, ...] or one object per line.'
        )


_SPACE = re.compile(r"[ \t\r\n]*")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dict; raise ValueError for a repeated key, of which Python would keep only the last."""
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError(f"an object has a key twice: {[key for key, _ in pairs][:20]}")
    return value


def _finite(text: str) -> float:
    """Return a number of JSON; raise ValueError for one beyond float64, which Python would read as infinite."""
    if math.isinf(value := float(text)):
        raise ValueError(f"the number {text} is beyond the largest float")
    return value


# Not strict: a tab or another control character within a text is no valid JSON, but what it means is clear.
_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_float=_finite, strict=False)


def _parse(file: DataFile, text: str, start: int, line: Callable[[int], int]) -> tuple[Any, int]:
    """Parse the value at a position; return it, and where it ends.

    Args:
        file (`DataFile`): for messages.
        text (`str`): JSON.
        start (`int`): the position.
        line (`Callable`): gives the line in the file of a position in the text.

    Raises:
        ValueError: the value is broken; the message has the line.
    """
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise _broken(file, f"{error.msg} (column {error.colno})", line(error.pos)) from error
    except ValueError as error:
        raise _broken(file, str(error), line(start)) from error
    except RecursionError as error:
        raise _broken(file, "it is nested too deeply", line(start)) from error


def _row(file: DataFile, text: str, span: tuple[int, int], value: Any, line: Callable[[int], int]) -> Row:
    """Return a parsed value as a row; raise ValueError if it is no object."""
    start, end = span
    if not isinstance(value, dict):
        raise _broken(file, f"this row is not an object but {text[start:end][:40]!r}; correct or drop it", line(start))
    try:
        whole = readable(value, text[start:end])
    except ValueError as error:
        raise _broken(file, str(error), line(start)) from error
    return Row(whole, end - start, halved=whole is not value and whole != value)


def _list_rows(file: DataFile) -> Iterator[Row]:
    """Yield the elements of a JSON list, of which one at a time is held as Python objects."""
    with file.open() as stream:
        text = _decoded(file, stream.read(), 1)

    def line(position: int) -> int:
        return text.count("\n", 0, position) + 1

    def skip(position: int) -> int:
        return _SPACE.match(text, position).end()  # type: ignore[union-attr]

    position = skip(text.index("[") + 1)
    while True:
        value, end = _parse(file, text, position, line)
        yield _row(file, text, (position, end), value, line)
        position = skip(end)
        sign = text[position : position + 1]
        if sign == "]":
            break
        if sign != ",":
            raise _broken(file, "a comma or the end of the list is missing", line(position))
        position = skip(position + 1)
    if (rest := skip(position + 1)) < len(text):
        raise _broken(file, "there is more after the end of the list", line(rest))


def _line_rows(file: DataFile) -> Iterator[Row]:
    """Yield the rows of JSON Lines; a file that is one object over several lines is one row."""
    first = True
    with file.open() as stream:
        # Lines end at a newline alone: JSON allows U+2028 and its like inside of text.
        for number, raw in enumerate(stream, 1):
            text = _decoded(file, raw, number)
            start = _SPACE.match(text).end()  # type: ignore[union-attr]
            if start == len(text):
                continue
            line = functools.partial(_same_line, number)
            try:
                value, end = _parse(file, text, start, line)
            except ValueError:
                if first and (row := _only_object(file)) is not None:
                    yield row
                    return
                raise
            if _SPACE.match(text, end).end() < len(text):  # type: ignore[union-attr]
                raise _broken(file, f"there is more after the object (column {end + 1})", number)
            yield _row(file, text, (start, end), value, line)
            first = False


def _same_line(number: int, position: int) -> int:
    return number


def _only_object(file: DataFile) -> Row | None:
    """Return the object that a file consists of, or `None` if it is anything else."""
    with file.open() as stream:
        text = stream.read().decode("utf-8-sig", "replace")
    with contextlib.suppress(ValueError):
        start = _SPACE.match(text).end()  # type: ignore[union-attr]
        value, end = _parse(file, text, start, lambda _: 1)
        if not text[end:].strip():
            return _row(file, text, (start, end), value, lambda _: 1)
    return None


# --- CSV


class _Table(NamedTuple):
    """A CSV file, the sign between its fields, and the names in its header."""

    file: DataFile
    separator: str
    names: list[str]


@contextlib.contextmanager
def _long_fields() -> Iterator[None]:
    """Let `csv` read fields of any length while the block runs; its limit of 131,072 characters is process-wide."""
    limit = csv.field_size_limit()
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a C long, of 32 bits on Windows
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _csv_lines(file: DataFile, separator: str) -> Generator[tuple[int, list[str]], None, None]:
    """Yield the records of a CSV file, the header first, each with the number of its first line."""
    with _long_fields(), file.open() as stream, io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as lines:
        # Strict, as `csv` would otherwise take a quote that is never closed for a field that ends with the file.
        reader = csv.reader(lines, delimiter=separator, strict=True)
        while True:
            start = reader.line_num + 1
            try:
                record = next(reader)
            except StopIteration:
                return
            except UnicodeDecodeError:
                break
            except csv.Error as error:
                raise _broken(file, str(error), start) from error
            if start == 1 and re.fullmatch("sep=.", separator.join(record)):
                continue  # how a file tells Excel its separator
            if record:  # an empty line is an empty record
                yield start, record
    with file.open() as stream:
        for number, raw in enumerate(stream, 1):
            _decoded(file, raw, number)
    raise _broken(file, "it is not UTF-8")


def _header(file: DataFile) -> tuple[str, list[str]]:
    """Return the separator and the names of the columns."""
    usual = "\t" if ".tsv" in Path(file.shown).name.lower() else ","
    counts = {usual: _count_names(file, usual)}
    if counts[usual] < 2:
        counts |= {sign: _count_names(file, sign) for sign in ";|\t,"}
    separator = max(counts, key=lambda sign: counts[sign])
    if separator != usual:
        logger.warning("source=%r: its fields are separated by %r, not by %r.", file.shown, separator, usual)
    with contextlib.closing(_csv_lines(file, separator)) as lines:
        names = next((record for _, record in lines), [])
    if not names:
        _refuse_no_rows([file])
    refuse_wide(f"source={file.shown!r}", len(names))
    unnamed = [i for i, name in enumerate(names, 1) if not name.strip()][:20]
    if unnamed:
        why = "pandas writes its index so, unless to_csv(index=False)"
        raise _broken(file, f"columns {unnamed} of the header have no name ({why}); name or drop them", 1)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise _broken(file, f"the header has {twice} more than once; rename them", 1)
    return separator, names


def _count_names(file: DataFile, separator: str) -> int:
    # Names in quotes cannot be read by another separator than theirs.
    with contextlib.suppress(ValueError), contextlib.closing(_csv_lines(file, separator)) as lines:
        return len(next((record for _, record in lines), []))
    return 0


def _csv_rows(table: _Table) -> Iterator[Row]:
    """Yield the rows of a CSV file, all values as text."""
    lines = _csv_lines(table.file, table.separator)
    next(lines)
    for number, record in lines:
        if len(record) != len(table.names):
            counts = f"line {number} has {len(record)} fields, the header has {len(table.names)}"
            raise _broken(table.file, counts)
        yield Row(dict(zip(table.names, record, strict=True)), sum(map(len, record)))


class _Column:
    """Which types hold all cells of a CSV column that were seen, without a change."""

    def __init__(self, is_text: bool) -> None:
        self.kinds = [] if is_text else ["int64", "float64"]
        self.filled = False

    def see(self, cell: str) -> None:
        if cell and self.kinds:
            self.filled = True
            self.kinds = [kind for kind in self.kinds if _SAME[kind](cell)]

    def feature(self) -> Value:
        return Value(self.kinds[0] if self.kinds and self.filled else "string")


def _is_same_int(cell: str) -> bool:
    with contextlib.suppress(ValueError):  # not a number
        return len(cell) <= 20 and str(int(cell)) == cell and -(2**63) <= int(cell) < 2**63
    return False


def _is_same_float(cell: str) -> bool:
    with contextlib.suppress(ValueError):
        return len(cell) < 32 and math.isfinite(float(cell)) and repr(float(cell)) == cell
    return False


_SAME: dict[str, Callable[[str], bool]] = {"int64": _is_same_int, "float64": _is_same_float}
_PARSERS: dict[str, Callable[[str], Any]] = {
    "string": str,
    "int64": lambda cell: int(cell) if cell else None,
    "float64": lambda cell: float(cell) if cell else None,
}
