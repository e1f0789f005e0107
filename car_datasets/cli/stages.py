"""The commands of the pipeline: `curate`, `demo`, and its single stages score, estimate, cluster, select, explore.

Does: parse, call the library, print.
Does not: hold logic, or import a heavy library before a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

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
    print_table,
    quiet_models,
    recipe_options,
)
from car_datasets.cli.publishing import print_pushed, push, verify
from car_datasets.cli.scorers import convert, evaluate, prepare, quantise, train

if TYPE_CHECKING:
    from datasets import Dataset

    from car_datasets.recipe import Recipe

READING = ("name", "split", "revision", "schema", "columns", "on_invalid")
SCORING = ("scorer", "scorer_revision", "tokenizer", "engine", "template", "dtype", "batch_tokens", "compile")


@app.command(epilog="Example: car-datasets score alpaca_data.json --output scored.parquet")
@one_line_errors
@recipe_options(
    *SCORING, "embedder", "embedder_revision", "turns", "uncertainty", "embedding_dtype", *READING, "score_column"
)
@add_options("shards", "token")
def score(
    source: Source,
    changes: dict[str, Any],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A new .parquet file, or .json. Without it, only fill --shards."),
    ] = None,
    embeddings: Annotated[bool, typer.Option(help="Also add the embedding, from the same pass, for `cluster`.")] = True,
    **options: Any,
) -> None:
    """Add iqs_score, iqs_tokens, iqs_truncated, iqs_status and embedding; write Parquet, or JSON as the original does."""
    quiet_models()
    from car_datasets.utils.files import fresh_file

    shards, token = options["shards"], options["token"]
    if output is not None:
        fresh_file(output)
    elif shards is None:
        raise ValueError("Where to? Pass --output FILE, or --shards DIR for one worker of many, or both.")
    from car_datasets.recipe import Recipe
    from car_datasets.selection.published import rank_rows, refuse_taken
    from car_datasets.stages import resolve

    recipe = Recipe().changed(**changes)
    opened, dataset = load_source(source, recipe, token)
    as_original = output is not None and output.suffix == ".json"
    if as_original:
        refuse_taken(dataset.column_names, {recipe.score_column: "score"})
    stages = resolve(recipe, token, embed=embeddings and not as_original)
    if output is None:
        _say_what_is_left(len(dataset), stages.fill_shards(dataset, shards, token=token), shards)
        return
    scored = stages.score(dataset, token=token, shard_dir=shards)
    if as_original:
        scored = rank_rows(scored, recipe.score_column)
    # A row index of the user's own stays in the original's format, one that we added does not.
    added = "" if recipe.index_column in opened.column_names else recipe.index_column
    _write(scored, output, score_column=recipe.score_column, index_column=added)


@app.command(epilog="Example: car-datasets estimate alpaca_data.json")
@one_line_errors
@recipe_options(*SCORING, *READING)
@add_options("token")
def estimate(
    source: Source,
    changes: dict[str, Any],
    rows: Annotated[int | None, typer.Option(help="Rows to time.  [default: a few hundred]")] = None,
    embeddings: Annotated[bool, typer.Option(help="With the embedding, if it comes from the same pass.")] = True,
    **options: Any,
) -> None:
    """Time some rows on this machine, and say how long the entire dataset would take to score."""
    quiet_models()
    from car_datasets.recipe import Recipe
    from car_datasets.scoring.engines import SAMPLE, estimate_scoring
    from car_datasets.stages import scorer_of

    recipe = Recipe().changed(**changes)
    _, dataset = load_source(source, recipe, options["token"])
    scorer = scorer_of(recipe, options["token"], embeddings)
    typer.echo(str(estimate_scoring(dataset, scorer, SAMPLE if rows is None else rows)))


@app.command(epilog="Example: car-datasets cluster scored.parquet --output clustered.parquet")
@one_line_errors
@recipe_options(
    *("k", "explained_variance", "seed", "n_init", "kmeans", "kmeans_sample"),
    embedder="For a file without embeddings: a sentence-transformers model.  [default: MiniLM]",
    template="Text that the embedder reads: clean-1, or paper.  [default: clean-1]",
    embedding_column="Name of the embedding column.",
    cluster_column="Name of the cluster column.",
)
def cluster(
    source: Source,
    output: OutputFile,
    changes: dict[str, Any],
    save_model: Annotated[Path | None, typer.Option(help="Also save the cluster model into this folder.")] = None,
) -> None:
    """Add cluster and cluster_distance; compute embeddings if the file has none, such as the original's scored files."""
    quiet_models()
    from car_datasets.utils.files import fresh_file, fresh_folder

    fresh_file(output)
    if save_model is not None:
        fresh_folder(save_model, ("cluster_model.json", "cluster_model.safetensors"), "--save-model")
    from car_datasets.clustering.model import ClusterModel
    from car_datasets.recipe import Recipe
    from car_datasets.stages import embed_where_missing, fit_settings
    from car_datasets.utils.columns import refuse_overwrite

    recipe = Recipe().changed(**changes)
    dataset, names = _open(source), recipe.names
    refuse_overwrite(dataset.column_names, (names.cluster, names.distance), "cluster_column=... (--cluster-column)")
    dataset = embed_where_missing(dataset, names.embedding, recipe.embedder, recipe.template)
    model = ClusterModel.fit(
        dataset,
        names.embedding,
        **fit_settings(recipe)._asdict(),
        output_column=names.cluster,
        distance_column=names.distance,
    )
    labelled = model.label(dataset, across_processes=True)
    _write(labelled, output, cluster_column=names.cluster, embedding_column=names.embedding)
    if save_model is not None:
        from car_datasets.utils.processes import from_main

        from_main(lambda: model.save_pretrained(save_model))


