"""The folder of a run over shards: which run it belongs to, finished shards, written whole and read back.

Does: bind a folder to a manifest, refuse another run's, write a shard as an Arrow file that is moved into place when it is
whole, open what is finished, tell what is torn, remove what killed workers have left, show how far all workers are.
Does not: know where rows come from (shards.py, stream_shards.py), or score.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from car_datasets.claims import Claims, Folder
from car_datasets.manifest import differences, run_id
from car_datasets.parallel import is_main_process
from car_datasets.results import write_whole

if TYPE_CHECKING:
    from datasets import Dataset, Features

MANIFEST = "manifest.json"
PART = re.compile(r"part-(\d+)\.arrow")
logger = logging.getLogger(__name__)


class SharedRun:
    """What a process does with the folder of its run; a subclass knows the rows.

    Args:
        manifest (`dict`): see [`describe_run`].
        shard_dir, expiry: see [`score_in_shards`].
    """

    def __init__(self, manifest: dict[str, Any], shard_dir: str | os.PathLike[str] | None, expiry: float) -> None:
        from datasets import config

        self.manifest = manifest
        self.id = run_id(manifest)
        cache = Path(config.HF_DATASETS_CACHE) / "car_datasets" / self.id
        self.folder = Folder(_on_one_machine(cache) if shard_dir is None else shard_dir)
        # Where parts are read from: a URL's are fetched once. Two streams may begin alike, and so have one id.
        location = hashlib.sha256(self.folder.location.encode()).hexdigest()[:8]
        self.copies = self.folder.local or cache / location
        self.claims = Claims(self.folder, expiry)
        self.done = 0  # rows of the shard at hand
        self.whole: dict[int, Dataset] = {}
        self._torn: set[int] = set()

    def expected_rows(self, shard: int, fingerprint: str) -> int:
        """Rows that a finished shard must have, whose part bears this fingerprint."""
        raise NotImplementedError

    def fingerprint(self, shard: int) -> str:
        """What binds a part to its run and its place: how the fingerprint begins that `datasets` finds in it."""
        return f"{self.id}-{shard:05d}"

    def bind(self) -> None:
        """Write the manifest, or find an equal one. Two runs that write theirs at once are told apart by their shards.

        Raises:
            ValueError: the folder is another run's, or holds something else.
        """
        with self.explaining(MANIFEST, "read"):
            earlier = self.folder.read(MANIFEST)
        if earlier is None:
            there = [name for name in self.folder.names() if not name.startswith(".")]
            if there and MANIFEST not in there:
                raise ValueError(
                    f"shard_dir={str(self.folder)!r} holds {sorted(there)[:3]} and no {MANIFEST}: it is no folder of shards. "
                    "Name a new or an empty one (--shards DIR)."
                )
            with self.explaining(MANIFEST):
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

    def write(self, shard: int, features: Features, batches: Iterable[dict[str, Any]], suffix: str = "") -> None:
        """Write a shard, whole or not at all.

        Args:
            features (`Features`): of its columns.
            batches (`Iterable`): its rows, as columns.
            suffix (`str`): of its fingerprint.

        Raises:
            OSError: it cannot be written, or does not read back.
        """
        from datasets.arrow_writer import ArrowWriter

        fingerprint = self.fingerprint(shard) + suffix

        def write(path: str) -> None:
            with (
                pa.OSFile(path, "wb") as file,
                ArrowWriter(features=features, stream=file, fingerprint=fingerprint) as writer,
            ):
                for batch in batches:
                    writer.write_batch(batch)
                writer.finalize()

        name = part_name(shard)
        with self.explaining(name):
            self.copies.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # another worker took over, finished, and swept our file away
                write_whole(self.copies / name, write)
                if self.folder.local is None:
                    self.folder.upload(self.copies / name, name)
        if not self.is_whole(shard, {name}):
            raise OSError(f"shard_dir={str(self.folder)!r}: {name} was written and does not read back whole.")

    def is_whole(self, shard: int, names: set[str]) -> bool:
        """Whether a shard is finished; one that is torn is not, and is scored again.

        Raises:
            ValueError: it belongs to another run.
        """
        if shard not in self.whole and part_name(shard) in names:
            found = self._open(shard)
            if isinstance(found, str) and shard not in self._torn:
                logger.warning("%s/%s is torn (%s): its rows are scored again.", self.folder, part_name(shard), found)
                self._torn.add(shard)
            elif not isinstance(found, str):
                self.whole[shard] = found
        return shard in self.whole

    def _open(self, shard: int) -> Dataset | str:
        """A finished shard, memory-mapped, or what is wrong with it if it is torn or gone.

        Raises:
            OSError: it cannot be read, whatever is in it: its rows may well be there, and are not to be scored again.
            ValueError: it belongs to another run.
        """
        path = self.copies / part_name(shard)
        with self.explaining(path.name, "read"):
            try:
                if not path.exists():
                    self.copies.mkdir(parents=True, exist_ok=True)
                    self.folder.download(path.name, path)
            except FileNotFoundError:
                return "it is gone"
            found = _read(path)
        if isinstance(found, str):
            self._forget_copy(path)
            return found
        part, fingerprint = found
        if not f"{fingerprint}-".startswith(f"{self.fingerprint(shard)}-"):
            raise ValueError(
                f"shard_dir={str(self.folder)!r}: {path.name} is a shard of another run. Move it away, or name another folder "
                "(--shards DIR)."
            )
        expected = self.expected_rows(shard, fingerprint)
        if len(part) != expected:
            self._forget_copy(path)
            return f"{len(part)} of {expected} rows"
        return part

    def _forget_copy(self, path: Path) -> None:
        if self.folder.local is None:
            path.unlink(missing_ok=True)

    def sweep(self, names: set[str]) -> None:
        """Remove what killed workers have left, once every shard is there."""
        for name in names:
            ours = PART.match(name.lstrip(".")) or name.startswith(f".{MANIFEST}.")
            if ours and not PART.fullmatch(name):
                with contextlib.suppress(OSError):
                    self.folder.remove(name)

    @contextlib.contextmanager
    def explaining(self, name: str, doing: str = "written") -> Iterator[None]:
        """A disk that is full or fails, or a folder that is closed to us, as an error that says what to do."""
        try:
            yield
        except OSError as error:
            mend = "make room or mend the folder" if doing == "written" else "mend the folder"
            raise OSError(
                f"shard_dir={str(self.folder)!r}: {name} cannot be {doing}: {error}. Shards that are finished stay: {mend}, and "
                "run the same again."
            ) from error

    @contextlib.contextmanager
    def progress(
        self, description: str, total: int | None, rows_in: Callable[[int], int]
    ) -> Iterator[Callable[..., None]]:
        """One bar for all workers, on the main process: what is finished, and what claims say of the rest.

        Args:
            total (`int`, *optional*): rows of the run, where they are known.
            rows_in (`Callable`): of a shard, at most.

        Yields:
            `Callable`: shows how far they are, given the names in the folder, or at most once a second without.
        """
        from datasets.utils import tqdm

        with tqdm(total=total, desc=description, unit=" examples", disable=not is_main_process()) as bar:
            looked = [0.0]

            def show(names: set[str] | None = None) -> None:
                if bar.disable or (names is None and time.monotonic() - looked[0] < 1):
                    return
                names = self.folder.names() if names is None else names
                looked[0] = time.monotonic()
                finished = sum(rows_in(int(part[1])) for part in map(PART.fullmatch, names) if part)
                bar.update(max(0, finished + self.claims.rows_elsewhere(names) + self.done - bar.n))

            yield show


def part_name(shard: int) -> str:
    """The file of a finished shard."""
    return f"part-{shard:05d}.arrow"


def _read(path: Path) -> tuple[Dataset, str] | str:
    """A part and its fingerprint, or how it is torn."""
    from datasets import Dataset

    try:
        with pa.memory_map(str(path)) as file:
            metadata = pa.ipc.open_stream(file).schema.metadata or {}
        part = Dataset.from_file(str(path))
    except (pa.ArrowInvalid, FileNotFoundError) as error:
        return str(error)
    except OSError as error:
        if error.errno is None:  # Arrow's own, on a file that ends early; those of the system have a number
            return str(error)
        raise
    return part, str(json.loads(metadata.get(b"huggingface", b"{}")).get("fingerprint"))


def _on_one_machine(cache: Path) -> Path:
    """The default folder, which processes on several machines may not have in common."""
    here, everywhere = (int(os.environ.get(name, "1")) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    if here != everywhere:
        raise ValueError(
            f"{everywhere} processes run on several machines: pass shard_dir=... (--shards DIR), a folder that all see, or a "
            "URL such as s3://..."
        )
    return cache
