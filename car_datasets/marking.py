"""Mark the rows of a pool with what a selection reads, apart from scores and clusters: pins, groups, tokens, copies.

Does: add each column that a recipe's selection needs, in the order of the pipeline, and refuse a setting that names what
is not there before anything expensive.
Does not: select, or know how a mark is found.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from datasets import Dataset, Value

from car_datasets.choosing import marks_of, may_be_selected
from car_datasets.loading.kinds import kinds_of_rows
from car_datasets.loading.languages import LANGUAGE_COLUMN, languages_of_rows
from car_datasets.loading.schemas import Schema, find_schema
from car_datasets.loading.sources import check_rows, open_dataset, unscorable_rows
from car_datasets.recipe import Recipe
from car_datasets.scoring.stage import Stage, add_columns, refuse_taken, say
from car_datasets.selection.marks.exclusions import KEEP, pinned_values
from car_datasets.selection.strata import parse_quota, read_strata, refuse_unknown_values
from car_datasets.stages import Pipeline, embedder_of, joined_from_main, run_stage, shard_folder, with_new_columns
from car_datasets.utils.column_names import ColumnNames
from car_datasets.utils.columns import embedding_batches, join_columns, read_numbers, refuse_no_embeddings
from car_datasets.utils.processes import from_main

if TYPE_CHECKING:
    from car_datasets.scoring.embedder import TextEmbedder
    from car_datasets.selection.marks.contamination import Decontaminator

SAMPLED = 4  # rows of a pool that are embedded again, to tell that its embeddings are those of a model
SAME = 0.95  # cosine from which on two embeddings of a row are from one model; those of two models have about 0


def add_pins(recipe: Recipe, dataset: Dataset, schema: Schema) -> Dataset:
    """Add the column `pinned` to checked rows if a recipe names rows that must be in, or must not.

    Raises:
        ValueError: a row is not in the data, is named by both, or must be in and cannot be scored.
    """
    if not recipe.has_pins:
        return dataset
    from car_datasets.selection.marks.pins import mark_pins

    return mark_pins(
        dataset,
        recipe.keep,
        recipe.drop,
        index_column=recipe.index_column,
        text_columns=schema.read_columns,
        unscorable=list(unscorable_rows(dataset, schema)),
    )


def add_groups(recipe: Recipe, dataset: Dataset, schema: Schema, languages: Sequence[str] = ()) -> Dataset:
    """Add the languages or kinds that `within`, `balance` or `quota` name, unless the data has a column of the name.

    Args:
        recipe ([`Recipe`]): the settings.
        dataset (`Dataset`), schema ([`Schema`]): checked rows, and how they are read.
        languages (`Sequence[str]`): the languages of the rows; used if there is one for each row.

    Raises:
        ValueError: there is no such column, or no row has a value that the quota names.
    """
    shares = None if recipe.quota is None else parse_quota(recipe.quota)
    for column in recipe.grouped_by:
        if column not in dataset.column_names and column == LANGUAGE_COLUMN:
            known = len(languages) == len(dataset)
            # By the main process alone: the last digits of a probability differ between machines.
            values = list(languages) if known else from_main(partial(languages_of_rows, dataset, schema))
            dataset = dataset.add_column(column, values, feature=Value("string"))
        elif column not in dataset.column_names and column == ColumnNames.kind:
            dataset = dataset.add_column(column, kinds_of_rows(dataset, schema), feature=Value("string"))
        groups = read_strata(dataset, column)
        if shares is not None and shares[0] == column:
            refuse_unknown_values(groups, *shares)
    return dataset


def refuse_unknown_groups(recipe: Recipe, columns: Sequence[str]) -> None:
    """Raise ValueError if `within`, `balance` or `quota` name a column that the data does not have and no stage finds."""
    found = (LANGUAGE_COLUMN, ColumnNames.kind)
    if missing := [column for column in recipe.grouped_by if column not in (*columns, *found)]:
        raise ValueError(
            f"There is no column {missing[0]!r} to tell groups of rows by (within, balance, quota): the data has "
            f"{list(columns)}. Name one of these, or language or kind, which are found."
        )


def decontaminator_of(recipe: Recipe, token: str | None = None) -> Decontaminator | None:
    """Return the stage that finds the items of a recipe's evaluation sets, which are read here; None without any."""
    if not recipe.against:
        return None
    from car_datasets.selection.marks.contamination import Decontaminator

    return Decontaminator(recipe.against, schema=recipe.schema, columns=recipe.columns, token=token)


