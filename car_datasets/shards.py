"""Scoring in shards: `score_in_shards`, which many processes and machines share, and which goes on where it was cut off.

Does: cut a dataset into shards, take them one by one (claims.py), write each as an Arrow file that is moved into place
when it is whole, refuse what belongs to another run (manifest.py), and put the columns beside the dataset's own.
Does not: start processes, or speak to them: what they share is a folder.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from car_datasets.claims import Claims, Folder, last_turns
from car_datasets.columns import batch_rows, read_columns
from car_datasets.manifest import describe_run, differences, run_id
from car_datasets.parallel import is_main_process
from car_datasets.parts import Parts, explaining, part_name
from car_datasets.rows import refuse_overwrite
from car_datasets.vectors import beside

if TYPE_CHECKING:
    from datasets import Dataset

    from car_datasets.embedding import TextEmbedder
    from car_datasets.scoring import QualityScorer

MANIFEST = "manifest.json"
SMALLEST, LARGEST, WANTED = 128, 65_536, 64  # rows in a shard, and shards where the rows allow
PART = re.compile(r"part-(\d+)\.arrow")
logger = logging.getLogger(__name__)


def score_in_shards(
    dataset: Dataset,
    fn: QualityScorer | TextEmbedder,
    shard_dir: str | os.PathLike[str] | None = None,
    *,
    shard_rows: int | None = None,
    expiry: float = 60.0,
    description: str = "Scoring",
) -> Dataset:
    """`dataset.map(fn)` in shards: by one process or many, on one machine or several, and again after a kill.

    Every process that calls this with the same arguments takes shards that no living one has, and returns the whole
    result, its rows in order. Start them as you like: `accelerate launch`, `torchrun`, a SLURM array, or the same command
    typed twice. A shard that is finished is never scored again.

    Args:
        dataset (`Dataset`): the same rows in every process.
        fn ([`QualityScorer`] or [`TextEmbedder`]): what adds the columns.
        shard_dir (`str`, *optional*): a folder that all processes see, or an fsspec URL such as `s3://...`. It belongs to
            these texts and this stage; what it holds is kept. By default a folder in the cache of `datasets`, named after
            them: one machine only.
        shard_rows (`int`, *optional*): rows in a shard; by default 65,536, and fewer where that would make fewer than 64.
        expiry (`float`): seconds without a sign of life after which a worker on another machine is taken for dead.
        description (`str`): of the progress bar, which the main process shows, for all.

    Returns:
        `Dataset`: the columns of `dataset` and the new ones, memory-mapped (from a local copy where `shard_dir` is a URL).

    Raises:
        ValueError: the folder belongs to another run (what differs is named) or to something else; `fn` is no stage; a
            column is taken; or see the stage.
        OSError: the folder cannot be written. Finished shards stay.
    """
    from datasets import Dataset

    run = _begin(dataset, fn, shard_dir, shard_rows, expiry)
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
) -> int:
    """One worker's part in [`score_in_shards`]: take shards until none is free, and wait for nobody.

    For a worker that is paid by the hour, such as a task of a SLURM array: a last call of [`score_in_shards`] finishes what
    is left, if a worker died, and returns the rows.

    Args:
        dataset, fn, shard_dir, shard_rows, expiry, description: see [`score_in_shards`].

    Returns:
        `int`: rows that are left, because other workers have claimed them.

    Raises:
        ValueError, OSError: see [`score_in_shards`].
    """
    return _begin(dataset, fn, shard_dir, shard_rows, expiry).work(description, wait=False)


def _begin(
    dataset: Dataset,
    fn: QualityScorer | TextEmbedder,
    shard_dir: str | os.PathLike[str] | None,
    shard_rows: int | None,
    expiry: float,
) -> ShardedRun:
    if not is_dataclass(fn) or not hasattr(fn, "schema") or not hasattr(fn, "output_features"):
        name = getattr(fn, "__qualname__", type(fn).__qualname__)
        raise ValueError(
            f"fn={name} is no QualityScorer and no TextEmbedder, whose fields a shard is bound to. Call "
            f"map_across_gpus(dataset, {name}) for a function of a batch; one of the whole dataset, on the result."
        )
    rows_each = default_rows(len(dataset)) if shard_rows is None else shard_rows
    if rows_each < 1 or not expiry > 0:
        raise ValueError(f"shard_rows={shard_rows} must be at least 1 and expiry={expiry} above 0.")
    refuse_overwrite(dataset.column_names, fn.output_features(), "output_column=... (and embedding_column=...)")
    texts = dataset.with_format(None).select_columns(read_columns(dataset, fn))
    return ShardedRun(texts, fn, shard_dir, rows_each, expiry)


def default_rows(rows: int) -> int:
    """Rows in a shard: by the rows alone, so that a run can go on with another number of processes."""
    return min(max(rows // WANTED, SMALLEST), LARGEST)


class ShardedRun:
    """One process's part in a run over shards; see [`score_in_shards`].

    Args:
        texts (`Dataset`): the columns that the stage reads, and those that name a row in a message.
        stage: [`QualityScorer`] or [`TextEmbedder`].
        shard_dir, shard_rows, expiry: see [`score_in_shards`].
    """

    def __init__(
        self, texts: Dataset, stage: Any, shard_dir: str | os.PathLike[str] | None, shard_rows: int, expiry: float
    ) -> None:
        from datasets import config

        self.texts, self.stage, self.shard_rows = texts, stage, shard_rows
        self.manifest = describe_run(texts, stage, read_columns(texts, stage, with_index=False), shard_rows)
        self.id = run_id(self.manifest)
        cache = Path(config.HF_DATASETS_CACHE) / "car_datasets" / self.id
        self.folder = Folder(_on_one_machine(cache) if shard_dir is None else shard_dir)
        self.parts = Parts(self.folder, self.folder.local or cache, self.id, stage.output_features())
        self.claims = Claims(self.folder, expiry)
        self.done = 0  # rows of the shard at hand
        self._whole: dict[int, Dataset] = {}
        self._torn: set[int] = set()

    def finish(self, description: str) -> Dataset:
        """Work until every shard is there, and read them all.

        Raises:
            ValueError, OSError: see [`score_in_shards`].
        """
        from datasets import concatenate_datasets

        self.work(description, wait=True)
        return concatenate_datasets([self._whole[shard] for shard in self._shards()])

    def work(self, description: str, wait: bool) -> int:
        """Bind the folder and take shards until every one is there, or, unless told to `wait`, claimed by another worker.

        Returns:
            `int`: rows that others have claimed.

        Raises:
            ValueError, OSError: see [`score_in_shards`].
        """
        self._bind()
        with _progress(self, description) as show:
            while True:
                names = self.folder.names()
                missing = [shard for shard in self._shards() if not self._is_whole(shard, names)]
                show(names)
                if not missing:
                    break
                turns = last_turns(names)
                if not any(self._take(shard, turns, show) for shard in missing):
                    if not wait:
                        return sum(len(self.rows_in(shard)) for shard in missing)
                    time.sleep(min(0.5, self.claims.expiry / 6))  # the others are at them
        self._sweep(names)
        return 0

    def _shards(self) -> range:
        return range(-(-len(self.texts) // self.shard_rows))

    def rows_in(self, shard: int) -> range:
        """The rows of a shard."""
        start = shard * self.shard_rows
        return range(start, min(start + self.shard_rows, len(self.texts)))

    def _bind(self) -> None:
        """Write the manifest, or find an equal one. Two runs that write theirs at once are told apart by their shards."""
        with explaining(self.folder, MANIFEST, "read"):
            earlier = self.folder.read(MANIFEST)
        if earlier is None:
            there = [name for name in self.folder.names() if not name.startswith(".")]
            if there and MANIFEST not in there:
                raise ValueError(
                    f"shard_dir={str(self.folder)!r} holds {sorted(there)[:3]} and no {MANIFEST}: it is no folder of shards. "
                    "Name a new or an empty one (--shards DIR)."
                )
            with explaining(self.folder, MANIFEST):
                self.folder.make()
                self.folder.write(MANIFEST, json.dumps(self.manifest, indent=2).encode())
            return
        try:
            found = json.loads(earlier)
        except ValueError:
            found = {}
        if found != self.manifest:
            raise ValueError(
                f"shard_dir={str(self.folder)!r} belongs to another run: {differences(found, self.manifest)}. Name another "
                "folder (--shards DIR), or delete this one."
            )

    def _take(self, shard: int, turns: dict[str, int], show: Callable[[], None]) -> bool:
        """Score a shard unless another worker has it."""
        with explaining(self.folder, part_name(shard)):
            claim = self.claims.take(part_name(shard), turns)
        if claim is None:
            return False
        self.done = 0
        with self.claims.renewing(claim, lambda: self.done):
            if not self._is_whole(shard, self.folder.names()):  # it may have been finished since we looked
                batches = []
                for batch in self.texts.select(self.rows_in(shard)).iter(batch_size=batch_rows()):
                    batches.append(self.stage(batch))
                    self.done += len(next(iter(batch.values())))
                    show()
                self._whole[shard] = self.parts.write(shard, batches, len(self.rows_in(shard)))
        self.done = 0
        return True

    def _is_whole(self, shard: int, names: set[str]) -> bool:
        """Whether a shard is finished; one that is torn is not, and is scored again."""
        if shard not in self._whole and part_name(shard) in names:
            found = self.parts.open(shard, len(self.rows_in(shard)))
            if isinstance(found, str) and shard not in self._torn:
                logger.warning("%s/%s is torn (%s): its rows are scored again.", self.folder, part_name(shard), found)
                self._torn.add(shard)
            elif not isinstance(found, str):
                self._whole[shard] = found
        return shard in self._whole

    def _sweep(self, names: set[str]) -> None:
        """Remove what killed workers have left, now that every shard is there."""
        for name in names:
            ours = PART.match(name.lstrip(".")) or name.startswith(f".{MANIFEST}.")
            if ours and not PART.fullmatch(name):
                with contextlib.suppress(OSError):
                    self.folder.remove(name)


def _on_one_machine(cache: Path) -> Path:
    """The default folder, which processes on several machines may not have in common."""
    here, everywhere = (int(os.environ.get(name, "1")) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    if here != everywhere:
        raise ValueError(
            f"{everywhere} processes run on several machines: pass shard_dir=... (--shards DIR), a folder that all see, or a "
            "URL such as s3://..."
        )
    return cache


@contextlib.contextmanager
def _progress(run: ShardedRun, description: str) -> Iterator[Callable[..., None]]:
    """One bar for all workers, on the main process: what is finished, and what claims say of the rest."""
    from datasets.utils import tqdm

    with tqdm(total=len(run.texts), desc=description, unit=" examples", disable=not is_main_process()) as bar:
        looked = [0.0]

        def show(names: set[str] | None = None) -> None:
            if bar.disable or (names is None and time.monotonic() - looked[0] < 1):
                return
            names = run.folder.names() if names is None else names
            looked[0] = time.monotonic()
            finished = sum(len(run.rows_in(int(part[1]))) for part in map(PART.fullmatch, names) if part)
            bar.update(max(0, finished + run.claims.rows_elsewhere(names) + run.done - bar.n))

        yield show
