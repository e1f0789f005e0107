"""Measure what CLUSTER and SELECT cost as the rows grow: exponents of time, and memory compared with the data."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, disable_progress_bars
from datasets.table import InMemoryTable

from car_datasets import ClusterModel, select_car
from car_datasets.clustering.kmeans import KMeansSettings, fit_kmeans, one_pass
from car_datasets.utils.columns import Matrix
from tests.benchmarks.clustering import pieces
from tests.benchmarks.synthetic import embeddings
from tests.benchmarks.table import Line, best_of

ROWS = (10_000, 100_000, 1_000_000)
CLUSTERS = 100  # where k does not grow with the rows
IN_MEMORY = 1_000_000


def measure() -> Iterator[Line]:
    """Time every stage at three sizes, and fit the exponent of its time."""
    disable_progress_bars()
    seconds: dict[str, list[float]] = {}
    for rows in ROWS:
        for stage, time in stages(rows).items():
            seconds.setdefault(stage, []).append(time)
    for stage, times in seconds.items():
        exponent = float(np.polyfit(np.log(ROWS), np.log(times), 1)[0])
        about = 1.5 if "all rows" in stage else 1.0
        shown = ", ".join(f"{time:.2g} s" for time in times)
        what = f"{stage}: exponent of its time over {', '.join(f'{rows:,}' for rows in ROWS)} rows ({shown})"
        yield Line(what, exponent, unit="", target=f"about {about}, or less", met=exponent <= about + 0.2)
    yield from memory()


def stages(rows: int) -> dict[str, float]:
    """Return the seconds of what is timed, on `rows` synthetic embeddings."""
    matrix = embeddings(rows)
    dataset = dataset_of(matrix)
    k = int(math.sqrt(rows / 2))
    runs = 3 if rows <= 100_000 else 1
    found: dict[str, float] = {}

    def timed(stage: str, function: Callable[[], object]) -> object:
        found[stage], result = best_of(runs, function)
        return result

    points = torch.from_numpy(matrix)
    read = pieces(matrix)
    timed("k-means on all rows, k = sqrt(n / 2)", lambda: fit_kmeans(read, torch.from_numpy, KMeansSettings(k, 0)))
    timed(f"a full pass, k = {CLUSTERS}", lambda: one_pass([points], points[:CLUSTERS]))
    model = timed(f"fit, sampled, k = {CLUSTERS}", lambda: ClusterModel.fit(dataset, k=CLUSTERS))
    labelled = timed(f"label, k = {CLUSTERS}", lambda: model.label(dataset))  # type: ignore[attr-defined]
    timed("select", lambda: select_car(labelled, n1=1_000, n2=1))
    return found


def dataset_of(matrix: Matrix) -> Dataset:
    """Return embeddings and scores, in Arrow's memory without a copy."""
    lists = pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), matrix.shape[1])
    scores = np.random.default_rng(1).normal(size=len(matrix)).astype(np.float32)
    return Dataset(InMemoryTable(pa.table({"embedding": lists, "iqs_score": scores})))


MEASURE = """
import json, sys
import numpy as np
from datasets import load_from_disk
from datasets import Dataset
from car_datasets import ClusterModel

def kilobytes(name):
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith(name)).split()[1])

ClusterModel.fit(Dataset.from_dict({"embedding": list(np.random.rand(500, 8))}))  # loads what a fit loads
before = kilobytes("VmRSS")
data = load_from_disk(sys.argv[1], keep_in_memory=True)
model = ClusterModel.fit(data, k=int(sys.argv[2]), kmeans_sample=int(sys.argv[3]))
print(json.dumps([(kilobytes("VmHWM") - before) * 1024, len(model.components)]))
"""


def memory() -> Iterator[Line]:
    """Compare the most that a fit adds to a process, the column itself included, with the column."""
    if not Path("/proc/self/status").exists():
        yield Line("memory of a fit: left out, this system has no /proc", math.nan)
        return
    with tempfile.TemporaryDirectory() as folder:
        dataset_of(embeddings(IN_MEMORY)).save_to_disk(folder)
        for k, sample in ((int(math.sqrt(IN_MEMORY / 2)), 256), (20, 0)):
            arguments = [sys.executable, "-c", MEASURE, folder, str(k), str(sample)]
            most, kept = json.loads(subprocess.run(arguments, capture_output=True, check=True).stdout.splitlines()[-1])
            data = IN_MEMORY * 4 * (384 if sample else 384 + kept)
            name = (
                "256 rows a cluster; compared with the column"
                if sample
                else "all rows; compared with the column and its projection"
            )
            what = f"memory of a fit of {IN_MEMORY:,} x 384 in memory, k={k}, {name}"
            yield Line(what, most / 2**20, data / 2**20, "MB", "<= 1.3 times", most <= 1.3 * data)
