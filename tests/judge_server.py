"""An endpoint on this machine that speaks OpenAI's protocol, rates rows by a digest, and fails on demand."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PROMPT, ANSWER = 300, 40  # tokens of a call, as the server counts them
MODEL = "judge-1"
KEY = "sk-ThisIsNotARealKeyButNobodyMaySeeIt"


def rating(row: str) -> dict[str, Any]:
    """Return the answer about a row, which depends on its text alone."""
    digest = hashlib.sha256(row.encode()).digest()
    return {"reason": f"byte {digest[0]}", "fault": "none", "soundness": digest[0] % 11, "worth": digest[1] % 11}


def completion(content: str | None, finish: str = "stop", **message: Any) -> dict[str, Any]:
    """Return the body of a response."""
    usage = {"prompt_tokens": PROMPT, "completion_tokens": ANSWER}
    choice = {"index": 0, "message": {"role": "assistant", "content": content, **message}, "finish_reason": finish}
    return {"object": "chat.completion", "choices": [choice], "usage": usage}


def error(message: str, **more: Any) -> dict[str, Any]:
    return {"error": {"message": message, "type": "error", **more}}


class JudgeServer(ThreadingHTTPServer):
    """A server on a free port.

    Attributes:
        requests: bodies of all calls so far, and `times` when they arrived.
        keys: the `Authorization` of each call.
        answered: calls that were answered with status 200.
        faults: what happens to the next calls instead of an answer, first come, first served; each is a function of the
            handler and the request.
        always: happens to every call; returns False to let it be answered.
        hold_at: calls are not answered any more once so many are; None to answer all.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.keys: list[str | None] = []
        self.answered = 0
        self.faults: list[Callable[[Handler, dict[str, Any]], None]] = []
        self.always: Callable[[Handler, dict[str, Any]], Any] = lambda handler, request: False
        self.hold_at: int | None = None
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def rows(self) -> list[str]:
        """Return the rows of all calls, in the order of arrival."""
        return [request["messages"][1]["content"] for request in self.requests]

    def handle_error(self, *_: Any) -> None:
        """Say nothing about clients that were killed."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: JudgeServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path != "/v1/models":
            self.send(404, error("no such page"))
        else:
            self.send(200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(request)
            self.server.times.append(time.monotonic())
            self.server.keys.append(self.headers["Authorization"])
            fault = self.server.faults.pop(0) if self.server.faults else None
        if fault is not None:
            fault(self, request)
        elif not self.server.always(self, request):
            self.answer(json.dumps(rating(request["messages"][1]["content"])))

    def answer(self, content: str | None, finish: str = "stop", **message: Any) -> None:
        """Answer a call, unless the server holds all answers back."""
        with self.server.lock:
            held = self.server.hold_at is not None and self.server.answered >= self.server.hold_at
            self.server.answered += not held
        if held:
            # Until the client is gone, as it is after a kill.
            self.connection.settimeout(60)
            while self.connection.recv(1):
                pass
            self.close_connection = True
            return
        self.send(200, completion(content, finish, **message))

    def send(self, status: int, body: Any, **headers: str) -> None:
        """Send a response; headers have `_` for `-`."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def drop(self) -> None:
        """Close the connection without a response."""
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def half(self) -> None:
        """Send half a response, then close the connection."""
        content = json.dumps(completion("{}")).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:30])
        self.wfile.flush()
        self.drop()


@contextmanager
def judge_server() -> Iterator[JudgeServer]:
    server = JudgeServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
