"""Find the data files that a path, a pattern, a folder, an address or standard input means, and open them.

Does: take a path for that path and nothing else; sort the files of a folder into splits, as `datasets` does; fetch what
is not on this machine; decompress; read Parquet.
Does not: parse JSON or CSV, or know the Hub's commits.
"""

from __future__ import annotations

import bz2
import contextlib
import glob
import gzip
import http.client
import io
import logging
import lzma
import os
import re
import shutil
import sys
import tempfile
import urllib.error
import urllib.request
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, cast
from urllib.parse import unquote, urlsplit

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from datasets import Dataset, config
from datasets.data_files import FILES_TO_IGNORE, _get_data_files_patterns, sanitize_patterns
from datasets.exceptions import DatasetsError
from datasets.packaged_modules.parquet.parquet import Parquet
from datasets.utils.metadata import MetadataConfigs
from fsspec.utils import glob_translate
from huggingface_hub import DatasetCard

from car_datasets.utils.columns import refuse_casts, refuse_wide
from car_datasets.utils.digests import contents_digest, file_digest
from car_datasets.utils.files import cache_folder, printable, user_path
from car_datasets.utils.hub import asking, clean_token, reason
from car_datasets.utils.revisions import hub_address
from car_datasets.utils.settings import refuse_huge_header

logger = logging.getLogger(__name__)

FORMATS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
STANDARD_INPUT = "-"
SPLIT = "train"  # the split of rows that belong to no other one, as in `datasets`
# Parameters of a configuration in a README.md that do not change how its files are read.
HARMLESS = {"data_files", "data_dir", "default", "description", "version", "drop_labels"}


def _open_zst(path: str) -> BinaryIO:
    # pyarrow brings the codec, and unlike some modules for it reports a stream that ends too early.
    return cast(BinaryIO, io.BufferedReader(pa.CompressedInputStream(pa.OSFile(path), "zstd")))


