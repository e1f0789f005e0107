"""`report.html`: the selection on one page that needs no network, with its figures, a map to point at, and rows to read.

Does: put figures, tables and rows into the templates of `pages/`.
Does not: choose rows (page_rows.py) or draw figures (plots.py).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from car_datasets.alternatives import HEADER, WhatIf, try_out
from car_datasets.overview import Overview
from car_datasets.page_rows import audit, page_data, text_columns
from car_datasets.plots import CLUSTERS, LENGTHS, MAP, PALETTE_NAMES, SCORES
from car_datasets.projection import PoolMap

if TYPE_CHECKING:
    from datasets import Dataset

PAGE_FILE = "report.html"
SHOWN = {  # for readers who hear the page
    SCORES: "Distributions of the scores of selection, pool and controls; the means are in the table above.",
    MAP: "Map of the pool, coloured by cluster, the selected rows ringed.",
    CLUSTERS: "Size of every cluster against the rows taken from it.",
    LENGTHS: "Score against length of the rows; the title has both correlations.",
}


def render_page(
    pool: Dataset,
    seen: Overview,
    pool_map: PoolMap | None,
    figures: Mapping[str, bytes],
    sentences: Sequence[str],
    comparison: Sequence[Sequence[str]],
    *,
    score_column: str = "iqs_score",
    cluster_column: str = "cluster",
    index_column: str = "source_index",
    embedding_column: str = "embedding",
) -> str:
    """The page as text.

    Args:
        pool (`Dataset`), seen ([`Overview`]), pool_map ([`PoolMap`], *optional*): the rows, and where they lie.
        figures (`Mapping[str, bytes]`): PNG files by name; may be empty.
        sentences, comparison: of the [`SelectionReport`].
        score_column, cluster_column, index_column, embedding_column (`str`): columns that are not the user's text.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    folder = Path(__file__).parent / "pages"
    environment = Environment(loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined)
    ours = columns_of_ours(score_column, cluster_column, index_column, embedding_column)
    data = page_data(pool, seen, pool_map, text_columns(pool, ours), embedding_column)
    return environment.get_template("report.html.jinja").render(
        style=Markup((folder / "report.css").read_text(encoding="utf-8")),
        script=Markup((folder / "report.js").read_text(encoding="utf-8")),
        data=Markup(json_in_html({"palette": PALETTE_NAMES, **data})),
        sentences=sentences,
        comparison=comparison,
        ledger=_ledger(seen),
        figures=[{"shows": SHOWN[name], "content": base64.b64encode(png).decode()} for name, png in figures.items()],
        has_map=pool_map is not None,
        method=pool_map.method if pool_map is not None else "",
        sampled=_sampled(seen, len(data["rows"]), pool_map is not None),
        audit=audit(pool, seen, ours),
        what_if_header=HEADER,
        what_if=[_what_if_line(choice, seen) for choice in try_out(pool, seen, embedding_column=embedding_column)],
    )


def columns_of_ours(
    score_column: str = "iqs_score",
    cluster_column: str = "cluster",
    index_column: str = "source_index",
    embedding_column: str = "embedding",
) -> tuple[str, ...]:
    """The columns that the stages add: the others are the user's."""
    stem = score_column.removesuffix("_score")
    scorer_columns = (score_column, *(f"{stem}_{name}" for name in ("score_std", "tokens", "truncated", "status")))
    return (*scorer_columns, cluster_column, f"{cluster_column}_distance", index_column, embedding_column)


def json_in_html(content: Any) -> str:
    """JSON that can stand in a `<script>`: no row can end the element or open a comment."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=str)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _sampled(seen: Overview, rows: int, has_map: bool) -> str:
    pool = len(seen.scored)
    words = "all scored rows" if rows >= pool else f"a sample of {rows:,} of the {pool:,} scored rows"
    missing = "" if has_map else " There is no map: the pool has no embeddings."
    return f"This page holds {words}.{missing}"


def _ledger(seen: Overview) -> list[dict[str, Any]]:
    total = max(1, len(seen.positions))
    counts = {name: int((seen.selected_by == name).sum()) for name in ("score", "cluster", "both")}
    return [
        {"name": name, "rows": f"{n:,}", "share": f"{100 * n / total:.1f} %", "width": round(100 * n / total, 1)}
        for name, n in counts.items()
    ]


def _what_if_line(choice: WhatIf, seen: Overview) -> dict[str, Any]:
    present = (seen.by_score, seen.by_cluster, seen.cluster_count)
    return {"cells": choice.cells(), "present": (choice.n1, choice.n2, choice.k) == present}
