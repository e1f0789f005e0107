"""SIGKILL at any point, then the same call: the bytes of an undisturbed run, and no shard is scored in vain."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import psutil
import pytest
import torch
from datasets.arrow_writer import ArrowWriter

from car_datasets import ClusterModel, QualityScorer, SelectionReport, curate
from car_datasets.results import CURATED_FILES
from car_datasets.scoring.shards import run, storage
from car_datasets.utils.files import UNFINISHED
from tests.conftest import WORDS
from tests.workers import WORKERS

pytestmark = pytest.mark.slow
ROWS, SHARD = 48, 8
LANES = 2  # processes that kill runs at the same time
FORKS = multiprocessing.get_context("fork")  # a lane has run nothing, so its forks are as good as the server's


class Undisturbed(NamedTuple):
    """A run that nobody killed.

    Args:
        source: the file of rows.
        models: the options of `curate` that name models.
        files: content of each file of the result.
        seconds: that the run took.
    """

    source: Path
    models: dict[str, str]
    files: dict[str, bytes]
    seconds: float


@pytest.fixture(scope="module")
def undisturbed(tiny_iqs: str, tiny_embedder: str, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Return the result for 48 rows, no two alike, which make six shards."""
    work = tmp_path_factory.mktemp("undisturbed")
    words = [word for word in WORDS if word.isalpha()]
    content = [
        {"instruction": f"Write {words[i % 20]} of {words[i // 20]}", "output": " ".join(words[: 2 + i % 9])}
        for i in range(ROWS)
    ]
    source = work / "rows.json"
    source.write_text(json.dumps(content), encoding="utf-8")
    models = {"scorer": tiny_iqs, "embedder": tiny_embedder}
    lane = WORKERS.Process(target=run_undisturbed, args=(source, work, models))
    lane.start()
    lane.join(120)
    assert lane.exitcode == 0
    assert sorted(contents(work)) == sorted(CURATED_FILES)
    assert scored(work) == ROWS // SHARD
    return Undisturbed(source, models, contents(work), float((work / "seconds").read_text()))


def run_undisturbed(source: Path, work: Path, models: dict[str, str]) -> None:
    start = time.monotonic()  # the server has done all imports by now
    again(source, work, models)
    (work / "seconds").write_text(str(time.monotonic() - start))


def prepare(log: Path) -> None:
    """Set up a child: small shards that take a while, each noted when it is scored, and claims that expire soon."""
    torch.set_num_threads(1)  # two lanes with two threads each would wait for each other on two cores
    run.SMALLEST = SHARD
    run.score_in_shards.__kwdefaults__["expiry"] = 1.0
    ordinary = QualityScorer.__call__

    def noted(self: QualityScorer, batch: Any, rank: int | None = None) -> Any:
        with log.open("a", encoding="utf-8") as file:
            file.write(f"{os.getpid()} {batch['source_index'][0]}\n")
        time.sleep(0.03)
        return ordinary(self, batch, rank)

    QualityScorer.__call__ = noted


def pipeline(source: Path, work: Path, models: dict[str, str], spoil: Callable[[], None] | None = None) -> None:
    """Run the command that is killed and run again."""
    prepare(work / "log")
    if spoil is not None:
        spoil()
    curate(source, work / "out", n1=10, n2=2, shard_dir=work / "shards", **models)


def help_scoring(source: Path, work: Path, models: dict[str, str]) -> None:
    """Work on the same shards, as another machine would, and end where the main process would cluster."""
    ClusterModel.fit = lambda *arguments, **options: (_ for _ in ()).throw(SystemExit(0))
    prepare(work / "log")
    # Without an output, which only one run may write at a time.
    curate(source, n1=10, n2=2, shard_dir=work / "shards", **models)


def parent_of_two(source: Path, work: Path, models: dict[str, str]) -> None:
    for task in (pipeline, help_scoring):
        if os.fork() == 0:
            multiprocessing.process._parent_process = None  # type: ignore[attr-defined]  # else it ends with its parent
            task(source, work, models)
            os._exit(0)
    time.sleep(600)


def begin(task: Callable[..., None], *arguments: Any) -> Any:
    worker = FORKS.Process(target=task, args=arguments)
    worker.start()
    return worker


def again(source: Path, work: Path, models: dict[str, str]) -> None:
    """Run the same command once more, unless it had finished; it must not wait for long."""
    if (work / "out" / "report.json").exists() and not (work / "out" / UNFINISHED).exists():
        return
    worker = begin(pipeline, source, work, models)
    worker.join(60)
    assert worker.exitcode == 0


