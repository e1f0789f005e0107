"""A stream read shard by shard, as typed tables that can be told apart and gone back to.

Does: cut a stream in its own order, settle the types of its columns by its first rows, refuse what does not fit them, go to
where the stream was.
Does not: know whether it arrives there: the digest of what it reads tells (stream_shards.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from car_datasets.manifest import content_digest

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

HEAD = 1_000  # first rows, which tell the types and bind the folder
DECLARE = "Name the types of all columns: stream.cast(Features(...)), or from_generator(..., features=Features(...))."

Row = dict[str, Any]
State = dict[str, Any]


class Piece(NamedTuple):
    """A shard of a stream in memory: its number, its rows as they came, as a table, its digest, and the stream's state before."""

    shard: int
    rows: list[Row]
    table: Dataset
    digest: str
    state: State


class StreamReader:
    """Reads a stream shard by shard, forwards; `shard` is the number of the next.

    Args:
        stream (`IterableDataset`): of any format.
        shard_rows (`int`): rows in a shard.

    `head` holds the first rows as a table, `features` the types: the stream's own, or those of the first rows.

    Raises:
        ValueError: there are no rows, or their types are unclear.
    """

    def __init__(self, stream: IterableDataset, shard_rows: int) -> None:
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
        """The next shard, or `None` at the end of the stream.

        Raises:
            ValueError: rows have other columns or types than the first.
        """
        state = self.stream.state_dict() if self.shard else self._start
        rows = self._pending + list(islice(self._rows, self.shard_rows - len(self._pending)))
        self._pending = []
        if not rows:
            return None
        table = self._table(rows)
        self.shard += 1
        return Piece(self.shard - 1, rows, table, content_digest(table, table.column_names)[-16:], state)

    def jump(self, shard: int, state: State) -> Piece | None:
        """Read a shard before which the stream had this state; `None` where the stream cannot take it or has no more rows."""
        try:
            self._go(shard, state)
            return self.read()
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):  # a state of another stream
            return None

    def restart(self) -> None:
        """Read from the first row again."""
        self._go(0, self._start)

    def _go(self, shard: int, state: State) -> None:
        self.stream.load_state_dict(state)
        self._rows, self._pending, self.shard = iter(self.stream), [], shard

    def _table(self, rows: list[Row]) -> Dataset:
        from datasets import Dataset
        from datasets.table import InMemoryTable

        columns, schema = _columns(rows), self.features.arrow_schema
        start = self.shard * self.shard_rows
        if not self._declared:
            found = self._inferred(columns, start)
            changed = [name for name in found.names if not _fits(found, schema, name)]
        else:
            changed = [name for name in columns if name not in self.features]
        if changed:
            raise ValueError(
                f"{self._where(start, len(rows))}: the columns {changed} have other types than in the first rows, or were not "
                f"there. {DECLARE}"
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
    """Rows as columns; of a name that only some rows have, null elsewhere."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _fits(found: pa.Schema, schema: pa.Schema, name: str) -> bool:
    """Whether values of the type found can be written as the type that the first rows had, and nothing is lost."""
    if name not in schema.names:
        return False
    parts = [pa.schema([pa.field(name, each.field(name).type)]) for each in (schema, found)]
    try:
        both = pa.unify_schemas(parts, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return False
    return bool(both.field(name).type == schema.field(name).type)
