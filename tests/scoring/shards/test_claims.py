"""Claims: one worker gets a piece, a dead one loses it, whatever the filesystem and the clocks."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from car_datasets.scoring.shards.claims import Claims, last_turns
from car_datasets.scoring.shards.storage import Folder
from car_datasets.utils.processes import this_process

PIECE = "part-00000.arrow"


def take(claims: Claims, folder: Folder) -> str | None:
    return claims.take(PIECE, last_turns(folder.names()))


def take_many(location: str, start: float, box: multiprocessing.Queue) -> None:
    folder = Folder(location)
    claims = Claims(folder)
    time.sleep(max(0.0, start - time.time()))
    box.put([i for i in range(50) if claims.take(f"piece-{i}", {}) is not None])
    time.sleep(1)  # a claim of a process that is gone is free


def hold(location: str, ready: multiprocessing.Event) -> None:
    folder = Folder(location)
    claim = take(Claims(folder), folder)
    assert claim is not None
    ready.set()
    time.sleep(60)


@pytest.fixture(params=["local", "file", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    places = {"local": str(tmp_path / "a"), "file": f"file://{tmp_path}/a", "memory": f"memory://{tmp_path.name}"}
    found = Folder(places[request.param])
    found.make()
    return found


def test_files_are_whole_and_made_once(folder: Folder, tmp_path: Path) -> None:
    assert folder.names() == set()
    assert folder.read("x") is None
    assert folder.create("x", b"1")
    assert not folder.create("x", b"2")
    assert folder.read("x") == b"1"
    folder.write("x", b"3")
    assert folder.read("x") == b"3"
    (tmp_path / "y").write_bytes(b"4")
    folder.upload(tmp_path / "y", "x")
    folder.download("x", tmp_path / "z")
    assert (tmp_path / "z").read_bytes() == b"4"
    assert folder.names() == {"x"}
    folder.remove("x")
    folder.remove("x")
    assert folder.names() == set()


def test_a_folder_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert Folder(tmp_path / "none").names() == set()
    assert Folder("memory://no/such/place").names() == set()


def test_a_claim_is_held_and_given_back(folder: Folder) -> None:
    mine, yours = Claims(folder), Claims(folder)
    claim = take(mine, folder)
    assert claim == f"{PIECE}.claim-0"
    with mine.renewing(claim, lambda: 7):
        assert take(yours, folder) is None
    assert folder.names() == set()
    assert take(yours, folder) == claim


def test_of_many_processes_one_gets_each_piece(tmp_path: Path) -> None:
    context, start = multiprocessing.get_context("fork"), time.time() + 0.5
    box = context.Queue()
    workers = [context.Process(target=take_many, args=(str(tmp_path), start, box)) for _ in range(4)]
    for worker in workers:
        worker.start()
    found = [box.get(timeout=30) for _ in workers]
    for worker in workers:
        worker.join()
    assert sorted(piece for pieces in found for piece in pieces) == list(range(50))


def test_the_claim_of_a_killed_process_is_taken_over_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    holder = context.Process(target=hold, args=(str(tmp_path), ready))
    holder.start()
    assert ready.wait(20)
    folder = Folder(tmp_path)
    claims = Claims(folder, expiry=1000)
    assert take(claims, folder) is None
    os.kill(holder.pid, signal.SIGKILL)
    time.sleep(0.2)  # not joined: a zombie does no work either
    claim = take(claims, folder)
    assert claim == f"{PIECE}.claim-1"
    assert take(Claims(folder), folder) is None
    claims.release(claim)
    assert folder.names() == set()
    holder.join()


def elsewhere(folder: Folder, turn: int, rows: int = 0) -> None:
    """Make a claim of a process on another machine, whose clock is a year ahead."""
    owner = {"id": "other", "host": "another machine", "pid": os.getpid(), "started": 0.0, "rows": rows}
    folder.write(f"{PIECE}.claim-{turn}", json.dumps({**owner, "at": time.time() + 3e7}).encode())


def test_a_claim_from_another_machine_lives_while_it_changes(folder: Folder) -> None:
    claims = Claims(folder, expiry=0.4)
    for rows in range(4):  # 0.8 s in all, but never 0.4 s the same
        elsewhere(folder, 0, rows)
        assert take(claims, folder) is None
        time.sleep(0.2)
    time.sleep(0.3)
    assert take(claims, folder) == f"{PIECE}.claim-1"


def test_a_stale_look_takes_nothing_twice(folder: Folder) -> None:
    """Let two workers see the same dead claim, the second in a listing from before the first took over."""
    elsewhere(folder, 0)
    one, two = Claims(folder, expiry=0.1), Claims(folder, expiry=0.1)
    before = last_turns(folder.names())
    assert one.take(PIECE, before) is None
    assert two.take(PIECE, before) is None
    time.sleep(0.2)
    assert one.take(PIECE, before) == f"{PIECE}.claim-1"
    assert two.take(PIECE, before) is None


def test_a_claim_cut_off_while_it_was_made_expires(folder: Folder) -> None:
    folder.create(f"{PIECE}.claim-0", b"")
    claims = Claims(folder, expiry=0.1)
    assert take(claims, folder) is None
    time.sleep(0.2)
    assert take(claims, folder) == f"{PIECE}.claim-1"


def test_a_claim_tells_how_far_its_owner_is(folder: Folder) -> None:
    mine, yours = Claims(folder, expiry=0.3), Claims(folder)
    claim = take(mine, folder)
    assert claim is not None
    with mine.renewing(claim, lambda: 7):
        deadline = time.monotonic() + 10
        while yours.rows_elsewhere(folder.names()) != 7:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert mine.rows_elsewhere(folder.names()) == 0
        assert yours.rows_elsewhere({*folder.names(), PIECE}) == 0  # a finished piece counts as such


STRAY = {
    "no JSON": b"\xff\x00",
    "a list": b"[]",
    "deep JSON": b"[" * 100_000,
    "rows of text": b'{"id": "other", "rows": "many"}',
    "rows without end": b'{"id": "other", "rows": 1e999}',
    "no process": json.dumps({"host": this_process()["host"]}).encode(),
    "a process of text": json.dumps({"host": this_process()["host"], "pid": "x", "started": 0}).encode(),
    "a process that cannot be": json.dumps({"host": this_process()["host"], "pid": 2**80, "started": 0}).encode(),
    "a start of text": json.dumps({"host": this_process()["host"], "pid": 1, "started": "x"}).encode(),
}


@pytest.mark.parametrize("content", STRAY.values(), ids=STRAY)
@pytest.mark.parametrize("turn", ["0", "10" * 40])
def test_a_claim_that_no_worker_wrote_expires(content: bytes, turn: str, tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.create(f"{PIECE}.claim-{turn}", content)
    folder.create(f"other-{PIECE}.claim-3", b"")
    claims = Claims(folder, expiry=0.02)
    assert claims.rows_elsewhere(folder.names()) == 0
    assert take(claims, folder) is None
    time.sleep(0.05)
    claim = take(claims, folder)
    assert claim == f"{PIECE}.claim-{int(turn) + 1}"
    claims.release(claim)
    assert folder.names() == {f"other-{PIECE}.claim-3"}
