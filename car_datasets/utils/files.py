"""Files and folders, and what strangers wrote in them: written atomically, found in the package, printed safely.

Does: refuse paths that hold results already or cannot be written; claim what a run will write; write a file or folder
under a temporary name and move it into place; keep copies of private rows in a folder that no kill leaves behind for
good; write figures as JSON that every parser reads; find the assets, recipes and card templates of the package; make
text of others safe for a terminal.
Does not: know how a result folder is laid out.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from car_datasets.utils.processes import from_main, has_ended, is_main_process, this_process

if TYPE_CHECKING:
    from rich.text import Text

PACKAGE = Path(__file__).parents[1]
ASSETS = PACKAGE / "assets"
FIGURES_FILE = "figures.json"  # next to a trained scorer
UNFINISHED = ".unfinished"  # a file of this name marks a folder that is being written
TEMPORARY = "temporary"  # the folder in the cache for what is removed at the end of a call
RUNS_FOLDER = "proof"  # the folder in a result for the finished runs of its proof
WRITING = ".writing"  # the file of a claim, in the folder that is claimed, or after the name of a file that is
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of an OSError: the disk, a quota or a limit is used up
# An address, whose second slash is gone once it was a path. The scheme of one letter is a drive of Windows.
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
_LEFTOVER = re.compile(r"(?P<name>[a-z-]+)-(?P<pid>\d{1,10})-(?P<started>\d{1,12})-(?P<host>[0-9a-f]{8})-[0-9a-f]{8}")


# What a terminal obeys (control characters but tab and newline), what shows text in another order than it is in, and
# halves of surrogate pairs, which cannot be written.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Return text of others for a terminal: what a terminal would obey becomes a Python escape, such as `\x1b`."""
    return _OBEYED.sub(lambda found: repr(found[0])[1:-1], text)


def table_text(text: str, style: str = "") -> Text:
    """Return text of others for a `rich` table, which would take `[/name]` for markup in a plain text."""
    from rich.text import Text

    return Text(printable(text), style)


def fresh_folder(folder: Path, names: Sequence[str], argument: str = "output_dir") -> Path:
    """Return the folder if it holds no files of these names.

    Args:
        folder (`Path`): need not exist.
        names (`Sequence[str]`): the files that will be written.
        argument (`str`): the caller's argument in the error message.

    Raises:
        ValueError: the path is a file or lies in one, or holds such files from a run that finished writing them.
    """
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(f"{argument}={str(folder)!r}: {path} is a file; name a folder.")
    # A killed run left some of the files and the mark; the same command may complete them.
    taken = [] if (folder / UNFINISHED).exists() else [name for name in names if (folder / name).exists()]
    if taken:
        raise ValueError(
            f"{argument}={str(folder)!r} already holds a result ({', '.join(taken)}). Name another folder or move it "
            "away."
        )
    return folder


def output_path(path: str | os.PathLike[str], argument: str = "output_dir") -> Path:
    """Return the path that a run will write to, with `~` as the home folder.

    Args:
        path (`str` or `PathLike`): a folder or file, which need not exist.
        argument (`str`): the caller's argument in the error message.

    Raises:
        ValueError: it is empty, or an address, for which a local folder `s3:` would be made.
    """
    text, shown = os.fspath(path), f"{argument}=" if argument else ""
    if not text.strip():
        raise ValueError(f"{shown}{text!r} is empty; name a path, such as {shown}'out'.")
    if address := _ADDRESS.match(text):
        raise ValueError(
            f"{shown}{text!r} is an address of the scheme {address[1]!r}, and results are written to a local path. Name "
            "one, and copy the result from there."
        )
    return user_path(text)


def refuse_in_source(place: Path, source: object, argument: str) -> None:
    """Raise ValueError if what will be written lies in a folder that is read, whose rows it would change.

    Args:
        place (`Path`): the folder or file that will be written.
        source: what is read; only folders, and lists of them, are looked at.
        argument (`str`): the caller's argument in the error message.
    """
    given = source if isinstance(source, (list, tuple)) else [source]
    for folder in (user_path(each) for each in given if isinstance(each, (str, Path))):
        if folder.is_dir() and folder.resolve() in (place.resolve(), *place.resolve().parents):
            raise ValueError(
                f"{argument}={str(place)!r} lies in the source, the folder {str(folder)!r}, and would be read as more rows "
                "of it by the next run. Name a place elsewhere."
            )


