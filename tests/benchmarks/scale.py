"""Measure all stages after the scoring on a million rows, in a process of its own: fit, label, select, report, write.

Scores and embeddings are given (synthetic, see synthetic.py), memory-mapped from disk as shards leave them; the texts are
those at hand, repeated. `python -m tests.benchmarks.scale ROWS` does it with fewer rows.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset, disable_progress_bars
from datasets.table import InMemoryTable

from car_datasets import ClusterModel, SelectionReport, select_car
from car_datasets.receipt import Receipt
from car_datasets.results import Extra, write_result
from car_datasets.utils.column_names import ColumnNames
from tests.benchmarks.memory import resident, watching
from tests.benchmarks.synthetic import embeddings
from tests.benchmarks.table import Line, best_of
from tests.benchmarks.texts import rows

ROWS = 1_000_000
LIMIT = 24.0  # GB
N1, N2 = 0.05, 1


def measure(count: int = ROWS) -> Iterator[Line]:
    """Yield the seconds of every stage, the memory of all of them, and the size on disk."""
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        write_pool(count, Path(folder) / "pool")
        command = [sys.executable, "-m", "tests.benchmarks.scale", "in-a-process", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    peak, anonymous, disk = (found.pop(name) for name in ("peak", "anonymous", "disk"))
    for stage, seconds in found.items():
        yield Line(f"{stage}, {count:,} rows with embeddings of 384 numbers", seconds)
    yield Line("all of it", sum(found.values()))
    target = f"<= {LIMIT:g} GB"
    yield Line("peak resident memory, pages of files included", peak, None, "GB", target, peak <= LIMIT)
    yield Line("of that without the libraries and files", anonymous, None, "GB")
    yield Line("what is written", disk, None, "GB")


def write_pool(count: int, folder: Path) -> None:
    """Write so many scored rows, with the columns that scoring leaves."""
    matrix, (_, texts), rng = embeddings(count), rows(), np.random.default_rng(1)
    few = pa.Table.from_pylist([{name: row[name] for name in ("instruction", "input", "output")} for row in texts])
    table = few.take(pa.array(np.arange(count) % len(few)))
    table = table.append_column("source_index", pa.array(np.arange(count)))
    table = table.append_column("iqs_score", pa.array(rng.normal(size=count).astype(np.float32)))
    table = table.append_column("iqs_tokens", pa.array(rng.integers(20, 512, count, dtype=np.int32)))
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), matrix.shape[1])
    Dataset(InMemoryTable(table.append_column("embedding", vectors))).save_to_disk(folder)


def road(folder: Path) -> dict[str, float]:
    """Return the seconds by stage, and in GB the peak of resident memory and the files of the result."""
    disable_progress_bars()
    ClusterModel.fit(Dataset.from_dict({"embedding": list(np.random.rand(500, 8))}))  # loads what a fit loads
    before = resident()["anonymous"]
    pool, found, output = Dataset.load_from_disk(folder / "pool"), {}, folder / "result"
    with watching() as highest:
        found["fit"], model = best_of(1, lambda: ClusterModel.fit(pool))
        found["label"], pool = best_of(1, lambda: model.label(pool))
        plain = pool.remove_columns("embedding")
        found["select"], chosen = best_of(1, lambda: select_car(plain, N1, N2))
        found["report"], report = best_of(1, lambda: SelectionReport.from_selection(plain, chosen))
        extra = Extra(Receipt({}, "", "", {}, {}, {}, {}, "", {}), {}, {})
        found["write"], _ = best_of(1, lambda: write_result(output, chosen, pool, report, extra, ColumnNames()))
    disk = sum(path.stat().st_size for path in output.iterdir()) / 2**30
    return {**found, "peak": highest["peak"], "anonymous": highest["anonymous"] - before, "disk": disk}


if __name__ == "__main__":
    if sys.argv[1] == "in-a-process":
        print(json.dumps(road(Path(sys.argv[2]))))
    else:
        from tests.benchmarks.__main__ import show

        show([("scale", line) for line in measure(int(sys.argv[1]))])
