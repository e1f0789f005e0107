"""`report.html`: the selection on one page that needs no network, with figures, a map to point at, and rows to read.

Does: put figures, tables and rows into the templates of `pages/`.
Does not: choose rows, or draw figures.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from car_datasets.alternatives import HEADER, WhatIf, try_out
from car_datasets.overview import Overview
from car_datasets.page_rows import audit, page_data
from car_datasets.plots import PALETTE_NAMES, PLOTS, plot_file
from car_datasets.projection import PoolMap

if TYPE_CHECKING:
    from jinja2 import Environment

PAGE_FILE = "report.html"
PAGE_TEMPLATES = Path(__file__).parent / "pages"


def render_page(
    overview: Overview,
    pool_map: PoolMap | None,
    figures: Mapping[str, bytes],
    sentences: Sequence[str],
    comparison: Sequence[Sequence[str]],
) -> str:
    """Render the page as HTML.

    Args:
        overview ([`Overview`]): of the pool and its selection.
        pool_map ([`PoolMap`], *optional*): without it the page has no map.
        figures (`Mapping[str, bytes]`): PNG files by name; may be empty.
        sentences (`Sequence[str]`): of the [`SelectionReport`].
        comparison (`Sequence[Sequence[str]]`): its table, a header and rows.
    """
    from markupsafe import Markup

    data = page_data(overview, pool_map)
    alts = {plot_file(name): plot.alt for name, plot in PLOTS.items()}
    return (
        page_environment()
        .get_template("report.html.jinja")
        .render(
            # Our own files, which autoescape would break; everything else on the page is escaped.
            style=Markup((PAGE_TEMPLATES / "report.css").read_text(encoding="utf-8")),
            script=Markup((PAGE_TEMPLATES / "report.js").read_text(encoding="utf-8")),
            data={"palette": PALETTE_NAMES, **data},
            sentences=sentences,
            comparison=comparison,
            ledger=_ledger(overview),
            figures=[{"alt": alts[name], "content": base64.b64encode(png).decode()} for name, png in figures.items()],
            has_map=pool_map is not None,
            method=pool_map.method if pool_map is not None else "",
            sampled=_sampled(overview, len(data["rows"]), pool_map is not None),
            audit=audit(overview),
            what_if_header=HEADER,
            what_if=[_what_if_line(choice, overview) for choice in try_out(overview)],
        )
    )


def page_environment() -> Environment:
    """Return the Jinja environment of the page.

    Its filter `tojson` writes JSON that is safe within a `<script>` element: it escapes `<`, `>`, `&` and `'`, so that
    the text of a row can neither end the element nor open a comment.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(PAGE_TEMPLATES), autoescape=True, undefined=StrictUndefined)
    # An index column may hold dates, hence `default`. The keys keep their order.
    options = {"sort_keys": False, "allow_nan": False, "separators": (",", ":"), "default": str}
    environment.policies["json.dumps_kwargs"] = options
    return environment


def _sampled(overview: Overview, rows: int, has_map: bool) -> str:
    pool = len(overview.scored)
    words = "all scored rows" if rows >= pool else f"a sample of {rows:,} of the {pool:,} scored rows"
    missing = "" if has_map else " There is no map: the pool has no embeddings."
    return f"This page holds {words}.{missing}"


def _ledger(overview: Overview) -> list[dict[str, Any]]:
    total = max(1, len(overview.positions))
    counts = {name: int((overview.selected_by == name).sum()) for name in ("score", "cluster", "both")}
    return [
        {"name": name, "rows": f"{n:,}", "share": f"{100 * n / total:.1f} %", "width": round(100 * n / total, 1)}
        for name, n in counts.items()
    ]


def _what_if_line(choice: WhatIf, overview: Overview) -> dict[str, Any]:
    present = (overview.by_score, overview.by_cluster, overview.cluster_count)
    return {"cells": choice.cells(), "present": (choice.n1, choice.n2, choice.k) == present}
