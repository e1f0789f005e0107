"""The folder of a run in shards: a manifest that identifies the run, part files of finished shards, claims on others.

Does: bind a folder to one run by the contents of its columns; write part files atomically and read them back; detect
truncated ones; remove what killed workers have left behind; show the progress of all workers.
Does not: know where rows come from, choose which shard is scored next, or use the fingerprint of a dataset, which
depends on its files and is random after a step that cannot be hashed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from car_datasets.scoring.batching import watching
from car_datasets.scoring.shards.claims import CLAIM, Claims
from car_datasets.scoring.shards.storage import MANIFEST, Folder, open_storage
from car_datasets.scoring.stage import Progress, Stage, read_columns, refuse_taken
from car_datasets.utils.digests import bound, content_digest
from car_datasets.utils.files import cache_folder, write_whole
from car_datasets.utils.processes import launched_rank, local_rank

if TYPE_CHECKING:
    from datasets import Dataset, Features


FORMAT = 1  # of the folder; part of the manifest, so that a run never resumes in a folder of another format

# Fields that a stage with a pinned `revision` may change within a run: `batch_tokens` changes no number beyond the
# tolerance, so a run that ran out of memory is resumed with smaller batches; the others are places whose contents the
# revisions pin, so it is resumed from a model folder at another path.
FREE_FIELDS = ("model_id", "tokenizer", "engine", "batch_tokens")

PART = re.compile(r"part-(\d+)\.arrow")
logger = logging.getLogger(__name__)


class RunOptions(NamedTuple):
    """How a run is stored and shared.

    Args:
        shard_dir (`str`, *optional*): a folder, an fsspec URL, or a folder in a dataset repository; by default a folder
            in the cache of `datasets`.
        shard_rows (`int`): rows in a shard.
        expiry (`float`): seconds without a heartbeat after which a worker on another machine counts as dead.
        token (`str`, *optional*): for a folder on the Hub.
    """

    shard_dir: str | os.PathLike[str] | None
    shard_rows: int
    expiry: float
    token: str | None = None


class SharedRun(ABC):
    """Base class for a worker of a resumable run that stores its shards in a folder; subclasses provide the rows.

    Args:
        table (`Dataset`): the rows that the manifest describes: all rows, or the first ones of a stream.
        stage ([`Stage`]): adds the columns.
        options ([`RunOptions`]): folder, size of a shard, and expiry of claims.
        more (`dict`, *optional*): entries of the manifest that replace those of `table`.

    Attributes:
        copies (`Path`): local folder that parts are read from: the folder of the run if it is local, else one in the
            cache.
        shown (`str`): how messages name the folder.
        done (`int`): rows of the current shard that have been scored.
        finished (`dict`): finished shards by number, memory-mapped.

    Raises:
        ValueError: a new column already exists, the stage cannot read the rows or has fields that are not plain values,
            or the folder cannot hold shards.
    """

    def __init__(
        self, table: Dataset, stage: Stage, options: RunOptions, more: Mapping[str, Any] | None = None
    ) -> None:
        """Describe the run and open its folder, in which nothing is written yet."""
        self.stage, self.shard_rows = stage, options.shard_rows
        refuse_taken(table.column_names, stage)
        self.table = table.with_format(None)
        self.reads = read_columns(table.column_names, stage, with_index=False)
        self.manifest = {**describe_run(self.table, stage, self.reads, self.shard_rows), **(more or {})}
        self.id = run_id(self.manifest)
        cache = cache_folder() / self.id
        location = _on_one_machine(cache) if options.shard_dir is None else options.shard_dir
        self.folder = open_storage(location, options.token)
        self.shown = f"shard_dir={str(self.folder)!r}"
        # Two streams that begin alike have one id, so copies are kept apart by the address of the folder.
        place = hashlib.sha256(str(self.folder).encode()).hexdigest()[:8]
        self.copies = self.folder.local or cache / place
        # On the Hub only the workers of one machine can claim, in their local folder.
        self.claims = Claims(self.folder if isinstance(self.folder, Folder) else Folder(self.copies), options.expiry)
        self.done = 0
        self._tell: Callable[[int], None] = lambda done: None  # sets and shows `done`, once there is a progress bar
        self.finished: dict[int, Dataset] = {}
        self._truncated: set[int] = set()

    @abstractmethod
    def expected_rows(self, shard: int, fingerprint: str) -> int:
        """Return the rows that a finished shard must have; `fingerprint` is the one stored in its part file."""

    @abstractmethod
    def may_write(self, names: set[str]) -> bool:
        """Return True if this run may still write a shard, given the names of the files in the folder."""

    @property
    def claims_are_shared(self) -> bool:
        """Return True if all workers claim in the folder of the run; False if each machine has claims of its own."""
        return self.claims.folder is self.folder

    @property
    def pause(self) -> float:
        """Return the seconds to wait before looking again whether other workers have finished or died."""
        return min(self.folder.patience, self.claims.expiry / 6)

    def fingerprint(self, shard: int) -> str:
        """Return the prefix of the fingerprint that binds the part file of a shard to its run and its number."""
        return f"{self.id}-{shard:05d}"

    def new_columns(self, batch: Mapping[str, Any], rows: int) -> dict[str, Any]:
        """Return the stage's new columns for a batch of `rows` rows.

        Raises:
            ValueError: they are not the columns that the stage declares, or have another number of rows.
        """
        before = self.done
        with watching(lambda done: self._tell(before + done)):
            new = self.stage(batch)
        self.done = before + rows
        wrong = {name: len(values) for name, values in new.items() if len(values) != rows}
        declared = list(self.stage.output_features())
        if set(new) != set(declared) or wrong:
            raise ValueError(
                f"fn={type(self.stage).__name__} returned the columns {list(new)} for {rows} rows"
                f"{f', with {wrong} values' if wrong else ''}. A stage must return one value per row for each of the "
                f"columns that output_features() declares: {declared}."
            )
        return new

    def names(self) -> set[str]:
        """Return the names of the files in the folder, and of the claims, wherever those are kept."""
        with self.explaining("the folder", "read"):
            names = self.folder.names()
        if self.claims_are_shared:
            return names
        return names | {name for name in self.claims.folder.names() if CLAIM.fullmatch(name)}

    def bind(self) -> None:
        """Write the manifest, or check that the one in the folder is equal.

        Two runs that write theirs at the same time are not told apart here, but by the fingerprints of their shards.

        Raises:
            ValueError: the folder belongs to another run, or holds other files.
            OSError: the folder cannot be read or written.
        """
        with self.explaining(MANIFEST, "read"):
            earlier = self.folder.read(MANIFEST)
        if earlier is None:
            # A manifest among the names came after the reading above, from another worker of this run or of another.
            present = [name for name in self.folder.names() if not name.startswith(".")]
            if present and MANIFEST not in present:
                raise ValueError(
                    f"{self.shown} holds {sorted(present)[:3]} and no {MANIFEST}: it is not a folder "
                    "of shards. Pass a new or empty one (--shards DIR)."
                )
            with self.explaining(MANIFEST):
                self.folder.make()
                self.folder.write(MANIFEST, json.dumps(self.manifest, indent=2).encode())
                # Read back: another run may have written its own meanwhile, and on the Hub the first one is kept.
                earlier = self.folder.read(MANIFEST)
        elif not self.claims_are_shared and self.may_write(self.folder.names()):
            self.folder.make()  # checks the token now, before an hour of work that could not be uploaded
        try:
            stored = json.loads(earlier or b"")
        except (ValueError, RecursionError):
            stored = None
        if stored != self.manifest:
            other = differences(stored, self.manifest) if isinstance(stored, dict) else f"its {MANIFEST} is damaged"
            raise ValueError(
                f"{self.shown} belongs to another run: {other}. Pass another folder (--shards DIR), or delete this one."
            )

    def claim(self, shard: int, turns: Mapping[str, int]) -> str | None:
        """Claim a shard.

        Args:
            shard (`int`): its number.
            turns (`Mapping`): the number of the newest claim on each part file, from [`last_turns`].

        Returns:
            `str` or `None`: the name of the claim; `None` if another worker holds the shard.
        """
        with self.explaining(part_name(shard)):
            if not self.claims_are_shared:
                self.claims.folder.make()
            return self.claims.take(part_name(shard), turns)

    def write(self, shard: int, features: Features, batches: Iterable[dict[str, Any]], suffix: str = "") -> None:
        """Write a shard atomically: in place if the folder is local, else to a local file for `upload`.

        Args:
            shard (`int`): its number.
            features (`Features`): types of its columns.
            batches (`Iterable`): its columns, batch by batch.
            suffix (`str`): appended to its fingerprint.

        Raises:
            OSError: the file cannot be written.
        """
        path = self._own(shard)
        with self.explaining(path.name):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Another worker may have taken over the claim, finished, and removed our temporary file.
            with contextlib.suppress(FileNotFoundError):
                write_part(path, features, batches, self.fingerprint(shard) + suffix)

    def upload(self, shard: int) -> None:
        """Upload a shard that was written, if the folder is remote, and read it back.

        Raises:
            OSError: it cannot be uploaded, or does not read back.
        """
        path, own = self.copies / part_name(shard), self._own(shard)
        if self.folder.local is None:
            # FileNotFoundError: removed by another worker, as in `write`.
            with self.explaining(path.name), contextlib.suppress(FileNotFoundError):
                path.unlink(missing_ok=True)
                if self.folder.upload(own, path.name, replace=shard in self._truncated):
                    os.replace(own, path)
                else:
                    own.unlink()  # another machine was first: all workers use its numbers, which are downloaded below
        if not self.is_finished(shard, {path.name}):
            raise OSError(f"{self.shown}: {path.name} was written, but does not read back complete.")

    def is_not_uploaded(self, shard: int) -> bool:
        """Return True if a finished copy of this shard exists locally but was never uploaded."""
        if self.folder.local is not None:
            return False
        with contextlib.suppress(ValueError):  # a file of another run
            return not isinstance(self._read(shard, self._own(shard)), str)
        return False

    def _own(self, shard: int) -> Path:
        """Return the path that a shard is written to, which is not that of a downloaded part if it will be uploaded."""
        name = part_name(shard)
        return self.copies / (name if self.folder.local is not None else f"unput-{name}")

    def is_finished(self, shard: int, names: set[str]) -> bool:
        """Return True if a shard is finished; a truncated one is not, and is scored again.

        Args:
            shard (`int`): its number.
            names (`set[str]`): names of the files in the folder.

        Raises:
            OSError: the part file cannot be read. It may be complete, so it is not scored again.
            ValueError: it belongs to another run.
        """
        name = part_name(shard)
        if shard not in self.finished and name in names:
            with self.explaining(name, "read"), contextlib.suppress(FileNotFoundError):  # removed since `names`
                if self.folder.local is None and not (self.copies / name).exists():
                    self.copies.mkdir(parents=True, exist_ok=True)
                    self.folder.download(name, self.copies / name)
            part = self._read(shard, self.copies / name)
            if not isinstance(part, str):
                self.finished[shard] = part
            else:
                if shard not in self._truncated:
                    logger.warning("%s/%s is truncated (%s): its rows are scored again.", self.folder, name, part)
                self._truncated.add(shard)
                if self.folder.local is None:  # downloaded again, once another worker has replaced it
                    (self.copies / name).unlink(missing_ok=True)
        return shard in self.finished

    def _read(self, shard: int, path: Path) -> Dataset | str:
        """Return the part in a local file, memory-mapped, or a message that says how it is truncated."""
        with self.explaining(path.name, "read"):
            content = read_part(path)
        if isinstance(content, str):
            return content
        part, fingerprint = content
        # A stream appends a dash and the digest of its rows to the fingerprint. The dash keeps the fingerprint of shard
        # 10000 from matching the start of that of shard 100000.
        if not f"{fingerprint}-".startswith(f"{self.fingerprint(shard)}-"):
            raise ValueError(
                f"{self.shown}: {path.name} is a shard of another run. Move it away, or pass another "
                "folder (--shards DIR)."
            )
        expected = self.expected_rows(shard, fingerprint)
        return part if len(part) == expected else f"{len(part)} of {expected} rows"

    def remove_leftovers(self, names: set[str]) -> None:
        """Remove claims and temporary files that killed workers have left behind, once every shard is finished."""
        for name in names:
            # Temporary names start with a dot. Files of other names are not ours to remove.
            ours = PART.match(name.lstrip(".")) or name.startswith(f".{MANIFEST}.")
            if ours and not PART.fullmatch(name):
                with contextlib.suppress(OSError):
                    self.claims.folder.remove(name)
        if self.folder.local is None:  # local files that were never uploaded
            for path in self.copies.glob("*part-*"):
                if not PART.fullmatch(path.name):
                    path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def explaining(self, name: str, doing: str = "written") -> Iterator[None]:
        """Raise an OSError that says what to do for one of a full or failing disk, or of missing permissions."""
        try:
            yield
        except OSError as error:
            mend = "Free disk space or repair the folder" if doing == "written" else "Repair the folder"
            raise OSError(
                f"{self.shown}: {name} cannot be {doing}: {error}. Finished shards are kept. {mend}, "
                "then run the same command again to resume."
            ) from error

    @contextlib.contextmanager
    def progress(
        self, description: str, total: int | None, rows_in: Callable[[int], int]
    ) -> Iterator[Callable[..., None]]:
        """Show one progress bar for all workers, on the main process, from the finished shards and the claims.

        Args:
            description (`str`): label of the bar.
            total (`int`, *optional*): rows of the run, if known.
            rows_in (`Callable`): maximal number of rows of a shard.

        Yields:
            `Callable`: updates the bar: at once if given the names in the folder, else if the last look is old enough.
        """
        with Progress(description, total) as bar:
            # Time of the last look at the folder, and the rows of finished shards and other workers that it found.
            looked, known = 0.0, 0

            def show(names: set[str] | None = None) -> None:
                nonlocal looked, known
                # A look at the folder costs a request, so there are few, and none without a bar.
                if bar.shown and (names is not None or time.monotonic() - looked >= 2 * self.folder.patience):
                    # Set before the look: a storage that fails should not be asked again after every batch.
                    looked = time.monotonic()
                    with contextlib.suppress(Exception):  # a failing look must not end a shard that is being scored
                        names = self.names() if names is None else names
                        finished = sum(rows_in(int(part[1])) for part in map(PART.fullmatch, names) if part)
                        # A claim that is taken over may tell fewer rows than before, which the bar ignores.
                        known = finished + self.claims.rows_elsewhere(names)
                bar.to(known + self.done)

            def tell(done: int) -> None:
                self.done = done
                show()
                bar.passed(known + done)

            self._tell = tell
            yield show


def _on_one_machine(cache: Path) -> Path:
    """Return the default folder; raise ValueError if processes run on several machines, which do not share it."""
    here, everywhere = local_rank()[1], launched_rank()[1]
    if here != everywhere:
        raise ValueError(
            f"{everywhere} processes run on several machines: pass shard_dir=... (--shards DIR), a folder that all "
            "share, or a URL such as s3://..."
        )
    return cache


def describe_run(dataset: Dataset, stage: Stage, columns: Sequence[str], shard_rows: int) -> dict[str, Any]:
    """Return the manifest of a run, as plain values; equal manifests give equal shards.

    Args:
        dataset (`Dataset`): the rows.
        stage ([`Stage`]): a dataclass; the manifest holds the name of its class and its fields.
        columns (`list[str]`): the columns that the stage reads, to whose content the run is bound.
        shard_rows (`int`): rows in a shard.

    Raises:
        ValueError: a field of the stage is not a plain value.
    """
    manifest = {
        "format": FORMAT,
        "rows": len(dataset),
        "shard_rows": shard_rows,
        "reads": list(columns),
        "content": content_digest(dataset, columns),
        "stage": type(stage).__name__,
        "features": stage.output_features().to_dict(),
    }
    settings = {field.name: getattr(stage, field.name) for field in fields(stage)}  # type: ignore[arg-type]
    free = getattr(stage, "free_fields", FREE_FIELDS if "revision" in settings else ())
    for name, value in settings.items():
        if name not in free:  # a field named like an entry above must not replace it
            manifest[f"stage.{name}" if name in manifest else name] = _plain_value(value, name, stage)
    # As JSON reads it back, so that it equals the manifest that another process reads from the folder.
    return {name: json.loads(json.dumps(value)) for name, value in manifest.items()}


def _plain_value(value: Any, name: str, stage: Stage) -> Any:
    """Return a field as JSON reads it back, with tuples as lists; raise ValueError if it is not a plain value."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"fn={type(stage).__name__}: the field {name} is a {type(value).__name__}, to which shards cannot be bound "
            f"({error}). Make it a string, number, boolean, None, or a list or dict of them."
        ) from error


