"""Estimate how long a stage takes on this machine: `estimate_scoring` times it on some rows of a dataset.

Does: load the model, time rows drawn at random, extrapolate to all rows in one process.
Does not: predict several processes or another machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from car_datasets.batching import padding_waste, token_budget
from car_datasets.columns import read_columns
from car_datasets.formatting import find_schema
from car_datasets.loaded_scorer import read_scorer_config
from car_datasets.packing import can_pack
from car_datasets.parallel import device_for
from car_datasets.rows import Rows
from car_datasets.scoring import QualityScorer
from car_datasets.stage import Stage

if TYPE_CHECKING:
    from datasets import Dataset

SAMPLE = 256
LARGE = 10_000  # rows from which `curate` prints an estimate before it starts


class Estimate(NamedTuple):
    """The speed of a stage on a sample of rows.

    Args:
        rows (`int`): of the dataset.
        sample (`int`): rows that were timed.
        seconds (`float`): for the sample.
        tokens (`int`, *optional*): read by the model, of the sample; for a [`QualityScorer`] only.
        waste (`float`, *optional*): share of padding among the tokens that the encoder computed; likewise.
        device (`str`): such as `"cpu"` or `"cuda:0"`.
    """

    rows: int
    sample: int
    seconds: float
    tokens: int | None
    waste: float | None
    device: str

    @property
    def rows_per_second(self) -> float:
        """Return the number of rows that the stage processes per second."""
        return self.sample / self.seconds

    @property
    def minutes(self) -> float:
        """Return the minutes that all rows take in one process."""
        return self.rows / self.rows_per_second / 60

    def __str__(self) -> str:
        minutes = self.minutes
        duration = f"{minutes / 60:.1f} hours" if minutes > 90 else f"{minutes:.1f} minutes"
        speed = f"{self.rows_per_second:.1f} rows/s"
        if self.tokens is not None and self.waste is not None:
            speed += f" ({self.tokens / self.seconds:,.0f} tokens/s, {self.waste:.0%} padding)"
        timed = f"timed on {self.sample} rows"
        return f"{speed} on {self.device}, {timed}: about {duration} to score {self.rows:,} rows in one process."


def estimate_scoring(dataset: Dataset, scorer: Stage, sample: int = SAMPLE, seed: int = 0) -> Estimate:
    """Time a stage on rows drawn at random, after a first call that loads its model.

    Args:
        dataset (`Dataset`): the rows to score. Those that a [`QualityScorer`] cannot score are not timed, but counted.
        scorer (`Stage`): such as a [`QualityScorer`], whose `embedding_column` is timed as well.
        sample (`int`): rows to time.
        seed (`int`): of the draw.

    Raises:
        ValueError: no row of the sample can be scored, or `sample` is below 1.
    """
    if sample < 1:
        raise ValueError(f"sample={sample} must be at least 1.")
    drawn = np.random.default_rng(seed).permutation(len(dataset))[:sample]
    rows = dataset.with_format(None)[np.sort(drawn).tolist()]
    device = str(device_for())
    if isinstance(scorer, QualityScorer):
        seconds, tokens, waste = _time_scorer(scorer, rows, len(drawn))
        return Estimate(len(dataset), len(drawn), seconds, tokens, waste, device)
    batch = {name: rows[name] for name in read_columns(dataset.column_names, scorer)}
    scorer({name: values[:4] for name, values in batch.items()})
    return Estimate(len(dataset), len(drawn), _seconds(lambda: scorer(batch))[0], None, None, device)


def _time_scorer(scorer: QualityScorer, rows: dict[str, Any], count: int) -> tuple[float, int, float]:
    """Time a scorer on its texts; return seconds, tokens read by the model, and the share of padding."""
    schema = find_schema(rows, scorer.schema, scorer.columns)
    texts = Rows.from_batch(rows, schema, str(scorer.template), "mark").texts
    if not texts:
        raise ValueError(f"None of {count} rows, drawn at random, can be scored.")
    scorer.score_texts(texts[:4])
    seconds, scores = _seconds(lambda: scorer.score_texts(texts))
    config = read_scorer_config(scorer.model_id, str(scorer.revision), scorer.tokenizer, scorer.tokenizer_revision)
    lengths = np.minimum(scores.tokens, config.max_tokens).tolist()
    device, encoder = device_for(), config.encoder_config
    waste = 0.0
    if not can_pack(encoder, scorer.dtype, device):
        waste = padding_waste(lengths, token_budget(device, encoder.hidden_size, scorer.batch_tokens).tokens)
    return seconds, sum(lengths), waste


def _seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return how long `work` took, and its result."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result
