"""The commands that speak with the Hub about a result: push, verify."""

from __future__ import annotations

from typing import Annotated

import typer

from car_datasets import cli_options as o
from car_datasets.cli_app import app, one_line_errors


@app.command(epilog="Example: car-datasets push out me/alpaca-car")
@one_line_errors
def push(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A folder that `curate` wrote.")],
    repo: Annotated[str, typer.Argument(help="OWNER/NAME of a dataset repository; made if it is not there.")],
    public: o.Public = False,
    split: Annotated[str, typer.Option(help="Name of the split of the selected rows.")] = "selected",
    also: Annotated[
        str,
        typer.Option(
            help="More splits, with commas: scored (the pool), random_control, length_matched_control; or none."
        ),
    ] = "scored",
    config_name: Annotated[str, typer.Option(help="Configuration: its splits all have the same columns.")] = "default",
    embeddings: Annotated[bool, typer.Option("--embeddings", help="With the embeddings of the pool.")] = False,
    check: o.Check = False,
    token: o.Token = None,
) -> None:
    """Push a result with card and receipt, in one commit, to a private repository; the same command again goes on."""
    from car_datasets.pushing import push_selection

    names = [name.strip() for name in also.split(",") if name.strip() not in ("", "none")]
    print_pushed(
        push_selection(
            folder,
            repo,
            split=split,
            also=names,
            private=not public,
            config_name=config_name,
            embeddings=embeddings,
            check=check,
            token=token,
        )
    )


@app.command(epilog="Example: car-datasets verify out --source alpaca_data.json")
@one_line_errors
def verify(
    where: Annotated[str, typer.Argument(metavar="REPO_OR_DIR", help="What `push` or `curate` wrote.")],
    source: Annotated[
        str | None, typer.Option(help="The file or folder that was curated, where it was no Hub dataset.")
    ] = None,
    rescore: Annotated[int, typer.Option(help="Also score so many rows again, drawn at random.")] = 0,
    seed: Annotated[int, typer.Option(help="Of that draw.")] = 0,
    scorer: Annotated[str | None, typer.Option(help="For --rescore, where it was a folder.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="For --rescore, where it was a folder.")] = None,
    engine: Annotated[str | None, typer.Option(help="For --rescore: the int8 encoder's folder.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of REPO.")] = None,
    config_name: Annotated[str, typer.Option(help="Configuration of REPO.")] = "default",
    split: Annotated[str, typer.Option(help="Split of REPO with the selected rows.")] = "selected",
    token: o.Token = None,
) -> None:
    """Check a selection against its receipt: source, choice, on request scores. Exit code 1 names the first difference."""
    from car_datasets.verification import verify

    found = verify(
        where,
        source=source,
        rescore=rescore,
        seed=seed,
        scorer=scorer,
        tokenizer=tokenizer,
        engine=engine,
        revision=revision,
        config_name=config_name,
        split=split,
        token=token,
    )
    for words in found.checked:
        typer.echo(f"right: {words}")
    for words in found.skipped:
        typer.echo(f"not checked: {words}")
    typer.echo("match" if found.matches else f"mismatch: {found.difference}")
    if not found.matches:
        raise typer.Exit(1)


def print_pushed(pushed: tuple[str, str]) -> None:
    """Where it is, and the commit."""
    typer.echo(f"Pushed to {pushed[0]}, commit {pushed[1]}.")