@app.command(epilog="Example: car-datasets select clustered.parquet --output selected.parquet --n1 1000 --n2 1")
@one_line_errors
@recipe_options(
    *("n1", "n2", "budget", "procedure", "score_column", "cluster_column", "index_column", "allow_worse"),
    seed="Seed of the report's control samples.",
)
def select(source: Source, output: OutputFile, changes: dict[str, Any]) -> None:
    """Select from a scored, clustered dataset and print the report."""
    from car_datasets.utils.files import fresh_file

    fresh_file(output)
    from car_datasets.recipe import Recipe
    from car_datasets.reporting.report import SelectionReport
    from car_datasets.stages import select_by

    recipe = Recipe().changed(**changes)
    pool = _open(source)
    names = {
        "score_column": recipe.score_column,
        "cluster_column": recipe.cluster_column,
        "index_column": recipe.index_column,
    }
    chosen = select_by(recipe, pool)
    report = SelectionReport.from_selection(pool, chosen, names=recipe.names, seed=recipe.seed)
    _write(chosen, output, **names)
    print_table(report.to_table())


@app.command(epilog="Example: car-datasets explore out")
@one_line_errors
@recipe_options("projection", "score_column", "cluster_column", "index_column", "embedding_column")
def explore(
    folder: Annotated[Path, typer.Argument(help="A folder that curate wrote.")],
    changes: dict[str, Any],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "localhost",
    port: Annotated[int, typer.Option(help="Port; if it is taken, the next free one.")] = 5055,
) -> None:
    """Open a curated pool in embedding-atlas, an extra, with our map and neighbours."""
    from car_datasets import exploring
    from car_datasets.recipe import Recipe
    from car_datasets.utils.column_names import ColumnNames

    projection = changes.pop("projection", Recipe.projection)
    names = ColumnNames(**{name.removesuffix("_column"): column for name, column in changes.items()})
    exploring.explore(folder, host, port, projection, names=names)


def _say_what_is_left(rows: int, left: dict[str, int], shards: str) -> None:
    done = ", ".join(f"{folder} holds {rows - others:,} of {rows:,} rows" for folder, others in left.items())
    rest = "the others are with other workers" if any(left.values()) else "none is left"
    typer.echo(f"{done}; {rest}. car-datasets curate SOURCE --output DIR --shards {shards} resumes from there.")


def load_source(source: str, recipe: Recipe, token: str | None) -> tuple[Dataset, Dataset]:
    """Return a source as it was opened, and with its rows checked and numbered."""
    from car_datasets.loading.sources import check_rows, open_dataset

    opened = open_dataset(
        source, recipe.name, recipe.split, revision=recipe.revision, token=token, columns=recipe.columns
    )
    dataset = check_rows(
        opened,
        schema=recipe.schema,
        columns=recipe.columns,
        on_invalid=recipe.on_invalid,
        index_column=recipe.index_column,
    )
    return opened, dataset


def _open(source: str) -> Dataset:
    from car_datasets.loading.sources import open_dataset
    from car_datasets.selection.published import from_original

    return from_original(open_dataset(source))


def _write(dataset: Dataset, output: Path, **names: str) -> None:
    from car_datasets.results import write_table
    from car_datasets.utils.column_names import ColumnNames
    from car_datasets.utils.processes import from_main

    columns = ColumnNames(**{name.removesuffix("_column"): column for name, column in names.items()})
    from_main(lambda: write_table(dataset, output, columns))
    typer.echo(f"{len(dataset):,} rows are in {output}.")


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
    from car_datasets.utils.hub import check_repository
    from car_datasets.utils.processes import from_main

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
    from car_datasets.publishing.push import push_selection
    from car_datasets.utils.processes import from_main

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
    from car_datasets.utils.files import sample_file

    report = curate(sample_file(), output, budget=budget).report
    print_table(report.to_table())
    _say_where(output)


def _say_where(folder: Path) -> None:
    from car_datasets.reporting.page import PAGE_FILE
    from car_datasets.results import SCORED_TABLE, SELECTED_JSON, SELECTED_TABLE, SUMMARY_FILE

    typer.echo(f"The selection is in {folder / SELECTED_TABLE} and {folder / SELECTED_JSON},")
    typer.echo(f"the figures are in {folder / PAGE_FILE} (open it in a browser) and {folder / SUMMARY_FILE},")
    typer.echo(f"and the entire pool with its scores is in {folder / SCORED_TABLE}.")
