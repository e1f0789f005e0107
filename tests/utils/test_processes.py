"""Ranks to devices, `.map` over spawned workers, and what cannot be spawned, on a machine without a GPU."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import multiprocess
import pytest
import torch
from datasets import Dataset

from car_datasets import ClusterModel, QualityScorer, cluster_filter, map_across_gpus, select_car
from car_datasets.scoring import inference
from car_datasets.utils import processes
from car_datasets.utils.processes import alone, device_for, from_main, is_main_process, process_rank, start_processes
from tests.conftest import ROOT


@pytest.mark.skipif(torch.accelerator.is_available(), reason="checks what happens without a GPU")
def test_without_a_gpu_every_rank_is_the_cpu() -> None:
    assert device_for(3) == device_for() == torch.device("cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_ranks_wrap_around_the_gpus() -> None:
    assert device_for(torch.cuda.device_count()) == torch.device("cuda", 0)


def test_alone_this_is_the_main_process() -> None:
    assert (process_rank(), is_main_process(), from_main(lambda: 3)) == ((0, 1), True, 3)


def test_getters_start_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a launcher, before the processes have met, and where no other process ever comes."""
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "nowhere"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "init_process_group", None)  # calling it would be a TypeError
    assert process_rank() == (1, 3)
    assert not is_main_process()
    with alone():
        assert process_rank() == (0, 1)
        assert is_main_process()
        start_processes()
        assert from_main(lambda: 3) == 3
    assert device_for().type in ("cpu", "cuda")
    assert not torch.distributed.is_initialized()
    monkeypatch.setattr(processes, "_accelerate_state", lambda: None)  # it would keep what it found for all other tests
    with pytest.raises(TypeError):
        start_processes()


@pytest.mark.parametrize("mpi", ["PMI", "OMPI_COMM_WORLD", "MV2_COMM_WORLD"])
def test_getters_know_the_launchers_that_start_processes_knows(mpi: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under mpirun every process would otherwise compute all rows, and print."""
    monkeypatch.setenv(f"{mpi}_SIZE", "3")
    monkeypatch.setenv(f"{mpi}_RANK", "2")
    assert process_rank() == (2, 3)
    assert not is_main_process()
    assert processes._is_launched()
    with pytest.raises(ValueError, match="a launcher started 3 processes already"):
        map_across_gpus(Dataset.from_dict({"a": [1]}), len, num_proc=2)


def test_processes_that_accelerate_does_not_see_meet_by_the_variables_of_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPUs accelerate reads those of torchrun alone."""
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "3")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "2")
    monkeypatch.setattr(processes, "_accelerate_state", lambda: None)
    met: list[Any] = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *how, **who: met.append((how, who)))
    start_processes()
    assert met == [(("gloo",), {"rank": 2, "world_size": 3})]


# --- map_across_gpus


def score_and_tell(batch: Any, rank: int, scorer: QualityScorer) -> dict[str, Any]:
    found = scorer(batch, rank)
    loads, count = inference.load_scorer.cache_info().misses, len(batch["output"])
    return {**found, "loads": [loads] * count, "rank": [rank] * count, "process": [os.getpid()] * count}


