"""SIGKILL anywhere, then the same call: the files of an undisturbed run, byte for byte, and no shard scored in vain."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import psutil
import pytest
from datasets.arrow_writer import ArrowWriter

from car_datasets import ClusterModel, QualityScorer, SelectionReport, curate
from car_datasets.results import RESULT_FILES
from car_datasets.scoring.shards import run, storage
from car_datasets.utils.files import UNFINISHED
from tests.conftest import WORDS
from tests.workers import WORKERS

pytestmark = pytest.mark.slow
ROWS, SHARD = 80, 8
ROUNDS = 24


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 rows, no two alike: ten shards."""
    words = [word for word in WORDS if word.isalpha()]
    content = [
        {"instruction": f"Write {words[i % 20]} of {words[i // 20]}", "output": " ".join(words[: 2 + i % 9])}
        for i in range(ROWS)
    ]
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def prepare(log: Path) -> None:
    """In a child: small shards that take a while, each noted when it is scored, and claims that expire soon."""
    run.SMALLEST = SHARD
    run.score_in_shards.__kwdefaults__["expiry"] = 1.0
    ordinary = QualityScorer.__call__

    def noted(self: QualityScorer, batch: Any, rank: int | None = None) -> Any:
        with log.open("a", encoding="utf-8") as file:
            file.write(f"{os.getpid()} {batch['source_index'][0]}\n")
        time.sleep(0.03)
        return ordinary(self, batch, rank)

    QualityScorer.__call__ = noted


def road(source: Path, work: Path, models: dict[str, str], spoil: Callable[[], None] | None = None) -> None:
    """The command that is killed and run again."""
    prepare(work / "log")
    if spoil is not None:
        spoil()
    curate(source, work / "out", n1=10, n2=2, shard_dir=work / "shards", **models)


def help_scoring(source: Path, work: Path, models: dict[str, str]) -> None:
    """Another worker on the same shards, as on another machine: it ends where the main one would cluster."""
    ClusterModel.fit = lambda *arguments, **options: (_ for _ in ()).throw(SystemExit(0))
    road(source, work, models)


def parent_of_two(source: Path, work: Path, models: dict[str, str]) -> None:
    for task in (road, help_scoring):
        if os.fork() == 0:
            task(source, work, models)
            os._exit(0)
    time.sleep(600)


def begin(task: Callable[..., None], *arguments: Any) -> Any:
    worker = WORKERS.Process(target=task, args=arguments)
    worker.start()
    return worker


def again(source: Path, work: Path, models: dict[str, str]) -> None:
    """The same command once more, unless it was through; nobody waits for long."""
    if (work / "out" / "report.json").exists() and not (work / "out" / UNFINISHED).exists():
        return
    worker = begin(road, source, work, models)
    worker.join(60)
    assert worker.exitcode == 0


def contents(work: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (work / "out").iterdir()}


def scored(work: Path) -> int:
    return len((work / "log").read_text().splitlines()) if (work / "log").exists() else 0


@pytest.fixture(scope="module")
def undisturbed(
    rows: Path, tiny_iqs: str, tiny_embedder: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, bytes], dict[str, str], float]:
    """The files of a run that nobody killed, its models, and the seconds that it took."""
    models, work = {"scorer": tiny_iqs, "embedder": tiny_embedder}, tmp_path_factory.mktemp("undisturbed")
    begin(nothing).join(60)  # the server imports, which is no part of the time
    start = time.monotonic()
    again(rows, work, models)
    seconds = time.monotonic() - start
    assert sorted(contents(work)) == sorted(RESULT_FILES)
    assert scored(work) == ROWS // SHARD
    return contents(work), models, seconds


def nothing() -> None:
    """What a child does while its server starts."""


# --- at a known point