def add_contamination(
    dataset: Dataset,
    marked: Dataset,
    stage: Decontaminator | None,
    token: str | None = None,
    shard_dir: str | os.PathLike[str] | None = None,
) -> Dataset:
    """Add which item of an evaluation set each row gives away, if there is a stage that finds them.

    Args:
        dataset (`Dataset`): checked rows, on which alone the computation and its place in the cache depend.
        marked (`Dataset`): the same rows with other marks, which get the new columns.
        stage ([`Decontaminator`], *optional*): finds the items.
        token (`str`, *optional*), shard_dir (`str`, *optional*): as for [`curate`].
    """
    if stage is None:
        return marked
    refuse_taken(marked.column_names, stage)
    stage.refuse_own(dataset)
    folder = None if shard_dir is None else shard_folder(shard_dir, "contamination")
    return with_new_columns(marked, run_stage(dataset, stage, "Decontaminating", folder, token))


def add_duplicates(recipe: Recipe, pool: Dataset, schema: Schema) -> Dataset:
    """Add which rows are copies of a better one, unless the recipe keeps them; a pool without any gets no columns.

    A row that must be selected counts as better than its copies, and one that must not be as worse.
    """
    if recipe.marking == "keep":
        return pool
    from car_datasets.selection.marks.duplicates import mark_duplicates

    how = "exact" if recipe.marking == "only-exact" else "near"
    rows, names = _with_eligible_scores(recipe, pool), recipe.names
    marked = mark_duplicates(rows, how, names=names, schema=schema)
    found = marked.select_columns([names.duplicate_of, names.duplicate_similarity])
    copies = found.with_format("arrow")[:][names.duplicate_of]
    if copies.null_count == len(copies):
        return pool
    pool = join_columns(pool, found)
    _say_losses(recipe, pool)
    return pool


def _say_losses(recipe: Recipe, pool: Dataset) -> None:
    """Say which sources and templates lose many of their rows as duplicates, as that may be a mistake."""
    from car_datasets.selection.marks.duplicates import duplicate_losses

    sources = [column for column in ("source", *recipe.grouped_by) if column in pool.column_names]
    for column in (None, *dict.fromkeys(sources)):
        for sentence in duplicate_losses(pool, column, schema=recipe.schema, columns=dict(recipe.columns)):
            say(f"{sentence} Look at the column {ColumnNames.duplicate_of!r}; --duplicates keep leaves them in.")


def _with_eligible_scores(recipe: Recipe, pool: Dataset) -> Dataset:
    """Return a pool whose scores put rows that must be selected first, and have none for rows that must not be."""
    column, allowed = recipe.score_column, may_be_selected(replace(recipe, duplicates="keep"), pool)
    kept = pinned_values(pool) == KEEP if recipe.keep is not None else np.zeros(len(pool), dtype=bool)
    if allowed.all() and not kept.any():
        return pool
    scores = read_numbers(pool, column, np.nan)
    first = np.nanmax(scores) - np.nanmin(scores) + 1
    scores = np.where(allowed, np.where(kept, scores + first, scores), np.nan)
    return pool.remove_columns(column).add_column(column, pa.array(scores, from_pandas=True))


def add_copies_and_ranks(stages: Pipeline, pool: Dataset, schema: Schema, examples: Dataset | None = None) -> Dataset:
    """Add to a clustered pool which rows are copies, and how near each is to examples, if there are any."""
    recipe = stages.recipe
    pool = add_duplicates(recipe, pool, schema)
    if examples is None:
        return pool
    return add_like_ranks(pool, examples, stages.embedding_stage(), recipe.names)


