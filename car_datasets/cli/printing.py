"""Print what a command found: its result in sentences, tables that fit the terminal, and the steps that come next.

Does: write in bold and within the width of a terminal, and to a pipe as plain lines without colours, boxes or breaks.
Does not: know a command, or compute a figure.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from car_datasets.cli.running import echo
from car_datasets.utils.files import printable
from car_datasets.utils.processes import launched_rank

if TYPE_CHECKING:
    from rich.console import Console

    from car_datasets.reporting.report import SelectionReport

UNBOUNDED = 100_000  # columns of a table that no terminal shows


class Step(NamedTuple):
    """What one can do after a command.

    Args:
        why (`str`): what it is good for, as a full sentence, which ends with a colon if lines follow.
        lines (`tuple[str, ...]`): commands, or lines of Python, that can be copied.
    """

    why: str
    lines: tuple[str, ...] = ()


def announce(text: str) -> None:
    """Say to someone at a terminal what is about to happen; a log needs no such line."""
    if (console := _console(err=True)).is_terminal:
        _print_words(console, text)


def tell(text: str) -> None:
    """Print the result of a command, one sentence, in bold on a terminal."""
    say(text, style="bold")


def say(text: str, style: str = "") -> None:
    """Print one sentence, in lines of entire words on a terminal."""
    console = _console()
    if console.is_terminal:
        indent = " " * (len(text) - len(text.lstrip()))
        _print_words(console, text.lstrip(), style, first=indent)
    else:
        echo(text)


def tell_each(sentences: Iterable[str]) -> None:
    """Print sentences that say more about a result, one below the other."""
    console = _console()
    if console.is_terminal:
        console.print()
    for sentence in sentences:
        if console.is_terminal:
            _print_words(console, sentence, first="- ")
        else:
            echo(f"- {sentence}")


def _print_words(console: Console, text: str, style: str = "", first: str = "") -> None:
    """Print a sentence in lines of entire words. A path that is longer than a line stays in one piece, to be copied."""
    lines = textwrap.TextWrapper(
        console.width, first, " " * len(first), break_long_words=False, break_on_hyphens=False
    ).wrap(_shown(text))
    console.print("\n".join(lines), style=style, soft_wrap=True)


def _shown(text: str) -> str:
    return printable(text).replace("\n", r"\n")


def print_table(table: Any) -> None:
    """Print a `rich` table to standard output, without reading its text as markup.

    On a terminal that is too narrow for the table, each row is printed as a list of its cells. To a pipe, each row is a
    line, however long.
    """
    # rich breaks a title at the width of the table, which may be narrow, and writes a caption in dim italics.
    title, caption, table.title, table.caption = table.title, table.caption, None, None
    table.pad_edge, table.show_edge, table.padding, table.width = False, False, (0, 1, 0, 0), None
    console = _console()
    if console.is_terminal:
        console.print()
        _print_fitting(console, table, title)
    else:
        table.box, console.width = None, UNBOUNDED
        if title:
            echo(str(title))
        with console.capture() as captured:
            console.print(table)
        for line in captured.get().splitlines():
            echo(line.rstrip())
    if caption:
        say(str(caption))


def _print_fitting(console: Console, table: Any, title: Any) -> None:
    """Print a table to a terminal."""
    from rich import box
    from rich.measure import Measurement

    table.box = box.SIMPLE_HEAD
    if title:
        _print_words(console, str(title), style="bold")
    # Measured without the bound of the terminal, which rich would cut the cells to.
    if Measurement.get(console, console.options.update(max_width=UNBOUNDED), table).minimum <= console.width:
        console.print(table)
    else:
        _print_as_lists(console, table)


def _print_as_lists(console: Console, table: Any) -> None:
    """Print each row of a table as its first cell, and below it a line for each of the others."""
    heads = [column.header for column in table.columns]
    for first, *others in zip(*(column.cells for column in table.columns), strict=True):
        _print_words(console, str(first or heads[0] or "-"), style="bold")
        for head, cell in zip(heads[1:], others, strict=True):
            _print_words(console, f"{head}: {cell}", first="  ")


def print_report(report: SelectionReport) -> None:
    """Print a selection: what came out in two sentences, its figures as a table, and the counts."""
    tell(" ".join(report.verdict()))
    table = report.to_table()
    table.caption = None  # the counts, which are easier to read as a list
    print_table(table)
    tell_each(report.sentences())
    if _console().is_terminal:
        echo("")


def print_result(report: SelectionReport, folder: Path) -> None:
    """Print a selection, and where the files are that people open."""
    from car_datasets.reporting.page import PAGE_FILE
    from car_datasets.results import SCORED_TABLE, SELECTED_JSON, SELECTED_TABLE, SUMMARY_FILE

    print_report(report)
    echo(f"The selection is in {folder / SELECTED_TABLE} and {folder / SELECTED_JSON},")
    echo(f"the figures are in {folder / PAGE_FILE} and {folder / SUMMARY_FILE},")
    echo(f"and the entire pool with its scores is in {folder / SCORED_TABLE}.")


def suggest(steps: Iterable[Step]) -> None:
    """Print to standard error what one can do next, so that a script that reads the output need not remove it."""
    steps = list(steps)
    if not steps or launched_rank()[0] != 0:
        return
    console = _console(err=True)
    console.print("\nNext:", style="bold")
    for why, lines in steps:
        _print_words(console, why, first="  ")
        for line in lines:
            console.print(f"    {_shown(line)}", style="bold", soft_wrap=True)


def _console(err: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=err, markup=False, emoji=False, highlight=False)
