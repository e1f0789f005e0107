"""Ray Data: `OnRay` runs a stage in `ray.data.Dataset.map_batches`.

Does: pass the columns that a stage reads to it, and append its new columns to the Arrow table.
Does not: import or start Ray, or distribute rows: actors, retries and the order of rows are Ray's.
"""

from __future__ import annotations

import pyarrow as pa

from car_datasets.columns import read_columns
from car_datasets.rows import refuse_taken
from car_datasets.stage import Stage


class OnRay:
    """A class of Ray actors that run a stage, such as [`QualityScorer`]; each actor loads the model once.

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

    Ray returns all rows, in any order. Sort by `source_index` (or an id of your own, which the rows must have before they
    are scored) before you select, as ties are broken by order. Ray restarts a worker that dies.

    Args:
        stage (`Stage`): its model must be on the Hub or at the same path on all machines.
    """

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def __call__(self, table: pa.Table) -> pa.Table:
        """Append the columns of the stage to a batch of rows.

        Raises:
            ValueError: the batch is not an Arrow table, it already has a column that the stage adds, or the stage refuses the
                rows.
        """
        from datasets import Dataset

        if not isinstance(table, pa.Table):
            raise ValueError(
                f"batch is a {type(table).__name__}, not an Arrow table: map_batches(..., batch_format='pyarrow')."
            )
        refuse_taken(table.column_names, self.stage)
        types = self.stage.output_features()
        new = self.stage(table.select(read_columns(table.column_names, self.stage)).to_pydict())
        added = Dataset.from_dict(new, features=types).with_format("arrow")[:]
        for name in types:
            table = table.append_column(added.schema.field(name), added.column(name))
        return table
