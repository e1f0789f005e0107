"""Compare rows and labels of two tables, and read a push back without a cache.

Does: find rows by content; name the labels of columns; load what was pushed and compare it row by row.
Does not: know receipts or selections, or push.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping

from datasets import ClassLabel, Dataset

from car_datasets.loading.hub_datasets import load_split
from car_datasets.loading.values import any_feature, carried
from car_datasets.utils.digests import first_difference
from car_datasets.utils.files import private_folder
from car_datasets.utils.settings import CONFIG_NAME

OLD = (
    "digests: this receipt.json is of format 1, which has none of the files, of single columns and of itself; it cannot "
    "show changes of report.html, selected.json, plots, token counts, distances, embeddings, versions and models"
)
PARTS = (
    "the source: these are rows of an earlier result, whose digests the receipt has, and new ones that were added by `top_up`; "
    "verify the earlier result against its source, and compare both digests"
)


def labels_of(dataset: Dataset) -> dict[str, list[list[str]]]:
    """Return the names of the labels, at any depth, of each column that has any; equal numbers mean equal labels then."""
    found: dict[str, list[list[str]]] = defaultdict(list)
    for column, feature in dataset.features.items():
        any_feature(feature, lambda f, seen=found[column]: isinstance(f, ClassLabel) and seen.append(f.names))  # type: ignore[misc]
    return {column: names for column, names in found.items() if names}


def places_of(source: Dataset, table: Dataset) -> list[int]:
    """Return the position in the source of each row of a table, found by content; equal rows are interchangeable.

    Raises:
        ValueError: a row is not in the source, or more often than there.
    """
    columns = source.column_names
    known: dict[str, list[int]] = defaultdict(list)
    for position, row in enumerate(carried(source.with_format(None))):
        known[json.dumps(row, sort_keys=True, default=str)].append(position)
    places = []
    for position, row in enumerate(carried(table.with_format(None).select_columns(columns))):
        found = known[json.dumps(row, sort_keys=True, default=str)]
        if not found:
            raise ValueError(f"row {position} is not in the source, or is there less often")
        places.append(found.pop(0))
    return places


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
    with private_folder("check") as place:
        for name, table in tables.items():
            try:
                # An empty cache, because a cached copy would be compared with itself.
                seen = load_split(repo_id, config_name, name, sha, token, str(place))
            except (ConnectionError, ValueError) as error:
                raise ConnectionError(f"it could not be read back ({error})") from error
            if difference := first_difference(table, seen):
                raise ValueError(f"{repo_id} at {sha}, split {name!r}, is not what was pushed: {difference}.")
