"""The commands of single stages: score, estimate, cluster, select, explore."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from car_datasets import cli_options as o
from car_datasets.cli_app import app, one_line_errors, print_table, quiet_models
from car_datasets.cli_options import parse_clusters, parse_columns, parse_count

if TYPE_CHECKING:
    from datasets import Dataset


@app.command(epilog="Example: car-datasets score alpaca_data.json --output scored.parquet")
@one_line_errors
def score(
    source: o.Source,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A new .parquet file, or .json. Without it, fill --shards and no more."),
    ] = None,
    scorer: o.ScorerModel = None,
    tokenizer: o.Tokenizer = None,
    embedder: o.Embedder = None,
    engine: o.Engine = None,
    turns: o.Turns = None,
    embeddings: Annotated[bool, typer.Option(help="Also add the embedding, from the same pass, for `cluster`.")] = True,
    uncertainty: Annotated[
        bool, typer.Option("--uncertainty", help="Also add iqs_score_std: how far the members of the head disagree.")
    ] = False,
    dtype: o.Dtype = None,
    embedding_dtype: o.EmbeddingDtype = None,
    batch_tokens: o.BatchTokens = None,
    compile: o.Compile = False,
    name: o.Name = None,
    split: o.Split = None,
    revision: o.Revision = None,
    token: o.Token = None,
    schema: o.SchemaName = "auto",
    columns: o.Columns = None,
    on_invalid: o.OnInvalid = "error",
    score_column: o.ScoreColumn = None,
    shards: o.Shards = None,
) -> None:
    """Add iqs_score, iqs_tokens, iqs_truncated, iqs_status and embedding; write Parquet, or JSON as the original does."""
    quiet_models()
    from car_datasets.results import fresh_file

    if output is not None:
        fresh_file(output)
    elif shards is None:
        raise ValueError("Where to? Pass --output FILE, or --shards DIR for one worker of many, or both.")
    from car_datasets.hub import DEFAULT_SCORER
    from car_datasets.loading import load_instructions, open_dataset
    from car_datasets.original import rank_rows, refuse_taken
    from car_datasets.recipe import Recipe
    from car_datasets.recipe_stages import fill_shards_of, score_and_embed

    reading: dict[str, Any] = {"schema": schema, "columns": parse_columns(columns), "on_invalid": on_invalid}
    opened = open_dataset(source, name, split, revision=revision, token=token, columns=reading["columns"])
    dataset = load_instructions(opened, **reading)
    names: dict[str, Any] = {"score_column": score_column or "iqs_score"}
    model: dict[str, Any] = {"scorer": scorer or DEFAULT_SCORER, "tokenizer": tokenizer, "uncertainty": uncertainty}
    model |= {"embedder": embedder, "turns": turns or "mean"}
    speed: dict[str, Any] = {
        "dtype": dtype or "float32",
        "embedding_dtype": embedding_dtype or "float32",
        "compile": compile,
    }
    recipe = Recipe(**model, engine=engine, batch_tokens=batch_tokens, **speed, **names, **reading)
    if output is None:
        _say_what_is_left(len(dataset), fill_shards_of(dataset, recipe, str(shards), token, embeddings), str(shards))
        return
    if as_original := output.suffix == ".json":
        refuse_taken(dataset.column_names, {names["score_column"]: "score"})
    scored = score_and_embed(dataset, recipe, token, embed=embeddings and not as_original, shard_dir=shards)
    added = "" if "source_index" in opened.column_names else "source_index"  # a row number of the user's own stays
    _write(rank_rows(scored, **names) if as_original else scored, output, index_column=added, **names)


@app.command(epilog="Example: car-datasets estimate alpaca_data.json")
@one_line_errors
def estimate(
    source: o.Source,
    rows: Annotated[int, typer.Option(help="Rows to time.")] = 256,
    scorer: o.ScorerModel = None,
    tokenizer: o.Tokenizer = None,
    engine: o.Engine = None,
    embeddings: Annotated[bool, typer.Option(help="With the embedding, where it comes from the same pass.")] = True,
    dtype: o.Dtype = None,
    batch_tokens: o.BatchTokens = None,
    compile: o.Compile = False,
    name: o.Name = None,
    split: o.Split = None,
    revision: o.Revision = None,
    token: o.Token = None,
    schema: o.SchemaName = "auto",
    columns: o.Columns = None,
    on_invalid: o.OnInvalid = "error",
) -> None:
    """Time some rows on this machine, and say how long the whole dataset would take to score."""
    quiet_models()
    from car_datasets.estimation import estimate_scoring
    from car_datasets.hub import DEFAULT_SCORER
    from car_datasets.loading import load_instructions
    from car_datasets.recipe import Recipe
    from car_datasets.recipe_stages import scorer_of

    reading: dict[str, Any] = {"schema": schema, "columns": parse_columns(columns), "on_invalid": on_invalid}
    speed: dict[str, Any] = {"dtype": dtype or "float32", "batch_tokens": batch_tokens, "compile": compile}
    recipe = Recipe(scorer=scorer or DEFAULT_SCORER, tokenizer=tokenizer, engine=engine, **speed, **reading)
    dataset = load_instructions(source, name, split, revision=revision, token=token, **reading)
    typer.echo(str(estimate_scoring(dataset, scorer_of(recipe, token, embeddings), rows)))


@app.command(epilog="Example: car-datasets cluster scored.parquet --output clustered.parquet")
@one_line_errors
def cluster(
    source: o.Source,
    output: o.OutputFile,
    k: o.Clusters = None,
    explained_variance: Annotated[float, typer.Option(help="Share of variance that PCA keeps.")] = 0.95,
    seed: o.Seed = None,
    n_init: o.Runs = None,
    kmeans: o.KMeans = None,
    kmeans_sample: o.KMeansSample = None,
    embedder: Annotated[
        str | None,
        typer.Option(help="For a file without embeddings: a sentence-transformers model.  [default: MiniLM]"),
    ] = None,
    template: Annotated[str, typer.Option(help="Text that the embedder reads: clean-1, or paper.")] = "clean-1",
    embedding_column: o.EmbeddingColumn = None,
    cluster_column: o.ClusterColumn = None,
    save_model: Annotated[Path | None, typer.Option(help="Also save the cluster model into this folder.")] = None,
) -> None:
    """Add cluster and cluster_distance; embeddings are computed where there are none, as in the original's scored files."""
    quiet_models()
    from car_datasets.results import fresh_file, fresh_folder

    fresh_file(output)
    if save_model is not None:
        fresh_folder(save_model, ("cluster_model.json", "cluster_model.safetensors"), "--save-model")
    from car_datasets.clustering import ClusterModel
    from car_datasets.recipe_stages import embed_where_missing
    from car_datasets.rows import refuse_overwrite

    dataset, column, vectors = _open(source), cluster_column or "cluster", embedding_column or "embedding"
    refuse_overwrite(dataset.column_names, (column, f"{column}_distance"), "cluster_column=... (--cluster-column)")
    dataset = embed_where_missing(dataset, vectors, embedder, template)
    model = ClusterModel.fit(
        dataset,
        vectors,
        k="sqrt" if k is None else parse_clusters(k) or 0,  # 0 is a mistake of the user's, to be named
        explained_variance=explained_variance,
        seed=42 if seed is None else seed,
        n_init=1 if n_init is None else n_init,
        kmeans="torch" if kmeans is None else kmeans,
        kmeans_sample=256 if kmeans_sample is None else kmeans_sample,
        output_column=column,
        distance_column=f"{column}_distance",
    )
    _write(model.label(dataset, across_processes=True), output, cluster_column=column, embedding_column=vectors)
    if save_model is not None:
        from car_datasets.parallel import from_main

        from_main(lambda: model.save_pretrained(save_model))


