"""Scoring in shards: `score_in_shards`, which many processes and machines share, and which goes on where it was cut off.

Does: cut a dataset into shards, take them one by one (claims.py), score what is missing of them (their files:
shard_files.py), and put the columns beside the dataset's own. A stream goes to stream_shards.py.
Does not: start processes, or speak to them: what they share is a folder, or a dataset repository (hub_folder.py).
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import TYPE_CHECKING, Any

from car_datasets.claims import last_turns
from car_datasets.columns import batch_rows, read_columns
from car_datasets.manifest import describe_run
from car_datasets.rows import refuse_taken
from car_datasets.shard_files import SharedRun
from car_datasets.shard_parts import part_name
from car_datasets.stream_shards import StreamedRun
from car_datasets.vectors import beside

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from car_datasets.embedding import TextEmbedder
    from car_datasets.scoring import QualityScorer

SMALLEST, LARGEST, WANTED = 128, 65_536, 64  # rows in a shard, and shards where the rows allow
STREAMED = 16_384  # rows in a shard of a stream: they are in memory at once


def score_in_shards(
    dataset: Dataset | IterableDataset,
    fn: QualityScorer | TextEmbedder,
    shard_dir: str | os.PathLike[str] | None = None,
    *,
    shard_rows: int | None = None,
    expiry: float = 60.0,
    description: str = "Scoring",
    token: str | None = None,
) -> Dataset:
    """`dataset.map(fn)` in shards: by one process or many, on one machine or several, and again after a kill.

    Every process that calls this with the same arguments takes shards that no living one has, and returns the whole
    result, its rows in order. Start them as you like: `accelerate launch`, `torchrun`, a SLURM array, or the same command
    typed twice. A shard that is finished is never scored again.

    A stream (`IterableDataset`) is cut into shards in its own order, and its rows are written with the new columns: the result
    is on disk, and may be larger than the memory, which holds one shard. Every process reads the whole stream, and scores
    only the shards that it has claimed; so pass the same stream to all, not one that is split by node. (Where reading is dear,
    split it, and give every node a folder of its own.) A run that was cut off goes on from the `state_dict` of the stream that
    was saved with its shards: it reads the last finished shard again, to see that these are the same rows, and where they are
    not (a shuffle buffer is in no state) reads from the start, and compares all. The order must be the same every time.

    Args:
        dataset (`Dataset` or `IterableDataset`): the same rows in every process.
        fn ([`QualityScorer`] or [`TextEmbedder`]): what adds the columns.
        shard_dir (`str`, *optional*): a folder that all processes see, an fsspec URL such as `s3://...`, or a folder in a
            dataset repository, `hf://datasets/you/work/run-1`, made private if it is not there: one commit per shard, and
            two machines may both score a shard, of which the first counts. It belongs to these texts and this stage; what
            it holds is kept. By default a folder in the cache of `datasets`, named after them: one machine only. A stream
            needs one, as it has no name before it is read; on the Hub it can go on, but two machines do the same work.
        shard_rows (`int`, *optional*): rows in a shard; by default 65,536, and fewer where that would make fewer than 64; of a
            stream, 16,384.
        expiry (`float`): seconds without a sign of life after which a worker on another machine is taken for dead.
        description (`str`): of the progress bar, which the main process shows, for all.
        token (`str`, *optional*): for a folder on the Hub; else that of `HF_TOKEN` or `hf auth login`. Never stored.

    Returns:
        `Dataset`: the columns of `dataset` and the new ones, memory-mapped (from a local copy where `shard_dir` is a URL).

    Raises:
        ValueError: the folder belongs to another run (what differs is named) or to something else, or is on the Hub and your
            token may not write there; `fn` is no stage; a column is taken; a stream has other rows than before, or none, or
            types that change; or see the stage, which names a stream's rows by their place in it. Finished shards stay.
        OSError: the folder cannot be read or written, or the Hub does not answer. Finished shards stay.
    """
    from datasets import Dataset, IterableDataset

    _check(fn, shard_rows, expiry)
    if isinstance(dataset, IterableDataset):
        return StreamedRun(dataset, fn, shard_dir, shard_rows or STREAMED, expiry, token).finish(description)
    run = _run_of(dataset, fn, shard_dir, shard_rows, expiry, token)
    if len(dataset) == 0:
        types = fn.output_features()
        return beside(dataset, Dataset.from_dict({name: [] for name in types}, features=types))
    return beside(dataset, run.finish(description))


def fill_shards(
    dataset: Dataset,
    fn: QualityScorer | TextEmbedder,
    shard_dir: str | os.PathLike[str],
    *,
    shard_rows: int | None = None,
    expiry: float = 60.0,
    description: str = "Scoring",
    token: str | None = None,
) -> int:
    """One worker's part in [`score_in_shards`]: take shards until none is free, and wait for nobody.

    For a worker that is paid by the hour, such as a task of a SLURM array: a last call of [`score_in_shards`] finishes what
    is left, if a worker died, and returns the rows.

    Args:
        dataset (`Dataset`): no stream.
        fn, shard_dir, shard_rows, expiry, description, token: see [`score_in_shards`].

    Returns:
        `int`: rows that are left, because other workers have claimed them.

    Raises:
        ValueError, OSError: see [`score_in_shards`].
    """
    from datasets import IterableDataset

    _check(fn, shard_rows, expiry)
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            "dataset is a stream, of which nobody knows what is left; call score_in_shards(dataset, fn, shard_dir)."
        )
    return _run_of(dataset, fn, shard_dir, shard_rows, expiry, token).work(description, wait=False)


def _check(fn: Any, shard_rows: int | None, expiry: float) -> None:
    if not is_dataclass(fn) or not hasattr(fn, "schema") or not hasattr(fn, "output_features"):
        name = getattr(fn, "__qualname__", type(fn).__qualname__)
        raise ValueError(
            f"fn={name} is no QualityScorer and no TextEmbedder, whose fields a shard is bound to. Call "
            f"map_across_gpus(dataset, {name}) for a function of a batch; one of the whole dataset, on the result."
        )
    if (shard_rows is not None and shard_rows < 1) or not expiry > 0:
        raise ValueError(f"shard_rows={shard_rows} must be at least 1 and expiry={expiry} above 0.")


def _run_of(
    dataset: Dataset,
    fn: QualityScorer | TextEmbedder,
    shard_dir: str | os.PathLike[str] | None,
    shard_rows: int | None,
    expiry: float,
    token: str | None,
) -> ShardedRun:
    from datasets import Dataset

    if not isinstance(dataset, Dataset):
        raise ValueError(f"dataset is a {type(dataset).__name__}; pass a Dataset or an IterableDataset, of one split.")
    refuse_taken(dataset.column_names, fn)
    texts = dataset.with_format(None).select_columns(read_columns(dataset.column_names, fn))
    return ShardedRun(texts, fn, shard_dir, shard_rows or default_rows(len(dataset)), expiry, token)


def default_rows(rows: int) -> int:
    """Rows in a shard: by the rows alone, so that a run can go on with another number of processes."""
    return min(max(rows // WANTED, SMALLEST), LARGEST)


class ShardedRun(SharedRun):
    """One process's part in a run over the shards of a dataset; see [`score_in_shards`].

    Args:
        texts (`Dataset`): the columns that the stage reads, and those that name a row in a message.
        stage: [`QualityScorer`] or [`TextEmbedder`].
        shard_dir, shard_rows, expiry, token: see [`score_in_shards`].
    """

    def __init__(
        self,
        texts: Dataset,
        stage: Any,
        shard_dir: str | os.PathLike[str] | None,
        shard_rows: int,
        expiry: float,
        token: str | None = None,
    ) -> None:
        self.texts, self.stage, self.shard_rows = texts, stage, shard_rows
        reads = read_columns(texts.column_names, stage, with_index=False)
        super().__init__(describe_run(texts, stage, reads, shard_rows), shard_dir, expiry, token)

    def expected_rows(self, shard: int, fingerprint: str) -> int:
        """Rows of a shard."""
        return len(self.rows_in(shard))

    def finish(self, description: str) -> Dataset:
        """Work until every shard is there, and read them all.

        Raises:
            ValueError, OSError: see [`score_in_shards`].
        """
        from datasets import concatenate_datasets

        self.work(description, wait=True)
        return concatenate_datasets([self.whole[shard] for shard in self._shards()])

    def work(self, description: str, wait: bool) -> int:
        """Bind the folder and take shards until every one is there, or, unless told to `wait`, claimed by another worker.

        Returns:
            `int`: rows that others have claimed.

        Raises:
            ValueError, OSError: see [`score_in_shards`].
        """
        self.bind()
        with self.progress(description, len(self.texts), lambda shard: len(self.rows_in(shard))) as show:
            while True:
                names = self.names()
                missing = [shard for shard in self._shards() if not self.is_whole(shard, names)]
                show(names)
                if not missing:
                    break
                if not self.folder.claimable:
                    random.shuffle(missing)  # another machine is hardly at the same one
                turns = last_turns(names)
                if not any(self._take(shard, turns, show) for shard in missing):
                    if not wait:
                        return sum(len(self.rows_in(shard)) for shard in missing)
                    time.sleep(min(self.folder.patience, self.claims.expiry / 6))  # the others are at them
        self.sweep(names)
        return 0

    def _shards(self) -> range:
        return range(-(-len(self.texts) // self.shard_rows))

    def rows_in(self, shard: int) -> range:
        """The rows of a shard."""
        start = shard * self.shard_rows
        return range(start, min(start + self.shard_rows, len(self.texts)))

    def may_write(self, names: set[str]) -> bool:
        """Whether a shard is missing."""
        return not {part_name(shard) for shard in self._shards()} <= names

    def _take(self, shard: int, turns: dict[str, int], show: Callable[[], None]) -> bool:
        """Score a shard unless another worker has it."""
        claim = self.claim(shard, turns)
        if claim is None:
            return False
        self.done = 0
        with self.claims.renewing(claim, lambda: self.done):
            if not self.is_whole(shard, self.names()):  # it may have been finished since we looked
                if not self.waits(shard):
                    batches = []
                    for batch in self.texts.select(self.rows_in(shard)).iter(batch_size=batch_rows()):
                        batches.append(self.stage(batch))
                        self.done += len(next(iter(batch.values())))
                        show()
                    self.write(shard, self.stage.output_features(), batches)
                self.put(shard)
        self.done = 0
        return True
