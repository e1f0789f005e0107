"""The typer app, and what its commands share: options and quiet models.

Does: build the options of a recipe from the fields of `Recipe`, and write every other shared option once.
Does not: hold a command.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import fields
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperGroup

from car_datasets import __version__
from car_datasets.cli.running import Command, ending_in_one_line
from car_datasets.cli.running import echo as echo  # for the modules of the commands
from car_datasets.recipe import HUB, OUTPUT, PANELS, PERFORMANCE, Recipe
from car_datasets.utils.files import output_path
from car_datasets.utils.hub import clean_token


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
    epilog="Start with: car-datasets demo --output demo",
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
        metavar="SOURCE",
        help="Read this dataset: a Hub id, a file in JSON, JSON Lines, CSV or Parquet, a folder, the address of a file, or "
        "- for standard input.",
    ),
]


def parse_new_path(text: str) -> Path:
    """Return the path of what a command will write; an empty name and an address are refused as wrong calls.

    A `Path` of either would be one of a local folder: the current one, or one called `s3:`.
    """
    try:
        return output_path(text, "")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


NEW_PATH: dict[str, Any] = {"parser": parse_new_path, "metavar": "<path>"}  # of an option for what will be written
Output = Annotated[Path, typer.Option("--output", "-o", help="Write the result into this new folder.", **NEW_PATH)]
OutputFile = Annotated[
    Path,
    typer.Option(
        *("--output", "-o"),
        help="Write this new file: .parquet, or .json for a list of rows in the original's format.",
        **NEW_PATH,
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
            # typer gives an empty list for an option that may be repeated and is not there.
            changes = {name: _value_of(known[name], text) for name, text in given.items() if text not in (None, [])}
            command(**arguments, changes=changes)

        return _with_parameters(run, command, options, drop="changes")

    return decorate


def _value_of(setting: Any, given: Any) -> Any:
    """Return the value of an option; the word none is None for a setting that may be None, to undo a file's value."""
    if given == NONE and type(None) in get_args(setting.type):
        return None
    if isinstance(given, list):
        return () if given == [NONE] else tuple(given)
    return _PARSERS[setting.name](given) if setting.name in _PARSERS else given


def _recipe_option(setting: Any, help: str | None) -> Option:
    """Return the option of a field of `Recipe`; its help ends with the recipe's default."""
    flag = setting.metadata["flag"] or f"--{setting.name.replace('_', '-')}"
    kind = str if setting.name in _PARSERS else list[str] if get_origin(setting.type) is tuple else setting.type
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
    "budget_tokens": str,  # the recipe reads 500k and 2M
    **{name: partial(parse_integer, f"--{name.replace('_', '-')}") for name in _INTEGERS},
}


def one_line_errors(command: Command) -> Command:
    """End a user's mistake with one line and exit code 2, and a signal with one line and 130 or 143.

    Anything else is our bug and keeps its traceback.
    """
    run = ending_in_one_line(command)
    # typer shows the docstring as the help, and rich would read the brackets of "car-datasets[explore]" as markup.
    run.__doc__ = _as_markup(command.__doc__ or "")
    return run


def quiet_models() -> None:
    """Turn off the progress bars of weights; each stage has a bar of its own."""
    # Otherwise tokenizers warns, and turns its threads off, in every process that is forked after its first use.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
