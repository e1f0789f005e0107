"""The typer app, and what its commands share: options, errors in one line, quiet models, tables.

Does: build the options of a recipe from the fields of `Recipe`, and write every other shared option once.
Does not: hold a command.
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
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args, get_type_hints

import typer
from typer.core import TyperGroup
from typer.models import OptionInfo

from car_datasets import __version__
from car_datasets.recipe import HUB, OUTPUT, PANELS, PERFORMANCE, Recipe
from car_datasets.utils.files import UNFINISHED, printable
from car_datasets.utils.hub import clean_token
from car_datasets.utils.processes import launched_rank


class Commands(TyperGroup):
    """The group of all commands: rich lays out its help, and a wrong call ends with plain lines."""

    def __init__(self, **settings: Any) -> None:
        # In this mode typer draws a box around an error, in which a message is broken into short lines.
        super().__init__(**{**settings, "rich_markup_mode": None})

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the commands in panels, as typer does for the options of each."""
        from typer import rich_utils

        rich_utils.rich_format_help(obj=self, ctx=ctx, markup_mode="rich")


app = typer.Typer(
    name="car-datasets",
    cls=Commands,
    no_args_is_help=True,
    # rich's tracebacks may print local variables, and a token may be among them.
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Command = Callable[..., None]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"car-datasets {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Pick the best and most diverse subset of an instruction-tuning dataset."""


class Option(NamedTuple):
    """The type of an option, annotated with its help, and its default."""

    annotation: Any
    default: Any = None


def option(kind: Any, help: str, default: Any = None, *flags: str, panel: str | None = None, **more: Any) -> Option:
    """Return an option with a help text.

    Args:
        kind (`type`): the type of the value.
        help (`str`): the help text; `[default: ...]` at its end shows a default that is not the option's own.
        default: the default of the option.
        flags (`str`): the names of the option, if it is not called like the argument.
        panel (`str`, *optional*): the group that the help shows it in, one of `PANELS`.
        more: further settings of `typer.Option`.
    """
    return Option(Annotated[kind, typer.Option(*flags, help=_as_markup(help), rich_help_panel=panel, **more)], default)


def _as_markup(help: str) -> str:
    """Return a help text for rich, which would read its square brackets as markup, with the default in grey."""
    text, mark, default = help.partition("  [default: ")
    escaped = text.replace("[", r"\[")
    return f"{escaped}  [dim]\\[default: {default}[/dim]" if mark else escaped


def _parse_token(text: str | None) -> str | None:
    try:
        return clean_token(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


Source = Annotated[
    str,
    typer.Argument(
        help="Read this dataset: a Hub id, a file in JSON, JSON Lines, CSV or Parquet, a folder, the address of a file, or "
        "- for standard input."
    ),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Write the result into this new folder.")]
OutputFile = Annotated[
    Path,
    typer.Option(
        "--output", "-o", help="Write this new file: .parquet, or .json for a list of rows in the original's format."
    ),
]
SHARED = {
    "token": option(
        str | None,
        "Use this Hub token for private datasets and models and to push; `hf auth login` saves one.",
        panel=HUB,
        envvar="HF_TOKEN",
        show_envvar=True,  # the name of the variable; typer never shows its value
        callback=_parse_token,
    ),
    "shards": option(
        str | None,
        "Keep finished shards in this folder or URL: a second run resumes from them, and processes share the work.",
        panel=PERFORMANCE,
    ),
    "overwrite": option(
        bool,
        "Replace an earlier result in --output, once the new one is complete.",
        False,
        "--overwrite",
        panel=OUTPUT,
    ),
    "public": option(bool, "Make the repository public instead of private.", False, "--public", panel=HUB),
    "check": option(bool, "Read back what was pushed, and compare it row by row.", False, "--check", panel=HUB),
}


def add_options(*shared: str, **own: Option) -> Callable[[Command], Command]:
    """Add options to a command, which receives them in its `**` parameter.

    Args:
        shared (`str`): keys of `SHARED`.
        own ([`Option`]): options of this command alone, by the name of the argument.
    """
    options = {**own, **{name: SHARED[name] for name in shared}}

    def decorate(command: Command) -> Command:
        return _with_parameters(command, command, options, drop=inspect.Parameter.VAR_KEYWORD)

    return decorate


FLAGS = [f.name for f in fields(Recipe)]  # every setting of a recipe has an option
NONE = "none"  # the word for None, since a shell has no other


def recipe_options(*names: str, **helps: str) -> Callable[[Command], Command]:
    """Add options for fields of [`Recipe`] to a command, which receives those given as the dict `changes`.

    Every option defaults to None, "not given", so that an option wins over a recipe file even with the default's value.

    Args:
        names (`str`): fields of [`Recipe`].
        helps (`str`): further fields, with a help text that fits this command better than the field's own.
    """
    wanted = [*names, *helps]
    known = {f.name: f for f in fields(Recipe)}
    options = {name: _recipe_option(known[name], helps.get(name)) for name in wanted}

    def decorate(command: Command) -> Command:
        @wraps(command)
        def run(**arguments: Any) -> None:
            given = {name: arguments.pop(name) for name in wanted}
            changes = {name: _value_of(known[name], text) for name, text in given.items() if text is not None}
            command(**arguments, changes=changes)

        return _with_parameters(run, command, options, drop="changes")

    return decorate


def _value_of(setting: Any, given: Any) -> Any:
    """Return the value of an option; the word none is None for a setting that may be None, to undo a file's value."""
    if given == NONE and type(None) in get_args(setting.type):
        return None
    return _PARSERS[setting.name](given) if setting.name in _PARSERS else given


def _recipe_option(setting: Any, help: str | None) -> Option:
    """Return the option of a field of `Recipe`; its help ends with the recipe's default."""
    flag = setting.metadata["flag"] or f"--{setting.name.replace('_', '-')}"
    kind = str if setting.name in _PARSERS else setting.type
    shown = setting.metadata["shown"] or setting.default
    if kind is bool:  # both forms, so that a recipe file's true can be overridden as well as its false
        shown, flag = flag[2:] if setting.default else f"no-{flag[2:]}", f"{flag}/--no-{flag[2:]}"
    text = setting.metadata["help"] if help is None else help
    # typer would show the option's own default, which is None.
    if "[default: " not in text and shown not in (None, ()):
        text = f"{text}  [default: {shown}]"
    shown_type = {"metavar": "<int>"} if setting.name in _INTEGERS else {}
    return option(kind | None, text, None, flag, panel=setting.metadata["panel"], **shown_type)


def _with_parameters(command: Command, like: Command, options: dict[str, Option], drop: Any) -> Command:
    """Give a command the signature that typer reads: that of `like`, with options instead of one parameter.

    Args:
        command (`Callable`): what typer calls.
        like (`Callable`): the function whose parameters it has.
        options (`dict`): the options to add, by name.
        drop (`str` or `inspect._ParameterKind`): name or kind of the parameter that collects them.
    """
    # The annotations are text, because the modules of the commands import them from __future__; typer needs the types.
    types = get_type_hints(inspect.unwrap(like), include_extras=True)
    kept = [
        # By keyword, because a parameter without a default may then follow one with a default.
        p.replace(kind=p.KEYWORD_ONLY, annotation=types.get(p.name, p.annotation))
        for p in inspect.signature(like).parameters.values()
        if drop not in (p.name, p.kind)
    ]
    new = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=each.annotation)
        for name, each in options.items()
    ]
    # The help shows the panels in the order of their first options; the sort keeps the order within each.
    parameters = sorted([*kept, *new], key=_place_of_panel)
    # typer reads the parameters from the signature and their types from the annotations, so both are set.
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _place_of_panel(parameter: inspect.Parameter) -> int:
    """Return the place of a parameter's panel in `PANELS`, or -1 without a panel."""
    for info in getattr(parameter.annotation, "__metadata__", ()):
        if info.rich_help_panel in PANELS:
            return PANELS.index(info.rich_help_panel)
    return -1


def parse_columns(text: str) -> dict[str, str]:
    """Return the mapping of `--columns role=column,...`.

    Raises:
        ValueError: the text is not a list of role=column pairs.
    """
    pairs = [part.split("=", 1) for part in text.split(",") if part]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"--columns {text}: write role=column pairs, as instruction=task,response=answer.")
    return {role.strip(): column.strip() for role, column in pairs}


