"""Measure memory and time of scoring as rows grow, in a process per size, on rows resampled from real ones.

A million rows through MiniLM would take hours on two cores; its words through a small random encoder take minutes, and
every buffer that could grow with the rows (texts, tokens, batches, results, what is written) is the same. Time is measured
on MiniLM itself, on 2,000 and on all rows at hand.
"""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.table import Line
from tests.benchmarks.texts import rows

FEW, MANY = 20_000, 1_000_000
LIMIT = 2.0  # GB without the model, at MANY rows


def measure() -> Iterator[Line]:
    """Yield the peak of resident memory at two sizes, and the exponent of time."""
    kind, found = rows()
    with tempfile.TemporaryDirectory() as folder:
        small_model(Path(folder) / "model")
        peaks = {}
        for count in (FEW, MANY):
            write_rows(found, count, Path(folder) / str(count))
            peaks[count] = _in_a_process("score", str(Path(folder) / "model"), str(Path(folder) / str(count)))
        few, many = peaks[FEW], peaks[MANY]
        added = many["peak"] - many["model"]
        what = f"peak resident memory without the model, {MANY:,} {kind} resampled; compared with {FEW:,} rows"
        yield Line(what, added, few["peak"] - few["model"], "GB", f"<= {LIMIT:g} GB", added <= LIMIT)
        what = "of that not backed by a file (the dataset's pages, which the system takes back when it needs them)"
        yield Line(what, many["anonymous"] - many["model"], few["anonymous"] - few["model"], "GB")
    sizes = (2_000, len(found))
    seconds = [_in_a_process("time", str(size))["seconds"] for size in sizes]
    exponent = math.log(seconds[1] / seconds[0]) / math.log(sizes[1] / sizes[0])
    what = f"exponent of scoring time, {sizes[0]:,} to {sizes[1]:,} {kind} ({seconds[0]:.0f} s, {seconds[1]:.0f} s)"
    yield Line(what, exponent, 1.0, "", "about 1", abs(exponent - 1) < 0.1)


def write_rows(found: list[dict[str, Any]], count: int, folder: Path) -> None:
    """Write so many rows drawn from these."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    few = Dataset.from_list(found)
    few.select(np.random.default_rng(0).integers(0, len(few), count)).save_to_disk(folder)


def small_model(folder: Path) -> None:
    """Return a random IQS model of 2 layers and 32 units that reads MiniLM's tokens."""
    from transformers import AutoTokenizer, BertConfig

    from car_datasets import IQSConfig, IQSModel
    from car_datasets.utils import revisions

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    encoder = BertConfig(vocab_size=30_522, max_position_embeddings=512, **sizes)
    IQSModel(IQSConfig(encoder_config=encoder, hidden_sizes=(16,), template="clean-1")).save_pretrained(folder)
    AutoTokenizer.from_pretrained(revisions.default_encoder_folder()).save_pretrained(folder)


def _in_a_process(*arguments: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-m", __name__, *arguments], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def resident() -> dict[str, float]:
    """Return the GB of this process: resident, and the part of it that no file backs."""
    lines = (line.split() for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    found = {words[0]: int(words[1]) / 2**20 for words in lines if words[0] in ("VmRSS:", "RssAnon:")}
    return {"peak": found["VmRSS:"], "anonymous": found["RssAnon:"]}


@contextlib.contextmanager
def watching() -> Iterator[dict[str, float]]:
    """Record the highest of [`resident`] meanwhile, sampled 20 times a second."""
    highest, done = resident(), threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            for name, value in resident().items():
                highest[name] = max(highest[name], value)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield highest
    finally:
        done.set()
        watcher.join()


def _score(model: str, folder: str) -> None:
    from datasets import Dataset

    from car_datasets import QualityScorer
    from car_datasets.loading.sources import load_instructions
    from car_datasets.scoring.stage import add_columns

    scorer = QualityScorer(model, diagnostics=True)
    scorer.score_texts(["Instruction: a Response: b"])
    before = resident()["anonymous"]  # libraries, weights, tokenizer
    with watching() as highest:
        add_columns(load_instructions(Dataset.load_from_disk(folder)), scorer, "Scoring")
    print(json.dumps({**highest, "model": before}))


def _time(count: str) -> None:
    from datasets import Dataset

    from car_datasets import QualityScorer
    from car_datasets.scoring.stage import add_columns

    scorer, dataset = QualityScorer(), Dataset.from_list(rows(int(count))[1])
    scorer.score_texts(["Instruction: a Response: b"])
    start = time.perf_counter()
    add_columns(dataset, scorer, "Scoring")
    print(json.dumps({"seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    {"score": _score, "time": _time}[sys.argv[1]](*sys.argv[2:])
