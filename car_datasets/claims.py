"""Who works on which piece of a shared folder: claims, which are files that only one worker can make.

Does: take, renew, give back and take over claims, and write whole files, in a local folder or behind an fsspec URL.
Does not: know what the pieces are (shards.py), or compare the clocks of two machines.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from car_datasets.results import write_whole

CLAIM = re.compile(r"(?P<piece>.+)\.claim-(?P<turn>\d+)")


class Folder:
    """A flat folder of whole files, local or behind any fsspec URL (`s3://...`, `memory://...`).

    Args:
        location (`str` or `PathLike`): made when something is written.

    `local` is its path where it is one, else `None`. Between two looks at it for what others have done, workers wait
    `patience` seconds.
    """

    claimable = True
    patience = 0.5

    def __init__(self, location: str | os.PathLike[str]) -> None:
        from fsspec.core import url_to_fs
        from fsspec.implementations.local import LocalFileSystem

        self.location = os.fspath(location)
        self._fs, self._path = url_to_fs(self.location)
        self.local = Path(self._path) if isinstance(self._fs, LocalFileSystem) else None

    def __str__(self) -> str:
        return self.location

    def make(self) -> None:
        """Make the folder and its parents."""
        self._fs.makedirs(self._path, exist_ok=True)

    def names(self) -> set[str]:
        """The names of its files; none where it is not there."""
        self._fs.invalidate_cache()
        try:
            return {str(path).rstrip("/").rsplit("/", 1)[-1] for path in self._fs.ls(self._path, detail=False)}
        except FileNotFoundError:
            return set()

    def read(self, name: str) -> bytes | None:
        """The content of a file, or `None` where it is not there."""
        try:
            content: bytes = self._fs.cat_file(self._at(name))
        except FileNotFoundError:
            return None
        return content

    def create(self, name: str, content: bytes) -> bool:
        """Make a file unless it is there: of several that try, one succeeds (O_EXCL, or a put with a condition).

        Where a filesystem has no such thing, several may succeed; two workers then do the same work, with equal results.
        """
        try:
            if self.local is not None:
                _create(self.local / name, content)
            else:
                self._fs.pipe_file(self._at(name), content, mode="create")
        except FileExistsError:
            return False
        return True

    def write(self, name: str, content: bytes) -> None:
        """Write a small file, whole or not at all."""
        if self.local is not None:
            write_whole(self.local / name, lambda path: Path(path).write_bytes(content))
        else:
            self._fs.pipe_file(self._at(name), content)  # an object store's put is whole

    def upload(self, path: Path, name: str, replace: bool = False) -> bool:
        """Put a local file there, whole or not at all, in the place of any other: under another name first, then moved."""
        partial = f".{name}.{uuid.uuid4().hex[:8]}"
        self._fs.put_file(str(path), self._at(partial))
        self._fs.mv(self._at(partial), self._at(name))
        return True

    def download(self, name: str, path: Path) -> None:
        """Fetch a file; what is at `path` is always whole."""
        write_whole(path, lambda partial: self._fs.get_file(self._at(name), partial))

    def remove(self, name: str) -> None:
        """Remove a file if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._at(name))

    def _at(self, name: str) -> str:
        return f"{self._path.rstrip('/')}/{name}"


