"""processes.py: ranks to devices, shares of rows, and a single process; tests/test_launched.py starts several."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from datasets import Dataset

from car_datasets import map_across_gpus
from car_datasets.utils import processes
from car_datasets.utils.processes import (
    Processes,
    _attempt,
    all_processes,
    alone,
    device_for,
    from_main,
    is_main_process,
    process_rank,
    start_processes,
)
from tests.conftest import ROOT


@pytest.mark.usefixtures("on_cpu")
def test_without_a_gpu_every_rank_is_the_cpu() -> None:
    assert device_for(3) == device_for() == torch.device("cpu")


def test_ranks_wrap_around_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare names of devices, which needs no GPU."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [device_for(rank) for rank in range(4)] == [torch.device("cuda", i) for i in (0, 1, 0, 1)]
    for name, value in {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert device_for() == torch.device("cuda", 1)


def test_alone_this_is_the_main_process() -> None:
    assert (process_rank(), is_main_process(), from_main(lambda: 3)) == ((0, 1), True, 3)


def test_getters_start_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Call the getters in the environment of a launcher whose other processes never join."""
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


@pytest.mark.parametrize("rows", [0, 1, 2, 5, 64, 65, 1_000])
@pytest.mark.parametrize("step", [1, 7, 64])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_shares_are_all_rows_in_order_cut_at_steps(rows: int, step: int, count: int) -> None:
    shares = [Processes(rank, count).share(rows, step) for rank in range(count)]
    assert [row for share in shares for row in share] == list(range(rows))
    assert all(share.start % step == 0 for share in shares)
    steps = [-(-len(share) // step) for share in shares]
    assert max(steps) - min(steps) <= 1


@pytest.mark.parametrize("mpi", ["PMI", "OMPI_COMM_WORLD", "MV2_COMM_WORLD"])
def test_getters_know_the_launchers_that_start_processes_knows(mpi: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read the variables of mpirun, or every process would compute all rows, and print."""
    monkeypatch.setenv(f"{mpi}_SIZE", "3")
    monkeypatch.setenv(f"{mpi}_RANK", "2")
    assert process_rank() == (2, 3)
    assert not is_main_process()
    assert processes._is_launched()
    with pytest.raises(ValueError, match="a launcher started 3 processes already"):
        map_across_gpus(Dataset.from_dict({"a": [1]}), len, num_proc=2)


def test_processes_that_accelerate_does_not_see_meet_by_the_variables_of_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the variables of MPI alone; on GPUs accelerate reads only those of torchrun."""
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "3")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "2")
    monkeypatch.setattr(processes, "_accelerate_state", lambda: None)
    met: list[Any] = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *how, **who: met.append((how, who)))
    start_processes()
    assert met == [(("gloo",), {"rank": 2, "world_size": 3})]


@pytest.mark.parametrize(
    ("cards", "count", "environment", "refused"),
    [
        (1, 2, {}, True),
        (2, 3, {"CUDA_VISIBLE_DEVICES": "0,1"}, True),
        (2, 2, {}, False),
        (0, 2, {}, False),  # gloo
        (1, 2, {"CUDA_VISIBLE_DEVICES": "1"}, False),  # may be another one in the other process
        (1, 2, {"ACCELERATE_USE_CPU": "true"}, False),
    ],
)
def test_more_processes_than_gpus_are_refused_before_they_meet(
    cards: int, count: int, environment: dict[str, str], refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    ranks = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    for name, value in {**ranks, **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cards > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "NVIDIA X")
    monkeypatch.setattr(processes, "_accelerate_state", lambda: None)
    met: list[Any] = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *how, **who: met.append(who))
    if not refused:
        start_processes()
        assert len(met) == 1
        return
    with pytest.raises(
        ValueError, match=rf"ranks 0 to {count - 1} .*cuda:0 \(NVIDIA X\).*--nproc_per_node {cards} "
    ) as error:
        start_processes()
    assert "\n" not in str(error.value)
    assert met == []


def test_alone_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "new_group", None)
    with all_processes() as group:
        assert group == Processes(0, 1)
        assert group.barrier(lambda: 3) == 3
        assert group.gather(lambda: 3, lambda found: found) == [3]
        total = torch.ones(2)
        assert group.all_reduce(lambda: total) is total
        with pytest.raises(ZeroDivisionError):
            group.gather(lambda: 1 / 0, len)


class Unpicklable(ValueError):
    def __init__(self, code: int, why: str) -> None:
        super().__init__(why)
        self.code = code


@pytest.mark.parametrize(
    ("error", "sent"),
    [(ValueError("no"), "ValueError('no')"), (Unpicklable(3, "no"), "RuntimeError('Unpicklable: no')")],
)
def test_an_error_can_be_sent(error: Exception, sent: str) -> None:
    def fail() -> None:
        raise error

    assert repr(_attempt(fail)[1]) == sent


WORKER = """
import os, time
from pathlib import Path
from car_datasets.utils.processes import device_for

def work(batch, rank):
    device_for(rank)
    Path("worker").write_text(str(os.getpid()))
    time.sleep(600)
"""
PARENT = """
from datasets import Dataset
from car_datasets import map_across_gpus
from worker_module import work

if __name__ == "__main__":
    map_across_gpus(Dataset.from_dict({"a": [1, 2]}), work, num_proc=2)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the system ends the workers on Linux only")
def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "worker_module.py").write_text(WORKER)
    (tmp_path / "parent.py").write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    parent = subprocess.Popen([sys.executable, "parent.py"], cwd=tmp_path, env=environment)
    deadline = time.monotonic() + 120
    while not (tmp_path / "worker").exists() or not (tmp_path / "worker").read_text():
        assert parent.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    worker = psutil.Process(int((tmp_path / "worker").read_text()))
    parent.kill()
    parent.wait(60)
    while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)
