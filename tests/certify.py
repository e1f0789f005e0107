"""Certify that the number of processes does not change a result: `make certify`, or `python -m tests.certify [gpu]`.

Score and embed the rows that the package ships with 1, 2 and 3 processes, with other batch budgets and in other orders.
For each run, print the largest difference of a number from that of one process, and whether the order of the rows and
the selection are the same. Then cluster these rows, and those of tests/together.py, with 2 and 3 processes: labels must
equal those of one process, and centres may differ by 1e-6. Exit with 1 if anything differs. It takes about three
minutes on two cores.

Where there is a GPU, two processes that share it and its shards score in bfloat16 as well; `gpu` does this alone, in
less than a minute, as one of the two is this process, which also does what takes one. There the order in which a batch
of another shape is summed can change the rounding of a state, so scores agree to within `HALF_TOLERANCE`, and rows that
are nearer to each other than that can change places at the edge of a selection.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset
from typer.testing import CliRunner

from car_datasets import cluster_filter
from car_datasets.cli import app
from car_datasets.scoring.shards.claims import CLAIM
from car_datasets.utils import files

TOLERANCE = 1e-5  # of scores and embeddings: batches of another shape sum float32 in another order
HALF_TOLERANCE = 0.08  # of those in bfloat16, as the README states; the standard deviation of the scores is 0.46


class Run(NamedTuple):
    """The settings of one scoring run."""

    processes: int
    batch_tokens: int | None = None
    order: str = "as given"
    dtype: str = "float32"  # in another one two processes share a GPU, each started by itself and not by a launcher

    @property
    def tolerance(self) -> float:
        """Return how far a number may be from that of one process."""
        return TOLERANCE if self.dtype == "float32" else HALF_TOLERANCE

    def __str__(self) -> str:
        return f"{self.processes} | {self.batch_tokens or 'default':>7} | {self.order:<8}"


RUNS = (Run(1), Run(2), Run(3), Run(1, 1024, "reversed"), Run(2, 32_768, "shuffled"))
GPU_RUNS = tuple(Run(*run, "bfloat16") for run in ((1, None, "as given"), (2, None, "as given"), (1, 1024, "reversed")))


def places(order: str, rows: int) -> list[int]:
    """Return, for each place in this order, the row of the sample that is there."""
    found = list(range(rows))
    if order == "reversed":
        found.reverse()
    elif order == "shuffled":
        random.Random(0).shuffle(found)
    return found


def score(run: Run, folder: Path) -> Dataset:
    """Return the sample in the order of the run, scored by `car-datasets score`; `id` is the row of the sample."""
    rows = json.loads(Path(files.sample_file()).read_text(encoding="utf-8"))
    folder.mkdir()
    content = [{**rows[i], "id": i} for i in places(run.order, len(rows))]
    (folder / "rows.json").write_text(json.dumps(content), encoding="utf-8")
    command, output = ["score", str(folder / "rows.json")], ["--output", str(folder / "scored.parquet")]
    budget = [] if run.batch_tokens is None else ["--batch-tokens", str(run.batch_tokens)]
    command += ["--shards", str(folder / "shards"), "--dtype", run.dtype, *budget]
    if run.dtype == "float32":
        start = launcher(run.processes) if run.processes > 1 else []
        finish(str(run), [sys.executable, *start, "-m", "car_datasets", *command, *output])
    elif run.processes == 1:
        here(str(run), [*command, *output])
    else:
        together(str(run), command, output, folder / "shards")
    return Dataset.from_parquet(str(folder / "scored.parquet"), cache_dir=str(folder / "cache"))


def here(what: str, words: list[str]) -> None:
    """Run a command in this process, which has the model already; exit with its message if it fails."""
    done = CliRunner().invoke(app, words)
    if done.exit_code != 0:
        sys.exit(f"{what}: {done.output[-3000:]}")


def together(what: str, command: list[str], output: list[str], shards: Path) -> None:
    """Run a command in another process and in this one, which waits for the other's shards and joins them all."""
    line = [sys.executable, "-m", "car_datasets", *command]
    with tempfile.TemporaryFile("w+") as said, subprocess.Popen(line, stdout=said, stderr=said) as other:
        try:
            # This process is warm, and would be done before the other one has loaded its model.
            deadline = time.monotonic() + 300
            while not any(CLAIM.fullmatch(path.name) for path in shards.rglob("*")) and other.poll() is None:
                if time.monotonic() > deadline:
                    sys.exit(f"{what}: the other process has claimed no shard for five minutes")
                time.sleep(0.001)
            here(what, [*command, *output])
        except BaseException:
            other.terminate()
            raise
        if other.wait() != 0:
            said.seek(0)
            sys.exit(f"{what}: {said.read()[-3000:]}")


