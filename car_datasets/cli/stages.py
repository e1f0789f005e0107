"""The commands of the pipeline: curate and demo run all of it; score, estimate, cluster, select and explore one stage.

Does: parse, call the library, print.
Does not: hold logic, or import a heavy library before a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from car_datasets.cli.app import (
    FLAGS,
    Output,
    OutputFile,
    Source,
    add_options,
    app,
    one_line_errors,
    print_pushed,
    print_table,
    quiet_models,
    recipe_options,
)
from car_datasets.recipe import Recipe
from car_datasets.utils.files import fresh_file, fresh_folder, sample_file
from car_datasets.utils.settings import ESTIMATE_ROWS

if TYPE_CHECKING:
    from datasets import Dataset

    from car_datasets.utils.column_names import ColumnNames

READING = ("name", "split", "revision", "glob", "schema", "columns", "on_invalid")
SCORING = ("scorer", "scorer_revision", "tokenizer", "engine", "template", "dtype", "batch_tokens", "compile")


@app.command(epilog="Example: car-datasets curate alpaca_data.json --output out --n1 1000 --n2 1")
@one_line_errors
@recipe_options(*FLAGS)
@add_options("shards", "public", "check", "token")
def curate(
    source: Source,
    output: Output,
    changes: dict[str, Any],
    config: Annotated[
        Path | None, typer.Option(help="A recipe in YAML, such as configs/default.yaml; options win over it.")
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(
            metavar="REPO",
            help="Also push the result to this dataset repository; before the run, check that this is possible.",
        ),
    ] = None,
    **options: Any,
) -> None:
    """Run the entire pipeline: load, score, embed, cluster, select and report."""
    quiet_models()
    from car_datasets.curation import curate

    private, check, token = not options["public"], options["check"], options["token"]
    # An ignored --public would look like a public result that never appears.
    if push is None and (check or not private):
        raise ValueError("--public and --check belong to --push REPO.")
    recipe = (Recipe() if config is None else Recipe.from_yaml(config)).changed(**changes)
    if push is not None:
        _refuse_push(push, private, token)
    # Interrupted between the result and the end of the push, the same command must push and not refuse its own result.
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
    from car_datasets.utils.hub import check_repository
    from car_datasets.utils.processes import from_main

    from_main(lambda: check_repository(repo, private, token, "dataset", "--push"))


def _is_there(folder: Path, source: str, settings: Recipe, token: str | None) -> bool:
    """Return True if the same command was interrupted after it wrote the result, while it was pushing."""
    from car_datasets.curation import made_by
    from car_datasets.results import read_result

    try:
        receipt = read_result(folder).receipt
    # Not a result, or an unfinished one: `curate` decides what to do with the folder.
    except ValueError:
        return False
    return receipt is not None and made_by(receipt, source, settings, token)


def _push(folder: Path, repo: str, private: bool, check: bool, token: str | None) -> None:
    from car_datasets.publishing.push import push_selection
    from car_datasets.utils.processes import from_main

    print_pushed(from_main(lambda: push_selection(folder, repo, private=private, check=check, token=token)))


@app.command(epilog="Example: car-datasets demo --output demo")
@one_line_errors
def demo(
    output: Output,
    budget: Annotated[int, typer.Option(help="Rows to select.")] = 60,
) -> None:
    """Curate the sample of instruction rows that ships with the package; needs no network."""
    quiet_models()
    from car_datasets.curation import curate

    # A budget, because the default of 1,000 rows by score is more than the sample has.
    report = curate(sample_file(), output, budget=budget).report
    print_table(report.to_table())
    _say_where(output)


def _say_where(folder: Path) -> None:
    from car_datasets.reporting.page import PAGE_FILE
    from car_datasets.results import SCORED_TABLE, SELECTED_JSON, SELECTED_TABLE, SUMMARY_FILE

    typer.echo(f"The selection is in {folder / SELECTED_TABLE} and {folder / SELECTED_JSON},")
    typer.echo(f"the figures are in {folder / PAGE_FILE} (open it in a browser) and {folder / SUMMARY_FILE},")
    typer.echo(f"and the entire pool with its scores is in {folder / SCORED_TABLE}.")


@app.command(epilog="Example: car-datasets score alpaca_data.json --output scored.parquet")
@one_line_errors
@recipe_options(
    *(*SCORING, "embedder", "embedder_revision", "turns", "uncertainty", "embedding_dtype", *READING),
    *("index_column", "score_column", "embedding_column"),
    cluster_column="Name of the column that `cluster` will add; the source must not have it.",
)
@add_options("shards", "token")
def score(
    source: Source,
    changes: dict[str, Any],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="A new .parquet file, or a .json file in the original's format; without it, only fill --shards.",
        ),
    ] = None,
    embeddings: Annotated[bool, typer.Option(help="Also add the embedding, which `cluster` reads.")] = True,
    **options: Any,
) -> None:
    """Add iqs_score, iqs_tokens, iqs_truncated, iqs_status and embedding; write Parquet, or the original's JSON."""
    quiet_models()

    shards, token = options["shards"], options["token"]
    if output is not None:
        fresh_file(output)
    elif shards is None:
        raise ValueError("Where to? Pass --output FILE, or --shards DIR for one worker of many, or both.")
    from car_datasets.curation import open_source
    from car_datasets.selection.published import rank_rows, refuse_taken
    from car_datasets.stages import refuse_taken_columns, resolve
    from car_datasets.utils.processes import start_processes

    recipe = Recipe().changed(**changes)
    if output is not None:  # workers that only fill shards need not meet
        start_processes()
    opened, dataset, *_ = open_source(source, recipe, token)
    # The original's files have no embeddings, so none are computed.
    as_original = output is not None and output.suffix == ".json"
    if as_original:
        refuse_taken(dataset.column_names, {recipe.score_column: "score"})
    embed = embeddings and not as_original
    refuse_taken_columns(dataset.column_names, recipe, embed)  # before a model is downloaded
    stages = resolve(recipe, token, embed=embed)
    if output is None:
        _say_what_is_left(len(dataset), stages.fill_shards(dataset, shards, token=token), shards)
        return
    scored = stages.score(dataset, token=token, shard_dir=shards)
    if as_original:
        scored = rank_rows(scored, recipe.score_column)
    # The original's format leaves out the row index that we added; an index column of the source stays.
    added = "" if recipe.index_column in opened.column_names else recipe.index_column
    _write(scored, output, replace(recipe.names, index=added))


