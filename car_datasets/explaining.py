"""Why a row was kept or not: `explain`.

Does: its place among scores, its cluster, the rows of the cluster that are nearest to it, the nearest selected row, and the rule
that decided, in words. Reads embeddings batch by batch.
Does not: decide anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from car_datasets.overview import Overview
from car_datasets.selection import Indices
from car_datasets.settings import is_whole_number
from car_datasets.vectors import Matrix, count_vectors, embedding_batches, unit_rows

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Neighbour:
    """A row beside the one that is explained.

    Args:
        row (`int` or `str`): its value in the index column, or its position where there is none.
        similarity (`float`): cosine of the two embeddings.
        score (`float`, *optional*), selected (`bool`): of that row.
    """

    row: int | str
    similarity: float
    score: float | None
    selected: bool


@dataclass(frozen=True)
class Explanation:
    """Why a row was kept or not.

    Args:
        row (`int` or `str`): see [`Neighbour`].
        selected_by (`str`, *optional*): `"score"`, `"cluster"`, `"both"`, or `None`.
        why (`str`): the same in a sentence.
        score (`float`, *optional*), score_rank (`int`), percentile (`float`): share of the scored rows, in %, that score no
            better; rank and percentile are 0 without a score.
        length (`float`), length_unit (`str`), truncated (`bool`): whether the scorer did not see the end.
        status (`str`): `"ok"`, `"truncated"`, ..., or why there is no score (`"unknown"` where no column says it).
        cluster (`int`, *optional*), cluster_size (`int`), cluster_rank (`int`): among its scored rows.
        neighbours (`tuple[Neighbour, ...]`): rows of its cluster that are most like it, nearest first.
        nearest_selected ([`Neighbour`], *optional*): the selected row, other than itself, that is most like it.
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
    score_column: str = "iqs_score",
    cluster_column: str = "cluster",
    index_column: str = "source_index",
    embedding_column: str = "embedding",
) -> Explanation:
    """Say of one row why it was kept or not.

    Example:

    ```python
    >>> print(explain(scored, selected, 17))
    ```

    Args:
        pool (`Dataset`), selected (`Dataset`): as for [`SelectionReport.from_selection`].
        row (`int` or `str`): the row's value in `index_column`, or its position where the pool has no such column.
        neighbours (`int`): how many rows of its cluster to name.
        score_column, cluster_column, index_column, embedding_column (`str`): as in [`select_car`]; without embeddings there
            are no neighbours.

    Returns:
        [`Explanation`]: printed, it says all of it in words.

    Raises:
        ValueError: there is no such row, or a column is missing.
    """
    if not isinstance(neighbours, int) or neighbours < 0:
        raise ValueError(f"neighbours={neighbours!r} must be a whole number, 0 or more.")
    seen = Overview.of(
        pool, selected, score_column=score_column, cluster_column=cluster_column, index_column=index_column
    )
    return explain_rows(pool, seen, [_position(seen, row, index_column)], neighbours, embedding_column)[0]


def _position(seen: Overview, row: int | str, index_column: str) -> int:
    rows = len(seen.scores)
    if seen.ids is None:
        if is_whole_number(row) and 0 <= row < rows:
            return int(row)
        raise ValueError(f"row={row!r} is no row: the pool has the rows 0 to {rows - 1}.")
    found = np.flatnonzero(np.asarray(seen.ids.to_pandas() == row))
    if len(found) == 0 or isinstance(row, bool):
        raise ValueError(
            f"row={row!r} is not in the pool's column {index_column!r}, which starts with {seen.ids[:3].to_pylist()}."
        )
    return int(found[0])


def explain_rows(
    pool: Dataset, seen: Overview, rows: Sequence[int], neighbours: int = 3, embedding_column: str = "embedding"
) -> list[Explanation]:
    """As [`explain`], of the rows at several positions, in one reading of the embeddings."""
    ranks, within, reasons = seen.score_ranks, seen.cluster_ranks, seen.reasons
    sizes = dict(zip(*np.unique(seen.clusters[seen.scored], return_counts=True), strict=True))
    near = _Nearest(seen, np.asarray(rows, dtype=np.int64), neighbours)
    if count_vectors(pool, embedding_column):
        near.read(pool.with_format(None), embedding_column)
    found = []
    for i, row in enumerate(rows):
        scored, cluster = not np.isnan(seen.scores[row]), int(seen.clusters[row])
        status = str(seen.statuses[row].as_py()) if seen.statuses is not None else "ok" if scored else "unknown"
        below = np.count_nonzero(seen.scores <= seen.scores[row]) if scored else 0
        found.append(
            Explanation(
                row=seen.name_of(row),
                selected_by=reasons[row].item() or None,
                why=_why(seen, reasons[row].item(), scored, status, int(ranks[row]), int(within[row])),
                score=float(seen.scores[row]) if scored else None,
                score_rank=int(ranks[row]) if scored else 0,
                percentile=100 * below / max(1, len(seen.scored)),
                length=float(seen.lengths[row]),
                length_unit=seen.length_unit,
                truncated=status == "truncated",
                status=status,
                cluster=cluster if cluster >= 0 else None,
                cluster_size=int(sizes.get(cluster, 0)),
                cluster_rank=int(within[row]),
                neighbours=tuple(near.of_cluster(i)),
                nearest_selected=next(iter(near.of_selection(i)), None),
            )
        )
    return found


