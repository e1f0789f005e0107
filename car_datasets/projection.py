"""A pool as a map: embeddings of a sample of its rows, projected to two dimensions.

Does: PCA (the default: a second for a million rows' sample), t-SNE by scikit-learn, UMAP where umap-learn is installed.
Does not: draw, or read rows that are not on the map.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from car_datasets.covariance import Covariance
from car_datasets.overview import Overview
from car_datasets.selection import Indices
from car_datasets.vectors import Matrix, count_vectors, read_embeddings

if TYPE_CHECKING:
    from datasets import Dataset

PROJECTIONS = {"pca": "PCA", "tsne": "t-SNE", "umap": "UMAP"}
MAP_ROWS = 10_000
KEPT = 50  # components that t-SNE and UMAP start from, as scikit-learn advises


class PoolMap(NamedTuple):
    """Rows of a pool, ascending, their points of shape `(rows, 2)` from -1 to 1, and what projected them."""

    rows: Indices
    points: npt.NDArray[np.float64]
    method: str


def check_projection(method: str) -> None:
    """Raise before any work where the map could not be made.

    Raises:
        ValueError: there is no such projection, or it needs umap-learn, which is not installed.
    """
    if method not in PROJECTIONS:
        raise ValueError(f"projection={method!r} is not known; choose one of {tuple(PROJECTIONS)}.")
    if method == "umap":
        _umap()


def map_of(
    pool: Dataset, seen: Overview, embedding_column: str = "embedding", method: str = "pca", limit: int = MAP_ROWS
) -> PoolMap | None:
    """Put a sample of the scored rows on a map.

    Args:
        pool (`Dataset`): with a column of embeddings; seen ([`Overview`]): of it.
        embedding_column (`str`): that column; without it there is no map.
        method (`str`): `"pca"`, `"tsne"` or `"umap"`.
        limit (`int`): rows on the map, the selected ones first, up to half of it.

    Raises:
        ValueError: as [`check_projection`].
    """
    check_projection(method)
    rows = seen.sample(limit)
    shown = pool.with_format(None).select(rows.tolist())
    if count_vectors(shown, embedding_column) == 0:
        return None
    matrix, present = read_embeddings(shown, embedding_column)
    return PoolMap(rows[present], _within_bounds(_project(matrix, method, seen.seed)), PROJECTIONS[method])


def _project(matrix: Matrix, method: str, seed: int) -> Matrix:
    components, _ = Covariance.of(matrix).principal_components(1.0)
    kept = min(KEPT if method != "pca" else 2, len(components))
    points = (matrix - matrix.mean(axis=0)) @ components[:kept].astype(np.float32).T
    if len(matrix) < 4 or points.std() == 0:  # too few, or all alike: there is nothing to lay out
        method = "pca"
    if method == "tsne":
        from sklearn.manifold import TSNE

        points = TSNE(perplexity=min(30.0, (len(matrix) - 1) / 3), init="pca", random_state=seed).fit_transform(points)
    elif method == "umap":
        points = _umap().UMAP(n_neighbors=min(15, len(matrix) - 1), random_state=seed).fit_transform(points)
    return np.pad(points[:, :2], ((0, 0), (0, 2 - min(2, points.shape[1]))))


def _umap() -> Any:
    try:
        import umap
    except ImportError as error:
        raise ValueError("projection='umap' needs umap-learn: pip install 'car-datasets[umap]'.") from error
    return umap


def _within_bounds(points: Matrix) -> npt.NDArray[np.float64]:
    """Moved to the middle and scaled, both axes alike, so that the widest goes from -1 to 1; to four digits."""
    low, high = points.min(axis=0), points.max(axis=0)
    scaled = (points - (low + high) / 2) / max(float((high - low).max()) / 2, 1e-12)
    return np.asarray(scaled, dtype=np.float64).round(4)
