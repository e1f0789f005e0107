"""Select, read and write as the original CaR code does, for comparison: `procedure="paper"` in a recipe.

Does: select by the published rule with its oddities; read and write its result files (a JSON list of rows with `score`,
and `label` as a string, best score first).
Does not: score or cluster.
"""

from __future__ import annotations

import base64
import datetime
import decimal
import json
import os
import re
import uuid
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from car_datasets.loading.values import carried
from car_datasets.selection.rule import (
    BY_BOTH,
    BY_CLUSTER,
    BY_SCORE,
    SELECTION_COLUMNS,
    Choice,
    add_selection,
    ranks_within,
)
from car_datasets.utils.column_names import ColumnNames
from car_datasets.utils.columns import read_clusters, read_numbers
from car_datasets.utils.files import without_nan
from car_datasets.utils.settings import default_n1, is_integer

if TYPE_CHECKING:
    from datasets import Dataset

RANKING_FILES = {"regression": "ranking_IQS_result.json", "ranking": "ranking_Comet_result.json"}
CLUSTERING_FILE = "clustering_result.json"
SELECTED_FILE = "CaR_selected_result.json"


# Oddities of the published code (CaR, Clustering/cluster.py at 3357044), which the default procedure does not share:
# - clusters are fitted on the rows sorted by score;
# - a row equal by value to one already taken is left out, but only in the second stage;
# - a cluster's best row that is among the top n1 already is not replaced by its next best;
# - clusters come in descending order of their label as text ("9" before "89");
# - n2 = 0 acts like 1.
def select_as_published(
    dataset: Dataset,
    n1: int | None = None,
    n2: int = 1,
    *,
    score_column: str = ColumnNames.score,
    cluster_column: str = ColumnNames.cluster,
    index_column: str = ColumnNames.index,
    embedding_column: str = ColumnNames.embedding,
) -> Dataset:
    """Select by the published rule, in the published order: the top n1, then what the clusters add.

    Args:
        dataset (`Dataset`): pool with a score and a cluster for every row.
        n1 (`int`, *optional*): number of rows taken by score; all rows if it is above their number. By default 1000 as
            in the paper, but at most half of the scored rows.
        n2 (`int`): number of rows looked at in every cluster, 1 in the paper; 0 acts like 1.
        score_column (`str`): column of scores.
        cluster_column (`str`): column of clusters.
        index_column (`str`): kept if the dataset has it, otherwise added: the row's position in order of score.
        embedding_column (`str`): column of embeddings, if the dataset has one; it does not count for equality of rows.

    Returns:
        `Dataset`: all columns of the chosen rows, and `selected_by`, `score_rank` and `cluster_rank`. Of rows equal by
        value, in the columns that the original's files have, the second stage takes one.

    Raises:
        ValueError: n1 or n2 is negative or not an integer, or a column is missing.
    """
    # Ranked first: from here on, position i is the row of rank i + 1.
    names = ColumnNames(score_column, cluster_column, index_column, embedding_column)
    ranked = rank_rows(dataset, score_column)
    scores = read_numbers(ranked, score_column, np.nan)
    labels = read_clusters(ranked, cluster_column)
    n1 = default_n1(len(ranked)) if n1 is None else n1
    if not all(is_integer(n) and n >= 0 for n in (n1, n2)):
        raise ValueError(f"n1={n1} and n2={n2} must not be negative; pass integers from 0 on.")
    n1 = min(int(n1), len(ranked))  # the original takes all rows if n1 is above their number
    looked_at = max(n2, 1)
    within = ranks_within(labels)
    top = np.arange(n1)
    from_clusters = (within >= 1) & (within <= looked_at)  # 0 is a row without a cluster
    candidates = np.flatnonzero(from_clusters).tolist()
    candidates.sort(key=lambda i: (str(labels[i]), scores[i]), reverse=True)
    rows = original_columns(ranked, names)  # the original compares rows as its files hold them
    taken = set(_values(rows, top.tolist()))
    added = []
    for position, value in zip(candidates, _values(rows, candidates), strict=True):
        if value not in taken:
            taken.add(value)
            added.append(position)
    positions = np.concatenate([top, np.array(added, dtype=np.int64)])
    in_top, in_cluster = positions < n1, from_clusters[positions]
    reasons = np.where(in_top & in_cluster, BY_BOTH, np.where(in_top, BY_SCORE, BY_CLUSTER)).tolist()
    return add_selection(ranked, Choice(positions, reasons, positions + 1, within[positions]), index_column)


