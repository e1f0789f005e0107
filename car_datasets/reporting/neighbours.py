"""Find the rows that are most similar to others: `Nearest`, batch by batch, and `nearest_rows` for a selection.

Does: keep the best by cosine of a pool that is read in batches; tell them apart from the selected ones.
Does not: read a cluster model: the embeddings and clusters in the pool's columns are enough.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from car_datasets.reporting.overview import Overview
from car_datasets.selection.rule import Indices
from car_datasets.utils.columns import Matrix, unit_rows


@dataclass(frozen=True)
class Neighbour:
    """A row that is similar to the one that is explained.

    Args:
        row (`int` or `str`): its value in the index column, or its position if the pool has no such column.
        similarity (`float`): cosine of the two embeddings.
        score (`float`, *optional*): its score.
        selected (`bool`): True if the row was selected.
    """

    row: int | str
    similarity: float
    score: float | None
    selected: bool


class Nearest(NamedTuple):
    """The most similar rows found so far, for each of some rows that were asked about.

    Args:
        similarities (`(asked, found)` float32): cosines, highest first; -inf for a row that is not allowed.
        rows (`(asked, found)` int64): positions of these rows.
    """

    similarities: Matrix
    rows: Indices

    @classmethod
    def none(cls, asked: int) -> Nearest:
        """Return the state before any row was looked at, for a number of rows that are asked about."""
        return cls(np.zeros((asked, 0), dtype=np.float32), np.zeros((asked, 0), dtype=np.int64))

    def updated(self, similarities: Matrix, rows: Indices, count: int) -> Nearest:
        """Return the best `count` of the rows found so far and of more rows.

        Args:
            similarities (`(asked, n)` float32): cosines of the new rows; -inf for a row that is not allowed.
            rows (`(n,)` int64): their positions, ascending, all after those of earlier calls, so that ties go to the
                earlier row.
            count (`int`): rows to keep, 1 or more.
        """
        # Drop all but `count` of the new rows before sorting: a batch has thousands, of which few are kept. They are
        # put back in row order, so that the stable sort below gives ties to the earlier row.
        if count < similarities.shape[1]:
            few = (
                similarities.argmax(axis=1)[:, None]  # the first of equal ones
                if count == 1
                else np.sort(np.argpartition(-similarities, count - 1, axis=1)[:, :count], axis=1)
            )
            similarities, rows = np.take_along_axis(similarities, few, axis=1), rows[few]
        values = np.hstack([self.similarities, similarities])
        places = np.hstack([self.rows, np.broadcast_to(rows, similarities.shape)])
        order = np.argsort(-values, axis=1, kind="stable")[:, :count]
        return Nearest(np.take_along_axis(values, order, axis=1), np.take_along_axis(places, order, axis=1))


def nearest_rows(overview: Overview, rows: Indices, count: int) -> tuple[list[list[Neighbour]], list[list[Neighbour]]]:
    """Find the rows that are nearest to each of some rows in its cluster, and the selected row that is nearest to it.

    Args:
        overview ([`Overview`]): of the pool and its selection.
        rows (`(asked,)` int64): positions of the rows that are asked about.
        count (`int`): neighbours in the cluster, 0 or more.

    Returns:
        `tuple[list[list[Neighbour]], list[list[Neighbour]]]`: for each row, its neighbours in the cluster, nearest first;
        and for each row a list of the nearest selected row alone. The lists of a row without an embedding are empty.
    """
    # By cosine similarity and not by distance after PCA, which only the cluster model knows: the pool alone is enough.
    of_cluster, of_selection = Nearest.none(len(rows)), Nearest.none(len(rows))
    vectors, present = overview.embeddings_of(rows)
    if len(present) == 0:
        return _as_neighbours(overview, of_cluster), _as_neighbours(overview, of_selection)
    # One row per question; those without an embedding stay zero.
    asked = np.zeros((len(rows), vectors.shape[1]), dtype=np.float32)
    asked[present] = unit_rows(vectors)
    directed = asked.any(axis=1)  # a vector of zeros has no direction, and no neighbours
    groups = _by_cluster(overview, rows, np.flatnonzero(directed)) if count else {}
    parts = {label: Nearest.none(len(group)) for label, group in groups.items()}
    for matrix, positions in overview.embedding_batches():
        unit, clusters = unit_rows(matrix), overview.clusters[positions]
        # Each cluster by itself: a page asks about thousands of rows, and all their pairs would be too many.
        for label in np.intersect1d(clusters, list(groups)).tolist():
            same, group = np.flatnonzero(clusters == label), groups[label]
            similar = _others(asked[group], unit[same], rows[group], positions[same])
            parts[label] = parts[label].updated(similar, positions[same], count)
        chosen = np.flatnonzero(overview.taken[positions])
        similar = _others(asked, unit[chosen], rows, positions[chosen])
        similar[~directed] = -np.inf
        of_selection = of_selection.updated(similar, positions[chosen], 1)
    named: list[list[Neighbour]] = [[] for _ in rows]
    for label, group in groups.items():
        for place, found in zip(group.tolist(), _as_neighbours(overview, parts[label]), strict=True):
            named[place] = found
    return named, _as_neighbours(overview, of_selection)


def _by_cluster(overview: Overview, rows: Indices, known: Indices) -> dict[int, Indices]:
    """Return the indices into `rows` of those that are in each cluster, of the ones that have a direction."""
    clusters = overview.clusters[rows]
    return {label: known[clusters[known] == label] for label in np.unique(clusters[known]).tolist() if label >= 0}


def _others(asked: Matrix, unit: Matrix, rows: Indices, positions: Indices) -> Matrix:
    """Return the cosines of rows that are asked about with rows of the pool, ascending; -inf for a row with itself."""
    cosines: Matrix = asked @ unit.T
    itself, where = np.nonzero(np.isin(rows, positions))[0], np.searchsorted(positions, rows)
    cosines[itself, where[itself]] = -np.inf
    return cosines


def _as_neighbours(overview: Overview, nearest: Nearest) -> list[list[Neighbour]]:
    """Return the rows that were found as [`Neighbour`]s, without those that are not allowed."""
    return [
        [
            _as_neighbour(overview, row, similarity)
            for similarity, row in zip(*pair, strict=True)
            if similarity > -np.inf
        ]
        for pair in zip(nearest.similarities.tolist(), nearest.rows.tolist(), strict=True)
    ]


def _as_neighbour(overview: Overview, row: int, similarity: float) -> Neighbour:
    score = float(overview.scores[row])
    score_or_none = None if np.isnan(score) else score
    return Neighbour(overview.name_of(row), similarity, score_or_none, bool(overview.taken[row]))
