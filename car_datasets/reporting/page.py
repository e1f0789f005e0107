"""Render `report.html`: the selection on one page that needs no network, with figures, an interactive map, and rows.

Does: draw samples of bounded size from the pool, read their text, and fill the template with figures, tables and rows.
Does not: select rows, or draw figures.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from car_datasets.loading.chats import ROLE_KEYS
from car_datasets.loading.values import carried
from car_datasets.reporting.likes import columns_of_few_values, fifths
from car_datasets.reporting.maps import PoolMap
from car_datasets.reporting.naming import NamedCluster
from car_datasets.reporting.neighbours import Neighbour
from car_datasets.reporting.overview import Floats, Overview
from car_datasets.reporting.plots import PALETTE_NAMES, PLOTS, SCALE, SPAN, colours_of, plot_file
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
CLUSTERS_LISTED = 200  # clusters in the table of clusters, each with a typical row
CLUSTERS_SHOWN, ENDS = 40, 3  # clusters whose best and worst rows are shown, and how many of each
SNIPPET = 200  # characters of a row that every row has at least
READ_IN_FULL = 1_500  # characters of each column of the rows that are shown in tables from the start
SEARCHED = 2_000_000  # characters in which the search looks, over all rows
RULES_ROWS = 100_000  # of a pool from which other rules select, for the table of rules; it takes some 5 s

Turns = list[tuple[str, str]]  # role and content
Field = tuple[str, "str | Turns"]  # the name of a column, and its text or chat


class Told(NamedTuple):
    """What a [`SelectionReport`] tells the page in words and figures.

    Args:
        head (`dict[str, str]`): dataset, scorer and other facts about the selection's origin; may be empty.
        verdict, sentences (`list[str]`): its verdict, and its counts in words.
        comparison (`list[list[str]]`): its table of pool, selection and controls, a header and rows.
        likes (`list[list[str]]`): the table of [`~car_datasets.reporting.likes.shares_table`], likewise.
        clusters (`dict[str, NamedCluster]`): the clusters by their numbers.
    """

    head: dict[str, str]
    verdict: list[str]
    sentences: list[str]
    comparison: list[list[str]]
    likes: list[list[str]]
    clusters: dict[str, NamedCluster]


def render_page(overview: Overview, pool_map: PoolMap | None, figures: Mapping[str, bytes], told: Told) -> str:
    """Render the page as HTML.

    Args:
        overview ([`Overview`]): of the pool and its selection.
        pool_map ([`PoolMap`], *optional*): without it the page has no map.
        figures (`Mapping[str, bytes]`): PNG files by name; may be empty. That of the map is left out, since the page
            draws its own.
        told ([`Told`]): of the report.
    """
    data = page_data(overview, pool_map, told.clusters)
    return (
        page_environment()
        .get_template("report.html.jinja")
        .render(
            # Files of this package, which autoescape would break; everything else on the page is escaped.
            style=Markup((ASSETS / "report.css").read_text(encoding="utf-8")),
            script=Markup((ASSETS / "report.js").read_text(encoding="utf-8")),
            data={"palette": PALETTE_NAMES, "scale": SCALE, "span": SPAN, **data},
            told=told,
            likes=_by_grouping(told.likes),
            ledger=_ledger(overview),
            figures={
                name: {"alt": plot.alt, "content": base64.b64encode(figures[plot_file(name)]).decode()}
                for name, plot in PLOTS.items()
                if plot_file(name) in figures and not plot.needs_map
            },
            method=pool_map.method if pool_map is not None else "",
            sampled=_sampled(overview, len(data["rows"]), pool_map is not None),
            unlisted=max(0, len(told.clusters) - CLUSTERS_LISTED),
            audit=audit(overview),
            rules=_rules(overview),
            what_if_header=HEADER,
            what_if=[_what_if_line(choice, overview) for choice in try_out(overview)],
        )
    )


def _by_grouping(likes: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Return the groups of each grouping, with their shares as numbers for the bars."""
    groupings: list[dict[str, Any]] = []
    for name, explained, group, *shares in likes[1:]:
        if name:
            groupings.append({"name": name, "explained": explained, "groups": []})
        numbers = [float(share.removesuffix(" %")) for share in shares]
        groupings[-1]["groups"].append({"name": group, "shares": shares, "numbers": numbers})
    return groupings


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


