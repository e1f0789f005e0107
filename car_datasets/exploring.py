"""Show a curated folder as a map in embedding-atlas (the extra `explore`): `explore`, `atlas_table`.

Does: make one table of columns, coordinates and nearest rows, for embedding-atlas's command or its notebook widget.
Does not: embed, or change the folder.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from car_datasets.choosing import asked_of
from car_datasets.receipt import RECEIPT_FILE, Receipt
from car_datasets.recipe import Recipe, column_names_in
from car_datasets.reporting.maps import map_of
from car_datasets.reporting.neighbours import Nearest
from car_datasets.reporting.overview import Overview
from car_datasets.reporting.page import texts_of
from car_datasets.results import SCORED_TABLE, read_result, read_tables
from car_datasets.utils.column_names import ColumnNames
from car_datasets.utils.columns import Matrix, unit_rows
from car_datasets.utils.files import private_folder
from car_datasets.utils.processes import Terminated, end_with_parent
from car_datasets.utils.settings import refuse_missing_extra

NEAREST = 10
NEIGHBOUR_ROWS = 20_000  # for more rows there are no neighbours: comparing all pairs would take minutes
BLOCK = 1_024  # rows compared with all others at a time
ROW, X, Y, NEIGHBOURS, TEXT, KEPT = "map_row", "map_x", "map_y", "map_neighbours", "map_text", "selected_by"


class AtlasTable(NamedTuple):
    """The input of embedding-atlas.

    Args:
        table (`pyarrow.Table`): the rows that have an embedding, without it, with coordinates and neighbours.
        columns (`dict[str, str]`): its columns by the arguments of embedding-atlas's widget that they are for.
    """

    table: pa.Table
    columns: dict[str, str]


def explore(
    folder: Path,
    host: str = "localhost",
    port: int = 5055,
    projection: str = "pca",
    *,
    names: ColumnNames | None = None,
) -> None:
    """Serve a curated folder in embedding-atlas until it is interrupted, in a process that is given no token.

    Args:
        folder (`Path`): the output of `curate`, with embeddings.
        host (`str`), port (`int`): address to listen on; if the port is taken, the next free one is used.
        projection (`str`): `"pca"`, `"tsne"` or `"umap"`.
        names ([`ColumnNames`], *optional*): the columns of score, cluster, row index and embedding; by default those of
            the receipt in the folder.

    Raises:
        ValueError: embedding-atlas is not installed, or the folder holds no result, or one without embeddings.
    """
    refuse_missing_extra("explore", "explore", {"embedding_atlas": "embedding-atlas"})
    with private_folder("explore") as place:
        options = write_atlas(folder, place / "pool.parquet", projection, names=names)
        address = ["--host", host, "--port", str(port)]
        # By the interpreter, since the script `embedding-atlas` need not be on the PATH of this environment.
        command = [sys.executable, "-m", "embedding_atlas.cli", *options, *address]
        try:
            done = subprocess.run(command, check=False, env=_without_secrets(os.environ), preexec_fn=end_with_parent)
        except Terminated:
            raise
        # The usual way to end it; the server has received the same signal.
        except KeyboardInterrupt:
            return
    if done.returncode != 0:
        raise ValueError(f"embedding-atlas ended with exit code {done.returncode}: {' '.join(command)}")


def _without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without tokens, keys and passwords: a page in a browser can ask the server's process."""
    kept = {name: value for name, value in environment.items() if not _SECRET.search(name)}
    # Here huggingface_hub looks for the token of `hf auth login`.
    return kept | {"HF_TOKEN_PATH": os.devnull, "HF_HUB_DISABLE_TELEMETRY": "1"}


_SECRET = re.compile("TOKEN($|S$|_)|SECRET|PASSW|CREDENTIAL|OIDC|_KEY($|_)", re.IGNORECASE)


def write_atlas(folder: Path, path: Path, projection: str = "pca", *, names: ColumnNames | None = None) -> list[str]:
    """Write the file that the command of embedding-atlas reads.

    Args:
        folder (`Path`): the output of `curate`, with embeddings.
        path (`Path`): the file to write, a `.parquet`.
        projection (`str`): `"pca"`, `"tsne"` or `"umap"`.
        names ([`ColumnNames`], *optional*): the columns of score, cluster, row index and embedding; by default those of
            the receipt in the folder.

    Returns:
        `list[str]`: the arguments of the command for this file.
    """
    from datasets import Dataset

    table, columns = atlas_table(folder, projection, names=names)
    Dataset(table.drop_columns(columns.pop("row_id"))).to_parquet(str(path))  # the command numbers the rows itself
    given = [part for option, column in columns.items() for part in (f"--{option}", column)]
    return [str(path), *given, "--disable-projection"]


