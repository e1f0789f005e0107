"""`car-datasets`: parses a command line, calls the library, and prints a user's mistake as one line (exit code 2).

Does: hold the commands `curate` and `demo`, and gather those of the other modules.
Does not: hold logic, or import a heavy library before a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from car_datasets.cli_app import app, one_line_errors, print_table, quiet_models
from car_datasets.cli_hub import print_pushed, push, verify
from car_datasets.cli_options import FLAGS, Output, Source, add_options, recipe_options
from car_datasets.cli_scorers import convert, evaluate, prepare, quantise, train
from car_datasets.cli_stages import cluster, estimate, explore, score, select

if TYPE_CHECKING:
    from car_datasets.recipe import Recipe

__all__ = [
    "app",
    "cluster",
    "convert",
    "curate",
    "demo",
    "estimate",
    "evaluate",
    "explore",
    "prepare",
    "push",
    "quantise",
    "score",
    "select",
    "train",
    "verify",
]


@app.command(epilog="Example: car-datasets curate alpaca_data.json --output out --n1 1000 --n2 1")
@one_line_errors
@recipe_options(*FLAGS)
@add_options("shards", "public", "check", "token")
def curate(
    source: Source,
    output: Output,
    changes: dict[str, Any],
    config: Annotated[
        Path | None, typer.Option(help="A recipe, such as configs/default.yaml; options win over it.")
    ] = None,
    push: Annotated[
        str | None, typer.Option(metavar="REPO", help="Push the result there; checks first that it can.")
    ] = None,
    **options: Any,
) -> None:
    """Load, score, embed, cluster, select and report, in one go."""
    quiet_models()
    from car_datasets.curation import curate
    from car_datasets.recipe import Recipe

    private, check, token = not options["public"], options["check"], options["token"]
    if push is None and (check or not private):
        raise ValueError("--public and --check belong to --push REPO.")
    recipe = (Recipe() if config is None else Recipe.from_yaml(config)).changed(**changes)
    if push is not None:
        _refuse_push(push, private, token)
    if push is not None and _is_there(output, source, recipe, token):
        typer.echo(f"{output} holds this result already.")
    else:
        report = curate(source, output, recipe, token=token, shard_dir=options["shards"]).report
        print_table(report.to_table())
        _say_where(output)
    if push is not None:
        _push(output, push, private, check, token)


def _refuse_push(repo: str, private: bool, token: str | None) -> None:
    """Raise ValueError if a push would fail, before hours of work; only the main process asks the Hub."""
    from car_datasets.parallel import from_main
    from car_datasets.repositories import check_repository

    from_main(lambda: check_repository(repo, private, token, "dataset", "--push"))


def _is_there(folder: Path, source: str, settings: Recipe, token: str | None) -> bool:
    """Return True if the same command was interrupted after it wrote the result, while it was pushing."""
    from car_datasets.curation import made_by
    from car_datasets.results import read_result

    try:
        receipt = read_result(folder).receipt
    except ValueError:
        return False
    return receipt is not None and made_by(receipt, source, settings, token)


def _push(folder: Path, repo: str, private: bool, check: bool, token: str | None) -> None:
    from car_datasets.parallel import from_main
    from car_datasets.pushing import push_selection

    print_pushed(from_main(lambda: push_selection(folder, repo, private=private, check=check, token=token)))


@app.command(epilog="Example: car-datasets demo --output demo")
@one_line_errors
def demo(
    output: Output,
    budget: Annotated[int, typer.Option(help="Rows to select.")] = 60,
) -> None:
    """Curate the sample of instruction rows that comes with the package; needs no network."""
    quiet_models()
    from car_datasets.curation import curate
    from car_datasets.hub import sample_file

    report = curate(sample_file(), output, budget=budget).report
    print_table(report.to_table())
    _say_where(output)


def _say_where(folder: Path) -> None:
    from car_datasets.report_page import PAGE_FILE
    from car_datasets.results import SCORED_TABLE, SELECTED_JSON, SELECTED_TABLE, SUMMARY_FILE

    typer.echo(f"The selection is in {folder / SELECTED_TABLE} and {folder / SELECTED_JSON},")
    typer.echo(f"the figures are in {folder / PAGE_FILE} (open it in a browser) and {folder / SUMMARY_FILE},")
    typer.echo(f"and the entire pool with its scores is in {folder / SCORED_TABLE}.")
