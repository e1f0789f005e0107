"""The command that adds new rows to a finished selection.

Does: parse, call the library, print the figures and the drift.
Does not: hold logic, or import a heavy library before the command runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from car_datasets.cli.app import (
    Output,
    add_options,
    app,
    echo,
    one_line_errors,
    print_table,
    quiet_models,
    recipe_options,
    say_where,
)
from car_datasets.cli.stages import PUBLISHING

_AGAIN = "Where the {} is, if it was a folder when the old rows were curated."


@app.command("top-up", rich_help_panel=PUBLISHING, epilog="Example: car-datasets top-up out new.json --output out-2")
@one_line_errors
@recipe_options(
    *("n1", "budget", "budget_tokens", "name", "split", "revision", "glob", "allow_worse"),
    against="Compare the new rows with these evaluation sets, which must be those of the old rows.",
    **{name: _AGAIN.format(name) for name in ("scorer", "embedder", "tokenizer", "engine", "budget_tokenizer")},
)
@add_options("shards", "overwrite", "token")
def top_up(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Add rows to the selection in this folder, from curate.")
    ],
    source: Annotated[str, typer.Argument(metavar="NEW_SOURCE", help="Read the new rows from here, as curate would.")],
    output: Output,
    changes: dict[str, Any],
    reselect: Annotated[
        bool,
        typer.Option("--reselect", help="Select anew from all rows, instead of keeping what was selected before."),
    ] = False,
    **options: Any,
) -> None:
    """Add new rows to a finished selection: only these are scored, and what was selected before stays."""
    quiet_models()
    from car_datasets.topping_up import top_up

    curated, drift = top_up(
        folder,
        source,
        output,
        reselect=reselect,
        token=options["token"],
        shard_dir=options["shards"],
        overwrite=options["overwrite"],
        **changes,
    )
    print_table(curated.report.to_table())
    echo(drift.sentence())
    say_where(output)
