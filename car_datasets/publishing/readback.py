"""Read back what was pushed, at an exact commit and without a cache, and compare it row by row.

Does: load a split of a dataset repository, retrying on transient errors; name the first difference between two
datasets.
Does not: push; read a receipt.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping

from datasets import Dataset

from car_datasets.loading.hub_datasets import load_split
from car_datasets.utils.settings import CONFIG_NAME

BLOCK = 1000  # rows compared at a time


def compare_pushed(
    repo_id: str, sha: str, tables: Mapping[str, Dataset], config_name: str = CONFIG_NAME, token: str | None = None
) -> None:
    """Load splits from a commit into an empty cache and compare them with `tables`, row by row.

    Args:
        repo_id (`str`), sha (`str`): the dataset repository and the commit.
        tables (`Mapping[str, Dataset]`): split to the rows that it should hold.
        config_name (`str`): the configuration of the splits.
        token (`str`, *optional*): for private repositories; never stored.

    Raises:
        ValueError: they differ; the message names the first row and column.
        ConnectionError: they could not be read back, which says nothing about their content.
    """
    with tempfile.TemporaryDirectory(prefix="car-datasets-check-") as place:
        for name, table in tables.items():
            try:
                # An empty cache, because a cached copy would be compared with itself.
                seen = load_split(repo_id, config_name, name, sha, token, place)
            except (ConnectionError, ValueError) as error:
                raise ConnectionError(f"it could not be read back ({error})") from error
            if difference := first_difference(table, seen):
                raise ValueError(f"{repo_id} at {sha}, split {name!r}, is not what was pushed: {difference}.")


def first_difference(expected: Dataset, seen: Dataset) -> str | None:
    """Return the first difference between two datasets in words, `None` if they are equal; NaN equals NaN."""
    if expected.features != seen.features:
        return f"the columns are {seen.features}, expected {expected.features}"
    if len(expected) != len(seen):
        return f"it has {len(seen)} rows, expected {len(expected)}"
    pair = [each.with_format("arrow").iter(BLOCK) for each in (expected, seen)]
    for number, (one, other) in enumerate(zip(*pair, strict=True)):
        # Arrow compares a block at once; only a block that differs is read row by row.
        if one.equals(other):
            continue
        for row, (wanted, found) in enumerate(zip(one.to_pylist(), other.to_pylist(), strict=True), BLOCK * number):
            for column in wanted:
                # NaN != NaN, but their representations are equal.
                if repr(wanted[column]) != repr(found[column]):
                    return f"row {row}, column {column!r}: {_short(found[column])}, expected {_short(wanted[column])}"
    return None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
