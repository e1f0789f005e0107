"""How every command ends: mistakes and signals in one line, with what is kept and how to resume.

Does: turn errors of the library into one line that names options as they are typed; end by a signal with exit code 130
or 143; print text of others safely.
Does not: hold a command, or know its options.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import logging
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import typer
from typer.models import OptionInfo

from car_datasets.recipe import Recipe
from car_datasets.utils.files import FULL, RUNS_FOLDER, UNFINISHED, cache_folder, claimed, printable
from car_datasets.utils.processes import exit_code, launched_rank, terminable

Command = Callable[..., None]
GRACE = 5.0  # seconds for the launcher to end this process, if the main one made the same mistake


def ending_in_one_line(command: Command) -> Command:
    """End a user's mistake and a full disk with one line and exit code 2; anything else is our bug, with its traceback.

    Ctrl-C ends in one line as well, with exit code 130, and SIGTERM with 143.

    Under `accelerate launch` or `torchrun` only the main process prints, unless another one alone fails.
    """

    @wraps(command)
    def run(**arguments: Any) -> None:
        handler = logging.StreamHandler()
        handler.setFormatter(_Printable("%(message)s"))
        logging.basicConfig(level=logging.WARNING, handlers=[handler])
        # From the environment: torch, which would know as well, must not be imported yet.
        is_main = launched_rank()[0] == 0
        with terminable():
            try:
                with contextlib.nullcontext() if is_main else _silence():
                    command(**arguments)
            except KeyboardInterrupt as stop:
                if is_main:
                    typer.echo(err=True)
                    echo(f"car-datasets: stopped. {_what_is_kept(command.__name__, arguments)}", err=True)
                raise typer.Exit(exit_code(stop)) from None
            except Exception as error:
                if (message := _message(error, command.__name__, arguments)) is None:
                    raise
                if not is_main:
                    time.sleep(GRACE)
                echo(f"car-datasets: {_as_typed(' '.join(message.split()), command, arguments)}", err=True)
                raise typer.Exit(2) from error

    return run


def _message(error: Exception, name: str, arguments: Mapping[str, Any]) -> str | None:
    """Return what to say about an error; None if it is neither a user's mistake nor a full disk."""
    cause: BaseException | None = error
    while cause is not None:  # `datasets` wraps the errors of its writers
        if isinstance(cause, OSError) and cause.errno in FULL:
            return f"{cause.strerror}. {_fullest(arguments)} {_what_is_kept(name, arguments)}"
        cause = cause.__cause__ or cause.__context__
    return str(error) if isinstance(error, (ValueError, OSError)) else None


def _fullest(arguments: Mapping[str, Any]) -> str:
    """Return which of the folders that a command writes to has the least space."""
    places = [Path(str(arguments[name])) for name in ("output", "shards", "folder", "work_dir") if arguments.get(name)]
    free = {}
    for place in (*places, cache_folder()):
        here = next(folder for folder in (place.absolute(), *place.absolute().parents) if folder.exists())
        free[shutil.disk_usage(here).free] = place
    least = min(free)
    return f"The disk of {free[least]} has {least / 1e6:,.1f} MB left."


class _Printable(logging.Formatter):
    """Log records without the characters that a terminal obeys."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as text."""
        return printable(super().format(record))


def _what_is_kept(name: str, arguments: Mapping[str, Any]) -> str:
    """Return what a stopped command has kept, and the command that resumes."""
    output, shards = arguments.get("output"), arguments.get("shards")
    kept, verb = "Nothing was kept.", "start again"
    if name == "judge":
        kept, verb = "Every answer that has arrived is kept, and is not paid for again.", "resume"
    elif shards:
        kept, verb = _finished_shards(str(shards)), "resume"
    elif "shards" in arguments:
        kept = "Scores of an unfinished pass are not kept; with --shards DIR the same command would resume from them."
    elif name == "prove":
        runs, verb = Path(arguments["work_dir"] or Path(arguments["folder"]) / RUNS_FOLDER), "resume"
        kept = f"Finished runs are kept in {runs}." if any(runs.glob("run-*.json")) else "No run was finished yet."
    elif isinstance(output, Path):
        kept = f"Nothing was written to {output}."
    if isinstance(output, Path) and (output / UNFINISHED).exists():
        kept += f" {output} is incomplete, and the same command completes it."
    typed = sys.argv[1:]
    if typed[:1] != [name] or launched_rank()[1] > 1:  # a launcher has a command of its own
        return f"{kept} To {verb}, run the same command again."
    # The token stays out of the terminal's history.
    shown = [re.sub("^--token=.*", "--token=TOKEN", word) for word in typed]
    shown = ["TOKEN" if before == "--token" else word for before, word in zip(["", *shown], shown, strict=False)]
    return f"{kept} To {verb}: {shlex.join(['car-datasets', *shown])}"


