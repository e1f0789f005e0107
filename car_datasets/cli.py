"""`car-datasets`: parses a command line, calls the library, prints one line for a user's mistake (exit code 2).

Does not hold logic. Heavy libraries are imported in the commands, so that `--help` answers at once. The commands of single
stages are in cli_stages.py, of scorers in cli_scorers.py, the options in cli_options.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from car_datasets import cli_options as o
from car_datasets.cli_app import app, one_line_errors, print_table, quiet_models
from car_datasets.cli_hub import print_pushed, push, verify
from car_datasets.cli_options import parse_clusters, parse_columns, parse_count
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
def curate(
    source: o.Source,
    output: o.Output,
    config: Annotated[
        Path | None, typer.Option(help="A recipe, such as configs/default.yaml; options win over it.")
    ] = None,
    n1: o.N1 = None,
    n2: o.N2 = None,
    budget: o.Budget = None,
    k: o.Clusters = None,
    name: o.Name = None,
    split: o.Split = None,
    revision: o.Revision = None,
    token: o.Token = None,
    schema: o.SchemaName = "auto",
    columns: o.Columns = None,
    on_invalid: o.OnInvalid = "error",
    scorer: o.ScorerModel = None,
    tokenizer: o.Tokenizer = None,
    embedder: o.Embedder = None,
    engine: o.Engine = None,
    procedure: o.Procedure = None,
    n_init: o.Runs = None,
    kmeans: o.KMeans = None,
    kmeans_sample: o.KMeansSample = None,
    turns: o.Turns = None,
    seed: o.Seed = None,
    projection: o.Projection = None,
    dtype: o.Dtype = None,
    embedding_dtype: o.EmbeddingDtype = None,
    batch_tokens: o.BatchTokens = None,
    compile: o.Compile = False,
    index_column: o.IndexColumn = None,
    score_column: o.ScoreColumn = None,
    embedding_column: o.EmbeddingColumn = None,
    cluster_column: o.ClusterColumn = None,
    allow_worse: o.AllowWorse = False,
    shards: o.Shards = None,
    no_embeddings: Annotated[bool, typer.Option("--no-embeddings", help="Leave them out of scored.parquet.")] = False,
    push: Annotated[
        str | None, typer.Option(metavar="REPO", help="Push the result there; asks first whether it may.")
    ] = None,
    public: o.Public = False,
    check: o.Check = False,
) -> None:
    """Load, score, embed, cluster, select and report, in one go."""
    quiet_models()
    from car_datasets.curation import curate
    from car_datasets.recipe import Recipe

    if push is None and (public or check):
        raise ValueError("--public and --check belong to --push REPO.")
    recipe = Recipe() if config is None else Recipe.from_yaml(config)
    given = {
        "n1": parse_count(n1),
        "n2": n2,
        "budget": budget,
        "k": parse_clusters(k),
        "name": name,
        "split": split,
        "revision": revision,
        "scorer": scorer,
        "embedder": embedder,
        "tokenizer": tokenizer,
        "engine": engine,
        "procedure": procedure,
        "n_init": n_init,
        "kmeans": kmeans,
        "kmeans_sample": kmeans_sample,
        "turns": turns,
        "seed": seed,
        "projection": projection,
        "dtype": dtype,
        "embedding_dtype": embedding_dtype,
        "batch_tokens": batch_tokens,
        "compile": compile or None,
        "index_column": index_column,
        "score_column": score_column,
        "embedding_column": embedding_column,
        "cluster_column": cluster_column,
        "columns": parse_columns(columns) or None,
        "schema": None if schema == "auto" else schema,
        "on_invalid": None if on_invalid == "error" else on_invalid,
        "allow_worse": allow_worse or None,
        "keep_embeddings": False if no_embeddings else None,
    }
    changes = {key: value for key, value in given.items() if value is not None}
    if push is not None:
        _refuse_push(push, not public, token)
    if push is not None and _is_there(output, source, recipe.changed(**changes), token):
        typer.echo(f"{output} holds this result already.")
    else:
        report = curate(source, output, recipe, token=token, shard_dir=shards, **changes).report
        print_table(report.to_table())
        _say_where(output)
    if push is not None:
        _push(output, push, not public, check, token)


def _refuse_push(repo: str, private: bool, token: str | None) -> None:
    """What a push could fail by, found before hours of work; by the main process of several."""
    from car_datasets.parallel import from_main
    from car_datasets.repositories import check_repository

    from_main(lambda: check_repository(repo, private, token, "dataset", "--push"))


def _is_there(folder: Path, source: str, settings: Recipe, token: str | None) -> bool:
    """Whether the same command was killed, or failed, when it had the result and was pushing it."""
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
    output: o.Output,
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
    typer.echo(f"and the whole pool with its scores is in {folder / SCORED_TABLE}.")
