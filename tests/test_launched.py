"""`torchrun` and `accelerate launch`: all processes get equal results, one writes and prints, a crash ends them all."""

from __future__ import annotations

import json
import os
import re
import runpy
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from datasets import Dataset

from car_datasets import ClusterModel, QualityScorer, TextEmbedder, curate, load_instructions
from car_datasets.results import CURATED_FILES
from car_datasets.scoring.stage import add_columns
from tests.conftest import ROOT, WORDS
from tests.test_marking import records
from tests.workers import run_ranks

# More ranks than GPUs is an error of NCCL; without one they communicate by gloo.
pytestmark = pytest.mark.usefixtures("on_cpu")

TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node"]
# Without a GPU `--cpu` would start one process whatever --num_processes says; `--multi_gpu` starts them all, on gloo.
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the path of 600 rows, which make five shards."""
    words = [word for word in WORDS if word.isalpha()]
    content = [  # no two alike: equal scores would be ranked by their last bit
        {
            "instruction": f"Write {words[i % 20]} of {words[i // 20 % 20]}",
            "output": " ".join(words[i // 400 : 3 + i % 9]),
        }
        for i in range(600)
    ]
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def launch(
    how: list[str], count: int, *command: str, bars: bool = False, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["HF_DATASETS_DISABLE_PROGRESS_BARS"] = str(int(not bars))
    line = [sys.executable, "-m", *how, str(count), *command]
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=150, check=False, cwd=cwd)


def read(path: Path, cache: Path) -> Dataset:
    return Dataset.from_parquet(str(path), cache_dir=str(cache))


@pytest.mark.slow
@pytest.mark.parametrize(("how", "count"), [(TORCHRUN, 2), (TORCHRUN, 3), (ACCELERATE, 2)])
def test_curate_gives_what_one_process_gives(
    tiny_iqs: str, tiny_embedder: str, rows: Path, tmp_path: Path, how: list[str], count: int
) -> None:
    curate(str(rows), tmp_path / "one", scorer=tiny_iqs, embedder=tiny_embedder, n1=50, n2=2)
    models = ["--scorer", tiny_iqs, "--embedder", tiny_embedder, "--n1", "50", "--n2", "2"]
    arguments = ["-m", "car_datasets", "curate", str(rows), "--output", str(tmp_path / "many"), *models]
    done = launch(how, count, *arguments, "--shards", str(tmp_path / "shards"), bars=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("The selection is in") == 1
    for bar in ("Scoring", "Embedding", "Clustering"):
        assert len(re.findall(rf"{bar}: 100%\S* 600/600", done.stderr)) in (1, 2)  # the last line is drawn twice
        assert len(re.findall(rf"{bar}: +0%.* 0/600 ", done.stderr)) == 1  # the first line, drawn by one process
    assert_same(tmp_path / "one", tmp_path / "many", tmp_path)
    assert sorted(path.name for path in (tmp_path / "shards" / "scores").iterdir()) == [
        "manifest.json",
        *(f"part-{i:05d}.arrow" for i in range(5)),
    ]


TOP_UP = """
import json, sys
from car_datasets import curate, top_up
folder, settings = json.loads(sys.argv[1])
curate("old.json", f"{folder}/old", **settings)
again = {name: settings[name] for name in ("scorer", "embedder", "against")}
top_up(f"{folder}/old", "new.json", f"{folder}/all", **again)
"""


@pytest.mark.slow
def test_marks_and_a_top_up_are_those_of_one_process(
    tiny_iqs: str, tiny_embedder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = records()
    exam = [{"question": made[row]["output"]} for row in (12, 38)]
    for name, content in {"old.json": made[:34], "new.json": made[34:], "exam.json": exam}.items():
        Path(name).write_text(json.dumps(content))
    Path("script.py").write_text(TOP_UP)
    settings = {"scorer": tiny_iqs, "embedder": tiny_embedder, "k": 4, "budget": 10, "keep_embeddings": True}
    settings |= {"keep": "gold", "within": "kind", "against": ["exam.json"]}
    done = launch(ACCELERATE, 2, "script.py", json.dumps(["many", settings]))
    assert done.returncode == 0, done.stderr[-3000:]
    monkeypatch.setattr(sys, "argv", ["script.py", json.dumps(["one", settings])])
    runpy.run_path("script.py")
    for name in ("old", "all"):
        one, many = (read(Path(folder, name, "scored.parquet"), tmp_path) for folder in ("one", "many"))
        assert one.column_names == many.column_names
        for column in ("source_index", "pinned", "contaminated_by", "kind", "cluster"):
            assert one[column][:] == many[column][:], column
        chosen = [read(Path(n, name, "selected.parquet"), tmp_path)["source_index"][:] for n in ("one", "many")]
        assert chosen[0] == chosen[1]
    assert {one["contaminated_by"][row] for row in (12, 38)} == {"exam:0", "exam:1"}
    assert one["duplicate_of"][:] == many["duplicate_of"][:]
    assert sum(of is not None for of in one["duplicate_of"][:]) == 2


def assert_same(one: Path, many: Path, cache: Path) -> None:
    """Assert that two results of `curate` have the same rows in order, and scores and embeddings within 1e-5."""
    scored = [read(folder / "scored.parquet", cache) for folder in (one, many)]
    assert scored[0].column_names == scored[1].column_names
    assert np.allclose(scored[0]["iqs_score"][:], scored[1]["iqs_score"][:], atol=1e-5)
    assert np.allclose(scored[0]["embedding"][:], scored[1]["embedding"][:], atol=1e-5)
    for name in ("source_index", "instruction", "iqs_tokens", "cluster"):
        assert scored[0][name][:] == scored[1][name][:], name
    chosen = [read(folder / "selected.parquet", cache)["source_index"][:] for folder in (one, many)]
    assert chosen[0] == chosen[1]


def on_machine(how: str, number: int, port: int) -> list[str]:
    """Return a launcher's command on one of two machines of one process each, which meet at a port of this one."""
    if how == "torchrun":
        meet = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{port}", "--rdzv_id", "test"]
        return ["torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", *meet]
    meet = ["--machine_rank", str(number), "--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    return ["accelerate.commands.launch", "--multi_gpu", "--num_machines", "2", "--num_processes", "2", *meet]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["torchrun", "accelerate"])
def test_two_machines_give_what_one_process_gives(
    tiny_iqs: str, tiny_embedder: str, rows: Path, tmp_path: Path, how: str
) -> None:
    curate(str(rows), tmp_path / "one", scorer=tiny_iqs, embedder=tiny_embedder, n1=50, n2=2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    models = ["--scorer", tiny_iqs, "--embedder", tiny_embedder, "--n1", "50", "--n2", "2"]
    places = ["--output", str(tmp_path / "two"), "--shards", str(tmp_path / "shards")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = ["-m", "car_datasets", "curate", str(rows), *places, *models]
    launchers = [
        subprocess.Popen(
            [sys.executable, "-m", *on_machine(how, i, port), *command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    ends = [launcher.communicate(timeout=240) for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], ends
    assert sum(output.count("The selection is in") for output, _ in ends) == 1
    assert_same(tmp_path / "one", tmp_path / "two", tmp_path)


SBATCH = ROOT / "configs" / "slurm_array.sbatch"


@pytest.mark.slow
def test_the_slurm_array_runs_without_slurm(sample_file: Path, tmp_path: Path) -> None:
    """Run two tasks that score at once, then the last one, which merges, on the shipped sample and models."""
    curate(str(sample_file), tmp_path / "one", n1=0.05, n2=1)
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "car-datasets"  # as an installed package has it
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m car_datasets "$@"\n')
    command.chmod(0o755)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"PATH": f"{command.parent}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_MAX": "2"}

    def task(number: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(SBATCH), str(sample_file), str(tmp_path / "run"), "--batch-tokens", "2048"],
            env={**environment, "SLURM_ARRAY_TASK_ID": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def parts() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run" / "shards" / "scores").iterdir()}

    scoring = [task(0), task(1)]
    said = [worker.communicate(timeout=240) for worker in scoring]
    assert [worker.returncode for worker in scoring] == [0, 0], said
    for output, _ in said:
        assert re.fullmatch(r"\S+/shards/scores holds \d+ of 384 rows; [^\n]+\.\n", output), output
    assert any("holds 384 of 384 rows; none is left" in output for output, _ in said)
    assert not (tmp_path / "run" / "result").exists()
    before = parts()
    assert len([name for name in before if name.startswith("part-")]) == 3
    last = task(2)
    output, errors = last.communicate(timeout=240)
    assert last.returncode == 0, errors
    assert "The selection is in" in output
    assert parts() == before  # nothing was scored again
    assert_same(tmp_path / "one", tmp_path / "run" / "result", tmp_path)


def test_the_slurm_array_says_its_command_and_parses() -> None:
    text = SBATCH.read_text(encoding="utf-8")
    assert "#   sbatch configs/slurm_array.sbatch " in text.split("#SBATCH")[0]
    assert subprocess.run(["bash", "-n", str(SBATCH)], check=False).returncode == 0


SCRIPT = """
import sys, torch
from datasets import Dataset
from accelerate import Accelerator, PartialState
if "accelerator-first" in sys.argv:
    Accelerator()
from car_datasets import curate
from car_datasets.utils.processes import from_main, is_main_process, process_rank
source, output, scorer, embedder = sys.argv[1:5]
selected, scored, report = curate(source, output, scorer=scorer, embedder=embedder, n1=20, keep_embeddings=False)
scored.to_parquet(f"{output}-{process_rank()[0]}.parquet")
selected.to_parquet(f"{output}-selected-{process_rank()[0]}.parquet")
try:
    from_main(lambda: 1 / 0)
except ZeroDivisionError:
    sys.stdout.write(f"rank {process_rank()} was told\\n")  # one write: print writes the line end apart
if is_main_process():
    sys.stdout.write("main\\n")
"""


@pytest.mark.slow
@pytest.mark.parametrize("option", ["", "accelerator-first"])
def test_a_script_sees_the_same_on_every_rank(
    tiny_iqs: str, tiny_embedder: str, rows: Path, tmp_path: Path, option: str
) -> None:
    arguments = [str(rows), str(tmp_path / "out"), tiny_iqs, tiny_embedder, option]
    ranks = run_ranks(3, ["-c", SCRIPT, *arguments])
    assert [done.returncode for done in ranks] == [0] * 3, ranks
    assert [re.findall(r"rank \((\d), 3\) was told", done.stdout) for done in ranks] == [["0"], ["1"], ["2"]]
    assert ["main\n" in done.stdout for done in ranks] == [True, False, False]
    for name in ("", "-selected"):
        files = [(tmp_path / f"out{name}-{rank}.parquet").read_bytes() for rank in range(3)]
        assert files[0] == files[1] == files[2]
    assert (tmp_path / "out" / "report.json").is_file()


CRASH = """
import os, sys, time
from car_datasets import QualityScorer
from car_datasets.utils.processes import from_main
ordinary = QualityScorer.__call__
kind, rank = sys.argv[3:5]
def broken(self, batch, rank_of_map=None):
    if os.environ["RANK"] == rank:
        raise getattr(__builtins__, kind)("rank %s has lost its GPU" % rank)
    time.sleep(1)
    return ordinary(self, batch)
from_main(lambda: None)  # all start together
QualityScorer.__call__ = broken
from car_datasets.cli import app
app(["score", sys.argv[1], "--output", sys.argv[5], "--scorer", sys.argv[2], "--no-embeddings"]
    + ["--shards", sys.argv[5] + ".shards"])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "rank", "message"),
    [("RuntimeError", 0, "RuntimeError: "), ("RuntimeError", 1, "RuntimeError: "), ("ValueError", 1, "car-datasets: ")],
)
def test_a_crash_on_one_rank_ends_all_with_its_message(
    tiny_iqs: str, rows: Path, tmp_path: Path, kind: str, rank: int, message: str
) -> None:
    (tmp_path / "crash.py").write_text(CRASH)
    arguments = [str(rows), tiny_iqs, kind, str(rank), str(tmp_path / "out.parquet")]
    done = launch(TORCHRUN, 2, str(tmp_path / "crash.py"), *arguments)
    assert done.returncode != 0
    assert f"{message}rank {rank} has lost its GPU" in done.stderr
    assert not (tmp_path / "out.parquet").exists()


SLOW = """
import sys, time
from car_datasets import QualityScorer
ordinary = QualityScorer.__call__
QualityScorer.__call__ = lambda self, batch, rank=None: (time.sleep(1), ordinary(self, batch, rank))[1]
from car_datasets.cli import app
app(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["launcher", "rank"])
def test_a_killed_launcher_or_rank_ends_the_others_and_the_same_command_resumes(
    tiny_iqs: str, tiny_embedder: str, rows: Path, tmp_path: Path, victim: str
) -> None:
    models = ["--scorer", tiny_iqs, "--embedder", tiny_embedder, "--n1", "50"]

    def arguments(name: str) -> list[str]:
        places = ["--output", str(tmp_path / name), "--shards", str(tmp_path / f"{name}-shards")]
        return [str(tmp_path / "slow.py"), "curate", str(rows), *places, *models]

    (tmp_path / "slow.py").write_text(SLOW)
    assert launch(TORCHRUN, 2, *arguments("whole")).returncode == 0
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launcher = subprocess.Popen(
        [sys.executable, "-m", *TORCHRUN, "2", *arguments("killed")], env=environment, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed-shards").glob("scores/part-*")):
        assert time.monotonic() < deadline
        assert launcher.poll() is None
        time.sleep(0.05)
    ranks = psutil.Process(launcher.pid).children()
    assert len(ranks) == 2
    (launcher if victim == "launcher" else ranks[1]).kill()
    assert launcher.wait(60) != 0
    assert psutil.wait_procs(ranks, timeout=60)[1] == []  # none is left hanging
    done = launch(TORCHRUN, 2, *arguments("killed"))
    assert done.returncode == 0, done.stderr[-3000:]
    for name in CURATED_FILES:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.fixture(scope="module")
def sample_embeddings(sample_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the path of embeddings of the rows that the package ships."""
    found = add_columns(load_instructions(str(sample_file)), TextEmbedder(), "Embedding")
    path = tmp_path_factory.mktemp("embeddings") / "sample.parquet"
    found.select_columns(["embedding"]).to_parquet(path)
    return path


TOLD = [  # on every rank, of what is wrong with all or with one
    r"ValueError: .* not finite in 3 rows, the first \[70, 200, 399\]\.",
    r"ValueError: .* embeddings of the lengths \[8, 12\]",
    r"ValueError: .* holds no embeddings, only nulls\.",
    r"ValueError: k=401 must be .* the 400 rows",
    r"ValueError: .* no column 'vector'",
    r"RuntimeError: rank 1 has lost its disk",
    *[r"ValueError: dataset: process 1 of \d fits clusters to other rows or in another way"] * 5,
    r"ValueError: .* not finite in 1 rows",
    *[r"ValueError: dataset: process 1 of \d labels other rows or in another way"] * 2,
]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_clusters_are_those_of_one_process(sample_embeddings: Path, count: int) -> None:
    ranks = run_ranks(count, ["-m", "tests.together", str(sample_embeddings)])
    assert [done.returncode for done in ranks] == [0] * count, ranks
    found = json.loads("".join(done.stdout for done in ranks))
    told = found.pop("errors")
    assert len(found) == 16
    for name, (other_labels, centers, distances) in found.items():
        assert other_labels == 0, name
        assert max(centers, distances) <= 1e-6, name
    assert len(told) == count
    for messages in told:
        assert len(messages) == len(TOLD)
        for message, pattern in zip(messages, TOLD, strict=True):
            assert re.match(pattern, message), message


@pytest.mark.slow
def test_the_command_cluster_shares_and_says_it_once(tiny_embedder: str, rows: Path, tmp_path: Path) -> None:
    """Cluster rows without embeddings, as in the original's scored files; the model is saved once."""
    found = {}
    for count in (1, 2):
        output, saved = tmp_path / f"{count}.parquet", tmp_path / f"model-{count}"
        arguments = ["cluster", str(rows), "--output", str(output), "--save-model", str(saved), "--k", "9"]
        done = launch(TORCHRUN, count, "-m", "car_datasets", *arguments, "--embedder", tiny_embedder, bars=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("600 rows are in") == 1
        assert len(re.findall(r"Embedding: +0%", done.stderr)) == len(re.findall(r"Clustering: +0%", done.stderr)) == 1
        found[count] = read(output, tmp_path / f"cache-{count}"), ClusterModel.from_pretrained(saved)
    assert found[1][0]["cluster"][:] == found[2][0]["cluster"][:]
    np.testing.assert_allclose(found[1][1].centers, found[2][1].centers, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("run", range(5))
def test_a_short_script_ends_well(tmp_path: Path, run: int) -> None:
    """Run a script that ends at once, which gloo ended by SIGABRT every other time without our cleanup."""
    (tmp_path / "short.py").write_text("from car_datasets.utils.processes import from_main\nfrom_main(lambda: None)\n")
    done = launch(TORCHRUN, 2, str(tmp_path / "short.py"))
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_a_mistake_of_all_is_said_once(tiny_iqs: str, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('[{"instruction": "a", "output": null}]')
    arguments = ["score", str(tmp_path / "rows.json"), "--output", str(tmp_path / "o.parquet"), "--scorer", tiny_iqs]
    done = launch(TORCHRUN, 2, "-m", "car_datasets", *arguments)
    assert done.returncode != 0
    assert done.stderr.count("car-datasets: 1 of 1 rows cannot be scored") == 1


def test_one_process_of_a_launcher_is_like_none(tiny_iqs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    from car_datasets.utils.processes import process_rank

    assert process_rank() == (0, 1)
    assert QualityScorer(tiny_iqs).score_texts([]).scores.shape == (0,)


@pytest.mark.slow
def test_processes_of_mpi_share_the_scoring(tiny_iqs: str, rows: Path, tmp_path: Path) -> None:
    """Set only the variables of Open MPI, with which each process once scored all rows by itself."""
    shards = tmp_path / "shards"
    arguments = ["score", str(rows), "--output", str(tmp_path / "out.parquet"), "--scorer", tiny_iqs]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "HF_DATASETS_CACHE": str(shards)}
    started = []
    for rank in "01":
        mpi = {f"OMPI_COMM_WORLD_{name}": rank for name in ("RANK", "LOCAL_RANK")}
        mpi |= {f"OMPI_COMM_WORLD_{name}": "2" for name in ("SIZE", "LOCAL_SIZE")}
        command = [sys.executable, "-m", "car_datasets", *arguments, "--no-embeddings"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, env={**environment, **mpi}, text=True, **pipes))
    ends = [process.communicate(timeout=150) for process in started]
    assert [process.returncode for process in started] == [0, 0], ends
    assert [output.count("600 rows are in") for output, _ in ends] == [1, 0]
    assert len(list(shards.rglob("part-*.arrow"))) == 5  # in one folder, that both have filled
    assert len(read(tmp_path / "out.parquet", tmp_path / "cache")) == 600
