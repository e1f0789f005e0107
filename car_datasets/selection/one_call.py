"""Cluster and select in one call: `cluster_filter` on a `Dataset` or inside `.filter`, `select_car_streaming` on a stream.

Does: fit clusters and label all rows, or label the batches of a stream by a model that was fitted before, then select;
refuse invalid numbers before the clusters are fitted; keep only rows of a stream that can still be chosen.
Does not: compute scores or embeddings; select a share or a budget of a stream, which need the number of rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from datasets import Dataset, DatasetDict, IterableDataset
from datasets.table import InMemoryTable

from car_datasets.clustering.model import ClusterModel
from car_datasets.loading.values import carried_stream, table_of
from car_datasets.scoring.named import refuse_raw_numbers
from car_datasets.selection.procedures import Amounts
from car_datasets.selection.rule import (
    SELECTION_COLUMNS,
    Choice,
    add_selection,
    choose,
    ranks_of,
    refuse_impossible,
    refuse_worse,
    select_car,
)
from car_datasets.utils.column_names import ColumnNames
from car_datasets.utils.columns import (
    check_columns,
    clusters_of,
    numbers_of,
    read_clusters,
    read_numbers,
    refuse_no_embeddings,
    refuse_other_datasets,
    refuse_overwrite,
)
from car_datasets.utils.processes import alone
from car_datasets.utils.settings import (
    EXPLAINED_VARIANCE,
    KMEANS,
    KMEANS_SAMPLE,
    N1,
    N_INIT,
    SEED,
    K,
    default_n1,
    is_integer,
)


def cluster_filter(
    dataset: Dataset | Mapping[str, Sequence[Any]],
    *,
    n1: int | float | None = None,
    n2: int = 1,
    budget: int | None = None,
    k: int | str = K,
    explained_variance: float = EXPLAINED_VARIANCE,
    seed: int = SEED,
    n_init: int = N_INIT,
    kmeans: str = KMEANS,
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
    refuse_raw_numbers(names.score, columns)
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
    clusters = read_clusters(labelled, names.cluster)
    positions = choose(numbers, clusters, amounts.n1, amounts.n2, amounts.budget).positions
    if not amounts.allow_worse:
        refuse_worse(numbers, positions)
    keep = np.zeros(rows, dtype=bool)
    keep[positions] = True
    return keep.tolist()


def select_car_streaming(
    dataset: IterableDataset | Dataset,
    clusters: ClusterModel | None = None,
    *,
    n1: int | None = None,
    n2: int = 1,
    score_column: str = ColumnNames.score,
    cluster_column: str | None = None,
    index_column: str = ColumnNames.index,
    allow_worse: bool = False,
    batch_size: int = 10_000,
) -> Dataset:
    """Return the selected rows of a stream of scored rows, best score first; the result is that of [`select_car`].

    Example:
    ```python
    >>> stream = load_dataset("me/huge", split="train", streaming=True)
    >>> stream = stream.map(QualityScorer(embedding_column="embedding"), batched=True)
    >>> clusters = ClusterModel.fit(Dataset.from_list(list(stream.shuffle(seed=0).take(50_000))), k=1000)
    >>> chosen = select_car_streaming(stream, clusters, n1=10_000, n2=2)
    ```

    At most n1 + n2 * k rows and one batch are in memory, plus one number per row of the stream, for `score_rank`.

    Args:
        dataset (`IterableDataset`): rows with a score, and either a cluster or, with `clusters`, an embedding. Rows
            without a score are never selected; rows without a cluster can only be selected by score.
        clusters ([`ClusterModel`], *optional*): assigns each row its cluster, unless the rows have one.
        n1 (`int`, *optional*): number of rows taken by score; by default 1000, but at most half of the scored rows.
        n2 (`int`): number of rows taken from every cluster.
        score_column (`str`): column of scores.
        cluster_column (`str`, *optional*): column of clusters; by default the one that `clusters` names, else `cluster`.
        index_column (`str`): kept if the rows have it, otherwise added: the row's position in the stream.
        allow_worse (`bool`): accept a selection whose mean score is below the pool's.
        batch_size (`int`): number of rows read at a time.

    Returns:
        `Dataset`: in memory, all columns of the chosen rows, and `selected_by`, `score_rank` and `cluster_rank`.

    Raises:
        ValueError: a column is missing or would be overwritten, a number does not fit, there are no rows, or the
            selection is worse than the pool.
    """
    most = N1 if n1 is None else n1  # the number of rows, on which the default depends, is known at the end
    counts = [n for n in (most, n2, batch_size) if not is_integer(n) or n < 0]
    if counts or most + n2 == 0 or batch_size < 1:
        raise ValueError(
            f"n1={n1!r}, n2={n2!r}, batch_size={batch_size!r}: a stream has no known number of rows, so pass "
            "integers, n1 or n2 above 0; for a share or a budget call select_car on a Dataset."
        )
    if not isinstance(dataset, IterableDataset):
        refuse_other_datasets(dataset, "select_car_streaming", "")
    if cluster_column is None:
        cluster_column = ColumnNames.cluster if clusters is None else clusters.output_column
    names = ColumnNames(score=score_column, cluster=cluster_column, index=index_column)
    kept: pa.Table | None = None
    places = np.zeros(0, dtype=np.int64)  # positions of the kept rows in the stream
    scores_read: list[npt.NDArray[Any]] = []
    rows = 0
    for batch in _tables(dataset, batch_size):
        batch = _labelled(batch, clusters, names)
        scores_read.append(numbers_of(batch[names.score], names.score, np.nan))
        here = np.arange(rows, rows + len(batch))
        rows += len(batch)
        if names.index not in batch.column_names:
            batch = batch.append_column(names.index, pa.array(here))
        # "permissive": a column that is null in all rows so far takes the type that a later batch has.
        kept = batch if kept is None else pa.concat_tables([kept, batch], promote_options="permissive")
        # A row that is not among the best so far can never be again, so it is dropped. Sorted by position, because ties
        # go to the earlier row.
        still = np.sort(_choice(kept, names, most, n2).positions)
        kept, places = kept.take(pa.array(still)), np.concatenate([places, here])[still]
    scores = np.concatenate(scores_read or [np.zeros(0)])
    scored = int(np.count_nonzero(~np.isnan(scores)))
    if kept is None or scored == 0:
        raise ValueError("dataset: the stream has no rows with a score; map a QualityScorer over it first.")
    n1 = default_n1(scored) if n1 is None else n1
    if max(n1, n2) > scored:
        raise ValueError(f"n1={n1} and n2={n2} must be between 0 and the {scored} rows that have a score.")
    choice = _choice(kept, names, n1, n2)
    if not allow_worse:
        refuse_worse(scores, places[choice.positions])
    # The ranks of the choice count the kept rows; these count all rows of the stream.
    choice = choice._replace(score_rank=ranks_of(scores)[places[choice.positions]])
    return add_selection(Dataset(InMemoryTable(kept.combine_chunks())), choice, names.index)


def _tables(dataset: IterableDataset | Dataset, batch_size: int) -> Iterator[pa.Table]:
    """Yield the batches as Arrow tables."""
    if isinstance(dataset, Dataset):
        yield from dataset.with_format("arrow").iter(batch_size=batch_size)
        return
    # Built here, since the tables of a stream have the types that each batch alone suggests: a column that is null in
    # one batch could not be joined with the same column in another.
    features = dataset.features
    for batch in carried_stream(dataset.with_format(None)).iter(batch_size=batch_size):
        if features is None:
            yield pa.table(dict(batch))
        else:
            yield table_of(batch, features)


def _labelled(batch: pa.Table, clusters: ClusterModel | None, names: ColumnNames) -> pa.Table:
    """Return the batch with its clusters, which are added by the model if the rows have none."""
    if clusters is not None and names.cluster not in batch.column_names:
        new = (names.cluster, clusters.distance_column)
        refuse_no_embeddings(batch.column_names, clusters.embedding_column)
        refuse_overwrite(batch.column_names, new, "output_column=... and distance_column=... to ClusterModel.fit")
        labels = clusters.label_arrow(batch[clusters.embedding_column])
        batch = batch.append_column(names.cluster, labels[clusters.output_column])
        batch = batch.append_column(clusters.distance_column, labels[clusters.distance_column])
    check_columns(batch.column_names, (names.score, names.cluster), SELECTION_COLUMNS)
    refuse_raw_numbers(names.score, batch.column_names)
    return batch


def _choice(table: pa.Table, names: ColumnNames, n1: int, n2: int) -> Choice:
    """Select from the rows so far, which may be fewer than n1 or n2."""
    scores = numbers_of(table[names.score], names.score, np.nan)
    scored = int(np.count_nonzero(~np.isnan(scores)))
    return choose(scores, clusters_of(table[names.cluster], names.cluster), min(n1, scored), min(n2, scored))
