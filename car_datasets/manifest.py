"""What a folder of shards belongs to: these texts, in this order, read by this stage, cut into pieces of this size.

Does: digest the contents of columns, describe a run as plain values, name what differs between two.
Does not: use the fingerprint of a dataset, which is another for the same rows in another file, folder or machine, and
random where a step before could not be hashed.
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

FORMAT = 1
WINDOW = 8_192  # rows that are digested together; part of the digest
# What changes no number beyond the tolerance, or says in other words what a revision pins: a run that ran out of memory may
# go on with a smaller batch, and on a machine where the same model lies in another folder.
FREE_FIELDS = ("model_id", "tokenizer", "engine", "batch_tokens")


def describe_run(dataset: Dataset, stage: Any, columns: Sequence[str], shard_rows: int) -> dict[str, Any]:
    """The manifest of a run, as plain values; equal manifests give equal shards.

    Args:
        dataset (`Dataset`): with `columns`, which are the ones that the stage reads.
        stage: a frozen dataclass with `output_features`, such as [`QualityScorer`].
        shard_rows (`int`): rows in a shard.
    """
    found = {
        "format": FORMAT,
        "rows": len(dataset),
        "shard_rows": shard_rows,
        "reads": list(columns),
        "content": content_digest(dataset, columns),
        "stage": type(stage).__name__,
        "features": stage.output_features().to_dict(),
        **{field.name: getattr(stage, field.name) for field in fields(stage) if field.name not in FREE_FIELDS},
    }
    plain: dict[str, Any] = json.loads(json.dumps(found))  # tuples as the lists that will be read back
    return plain


def run_id(manifest: dict[str, Any]) -> str:
    """A name for a run: 16 hexadecimal digits, equal for equal manifests."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]


def differences(earlier: dict[str, Any], now: dict[str, Any]) -> str:
    """What two manifests differ in, for a message: `dtype ('float32' there, 'bfloat16' now)`."""
    names = [name for name in (*now, *earlier) if earlier.get(name) != now.get(name)]
    return ", ".join(
        f"{name} ({str(earlier.get(name))[:40]!r} there, {str(now.get(name))[:40]!r} now)"
        for name in dict.fromkeys(names)
    )


def content_digest(dataset: Dataset, columns: Sequence[str]) -> str:
    """sha256 over the values of some columns, in row order: equal for equal values, however they are stored.

    Chunks, offsets, memory-mapped or not, `string` or `large_string`, an index over shuffled rows: none of it counts.
    """
    content = hashlib.sha256()
    for batch in dataset.select_columns(list(columns)).with_format("arrow").iter(batch_size=WINDOW):
        for name in columns:
            content.update(f"{name} {len(batch)} ".encode())
            _feed(content, pa.concat_arrays(batch.column(name).chunks))
    return "sha256:" + content.hexdigest()


def _feed(content: Any, array: pa.Array) -> None:
    """Values and nulls of an array, as bytes that two arrays share only if they are equal."""
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    content.update(np.packbits(array.is_valid().to_numpy(zero_copy_only=False)))
    array, kind = array.drop_null(), array.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        array = array.cast(pa.large_binary())
        content.update(pc.binary_length(array).to_numpy())
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
    else:  # no text: numbers in a text column, which the stage refuses or marks
        content.update(repr(array.to_pylist()).encode())
