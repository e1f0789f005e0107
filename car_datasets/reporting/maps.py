"""`PoolMap`: rows of a pool on a map, by their embeddings.

Does: project the embeddings of a sample to two dimensions by PCA, t-SNE, or UMAP if umap-learn is installed.
Does not: draw.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from car_datasets.clustering.fitting import project
from car_datasets.reporting.overview import Overview
from car_datasets.selection.rule import Indices
from car_datasets.utils.columns import Matrix
from car_datasets.utils.settings import refuse_missing_extra

PROJECTIONS = {"pca": "PCA", "tsne": "t-SNE", "umap": "UMAP"}
MAP_ROWS = 10_000  # rows on the map of a plot; PCA is never fitted on more
START_COMPONENTS = 50  # dimensions that t-SNE and UMAP start from, as scikit-learn advises


class PoolMap(NamedTuple):
    """Rows of a pool on a map.

    Args:
        rows (`(n,)` int64): row positions, ascending.
        points (`(n, 2)` float64): their coordinates, from -1 to 1.
        method (`str`): the projection that was used by its full name, such as `"t-SNE"`.
    """

    rows: Indices
    points: npt.NDArray[np.float64]
    method: str


def map_of(overview: Overview, method: str = "pca", limit: int = MAP_ROWS) -> PoolMap | None:
    """Project a sample of the scored rows to two dimensions.

    Args:
        overview ([`Overview`]): of the pool.
        method (`str`): `"pca"`, `"tsne"` or `"umap"`; fewer than four rows are always projected by PCA.
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
    if len(matrix) < 4:  # too few rows for the neighbourhoods of t-SNE and UMAP
        method = "pca"
    points = _project(matrix, method, overview.seed)
    return PoolMap(rows[present], _within_bounds(points), PROJECTIONS[method])


def check_projection(method: str) -> None:
    """Raise ValueError if the projection is not known, or needs umap-learn, which is not installed.

    Callers check before hours of scoring; the map is drawn at the very end.
    """
    if method not in PROJECTIONS:
        raise ValueError(f"projection={method!r} is not known; choose one of {tuple(PROJECTIONS)}.")
    if method == "umap":
        _umap()


def _project(matrix: Matrix, method: str, seed: int) -> Matrix:
    """Project `(rows, dimension)` embeddings to `(rows, 2)` points."""
    if (matrix == matrix[0]).all():  # one row, or equal ones: PCA would divide by a variance of 0
        return np.zeros((len(matrix), 2), dtype=np.float32)
    points = _principal_points(matrix, 2 if method == "pca" else START_COMPONENTS, seed)
    if method == "tsne":
        from sklearn.manifold import TSNE

        # The perplexity must be below the number of rows; scikit-learn's default is 30.
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
    refuse_missing_extra("umap", "projection='umap'", {"umap": "umap-learn"}, load=True)
    import umap

    return umap


def _within_bounds(points: Matrix) -> npt.NDArray[np.float64]:
    """Centre the points and scale both axes alike, so that the wider one goes from -1 to 1; round to four digits."""
    # Both alike, because distances on the map mean something. 1e-12 avoids 0 / 0 where all points coincide.
    low, high = points.min(axis=0), points.max(axis=0)
    scaled = (points - (low + high) / 2) / max(float((high - low).max()) / 2, 1e-12)
    return np.asarray(scaled, dtype=np.float64).round(4)
