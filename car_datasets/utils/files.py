"""Files and folders, and what strangers wrote in them: written atomically, found in the package, printed safely.

Does: refuse paths that hold results already; write a file or folder under a temporary name and move it into place; write
figures as JSON that every parser reads; find the assets, recipes and card templates of the package; make text of
others safe for a terminal.
Does not: know how a result folder is laid out.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.text import Text

PACKAGE = Path(__file__).parents[1]
ASSETS = PACKAGE / "assets"
FIGURES_FILE = "figures.json"  # next to a trained scorer
UNFINISHED = ".unfinished"  # a file of this name marks a folder that is being written


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
        ValueError: it exists and may not be replaced, lies in a file, or is neither Parquet nor JSON.
    """
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


def write_whole(path: Path, write: Callable[[str], object]) -> None:
    """Write a file atomically: call `write(temporary_name)`, then move the file to `path`."""
    # Next to the target: a rename is atomic only within a file system. Random, since several machines may share the
    # folder, and process ids repeat among them.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        write(str(temporary))
        # The content must reach the disk before the name does: a power failure could leave the name alone.
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
