"""Choose rows by a recipe, from the columns of a pool alone: `select_by`, which `select`, `verify` and `curate` share.

Does: rank rows within groups; leave out rows that are marked; turn shares, budgets and pins into bounds; call the rule.
Does not: run a model, find duplicates or contamination, or read a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from datasets import Dataset

from car_datasets.recipe import Recipe
from car_datasets.reporting.ledger import count_of
from car_datasets.reporting.overview import Asked
from car_datasets.scoring.named import refuse_raw_numbers
from car_datasets.scoring.stage import say
from car_datasets.selection.constrained import choose_within
from car_datasets.selection.filling import Room
from car_datasets.selection.limits import Limits, parse_tokens
from car_datasets.selection.marks.exclusions import KEEP, excluded_rows, pinned_values
from car_datasets.selection.procedures import Amounts, find_procedure
from car_datasets.selection.rule import (
    BY_LIKE,
    BY_PIN,
    BY_SCORE,
    SELECTION_COLUMNS,
    Choice,
    add_selection,
    choose,
    refuse_infinite,
    refuse_worse,
    shares_within,
)
from car_datasets.selection.strata import parse_quota, quotas_of, read_strata, refuse_unknown_values
from car_datasets.utils.column_names import ColumnNames
from car_datasets.utils.columns import check_columns, read_clusters, read_numbers

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


def select_by(recipe: Recipe, pool: Dataset) -> Dataset:
    """Select from a scored, clustered pool by a recipe, without looking its models up.

    Args:
        recipe ([`Recipe`]): the settings.
        pool (`Dataset`): with all columns that the recipe's rule reads.

    Returns:
        `Dataset`: the selected rows, with `selected_by`, `score_rank` and `cluster_rank`.

    Raises:
        ValueError: a column is missing, or the bounds cannot be kept.
    """
    # `curate` has ranked its pool already, but `select` and `verify` start from a pool that was read from a file.
    _refuse_missing_marks(recipe, pool.column_names)
    refuse_raw_numbers(recipe.score_column, pool.column_names)
    pool = ranked(recipe, pool)
    if recipe.is_limited:
        return _select_within_limits(recipe, pool)
    allowed = may_be_selected(recipe, pool)
    if not allowed.all():
        # The rows are counted in the source before some are left out.
        if recipe.index_column not in pool.column_names:
            pool = pool.add_column(recipe.index_column, np.arange(len(pool)))
        pool = pool.select(np.flatnonzero(allowed).tolist())
    amounts = _amounts(recipe, scored_rows(recipe, pool), bool(allowed.all()))
    return find_procedure(recipe.procedure).select(pool, amounts, replace(recipe.names, score=_ranking_column(recipe)))


def _refuse_missing_marks(recipe: Recipe, columns: Sequence[str]) -> None:
    """Raise ValueError if a recipe selects by marks that the rows do not have."""
    names = recipe.names
    needed = {
        "keep": names.pinned if recipe.keep is not None else None,
        "drop": names.pinned if recipe.drop is not None else None,
        "against": names.contaminated_by if recipe.against else None,
        "like": names.like_rank if recipe.like is not None else None,
        "rule": names.near_clusters if recipe.rule == "gain" else None,
    }
    for setting, column in needed.items():
        if column is not None and column not in columns:
            raise ValueError(
                f"{setting}={getattr(recipe, setting)!r} needs the column {column!r}, which the rows do not have; `curate` "
                "adds it."
            )


def may_be_selected(recipe: Recipe, pool: Dataset) -> Mask:
    """Return a mask of the rows that no mark keeps out, with or without a score."""
    marks = excluded_rows(pool, duplicates=recipe.marking != "keep", pins=recipe.has_pins)
    return np.asarray(marks == "", dtype=bool)


def asked_of(recipe: Recipe) -> Asked:
    """Return what a recipe asks of the selection, as reports tell it."""
    groups = recipe.balance if recipe.quota is None else parse_quota(recipe.quota)[0]
    return Asked(recipe.n2, recipe.k, groups, recipe.budget_tokens is not None, recipe.within)


def marks_of(recipe: Recipe) -> list[str]:
    """Return the names of the columns by which a recipe marks rows; they cannot be changed."""
    names = recipe.names
    marks = [names.pinned] if recipe.has_pins else []
    marks += [names.contaminated_by, names.contaminated_share] if recipe.against else []
    marks += [names.duplicate_of, names.duplicate_similarity] if recipe.marking != "keep" else []
    marks += [names.near_clusters, names.near_weights] if recipe.rule == "gain" else []
    marks += [names.like_rank] if recipe.like is not None else []
    return [*marks, names.budget_tokens] if recipe.budget_tokenizer is not None else marks


def settled(recipe: Recipe, pool: Dataset) -> Recipe:
    """Return a recipe with the n1 that its default gives for a scored pool, unless it has an amount."""
    if recipe.budget_tokens is not None:
        return recipe
    allowed = may_be_selected(recipe, pool)
    rows = pool if allowed.all() else pool.select(np.flatnonzero(allowed).tolist())
    return recipe.changed(n1=recipe.amounts_of(scored_rows(recipe, rows)).n1)


def scored_rows(recipe: Recipe, pool: Dataset) -> int:
    """Return the number of rows that have a score; 0 without the column, which the selection refuses."""
    # The selection names the missing column in a better message.
    if recipe.score_column not in pool.column_names:
        return 0
    scores = read_numbers(pool, recipe.score_column, np.nan)
    refuse_infinite(scores, recipe.score_column)  # here, as plots of them would fail once the selection is made
    return int(np.count_nonzero(~np.isnan(scores)))


def ranked(recipe: Recipe, pool: Dataset) -> Dataset:
    """Return a scored pool with the column by which its rows are ranked within their groups, if a recipe wants that.

    The scores stay as they are. Rows of undetermined language, or of no value, are ranked among themselves; rows that
    may not be selected have no rank.

    Raises:
        ValueError: the pool has no column of scores or of groups.
    """
    names = recipe.names
    if _ranking_column(recipe) == names.score:
        return pool
    if recipe.languages == "within" and names.language not in pool.column_names:
        raise ValueError(
            f"languages='within' needs the column {names.language!r}, which the rows do not have. Name the one "
            "that they have (--language-column), or let `score --language-column` or `curate --languages within` add it."
        )
    check_columns(pool.column_names, (names.score,), ())
    scores = np.where(may_be_selected(recipe, pool), read_numbers(pool, names.score, np.nan), np.nan)
    shares = shares_within(scores, read_strata(pool, recipe.within or names.language))
    if names.within in pool.column_names:  # computed anew, so that a check of the selection does not trust it
        pool = pool.remove_columns(names.within)
    return pool.add_column(names.within, pa.array(shares, from_pandas=True))


def _ranking_column(recipe: Recipe) -> str:
    """Return the column that rows are ranked by; the report and the files keep the score itself."""
    return recipe.names.within if recipe.within or recipe.languages == "within" else recipe.score_column


def _amounts(recipe: Recipe, rows: int, all_allowed: bool) -> Amounts:
    """Return how many rows to select from so many scored rows that may be selected.

    Duplicates are known only once all rows are scored. A run of hours must not fail for the few rows that they take
    from a pool that was large enough, so then all that are left are selected.
    """
    amounts = recipe.amounts_of(rows)
    if all_allowed:
        return amounts
    n1, budget = amounts.n1, amounts.budget
    for name, n in (("n1", n1), ("budget", budget)):
        if isinstance(n, int) and n > rows > 0:
            say(f"{name}={n:,} is more than the {rows:,} rows that may be selected: all of these are taken.")
    return replace(
        amounts,
        n1=min(n1, rows) if isinstance(n1, int) else n1,
        n2=min(amounts.n2, max(rows, 1)),
        budget=None if budget is None else min(budget, rows),
    )


def _select_within_limits(recipe: Recipe, pool: Dataset) -> Dataset:
    """Select by the rule of a recipe within its bounds."""
    names = recipe.names
    check_columns(pool.column_names, (names.score, names.cluster), SELECTION_COLUMNS)
    scored_rows(recipe, pool)  # refuses infinite scores
    scores = read_numbers(pool, ColumnNames.like_rank if recipe.like else _ranking_column(recipe), np.nan)
    # What cannot be scored is never selected, and neither is what a mark keeps out.
    eligible = may_be_selected(recipe, pool) & ~np.isnan(read_numbers(pool, names.score, np.nan))
    scores = np.where(eligible, -scores if recipe.like else scores, np.nan)
    clusters = read_clusters(pool, names.cluster)
    limits, groups = limits_of(recipe, pool, scores, clusters)
    choice = _choose(recipe, pool, scores, clusters, limits)
    if len(choice.positions) == 0:
        raise ValueError("The bounds leave no row to select: raise the budget, or the share of a value that has rows.")
    if not recipe.allow_worse and not recipe.like:
        _refuse_worse(scores, choice, groups)
    return add_selection(pool, choice, names.index)


def _choose(recipe: Recipe, pool: Dataset, scores: Floats, clusters: Any, limits: Limits) -> Choice:
    if recipe.rule == "gain":
        from car_datasets.selection.gain import choose_by_gain, read_memberships

        return choose_by_gain(scores, *read_memberships(pool, recipe.names), limits)
    if not recipe.like:
        return choose_within(scores, clusters, recipe.n2, limits)
    # Clusters give none of their own: their best rows need not be near any example.
    choice = choose_within(scores, clusters, 0, limits)
    return choice._replace(selected_by=[BY_LIKE if reason == BY_SCORE else reason for reason in choice.selected_by])


def limits_of(recipe: Recipe, pool: Dataset, scores: Floats, clusters: Any) -> tuple[Limits, list[str] | None]:
    """Return the bounds of a recipe, and the group of each row if the budget is shared out among groups.

    Args:
        recipe ([`Recipe`]): the settings.
        pool (`Dataset`): with the columns that hold tokens and groups.
        scores (`(rows,)` float64): what the rows are ranked by; NaN for a row that must not be selected.
        clusters (`(rows,)` int64): of each row; needed if there is no budget, which then is what CaR's rule takes.
    """
    eligible = ~np.isnan(scores)
    pinned = pinned_values(pool) == KEEP if recipe.keep else None
    costs = None if recipe.budget_tokens is None else _costs(recipe, pool, eligible)
    if recipe.budget_tokens is not None:
        budget = parse_tokens(recipe.budget_tokens)
    else:
        amounts = _amounts(recipe, int(np.count_nonzero(eligible)), bool(eligible.all()))
        # Without a budget it is what the rule takes without bounds.
        n2 = 0 if recipe.like else amounts.n2
        budget = amounts.budget or len(choose(scores, clusters, amounts.n1, n2).positions)
        if amounts.budget is None and pinned is not None:
            budget = max(budget, int(np.count_nonzero(pinned)))
    column, shares = (recipe.balance, None) if recipe.quota is None else parse_quota(recipe.quota)
    if column is None:
        return Limits(budget, costs, pinned=pinned), None
    values = read_strata(pool, column)
    if shares is not None:
        refuse_unknown_values(values, column, shares)
    shared = quotas_of(values, costs, eligible, budget, shares)
    _refuse_pins_over(shared.names, shared.strata, shared.quotas, costs, pinned)
    return Limits(budget, costs, shared.strata, shared.quotas, pinned), values


def check_limits(recipe: Recipe, dataset: Dataset, count_tokens: Callable[[Dataset], Iterator[int]] | None) -> None:
    """Raise ValueError if the rows to keep are more than the budget or a quota, as far as rows without scores tell.

    Args:
        recipe ([`Recipe`]): the settings.
        dataset (`Dataset`): checked rows, with the columns of pins and groups, and of tokens if a tokenizer is named.
        count_tokens (`Callable`, *optional*): yields the tokens of rows as the scorer counts them; asked for the rows to
            keep alone, so that quotas in these tokens are checked only once all rows are scored. `None` if the scorer
            cannot count without scoring: a budget in its tokens is then checked afterwards.
    """
    if recipe.keep is None or (recipe.budget is None and recipe.budget_tokens is None):
        return
    if recipe.budget_tokens is not None and recipe.budget_tokenizer is None:
        if count_tokens is None:
            return
        kept = dataset.select(np.flatnonzero(pinned_values(dataset) == KEEP).tolist())
        used = sum(count_tokens(kept))
        if used > parse_tokens(recipe.budget_tokens):
            raise ValueError(
                f"budget_tokens={recipe.budget_tokens!r} is below the {used:,} tokens of {count_of(len(kept), 'rows')} to keep. "
                "Raise it (--budget-tokens), or keep fewer rows (--keep)."
            )
        return
    allowed = may_be_selected(recipe, dataset)
    scores = np.where(allowed, 0.0, np.nan)
    Room(limits_of(recipe, dataset, scores, np.full(len(dataset), -1))[0], scores)


def _costs(recipe: Recipe, pool: Dataset, eligible: Mask) -> npt.NDArray[np.int64]:
    """Return the tokens of each row, by the scorer's count or by that of a named tokenizer."""
    column = recipe.names.tokens if recipe.budget_tokenizer is None else ColumnNames.budget_tokens
    if column not in pool.column_names:
        raise ValueError(
            f"budget_tokens={recipe.budget_tokens!r} needs the column {column!r}, which the rows do not have; `score` and "
            "`curate` add it. Or name a tokenizer to count by: budget_tokenizer=... (--budget-tokenizer)."
        )
    tokens = read_numbers(pool, column, np.nan)
    if len(rows := np.flatnonzero(eligible & ~(tokens >= 0))):
        raise ValueError(
            f"The column {column!r} has no count of tokens in {len(rows)} rows that have a score, the first at position "
            f"{rows[0]}: score them again, or name a tokenizer (--budget-tokenizer)."
        )
    return np.nan_to_num(tokens).astype(np.int64)


