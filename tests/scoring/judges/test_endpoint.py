"""endpoint.py: every way in which an endpoint fails, by a real server; what is billed, repeated and said."""

import json
import logging
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from car_datasets.scoring.judges import endpoint as endpoint_module
from car_datasets.scoring.judges.cache import Caps, JudgeCache, Spent
from car_datasets.scoring.judges.endpoint import Connection, Endpoint, RowFailure, check_base_url
from tests.judge_server import ANSWER, KEY, MODEL, PROMPT, JudgeServer, error, judge_server

MESSAGES = [{"role": "system", "content": "Rate the row."}, {"role": "user", "content": "1 + 1 = 2"}]
SCHEMA = {"type": "object"}
TOKENS = PROMPT + ANSWER
MOST = 376  # tokens that the call can take: 40 bytes, 2 messages, a call and an answer of 48
Fault = Callable[[Any, Any], None]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(endpoint_module, "LONGEST_WAIT", 0.02)
    monkeypatch.setattr(endpoint_module, "_seen", {})


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with judge_server() as found:
        yield found


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[JudgeCache]:
    with JudgeCache(tmp_path / "judge.sqlite") as found:
        yield found


def connect(server: JudgeServer, cache: JudgeCache, key: str | None = None, **changes: Any) -> Endpoint:
    connection = Connection(server.url, MODEL, 48, 10.0, 2, (1.0, 2.0), Caps())._replace(**changes)
    return Endpoint(connection, key, "JUDGE_API_KEY", cache)


def status(number: int, message: str = "busy", **headers: str) -> Fault:
    return lambda handler, request: handler.send(number, error(message), **headers)


def body(content: bytes) -> Fault:
    return lambda handler, request: handler.send(200, content)


def wait(handler: Any, request: Any) -> None:
    handler.connection.settimeout(10)
    handler.connection.recv(1)  # returns when the client gives up


