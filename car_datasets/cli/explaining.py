"""The command that explains a selection: why rows are in it, or are not.

Does: parse, read the folder of a result, print.
Does not: hold logic, or import a heavy library before the command runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from car_datasets.cli.app import app, echo, one_line_errors
from car_datasets.cli.next_steps import look
from car_datasets.cli.printing import say, suggest
from car_datasets.cli.stages import PUBLISHING


@app.command(rich_help_panel=PUBLISHING, epilog="Example: car-datasets explain out 17 42")
@one_line_errors
def explain(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Explain the result in this folder, which `curate` wrote.")
    ],
    rows: Annotated[
        list[str] | None,
        typer.Argument(metavar="ROW", help="Explain the rows of these numbers in the index column."),
    ] = None,
    explain_all: Annotated[
        bool,
        typer.Option(
            "--explain-all", help="Print one line for every row of the pool: what brought it in or kept it out."
        ),
    ] = False,
    neighbours: Annotated[int, typer.Option(help="Name this many similar rows of a row's cluster.")] = 3,
) -> None:
    """Say why rows were selected or not: by which rule, which mark or which bound, and which rows are like them."""
    if bool(rows) == explain_all:
        raise ValueError("Name rows, as in `car-datasets explain out 17 42`, or pass --explain-all for a line per row.")
    from car_datasets.exploring import overview_of
    from car_datasets.reporting.ledger import ledger
    from car_datasets.reporting.questions import explain_rows, position_of

    overview = overview_of(folder)
    for line in ledger(overview) if explain_all else ():
        echo(line)
    # On the command line all is text; an index column of numbers is asked for a number.
    numbered = isinstance(overview.name_of(0), int)
    found = [position_of(overview, int(row) if numbered and row.isdecimal() else row) for row in rows or ()]
    for explanation in explain_rows(overview, found, neighbours):
        for line in str(explanation).split("\n"):
            say(line)
    if not explain_all:
        suggest([look(folder)])
