"""Render `report.html`: the selection on one page that needs no network, with figures, an interactive map, and rows.

Does: draw samples of bounded size from the pool, read their text, and fill the template with figures, tables and rows.
Does not: select rows, or draw figures.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from car_datasets.loading.chats import TRUNCATED
from car_datasets.loading.values import carried
from car_datasets.reporting.likes import columns_of_few_values, fifths
from car_datasets.reporting.maps import PoolMap
from car_datasets.reporting.overview import Floats, Overview
from car_datasets.reporting.plots import PALETTE_NAMES, PLOTS, colours_of, plot_file
from car_datasets.reporting.questions import HEADER, Explanation, WhatIf, explain_rows, try_out
from car_datasets.reporting.rules import compare_rules, rules_lines
from car_datasets.selection.rule import OTHER_REASONS, REASONS, Indices
from car_datasets.utils.columns import is_text
from car_datasets.utils.files import ASSETS

PAGE_FILE = "report.html"
# Where a proof, which is made after the page, has its section; the template has the pair without anything between.
PROOF_BEGIN, PROOF_END = "<!-- proof: begin -->", "<!-- proof: end -->"

# The page is a single file, so these limits bound its size whatever the size of the pool.
PAGE_ROWS = 4_000  # rows on the page's map and in its search
PER_DECILE = 10  # rows drawn from each tenth of the scores
CLUSTERS_SHOWN, ENDS = 40, 3  # clusters whose best and worst rows are shown, and how many of each
SNIPPET = 200  # characters of a row in a table
EXPLAINED = 1_500  # characters of each column of a row that is explained
SEARCHED = 2_000_000  # characters in which the search looks, over all rows
RULES_ROWS = 100_000  # of a pool from which other rules select, for the table of rules; it takes some 5 s
EXPLAINED_ROWS = 200  # selected rows that come with an explanation


def render_page(
    overview: Overview,
    pool_map: PoolMap | None,
    figures: Mapping[str, bytes],
    sentences: Sequence[str],
    comparison: Sequence[Sequence[str]],
    likes: Sequence[Sequence[str]],
) -> str:
    """Render the page as HTML.

    Args:
        overview ([`Overview`]): of the pool and its selection.
        pool_map ([`PoolMap`], *optional*): without it the page has no map.
        figures (`Mapping[str, bytes]`): PNG files by name; may be empty.
        sentences (`Sequence[str]`): of the [`SelectionReport`].
        comparison (`Sequence[Sequence[str]]`): its table, a header and rows.
        likes (`Sequence[Sequence[str]]`): the table of [`~car_datasets.reporting.likes.shares_table`], likewise.
    """
    data = page_data(overview, pool_map)
    alts = {plot_file(name): plot.alt for name, plot in PLOTS.items()}
    return (
        page_environment()
        .get_template("report.html.jinja")
        .render(
            # Files of this package, which autoescape would break; everything else on the page is escaped.
            style=Markup((ASSETS / "report.css").read_text(encoding="utf-8")),
            script=Markup((ASSETS / "report.js").read_text(encoding="utf-8")),
            data={"palette": PALETTE_NAMES, **data},
            sentences=sentences,
            comparison=comparison,
            likes=likes,
            ledger=_ledger(overview),
            figures=[{"alt": alts[name], "content": base64.b64encode(png).decode()} for name, png in figures.items()],
            has_map=pool_map is not None,
            method=pool_map.method if pool_map is not None else "",
            sampled=_sampled(overview, len(data["rows"]), pool_map is not None),
            audit=audit(overview),
            rules=_rules(overview),
            what_if_header=HEADER,
            what_if=[_what_if_line(choice, overview) for choice in try_out(overview)],
        )
    )


def _rules(overview: Overview) -> list[list[str]]:
    """Return the table of rules at the same budget; empty for a pool on which the rules take long."""
    if len(overview.scores) > RULES_ROWS:
        return []
    return rules_lines(compare_rules(overview, costs=overview.token_costs, groups=overview.groups))


def page_environment() -> Environment:
    """Return the Jinja environment of the page.

    Its filter `tojson` writes JSON that is safe within a `<script>` element: it escapes `<`, `>`, `&` and `'`, so that
    the text of a row can neither end the element nor open a comment.
    """
    environment = Environment(loader=FileSystemLoader(ASSETS), autoescape=True, undefined=StrictUndefined)
    # An index column may hold dates, hence `default`. The keys keep their order. NaN would not be valid JSON.
    options = {"sort_keys": False, "allow_nan": False, "separators": (",", ":"), "default": str}
    environment.policies["json.dumps_kwargs"] = options
    return environment


def with_proof(page: str, section: str) -> str:
    """Return a page with the section of a proof, which replaces an earlier one.

    Args:
        page (`str`): what [`render_page`] returned, perhaps by an earlier version.
        section (`str`): HTML; everything in it must be escaped.
    """
    begin, end = page.find(PROOF_BEGIN), page.find(PROOF_END)
    if begin < 0 or end < begin:  # a page of an earlier version
        begin = page.rfind("</main>")
        return f"{page[:begin]}{PROOF_BEGIN}\n{section}\n{PROOF_END}\n{page[begin:]}"
    return f"{page[:begin]}{PROOF_BEGIN}\n{section}\n{page[end:]}"


def _sampled(overview: Overview, rows: int, has_map: bool) -> str:
    pool = len(overview.scored)
    words = "all scored rows" if rows >= pool else f"a sample of {rows:,} of the {pool:,} scored rows"
    missing = "" if has_map else " There is no map: the pool has no embeddings."
    return f"This page holds {words}.{missing}"


def _ledger(overview: Overview) -> list[dict[str, Any]]:
    total = max(1, len(overview.positions))
    counts = {name: int((overview.selected_by == name).sum()) for name in (*REASONS, *OTHER_REASONS)}
    return [
        {"name": name, "rows": f"{n:,}", "share": f"{100 * n / total:.1f} %", "width": round(100 * n / total, 1)}
        for name, n in counts.items()
        if n or name in REASONS
    ]


def _what_if_line(choice: WhatIf, overview: Overview) -> dict[str, Any]:
    present = (overview.by_score, overview.by_cluster, overview.k)
    return {"cells": choice.cells(), "present": (choice.n1, choice.n2, choice.k) == present}


def page_data(overview: Overview, pool_map: PoolMap | None) -> dict[str, Any]:
    """Return what the page's script reads.

    Args:
        overview ([`Overview`]): of the pool and its selection.
        pool_map ([`PoolMap`], *optional*): coordinates of rows.

    Returns:
        `dict`: `rows`; `deciles` and `clusters`, which name rows by their index in `rows`; `unit` of the lengths; and
        `searched`, the characters of a row that the search looks at, or `None` if it looks at all.
    """
    tenths, ends = _tenths(overview), _cluster_ends(overview)
    deciles = _draw(tenths, overview.seed)
    explained = sorted(
        {row for rows in deciles for row in rows}
        | {row for _, *best_and_worst in ends for rows in best_and_worst for row in rows}
        | set(overview.positions[:EXPLAINED_ROWS].tolist())
    )
    placed = _on_the_map(overview, pool_map)
    # Without a map the rows of the search are a sample of their own.
    rows = sorted({*explained, *placed, *(overview.sample(PAGE_ROWS).tolist() if not placed else ())})
    index_of = {row: i for i, row in enumerate(rows)}
    texts = texts_of(overview, rows)
    # Explained together: one pass over the embeddings serves all.
    stories = dict(zip(explained, explain_rows(overview, explained), strict=True))
    # SEARCHED characters for all rows together, but at least a snippet and at most EXPLAINED for each.
    most = max(SNIPPET, min(EXPLAINED, SEARCHED // max(1, len(rows))))
    searched = [_snippet(text, most) for text in texts]
    cut = any(len(part) < len(_snippet(text)) for part, text in zip(searched, texts, strict=True))
    percentiles = overview.percentiles[rows].round(1).tolist()
    return {
        "unit": overview.length_unit,
        "searched": most if cut else None,
        "rows": [
            {
                **_row(overview, row, percentile),
                "text": _snippet(text, SNIPPET),
                **({"more": more} if len(more) > SNIPPET else {}),
                **placed.get(row, {"x": None, "y": None, "colour": 0}),
                **({"told": _story(stories[row], text)} if row in stories else {}),
            }
            for row, text, more, percentile in zip(rows, texts, searched, percentiles, strict=True)
        ],
        "deciles": [
            {"name": _decile_name(i, overview.scores[tenth]), "rows": [index_of[row] for row in drawn]}
            for i, (tenth, drawn) in enumerate(zip(tenths, deciles, strict=True))
        ],
        "clusters": [
            {"label": label, "best": [index_of[r] for r in best], "worst": [index_of[r] for r in worst]}
            for label, best, worst in ends
        ],
    }


def _row(overview: Overview, row: int, percentile: float) -> dict[str, Any]:
    """Return the figures of a row, without its text."""
    return {
        "id": overview.name_of(row),
        "score": _number(overview.scores[row]),
        "percentile": percentile,
        "by": overview.reasons[row].item(),
        "cluster": int(overview.clusters[row]) if overview.clusters[row] >= 0 else None,
        "crank": int(overview.cluster_ranks[row]),
        "length": overview.lengths[row],
        "cut": overview.statuses is not None and overview.statuses[row].as_py() == TRUNCATED,
    }


def _number(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 5)


def _on_the_map(overview: Overview, pool_map: PoolMap | None) -> dict[int, dict[str, Any]]:
    """Return coordinates and colour of the rows that the page's map shows, which may be fewer than the plot's."""
    if pool_map is None:
        return {}
    # Colours from all rows of the map, so that they are those of the plot.
    colours = colours_of(pool_map.points, overview.clusters[pool_map.rows])
    shown = np.flatnonzero(np.isin(pool_map.rows, overview.sample(PAGE_ROWS, pool_map.rows)))
    return {
        int(pool_map.rows[i]): {
            "x": float(pool_map.points[i, 0]),
            "y": float(pool_map.points[i, 1]),
            "colour": int(colours[i]),
        }
        for i in shown
    }


def _story(explanation: Explanation, text: list[tuple[str, str]]) -> dict[str, Any]:
    return {
        "why": explanation.why,
        "texts": [(name, _cut(value, EXPLAINED)) for name, value in text if value],
        "neighbours": [vars(n) for n in explanation.neighbours],
        "nearest": vars(explanation.nearest_selected) if explanation.nearest_selected else None,
    }


# the rows on the page -------------------------------------------------------------------------------------------------


def _tenths(overview: Overview) -> list[Indices]:
    """Return the scored rows in ten parts by falling score; fewer for a pool of fewer than ten."""
    return [
        part for part in np.array_split(np.argsort(overview.score_ranks)[: overview.eligible_rows], 10) if len(part)
    ]


def _draw(tenths: Sequence[Indices], seed: int) -> list[list[int]]:
    """Draw `PER_DECILE` rows of each part, in its order."""
    rng = np.random.default_rng(seed)
    places = [np.sort(rng.choice(len(part), min(PER_DECILE, len(part)), replace=False)) for part in tenths]
    return [part[drawn].tolist() for part, drawn in zip(tenths, places, strict=True)]


def _decile_name(i: int, scores: Floats) -> str:
    name = {0: ", the best", 9: ", the worst"}.get(i, "")
    return f"{i + 1}{name}: scores {scores[0]:.3f} to {scores[-1]:.3f}"


def _cluster_ends(overview: Overview) -> list[tuple[str, list[int], list[int]]]:
    """Return the label, best rows and worst rows of the clusters from which most rows were selected."""
    labels, sizes = np.unique(overview.clusters[overview.scored], return_counts=True)
    selected = overview.clusters[overview.positions]
    taken = dict(zip(*(part.tolist() for part in np.unique(selected, return_counts=True)), strict=True))
    sized = [(label, size) for label, size in zip(labels.tolist(), sizes.tolist(), strict=True) if label >= 0]
    ends = []
    for label, size in sorted(sized, key=lambda pair: (-taken.get(pair[0], 0), -pair[1]))[:CLUSTERS_SHOWN]:
        members = np.flatnonzero((overview.clusters == label) & (overview.cluster_ranks > 0))
        members = members[np.argsort(overview.cluster_ranks[members])]
        title = f"{label}: {size:,} rows, {taken.get(label, 0):,} kept"
        # A small cluster has no row both among its best and among its worst.
        ends.append((title, members[:ENDS].tolist(), members[max(ENDS, size - ENDS) :].tolist()))
    return ends


# the text of rows -----------------------------------------------------------------------------------------------------


def texts_of(overview: Overview, rows: Sequence[int]) -> list[list[tuple[str, str]]]:
    """Return the text columns of some rows.

    Returns:
        for every row a list of `(column, text)`; a chat is one line per turn.
    """
    columns = text_columns(overview)
    if not columns:
        return [[] for _ in rows]
    values = carried(overview.pool.select_columns(columns)).select(list(rows))[:]
    return [[(name, _plain(values[name][i])) for name in columns] for i in range(len(rows))]


def text_columns(overview: Overview) -> list[str]:
    """Return the columns that hold the user's text: strings, and chats."""
    schema = overview.pool.features.arrow_schema
    return [column for column in overview.user_columns if _holds_text(schema.field(column).type)]


