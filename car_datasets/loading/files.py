"""Name data files, and report in one error those that `datasets` cannot read.

Does: know the formats by their extensions; turn a reader's error into one that names the file.
Does not: decide whether a source is a file, a folder or a Hub id.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from datasets.exceptions import DatasetGenerationError

FORMATS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


class DataFile(NamedTuple):
    """A data file that is on this machine.

    Args:
        path (`str`): where it lies.
        shown (`str`): its name in messages and receipts.
        kind (`str`): `"json"` (a list or lines), `"csv"` or `"parquet"`.
    """

    path: str
    shown: str
    kind: str

    def open(self) -> BinaryIO:
        """Return the file's bytes as a stream."""
        return open(self.path, "rb")


@contextlib.contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Turn a reader's error into one ValueError that names the file, and silence the reader's own log line."""
    # The readers of `datasets` log the error before they raise it; the user would see it twice.
    loggers = [logging.getLogger(f"datasets.packaged_modules.{k}.{k}") for k in ("json", "csv", "parquet")]
    levels = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    except (DatasetGenerationError, ValueError, StopIteration, OSError) as error:
        # Errors of decoding and of Arrow are ValueErrors, or OSErrors without an errno. An OSError with an errno comes
        # from the operating system (no permission, disk full): the file itself is not to blame.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        if "corresponds to no data" in str(error):
            raise ValueError(f"source={str(path)!r} has no rows.") from error
        cause = error.__cause__ or error  # DatasetGenerationError says nothing; its cause names the line
        raise ValueError(
            f"source={str(path)!r} cannot be read as {kind}: {type(cause).__name__}: {str(cause)[:200]}"
        ) from error
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)