class KillAt:
    """Replace `owner.name` by a function that dies by SIGKILL at its n-th call of interest, before or after its work."""

    def __init__(self, owner: str, name: str, nth: int = 1, target: str = "", after: bool = False) -> None:
        self.owner, self.name, self.nth, self.target, self.after = owner, name, nth, target, after

    def __call__(self) -> None:
        owner = OWNERS[self.owner]
        ordinary, seen = getattr(owner, self.name), [0]

        def deadly(*arguments: Any, **options: Any) -> Any:
            seen[0] += self.target in " ".join(map(str, arguments))
            if seen[0] == self.nth and not self.after:
                if self.owner == "claims":
                    Path(arguments[0]).touch()  # between the making of the file and its writing
                os.kill(os.getpid(), signal.SIGKILL)
            found = ordinary(*arguments, **options)
            if seen[0] == self.nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        setattr(owner, self.name, deadly)


OWNERS = {
    "claims": storage,
    "writer": ArrowWriter,
    "os": os,
    "datasets": datasets,
    "clusters": ClusterModel,
    "report": SelectionReport,
    "path": Path,
}


@pytest.mark.parametrize(
    "spoil",
    [
        KillAt("os", "replace", target="manifest.json"),
        KillAt("os", "replace", target="manifest.json", after=True),
        KillAt("claims", "_create", nth=4),
        KillAt("claims", "_create", nth=4, after=True),
        KillAt("writer", "finalize", nth=3),
        KillAt("os", "replace", nth=3, target="part-"),
        KillAt("os", "replace", nth=3, target="part-", after=True),
        KillAt("datasets", "concatenate_datasets"),
        KillAt("clusters", "fit"),
        KillAt("report", "from_overview"),
        KillAt("os", "replace", target="scored.parquet"),
        KillAt("os", "replace", target="selected.json"),
        KillAt("report", "pictures"),
        KillAt("os", "replace", target="plot_map.png", after=True),
        KillAt("os", "replace", target="report.html"),
        KillAt("os", "replace", target="report.json", after=True),
    ],
    ids=lambda spoil: f"{spoil.owner}.{spoil.name}-{spoil.target}-{'after' if spoil.after else 'before'}",
)
def test_killed_at_a_known_point(
    rows: Path, undisturbed: tuple[dict[str, bytes], dict[str, str], float], tmp_path: Path, spoil: KillAt
) -> None:
    files, models, _ = undisturbed
    worker = begin(road, rows, tmp_path, models, spoil)
    worker.join(60)
    assert worker.exitcode == -signal.SIGKILL
    again(rows, tmp_path, models)
    assert contents(tmp_path) == files
    assert scored(tmp_path) <= ROWS // SHARD + 1
    for stage in ("scores", "embeddings"):
        left = sorted(path.name for path in (tmp_path / "shards" / stage).iterdir())
        assert left == ["manifest.json", *(f"part-{i:05d}.arrow" for i in range(10))]


# --- at any point


def children(pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(pid).children()]


@pytest.mark.parametrize("number", range(ROUNDS))
def test_killed_at_any_point(
    rows: Path, undisturbed: tuple[dict[str, bytes], dict[str, str], float], tmp_path: Path, number: int
) -> None:
    files, models, seconds = undisturbed
    chance = random.Random(number)
    who = ("all", "one", "parent")[number % 3]
    if who == "parent":
        parent = begin(parent_of_two, rows, tmp_path, models)
        time.sleep(chance.uniform(0, 1.2 * seconds))
        orphans = children(parent.pid)
        os.kill(parent.pid, signal.SIGKILL)
        killed = 0  # the orphans go on, beside the same command or before it
        for orphan in orphans:
            if chance.random() < 0.5:
                with contextlib.suppress(ProcessLookupError):  # it was through
                    os.kill(orphan, signal.SIGKILL)
                killed += 1
            else:
                psutil.wait_procs([p for p in psutil.process_iter() if p.pid == orphan], timeout=60)
    else:
        workers = [begin(task, rows, tmp_path, models) for task in (road, help_scoring)[: chance.choice((1, 2))]]
        time.sleep(chance.uniform(0, 1.2 * seconds))
        victims = workers if who == "all" else [chance.choice(workers)]
        killed = len(victims)
        for victim in victims:
            victim.kill()
        for worker in workers:
            worker.join(60)
            assert worker.exitcode is not None
    again(rows, tmp_path, models)
    assert contents(tmp_path) == files
    assert scored(tmp_path) <= ROWS // SHARD + killed
