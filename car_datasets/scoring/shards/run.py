"""Scoring in shards: `score_in_shards` is shared by any number of processes and machines, and resumable.

Does: cut a dataset into shards, claim and score those that are missing, return them with the columns of the dataset.
Does not: start processes, or let them communicate: all that they share is a folder or a dataset repository.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from dataclasses import is_dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from car_datasets.loading.values import carried
from car_datasets.scoring.shards.claims import EXPIRY, last_turns
from car_datasets.scoring.shards.folder import RunOptions, SharedRun, part_name
from car_datasets.scoring.shards.stream import StreamedRun
from car_datasets.scoring.stage import Stage, batch_rows, read_columns
from car_datasets.utils.columns import join_columns

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


# A shard has 1/64 of the rows, so that 64 processes have work; but at least 128 rows, as each shard is a file, and at
# most 65,536, as a killed process loses the rows of its current shard.
SMALLEST, LARGEST, WANTED = 128, 65_536, 64
STREAMED = 16_384  # rows in a shard of a stream; fewer, as they are held in memory together, as Python objects
DESCRIPTION = "Scoring"  # of the progress bar


def score_in_shards(
    dataset: Dataset | IterableDataset,
    fn: Stage,
    shard_dir: str | os.PathLike[str] | None = None,
    *,
    shard_rows: int | None = None,
    expiry: float = EXPIRY,
    description: str = DESCRIPTION,
    token: str | None = None,
) -> Dataset:
    """Compute `dataset.map(fn)` in shards, in any number of processes on any number of machines; resumable.

    Every process that calls this with the same arguments scores shards that no other worker has claimed, and returns
    the entire result, rows in order. Start the processes by `accelerate launch`, `torchrun`, a SLURM array, or by
    typing the same command twice. A finished shard is never scored again.

    A stream (`IterableDataset`) is cut into shards in its own order, and its rows are written with the new columns: the
    result is on disk and may be larger than the memory, which holds one shard. Every process reads the entire stream
    and scores only the shards that it has claimed, so pass the same stream to all, not one that is split by node. (If
    reading is expensive, split it, and give every node a folder of its own.) The order of the rows must be the same
    every time. An interrupted run resumes from the stream's `state_dict`, which is saved with the shards: the last
    finished shard is read again and compared. If it differs (no state covers a shuffle buffer), the stream is read from
    its start, and every shard is compared.

    Args:
        dataset (`Dataset` or `IterableDataset`): the same rows in every process.
        fn ([`Stage`]): adds the columns: [`QualityScorer`], [`TextEmbedder`], or a frozen dataclass of your own that
            returns one value per row. Its fields must be plain values; they are written to the folder's
            `manifest.json`, so keep secrets out of them.
        shard_dir (`str`, *optional*): a folder that all processes share, an fsspec URL such as `s3://...`, or a folder
            in a dataset repository, `hf://datasets/you/work/run-1`, created as a private one if it does not exist. On
            the Hub a shard is one commit; two machines may both score a shard, and the first commit counts. The folder
            belongs to one dataset and one stage, and its files are kept. By default a folder in the cache of
            `datasets`, named after the run, which serves one machine only. A stream needs a `shard_dir`, because it has
            no name before it is read; on the Hub it can be resumed, but two machines would do the same work.
        shard_rows (`int`, *optional*): rows in a shard; by default 65,536, or fewer if that would make fewer than 64
            shards; for a stream, 16,384.
        expiry (`float`): seconds without a heartbeat after which a worker on another machine counts as dead.
        description (`str`): label of the progress bar, which the main process shows for all.
        token (`str`, *optional*): for a folder on the Hub; by default `HF_TOKEN` or the token of `hf auth login`. It is
            never stored.

    Returns:
        `Dataset`: the columns of `dataset` and the new ones, memory-mapped (from a local copy if `shard_dir` is a URL).

    Raises:
        ValueError: the folder belongs to another run (the differences are named) or holds other files, or the token may
            not write to its repository; `fn` is not a stage; a column already exists; a stream is empty, its rows have
            changed, or its types change; or an error of the stage, which names rows of a stream by their position.
            Finished shards are kept.
        OSError: the folder cannot be read or written, or the Hub does not respond. Finished shards are kept.
    """
    from datasets import Dataset, IterableDataset

    _check(fn, shard_rows, expiry)
    # The result of a stream is its rows and the new columns; that of a dataset joins the new columns to the dataset.
    if isinstance(dataset, IterableDataset):
        options = RunOptions(shard_dir, shard_rows or STREAMED, expiry, token)
        return StreamedRun(dataset, fn, options).finish(description)
    run = _run_of(dataset, fn, shard_dir, shard_rows, expiry, token)
    # No shard, so there would be no part file to take the types of the columns from.
    if len(dataset) == 0:  # after `_run_of`, which makes the same checks as for any dataset
        types = fn.output_features()
        return join_columns(dataset, Dataset.from_dict({name: [] for name in types}, features=types))
    return join_columns(dataset, run.finish(description))


def fill_shards(
    dataset: Dataset,
    fn: Stage,
    shard_dir: str | os.PathLike[str],
    *,
    shard_rows: int | None = None,
    expiry: float = EXPIRY,
    description: str = DESCRIPTION,
    token: str | None = None,
) -> int:
    """Score every unclaimed shard of [`score_in_shards`], then return without waiting for other workers.

    For a worker that is paid by the hour, such as a task of a SLURM array. A last call of [`score_in_shards`] scores
    what dead workers have left unfinished, and returns the rows.

    Args:
        dataset (`Dataset`): the same rows in every process; streams are not supported.
        fn ([`Stage`]): adds the columns.
        shard_dir (`str`): a folder that all processes share, an fsspec URL, or a folder in a dataset repository.
        shard_rows (`int`, *optional*): rows in a shard; by default 65,536, or fewer if that would make fewer than 64
            shards.
        expiry (`float`): seconds without a heartbeat after which a worker on another machine counts as dead.
        description (`str`): label of the progress bar.
        token (`str`, *optional*): for a folder on the Hub; by default `HF_TOKEN` or the token of `hf auth login`.

    Returns:
        `int`: number of rows that are not finished, because other workers have claimed them.

    Raises:
        ValueError: `dataset` is a stream, `fn` is not a stage, a column already exists, the folder belongs to another
            run, or an error of the stage. Finished shards are kept.
        OSError: the folder cannot be read or written, or the Hub does not respond. Finished shards are kept.
    """
    from datasets import IterableDataset

    _check(fn, shard_rows, expiry)
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            "dataset is an IterableDataset, which fill_shards does not support, because its length is unknown. Call "
            "score_in_shards(dataset, fn, shard_dir)."
        )
    return _run_of(dataset, fn, shard_dir, shard_rows, expiry, token).work(description, wait=False)


def default_rows(rows: int) -> int:
    """Return the rows in a shard; they depend on `rows` alone, so that any number of processes can resume a run."""
    return min(max(rows // WANTED, SMALLEST), LARGEST)


def _check(fn: Any, shard_rows: int | None, expiry: float) -> None:
    # A class would pass both tests: it is a dataclass and has the attributes, but is not an instance with values.
    if isinstance(fn, type) or not is_dataclass(fn) or not isinstance(fn, Stage):
        name = getattr(fn, "__qualname__", type(fn).__qualname__)
        raise ValueError(
            f"fn={name} is not a Stage: an instance of a dataclass with output_columns, output_features() and "
            f"__call__, such as QualityScorer(). Shards are bound to its fields. Call map_across_gpus(dataset, {name}) "
            "for a function of a batch, or apply a function of the entire dataset to the result."
        )
    if (shard_rows is not None and shard_rows < 1) or not expiry > 0:
        raise ValueError(f"shard_rows={shard_rows} must be at least 1 and expiry={expiry} above 0.")


def _run_of(
    dataset: Dataset,
    fn: Stage,
    shard_dir: str | os.PathLike[str] | None,
    shard_rows: int | None,
    expiry: float,
    token: str | None,
) -> DatasetRun:
    from datasets import Dataset

    if not isinstance(dataset, Dataset):
        raise ValueError(f"dataset is a {type(dataset).__name__}; pass a Dataset or an IterableDataset, of one split.")
    return DatasetRun(dataset, fn, RunOptions(shard_dir, shard_rows or default_rows(len(dataset)), expiry, token))


class DatasetRun(SharedRun):
    """One worker of a run over the shards of a dataset, whose length is known."""

    @cached_property
    def texts(self) -> Dataset:
        """Return the columns that the stage reads, and `source_index`, which names a row in a message."""
        # A view of the Arrow table: nothing is copied.
        return carried(self.table.select_columns(read_columns(self.table.column_names, self.stage)))

    def expected_rows(self, shard: int, fingerprint: str) -> int:
        """Return the number of rows of a shard; `fingerprint` is not needed for it."""
        return len(self.rows_in(shard))

    def finish(self, description: str) -> Dataset:
        """Bind the folder, score what is missing, wait for other workers, and return all shards as one dataset.

        Raises:
            ValueError: the folder belongs to another run, or an error of the stage.
            OSError: the folder cannot be read or written.
        """
        from datasets import concatenate_datasets

        self.work(description, wait=True)
        # The parts are memory-mapped, so the result may be larger than memory.
        return concatenate_datasets([self.finished[shard] for shard in self._shards()])

    def work(self, description: str, wait: bool) -> int:
        """Score shards until all are finished, or, without `wait`, until other workers have claimed the rest.

        Returns:
            `int`: number of rows that other workers have claimed and not finished.

        Raises:
            ValueError: the folder belongs to another run, or an error of the stage.
            OSError: the folder cannot be read or written.
        """
        self.bind()
        with self.progress(description, len(self.table), lambda shard: len(self.rows_in(shard))) as show:
            while True:
                names = self.names()
                # `is_finished` also reads the parts, so that a truncated one counts as missing.
                missing = [shard for shard in self._shards() if not self.is_finished(shard, names)]
                show(names)
                if not missing:
                    break
                if not self.claims_are_shared:
                    random.shuffle(missing)  # so that another machine is unlikely to score the same shard
                turns = last_turns(names)
                # `any` stops after one shard was scored, as other workers have finished shards meanwhile: look again.
                if not any(self._take(shard, turns, show) for shard in missing):
                    if not wait:
                        return sum(len(self.rows_in(shard)) for shard in missing)
                    time.sleep(self.pause)
        # Not earlier: the claims of dead workers count the takeovers of a shard that is not finished.
        self.remove_leftovers(names)
        return 0

    def _shards(self) -> range:
        return range(-(-len(self.table) // self.shard_rows))  # rounded up: the last shard may be shorter

    def rows_in(self, shard: int) -> range:
        """Return the rows of a shard."""
        start = shard * self.shard_rows
        return range(start, min(start + self.shard_rows, len(self.table)))

    def may_write(self, names: set[str]) -> bool:
        """Return True if a shard is missing from `names`."""
        return not {part_name(shard) for shard in self._shards()} <= names

    def _take(self, shard: int, turns: dict[str, int], show: Callable[[], None]) -> bool:
        """Score a shard and return True, unless another worker has claimed it."""
        claim = self.claim(shard, turns)
        if claim is None:
            return False
        self.done = 0
        with self.claims.renewing(claim, lambda: self.done):
            # Another worker may have finished it before the claim was taken.
            if not self.is_finished(shard, self.names()):
                # A shard that was scored before but never uploaded only has to be uploaded.
                if not self.is_not_uploaded(shard):
                    batches = []
                    for batch in self.texts.select(self.rows_in(shard)).iter(batch_size=batch_rows()):
                        rows = len(next(iter(batch.values())))
                        batches.append(self.new_columns(batch, rows))
                        show()
                    self.write(shard, self.stage.output_features(), batches)
                self.upload(shard)
        self.done = 0  # the finished shard is counted by its file from now on
        return True
