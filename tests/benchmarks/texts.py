"""Read the rows of the benchmarks: those of the project's data folder if it exists, or the shipped sample, repeated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from car_datasets.loading.templates import Exchange, render
from car_datasets.utils import files

ALPACA = Path(__file__).parents[3] / "shared" / "data" / "alpaca_9k.json"


def rows(count: int | None = None) -> tuple[str, list[dict[str, Any]]]:
    """Return a description of the rows, and the first `count` of them; by default all of the Alpaca file."""
    if ALPACA.is_file():
        found = json.loads(ALPACA.read_text(encoding="utf-8"))
        return "Alpaca rows", found[:count]
    found = json.loads(files.sample_file().read_text(encoding="utf-8"))
    return "sample rows, repeated", [found[i % len(found)] for i in range(count or 9_229)]


def texts(count: int | None = None) -> tuple[str, list[str]]:
    """Return the same description, and the text of each row that a scorer reads."""
    kind, found = rows(count)
    return kind, [render(Exchange(row["instruction"], row["input"], row["output"])).whole for row in found]
