"""Faults of the Hub: rules for which requests fail, and how."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

KINDS = ("status", "drop", "delay", "lost", "cut")


@dataclass
class Fault:
    """A rule that makes the next `times` matching requests fail, after `skip` of them.

    Kinds:
        `status`: the request is not executed; the answer is an error with `status`, `code`, `message` and `headers`.
        `drop`: the request is not executed, and the connection is closed.
        `delay`: the request is executed after `seconds`.
        `lost`: the request is executed, and the connection is closed without an answer.
        `cut`: the request is executed, and the connection is closed half-way through the answer.
    """

    method: str
    path: str  # a regular expression, searched in the path and query
    times: int = 1
    kind: str = "status"
    skip: int = 0
    status: int = 503
    code: str | None = None
    message: str = "The hub is told to fail."
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} is not known; choose one of {KINDS}.")
        # A bad pattern fails in the test that wrote it, not in the server.
        re.compile(self.path), re.compile(self.method)


class Faults:
    """The rules in force, in order; the first that matches a request applies."""

    def __init__(self) -> None:
        self.rules: list[Fault] = []

    def take(self, method: str, path: str) -> Fault | None:
        """Return the fault of a request, or None, and count it."""
        for rule in self.rules:
            if rule.times and re.fullmatch(rule.method, method) and re.search(rule.path, path):
                if rule.skip:
                    rule.skip -= 1
                    continue
                rule.times -= 1
                return rule
        return None
