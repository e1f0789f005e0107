"""Manifests, which bind a folder of shards to the rows, their order, the stage, and the size of a shard.

Does: digest the contents of columns, describe a run as plain values, name the differences between two runs.
Does not: use the fingerprint of a dataset, which depends on its files and folder, and is random after an unhashable
step.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

if TYPE_CHECKING:
    from datasets import Dataset

    from car_datasets.stage import Stage

FORMAT = 1
WINDOW = 8_192  # rows that are digested together; another number would give other digests
# Fields that a stage with a pinned `revision` may change within a run, because they change no number beyond the
# tolerance, or name what the revision pins: a run that ran out of memory is resumed with smaller batches, or from
# another model folder.
FREE_FIELDS = ("model_id", "tokenizer", "engine", "batch_tokens")


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
    free = FREE_FIELDS if "revision" in settings else ()
    for name, value in settings.items():
        if name not in free:  # a field named like an entry above must not replace it
            manifest[f"stage.{name}" if name in manifest else name] = _plain_value(value, name, stage)
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


def content_digest(dataset: Dataset, columns: Sequence[str]) -> str:
    """Return the sha256 of the values of some columns, in row order: equal for equal values, however they are stored.

    Chunks, offsets, memory mapping, `string` or `large_string`, or an index over shuffled rows make no difference.
    """
    content = hashlib.sha256()
    for batch in dataset.select_columns(list(columns)).with_format("arrow").iter(batch_size=WINDOW):
        for name in columns:
            content.update(f"{name} {len(batch)} ".encode())
            _feed(content, pa.concat_arrays(batch.column(name).chunks))
    return "sha256:" + content.hexdigest()


def _feed(content: Any, array: pa.Array) -> None:
    """Update `content` with the nulls and values of an array, as bytes that differ for arrays that differ."""
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    # Nulls first: what lies in the buffers under a null is undefined, so only the other values are digested.
    content.update(np.packbits(array.is_valid().to_numpy(zero_copy_only=False)))
    array, kind = array.drop_null(), array.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        array = array.cast(pa.large_binary())
        content.update(pc.binary_length(array).to_numpy())  # else ["ab", ""] would equal ["a", "b"]
        _, starts, data = array.buffers()
        if len(array) and data is not None:
            ends = np.frombuffer(starts, dtype=np.int64)[array.offset : array.offset + len(array) + 1]
            content.update(memoryview(data)[ends[0] : ends[-1]])
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        content.update(pc.list_value_length(array).cast(pa.int64()).to_numpy())
        _feed(content, array.flatten())
    elif pa.types.is_struct(kind):
        for field, values in zip(kind, array.flatten(), strict=True):
            content.update(f"{field.name} ".encode())
            _feed(content, values)
    else:  # numbers and other types, as Python writes them
        content.update(repr(array.to_pylist()).encode())
