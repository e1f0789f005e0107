"""EXPLORE: a curated folder as a map in embedding-atlas (the extra `explore`), with coordinates and neighbours given.

Does: make one table of our columns, places and nearest rows; give it to embedding-atlas's widget in a notebook, or write it and
start embedding-atlas on the file; either way it computes nothing.
Does not: embed, or change the folder.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from car_datasets.overview import Overview
from car_datasets.page_rows import text_columns, texts_of
from car_datasets.projection import map_of
from car_datasets.report_page import columns_of_ours
from car_datasets.results import SCORED_TABLE, read_tables
from car_datasets.selection import Indices
from car_datasets.vectors import Matrix, read_embeddings, unit_rows

NEAREST = 10
NEIGHBOUR_ROWS = 20_000  # all pairs of more take minutes; then there are places, and no neighbours
BLOCK = 1_024
ROW, X, Y, NEIGHBOURS, TEXT, KEPT = "map_row", "map_x", "map_y", "map_neighbours", "map_text", "selected_by"


class AtlasTable(NamedTuple):
    """What embedding-atlas is given.

    Args:
        table (`pyarrow.Table`): the rows that have an embedding, without it, and what we know of them.
        columns (`dict[str, str]`): which of its columns is what, by the names of the arguments of embedding-atlas's widget.
    """

    table: pa.Table
    columns: dict[str, str]


def explore(folder: Path, host: str = "localhost", port: int = 5055, projection: str = "pca", **names: str) -> None:
    """Serve a curated folder in embedding-atlas until it is interrupted.

    Args:
        folder (`Path`): what `curate` wrote, with embeddings.
        host (`str`), port (`int`): where to listen; the next free port is taken.
        projection (`str`): `"pca"`, `"tsne"` or `"umap"`.
        names (`str`): score_column, cluster_column, index_column, embedding_column, where they are not the usual ones.

    Raises:
        ValueError: embedding-atlas is not installed, or the folder holds no result, or one without embeddings.
    """
    if importlib.util.find_spec("embedding_atlas") is None:
        raise ValueError("explore needs embedding-atlas: pip install 'car-datasets[explore]' (some 450 MB).")
    with tempfile.TemporaryDirectory() as place:
        options = write_atlas(folder, Path(place) / "pool.parquet", projection, **names)
        where = ["--host", host, "--port", str(port)]
        command = [sys.executable, "-m", "embedding_atlas.cli", *options, *where]
        try:
            done = subprocess.run(command, check=False)
        except KeyboardInterrupt:
            return
    if done.returncode != 0:
        raise ValueError(f"embedding-atlas ended with exit code {done.returncode}: {' '.join(command)}")


def write_atlas(folder: Path, path: Path, projection: str = "pca", **names: str) -> list[str]:
    """Write the file that embedding-atlas reads.

    Returns:
        `list[str]`: the arguments of embedding-atlas that go with it.
    """
    from datasets import Dataset

    table, columns = atlas_table(folder, projection, **names)
    Dataset(table.drop_columns(columns.pop("row_id"))).to_parquet(str(path))  # the command counts rows by itself
    given = [part for option, column in columns.items() for part in (f"--{option}", column)]
    return [str(path), *given, "--disable-projection"]


def atlas_table(folder: str | os.PathLike[str], projection: str = "pca", **names: str) -> AtlasTable:
    """A curated folder as the table that embedding-atlas shows, with places and neighbours, so that it computes nothing.

    Example, in a notebook:

    ```python
    >>> table, columns = atlas_table("out")
    >>> EmbeddingAtlasWidget(table, **columns)
    ```

    Args:
        folder (`str`): what `curate` wrote, with embeddings.
        projection (`str`): `"pca"`, `"tsne"` or `"umap"`.
        names (`str`): score_column, cluster_column, index_column, embedding_column, where they are not the usual ones.

    Returns:
        [`AtlasTable`]: `(table, columns)`.

    Raises:
        ValueError: the folder holds no result, or one without embeddings.
    """
    folder = Path(folder)
    selected, pool = read_tables(folder)
    vectors = names.pop("embedding_column", "embedding")
    if vectors not in pool.column_names:
        raise ValueError(
            f"{str(folder / SCORED_TABLE)!r} has no column {vectors!r}; curate without --no-embeddings, or name yours "
            "(--embedding-column)."
        )
    seen = Overview.of(pool, selected, **names)  # type: ignore[arg-type]
    pool_map = map_of(pool, seen, vectors, projection, limit=len(pool))
    if pool_map is None:
        raise ValueError(f"No row of {str(folder / SCORED_TABLE)!r} has an embedding.")
    ours = columns_of_ours(embedding_column=vectors, **names)
    chosen = pool.select(pool_map.rows.tolist())
    texts = texts_of(pool, pool_map.rows.tolist(), text_columns(pool, ours))
    table: pa.Table = chosen.remove_columns(vectors).with_format("arrow")[:]
    free = {name: _free(name, table.column_names) for name in (ROW, X, Y, NEIGHBOURS, TEXT, KEPT)}
    columns = {"row_id": free[ROW], "text": free[TEXT], "x": free[X], "y": free[Y]}
    new: dict[str, Any] = {
        KEPT: [reason or "not kept" for reason in seen.reasons[pool_map.rows].tolist()],
        ROW: np.arange(len(chosen)),  # the neighbours' ids; the widget's own count may begin at 1
        X: pool_map.points[:, 0],
        Y: pool_map.points[:, 1],
        TEXT: ["\n\n".join(text for _, text in row if text) for row in texts],
    }
    if len(pool_map.rows) <= NEIGHBOUR_ROWS:
        new[NEIGHBOURS] = _nearest(read_embeddings(chosen, vectors)[0])
        columns["neighbors"] = free[NEIGHBOURS]
    for name, values in new.items():
        table = table.append_column(free[name], pa.array(values))
    return AtlasTable(table, columns)


def _free(name: str, taken: Sequence[str]) -> str:
    """The name, with as many underscores behind it as it takes to be no column of the user's."""
    return _free(f"{name}_", taken) if name in taken else name


def _nearest(matrix: Matrix) -> list[dict[str, list[Any]]]:
    """For every row its nearest ones by cosine distance, itself first, as embedding-atlas computes them."""
    units, count = unit_rows(matrix), min(NEAREST + 1, len(matrix))
    found: list[dict[str, list[Any]]] = []
    for start in range(0, len(units), BLOCK):
        similar = units[start : start + BLOCK] @ units.T
        rows = np.arange(len(similar))
        similar[rows, start + rows] = 2  # itself, before equal ones
        near: Indices = np.argpartition(-similar, count - 1, axis=1)[:, :count]
        apart = 1 - np.minimum(np.take_along_axis(similar, near, axis=1), 1)
        similar_first = np.argsort(-np.take_along_axis(similar, near, axis=1), axis=1, kind="stable")
        near, apart = (np.take_along_axis(part, similar_first, axis=1) for part in (near, apart))
        found += [{"ids": i, "distances": d} for i, d in zip(near.tolist(), apart.tolist(), strict=True)]
    return found
