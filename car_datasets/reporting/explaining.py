"""`explain`: why a row was selected or not.

Does: find the row's place among the scores and in its cluster, the rows nearest to it, and the rule that decided, and
put them into words.
Does not: select anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from car_datasets.loading.chats import OK, TRUNCATED
from car_datasets.reporting.overview import Overview
from car_datasets.selection.rule import BY_BOTH, BY_CLUSTER, BY_SCORE, Indices
from car_datasets.utils.column_names import ColumnNames
from car_datasets.utils.columns import Matrix, unit_rows
from car_datasets.utils.settings import is_whole_number

if TYPE_CHECKING:
    from datasets import Dataset


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


@dataclass(frozen=True)
class Explanation:
    """Why a row was selected or not.

    Args:
        row (`int` or `str`): its value in the index column, or its position if the pool has no such column.
        selected_by (`str`, *optional*): `"score"`, `"cluster"`, `"both"`, or `None` if it was not selected.
        why (`str`): the same in a sentence.
        score (`float`, *optional*): its score.
        score_rank (`int`): rank by score in the pool, 1 for the best; 0 without a score.
        percentile (`float`): share of the scored rows, in %, that score no better; 0 without a score.
        length (`float`): its length in `length_unit`.
        length_unit (`str`): `"tokens"` of the scored text, or `"characters"` of the row's strings.
        truncated (`bool`): True if the text was longer than the scorer reads.
        status (`str`): `"ok"`, `"truncated"`, ..., or why there is no score (`"unknown"` without a status column).
        cluster (`int`, *optional*): its cluster.
        cluster_size (`int`): scored rows in the cluster.
        cluster_rank (`int`): rank by score among them, 1 for the best; 0 without a cluster or a score.
        neighbours (`tuple[Neighbour, ...]`): rows of its cluster that are most similar to it, nearest first.
        nearest_selected ([`Neighbour`], *optional*): the selected row, other than itself, that is most similar to it.
    """

    row: int | str
    selected_by: str | None
    why: str
    score: float | None
    score_rank: int
    percentile: float
    length: float
    length_unit: str
    truncated: bool
    status: str
    cluster: int | None
    cluster_size: int
    cluster_rank: int
    neighbours: tuple[Neighbour, ...]
    nearest_selected: Neighbour | None

    def __str__(self) -> str:
        """Return everything in words, over several lines."""
        lines = [f"row {self.row}: {self.why}"]
        if self.score is not None:
            lines.append(f"score {self.score:.3f}, rank {self.score_rank:,}, percentile {self.percentile:.1f}")
        lines.append(f"{self.length:,.0f} {self.length_unit}{', cut before its end' if self.truncated else ''}")
        if self.cluster is not None:
            place = (
                f"{self.cluster_rank:,} of {self.cluster_size:,} by score" if self.cluster_rank else "without a score"
            )
            lines.append(f"cluster {self.cluster}: {place}")
        near = [_in_words(n) for n in self.neighbours]
        lines += [f"nearest in its cluster: {'; '.join(near)}"] if near else []
        lines += [f"nearest selected row: {_in_words(self.nearest_selected)}"] if self.nearest_selected else []
        return "\n  ".join(lines)


def _in_words(n: Neighbour) -> str:
    score = "no score" if n.score is None else f"score {n.score:.3f}"
    return f"row {n.row} (similarity {n.similarity:.3f}, {score}, {'kept' if n.selected else 'not kept'})"


def explain(
    pool: Dataset,
    selected: Dataset,
    row: int | str,
    *,
    neighbours: int = 3,
    names: ColumnNames = ColumnNames(),
) -> Explanation:
    """Explain why a row was selected or not.

    Example:
    ```python
    >>> print(explain(scored, selected, 17))
    ```

    Args:
        pool (`Dataset`): scored and clustered. Without embeddings there are no neighbours.
        selected (`Dataset`): the rows that [`select_car`] took from it.
        row (`int` or `str`): the row's value in the index column, or its position if the pool has no such column.
        neighbours (`int`): how many rows of its cluster to name.
        names ([`ColumnNames`]): the columns of score, cluster, row index and embedding.

    Returns:
        [`Explanation`]: `print` it to read it in words.

    Raises:
        ValueError: the row does not exist, or a column is missing.
    """
    if not is_whole_number(neighbours) or neighbours < 0:
        raise ValueError(f"neighbours={neighbours!r} must be a whole number, 0 or more.")
    overview = Overview.of(pool, selected, names=names)
    return explain_rows(overview, [_position(overview, row)], neighbours)[0]


def _position(overview: Overview, row: int | str) -> int:
    """Return the position of a row in the pool; raise ValueError if it does not exist."""
    rows = len(overview.scores)
    if overview.ids is None:
        if is_whole_number(row) and 0 <= row < rows:
            return int(row)
        raise ValueError(f"row={row!r} does not exist: the pool has the rows 0 to {rows - 1}.")
    # pandas compares values of any type without raising; the index column may hold text, numbers or dates.
    matches = np.flatnonzero(np.asarray(overview.ids.to_pandas() == row))
    if len(matches) == 0 or isinstance(row, bool):  # True == 1 in Python
        raise ValueError(
            f"row={row!r} is not in the pool's column {overview.names.index!r}, which starts with "
            f"{overview.ids[:3].to_pylist()}."
        )
    return int(matches[0])


def explain_rows(overview: Overview, rows: Sequence[int], neighbours: int = 3) -> list[Explanation]:
    """Explain the rows at several positions, with one pass over the embeddings.

    Args:
        overview ([`Overview`]): of the pool and its selection.
        rows (`Sequence[int]`): positions in the pool.
        neighbours (`int`): how many rows of its cluster to name for each.
    """
    # All rows in one pass over the embeddings, which may be larger than memory: a page explains hundreds.
    sizes = dict(zip(*np.unique(overview.clusters[overview.scored], return_counts=True), strict=True))
    of_cluster, of_selection = _neighbours(overview, np.asarray(rows, dtype=np.int64), neighbours)
    explanations = []
    for i, row in enumerate(rows):
        scored, cluster = not np.isnan(overview.scores[row]), int(overview.clusters[row])
        rank, within = int(overview.score_ranks[row]), int(overview.cluster_ranks[row])
        status = _status(overview, row, scored)
        explanations.append(
            Explanation(
                row=overview.name_of(row),
                selected_by=overview.reasons[row].item() or None,  # "" if not selected
                why=_why(overview, row, status),
                score=float(overview.scores[row]) if scored else None,
                score_rank=rank if scored else 0,
                percentile=float(overview.percentiles[row]),
                length=float(overview.lengths[row]),
                length_unit=overview.length_unit,
                truncated=status == TRUNCATED,
                status=status,
                cluster=cluster if cluster >= 0 else None,
                cluster_size=int(sizes.get(cluster, 0)),
                cluster_rank=within,
                neighbours=tuple(of_cluster[i]),
                nearest_selected=next(iter(of_selection[i]), None),
            )
        )
    return explanations


def _status(overview: Overview, row: int, scored: bool) -> str:
    if overview.statuses is not None:
        return str(overview.statuses[row].as_py())
    return OK if scored else "unknown"


def _why(overview: Overview, row: int, status: str) -> str:
    """Return the rule that decided on a row, in a sentence."""
    reason, n1, n2 = overview.reasons[row].item(), overview.by_score, overview.by_cluster
    rank, within = int(overview.score_ranks[row]), int(overview.cluster_ranks[row])
    score = f"rank {rank:,} of {len(overview.scored):,} by score, where the best {n1:,} are taken"
    cluster = f"number {within:,} of its cluster, which gives its best {n2:,}" if within else "in no cluster"
    if reason == BY_BOTH:
        return f"kept by both: {score}, and {cluster}."
    if reason == BY_SCORE:
        return f"kept by score: {score}; it is {cluster}."
    if reason == BY_CLUSTER:
        return f"kept by its cluster: {cluster}; it is {score}."
    if np.isnan(overview.scores[row]):
        return f"not kept: it has no score{'' if status == 'unknown' else f' ({status})'}."
    if rank <= n1 or 0 < within <= n2:  # n1 and n2 follow from the selection, which need not be CaR's
        return f"not kept, though it is {score}, and {cluster}: the selection was made by another rule."
    return f"not kept: {score}, and it is {cluster}."


# nearest rows ---------------------------------------------------------------------------------------------------------


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
            few = np.sort(np.argpartition(-similarities, count - 1, axis=1)[:, :count], axis=1)
            similarities, rows = np.take_along_axis(similarities, few, axis=1), rows[few]
        values = np.hstack([self.similarities, similarities])
        places = np.hstack([self.rows, np.broadcast_to(rows, similarities.shape)])
        order = np.argsort(-values, axis=1, kind="stable")[:, :count]
        return Nearest(np.take_along_axis(values, order, axis=1), np.take_along_axis(places, order, axis=1))


def _neighbours(overview: Overview, rows: Indices, count: int) -> tuple[list[list[Neighbour]], list[list[Neighbour]]]:
    """Find the nearest rows of the cluster of every row, `count` each, and the nearest selected row.

    Returns:
        two lists with an entry per row: its neighbours, nearest first. Without embeddings all are empty.
    """
    # By cosine similarity and not by distance after PCA, which only the cluster model knows: the pool alone is enough.
    of_cluster, of_selection = Nearest.none(len(rows)), Nearest.none(len(rows))
    vectors, present = overview.embeddings_of(rows)
    if len(present):
        # One row per question; those without an embedding stay zero.
        asked = np.zeros((len(rows), vectors.shape[1]), dtype=np.float32)
        asked[present] = unit_rows(vectors)
        known = np.asarray(asked.any(axis=1))[:, None]  # a vector of zeros has no direction, and no neighbours
        clusters = overview.clusters[rows][:, None]
        for matrix, positions in overview.embedding_batches():
            similar = asked @ unit_rows(matrix).T  # cosines, (asked, rows of the batch)
            other = known & (positions[None] != rows[:, None])
            if count:
                same = (clusters >= 0) & (clusters == overview.clusters[positions])
                of_cluster = of_cluster.updated(_only(similar, other & same), positions, count)
            of_selection = of_selection.updated(_only(similar, other & overview.taken[positions]), positions, 1)
    return _named(overview, of_cluster), _named(overview, of_selection)


def _only(similarities: Matrix, allowed: npt.NDArray[np.bool_]) -> Matrix:
    return np.where(allowed, similarities, np.float32(-np.inf))


def _named(overview: Overview, nearest: Nearest) -> list[list[Neighbour]]:
    """Return the rows that were found as [`Neighbour`]s, without those that are not allowed."""
    return [
        [_neighbour(overview, row, similarity) for similarity, row in zip(*pair, strict=True) if similarity > -np.inf]
        for pair in zip(nearest.similarities.tolist(), nearest.rows.tolist(), strict=True)
    ]


def _neighbour(overview: Overview, row: int, similarity: float) -> Neighbour:
    score = float(overview.scores[row])
    score_or_none = None if np.isnan(score) else score
    return Neighbour(overview.name_of(row), similarity, score_or_none, bool(overview.taken[row]))
