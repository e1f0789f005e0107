"""Find pairs of rows with similar embeddings, without comparing every row with every other one.

Does: put each row into the two nearest of the cells around the means of clusters; compare rows within a cell; compute
cosines that are equal on every machine.
Does not: hold more embeddings than those of one cell, or of `READ` rows; read texts, or decide which rows are duplicates.

Embeddings are scaled to length `SCALE` and rounded to integers. Products and sums of such numbers stay below 2^24, where
float32 is exact, so neither the number of threads nor the processor changes a cosine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from datasets import Dataset

from car_datasets.utils.columns import Matrix, Positions, embedding_batches, matrix_of, rows_by_chunk

SCALE = 4_000  # length of a rounded embedding; its square must stay below 2^24
LARGEST = 4_096  # rows; a cluster with more is divided
BLOCK = 1 << 20  # cosines in memory at a time: few enough for a processor's cache
READ = 1 << 16  # embeddings that are read together, for one cell or for several


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


class _Cell(NamedTuple):
    """The rows that are nearest to a centre, or nearer to one other centre alone.

    Args:
        number (`int`): of the cell.
        rows (`(rows,)` int64): positions.
        other (`(rows,)` int32): the other cell that each row is in; -1 with a single cell.
    """

    number: int
    rows: Positions
    other: npt.NDArray[np.int32]


def near_pairs(
    dataset: Dataset, column: str, clusters: Positions | None, skip: npt.NDArray[np.bool_], least: float
) -> Iterator[Pairs]:
    """Yield the pairs of rows with a cosine of `least` or more that have one of their two nearest centres in common.

    Args:
        dataset (`Dataset`): with embeddings.
        column (`str`): column of embeddings; rows without one are in no pair.
        clusters (`(rows,)` int64, *optional*): -1 for a row in none. Without clusters, cells are made around rows
            evenly drawn from the dataset.
        skip (`(rows,)` bool): rows to leave out.
        least (`float`): cosine.
    """
    for group in _groups(_divide(dataset, column, clusters, skip)):
        vectors, start = _read(dataset, column, np.concatenate([cell.rows for cell in group])), 0
        for cell in group:
            yield from _similar(vectors[start : start + len(cell.rows)], cell, least)
            start += len(cell.rows)


def _groups(cells: Iterable[_Cell]) -> Iterator[list[_Cell]]:
    """Yield cells together as long as they have few rows, since each read of a column touches all of its chunks."""
    group: list[_Cell] = []
    rows = 0
    for cell in cells:
        if group and rows + len(cell.rows) > READ:
            yield group
            group, rows = [], 0
        group.append(cell)
        rows += len(cell.rows)
    if group:
        yield group


def rounded(matrix: Matrix) -> Matrix:
    """Return the rows scaled to length `SCALE`, and rounded to integers; rows of zeros stay zeros."""
    # In float64, so that the order of the sum cannot change how a number is rounded.
    lengths = np.sqrt(np.einsum("ij,ij->i", matrix, matrix, dtype=np.float64))
    scales = np.divide(SCALE, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    return np.rint(matrix * scales[:, None].astype(np.float32))


def _divide(dataset: Dataset, column: str, clusters: Positions | None, skip: npt.NDArray[np.bool_]) -> Iterator[_Cell]:
    """Yield the cells of the two nearest centres of each row."""
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
    own, others, rows = np.r_[nearest, second], np.r_[second, nearest], np.r_[rows, rows]
    order = np.argsort(own, kind="stable")
    ends = np.searchsorted(own[order], np.arange(len(centers)), "right")
    for number, start in enumerate(np.searchsorted(own[order], np.arange(len(centers)), "left").tolist()):
        members = order[start : ends[number]]
        if len(members):
            yield _Cell(number, rows[members], others[members])


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
    found: Matrix | None = None
    # Rounded chunk by chunk, in a processor's cache: ten times as fast as all rows at once.
    for where, some in rows_by_chunk(dataset.data.column(column), rows):
        vectors = rounded(matrix_of(some, column)[0])
        found = np.empty((len(rows), vectors.shape[1]), dtype=np.float32) if found is None else found
        found[where] = vectors
    assert found is not None  # each cell has rows
    return found


def _similar(vectors: Matrix, cell: _Cell, least: float) -> Iterator[Pairs]:
    """Yield the similar pairs of a cell, but those that are in another cell as well in the first of the two only."""
    threshold = np.float32(least * SCALE * SCALE)
    step = max(1, BLOCK // len(vectors))
    held = np.empty(min(step, len(vectors)) * len(vectors), dtype=np.float32)  # new memory costs more than a product
    for start in range(0, len(vectors), step):
        block, others = vectors[start : start + step], vectors[start:]
        products = held[: len(block) * len(others)].reshape(len(block), len(others))
        np.matmul(block, others.T, out=products)
        similar = products >= threshold
        np.fill_diagonal(similar, False)
        found = np.flatnonzero(similar)
        if len(found) == 0:
            continue
        one = np.repeat(np.arange(len(block)), np.count_nonzero(similar, axis=1))
        other = found - one * len(others)
        own, theirs = cell.other[start + one], cell.other[start + other]
        new = (other > one) & ((own != theirs) | (own > cell.number) | (own < 0))
        one, other = one[new], other[new]
        if len(one):
            cosines = products[one, other] / np.float32(SCALE * SCALE)
            yield Pairs(cell.rows[one + start], cell.rows[other + start], np.minimum(cosines, np.float32(1)))
