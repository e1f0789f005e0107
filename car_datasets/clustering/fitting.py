"""Compute the numbers of a `ClusterModel` from a column of embeddings: the two engines, and the parts of an engine.

Does: stream the embeddings into a covariance, whose memory does not grow with the rows, and project them onto its
principal components; fit k-means. Each process of a launcher reads its own part.
Does not: label rows, or save a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from car_datasets.clustering.kmeans import Chunks, KMeansSettings, fit_kmeans
from car_datasets.utils import columns
from car_datasets.utils.columns import Matrix, Positions, embedding_batches, read_embeddings
from car_datasets.utils.processes import Processes, all_processes, device_for, from_main
from car_datasets.utils.settings import is_integer

if TYPE_CHECKING:
    from datasets import Dataset

Doubles = npt.NDArray[np.float64]
MatrixOrTensor = TypeVar("MatrixOrTensor", Matrix, torch.Tensor)

COMPARED = 512  # rows that processes compare to check that they have the same dataset
# Share of a row's length by which two copies may differ: half precision on two kinds of GPU stays below it, the
# embedding of another text is further away.
ROUNDING = 0.02


class FitSettings(NamedTuple):
    """The checked arguments of [`ClusterModel.fit`], as Python's own numbers.

    Args:
        k (`int` or `"sqrt"`): number of clusters; `"sqrt"` is int(sqrt(rows / 2)).
        explained_variance (`float`): share of the variance in (0, 1] that PCA keeps; 1.0 keeps all components.
        seed (`int`): seed of k-means.
        n_init (`int`): number of runs of k-means, of which the best is kept.
        kmeans (`str`): the name of the engine.
        kmeans_sample (`int`): rows per cluster that k-means is fitted on; 0 for all rows.
    """

    k: int | str
    explained_variance: float
    seed: int
    n_init: int
    kmeans: str
    kmeans_sample: int


class Numbers(NamedTuple):
    """The numbers of a model, in the order of the fields of `ClusterModel`.

    Args:
        mean (`(dimension,)` float32): mean of the embeddings.
        components (`(kept, dimension)` float32): principal components.
        centers (`(k, kept)` float32): centres of k-means in the projected space.
        explained_variance (`float`): share of the variance that the components hold.
        inertia (`float`): sum of squared distances of all rows to their centres.
    """

    mean: Matrix
    components: Matrix
    centers: Matrix
    explained_variance: float
    inertia: float


Engine = Callable[["Dataset", str, FitSettings], Numbers]  # of rows, their column of embeddings, and settings


def fit_torch(dataset: Dataset, column: str, settings: FitSettings) -> Numbers:
    """Fit by a streamed PCA and k-means in torch, shared by the processes of a launcher.

    The column is read once for the components, once for the rows to fit on, and, after a fit on a sample, three more
    times.

    Args:
        dataset (`Dataset`): the rows to cluster, the same in every process.
        column (`str`): column of embeddings.
        settings ([`FitSettings`]): settings of the fit.

    Returns:
        [`Numbers`]: equal in all processes.
    """
    # One group for the entire fit: every process must take part in the same exchanges, in the same order.
    with all_processes() as processes:
        basis = _fit_basis(dataset, column, settings, processes)
        rows, device = sum(basis.lengths), clustering_device()
        chunks = Chunks(basis.lengths, partial(_read_matrices, dataset, column))
        points = Projection(basis.mean, basis.components, device)
        clusters = number_of_clusters(settings.k, rows)
        wanted = KMeansSettings(clusters, settings.seed, settings.n_init, settings.kmeans_sample)
        fitted = fit_kmeans(chunks, points, wanted, device=device, processes=processes)
        centers = fitted.centers.cpu().numpy()
        own = Numbers(basis.mean, basis.components, centers, basis.explained_variance, fitted.inertia)
        # All take the main process's numbers: another kind of GPU may have rounded its own differently.
        return processes.gather(lambda: own, lambda of_all: of_all[0])


class Basis(NamedTuple):
    """The result of the pass for PCA: the number of embeddings in each batch, and the projection."""

    lengths: list[int]
    mean: Matrix
    components: Matrix
    explained_variance: float


def _fit_basis(dataset: Dataset, column: str, settings: FitSettings, processes: Processes) -> Basis:
    """Measure this process's batches, then let the main process merge the parts of all and find the components."""
    batches = processes.share(math.ceil(len(dataset) / columns.BATCH), 1)
    try:
        return processes.gather(
            lambda: _measure(dataset, column, batches, Identity.of(dataset, column, settings, processes)),
            lambda parts: _merged(parts, settings.explained_variance),
        )
    except ValueError:
        if processes.count > 1:
            # The error counts the bad rows of one process only. The main process therefore reads all rows again, and
            # raises an error that counts all of them.
            processes.gather(lambda: None, lambda _: _read_to_the_end(dataset, column))
        raise


