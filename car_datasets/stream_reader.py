"""Reading a stream shard by shard, as typed tables with digests.

Does: cut a stream in its own order, infer the types of its columns from its first rows, refuse rows that do not fit
them, restore a saved state.
Does not: check that a restored state leads to the same rows; callers compare digests.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from car_datasets.manifest import content_digest

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

HEAD = 1_000  # number of first rows, which give the types and name the run
DECLARE = "Name the types of all columns: stream.cast(Features(...)), or from_generator(..., features=Features(...))."

Row = dict[str, Any]
State = dict[str, Any]


class Piece(NamedTuple):
    """A shard of a stream in memory.

    Args:
        shard (`int`): its number.
        rows (`list[dict]`): the rows as the stream yielded them.
        table (`Dataset`): the same rows with the types of the run.
        digest (`str`): 16 hexadecimal digits of the sha256 of the table.
        state (`dict`): the stream's `state_dict()` before the shard.
    """

    shard: int
    rows: list[Row]
    table: Dataset
    digest: str
    state: State


class StreamReader:
    """A reader that cuts a stream into shards.

    Args:
        stream (`IterableDataset`): in any format.
        shard_rows (`int`): rows in a shard.

    Attributes:
        shard (`int`): number of the next shard.
        head (`Dataset`): the first rows.
        features (`Features`): the types that the stream declares, else those of the first rows.

    Raises:
        ValueError: the stream is empty, or the types of its first rows are unclear.
    """

    def __init__(self, stream: IterableDataset, shard_rows: int) -> None:
        """Read the first rows."""
        from datasets import Features

        self.stream, self.shard_rows, self.shard = stream.with_format(None), shard_rows, 0
        self._start = self.stream.state_dict()
        self._rows: Iterator[Row] = iter(self.stream)
        self._pending = list(islice(self._rows, min(HEAD, shard_rows)))
        if not self._pending:
            raise ValueError("dataset: the stream has no rows.")
        self._declared = self.stream.features is not None
        self.features: Features = self.stream.features or Features.from_arrow_schema(
            self._inferred(_columns(self._pending), 0)
        )
        self.head = self._table(self._pending)

    def read(self) -> Piece | None:
        """Return the next shard, or `None` at the end of the stream.

        Raises:
            ValueError: rows have other columns or types than the first rows.
        """
        # The first rows have been read already, so the state before shard 0 is not the current one.
        state = self.stream.state_dict() if self.shard else self._start
        rows = self._pending + list(islice(self._rows, self.shard_rows - len(self._pending)))
        self._pending = []
        if not rows:
            return None
        table = self._table(rows)
        self.shard += 1
        return Piece(self.shard - 1, rows, table, content_digest(table, table.column_names)[-16:], state)

    def jump(self, shard: int, state: State) -> Piece | None:
        """Return the shard that follows a saved state; `None` if the stream rejects the state or has no more rows."""
        try:
            self._go(shard, state)
            return self.read()
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):  # a state of another stream
            return None

    def restart(self) -> None:
        """Go back to the first row."""
        self._go(0, self._start)

    def _go(self, shard: int, state: State) -> None:
        self.stream.load_state_dict(state)
        self._rows, self._pending, self.shard = iter(self.stream), [], shard

    def _table(self, rows: list[Row]) -> Dataset:
        """Return rows as a table with the types of the run; raise ValueError if they do not fit."""
        from datasets import Dataset
        from datasets.table import InMemoryTable

        columns, schema = _columns(rows), self.features.arrow_schema
        start = self.shard * self.shard_rows
        if not self._declared:
            inferred = self._inferred(columns, start)
            changed = [name for name in inferred.names if not _fits(inferred, schema, name)]
        else:
            changed = [name for name in columns if name not in self.features]
        if changed:
            raise ValueError(
                f"{self._where(start, len(rows))}: the columns {changed} have other types than in the first rows, or "
                f"did not exist. {DECLARE}"
            )
        columns = {name: columns.get(name, [None] * len(rows)) for name in self.features}
        encoded = self.features.encode_batch(columns) if self._declared else columns
        return Dataset(InMemoryTable(pa.table(encoded, schema=schema)))

    def _inferred(self, columns: dict[str, list[Any]], start: int) -> pa.Schema:
        try:
            return pa.table(columns).schema
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
            rows = len(next(iter(columns.values())))
            raise ValueError(f"{self._where(start, rows)} hold values that fit no type: {error}. {DECLARE}") from error

    def _where(self, start: int, rows: int) -> str:
        return f"Rows {start} to {start + rows - 1} of the stream"


def _columns(rows: list[Row]) -> dict[str, list[Any]]:
    """Return rows as columns, with nulls in rows that lack a column."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _fits(inferred: pa.Schema, schema: pa.Schema, name: str) -> bool:
    """Return True if the inferred type of a column can be written as the type of the first rows without loss."""
    if name not in schema.names:
        return False
    parts = [pa.schema([pa.field(name, each.field(name).type)]) for each in (schema, inferred)]
    try:
        both = pa.unify_schemas(parts, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return False
    return bool(both.field(name).type == schema.field(name).type)