def parse_count(n1: str) -> int | float:
    """Return the number of `--n1`: an integer is a count, a number with a point is a share.

    Raises:
        ValueError: the text is not a number.
    """
    try:
        return int(n1) if n1.lstrip("+-").isdecimal() else float(n1)
    except ValueError as error:
        raise ValueError(f"--n1 {n1}: pass a number of rows, or a share such as 0.05.") from error


def parse_integer(flag: str, text: str) -> int:
    """Return the number of an option.

    Raises:
        ValueError: the text is not an integer.
    """
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"{flag} {text}: pass an integer, or none to undo the value of a file.") from error


def parse_clusters(k: str) -> int | str:
    """Return the number of `--k`, or `"sqrt"`.

    Raises:
        ValueError: the text is neither.
    """
    if k == "sqrt":
        return k
    try:
        return int(k)
    except ValueError as error:
        raise ValueError(f"--k {k}: pass a number, or sqrt.") from error


# Settings whose type typer cannot parse, a union or a mapping, or a number that may be the word none; they are text on
# the command line.
_INTEGERS = ("budget", "batch_tokens")
_PARSERS: dict[str, Callable[[str], Any]] = {
    "columns": parse_columns,
    "n1": parse_count,
    "k": parse_clusters,
    **{name: partial(parse_integer, f"--{name.replace('_', '-')}") for name in _INTEGERS},
}
GRACE = 5.0  # seconds for the launcher to end this process, if the main one made the same mistake