def user_path(name: str | os.PathLike[str]) -> Path:
    """Return the path that a user means: as it is written if that exists, otherwise with `~` as the home folder."""
    path = Path(name)
    try:
        return path if path.exists() else path.expanduser()
    except RuntimeError:  # "~x" is the home folder of a user x, and there is none
        return path


def fresh_file(path: Path, source: str = "", overwrite: bool = False) -> Path:
    """Return the path if a command can write its dataset there.

    Args:
        path (`Path`): the file.
        source (`str`): what the command reads, which must be another file.
        overwrite (`bool`): a file there may be replaced.

    Raises:
        ValueError: it exists and may not be replaced, lies in a file or in the source, or is neither Parquet nor JSON.
    """
    refuse_in_source(path, source, "--output")
    if path.suffix not in (".parquet", ".json"):
        raise ValueError(f"--output {path}: name a .parquet file, or a .json file for the original's format.")
    for parent in path.parents:
        if parent.is_file():
            raise ValueError(f"--output {path}: {parent} is a file; name a folder.")
    if path.is_file() and overwrite:
        if user_path(source).resolve() == path.resolve():
            raise ValueError(f"--output {path} is the file that is read; name another file.")
    elif path.exists():
        raise ValueError(f"--output {path} is there already; name another file, move it away, or pass --overwrite.")
    return path


@dataclass(frozen=True)
class Claim:
    """The claim of a run on the folder or file that it will write.

    Args:
        target (`Path`): the folder or file.
        place (`Path`): the file of the claim, which names the process that holds it.
        content (`bytes`): what this run wrote there.
        run (`str`): a digest of what makes this run.
        shown (`str`): the caller's argument and its value, for messages.
        files (`Sequence[Path]`): the files that will be written.
        before (`Sequence`): what these were when the claim was taken.
        made (`Sequence[Path]`): folders that were made for the claim, innermost first.
    """

    target: Path
    place: Path
    content: bytes
    run: str
    shown: str
    files: Sequence[Path]
    before: Sequence[Any]
    made: Sequence[Path]

    def check(self) -> None:
        """Check, just before the result is put in place, that nobody else has written there meanwhile.

        Raises:
            ValueError: another process holds the claim, or a file is new, gone or another.
        """
        held = _read_claim(self.place)
        changed = [str(path) for path, old in zip(self.files, self.before, strict=True) if _state(path) != old]
        if (held is not None and held != self.content) or changed:
            seen = f"{', '.join(changed)} has changed" if changed else f"{self.place} is of another process"
            raise ValueError(
                f"{self.shown} was written by another run meanwhile ({seen}), so nothing was replaced there. Name "
                "another place, and run the command again."
            )

    def release(self) -> None:
        """Remove the claim, and the folders that were made for it and are empty."""
        with contextlib.suppress(OSError):  # of a folder that was moved or removed meanwhile
            if _read_claim(self.place) == self.content:
                self.place.unlink()
            for folder in self.made:
                folder.rmdir()


@contextlib.contextmanager
def claimed(
    target: Path, run: Sequence[object], files: Sequence[Path] = (), argument: str = "--output"
) -> Iterator[Claim]:
    """Hold the claim on a folder or file in this block, so that no other run writes it at the same time.

    A claim is a file, `.writing` in a folder and `.NAME.writing` next to a file, with a digest of the run and the
    process that holds it. The claim of a process of this machine that has ended is taken over. Of several processes
    that a launcher started, the main one holds it for all.

    Args:
        target (`Path`): what will be written. Its folder is made, and removed again if nothing was written to it.
        run (`Sequence`): what makes this run, such as its settings and its source, to tell the same command from others.
        files (`Sequence[Path]`): the files that will be written, if `target` is a folder.
        argument (`str`): the caller's argument in the error message.

    Raises:
        ValueError: another process holds the claim, or nothing can be written there.
    """
    claim = from_main(lambda: take_claim(target, run, files, argument))
    try:
        yield claim
    finally:
        if is_main_process():
            claim.release()


