"""`cluster_filter`: cluster and select in one call, on a `Dataset` or inside `.filter`.

Does: fit clusters, label all rows, select; refuse invalid numbers before the clusters are fitted.
Does not: compute scores or embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict

from car_datasets.clustering.model import ClusterModel
from car_datasets.selection.procedures import Amounts
from car_datasets.selection.rule import SELECTION_COLUMNS, choose, refuse_impossible, refuse_worse, select_car
from car_datasets.utils.column_names import ColumnNames
from car_datasets.utils.columns import (
    check_columns,
    read_numbers,
    refuse_no_embeddings,
    refuse_other_datasets,
    refuse_overwrite,
)
from car_datasets.utils.processes import alone
from car_datasets.utils.settings import EXPLAINED_VARIANCE, KMEANS_SAMPLE, SEED


def cluster_filter(
    dataset: Dataset | Mapping[str, Sequence[Any]],
    *,
    n1: int | float | None = None,
    n2: int = 1,
    budget: int | None = None,
    k: int | str = "sqrt",
    explained_variance: float = EXPLAINED_VARIANCE,
    seed: int = SEED,
    n_init: int = 1,
    kmeans: str = "torch",
    kmeans_sample: int = KMEANS_SAMPLE,
    score_column: str = ColumnNames.score,
    embedding_column: str = ColumnNames.embedding,
    allow_worse: bool = False,
    num_rows: int | None = None,
) -> Dataset | list[bool]:
    """Cluster and select in one call, on a dataset that has scores and embeddings.

    Called on a `Dataset`, it returns the selected rows with `cluster`, `cluster_distance` and the columns of the
    selection:

    ```python
    >>> chosen = cluster_filter(dataset, n1=1000, n2=1)
    ```

    Passed to `.filter`, it decides which rows stay; they keep the dataset's own order and columns. It must get all rows
    in one batch, which it checks by `num_rows`:

    ```python
    >>> dataset.filter(cluster_filter, batched=True, batch_size=None, fn_kwargs={"n1": 1000, "num_rows": len(dataset)})
    ```

    Args:
        dataset (`Dataset`, or a batch of `.filter`): rows with `score_column` and `embedding_column`.
        n1 (`int` or `float`, *optional*): number of rows taken by score; a float in (0, 1) is that share of the scored
            rows. Without n1 and budget it is 1000, but at most half of the scored rows.
        n2 (`int`): number of rows taken from every cluster.
        budget (`int`, *optional*): number of rows in total; n1 then follows from it and from n2, and must not be given.
        k (`int` or `"sqrt"`): number of clusters; `"sqrt"` is the paper's int(sqrt(rows / 2)).
        explained_variance (`float`): PCA keeps the fewest components that hold this share; 1.0 keeps all.
        seed (`int`): seed of k-means.
        n_init (`int`): number of runs of k-means, of which the best is kept.
        kmeans (`str`): engine, `"torch"` or `"sklearn"`.
        kmeans_sample (`int`): for `"torch"`, rows per cluster to fit on; 0 fits on all rows.
        score_column (`str`): column of scores; rows without a score are never selected.
        embedding_column (`str`): column of embeddings; rows without one can only be selected by score.
        allow_worse (`bool`): accept a selection whose mean score is below the pool's.
        num_rows (`int`): in `.filter` only, `len(dataset)`.

    Returns:
        `Dataset`: the selected rows with all columns, best first; for a batch, `list[bool]`.

    Raises:
        ValueError: a column is missing or would be overwritten, a number does not fit, embeddings are invalid, the
            selection is worse than the pool, or, in `.filter`, the batch is not the entire dataset.
    """
    # A batch of `.filter` is a mapping of columns, or a table with the attribute `columns`.
    is_batch = isinstance(dataset, Mapping) or hasattr(dataset, "columns")
    if isinstance(dataset, DatasetDict) or not is_batch:
        refuse_other_datasets(dataset, "cluster_filter", "ClusterModel.fit on a sample, then select_car_streaming")
    fitting: dict[str, Any] = {
        "k": k,
        "explained_variance": explained_variance,
        "seed": seed,
        "n_init": n_init,
        "kmeans": kmeans,
        "kmeans_sample": kmeans_sample,
    }
    names = ColumnNames(score=score_column, embedding=embedding_column)
    # A batch of `.filter` is a mapping of columns; only a Dataset has column names, and gets new columns.
    columns = dataset.column_names if hasattr(dataset, "column_names") else list(dataset)
    new = SELECTION_COLUMNS if isinstance(dataset, Dataset) else ()
    check_columns(columns, (names.score,), new)
    refuse_no_embeddings(columns, names.embedding)
    amounts = Amounts(n1, n2, budget, allow_worse)
    if isinstance(dataset, Dataset):
        return _selected_rows(dataset, names, amounts, fitting)
    return _mask_of_batch(dataset, names, amounts, fitting, num_rows)


def _selected_rows(dataset: Dataset, names: ColumnNames, amounts: Amounts, fitting: dict[str, Any]) -> Dataset:
    """Cluster a dataset and return the selected rows."""
    refuse_overwrite(dataset.column_names, (names.cluster, names.distance), "dataset.rename_column(...) on them")
    # Before the fit, which takes longest. The number of clusters is known only after it; 1 is the least.
    scored = int(np.count_nonzero(~np.isnan(read_numbers(dataset, names.score, np.nan))))
    refuse_impossible(scored, 1, amounts.n1, amounts.n2, amounts.budget)
    model = ClusterModel.fit(dataset, names.embedding, **fitting)
    labelled = model.label(dataset, across_processes=True)  # like the fit, shared by the processes of a launcher
    return select_car(
        labelled,
        amounts.n1,
        amounts.n2,
        budget=amounts.budget,
        score_column=names.score,
        allow_worse=amounts.allow_worse,
    )


def _mask_of_batch(
    batch: Mapping[str, Sequence[Any]],
    names: ColumnNames,
    amounts: Amounts,
    fitting: dict[str, Any],
    num_rows: int | None,
) -> list[bool]:
    """Cluster the batch of all rows that `.filter` passes, and return True for the rows that are selected."""
    scores = batch[names.score]
    rows = len(scores) if isinstance(scores, Sized) else 0  # without batched=True, `.filter` passes one row
    if num_rows != rows or not rows:
        seen = f"a batch of {rows} rows" if rows else "a single row or none"
        raise ValueError(
            f"cluster_filter saw {seen} with num_rows={num_rows}: it must see the entire dataset at once. Call "
            "dataset.filter(cluster_filter, batched=True, batch_size=None, fn_kwargs={'num_rows': len(dataset), ...}), "
            "without num_proc."
        )
    # Two columns alone: the others would be converted to Arrow for nothing.
    pool = Dataset.from_dict({name: batch[name] for name in (names.score, names.embedding)})
    # Under a launcher, `.filter` may call one process only, while the others read its cache: it must not wait for them.
    with alone():
        labelled = ClusterModel.fit(pool, names.embedding, **fitting).label(pool)
    numbers = read_numbers(pool, names.score, np.nan)
    # -1 marks a row without a cluster, as `choose` expects it.
    clusters = np.asarray(read_numbers(labelled, names.cluster, -1), dtype=np.int64)
    positions = choose(numbers, clusters, amounts.n1, amounts.n2, amounts.budget).positions
    if not amounts.allow_worse:
        refuse_worse(numbers, positions)
    keep = np.zeros(rows, dtype=bool)
    keep[positions] = True
    return keep.tolist()
