"""The commands of the pipeline: curate and demo run all of it, the others one stage; and explore, which shows it.

Does: parse, call the library, print.
Does not: hold logic, or import a heavy library before a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from car_datasets.cli.app import (
    FLAGS,
    NEW_PATH,
    Output,
    OutputFile,
    Source,
    add_options,
    app,
    echo,
    one_line_errors,
    quiet_models,
    recipe_options,
)
from car_datasets.cli.next_steps import (
    after_cluster,
    after_curate,
    after_demo,
    after_estimate,
    after_filled_shards,
    after_push,
    after_score,
    after_select,
)
from car_datasets.cli.printing import announce, print_report, print_result, suggest, tell
from car_datasets.cli.running import holds_result
from car_datasets.loading.templates import CLEAN_TEMPLATE, TEMPLATES
from car_datasets.recipe import HUB, OUTPUT, Recipe, listed
from car_datasets.utils.files import (
    Claim,
    claimed,
    fresh_file,
    fresh_folder,
    prepare_cache,
    refuse_in_source,
    sample_file,
)
from car_datasets.utils.processes import from_main
from car_datasets.utils.revisions import DEFAULT_ENCODER
from car_datasets.utils.settings import ESTIMATE_ROWS

if TYPE_CHECKING:
    from datasets import Dataset

    from car_datasets.clustering.fitting import FitSettings
    from car_datasets.loading.schemas import Schema
    from car_datasets.stages import Pipeline
    from car_datasets.utils.column_names import ColumnNames

# The groups of commands in the help.
ENTIRE = "The entire pipeline"
STAGES = "One stage of it"
PUBLISHING = "Publish and check a result"

READING = ("name", "split", "revision", "glob", "schema", "columns", "on_invalid", "score_thoughts")
SCORER = ("scorer", "scorer_revision", "tokenizer", "engine", "template", "dtype", "batch_tokens", "compile")


@app.command(
    rich_help_panel=ENTIRE, epilog="Example: car-datasets curate alpaca_data.json --output out --n1 1000 --n2 1"
)
@one_line_errors
@recipe_options(*FLAGS)
@add_options("shards", "overwrite", "public", "check", "token")
def curate(
    source: Source,
    output: Output,
    changes: dict[str, Any],
    config: Annotated[
        Path | None,
        typer.Option(
            help="Read a recipe in YAML, such as configs/default.yaml. Options win over it; the word none undoes a value."
        ),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(
            metavar="REPO",
            help="Also push the result to this dataset repository, and check before the run that this is possible.",
            rich_help_panel=HUB,
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
    # The file first, then the options, which therefore win.
    recipe = (Recipe() if config is None else Recipe.from_yaml(config)).changed(**changes)
    if push is not None:
        _refuse_push(push, private, token)
    # Interrupted after the result, or while it was pushed, the same command must not refuse its own result.
    again = options["overwrite"]
    if (push is not None or not again) and holds_result(output, source, recipe, token, again):
        tell(f"{output} holds this result already: it is complete, and the same settings and source made it.")
    else:
        report = curate(
            source, output, recipe, token=token, shard_dir=options["shards"], overwrite=options["overwrite"]
        ).report
        print_result(report, output)
    if push is None:
        suggest(after_curate(output, source))
    else:
        _push(output, push, private, check, token)


def _refuse_push(repo: str, private: bool, token: str | None) -> None:
    """Raise ValueError if a push would fail, before hours of work; only the main process asks the Hub."""
    from car_datasets.utils.hub import check_repository

    from_main(lambda: check_repository(repo, private, token, "dataset", "--push"))


def _push(folder: Path, repo: str, private: bool, check: bool, token: str | None) -> None:
    from car_datasets.publishing.push import push_selection

    pushed = from_main(lambda: push_selection(folder, repo, private=private, check=check, token=token))
    tell(f"Pushed to {pushed[0]}, commit {pushed[1]}.")
    if check:
        tell("Read back from there, every row equals the one that was pushed.")
    suggest(after_push(repo, pushed[1]))


@app.command(rich_help_panel=ENTIRE, epilog="Example: car-datasets demo --output demo")
@one_line_errors
@add_options("overwrite")
def demo(
    output: Output,
    budget: Annotated[int, typer.Option(help="Select this many rows in total.")] = 60,
    **options: Any,
) -> None:
    """Curate the sample of instruction rows that ships with the package, without a network."""
    # First of all, as the libraries alone take some seconds to load.
    announce(f"Scoring the sample and selecting {budget:,} of its rows takes some 30 seconds on two cores of a CPU.")
    quiet_models()
    from car_datasets.curation import curate

    if not options["overwrite"] and holds_result(output, str(sample_file()), Recipe(budget=budget), None):
        tell(f"{output} holds this result already: it is complete, and the same settings made it.")
    else:
        # The default scorer and the sample are part of the package, so this needs no network.
        print_result(curate(sample_file(), output, budget=budget, overwrite=options["overwrite"]).report, output)
    suggest(after_demo(output))


@app.command(rich_help_panel=STAGES, epilog="Example: car-datasets score alpaca_data.json --output scored.parquet")
@one_line_errors
@recipe_options(
    *(*SCORER, "embedder", "embedder_revision", "turns", "uncertainty", "parts", "embedding_dtype", *READING),
    *("index_column", "score_column", "embedding_column", "language_column"),
    cluster_column="Name the column that `cluster` will add, which the source must not have.",
)
@add_options("shards", "overwrite", "token")
def score(
    source: Source,
    changes: dict[str, Any],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Write this new file: .parquet, or .json for a list of rows in the original's format. Without it, "
            "only fill --shards.",
            **NEW_PATH,
        ),
    ] = None,
    embeddings: Annotated[
        bool, typer.Option(rich_help_panel=OUTPUT, help="Also add the embedding, which `cluster` reads.")
    ] = True,
    **options: Any,
) -> None:
    """Add iqs_score, iqs_tokens, iqs_truncated, iqs_status and embedding to the rows of a dataset."""
    quiet_models()

    shards = options["shards"]
    if output is not None:
        fresh_file(output, source, options["overwrite"])
    elif shards is None:
        raise ValueError(
            "Pass --output FILE, or --shards DIR for one worker of many, or both: there is nowhere to write to."
        )
    if shards is not None:
        from car_datasets.scoring.shards.storage import check_shards

        check_shards(shards, output, source)
    recipe = Recipe().changed(**changes)
    with contextlib.ExitStack() as held:
        # Workers that only fill shards need not meet, and each may write.
        claim = None if output is None else held.enter_context(claimed(output, ("score", source, recipe, embeddings)))
        _score(source, recipe, embeddings, claim, options)
    if output is None:
        suggest(after_filled_shards(source, str(shards), changes))
    else:
        suggest(after_score(output, changes, embeddings and output.suffix != ".json"))


def _score(source: str, recipe: Recipe, embeddings: bool, claim: Claim | None, options: dict[str, Any]) -> None:
    from car_datasets.curation import open_source
    from car_datasets.selection.published import rank_rows, refuse_original_names
    from car_datasets.stages import refuse_taken_columns, refuse_taken_language, resolve

    shards, token = options["shards"], options["token"]
    opened, dataset, schema, _ = open_source(source, recipe, token)
    # The original's files have no embeddings, so none are computed.
    as_original = claim is not None and claim.target.suffix == ".json"
    if as_original:
        refuse_original_names(dataset.column_names, {recipe.score_column: "score"})
    embed = embeddings and not as_original
    refuse_taken_columns(dataset.column_names, recipe, embed)  # before a model is downloaded
    refuse_taken_language(dataset.column_names, recipe)
    # After all checks of the rows, since this downloads the models.
    stages = resolve(recipe, token, embed=embed)
    dataset = _with_languages(dataset, schema, stages)
    if claim is None:
        _say_what_is_left(len(dataset), stages.fill_shards(dataset, shards, token=token))
        return
    scored = stages.score(dataset, token=token, shard_dir=shards)
    if as_original:
        scored = rank_rows(scored, recipe.score_column)
    # The original's format leaves out the row index that we added; an index column of the source stays.
    added = "" if recipe.index_column in opened.column_names else recipe.index_column
    _write(scored, claim, replace(recipe.names, index=added))
    _say_written(scored, claim.target)


def _with_languages(dataset: Dataset, schema: Schema, stages: Pipeline) -> Dataset:
    """Say which rows the scorer does not read, and add the column of languages if it was asked for."""
    from car_datasets.loading.languages import count_languages, languages_not_read

    languages = stages.read_languages(dataset, schema)
    if sentence := languages_not_read(count_languages(languages), stages.scorer.languages):
        echo(f"Warning: {sentence} `select --languages within` ranks within languages.", err=True)
    column = stages.recipe.names.language
    return dataset.add_column(column, languages) if column else dataset


@app.command(rich_help_panel=STAGES, epilog="Example: car-datasets estimate alpaca_data.json")
@one_line_errors
@recipe_options(*SCORER, *READING)
@add_options("token")
def estimate(
    source: Source,
    changes: dict[str, Any],
    rows: Annotated[int, typer.Option(help="Time this many rows.")] = ESTIMATE_ROWS,
    embeddings: Annotated[bool, typer.Option(help="Include the embedding if it comes from the same pass.")] = True,
    **options: Any,
) -> None:
    """Time some rows on this machine, and estimate how long the entire dataset takes to score."""
    quiet_models()
    import torch

    from car_datasets.curation import open_source
    from car_datasets.scoring.engines import estimate_scoring
    from car_datasets.stages import scorer_of

    recipe = Recipe().changed(**changes)
    dataset = open_source(source, recipe, options["token"]).dataset
    scorer = scorer_of(recipe, options["token"], embeddings)
    found = estimate_scoring(dataset, scorer, rows)
    tell(str(found))
    suggest(after_estimate(source, changes, found, torch.cuda.device_count()))


@app.command(rich_help_panel=STAGES, epilog="Example: car-datasets cluster scored.parquet --output clustered.parquet")
@one_line_errors
@recipe_options(
    *("schema", "columns", "k", "explained_variance", "n_init", "kmeans", "kmeans_sample"),
    embedder="Embed a file without embeddings with this sentence-transformers model."
    f"  [default: {DEFAULT_ENCODER.partition('/')[2]}]",
    template=f"Embed a file without embeddings by this text template: {listed(TEMPLATES)}.  [default: {CLEAN_TEMPLATE}]",
    seed="Seed k-means with this number.",
    embedding_column="Read the embeddings from this column.",
    cluster_column="Name the cluster column.",
    rule="With gain, also add near_clusters and near_weights, which `select --rule gain` reads.  [default: car]",
)
@add_options("overwrite")
def cluster(
    source: Source,
    output: OutputFile,
    changes: dict[str, Any],
    save_model: Annotated[
        Path | None,
        typer.Option(rich_help_panel=OUTPUT, help="Also save the cluster model into this folder.", **NEW_PATH),
    ] = None,
    **options: Any,
) -> None:
    """Add cluster and cluster_distance to scored rows.

    Files without embeddings, such as the original's, are embedded first.
    """
    quiet_models()
    from car_datasets.clustering.model import CLUSTER_MODEL_FILES

    fresh_file(output, source, options["overwrite"])
    if save_model is not None:
        fresh_folder(save_model, CLUSTER_MODEL_FILES, "--save-model")
        refuse_in_source(save_model, source, "--save-model")
    from car_datasets.stages import fit_settings

    recipe = Recipe().changed(**changes)
    fit = fit_settings(recipe)  # before the embedding, which may take hours
    run = ("cluster", source, recipe)
    with contextlib.ExitStack() as held:
        claim = held.enter_context(claimed(output, run))
        model_claim = None
        if save_model is not None:
            files = [save_model / name for name in CLUSTER_MODEL_FILES]
            model_claim = held.enter_context(claimed(save_model, run, files, "--save-model"))
        columns = _cluster(source, recipe, fit, claim, model_claim)
    suggest(after_cluster(output, columns, changes))


def _cluster(source: str, recipe: Recipe, fit: FitSettings, claim: Claim, model_claim: Claim | None) -> list[str]:
    """Write the clustered rows, and return their columns."""
    from car_datasets.stages import add_near_clusters, embed_where_missing, fit_clusters
    from car_datasets.utils.columns import refuse_overwrite

    dataset, names = _open(source, recipe.names), recipe.names
    refuse_overwrite(dataset.column_names, (names.cluster, names.distance), "cluster_column=... (--cluster-column)")
    dataset = embed_where_missing(dataset, recipe)
    model = fit_clusters(dataset, fit, names)
    labelled = add_near_clusters(recipe, model.label(dataset, across_processes=True), model)
    _write(labelled, claim, names)
    _say_written(labelled, claim.target)
    if model_claim is not None:
        folder = model_claim.target
        # After the labels, which are the result that was asked for; one process writes.
        from_main(model_claim.check)
        from_main(lambda: model.save_pretrained(folder))
    return labelled.column_names


@app.command(
    rich_help_panel=STAGES,
    epilog="Example: car-datasets select clustered.parquet --output selected.parquet --n1 1000 --n2 1",
)
@one_line_errors
@recipe_options(
    *("n1", "n2", "budget", "rule", "procedure", "allow_worse", "index_column", "schema", "columns"),
    *("against", "keep", "drop", "within", "balance", "quota", "budget_tokens", "budget_tokenizer", "like"),
    duplicates="Look for near-duplicates of a better row with drop, for equal rows alone with only-exact, and leave them "
    "out; select them all with keep.  [default: leave out those that are marked]",
    embedder="Embed the examples of --like with this model, which made the embeddings of the rows."
    f"  [default: {DEFAULT_ENCODER.partition('/')[2]}]",
    template=f"Embed the examples by this text template: {listed(TEMPLATES)}.  [default: {CLEAN_TEMPLATE}]",
    embedding_column="Read the embeddings from this column.",
    score_column="Read the scores from this column.",
    cluster_column="Read the clusters from this column.",
    seed="Seed the report's control samples with this number.",
    languages="With within, rank within each language, by --language-column; any other value compares all scores.",
    language_column="Read the languages from this column.  [default: language, with --languages within]",
)
@add_options("overwrite", "token")
def select(source: Source, output: OutputFile, changes: dict[str, Any], **options: Any) -> None:
    """Select rows from a scored, clustered dataset, and print the report."""
    fresh_file(output, source, options["overwrite"])
    from car_datasets.choosing import ranked, select_by
    from car_datasets.marking import ready_to_select
    from car_datasets.reporting.report import SelectionReport

    recipe = Recipe().changed(**changes)
    with claimed(output, ("select", source, recipe)) as claim:
        pool = ranked(recipe, ready_to_select(recipe, _open(source, recipe.names), options["token"]))
        chosen = select_by(recipe, pool)
        report = SelectionReport.from_selection(pool, chosen, names=recipe.names, seed=recipe.seed)
        _write(chosen, claim, recipe.names)
    print_report(report)
    _say_written(chosen, output)
    suggest(after_select(output))


@app.command(rich_help_panel=STAGES, epilog="Example: car-datasets explore out")
@one_line_errors
@recipe_options(
    "projection",
    index_column="Read the numbers of the rows from this column.  [default: that of the result]",
    **{
        f"{name}_column": f"Read the {name}s from this column.  [default: that of the result]"
        for name in ("score", "cluster", "embedding")
    },
)
def explore(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Show the result in this folder, which `curate` wrote.")
    ],
    changes: dict[str, Any],
    host: Annotated[str, typer.Option(help="Listen on this address.")] = "localhost",
    port: Annotated[int, typer.Option(help="Listen on this port, or on the next one that is free.")] = 5055,
) -> None:
    """Show a curated pool as a map in embedding-atlas.

    This needs an extra: pip install 'car-datasets[explore]'.
    """
    from car_datasets import exploring

    projection = Recipe().changed(**changes).projection
    exploring.explore(folder, host, port, projection, names=exploring.names_of(folder, changes))


def _say_what_is_left(rows: int, left: dict[str, int]) -> None:
    # `left` counts the rows that other workers have claimed and not finished.
    done = ", ".join(f"{folder} holds {rows - others:,} of {rows:,} rows" for folder, others in left.items())
    rest = "the others are with other workers" if any(left.values()) else "none is left"
    tell(f"{done}; {rest}.")


def _open(source: str, names: ColumnNames) -> Dataset:
    """Open a dataset that an earlier stage wrote, ours or the original's; its rows are not checked again."""
    from car_datasets.loading.sources import open_dataset
    from car_datasets.selection.published import from_original

    prepare_cache()
    return from_original(open_dataset(source), names)


def _write(dataset: Dataset, claim: Claim, names: ColumnNames) -> None:
    from car_datasets.results import write_table

    def write() -> None:
        claim.check()
        write_table(dataset, claim.target, names)

    from_main(write)


def _say_written(dataset: Dataset, file: Path) -> None:
    tell(f"{len(dataset):,} rows are in {file}.")