class _Bounded(io.RawIOBase):
    """The decompressed bytes of a file, up to a limit that follows from its size."""

    def __init__(self, stream: Any, path: str, shown: str) -> None:
        self.stream, self.shown = stream, shown
        self.left = max(FREE, MOST_EXPANDED * Path(path).stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        read = self.stream.read(len(buffer))
        buffer[: len(read)] = read
        self.left -= len(read)
        if self.left < 0:
            raise ValueError(
                f"source={self.shown!r} decompresses to more than {MOST_EXPANDED} times its size, as files do that are "
                "made to fill memory and disk. If you trust it, decompress it yourself and pass the result."
            )
        return len(read)

    def close(self) -> None:
        self.stream.close()
        super().close()


FREE, MOST_EXPANDED = 1 << 26, 200  # bytes that any compressed file may have, and how many times its size otherwise
OPENERS: dict[str, Callable[[str], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zst}


class DataFile(NamedTuple):
    """A file of rows.

    Args:
        path (`str`): where it is on this machine.
        shown (`str`): its name in messages and receipts: as the user named it, or its path in a folder or repository.
        kind (`str`): `"json"` (a list of objects, or one object per line), `"csv"` (also with tabs) or `"parquet"`.
    """

    path: str
    shown: str
    kind: str

    def open(self) -> BinaryIO:
        """Open the file for reading its bytes, decompressed if its name says that it is compressed."""
        opener = OPENERS.get(Path(self.path).suffix.lower())
        if opener is None:
            return Path(self.path).open("rb")
        return io.BufferedReader(_Bounded(opener(self.path), self.path, self.shown), 1 << 20)


def kind_of(name: str) -> str | None:
    """Return the kind of a file by its name, such as `"json"` for `rows.jsonl.gz`, or `None` if it is not known."""
    path = PurePosixPath(name.lower())
    if path.suffix in OPENERS:
        kind = FORMATS.get(PurePosixPath(path.stem).suffix)
        return None if kind == "parquet" else kind  # Parquet is compressed inside
    return FORMATS.get(path.suffix)


def data_file(path: str | Path, shown: str) -> DataFile:
    """Return a file of rows.

    Raises:
        ValueError: its name does not tell what it holds, or it is empty.
    """
    kind = kind_of(Path(path).name)
    if kind is None:
        raise ValueError(
            f"source={shown!r}: the file extension {PurePosixPath(shown).suffix!r} is not known; use one of "
            f"{sorted(FORMATS)}, where text may be compressed ({', '.join(OPENERS)})."
        )
    if Path(path).stat().st_size == 0:
        raise ValueError(f"source={shown!r} is an empty file; pass one that contains rows.")
    return DataFile(str(path), shown, kind)


# --- places


def find_files(source: str, pattern: bool, token: str | None, cache_dir: str | None) -> list[DataFile]:
    """Return the files that one source means, in the order in which their rows are read, or none for a Hub id.

    A path that exists means that file, whatever characters it contains.

    Args:
        source (`str`): a path, an address with a scheme such as `https://`, or `-` for standard input.
        pattern (`bool`): if there is no such path, `source` is a pattern with `*`, `?` or `[...]`.
        token (`str`, *optional*): for `hf://` addresses.
        cache_dir (`str`, *optional*): where copies of files from other machines are kept.

    Raises:
        ValueError: what was found is not a file of rows.
        FileNotFoundError: there is no such file, or none that fits the pattern.
        ConnectionError: another machine does not answer.
    """
    if source == STANDARD_INPUT:
        return [_read_stream(_standard_input(), source, cache_dir)]
    if is_address(source):
        return [_download(each, token, cache_dir) for each in _addresses(source, pattern, token)]
    path = user_path(source)
    if path.is_file():
        return [data_file(path, str(path))]
    if path.is_fifo():  # such as the shell's <(zcat rows.jsonl.gz)
        with path.open("rb") as stream:
            return [_read_stream(stream, source, cache_dir)]
    if glob.has_magic(source) and pattern:
        found = sorted(p for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        if not found:
            raise FileNotFoundError(f"source={source!r}: no file fits this pattern.")
        return [data_file(each, each) for each in found]
    if glob.has_magic(source):
        raise FileNotFoundError(
            f"source={source!r}: no such file or folder. To read all files that fit it as a pattern, pass glob=True "
            "(--glob)."
        )
    # These can only mean a path; asking the Hub would hide a misspelt file name behind an error about repositories.
    if kind_of(path.name) or path.suffix.lower() in OPENERS or path.is_absolute() or source.startswith((".", "~")):
        raise FileNotFoundError(f"source={source!r}: no such file or folder. Check the path.")
    return []


def is_address(source: str) -> bool:
    """Return True for an address with a scheme, such as `https://...`."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", source) is not None


def _addresses(source: str, pattern: bool, token: str | None) -> list[str]:
    """Return the addresses of the files that an address means."""
    at = hub_address(source)
    if at is not None and at.path:
        # fsspec writes a revision that contains a slash with %2F.
        revision = "" if at.revision is None else "@" + at.revision.replace("/", "%2F")
        source = f"hf://datasets/{at.repo_id}{revision}/{at.path}"
    scheme = urlsplit(source).scheme
    if not (pattern and glob.has_magic(source)) or scheme in ("http", "https"):
        return [source]
    system, path = _file_system(source, token)
    with _fetching(shown_address(source)):
        found = sorted(system.unstrip_protocol(each) for each in system.glob(path))
    if not found:
        raise FileNotFoundError(f"source={shown_address(source)!r}: no file fits this pattern.")
    return found


def shown_address(address: str) -> str:
    """Return an address without user, password and query, any of which may be a secret."""
    parts = urlsplit(address)
    if parts.scheme == "hf":
        return address
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"


def _download(address: str, token: str | None, cache_dir: str | None) -> DataFile:
    shown = shown_address(address)
    name = PurePosixPath(shown if shown == address else unquote(urlsplit(address).path)).name
    if kind_of(name) is None:
        raise ValueError(
            f"source={shown!r}: the name at the end of the address does not tell the format; it must end in one of "
            f"{sorted(FORMATS)}. Download the file, or pass its own address."
        )
    if urlsplit(address).scheme in ("http", "https"):
        with _fetching(shown), urllib.request.urlopen(address) as stream:
            kept = _keep(stream, name, cache_dir)
            length = stream.headers.get("Content-Length")
        # The standard library does not report an answer that breaks off.
        if length is not None and not stream.headers.get("Content-Encoding") and kept.stat().st_size != int(length):
            raise ConnectionError(f"source={shown!r}: the server broke off. Run the same again later.")
    else:
        system, path = _file_system(address, token)
        hub = asking(f"source={shown!r}", "dataset", None, FileNotFoundError)
        with _fetching(shown), hub, system.open(path, "rb") as stream:
            kept = _keep(stream, name, cache_dir)
    return data_file(kept, shown)


def _file_system(address: str, token: str | None) -> tuple[Any, str]:
    """Return the file system of an address, and the path in it."""
    shown, scheme = shown_address(address), urlsplit(address).scheme
    try:
        system, path = fsspec.core.url_to_fs(address, **({"token": clean_token(token)} if scheme == "hf" else {}))
    except ImportError as error:  # its text says which package to install
        raise ValueError(f"source={shown!r}: {scheme}:// addresses need another package: {reason(error)}.") from error
    except ValueError as error:
        raise ValueError(f"source={shown!r}: {scheme}:// is not known ({reason(error)}). Pass a path.") from error
    return system, path


@contextlib.contextmanager
def _fetching(shown: str) -> Iterator[None]:
    """Turn an error of another machine into one line without the secrets that an address may contain."""
    missing = f"source={shown!r}: there is no such file. Check the address."
    try:
        yield
    except urllib.error.HTTPError as error:
        if error.code in (404, 410):
            raise FileNotFoundError(missing) from None
        kind = ValueError if error.code < 500 else ConnectionError
        raise kind(f"source={shown!r}: the server refuses ({error.code} {error.reason}).") from None
    except FileNotFoundError as error:
        raise FileNotFoundError(str(error) if "source=" in str(error) else missing) from error
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError) as error:
        cause = getattr(error, "reason", type(error).__name__)
        raise ConnectionError(f"source={shown!r} cannot be reached ({cause}). Run the same again later.") from None
    except (ValueError, OSError):
        raise
    except Exception as error:  # the errors of cloud clients have no common base class
        raise ConnectionError(f"source={shown!r} cannot be read ({type(error).__name__}).") from error


def _standard_input() -> BinaryIO:
    if sys.stdin is None or sys.stdin.isatty():
        raise ValueError("source='-' is standard input, which is a terminal: pipe rows into it, or pass a file.")
    return cast(BinaryIO, sys.stdin.buffer)


def _read_stream(stream: BinaryIO, shown: str, cache_dir: str | None) -> DataFile:
    """Keep the bytes of a stream in a file whose name tells what they are."""
    start = stream.read(1 << 16)
    opening = start.removeprefix(b"\xef\xbb\xbf").lstrip()[:4]
    if not opening:
        raise ValueError(f"source={shown!r} is empty; write rows into it.")
    ending = ".parquet" if opening == b"PAR1" else ".gz" if opening[:2] == b"\x1f\x8b" else ".csv"
    if ending == ".gz":
        raise ValueError(f"source={shown!r} is compressed; decompress it on the way, as in `zcat FILE | ...`.")
    name = "stdin.json" if opening[:1] in b"[{" else f"stdin{ending}"
    kept = _keep(cast(BinaryIO, _Joined(start, stream)), name, cache_dir)
    return data_file(kept, shown)


class _Joined(NamedTuple):
    """A stream of which the start was read already."""

    start: bytes
    rest: BinaryIO


def _keep(stream: BinaryIO | _Joined, name: str, cache_dir: str | None) -> Path:
    """Write a stream to a file of the cache in a folder named after its sha256, so that equal bytes are kept once."""
    folder = cache_folder(cache_dir)
    folder.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            if isinstance(stream, _Joined):
                file.write(stream.start)
            shutil.copyfileobj(stream.rest if isinstance(stream, _Joined) else stream, file, 1 << 20)
        kept = folder / file_digest(Path(temporary)) / name
        kept.parent.mkdir(exist_ok=True)
        if not kept.exists():  # a later time stamp would make `datasets` read the same bytes again
            Path(temporary).replace(kept)
        return kept
    finally:
        Path(temporary).unlink(missing_ok=True)


# --- folders


def folder_files(folder: Path, name: str | None = None) -> dict[str, list[DataFile]]:
    """Sort the data files of a folder into splits: by the `configs` of its README.md, or by their names.

    Args:
        folder (`Path`): a folder of data files.
        name (`str`, *optional*): a configuration of its README.md.

    Raises:
        ValueError: there are no data files, or as many of one format as of another, or no such configuration.
    """
    every = sorted(path for path in folder.rglob("*") if path.is_file() and path.name.lower() not in _ASIDE)
    names = [path.relative_to(folder).as_posix() for path in every]
    names = [each for each in names if kind_of(each) and not _HIDDEN.search(each)]
    if not names:
        raise ValueError(
            f"source={str(folder)!r} is a folder without data. Pass one that save_to_disk wrote, or one with files that "
            f"end in {sorted(FORMATS)}."
        )
    patterns, inner = _configured(folder, name)
    names = [each for each in names if each.startswith(inner)]
    if patterns is None:
        usual = _most_frequent(names, folder)
        patterns = {str(k): v for k, v in _get_data_files_patterns(lambda p: _fitting(usual, p, inner)).items()}
        # Sorted by name: the patterns of a split are spellings, whose order says nothing about the rows.
        splits = {k: sorted({n for p in v for n in _fitting(usual, p, inner)}) for k, v in patterns.items()}
        _say_what_is_left_out(folder, names, splits)
    else:
        splits = {k: list(dict.fromkeys(n for p in v for n in _fitting(names, p, inner))) for k, v in patterns.items()}
        if empty := [split for split, found in splits.items() if not found]:
            raise ValueError(f"source={str(folder)!r}: no file fits what its README.md says of the split(s) {empty}.")
    return {split: [data_file(folder / each, str(folder / each)) for each in found] for split, found in splits.items()}


_ASIDE = {*FILES_TO_IGNORE, "readme.md", "metadata.json"}
_HIDDEN = re.compile(r"(?:^|/)(?:\.|__)")


def _fitting(names: Sequence[str], pattern: str, inner: str = "") -> list[str]:
    """Return the names that fit a pattern as `datasets` reads it, or the one that is equal to it."""
    wanted = inner + pattern.removeprefix("./")
    if wanted in names:
        return [wanted]
    fits = re.compile(glob_translate(wanted)).match
    return [name for name in names if fits(name)]


def _most_frequent(names: Sequence[str], folder: Path) -> list[str]:
    """Return the files of the format that most files have."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in names:
        kinds[str(kind_of(name))].append(name)
    ranked = sorted(kinds.values(), key=len, reverse=True)
    if len(ranked) > 1 and len(ranked[0]) == len(ranked[1]):
        raise ValueError(
            f"source={str(folder)!r} holds as many files of one format as of another: {listed(ranked[0])} and "
            f"{listed(ranked[1])}. Pass one file, a list of files, or a pattern with glob=True (--glob)."
        )
    return ranked[0]


def _say_what_is_left_out(folder: Path, names: Sequence[str], splits: Mapping[str, Sequence[str]]) -> None:
    read = {name for found in splits.values() for name in found}
    if left := [name for name in names if name not in read]:
        logger.warning("source=%r: %d data files are not read: %s.", str(folder), len(left), listed(left))


def listed(names: Sequence[str]) -> str:
    """Return the first names for a message, and the number of all of them if there are more."""
    return printable(", ".join(names[:5])) + (f", ... ({len(names)} files)" if len(names) > 5 else "")


def _configured(folder: Path, name: str | None) -> tuple[dict[str, list[str]] | None, str]:
    """Return the patterns of each split and the inner folder that the header of a README.md gives, if it does."""
    readme = folder / config.REPOCARD_FILENAME
    shown, configs = f"source={str(folder)!r}", MetadataConfigs()
    if readme.is_file():
        text = readme.read_text(encoding="utf-8-sig", errors="replace")
        refuse_huge_header(text, shown)
        try:
            configs = MetadataConfigs.from_dataset_card_data(DatasetCard(text).data)
        except (ValueError, RecursionError, yaml.YAMLError) as error:
            raise ValueError(f"{shown}: the header of its README.md cannot be read ({reason(error)}).") from error
    if not configs and name is None:
        return None, ""
    chosen = name or configs.get_default_config_name() or (next(iter(configs)) if len(configs) == 1 else None)
    if chosen not in configs:
        raise ValueError(
            f"{shown}: name={name!r} is not a configuration; it has {sorted(configs)}. "
            + ("Say which: name=... (--name)." if configs else "Leave name out.")
        )
    settings = configs[chosen]
    if others := sorted(set(settings) - HARMLESS):
        raise ValueError(
            f"{shown}: the configuration {chosen!r} of its README.md has {others}, which are for `datasets` itself. "
            "Open it with datasets.load_dataset, and pass the Dataset."
        )
    inner = str(settings.get("data_dir") or "").strip("./")
    patterns = settings.get("data_files")
    return patterns and sanitize_patterns(patterns), f"{inner}/" if inner else ""


# --- bytes


@contextlib.contextmanager
def quiet_readers() -> Iterator[None]:
    """Silence the log of the readers of `datasets`, which tell an error before they raise it: it would be seen twice."""
    log = logging.getLogger("datasets.packaged_modules")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        log.setLevel(level)


@contextlib.contextmanager
def naming_broken(files: Sequence[DataFile]) -> Iterator[None]:
    """Turn a decompressor's error into one ValueError that names the file."""
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        for file in files:
            _decompress(file)
        raise error


def _decompress(file: DataFile) -> None:
    if Path(file.path).suffix.lower() not in OPENERS:
        return
    try:
        with file.open() as stream:
            while stream.read(1 << 20):
                pass
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if getattr(error, "errno", None) is not None:  # from the operating system: the file is not to blame
            raise
        raise ValueError(f"source={file.shown!r} cannot be decompressed: {reason(error)}") from error


def read_parquet(files: Sequence[DataFile], cache_dir: str | None = None) -> Dataset:
    """Read Parquet files into one dataset.

    Raises:
        ValueError: a file is broken, or has other columns than the first one.
    """
    first: list[str] | None = None
    for file in files:
        try:
            columns = sorted(pq.read_schema(file.path).names)
        except (pa.ArrowException, OSError) as error:
            if getattr(error, "errno", None) is not None:  # from the operating system: the file is not to blame
                raise
            raise ValueError(f"source={file.shown!r} cannot be read as parquet: {reason(error)}") from error
        refuse_wide(f"source={file.shown!r}", len(columns))
        if first is not None and columns != first:
            raise ValueError(
                f"source={file.shown!r} has the columns {columns}; {files[0].shown!r} has {first}. One dataset has the "
                "same columns everywhere: pass the files one by one, or write them with equal columns."
            )
        first = columns
    # `datasets` keys its cache by path and time; with the content in the key, a replaced file is always read anew.
    content = contents_digest(here := [Path(file.path).absolute() for file in files])
    paths = [glob.escape(str(path)) for path in here]  # `datasets` takes every path for a pattern
    builder = Parquet(cache_dir=cache_dir, data_files={SPLIT: paths}, hash=content)
    refuse_casts(builder)
    try:
        with quiet_readers():
            builder.download_and_prepare()
        if contents_digest(here) != content:
            shutil.rmtree(builder.cache_dir)  # it may hold the rows of other bytes than its name says
            raise ValueError("it was changed while it was read")
        return builder.as_dataset(SPLIT)
    except (DatasetsError, pa.ArrowException, ValueError) as error:
        cause, names = error.__cause__ or error, listed([file.shown for file in files])
        raise ValueError(f"source={names!r} cannot be read as parquet: {reason(cause)[:300]}") from error
