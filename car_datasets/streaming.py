"""SELECT over a stream: the selection of [`select_car`] without the pool in memory.

Does: read scored rows batch by batch, cluster them by a model that was fitted before, keep only rows that can still be
chosen: n1 by score and n2 of every cluster.
Does not: fit clusters (on a sample: `ClusterModel.fit`), or take a share of rows or a budget, which need the number of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from car_datasets.clustering import ClusterModel
from car_datasets.rows import refuse_overwrite
from car_datasets.selection import (
    SELECTION_COLUMNS,
    Choice,
    add_selection,
    check_columns,
    choose,
    numbers_of,
    ranks_of,
    refuse_worse,
)
from car_datasets.settings import is_whole_number

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


def select_car_streaming(
    dataset: IterableDataset | Dataset,
    clusters: ClusterModel | None = None,
    *,
    n1: int = 1000,
    n2: int = 1,
    score_column: str = "iqs_score",
    cluster_column: str = "cluster",
    index_column: str = "source_index",
    allow_worse: bool = False,
    batch_size: int = 10_000,
) -> Dataset:
    """The selected rows of a stream of scored rows, best score first.

    Example:

    ```python
    >>> stream = load_dataset("me/huge", split="train", streaming=True)
    >>> stream = stream.map(QualityScorer(embedding_column="embedding"), batched=True)
    >>> clusters = ClusterModel.fit(Dataset.from_list(list(stream.shuffle(seed=0).take(50_000))), k=1000)
    >>> chosen = select_car_streaming(stream, clusters, n1=10_000, n2=2)
    ```

    A row that is not among the n1 best, nor among the n2 best of its cluster, so far will never be again; so at most
    n1 + n2 * k rows and one batch are in memory, beside one number per row of the stream, for `score_rank`. The result is that
    of [`select_car`] on all rows at once.

    Args:
        dataset (`IterableDataset`): with a score for every row, and either clusters or, with `clusters`, embeddings; nulls are
            never selected (by score, or at all).
        clusters ([`ClusterModel`], *optional*): gives each row its cluster, unless the rows have one.
        n1 (`int`), n2 (`int`): rows by score, and from every cluster.
        score_column, cluster_column, index_column, allow_worse: see [`select_car`].
        batch_size (`int`): rows read at a time.

    Returns:
        `Dataset`: as of [`select_car`], in memory.

    Raises:
        ValueError: a column is missing or would be overwritten, a number does not fit, there are no rows, or the selection
            is worse than the pool.
    """
    from datasets import Dataset
    from datasets.table import InMemoryTable

    counts = [n for n in (n1, n2, batch_size) if not is_whole_number(n) or n < 0]
    if counts or n1 + n2 == 0 or batch_size < 1:
        raise ValueError(
            f"n1={n1!r}, n2={n2!r}, batch_size={batch_size!r}: a stream has no known number of rows, so pass whole numbers, "
            "n1 or n2 above 0; a share or a budget takes select_car on a Dataset."
        )
    kept: pa.Table | None = None
    places = np.zeros(0, dtype=np.int64)  # of the kept rows, in the stream
    seen: list[npt.NDArray[Any]] = []
    rows = 0
    for batch in _tables(dataset, batch_size):
        batch = _labelled(batch, clusters, score_column, cluster_column)
        seen.append(_numbers(batch, score_column, np.nan))
        here = np.arange(rows, rows + len(batch))
        rows += len(batch)
        if index_column not in batch.column_names:
            batch = batch.append_column(index_column, pa.array(here))
        kept = batch if kept is None else pa.concat_tables([kept, batch], promote_options="permissive")
        still = np.sort(_choice(kept, score_column, cluster_column, n1, n2).positions)
        kept, places = kept.take(pa.array(still)), np.concatenate([places, here])[still]
    scores = np.concatenate(seen or [np.zeros(0)])
    scored = int(np.count_nonzero(~np.isnan(scores)))
    if kept is None or scored == 0:
        raise ValueError("dataset: the stream has no rows with a score.")
    if max(n1, n2) > scored:
        raise ValueError(f"n1={n1} and n2={n2} must be between 0 and the {scored} rows that have a score.")
    choice = _choice(kept, score_column, cluster_column, n1, n2)
    if not allow_worse:
        refuse_worse(scores, places[choice.positions])
    choice = choice._replace(score_rank=ranks_of(scores)[places[choice.positions]])
    return add_selection(Dataset(InMemoryTable(kept.combine_chunks())), choice, index_column)


def _tables(dataset: IterableDataset | Dataset, batch_size: int) -> Iterator[pa.Table]:
    """The batches as Arrow tables. A stream's are built here: its own have the types that each batch alone suggests, which
    `datasets` cannot join where one holds a null only."""
    from datasets import Dataset

    if isinstance(dataset, Dataset):
        yield from dataset.with_format("arrow").iter(batch_size=batch_size)
        return
    features = dataset.features
    for batch in dataset.with_format(None).iter(batch_size=batch_size):
        if features is None:
            yield pa.table(dict(batch))
        else:
            yield pa.table(features.encode_batch(batch), schema=features.arrow_schema)


def _labelled(batch: pa.Table, clusters: ClusterModel | None, score_column: str, cluster_column: str) -> pa.Table:
    if clusters is not None and cluster_column not in batch.column_names:
        new = (cluster_column, clusters.distance_column)
        check_columns(batch.column_names, (clusters.embedding_column,), ())
        refuse_overwrite(batch.column_names, new, "output_column=... and distance_column=... to ClusterModel.fit")
        found = clusters.label_arrow(batch[clusters.embedding_column])
        batch = batch.append_column(cluster_column, found[clusters.output_column])
        batch = batch.append_column(clusters.distance_column, found[clusters.distance_column])
    check_columns(batch.column_names, (score_column, cluster_column), SELECTION_COLUMNS)
    return batch


def _choice(table: pa.Table, score_column: str, cluster_column: str, n1: int, n2: int) -> Choice:
    scores = _numbers(table, score_column, np.nan)
    scored = int(np.count_nonzero(~np.isnan(scores)))
    return choose(scores, _numbers(table, cluster_column, -1), min(n1, scored), min(n2, scored))


def _numbers(table: pa.Table, column: str, missing: float) -> npt.NDArray[Any]:
    return numbers_of(table[column], column, missing)
