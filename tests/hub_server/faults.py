"""Faults of a hub: which of the coming requests go wrong, and how."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

KINDS = ("status", "drop", "delay", "lost", "cut")


@dataclass
class Fault:
    """The next `times` requests that match, after `skip` of them, go wrong.

    Kinds: `status`, the answer is an error with this `status`, `code`, `message` and `headers`, and nothing is done; `drop`,
    the connection is closed and nothing is done; `delay`, `seconds` pass before it is done; `lost`, it is done, and the
    connection is closed in the answer's place; `cut`, it is done, and the connection is closed half-way through the answer.
    """

    method: str
    path: str  # a regular expression that is searched in the path with its query
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
        re.compile(self.path), re.compile(self.method)


class Faults:
    """The rules that are set, in order; the first that matches a request counts."""

    def __init__(self) -> None:
        self.rules: list[Fault] = []

    def take(self, method: str, path: str) -> Fault | None:
        """What befalls a request."""
        for rule in self.rules:
            if rule.times and re.fullmatch(rule.method, method) and re.search(rule.path, path):
                if rule.skip:
                    rule.skip -= 1
                    continue
                rule.times -= 1
                return rule
        return None
