"""Claims of workers on pieces of work: files that only one worker can create, and that it renews by a heartbeat.

Does: take, renew, release and take over claims; tell how many rows other workers have done.
Does not: know what is claimed, or compare the clocks of two machines.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from car_datasets.scoring.shards.storage import Folder
from car_datasets.utils.processes import has_ended, this_process
from car_datasets.utils.settings import is_integer

EXPIRY = 60.0  # seconds without a heartbeat after which a worker counts as dead, unless the caller names another number
CLAIM = re.compile(r"(?P<piece>.+)\.claim-(?P<turn>[0-9]{1,99})")  # more digits are in no name of ours


def claim_name(piece: str, turn: int) -> str:
    """Return the name of the file of a claim; every takeover of a piece raises `turn` by 1."""
    return f"{piece}.claim-{turn}"


class Claims:
    """The claims of one worker on the pieces of work in a folder: leases that it renews by a heartbeat.

    A claim on PIECE is the file `PIECE.claim-0`, which only one worker can create. It names its owner, and is rewritten
    every few seconds as a heartbeat. The claim of a dead worker is not removed; whoever creates `PIECE.claim-1` takes
    over, so that only one of several workers that notice the death succeeds. A worker counts as dead if it ran on this
    machine and its process is gone, or if its claim has not changed for `expiry` seconds by the clock of the observer,
    so that the clocks of the machines need not agree.

    A worker that was only suspended may wake up and finish the same piece, so results must be equal and written
    atomically.

    Args:
        folder ([`Folder`]): the folder that the claims are stored in.
        expiry (`float`): seconds without a heartbeat after which a worker counts as dead.
    """

    def __init__(self, folder: Folder, expiry: float = EXPIRY) -> None:
        """Give the worker an identity; nothing is claimed yet."""
        self.folder, self.expiry = folder, expiry
        self._me = {"id": uuid.uuid4().hex, **this_process()}
        # Content of each claim of others, and the time of this machine's clock at which it was first read.
        self._seen: dict[str, tuple[bytes | None, float]] = {}

    def take(self, piece: str, turns: Mapping[str, int]) -> str | None:
        """Claim a piece.

        Args:
            piece (`str`): the name of the file that the worker will write. Check again that it is missing once the
                claim is taken: another worker may have finished it and released its claim meanwhile.
            turns (`Mapping`): the number of the newest claim on each piece, from [`last_turns`].

        Returns:
            `str` or `None`: the name of the claim; `None` if another worker holds the piece.
        """
        turn = turns.get(piece, -1)
        if turn >= 0 and not self._is_dead(claim_name(piece, turn)):
            return None
        claim = claim_name(piece, turn + 1)
        return claim if self.folder.create(claim, self._sign(0)) else None

    @contextlib.contextmanager
    def renewing(self, claim: str, done: Callable[[], int]) -> Iterator[None]:
        """Renew a claim in the background, and release it at the end.

        Args:
            claim (`str`): the name that `take` returned.
            done (`Callable`): returns the rows of the piece that are done, which is published with the heartbeat.
        """
        ended = threading.Event()

        def renew() -> None:
            while not ended.wait(min(5.0, self.expiry / 6)):  # five missed heartbeats do not expire a claim
                with contextlib.suppress(Exception):  # of a full disk, say; the worker will meet and report it
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
        """Remove a claim, and the claims of dead workers that it has replaced."""
        piece, _, last = claim.rpartition(".claim-")
        names = {claim}
        with contextlib.suppress(OSError):
            names |= self.folder.names()
        # Those that exist, since a stray file may have any number. In ascending order: while a newer claim exists, an
        # older one is not valid, so no moment looks unclaimed.
        turns = {int(name["turn"]) for name in map(CLAIM.fullmatch, names) if name and name["piece"] == piece}
        for turn in sorted(turn for turn in turns | {int(last)} if turn <= int(last)):
            with contextlib.suppress(OSError):
                self.folder.remove(claim_name(piece, turn))

    def rows_elsewhere(self, names: Collection[str]) -> int:
        """Return the rows that other workers have done of unfinished pieces, according to the claims among `names`."""
        open_claims = [claim_name(piece, turn) for piece, turn in last_turns(names).items() if piece not in names]
        owners = [_parse(self.folder.read(claim)) for claim in open_claims]
        return sum(owner.get("rows", 0) for owner in owners if owner.get("id") != self._me["id"])

    def _sign(self, rows: int) -> bytes:
        # "at" makes every heartbeat differ from the last one; nobody compares it with a clock.
        return json.dumps({**self._me, "rows": rows, "at": time.time()}).encode()

    def _is_dead(self, claim: str) -> bool:
        content, now = self.folder.read(claim), time.monotonic()
        owner = _parse(content)
        # A process of this machine can be looked up, which tells at once; of any other only the heartbeat is seen.
        if has_ended(owner):
            return True
        seen, since = self._seen.get(claim, (None, now))
        if content != seen or claim not in self._seen:
            self._seen[claim] = (content, now)  # the first look, or a heartbeat: the lease starts anew
            return False
        return now - since > self.expiry


def last_turns(names: Collection[str]) -> dict[str, int]:
    """Return the number of the newest claim on each piece that is claimed; only that one is valid."""
    last: dict[str, int] = {}
    for claim in filter(None, map(CLAIM.fullmatch, names)):
        last[claim["piece"]] = max(int(claim["turn"]), last.get(claim["piece"], 0))
    return last


def _parse(content: bytes | None) -> dict[str, Any]:
    """Return the owner of a claim; an empty dict for what no worker wrote, or has only begun to write."""
    try:
        owner = json.loads(content or b"{}")
    except (ValueError, RecursionError):
        return {}
    if not isinstance(owner, dict) or not is_integer(rows := owner.get("rows", 0)) or not 0 <= rows < 2**63:
        return {}
    return owner
