"""Requests and answers of the Hub, without HTTP's framing."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs

from tests.hub_server.store import Refused


@dataclass
class Request:
    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: bytes
    origin: str
    large_origin: str  # differs from `origin`, so clients must not send the token there
    user: str | None = None
    may: str | None = None

    @property
    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    def asks(self, name: str) -> bool:
        return parse_qs(self.query).get(name, [""])[0].lower() in ("1", "true")


@dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, content: Any, status: int = 200, **headers: str) -> Answer:
        return cls(status, json.dumps(content).encode(), {"Content-Type": "application/json", **headers})


def refusal(error: Refused) -> Answer:
    headers = {"X-Error-Message": error.message, **({"X-Error-Code": error.code} if error.code else {})}
    return Answer.of({"error": error.message, **error.fields}, error.status, **headers)


def ranged(request: Request, content: bytes, headers: dict[str, str]) -> Answer:
    headers = {**headers, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
    if asked is None or not any(asked.groups()):
        return Answer(200, content, headers)
    # RFC 9110, 14.1.2: `a-b` includes b, `a-` is the rest from a, and `-n` the last n bytes.
    size = len(content)
    start = int(asked[1]) if asked[1] else max(0, size - int(asked[2]))
    stop = min(size, int(asked[2]) + 1) if asked[1] and asked[2] else size
    if start >= size:
        return Answer(416, b"", {**headers, "Content-Range": f"bytes */{size}"})
    return Answer(206, content[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"})
