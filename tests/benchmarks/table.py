"""Define a line of the benchmarks' table, and the function that measures times for all of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple


class Line(NamedTuple):
    """One measured figure and its reference, which was measured in the same run.

    Args:
        what (`str`): the task and its size.
        ours (`float`), reference (`float`, *optional*), unit (`str`): the two figures.
        target (`str`): the aim in words; met (`bool`, *optional*): `True` if it was reached.
    """

    what: str
    ours: float
    reference: float | None = None
    unit: str = "s"
    target: str = ""
    met: bool | None = None


def best_of(runs: int, function: Callable[[], Any]) -> tuple[float, Any]:
    """Return the shortest time of several runs in seconds, and the result of the last run."""
    seconds, result = [], None
    for _ in range(runs):
        result = None  # freed before the run, so that two results are never in memory at once
        start = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - start)
    return min(seconds), result