def atlas_table(
    folder: str | os.PathLike[str], projection: str = "pca", *, names: ColumnNames | None = None
) -> AtlasTable:
    """Make the table that embedding-atlas shows, with coordinates and neighbours, so that it computes nothing.

    Example, in a notebook:

    ```python
    >>> table, columns = atlas_table("out")
    >>> EmbeddingAtlasWidget(table, **columns)
    ```

    Args:
        folder (`str`): the output of `curate`, with embeddings.
        projection (`str`): `"pca"`, `"tsne"` or `"umap"`.
        names ([`ColumnNames`], *optional*): the columns of score, cluster, row index and embedding; by default those of
            the receipt in the folder.

    Returns:
        [`AtlasTable`]: `(table, columns)`.

    Raises:
        ValueError: the folder holds no result, or one without embeddings.
    """
    names = names_of(Path(folder)) if names is None else names
    overview = _read_folder(Path(folder), names)
    pool_map = map_of(overview, projection, limit=len(overview.pool))
    if pool_map is None:
        raise ValueError(
            f"No row of {str(Path(folder) / SCORED_TABLE)!r} has an embedding in the column {names.embedding!r}; "
            "name another: names=ColumnNames(embedding=...) (--embedding-column)."
        )
    rows = pool_map.rows
    # The vectors stay out: the map replaces them, and the browser would have to load them.
    table: pa.Table = overview.pool.select(rows.tolist()).remove_columns(names.embedding).with_format("arrow")[:]
    # A column of the dataset may have one of these names, and must be shown as well.
    free = {name: _free(name, table.column_names) for name in (ROW, X, Y, NEIGHBOURS, TEXT, KEPT)}
    columns = {"row_id": free[ROW], "text": free[TEXT], "x": free[X], "y": free[Y]}
    new: dict[str, Any] = {
        KEPT: [reason or "not kept" for reason in overview.reasons[rows].tolist()],
        ROW: np.arange(len(rows)),  # the ids that the neighbours refer to; the widget's own numbers may begin at 1
        X: pool_map.points[:, 0],
        Y: pool_map.points[:, 1],
        TEXT: ["\n\n".join(text for _, text in row if text) for row in texts_of(overview, rows.tolist())],
    }
    if len(rows) <= NEIGHBOUR_ROWS:
        new[NEIGHBOURS] = _all_nearest(overview.embeddings_of(rows)[0])
        columns["neighbors"] = free[NEIGHBOURS]
    for name, values in new.items():
        table = table.append_column(free[name], pa.array(values))
    return AtlasTable(table, columns)


def names_of(folder: Path, changes: Mapping[str, Any] | None = None) -> ColumnNames:
    """Return the names of the columns of a result, by its receipt if it has one.

    Args:
        folder (`Path`): the output of `curate`.
        changes (`Mapping[str, Any]`, *optional*): names that replace those of the receipt, such as `score_column`.
    """
    settings = Receipt.read(folder).recipe if (folder / RECEIPT_FILE).is_file() else {}
    return column_names_in({**settings, **(changes or {})})


def overview_of(folder: Path) -> Overview:
    """Return pool and selection of a result, read by the names and the bounds in its receipt.

    Args:
        folder (`Path`): the output of `curate`.

    Raises:
        ValueError: the folder holds no complete result, or one of another version.
    """
    result = read_result(folder)
    assert result.scored is not None and result.receipt is not None  # of a folder both are read
    recipe = Recipe().changed(**result.receipt.recipe)
    return Overview.of(result.scored, result.selected, names=recipe.names, seed=recipe.seed, asked=asked_of(recipe))


def _read_folder(folder: Path, names: ColumnNames) -> Overview:
    """Read the pool and the selection that `curate` wrote; raise ValueError if they are not there."""
    selected, pool = read_tables(folder)
    if names.embedding not in pool.column_names:
        raise ValueError(
            f"{str(folder / SCORED_TABLE)!r} has no column {names.embedding!r}; curate without --no-embeddings, or "
            "name your embedding column: names=ColumnNames(embedding=...) (--embedding-column)."
        )
    return Overview.of(pool, selected, names=names)


def _free(name: str, taken: Sequence[str]) -> str:
    """Return the name, with underscores appended until no column of the user has it."""
    return _free(f"{name}_", taken) if name in taken else name


def _all_nearest(matrix: Matrix) -> list[dict[str, list[Any]]]:
    """Find the nearest rows of every row by cosine distance, itself first, in the form of embedding-atlas.

    Args:
        matrix (`(rows, dimension)` float32): embeddings.

    Returns:
        for every row a dict of `ids` and `distances`.
    """
    # One more than wanted, since every row is its own nearest.
    units, count = unit_rows(matrix), min(NEAREST + 1, len(matrix))
    found: list[dict[str, list[Any]]] = []
    for start in range(0, len(units), BLOCK):
        similar = units[start : start + BLOCK] @ units.T
        rows = np.arange(len(similar))
        similar[rows, start + rows] = 2  # above any cosine: the row itself comes before equal ones
        best = Nearest.none(len(similar)).updated(similar, np.arange(len(units)), count)
        # Back below 1: rounding, and the 2 of the row itself, would give negative distances.
        distances = 1 - np.minimum(best.similarities, 1)
        found += [{"ids": i, "distances": d} for i, d in zip(best.rows.tolist(), distances.tolist(), strict=True)]
    return found
