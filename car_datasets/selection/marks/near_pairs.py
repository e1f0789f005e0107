"""Find pairs of rows with similar embeddings, without comparing every row with every other one.

Does: put rows into cells around the means of their clusters; compare rows within a cell, and with the rows whose
second-nearest cell it is; compute cosines that are equal on every machine.
Does not: hold more embeddings than those of one cell; read texts, or decide which rows are duplicates.

Embeddings are scaled to length `SCALE` and rounded to integers. Products and sums of such numbers stay below 2^24, where
float32 is exact, so neither the number of threads nor the processor changes a cosine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from datasets import Dataset

from car_datasets.utils.columns import Matrix, Positions, embedding_batches, matrix_of, take_rows

SCALE = 4_000  # length of a rounded embedding; its square must stay below 2^24
LARGEST = 4_096  # rows of a cell; a cluster with more is divided
BLOCK = 1 << 22  # cosines in memory at a time


class Pairs(NamedTuple):
    """Pairs of rows.

    Args:
        first (`(pairs,)` int64), second (`(pairs,)` int64): positions.
        cosines (`(pairs,)` float32): of their embeddings.
    """

    first: Positions
    second: Positions
    cosines: npt.NDArray[np.float32]

    @classmethod
    def none(cls) -> Pairs:
        """Return no pairs."""
        return cls(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32))

    @classmethod
    def joined(cls, parts: Sequence[Pairs]) -> Pairs:
        """Return the pairs of all parts, of which there must be one or more."""
        first, second, cosines = zip(*parts, strict=True)
        return cls(np.concatenate(first), np.concatenate(second), np.concatenate(cosines))

    def at(self, places: Any) -> Pairs:
        """Return the pairs at these places: indices, a slice or a mask."""
        return Pairs(self.first[places], self.second[places], self.cosines[places])


class _Cells(NamedTuple):
    rows: Positions  # those with an embedding, ascending
    nearest: npt.NDArray[np.int32]  # the cell of each
    next: npt.NDArray[np.int32]  # the cell whose centre is second-nearest; -1 with a single cell
    number: int


def near_pairs(
    dataset: Dataset, column: str, clusters: Positions | None, skip: npt.NDArray[np.bool_], least: float
) -> Iterator[Pairs]:
    """Yield the pairs of rows with a cosine of `least` or more; a pair can come twice, from two cells.

    Args:
        dataset (`Dataset`): with embeddings.
        column (`str`): column of embeddings; rows without one are in no pair.
        clusters (`(rows,)` int64, *optional*): -1 for a row in none. Without clusters, cells are made around rows
            evenly drawn from the dataset.
        skip (`(rows,)` bool): rows to leave out.
        least (`float`): cosine.
    """
    cells = _divide(dataset, column, clusters, skip)
    owners, visitors = (np.argsort(labels, kind="stable") for labels in (cells.nearest, cells.next))
    numbers = np.arange(cells.number)
    starts, ends = (np.searchsorted(cells.nearest[owners], numbers, side) for side in ("left", "right"))
    from_, to = (np.searchsorted(cells.next[visitors], numbers, side) for side in ("left", "right"))
    for cell in range(cells.number):
        own = cells.rows[owners[starts[cell] : ends[cell]]]
        if len(own) == 0:
            continue
        guests = cells.rows[visitors[from_[cell] : to[cell]]]
        vectors = _read(dataset, column, np.concatenate([own, guests]))
        yield from _similar(vectors, np.concatenate([own, guests]), len(own), least)


def rounded(matrix: Matrix) -> Matrix:
    """Return the rows scaled to length `SCALE`, and rounded to integers; rows of zeros stay zeros."""
    # In float64, so that the order of the sum cannot change how a number is rounded.
    lengths = np.sqrt(np.einsum("ij,ij->i", matrix, matrix, dtype=np.float64))
    scales = np.divide(SCALE, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    return np.rint(matrix * scales[:, None].astype(np.float32))


def _divide(dataset: Dataset, column: str, clusters: Positions | None, skip: npt.NDArray[np.bool_]) -> _Cells:
    """Assign each row to its two nearest centres."""
    centers = _centers(dataset, column, clusters, skip)
    parts: list[tuple[Positions, npt.NDArray[np.int32], npt.NDArray[np.int32]]] = []
    for matrix, positions in embedding_batches(dataset, column):
        kept = ~skip[positions]
        similar = rounded(matrix[kept]) @ centers.T
        nearest = similar.argmax(axis=1).astype(np.int32)
        second = np.full(len(nearest), -1, dtype=np.int32)
        if len(centers) > 1:
            similar[np.arange(len(nearest)), nearest] = -np.inf
            second = similar.argmax(axis=1).astype(np.int32)
        parts.append((positions[kept], nearest, second))
    rows, nearest, second = (np.concatenate(part) for part in zip(*parts, strict=True))
    return _Cells(rows, nearest, second, len(centers))


def _centers(dataset: Dataset, column: str, clusters: Positions | None, skip: npt.NDArray[np.bool_]) -> Matrix:
    """Return the centres of the cells, rounded: the mean of each cluster, or rows of a cluster that is too large."""
    labels = np.where(skip, -1, 0 if clusters is None else clusters)
    if not (labels >= 0).any():
        labels = np.where(skip, -1, 0)  # no row is in a cluster
    names, numbers = np.unique(labels[labels >= 0], return_inverse=True)
    if len(names) == 0:
        return _read(dataset, column, np.zeros(1, dtype=np.int64))
    labels[labels >= 0] = numbers
    sums: npt.NDArray[np.float64] | None = None
    counts = np.zeros(len(names), dtype=np.int64)
    found: list[Positions] = []
    for matrix, positions in embedding_batches(dataset, column):
        kept = labels[positions] >= 0
        positions = positions[kept]
        order = np.argsort(labels[positions], kind="stable")
        own = labels[positions][order]
        vectors = rounded(matrix[kept])[order].astype(np.float64)  # sums of integers are exact in float64
        sums = np.zeros((len(names), matrix.shape[1])) if sums is None else sums
        present, starts = np.unique(own, return_index=True)
        if len(present):
            sums[present] += np.add.reduceat(vectors, starts, axis=0)
        counts += np.bincount(own, minlength=len(names))
        found.append(positions)
    assert sums is not None  # embedding_batches refuses a column without embeddings
    # A cluster of n rows takes n^2 comparisons.
    large = np.flatnonzero(counts > LARGEST)
    means = rounded(np.delete(sums / np.maximum(counts, 1)[:, None], large, axis=0).astype(np.float32))
    if len(large) == 0:
        return means
    rows = np.concatenate(found)
    by_label = [rows[labels[rows] == label] for label in large]
    drawn = np.concatenate([some[:: LARGEST // 4] for some in by_label])
    return np.concatenate([means, _read(dataset, column, np.sort(drawn))])


def _read(dataset: Dataset, column: str, rows: Positions) -> Matrix:
    """Return the rounded embeddings of these rows, in their order."""
    order = dataset._indices  # row numbers in `data` of a shuffled or filtered dataset; it has no public name
    if order is not None:
        rows = order.column(0).take(rows).to_numpy().astype(np.int64)
    return rounded(matrix_of(take_rows(dataset.data.column(column), rows), column)[0])


def _similar(vectors: Matrix, rows: Positions, own: int, least: float) -> Iterator[Pairs]:
    """Yield the similar pairs of the first `own` rows of a cell, among themselves and with all others."""
    threshold = np.float32(least * SCALE * SCALE)
    step = max(1, BLOCK // len(rows))
    for start in range(0, own, step):
        block = vectors[start : start + step]
        products = block @ vectors[start:].T
        found = np.flatnonzero(products >= threshold)
        one, other = found // products.shape[1], found % products.shape[1]
        later = other > one  # each pair once, and no row with itself
        one, other, found = one[later], other[later], found[later]
        if len(one):
            cosines = products.ravel()[found] / np.float32(SCALE * SCALE)
            yield Pairs(rows[one + start], rows[other + start], np.minimum(cosines, np.float32(1)))
