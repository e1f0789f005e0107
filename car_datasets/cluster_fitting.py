"""How the numbers of a `ClusterModel` are found: components by covariance.py and centres by kmeans.py, or both by scikit-learn.

Does: read the embeddings as often as a fit needs them, each process of a launcher its own part; check the settings of a fit.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from car_datasets import vectors
from car_datasets.collectives import Processes
from car_datasets.covariance import Covariance
from car_datasets.kmeans import Chunks, fit_kmeans
from car_datasets.parallel import all_processes, device_for, from_main, note_that_torch_runs
from car_datasets.settings import is_whole_number
from car_datasets.vectors import Matrix, Positions, embedding_batches, read_embeddings

if TYPE_CHECKING:
    from datasets import Dataset

ENGINES = ("torch", "sklearn")
COMPARED = 512  # rows by which processes see that they have the same dataset
ROUNDING = 0.02  # of a row's length: half precision on two kinds of GPU stays below it, another text is further away


class FitSettings(NamedTuple):
    """What [`ClusterModel.fit`] is told, as Python's own numbers: see there."""

    k: int | str
    explained_variance: float
    seed: int
    n_init: int
    kmeans: str
    kmeans_sample: int


class Numbers(NamedTuple):
    """The numbers of a model, in the order of its fields."""

    mean: Matrix
    components: Matrix
    centers: Matrix
    explained_variance: float
    inertia: float


class Identity(NamedTuple):
    """By which processes see that they do the same: what was asked of them, and rows from all over the dataset."""

    asked: tuple[Any, ...]
    rows: Matrix

    @classmethod
    def of(cls, dataset: Dataset, column: str, asked: tuple[Any, ...], processes: Processes) -> Identity | None:
        """Of what this process works on; a process that is alone needs none."""
        if processes.count == 1:
            return None
        some = np.unique(np.linspace(0, max(len(dataset) - 1, 0), COMPARED).astype(int))[: len(dataset)]
        rows = dataset.select_columns([column]).with_format(None).select(some.tolist())[:][column]
        found = np.full((len(rows), max((len(row or ()) for row in rows), default=0)), np.nan, dtype=np.float32)
        for place, row in zip(found, rows, strict=True):
            place[: len(row or ())] = row or ()
        return cls((len(dataset), column, *asked), found)

    def is_of_the_same(self, other: Identity) -> bool:
        """Whether the rows are equal but for rounding, as of embeddings that were computed on another GPU."""
        if self.asked != other.asked or self.rows.shape != other.rows.shape:
            return False
        apart, size = (np.linalg.norm(matrix, axis=1) for matrix in (self.rows - other.rows, self.rows))
        missing = np.isnan(self.rows).any(axis=1)
        if (missing != np.isnan(other.rows).any(axis=1)).any():
            return False
        return bool((apart[~missing] <= ROUNDING * size[~missing] + 1e-6).all())


@dataclass(frozen=True)
class Projection:
    """From embeddings `(rows, dimension)` to points `(rows, kept)` on a device."""

    mean: Matrix
    components: Matrix
    device: torch.device

    @cached_property
    def _components(self) -> torch.Tensor:
        return torch.from_numpy(self.components).to(self.device)

    def __call__(self, embeddings: Matrix) -> torch.Tensor:
        centred = torch.from_numpy(embeddings - self.mean).to(self.device)
        return centred @ self._components.T


def clustering_device(rank: int | None = None) -> torch.device:
    """As [`device_for`] where there is CUDA, else the CPU: other devices lack float64, which sums need."""
    return device_for(rank) if torch.cuda.is_available() else torch.device("cpu")


def fit_torch(dataset: Dataset, column: str, settings: FitSettings) -> Numbers:
    """One pass over the column for the components, one for the rows to fit on, and, after a sample, three more.

    The processes of a launcher share every pass, and get the same numbers.
    """
    note_that_torch_runs()
    with all_processes() as processes:
        lengths, mean, components, share = _components_of_all(dataset, column, settings, processes)

        def read(batches: range) -> Iterator[Matrix]:
            return (matrix for matrix, _ in _read(dataset, column, batches))

        device = clustering_device()
        fitted = fit_kmeans(
            Chunks(lengths, read),
            Projection(mean, components, device),
            number_of_clusters(settings.k, sum(lengths)),
            seed=settings.seed,
            n_init=settings.n_init,
            sample=settings.kmeans_sample,
            device=device,
            processes=processes,
        )
        numbers = Numbers(mean, components, fitted.centers.cpu().numpy(), share, fitted.inertia)
        return processes.joined(
            lambda: numbers, lambda found: found[0]
        )  # not even another kind of GPU rounds otherwise


