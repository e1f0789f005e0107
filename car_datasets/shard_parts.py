"""The files of a run in shards: how one is written, and whether what lies there is one, whole, and of this run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from car_datasets.results import write_whole

if TYPE_CHECKING:
    from datasets import Dataset, Features

PART = re.compile(r"part-(\d+)\.arrow")


def part_name(shard: int) -> str:
    """The file of a shard."""
    return f"part-{shard:05d}.arrow"


def write_part(path: Path, features: Features, batches: Iterable[dict[str, Any]], fingerprint: str) -> None:
    """Write the new columns of a shard, whole or not at all.

    Args:
        path (`Path`): the file.
        features (`Features`): types of the columns.
        batches (`Iterable`): columns as the stage gave them, batch by batch.
        fingerprint (`str`): what binds a part to its run and its place; `datasets` takes it for the fingerprint of the part.
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
    """A part, memory-mapped, and its fingerprint, or how it is torn.

    Raises:
        OSError: it cannot be read, whatever is in it.
    """
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
