"""Files: one run writes a place at a time, nothing is left behind, and a full disk is named."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, config

from car_datasets.utils.files import claimed, prepare_cache, private_folder, take_claim, write_whole
from car_datasets.utils.processes import this_process
from tests.conftest import full_disk
from tests.workers import at_home, start

HELD = """
import sys, time
from pathlib import Path
from car_datasets.utils.files import take_claim
target, run, *names = sys.argv[1:]
take_claim(Path(target), (run,), [Path(target, name) for name in names])
print("held", flush=True)
time.sleep(600)
"""


@contextlib.contextmanager
def running(code: str, *arguments: object, said: str = "held") -> Iterator[Any]:
    """Run code in another process, yield the process once it has said a word, and kill it at the end."""
    process = start(["-c", code, *map(str, arguments)], at_home())
    try:
        deadline = time.monotonic() + 60
        while said not in process.printed()[0]:
            assert process.poll() is None and time.monotonic() < deadline, process.printed()
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.wait(60)


# --- claims

FOLDER = ("report.json", "plots/map.png")  # the files of a folder; none stands for a file


@pytest.mark.parametrize("names", [(), FOLDER], ids=["file", "folder"])
@pytest.mark.parametrize(("run", "who"), [("a", "the same command"), ("b", "another command")])
def test_a_place_is_written_by_one_run_at_a_time_and_taken_over_after_a_kill(
    names: tuple[str, ...], run: str, who: str, tmp_path: Path
) -> None:
    target = tmp_path / "new" / "out"
    files = [target / name for name in names]
    message = r"--output='.*out' is being written by {}, process {}\b"
    with running(HELD, target, "a", *names) as process, pytest.raises(ValueError) as error:
        take_claim(target, (run,), files)
    assert re.match(message.format(who, process.pid), str(error.value))
    left = target.with_name(".out.0123abcd") if not names else target / ".report.json.0123abcd"
    other = left.with_name(".mine.0123abcd")
    for path in (left, other):
        path.touch()
    with claimed(target, (run,), files) as claim:
        claim.check()
        assert not left.exists()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [other.name]


@pytest.mark.parametrize("names", [(), FOLDER], ids=["file", "folder"])
def test_a_claim_leaves_no_trace(names: tuple[str, ...], tmp_path: Path) -> None:
    target = tmp_path / "new" / "deep" / "out"
    with claimed(target, (), [target / name for name in names]):
        pass
    assert list(tmp_path.iterdir()) == []


def _write(claim: Any) -> None:
    claim.files[0].write_text("of another run")


def _take(claim: Any) -> None:
    claim.place.write_text("{}")


def _remove(claim: Any) -> None:
    claim.files[0].unlink()


@pytest.mark.parametrize("names", [(), FOLDER], ids=["file", "folder"])
@pytest.mark.parametrize("change", [_write, _take, _remove])
def test_what_another_run_has_written_meanwhile_is_not_replaced(
    names: tuple[str, ...], change: Callable[[Any], None], tmp_path: Path
) -> None:
    target = tmp_path / "out"
    files = [target / name for name in names]
    (files or [target])[0].parent.mkdir(exist_ok=True)
    (files or [target])[0].write_text("old")
    with claimed(target, (), files) as claim:
        claim.check()
        change(claim)
        with pytest.raises(ValueError, match=r"was written by another run meanwhile .* nothing was replaced"):
            claim.check()


OWNERS: dict[str, tuple[dict[str, Any], str]] = {
    "on another machine": ({"host": "elsewhere"}, "on the machine 'elsewhere'.* delete .* and run"),
    "of nobody": ({"pid": "x"}, "another command"),
}


@pytest.mark.parametrize(("owner", "message"), OWNERS.values(), ids=OWNERS)
def test_a_claim_that_cannot_be_looked_up_says_what_to_do(owner: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / ".out.writing").write_text(json.dumps({**this_process(), **owner}))
    with pytest.raises(ValueError, match=message):
        take_claim(tmp_path / "out", ())


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_claim_that_no_run_wrote_is_taken_over(content: bytes, tmp_path: Path) -> None:
    (tmp_path / ".out.writing").write_bytes(content)
    take_claim(tmp_path / "out", ()).release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["out", "new/deep/out", "file/out"])
def test_a_place_that_cannot_be_written_is_refused_and_left_as_it_was(place: str, read_only: Path) -> None:
    read_only.chmod(0o755)
    (read_only / "file").touch()
    read_only.chmod(0o555)
    for names in ((), FOLDER):
        target = read_only / place
        with pytest.raises(ValueError, match=r"--output=.*: nothing can be written to .*Name another place"):
            take_claim(target, (), [target / name for name in names])
    assert [path.name for path in read_only.iterdir()] == ["file"]


# --- copies of private rows

COPIES = {
    "push": """
from car_datasets import push_selection
from car_datasets.utils import hub
hub.open_repository = lambda *_: None
hub.commit_dataset = say_and_wait
push_selection(Dataset.from_dict({"a": ["private"]}), "me/x")
""",
    "check": """
from car_datasets.publishing import comparing
comparing.load_split = say_and_wait
comparing.compare_pushed("me/x", "0" * 40, {"a": Dataset.from_dict({"a": ["private"]})}, "default", None)
""",
    "explore": """
from car_datasets import exploring
exploring.refuse_missing_extra = lambda *_: None
exploring.write_atlas = say_and_wait
exploring.explore("out")
""",
}
WAITING = """
import sys, time
from datasets import Dataset, config
config.HF_DATASETS_CACHE = sys.argv[1]
def say_and_wait(*_, **__):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("kind", COPIES)
def test_copies_of_private_rows_of_a_killed_process_are_removed(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(tmp_path))
    above = tmp_path / "car_datasets" / "temporary"
    (above / "notes").mkdir(parents=True)  # not ours
    with running(WAITING + COPIES[kind], tmp_path):
        prepare_cache()
        [copy] = [path for path in above.iterdir() if path.name.startswith(f"{kind}-")]
        assert copy.stat().st_mode & 0o777 == 0o700
        if kind == "push":
            assert list(copy.rglob("*.parquet"))
    assert copy.exists()
    with private_folder("other") as mine:  # as the next call does
        assert sorted(above.iterdir()) == sorted([above / "notes", mine])
    assert [path.name for path in above.iterdir()] == ["notes"]


def test_a_cache_that_cannot_be_written_is_named_with_what_mends_it(
    read_only: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(read_only / "cache"))
    with pytest.raises(ValueError, match=r"cache of `datasets` cannot be written: .*HF_DATASETS_CACHE=/path"):
        prepare_cache()


# --- a full disk

TEXTS = Dataset.from_dict({"a": [hashlib.sha256(bytes([i])).hexdigest() for i in range(200)]})
WRITERS: dict[str, Callable[[str], object]] = {
    "python": lambda name: Path(name).write_bytes(b"x" * 9000),
    "parquet": TEXTS.to_parquet,
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_full_disk_is_named_with_the_file_and_leaves_nothing(write: Callable[[str], object], tmp_path: Path) -> None:
    message = r"out cannot be written: .* full after [\d,]+ bytes.* up to 9,000.*run the same"
    with full_disk(), pytest.raises(OSError, match=message):
        write_whole(tmp_path / "out", write, most=9000)
    assert list(tmp_path.iterdir()) == []