def run_id(manifest: dict[str, Any]) -> str:
    """Return a name for a run: 16 hexadecimal digits, equal for equal manifests."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]


def differences(earlier: dict[str, Any], now: dict[str, Any]) -> str:
    """Return the differences of two manifests for a message: `dtype ('float32' there, 'bfloat16' now)`."""
    names = [name for name in (*now, *earlier) if earlier.get(name) != now.get(name)]
    return ", ".join(
        f"{name} ({str(earlier.get(name))[:40]!r} there, {str(now.get(name))[:40]!r} now)"
        for name in dict.fromkeys(names)
    )


def part_name(shard: int) -> str:
    """Return the name of the part file of a shard."""
    return f"part-{shard:05d}.arrow"


def write_part(path: Path, features: Features, batches: Iterable[dict[str, Any]], fingerprint: str) -> None:
    """Write the new columns of a shard atomically.

    Args:
        path (`Path`): the part file.
        features (`Features`): types of the columns.
        batches (`Iterable`): columns as the stage returned them, batch by batch.
        fingerprint (`str`): binds the part to its run and its number; `datasets` takes it for the fingerprint of the
            part.
    """
    from datasets.arrow_writer import ArrowWriter

    def write(temporary: str) -> None:
        with (
            pa.OSFile(temporary, "wb") as file,
            ArrowWriter(features=features, stream=file, fingerprint=fingerprint) as writer,
        ):
            for batch in batches:
                writer.write_batch(batch)
            writer.finalize()

    write_whole(path, write)


def read_part(path: Path) -> tuple[Dataset, str] | str:
    """Return the part in a file, memory-mapped, and its fingerprint, or a message that says how the file is truncated.

    Raises:
        OSError: the file cannot be read. It may be complete.
    """
    from datasets import Dataset

    try:
        with pa.memory_map(str(path)) as file:
            metadata = pa.ipc.open_stream(file).schema.metadata or {}
        part = bound(Dataset.from_file(str(path)))
        fingerprint = str(json.loads(metadata.get(b"huggingface", b"{}")).get("fingerprint"))
    # Truncated at the start, or gone; or it holds what no worker wrote.
    except (FileNotFoundError, ValueError, RuntimeError, LookupError, TypeError, AttributeError) as error:
        return str(error)
    except OSError as error:
        if error.errno is None:  # raised by Arrow for a file that ends early; errors of the system have a number
            return str(error)
        raise
    return part, fingerprint
