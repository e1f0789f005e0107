"""`score_in_shards` in one process: as one `.map`, once; what is truncated is done again, what is foreign is refused."""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, Features, Value

from car_datasets import QualityScorer, TextEmbedder, cluster_filter, curate, score_in_shards, select_car
from car_datasets.scoring.shards import run
from car_datasets.scoring.shards.claims import Claims
from car_datasets.scoring.shards.run import fill_shards
from car_datasets.scoring.shards.storage import Folder
from car_datasets.scoring.stage import add_columns
from tests.workers import WORKERS

ANSWERS = ["Red, green and blue.", "The sea is wide.", "6", "a, b, c", "Bad."]


@pytest.fixture
def rows() -> Dataset:
    """Return 23 rows: with shards of 4, six of them, the last of three rows."""
    return Dataset.from_dict(
        {
            "instruction": [f"Write a list of {i} colours." for i in range(23)],
            "output": [ANSWERS[i % 5] * (1 + i % 3) for i in range(23)],
            "page": list(range(23)),
        }
    )


def parts(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_as_one_map_in_order_and_memory_mapped(tiny_iqs: str, rows: Dataset, tmp_path: Path) -> None:
    scorer = QualityScorer(tiny_iqs, diagnostics=True)
    found, whole = score_in_shards(rows, scorer, tmp_path, shard_rows=4), add_columns(rows, scorer, "Scoring")
    assert found.features == whole.features
    assert np.allclose(found["iqs_score"][:], whole["iqs_score"][:], atol=1e-5)
    assert found.remove_columns("iqs_score").to_dict() == whole.remove_columns("iqs_score").to_dict()
    assert parts(tmp_path) == ["manifest.json", *(f"part-{i:05d}.arrow" for i in range(6))]
    assert {Path(file["filename"]).parent for file in found.cache_files} == {tmp_path}


def doubled(batch: dict[str, Any]) -> dict[str, Any]:
    return {"double": [2 * score for score in batch["iqs_score"]]}


def test_a_part_of_other_content_at_the_same_path_and_time_gives_other_rows(
    tiny_iqs: str, rows: Dataset, tmp_path: Path
) -> None:
    scorer, part = QualityScorer(tiny_iqs), tmp_path / "part-00001.arrow"
    first = score_in_shards(rows, scorer, tmp_path, shard_rows=4).map(doubled, batched=True)
    before = part.stat()
    with pa.memory_map(str(part)) as file:
        table = pa.ipc.open_stream(file).read_all()
    column = pa.array([9.0] * 4, table.schema.field("iqs_score").type)
    (tmp_path / "new").write_bytes(b"")
    with pa.OSFile(str(tmp_path / "new"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(
            table.set_column(table.column_names.index("iqs_score"), table.schema.field("iqs_score"), column)
        )
    os.replace(tmp_path / "new", part)
    os.utime(part, ns=(before.st_atime_ns, before.st_mtime_ns))
    again = score_in_shards(rows, scorer, tmp_path, shard_rows=4).map(doubled, batched=True)
    assert again["iqs_score"][4:8] == [9.0] * 4 and again["double"][4:8] == [18.0] * 4
    assert first["double"][8:] == again["double"][8:]


def test_what_is_finished_is_not_scored_again(tiny_iqs: str, rows: Dataset, tmp_path: Path, calls: list[int]) -> None:
    scorer = QualityScorer(tiny_iqs)
    first = score_in_shards(rows, scorer, tmp_path, shard_rows=4)
    assert calls == [4, 4, 4, 4, 4, 3]
    (tmp_path / "part-00002.arrow").unlink()
    calls.clear()
    again = score_in_shards(rows.select(range(23)), QualityScorer(tiny_iqs, batch_tokens=99), tmp_path, shard_rows=4)
    assert calls == [4]
    assert again["iqs_score"][:8] + again["iqs_score"][12:] == first["iqs_score"][:8] + first["iqs_score"][12:]
    assert np.allclose(again["iqs_score"][:], first["iqs_score"][:], atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.4, 0.9, 0.999])
def test_a_truncated_shard_is_scored_again_with_its_reason(
    tiny_iqs: str, rows: Dataset, tmp_path: Path, calls: list[int], share: float, caplog: pytest.LogCaptureFixture
) -> None:
    scorer = QualityScorer(tiny_iqs)
    first = score_in_shards(rows, scorer, tmp_path, shard_rows=4).to_dict()
    truncated = tmp_path / "part-00003.arrow"
    content = truncated.read_bytes()
    truncated.write_bytes(content[: int(len(content) * share)])
    calls.clear()
    with caplog.at_level(logging.WARNING):
        again = score_in_shards(rows, scorer, tmp_path, shard_rows=4).to_dict()
    assert again == first
    if share < 0.999:  # there the mark of the end alone is missing: all rows are there
        assert calls == [4]
        assert caplog.text.count("part-00003.arrow is truncated") == 1
        assert truncated.read_bytes() == content


def test_shards_of_another_run_are_refused(make_tiny_iqs: Any, rows: Dataset, tmp_path: Path, calls: list[int]) -> None:
    folder, other_folder = tmp_path / "one", tmp_path / "two"
    scorer = QualityScorer(make_tiny_iqs(seed=1))
    score_in_shards(rows, scorer, folder, shard_rows=4)
    calls.clear()
    for changed, stage, size, message in (
        (rows, QualityScorer(make_tiny_iqs(seed=2)), 4, "another run: revision"),
        (rows, QualityScorer(scorer.model_id, dtype="bfloat16"), 4, r"dtype \('float32' there, 'bfloat16' now\)"),
        (rows, scorer, 5, r"shard_rows \('4' there, '5' now\)"),
        (rows.select(range(22)), scorer, 4, "rows .'23' there, '22' now"),
        (rows.select(list(range(22, -1, -1))), scorer, 4, "content"),
    ):
        with pytest.raises(ValueError, match=message):
            score_in_shards(changed, stage, folder, shard_rows=size)
    assert calls == []
    score_in_shards(rows, QualityScorer(make_tiny_iqs(seed=2)), other_folder, shard_rows=4)
    shutil.copy(other_folder / "part-00001.arrow", folder / "part-00001.arrow")
    with pytest.raises(ValueError, match=r"part-00001\.arrow is a shard of another run"):
        score_in_shards(rows, scorer, folder, shard_rows=4)
    shutil.copy(folder / "part-00002.arrow", folder / "part-00001.arrow")  # of this run, at another place
    with pytest.raises(ValueError, match=r"part-00001\.arrow is a shard of another run"):
        score_in_shards(rows, scorer, folder, shard_rows=4)


def test_a_folder_of_something_else_is_left_alone(tiny_iqs: str, rows: Dataset, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"holds \['thesis\.tex'\] and no manifest\.json"):
        score_in_shards(rows, QualityScorer(tiny_iqs), tmp_path)
    assert parts(tmp_path) == ["thesis.tex"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="run the same command again"):
        score_in_shards(rows, QualityScorer(tiny_iqs), tmp_path / "file" / "shards")


@pytest.mark.parametrize("blank", ["", " "])
def test_a_name_that_is_empty_is_no_folder(
    tiny_iqs: str, tiny_embedder: str, rows: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blank: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"shard_dir='' is empty"):
        score_in_shards(rows, QualityScorer(tiny_iqs), blank)
    with pytest.raises(ValueError, match=r"shard_dir='' is empty"):
        curate(rows, n1=2, k=2, scorer=tiny_iqs, embedder=tiny_embedder, shard_dir=blank)
    assert parts(tmp_path) == []


def test_urls(tiny_iqs: str, rows: Dataset, tmp_path: Path, calls: list[int]) -> None:
    scorer = QualityScorer(tiny_iqs)
    local = score_in_shards(rows, scorer, f"file://{tmp_path}/local", shard_rows=4)
    assert (tmp_path / "local" / "part-00005.arrow").is_file()
    url = f"memory://{tmp_path.name}/shards"
    remote = score_in_shards(rows, scorer, url, shard_rows=4)
    assert remote.to_dict() == local.to_dict()
    import fsspec

    memory = fsspec.filesystem("memory")
    names = sorted(path.rsplit("/", 1)[-1] for path in memory.ls(f"/{tmp_path.name}/shards", detail=False))
    assert names == ["manifest.json", *(f"part-{i:05d}.arrow" for i in range(6))]
    calls.clear()
    for file in remote.cache_files:  # as on another machine, which has no copies yet
        if file["filename"].endswith(".arrow"):
            Path(file["filename"]).unlink()
    copies = Path(remote.cache_files[0]["filename"]).parent
    for left in (".part-00001.arrow.0a1b2c3d", "unput-part-00002.arrow", ".unput-part-00003.arrow.0a1b2c3d"):
        (copies / left).write_bytes(b"by a worker that was killed")
    truncated = f"/{tmp_path.name}/shards/part-00004.arrow"
    memory.pipe_file(truncated, memory.cat_file(truncated)[:200])
    again = score_in_shards(rows, scorer, url, shard_rows=4)
    assert calls == [4]
    assert again.to_dict() == local.to_dict()
    assert len(memory.cat_file(truncated)) > 200
    assert parts(copies) == [f"part-{i:05d}.arrow" for i in range(6)]


def test_a_shard_that_cannot_be_fetched_is_an_error_and_not_scored_again(
    tiny_iqs: str, rows: Dataset, tmp_path: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, scorer, download = f"memory://{tmp_path.name}/shards", QualityScorer(tiny_iqs), Folder.download
    first = score_in_shards(rows, scorer, url, shard_rows=4)
    for file in first.cache_files:
        Path(file["filename"]).unlink(missing_ok=True)

    def fail(self: Folder, name: str, path: Path) -> None:
        if name == "part-00002.arrow":
            raise OSError("connection reset")  # without a number, as the clients of object stores raise it
        download(self, name, path)

    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "download", fail)
        with pytest.raises(
            OSError, match=r"part-00002\.arrow cannot be read: connection reset.*run the same command again"
        ):
            score_in_shards(rows, scorer, url, shard_rows=4)
    assert score_in_shards(rows, scorer, url, shard_rows=4).to_dict() == first.to_dict()
    assert calls == []


def test_without_a_folder_the_cache_keeps_them(
    tiny_iqs: str, rows: Dataset, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = QualityScorer(tiny_iqs)
    first = score_in_shards(rows, scorer, shard_rows=6)
    again = score_in_shards(rows, scorer, shard_rows=6)
    assert calls == [6, 6, 6, 5]
    assert again.to_dict() == first.to_dict()
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(ValueError, match="16 processes run on several machines: pass shard_dir="):
        score_in_shards(rows, scorer, shard_rows=6)


def test_stages_follow_one_another_and_empty_datasets_pass(
    tiny_iqs: str, tiny_embedder: str, rows: Dataset, tmp_path: Path
) -> None:
    scored = score_in_shards(rows.shuffle(seed=1), QualityScorer(tiny_iqs), tmp_path / "a", shard_rows=5)
    both = score_in_shards(scored, TextEmbedder(tiny_embedder), tmp_path / "b", shard_rows=7)
    assert both.column_names == ["instruction", "output", "page", "iqs_score", "embedding"]
    assert both["page"][:] == rows.shuffle(seed=1)["page"][:]
    empty = score_in_shards(rows.select([]), QualityScorer(tiny_iqs), tmp_path / "c")
    assert (len(empty), empty.column_names[-1]) == (0, "iqs_score")


def test_the_size_of_a_shard_follows_the_rows_alone() -> None:
    # a run may resume with another number of processes, so that must not decide
    assert [run.default_rows(n) for n in (1, 384, 52_002, 1_000_000, 10**8)] == [128, 128, 812, 15_625, 65_536]


def test_who_does_not_wait_takes_what_is_free_and_says_what_is_left(
    tiny_iqs: str, rows: Dataset, tmp_path: Path, calls: list[int]
) -> None:
    scorer = QualityScorer(tiny_iqs)
    whole = score_in_shards(rows, scorer, tmp_path, shard_rows=4).to_dict()
    for shard in (1, 3, 5):
        (tmp_path / f"part-{shard:05d}.arrow").unlink()
    other = Claims(Folder(tmp_path))
    claims = [other.take(f"part-{shard:05d}.arrow", {}) for shard in (1, 5)]
    calls.clear()
    assert fill_shards(rows, scorer, tmp_path, shard_rows=4) == 7  # four rows of one, three of the other
    assert calls == [4]
    for claim in claims:
        other.release(str(claim))
    assert fill_shards(rows, scorer, tmp_path, shard_rows=4) == 0
    assert calls == [4, 4, 3]
    assert score_in_shards(rows, scorer, tmp_path, shard_rows=4).to_dict() == whole
    assert len(calls) == 3


@pytest.mark.parametrize("wrong", [cluster_filter, select_car, len, lambda batch: batch])
def test_what_is_no_stage_is_told_where_to_go(rows: Dataset, tmp_path: Path, wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"is not a Stage.* map_across_gpus\(dataset"):
        score_in_shards(rows, wrong, tmp_path)


@dataclass(frozen=True)
class Lengths:
    """A stage that is neither scorer nor embedder: the length of the answer, in a unit."""

    unit: float = 1.0
    rows: str = "a field that is named like an entry of the manifest"
    cut: int = 0  # rows that a faulty stage drops
    extra: Any = None

    @property
    def output_columns(self) -> tuple[str, ...]:
        return ("length",)

    def output_features(self) -> Features:
        return Features({"length": Value("float32")})

    def __call__(self, batch: Any, rank: int | None = None) -> dict[str, Any]:
        assert list(batch) == ["instruction", "output", "page"]
        return {"length": [len(text) / self.unit for text in batch["output"][self.cut :]]}


@dataclass(frozen=True)
class AnswersOnly(Lengths):
    """A stage that says which columns it reads."""

    def read_columns(self, column_names: Sequence[str]) -> list[str]:
        return ["output"]

    def __call__(self, batch: Any, rank: int | None = None) -> dict[str, Any]:
        assert set(batch) <= {"output", "source_index"}
        return {"length": [len(text) / self.unit for text in batch["output"]]}


def test_any_stage_is_scored_resumed_and_bound_to_its_fields(rows: Dataset, tmp_path: Path) -> None:
    found = score_in_shards(rows, Lengths(), tmp_path / "all", shard_rows=4)
    assert found.column_names == ["instruction", "output", "page", "length"]
    assert found.features["length"] == Value("float32")
    assert found["length"][:] == [len(text) for text in rows["output"][:]]
    manifest = json.loads((tmp_path / "all" / "manifest.json").read_text())
    assert manifest["reads"] == ["instruction", "output", "page"]
    assert (manifest["stage"], manifest["unit"], manifest["rows"]) == ("Lengths", 1.0, 23)
    before = (tmp_path / "all" / "part-00003.arrow").stat().st_mtime_ns
    (tmp_path / "all" / "part-00002.arrow").unlink()
    assert fill_shards(rows, Lengths(), tmp_path / "all", shard_rows=4) == 0
    assert (tmp_path / "all" / "part-00003.arrow").stat().st_mtime_ns == before
    other_page = rows.remove_columns("page").add_column("page", [0] * 23)
    for changed, stage, message in (
        (rows, Lengths(unit=2.0), r"another run: unit"),
        (rows, Lengths(rows="x"), r"another run: stage\.rows"),
        (rows, AnswersOnly(), r"another run: reads"),
        (other_page, Lengths(), r"another run: content"),  # it reads all columns
    ):
        with pytest.raises(ValueError, match=message):
            score_in_shards(changed, stage, tmp_path / "all", shard_rows=4)
    narrow = score_in_shards(rows, AnswersOnly(), tmp_path / "one", shard_rows=4)
    assert narrow["length"][:] == found["length"][:]
    assert (
        len(score_in_shards(other_page, AnswersOnly(), tmp_path / "one", shard_rows=4)) == 23
    )  # it does not read `page`
    stream = score_in_shards(rows.to_iterable_dataset(), AnswersOnly(), tmp_path / "stream", shard_rows=4)
    assert stream.to_dict() == found.to_dict()


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (Lengths(extra=object()), r"fn=Lengths: the field extra is a object, to which shards cannot be bound"),
        (Lengths(cut=1), r"fn=Lengths returned the columns \['length'\] for 4 rows, with \{'length': 3\} values"),
        (Lengths, r"fn=Lengths is not a Stage"),
    ],
)
def test_a_faulty_stage_is_named(rows: Dataset, tmp_path: Path, stage: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score_in_shards(rows, stage, tmp_path / "new", shard_rows=4)
    assert not list(tmp_path.glob("new/part-*"))


def test_bad_arguments_end_before_anything_is_written(tiny_iqs: str, rows: Dataset, tmp_path: Path) -> None:
    for options, message in (({"shard_rows": 0}, "shard_rows=0"), ({"expiry": 0.0}, "expiry=0.0")):
        with pytest.raises(ValueError, match=message):
            score_in_shards(rows, QualityScorer(tiny_iqs), tmp_path / "new", **options)
    with pytest.raises(ValueError, match="iqs_score"):
        score_in_shards(rows.add_column("iqs_score", [0.0] * 23), QualityScorer(tiny_iqs), tmp_path / "new")
    assert not (tmp_path / "new").exists()


# --- several real processes


def work(scorer: QualityScorer, rows: Dataset, folder: str, log: str, **options: Any) -> None:
    """Score slowly, as one worker, and note every shard."""
    ordinary = QualityScorer.__call__

    def noted(self: QualityScorer, batch: Any, rank: int | None = None) -> Any:
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"{os.getpid()} {batch['output'][0]} {len(batch['output'])}\n")
        time.sleep(0.15)
        return ordinary(self, batch, rank)

    QualityScorer.__call__ = noted
    score_in_shards(rows, scorer, folder, shard_rows=4, **options).to_parquet(f"{log}.{os.getpid()}.parquet")


def start(*arguments: Any) -> Any:
    worker = WORKERS.Process(target=work, args=arguments)
    worker.start()
    return worker


@pytest.mark.slow
def test_processes_share_the_shards_and_see_the_same(tiny_iqs: str, rows: Dataset, tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    workers = [start(QualityScorer(tiny_iqs), rows, str(tmp_path / "shards"), log) for _ in range(2)]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    lines = Path(log).read_text().splitlines()
    assert len(lines) == 6
    assert {line.split()[0] for line in lines} == {str(worker.pid) for worker in workers}
    one, two = (Path(f"{log}.{worker.pid}.parquet").read_bytes() for worker in workers)
    assert one == two
    assert len(parts(tmp_path / "shards")) == 7


def test_a_killed_worker_costs_one_shard(tiny_iqs: str, rows: Dataset, tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    workers = [start(QualityScorer(tiny_iqs), rows, str(tmp_path / "shards"), log) for _ in range(2)]
    deadline = time.monotonic() + 60
    while not Path(log).exists() or str(workers[0].pid) not in Path(log).read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(workers[0].pid, signal.SIGKILL)
    workers[1].join(60)
    assert workers[1].exitcode == 0
    assert len(Path(log).read_text().splitlines()) <= 7
    found = Dataset.from_parquet(f"{log}.{workers[1].pid}.parquet", cache_dir=str(tmp_path / "cache"))
    assert found["page"][:] == list(range(23))
    assert parts(tmp_path / "shards") == ["manifest.json", *(f"part-{i:05d}.arrow" for i in range(6))]


# --- a disk that is full, a folder that is read-only


def in_child(task: Any, *arguments: Any) -> str:
    """Run `task` in a child, which may spoil itself; the error it ended with."""
    box = WORKERS.Queue()
    child = WORKERS.Process(target=_report, args=(box, task, *arguments))
    child.start()
    message: str = box.get(timeout=60)
    child.join(60)
    return message


def _report(box: Any, task: Any, *arguments: Any) -> None:
    try:
        task(*arguments)
        box.put("")
    except Exception as error:
        box.put(f"{type(error).__name__}: {error}")


def spoil_after(calls: int, spoil: Any) -> None:
    """Call `spoil` while the scorer has its `calls`-th shard at hand."""
    ordinary, seen = QualityScorer.__call__, [0]

    def counted(self: QualityScorer, batch: Any, rank: int | None = None) -> Any:
        found = ordinary(self, batch, rank)
        seen[0] += 1
        if seen[0] == calls:
            spoil()
        return found

    QualityScorer.__call__ = counted


def score_until_the_disk_is_full(scorer: QualityScorer, rows: Dataset, folder: str) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit then fails, as on a full disk
    spoil_after(3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)))
    score_in_shards(rows, scorer, folder, shard_rows=4)


def score_where_nothing_may_be_written(scorer: QualityScorer, rows: Dataset, folder: str) -> None:
    scorer(rows[:1])  # loaded while its folder may be read
    if os.getuid() == 0:  # whom no folder refuses
        os.setuid(65534)
    score_in_shards(rows, scorer, folder, shard_rows=4)


def test_a_full_disk_is_a_clear_error_and_costs_no_finished_shard(
    tiny_iqs: str, rows: Dataset, tmp_path: Path, calls: list[int]
) -> None:
    message = in_child(score_until_the_disk_is_full, QualityScorer(tiny_iqs), rows, str(tmp_path))
    assert message.startswith("OSError: shard_dir=")
    assert "part-00002.arrow cannot be written" in message
    assert "Finished shards are kept" in message
    assert parts(tmp_path) == ["manifest.json", "part-00000.arrow", "part-00001.arrow"]
    score_in_shards(rows, QualityScorer(tiny_iqs), tmp_path, shard_rows=4)
    assert calls == [4, 4, 4, 3]


def test_a_read_only_folder_is_a_clear_error_and_serves_what_is_finished(
    tiny_iqs: str, rows: Dataset, calls: list[int]
) -> None:
    folder = Path(tempfile.mkdtemp(prefix="car-datasets-shards-"))  # not tmp_path, into which root alone may look
    scorer = QualityScorer(tiny_iqs)
    try:
        folder.chmod(0o555)
        message = in_child(score_where_nothing_may_be_written, scorer, rows, str(folder))
        assert "manifest.json cannot be written" in message
        assert "Permission denied" in message
        folder.chmod(0o755)
        score_in_shards(rows, scorer, folder, shard_rows=4)
        folder.chmod(0o555)
        assert in_child(score_where_nothing_may_be_written, scorer, rows, str(folder)) == ""
        (folder / "part-00002.arrow").unlink()
        message = in_child(score_where_nothing_may_be_written, scorer, rows, str(folder))
        assert "part-00002.arrow cannot be written" in message
        calls.clear()
        folder.chmod(0o755)
        score_in_shards(rows, scorer, folder, shard_rows=4)
        assert calls == [4]
        (folder / "part-00003.arrow").chmod(0)
        (folder / "part-00001.arrow").unlink()
        message = in_child(score_where_nothing_may_be_written, scorer, rows, str(folder))
        assert (
            "part-00003.arrow cannot be read" in message
        )  # an error, not a shard that is truncated and to be scored again
        assert "Permission denied" in message
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)
