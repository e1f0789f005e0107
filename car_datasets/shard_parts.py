"""Part files: each holds the new columns of one shard, as an Arrow stream.

Does: write one atomically, read one memory-mapped, tell a torn one from one that cannot be read.
Does not: know which run a part belongs to; its fingerprint tells.
"""

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
    """Return the part in a file, memory-mapped, and its fingerprint, or a message that says how the file is torn.

    Raises:
        OSError: the file cannot be read. It may be complete.
    """
    from datasets import Dataset

    try:
        with pa.memory_map(str(path)) as file:
            metadata = pa.ipc.open_stream(file).schema.metadata or {}
        part = Dataset.from_file(str(path))
    except (pa.ArrowInvalid, FileNotFoundError) as error:
        return str(error)
    except OSError as error:
        if error.errno is None:  # raised by Arrow for a file that ends early; errors of the system have a number
            return str(error)
        raise
    return part, str(json.loads(metadata.get(b"huggingface", b"{}")).get("fingerprint"))
