"""`JudgeCache`: answers of judges and what they cost, in one SQLite file that several processes share.

Does: keep every answer from the moment that it has arrived; let one process at a time make a call; reserve the most
that a call can cost before it is made, so that a cap is not passed by all processes together.
Does not: hold a prompt, a row or an API key, make a call, or know what an answer means.
"""

from __future__ import annotations

import contextlib
import errno
import json
import random
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from car_datasets.utils.processes import has_ended, this_process

FORMAT = 1  # of the file, in its user_version
PATIENCE = 60.0  # seconds to wait for another process that writes the file
TABLES = """
CREATE TABLE answers (key TEXT PRIMARY KEY, reply TEXT NOT NULL);
CREATE TABLE open_calls (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL, tokens INTEGER NOT NULL, cost REAL NOT NULL, owner TEXT NOT NULL,
    until REAL NOT NULL
);
CREATE TABLE spent (calls INTEGER NOT NULL, tokens INTEGER NOT NULL, cost REAL NOT NULL);
INSERT INTO spent VALUES (0, 0, 0);
"""


class Reply(NamedTuple):
    """The answer of an endpoint to one call.

    Args:
        content (`str`): what the model wrote.
        finish (`str`): why it ended, such as `"stop"` or `"length"`.
        refusal (`str`): the words of a refusal, or `""`.
        prompt_tokens, answer_tokens (`int`, *optional*): what the endpoint counted; `None` if it did not say.
    """

    content: str
    finish: str = "stop"
    refusal: str = ""
    prompt_tokens: int | None = None
    answer_tokens: int | None = None

    @property
    def tokens(self) -> int | None:
        """Return the tokens of prompt and answer, or `None` if the endpoint did not count them."""
        if self.prompt_tokens is None or self.answer_tokens is None:
            return None
        return self.prompt_tokens + self.answer_tokens


class Spent(NamedTuple):
    """What a cache has recorded.

    Args:
        calls (`int`): calls that were answered or may have been billed.
        tokens (`int`): their tokens, of prompts and answers. A call without an answer counts as the most that it can
            take.
        cost (`float`): the same in the currency of the prices.
    """

    calls: int
    tokens: int
    cost: float


class Caps(NamedTuple):
    """The most that may be spent.

    Args:
        tokens (`int`, *optional*): of prompts and answers; `None` for no limit.
        cost (`float`, *optional*): in the currency of the prices; `None` for no limit.
    """

    tokens: int | None = None
    cost: float | None = None


class Ticket(NamedTuple):
    """A call that may be made now.

    Args:
        number (`int`): of the call in the file.
        tokens (`int`), cost (`float`): what was reserved for it.
    """

    number: int
    tokens: int
    cost: float


class Wait(NamedTuple):
    """A call has to wait for others, whose answer may be the same, or whose end may leave room below the cap."""


class Full(NamedTuple):
    """A call could pass the cap, and nothing that runs will leave room for it."""

    spent: Spent