FAULTS: dict[str, tuple[Fault, bool]] = {  # and whether the call may have been billed
    "429": (status(429), False),
    "500": (status(500), False),
    "503": (status(503), False),
    "502": (status(502), True),
    "504": (status(504), True),
    "dropped": (lambda handler, request: handler.drop(), True),
    "half an answer": (lambda handler, request: handler.half(), True),
    "invalid JSON": (body(b'{"choices": [{"mess'), True),
    "a page": (body(b"<html>Please log in</html>"), True),
    "no choices": (body(b'{"choices": []}'), True),
    "slow": (wait, True),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_may_pass_is_repeated(server: JudgeServer, cache: JudgeCache, name: str) -> None:
    fault, billed = FAULTS[name]
    server.faults = [fault, fault]
    with connect(server, cache, timeout=0.3 if name == "slow" else 10.0) as endpoint:
        reply = endpoint.ask(MESSAGES, SCHEMA)
        assert json.loads(reply.content)["fault"] == "none"
        assert (reply.finish, reply.tokens) == ("stop", TOKENS)
        # From the cache, whatever has happened to the server.
        assert endpoint.ask(MESSAGES, SCHEMA) == reply
    assert len(server.requests) == 3
    lost = 2 if billed else 0
    cost = (PROMPT + 2 * ANSWER + lost * (MOST + 48)) / 1e6
    assert cache.spent() == (1 + lost, TOKENS + lost * MOST, pytest.approx(cost))


@pytest.mark.parametrize("name", ["500", "dropped"])
def test_a_fault_that_stays_is_a_failure_of_the_row(server: JudgeServer, cache: JudgeCache, name: str) -> None:
    server.faults = [FAULTS[name][0]] * 99
    with connect(server, cache) as endpoint:
        for number in range(9):
            with pytest.raises(RowFailure, match=r"busy|disconnected") as failed:
                endpoint.ask([*MESSAGES, {"role": "user", "content": str(number)}], SCHEMA)
            assert failed.value.status == "no_answer"
        assert len(server.requests) == 27
        with pytest.raises(ConnectionError, match="answered none of the last 10 calls, each made 3 times"):
            endpoint.ask(MESSAGES, SCHEMA)


def test_a_server_that_rejects_every_call_ends_the_run(server: JudgeServer, cache: JudgeCache) -> None:
    server.always = lambda handler, request: handler.send(400, error("no chat here")) or True
    with connect(server, cache) as endpoint:
        for number in range(9):
            with pytest.raises(RowFailure, match="no chat here"):
                endpoint.ask([*MESSAGES, {"role": "user", "content": str(number)}], SCHEMA)
        with pytest.raises(ConnectionError, match="answered none of the last 10 calls"):
            endpoint.ask(MESSAGES, SCHEMA)
        # One that has answered once may reject many rows, which may be too long.
        server.always = lambda handler, request: False
        endpoint.ask(MESSAGES, SCHEMA)
        server.always = lambda handler, request: handler.send(400, error("too long")) or True
        for number in range(12):
            with pytest.raises(RowFailure, match="too long"):
                endpoint.ask([*MESSAGES, {"role": "user", "content": str(number)}], SCHEMA)


@pytest.mark.parametrize(
    ("asked", "low", "high"),
    [
        ("3", 3, 3),
        ("0.5", 0.5, 0.5),
        ("-1", 0, 0),
        ("soon", 0, 0),
        ("nan", 0, 0),
        ("", 0, 0),
        (60, 50, 61),
        (-60, 0, 0),
    ],
)
def test_how_long_a_server_asks_to_wait(asked: str | int, low: float, high: float) -> None:
    text = asked if isinstance(asked, str) else formatdate(time.time() + asked, usegmt=True)
    assert low <= endpoint_module._asked_wait({"retry-after": text}) <= high


def test_a_server_that_asks_to_wait_is_waited_for(server: JudgeServer, cache: JudgeCache) -> None:
    server.faults = [status(429, retry_after="0.4"), status(503, retry_after="901")]
    asks = pytest.raises(ConnectionError, match=r"asks to wait 901 seconds \(busy\)")
    with connect(server, cache) as endpoint, asks:
        endpoint.ask(MESSAGES, SCHEMA)
    assert server.times[1] - server.times[0] >= 0.4
    assert cache.spent() == Spent(0, 0, 0)


@pytest.mark.parametrize(
    ("number", "message", "key", "expected"),
    [
        (
            401,
            "no key",
            None,
            r"answers 401 \(no key\). It wants an API key: set the environment variable JUDGE_API_KEY",
        ),
        (401, f"wrong key {KEY}", KEY, r"\(wrong key \*\*\*\). It does not accept the key from JUDGE_API_KEY"),
        (403, "not yours", KEY, "does not accept the key"),
        (404, "no such model", None, r"404 for model='judge-1' \(no such model\). It has \['judge-1'\]"),
        (402, "pay first", None, "the account cannot pay for more"),
    ],
)
def test_what_no_repetition_mends_ends_the_run(
    server: JudgeServer, cache: JudgeCache, number: int, message: str, key: str | None, expected: str
) -> None:
    server.faults = [status(number, message)]
    with connect(server, cache, key) as endpoint, pytest.raises(ValueError, match=expected) as refused:
        endpoint.ask(MESSAGES, SCHEMA)
    assert KEY not in str(refused.value)
    assert server.keys == [f"Bearer {key or 'none'}"]
    assert cache.spent() == Spent(0, 0, 0)


def test_an_empty_account_is_told_from_a_busy_server(server: JudgeServer, cache: JudgeCache) -> None:
    server.faults = [lambda handler, request: handler.send(429, error("empty", code="insufficient_quota"))]
    with connect(server, cache) as endpoint, pytest.raises(ValueError, match=r"429 \(empty\): the account cannot pay"):
        endpoint.ask(MESSAGES, SCHEMA)


def test_a_wrong_address_is_told_before_a_row_is_sent(server: JudgeServer, cache: JudgeCache) -> None:
    server.faults = [status(404, "no such page")]
    other = pytest.raises(ValueError, match=r"answers 404.*Most servers want an address that ends in /v1")
    with connect(server, cache, base_url=server.url.replace("/v1", "")) as endpoint, other:
        endpoint.ask(MESSAGES, SCHEMA)
    server.server_close()
    gone = pytest.raises(ConnectionError, match=r"nothing answers there .*Start the server, or correct the address")
    with connect(server, cache) as endpoint, gone:
        endpoint.ask(MESSAGES, SCHEMA)
    assert cache.spent() == Spent(0, 0, 0)


def test_a_wrong_key_is_told_before_a_row_is_sent(
    server: JudgeServer, cache: JudgeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.RequestHandlerClass, "do_GET", lambda handler: handler.send(401, error("no key")))
    with connect(server, cache) as endpoint, pytest.raises(ValueError, match="It wants an API key"):
        endpoint.ask(MESSAGES, SCHEMA)
    assert server.requests == []


@pytest.mark.parametrize(
    ("refuses", "named"),
    [
        (("json_schema",), True),
        (("json_schema", "json_object"), True),
        (("json_schema", "json_object"), False),
        (("max_tokens",), True),
        (("json_schema", "max_tokens", "temperature"), True),
    ],
)
def test_a_server_is_asked_in_the_forms_that_it_knows(
    server: JudgeServer, cache: JudgeCache, caplog: pytest.LogCaptureFixture, refuses: tuple[str, ...], named: bool
) -> None:
    mends = {"max_tokens": "use max_completion_tokens"}

    def picky(handler: Any, request: dict[str, Any]) -> bool:
        given = {*request, request.get("response_format", {}).get("type")}
        for part in refuses:
            if part in given:
                kind = "response_format" if part.startswith("json") else part
                handler.send(400, error(f"unsupported {kind}, {mends.get(part, '')}" if named else "bad request"))
                return True
        return False

    server.always = picky
    with connect(server, cache) as endpoint, caplog.at_level(logging.WARNING):
        endpoint.ask(MESSAGES, SCHEMA)
        asked = len(server.requests)
        assert asked == 1 + len(refuses)
        endpoint.ask([*MESSAGES, {"role": "user", "content": "again"}], SCHEMA)
        assert len(server.requests) == asked + 1  # the form is known now
        assert ("takes no temperature=0" in caplog.text) == ("temperature" in refuses)
        # A row that is too long is rejected, however it is asked about, and changes no form.
        server.faults = [status(400, "maximum context length is 8192 tokens")] * 9
        with pytest.raises(RowFailure, match="maximum context length") as failed:
            endpoint.ask([*MESSAGES, {"role": "user", "content": "long"}], SCHEMA)
        assert failed.value.status == "rejected"
        server.faults = []
        endpoint.ask([*MESSAGES, {"role": "user", "content": "more"}], SCHEMA)
    known, last = server.requests[asked - 1], server.requests[-1]
    assert {**known, "messages": 0} == {**last, "messages": 0}
    assert {"max_tokens", "max_completion_tokens"} & set(last) == (
        {"max_completion_tokens"} if "max_tokens" in refuses else {"max_tokens"}
    )
    assert cache.spent().calls == 3


def test_the_cap_is_reserved_before_a_call(server: JudgeServer, cache: JudgeCache) -> None:
    caps = Caps(tokens=MOST + TOKENS)  # two short calls, as "a" reserves less than MOST
    with connect(server, cache, caps=caps) as endpoint:
        for text in ("a", "b"):
            endpoint.ask([MESSAGES[0], {"role": "user", "content": text}], SCHEMA)
        with pytest.raises(RowFailure, match=r"max_tokens=716 \(so far 680 tokens\): one more call can take") as failed:
            endpoint.ask(MESSAGES, SCHEMA)
        assert failed.value.status == "cap_reached"
    assert cache.spent() == Spent(2, 2 * TOKENS, 0.00076)
    with (
        connect(server, cache, caps=Caps(cost=0.001)) as endpoint,
        pytest.raises(RowFailure, match=r"max_cost=0.001 \("),
    ):
        endpoint.ask(MESSAGES, SCHEMA)
    assert len(server.requests) == 2


def test_a_server_that_bills_more_than_it_may_ends_a_run_with_a_cap(server: JudgeServer, cache: JudgeCache) -> None:
    for cap, expected in ((None, None), (10**6, "no cap can be held")):
        with connect(server, cache, answer_tokens=1, caps=Caps(cap)) as endpoint:
            message = [MESSAGES[0], {"role": "user", "content": str(cap)}]
            if expected is None:
                endpoint.ask(message, SCHEMA)
            else:
                with pytest.raises(ValueError, match=expected):
                    endpoint.ask(message, SCHEMA)
    assert cache.spent().tokens == 2 * TOKENS


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("localhost:8000/v1", "has no scheme; write http://localhost:8000/v1"),
        ("", "has no scheme"),
        ("ftp://a/v1", "is not an address"),
        ("http:///v1", "is not an address"),
        ("http://a:99999/v1", "is not an address"),
        ("http://a b/v1", "is not an address"),
        (f"https://user:{KEY}@a/v1", "base_url holds a password"),
        (f"user:{KEY}@a/v1", "base_url has no scheme"),
        (f"https://a/v1?key={KEY}", "base_url holds a password"),
        ("http://a/v1/chat/completions", "leave out /chat/completions"),
    ],
)
def test_addresses_that_are_none_are_refused(address: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        check_base_url(address)
    assert KEY not in str(refused.value)
    assert check_base_url(" http://a:1/v1/ ") == "http://a:1/v1"
