"""The commands that publish a result and check one: push, verify."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from car_datasets.cli.app import add_options, app, one_line_errors, option, print_pushed
from car_datasets.utils.settings import CONFIG_NAME, SPLIT


@app.command(epilog="Example: car-datasets push out me/alpaca-car")
@one_line_errors
@add_options(
    "public",
    "check",
    "token",
    split=option(str, "Name of the split of the selected rows.", SPLIT),
    config_name=option(str, "Configuration to push to; all its splits have the same columns.", CONFIG_NAME),
    embeddings=option(bool, "Push the embeddings of the pool as well.", False, "--embeddings"),
)
def push(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A folder that `curate` wrote.")],
    repo: Annotated[str, typer.Argument(help="OWNER/NAME of a dataset repository; created if it does not exist.")],
    also: Annotated[
        str,
        typer.Option(
            help="More splits, separated by commas: scored (the pool), random_control, length_matched_control; or none."
        ),
    ] = "scored",
    **options: Any,
) -> None:
    """Push a result with its card and receipt in one commit, private by default; if interrupted, run it again."""
    from car_datasets.publishing.push import push_selection

    # A word for the empty list, because an empty argument is easily lost in a shell script.
    names = [name.strip() for name in also.split(",") if name.strip() not in ("", "none")]
    private = not options.pop("public")
    print_pushed(push_selection(folder, repo, also=names, private=private, **options))


@app.command(epilog="Example: car-datasets verify out --source alpaca_data.json")
@one_line_errors
@add_options(
    "token",
    source=option(str | None, "The file or folder that was curated; not needed for a Hub dataset."),
    rescore=option(int, "Also score this many rows again, drawn at random.", 0),
    seed=option(int, "Seed of the draw of --rescore.", 0),
    scorer=option(str | None, "For --rescore, if the scorer was a folder: its path."),
    tokenizer=option(str | None, "For --rescore, if the tokenizer was a folder: its path."),
    engine=option(str | None, "For --rescore, if an int8 encoder was used: its folder."),
    revision=option(str | None, "Branch, tag or commit of the repository."),
    config_name=option(str, "Configuration in the repository.", CONFIG_NAME),
    split=option(str, "Split in the repository with the selected rows.", SPLIT),
)
def verify(
    where: Annotated[
        str,
        typer.Argument(metavar="REPO_OR_DIR", help="Repository of a push, or folder of a result."),
    ],
    **options: Any,
) -> None:
    """Check a selection against its receipt: its source, its choice and, with --rescore, its scores.

    Names the first difference, with exit code 1.
    """
    from car_datasets.publishing.verification import verify

    found = verify(where, **options)
    for words in found.checked:
        typer.echo(f"right: {words}")
    for words in found.skipped:
        typer.echo(f"not checked: {words}")
    typer.echo("match" if found.matches else f"mismatch: {found.difference}")
    # 1 for a mismatch, so that scripts can tell it from a wrong call, which exits with 2.
    if not found.matches:
        raise typer.Exit(1)
