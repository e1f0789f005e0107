"""The command that writes a selection as a training file.

Does: parse, call the library, print the file, the stanza for the trainer and the next step.
Does not: hold logic, or import a heavy library before the command runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from car_datasets.cli.app import NEW_PATH, add_options, app, one_line_errors
from car_datasets.cli.printing import Step, suggest, tell
from car_datasets.cli.running import echo
from car_datasets.cli.stages import PUBLISHING


@app.command(rich_help_panel=PUBLISHING, epilog="Example: car-datasets export out --for trl")
@one_line_errors
@add_options("overwrite")
def export(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Export the selection in this folder, which `curate` wrote.")
    ],
    trainer: Annotated[
        str, typer.Option("--for", help="Write what this trainer reads: trl, llama-factory, axolotl, openai or alpaca.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            *("--output", "-o"),
            help="Write this new file, which ends in .jsonl (.json for alpaca), or into this folder.  [default: DIR-TRAINER]",
            **NEW_PATH,
        ),
    ] = None,
    **options: Any,
) -> None:
    """Write the selected rows as a training file with the source's columns, and print the trainer's configuration."""
    from car_datasets.publishing.exporting import export_selection

    done = export_selection(folder, trainer, output, overwrite=options["overwrite"])
    tell(f"{done.rows:,} rows are in {done.file}, with the columns {', '.join(done.columns)}.")
    if done.left_out:
        echo(f"Not part of it: {', '.join(done.left_out)}.")
    echo(f"{f'For {trainer}' if done.info is None else done.info}:")
    for line in ("", *done.stanza.splitlines(), ""):
        echo(line)
    suggest([Step(done.next_step)])
