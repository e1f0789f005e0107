"""`select_car_streaming`: select from a stream of scored rows, without the pool in memory.

Does: read rows batch by batch, label them by a model that was fitted before, keep only rows that can still be chosen.
Does not: fit clusters, or select a share of the rows or a budget, which need the number of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from datasets import Dataset, IterableDataset
from datasets.table import InMemoryTable

from car_datasets.clustering.model import ClusterModel
from car_datasets.loading.values import carried_stream, table_of
from car_datasets.selection.rule import SELECTION_COLUMNS, Choice, add_selection, choose, ranks_of, refuse_worse
from car_datasets.utils.column_names import ColumnNames
from car_datasets.utils.columns import check_columns, numbers_of, refuse_overwrite
from car_datasets.utils.settings import N1, is_whole_number


def select_car_streaming(
    dataset: IterableDataset | Dataset,
    clusters: ClusterModel | None = None,
    *,
    n1: int = N1,
    n2: int = 1,
    score_column: str = ColumnNames.score,
    cluster_column: str = ColumnNames.cluster,
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
        n1 (`int`): number of rows taken by score.
        n2 (`int`): number of rows taken from every cluster.
        score_column (`str`): column of scores.
        cluster_column (`str`): column of clusters.
        index_column (`str`): kept if the rows have it, otherwise added: the row's position in the stream.
        allow_worse (`bool`): accept a selection whose mean score is below the pool's.
        batch_size (`int`): number of rows read at a time.

    Returns:
        `Dataset`: in memory, all columns of the chosen rows, and `selected_by`, `score_rank` and `cluster_rank`.

    Raises:
        ValueError: a column is missing or would be overwritten, a number does not fit, there are no rows, or the
            selection is worse than the pool.
    """
    counts = [n for n in (n1, n2, batch_size) if not is_whole_number(n) or n < 0]
    if counts or n1 + n2 == 0 or batch_size < 1:
        raise ValueError(
            f"n1={n1!r}, n2={n2!r}, batch_size={batch_size!r}: a stream has no known number of rows, so pass whole "
            "numbers, n1 or n2 above 0; for a share or a budget call select_car on a Dataset."
        )
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
        still = np.sort(_choice(kept, names, n1, n2).positions)
        kept, places = kept.take(pa.array(still)), np.concatenate([places, here])[still]
    scores = np.concatenate(scores_read or [np.zeros(0)])
    scored = int(np.count_nonzero(~np.isnan(scores)))
    if kept is None or scored == 0:
        raise ValueError("dataset: the stream has no rows with a score; map a QualityScorer over it first.")
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
        check_columns(batch.column_names, (clusters.embedding_column,), ())
        refuse_overwrite(batch.column_names, new, "output_column=... and distance_column=... to ClusterModel.fit")
        labels = clusters.label_arrow(batch[clusters.embedding_column])
        batch = batch.append_column(names.cluster, labels[clusters.output_column])
        batch = batch.append_column(clusters.distance_column, labels[clusters.distance_column])
    check_columns(batch.column_names, (names.score, names.cluster), SELECTION_COLUMNS)
    return batch


def _choice(table: pa.Table, names: ColumnNames, n1: int, n2: int) -> Choice:
    """Select from the rows so far, which may be fewer than n1 or n2."""
    scores = numbers_of(table[names.score], names.score, np.nan)
    scored = int(np.count_nonzero(~np.isnan(scores)))
    return choose(scores, numbers_of(table[names.cluster], names.cluster, -1), min(n1, scored), min(n2, scored))
