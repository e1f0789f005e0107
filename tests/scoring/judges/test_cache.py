"""cache.py: one process makes a call, all share the answer, and the cap holds for all together, also after a kill."""

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from car_datasets.scoring.judges.cache import Caps, Full, JudgeCache, Reply, Spent, Ticket, Wait

REPLY = Reply('{"good": 3}', "stop", "", 20, 5)
MOST = (100, 0.5)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new" / "judge.sqlite"


def begin(cache: JudgeCache, key: str, caps: Caps = Caps()) -> Ticket:  # noqa: B008 (a tuple)
    found = cache.begin(key, MOST, caps, 60)
    assert isinstance(found, Ticket)
    return found


def test_an_answer_is_kept_and_counts_what_it_took(path: Path) -> None:
    with JudgeCache(path) as cache, JudgeCache(path) as other:
        ticket = begin(cache, "a")
        assert other.spent() == Spent(1, 100, 0.5)
        assert isinstance(other.begin("a", MOST, Caps(), 60), Wait)
        cache.finish(ticket, "a", REPLY, 0.1)
        assert other.begin("a", MOST, Caps(), 60) == REPLY
        assert other.find("a") == REPLY
        assert other.find("b") is None
        cache.finish(begin(cache, "b"), "b", Reply("no usage"), 0.0)
        assert cache.spent() == Spent(2, 125, 0.6)
    with JudgeCache(path) as cache:
        assert cache.find("a") == REPLY
        assert cache.spent() == Spent(2, 125, 0.6)


@pytest.mark.parametrize("caps", [Caps(tokens=250), Caps(cost=1.25)])
def test_what_is_reserved_leaves_no_room_until_it_is_known(path: Path, caps: Caps) -> None:
    with JudgeCache(path) as cache:
        first, second = begin(cache, "a", caps), begin(cache, "b", caps)
        assert isinstance(cache.begin("c", MOST, caps, 60), Wait)
        cache.release(first)
        third = begin(cache, "c", caps)
        cache.write_off(second)
        cache.finish(third, "c", REPLY, 0.1)
        for key in ("d", "e"):
            cache.finish(begin(cache, key, caps), key, REPLY, 0.1)
        full = cache.begin("f", MOST, caps, 60)
        assert isinstance(full, Full)
        assert full.spent == (4, 175, pytest.approx(0.8))


def test_calls_of_a_process_that_has_ended_count_as_made(path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from car_datasets.scoring.judges.cache import *\n"
        "cache = JudgeCache(Path(sys.argv[1])); cache.begin('a', (100, .5), Caps(), 60); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    with JudgeCache(path) as cache:
        assert cache.spent() == Spent(1, 100, 0.5)
        assert isinstance(cache.begin("a", MOST, Caps(tokens=199), 60), Full)
        begin(cache, "a", Caps(tokens=200))  # at once, without waiting for the dead
        assert cache.spent() == Spent(2, 200, 1.0)


def test_a_call_of_another_machine_is_waited_for_until_its_time_is_over(path: Path) -> None:
    elsewhere = {"host": "elsewhere", "pid": 1, "started": psutil.Process().create_time()}
    with JudgeCache(path) as cache:
        cache._owner = json.dumps(elsewhere)
        begin(cache, "a")
        cache.begin("b", MOST, Caps(), -1)
    with JudgeCache(path) as cache:
        assert isinstance(cache.begin("a", MOST, Caps(), 60), Wait)
        begin(cache, "b")


def test_a_file_that_another_process_is_making_is_waited_for(path: Path) -> None:
    path.parent.mkdir()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN IMMEDIATE")
        other.execute("CREATE TABLE made (x)")
        other.execute("DROP TABLE made")
        timer = threading.Timer(0.3, other.execute, ["COMMIT"])
        timer.start()
        with JudgeCache(path) as cache:
            assert cache.spent() == Spent(0, 0, 0)
        timer.join()


def spend(path: Path) -> int:
    made = 0
    with JudgeCache(path) as cache:
        while not isinstance(found := cache.begin(f"{os.getpid()} {made}", MOST, Caps(tokens=2_000), 60), Full):
            if isinstance(found, Ticket):
                cache.finish(found, f"{os.getpid()} {made}", REPLY, 0.1)
                made += 1
    return made


def test_processes_share_a_cap(path: Path) -> None:
    code = f"from pathlib import Path; from tests.scoring.judges.test_cache import spend; print(spend(Path({str(path)!r})))"
    runs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    made = [int(run.communicate(timeout=60)[0]) for run in runs]
    with JudgeCache(path) as cache:
        assert cache.spent()[:2] == (sum(made), 25 * sum(made))
    assert sum(made) == 77  # the last one may begin at 1,900 tokens


@pytest.mark.parametrize("kind", ["text", "other", "folder", "newer"])
def test_a_file_of_another_kind_is_refused(path: Path, kind: str) -> None:
    path.parent.mkdir()
    if kind == "text":
        path.write_text("not a database, but long enough to have a header of a hundred bytes" * 9)
    elif kind == "folder":
        path.mkdir()
    else:
        with sqlite3.connect(path) as file:
            file.execute("CREATE TABLE x (y)" if kind == "other" else "PRAGMA user_version=9")
        file.close()
    with pytest.raises(ValueError, match=r"cache='.*judge.sqlite' (cannot be used|is a database of another kind)"):
        JudgeCache(path)


def test_a_folder_that_is_read_only_is_refused(read_only: Path) -> None:
    for place in (read_only / "judge.sqlite", read_only / "new" / "judge.sqlite"):
        with pytest.raises(ValueError, match="cache="):
            JudgeCache(place)