def _components_of_all(
    dataset: Dataset, column: str, settings: FitSettings, processes: Processes
) -> tuple[list[int], Matrix, Matrix, float]:
    """How many rows of each batch have an embedding; mean, components, and the share of variance that they hold."""
    batches = processes.share(-(-len(dataset) // vectors.BATCH), 1)
    lengths = [0] * len(batches)

    def own() -> tuple[Identity | None, Covariance | None, list[int]]:
        def counted() -> Iterator[Matrix]:
            for matrix, places in _read(dataset, column, batches):
                lengths[int(places[0]) // vectors.BATCH - batches.start] = len(matrix)
                yield matrix

        found = Covariance.of_all(counted())
        return Identity.of(dataset, column, settings, processes), found, lengths

    def join(parts: list[tuple[Identity | None, Covariance | None, list[int]]]) -> tuple[Any, ...]:
        refuse_others("fits clusters to", [identity for identity, _, _ in parts])
        first, *others = [covariance for _, covariance, _ in parts if covariance is not None]
        for other in others:
            first.merge(other)
        return [n for _, _, lengths in parts for n in lengths], *fit_components(first, settings.explained_variance)

    try:
        found: Any = processes.joined(own, join)
    except ValueError:
        if processes.count > 1:  # said of a part of the rows: the main process reads them all and says it of all
            processes.joined(lambda: None, lambda _: deque(embedding_batches(dataset, column), maxlen=0))
        raise
    return found


def _read(dataset: Dataset, column: str, batches: range) -> Iterator[tuple[Matrix, Positions]]:
    """Some of the batches in which [`embedding_batches`] gives the column."""
    if len(batches) * vectors.BATCH >= len(dataset):
        return embedding_batches(dataset, column)
    rows = range(batches.start * vectors.BATCH, min(batches.stop * vectors.BATCH, len(dataset)))
    return embedding_batches(dataset, column, rows) if batches else iter(())


def refuse_others(does: str, identities: list[Identity | None]) -> None:
    """Raise where a process works on something else than the main one.

    Raises:
        ValueError: it names the process.
    """
    main = identities[0]
    for rank, other in enumerate(identities):
        if main is not None and other is not None and not main.is_of_the_same(other):
            raise ValueError(
                f"dataset: process {rank} of {len(identities)} {does} other rows or in another way than the main one: "
                f"{other.asked}, not {main.asked}. Pass the same rows, in the same order, and settings in all processes, or "
                "let each work on its own: `with car_datasets.parallel.alone(): ...`."
            )


def fit_components(covariance: Covariance, explained_variance: float) -> tuple[Matrix, Matrix, float]:
    """Mean and components in float32, and the share of the variance that the components hold."""
    components, share = covariance.principal_components(explained_variance)
    return covariance.mean.astype(np.float32), np.ascontiguousarray(components, dtype=np.float32), share


def fit_sklearn(dataset: Dataset, column: str, settings: FitSettings) -> Numbers:
    """The reference: scikit-learn's PCA and k-means, with the whole column in memory, of the main process alone."""
    with all_processes() as processes:
        processes.joined(
            lambda: Identity.of(dataset, column, settings, processes),
            lambda found: refuse_others("fits clusters to", found),
        )
    return from_main(lambda: _fit_sklearn(dataset, column, settings))


def _fit_sklearn(dataset: Dataset, column: str, settings: FitSettings) -> Numbers:
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA

    note_that_torch_runs()
    matrix, _ = read_embeddings(dataset, column)
    clusters = number_of_clusters(settings.k, len(matrix))
    if (matrix == matrix[0]).all():  # one row, or equal ones: no variance to explain
        mean, components, share = matrix[0], np.eye(1, matrix.shape[1], dtype=np.float32), 1.0
    else:
        kept = None if settings.explained_variance == 1.0 else settings.explained_variance
        # covariance_eigh is exact, and 15 times faster than the SVD that "auto" takes for wide embeddings.
        pca = PCA(kept, svd_solver="covariance_eigh", random_state=settings.seed).fit(matrix)
        mean, components = pca.mean_.astype(np.float32), pca.components_.astype(np.float32)
        share = float(pca.explained_variance_ratio_.sum())
    found = KMeans(clusters, n_init=settings.n_init, random_state=settings.seed).fit((matrix - mean) @ components.T)
    return Numbers(mean, components, found.cluster_centers_, share, float(found.inertia_))


def checked_fit(
    k: int | str, explained_variance: float, seed: int, n_init: int, kmeans: str, kmeans_sample: int
) -> FitSettings:
    """The settings, with numpy's numbers as Python's own.

    Raises:
        ValueError: no fit can have them. Whether k is above the rows is known when they have been counted.
    """
    k, seed, n_init, kmeans_sample = (_plain(value) for value in (k, seed, n_init, kmeans_sample))
    if k != "sqrt" and (not is_whole_number(k) or k < 1):
        raise ValueError(f"k={k!r} must be 'sqrt' or a whole number of clusters, at least 1.")
    real = is_whole_number(explained_variance) or isinstance(explained_variance, (float, np.floating))
    if not real or not 0 < explained_variance <= 1:
        raise ValueError(f"explained_variance={explained_variance!r} must lie in (0, 1].")
    if not is_whole_number(n_init) or n_init < 1:
        raise ValueError(f"n_init={n_init!r} must be at least 1, a whole number of runs.")
    if not is_whole_number(seed) or not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed!r} must be a whole number from 0 to 2**32 - 1.")
    if kmeans not in ENGINES:
        raise ValueError(f"kmeans={kmeans!r} is not known; choose one of {ENGINES}.")
    if not is_whole_number(kmeans_sample) or kmeans_sample < 0:
        raise ValueError(f"kmeans_sample={kmeans_sample!r} must be a number of rows per cluster, or 0 for all rows.")
    return FitSettings(k, float(explained_variance), seed, n_init, kmeans, kmeans_sample)


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, np.integer) else value


def number_of_clusters(k: int | str, rows: int) -> int:
    """`k` as a number, checked against the rows; `"sqrt"` is int(sqrt(rows / 2)), at least 1.

    Raises:
        ValueError: it is not positive, or larger than the number of rows.
    """
    k = _plain(k)
    if k == "sqrt":
        k = max(1, int(math.sqrt(rows / 2)))  # the original fails on a single row, with k = 0
    if not is_whole_number(k) or not 1 <= k <= rows:
        raise ValueError(f"k={k!r} must be 'sqrt' or a number between 1 and the {rows} rows that can be clustered.")
    return k