@app.command(epilog="Example: car-datasets estimate alpaca_data.json")
@one_line_errors
@recipe_options(*SCORING, *READING)
@add_options("token")
def estimate(
    source: Source,
    changes: dict[str, Any],
    rows: Annotated[int, typer.Option(help="Rows to time.")] = ESTIMATE_ROWS,
    embeddings: Annotated[bool, typer.Option(help="Include the embedding, if it comes from the same pass.")] = True,
    **options: Any,
) -> None:
    """Time some rows on this machine, and estimate how long the entire dataset takes to score."""
    quiet_models()
    from car_datasets.curation import open_source
    from car_datasets.scoring.engines import estimate_scoring
    from car_datasets.stages import scorer_of

    recipe = Recipe().changed(**changes)
    dataset = open_source(source, recipe, options["token"]).dataset
    scorer = scorer_of(recipe, options["token"], embeddings)
    typer.echo(str(estimate_scoring(dataset, scorer, rows)))


@app.command(epilog="Example: car-datasets cluster scored.parquet --output clustered.parquet")
@one_line_errors
@recipe_options(
    *("k", "explained_variance", "n_init", "kmeans", "kmeans_sample"),
    embedder="For a file without embeddings: a sentence-transformers model.  [default: all-MiniLM-L6-v2]",
    template="For a file without embeddings: text template, clean-1 or paper.  [default: clean-1]",
    seed="Seed of k-means.",
    embedding_column="Name of the embedding column.",
    cluster_column="Name of the cluster column.",
)
def cluster(
    source: Source,
    output: OutputFile,
    changes: dict[str, Any],
    save_model: Annotated[Path | None, typer.Option(help="Also save the cluster model into this folder.")] = None,
) -> None:
    """Add cluster and cluster_distance; compute the embeddings first if the file has none, as the original's files."""
    quiet_models()
    from car_datasets.clustering.model import MODEL_FILES

    fresh_file(output)
    if save_model is not None:
        fresh_folder(save_model, MODEL_FILES, "--save-model")
    from car_datasets.stages import embed_where_missing, fit_clusters, fit_settings
    from car_datasets.utils.columns import refuse_overwrite
    from car_datasets.utils.processes import start_processes

    recipe = Recipe().changed(**changes)
    fit = fit_settings(recipe)  # before the embedding, which may take hours
    start_processes()
    dataset, names = _open(source), recipe.names
    refuse_overwrite(dataset.column_names, (names.cluster, names.distance), "cluster_column=... (--cluster-column)")
    dataset = embed_where_missing(dataset, names.embedding, recipe.embedder, recipe.template)
    model = fit_clusters(dataset, fit, names)
    labelled = model.label(dataset, across_processes=True)
    _write(labelled, output, names)
    if save_model is not None:
        from car_datasets.utils.processes import from_main

        # After the labels, which are the result that was asked for; one process writes.
        from_main(lambda: model.save_pretrained(save_model))


