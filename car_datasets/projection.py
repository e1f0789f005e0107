"""`map_of`: a pool as a map, the embeddings of a sample of its rows projected to two dimensions.

Does: PCA (the default), t-SNE by scikit-learn, UMAP if umap-learn is installed.
Does not: draw, or read embeddings of rows that are not on the map.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from car_datasets.covariance import project
from car_datasets.overview import Overview
from car_datasets.selection import Indices
from car_datasets.vectors import Matrix

PROJECTIONS = {"pca": "PCA", "tsne": "t-SNE", "umap": "UMAP"}
MAP_ROWS = 10_000  # on the map of a plot; PCA is never fitted on more
START_COMPONENTS = 50  # that t-SNE and UMAP start from, as scikit-learn advises


class PoolMap(NamedTuple):
    """Rows of a pool on a map.

    Args:
        rows (`(n,)` int64): row positions, ascending.
        points (`(n, 2)` float64): their coordinates, from -1 to 1.
        method (`str`): the projection by its full name, such as `"t-SNE"`.
    """

    rows: Indices
    points: npt.NDArray[np.float64]
    method: str


def check_projection(method: str) -> None:
    """Raise ValueError if the projection is not known, or needs umap-learn, which is not installed."""
    if method not in PROJECTIONS:
        raise ValueError(f"projection={method!r} is not known; choose one of {tuple(PROJECTIONS)}.")
    if method == "umap":
        _umap()


def map_of(overview: Overview, method: str = "pca", limit: int = MAP_ROWS) -> PoolMap | None:
    """Project a sample of the scored rows to two dimensions.

    Args:
        overview ([`Overview`]): of the pool.
        method (`str`): `"pca"`, `"tsne"` or `"umap"`.
        limit (`int`): rows on the map at most. Selected rows fill up to half of it, other rows the rest.

    Returns:
        [`PoolMap`] or `None`: `None` if none of these rows has an embedding.

    Raises:
        ValueError: the projection is not known, or needs umap-learn, which is not installed.
    """
    check_projection(method)
    rows = overview.sample(limit)
    matrix, present = overview.embeddings_of(rows)
    if len(present) == 0:
        return None
    points = _project(matrix, method, overview.seed)
    return PoolMap(rows[present], _within_bounds(points), PROJECTIONS[method])


def _project(matrix: Matrix, method: str, seed: int) -> Matrix:
    """Project `(rows, dimension)` embeddings to `(rows, 2)` points."""
    if (matrix == matrix[0]).all():  # one row, or equal ones: no variance, and PCA would divide by zero
        return np.zeros((len(matrix), 2), dtype=np.float32)
    if len(matrix) < 4:  # too few rows for neighbourhoods
        method = "pca"
    points = _principal_points(matrix, 2 if method == "pca" else START_COMPONENTS, seed)
    if method == "tsne":
        from sklearn.manifold import TSNE

        points = TSNE(perplexity=min(30.0, (len(matrix) - 1) / 3), init="pca", random_state=seed).fit_transform(points)
    elif method == "umap":
        points = _umap().UMAP(n_neighbors=min(15, len(matrix) - 1), random_state=seed).fit_transform(points)
    # Embeddings of one dimension have one component; the second axis is then 0.
    return np.pad(points[:, :2], ((0, 0), (0, 2 - min(2, points.shape[1]))))


def _principal_points(matrix: Matrix, components: int, seed: int) -> Matrix:
    """Project the rows on their first principal components, of which there are at most min(rows, dimension)."""
    from sklearn.decomposition import PCA

    every = -(-len(matrix) // MAP_ROWS)  # rounded up: at most MAP_ROWS rows, from all over the matrix
    held = matrix[::every].astype(np.float64)  # covariance_eigh does not centre first, and float32 would lose digits
    # An exact solver, whose signs are fixed: the largest entry of every component is positive.
    pca = PCA(min(components, *held.shape), svd_solver="covariance_eigh", random_state=seed).fit(held)
    return project(matrix, pca.mean_.astype(np.float32), pca.components_.astype(np.float32))


def _umap() -> Any:
    """Import umap-learn, or raise ValueError that says how to install it."""
    try:
        import umap
    except ImportError as error:
        raise ValueError("projection='umap' needs umap-learn: pip install 'car-datasets[umap]'.") from error
    return umap


def _within_bounds(points: Matrix) -> npt.NDArray[np.float64]:
    """Centre the points and scale both axes alike, so that the wider one goes from -1 to 1; round to four digits."""
    low, high = points.min(axis=0), points.max(axis=0)
    scaled = (points - (low + high) / 2) / max(float((high - low).max()) / 2, 1e-12)
    return np.asarray(scaled, dtype=np.float64).round(4)