def take_claim(target: Path, run: Sequence[object], files: Sequence[Path] = (), argument: str = "--output") -> Claim:
    """Take the claim of [`claimed`] for this process alone, which must release it.

    Args:
        target (`Path`), run (`Sequence`), files (`Sequence[Path]`), argument (`str`): as in [`claimed`].

    Raises:
        ValueError: another process holds the claim, or nothing can be written there.
    """
    digest = hashlib.sha256("\n".join(map(repr, run)).encode(errors="surrogatepass")).hexdigest()[:16]
    place = target / WRITING if files else target.with_name(f".{target.name}{WRITING}")
    shown = f"{argument}={str(target)!r}"
    content = json.dumps({**this_process(), "run": digest, "id": uuid.uuid4().hex}).encode()
    made = [folder for folder in (place.parent, *place.parent.parents) if not folder.exists()]
    try:
        holder = _create_claim(place, content)
        if holder is None:
            for left in temporaries(files if files else [target]):
                left.unlink(missing_ok=True)
    except OSError as error:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise ValueError(
            f"{shown}: nothing can be written to {place.parent} ({error.strerror or error}). Name another place, or "
            "mend this one."
        ) from error
    if holder is not None:
        raise ValueError(f"{shown} is being written by {_who(holder, digest, place)}")
    files = files or [target]
    return Claim(target, place, content, digest, shown, files, [_state(path) for path in files], made)


def _create_claim(place: Path, content: bytes) -> dict[str, Any] | None:
    """Create the file of a claim; return None, or what the file of another process says that still holds it."""
    for _ in range(10):
        place.parent.mkdir(parents=True, exist_ok=True)
        # The run that held the claim may remove its empty folder at this moment.
        with contextlib.suppress(FileNotFoundError), _locked(place.parent):
            held = _read_claim(place)
            if held is not None:
                try:
                    holder = dict(json.loads(held))
                except (ValueError, TypeError, RecursionError):
                    holder = {}  # a kill between the making of the file and its writing, or a file of nobody
                if holder and not has_ended(holder):
                    return holder
                place.unlink()
            with place.open("xb") as file:
                file.write(content)
            return None
    raise FileNotFoundError(errno.ENOENT, "it is removed again and again")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder, so that of several processes that find a dead claim only one takes it over."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks, where O_EXCL alone must do
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _read_claim(place: Path) -> bytes | None:
    try:
        return place.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _who(holder: Mapping[str, Any], run: str, place: Path) -> str:
    """Return the process that holds a claim, and what to do, for a message."""
    command = "the same command" if holder.get("run") == run else "another command"
    who = f"{command}, process {str(holder.get('pid'))[:20]}"
    if holder.get("host") == this_process()["host"]:
        return f"{who}. Name another place, or wait until it has ended."
    name = str(holder.get("host")).split(" ")[0][:80]
    return (
        f"{who} on the machine {name!r}, where this one cannot look. Name another place, or wait; if that process was "
        f"killed, delete {place} and run the command again."
    )