def _why(seen: Overview, reason: str, scored: bool, status: str, rank: int, within: int) -> str:
    n1, n2 = seen.by_score, seen.by_cluster
    score = f"rank {rank:,} of {len(seen.scored):,} by score, where the best {n1:,} are taken"
    cluster = f"number {within:,} of its cluster, which gives its best {n2:,}" if within else "in no cluster"
    if reason == "both":
        return f"kept by both: {score}, and {cluster}."
    if reason == "score":
        return f"kept by score: {score}; it is {cluster}."
    if reason == "cluster":
        return f"kept by its cluster: {cluster}; it is {score}."
    if not scored:
        return f"not kept: it has no score{'' if status == 'unknown' else f' ({status})'}."
    if rank <= n1 or 0 < within <= n2:
        return f"not kept, though it is {score}, and {cluster}: the selection was made by another rule."
    return f"not kept: {score}, and it is {cluster}."


class _Nearest:
    """The rows most like some given ones, by cosine: of their clusters, and of the selection."""

    def __init__(self, seen: Overview, rows: Indices, count: int) -> None:
        self.seen, self.rows, self.count = seen, rows, count
        self.taken = np.zeros(len(seen.scores), dtype=bool)
        self.taken[seen.positions] = True
        empty = np.zeros((len(rows), 0))
        self.best: dict[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]] = {
            kind: (empty, empty.astype(np.int64)) for kind in ("cluster", "selection")
        }

    def read(self, pool: Dataset, column: str) -> None:
        own = pool.select_columns([column]).select(self.rows.tolist())
        if own.with_format("arrow")[:][column].null_count == len(own):
            return  # rows without an embedding have no neighbours
        asked = np.zeros((len(self.rows), 0), dtype=np.float32)
        for matrix, present in embedding_batches(own, column):
            asked = asked if asked.shape[1] else np.zeros((len(self.rows), matrix.shape[1]), dtype=np.float32)
            asked[present] = unit_rows(matrix)
        known = np.asarray(asked.any(axis=1))
        for matrix, positions in embedding_batches(pool, column):
            similar = asked @ unit_rows(matrix).T
            other = known[:, None] & np.not_equal(positions[None], self.rows[:, None])
            clusters = self.seen.clusters[self.rows][:, None]
            same = np.logical_and(clusters >= 0, clusters == self.seen.clusters[positions])
            if self.count:
                self._keep("cluster", similar, positions, other & same, self.count)
            self._keep("selection", similar, positions, other & self.taken[None, positions], 1)

    def _keep(self, kind: str, similar: Matrix, positions: Indices, allowed: npt.NDArray[np.bool_], count: int) -> None:
        values, rows = self.best[kind]
        similar = np.where(allowed, similar, -np.inf)
        if count < similar.shape[1]:
            few = np.sort(np.argpartition(-similar, count - 1, axis=1)[:, :count], axis=1)
            similar, positions = np.take_along_axis(similar, few, axis=1), positions[few]
        values = np.hstack([values, similar])
        rows = np.hstack([rows, np.broadcast_to(positions, similar.shape)])
        order = np.argsort(-values, axis=1, kind="stable")[:, :count]
        self.best[kind] = np.take_along_axis(values, order, axis=1), np.take_along_axis(rows, order, axis=1)

    def of_cluster(self, i: int) -> list[Neighbour]:
        return self._neighbours("cluster", i)

    def of_selection(self, i: int) -> list[Neighbour]:
        return self._neighbours("selection", i)

    def _neighbours(self, kind: str, i: int) -> list[Neighbour]:
        found = []
        for value, row in zip(*(part[i] for part in self.best[kind]), strict=True):
            if value > -np.inf:
                score = self.seen.scores[row]
                score = None if np.isnan(score) else float(score)
                found.append(Neighbour(self.seen.name_of(int(row)), float(value), score, bool(self.taken[row])))
        return found