def _finished_shards(place: str) -> str:
    """Return how many rows the folders of shards hold, read without the libraries that may be half imported."""
    found = []
    for folder in sorted(path.parent for path in Path(place).glob("*/manifest.json")):
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):  # of a damaged manifest
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            rows, size = manifest["rows"], manifest["shard_rows"]
            numbers = [int(path.stem.removeprefix("part-")) for path in folder.glob("part-*.arrow")]
            done = sum(min(size, rows - number * size) for number in numbers)
            found.append(f"{folder} holds {done:,} of {rows:,} rows")
    return f"{', '.join(found)}." if found else f"Finished shards are kept in {place}."


# What the library calls the values of these options.
_ARGUMENTS = {"output": "output_dir", "shards": "shard_dir", "rows": "sample"}


def _as_typed(message: str, command: Command, arguments: dict[str, Any]) -> str:
    """Return a message of the library with its arguments as the options of a command: `--n1=9` for `n1=9`.

    Args:
        message (`str`): the message, in one line.
        command (`Callable`): the command that failed.
        arguments (`dict`): what it was called with.
    """
    # Many messages name both, as in "on_invalid='mark' (--on-invalid mark)".
    message = re.sub(
        r"(?<![\w-])(\w+)=[^\s()]* \((--([\w-]+)[^()]*)\)",
        lambda both: both[2] if both[3].replace("-", "_") == both[1] else both[0],
        message,
    )
    # Evaluated, since the annotations of a command without added options are text.
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        typed = arguments.get(name) is not None
        # A recipe file has no options, and messages about a model say "revision" too.
        if not typed and (arguments.get("config") is not None or name == "revision"):
            continue
        on, _, off = _flag_of(parameter).partition("/")
        if not on:
            continue
        # A value is quoted or a number; a bare word belongs to `--columns`, as in instruction=task,output=answer.
        argument = rf"(?<![\w,-])(?:{name}|{_ARGUMENTS.get(name, name)})=(?!(?!nan|inf)[a-z])"
        message = re.sub(rf"{argument}True\b", on, message)
        message = re.sub(rf"{argument}False\b", off or on, message)
        message = re.sub(argument, f"{on}=", message)
    return message


def _flag_of(parameter: inspect.Parameter) -> str:
    """Return the name of an option, `--x` or `--x/--no-x`, or nothing for an argument."""
    for info in getattr(parameter.annotation, "__metadata__", ()):
        if isinstance(info, OptionInfo):
            # In an annotation, typer takes the first name of an option for its default.
            names = [str(name) for name in (info.default, *(info.param_decls or ()))]
            return next((name for name in names if name.startswith("--")), f"--{parameter.name.replace('_', '-')}")
    return ""


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Suppress output and progress bars; set before the libraries that draw them are imported."""
    os.environ.update(TQDM_DISABLE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def echo(text: str, err: bool = False) -> None:
    """Print one line, whatever names, paths and statuses of others it contains."""
    typer.echo(printable(text).replace("\n", r"\n"), err=err)


def holds_result(folder: Path, source: str, settings: Recipe, token: str | None, overwrite: bool = False) -> bool:
    """Return True if the same command has written the result, and was then interrupted or is typed again.

    Raises:
        ValueError: it has, and files of the result were changed since; with `overwrite` the answer is then False.
    """
    from car_datasets.utils.processes import from_main

    # By the main process alone, which asks the Hub once.
    return from_main(lambda: _is_complete(folder, source, settings, token, overwrite))


def _is_complete(folder: Path, source: str, settings: Recipe, token: str | None, overwrite: bool) -> bool:
    from car_datasets.curation import made_by
    from car_datasets.results import NEW, RESULT_FILES, compare_folder, read_result

    try:
        receipt = read_result(folder).receipt
        if receipt is None or not made_by(receipt, source, settings, token):
            return False
    # Not a result, or an unfinished one, or a source that is not there: `curate` decides what to do.
    except (ValueError, FileNotFoundError):
        return False
    # A claim that a killed run has left is removed, and so are its temporary files.
    with claimed(folder, (), [folder / name for name in RESULT_FILES]):
        shutil.rmtree(folder / NEW, ignore_errors=True)
    changed = compare_folder(folder, receipt).differences
    if changed and not overwrite:
        raise ValueError(
            f"{folder} holds this result, but not as it was written: {'; '.join(changed[:5])}. Name another "
            "folder, or pass --overwrite to write it again."
        )
    if missing := [name for name in receipt.files if not (folder / name).exists()]:
        echo(f"Warning: {folder} lacks {', '.join(missing)}, which was deleted; --overwrite writes all anew.", err=True)
    return not changed
