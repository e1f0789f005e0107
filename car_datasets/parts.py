"""The finished shards of a run: Arrow files that are moved into place when they are whole, each bound to its run and place.

Does: write, fetch and open them; tell one that is torn, which is done again, from a disk that fails, which is an error.
Does not: know who works on which of them (claims.py), or what is to be in them (shards.py).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from car_datasets.claims import Folder
from car_datasets.results import write_whole

if TYPE_CHECKING:
    from datasets import Dataset, Features


def part_name(shard: int) -> str:
    """The file of a shard."""
    return f"part-{shard:05d}.arrow"


@contextlib.contextmanager
def explaining(folder: Folder, name: str, doing: str = "written") -> Iterator[None]:
    """A disk that is full or fails, or a folder that is closed to us, as an error that says what to do.

    Raises:
        OSError: whatever `OSError` was raised inside, with the folder and `name`.
    """
    try:
        yield
    except OSError as error:
        mend = "make room or mend the folder" if doing == "written" else "mend the folder"
        raise OSError(
            f"shard_dir={str(folder)!r}: {name} cannot be {doing}: {error}. Shards that are finished stay: {mend}, and run "
            "the same again."
        ) from error


class Parts:
    """The parts of one run.

    Args:
        folder ([`Folder`]): where they belong.
        copies (`Path`): where they are read from: the folder itself if it is local, else where its parts are fetched to.
        run (`str`): the id of the run.
        features (`Features`): of the columns in them.
    """

    def __init__(self, folder: Folder, copies: Path, run: str, features: Features) -> None:
        self.folder, self.copies, self.run, self.features = folder, copies, run, features

    def write(self, shard: int, batches: list[dict[str, Any]], rows: int) -> Dataset:
        """Write the part of a shard, and read it back.

        Raises:
            OSError: the folder cannot be written, or what was written does not read back.
        """
        from datasets.arrow_writer import ArrowWriter

        def write(path: str) -> None:
            with (
                pa.OSFile(path, "wb") as file,
                ArrowWriter(features=self.features, stream=file, fingerprint=self._fingerprint(shard)) as writer,
            ):
                for batch in batches:
                    writer.write_batch(batch)
                writer.finalize()

        name = part_name(shard)
        with explaining(self.folder, name):
            self.copies.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # another worker took over, finished, and swept our file away
                write_whole(self.copies / name, write)
                if self.folder.local is None:
                    self.folder.upload(self.copies / name, name)
        part = self.open(shard, rows)
        if isinstance(part, str):
            raise OSError(f"shard_dir={str(self.folder)!r}: {name} was written and does not read back whole: {part}.")
        return part

    def open(self, shard: int, rows: int) -> Dataset | str:
        """A finished shard, memory-mapped, or what is wrong with it if it is torn or gone.

        Raises:
            OSError: it cannot be read, whatever is in it: its rows may well be there, and are not to be scored again.
            ValueError: it belongs to another run.
        """
        path = self.copies / part_name(shard)
        with explaining(self.folder, path.name, "read"):
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
        if fingerprint != self._fingerprint(shard):
            raise ValueError(
                f"shard_dir={str(self.folder)!r}: {path.name} is a shard of another run. Move it away, or name another folder "
                "(--shards DIR)."
            )
        if len(part) != rows:
            self._forget_copy(path)
            return f"{len(part)} of {rows} rows"
        return part

    def _forget_copy(self, path: Path) -> None:
        if self.folder.local is None:
            path.unlink(missing_ok=True)

    def _fingerprint(self, shard: int) -> str:
        """What binds a part to its run and its place; `datasets` takes it for the fingerprint of the part."""
        return f"{self.run}-{shard:05d}"


def _read(path: Path) -> tuple[Dataset, str | None] | str:
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
    return part, json.loads(metadata.get(b"huggingface", b"{}")).get("fingerprint")