def launcher(processes: int) -> list[str]:
    """Return the arguments after `python` that start this number of processes."""
    return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]


def finish(what: str, line: list[str]) -> str:
    """Run a command and return its stdout; exit with its stderr if it fails."""
    environment = {**os.environ, "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    if torch.cuda.device_count() < max(run.processes for run in RUNS):
        environment["CUDA_VISIBLE_DEVICES"] = ""  # NCCL refuses two processes on one GPU
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode != 0:
        sys.exit(f"{what}: {done.stderr[-3000:]}")
    return done.stdout


def certify_clusters(source: Path) -> bool:
    """Cluster the cases of tests/together.py and the embeddings of `source` with 2 and 3 processes, and print each."""
    fine = True
    print("processes | case | share of rows with another label | largest difference of a centre | of a distance")
    for processes in (2, 3):
        what = f"{processes} processes cluster"
        found = json.loads(finish(what, [sys.executable, *launcher(processes), "-m", "tests.together", str(source)]))
        del found["errors"]  # messages, which tests/test_launched.py checks
        for case, (others, centers, distances) in found.items():
            fine = fine and others == 0 and max(centers, distances) <= 1e-6
            print(f"{processes} | {case} | {others:.1e} | {centers:.1e} | {distances:.1e}", flush=True)
    print(f"clusters: {'certified' if fine else 'NOT certified'}")
    return fine


def select(scored: Dataset) -> list[int]:
    """Return the `id` of the rows that CLUSTER and SELECT take, best first."""
    chosen: list[int] = cluster_filter(scored, n1=40, n2=2)["id"][:]
    return chosen


def same_choice(mine: list[int], others: list[int], scores: np.ndarray, tolerance: float) -> bool:
    """Return True if two selections are equal, or differ only by rows whose scores are that near to each other."""
    if tolerance <= TOLERANCE:
        return mine == others
    swapped = [np.sort(scores[list(set(a) - set(b))]) for a, b in ((mine, others), (others, mine))]
    return len(swapped[0]) == len(swapped[1]) and bool((np.abs(swapped[0] - swapped[1]) <= 2 * tolerance).all())


def certify(folder: Path, runs: tuple[Run, ...] = RUNS) -> bool:
    """Score the sample in each of these runs, print a line for each, and return True if all agree with the first."""
    print("processes | batch | order | largest difference of a score | of an embedding | row order | selection")
    scores, vectors, chosen, fine = np.zeros(0), np.zeros(0), [0], True
    tolerance = runs[0].tolerance
    for number, run in enumerate(runs):
        found = score(run, folder / f"{run.dtype}-{number}")
        in_order = found["id"][:] == places(run.order, len(found))
        # Back in the order of the sample, to compare row by row.
        back = found.select(np.argsort(found["id"][:]).tolist())
        mine, my_vectors, my_choice = np.array(back["iqs_score"][:]), np.array(back["embedding"][:]), select(back)
        if number == 0:
            scores, vectors, chosen = mine, my_vectors, my_choice
        far, vectors_far = float(np.abs(mine - scores).max()), float(np.abs(my_vectors - vectors).max())
        same = same_choice(my_choice, chosen, scores, tolerance)
        fine = fine and in_order and same and max(far, vectors_far) <= tolerance
        said = ["identical" if value else "ANOTHER" for value in (in_order, same)]
        print(f"{run} | {far:.1e} | {vectors_far:.1e} | {said[0]} | {said[1]}", flush=True)
    verdict = "certified" if fine else "NOT certified"
    print(f"{len(scores)} rows, {len(chosen)} selected, tolerance {tolerance:.0e}: {verdict}")
    return fine


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="car-datasets-certify-") as temporary:
        if sys.argv[1:] == ["gpu"]:
            sys.exit(0 if certify(Path(temporary), GPU_RUNS) else 1)
        scores_agree = certify(Path(temporary))
        if torch.cuda.is_available():
            scores_agree = certify(Path(temporary), GPU_RUNS) and scores_agree
        clusters_agree = certify_clusters(Path(temporary) / "float32-0" / "scored.parquet")
        sys.exit(0 if scores_agree and clusters_agree else 1)
