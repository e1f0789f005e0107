"""The rows that `report.html` shows: which ones, with what text, in which groups.

Does: draw the samples of a page whose size does not grow with the pool; read their text; count who is kept.
Does not: write HTML (report_page.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from car_datasets.explaining import Explanation, explain_rows
from car_datasets.overview import Floats, Overview
from car_datasets.plots import colours_of
from car_datasets.projection import PoolMap
from car_datasets.selection import SELECTION_COLUMNS, Indices

if TYPE_CHECKING:
    from datasets import Dataset

PAGE_ROWS = 4_000  # on the page's map and in its search
PER_DECILE = 10
CLUSTERS_SHOWN, ENDS = 40, 3  # clusters whose best and worst rows are shown, and how many of each
SNIPPET, WHOLE = 200, 1_500  # characters of a row in a table, and of each of its columns where it is explained
SEARCHED = 2_000_000  # characters of all rows together that the search can look at
TOLD = 200  # kept rows whose whole story is on the page
LEVELS = 20  # a column of at most so many different values is one that rows can be grouped by
GROUPINGS = 5


def page_data(
    pool: Dataset, seen: Overview, pool_map: PoolMap | None, text_columns: Sequence[str], embedding_column: str
) -> dict[str, Any]:
    """What the page's script reads: `rows`, and positions in them as `deciles` and `clusters`."""
    tenths, ends = _tenths(seen), _cluster_ends(seen)
    deciles = _draw(tenths, seen.seed)
    told = sorted(
        {row for rows in deciles for row in rows}
        | {row for _, *two in ends for rows in two for row in rows}
        | set(seen.positions[:TOLD].tolist())
    )
    placed = _on_the_map(seen, pool_map)
    rows = sorted({*told, *placed, *(seen.sample(PAGE_ROWS).tolist() if not placed else ())})
    place_of = {row: i for i, row in enumerate(rows)}
    texts = texts_of(pool, rows, text_columns)
    stories = dict(zip(told, explain_rows(pool, seen, told, embedding_column=embedding_column), strict=True))
    most = max(SNIPPET, min(WHOLE, SEARCHED // max(1, len(rows))))
    plain = [_snippet(text) for text in texts]
    searched = [_snippet(text, most) for text in texts]
    below = np.searchsorted(np.sort(seen.scores[seen.scored]), seen.scores[rows], side="right")
    return {
        "unit": seen.length_unit,
        "searched": most if any(len(part) < len(whole) for part, whole in zip(searched, plain, strict=True)) else None,
        "rows": [
            {
                "id": seen.name_of(row),
                "score": _number(seen.scores[row]),
                "percentile": round(100 * float(count) / len(seen.scored), 1),
                "by": seen.reasons[row].item(),
                "cluster": int(seen.clusters[row]) if seen.clusters[row] >= 0 else None,
                "crank": int(seen.cluster_ranks[row]),
                "length": seen.lengths[row],
                "cut": seen.statuses is not None and seen.statuses[row].as_py() == "truncated",
                "text": _snippet(text, SNIPPET),
                **({"more": more} if len(more) > SNIPPET else {}),
                **placed.get(row, {"x": None, "y": None, "colour": 0}),
                **({"told": _story(stories[row], text)} if row in stories else {}),
            }
            for row, text, more, count in zip(rows, texts, searched, below.tolist(), strict=True)
        ],
        "deciles": [
            {"name": _decile_name(i, seen.scores[tenth]), "rows": [place_of[row] for row in drawn]}
            for i, (tenth, drawn) in enumerate(zip(tenths, deciles, strict=True))
        ],
        "clusters": [
            {"label": label, "best": [place_of[r] for r in best], "worst": [place_of[r] for r in worst]}
            for label, best, worst in ends
        ],
    }


def _number(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 5)


def _on_the_map(seen: Overview, pool_map: PoolMap | None) -> dict[int, dict[str, Any]]:
    if pool_map is None:
        return {}
    colours = colours_of(pool_map.points, seen.clusters[pool_map.rows])
    shown = np.flatnonzero(np.isin(pool_map.rows, seen.sample(PAGE_ROWS, pool_map.rows)))
    return {
        int(pool_map.rows[i]): {
            "x": float(pool_map.points[i, 0]),
            "y": float(pool_map.points[i, 1]),
            "colour": int(colours[i]),
        }
        for i in shown
    }


def _story(found: Explanation, text: list[tuple[str, str]]) -> dict[str, Any]:
    return {
        "why": found.why,
        "texts": [(name, _cut(value, WHOLE)) for name, value in text if value],
        "neighbours": [vars(n) for n in found.neighbours],
        "nearest": vars(found.nearest_selected) if found.nearest_selected else None,
    }


# which rows -----------------------------------------------------------------------------------------------------------


def _tenths(seen: Overview) -> list[Indices]:
    """The scored rows, best tenth first, each best row first."""
    return [part for part in np.array_split(np.argsort(seen.score_ranks)[: len(seen.scored)], 10) if len(part)]


def _draw(tenths: Sequence[Indices], seed: int) -> list[list[int]]:
    """Some rows of each, in its order."""
    rng = np.random.default_rng(seed)
    places = [np.sort(rng.choice(len(part), min(PER_DECILE, len(part)), replace=False)) for part in tenths]
    return [part[drawn].tolist() for part, drawn in zip(tenths, places, strict=True)]


def _decile_name(i: int, scores: Floats) -> str:
    name = {0: ", the best", 9: ", the worst"}.get(i, "")
    return f"{i + 1}{name}: scores {scores[0]:.3f} to {scores[-1]:.3f}"


def _cluster_ends(seen: Overview) -> list[tuple[str, list[int], list[int]]]:
    """The clusters that gave most rows: a label, and their best and worst rows."""
    names, sizes = np.unique(seen.clusters[seen.scored], return_counts=True)
    taken = {
        int(name): int(n) for name, n in zip(*np.unique(seen.clusters[seen.positions], return_counts=True), strict=True)
    }
    sized = [(int(name), int(size)) for name, size in zip(names, sizes, strict=True) if name >= 0]
    found = []
    for name, size in sorted(sized, key=lambda pair: (-taken.get(pair[0], 0), -pair[1]))[:CLUSTERS_SHOWN]:
        members = np.flatnonzero((seen.clusters == name) & (seen.cluster_ranks > 0))
        members = members[np.argsort(seen.cluster_ranks[members])]
        label = f"{name}: {size:,} rows, {taken.get(name, 0):,} kept"
        found.append((label, members[:ENDS].tolist(), members[max(ENDS, size - ENDS) :].tolist()))
    return found


# their text -----------------------------------------------------------------------------------------------------------


def text_columns(pool: Dataset, ours: Sequence[str]) -> list[str]:
    """The columns that hold text of the user's: strings, and chats."""
    schema = pool.features.arrow_schema
    return [f.name for f in schema if f.name not in {*ours, *SELECTION_COLUMNS} and _holds_text(f.type)]


def _holds_text(kind: pa.DataType) -> bool:
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return True
    return any(_holds_text(kind.field(i).type) for i in range(kind.num_fields))


def texts_of(pool: Dataset, rows: Sequence[int], columns: Sequence[str]) -> list[list[tuple[str, str]]]:
    """For every row its columns and their text; a chat is one line per turn."""
    if not columns:
        return [[] for _ in rows]
    found = pool.with_format(None).select_columns(list(columns)).select(list(rows))[:]
    return [[(name, _plain(found[name][i])) for name in columns] for i in range(len(rows))]


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return ": ".join(part for part in map(_plain, value.values()) if part)
    if isinstance(value, (list, tuple)):
        return "\n".join(part for part in map(_plain, value) if part)
    return ""


def _snippet(text: list[tuple[str, str]], limit: int | None = None) -> str:
    """The columns in one line, or so many characters of them, of which the longer ones share what the shorter ones leave."""
    parts = [" ".join(value.split()) for _, value in text if value]
    limit = sum(map(len, parts)) if limit is None else limit
    for left, i in enumerate(sorted(range(len(parts)), key=lambda i: len(parts[i]))):
        parts[i] = _cut(parts[i], max(1, limit // (len(parts) - left)))
        limit -= len(parts[i])
    return " | ".join(parts)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


# who is kept ----------------------------------------------------------------------------------------------------------


def audit(pool: Dataset, seen: Overview, ours: Sequence[str]) -> list[list[str]]:
    """Rows, scores and shares kept by length, and by every column of few values: what goes with being kept."""
    lines = [["", "all scored rows", *_kept(seen, np.ones(len(seen.scores), dtype=bool))]]
    for name, group, which in (*_by_length(seen), *_by_column(pool, ours)):
        lines.append([name, group, *_kept(seen, which)])
    return lines


def _kept(seen: Overview, which: npt.NDArray[np.bool_]) -> list[str]:
    rows = seen.scored[which[seen.scored]]
    taken = int(np.count_nonzero(which[seen.positions]))
    if len(rows) == 0:
        return ["0", "", str(taken), "", ""]
    share, usual = taken / len(rows), len(seen.positions) / len(seen.scored)
    score = f"{seen.scores[rows].mean():.3f}"
    return [f"{len(rows):,}", score, f"{taken:,}", f"{100 * share:.1f} %", f"{share / usual:.2f} times"]


def _by_length(seen: Overview) -> Iterator[tuple[str, str, npt.NDArray[np.bool_]]]:
    lengths = seen.lengths[seen.scored]
    edges = np.unique(np.quantile(lengths, (0.2, 0.4, 0.6, 0.8)).round())
    fifth = np.digitize(seen.lengths, edges)
    for i in np.unique(fifth[seen.scored]):
        inside = lengths[fifth[seen.scored] == i]
        yield f"{seen.length_unit}", f"{inside.min():,.0f} to {inside.max():,.0f}", fifth == i


def _by_column(pool: Dataset, ours: Sequence[str]) -> Iterator[tuple[str, str, npt.NDArray[np.bool_]]]:
    table, used = pool.with_format("arrow"), 0
    for name in (n for n in pool.column_names if n not in {*ours, *SELECTION_COLUMNS}):
        kind = pool.features.arrow_schema.field(name).type
        if used == GROUPINGS or not (
            pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_boolean(kind)
        ):
            continue
        values = table.select_columns([name])[:][name]
        if 2 <= pc.count_distinct(values).as_py() <= LEVELS:
            used += 1
            for level in sorted(pc.unique(values.drop_null()).to_pylist()):
                yield name, _cut(str(level), 40), np.asarray(pc.equal(values, level).fill_null(False))