def page_data(
    overview: Overview, pool_map: PoolMap | None, named: Mapping[str, NamedCluster] | None = None
) -> dict[str, Any]:
    """Return what the page's script reads.

    Args:
        overview ([`Overview`]): of the pool and its selection.
        pool_map ([`PoolMap`], *optional*): coordinates of rows.
        named (`Mapping[str, NamedCluster]`, *optional*): the clusters by their numbers.

    Returns:
        `dict`: `rows`; `deciles` and `clusters`, which name rows by their index in `rows`; `names` and `sizes` of all
        clusters; `ranked`, the rows that could be selected; `unit` of the lengths; and `searched`, the characters of a
        row that the search looks at, or `None` if it looks at all.
    """
    named = named or {}
    tenths = _tenths(overview)
    deciles, clusters = _draw(tenths, overview.seed), _clusters(overview, named)
    first = {row for rows in deciles for row in rows}
    for cluster in clusters:
        first |= {*cluster["best"], *cluster["worst"], *([] if cluster["typical"] is None else [cluster["typical"]])}
    placed = _on_the_map(overview, pool_map)
    # Without a map the rows of the search are a sample of their own.
    rows = sorted({*first, *placed, *(overview.sample(PAGE_ROWS).tolist() if not placed else ())})
    index_of: dict[int | None, int | None] = {None: None, **{row: i for i, row in enumerate(rows)}}
    # SEARCHED characters for all rows together, but at least a snippet for each and at most all that is read.
    most = max(SNIPPET, min(READ_IN_FULL, SEARCHED // max(1, len(rows))))
    texts = fields_of(overview, rows)
    cut = any(sum(map(_length, map(_value, fields))) > most for fields in texts)
    return {
        "unit": overview.length_unit,
        "searched": most if cut else None,
        "ranked": overview.eligible_rows,
        "names": {label: ", ".join(of.keywords) for label, of in named.items() if of.keywords},
        "sizes": {label: of.rows for label, of in named.items()},
        "rows": [
            {
                **_row(overview, row, explanation),
                "fields": _shortened(fields, READ_IN_FULL * len(fields) if row in first else most),
                **placed.get(row, {"x": None, "y": None, "colour": 0}),
            }
            # Explained together: one pass over the embeddings serves all.
            for row, fields, explanation in zip(rows, texts, explain_rows(overview, rows), strict=True)
        ],
        "deciles": [
            {"name": _decile_name(i, overview.scores[tenth]), "rows": [index_of[row] for row in drawn]}
            for i, (tenth, drawn) in enumerate(zip(tenths, deciles, strict=True))
        ],
        "clusters": [
            {
                **cluster,
                "typical": index_of[cluster["typical"]],
                "best": [index_of[r] for r in cluster["best"]],
                "worst": [index_of[r] for r in cluster["worst"]],
            }
            for cluster in clusters
        ],
    }


def _row(overview: Overview, row: int, told: Explanation) -> dict[str, Any]:
    """Return what is known of a row, without its text."""
    return {
        "id": told.row,
        "score": _number(overview.scores[row]),
        "rank": told.score_rank,
        "percentile": round(told.percentile, 1),
        "by": told.selected_by or "",
        "cluster": told.cluster,
        "crank": told.cluster_rank,
        "length": told.length,
        "cut": told.truncated,
        "why": told.why,
        "near": [_near(n) for n in told.neighbours],
        "kept": None if told.nearest_selected is None else _near(told.nearest_selected),
    }


def _near(neighbour: Neighbour) -> list[Any]:
    score = None if neighbour.score is None else round(neighbour.score, 3)
    return [neighbour.row, round(neighbour.similarity, 3), score, int(neighbour.selected)]


def _number(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 5)


def _on_the_map(overview: Overview, pool_map: PoolMap | None) -> dict[int, dict[str, Any]]:
    """Return coordinates and colour of the rows that the page's map shows, which may be fewer than the plot's."""
    if pool_map is None:
        return {}
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


def _clusters(overview: Overview, named: Mapping[str, NamedCluster]) -> list[dict[str, Any]]:
    """Return the clusters from which most rows were selected: counts, mean score, typical, best and worst rows."""
    scored = overview.scored[overview.clusters[overview.scored] >= 0]
    labels, sizes = np.unique(overview.clusters[scored], return_counts=True)
    selected = overview.clusters[overview.positions]
    taken = dict(zip(*(part.tolist() for part in np.unique(selected, return_counts=True)), strict=True))
    most = sorted(zip(labels.tolist(), sizes.tolist(), strict=True), key=lambda p: (-taken.get(p[0], 0), -p[1]))
    clusters = []
    for place, (label, size) in enumerate(most[:CLUSTERS_LISTED]):
        members = scored[overview.clusters[scored] == label]
        ranked = members[overview.cluster_ranks[members] > 0]
        ranked = ranked[np.argsort(overview.cluster_ranks[ranked])]
        ends = ENDS if place < CLUSTERS_SHOWN else 0
        typical = named[str(label)].typical if str(label) in named else None
        clusters.append(
            {
                "label": label,
                "rows": size,
                "kept": taken.get(label, 0),
                "mean": round(float(overview.scores[members].mean()), 3),
                # A small cluster has no row both among its best and among its worst.
                "best": ranked[:ends].tolist(),
                "worst": ranked[max(ends, len(ranked) - ends) :].tolist() if ends else [],
                "typical": next((row for row in members.tolist() if str(overview.name_of(row)) == str(typical)), None),
            }
        )
    return clusters


# the text of rows -----------------------------------------------------------------------------------------------------


def fields_of(overview: Overview, rows: Sequence[int]) -> list[list[Field]]:
    """Return the text columns of some rows that hold text, each with its text, or with the turns of its chat."""
    columns = text_columns(overview)
    if not columns:
        return [[] for _ in rows]
    values = carried(overview.pool.select_columns(columns)).select(list(rows))[:]
    each = ([(name, _turns(values[name][i]) or _plain(values[name][i])) for name in columns] for i in range(len(rows)))
    return [[(name, value) for name, value in fields if value] for fields in each]


def texts_of(overview: Overview, rows: Sequence[int]) -> list[list[tuple[str, str]]]:
    """Return the text columns of some rows, in the form of [`fields_of`], but with a chat as one line per turn."""
    return [[(name, _text(value)) for name, value in fields] for fields in fields_of(overview, rows)]


def text_columns(overview: Overview) -> list[str]:
    """Return the columns that hold the user's text: strings, and chats."""
    schema = overview.pool.features.arrow_schema
    return [column for column in overview.user_columns if _holds_text(schema.field(column).type)]


def _holds_text(kind: pa.DataType) -> bool:
    if is_text(kind) or isinstance(kind, pa.BaseExtensionType):  # JSON, such as turns of differing keys
        return True
    return any(_holds_text(kind.field(i).type) for i in range(kind.num_fields))


def _plain(value: Any) -> str:
    """Return the strings of a value, nested to any depth, as one text."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return ": ".join(part for part in map(_plain, value.values()) if part)
    if isinstance(value, (list, tuple)):
        return "\n".join(part for part in map(_plain, value) if part)
    return ""


def _turns(value: Any) -> Turns:
    """Return role and content of each turn of a chat; empty for any other value."""
    if not isinstance(value, (list, tuple)) or not all(isinstance(turn, Mapping) for turn in value):
        return []
    turns = []
    for turn in value:
        key = next((key for key in ROLE_KEYS if isinstance(turn.get(key), str)), None)
        if key is None:
            return []
        turns.append((turn[key], _plain({name: part for name, part in turn.items() if name != key})))
    return turns


def _value(field: Field) -> str | Turns:
    return field[1]


def _text(value: str | Turns) -> str:
    return value if isinstance(value, str) else "\n".join(f"{role}: {content}" for role, content in value)


def _length(value: str | Turns) -> int:
    return len(value) if isinstance(value, str) else sum(len(content) for _, content in value)


def _shortened(fields: Sequence[Field], limit: int) -> list[Field]:
    """Cut the fields of a row to a number of characters; short ones are kept in full, the longer ones share the rest."""
    lengths = [_length(value) for _, value in fields]
    shortened = list(fields)
    for done, i in enumerate(sorted(range(len(fields)), key=lambda i: lengths[i])):
        share = max(1, limit // (len(fields) - done))
        name, value = fields[i]
        shortened[i] = (name, _cut(value, share) if isinstance(value, str) else _first_turns(value, share))
        limit -= min(share, lengths[i])
    return shortened


def _first_turns(turns: Turns, limit: int) -> Turns:
    kept: Turns = []
    for role, content in turns:
        if limit <= 0:
            return [*kept, ("…", "")]
        kept.append((role, _cut(content, limit)))
        limit -= len(content)
    return kept


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
