"""Retry Hub requests on transient errors (408, 409, 412, 429, 5xx, dropped connections).

Does: tell transient errors from lasting ones; wait as long as the server asks.
Does not: know the request, which must be safe to repeat.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)  # seconds before the second, third, ... attempt
READING_WAITS = WAITS[:3]  # for reads, at the start of a run: little work is lost, and a user may be waiting
LONGEST = 300.0  # seconds; the longest wait that a server may ask for
TRANSIENT = (408, 409, 412, 429)  # timeout, concurrent commit, parent commit has moved, rate limit


def retry(call: Callable[[], T], waits: Sequence[float] | None = None) -> T:
    """Return `call()`, repeating it on transient errors.

    huggingface_hub repeats uploads, but not the requests that look up or create a repository, or commit.

    Args:
        call (`Callable`): a request that is safe to repeat.
        waits (`Sequence[float]`, *optional*): seconds before each further attempt. Defaults to [`WAITS`].

    Raises:
        ConnectionError: the last attempt failed as well.
        Exception: an error that is not transient is raised at once.
    """
    waits = WAITS if waits is None else waits
    for wait in (*waits, None):
        try:
            return call()
        except Exception as error:  # the HTTP library's own errors derive from nothing narrower
            requested = seconds_to_wait(error)
            if requested is None:
                raise
            if wait is None:
                raise ConnectionError(
                    f"the Hub failed {len(waits) + 1} times, most recently: {reason(error)}"
                ) from error
            # Random, so that workers which failed together do not come back together.
            time.sleep(min(LONGEST, max(requested, wait * random.uniform(0.75, 1.25))))
    raise AssertionError("the last attempt returns or raises")


def seconds_to_wait(error: BaseException | None) -> float | None:
    """Return the wait in seconds that a server asks for after a transient error (0 if unsaid), `None` after others."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]

    while error is not None:
        if isinstance(error, ConnectionError):  # from a retry inside this one, or because HF_HUB_OFFLINE is set
            return None
        if isinstance(error, HfHubHTTPError):
            response = error.response
            if response is None or not (response.status_code in TRANSIENT or response.status_code >= 500):
                return None
            after = response.headers.get("Retry-After", "")
            window = re.search(r";r=0;t=(\d+)", response.headers.get("ratelimit", ""))  # of the public Hub
            return float(after) if after.isdecimal() else float(window[1]) if window else 0.0
        if isinstance(error, HTTPError):
            return None if type(error).__name__ in ("LocalProtocolError", "UnsupportedProtocol") else 0.0
        if isinstance(error, RuntimeError) and "client has been closed" in str(error):
            return 0.0  # huggingface_hub's threads share a client; one that loses its connection closes it for all
        error = error.__cause__  # a failed upload is a RuntimeError whose cause is the error of the request
    return None


def reason(error: BaseException) -> str:
    """Return an error in one line; for a failed upload, the error of the request that caused it."""
    while not str(error) or (isinstance(error, RuntimeError) and error.__cause__ is not None):
        if error.__cause__ is None:
            return type(error).__name__
        error = error.__cause__
    return " ".join(str(error).split())
