"""How long will it take here? `estimate_scoring` times some rows of a dataset on this machine."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from car_datasets.batching import padding_waste, token_budget
from car_datasets.formatting import find_schema
from car_datasets.loaded_scorer import read_scorer_config
from car_datasets.packing import can_pack
from car_datasets.parallel import device_for
from car_datasets.rows import Rows

if TYPE_CHECKING:
    from datasets import Dataset

    from car_datasets.scoring import QualityScorer

SAMPLE = 256
LARGE = 10_000  # rows from which on [`curate`] says at the start how long it will take


class Estimate(NamedTuple):
    """What [`estimate_scoring`] found.

    Args:
        rows (`int`): of the dataset; sample (`int`): how many were timed.
        seconds (`float`): for the sample.
        tokens (`int`): read of it; waste (`float`): share of padding among what the encoder computed.
        device (`str`): on what.
    """

    rows: int
    sample: int
    seconds: float
    tokens: int
    waste: float
    device: str

    @property
    def rows_per_second(self) -> float:
        """Rows scored (and embedded) per second."""
        return self.sample / self.seconds

    @property
    def minutes(self) -> float:
        """For all rows, in one process."""
        return self.rows / self.rows_per_second / 60

    def __str__(self) -> str:
        minutes = self.minutes
        whole = f"{minutes / 60:.1f} hours" if minutes > 90 else f"{minutes:.1f} minutes"
        speed = (
            f"{self.rows_per_second:.1f} rows/s ({self.tokens / self.seconds:,.0f} tokens/s, {self.waste:.0%} padding)"
        )
        timed = f"timed on {self.sample} rows"
        return f"{speed} on {self.device}, {timed}: about {whole} to score {self.rows:,} rows in one process."


def estimate_scoring(dataset: Dataset, scorer: QualityScorer, sample: int = SAMPLE, seed: int = 0) -> Estimate:
    """Time a scorer on rows drawn at random, after a first call that loads it.

    Args:
        dataset (`Dataset`): of a known schema; rows that cannot be scored are left out of the time, not of the count.
        scorer ([`QualityScorer`]): with an `embedding_column` that is timed as well.
        sample (`int`): rows to time.
        seed (`int`): of the draw.

    Raises:
        ValueError: no row of the sample can be scored, or `sample` is below 1.
    """
    if sample < 1:
        raise ValueError(f"sample={sample} must be at least 1.")
    drawn = np.random.default_rng(seed).permutation(len(dataset))[:sample]
    rows = dataset.with_format(None)[np.sort(drawn).tolist()]
    schema = find_schema(rows, scorer.schema, scorer.columns)
    texts = Rows.from_batch(rows, schema, str(scorer.template), "mark").texts
    if not texts:
        raise ValueError(f"None of {len(drawn)} rows, drawn at random, can be scored.")
    scorer.score_texts(texts[:4])
    start = time.perf_counter()
    found = scorer.score_texts(texts)
    seconds = time.perf_counter() - start
    config = read_scorer_config(scorer.model_id, str(scorer.revision), scorer.tokenizer, scorer.tokenizer_revision)
    lengths = np.minimum(found.tokens, config.max_tokens).tolist()
    device, encoder = device_for(), config.encoder_config
    waste = 0.0
    if not can_pack(encoder, scorer.dtype, device):
        waste = padding_waste(lengths, token_budget(device, encoder.hidden_size, scorer.batch_tokens).tokens)
    return Estimate(len(dataset), len(drawn), seconds, sum(lengths), waste, str(device))
