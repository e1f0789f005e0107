"""New columns beside a dataset's own, which stay where they are: neither read as Python objects nor written again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from car_datasets.formatting import find_schema
from car_datasets.rows import refuse_overwrite
from car_datasets.vectors import beside

if TYPE_CHECKING:
    from datasets import Dataset

    from car_datasets.embedding import TextEmbedder
    from car_datasets.scoring import QualityScorer

# A GPU is through a thousand rows before the next thousand are tokenised; on a CPU more would delay the progress bar, and fewer
# leave more padding (3.5 % at 1,000 rows of Alpaca, 2.0 % at 2,000, 1.2 % at 4,000).
CPU_ROWS, ACCELERATOR_ROWS = 2_000, 16_384


def add_columns(dataset: Dataset, stage: QualityScorer | TextEmbedder, description: str) -> Dataset:
    """What `dataset.map(stage, batched=True)` gives, with a progress bar, from the text columns alone.

    The new columns have the stage's own types (`.map` would infer lists of any length for embeddings, and fail on a first
    batch of nulls), and are read from the cache the second time, as those of `.map` are.

    Raises:
        ValueError: the dataset has a column of that name, or see the stage.
    """
    features = stage.output_features()
    refuse_overwrite(dataset.column_names, features, "output_column=... (and embedding_column=...)")
    read = read_columns(dataset.column_names, stage)
    found = dataset.select_columns(read).map(
        stage,
        batched=True,
        batch_size=batch_rows(),
        with_rank=True,
        desc=description,
        features=features,
        remove_columns=read,
    )
    return beside(dataset, found)


def read_columns(
    column_names: Sequence[str], stage: QualityScorer | TextEmbedder, with_index: bool = True
) -> list[str]:
    """The columns that a stage reads: those of the text, and `source_index` where it is there, by which a message names a row.

    Raises:
        ValueError: no schema fits.
    """
    schema = find_schema(column_names, stage.schema, stage.columns)
    read = [name for name in (*schema.required, schema.input) if name is not None]
    if with_index and "source_index" in column_names and "source_index" not in read:
        read.append("source_index")
    return read


def batch_rows() -> int:
    """How many rows a stage is given at a time on this machine."""
    return ACCELERATOR_ROWS if torch.accelerator.is_available() else CPU_ROWS
