"""`car-datasets`: parses a command line, calls the library, prints one line for a user's mistake (exit code 2).

Does not hold logic: each command is one call that a script can make as well. Heavy libraries are imported in the command,
so that `--help` answers at once.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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

Source = Annotated[str, typer.Argument(help="Hub id, .json, .jsonl, .csv or .parquet file, or a folder.")]
Name = Annotated[str | None, typer.Option(help="Configuration of a Hub dataset.")]
Split = Annotated[str | None, typer.Option(help="Split, where the source has several.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub dataset.")]
Token = Annotated[str | None, typer.Option(envvar="HF_TOKEN", show_envvar=True, help="For private sources and models.")]
SchemaName = Annotated[str, typer.Option(help="alpaca, prompt/completion, messages, conversations, ...; auto looks.")]
Columns = Annotated[str | None, typer.Option(help="Your column names: instruction=task,response=answer.")]
ScorerModel = Annotated[str | None, typer.Option(help="An IQS model: Hub id or folder.  [default: the embedded one]")]
OnInvalid = Annotated[str, typer.Option(help="Rows that cannot be scored: error, or mark.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Where the result goes; must not exist yet.")]
N1 = Annotated[float | None, typer.Option(help="Rows by score: a number, or a share such as 0.05.  [default: 1000]")]
N2 = Annotated[int | None, typer.Option(help="Rows from every cluster.  [default: 1]")]
Budget = Annotated[int | None, typer.Option(help="Rows in all; n1 then follows.")]
Clusters = Annotated[str | None, typer.Option("--k", help="Clusters: a number, or sqrt for int(sqrt(rows / 2)).")]
Seed = Annotated[int | None, typer.Option(help="Of clustering and controls.  [default: 42]")]
AllowWorse = Annotated[bool, typer.Option("--allow-worse", help="Do not refuse a selection below the pool's mean.")]
ScoreColumn = Annotated[str | None, typer.Option(help="Name of the score column.  [default: iqs_score]")]
EmbeddingColumn = Annotated[str | None, typer.Option(help="Name of the embedding column.  [default: embedding]")]
ClusterColumn = Annotated[str | None, typer.Option(help="Name of the cluster column.  [default: cluster]")]


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


@app.command(
    epilog="Example: car-datasets curate alpaca_data.json --output out --n1 1000 --n2 1",
)
@_one_line_errors
def curate(
    source: Source,
    output: Output,
    config: Annotated[
        Path | None, typer.Option(help="A recipe, such as configs/default.yaml; options win over it.")
    ] = None,
    n1: N1 = None,
    n2: N2 = None,
    budget: Budget = None,
    k: Clusters = None,
    name: Name = None,
    split: Split = None,
    revision: Revision = None,
    token: Token = None,
    schema: SchemaName = "auto",
    columns: Columns = None,
    on_invalid: OnInvalid = "error",
    scorer: ScorerModel = None,
    embedder: Annotated[
        str | None, typer.Option(help="A sentence-transformers model.  [default: the scorer's own]")
    ] = None,
    turns: Annotated[str | None, typer.Option(help="Score of a chat: mean, min, last or sum.  [default: mean]")] = None,
    seed: Seed = None,
    index_column: Annotated[str | None, typer.Option(help="Your row id.  [default: source_index]")] = None,
    score_column: ScoreColumn = None,
    embedding_column: EmbeddingColumn = None,
    cluster_column: ClusterColumn = None,
    allow_worse: AllowWorse = False,
    no_embeddings: Annotated[bool, typer.Option("--no-embeddings", help="Leave them out of scored.parquet.")] = False,
) -> None:
    """Load, score, embed, cluster, select and report, in one go."""
    _quiet_models()
    from car_datasets.recipe import Recipe, curate

    recipe = Recipe() if config is None else Recipe.from_yaml(config)
    given = {
        "n1": _count(n1),
        "n2": n2,
        "budget": budget,
        "k": _clusters(k),
        "name": name,
        "split": split,
        "revision": revision,
        "scorer": scorer,
        "embedder": embedder,
        "turns": turns,
        "seed": seed,
        "index_column": index_column,
        "score_column": score_column,
        "embedding_column": embedding_column,
        "cluster_column": cluster_column,
        "columns": _columns(columns) or None,
        "schema": None if schema == "auto" else schema,
        "on_invalid": None if on_invalid == "error" else on_invalid,
        "allow_worse": allow_worse or None,
        "keep_embeddings": False if no_embeddings else None,
    }
    report = curate(source, output, recipe, token=token, **{o: v for o, v in given.items() if v is not None}).report
    _print(report.to_table())
    _say_where(output)


@app.command(epilog="Example: car-datasets demo --output demo")
@_one_line_errors
def demo(
    output: Output,
    budget: Annotated[int, typer.Option(help="Rows to select.")] = 60,
) -> None:
    """Curate the sample of instruction rows that comes with the package; needs no network."""
    _quiet_models()
    from car_datasets.hub import sample_file
    from car_datasets.recipe import curate

    report = curate(sample_file(), output, budget=budget).report
    _print(report.to_table())
    _say_where(output)


@app.command(epilog="Example: car-datasets score alpaca_data.json --output scored.parquet")
@_one_line_errors
def score(
    source: Source,
    output: Output,
    scorer: ScorerModel = None,
    embeddings: Annotated[bool, typer.Option(help="Also add the embedding, from the same pass, for `cluster`.")] = True,
    name: Name = None,
    split: Split = None,
    revision: Revision = None,
    token: Token = None,
    schema: SchemaName = "auto",
    columns: Columns = None,
    on_invalid: OnInvalid = "error",
    score_column: ScoreColumn = None,
) -> None:
    """Add iqs_score, iqs_tokens, iqs_truncated, iqs_status and embedding; write Parquet."""
    _quiet_models()
    _refuse_existing(output)
    from car_datasets.hub import DEFAULT_SCORER
    from car_datasets.loading import load_instructions
    from car_datasets.recipe import Recipe, score_and_embed

    reading: dict[str, Any] = {"schema": schema, "columns": _columns(columns), "on_invalid": on_invalid}
    dataset = load_instructions(source, name, split, revision=revision, token=token, **reading)
    recipe = Recipe(scorer=scorer or DEFAULT_SCORER, score_column=score_column or "iqs_score", **reading)
    _write(score_and_embed(dataset, recipe, token, embed=embeddings), output)


@app.command(epilog="Example: car-datasets cluster scored.parquet --output clustered.parquet")
@_one_line_errors
def cluster(
    source: Source,
    output: Output,
    k: Clusters = None,
    explained_variance: Annotated[float, typer.Option(help="Share of variance that PCA keeps.")] = 0.95,
    seed: Seed = None,
    embedding_column: EmbeddingColumn = None,
    cluster_column: ClusterColumn = None,
    save_model: Annotated[Path | None, typer.Option(help="Also save the cluster model into this folder.")] = None,
) -> None:
    """Add cluster and cluster_distance to a dataset that has embeddings; write Parquet."""
    _refuse_existing(output)
    if save_model is not None and (save_model / "cluster_model.json").exists():
        raise ValueError(f"--save-model {save_model} holds a cluster model already; name another folder.")
    from car_datasets.clustering import ClusterModel
    from car_datasets.rows import refuse_overwrite

    dataset, column = _open(source), cluster_column or "cluster"
    refuse_overwrite(dataset.column_names, (column, f"{column}_distance"), "cluster_column=... (--cluster-column)")
    model = ClusterModel.fit(
        dataset,
        embedding_column or "embedding",
        k=_clusters(k) or "sqrt",
        explained_variance=explained_variance,
        seed=42 if seed is None else seed,
        output_column=column,
        distance_column=f"{column}_distance",
    )
    _write(model.label(dataset), output)
    if save_model is not None:
        model.save_pretrained(save_model)


@app.command(epilog="Example: car-datasets select clustered.parquet --output selected.parquet --n1 1000 --n2 1")
@_one_line_errors
def select(
    source: Source,
    output: Output,
    n1: N1 = None,
    n2: N2 = None,
    budget: Budget = None,
    score_column: ScoreColumn = None,
    cluster_column: ClusterColumn = None,
    allow_worse: AllowWorse = False,
) -> None:
    """Select from a scored, clustered dataset and print the report; write Parquet."""
    _refuse_existing(output)
    from car_datasets.reporting import SelectionReport
    from car_datasets.selection import select_car

    pool = _open(source)
    names: dict[str, Any] = {"score_column": score_column or "iqs_score", "cluster_column": cluster_column or "cluster"}
    count = _count(n1)
    chosen = select_car(
        pool, 1000 if count is None else count, 1 if n2 is None else n2, budget=budget, allow_worse=allow_worse, **names
    )
    _write(chosen, output)
    _print(SelectionReport.from_selection(pool, chosen, **names).to_table())


def _open(source: str) -> Dataset:
    from car_datasets.loading import open_dataset

    return open_dataset(source)


def _write(dataset: Dataset, output: Path) -> None:
    from car_datasets.recipe import write_whole

    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, dataset.to_parquet)
    typer.echo(f"{len(dataset):,} rows are in {output}.")


def _refuse_existing(output: Path) -> None:
    if output.suffix != ".parquet":
        raise ValueError(f"--output {output}: name a .parquet file.")
    if any(parent.is_file() for parent in output.parents):
        raise ValueError(
            f"--output {output}: {next(p for p in output.parents if p.is_file())} is a file; name a folder."
        )
    if output.exists():
        raise ValueError(f"--output {output} is there already; name another file or move it away.")


def _print(table: Any) -> None:
    from rich.console import Console

    Console().print(table)


def _quiet_models() -> None:
    """One progress bar per stage is ours; the weights' own are noise here."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def _count(n1: float | None) -> int | float | None:
    return int(n1) if n1 is not None and n1.is_integer() else n1


def _clusters(k: str | None) -> int | str | None:
    if k is None or k == "sqrt":
        return k
    try:
        return int(k)
    except ValueError as error:
        raise ValueError(f"--k {k}: pass a number, or sqrt.") from error


def _columns(text: str | None) -> dict[str, str]:
    pairs = [part.split("=", 1) for part in (text or "").split(",") if part]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"--columns {text}: write role=column pairs, as instruction=task,response=answer.")
    return {role.strip(): column.strip() for role, column in pairs}


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