@pytest.mark.slow
def test_each_spawned_worker_loads_once_and_the_order_stays(
    tiny_iqs: str, pairs: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    rows = Dataset.from_dict({name: values * 4 for name, values in pairs.to_dict().items()})
    one = rows.map(QualityScorer(tiny_iqs), batched=True)  # torch has run here: forked workers would hang
    before = multiprocess.get_start_method(allow_none=True)
    tell = functools.partial(score_and_tell, scorer=QualityScorer(tiny_iqs))
    found = map_across_gpus(rows, tell, num_proc=2, batch_size=4)
    assert multiprocess.get_start_method(allow_none=True) == before
    assert found["iqs_score"][:] == pytest.approx(one["iqs_score"][:], abs=1e-5)
    assert found["output"][:] == rows["output"][:]
    assert set(found["loads"][:]) == {1}
    assert found["rank"][:] == [0] * 12 + [1] * 12
    assert len({*found["process"][:], os.getpid()}) == 3


def test_a_forked_worker_says_so_instead_of_hanging(tiny_iqs: str, pairs: Dataset) -> None:
    if multiprocess.get_start_method() != "fork":
        pytest.skip("this Python does not fork")
    device_for()
    with pytest.raises(ValueError, match="forked from a process that had run a model"):
        pairs.map(QualityScorer(tiny_iqs), batched=True, with_rank=True, num_proc=2)


@pytest.mark.parametrize(
    ("fn", "options", "message"),
    [
        (cluster_filter, {}, r"fn=cluster_filter needs all rows at once.*cluster_filter\(dataset, \.\.\.\)"),
        (functools.partial(select_car, n1=2), {}, "needs all rows at once"),
        (ClusterModel.fit, {}, r"fn=ClusterModel\.fit needs all rows at once"),
        (device_for, {"batch_size": None}, "needs all rows at once"),
        (device_for, {"num_proc": 0}, "num_proc=0"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(pairs: Dataset, fn: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        map_across_gpus(pairs, fn, **{"num_proc": 2, **options})


def test_streams_and_launched_processes_are_refused(
    tiny_iqs: str, pairs: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="IterableDataset, which has no num_proc"):
        map_across_gpus(pairs.to_iterable_dataset(), QualityScorer(tiny_iqs), num_proc=2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"a launcher started 2 processes already.*score_in_shards"):
        map_across_gpus(pairs, QualityScorer(tiny_iqs), num_proc=2)


SCRIPT = """
import sys
from datasets import Dataset
from car_datasets import map_across_gpus

def upper(batch):
    return {"b": [text.upper() for text in batch["a"]]}

def main():
    print(map_across_gpus(Dataset.from_dict({"a": ["x", "y"]}), upper, num_proc=2)["b"][:])
"""
GUARD = 'if __name__ == "__main__":\n    main()\n'


def run(*command: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command],
        env=environment,
        input=text,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.slow
def test_a_guarded_script_runs_and_an_unguarded_one_is_told(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text(SCRIPT + GUARD)
    done = run(str(tmp_path / "good.py"))
    assert done.stdout == "['X', 'Y']\n", done.stderr
    (tmp_path / "bad.py").write_text(SCRIPT + "main()\n")
    done = run(str(tmp_path / "bad.py"))
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith('would start workers again. Put the call under `if __name__ == "__main__":`.')
    assert 'bad.py", line 11' in done.stderr


@pytest.mark.parametrize("command", [["-"], ["-c", SCRIPT + "main()\n"]])
def test_a_callable_of_a_notebook_is_told_to_move(command: list[str]) -> None:
    done = run(*command, text=SCRIPT + "main()\n")  # a pipe and a prompt have no file, as a notebook has none
    assert done.returncode == 1
    assert "fn=upper is defined in a notebook, a prompt or a pipe" in done.stderr
    assert "%%writefile" in done.stderr


FORKS_AFTER_CLUSTERING = """
import numpy as np
from datasets import Dataset
from car_datasets import ClusterModel, QualityScorer
ClusterModel.fit(Dataset.from_dict({"embedding": list(np.random.default_rng(0).normal(size=(300, 16)))}), k=5, kmeans=ENGINE)
rows = Dataset.from_dict({"instruction": ["a"] * 8, "output": ["b"] * 8})
rows.map(QualityScorer(MODEL), batched=True, num_proc=2)
"""


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", "sklearn"])
def test_a_worker_forked_after_clustering_says_so_instead_of_hanging(tiny_iqs: str, engine: str) -> None:
    if multiprocess.get_start_method() != "fork":
        pytest.skip("this Python does not fork")
    code = FORKS_AFTER_CLUSTERING.replace("MODEL", repr(tiny_iqs)).replace("ENGINE", repr(engine))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert "forked from a process that had run a model" in done.stderr
