"""STAND-IN until the merge: the other branch's module replaces it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from datasets import Dataset


def dataset_from_pandas(frame: pd.DataFrame) -> Dataset:
    """STAND-IN."""
    return Dataset.from_pandas(frame, preserve_index=False)


def dataset_from_rows(rows: Sequence[Mapping[str, Any]]) -> Dataset:
    """STAND-IN."""
    return Dataset.from_list([dict(row) for row in rows])


def carried(dataset: Dataset) -> Dataset:
    """STAND-IN."""
    return dataset


def as_written(dataset: Dataset) -> Dataset:
    """STAND-IN."""
    return dataset