def _read_to_the_end(dataset: Dataset, column: str) -> None:
    for _ in embedding_batches(dataset, column):
        pass


class Part(NamedTuple):
    """The contribution of one process to a [`Basis`]; `covariance` is `None` if its batches hold no embedding."""

    identity: Identity | None
    covariance: Covariance | None
    lengths: list[int]


def _measure(dataset: Dataset, column: str, batches: range, identity: Identity | None) -> Part:
    """Return the covariance of some batches, and the number of embeddings in each; one pass over the rows."""
    lengths = [0] * len(batches)
    covariance = None
    for matrix, positions in _read(dataset, column, batches):
        # By position, since batches without an embedding are skipped.
        lengths[int(positions[0]) // columns.BATCH - batches.start] = len(matrix)
        covariance = merge(covariance, Covariance.of(matrix))
    return Part(identity, covariance, lengths)


def _merged(parts: list[Part], explained_variance: float) -> Basis:
    """Check that all processes measured the same dataset, and return the basis of their parts together."""
    check_same_data("fits clusters to", [part.identity for part in parts])
    covariance = None
    for part in parts:  # in the order of the ranks, so that the sum is the same on every run
        covariance = merge(covariance, part.covariance)
    if covariance is None:
        raise ValueError("There are no embeddings to fit on: run TextEmbedder over the rows first.")
    lengths = [length for part in parts for length in part.lengths]
    return Basis(lengths, *fit_components(covariance, explained_variance))


def fit_components(covariance: Covariance, explained_variance: float) -> tuple[Matrix, Matrix, float]:
    """Return mean and components in float32, and the share of the variance that the components hold."""
    components, share = covariance.principal_components(explained_variance)
    return covariance.mean.astype(np.float32), np.ascontiguousarray(components, dtype=np.float32), share


def _read_matrices(dataset: Dataset, column: str, batches: range) -> Iterator[Matrix]:
    for matrix, _ in _read(dataset, column, batches):
        yield matrix


def _read(dataset: Dataset, column: str, batches: range) -> Iterator[tuple[Matrix, Positions]]:
    """Yield some of the batches in which [`embedding_batches`] reads the column, and the positions of their rows."""
    # Without `rows`, a column without any embedding is an error; a part of the column may well have none.
    if len(batches) * columns.BATCH >= len(dataset):
        return embedding_batches(dataset, column)
    rows = range(batches.start * columns.BATCH, min(batches.stop * columns.BATCH, len(dataset)))
    return embedding_batches(dataset, column, rows) if batches else iter(())


def fit_sklearn(dataset: Dataset, column: str, settings: FitSettings) -> Numbers:
    """Fit by scikit-learn's PCA and k-means, with the entire column in memory, in the main process alone.

    Args:
        dataset (`Dataset`): the rows to cluster, the same in every process.
        column (`str`): column of embeddings.
        settings ([`FitSettings`]): settings of the fit; `kmeans_sample` is not used.

    Returns:
        [`Numbers`]: equal in all processes.
    """
    with all_processes() as processes:
        processes.gather(
            lambda: Identity.of(dataset, column, settings, processes),
            lambda identities: check_same_data("fits clusters to", identities),
        )
    return from_main(lambda: _fit_sklearn(dataset, column, settings))


def _fit_sklearn(dataset: Dataset, column: str, settings: FitSettings) -> Numbers:
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA

    matrix, _ = read_embeddings(dataset, column)
    clusters = number_of_clusters(settings.k, len(matrix))
    if (matrix == matrix[0]).all():  # one row, or equal ones: PCA would divide by a variance of 0
        mean, components, share = matrix[0], np.eye(1, matrix.shape[1], dtype=np.float32), 1.0
    else:
        kept = None if settings.explained_variance == 1.0 else settings.explained_variance
        # covariance_eigh is exact, and 15 times faster than the SVD that "auto" takes for wide embeddings.
        pca = PCA(kept, svd_solver="covariance_eigh", random_state=settings.seed).fit(matrix)
        mean, components = pca.mean_.astype(np.float32), pca.components_.astype(np.float32)
        share = float(pca.explained_variance_ratio_.sum())
    # In float32, k-means++ draws other centres on some processors, whose sums differ in the last bit; in float64 all
    # agree.
    points = project(matrix, mean, components).astype(np.float64)
    fitted = KMeans(clusters, n_init=settings.n_init, random_state=settings.seed).fit(points)
    return Numbers(mean, components, fitted.cluster_centers_.astype(np.float32), share, float(fitted.inertia_))


def number_of_clusters(k: int | str, rows: int) -> int:
    """Return `k` as a number; `"sqrt"` is the paper's int(sqrt(rows / 2)), at least 1.

    Raises:
        ValueError: k is not positive, or larger than the number of rows.
    """
    if k == "sqrt":
        k = max(1, int(math.sqrt(rows / 2)))  # the original fails on a single row, with k = 0
    if not is_integer(k) or not 1 <= k <= rows:
        raise ValueError(f"k={k!r} must be 'sqrt' or a number between 1 and the {rows} rows that can be clustered.")
    return int(k)


@dataclass
class Covariance:
    """Mean and centred products of the rows seen so far; two of these can be merged.

    Every chunk is centred by its own mean before its product is taken in float32, and the parts are merged in float64
    by the rule of Chan, Golub and LeVeque (1979). Rows far from the origin therefore lose no digits, and the order of
    the chunks hardly matters (1e-6).

    Args:
        rows (`int`): number of rows seen.
        mean (`(dimension,)` float64): mean of these rows.
        products (`(dimension, dimension)` float64): sum over the rows of (row - mean) (row - mean)^T.
    """

    rows: int
    mean: Doubles
    products: Doubles

    @classmethod
    def of(cls, chunk: Matrix) -> Covariance:
        """Return the covariance of one chunk, `(rows, dimension)` float32, with at least one row."""
        center = chunk.mean(axis=0)
        centred = chunk - center
        # The mean was rounded to float32, so the centred rows still have a small mean of their own.
        rest = centred.mean(axis=0).astype(np.float64)
        # numpy recognises a matrix times its own transpose, and computes only one half (BLAS syrk).
        products = (centred.T @ centred).astype(np.float64)
        return cls(len(chunk), center + rest, products - len(chunk) * np.outer(rest, rest))

    @classmethod
    def of_all(cls, chunks: Iterable[Matrix]) -> Covariance | None:
        """Return the covariance of the rows of all chunks, or `None` if there are no chunks."""
        total = None
        for chunk in chunks:
            total = merge(total, cls.of(chunk))
        return total

    def merge(self, other: Covariance) -> None:
        """Add the rows that `other` has seen, in place."""
        # Chan et al.: M = M1 + M2 + d d^T n1 n2 / (n1 + n2), with d the difference of the means.
        apart = other.mean - self.mean
        share = other.rows / (self.rows + other.rows)
        self.products += other.products
        self.products += np.outer(apart, apart) * (self.rows * share)
        self.mean = self.mean + apart * share
        self.rows += other.rows

    def principal_components(self, share: float) -> tuple[Doubles, float]:
        """Return the fewest components that hold `share` of the variance, as scikit-learn's `PCA(share)` counts it.

        Args:
            share (`float`): share of the variance in (0, 1]; 1 keeps min(rows, dimension), as scikit-learn does.

        Returns:
            Components `(kept, dimension)` of length 1 in order of falling variance, and the share of the variance that
            they hold. If all rows are equal: one axis, and 1.0.
        """
        dimension = len(self.mean)
        # Below this the variance is nothing but float32 rounding of equal rows, and its directions are noise.
        rounding = float(np.finfo(np.float32).eps) * np.abs(self.mean).max()
        if np.trace(self.products) <= self.rows * dimension * rounding**2:
            return np.eye(1, dimension), 1.0
        values, vectors = np.linalg.eigh(self.products)  # in order of rising eigenvalues
        shares = values[::-1].clip(min=0).cumsum()  # rounding can make the smallest eigenvalues negative
        shares /= shares[-1]
        kept = min(self.rows, dimension)
        if share < 1:
            # The same search, side included, as in scikit-learn's PCA.
            kept = min(kept, int(np.searchsorted(shares, share, side="right")) + 1)
        components = vectors.T[::-1][:kept]
        # The sign of a component is arbitrary: make its largest entry positive, so that equal rows give equal models.
        largest = np.abs(components).argmax(axis=1)
        signs = np.sign(components[np.arange(kept), largest])
        return components * signs[:, None], float(shares[kept - 1])


def merge(total: Covariance | None, part: Covariance | None) -> Covariance | None:
    """Return the total, into which the part is merged; `None` means no rows."""
    if total is None or part is None:
        return part if total is None else total
    total.merge(part)
    return total


def project(matrix: MatrixOrTensor, mean: MatrixOrTensor, components: MatrixOrTensor) -> MatrixOrTensor:
    """Return the coordinates of rows along principal components, `(rows, kept)`.

    Args:
        matrix (`(rows, dimension)` float32): rows, as a numpy array or a tensor; the other two are of the same kind.
        mean (`(dimension,)` float32): mean of the rows that the components were computed from.
        components (`(kept, dimension)` float32): directions of length 1.
    """
    return (matrix - mean) @ components.T


@dataclass(frozen=True)
class Projection:
    """A callable that takes embeddings `(rows, dimension)` to points `(rows, kept)` on a device.

    Args:
        mean (`(dimension,)` float32): mean of the embeddings.
        components (`(kept, dimension)` float32): principal components.
        device (`torch.device`): device to compute on.
    """

    mean: Matrix
    components: Matrix
    device: torch.device

    @cached_property
    def _on_device(self) -> tuple[torch.Tensor, torch.Tensor]:
        # Copied once, not for every batch. A cached property writes to `__dict__`, which a frozen dataclass allows.
        return torch.from_numpy(self.mean).to(self.device), torch.from_numpy(self.components).to(self.device)

    def __call__(self, embeddings: Matrix) -> torch.Tensor:
        """Return the points of a batch of embeddings, float32."""
        # torch.tensor copies: torch.from_numpy warns of arrays that are views of Arrow's read-only buffers.
        return project(torch.tensor(embeddings, device=self.device), *self._on_device)


def clustering_device(rank: int | None = None) -> torch.device:
    """Return the CUDA device of this process or `.map` worker, or the CPU if there is none.

    Other devices, such as Apple's, lack float64, which the sums of k-means need.

    Args:
        rank (`int`, *optional*): rank that `.map(with_rank=True)` passes.
    """
    return device_for(rank) if torch.cuda.is_available() else torch.device("cpu")


class Identity(NamedTuple):
    """A fingerprint used to check that all processes work on the same data: the arguments, plus a sample of rows.

    The rows are compared by value and not by a digest, since processes may have embedded them on different GPUs.

    Args:
        asked (`tuple`): number of rows, column, and arguments; must be equal.
        rows (`(up to COMPARED, dimension)` float32): rows from all over the dataset; must be equal up to rounding.
    """

    asked: tuple[Any, ...]
    rows: Matrix

    @classmethod
    def of(cls, dataset: Dataset, column: str, asked: tuple[Any, ...], processes: Processes) -> Identity | None:
        """Return the fingerprint of this process's work, or `None` in a single process."""
        if processes.count == 1:
            return None
        some = np.unique(np.linspace(0, max(len(dataset) - 1, 0), COMPARED).astype(int))[: len(dataset)]
        rows = dataset.select_columns([column]).with_format(None).select(some.tolist())[:][column]
        # Padded with NaN: rows may be null or of unequal length here, which only a later check refuses.
        sample = np.full((len(rows), max((len(row or ()) for row in rows), default=0)), np.nan, dtype=np.float32)
        for place, row in zip(sample, rows, strict=True):
            place[: len(row or ())] = row or ()
        return cls((len(dataset), column, *asked), sample)

    def matches(self, other: Identity) -> bool:
        """Return True if the rows are equal up to rounding, as of embeddings that were computed on another GPU."""
        if self.asked != other.asked or self.rows.shape != other.rows.shape:
            return False
        # One number per row: the length of the difference, and that of the row.
        apart, size = (np.linalg.norm(matrix, axis=1) for matrix in (self.rows - other.rows, self.rows))
        missing = np.isnan(self.rows).any(axis=1)
        if (missing != np.isnan(other.rows).any(axis=1)).any():
            return False
        return bool((apart[~missing] <= ROUNDING * size[~missing] + 1e-6).all())


def check_same_data(action: str, identities: list[Identity | None]) -> None:
    """Raise ValueError, naming the process, if one works on other data than the main process.

    Args:
        action (`str`): what the processes do, for the message.
        identities (`list[Identity | None]`): one per process, the main one first.
    """
    main = identities[0]
    for rank, other in enumerate(identities):
        if main is not None and other is not None and not main.matches(other):
            raise ValueError(
                f"dataset: process {rank} of {len(identities)} {action} other rows or in another way than the main one: "
                f"{other.asked}, not {main.asked}. Pass the same rows, in the same order, and settings in all "
                "processes, or let each work on its own: `with car_datasets.utils.processes.alone(): ...`."
            )
