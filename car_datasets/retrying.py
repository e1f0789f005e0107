"""Requests that may be sent again: which failures of a Hub pass by themselves, and how long to wait for that.

Does: call again after a conflict, a rate limit, an error of the server or a dropped connection.
Does not: know what is asked; what is given here must do no harm when it is done twice.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)  # seconds before the second, third, ... attempt
READING_WAITS = WAITS[:3]  # where nothing is lost but a look-up, and someone may sit in front of it
LONGEST = 300.0  # that a server may ask to wait
PASSING = (408, 409, 412, 429)  # timeout, another commit at the same time, the parent has moved, too many requests


def retry(call: Callable[[], T], waits: Sequence[float] | None = None) -> T:
    """What `call()` gives, after as many attempts as `waits`, by default [`WAITS`], allows.

    huggingface_hub repeats uploads by itself, but not the requests that ask for a repository, make one, or commit.

    Raises:
        ConnectionError: the failure did not pass.
        Exception: one that does not pass, at once.
    """
    waits = WAITS if waits is None else waits
    for wait in (*waits, None):
        try:
            return call()
        except Exception as error:  # the HTTP library's own errors derive from nothing narrower
            asked = seconds_to_wait(error)
            if asked is None:
                raise
            if wait is None:
                raise ConnectionError(f"the Hub failed {len(waits) + 1} times, at last: {reason(error)}") from error
            time.sleep(min(LONGEST, max(asked, wait * random.uniform(0.75, 1.25))))  # not all who wait at once
    raise AssertionError("the last attempt returns or raises")


def seconds_to_wait(error: BaseException | None) -> float | None:
    """How long a server wants us to wait after a failure that passes (0: it does not say); `None` for one that stays."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]

    while error is not None:
        if isinstance(error, ConnectionError):  # of a retry within this one, or of being offline by choice
            return None
        if isinstance(error, HfHubHTTPError):
            response = error.response
            if response is None or not (response.status_code in PASSING or response.status_code >= 500):
                return None
            after = response.headers.get("Retry-After", "")
            window = re.search(r";r=0;t=(\d+)", response.headers.get("ratelimit", ""))  # the public Hub's own header
            return float(after) if after.isdecimal() else float(window[1]) if window else 0.0
        if isinstance(error, HTTPError):
            return None if type(error).__name__ in ("LocalProtocolError", "UnsupportedProtocol") else 0.0
        if isinstance(error, RuntimeError) and "client has been closed" in str(error):
            return 0.0  # huggingface_hub's threads share a client, and one that loses its connection closes it for all
        error = error.__cause__  # an upload's failure is a RuntimeError from the request's
    return None


def reason(error: BaseException) -> str:
    """The failure in one line: the request's own, where an upload's stands before it."""
    while not str(error) or (isinstance(error, RuntimeError) and error.__cause__ is not None):
        if error.__cause__ is None:
            return type(error).__name__
        error = error.__cause__
    return " ".join(str(error).split())
