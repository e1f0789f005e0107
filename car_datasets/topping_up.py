"""Add new rows to a finished selection: `top_up`.

Does: read new rows by the old recipe; score only these; label them by the old clusters; look for copies of old rows;
select again with the old selection kept; measure how far the new rows are from the old ones; write a complete result.
Does not: fit clusters, or score an old row.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from datasets import Dataset, Features, Value, concatenate_datasets
from datasets.table import InMemoryTable

from car_datasets.choosing import marks_of, ranked, settled
from car_datasets.clustering.fitting import project
from car_datasets.clustering.model import CLUSTER_MODEL_FILES, ClusterModel
from car_datasets.curation import (
    Curated,
    Made,
    OpenSource,
    add_before_scores,
    open_source,
    select_and_report,
    without,
    write_files,
)
from car_datasets.loading.languages import LANGUAGE_COLUMN
from car_datasets.loading.schemas import Schema
from car_datasets.loading.sources import Source
from car_datasets.marking import add_contamination, add_copies_and_ranks, add_pins, decontaminator_of
from car_datasets.receipt import TOPPED_UP, Receipt, describe_source, named_sets, pinned_source, with_digest
from car_datasets.recipe import Recipe
from car_datasets.results import (
    RESULT_FILES,
    SELECTED_TABLE,
    Result,
    compare_folder,
    files_to_replace,
    read_result,
    refuse_unfinished,
)
from car_datasets.scoring.named import moved
from car_datasets.scoring.stage import add_columns, say
from car_datasets.selection.limits import parse_tokens
from car_datasets.selection.marks.exclusions import KEEP, pinned_values
from car_datasets.selection.marks.pins import read_flags
from car_datasets.selection.marks.resembling import resembling_rows
from car_datasets.selection.procedures import find_procedure
from car_datasets.selection.rule import SELECTION_COLUMNS
from car_datasets.selection.strata import parse_quota
from car_datasets.stages import Pipeline, resolve
from car_datasets.utils.column_names import ColumnNames
from car_datasets.utils.columns import embedding_batches, join_columns, read_clusters, read_numbers
from car_datasets.utils.digests import file_digest
from car_datasets.utils.files import UNFINISHED, claimed, output_path, user_path
from car_datasets.utils.processes import from_main, is_main_process

Mask = npt.NDArray[np.bool_]

# What may differ from the old recipe: how many rows to select, how to read the new ones, and where things are here.
AMOUNTS = ("n1", "budget", "budget_tokens")
READ = ("name", "split", "revision", "glob", "allow_worse")
PLACES = (*READ, "against", "scorer", "embedder", "tokenizer", "engine", "budget_tokenizer")
AND = " and "  # in the receipt, between the selection that stayed and what the user wanted to keep
FAR = 0.99  # quantile of the distances of old rows to their centres
PROJECTED = 8_192  # rows whose distances to all centres are in memory


class Drift(NamedTuple):
    """How new rows lie among the clusters of old ones.

    Args:
        rows (`int`): new rows with an embedding.
        far (`float`): share of them that is farther from every centre than 99 % of the old rows are from their own; 0.01
            if the new rows are like the old ones. NaN without new rows.
        outside (`int`): rows that lie outside all clusters: farther from each centre than any of its old rows.
    """

    rows: int
    far: float
    outside: int

    def sentence(self) -> str:
        """Return the figures in words."""
        return (
            f"drift: {self.far:.1%} of the {self.rows:,} new rows are farther from every centre than 99 % of the old rows "
            f"are from their own (1.0% if both are alike); {self.outside:,} lie outside all clusters"
        )


class ToppedUp(NamedTuple):
    """The result of [`top_up`]: what [`curate`] returns, of all rows, and the drift of the new ones."""

    curated: Curated
    drift: Drift


class _Old(NamedTuple):
    folder: Path
    result: Result
    receipt: Receipt
    clusters: ClusterModel


def top_up(
    result_dir: str | os.PathLike[str],
    new_source: Source,
    output_dir: str | os.PathLike[str],
    *,
    reselect: bool = False,
    token: str | None = None,
    shard_dir: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    **changes: Any,
) -> ToppedUp:
    """Add new rows to a finished result, and write the result of all rows into a new folder.

    New rows are read, scored and embedded as the old ones were, and labelled by the old clusters, which are not fitted
    again. Unless duplicates are kept, they are compared with the old rows; a row that was selected stays in place of
    its copies. With equal clusters and `reselect=True`, the selection is that of a run over all rows if the old result
    has its embeddings (`keep_embeddings=True`); without them, old rows that share words with new ones are embedded again.

    Example:
    ```python
    >>> topped = top_up("out", "new.json", "out-2")
    >>> topped.drift.sentence()
    ```

    Args:
        result_dir (`str`): a folder that [`curate`] wrote, or this function.
        new_source: the new rows, anything that [`curate`] reads, with the columns of the old source.
        output_dir (`str`): a folder for the files that [`curate`] writes.
        reselect (`bool`): select anew from all rows. By default, every row of the old selection stays.
        token (`str`, *optional*): for private sources and models; never stored.
        shard_dir (`str`, *optional*): a folder for finished shards of the new rows, as for [`curate`].
        overwrite (`bool`): replace a complete result in `output_dir`.
        changes: `n1`, `budget` or `budget_tokens`; without them the old numbers grow as the pool does. `name`, `split`,
            `revision` and `glob` of the new source, and `allow_worse`. `scorer`, `embedder`, `tokenizer`, `engine` and
            `budget_tokenizer`, where they were folders, and `against`, if the old rows were compared with evaluation sets:
            those that were used.

    Returns:
        [`ToppedUp`]: `(curated, drift)`.

    Raises:
        ValueError: the old result is damaged or holds no cluster model; the new rows have other columns, or indices of
            old rows; an option is invalid.
        FileNotFoundError: a source does not exist.
    """
    folder = output_path(output_dir)
    old = _read_old(user_path(result_dir))
    recipe = _recipe_of(old, changes)
    _refuse_pins(old, recipe, reselect)
    if folder.resolve() == old.folder.resolve():
        raise ValueError(f"output_dir={str(output_dir)!r} is the old result, which is read; name a new folder.")
    replaced = files_to_replace(folder, find_procedure(recipe.procedure), overwrite, new_source)
    files = [folder / name for name in (*RESULT_FILES, UNFINISHED)]
    with claimed(folder, (str(old.folder), old.receipt.sha256, recipe, reselect), files, "output_dir") as claim:
        refuse_unfinished(folder, claim.run, overwrite)
        has_amount = any(changes.get(name) is not None for name in AMOUNTS)
        made, drift = _compute(old, new_source, recipe, (reselect, has_amount), token, shard_dir)
        from_main(lambda: write_files(folder, made, claim, replaced))
    return ToppedUp(made.curated, drift)


# --- the old result


def _read_old(folder: Path) -> _Old:
    """Read a result that rows are added to; raise ValueError if it is damaged, or lacks what this needs."""
    result = read_result(folder)
    receipt = Receipt.read(folder)
    if not (folder / CLUSTER_MODEL_FILES[0]).is_file():
        raise ValueError(
            f"{folder} holds no cluster model ({CLUSTER_MODEL_FILES[0]}), by which new rows would be labelled: an earlier "
            "version wrote it. Curate again: car-datasets curate SOURCE --output DIR."
        )
    if differences := compare_folder(folder, receipt).differences:
        raise ValueError(
            f"{folder} is not what was written: {differences[0]}. Run `car-datasets verify` on it, or curate again."
        )
    return _Old(folder, result, receipt, ClusterModel.from_pretrained(folder))


def _recipe_of(old: _Old, changes: Mapping[str, Any]) -> Recipe:
    """Return the recipe of the old result for new rows; raise ValueError for a change that old scores do not allow."""
    if other := sorted(set(changes) - {*AMOUNTS, *PLACES}):
        raise ValueError(
            f"{other[0]} cannot be changed for new rows alone; top_up takes {', '.join((*AMOUNTS, *PLACES))}. To change "
            "it for all rows, curate again."
        )
    settings = {**dict(old.receipt.recipe), "name": None, "split": None, "revision": None, "glob": False}
    settings["k"] = old.clusters.k
    if given := [name for name in AMOUNTS if changes.get(name) is not None]:
        settings |= dict.fromkeys(AMOUNTS)
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are both given; pass one of them.")
    given_here = {name: value for name, value in changes.items() if value is not None}
    if "scorer" in given_here:
        given_here["scorer"] = moved(str(settings["scorer"]), given_here["scorer"])
    recipe = Recipe().changed(**{**settings, **given_here})
    if recipe.like is not None:
        raise ValueError(
            f"{old.folder} was selected by its likeness to examples ({recipe.like}), which new rows alone cannot be ranked "
            "by. Curate again with both sources: car-datasets curate."
        )
    if recipe.procedure != Recipe().procedure:
        raise ValueError(
            f"{old.folder} was made by procedure={recipe.procedure!r}, which orders all rows before it clusters them. "
            "Curate again with both sources."
        )
    if recipe.against and not changes.get("against"):
        raise ValueError(
            f"The old rows were compared with the evaluation sets {', '.join(recipe.against)}. Say where they are: "
            "against=[...] (--against FILE)."
        )
    wanted = old.receipt.recipe.get("budget_tokenizer")
    named = recipe.budget_tokenizer
    # Only that of a folder has a digest, and is not to be found by its name alone.
    if None not in (wanted, named) and (with_digest(str(named)) != wanted or (named == wanted and "@" in wanted)):
        raise ValueError(
            f"The tokens of the old rows were counted by {wanted}. Say where it is, if it was a folder: "
            "budget_tokenizer=... (--budget-tokenizer)."
        )
    return recipe


def _refuse_pins(old: _Old, recipe: Recipe, reselect: bool) -> None:
    """Raise ValueError if the old selection cannot stay, or what stayed before cannot be told from rows to keep."""
    selected, scored, names = old.result.selected, old.result.scored, recipe.names
    assert scored is not None
    own = _own_keep(old, recipe)
    if reselect:
        if own != recipe.keep and own is not None and own not in scored.column_names:
            raise ValueError(
                f"{old.folder} was topped up itself: the rows that stayed there cannot be told from those of {own}, which "
                "were to be kept. Select anew from the result before it, or curate again."
            )
        return
    if not recipe.has_pins and names.pinned in scored.column_names:
        raise ValueError(
            f"The data has a column {names.pinned!r} of its own, which would name the rows that stay. Pass reselect=True "
            "(--reselect), or rename the column in the source and curate again."
        )
    budget, used = recipe.budget, len(selected)
    if recipe.budget_tokens is not None:
        column = names.tokens if recipe.budget_tokenizer is None else names.budget_tokens
        budget = parse_tokens(recipe.budget_tokens)
        used = int(read_numbers(selected, column, 0).sum()) if column in selected.column_names else 0
    if budget is not None and used > budget:
        name = "budget" if recipe.budget_tokens is None else "budget_tokens"
        raise ValueError(
            f"{name}={getattr(recipe, name)!r} is below the {used:,} of the rows that were selected before, which stay. "
            "Raise it, or pass reselect=True (--reselect)."
        )


def _own_keep(old: _Old, recipe: Recipe) -> str | None:
    """Return what the user wanted to keep, also where the old result was topped up, which kept a selection as well."""
    topped = old.receipt.source.get("kind") == TOPPED_UP and str(recipe.keep).startswith(f"{SELECTED_TABLE}@")
    return (recipe.keep or "").partition(AND)[2] or None if topped else recipe.keep


# --- the new rows


def _compute(
    old: _Old,
    new_source: Source,
    recipe: Recipe,
    how: tuple[bool, bool],
    token: str | None,
    shard_dir: str | os.PathLike[str] | None,
) -> tuple[Made, Drift]:
    """Run all stages on the new rows and select from all; `how` says whether anew, and whether an amount was given."""
    reselect, has_amount = how
    new = open_source(new_source, recipe, token)
    rows = _numbered(_checked(old, new, recipe), old, recipe, recipe.index_column in new.opened.column_names)
    decontaminator = decontaminator_of(recipe, token)
    sets = named_sets(recipe.against, decontaminator)
    if list(sets) != list(old.receipt.recipe.get("against", ())):
        raise ValueError(
            f"against={list(sets)} are other sets than those of the old rows, {old.receipt.recipe.get('against')}. Name the "
            "same ones, or curate again."
        )
    told = _told(old, describe_source(new.origin, new.opened, recipe) if is_main_process() else {})
    stages = resolve(pinned_source(recipe, new.origin), token)
    _refuse_other_models(old, stages)
    # A column of the data names new rows as well; a file named old rows only.
    own = _own_keep(old, recipe)
    keep, drop = (name if name in rows.column_names else None for name in (own, recipe.drop))
    flags = replace(recipe, keep=keep, drop=drop)
    # New rows need not have all values that a quota names, so for them it is a column only.
    before = stages
    if recipe.quota is not None:
        before = replace(stages, recipe=stages.recipe.changed(quota=None, balance=parse_quota(recipe.quota)[0]))
    marked, languages = add_before_scores(before, add_pins(flags, rows, new.schema), new.schema, token)
    marked = add_contamination(rows, marked, decontaminator, token, shard_dir)
    labelled = stages.cluster(stages.score(rows, marked, token=token, shard_dir=shard_dir), old.clusters)
    drift = _drift(old, labelled, recipe.names)
    say(drift.sentence())
    stay = f"{SELECTED_TABLE}@{file_digest(old.folder / SELECTED_TABLE)}"
    kept = own if reselect else stay if own is None else f"{stay}{AND}{own}"
    pool, count = _joined(old, labelled, recipe, reselect), len(old.result.scored or ())
    stages = replace(stages, recipe=_grown(stages.recipe, kept, 1.0 if has_amount else len(pool) / max(1, count)))
    pool = _with_copies(stages, pool, count, new.schema)
    stages = replace(stages, recipe=settled(stages.recipe, pool).changed(against=sets))
    curated, overview = select_and_report(stages, ranked(stages.recipe, pool), new.schema, languages)
    own_index = recipe.index_column in new.opened.column_names
    return Made(curated, overview, stages, told, new.schema, own_index, old.clusters), drift


def _checked(old: _Old, new: OpenSource, recipe: Recipe) -> Dataset:
    """Return the new rows with the types of the old ones; raise ValueError if their columns differ."""
    scored = old.result.scored
    assert scored is not None
    if new.schema.name != old.receipt.schema:
        raise ValueError(
            f"The new rows have the schema {new.schema.name!r}, and the old ones {old.receipt.schema!r}. Rename their "
            "columns as the old source has them."
        )
    names = recipe.names
    added = {*names.diagnostics, names.score, names.cluster, names.embedding, names.within, names.language, names.index}
    added |= {*recipe.further_columns, *marks_of(recipe), *SELECTION_COLUMNS}
    added |= {column for column in (LANGUAGE_COLUMN, names.kind) if column in recipe.grouped_by}
    own = {column for column in scored.column_names if column not in added}
    given = {column for column in new.dataset.column_names if column not in added}
    if own != given:
        raise ValueError(
            f"The new rows lack the columns {sorted(own - given)} of the old ones, and have the columns "
            f"{sorted(given - own)}, which those have not. Give both the same columns."
        )
    features = Features(
        {c: scored.features[c] if c in own else new.dataset.features[c] for c in new.dataset.column_names}
    )
    try:
        return new.dataset.cast(features)
    except (ValueError, TypeError, pa.ArrowException) as error:
        raise ValueError(
            f"The new rows have other types than the old ones: {error}. Write both in the same way."
        ) from error


def _numbered(rows: Dataset, old: _Old, recipe: Recipe, own: bool) -> Dataset:
    """Return the new rows with indices that no old row has."""
    scored, name = old.result.scored, recipe.index_column
    assert scored is not None
    known = scored[name][:]
    is_number = pa.types.is_integer(scored.data.column(name).type)
    if not own:
        if not is_number:
            raise ValueError(f"The old rows are named by {name!r}, a column that the new rows lack. Add it to them.")
        start = max(known, default=-1) + 1
        numbers = [start + number for number in rows[name][:]]
        return rows.remove_columns(name).add_column(name, numbers, feature=scored.features[name])
    if both := sorted(set(known) & set(rows[name][:]), key=str):
        raise ValueError(
            f"{len(both)} new rows have an index of an old row in {name!r}, the first {both[:3]}. Give them indices of their "
            "own, or drop rows that are there already."
        )
    return rows.cast_column(name, scored.features[name])


def _refuse_other_models(old: _Old, stages: Pipeline) -> None:
    """Raise ValueError if the models are not those of the old rows, whose scores could then not be compared."""
    pairs = {"scorer": (old.receipt.scorer["revision"], str(stages.scorer.revision))}
    if stages.recipe.embedder is not None:
        pairs["embedder"] = (old.receipt.embedder["revision"], str(stages.recipe.embedder_revision))
    for name, (wanted, seen) in pairs.items():
        if wanted != seen:
            raise ValueError(
                f"The {name} is another model now ({seen}) than that of the old rows ({wanted}). Pass the one that was used: "
                f"{name}=... (--{name}), or curate again."
            )


def _told(old: _Old, new: Mapping[str, Any]) -> dict[str, Any]:
    """Return the field `source` of the receipt: both sources, and the old result by its digests."""
    receipt = old.receipt
    digests = {"selected_sha256": receipt.selected_sha256, "scored_sha256": receipt.scored_sha256}
    return {"kind": TOPPED_UP, **digests, "old": receipt.source, "new": dict(new)}


def _grown(recipe: Recipe, keep: str | None, factor: float) -> Recipe:
    """Return the recipe of the selection, its numbers of rows or tokens grown by a factor; shares stay as they are."""
    grown: dict[str, Any] = {"keep": keep}
    for name in AMOUNTS:
        value = getattr(recipe, name)
        if isinstance(value, (int, str)):
            grown[name] = round((parse_tokens(value) if isinstance(value, str) else value) * factor)
    return recipe.changed(**grown)


# --- both together


def _joined(old: _Old, new: Dataset, recipe: Recipe, reselect: bool) -> Dataset:
    """Return the old rows and then the new ones, with the same columns; rows of the old selection are pinned."""
    scored, names = old.result.scored, recipe.names
    assert scored is not None
    own = _own_keep(old, recipe)
    copies = [] if recipe.marking == "keep" else [names.duplicate_of, names.duplicate_similarity]
    marks = [*copies, names.within]
    if reselect and recipe.keep is not None and recipe.drop is None and own is None:
        marks.append(names.pinned)
    if names.embedding not in scored.column_names:
        vectors = pa.nulls(len(scored), new.data.column(names.embedding).type)
        scored = _with(scored, names.embedding, vectors, new.features[names.embedding])
    if recipe.has_pins or not reselect:
        chosen = set() if reselect else set(old.result.selected[names.index][:])
        marked = pinned_values(scored)
        if reselect and own != recipe.keep:  # what stayed before need not stay now
            wanted = np.zeros(len(scored), dtype=bool) if own is None else read_flags(scored, own, "keep")
            marked = np.where((marked == KEEP) & ~wanted, "", marked)
        words = [
            KEEP if index in chosen else word or None
            for index, word in zip(scored[names.index][:], marked.tolist(), strict=True)
        ]
        scored = _with(scored, names.pinned, pa.array(words, pa.string()), Value("string"))
        if names.pinned not in new.column_names:
            new = _with(new, names.pinned, pa.nulls(len(new), pa.string()), Value("string"))
    # Found anew, and ranked anew, for all rows; what the old ones had is read again from the old result.
    scored, new = (part.remove_columns([c for c in marks if c in part.column_names]) for part in (scored, new))
    new = new.select_columns(scored.column_names).cast(scored.features)
    return concatenate_datasets([scored, new])


def _with(dataset: Dataset, name: str, values: pa.Array, feature: Any) -> Dataset:
    """Return a dataset with a column of Arrow values, in place of one of that name."""
    places = dataset.column_names
    column = Dataset(InMemoryTable(pa.table({name: values}))).cast(Features({name: feature}))
    joined = join_columns(without(dataset, name), column)
    return joined.select_columns(places) if name in places else joined


def _with_copies(stages: Pipeline, pool: Dataset, count: int, schema: Schema) -> Dataset:
    """Return the pool with its duplicates marked, and without embeddings that the recipe does not keep."""
    recipe, names = stages.recipe, stages.recipe.names
    vectors = pool.data.column(names.embedding) if names.embedding in pool.column_names else None
    if recipe.marking != "keep" and vectors is not None and vectors.null_count:
        old, new = pool.select(range(count)), pool.select(range(count, len(pool)))
        rows = resembling_rows(old, new, schema)
        say(f"{len(rows):,} of {count:,} old rows share words with new ones, and are embedded again to compare them.")
        pool = concatenate_datasets([_embedded(stages, old, rows), new])
    marked = add_copies_and_ranks(stages, pool, schema)
    return marked if recipe.keep_embeddings else without(marked, names.embedding)


def _embedded(stages: Pipeline, rows: Dataset, places: npt.NDArray[np.int64]) -> Dataset:
    """Return rows of which those at some places have their embedding."""
    column = stages.recipe.embedding_column
    feature = rows.features[column]
    if len(places) == 0:
        return rows
    some = add_columns(without(rows, column).select(places.tolist()), stages.embedding_stage(), "Embedding")
    vectors = some.with_format("arrow")[:][column].combine_chunks()
    at = np.full(len(rows), -1, dtype=np.int64)
    at[places] = np.arange(len(places))
    return _with(rows, column, vectors.take(pa.array(at, mask=at < 0)), feature)


def _drift(old: _Old, new: Dataset, names: ColumnNames) -> Drift:
    """Return how the new rows lie among the old clusters."""
    scored, model = old.result.scored, old.clusters
    assert scored is not None
    labels, distances = read_clusters(scored, names.cluster), read_numbers(scored, names.distance, np.nan)
    far, inside = float(np.quantile(distances[labels >= 0], FAR)), np.full(model.k, -1.0)
    np.maximum.at(inside, labels[labels >= 0], distances[labels >= 0])
    rows, beyond, outside = 0, 0, 0
    for matrix, _ in embedding_batches(new, names.embedding):
        for start in range(0, len(matrix), PROJECTED):
            points = project(matrix[start : start + PROJECTED], model.mean, model.components)
            squares = (points**2).sum(axis=1)[:, None] + (model.centers**2).sum(axis=1) - 2 * points @ model.centers.T
            each = np.sqrt(np.maximum(squares, 0))
            rows += len(each)
            beyond += int(np.count_nonzero(each.min(axis=1) > far))
            outside += int(np.count_nonzero((each > inside).all(axis=1)))
    return Drift(rows, beyond / rows if rows else float("nan"), outside)
