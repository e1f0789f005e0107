"""Read the pool of a selection as chat messages, keep evaluation rows out of it, and draw the arms of an experiment.

Does: turn scored rows into TRL's conversational prompt-completion form; find rows that equal or resemble an evaluation
row; draw the selection, its rivals and a control, each of equal answer tokens or of equal rows.
Does not: train, tokenise (the caller counts tokens), or read evaluation files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from datasets import Dataset, concatenate_datasets

from car_datasets.loading.schemas import SCHEMAS, Schema, find_schema
from car_datasets.proving.examples import (
    GROUP_COLUMNS,
    CountTokens,
    as_examples,
    count_by_batch,
    digest_of,
    find_groups,
    kinds_of_rows,
    shuffle_words,
)
from car_datasets.proving.overlap import find_alike, find_overlap
from car_datasets.receipt import Receipt
from car_datasets.recipe import Recipe
from car_datasets.reporting.overview import positions_in_pool
from car_datasets.results import read_tables
from car_datasets.scoring.stage import Stage
from car_datasets.stages import Pipeline, resolve
from car_datasets.utils.columns import check_columns, read_clusters, read_numbers

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
Lesson = tuple[int, str | None]  # a row of the pool, and the answer that is trained on instead of its own

SELECTION = "selection"
RANDOM = "random"
CONTROL = "control"
BALANCED = "balanced"
MATCHED = "length-matched"
LONGEST = "longest"
BOTTOM = "bottom"
ARMS = (SELECTION, RANDOM, BALANCED, MATCHED, LONGEST, BOTTOM, CONTROL)  # drawn by default, in the order of reports
LENGTH_BINS = 32  # of the length-matched arm, over the pool and as many again over the selection
LAST = 64  # rows among which the last one of an arm is chosen, so that arms have nearly equal tokens


@dataclass(frozen=True, eq=False)
class Pool:
    """The rows that arms are drawn from; every array has one entry per row of `rows`.

    Args:
        rows (`Dataset`): `prompt` and `completion`, lists of messages with `role` and `content`: TRL's conversational
            prompt-completion form. The completion is the last answer of the row.
        scores (`(rows,)` float64): NaN for a row that only an arm of the caller has.
        clusters (`(rows,)` int64): -1 without a cluster.
        tokens (`(rows,)` int64): tokens of the answer.
        groups (`(rows,)` str): the source or the kind of task of each row, for the balanced arm and for reports.
        grouped_by (`str`): the name of the column of sources, or `"kind of task"`.
        scored (`(n,)` int64): the rows of the pool itself, from which random arms are drawn.
        chosen (`dict`): rows of the selection, under `"selection"`, and of each arm of the caller, in their order.
        left_out (`dict`): how many scored rows are not in `rows`, and why: `"unreadable"`, `"empty answer"` or
            `"too long"`.
        embedding_column (`str`): the column of `rows` with embeddings; `""` if the result has none.
    """

    rows: Dataset
    scores: Floats
    clusters: Indices
    tokens: Indices
    groups: npt.NDArray[np.str_]
    grouped_by: str
    scored: Indices
    chosen: dict[str, Indices]
    left_out: dict[str, int]
    embedding_column: str = ""

    def without(self, rows: Indices) -> Pool:
        """Return the pool without some rows; the others are numbered anew, in the same order."""
        kept = np.setdiff1d(np.arange(len(self.tokens)), rows)
        number = np.full(len(self.tokens), -1, dtype=np.int64)
        number[kept] = np.arange(len(kept))
        return replace(
            self,
            rows=self.rows.select(kept),
            **{name: getattr(self, name)[kept] for name in ("scores", "clusters", "tokens", "groups")},
            scored=_renumbered(self.scored, number),
            chosen={name: _renumbered(chosen, number) for name, chosen in self.chosen.items()},
        )

    def examples(self, lessons: Sequence[Lesson]) -> list[dict[str, Any]]:
        """Return what is trained on: `prompt` and `completion` of each row, with another answer where one is given."""
        found = self.rows.select_columns(["prompt", "completion"]).select([row for row, _ in lessons]).to_list()
        for example, (_, answer) in zip(found, lessons, strict=True):
            if answer is not None:
                example["completion"] = [{**example["completion"][0], "content": answer}]
        return found


class Arm(NamedTuple):
    """The rows of one arm, in training order.

    Args:
        name (`str`): one of `ARMS`, or a name of the caller's.
        rows (`(n,)` int64): rows of the pool.
        tokens (`int`): tokens of all their answers.
        answers (`list[str]`, *optional*): the answers that are trained on instead; only the control has them.
    """

    name: str
    rows: Indices
    tokens: int
    answers: list[str] | None = None

    @property
    def lessons(self) -> list[Lesson]:
        """Return each row with the answer that is trained on instead of its own, or `None`."""
        rows = self.rows.tolist()
        return [(row, None) for row in rows] if self.answers is None else list(zip(rows, self.answers, strict=True))


class HeldOut(NamedTuple):
    """A pool without the rows that are in an evaluation set.

    Args:
        pool ([`Pool`]): the rows that may be trained on.
        equal, near, asked (`int`): rows of the pool that were left out because they equal an evaluation row, resemble
            one in prompt and answer, or have its prompt with another answer.
        selected (`int`): how many of these were in the selection.
    """

    pool: Pool
    equal: int
    near: int
    asked: int
    selected: int


# the pool ------------------------------------------------------------------------------------------------------------


def read_pool(
    folder: str | Path,
    count_tokens: CountTokens,
    *,
    group_column: str | None = None,
    own: Mapping[str, str | Path] | None = None,
) -> Pool:
    """Read all scored rows of a result of [`curate`], and which of them were selected, as chat messages.

    A chat is trained on its last answer, with everything before it as the prompt; thoughts of that answer are kept.

    Args:
        folder (`str` or `Path`): a folder that `car-datasets curate` wrote.
        count_tokens (`Callable`): returns for a list of rows (`prompt` and `completion`) how many tokens of each answer
            would be trained on; 0 for a row that does not fit.
        group_column (`str`, *optional*): the column of sources for the balanced arm. Defaults to the first of
            `GROUP_COLUMNS` that is there, else to kinds of task that are found in the texts.
        own (`Mapping[str, str]`, *optional*): arms of the caller: a name, and the folder of another result, whose
            selected rows are the arm.

    Returns:
        [`Pool`]: rows without a score, without a readable answer or with an empty one are left out and counted.

    Raises:
        ValueError: a folder is not a result, does not have the texts of its rows, or has no row that can be used.
    """
    check_names(own or {})
    found = _read_result(Path(folder), group_column)
    chosen, rows = {SELECTION: found.selected}, found.rows
    positions = {digest: row for row, digest in enumerate(map(digest_of, rows))} if own else {}
    for name, other in (own or {}).items():
        theirs = _read_result(Path(other), None)
        picked = theirs.rows.select(theirs.selected)
        digests = [digest_of(row) for row in picked]
        new = [i for i, digest in enumerate(digests) if digest not in positions]
        positions |= {digests[i]: len(rows) + n for n, i in enumerate(new)}
        rows = (
            concatenate_datasets([rows, picked.select(new).select_columns(["prompt", "completion"])]) if new else rows
        )
        chosen[name] = np.array([positions[digest] for digest in digests], dtype=np.int64)
    added = len(rows) - len(found.rows)
    known = [*found.groups, *[""] * added]
    groups = np.array(known if found.group_column else kinds_of_rows(rows), dtype=np.str_)
    tokens = count_by_batch(rows, count_tokens)
    pool = Pool(
        rows=rows,
        scores=np.concatenate([found.scores, np.full(added, np.nan)]),
        clusters=np.concatenate([found.clusters, np.full(added, -1)]),
        tokens=tokens,
        groups=groups,
        grouped_by=found.group_column or "kind of task",
        scored=np.arange(len(found.rows)),
        chosen=chosen,
        left_out={**found.left_out, "too long": int(np.count_nonzero(tokens < 1))},
        embedding_column=found.embedding_column,
    )
    return pool.without(np.flatnonzero(tokens < 1))


def check_names(names: Iterable[str]) -> None:
    """Raise ValueError if an arm of the caller has no name, or that of an arm of the package."""
    for name in names:
        if name in ARMS or not name.strip():
            raise ValueError(f"arms has the name {name!r}, which an arm of the package has; choose another name.")


class _Result(NamedTuple):
    """The usable rows of a result, and the positions of its selection among them."""

    rows: Dataset
    scores: Floats
    clusters: Indices
    selected: Indices
    group_column: str
    groups: list[str]
    left_out: dict[str, int]
    embedding_column: str


def _read_result(folder: Path, group_column: str | None) -> _Result:
    selected, scored = read_tables(folder)
    receipt = Receipt.read(folder)
    names = Recipe().changed(**receipt.recipe).names
    check_columns(scored.column_names, (names.score, names.index), ())
    schema = _schema_of(folder, scored, receipt)
    by = find_groups(scored, GROUP_COLUMNS, group_column)
    scores = read_numbers(scored, names.score, np.nan).astype(np.float64)
    clusters = read_clusters(scored, names.cluster)
    with_score = np.flatnonzero(~np.isnan(scores))
    rows, problems = as_examples(scored.select(with_score), schema)
    usable = np.array([not problem for problem in problems], dtype=bool)
    if not usable.any():
        raise ValueError(
            f"{str(folder)!r} has no row with a score and an answer that can be trained on; curate another source."
        )
    kept = with_score[usable]
    number = np.full(len(scored), -1, dtype=np.int64)
    number[kept] = np.arange(len(kept))
    embedded = names.embedding if names.embedding in scored.column_names else ""
    rows = rows.select(np.flatnonzero(usable))
    if embedded:
        vectors = scored.select_columns([embedded]).select(kept).flatten_indices(keep_in_memory=True)
        rows = concatenate_datasets([rows.flatten_indices(keep_in_memory=True), vectors], axis=1)
    return _Result(
        rows=rows,
        scores=scores[kept],
        clusters=clusters[kept],
        selected=_renumbered(positions_in_pool(scored, selected, names.index), number),
        group_column=by,
        groups=[] if not by else [str(value) for value in scored.select_columns([by]).select(kept)[by][:]],
        left_out={reason: problems.count(reason) for reason in ("unreadable", "empty answer")},
        embedding_column=embedded,
    )


def _schema_of(folder: Path, scored: Dataset, receipt: Receipt) -> Schema:
    """Return how the rows of a result are read; raise ValueError if their texts are not in its table."""
    known = receipt.schema if receipt.schema in SCHEMAS else "auto"
    try:
        return find_schema(scored.column_names, known, receipt.recipe.get("columns", {}))
    except ValueError as error:
        source = receipt.source.get("id") or receipt.source.get("name") or "its source"
        raise ValueError(
            f"{str(folder)!r} does not have the texts of its rows ({error}). Curate {source!r} again with all of its "
            "columns: car-datasets curate SOURCE --output-dir NEW."
        ) from error


def _renumbered(rows: Indices, number: Indices) -> Indices:
    found = number[rows]
    return found[found >= 0]


# rows that are evaluated on --------------------------------------------------------------------------------------------


def stages_of(folder: str | Path, token: str | None = None) -> Pipeline | None:
    """Return the stages that scored and embedded the rows of a result, to be applied to messages.

    Args:
        folder (`str` or `Path`): a folder that `car-datasets curate` wrote.
        token (`str`, *optional*): for a private model; never stored.

    Returns:
        [`Pipeline`]: `None` if a model is not at hand; of a local folder, a receipt holds the name without the path.
    """
    recipe = Recipe().changed(**Receipt.read(Path(folder)).recipe).changed(schema="auto", columns=())
    try:
        return resolve(recipe, token)
    except (ValueError, OSError):
        return None


def hold_out(pool: Pool, evaluation: Dataset, embedder: Stage | None = None) -> HeldOut:
    """Leave rows out of a pool that are in an evaluation set, equal or nearly, so that they are never trained on.

    Args:
        pool ([`Pool`]): from [`read_pool`].
        evaluation (`Dataset`): `prompt` and `completion`, as in `pool.rows`.
        embedder ([`Stage`], *optional*): of the pool's embeddings; then rows with nearly the embedding of an evaluation row
            are near ones as well, if the pool has embeddings.

    Returns:
        [`HeldOut`]: the pool without these rows, and how many of each sort there were.

    Raises:
        ValueError: every evaluation row is in the pool, or no row of the pool or of the selection is left.
    """
    overlap = find_overlap(pool.rows, evaluation)
    if len(overlap.evaluation) == len(evaluation):
        raise ValueError(
            f"All {len(evaluation)} evaluation rows are in the pool that the selection was made from, so they cannot "
            "measure it. Pass rows that are apart from it: evaluation=[FILE] (--eval FILE), or leave it out for the set "
            "that the package ships."
        )
    near = overlap.near
    if embedder is not None and pool.embedding_column:
        alike = find_alike(pool.rows, pool.embedding_column, evaluation, embedder)
        near = np.union1d(near, np.setdiff1d(alike, np.concatenate([overlap.equal, overlap.asked])))
    rows = np.concatenate([overlap.equal, near, overlap.asked])
    left = pool.without(rows)
    empty = [name for name, chosen in left.chosen.items() if len(chosen) < 2]
    if empty:
        raise ValueError(
            f"The arm {empty[0]!r} has {len(left.chosen[empty[0]])} rows that are not in the evaluation set; two are "
            "needed. Select more rows, or pass another evaluation set: evaluation=[FILE] (--eval FILE)."
        )
    selected = len(np.intersect1d(rows, pool.chosen[SELECTION]))
    return HeldOut(left, len(overlap.equal), len(near), len(overlap.asked), selected)


# arms ------------------------------------------------------------------------------------------------------------------


def available(pool: Pool, names: Sequence[str] = ARMS) -> dict[str, tuple[int, int]]:
    """Return how many answer tokens and rows each arm can have.

    Args:
        pool ([`Pool`]): from [`hold_out`].
        names (`Sequence[str]`): of `ARMS`; arms of the caller are always in the result.

    Raises:
        ValueError: a name is unknown.
    """
    unknown = [name for name in names if name not in ARMS and name not in pool.chosen]
    if unknown:
        raise ValueError(f"names has {unknown[0]!r}; the arms are {', '.join((*ARMS, *list(pool.chosen)[1:]))}.")
    found = {}
    for name in dict.fromkeys((*names, *list(pool.chosen)[1:])):
        rows = pool.chosen[SELECTION if name == CONTROL else name] if name in (*pool.chosen, CONTROL) else pool.scored
        found[name] = (int(pool.tokens[rows].sum()), len(rows))
    return found


def draw_arms(
    pool: Pool, seed: int, *, tokens: int | None = None, rows: int | None = None, names: Sequence[str] = ARMS
) -> dict[str, Arm]:
    """Draw all arms for one seed, each of the same number of answer tokens or of rows.

    An arm is cut to the budget by whole rows; the last one is chosen so that the sum is near the budget. The rows of
    the selection that a smaller budget leaves out are drawn at random, and each arm is shuffled into its training
    order; both depend on the seed alone. The control has the rows of the selection in the same order, with the words of
    each answer shuffled.

    Args:
        pool ([`Pool`]): from [`hold_out`].
        seed (`int`): of random draws and of orders.
        tokens (`int`, *optional*): answer tokens of each arm. Defaults to what the smallest arm has.
        rows (`int`, *optional*): rows of each arm, instead of tokens.
        names (`Sequence[str]`): which of `ARMS` to draw; arms of the caller are always drawn.

    Returns:
        `dict[str, Arm]`: in the order of `names`, and the arms of the caller at the end.

    Raises:
        ValueError: both budgets are given, or an arm has fewer tokens or rows than its budget.
    """
    limits = available(pool, names)
    budget = _budget(limits, tokens, rows)
    weights = pool.tokens if rows is None else np.ones_like(pool.tokens)
    # One generator per arm, so that an arm does not depend on which others are drawn.
    drawn = {name: _draw(pool, name, seed, weights, budget) for name in limits}
    arms = {}
    for name, picked in drawn.items():
        order = _rng(seed, "order").permutation(len(picked))
        arms[name] = Arm(name, picked[order], int(pool.tokens[picked].sum()))
    if CONTROL in arms:
        rng = _rng(seed, "words")
        said = [each["completion"][0]["content"] for each in pool.examples(arms[CONTROL].lessons)]
        arms[CONTROL] = arms[CONTROL]._replace(answers=[shuffle_words(text, rng) for text in said])
    return arms


def _budget(limits: Mapping[str, tuple[int, int]], tokens: int | None, rows: int | None) -> int:
    """Return the budget of every arm in tokens, or in rows if these were asked for."""
    if tokens is not None and rows is not None:
        raise ValueError(f"tokens={tokens} and rows={rows} are two budgets; pass one of them.")
    unit, at = ("tokens", 0) if rows is None else ("rows", 1)
    asked = tokens if rows is None else rows
    smallest = min(limits, key=lambda name: limits[name][at])
    most = limits[smallest][at]
    budget = most if asked is None else asked
    if not 1 <= budget <= most:
        shown = "answer tokens" if unit == "tokens" else "rows"
        raise ValueError(
            f"{unit}={asked}, but the arm {smallest!r} has {most} {shown}. Pass {unit}={most} (--{unit} {most}) or "
            "less, or select more rows."
        )
    if min(limits[name][1] for name in limits) < 2:
        raise ValueError(f"The arm {smallest!r} has fewer than two rows; select more rows.")
    return budget


def _rng(seed: int, name: str) -> np.random.Generator:
    return np.random.default_rng([seed, *hashlib.sha256(name.encode()).digest()[:8]])


def _draw(pool: Pool, name: str, seed: int, weights: Indices, budget: int) -> Indices:
    """Return the rows of an arm, cut to the budget."""
    rng = _rng(seed, name)
    if name in (SELECTION, CONTROL):
        # The control has the same rows, so that only the answers differ.
        order = _rng(seed, SELECTION).permutation(pool.chosen[SELECTION])
    elif name in pool.chosen:
        order = rng.permutation(pool.chosen[name])
    elif name == RANDOM:
        order = rng.permutation(pool.scored)
    elif name == BALANCED:
        return _balanced(pool, rng, weights, budget)
    elif name == MATCHED:
        order = _length_matched(pool, rng)
    else:
        keys = -pool.tokens if name == LONGEST else pool.scores
        order = pool.scored[np.argsort(keys[pool.scored], kind="stable")]
    return _cut(order, weights, budget)


def _cut(order: Indices, weights: Indices, budget: float) -> Indices:
    """Return the first rows of an order that fit, and the one of the next `LAST` that brings the sum nearest to it."""
    sums = np.cumsum(weights[order])
    count = int(np.searchsorted(sums, budget, side="right"))
    left = budget - (sums[count - 1] if count else 0)
    others = order[count : count + LAST]
    misses = np.abs(weights[others] - left)
    if len(others) and (count == 0 or misses.min() < left):
        return np.append(order[:count], others[int(np.argmin(misses))])
    return order[:count]


def _balanced(pool: Pool, rng: np.random.Generator, weights: Indices, budget: int) -> Indices:
    """Return random rows of which every group has an equal share; what a small group cannot use goes to the others."""
    rows = rng.permutation(pool.scored)
    groups, member = np.unique(pool.groups[rows], return_inverse=True)
    sizes = np.bincount(member, weights[rows], minlength=len(groups))
    level, left = 0.0, float(budget)
    # Smallest first: what it lacks of an equal share is divided among the groups that are still to come.
    quotas = np.zeros(len(groups))
    for place, group in enumerate(np.argsort(sizes, kind="stable")):
        level = min(sizes[group], left / (len(groups) - place))
        quotas[group] = level
        left -= level
    picked, short = [], 0.0
    for group in range(len(groups)):
        mine = rows[member == group]
        # Whole rows miss a quota by some tokens, which the next group makes up for.
        cut = _cut(mine, weights, quotas[group] + short) if quotas[group] + short > 0 else mine[:0]
        short += quotas[group] - float(weights[cut].sum())
        picked.append(cut)
    return np.concatenate(picked)


def _length_matched(pool: Pool, rng: np.random.Generator) -> Indices:
    """Return all rows of the pool, in an order whose first rows have the lengths of answers that the selection has."""
    chosen = pool.chosen[SELECTION]
    quantiles = np.linspace(0, 1, LENGTH_BINS + 1)[1:-1]
    edges = np.unique([np.quantile(pool.tokens[rows], quantiles) for rows in (pool.scored, chosen)])
    bins = np.digitize(pool.tokens, edges)
    rows = rng.permutation(pool.scored)
    share = np.bincount(bins[chosen], minlength=len(edges) + 1) / len(chosen)
    # The i-th row of a bin comes at i / share of it, so that every part of the order has the selection's shares.
    order = np.argsort(bins[rows], kind="stable")
    sorted_bins = bins[rows][order]
    first = np.searchsorted(sorted_bins, np.arange(len(edges) + 1))
    place = np.empty(len(rows))
    place[order] = np.arange(len(rows)) - first[sorted_bins] + rng.random(len(rows))
    with np.errstate(divide="ignore"):
        keys = place / share[bins[rows]]
    return rows[np.argsort(keys, kind="stable")]
