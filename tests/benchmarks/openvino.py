"""Compare the int8 encoder with float32 on rows that it was not calibrated on: speed, scores and embeddings."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from datasets import Dataset

from car_datasets import QualityScorer
from car_datasets.scoring.iqs.quantisation import compare_engines, quantise_encoder, sample_texts
from car_datasets.utils import files
from tests.benchmarks.table import Line

ALPACA = Path(__file__).parents[3] / "shared" / "data" / "alpaca_9k.json"
CALIBRATION, COMPARED = 300, 1000


def measure() -> Iterator[Line]:
    """Measure on Alpaca from the project's data folder; without it on the shipped sample, half of it to calibrate."""
    file = ALPACA if ALPACA.is_file() else files.sample_file()
    rows = json.loads(file.read_text(encoding="utf-8"))
    calibration = min(CALIBRATION, len(rows) // 2)
    scorer = QualityScorer()
    texts, rest = sample_texts(Dataset.from_list(rows), scorer, calibration, COMPARED)
    with tempfile.TemporaryDirectory() as folder:
        quick = replace(scorer, engine=str(quantise_encoder(scorer, texts, folder)))
        found = compare_engines(scorer, quick, rest)
        vectors = [replace(s, embedding_column="embedding").score_texts(rest).embeddings for s in (scorer, quick)]
        alone = replace(quick, batch_tokens=1).score_texts(rest[:200]).scores
        company = float(np.abs(quick.score_texts(rest[:200]).scores - alone).max())
    what = f"int8 compared with float32, text to score, {len(rest):,} rows, calibrated on {calibration}"
    speeds = found.int8_rows_per_second, found.float32_rows_per_second
    yield Line(what, *speeds, "rows/s", ">= 2 times", speeds[0] >= 2 * speeds[1])
    yield Line("its Spearman", found.spearman, None, "", ">= 0.995", found.spearman >= 0.995)
    yield Line("its best tenth in common with float32's", found.top_tenth, None, "")
    yield Line("its mean cosine of embeddings", float((vectors[0] * vectors[1]).sum(axis=1).mean()), None, "")
    yield Line("its largest difference of a score, alone and in a batch", company, None, "", "<= 1e-5", company <= 1e-5)
