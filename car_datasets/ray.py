"""Ray Data: `OnRay`, in which a stage goes through `ray.data.Dataset.map_batches`.

Does: give a stage the columns of an Arrow table that it reads, and put its new columns beside the table's own.
Does not: import or start Ray, or deal out rows: actors, retries and the order of rows are Ray's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa

from car_datasets.columns import read_columns
from car_datasets.rows import refuse_overwrite

if TYPE_CHECKING:
    from car_datasets.embedding import TextEmbedder
    from car_datasets.scoring import QualityScorer


class OnRay:
    """A [`QualityScorer`] or [`TextEmbedder`] as the class of Ray's actors, each of which loads the model once.

    ```python
    import ray
    from car_datasets import QualityScorer
    from car_datasets.ray import OnRay

    rows = ray.data.read_parquet("s3://pool/")
    scored = rows.map_batches(
        OnRay,
        fn_constructor_args=(QualityScorer(embedding_column="embedding"),),
        batch_format="pyarrow",
        batch_size=4096,
        compute=ray.data.ActorPoolStrategy(size=8),
        num_gpus=1,
    )
    scored.write_parquet("s3://scored/")
    ```

    Ray gives back rows in any order, and whole: sort by `source_index` (or an id of your own, which the rows must have
    when they come in) before you select, as ties are broken by order. A worker that dies is started again by Ray.

    Args:
        stage ([`QualityScorer`] or [`TextEmbedder`]): its model must be on the Hub or at the same path on all machines.
    """

    def __init__(self, stage: QualityScorer | TextEmbedder) -> None:
        self.stage = stage

    def __call__(self, table: pa.Table) -> pa.Table:
        """A batch of rows as a table, `(rows, columns)`, to the same with the stage's columns after its own.

        Raises:
            ValueError: the batch is no Arrow table, a column is taken, or see the stage.
        """
        from datasets import Dataset

        if not isinstance(table, pa.Table):
            raise ValueError(
                f"batch is a {type(table).__name__}, not an Arrow table: map_batches(..., batch_format='pyarrow')."
            )
        types = self.stage.output_features()
        refuse_overwrite(table.column_names, types, "output_column=... (and embedding_column=...)")
        new = self.stage(table.select(read_columns(table.column_names, self.stage)).to_pydict())
        added = Dataset.from_dict(new, features=types).with_format("arrow")[:]
        for name in types:
            table = table.append_column(added.schema.field(name), added.column(name))
        return table
