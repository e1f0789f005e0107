"""Measure what the score likes: by kind and form of answer, language, length, and columns of few values.

Does: read the text of a sample of rows; give the share of the scores' variance that each grouping explains, and the
share of each group in the pool, in its best tenth and in the selection; name the groups that are all but lost.
Does not: tell whether a group deserves its scores, or change a selection.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from car_datasets.loading.kinds import forms_of, kinds_of
from car_datasets.loading.languages import UNDETERMINED, detect_languages
from car_datasets.loading.schemas import Schema, exchanges_of, find_schema
from car_datasets.loading.templates import Exchange, join_lines
from car_datasets.loading.values import carried
from car_datasets.reporting.overview import Floats, Overview
from car_datasets.selection.rule import Indices, ranks_of
from car_datasets.utils.columns import is_text

# What bounds the time, to some .6 s: rows of the pool, and as many of the selection, whose text is read.
ROWS_READ = 4_000
FEWEST = 100  # scored rows; the best tenth of fewer says nothing
LOST = 0.25  # of its share in the pool, below which a group is all but lost
EXPECTED = 10  # rows that a group would have by its share in the pool; with fewer, chance alone may lose it
LEVELS = 20  # a column with at most so many different values groups the rows
GROUPINGS = 5  # columns by which rows are grouped at most
FIRST_LOOK = 300  # rows whose language is read to see whether there are several
SEVERAL = 0.02  # share of the rows by which a second language counts
LABEL = 40  # characters of a group's name

Labels = npt.NDArray[np.object_]  # the group of each row; None where it is not known


@dataclass(frozen=True)
class ScoreByGroup:
    """How the scores, and the rows that were kept for them, are spread over the groups of one grouping.

    Args:
        rows (`int`): rows of the pool that were read, a sample if the pool is large.
        best_rows (`int`): those of them in the best tenth of the pool by score.
        selected_rows (`int`): rows of the selection that were read.
        explained (`float`): share of the variance of the scores that the groups explain: eta squared, adjusted for the
            number of groups, so that groups at random explain nothing on average.
        pool, best_tenth, selected (`dict[str, float]`): share of each group in these rows.
    """

    rows: int
    best_rows: int
    selected_rows: int
    explained: float
    pool: dict[str, float]
    best_tenth: dict[str, float]
    selected: dict[str, float]


class _Sample(NamedTuple):
    """Rows that were read: their positions, ascending, and masks over them."""

    rows: Indices
    in_pool: npt.NDArray[np.bool_]  # of the sample of the pool
    best: npt.NDArray[np.bool_]  # of the best tenth of the pool
    selected: npt.NDArray[np.bool_]  # of the sample of the selection


def score_by_groups(overview: Overview, schema: Schema | None = None) -> dict[str, ScoreByGroup]:
    """Measure the scores by kind and form of answer, language, length and columns of few values.

    Args:
        overview ([`Overview`]): of the pool and its selection.
        schema ([`Schema`], *optional*): how the rows are read; by default it is recognised. Rows of no known schema are
            not grouped by kind and language.

    Returns:
        `dict`: [`ScoreByGroup`] by `"kind of answer"` (what was asked for, such as code), `"form of answer"` (how the
        answer looks, such as a list), `"language"`, `"length in tokens"` (or characters), and `"column ..."`. Groupings
        of which the rows read show one group only are left out; empty for a pool of fewer than `FEWEST` scored rows.
    """
    if len(overview.scored) < FEWEST:
        return {}
    sample = _sample(overview)
    found = ((name, _by_group(overview, sample, labels)) for name, labels in _groupings(overview, sample, schema))
    return {name: by_group for name, by_group in found if by_group is not None}


def _sample(overview: Overview) -> _Sample:
    rng = np.random.default_rng(overview.seed)
    pool, selected = (_drawn(rows, rng) for rows in (overview.scored, overview.positions))
    rows = np.union1d(pool, selected)
    # Ranks by the scores themselves, also where the selection ranked within languages.
    ranks = overview.score_ranks if overview.ranking is overview.scores else ranks_of(overview.scores)
    best = ranks[rows] <= -(-len(overview.scored) // 10)
    return _Sample(rows, np.isin(rows, pool), best, np.isin(rows, selected))


def _drawn(rows: Indices, rng: np.random.Generator) -> Indices:
    """Return at most `ROWS_READ` of some rows."""
    return rows if len(rows) <= ROWS_READ else rows[rng.choice(len(rows), ROWS_READ, replace=False)]


def _by_group(overview: Overview, sample: _Sample, labels: Labels) -> ScoreByGroup | None:
    """Return the figures of one grouping, `None` if the pool shows one group only."""
    known = np.array([label is not None for label in labels], dtype=bool)
    pool = known & sample.in_pool
    groups = sorted(set(labels[pool].tolist()), key=_in_order)
    if len(groups) < 2:
        return None
    masks = (pool, pool & sample.best, known & sample.selected)
    rows, best, selected = (int(np.count_nonzero(mask)) for mask in masks)
    shares = [{g: float(np.mean(labels[mask] == g)) if mask.any() else 0.0 for g in groups} for mask in masks]
    code_of = {group: code for code, group in enumerate(groups)}
    codes = np.array([code_of[label] for label in labels[pool]], dtype=np.int64)
    explained = _explained(overview.scores[sample.rows[pool]], codes)
    return ScoreByGroup(rows, best, selected, explained, *shares)


def _in_order(name: str) -> list[tuple[int, str]]:
    """Return a key by which names are sorted, with the numbers in them by size."""
    parts = re.findall(r"\d[\d,]*|\D+", name)
    return [(int(part.replace(",", "")), "") if part[0].isdecimal() else (-1, part) for part in parts]


def _explained(scores: Floats, codes: Indices) -> float:
    """Return the share of the variance of scores that groups explain, adjusted for the number of groups."""
    rows, counts = len(scores), np.bincount(codes)
    groups = np.count_nonzero(counts)
    total = float(np.square(scores - scores.mean()).sum())
    if total == 0 or rows <= groups:
        return 0.0
    means = np.bincount(codes, scores) / np.maximum(counts, 1)
    within = float(np.square(scores - means[codes]).sum())
    return float(max(0.0, 1 - within / total * (rows - 1) / (rows - groups)))


# the groupings --------------------------------------------------------------------------------------------------------


def _groupings(overview: Overview, sample: _Sample, schema: Schema | None) -> Iterator[tuple[str, Labels]]:
    """Yield the name of each grouping and the group of every row of the sample."""
    exchanges = exchanges_at(overview, sample.rows, schema)
    known = [i for i, exchange in enumerate(exchanges) if exchange is not None]
    texts = [exchange for exchange in exchanges if exchange is not None]
    if texts:
        kinds = kinds_of([join_lines(t.instruction, t.input) for t in texts], [t.response for t in texts])
        yield "kind of answer", _placed(len(exchanges), known, kinds)
        yield "form of answer", _placed(len(exchanges), known, forms_of([t.response for t in texts]))
    if overview.languages is not None:
        yield "language", _labels(overview.languages.take(pa.array(sample.rows)))
    elif _several([t.response for t in texts], overview.seed):
        yield "language", _placed(len(exchanges), known, detect_languages(t.response for t in texts))
    fifth, names = fifths(overview.lengths[sample.rows])
    yield f"length in {overview.length_unit}", np.array([names[i] for i in fifth], dtype=np.object_)
    for name, values in columns_of_few_values(overview, sample.rows):
        yield f"column {plain_name(name)}", _labels(values)


def exchanges_at(overview: Overview, rows: Indices, schema: Schema | None) -> list[Exchange | None]:
    """Return what was asked and answered last in each of these rows, `None` for a row that cannot be read."""
    if schema is None:
        try:
            schema = find_schema(overview.user_columns)
        except ValueError:  # the scores may come from anywhere
            return [None] * len(rows)
    batch = carried(overview.pool.select_columns(list(schema.read_columns))).select(rows.tolist())[:]
    return [None if isinstance(row, str) else row[-1] for row in exchanges_of(batch, schema)]


def _several(texts: list[str], seed: int) -> bool:
    """Return True if some of the texts show more than one language."""
    # Drawn at random: every n-th row of a dataset may well be of one language.
    looked = np.random.default_rng(seed).permutation(len(texts))[:FIRST_LOOK]
    told = [language for language in detect_languages(texts[i] for i in looked) if language != UNDETERMINED]
    counts = np.unique(np.array(told, dtype=np.str_), return_counts=True)[1]
    return int(np.count_nonzero(counts >= max(2, SEVERAL * len(looked)))) > 1


def fifths(lengths: Floats, counted: Indices | None = None) -> tuple[Indices, dict[int, str]]:
    """Return the number of the fifth that each length is in, and the range of each; equal lengths make fewer groups.

    Args:
        lengths (`(rows,)`): of all rows.
        counted (`(n,)` int64, *optional*): the rows whose lengths are divided into fifths and give the ranges; by
            default all.
    """
    of_counted = lengths if counted is None else lengths[counted]
    edges = np.unique(np.quantile(of_counted, (0.2, 0.4, 0.6, 0.8)).round())
    inside = np.digitize(of_counted, edges)
    parts = {int(i): of_counted[inside == i] for i in np.unique(inside)}
    return np.digitize(lengths, edges), {i: f"{part.min():,.0f} to {part.max():,.0f}" for i, part in parts.items()}


def columns_of_few_values(overview: Overview, rows: Indices | None = None) -> Iterator[tuple[str, pa.ChunkedArray]]:
    """Yield the columns of the source that have few values, such as the name of a source, with these values.

    Args:
        overview ([`Overview`]): of the pool.
        rows (`(n,)` int64, *optional*): read only these rows of it.
    """
    pool, schema, used = overview.pool.with_format("arrow"), overview.pool.features.arrow_schema, 0
    for name in overview.user_columns:
        kind = schema.field(name).type
        if used == GROUPINGS or not (is_text(kind) or pa.types.is_boolean(kind)):
            continue
        column = pool.select_columns([name])
        values = (column if rows is None else column.select(rows.tolist()))[:][name]
        if 2 <= pc.count_distinct(values).as_py() <= LEVELS:  # nulls do not count
            used += 1
            yield name, values


def _labels(values: pa.Array | pa.ChunkedArray) -> Labels:
    return np.array(
        [None if value is None else plain_name(str(value)) for value in values.to_pylist()], dtype=np.object_
    )


def _placed(count: int, at: list[int], values: list[str]) -> Labels:
    labels: Labels = np.full(count, None, dtype=np.object_)
    labels[at] = values
    return labels


def plain_name(text: str) -> str:
    """Return a text of the rows as a short name that is safe in Markdown: one line, and no signs of markup."""
    plain = " ".join("".join(c if c.isprintable() and c not in "`<>[]|*_\\" else " " for c in text).split())
    return (plain if len(plain) <= LABEL else plain[: LABEL - 1] + "…") or "(empty)"


# in words -------------------------------------------------------------------------------------------------------------


def describe(by_groups: Mapping[str, ScoreByGroup]) -> list[str]:
    """Return in words what the groupings explain, and which groups are all but lost."""
    if not by_groups:
        return []
    told = [f"{name} {100 * by_group.explained:.0f} %" for name, by_group in by_groups.items()]
    rows = max(by_group.rows for by_group in by_groups.values())
    sentences = [f"share of the scores' variance that the groups of {rows:,} rows explain: {', '.join(told)}"]
    for name, by_group in by_groups.items():
        for group in lost_groups(by_group):
            shares = (shares[group] for shares in (by_group.pool, by_group.best_tenth, by_group.selected))
            pool, best, selected = (f"{100 * share:.1f} %" for share in shares)
            sentences.append(
                f"all but lost: {named_group(name, group)}, {pool} of the pool, {best} of its best tenth by score, "
                f"and {selected} of the selection"
            )
    return sentences


def named_group(name: str, group: str) -> str:
    """Return a group and the name of its grouping in words, such as `rows of 15 to 46 tokens`."""
    unit = name.removeprefix("length in ")
    return f"{group} ({name})" if unit == name else f"rows of {group} {unit}"


def lost_groups(by_group: ScoreByGroup) -> list[str]:
    """Return the groups whose share in best tenth or selection is below a quarter of that in the pool.

    Groups that would have fewer than `EXPECTED` rows there by their share in the pool are too small to tell.
    """
    kept = ((by_group.best_rows, by_group.best_tenth), (by_group.selected_rows, by_group.selected))
    return [
        group
        for group, share in by_group.pool.items()
        if any(share * rows >= EXPECTED and shares[group] < LOST * share for rows, shares in kept)
    ]


def shares_table(by_groups: Mapping[str, ScoreByGroup]) -> list[list[str]]:
    """Return a header and a row per group, as text: grouping, variance explained, group, and its three shares."""
    lines = [["grouping", "variance explained", "group", "pool", "best tenth by score", "selected"]]
    for name, by_group in by_groups.items():
        lost = lost_groups(by_group)
        for i, (group, *shares) in enumerate(_shares(by_group)):
            start = [name, f"{100 * by_group.explained:.1f} %"] if i == 0 else ["", ""]
            mark = f"{group} (all but lost)" if group in lost else group
            lines.append([*start, mark, *(f"{100 * share:.1f} %" for share in shares)])
    return lines


def _shares(by_group: ScoreByGroup) -> Iterator[tuple[str, float, float, float]]:
    for group, share in by_group.pool.items():
        yield group, share, by_group.best_tenth[group], by_group.selected[group]
