"""The folder of a run over shards: which run it belongs to, finished shards, put there whole and read back.

Does: bind a folder to a manifest, refuse another run's, put a shard where all see it, open what is finished, tell what is
torn, remove what killed workers have left, show how far all workers are.
Does not: know where rows come from (shards.py, stream_shards.py), or score.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from car_datasets.claims import CLAIM, Claims, Folder
from car_datasets.hub_folder import HubFolder
from car_datasets.manifest import differences, run_id
from car_datasets.parallel import is_main_process
from car_datasets.shard_parts import PART, part_name, read_part, write_part

if TYPE_CHECKING:
    from datasets import Dataset, Features

MANIFEST = "manifest.json"
logger = logging.getLogger(__name__)


class SharedRun:
    """What a process does with the folder of its run; a subclass knows the rows.

    Args:
        manifest (`dict`): see [`describe_run`].
        shard_dir, expiry, token: see [`score_in_shards`].
    """

    def __init__(
        self,
        manifest: dict[str, Any],
        shard_dir: str | os.PathLike[str] | None,
        expiry: float,
        token: str | None = None,
    ) -> None:
        from datasets import config

        self.manifest = manifest
        self.id = run_id(manifest)
        cache = Path(config.HF_DATASETS_CACHE) / "car_datasets" / self.id
        self.folder = _open(_on_one_machine(cache) if shard_dir is None else os.fspath(shard_dir), token)
        # Where parts are read from: a URL's are fetched once. Two streams may begin alike, and so have one id.
        place = hashlib.sha256(str(self.folder).encode()).hexdigest()[:8]
        self.copies = self.folder.local or cache / place
        # Where claims are impossible, the workers of one machine still share their own.
        self.claims = Claims(self.folder if isinstance(self.folder, Folder) else Folder(self.copies), expiry)
        self.done = 0  # rows of the shard at hand
        self.whole: dict[int, Dataset] = {}
        self._torn: set[int] = set()

    def expected_rows(self, shard: int, fingerprint: str) -> int:
        """Rows that a finished shard must have, whose part bears this fingerprint."""
        raise NotImplementedError

    def may_write(self, names: set[str]) -> bool:
        """Whether this run may have something to put there, given what is there."""
        raise NotImplementedError

    def fingerprint(self, shard: int) -> str:
        """What binds a part to its run and its place: how the fingerprint begins that `datasets` finds in it."""
        return f"{self.id}-{shard:05d}"

    def names(self) -> set[str]:
        """What is in the folder, and the claims, wherever they are."""
        with self.explaining("the folder", "read"):
            names = self.folder.names()
        if self.claims.folder is self.folder:
            return names
        return names | {name for name in self.claims.folder.names() if CLAIM.fullmatch(name)}

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
                earlier = self.folder.read(MANIFEST)
        elif not self.folder.claimable and self.may_write(self.folder.names()):
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

    def claim(self, shard: int, turns: Mapping[str, int]) -> str | None:
        """Claim a shard: the name of the claim, or `None` where another worker has it, see [`~Claims.take`]."""
        with self.explaining(part_name(shard)):
            if self.claims.folder is not self.folder:
                self.claims.folder.make()
            return self.claims.take(part_name(shard), turns)

    def write(self, shard: int, features: Features, batches: Iterable[dict[str, Any]], suffix: str = "") -> None:
        """Write a shard here, whole or not at all; in place where the folder is here, else where it waits for `put`.

        Args:
            features (`Features`): of its columns.
            batches (`Iterable`): its rows, as columns.
            suffix (`str`): of its fingerprint.

        Raises:
            OSError: it cannot be written.
        """
        path = self._own(shard)
        with self.explaining(path.name):
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # another worker took over, finished, and swept our file away
                write_part(path, features, batches, self.fingerprint(shard) + suffix)

    def put(self, shard: int) -> None:
        """Put a shard that was written here where all see it.

        Raises:
            OSError: it cannot be put there, or does not read back.
        """
        path, own = self.copies / part_name(shard), self._own(shard)
        if self.folder.local is None:
            with self.explaining(path.name), contextlib.suppress(FileNotFoundError):  # as above
                path.unlink(missing_ok=True)
                if self.folder.upload(own, path.name, replace=shard in self._torn):
                    os.replace(own, path)
                else:
                    own.unlink()  # another machine was first: its numbers are everyone's, and are fetched
        if not self.is_whole(shard, {path.name}):
            raise OSError(f"shard_dir={str(self.folder)!r}: {path.name} was written and does not read back whole.")

    def waits(self, shard: int) -> bool:
        """Whether this shard was scored here before, by a run that could not put it where all see it."""
        if self.folder.local is not None:
            return False
        with contextlib.suppress(ValueError):  # another run's
            return not isinstance(self._read(shard, self._own(shard)), str)
        return False

    def _own(self, shard: int) -> Path:
        """Where a shard is written: under a name of its own where others may bring the same one."""
        name = part_name(shard)
        return self.copies / (name if self.folder.local is not None else f"unput-{name}")

    def is_whole(self, shard: int, names: set[str]) -> bool:
        """Whether a shard is finished; one that is torn is not, and is scored again.

        Raises:
            OSError: it cannot be read, whatever is in it: its rows may well be there, and are not to be scored again.
            ValueError: it belongs to another run.
        """
        name = part_name(shard)
        if shard not in self.whole and name in names:
            with self.explaining(name, "read"), contextlib.suppress(FileNotFoundError):  # gone since we looked
                if self.folder.local is None and not (self.copies / name).exists():
                    self.copies.mkdir(parents=True, exist_ok=True)
                    self.folder.download(name, self.copies / name)
            found = self._read(shard, self.copies / name)
            if not isinstance(found, str):
                self.whole[shard] = found
            else:
                if shard not in self._torn:
                    logger.warning("%s/%s is torn (%s): its rows are scored again.", self.folder, name, found)
                self._torn.add(shard)
                if self.folder.local is None:
                    (self.copies / name).unlink(missing_ok=True)
        return shard in self.whole

    def _read(self, shard: int, path: Path) -> Dataset | str:
        """The part of a shard that lies here, memory-mapped, or what is wrong with it."""
        with self.explaining(path.name, "read"):
            found = read_part(path)
        if isinstance(found, str):
            return found
        part, fingerprint = found
        if not f"{fingerprint}-".startswith(f"{self.fingerprint(shard)}-"):
            raise ValueError(
                f"shard_dir={str(self.folder)!r}: {path.name} is a shard of another run. Move it away, or name another folder "
                "(--shards DIR)."
            )
        expected = self.expected_rows(shard, fingerprint)
        return part if len(part) == expected else f"{len(part)} of {expected} rows"

    def sweep(self, names: set[str]) -> None:
        """Remove what killed workers have left, once every shard is there."""
        for name in names:
            ours = PART.match(name.lstrip(".")) or name.startswith(f".{MANIFEST}.")
            if ours and not PART.fullmatch(name):
                with contextlib.suppress(OSError):
                    self.claims.folder.remove(name)
        if self.folder.local is None:  # and what waited here to be put there
            for path in self.copies.glob("*part-*"):
                if not PART.fullmatch(path.name):
                    path.unlink(missing_ok=True)

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

            def draw(names: set[str]) -> None:
                looked[0] = time.monotonic()
                finished = sum(rows_in(int(part[1])) for part in map(PART.fullmatch, names) if part)
                bar.update(max(0, finished + self.claims.rows_elsewhere(names) + self.done - bar.n))

            def show(names: set[str] | None = None) -> None:
                if bar.disable:
                    return
                if names is not None:
                    draw(names)
                elif time.monotonic() - looked[0] >= 2 * self.folder.patience:
                    looked[0] = time.monotonic()
                    with contextlib.suppress(Exception):  # in the middle of a shard, whose rows are worth more
                        draw(self.names())

            yield show


def refuse_blank(shard_dir: str | os.PathLike[str]) -> None:
    """A name that is empty would be the working directory, or the root: often a variable that is not set.

    Raises:
        ValueError: it is.
    """
    if not os.fspath(shard_dir).strip():
        raise ValueError("shard_dir='' names no folder; pass one (--shards DIR), or leave it out.")


def _open(location: str | Path, token: str | None) -> Folder | HubFolder:
    refuse_blank(location)
    on_the_hub = str(location).startswith("hf://") and not str(location).startswith("hf://buckets/")
    return HubFolder(str(location), token) if on_the_hub else Folder(location)


def _on_one_machine(cache: Path) -> Path:
    """The default folder, which processes on several machines may not have in common."""
    here, everywhere = (int(os.environ.get(name, "1")) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    if here != everywhere:
        raise ValueError(
            f"{everywhere} processes run on several machines: pass shard_dir=... (--shards DIR), a folder that all see, or a "
            "URL such as s3://..."
        )
    return cache
