"""How the numbers of a `ClusterModel` are found: components by covariance.py and centres by kmeans.py, or both by scikit-learn.

Does: read the embeddings as often as a fit needs them; check the settings of a fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from car_datasets.covariance import Covariance
from car_datasets.kmeans import fit_kmeans
from car_datasets.parallel import device_for, note_that_torch_runs
from car_datasets.vectors import Matrix, embedding_batches, read_embeddings

if TYPE_CHECKING:
    from datasets import Dataset

ENGINES = ("torch", "sklearn")


class Numbers(NamedTuple):
    """The numbers of a model, in the order of its fields."""

    mean: Matrix
    components: Matrix
    centers: Matrix
    explained_variance: float
    inertia: float


@dataclass(frozen=True)
class Projection:
    """From embeddings `(rows, dimension)` to points `(rows, kept)` on a device."""

    mean: Matrix
    components: Matrix
    device: torch.device

    def __call__(self, embeddings: Matrix) -> torch.Tensor:
        centred = torch.from_numpy(embeddings - self.mean).to(self.device)
        return centred @ torch.from_numpy(self.components).to(self.device).T


def clustering_device(rank: int | None = None) -> torch.device:
    """As [`device_for`] where there is CUDA, else the CPU: other devices lack float64, which sums need."""
    return device_for(rank) if torch.cuda.is_available() else torch.device("cpu")


def fit_torch(
    dataset: Dataset, column: str, k: int | str, explained_variance: float, seed: int, n_init: int, sample: int
) -> Numbers:
    """One pass over the column for the components, one for the rows to fit on, and, after a sample, three more."""

    note_that_torch_runs()

    def read() -> Iterator[Matrix]:
        return (matrix for matrix, _ in embedding_batches(dataset, column))

    rows, project, share = fit_components(read(), explained_variance, clustering_device())
    clusters = number_of_clusters(k, rows)
    fitted = fit_kmeans(read, project, rows, clusters, seed=seed, n_init=n_init, sample=sample)
    return Numbers(project.mean, project.components, fitted.centers.cpu().numpy(), share, fitted.inertia)


def fit_components(
    chunks: Iterator[Matrix], explained_variance: float, device: torch.device
) -> tuple[int, Projection, float]:
    """PCA in one pass over the rows.

    Returns:
        The number of rows, the projection on the components, for points on `device`, and the share of variance they hold.
    """
    covariance = Covariance.of(next(chunks))
    for chunk in chunks:
        covariance.merge(Covariance.of(chunk))
    components, share = covariance.principal_components(explained_variance)
    mean, kept = covariance.mean.astype(np.float32), np.ascontiguousarray(components, dtype=np.float32)
    return covariance.rows, Projection(mean, kept, device), share


def fit_sklearn(
    dataset: Dataset, column: str, k: int | str, explained_variance: float, seed: int, n_init: int
) -> Numbers:
    """The reference: scikit-learn's PCA and k-means, with the whole column in memory."""
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA

    note_that_torch_runs()
    matrix, _ = read_embeddings(dataset, column)
    clusters = number_of_clusters(k, len(matrix))
    if (matrix == matrix[0]).all():  # one row, or equal ones: no variance to explain
        mean, components, share = matrix[0], np.eye(1, matrix.shape[1], dtype=np.float32), 1.0
    else:
        kept = None if explained_variance == 1.0 else explained_variance
        # covariance_eigh is exact, and 15 times faster than the SVD that "auto" takes for wide embeddings.
        pca = PCA(kept, svd_solver="covariance_eigh", random_state=seed).fit(matrix)
        mean, components = pca.mean_.astype(np.float32), pca.components_.astype(np.float32)
        share = float(pca.explained_variance_ratio_.sum())
    found = KMeans(clusters, n_init=n_init, random_state=seed).fit((matrix - mean) @ components.T)
    return Numbers(mean, components, found.cluster_centers_, share, float(found.inertia_))


def refuse_bad_fit(explained_variance: float, n_init: int, seed: int, kmeans: str, kmeans_sample: int) -> None:
    """Raise a ValueError for settings that no fit can have."""
    if not isinstance(explained_variance, (int, float)) or not 0 < explained_variance <= 1:
        raise ValueError(f"explained_variance={explained_variance!r} must lie in (0, 1].")
    if not isinstance(n_init, int) or n_init < 1:
        raise ValueError(f"n_init={n_init!r} must be at least 1.")
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed!r} must be a whole number from 0 to 2**32 - 1.")
    if kmeans not in ENGINES:
        raise ValueError(f"kmeans={kmeans!r} is not known; choose one of {ENGINES}.")
    if not isinstance(kmeans_sample, int) or isinstance(kmeans_sample, bool) or kmeans_sample < 0:
        raise ValueError(f"kmeans_sample={kmeans_sample!r} must be a number of rows per cluster, or 0 for all rows.")


def number_of_clusters(k: int | str, rows: int) -> int:
    """`k` as a number, checked against the rows; `"sqrt"` is int(sqrt(rows / 2)), at least 1.

    Raises:
        ValueError: it is not positive, or larger than the number of rows.
    """
    if isinstance(k, np.integer):
        k = int(k)
    if k == "sqrt":
        k = max(1, int(math.sqrt(rows / 2)))  # the original fails on a single row, with k = 0
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= rows:
        raise ValueError(f"k={k!r} must be 'sqrt' or a number between 1 and the {rows} rows that can be clustered.")
    return k
