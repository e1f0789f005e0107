"""`PROCEDURES`: the ways in which `curate` orders, selects and writes rows, by the name that a recipe gives them.

Does: check the numbers of a selection before there are scores; order the pool; select from it; name extra files.
Does not: score, cluster, or write files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from car_datasets.selection.published import (
    CLUSTERING_FILE,
    RANKING_FILES,
    SELECTED_FILE,
    rank_rows,
    select_as_published,
)
from car_datasets.selection.rule import refuse_impossible, select_car
from car_datasets.utils.column_names import ColumnNames
from car_datasets.utils.settings import KMEANS, is_integer

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Amounts:
    """How many rows to select.

    Args:
        n1 (`int` or `float`, *optional*): rows taken by score; a float in (0, 1) is that share of the scored rows. A
            recipe without n1 gives its default here, and None only with a budget.
        n2 (`int`): rows taken from every cluster.
        budget (`int`, *optional*): rows in all; n1 then follows from it and from n2.
        allow_worse (`bool`): accept a selection whose mean score is below the pool's.
    """

    n1: int | float | None
    n2: int
    budget: int | None = None
    allow_worse: bool = False


def _keep_order(pool: Dataset, names: ColumnNames) -> Dataset:
    """Return the pool in the order of the source."""
    return pool


def _no_files(selected: Dataset, pool: Dataset, objective: str, names: ColumnNames) -> dict[str, Dataset]:
    """Return no extra files."""
    return {}


@dataclass(frozen=True)
class Procedure:
    """A rule of selection, with what it needs before clustering and what it leaves behind.

    Add one with `PROCEDURES["mine"] = Procedure(check, select)`; `curate(..., procedure="mine")` then uses it.

    Args:
        check (`Callable`): `(rows, clusters, amounts)`; raises ValueError if these amounts cannot be selected from so
            many scorable rows and clusters. Called before any model runs; with fewer distinct rows than clusters, as
            many clusters as distinct rows, since no more can have rows.
        select (`Callable`): `(pool, amounts, names)`; returns the selected rows of a scored, clustered pool with the
            columns `selected_by`, `score_rank` and `cluster_rank`.
        order (`Callable`): `(pool, names)`; returns the scored pool in the order in which it is clustered.
        kmeans (`str`): the k-means engine, unless the recipe names one: `"torch"` or `"sklearn"`.
        duplicates (`str`): what happens to near-duplicates, unless the recipe says it: `"drop"`, `"only-exact"` or
            `"keep"`.
        files (`tuple[str, ...]`): names of all extra files that the procedure may write, in the original's JSON format.
        tables (`Callable`): `(selected, pool, objective, names)`; returns the rows of each extra file by its name.
            `objective` is the scorer's, `"regression"` or `"ranking"`.
    """

    check: Callable[[int, int, Amounts], None]
    select: Callable[[Dataset, Amounts, ColumnNames], Dataset]
    order: Callable[[Dataset, ColumnNames], Dataset] = _keep_order
    kmeans: str = KMEANS
    duplicates: str = "drop"
    files: tuple[str, ...] = ()
    tables: Callable[[Dataset, Dataset, str, ColumnNames], dict[str, Dataset]] = _no_files


def find_procedure(name: str) -> Procedure:
    """Return the procedure of this name.

    Raises:
        ValueError: the name is not in [`PROCEDURES`].
    """
    if name not in PROCEDURES:
        raise ValueError(f"procedure={name!r} is not known; choose one of {tuple(PROCEDURES)}.")
    return PROCEDURES[name]


def _check_default(rows: int, clusters: int, amounts: Amounts) -> None:
    refuse_impossible(rows, clusters, amounts.n1, amounts.n2, amounts.budget)


def _select_default(pool: Dataset, amounts: Amounts, names: ColumnNames) -> Dataset:
    return select_car(
        pool,
        amounts.n1,
        amounts.n2,
        budget=amounts.budget,
        allow_worse=amounts.allow_worse,
        score_column=names.score,
        cluster_column=names.cluster,
        index_column=names.index,
    )


def _check_published(rows: int, clusters: int, amounts: Amounts) -> None:
    # Asking for more rows than there are is fine: the published code takes all of them.
    numbers = [n for n in (amounts.n1, amounts.n2) if n is not None]
    if amounts.budget is not None or not all(is_integer(n) and n >= 0 for n in numbers):
        raise ValueError(
            f"procedure='paper' takes integers n1={amounts.n1} and n2={amounts.n2} that are not negative, and no "
            f"budget={amounts.budget}. Pass n1 and n2 as integers without budget, or procedure='default'."
        )


def _select_published(pool: Dataset, amounts: Amounts, names: ColumnNames) -> Dataset:
    _check_published(len(pool), 0, amounts)  # again, for callers other than `curate`; the counts are not looked at
    # `allow_worse` is not passed on: the published code does not compare its selection with the pool.
    return select_as_published(
        pool,
        None if amounts.n1 is None else int(amounts.n1),
        amounts.n2,
        score_column=names.score,
        cluster_column=names.cluster,
        index_column=names.index,
        embedding_column=names.embedding,
    )


def _order_published(pool: Dataset, names: ColumnNames) -> Dataset:
    # k-means depends on the order of its rows, and the published code clusters the ranking file.
    return rank_rows(pool, names.score)


def _published_tables(selected: Dataset, pool: Dataset, objective: str, names: ColumnNames) -> dict[str, Dataset]:
    return {
        # The original wrote this file before it clustered.
        RANKING_FILES[objective]: pool.remove_columns([names.cluster, names.distance]),
        CLUSTERING_FILE: pool,
        SELECTED_FILE: selected,
    }


# By the name that a recipe gives: part of recipes and receipts on disk, so a name is never reused for another rule.
PROCEDURES: dict[str, Procedure] = {
    "default": Procedure(_check_default, _select_default),
    "paper": Procedure(
        _check_published,
        _select_published,
        order=_order_published,
        kmeans="sklearn",
        duplicates="keep",
        files=(*RANKING_FILES.values(), CLUSTERING_FILE, SELECTED_FILE),
        tables=_published_tables,
    ),
}
