"""The commands that publish a result and check one: push, verify."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from car_datasets.cli.app import add_options, app, one_line_errors, option, print_pushed
from car_datasets.recipe import HUB, SCORING
from car_datasets.utils.settings import CONFIG_NAME, SPLIT

PUBLISHING = "Publish and check a result"  # the group of these commands in the help


@app.command(rich_help_panel=PUBLISHING, epilog="Example: car-datasets push out me/alpaca-car")
@one_line_errors
@add_options(
    "public",
    "check",
    "token",
    split=option(str, "Name the split of the selected rows.", SPLIT),
    config_name=option(str, "Push to this configuration, whose splits all have the same columns.", CONFIG_NAME),
    embeddings=option(bool, "Push the embeddings of the pool as well.", False, "--embeddings"),
)
def push(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Push the result in this folder, which `curate` wrote.")],
    repo: Annotated[
        str, typer.Argument(help="Push to this dataset repository, OWNER/NAME, which is created if needed.")
    ],
    also: Annotated[
        str,
        typer.Option(
            help="Push these splits too, separated by commas: scored (the entire pool), random_control and "
            "length_matched_control, or none of them with the word none."
        ),
    ] = "scored",
    **options: Any,
) -> None:
    """Push a result with its card and receipt in one commit, into a private repository by default.

    If the push is interrupted, run the same command again.
    """
    from car_datasets.publishing.push import push_selection

    # A word for the empty list, because an empty argument is easily lost in a shell script.
    names = [name.strip() for name in also.split(",") if name.strip() not in ("", "none")]
    private = not options.pop("public")
    print_pushed(push_selection(folder, repo, also=names, private=private, **options))


@app.command(rich_help_panel=PUBLISHING, epilog="Example: car-datasets verify out --source alpaca_data.json")
@one_line_errors
@add_options(
    "token",
    source=option(
        str | None, "Compare with this file or folder, which was curated. A Hub dataset is found without it."
    ),
    rescore=option(int, "Also score this many rows again, drawn at random.", 0, panel=SCORING),
    seed=option(int, "Seed the draw of --rescore with this number.", 0, panel=SCORING),
    scorer=option(str | None, "Rescore with the scorer in this folder, if it was a folder.", panel=SCORING),
    tokenizer=option(str | None, "Rescore with the tokenizer in this folder, if it was a folder.", panel=SCORING),
    engine=option(str | None, "Rescore with the int8 encoder in this folder, if one was used.", panel=SCORING),
    revision=option(str | None, "Check this branch, tag or commit of the repository.", panel=HUB),
    config_name=option(str, "Check this configuration of the repository.", CONFIG_NAME, panel=HUB),
    split=option(str, "Check the selected rows in this split of the repository.", SPLIT, panel=HUB),
)
def verify(
    where: Annotated[
        str,
        typer.Argument(
            metavar="REPO_OR_DIR", help="Check this repository, which `push` wrote, or this folder of a result."
        ),
    ],
    **options: Any,
) -> None:
    """Check a selection against its receipt: its source, its choice and, with --rescore, its scores.

    A difference is printed, and the exit code is then 1.
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
