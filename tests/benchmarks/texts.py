"""The rows that benchmarks read: the project's own where they lie beside the checkout, else the shipped sample's, repeated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from car_datasets.loading.templates import Exchange, render
from car_datasets.utils import files

ALPACA = Path(__file__).parents[3] / "shared" / "data" / "alpaca_9k.json"


def rows(count: int | None = None) -> tuple[str, list[dict[str, Any]]]:
    """So many rows (all of the Alpaca file, unless fewer are asked for), and what they are."""
    if ALPACA.is_file():
        found = json.loads(ALPACA.read_text(encoding="utf-8"))
        return "Alpaca rows", found[:count]
    found = json.loads(files.sample_file().read_text(encoding="utf-8"))
    return "sample rows, repeated", [found[i % len(found)] for i in range(count or 9_229)]


def texts(count: int | None = None) -> tuple[str, list[str]]:
    """The same rows as the text that is scored."""
    kind, found = rows(count)
    return kind, [render(Exchange(row["instruction"], row["input"], row["output"])).whole for row in found]
