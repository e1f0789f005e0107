"""What scorer and embedder share: a `.map` batch as texts, and per-text numbers back as one value per row."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from car_datasets.formatting import UNSCORABLE, Schema, format_batch
from car_datasets.templates import TEMPLATES, Text

DTYPES = ("float32", "bfloat16", "float16")
EMBEDDING_DTYPES = ("float32", "float16")
ON_INVALID = ("error", "mark")


@dataclass(frozen=True)
class Rows:
    """The texts of a batch, end to end, and which of them belong to which row.

    Args:
        texts (`list[Text]`): one per exchange.
        counts (`list[int]`): texts per row; 0 for a row that cannot be scored.
        status (`list[str]`): per row, see formatting.py.
    """

    texts: list[Text]
    counts: list[int]
    status: list[str]

    @staticmethod
    def check_options(
        template: str | None, on_invalid: str, dtype: str, batch_tokens: int | None, new_columns: Sequence[str]
    ) -> None:
        """Refuse options that would only fail in a worker, after the models are loaded."""
        if batch_tokens is not None and batch_tokens < 1:
            raise ValueError(f"batch_tokens={batch_tokens} must be at least 1.")
        if len(set(new_columns)) < len(new_columns):
            raise ValueError(f"The new columns {list(new_columns)} must have different names.")
        if template is not None and template not in TEMPLATES:
            raise ValueError(f"template={template!r} is not known; choose one of {sorted(TEMPLATES)}.")
        if on_invalid not in ON_INVALID:
            raise ValueError(f"on_invalid={on_invalid!r} is not known; choose one of {ON_INVALID}.")
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is not known; choose one of {DTYPES}.")

    @classmethod
    def from_batch(cls, batch: Mapping[str, Sequence[Any]], schema: Schema, template: str, on_invalid: str) -> Rows:
        """Format a batch.

        Raises:
            ValueError: with `on_invalid="error"`, rows that cannot be scored: how many, which, and why.
        """
        rows = format_batch(batch, schema, template)
        bad = [i for i, row in enumerate(rows) if row.status in UNSCORABLE]
        if bad and on_invalid == "error":
            where = "" if "source_index" in batch else " of this batch"
            names = row_names(batch, bad)
            raise ValueError(invalid_rows_message([rows[i].status for i in bad], names, len(rows), where))
        texts = [text for row in rows for text in row.texts]
        return cls(texts, [len(row.texts) for row in rows], [row.status for row in rows])

    def split(self, values: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        """Per-text values to one slice per row."""
        ends = np.cumsum(self.counts)
        return [values[end - count : end] for end, count in zip(ends, self.counts, strict=True)]

    def mean_vectors(self, vectors: npt.NDArray[np.float32], dtype: str = "float32") -> Any:
        """Per-text vectors to one per row: the mean of its exchanges, scaled back to their mean length.

        Returns:
            An array of shape `(rows, dimension)`, which `datasets` stores without a Python object per number; a list with
            `None` where rows have no vector.
        """
        if all(count == 1 for count in self.counts):
            return vectors.astype(dtype)
        means = [_mean_vector(part) for part in self.split(vectors)]
        whole = [mean.astype(dtype) for mean in means if mean is not None]
        if whole and len(whole) == len(means):
            return np.stack(whole)
        return [None if mean is None else mean.astype(dtype) for mean in means]


def _mean_vector(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32] | None:
    if len(vectors) == 0:
        return None
    if len(vectors) == 1:
        return vectors[0]
    mean = vectors.mean(axis=0)
    length = float(np.linalg.norm(mean))
    scale = float(np.linalg.norm(vectors, axis=1).mean()) / length if length > 0 else 1.0
    return np.asarray(mean * scale, dtype=np.float32)


def check_embedding_dtype(dtype: str) -> None:
    """Raise a ValueError for a type that no column of embeddings has."""
    if dtype not in EMBEDDING_DTYPES:
        raise ValueError(f"embedding_dtype={dtype!r} is not known; choose one of {EMBEDDING_DTYPES}.")


def row_names(batch: Mapping[str, Sequence[Any]], positions: Iterable[int]) -> list[Any]:
    """How to call these rows in a message: by `source_index` where the batch has it, else by place in the batch."""
    index = batch.get("source_index")
    return [index[i] if index is not None else i for i in positions]


def invalid_rows_message(statuses: Sequence[str], names: Sequence[Any], total: int, where: str = "") -> str:
    """`3 of 1000 rows cannot be scored: 2 null (rows 4, 17), 1 not_a_string (row 9). ...`"""
    parts = []
    for kind in dict.fromkeys(statuses):
        which = [str(n) for s, n in zip(statuses, names, strict=True) if s == kind]
        shown = ", ".join(which[:5]) + (", ..." if len(which) > 5 else "")
        parts.append(f"{len(which)} {kind} (rows {shown})")
    return (
        f"{len(statuses)} of {total} rows{where} cannot be scored: {'; '.join(parts)}. Mend or drop them, or pass "
        "on_invalid='mark' (--on-invalid mark) to keep them without a score."
    )


def refuse_tables(batch: Any, instead: str) -> None:
    """Raise a ValueError for a batch that is no mapping: in those formats `.map` keeps the new columns and drops the rest."""
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"In its Arrow, pandas or polars format a dataset loses its columns in .map. Map over dataset.with_format(None), or "
            f"call {instead}."
        )
    if any(isinstance(value, (str, int, float)) for value in batch.values()):
        raise ValueError("This is a row, not a batch of rows: call dataset.map(..., batched=True, with_rank=True).")


def refuse_overwrite(seen: Container[str], new_columns: Iterable[str], option: str) -> None:
    """Raise a ValueError if the dataset already has a column of that name; `option` is what renames the new one."""
    taken = [name for name in new_columns if name in seen]
    if taken:
        raise ValueError(
            f"The dataset already has the column(s) {taken}, which would be overwritten. Pass {option} to name the new "
            f"ones differently, or drop the old ones: dataset.remove_columns({taken})."
        )
