"""`car-datasets`: parses a command line, calls the library, prints one line for a user's mistake (exit code 2).

Does not hold logic. Heavy libraries are imported in the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from car_datasets import cli_options as o
from car_datasets.cli_options import parse_clusters, parse_columns, parse_count
from car_datasets.version import __version__

if TYPE_CHECKING:
    from datasets import Dataset

app = typer.Typer(
    name="car-datasets",
    help="Pick the best and most diverse subset of an instruction-tuning dataset.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    """A user's mistake ends with one line and exit code 2; anything else is our bug and keeps its traceback."""

    @wraps(command)
    def run(**arguments: Any) -> None:
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        try:
            command(**arguments)
        except (ValueError, OSError) as error:
            typer.echo(f"car-datasets: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from error

    return run


@app.command(epilog="Example: car-datasets curate alpaca_data.json --output out --n1 1000 --n2 1")
@_one_line_errors
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
    procedure: o.Procedure = None,
    n_init: o.Runs = None,
    turns: Annotated[str | None, typer.Option(help="Score of a chat: mean, min, last or sum.  [default: mean]")] = None,
    seed: o.Seed = None,
    index_column: o.IndexColumn = None,
    score_column: o.ScoreColumn = None,
    embedding_column: o.EmbeddingColumn = None,
    cluster_column: o.ClusterColumn = None,
    allow_worse: o.AllowWorse = False,
    no_embeddings: Annotated[bool, typer.Option("--no-embeddings", help="Leave them out of scored.parquet.")] = False,
) -> None:
    """Load, score, embed, cluster, select and report, in one go."""
    _quiet_models()
    from car_datasets.curation import curate
    from car_datasets.recipe import Recipe

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
        "procedure": procedure,
        "n_init": n_init,
        "turns": turns,
        "seed": seed,
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
    report = curate(source, output, recipe, token=token, **{key: v for key, v in given.items() if v is not None}).report
    _print(report.to_table())
    _say_where(output)


@app.command(epilog="Example: car-datasets demo --output demo")
@_one_line_errors
def demo(
    output: o.Output,
    budget: Annotated[int, typer.Option(help="Rows to select.")] = 60,
) -> None:
    """Curate the sample of instruction rows that comes with the package; needs no network."""
    _quiet_models()
    from car_datasets.curation import curate
    from car_datasets.hub import sample_file

    report = curate(sample_file(), output, budget=budget).report
    _print(report.to_table())
    _say_where(output)


@app.command(epilog="Example: car-datasets score alpaca_data.json --output scored.parquet")
@_one_line_errors
def score(
    source: o.Source,
    output: o.OutputFile,
    scorer: o.ScorerModel = None,
    tokenizer: o.Tokenizer = None,
    embeddings: Annotated[bool, typer.Option(help="Also add the embedding, from the same pass, for `cluster`.")] = True,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Padded tokens in one forward pass.  [default: by device]")
    ] = None,
    name: o.Name = None,
    split: o.Split = None,
    revision: o.Revision = None,
    token: o.Token = None,
    schema: o.SchemaName = "auto",
    columns: o.Columns = None,
    on_invalid: o.OnInvalid = "error",
    score_column: o.ScoreColumn = None,
) -> None:
    """Add iqs_score, iqs_tokens, iqs_truncated, iqs_status and embedding; write Parquet, or JSON as the original does."""
    _quiet_models()
    from car_datasets.results import fresh_file

    fresh_file(output)
    from car_datasets.curation import score_and_embed
    from car_datasets.hub import DEFAULT_SCORER
    from car_datasets.loading import load_instructions
    from car_datasets.original import rank_rows
    from car_datasets.recipe import Recipe

    reading: dict[str, Any] = {"schema": schema, "columns": parse_columns(columns), "on_invalid": on_invalid}
    dataset = load_instructions(source, name, split, revision=revision, token=token, **reading)
    names: dict[str, Any] = {"score_column": score_column or "iqs_score"}
    recipe = Recipe(scorer=scorer or DEFAULT_SCORER, tokenizer=tokenizer, batch_tokens=batch_tokens, **names, **reading)
    as_original = output.suffix == ".json"
    scored = score_and_embed(dataset, recipe, token, embed=embeddings and not as_original)
    _write(rank_rows(scored, **names) if as_original else scored, output, **names)


@app.command(epilog="Example: car-datasets cluster scored.parquet --output clustered.parquet")
@_one_line_errors
def cluster(
    source: o.Source,
    output: o.OutputFile,
    k: o.Clusters = None,
    explained_variance: Annotated[float, typer.Option(help="Share of variance that PCA keeps.")] = 0.95,
    seed: o.Seed = None,
    n_init: o.Runs = None,
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
    _quiet_models()
    from car_datasets.results import fresh_file, fresh_folder

    fresh_file(output)
    if save_model is not None:
        fresh_folder(save_model, ("cluster_model.json", "cluster_model.safetensors"), "--save-model")
    from car_datasets.clustering import ClusterModel
    from car_datasets.curation import embed_where_missing
    from car_datasets.rows import refuse_overwrite

    dataset, column, vectors = _open(source), cluster_column or "cluster", embedding_column or "embedding"
    refuse_overwrite(dataset.column_names, (column, f"{column}_distance"), "cluster_column=... (--cluster-column)")
    dataset = embed_where_missing(dataset, vectors, embedder, template)
    model = ClusterModel.fit(
        dataset,
        vectors,
        k=parse_clusters(k) or "sqrt",
        explained_variance=explained_variance,
        seed=42 if seed is None else seed,
        n_init=1 if n_init is None else n_init,
        output_column=column,
        distance_column=f"{column}_distance",
    )
    _write(model.label(dataset), output, cluster_column=column, embedding_column=vectors)
    if save_model is not None:
        model.save_pretrained(save_model)


@app.command(epilog="Example: car-datasets select clustered.parquet --output selected.parquet --n1 1000 --n2 1")
@_one_line_errors
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
    _print(report.to_table())


@app.command(
    epilog="Example: car-datasets convert instruction_score --output iqs --tokenizer FacebookAI/xlm-roberta-large"
)
@_one_line_errors
def convert(
    checkpoint: Annotated[str, typer.Argument(help="A .ckpt file, or a folder or Hub id in the original's layout.")],
    output: o.Output,
    tokenizer: o.Tokenizer = None,
) -> None:
    """Write a checkpoint of the original's as an ordinary model folder: configuration, safetensors, tokenizer."""
    _quiet_models()
    from car_datasets.modeling_iqs import convert_checkpoint

    convert_checkpoint(checkpoint, output, tokenizer)
    typer.echo(f"The model is in {output}.")


def _open(source: str) -> Dataset:
    from car_datasets.loading import open_dataset
    from car_datasets.original import from_original

    return from_original(open_dataset(source))


def _write(dataset: Dataset, output: Path, **names: str) -> None:
    from car_datasets.results import write_table

    write_table(dataset, output, **names)
    typer.echo(f"{len(dataset):,} rows are in {output}.")


def _print(table: Any) -> None:
    from rich.console import Console

    Console().print(table)


def _quiet_models() -> None:
    """One progress bar per stage is ours; the weights' own are noise here."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def _say_where(folder: Path) -> None:
    typer.echo(f"The selection is in {folder / 'selected.parquet'} and {folder / 'selected.json'},")
    typer.echo(
        f"the figures are in {folder / 'report.md'}, and the whole pool with its scores is in {folder / 'scored.parquet'}."
    )


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"car-datasets {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Pick the best and most diverse subset of an instruction-tuning dataset."""
