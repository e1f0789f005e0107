"""`Endpoint`: calls of an OpenAI-compatible server, with a cache, retries and a cap that is not passed.

Does: ask for one answer, from the cache if it is there; wait as the server asks, and repeat what may be repeated; find
out which forms of request the server knows; explain errors that no repetition mends.
Does not: know rubrics or rows, keep an API key in anything that is stored, or print one.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import logging
import random
import threading
import time
from collections.abc import Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from car_datasets.scoring.judges.cache import Caps, Full, JudgeCache, Reply, Ticket, Wait

logger = logging.getLogger(__name__)

FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds between two attempts, doubled each time
LONGEST_ASKED = 900.0  # seconds that a server may ask us to wait
POLL = 0.02  # seconds until a call that waits for others looks again, growing to half a second
# A token has at least one byte in the vocabularies of all current models, so a text has at most as many tokens as bytes.
# Templates of chats add some per message, and some servers a system prompt of their own.
TOKENS_PER_MESSAGE, TOKENS_PER_CALL = 16, 256

NO_ANSWER, REJECTED, CAP_REACHED = "no_answer", "rejected", "cap_reached"  # statuses of rows
FORMATS = ("json_schema", "json_object", "none")  # in the order in which they are tried
# Words in the error of a server that does not know a part of the request.
_OF_FORMAT = ("response_format", "json_schema", "json_object", "guided", "grammar", "schema", "structured")
_OF_LIMIT = ("max_tokens", "max_completion_tokens")
_UNBILLED = (429, 500, 503, 529)  # a gateway's 502, 504 and 524 say nothing of the server behind it
FATAL = (401, 402, 403, 404, 405)
ROW_ERRORS = (400, 413, 422)
_UNANSWERED = 10  # calls that fail one after the other, with no answer between them, after which a run ends


class Connection(NamedTuple):
    """Where an endpoint is and how it is called; plain values without the key.

    Args:
        base_url (`str`): the address, without `/chat/completions`.
        model (`str`): the model's name there.
        answer_tokens (`int`): the most tokens of an answer.
        timeout (`float`): seconds to wait for an answer.
        retries (`int`): repetitions of a call that failed.
        prices (`tuple[float, float]`): per million tokens of prompts and of answers.
        caps ([`Caps`]): the limits.
    """

    base_url: str
    model: str
    answer_tokens: int
    timeout: float
    retries: int
    prices: tuple[float, float]
    caps: Caps


class RowFailure(Exception):
    """A row cannot be judged; the status says why."""

    def __init__(self, status: str, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.row = ""  # its text, which the caller adds


class Stopped(Exception):
    """The run ends by an error of another call."""


class _Dialect(NamedTuple):
    """The forms of request that a server knows."""

    format: str = FORMATS[0]
    limit: str = _OF_LIMIT[0]
    temperature: bool = True


class _Seen(NamedTuple):
    dialect: _Dialect
    answered: bool


# By address and model: what this process has learnt. A process that is forked or started anew may learn it again.
_seen: dict[tuple[str, str], _Seen] = {}


def check_base_url(base_url: str) -> str:
    """Return an address without a slash at its end.

    Raises:
        ValueError: it has no scheme or host, holds credentials or a query, or names the call itself.
    """
    address = base_url.strip().rstrip("/") if isinstance(base_url, str) else ""
    shown = "base_url" if "@" in address else f"base_url={base_url!r}"  # it may hold a password
    if "://" not in address:
        raise ValueError(f"{shown} has no scheme; write http://localhost:8000/v1 or https://api.openai.com/v1.")
    try:
        parts = urlsplit(address)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        known = False
    if not known or any(character.isspace() for character in address):
        raise ValueError(f"{shown} is not an address; write http://localhost:8000/v1 or https://api.openai.com/v1.")
    if parts.username or parts.password or parts.query or parts.fragment:
        # Not shown: a password in the address would be printed, and stored with the scorer.
        raise ValueError(
            "base_url holds a password, a query or a fragment. Leave it out, and pass the key as api_key=."
        )
    if address.endswith("/chat/completions"):
        raise ValueError(f"{shown} names the call itself; leave out /chat/completions.")
    return address


class Endpoint:
    """A server that threads ask for answers.

    Args:
        connection ([`Connection`]): address, model and limits.
        key (`str`, *optional*): the API key.
        key_source (`str`): where the key comes from or should come from, for messages.
        cache ([`JudgeCache`]): of answers and costs, open in this process.
    """

    def __init__(self, connection: Connection, key: str | None, key_source: str, cache: JudgeCache) -> None:
        openai: Any = importlib.import_module("openai")  # of the extra
        self._connection, self._cache, self._openai = connection, cache, openai
        self._secret, self._key_source = key or "", key_source
        # Repetitions are made here: each needs a reservation of its own. A server without keys ignores the one given.
        self._client = openai.OpenAI(
            base_url=connection.base_url, api_key=key or "none", max_retries=0, timeout=connection.timeout
        )
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._resume_at = 0.0  # a server that asks one call to wait means all
        self._unanswered = 0

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def stop(self) -> None:
        """End all calls that wait; those that are on their way are awaited by their threads."""
        self._stop.set()

    @property
    def has_answered(self) -> bool:
        """Return True if this process has an answer of the server already, so that many may be asked at once."""
        return self._place in _seen and _seen[self._place].answered

    @property
    def _place(self) -> tuple[str, str]:
        return self._connection.base_url, self._connection.model

    def check(self) -> None:
        """Ask for the list of models, once per process, which tells a wrong address or key before any row is sent.

        Raises:
            ConnectionError: nothing answers at the address.
            ValueError: the server wants another key.
        """
        if self._place in _seen:
            return
        try:
            self._client.models.with_raw_response.list()
        except self._openai.APIStatusError as error:
            # Not every server has this list.
            if error.status_code in (401, 403):
                self._raise_fatal(error)
        except self._openai.APIConnectionError as error:
            if _was_not_sent(error):
                raise ConnectionError(
                    f"base_url={self._connection.base_url!r}: nothing answers there ({self._said(error)}). Start the "
                    "server, or correct the address."
                ) from None
        _seen[self._place] = _Seen(_Dialect(), False)

    def ask(self, messages: Sequence[Mapping[str, str]], schema: Mapping[str, Any]) -> Reply:
        """Return the answer to a conversation, from the cache or from the server.

        Args:
            messages (`Sequence[Mapping[str, str]]`): with the keys `role` and `content`.
            schema (`Mapping`): the JSON schema of the answer.

        Raises:
            RowFailure: the server rejects this call, or does not answer it, or the cap leaves no room.
            ValueError: the server answers no call of this kind, or bills more than a call can cost.
            ConnectionError: the server does not answer any more.
            Stopped: the run ends by an error of another call.
        """
        key = answer_key(self._connection, messages, schema)
        if (kept := self._cache.find(key)) is not None:
            return kept
        self.check()
        most = self._most(messages, schema)
        # A call that may be billed may have no second attempt without a second reservation.
        for attempt in range(self._connection.retries + 1):
            self._sleep_until_resumed()
            ticket = self._ticket(key, most)
            if isinstance(ticket, Reply):
                return ticket
            failed: Any = None
            try:
                reply = self._call(messages, schema)
            except self._openai.APIError as error:
                failed = error  # handled below, so that no error of ours shows the request, with its key, as its cause
            except BaseException:
                self._cache.write_off(ticket)
                raise
            if failed is None:
                self._keep(ticket, key, reply)
                return reply
            self._settle(ticket, failed)
            self._refuse(failed)
            self._wait(attempt, failed)
        self._count_unanswered(self._said(failed))
        raise RowFailure(NO_ANSWER, self._said(failed))

    def _most(self, messages: Sequence[Mapping[str, str]], schema: Mapping[str, Any]) -> tuple[int, float]:
        """Return the most tokens and money that a call can cost."""
        texts = [*(message["content"] for message in messages), json.dumps(schema)]
        prompt = sum(len(text.encode()) for text in texts) + TOKENS_PER_MESSAGE * len(messages) + TOKENS_PER_CALL
        answer = self._connection.answer_tokens
        return prompt + answer, self._cost(prompt, answer)

    def _cost(self, prompt_tokens: int, answer_tokens: int) -> float:
        prices = self._connection.prices
        return (prompt_tokens * prices[0] + answer_tokens * prices[1]) / 1e6

    def _ticket(self, key: str, most: tuple[int, float]) -> Ticket | Reply:
        """Return a reservation, or the answer that another call has brought meanwhile.

        Raises:
            RowFailure: the cap leaves no room.
        """
        pause = POLL
        # Longer than the call, whose time limit is for each part that arrives.
        seconds = 3 * self._connection.timeout + 60
        while isinstance(found := self._cache.begin(key, most, self._connection.caps, seconds), Wait):
            if self._stop.wait(pause):
                raise Stopped
            pause = min(0.5, 1.5 * pause)
        if isinstance(found, Full):
            caps, spent = self._connection.caps, found.spent
            limits = [f"max_tokens={caps.tokens:,} (so far {spent.tokens:,} tokens)"] if caps.tokens is not None else []
            limits += [f"max_cost={caps.cost:g} (so far {spent.cost:.4g})"] if caps.cost is not None else []
            raise RowFailure(
                CAP_REACHED, f"{' and '.join(limits)}: one more call can take {most[0]:,} tokens and cost {most[1]:.4g}"
            )
        return found

    def _call(self, messages: Sequence[Mapping[str, str]], schema: Mapping[str, Any]) -> Reply:
        """Make one call, in the forms that the server knows; those that it rejects are tried in plainer ones."""
        dialect = _seen.get(self._place, _Seen(_Dialect(), False)).dialect
        while True:
            try:
                raw = self._client.chat.completions.with_raw_response.create(**self._request(messages, schema, dialect))
            except self._openai.APIStatusError as error:
                plainer = self._plainer(dialect, error)
                if plainer is None:
                    raise
                dialect = plainer
                continue
            reply = _read_reply(raw.http_response.content)
            if reply is None:
                # As of a proxy that ends a page early: nothing tells whether the call was billed.
                request = raw.http_response.request
                raise self._openai.APIConnectionError(message="The answer is no chat completion.", request=request)
            # Only what was answered: an overlong row is rejected in every form.
            _seen[self._place] = _Seen(dialect, True)
            return reply

    def _request(
        self, messages: Sequence[Mapping[str, str]], schema: Mapping[str, Any], dialect: _Dialect
    ) -> dict[str, Any]:
        """Return the arguments of a call."""
        request: dict[str, Any] = {"model": self._connection.model, "messages": list(messages)}
        request[dialect.limit] = self._connection.answer_tokens
        if dialect.temperature:
            request["temperature"] = 0
        if dialect.format == "json_schema":
            named = {"name": "judgement", "strict": True, "schema": dict(schema)}
            request["response_format"] = {"type": "json_schema", "json_schema": named}
        elif dialect.format == "json_object":
            request["response_format"] = {"type": "json_object"}
        return request

    def _plainer(self, dialect: _Dialect, error: Any) -> _Dialect | None:
        """Return the next form of request to try, or None if the error is about something else."""
        if error.status_code not in (*ROW_ERRORS, 500, 501):
            return None
        said = self._said(error).lower()
        if dialect.temperature and "temperature" in said:
            logger.warning("%s takes no temperature=0: its answers may differ from call to call.", self._place[1])
            return dialect._replace(temperature=False)
        if dialect.limit == _OF_LIMIT[0] and _OF_LIMIT[1] in said:
            return dialect._replace(limit=_OF_LIMIT[1])
        # A server that has answered nothing yet may not say what it does not know.
        unnamed = error.status_code in (400, 422) and not self.has_answered
        if dialect.format != FORMATS[-1] and (unnamed or any(word in said for word in _OF_FORMAT)):
            return dialect._replace(format=FORMATS[FORMATS.index(dialect.format) + 1])
        return None

    def _keep(self, ticket: Ticket, key: str, reply: Reply) -> None:
        """Store an answer, whatever it is worth: it was paid for.

        Raises:
            ValueError: the server bills more than a call can cost, so no cap could be held.
        """
        cost = 0.0 if reply.tokens is None else self._cost(reply.prompt_tokens or 0, reply.answer_tokens or 0)
        self._cache.finish(ticket, key, reply, cost)
        with self._lock:
            self._unanswered = 0
        over = reply.tokens is not None and (reply.tokens > ticket.tokens or cost > ticket.cost * (1 + 1e-9))
        if over and self._connection.caps != Caps():
            raise ValueError(
                f"base_url={self._connection.base_url!r} counts {reply.prompt_tokens} tokens for a prompt and "
                f"{reply.answer_tokens} for an answer, where answer_tokens={self._connection.answer_tokens} was the "
                f"limit and {ticket.tokens} tokens in all were reserved: it does not keep the limit, so no cap can be held "
                "there. Leave out max_tokens and max_cost, or name an endpoint that keeps it."
            )

    def _settle(self, ticket: Ticket, error: Any) -> None:
        """Free what was reserved for a call without an answer if it was certainly not billed, else count it."""
        status = getattr(error, "status_code", None)
        if _was_not_sent(error) if status is None else status < 500 or status in _UNBILLED:
            self._cache.release(ticket)
        else:
            self._cache.write_off(ticket)

    def _refuse(self, error: Any) -> None:
        """Raise an error for a failure that no repetition mends.

        Raises:
            ValueError: the key, the model, the address or the account is at fault.
            RowFailure: the row is.
        """
        status = getattr(error, "status_code", None)
        if status in FATAL or error.code == "insufficient_quota":
            self._raise_fatal(error)
        if status in ROW_ERRORS:
            # Many rows may be too long; but a server that has never answered rejects all of them.
            if self._cache.spent().calls == 0:
                self._count_unanswered(self._said(error))
            raise RowFailure(REJECTED, self._said(error))

    def _raise_fatal(self, error: Any) -> None:
        said, status, model = self._said(error), error.status_code, self._connection.model
        place = f"base_url={self._connection.base_url!r}"
        if status in (401, 403):
            mend = (
                f"It does not accept the key from {self._key_source}; pass another as api_key=."
                if self._secret
                else f"It wants an API key: set the environment variable {self._key_source}, or pass api_key=."
            )
            raise ValueError(f"{place} answers {status} ({said}). {mend}") from None
        if status in (404, 405):
            known = self._models()
            mend = f"It has {known[:8]}." if known else "Most servers want an address that ends in /v1."
            raise ValueError(f"{place} answers {status} for model={model!r} ({said}). {mend}") from None
        raise ValueError(
            f"{place} answers {status} ({said}): the account cannot pay for more. Answers so far are kept; run the same "
            "call again once it can."
        ) from None

    def _models(self) -> list[str]:
        """Return the models that the server lists, or nothing if it has no list."""
        with contextlib.suppress(self._openai.APIError, ValueError, AttributeError, TypeError):
            listed = json.loads(self._client.models.with_raw_response.list().http_response.content)
            return [str(entry["id"]) for entry in listed["data"]]
        return []

    def _count_unanswered(self, failure: str) -> None:
        """Raise ConnectionError if many calls in a row have failed, as a run through all other rows would be in vain."""
        with self._lock:
            self._unanswered += 1
            if self._unanswered < _UNANSWERED:
                return
        raise ConnectionError(
            f"base_url={self._connection.base_url!r} answered none of the last {self._unanswered} calls, each made "
            f"{self._connection.retries + 1} times if the server was at fault ({failure}). Answers so far are kept; run "
            "the same call again once it answers."
        )

    def _wait(self, attempt: int, error: Any) -> None:
        """Sleep before the next attempt, as long as the server asks, and keep all other calls from going before.

        Raises:
            ConnectionError: the server asks for more than a quarter of an hour.
        """
        if attempt == self._connection.retries:
            return
        asked = _asked_wait(error.response.headers) if hasattr(error, "response") else 0.0
        if asked > LONGEST_ASKED:
            raise ConnectionError(
                f"base_url={self._connection.base_url!r} asks to wait {asked:.0f} seconds ({self._said(error)}). Answers "
                "so far are kept; run the same call again then."
            )
        if asked > 0:
            with self._lock:
                self._resume_at = max(self._resume_at, time.monotonic() + asked)
            return
        # A part of it by chance, so that calls that failed together do not come back together.
        seconds = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1)
        if self._stop.wait(seconds):
            raise Stopped

    def _sleep_until_resumed(self) -> None:
        while True:
            with self._lock:
                left = self._resume_at - time.monotonic()
            if self._stop.wait(max(0.0, left)):
                raise Stopped
            if left <= 0:
                return

    def _said(self, error: Any) -> str:
        """Return what an error says, in one short line without the key."""
        body = getattr(error, "body", None)
        text = body.get("message") if isinstance(body, Mapping) else None
        text = str(text or error.__cause__ or error)
        if self._secret:
            text = text.replace(self._secret, "***")
        return " ".join(text.split())[:300]


def answer_key(connection: Connection, messages: Sequence[Mapping[str, str]], schema: Mapping[str, Any]) -> str:
    """Return the key of an answer: a digest of model, messages, schema and sampling, and of no address.

    Args:
        connection ([`Connection`]): of which model and limit of an answer count.
        messages (`Sequence[Mapping[str, str]]`), schema (`Mapping`): as of [`~Endpoint.ask`].
    """
    content = [connection.model, list(map(dict, messages)), dict(schema), connection.answer_tokens, 0]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _asked_wait(headers: Mapping[str, str]) -> float:
    """Return the seconds that a server asks to wait: a number or a date; 0 if it asks for nothing."""
    text = headers.get("retry-after", "").strip()
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, TypeError):
            return 0.0
    return seconds if seconds > 0 else 0.0


def _was_not_sent(error: Any) -> bool:
    """Return True if a call has failed before anything was sent."""
    return type(error.__cause__).__name__ in ("ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol")


def _read_reply(content: bytes) -> Reply | None:
    """Return the answer in the body of a response, or None if it is no chat completion."""
    try:
        body = json.loads(content)
        choice = body["choices"][0]
        message = choice["message"]
        usage = body.get("usage") or {}
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    if not isinstance(message, Mapping):
        return None
    prompt, answer = (count if type(count) is int and count >= 0 else None for count in counts)
    text, refusal = (
        value if isinstance(value, str) else "" for value in (message.get("content"), message.get("refusal"))
    )
    return Reply(text, str(choice.get("finish_reason") or "stop"), refusal, prompt, answer)