def contents(work: Path) -> dict[str, bytes]:
    out = work / "out"
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def scored(work: Path) -> int:
    return len((work / "log").read_text().splitlines()) if (work / "log").exists() else 0


def check_again(undisturbed: Undisturbed, work: Path, extra: int) -> None:
    """Run the command again; at most `extra` shards may have been scored twice."""
    again(undisturbed.source, work, undisturbed.models)
    found = contents(work)
    assert sorted(found) == sorted(undisturbed.files)
    assert [name for name, content in found.items() if content != undisturbed.files[name]] == []
    assert scored(work) <= ROWS // SHARD + extra
    for stage in ("scores", "embeddings"):
        left = sorted(path.name for path in (work / "shards" / stage).iterdir())
        assert left == ["manifest.json", *(f"part-{i:05d}.arrow" for i in range(ROWS // SHARD))]


def try_points(
    trial: Callable[[Undisturbed, Path, Any], None], table: Sequence[Any], undisturbed: Undisturbed, folder: Path
) -> None:
    """Call `trial` at every point of a table, in `LANES` processes, and fail with the points that failed."""
    lanes = [
        WORKERS.Process(target=lane, args=(trial, table, range(start, len(table), LANES), undisturbed, folder))
        for start in range(LANES)
    ]
    try:
        for process in lanes:
            process.start()
        for process in lanes:
            process.join(300)
    finally:
        for process in lanes:
            process.kill()
    said = "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("failed-*")))
    assert not said, said
    assert sorted(path.name for path in folder.glob("passed-*")) == sorted(f"passed-{i}" for i in range(len(table)))


def lane(
    trial: Callable[[Undisturbed, Path, Any], None],
    table: Sequence[Any],
    places: range,
    undisturbed: Undisturbed,
    folder: Path,
) -> None:
    for place in places:
        work = folder / f"point-{place}"
        work.mkdir()
        try:
            trial(undisturbed, work, table[place])
        except BaseException:
            (folder / f"failed-{place}").write_text(f"{table[place]}: {traceback.format_exc()}", encoding="utf-8")
        else:
            (folder / f"passed-{place}").touch()


# --- at a known point


class KillAt(NamedTuple):
    """Replace `owner.name` by a function that dies by SIGKILL at its n-th call of interest, before or after its work."""

    owner: str
    name: str
    nth: int = 1
    target: str = ""
    after: bool = False

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
}
POINTS = [
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
]


def killed_at(undisturbed: Undisturbed, work: Path, point: KillAt) -> None:
    worker = begin(pipeline, undisturbed.source, work, undisturbed.models, point)
    worker.join(60)
    assert worker.exitcode == -signal.SIGKILL
    check_again(undisturbed, work, 1)


def test_killed_at_a_known_point(undisturbed: Undisturbed, tmp_path: Path) -> None:
    try_points(killed_at, POINTS, undisturbed, tmp_path)


# --- at any point


def killed_after_a_while(undisturbed: Undisturbed, work: Path, number: int) -> None:
    """Kill a run, alone or with a second process on its shards, or the parent of both, at a time drawn by the number."""
    source, models, _, seconds = undisturbed
    chance = random.Random(number)
    who = ("all", "one", "parent")[number % 3]
    if who == "parent":
        parent = begin(parent_of_two, source, work, models)
        time.sleep(chance.uniform(0, 1.2 * seconds))
        orphans = psutil.Process(parent.pid).children()
        parent.kill()
        parent.join(60)
        killed = 0  # the other orphans continue, at the same time as the command or before it
        for orphan in orphans:
            if chance.random() < 0.5:
                with contextlib.suppress(psutil.NoSuchProcess):  # it had finished
                    orphan.kill()
                killed += 1
            else:
                psutil.wait_procs([orphan], timeout=60)
    else:
        workers = [begin(task, source, work, models) for task in (pipeline, help_scoring)[: chance.choice((1, 2))]]
        time.sleep(chance.uniform(0, 1.2 * seconds))
        victims = workers if who == "all" else [chance.choice(workers)]
        killed = len(victims)
        for victim in victims:
            victim.kill()
        for worker in workers:
            worker.join(60)
            assert worker.exitcode is not None
    check_again(undisturbed, work, killed)


def test_killed_at_any_point(undisturbed: Undisturbed, tmp_path: Path) -> None:
    try_points(killed_after_a_while, range(24), undisturbed, tmp_path)
