"""A stream scored in shards: as in memory and in order, once, on from where it was killed, and never with foreign rows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Features, IterableDataset, IterableDatasetDict, Value, interleave_datasets, load_dataset

from car_datasets import QualityScorer, TextEmbedder, score_in_shards, select_car_streaming
from car_datasets.scoring.stage import add_columns
from tests.conftest import ROOT
from tests.scoring.shards.test_killed import KillAt
from tests.test_launched import TORCHRUN, launch
from tests.workers import WORKERS

ANSWERS = ["Red, green and blue.", "The sea is wide.", "6", "a, b, c", "Bad."]
PARTS = ["manifest.json", *(f"part-{i:05d}.arrow" for i in range(6)), "state-00005.json"]


def content(count: int = 23) -> list[dict[str, Any]]:
    """Return rows that make six shards of 4, the last of three rows."""
    return [
        {"instruction": f"Write a list of {i} colours.", "output": ANSWERS[i % 5] * (1 + i % 3), "page": i}
        for i in range(count)
    ]


def from_list(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    yield from (dict(row) for row in rows)


def stream_of(rows: list[dict[str, Any]], **options: Any) -> IterableDataset:
    return IterableDataset.from_generator(from_list, gen_kwargs={"rows": rows}, **options)


def one_after_another(files: list[Path]) -> Iterator[dict[str, Any]]:
    for file in files:
        for line in file.read_text().splitlines():
            yield json.loads(line)


def parts(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Write the rows to three JSON Lines files of 8, 1 and 14 rows."""
    rows = content()
    for name, part in (("a", rows[:8]), ("b", rows[8:9]), ("c", rows[9:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return [str(tmp_path / f"{name}.jsonl") for name in "abc"]


SOURCES: dict[str, Callable[[list[str]], IterableDataset]] = {
    "generator": lambda files: stream_of(content()),
    "generator of shards": lambda files: IterableDataset.from_generator(
        one_after_another, gen_kwargs={"files": [Path(file) for file in files]}
    ),
    "json lines": lambda files: load_dataset("json", data_files=files, split="train", streaming=True),
    "dataset": lambda files: Dataset.from_list(content()).to_iterable_dataset(num_shards=3),
    "mapped": lambda files: stream_of(content()).map(lambda batch: {"page": batch["page"]}, batched=True, batch_size=5),
    "arrow format": lambda files: Dataset.from_list(content()).to_iterable_dataset(num_shards=2).with_format("arrow"),
    "two, in turns": lambda files: interleave_datasets(
        [Dataset.from_list(content()[half::2]).to_iterable_dataset() for half in (0, 1)],
        stopping_strategy="all_exhausted_without_replacement",
    ),
}


@pytest.mark.parametrize("source", SOURCES)
def test_as_in_memory_and_in_order_and_on_where_it_ended(
    tiny_iqs: str, tmp_path: Path, files: list[str], calls: list[int], source: str, caplog: pytest.LogCaptureFixture
) -> None:
    scorer, folder = QualityScorer(tiny_iqs, diagnostics=True), tmp_path / "shards"
    found = score_in_shards(SOURCES[source](files), scorer, folder, shard_rows=4)
    assert calls == [4, 4, 4, 4, 4, 3]
    whole = add_columns(Dataset.from_list(content()), scorer, "Scoring")
    assert found.features == whole.features
    assert np.allclose(found["iqs_score"][:], whole["iqs_score"][:], atol=1e-5)
    assert found.remove_columns("iqs_score").to_dict() == whole.remove_columns("iqs_score").to_dict()
    assert parts(folder) == PARTS
    assert {Path(file["filename"]).parent for file in found.cache_files} == {folder}
    first = found.to_dict()
    calls.clear()
    again = QualityScorer(tiny_iqs, diagnostics=True, batch_tokens=99)
    assert score_in_shards(SOURCES[source](files), again, folder, shard_rows=4).to_dict() == first
    assert calls == []
    (folder / "part-00003.arrow").unlink()
    assert score_in_shards(SOURCES[source](files), scorer, folder, shard_rows=4).to_dict() == first
    assert calls == [4]
    assert caplog.text == ""


def test_a_state_saves_reading_what_is_finished(tiny_iqs: str, tmp_path: Path) -> None:
    read: list[int] = []

    def pages(starts: list[int]) -> Iterator[dict[str, Any]]:
        for start in starts:
            for row in content()[start : start + 4]:
                read.append(row["page"])
                yield row

    def stream() -> IterableDataset:
        return IterableDataset.from_generator(pages, gen_kwargs={"starts": list(range(0, 23, 4))})

    first = score_in_shards(stream(), QualityScorer(tiny_iqs), tmp_path, shard_rows=4).to_dict()
    read.clear()
    assert score_in_shards(stream(), QualityScorer(tiny_iqs), tmp_path, shard_rows=4).to_dict() == first
    # The first rows, and the last shard to its end, with the source before it: there the stream was when that shard began.
    assert read == [0, 1, 2, 3, *range(16, 23)]
    (tmp_path / "state-00005.json").unlink()
    read.clear()
    assert score_in_shards(stream(), QualityScorer(tiny_iqs), tmp_path, shard_rows=4).to_dict() == first
    assert read == list(range(23))


def test_a_shuffle_buffer_is_read_from_the_start(
    tiny_iqs: str, tmp_path: Path, calls: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    stream, scorer = stream_of(content()).shuffle(seed=3, buffer_size=10), QualityScorer(tiny_iqs)
    first = score_in_shards(stream, scorer, tmp_path, shard_rows=4).to_dict()
    assert sorted(first["page"]) == list(range(23))
    assert first["page"] != list(range(23))
    (tmp_path / "part-00005.arrow").unlink()
    (tmp_path / "state-00004.json").write_bytes((tmp_path / "state-00005.json").read_bytes())  # a wrong one, even
    calls.clear()
    assert score_in_shards(stream, scorer, tmp_path, shard_rows=4).to_dict() == first
    assert calls == [3]
    assert "read from its start" in caplog.text
    other = stream_of(content()).shuffle(seed=4, buffer_size=10)
    with pytest.raises(ValueError, match="content"):
        score_in_shards(other, scorer, tmp_path, shard_rows=4)


def changed(rows: list[dict[str, Any]], place: int, **values: Any) -> list[dict[str, Any]]:
    return [{**row, **values} if i == place else row for i, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (changed(content(), 1, output="Other."), r"another run: content"),
        (changed(content(), 21, output="Other."), r"rows 20 to 22 are not what they were"),
        (changed(content(), 21, page=0), r"rows 20 to 22 are not what they were"),
        (content(25), r"rows 20 to 23 are not what they were"),
        (content(22), r"rows 20 to 21 are not what they were"),
        (content(20), r"ends before row 20"),
        (content(11), r"rows 8 to 10 are not what they were"),
        ([{**row, "extra": 1} for row in content()], r"another run: source"),
    ],
)
def test_another_stream_is_refused_and_nothing_is_scored(
    tiny_iqs: str, tmp_path: Path, calls: list[int], rows: list[dict[str, Any]], message: str
) -> None:
    scorer = QualityScorer(tiny_iqs)
    first = score_in_shards(stream_of(content()), scorer, tmp_path, shard_rows=4).to_dict()
    calls.clear()
    with pytest.raises(ValueError, match=message):
        score_in_shards(stream_of(rows), scorer, tmp_path, shard_rows=4)
    with pytest.raises(ValueError, match="another run: dtype"):
        score_in_shards(stream_of(content()), QualityScorer(tiny_iqs, dtype="bfloat16"), tmp_path, shard_rows=4)
    assert calls == []
    assert score_in_shards(stream_of(content()), scorer, tmp_path, shard_rows=4).to_dict() == first


def test_rows_that_were_added_are_scored_where_the_last_shard_was_full(
    tiny_iqs: str, tmp_path: Path, calls: list[int]
) -> None:
    scorer = QualityScorer(tiny_iqs)
    score_in_shards(stream_of(content(20)), scorer, tmp_path, shard_rows=4)
    calls.clear()
    found = score_in_shards(stream_of(content(23)), scorer, tmp_path, shard_rows=4)
    assert calls == [3]
    assert found["page"][:] == list(range(23))


def test_a_row_without_text_is_named_and_finished_shards_are_kept(
    tiny_iqs: str, tmp_path: Path, calls: list[int]
) -> None:
    types = Features({"instruction": Value("string"), "output": Value("string"), "page": Value("int64")})
    scorer, bad = QualityScorer(tiny_iqs), changed(content(), 17, output=None)
    with pytest.raises(
        ValueError, match=r"Rows 16 to 19 of the stream: .* 1 null \(rows 17\).*Finished shards are kept in shard_dir"
    ):
        score_in_shards(stream_of(bad, features=types), scorer, tmp_path / "a", shard_rows=4)
    assert parts(tmp_path / "a")[:5] == PARTS[:5]
    calls.clear()
    mended = score_in_shards(stream_of(content(), features=types), scorer, tmp_path / "a", shard_rows=4)
    assert calls == [4, 3]
    assert mended["page"][:] == list(range(23))
    marked = score_in_shards(stream_of(bad), QualityScorer(tiny_iqs, on_invalid="mark"), tmp_path / "b", shard_rows=4)
    assert [i for i, status in enumerate(marked["iqs_status"][:]) if status != "ok"] == [17]
    assert marked["iqs_score"][17] is None


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "the stream has no rows"),
        ([{"a": 1}], "No known schema fits"),
        ([{**content(1)[0], "iqs_score": 1.0}], "already has the column"),
        (changed(content(), 9, output=7), "Rows 8 to 11 of the stream hold values that fit no type"),
        (changed(content(), 9, page="nine"), "Rows 8 to 11 of the stream hold values that fit no type"),
        (changed(content(), 9, page=0.5), r"Rows 8 to 11 of the stream: the columns \['page'\] have other types"),
        (changed(content(), 9, note="x"), r"Rows 8 to 11 of the stream: the columns \['note'\] have other types.*cast"),
        (changed(content(), 1, page={"a": 1}), "Rows 0 to 3 of the stream hold values that fit no type"),
    ],
)
def test_rows_that_do_not_fit_are_refused(
    tiny_iqs: str, tmp_path: Path, rows: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        score_in_shards(stream_of(rows), QualityScorer(tiny_iqs), tmp_path / "new", shard_rows=4)


def test_a_column_beyond_the_declared_types_is_left_out_by_the_stream_itself(tiny_iqs: str, tmp_path: Path) -> None:
    types = Features({"instruction": Value("string"), "output": Value("string")})
    stream = stream_of(content(), features=types)
    found = score_in_shards(stream, QualityScorer(tiny_iqs), tmp_path / "new", shard_rows=4)
    assert found.column_names == ["instruction", "output", "iqs_score"]


def test_a_later_key_of_a_chat_is_not_dropped_in_silence(tiny_iqs: str, tmp_path: Path) -> None:
    def chat(i: int) -> dict[str, Any]:
        extra = {"tool": "sum"} if i == 6 else {}
        return {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "6", **extra}]}

    rows = [chat(i) for i in range(8)]
    with pytest.raises(ValueError, match=r"Rows 4 to 7 of the stream: the columns \['messages'\] have other types"):
        score_in_shards(stream_of(rows), QualityScorer(tiny_iqs), tmp_path / "a", shard_rows=4)
    types = Dataset.from_list(rows[6:7]).features
    found = score_in_shards(stream_of(rows, features=types), QualityScorer(tiny_iqs), tmp_path / "b", shard_rows=4)
    assert [turns[1]["tool"] for turns in found["messages"]] == [None] * 6 + ["sum", None]


