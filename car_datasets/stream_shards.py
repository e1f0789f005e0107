"""A stream in shards: rows that fit in no memory are scored in their own order, and written with their new columns.

Does: claim and score the shards that a stream is cut into (stream_reader.py), go on where a run was cut off, make sure that
the rows are those that were scored.
Does not: need to know how many rows there are, trust a saved state (the last finished shard is read again, and compared),
or ask a stream for another order than its own.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from car_datasets.claims import last_turns
from car_datasets.columns import batch_rows, read_columns
from car_datasets.manifest import describe_run
from car_datasets.rows import refuse_taken
from car_datasets.shard_files import SharedRun
from car_datasets.shard_parts import PART, part_name
from car_datasets.stream_reader import Piece, State, StreamReader

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

STATE = re.compile(r"\.?state-(\d+)\.json.*")
logger = logging.getLogger(__name__)


class StreamedRun(SharedRun):
    """One process's part in a run over the shards of a stream; see [`score_in_shards`].

    Args:
        stream (`IterableDataset`): the same rows in the same order in every process, every time.
        stage: [`QualityScorer`] or [`TextEmbedder`].
        shard_dir, shard_rows, expiry, token: see [`score_in_shards`].
    """

    def __init__(
        self,
        stream: IterableDataset,
        stage: Any,
        shard_dir: str | os.PathLike[str] | None,
        shard_rows: int,
        expiry: float,
        token: str | None = None,
    ) -> None:
        if shard_dir is None:
            raise ValueError(
                "shard_dir=None: a stream has no name before it is read. Pass shard_dir=<a folder or URL>."
            )
        self.stage, self.shard_rows = stage, shard_rows
        self.reader = StreamReader(stream, shard_rows)
        names = list(self.reader.features)
        refuse_taken(names, stage)
        self.reads = read_columns(names, stage, with_index=False)
        manifest = describe_run(self.reader.head, stage, self.reads, shard_rows)
        manifest |= {"rows": "a stream", "source": json.loads(json.dumps(self.reader.features.to_dict()))}
        super().__init__(manifest, shard_dir, expiry, token)
        self.digests: dict[int, str] = {}  # of shards that are finished, or have been read
        self.waiting: dict[int, State] = {}  # shards that other workers have, and where the stream was before them

    def expected_rows(self, shard: int, fingerprint: str) -> int:
        """Rows of a shard, which are known once it has been read, and stand in its fingerprint with their digest."""
        _, _, rows, digest = fingerprint.split("-")
        if self.digests.setdefault(shard, digest) != digest:
            raise ValueError(self._foreign(f"{part_name(shard)} holds other rows than were read here"))
        return int(rows)

    def may_write(self, names: set[str]) -> bool:
        """Always: nobody knows where the stream ends."""
        return True

    def finish(self, description: str) -> Dataset:
        """Bind the folder, read the stream to its end, wait for what others are at, and open all shards.

        Raises:
            ValueError, OSError: see [`score_in_shards`].
        """
        from datasets import concatenate_datasets

        self.bind()
        with self.progress(description, None, lambda shard: self.shard_rows) as show:
            self._skip_finished(self.names())
            while (piece := self.reader.read()) is not None:
                self._check(piece)
                if not self._take(piece.shard, piece, show):
                    self.waiting[piece.shard] = piece.state
            shards = range(self.reader.shard)
            while self._wait(show):
                time.sleep(min(self.folder.patience, self.claims.expiry / 6))
            names = self.names()
            show(names)
        self._refuse_more_than(len(shards), names)
        self.sweep(names)
        return concatenate_datasets([self.whole[shard] for shard in shards])

    def _skip_finished(self, names: set[str]) -> None:
        """Go on behind the shards that are finished; the last of them is read again."""
        finished = 0
        while self.is_whole(finished, names):
            finished += 1
        state = self._saved_state(finished - 1) if finished > 1 else None
        if state is not None:
            self._read_again(finished - 1, state)

    def _read_again(self, shard: int, state: State) -> Piece:
        """A shard whose digest is known, by a state of the stream if that leads to the same rows, else from the start."""
        piece = self.reader.jump(shard, state)
        if piece is not None and piece.digest == self.digests[shard]:
            return piece
        logger.warning("The stream does not go on where it was before shard %d: it is read from its start.", shard)
        self.reader.restart()
        while (piece := self.reader.read()) is not None:
            self._check(piece)
            if piece.shard == shard:
                return piece
        raise ValueError(self._foreign(f"it ends before row {shard * self.shard_rows}"))

    def _check(self, piece: Piece) -> None:
        """Refuse a shard that has been read or scored with other rows."""
        if self.digests.setdefault(piece.shard, piece.digest) != piece.digest:
            start = piece.shard * self.shard_rows
            raise ValueError(self._foreign(f"rows {start} to {start + len(piece.rows) - 1} are not what they were"))

    def _foreign(self, what: str) -> str:
        return (
            f"shard_dir={str(self.folder)!r} belongs to another stream, or this one has changed or has no fixed order: {what}. "
            "Name another folder; shuffle by a seed."
        )

    def _wait(self, show: Callable[..., None]) -> bool:
        """Whether other workers are still at shards that this one has read past; those of dead workers are done here."""
        names = self.names()
        show(names)
        for shard in list(self.waiting):
            if self.is_whole(shard, names) or self._take(shard, None, show):
                del self.waiting[shard]
        return bool(self.waiting)

    def _take(self, shard: int, piece: Piece | None, show: Callable[..., None]) -> bool:
        """Score a shard, which may have to be read again, unless it is finished or another worker has it."""
        names = self.names()
        if self.is_whole(shard, names):
            return True
        claim = self.claim(shard, last_turns(names))
        if claim is None:
            return False
        with self.claims.renewing(claim, lambda: self.done):
            if not self.is_whole(shard, self.names()):  # it may have been finished since we looked
                piece = piece or self._read_again(shard, self.waiting[shard])
                self._save_state(piece)
                if not self.waits(shard):
                    batches = list(self._scored(piece, show))
                    features = type(self.reader.features)({**self.reader.features, **self.stage.output_features()})
                    self.write(shard, features, batches, f"-{len(piece.rows)}-{piece.digest}")
                self.put(shard)
        self.done = 0
        return True

    def _scored(self, piece: Piece, show: Callable[..., None]) -> Iterator[dict[str, Any]]:
        start = piece.shard * self.shard_rows
        step = batch_rows()
        for at in range(0, len(piece.rows), step):
            rows = piece.rows[at : at + step]
            numbers = list(range(start + at, start + at + len(rows)))
            texts = {name: [row.get(name) for row in rows] for name in self.reads}
            try:
                new = self.stage({**texts, "source_index": numbers})
            except ValueError as error:
                raise ValueError(
                    f"Rows {numbers[0]} to {numbers[-1]} of the stream: {error} Shards that are finished stay in "
                    f"shard_dir={str(self.folder)!r}: mend the source and run the same again."
                ) from error
            source = piece.table.data.slice(at, len(rows))
            yield {**{name: source[name] for name in source.column_names}, **new}
            self.done = at + len(rows)
            show()

    def _save_state(self, piece: Piece) -> None:
        """Write where the stream was before a shard, unless its state holds more than plain values."""
        with suppress(TypeError):
            content = json.dumps(piece.state)
            if json.loads(content) == piece.state:
                with self.explaining(_state_name(piece.shard)), suppress(FileNotFoundError):  # swept by who took over
                    self.claims.folder.write(_state_name(piece.shard), content.encode())

    def _saved_state(self, shard: int) -> State | None:
        try:
            found = json.loads(self.claims.folder.read(_state_name(shard)) or b"")
        except ValueError:
            return None
        return found if isinstance(found, dict) else None

    def _refuse_more_than(self, count: int, names: set[str]) -> None:
        """Refuse parts of a stream that was longer."""
        beyond = [name for name in sorted(names) if (part := PART.fullmatch(name)) and int(part[1]) >= count]
        if beyond:
            raise ValueError(self._foreign(f"it ends before row {count * self.shard_rows}, and {beyond[0]} is there"))

    def sweep(self, names: set[str]) -> None:
        """Remove what killed workers have left, and the states before all shards but the last, where rows may be added."""
        super().sweep(names)
        for name in self.claims.folder.names() - {_state_name(max(self.whole))}:
            if STATE.fullmatch(name):
                with suppress(OSError):
                    self.claims.folder.remove(name)


def _state_name(shard: int) -> str:
    return f"state-{shard:05d}.json"