def add_like_ranks(pool: Dataset, examples: Dataset, embedder: Stage, names: ColumnNames) -> Dataset:
    """Add each row's place in a round robin over examples."""
    from car_datasets.selection.marks.examples import rank_by_examples

    return joined_from_main(pool, lambda: rank_by_examples(pool, examples, embedder, names), [names.like_rank])


def add_token_counts(recipe: Recipe, dataset: Dataset, schema: Schema, token: str | None = None) -> Dataset:
    """Add the tokens of each row by the tokenizer that a recipe names for its budget, if it names one."""
    if recipe.budget_tokenizer is None:
        return dataset
    from car_datasets.selection.marks.tokens import count_tokens, load_tokenizer_file

    return count_tokens(dataset, schema, load_tokenizer_file(recipe.budget_tokenizer, token))


def ready_to_select(recipe: Recipe, pool: Dataset, token: str | None = None) -> Dataset:
    """Add the marks that a recipe selects by to a pool that was scored and clustered before; `select` needs no model.

    Marks of an earlier selection are made anew if the recipe names what they come from. Duplicates are looked for only
    if the recipe says so itself, and examples need an embedder.

    Args:
        recipe ([`Recipe`]): the settings.
        pool (`Dataset`): scored and clustered rows.
        token (`str`, *optional*): for private evaluation sets, examples and tokenizers.

    Raises:
        ValueError: a file, column or value that the recipe names does not exist, or the rows have no text to read.
    """
    refuse_unknown_groups(recipe, pool.column_names)
    found = [column for column in recipe.grouped_by if column not in pool.column_names]
    named = (recipe.against, recipe.like, recipe.budget_tokenizer, recipe.keep, recipe.drop, recipe.duplicates, found)
    if not any(named):
        return pool
    old = marks_of(replace(recipe, duplicates=recipe.duplicates or "keep", rule="car"))
    pool = pool.remove_columns([column for column in old if column in pool.column_names])
    schema = find_schema(pool.column_names, recipe.schema, recipe.columns)
    examples = None if recipe.like is None else open_examples(recipe, token)
    pool = add_pins(recipe, pool, schema)
    pool = add_token_counts(recipe, add_groups(recipe, pool, schema), schema, token)
    pool = add_contamination(pool, pool, decontaminator_of(recipe, token), token)
    if recipe.duplicates is not None:
        pool = add_duplicates(recipe, pool, schema)
    if examples is None:
        return pool
    embedder = embedder_of(recipe)
    from_main(lambda: _refuse_other_embedder(pool, embedder))
    return add_like_ranks(pool, examples, embedder, recipe.names)


def _refuse_other_embedder(pool: Dataset, embedder: TextEmbedder) -> None:
    """Raise ValueError if the first rows that have an embedding do not have the same when they are embedded again."""
    column = embedder.output_column
    refuse_no_embeddings(pool.column_names, column)
    _, embedded = next(embedding_batches(pool, column))
    some = pool.select(embedded[:SAMPLED].tolist())
    again = add_columns(some.remove_columns(column), embedder, "Embedding rows of the pool again")
    for wanted, seen in zip(some.with_format(None)[column][:], again.with_format(None)[column][:], strict=True):
        if wanted is None or seen is None:
            continue
        one, other = np.asarray(wanted, dtype=np.float64), np.asarray(seen, dtype=np.float64)
        if len(one) != len(other) or one @ other < SAME * np.linalg.norm(one) * np.linalg.norm(other):
            raise ValueError(
                f"like: the embeddings in {column!r} are not those that {embedder.model_id} gives with the template "
                f"{embedder.template!r}, by which the examples would be embedded. Name the model that made them: "
                "embedder=... (--embedder), and its template (--template)."
            )


def open_examples(recipe: Recipe, token: str | None = None) -> Dataset:
    """Open the examples of a recipe.

    Raises:
        ValueError: there are none, or they cannot be scored.
    """
    assert recipe.like is not None
    try:
        examples = open_dataset(recipe.like, token=token).with_format(None)
        return check_rows(examples, schema=recipe.schema, columns=recipe.columns)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"like={recipe.like!r}: {error}") from error