def rank_rows(dataset: Dataset, score_column: str = ColumnNames.score) -> Dataset:
    """Return the rows with a score, best first; ties keep their order, as in the original's stable sort."""
    scores = read_numbers(dataset, score_column, np.nan)
    order = np.argsort(-scores, kind="stable")[: int(np.count_nonzero(~np.isnan(scores)))]
    return dataset.select(order.tolist())


def original_columns(dataset: Dataset, names: ColumnNames) -> Dataset:
    """Return the dataset without the columns that this package adds and the original's files do not have."""
    ours = {*names.diagnostics, *names.marks, names.within, names.language, names.index, names.embedding}
    ours |= {*SELECTION_COLUMNS}
    return dataset.remove_columns([column for column in dataset.column_names if column in ours])


def _values(rows: Dataset, positions: list[int]) -> list[str]:
    """Return rows as text that is equal if they are equal by value."""
    if not positions:
        return []
    return [json.dumps(row, sort_keys=True, default=as_text) for row in carried(rows.select(positions))]


def from_original(dataset: Dataset) -> Dataset:
    """Return a dataset read from one of the original's result files with this package's names and types.

    `score` becomes `iqs_score`; `label`, a number as a string, becomes `cluster`. Any other dataset is returned
    unchanged.
    """
    columns, names = dataset.column_names, ColumnNames()
    if "score" in columns and names.score not in columns:
        dataset = dataset.rename_column("score", names.score)
    if "label" in columns and names.cluster not in columns:
        labels = dataset["label"][:]
        # Not str.isdigit, which holds for "²" too.
        if all(re.fullmatch("[0-9]+", str(label)) for label in labels):
            dataset = dataset.remove_columns("label").add_column(
                names.cluster, np.array([int(x) for x in labels], dtype=np.int32)
            )
    return dataset


def write_original(
    dataset: Dataset, path: str | os.PathLike[str], names: ColumnNames, *, where_free: bool = False
) -> None:
    """Write rows as the original does: a JSON list, indented, `score` a number, `label` a string.

    What JSON does not have is written as text, from which it can be made again: bytes in base64, dates and times in ISO
    8601, decimals in digits. Images, audio and video are not decoded: they are objects of `bytes` (in base64) and
    `path`, either of which may be null. NaN and infinities are null.

    Args:
        dataset (`Dataset`): rows to write, with all of their columns.
        path (`str` or `PathLike`): file to write.
        names ([`ColumnNames`]): `names.score` is written as `score`, `names.cluster` as `label`.
        where_free (`bool`): if the dataset already has a column `score` or `label`, keep that column and ours, each
            under its own name.

    Raises:
        ValueError: the dataset already has a column `score` or `label`, and `where_free` is off; or a value cannot be
            written.
    """
    columns = dataset.column_names
    renamed = {old: new for old, new in ((names.score, "score"), (names.cluster, "label")) if old in columns}
    if where_free:
        renamed = {old: new for old, new in renamed.items() if old == new or new not in columns}
    refuse_original_names(columns, renamed)

    def original(row: dict[str, Any]) -> dict[str, Any]:
        values = {renamed.get(column, column): value for column, value in row.items()}
        if names.cluster in renamed and row.get(names.cluster) is not None:
            values["label"] = str(row[names.cluster])
        return values

    rows = [original(row) for row in carried(dataset.with_format(None))]
    text = json.dumps(without_nan(rows), indent=4, ensure_ascii=False, default=as_text, allow_nan=False)
    Path(path).write_text(text, encoding="utf-8")


def as_text(value: Any) -> str:
    """Return the text from which a value that JSON does not have can be made again, as [`write_original`] writes it.

    Raises:
        ValueError: the value has no such text.
    """
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, datetime.timedelta):
        return pd.Timedelta(value).isoformat()
    if isinstance(value, (datetime.date, datetime.time)):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, (decimal.Decimal, uuid.UUID)):
        return str(value)
    raise ValueError(f"A {type(value).__name__} cannot be written as JSON: drop its column, or make it text.")


def refuse_original_names(columns: Collection[str], renamed: Mapping[str, str]) -> None:
    """Raise ValueError if the rows have a column of a name that the original's format uses, such as `score`.

    Args:
        columns (`Collection[str]`): columns of the rows.
        renamed (`Mapping[str, str]`): from names of this package to those of the original's format.
    """
    if taken := [new for old, new in renamed.items() if old != new and new in columns]:
        raise ValueError(
            f"The rows have column(s) {taken} of their own, which the original's format uses: "
            "rename them first, by dataset.rename_column(...)."
        )