def _holds_text(kind: pa.DataType) -> bool:
    if is_text(kind) or isinstance(kind, pa.BaseExtensionType):  # JSON, such as turns of differing keys
        return True
    return any(_holds_text(kind.field(i).type) for i in range(kind.num_fields))


def _plain(value: Any) -> str:
    """Return the strings of a value, nested to any depth, as one text; a turn becomes `role: content`."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return ": ".join(part for part in map(_plain, value.values()) if part)
    if isinstance(value, (list, tuple)):
        return "\n".join(part for part in map(_plain, value) if part)
    return ""


def _snippet(text: list[tuple[str, str]], limit: int | None = None) -> str:
    """Join the columns of a row in one line of at most `limit` characters, without the separators.

    Short columns are kept in full; the longer ones share the characters that remain.
    """
    parts = [" ".join(value.split()) for _, value in text if value]
    limit = sum(map(len, parts)) if limit is None else limit
    shortest_first = sorted(range(len(parts)), key=lambda i: len(parts[i]))
    for done, i in enumerate(shortest_first):
        parts[i] = _cut(parts[i], max(1, limit // (len(parts) - done)))
        limit -= len(parts[i])
    return " | ".join(parts)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


# selection rates by group ---------------------------------------------------------------------------------------------


def audit(overview: Overview) -> list[list[str]]:
    """Return a table of selection rates by length quintile and by each low-cardinality column of the source.

    Returns:
        a line per group, as text: column, group, scored rows, mean score, selected rows, their share, and that share
        compared with the pool's.
    """
    everything = np.ones(len(overview.scores), dtype=bool)
    lines = [["", "all scored rows", *_rates(overview, everything)]]
    for name, group, members in (*_by_length(overview), *_by_column(overview)):
        lines.append([name, group, *_rates(overview, members)])
    return lines


def _rates(overview: Overview, members: npt.NDArray[np.bool_]) -> list[str]:
    rows = overview.scored[members[overview.scored]]
    selected = int(np.count_nonzero(members[overview.positions]))
    if len(rows) == 0:
        return ["0", "", str(selected), "", ""]
    # Lift: the group's selection rate divided by that of all scored rows.
    share, usual = selected / len(rows), len(overview.positions) / len(overview.scored)
    score = f"{overview.scores[rows].mean():.3f}"
    return [f"{len(rows):,}", score, f"{selected:,}", f"{100 * share:.1f} %", f"{share / usual:.2f} times"]


def _by_length(overview: Overview) -> Iterator[tuple[str, str, npt.NDArray[np.bool_]]]:
    fifth, names = fifths(overview.lengths, overview.scored)
    for i, name in names.items():
        yield overview.length_unit, name, fifth == i


def _by_column(overview: Overview) -> Iterator[tuple[str, str, npt.NDArray[np.bool_]]]:
    for name, values in columns_of_few_values(overview):
        for level in sorted(pc.unique(values.drop_null()).to_pylist()):
            yield name, _cut(str(level), 40), np.asarray(pc.equal(values, level).fill_null(False))