@app.command(epilog="Example: car-datasets select clustered.parquet --output selected.parquet --n1 1000 --n2 1")
@one_line_errors
@recipe_options(
    *("n1", "n2", "budget", "procedure", "score_column", "cluster_column", "index_column", "allow_worse"),
    seed="Seed of the report's control samples.",
)
def select(source: Source, output: OutputFile, changes: dict[str, Any]) -> None:
    """Select from a scored, clustered dataset and print the report."""
    fresh_file(output)
    from car_datasets.reporting.report import SelectionReport
    from car_datasets.stages import select_by

    recipe = Recipe().changed(**changes)
    pool = _open(source)
    chosen = select_by(recipe, pool)
    report = SelectionReport.from_selection(pool, chosen, names=recipe.names, seed=recipe.seed)
    _write(chosen, output, recipe.names)
    print_table(report.to_table())


@app.command(epilog="Example: car-datasets explore out")
@one_line_errors
@recipe_options("projection", "score_column", "cluster_column", "index_column", "embedding_column")
def explore(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `curate` wrote.")],
    changes: dict[str, Any],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "localhost",
    port: Annotated[int, typer.Option(help="Port; if it is taken, the next free one.")] = 5055,
) -> None:
    """Show a curated pool as a map in embedding-atlas; needs the extra: pip install 'car-datasets[explore]'."""
    from car_datasets import exploring

    recipe = Recipe().changed(**changes)
    exploring.explore(folder, host, port, recipe.projection, names=recipe.names)


def _say_what_is_left(rows: int, left: dict[str, int], shards: str) -> None:
    # `left` counts the rows that other workers have claimed and not finished.
    done = ", ".join(f"{folder} holds {rows - others:,} of {rows:,} rows" for folder, others in left.items())
    rest = "the others are with other workers" if any(left.values()) else "none is left"
    typer.echo(f"{done}; {rest}. car-datasets curate SOURCE --output DIR --shards {shards} resumes from there.")


def _open(source: str) -> Dataset:
    """Open a dataset that an earlier stage wrote, ours or the original's; its rows are not checked again."""
    from car_datasets.loading.sources import open_dataset
    from car_datasets.selection.published import from_original

    return from_original(open_dataset(source))


def _write(dataset: Dataset, output: Path, names: ColumnNames) -> None:
    from car_datasets.results import write_table
    from car_datasets.utils.processes import from_main

    from_main(lambda: write_table(dataset, output, names))
    typer.echo(f"{len(dataset):,} rows are in {output}.")
