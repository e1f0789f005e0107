"""Rank a pool by its likeness to examples: `rank_by_examples` (`--like`), a round robin over the examples.

Does: embed the examples; let each in turn take the nearest row of the pool that is still there; write the order down.
Does not: read files, or select.

As in RDS+ (arXiv 2503.01807), where a round robin over the queries chose better than the best or the mean likeness.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from datasets import Dataset
from datasets.table import InMemoryTable

from car_datasets.scoring.stage import Stage, add_columns
from car_datasets.selection.rule import Indices
from car_datasets.utils.column_names import ColumnNames
from car_datasets.utils.columns import (
    check_columns,
    embedding_batches,
    join_columns,
    matrix_of,
    refuse_no_embeddings,
    refuse_other_datasets,
    refuse_overwrite,
)

Floats = npt.NDArray[np.float32]
EXACT = 100_000  # places of a larger pool that the round robin gives; rows behind them follow by their best likeness
# Likeness is compared in whole numbers of this part of a cosine: the last digits of a product depend on the machine,
# and would decide between rows that are equally near.
PARTS = 1e6
LIKENESSES = 2**26  # held at a time: 256 MB
STEP = 64  # rows of an example's list that are looked at together


def rank_by_examples(
    pool: Dataset, examples: Dataset, embed: Stage | None = None, names: ColumnNames = ColumnNames()
) -> Dataset:
    """Add each row's place in a round robin over examples: each in turn takes the nearest row that is not taken.

    Of rows that are equally near the earlier one is taken. Nearness is the cosine of the embeddings. The order is that
    of the round robin for the first `EXACT` places; rows behind them follow by their likeness to the nearest example.

    Args:
        pool (`Dataset`): rows with embeddings, which are read batch by batch.
        examples (`Dataset`): one row or more that the selection should resemble, with text that `embed` reads, or with
            embeddings by the pool's model.
        embed (`Stage`, *optional*): the stage that embedded the pool, such as [`TextEmbedder`]; needed unless the
            examples have embeddings.
        names ([`ColumnNames`]): the column of embeddings, in both, and the new one.

    Returns:
        `Dataset`: the pool with `like_rank` (int64), 1 for the nearest row of the first example; null in rows without an
        embedding.

    Raises:
        ValueError: there is no example, one has no text, or its embedding does not fit the pool's; a column is missing or
            would be overwritten.
    """
    refuse_other_datasets(pool, "rank_by_examples", "it with the rows in memory: Dataset.from_list(list(pool))")
    refuse_no_embeddings(pool.column_names, names.embedding)
    refuse_overwrite(pool.column_names, (names.like_rank,), "another name")
    likeness = _Likeness(pool, _embeddings_of(examples, embed, names), names.embedding)
    ranks = _round_robin(likeness, min(EXACT, len(likeness.rows)))
    column = np.zeros(len(pool), dtype=np.int64)
    column[likeness.rows] = ranks
    table = pa.table({names.like_rank: pa.array(column, mask=column == 0)})
    return join_columns(pool, Dataset(InMemoryTable(table)))


def _embeddings_of(examples: Dataset, embed: Stage | None, names: ColumnNames) -> npt.NDArray[np.float64]:
    """Return the embeddings of the examples, scaled to length 1."""
    if len(examples) == 0:
        raise ValueError("There are no examples; pass at least one row that the selection should resemble (--like).")
    if names.embedding not in examples.column_names:
        if embed is None:
            raise ValueError(
                f"The examples have no column {names.embedding!r}: pass the stage that embedded the pool, embed=TextEmbedder()."
            )
        examples = add_columns(examples, embed, "Embedding examples")
        check_columns(examples.column_names, (names.embedding,), ())
    values = examples.select_columns([names.embedding]).with_format("arrow")[:][names.embedding]
    matrix, present = matrix_of(values, names.embedding)
    if len(present) < len(examples):
        missing = np.setdiff1d(np.arange(len(examples)), present)
        raise ValueError(
            f"{len(missing)} of {len(examples)} examples have no text to embed, the first {missing[:5].tolist()}. Leave "
            "these rows out, or name the columns of their text by columns=... (--columns)."
        )
    return _unit(matrix)


def _unit(matrix: Floats) -> npt.NDArray[np.float64]:
    """Return the rows scaled to length 1, so that their products are cosines; rows of zeros stay zeros."""
    double = matrix.astype(np.float64)
    return np.asarray(double / np.maximum(np.linalg.norm(double, axis=1, keepdims=True), 1e-12))


class _Likeness:
    """How like the rows of a pool are to examples, computed anew for as many examples at a time as memory allows.

    Args:
        pool (`Dataset`): with a column of embeddings.
        examples (`(examples, dimension)` float64): of length 1.
        column (`str`): name of the column.
    """

    def __init__(self, pool: Dataset, examples: npt.NDArray[np.float64], column: str) -> None:
        self.pool, self.examples, self.column = pool, examples, column
        positions = []
        for matrix, rows in embedding_batches(pool, column):
            if matrix.shape[1] != examples.shape[1]:
                raise ValueError(
                    f"The examples have embeddings of {examples.shape[1]} numbers, the pool's column {column!r} has "
                    f"{matrix.shape[1]}. Embed both by the same model."
                )
            positions.append(rows)
        self.rows = np.concatenate(positions)  # positions of the rows that have an embedding

    def of(self, examples: Indices) -> Iterator[tuple[Indices, Floats]]:
        """Yield some of these examples and the likeness of each to all rows, `(some, rows)`, in `PARTS` of a cosine."""
        some = max(1, LIKENESSES // len(self.rows))
        for start in range(0, len(examples), some):
            part = examples[start : start + some]
            found = np.empty((len(part), len(self.rows)), dtype=np.float32)
            done = 0
            for matrix, rows in embedding_batches(self.pool, self.column):
                # In float64, and rounded: whole numbers up to 1e6 are exact in float32.
                np.rint(
                    self.examples[part] @ _unit(matrix).T * PARTS,
                    out=found[:, done : done + len(rows)],
                    casting="same_kind",
                )
                done += len(rows)
            yield part, found


def _round_robin(likeness: _Likeness, places: int) -> Indices:
    """Return the rank of every row that has an embedding, from 1: so many by the round robin, the others behind."""
    count = len(likeness.examples)
    taken = np.zeros(len(likeness.rows), dtype=bool)
    best = np.full(len(likeness.rows), -np.inf, dtype=np.float32)
    # An example's list of its nearest rows. When it is used up, all its rows are taken, and the lists of all examples
    # are made anew without the rows that are: at most every `depth` turns.
    depth = max(1, min(places, LIKENESSES // count))
    order: list[int] = []
    lists: list[Indices] = [np.zeros(0, dtype=np.int64)] * count
    at = [0] * count
    while len(order) < places:
        example = len(order) % count
        found = _next_free(lists[example], at[example], taken)
        if found == len(lists[example]):
            for some, values in likeness.of(np.arange(count)):
                if not order:
                    best = np.maximum(best, values.max(axis=0))
                values[:, taken] = -np.inf
                for number, row_values in zip(some.tolist(), values, strict=True):
                    lists[number] = _nearest(row_values, min(depth, len(taken) - len(order)))
            at, found = [0] * count, 0
        row = int(lists[example][found])
        at[example] = found + 1
        taken[row] = True
        order.append(row)
    behind = np.flatnonzero(~taken)
    behind = behind[np.argsort(-best[behind], kind="stable")]
    ranks = np.empty(len(taken), dtype=np.int64)
    ranks[np.r_[np.array(order, dtype=np.int64), behind]] = np.arange(1, len(taken) + 1)
    return ranks


def _next_free(rows: Indices, start: int, taken: npt.NDArray[np.bool_]) -> int:
    """Return the place of the first row from `start` on that is not taken, or the number of rows."""
    for begin in range(start, len(rows), STEP):
        free = ~taken[rows[begin : begin + STEP]]
        if free.any():
            return begin + int(free.argmax())
    return len(rows)


def _nearest(values: Floats, count: int) -> Indices:
    """Return the rows of the `count` largest values, largest first, the earlier of equal ones first."""
    rows = np.arange(len(values))
    if count < len(values):
        least = np.partition(values, len(values) - count)[len(values) - count]
        rows = np.flatnonzero(values >= least)
    return rows[np.argsort(-values[rows], kind="stable")][:count]