def test_bad_arguments_end_before_anything_is_written(tiny_iqs: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shard_dir=None"):
        score_in_shards(stream_of(content()), QualityScorer(tiny_iqs))
    with pytest.raises(ValueError, match="shard_rows=0"):
        score_in_shards(stream_of(content()), QualityScorer(tiny_iqs), tmp_path / "new", shard_rows=0)
    with pytest.raises(
        ValueError, match="is a IterableDatasetDict; pass a Dataset or an IterableDataset, of one split"
    ):
        score_in_shards(IterableDatasetDict(train=stream_of(content())), QualityScorer(tiny_iqs), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_stages_follow_and_a_selection_ends_them(tiny_iqs: str, tiny_embedder: str, tmp_path: Path) -> None:
    scored = score_in_shards(stream_of(content()), QualityScorer(tiny_iqs), tmp_path / "a", shard_rows=5)
    both = score_in_shards(scored.to_iterable_dataset(), TextEmbedder(tiny_embedder), tmp_path / "b", shard_rows=7)
    assert both.column_names == ["instruction", "output", "page", "iqs_score", "embedding"]
    assert both.features["embedding"].length == 32
    labelled = both.add_column("cluster", [0] * 23)
    best = int(np.argmax(both["iqs_score"][:]))
    assert select_car_streaming(labelled.to_iterable_dataset(), n1=1, n2=0)["page"][:] == [best]


def test_a_url(tiny_iqs: str, tmp_path: Path, calls: list[int]) -> None:
    url, scorer = f"memory://{tmp_path.name}/streamed", QualityScorer(tiny_iqs)
    first = score_in_shards(stream_of(content()), scorer, url, shard_rows=4)
    expected = first.to_dict()
    for file in first.cache_files:  # as on another machine, which has no copies yet
        Path(file["filename"]).unlink()
    calls.clear()
    assert score_in_shards(stream_of(content()), scorer, url, shard_rows=4).to_dict() == expected
    assert calls == []
    longer = score_in_shards(stream_of(content(30)), scorer, f"{url}-of-a-stream-that-begins-alike", shard_rows=4)
    assert longer["page"][:] == list(range(30))


# --- several real processes, and killed ones


def slow_stream(rows: int) -> Iterator[dict[str, Any]]:
    yield from content(rows)


def work(scorer: QualityScorer, folder: str, log: str, spoil: Callable[[], None] | None = None) -> None:
    """Score slowly, as one worker, and note every shard."""
    if spoil is not None:
        spoil()
    ordinary = QualityScorer.__call__

    def noted(self: QualityScorer, batch: Any, rank: int | None = None) -> Any:
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"{os.getpid()} {batch['source_index'][0]}\n")
        time.sleep(0.15)
        return ordinary(self, batch, rank)

    QualityScorer.__call__ = noted
    stream = IterableDataset.from_generator(slow_stream, gen_kwargs={"rows": 47})
    score_in_shards(stream, scorer, folder, shard_rows=4, expiry=2).to_parquet(f"{log}.{os.getpid()}.parquet")


def start(*arguments: Any) -> Any:
    worker = WORKERS.Process(target=work, args=arguments)
    worker.start()
    return worker


def wait_for_lines(log: Path, count: int, pid: int | None = None) -> None:
    deadline = time.monotonic() + 90
    while not log.exists() or sum(pid is None or str(pid) in line for line in log.read_text().splitlines()) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_killed_in_the_middle_the_same_call_resumes(tiny_iqs: str, tmp_path: Path) -> None:
    scorer, log = QualityScorer(tiny_iqs), tmp_path / "log"
    whole = score_in_shards(stream_of(content(47)), scorer, tmp_path / "whole", shard_rows=4)
    worker = start(scorer, str(tmp_path / "shards"), str(log))
    wait_for_lines(log, 6)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join(60)
    assert worker.exitcode == -signal.SIGKILL
    finished = {path: path.stat() for path in (tmp_path / "shards").glob("part-*.arrow")}
    assert 5 <= len(finished) <= 6
    again = start(scorer, str(tmp_path / "shards"), str(log))
    again.join(60)
    assert again.exitcode == 0
    assert all(
        (path.stat().st_ino, path.stat().st_mtime_ns) == (s.st_ino, s.st_mtime_ns) for path, s in finished.items()
    )
    assert len(log.read_text().splitlines()) <= 12 + 1
    found = (tmp_path / f"log.{again.pid}.parquet").read_bytes()
    whole.to_parquet(str(tmp_path / "whole.parquet"))
    assert found == (tmp_path / "whole.parquet").read_bytes()
    assert parts(tmp_path / "shards") == parts(tmp_path / "whole")
    for path in (tmp_path / "whole").glob("part-*"):
        assert path.read_bytes() == (tmp_path / "shards" / path.name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "spoil",
    [
        KillAt("os", "replace", target="manifest.json"),
        KillAt("claims", "_create", nth=4),
        KillAt("claims", "_create", nth=4, after=True),
        KillAt("os", "replace", nth=3, target="state-"),
        KillAt("os", "replace", nth=3, target="state-", after=True),
        KillAt("writer", "finalize", nth=3),
        KillAt("os", "replace", nth=3, target="part-"),
        KillAt("os", "replace", nth=12, target="part-", after=True),
        KillAt("datasets", "concatenate_datasets"),
    ],
    ids=lambda spoil: f"{spoil.owner}.{spoil.name}-{spoil.target}-{'after' if spoil.after else 'before'}",
)
def test_killed_at_a_known_point(tiny_iqs: str, tmp_path: Path, spoil: KillAt) -> None:
    scorer, log = QualityScorer(tiny_iqs), tmp_path / "log"
    whole = score_in_shards(stream_of(content(47)), scorer, tmp_path / "whole", shard_rows=4)
    killed = start(scorer, str(tmp_path / "shards"), str(log), spoil)
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    again = start(scorer, str(tmp_path / "shards"), str(log))
    again.join(60)
    assert again.exitcode == 0
    assert len(log.read_text().splitlines()) <= 12 + 1
    whole.to_parquet(str(tmp_path / "whole.parquet"))
    assert (tmp_path / f"log.{again.pid}.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert parts(tmp_path / "shards") == parts(tmp_path / "whole")


def test_two_workers_share_a_stream_and_one_takes_over_what_the_other_was_at(tiny_iqs: str, tmp_path: Path) -> None:
    scorer, log = QualityScorer(tiny_iqs), tmp_path / "log"
    workers = [start(scorer, str(tmp_path / "shards"), str(log)) for _ in range(3)]
    wait_for_lines(log, 2, workers[0].pid)
    workers[0].kill()
    for worker in workers[1:]:
        worker.join(90)
        assert worker.exitcode == 0
    lines = log.read_text().splitlines()
    assert len({line.split()[1] for line in lines}) == 12
    assert len(lines) <= 13
    assert {line.split()[0] for line in lines} == {str(worker.pid) for worker in workers}
    one, two = (Path(f"{log}.{worker.pid}.parquet").read_bytes() for worker in workers[1:])
    assert one == two
    found = Dataset.from_parquet(f"{log}.{workers[1].pid}.parquet", cache_dir=str(tmp_path / "cache"))
    assert found["page"][:] == list(range(47))


RANKS = """
import sys
from datasets import load_dataset
from car_datasets import QualityScorer, score_in_shards
from car_datasets.utils.processes import from_main, process_rank
model, folder, *files = sys.argv[1:]
stream = load_dataset("json", data_files=files, split="train", streaming=True)
from_main(lambda: None)  # all start together
found = score_in_shards(stream, QualityScorer(model), folder, shard_rows=2)
found.to_parquet(f"{folder}-{process_rank()[0]}.parquet")
"""


@pytest.mark.slow
@pytest.mark.usefixtures("on_cpu")
def test_two_ranks_give_what_one_gives(tiny_iqs: str, tmp_path: Path, files: list[str]) -> None:
    (tmp_path / "ranks.py").write_text(RANKS)
    done = launch(TORCHRUN, 2, str(tmp_path / "ranks.py"), tiny_iqs, str(tmp_path / "shards"), *files)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (tmp_path / f"shards-{rank}.parquet" for rank in (0, 1))
    assert one.read_bytes() == two.read_bytes()
    stream = load_dataset("json", data_files=files, split="train", streaming=True)
    alone = score_in_shards(stream, QualityScorer(tiny_iqs), tmp_path / "alone", shard_rows=2)
    many = Dataset.from_parquet(str(one), cache_dir=str(tmp_path / "cache"))
    assert np.allclose(many["iqs_score"][:], alone["iqs_score"][:], atol=1e-5)
    assert many.remove_columns("iqs_score").to_dict() == alone.remove_columns("iqs_score").to_dict()


# --- memory

MEMORY = """
import json, resource, sys
from datasets import IterableDataset
from car_datasets import QualityScorer, score_in_shards
rows = int(sys.argv[3])
def generate():
    for i in range(rows):
        yield {"instruction": f"Write a list of {i}", "output": "Good sum. " + "x" * 300, "page": i}
scorer = QualityScorer(sys.argv[1])
found = score_in_shards(IterableDataset.from_generator(generate), scorer, sys.argv[2], shard_rows=2_000)
assert len(found) == rows
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps({"anonymous": int(status["RssAnon"].split()[0]), "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads its memory from /proc")
def test_memory_does_not_grow_with_the_rows(make_tiny_iqs: Any, tmp_path: Path) -> None:
    model = make_tiny_iqs(max_tokens=16)
    peaks = {}
    for rows in (20_000, 200_000):
        line = [sys.executable, "-c", MEMORY, model, str(tmp_path / str(rows)), str(rows)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(line, capture_output=True, text=True, env=environment, check=True, timeout=550)
        peaks[rows] = json.loads(done.stdout.splitlines()[-1])
    grown = {name: (peaks[200_000][name] - peaks[20_000][name]) / 1024 for name in ("anonymous", "peak")}
    assert grown["anonymous"] < 40, peaks  # MB; 180,000 rows are 60 MB of text, and more as Python objects
    assert grown["peak"] < 60, peaks
