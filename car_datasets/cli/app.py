"""The typer app, and what its commands share: options, errors in one line, quiet models, tables.

Does: build the options of a recipe from the fields of `Recipe`, and write every other shared option once.
Does not: hold a command.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_type_hints

import typer

from car_datasets import __version__
from car_datasets.recipe import Recipe
from car_datasets.utils.hub import clean_token
from car_datasets.utils.settings import launched_rank

app = typer.Typer(
    name="car-datasets",
    help="Pick the best and most diverse subset of an instruction-tuning dataset.",
    no_args_is_help=True,
    # rich's tracebacks may print local variables, and a token may be among them.
    pretty_exceptions_enable=False,
    # Help texts contain square brackets, which rich would read as markup.
    rich_markup_mode=None,
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
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Pick the best and most diverse subset of an instruction-tuning dataset."""


class Option(NamedTuple):
    """The type of an option, annotated with its help, and its default."""

    annotation: Any
    default: Any = None


def option(kind: Any, help: str, default: Any = None, *flags: str, **settings: Any) -> Option:
    """Return an option with a help text; `flags` and `settings` are those of `typer.Option`."""
    return Option(Annotated[kind, typer.Option(*flags, help=help, **settings)], default)


def _parse_token(text: str | None) -> str | None:
    try:
        return clean_token(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


Source = Annotated[
    str, typer.Argument(help="Hub id, .json, .jsonl, .csv or .parquet file, folder, address of a file, or -.")
]
Output = Annotated[Path, typer.Option("--output", "-o", help="A new folder for the result.")]
OutputFile = Annotated[
    Path, typer.Option("--output", "-o", help="A new .parquet file, or a .json file in the original's format.")
]
SHARED = {
    "token": option(
        str | None,
        "Hub token: for private sources and models, for --shards on the Hub, and to push.",
        envvar="HF_TOKEN",
        show_envvar=True,  # the name of the variable; typer never shows its value
        callback=_parse_token,
    ),
    "shards": option(
        str | None,
        "Folder or URL for finished shards: a second run resumes from them, and several processes share the work.",
    ),
    "public": option(bool, "Make the repository public.  [default: private]", False, "--public"),
    "check": option(bool, "Read back what was pushed, and compare it row by row.", False, "--check"),
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
            changes = {
                name: _PARSERS[name](value) if name in _PARSERS else value
                for name, value in given.items()
                if value is not None
            }
            command(**arguments, changes=changes)

        return _with_parameters(run, command, options, drop="changes")

    return decorate


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
    return option(kind | None, text, None, flag)


def _with_parameters(command: Command, like: Command, options: dict[str, Option], drop: Any) -> Command:
    """Give a command the signature that typer reads: that of `like`, with options in the place of one parameter.

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
    # typer reads the parameters from the signature and their types from the annotations, so both are set.
    command.__signature__ = inspect.Signature([*kept, *new])  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in [*kept, *new]}
    return command


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
    """Return the number of `--n1`: a whole number is a count, a number with a point is a share.

    Raises:
        ValueError: the text is not a number.
    """
    try:
        return int(n1) if n1.lstrip("+-").isdecimal() else float(n1)
    except ValueError as error:
        raise ValueError(f"--n1 {n1}: pass a number of rows, or a share such as 0.05.") from error


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


# Settings whose type typer cannot parse, a union or a mapping; they are text on the command line.
_PARSERS: dict[str, Callable[[str], Any]] = {"columns": parse_columns, "n1": parse_count, "k": parse_clusters}
GRACE = 5.0  # seconds for the launcher to end this process, if the main one made the same mistake


def one_line_errors(command: Command) -> Command:
    """End a user's mistake with one line and exit code 2; anything else is our bug and keeps its traceback.

    Under `accelerate launch` or `torchrun` only the main process prints, unless another one alone fails.
    """

    @wraps(command)
    def run(**arguments: Any) -> None:
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        # From the environment: torch, which would know as well, must not be imported yet.
        is_main = launched_rank()[0] == 0
        try:
            with contextlib.nullcontext() if is_main else _silence():
                command(**arguments)
        except (ValueError, OSError) as error:
            if not is_main:
                time.sleep(GRACE)
            typer.echo(f"car-datasets: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from error

    return run


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Suppress output and progress bars; set before the libraries that draw them are imported."""
    os.environ.update(TQDM_DISABLE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def print_table(table: Any) -> None:
    """Print a `rich` table to standard output."""
    from rich.console import Console

    Console().print(table)


def print_pushed(pushed: tuple[str, str]) -> None:
    """Print the repository and the commit of a push."""
    typer.echo(f"Pushed to {pushed[0]}, commit {pushed[1]}.")


def quiet_models() -> None:
    """Turn off the progress bars of weights; each stage has a bar of its own."""
    # Otherwise tokenizers warns, and turns its threads off, in every process that is forked after its first use.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