def _state(path: Path) -> tuple[int, ...] | None:
    """Return what changes when a file is replaced or written to; None if there is none."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def temporaries(paths: Sequence[Path]) -> list[Path]:
    """Return the temporary files of `write_whole` for these paths, which killed processes have left."""
    wanted = {(path.parent, path.name) for path in paths}
    found = [left for folder in {path.parent for path in paths} if folder.is_dir() for left in folder.glob(".*")]
    mark = re.compile(r"\.(.+)\.[0-9a-f]{8}", re.DOTALL)
    return [left for left in found if (name := mark.fullmatch(left.name)) and (left.parent, name[1]) in wanted]


def write_whole(path: Path, write: Callable[[str], object], most: int | None = None) -> None:
    """Write a file atomically: call `write(temporary_name)`, then move the file to `path`.

    Args:
        path (`Path`): the file.
        write (`Callable`): writes a file of the name that it is given.
        most (`int`, *optional*): bytes that the file has at most, for the message.

    Raises:
        OSError: the file cannot be written; if the disk is full, the message names the file and what was written of it.
    """
    # Next to the target: a rename is atomic only within a file system. Random, since several machines may share the
    # folder, and process ids repeat among them.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        write(str(temporary))
        # The content must reach the disk before the name does: a power failure could leave the name alone.
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in FULL:
            raise
        done = temporary.stat().st_size if temporary.exists() else 0
        raise OSError(
            error.errno,
            f"{path} cannot be written: its disk, quota or limit was full after {done:,} bytes of it"
            f"{f', and it needs up to {most:,}' if most else ''}. Free more than that, and run the same command again.",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_content(path: Path, content: str | bytes) -> None:
    """Write a text, in UTF-8, or bytes as a file, atomically as [`write_whole`] does."""
    encoded = content.encode("utf-8") if isinstance(content, str) else content
    write_whole(path, lambda temporary: Path(temporary).write_bytes(encoded))


@contextlib.contextmanager
def write_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `path` and move it there at the end, so that `path` is complete or absent.

    The folder is removed if the block raises. Leftovers of a killed process are removed at the start.
    """
    temporary = path.with_name(f"{path.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for part in temporary.rglob("*"):
            if part.is_file():
                with part.open("rb") as file:
                    os.fsync(file.fileno())  # contents must reach the disk before the name does
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def data_folder(name: str) -> Path:
    """Return the folder `configs/` or `hub_cards/`: inside the package in a wheel, next to it in a checkout."""
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent / name


def cache_folder(cache_dir: str | None = None) -> Path:
    """Return the folder of this package in the cache of `datasets`.

    Args:
        cache_dir (`str`, *optional*): another cache than that of `datasets`.
    """
    from datasets import config  # here, as the command line reads this module for its help

    return Path(cache_dir or config.HF_DATASETS_CACHE).expanduser() / "car_datasets"


def make_writable(folder: Path) -> None:
    """Make a folder if it does not exist; raise OSError if no file can be written there."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as probe:
        probe.write(b"\0")


def prepare_cache() -> Path:
    """Return the folder of this package in the cache of `datasets`, once it is certain that it can be written.

    Copies of private rows that killed processes of this machine have left there are removed.

    Raises:
        ValueError: nothing can be written there.
    """
    folder = cache_folder()
    try:
        make_writable(folder)
    except OSError as error:
        raise ValueError(
            f"The cache of `datasets` cannot be written: {folder} ({error.strerror or error}). Name another folder in "
            "the environment, as in HF_DATASETS_CACHE=/path/to/cache."
        ) from error
    for path in (folder / TEMPORARY).glob("*"):
        if (name := _LEFTOVER.fullmatch(path.name)) and name["host"] == _host_digest():
            owner = {"host": this_process()["host"], "pid": int(name["pid"]), "started": int(name["started"])}
            if has_ended(owner):
                shutil.rmtree(path, ignore_errors=True)
    return folder


@contextlib.contextmanager
def private_folder(name: str) -> Iterator[Path]:
    """Yield a new folder for copies of private rows, which only this user can read; it is removed at the end.

    It is in the cache, which holds the rows anyway, under a name by which a later process knows that this one was
    killed, and then removes it.

    Args:
        name (`str`): of lower-case letters.

    Raises:
        ValueError: nothing can be written to the cache.
    """
    above = prepare_cache() / TEMPORARY
    above.mkdir(mode=0o700, exist_ok=True)
    me = this_process()
    place = above / f"{name}-{me['pid']}-{int(me['started'])}-{_host_digest()}-{uuid.uuid4().hex[:8]}"
    place.mkdir(mode=0o700)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _host_digest() -> str:
    return hashlib.sha256(this_process()["host"].encode()).hexdigest()[:8]


def sample_file() -> Path:
    """Return the instruction rows that ship with the package: a JSON list in the format of the Alpaca dataset."""
    return ASSETS / "instructions.json"


def write_figures(folder: Path, figures: Mapping[str, Any]) -> None:
    """Write `figures.json`, without the entry `revision`."""
    # The revision of a local folder is a digest of its files, this one among them.
    content = without_nan({name: value for name, value in figures.items() if name != "revision"})
    (folder / FIGURES_FILE).write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def without_nan(content: Any) -> Any:
    """Return a value with `None` in place of NaN and infinities, which JSON does not have, at any depth."""
    if isinstance(content, dict):
        return {name: without_nan(part) for name, part in content.items()}
    if isinstance(content, list):
        return [without_nan(part) for part in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
