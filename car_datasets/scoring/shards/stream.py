"""Score a stream in shards: rows are scored in the order of the stream, and written with their new columns.

Does: cut a stream into typed tables with digests; claim and score its shards; resume an interrupted run, and check that
the rows are those that were scored.
Does not: need the number of rows, trust a saved state (the last finished shard is read again and compared), or reorder
rows.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from car_datasets.loading.values import carried_stream, table_of
from car_datasets.scoring.shards.claims import last_turns
from car_datasets.scoring.shards.folder import PART, RunOptions, SharedRun, part_name
from car_datasets.scoring.stage import batch_rows
from car_datasets.utils.column_names import ColumnNames
from car_datasets.utils.digests import content_digest

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from car_datasets.scoring.stage import Stage


HEAD = 1_000  # number of first rows, which give the types and identify the run
DECLARE = "Name the types of all columns: stream.cast(Features(...)), or from_generator(..., features=Features(...))."
STATE = re.compile(r"\.?state-(\d+)\.json.*")  # with the temporary files of its writing
Row = dict[str, Any]
State = dict[str, Any]
logger = logging.getLogger(__name__)


class StreamedRun(SharedRun):
    """One worker of a run over the shards of a stream, whose length is unknown.

    Args:
        stream (`IterableDataset`): the same rows in the same order in every process and every run.
        stage ([`Stage`]): adds the columns.
        options ([`RunOptions`]): folder, size of a shard, and expiry of claims.

    Raises:
        ValueError: `shard_dir` is missing, the stream is empty, its types are unclear, or it has a new column already.
    """

    def __init__(self, stream: IterableDataset, stage: Stage, options: RunOptions) -> None:
        """Read the first rows, which identify the run, and open its folder."""
        if options.shard_dir is None:
            raise ValueError(
                "shard_dir=None: a stream has no name before it is read. Pass shard_dir=<a folder or URL>."
            )
        self.reader = StreamReader(stream, options.shard_rows)
        # As JSON reads it back, like every other entry of the manifest.
        source = json.loads(json.dumps(self.reader.features.to_dict()))
        super().__init__(self.reader.head, stage, options, {"rows": "a stream", "source": source})
        self.digests: dict[int, str] = {}  # of shards that are finished or have been read
        # Shards that other workers have claimed, and the state of the stream before them.
        self.waiting: dict[int, State] = {}

    def expected_rows(self, shard: int, fingerprint: str) -> int:
        """Return the number of rows of a shard from its fingerprint, which also holds the digest of the rows."""
        _, _, rows, digest = fingerprint.split("-")  # run, shard, and the two that `_take` appends
        if self.digests.setdefault(shard, digest) != digest:
            raise ValueError(self._foreign(f"{part_name(shard)} holds other rows than this stream"))
        return int(rows)

    def may_write(self, names: set[str]) -> bool:
        """Return True: shards may always follow, because the length of the stream is unknown."""
        return True

    def finish(self, description: str) -> Dataset:
        """Bind the folder, score the stream to its end, wait for other workers, and return all shards as one dataset.

        Raises:
            ValueError: the folder belongs to another run, the rows have changed, or an error of the stage.
            OSError: the folder cannot be read or written.
        """
        from datasets import concatenate_datasets

        self.bind()
        with self.progress(description, None, lambda shard: self.shard_rows) as show:
            self._skip_finished(self.names())
            while (piece := self.reader.read()) is not None:
                self._check(piece)
                if not self._take(piece.shard, piece, show):
                    # Only the state is kept: the rows are read again if the worker that has claimed them dies.
                    self.waiting[piece.shard] = piece.state
            shards = range(self.reader.shard)  # the reader is at the end now; `_wait` may move it back
            while self._wait(show):
                time.sleep(self.pause)
            names = self.names()
            show(names)
        self._refuse_more_than(len(shards), names)
        self.remove_leftovers(names)
        return concatenate_datasets([self.finished[shard] for shard in shards])

    def _skip_finished(self, names: set[str]) -> None:
        """Skip the finished shards, but read the last of them again to check that the rows are the same."""
        finished = 0
        while self.is_finished(finished, names):
            finished += 1
        # A single finished shard is read again from the start anyway, and compared by `_check`.
        state = self._saved_state(finished - 1) if finished > 1 else None
        if state is not None:
            self._read_again(finished - 1, state)

    def _read_again(self, shard: int, state: State) -> Piece:
        """Return a shard of known digest, from a saved state if that leads to the same rows, else from the start."""
        piece = self.reader.jump(shard, state)
        if piece is not None and piece.digest == self.digests[shard]:
            return piece
        logger.warning("The stream does not resume where it was before shard %d: it is read from its start.", shard)
        self.reader.restart()
        while (piece := self.reader.read()) is not None:
            self._check(piece)
            if piece.shard == shard:
                return piece
        raise ValueError(self._foreign(f"it ends before row {shard * self.shard_rows}"))

    def _check(self, piece: Piece) -> None:
        """Raise ValueError if this shard was read or scored before with other rows."""
        if self.digests.setdefault(piece.shard, piece.digest) != piece.digest:
            start = piece.shard * self.shard_rows
            raise ValueError(self._foreign(f"rows {start} to {start + len(piece.rows) - 1} are not what they were"))

    def _foreign(self, what: str) -> str:
        return (
            f"{self.shown} belongs to another stream, or this one has changed or has no fixed order: "
            f"{what}. Pass another folder, and shuffle with a seed."
        )

    def _wait(self, show: Callable[..., None]) -> bool:
        """Return True if other workers still hold shards that were read past; score those of dead workers here."""
        names = self.names()
        show(names)
        for shard in list(self.waiting):
            if self.is_finished(shard, names) or self._take(shard, None, show):
                del self.waiting[shard]
        return bool(self.waiting)

    def _take(self, shard: int, piece: Piece | None, show: Callable[..., None]) -> bool:
        """Score a shard, read again if `piece` is None; return False if another worker has claimed it."""
        from datasets import Features

        # Listed for every shard: reading a stream takes long, and other workers finish shards meanwhile.
        names = self.names()
        if self.is_finished(shard, names):
            return True
        claim = self.claim(shard, last_turns(names))
        if claim is None:
            return False
        with self.claims.renewing(claim, lambda: self.done):
            # Another worker may have finished it before the claim was taken.
            if not self.is_finished(shard, self.names()):
                piece = piece or self._read_again(shard, self.waiting[shard])
                self._save_state(piece)  # before the part: whoever finds the part finds its state too
                if not self.is_not_uploaded(shard):
                    batches = list(self._scored(piece, show))
                    features = Features({**self.reader.features, **self.stage.output_features()})
                    self.write(shard, features, batches, f"-{len(piece.rows)}-{piece.digest}")
                self.upload(shard)
        self.done = 0
        return True

    def _scored(self, piece: Piece, show: Callable[..., None]) -> Iterator[dict[str, Any]]:
        """Yield the columns of a shard and the new ones, batch by batch."""
        start = piece.shard * self.shard_rows
        step = batch_rows()
        for at in range(0, len(piece.rows), step):
            rows = piece.rows[at : at + step]
            numbers = list(range(start + at, start + at + len(rows)))
            # The stage reads the rows as the stream yielded them, as `.map` would; the table gives the columns to keep.
            texts = {name: [row.get(name) for row in rows] for name in self.reads}
            try:
                # The position in the stream names a row in the stage's messages, unless it reads a column of that name.
                new = self.new_columns({ColumnNames.index: numbers, **texts}, len(rows))
            except ValueError as error:
                raise ValueError(
                    f"{_rows_of_stream(numbers[0], len(rows))}: {error} Finished shards are kept in {self.shown}. "
                    "Correct the source, then run the same command again to resume."
                ) from error
            source = piece.table.data.slice(at, len(rows))
            yield {**{name: source[name] for name in source.column_names}, **new}
            show()

    def _save_state(self, piece: Piece) -> None:
        """Save the state of the stream before a shard, unless it holds more than plain values."""
        with suppress(TypeError):  # of json, for such a state
            content = json.dumps(piece.state)
            if json.loads(content) == piece.state:  # not so for tuples, or numbers as keys
                with self.explaining(_state_name(piece.shard)), suppress(FileNotFoundError):  # removed after a takeover
                    self.claims.folder.write(_state_name(piece.shard), content.encode())

    def _saved_state(self, shard: int) -> State | None:
        try:
            state = json.loads(self.claims.folder.read(_state_name(shard)) or b"")
        except ValueError:
            return None
        return state if isinstance(state, dict) else None

    def _refuse_more_than(self, count: int, names: set[str]) -> None:
        """Raise ValueError if the folder holds shards beyond the end of the stream."""
        beyond = [name for name in sorted(names) if (part := PART.fullmatch(name)) and int(part[1]) >= count]
        if beyond:
            raise ValueError(self._foreign(f"it ends before row {count * self.shard_rows}, and {beyond[0]} is there"))

    def remove_leftovers(self, names: set[str]) -> None:
        """Remove what killed workers have left behind, and all states but the last, which added rows would need."""
        super().remove_leftovers(names)
        # States lie next to the claims, as a repository would need a commit for each.
        for name in self.claims.folder.names() - {_state_name(max(self.finished))}:
            if STATE.fullmatch(name):
                with suppress(OSError):
                    self.claims.folder.remove(name)


def _state_name(shard: int) -> str:
    return f"state-{shard:05d}.json"


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

        self.stream, self.shard_rows, self.shard = carried_stream(stream.with_format(None)), shard_rows, 0
        self._start = self.stream.state_dict()  # before the first row is read
        self._rows: Iterator[Row] = iter(self.stream)
        self._pending = list(islice(self._rows, min(HEAD, shard_rows)))
        if not self._pending:
            raise ValueError("dataset: the stream has no rows.")
        self._declared = stream.features is not None
        # As the stream has them, so that images are decoded where the shards are read, if they were in the stream.
        self.features: Features = stream.features or Features.from_arrow_schema(
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
        table = self._table(rows)  # before the number is raised, as messages compute positions from it
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
        if not self._declared:  # the first rows decided, and later rows may not need a wider type
            inferred = self._inferred(columns, start)
            changed = [name for name in inferred.names if not _fits(inferred, schema, name)]
        else:
            changed = [name for name in columns if name not in self.features]
        if changed:
            raise ValueError(
                f"{_rows_of_stream(start, len(rows))}: the columns {changed} have other types than in the first rows, "
                f"or did not exist. {DECLARE}"
            )
        columns = {name: columns.get(name, [None] * len(rows)) for name in self.features}
        # Declared types may need encoding (images, class labels); inferred ones are those that Arrow gives the values.
        table = table_of(columns, self.features) if self._declared else pa.table(columns, schema=schema)
        return Dataset(InMemoryTable(table))

    def _inferred(self, columns: dict[str, list[Any]], start: int) -> pa.Schema:
        try:
            return pa.table(columns).schema
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
            rows = len(next(iter(columns.values())))
            where = _rows_of_stream(start, rows)
            raise ValueError(f"{where} hold values that fit no type: {error}. {DECLARE}") from error


def _columns(rows: list[Row]) -> dict[str, list[Any]]:
    """Return rows as columns, with nulls in rows that lack a column."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _fits(inferred: pa.Schema, schema: pa.Schema, name: str) -> bool:
    """Return True if the inferred type of a column can be written as the type of the first rows without loss."""
    if name not in schema.names:
        return False
    # Nothing is lost if the wider type of both is that of the first rows, as for integers after floats, or nulls.
    parts = [pa.schema([pa.field(name, each.field(name).type)]) for each in (schema, inferred)]
    try:
        both = pa.unify_schemas(parts, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return False
    return bool(both.field(name).type == schema.field(name).type)


def _rows_of_stream(start: int, count: int) -> str:
    """Return how messages name rows, by their positions in the stream."""
    return f"Rows {start} to {start + count - 1} of the stream"