@app.command(epilog="Example: car-datasets select clustered.parquet --output selected.parquet --n1 1000 --n2 1")
@one_line_errors
def select(
    source: o.Source,
    output: o.OutputFile,
    n1: o.N1 = None,
    n2: o.N2 = None,
    budget: o.Budget = None,
    procedure: o.Procedure = None,
    score_column: o.ScoreColumn = None,
    cluster_column: o.ClusterColumn = None,
    index_column: o.IndexColumn = None,
    allow_worse: o.AllowWorse = False,
) -> None:
    """Select from a scored, clustered dataset and print the report."""
    from car_datasets.results import fresh_file

    fresh_file(output)
    from car_datasets.curation import select_by
    from car_datasets.recipe import Recipe
    from car_datasets.reporting import SelectionReport

    pool = _open(source)
    names: dict[str, Any] = {
        "score_column": score_column or "iqs_score",
        "cluster_column": cluster_column or "cluster",
        "index_column": index_column or "source_index",
    }
    given = {"n1": parse_count(n1), "n2": n2, "budget": budget, "procedure": procedure, "allow_worse": allow_worse}
    recipe = Recipe().changed(**names, **{name: value for name, value in given.items() if value is not None})
    chosen = select_by(recipe, pool)
    report = SelectionReport.from_selection(pool, chosen, **names)
    _write(chosen, output, **names)
    print_table(report.to_table())


@app.command(epilog="Example: car-datasets explore out")
@one_line_errors
def explore(
    folder: Annotated[Path, typer.Argument(help="A folder that curate wrote.")],
    host: Annotated[str, typer.Option(help="Where to listen.")] = "localhost",
    port: Annotated[int, typer.Option(help="The next free one is taken.")] = 5055,
    projection: o.Projection = None,
    score_column: o.ScoreColumn = None,
    cluster_column: o.ClusterColumn = None,
    index_column: o.IndexColumn = None,
    embedding_column: o.EmbeddingColumn = None,
) -> None:
    """Open a curated pool in embedding-atlas, an extra, with our map and neighbours."""
    from car_datasets import exploring

    names = {
        "score_column": score_column,
        "cluster_column": cluster_column,
        "index_column": index_column,
        "embedding_column": embedding_column,
    }
    given = {name: column for name, column in names.items() if column is not None}
    exploring.explore(folder, host, port, projection or "pca", **given)


def _say_what_is_left(rows: int, left: dict[str, int], shards: str) -> None:
    done = ", ".join(f"{folder} holds {rows - others:,} of {rows:,} rows" for folder, others in left.items())
    rest = "the others are with other workers" if any(left.values()) else "none is left"
    typer.echo(f"{done}; {rest}. car-datasets curate SOURCE --output DIR --shards {shards} goes on from there.")


def _open(source: str) -> Dataset:
    from car_datasets.loading import open_dataset
    from car_datasets.original import from_original

    return from_original(open_dataset(source))


def _write(dataset: Dataset, output: Path, **names: str) -> None:
    from car_datasets.column_names import ColumnNames
    from car_datasets.parallel import from_main
    from car_datasets.results import write_table

    columns = ColumnNames(**{name.removesuffix("_column"): column for name, column in names.items()})
    from_main(lambda: write_table(dataset, output, columns))
    typer.echo(f"{len(dataset):,} rows are in {output}.")