def one_line_errors(command: Command) -> Command:
    """End a user's mistake with one line and exit code 2; anything else is our bug and keeps its traceback.

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
        try:
            with contextlib.nullcontext() if is_main else _silence(), _terminable():
                command(**arguments)
        except (ValueError, OSError) as error:
            if not is_main:
                time.sleep(GRACE)
            echo(f"car-datasets: {_as_typed(' '.join(str(error).split()), command, arguments)}", err=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as stop:
            if is_main:
                typer.echo(err=True)
                echo(f"car-datasets: stopped. {_what_is_kept(command.__name__, arguments)}", err=True)
            raise typer.Exit(143 if isinstance(stop, _Terminated) else 130) from None

    # typer shows the docstring as the help, and rich would read the brackets of "car-datasets[explore]" as markup.
    run.__doc__ = _as_markup(command.__doc__ or "")
    return run


class _Printable(logging.Formatter):
    """Log records without the characters that a terminal obeys."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as text."""
        return printable(super().format(record))


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Raise `_Terminated` at a SIGTERM in this block."""
    # Not under a launcher, whose SIGTERM must end a process that waits for others without ever returning to Python.
    if launched_rank()[1] > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _what_is_kept(name: str, arguments: Mapping[str, Any]) -> str:
    """Return what a stopped command has kept, and the command that resumes."""
    output, shards = arguments.get("output"), arguments.get("shards")
    kept, verb = "Nothing was kept.", "start again"
    if shards:
        kept, verb = _finished_shards(str(shards)), "resume"
    elif "shards" in arguments:
        kept = "Scores of an unfinished pass are not kept; with --shards DIR the same command would resume from them."
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


def print_table(table: Any) -> None:
    """Print a `rich` table to standard output, without reading its text as markup."""
    from rich.console import Console

    Console(markup=False, emoji=False).print(table)


def print_pushed(pushed: tuple[str, str]) -> None:
    """Print the repository and the commit of a push."""
    echo(f"Pushed to {pushed[0]}, commit {pushed[1]}.")


def quiet_models() -> None:
    """Turn off the progress bars of weights; each stage has a bar of its own."""
    # Otherwise tokenizers warns, and turns its threads off, in every process that is forked after its first use.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
