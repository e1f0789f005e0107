"""The commands for results on the Hub: push, verify."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from car_datasets.cli.app import add_options, app, one_line_errors, option


@app.command(epilog="Example: car-datasets push out me/alpaca-car")
@one_line_errors
@add_options(
    "public",
    "check",
    "token",
    split=option(str, "Name of the split of the selected rows.", "selected"),
    config_name=option(str, "Configuration: its splits all have the same columns.", "default"),
    embeddings=option(bool, "Push the embeddings of the pool as well.", False, "--embeddings"),
)
def push(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A folder that `curate` wrote.")],
    repo: Annotated[str, typer.Argument(help="OWNER/NAME of a dataset repository; made if it does not exist.")],
    also: Annotated[
        str,
        typer.Option(
            help="More splits, with commas: scored (the pool), random_control, length_matched_control; or none."
        ),
    ] = "scored",
    **options: Any,
) -> None:
    """Push a result with card and receipt, in one commit, to a private repository; run it again to resume."""
    from car_datasets.publishing.push import push_selection

    names = [name.strip() for name in also.split(",") if name.strip() not in ("", "none")]
    private = not options.pop("public")
    print_pushed(push_selection(folder, repo, also=names, private=private, **options))


@app.command(epilog="Example: car-datasets verify out --source alpaca_data.json")
@one_line_errors
@add_options(
    "token",
    source=option(str | None, "The file or folder that was curated, unless it was a Hub dataset."),
    rescore=option(int, "Also score so many rows again, drawn at random.", 0),
    seed=option(int, "Seed of that draw.", 0),
    scorer=option(str | None, "For --rescore, if the scorer was a folder."),
    tokenizer=option(str | None, "For --rescore, if the tokenizer was a folder."),
    engine=option(str | None, "For --rescore: the folder of the int8 encoder."),
    revision=option(str | None, "Branch, tag or commit of REPO."),
    config_name=option(str, "Configuration of REPO.", "default"),
    split=option(str, "Split of REPO with the selected rows.", "selected"),
)
def verify(
    where: Annotated[str, typer.Argument(metavar="REPO_OR_DIR", help="What `push` or `curate` wrote.")],
    **options: Any,
) -> None:
    """Check a selection against its receipt: source, choice, on request scores. Exit code 1 names the first difference."""
    from car_datasets.publishing.verification import verify

    found = verify(where, **options)
    for words in found.checked:
        typer.echo(f"right: {words}")
    for words in found.skipped:
        typer.echo(f"not checked: {words}")
    typer.echo("match" if found.matches else f"mismatch: {found.difference}")
    if not found.matches:
        raise typer.Exit(1)


def print_pushed(pushed: tuple[str, str]) -> None:
    """Print the repository and the commit of a push."""
    typer.echo(f"Pushed to {pushed[0]}, commit {pushed[1]}.")