class JudgeCache:
    """A file of answers and calls, open in one process; threads may share it.

    Use it in a `with` block, in the process that makes the calls: an open file must not be taken along by a fork.

    Args:
        path (`Path`): the file; it is made if it does not exist. It must be on a disk of this machine, as SQLite does
            not lock files on a network reliably.

    Raises:
        ValueError: the file is not such a cache, or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()  # of this process's connection; SQLite itself locks out other processes
        self._owner = json.dumps(this_process())
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cache={str(path)!r}: its folder cannot be made ({error.strerror}).") from error
        with self._explaining():
            self._file = sqlite3.connect(path, timeout=PATIENCE, isolation_level=None, check_same_thread=False)
            try:
                self._keep_a_log()
                self._file.execute("PRAGMA synchronous=NORMAL")
                with self._writing():
                    self._make_tables()
            except BaseException:
                self._file.close()
                raise

    def __enter__(self) -> JudgeCache:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _keep_a_log(self) -> None:
        """Let a commit be written to a log, so that it waits for no disk and survives the death of the process."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                self._file.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError as error:
                # SQLite does not wait its timeout here: it fails at once while another process does the same.
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.01 * (1 + random.random()))

    def _make_tables(self) -> None:
        version = self._one("PRAGMA user_version")[0]
        holds = self._one("SELECT count(*) FROM sqlite_master")[0]
        if version == 0 and holds == 0:
            for statement in filter(str.strip, TABLES.split(";")):
                self._file.execute(statement)
            self._file.execute(f"PRAGMA user_version={FORMAT}")
        elif version != FORMAT:
            raise ValueError(
                f"cache={str(self.path)!r} is a database of another kind or version; name a new file (--cache FILE)."
            )

    def spent(self) -> Spent:
        """Return what the file has recorded, with the calls that run now at the most that they can take."""
        with self._lock, self._explaining():
            return self._spent()

    def _spent(self) -> Spent:
        calls, tokens, cost = self._one("SELECT calls, tokens, cost FROM spent")
        running = self._one("SELECT count(*), total(tokens), total(cost) FROM open_calls")
        return Spent(calls + running[0], tokens + int(running[1]), cost + running[2])

    def find(self, key: str) -> Reply | None:
        """Return the answer that is kept under a key."""
        with self._lock, self._explaining():
            return self._find(key)

    def _find(self, key: str) -> Reply | None:
        row = self._one("SELECT reply FROM answers WHERE key = ?", key)
        return None if row is None else Reply(*json.loads(row[0]))

    def begin(self, key: str, most: tuple[int, float], caps: Caps, seconds: float) -> Reply | Ticket | Wait | Full:
        """Reserve what a call can cost, unless its answer is there or the cap leaves no room.

        Args:
            key (`str`): of the answer.
            most (`tuple[int, float]`): the most tokens and money that the call can cost.
            caps ([`Caps`]): the limits, over everything that the file has recorded.
            seconds (`float`): the longest that the call can take; a reservation of another machine counts as dead
                afterwards.

        Returns:
            [`Ticket`] if the call may be made, and must be ended by [`~JudgeCache.finish`],
            [`~JudgeCache.write_off`] or [`~JudgeCache.release`]; [`Reply`] if the answer is kept already; [`Wait`] to
            ask again soon; [`Full`] if the cap has no room.
        """
        with self._lock, self._explaining(), self._writing():
            if (reply := self._find(key)) is not None:
                return reply
            alive = self._write_off_dead()
            if key in alive:
                return Wait()
            spent = self._spent()
            over = caps.tokens is not None and spent.tokens + most[0] > caps.tokens
            if over or (caps.cost is not None and spent.cost + most[1] > caps.cost):
                return Wait() if alive else Full(spent)
            until = time.time() + seconds
            entry = (key, *most, self._owner, until)
            made = self._file.execute(
                "INSERT INTO open_calls (key, tokens, cost, owner, until) VALUES (?, ?, ?, ?, ?)", entry
            )
            return Ticket(int(made.lastrowid or 0), *most)

    def _write_off_dead(self) -> set[str]:
        """Count the calls of processes that have ended as made, and return the keys of all others."""
        alive = set()
        rows = self._file.execute("SELECT id, key, tokens, cost, owner, until FROM open_calls").fetchall()
        ended = {owner: owner != self._owner and has_ended(json.loads(owner)) for *_, owner, _ in rows}
        for number, key, tokens, cost, owner, until in rows:
            if ended[owner] or (owner != self._owner and until < time.time()):
                self._close(Ticket(number, tokens, cost), tokens, cost)
            else:
                alive.add(key)
        return alive

    def finish(self, ticket: Ticket, key: str, reply: Reply, cost: float) -> None:
        """Keep an answer, and count what it took in place of what was reserved.

        Args:
            ticket ([`Ticket`]): of the call.
            key (`str`): of the answer.
            reply ([`Reply`]): the answer. If it does not say its tokens, the call counts as reserved.
            cost (`float`): what it cost; ignored if the answer does not say its tokens.
        """
        counted = (ticket.tokens, ticket.cost) if reply.tokens is None else (reply.tokens, cost)
        with self._lock, self._explaining(), self._writing():
            self._file.execute("INSERT OR IGNORE INTO answers VALUES (?, ?)", (key, json.dumps(reply)))
            self._close(ticket, *counted)

    def write_off(self, ticket: Ticket) -> None:
        """Count a call that brought no answer, and may have been billed, as the most that it can cost."""
        with self._lock, self._explaining(), self._writing():
            self._close(ticket, ticket.tokens, ticket.cost)

    def release(self, ticket: Ticket) -> None:
        """Forget a call that was certainly not billed."""
        with self._lock, self._explaining(), self._writing():
            self._file.execute("DELETE FROM open_calls WHERE id = ?", (ticket.number,))

    def _close(self, ticket: Ticket, tokens: int, cost: float) -> None:
        # Another machine may have closed it meanwhile, as a call that took too long.
        if self._file.execute("DELETE FROM open_calls WHERE id = ?", (ticket.number,)).rowcount:
            self._file.execute(
                "UPDATE spent SET calls = calls + 1, tokens = tokens + ?, cost = cost + ?", (tokens, cost)
            )

    def _one(self, statement: str, *values: Any) -> Any:
        return self._file.execute(statement, values).fetchone()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Hold the file against all other writers in this block, and write all of it or nothing."""
        self._file.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._file.execute("ROLLBACK")
            raise
        self._file.execute("COMMIT")

    @contextlib.contextmanager
    def _explaining(self) -> Iterator[None]:
        """Raise SQLite's errors as those that the package raises for files."""
        try:
            yield
        except sqlite3.Error as error:
            if "full" in str(error):
                raise OSError(errno.ENOSPC, f"No space left for cache={str(self.path)!r}") from error
            raise ValueError(
                f"cache={str(self.path)!r} cannot be used ({error}). Name a new file on a disk of this machine "
                "(--cache FILE)."
            ) from error
