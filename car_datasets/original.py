"""The original's files and its published procedure, to compare with: `procedure="paper"` in a recipe.

Does: read and write `ranking_IQS_result.json`, `clustering_result.json` and `CaR_selected_result.json` (a list of rows with
`score`, and `label` as a string, best score first), and select by the published rule with its oddities.
Does not: score or cluster; the default procedure (selection.py) does right what is odd here.

What is odd (CaR, Clustering/cluster.py at 3357044): clusters are fitted on the score-sorted rows; a row equal *by value* to
one already taken is left out, but only in the second stage; a cluster's best row that the top n1 hold already is not replaced
by its next best; clusters come in descending order of their label as text ("9" before "89"); n2 = 0 acts like 1.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from car_datasets.selection import (
    BY_BOTH,
    BY_CLUSTER,
    BY_SCORE,
    SELECTION_COLUMNS,
    Choice,
    add_selection,
    ranks_within,
    read_numbers,
)

if TYPE_CHECKING:
    from datasets import Dataset

RANKING_FILES = {"regression": "ranking_IQS_result.json", "ranking": "ranking_Comet_result.json"}
CLUSTERING_FILE = "clustering_result.json"
SELECTED_FILE = "CaR_selected_result.json"


def rank_rows(dataset: Dataset, score_column: str = "iqs_score") -> Dataset:
    """The rows with a score, best first; ties keep their order, as Python's stable sort does in the original."""
    scores = read_numbers(dataset, score_column, np.nan)
    order = np.argsort(-scores, kind="stable")[: int(np.count_nonzero(~np.isnan(scores)))]
    return dataset.select(order.tolist())


def select_as_published(
    dataset: Dataset,
    n1: int = 1000,
    n2: int = 1,
    *,
    score_column: str = "iqs_score",
    cluster_column: str = "cluster",
    index_column: str = "source_index",
) -> Dataset:
    """Select by the published rule, in the published order: the top n1, then what the clusters add.

    Args:
        dataset (`Dataset`): scored and clustered.
        n1, n2 (`int`): the paper's are 1000 and 1.
        score_column, cluster_column, index_column (`str`): as in [`select_car`].

    Returns:
        `Dataset`: as [`select_car`] gives it, but rows equal by value (all columns but `index_column`) come in once in the
        second stage.

    Raises:
        ValueError: n1 or n2 is negative, or a column is missing.
    """
    ranked = rank_rows(dataset, score_column)
    scores = read_numbers(ranked, score_column, np.nan)
    labels = np.asarray(read_numbers(ranked, cluster_column, -1), dtype=np.int64)
    if n1 < 0 or n2 < 0:
        raise ValueError(f"n1={n1} and n2={n2} must not be negative.")
    n1 = min(int(n1), len(ranked))  # the original takes all rows where n1 is above them
    looked_at = max(n2, 1)
    within = ranks_within(labels)
    top = np.arange(n1)
    candidates = np.flatnonzero((within >= 1) & (within <= looked_at)).tolist()
    candidates.sort(key=lambda i: (str(labels[i]), scores[i]), reverse=True)
    names = {"score_column": score_column, "cluster_column": cluster_column, "index_column": index_column}
    rows = original_columns(ranked, **names)  # the original compares what its files hold
    seen = set(_values(rows, top.tolist()))
    added = []
    for position, value in zip(candidates, _values(rows, candidates), strict=True):
        if value not in seen:
            seen.add(value)
            added.append(position)
    positions = np.concatenate([top, np.array(added, dtype=np.int64)])
    in_top, in_cluster = positions < n1, within[positions] <= looked_at
    reasons = np.where(in_top & in_cluster, BY_BOTH, np.where(in_top, BY_SCORE, BY_CLUSTER)).tolist()
    return add_selection(ranked, Choice(positions, reasons, positions + 1, within[positions]), index_column)


def original_columns(
    dataset: Dataset,
    *,
    score_column: str = "iqs_score",
    cluster_column: str = "cluster",
    index_column: str = "source_index",
    embedding_column: str = "embedding",
) -> Dataset:
    """The dataset without the columns of ours that the original's files do not have."""
    stem = score_column.removesuffix("_score")
    ours = {f"{stem}_tokens", f"{stem}_truncated", f"{stem}_status", f"{cluster_column}_distance"}
    ours |= {index_column, embedding_column}
    return dataset.remove_columns([c for c in dataset.column_names if c in {*ours, *SELECTION_COLUMNS}])


def _values(rows: Dataset, positions: list[int]) -> list[str]:
    return [json.dumps(row, sort_keys=True, default=str) for row in rows.select(positions)] if positions else []


def from_original(dataset: Dataset) -> Dataset:
    """A dataset read from one of the original's result files, with our names and types.

    `score` becomes `iqs_score`; `label`, a number as a string, becomes `cluster`. Any other dataset comes back as it is.
    """
    names = dataset.column_names
    if "score" in names and "iqs_score" not in names:
        dataset = dataset.rename_column("score", "iqs_score")
    if "label" in names and "cluster" not in names:
        labels = dataset["label"][:]
        if all(re.fullmatch("[0-9]+", str(label)) for label in labels):
            dataset = dataset.remove_columns("label").add_column(
                "cluster", np.array([int(x) for x in labels], dtype=np.int32)
            )
    return dataset


def refuse_taken(columns: Collection[str], renamed: Mapping[str, str]) -> None:
    """Raise a ValueError where the user's rows have a column of a name that one of ours gets, such as `score`."""
    if taken := [new for old, new in renamed.items() if old != new and new in columns]:
        raise ValueError(
            f"The rows have column(s) {taken} of their own, which the original's format uses: rename them first."
        )


def write_original(
    dataset: Dataset,
    path: str | os.PathLike[str],
    *,
    score_column: str = "iqs_score",
    cluster_column: str = "cluster",
    where_free: bool = False,
) -> None:
    """Write rows as the original does: a JSON list, indented, `score` a number, `label` a string.

    A column `score` or `label` of the user's is a ValueError, or with `where_free` stays, and ours keeps its name.
    """
    columns = dataset.column_names
    renamed = {old: new for old, new in ((score_column, "score"), (cluster_column, "label")) if old in columns}
    if where_free:
        renamed = {old: new for old, new in renamed.items() if old == new or new not in columns}
    refuse_taken(columns, renamed)

    def original(row: dict[str, Any]) -> dict[str, Any]:
        values = {renamed.get(column, column): value for column, value in row.items()}
        if cluster_column in renamed and row.get(cluster_column) is not None:
            values["label"] = str(row[cluster_column])
        return values

    rows = [original(row) for row in dataset.with_format(None)]
    text = json.dumps(_finite(rows), indent=4, ensure_ascii=False, default=str, allow_nan=False)
    Path(path).write_text(text, encoding="utf-8")


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity; `null` is what other readers take for a missing number."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list) else value
