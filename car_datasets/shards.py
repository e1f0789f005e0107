"""Scoring in shards: `score_in_shards`, which many processes and machines share, and which goes on where it was cut off.

Does: cut a dataset into shards, take them one by one (claims.py), put each in place as a file when it is whole
(shard_parts.py), refuse what belongs to another run (manifest.py), and put the columns beside the dataset's own.
Does not: start processes, or speak to them: what they share is a folder, or a dataset repository (hub_folder.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from car_datasets.claims import CLAIM, Claims, Folder, last_turns
from car_datasets.columns import batch_rows, read_columns
from car_datasets.hub_folder import START, HubFolder
from car_datasets.manifest import describe_run, differences, run_id
from car_datasets.parallel import is_main_process
from car_datasets.rows import refuse_overwrite
from car_datasets.shard_parts import PART, part_name, read_part, write_part
from car_datasets.vectors import beside

if TYPE_CHECKING:
    from datasets import Dataset

    from car_datasets.embedding import TextEmbedder
    from car_datasets.scoring import QualityScorer

MANIFEST = "manifest.json"
SMALLEST, LARGEST, WANTED = 128, 65_536, 64  # rows in a shard, and shards where the rows allow
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
        shard_dir (`str`, *optional*): a folder that all processes see, an fsspec URL such as `s3://...`, or a folder in a
            dataset repository, `hf://datasets/you/work/run-1`, made private if it is not there: one commit per shard, and
            two machines may both score a shard, of which the first counts. It belongs to these texts and this stage; what
            it holds is kept. By default a folder in the cache of `datasets`, named after them: one machine only.
        shard_rows (`int`, *optional*): rows in a shard; by default 65,536, and fewer where that would make fewer than 64.
        expiry (`float`): seconds without a sign of life after which a worker on another machine is taken for dead.
        description (`str`): of the progress bar, which the main process shows, for all.

    Returns:
        `Dataset`: the columns of `dataset` and the new ones, memory-mapped (from a local copy where `shard_dir` is a URL).

    Raises:
        ValueError: the folder belongs to another run (what differs is named) or to something else, or is on the Hub and your
            token may not write there; `fn` is no stage; a column is taken; or see the stage.
        OSError: the folder cannot be written, or the Hub does not answer. Finished shards stay.
    """
    from datasets import Dataset

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
    if len(dataset) == 0:
        types = fn.output_features()
        return beside(dataset, Dataset.from_dict({name: [] for name in types}, features=types))
    run = ShardedRun(texts, fn, shard_dir, rows_each, expiry)
    return beside(dataset, run.finish(description))


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
        location = str(_on_one_machine(cache)) if shard_dir is None else os.fspath(shard_dir)
        self.folder = HubFolder(location) if location.startswith(START) else Folder(location)
        # Where parts are read from: a URL's are fetched once, into a folder of its own.
        place = hashlib.sha256(str(self.folder).encode()).hexdigest()[:8]
        self.copies = self.folder.local or cache.with_name(f"{self.id}-{place}")
        # Where claims are impossible, the workers of one machine still share their own.
        self.claims = Claims(self.folder if isinstance(self.folder, Folder) else Folder(self.copies), expiry)
        self.done = 0  # rows of the shard at hand
        self._whole: dict[int, Dataset] = {}
        self._torn: set[int] = set()

    def finish(self, description: str) -> Dataset:
        """Bind the folder, work until every shard is there, and read them all.

        Raises:
            ValueError, OSError: see [`score_in_shards`].
        """
        from datasets import concatenate_datasets

        self._bind()
        shards = range(self.shard_count)
        with _progress(self, description) as show:
            while True:
                names = self.names()
                missing = [shard for shard in shards if not self._is_whole(shard, names)]
                show(names)
                if not missing:
                    break
                if not self.folder.claimable:
                    random.shuffle(missing)  # another machine is hardly at the same one
                turns = last_turns(names)
                if not any(self._take(shard, turns, show) for shard in missing):
                    time.sleep(min(self.folder.patience, self.claims.expiry / 6))  # the others are at them
        self._sweep(names)
        return concatenate_datasets([self._whole[shard] for shard in shards])

    def names(self) -> set[str]:
        """What is in the folder, and the claims, wherever they are."""
        with self._explaining("the folder"):
            names = self.folder.names()
        if self.claims.folder is self.folder:
            return names
        return names | {name for name in self.claims.folder.names() if CLAIM.fullmatch(name)}

    @property
    def shard_count(self) -> int:
        return -(-len(self.texts) // self.shard_rows)

    def rows_in(self, shard: int) -> range:
        """The rows of a shard."""
        start = shard * self.shard_rows
        return range(start, min(start + self.shard_rows, len(self.texts)))

    def _bind(self) -> None:
        """Write the manifest, or find an equal one. Two runs that write theirs at once are told apart by their shards."""
        with self._explaining(MANIFEST):
            earlier = self.folder.read(MANIFEST)
        if earlier is None:
            there = [name for name in self.folder.names() if not name.startswith(".")]
            if there and MANIFEST not in there:
                raise ValueError(
                    f"shard_dir={str(self.folder)!r} holds {sorted(there)[:3]} and no {MANIFEST}: it is no folder of shards. "
                    "Name a new or an empty one (--shards DIR)."
                )
            with self._explaining(MANIFEST):
                self.folder.make()
                self.folder.write(MANIFEST, json.dumps(self.manifest, indent=2).encode())
                earlier = self.folder.read(MANIFEST)
        elif not self.folder.claimable and not {*map(part_name, range(self.shard_count))} <= self.folder.names():
            self.folder.make()  # before an hour of work that may not be put there
        try:
            found = json.loads(earlier or b"")
        except ValueError:
            found = {}
        if found != self.manifest:
            raise ValueError(
                f"shard_dir={str(self.folder)!r} belongs to another run: {differences(found, self.manifest)}. Name another "
                "folder (--shards DIR), or delete this one."
            )

    def _take(self, shard: int, turns: dict[str, int], show: Callable[[], None]) -> bool:
        """Score a shard unless another worker has it."""
        with self._explaining(part_name(shard)):
            if self.claims.folder is not self.folder:
                self.claims.folder.make()
            claim = self.claims.take(part_name(shard), turns)
        if claim is None:
            return False
        self.done = 0
        with self.claims.renewing(claim, lambda: self.done):
            if not self._is_whole(shard, self.names()):  # it may have been finished since we looked
                if self.folder.local is not None or isinstance(self._read(shard), str):
                    self._score(shard, show)
                self._put(shard)
        self.done = 0
        return True

    def _score(self, shard: int, show: Callable[[], None]) -> None:
        """Score a shard, and write it here."""
        batches = []
        for batch in self.texts.select(self.rows_in(shard)).iter(batch_size=batch_rows()):
            batches.append(self.stage(batch))
            self.done += len(next(iter(batch.values())))
            show()
        path = self.copies / part_name(shard)
        with self._explaining(path.name):
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # another worker took over, finished, and swept our file away
                write_part(path, self.stage.output_features(), batches, self._fingerprint(shard))

    def _put(self, shard: int) -> None:
        """Put a shard that was scored here where all see it."""
        path = self.copies / part_name(shard)
        with self._explaining(path.name):
            if self.folder.local is None and not self.folder.upload(path, path.name, replace=shard in self._torn):
                path.unlink()  # another machine was first: its numbers are everyone's
        if not self._is_whole(shard, {path.name}):
            raise OSError(f"shard_dir={str(self.folder)!r}: {path.name} was written and does not read back whole.")

    def _is_whole(self, shard: int, names: set[str]) -> bool:
        """Whether a shard is finished; one that is torn is not, and is scored again."""
        name = part_name(shard)
        if shard not in self._whole and name in names:
            if self.folder.local is None and not (self.copies / name).exists():
                with self._explaining(name):
                    self.copies.mkdir(parents=True, exist_ok=True)
                    self.folder.download(name, self.copies / name)
            found = self._read(shard)
            if not isinstance(found, str):
                self._whole[shard] = found
            else:
                if shard not in self._torn:
                    logger.warning("%s/%s is torn (%s): its rows are scored again.", self.folder, name, found)
                self._torn.add(shard)
                if self.folder.local is None:
                    (self.copies / name).unlink(missing_ok=True)
        return shard in self._whole

    def _read(self, shard: int) -> Dataset | str:
        """The part of a shard that lies here, or what is wrong with it.

        Raises:
            ValueError: it belongs to another run.
        """
        try:
            return read_part(self.copies / part_name(shard), len(self.rows_in(shard)), self._fingerprint(shard))
        except ValueError as error:
            raise ValueError(f"shard_dir={str(self.folder)!r}: {error}") from error

    def _fingerprint(self, shard: int) -> str:
        """What binds a part to its run and its place."""
        return f"{self.id}-{shard:05d}"

    def _sweep(self, names: set[str]) -> None:
        """Remove what killed workers have left, now that every shard is there."""
        for name in names:
            ours = PART.match(name.lstrip(".")) or name.startswith(f".{MANIFEST}.")
            if ours and not PART.fullmatch(name):
                with contextlib.suppress(OSError):
                    self.claims.folder.remove(name)

    @contextlib.contextmanager
    def _explaining(self, name: str) -> Iterator[None]:
        """A disk that is full or a folder that is read-only as an error that says what to do."""
        try:
            yield
        except OSError as error:
            raise OSError(
                f"shard_dir={str(self.folder)!r}: {name} cannot be written: {error}. Shards that are finished stay: make room "
                "or mend the folder, and run the same again."
            ) from error


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
            if bar.disable or (names is None and time.monotonic() - looked[0] < 2 * run.folder.patience):
                return
            names = run.names() if names is None else names
            looked[0] = time.monotonic()
            finished = sum(len(run.rows_in(int(part[1]))) for part in map(PART.fullmatch, names) if part)
            bar.update(max(0, finished + run.claims.rows_elsewhere(names) + run.done - bar.n))

        yield show
