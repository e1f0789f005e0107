"""A line of the benchmarks' table, and the way that all of them take times."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple


class Line(NamedTuple):
    """One measured figure beside its reference, which was measured in the same run.

    Args:
        what (`str`): what was done, to how much.
        ours (`float`), reference (`float`, *optional*), unit (`str`): the two figures.
        target (`str`): what is wanted, in words; met (`bool`, *optional*): whether it was reached.
    """

    what: str
    ours: float
    reference: float | None = None
    unit: str = "s"
    target: str = ""
    met: bool | None = None


def best_of(runs: int, function: Callable[[], Any]) -> tuple[float, Any]:
    """The least seconds of several runs, and what the last one returned."""
    seconds, result = [], None
    for _ in range(runs):
        result = None  # so that two results are never in memory
        start = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - start)
    return min(seconds), result
