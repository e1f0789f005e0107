"""CLUSTER and SELECT in one call, as a function of a `Dataset` or inside `.filter`: `cluster_filter`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from car_datasets.clustering import ClusterModel
from car_datasets.parallel import alone
from car_datasets.rows import refuse_overwrite
from car_datasets.selection import (
    SELECTION_COLUMNS,
    check_columns,
    choose,
    read_numbers,
    refuse_impossible,
    refuse_worse,
    select_car,
)

if TYPE_CHECKING:
    from datasets import Dataset


def cluster_filter(
    dataset: Dataset | Mapping[str, Sequence[Any]],
    *,
    n1: int | float = 1000,
    n2: int = 1,
    budget: int | None = None,
    k: int | str = "sqrt",
    explained_variance: float = 0.95,
    seed: int = 42,
    n_init: int = 1,
    kmeans: str = "torch",
    kmeans_sample: int = 256,
    score_column: str = "iqs_score",
    embedding_column: str = "embedding",
    allow_worse: bool = False,
    num_rows: int | None = None,
) -> Dataset | list[bool]:
    """CLUSTER and SELECT in one call, on a dataset that has scores and embeddings.

    As a function of a `Dataset` it returns the selected `Dataset`, with `cluster` and the columns of [`select_car`]:

    ```python
    >>> chosen = cluster_filter(dataset, n1=1000, n2=1)
    ```

    As the function of a `.filter` it returns which rows stay; they keep the dataset's own order and columns. It must see
    the whole dataset at once, and `num_rows` makes sure that it does:

    ```python
    >>> dataset.filter(cluster_filter, batched=True, batch_size=None, fn_kwargs={"n1": 1000, "num_rows": len(dataset)})
    ```

    Args:
        dataset (`Dataset`, or a batch of `.filter`): with `score_column` and `embedding_column`.
        n1, n2, budget, score_column, allow_worse: see [`select_car`].
        k, explained_variance, seed, n_init, kmeans, kmeans_sample, embedding_column: see [`ClusterModel.fit`].
        num_rows (`int`): in `.filter` only, `len(dataset)`.

    Returns:
        `Dataset`: the selected rows with all columns, best first; of a batch, `list[bool]`.

    Raises:
        ValueError: as in the two stages; in `.filter`, the batch is not the whole dataset.
    """
    from datasets import Dataset

    fitting: dict[str, Any] = {
        "k": k,
        "explained_variance": explained_variance,
        "seed": seed,
        "n_init": n_init,
        "kmeans": kmeans,
        "kmeans_sample": kmeans_sample,
    }
    seen = dataset.column_names if hasattr(dataset, "column_names") else list(dataset)
    new = SELECTION_COLUMNS if isinstance(dataset, Dataset) else ()
    check_columns(seen, (score_column,), new)
    if embedding_column not in seen:
        raise ValueError(f"The dataset has no column {embedding_column!r}; it has {seen}.")
    if isinstance(dataset, Dataset):
        refuse_overwrite(seen, ("cluster", "cluster_distance"), "dataset.rename_column(...) on them")
        scored = int(np.count_nonzero(~np.isnan(read_numbers(dataset, score_column, np.nan))))
        refuse_impossible(scored, 1, n1, n2, budget)
        model = ClusterModel.fit(dataset, embedding_column, **fitting)
        return select_car(
            model.label(dataset, across_processes=True),
            n1,
            n2,
            budget=budget,
            score_column=score_column,
            allow_worse=allow_worse,
        )
    batch = {score_column: dataset[score_column], embedding_column: dataset[embedding_column]}
    if num_rows != len(batch[score_column]):
        raise ValueError(
            f"cluster_filter saw a batch of {len(batch[score_column])} rows with num_rows={num_rows}: it must see the whole "
            "dataset at once. Call dataset.filter(cluster_filter, batched=True, batch_size=None, "
            "fn_kwargs={'num_rows': len(dataset), ...}), without num_proc."
        )
    whole = Dataset.from_dict(batch)
    with alone():  # of several processes `.filter` may call one, and have the others read its cache
        labelled = ClusterModel.fit(whole, embedding_column, **fitting).label(whole)
    clusters = np.asarray(read_numbers(labelled, "cluster", -1), dtype=np.int64)
    scores = read_numbers(whole, score_column, np.nan)
    positions = choose(scores, clusters, n1, n2, budget).positions
    if not allow_worse:
        refuse_worse(scores, positions)
    keep = np.zeros(num_rows, dtype=bool)
    keep[positions] = True
    return keep.tolist()