def _refuse_pins_over(
    names: tuple[str, ...],
    strata: npt.NDArray[np.int64],
    quotas: npt.NDArray[np.int64],
    costs: Any,
    pinned: Mask | None,
) -> None:
    """Raise ValueError if the pinned rows of a stratum are more than its quota, with the name of the stratum."""
    if pinned is None:
        return
    cost = np.ones(len(strata), dtype=np.int64) if costs is None else costs
    used = np.bincount(strata[pinned], cost[pinned], minlength=len(quotas))
    if len(over := np.flatnonzero(used > quotas)):
        first = over[0]
        raise ValueError(
            f"The rows to keep of {names[first] or 'the other values'!r} take {int(used[first]):,} of its quota of "
            f"{quotas[first]:,}: raise the budget or the share of this value, or keep fewer of its rows (--keep; "
            "in a top-up, --reselect)."
        )


def _refuse_worse(scores: Floats, choice: Choice, groups: list[str] | None) -> None:
    """Raise ValueError if the chosen rows rank below the pool: within their groups, where shares are prescribed."""
    by_pin = np.asarray(choice.selected_by) == BY_PIN
    chosen = choice.positions[~by_pin]
    # Pinned rows are not there to be chosen: they may be the best ones, as after a top-up.
    scores = scores.copy()
    scores[choice.positions[by_pin]] = np.nan
    if len(chosen):
        refuse_worse(scores if groups is None else shares_within(scores, groups), chosen)
