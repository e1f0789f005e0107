"""The options of the commands, each written once, and what their text means."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from car_datasets.tokens import clean_token


def _parse_token(text: str | None) -> str | None:
    try:
        return clean_token(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


Source = Annotated[str, typer.Argument(help="Hub id, .json, .jsonl, .csv or .parquet file, or a folder.")]
Name = Annotated[str | None, typer.Option(help="Configuration of a Hub dataset.")]
Split = Annotated[str | None, typer.Option(help="Split, where the source has several.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub dataset.")]
Token = Annotated[
    str | None,
    typer.Option(
        envvar="HF_TOKEN",
        show_envvar=True,
        callback=_parse_token,
        help="For private sources and models, --shards on the Hub, and to push.",
    ),
]
Public = Annotated[bool, typer.Option("--public", help="The repository is a public one.  [default: private]")]
Check = Annotated[bool, typer.Option("--check", help="Read back what was pushed, and compare it row for row.")]
SchemaName = Annotated[str, typer.Option(help="alpaca, prompt/completion, messages, conversations, ...; auto looks.")]
Columns = Annotated[str | None, typer.Option(help="Your column names: instruction=task,response=answer.")]
ScorerModel = Annotated[str | None, typer.Option(help="An IQS model: Hub id or folder.  [default: the embedded one]")]
Tokenizer = Annotated[
    str | None,
    typer.Option(help="For a scorer in the original's layout: folder or Hub id of its base model's tokenizer."),
]
Embedder = Annotated[str | None, typer.Option(help="A sentence-transformers model.  [default: the scorer's own]")]
Turns = Annotated[str | None, typer.Option(help="Score of a chat: mean, min, last or sum.  [default: mean]")]
Engine = Annotated[str | None, typer.Option(help="Score by the int8 encoder in this folder, see quantise.")]
Procedure = Annotated[str | None, typer.Option(help="default, or paper: the published rules, oddities included.")]
Runs = Annotated[int | None, typer.Option(help="k-means runs, of which the best is kept.  [default: 1]")]
KMeans = Annotated[
    str | None, typer.Option("--kmeans", help="torch, or sklearn: on all rows, as the paper.  [default: by procedure]")
]
KMeansSample = Annotated[
    int | None,
    typer.Option("--kmeans-sample", help="Rows per cluster to fit on, where there are more; 0: all.  [default: 256]"),
]
OnInvalid = Annotated[str, typer.Option(help="Rows that cannot be scored: error, or mark.")]
Dtype = Annotated[
    str | None, typer.Option(help="Of the encoder: float32, or bfloat16, which is fast on a GPU.  [default: float32]")
]
BatchTokens = Annotated[int | None, typer.Option(help="Padded tokens in one forward pass.  [default: by device]")]
Compile = Annotated[bool, typer.Option("--compile", help="Compile the encoder: for many rows on a GPU.")]
EmbeddingDtype = Annotated[str | None, typer.Option(help="Of the embeddings: float32 or float16.  [default: float32]")]
Output = Annotated[Path, typer.Option("--output", "-o", help="A new folder for the result.")]
OutputFile = Annotated[
    Path, typer.Option("--output", "-o", help="A new .parquet file; or .json, the original's format.")
]
Shards = Annotated[
    str | None,
    typer.Option(help="A folder or URL for finished shards: a second run, or more processes, go on with the rest."),
]
N1 = Annotated[str | None, typer.Option(help="Rows by score: a number, or a share such as 0.05.  [default: 1000]")]
N2 = Annotated[int | None, typer.Option(help="Rows from every cluster.  [default: 1]")]
Budget = Annotated[int | None, typer.Option(help="Rows in all; n1 then follows.")]
Clusters = Annotated[str | None, typer.Option("--k", help="Clusters: a number, or sqrt for int(sqrt(rows / 2)).")]
Projection = Annotated[str | None, typer.Option(help="Of the map: pca, tsne, or umap (an extra).  [default: pca]")]
Seed = Annotated[int | None, typer.Option(help="Of clustering and controls.  [default: 42]")]
AllowWorse = Annotated[bool, typer.Option("--allow-worse", help="Do not refuse a selection below the pool's mean.")]
IndexColumn = Annotated[str | None, typer.Option(help="Your row id.  [default: source_index]")]
ScoreColumn = Annotated[str | None, typer.Option(help="Name of the score column.  [default: iqs_score]")]
EmbeddingColumn = Annotated[str | None, typer.Option(help="Name of the embedding column.  [default: embedding]")]
ClusterColumn = Annotated[str | None, typer.Option(help="Name of the cluster column.  [default: cluster]")]


def parse_count(n1: str | None) -> int | float | None:
    """`--n1`: a whole number is a count, a number with a point is a share."""
    if n1 is None:
        return None
    try:
        return int(n1) if n1.lstrip("+-").isdecimal() else float(n1)
    except ValueError as error:
        raise ValueError(f"--n1 {n1}: pass a number of rows, or a share such as 0.05.") from error


def parse_clusters(k: str | None) -> int | str | None:
    """`--k`: a number, or `sqrt`."""
    if k is None or k == "sqrt":
        return k
    try:
        return int(k)
    except ValueError as error:
        raise ValueError(f"--k {k}: pass a number, or sqrt.") from error


def parse_columns(text: str | None) -> dict[str, str]:
    """`--columns`: `role=column` pairs with commas between."""
    pairs = [part.split("=", 1) for part in (text or "").split(",") if part]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"--columns {text}: write role=column pairs, as instruction=task,response=answer.")
    return {role.strip(): column.strip() for role, column in pairs}