class Claims:
    """One worker's claims on the pieces of a folder.

    A claim on PIECE is the file `PIECE.claim-0`, which only one worker can make. It tells who that is, and is written anew
    every few seconds. The claim of a worker that has died is not removed: whoever makes `PIECE.claim-1` has taken over, so
    that of several that find it dead, one gets it. A worker is dead if it ran on this machine and its process is gone, or
    if its claim has stayed the same for `expiry` seconds by the clock of the one who looks.

    A worker that was only asleep may go on and do the same work: pieces must come out equal, and be put there whole.

    Args:
        folder ([`Folder`]): where the claims are.
        expiry (`float`): seconds without a sign of life.
    """

    def __init__(self, folder: Folder, expiry: float = 60.0) -> None:
        process = psutil.Process()
        self.folder, self.expiry = folder, expiry
        self._me = {"id": uuid.uuid4().hex, "host": _host(), "pid": process.pid, "started": process.create_time()}
        self._seen: dict[str, tuple[bytes | None, float]] = {}

    def take(self, piece: str, turns: Mapping[str, int]) -> str | None:
        """Claim a piece: the name of the claim, or `None` where another worker has it.

        Args:
            piece (`str`): a file name. Look for the file itself again once the claim is taken.
            turns (`Mapping`): what [`last_turns`] found in the folder.
        """
        turn = turns.get(piece, -1)
        if turn >= 0 and not self._is_dead(f"{piece}.claim-{turn}"):
            return None
        claim = f"{piece}.claim-{turn + 1}"
        return claim if self.folder.create(claim, self._sign(0)) else None

    @contextlib.contextmanager
    def renewing(self, claim: str, done: Callable[[], int]) -> Iterator[None]:
        """Keep a claim alive, and give it back at the end.

        Args:
            claim (`str`): what `take` gave.
            done (`Callable`): how many rows of it are done, which others can read, see `rows_elsewhere`.
        """
        ended = threading.Event()

        def renew() -> None:
            while not ended.wait(min(5.0, self.expiry / 6)):
                with contextlib.suppress(Exception):  # a full disk, or an object store's: for the worker to report
                    self.folder.write(claim, self._sign(done()))

        beat = threading.Thread(target=renew, daemon=True)
        beat.start()
        try:
            yield
        finally:
            ended.set()
            beat.join()
            self.release(claim)

    def release(self, claim: str) -> None:
        """Remove a claim, and those that it has taken over."""
        piece, turn = claim.rsplit(".claim-", 1)
        for earlier in range(int(turn) + 1):
            with contextlib.suppress(OSError):
                self.folder.remove(f"{piece}.claim-{earlier}")

    def rows_elsewhere(self, names: Collection[str]) -> int:
        """Rows that other workers have done of pieces that are not finished yet, by the claims among `names`."""
        open_claims = {piece: turn for piece, turn in last_turns(names).items() if piece not in names}
        owners = [_parse(self.folder.read(f"{piece}.claim-{turn}")) for piece, turn in open_claims.items()]
        return sum(owner.get("rows", 0) for owner in owners if owner.get("id") != self._me["id"])

    def _sign(self, rows: int) -> bytes:
        return json.dumps({**self._me, "rows": rows, "at": time.time()}).encode()

    def _is_dead(self, claim: str) -> bool:
        content, now = self.folder.read(claim), time.monotonic()
        owner = _parse(content)
        if owner.get("host") == self._me["host"] and not _runs(owner["pid"], owner["started"]):
            return True
        seen, since = self._seen.get(claim, (None, now))
        if content != seen or claim not in self._seen:
            self._seen[claim] = (content, now)
            return False
        return now - since > self.expiry


def last_turns(names: Collection[str]) -> dict[str, int]:
    """Of every piece that is claimed, the number of the claim that counts: the last."""
    last: dict[str, int] = {}
    for found in filter(None, map(CLAIM.fullmatch, names)):
        last[found["piece"]] = max(int(found["turn"]), last.get(found["piece"], 0))
    return last


def _create(path: Path, content: bytes) -> None:
    with path.open("xb") as file:  # O_CREAT | O_EXCL
        try:
            file.write(content)
            file.flush()
        except OSError:  # a full disk: an empty claim would keep others away
            path.unlink()
            raise


def _parse(content: bytes | None) -> dict[str, Any]:
    """A claim, which is empty for the moment between its making and its writing."""
    try:
        found = json.loads(content or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _host() -> str:
    """This machine since it was started, and its container: where a process id means one process."""
    names = [platform.node()]
    with contextlib.suppress(OSError):  # Linux only
        names += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(names)


def _runs(pid: int, started: float) -> bool:
    try:
        process = psutil.Process(pid)
        alive: bool = process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - started) < 2
    except psutil.NoSuchProcess:
        return False
    return alive
