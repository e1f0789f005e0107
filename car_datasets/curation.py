"""Run the entire pipeline in one call: `curate`.

Does: load, score and embed, cluster, select and report, with every check before the first expensive stage.
Does not: hold the logic of a stage; each can be called alone.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from car_datasets.choosing import asked_of, check_limits, ranked, settled
from car_datasets.clustering.fitting import number_of_clusters
from car_datasets.clustering.model import ClusterModel
from car_datasets.loading.files import STANDARD_INPUT, is_address
from car_datasets.loading.languages import (
    LANGUAGE_COLUMN,
    count_languages,
    languages_of_rows,
    refuse_languages,
)
from car_datasets.loading.schemas import Schema, check_schema, find_schema
from car_datasets.loading.sources import (
    Origin,
    Source,
    check_rows,
    find_origin,
    open_rows,
    unscorable_rows,
)
from car_datasets.loading.values import any_feature, carried, is_json
from car_datasets.marking import (
    add_contamination,
    add_copies_and_ranks,
    add_groups,
    add_pins,
    add_token_counts,
    decontaminator_of,
    open_examples,
    refuse_unknown_groups,
)
from car_datasets.receipt import (
    Receipt,
    describe_source,
    make_receipt,
    named_sets,
    pinned_source,
    portable_settings,
    reading_of,
    scorer_pins,
)
from car_datasets.recipe import Recipe
from car_datasets.reporting.maps import check_projection
from car_datasets.reporting.overview import Overview
from car_datasets.reporting.report import SelectionReport
from car_datasets.results import RESULT_FILES, Extra, files_to_replace, refuse_unfinished, unfinished, write_result
from car_datasets.scoring.named import settings_of
from car_datasets.scoring.scorer import QualityScorer
from car_datasets.scoring.shards.storage import check_shards
from car_datasets.selection.marks.exclusions import DROPPED, pinned_values
from car_datasets.selection.procedures import find_procedure
from car_datasets.selection.published import refuse_original_names
from car_datasets.stages import (
    Pipeline,
    fit_clusters,
    fit_settings,
    refuse_taken_columns,
    refuse_taken_language,
    resolve,
    scorer_of,
)
from car_datasets.utils import revisions
from car_datasets.utils.columns import column_batches
from car_datasets.utils.files import UNFINISHED, Claim, claimed, output_path, prepare_cache, user_path
from car_datasets.utils.processes import from_main, is_main_process, start_processes
from car_datasets.utils.revisions import hub_address
from car_datasets.utils.settings import default_n1


class Curated(NamedTuple):
    """The result of [`curate`]: the selected rows, the entire pool with its new columns, and the figures."""

    selected: Dataset
    scored: Dataset
    report: SelectionReport


def curate(
    source: Source,
    output_dir: str | os.PathLike[str] | None = None,
    recipe: Recipe | None = None,
    *,
    token: str | None = None,
    shard_dir: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    **changes: Any,
) -> Curated:
    """Load, score, embed, cluster, select and report; every setting is checked before the first stage runs.

    Under `accelerate launch` or `torchrun` every process calls this and returns the same result: the processes share
    scoring and clustering, and the main one writes. If a run is interrupted, call it again with the same arguments to
    resume (needs `shard_dir` or more than one process).

    Example:
    ```python
    >>> selected, scored, report = curate("alpaca_data.json", "out", n1=1000, n2=1)
    ```

    Args:
        source (`str`, `Path`, a list of these, a list of rows, `DataFrame`, `Dataset` or `DatasetDict`): a Hub id, a
            .json, .jsonl, .csv, .tsv or .parquet file, a folder of such files or of `save_to_disk`, the address of a
            file, or rows in memory; see [`load_instructions`].
        output_dir (`str`, *optional*): a folder for `selected.parquet`, `selected.json` (the original's format, a list
            of rows), `scored.parquet`, `receipt.json` ([`Receipt`]), `report.json`, `report.md`, `report.html`, a
            `README.md` by which `load_dataset(output_dir)` loads the selection, and, with matplotlib, one
            `plots/plot_<name>.png` per figure. It must not hold a result.
        recipe ([`Recipe`], *optional*): settings; the defaults are the paper's n2 = 1, k = int(sqrt(n / 2)) and
            n1 = 1000, but at most half of the scored rows. The receipt says which n1 was used.
        token (`str`, *optional*): for private sources and models; never stored.
        shard_dir (`str`, *optional*): a folder or URL for finished shards of scores and embeddings, so that a second
            run, or more processes, compute only what is missing.
        overwrite (`bool`): replace the files of a complete result in `output_dir` once the new one is complete. Other
            files in the folder stay.
        changes: fields of [`Recipe`] by name, which win over `recipe`. `scorer` may also be a stage, such as
            `RewardScorer("OWNER/MODEL")`, whose options are then those of the recipe.

    Returns:
        [`Curated`]: `(selected, scored, report)`.

    Raises:
        ValueError: a setting or the source is invalid, or the folder already holds a result.
        FileNotFoundError: the source does not exist.
    """
    if recipe is not None and not isinstance(recipe, Recipe):
        raise ValueError(
            f"recipe is a {type(recipe).__name__}; pass a Recipe, such as Recipe(n1=1000), or pass the settings themselves: "
            "curate(source, output_dir, n1=1000)."
        )
    if callable(changes.get("scorer")):  # a stage
        changes = {**settings_of(changes.pop("scorer"), [each.name for each in fields(Recipe)]), **changes}
    recipe = (recipe or Recipe()).changed(**changes)
    procedure = find_procedure(recipe.procedure)
    start_processes()  # now, while all processes are at the same point: later one may have hours of work before it
    folder = None if output_dir is None else output_path(output_dir)
    if shard_dir is not None:
        from_main(lambda: check_shards(shard_dir, folder, source))
    if folder is None:
        return _compute(source, recipe, token, shard_dir).curated
    old = files_to_replace(folder, procedure, overwrite, source)
    files = [folder / name for name in (*RESULT_FILES, *procedure.files, UNFINISHED)]
    with claimed(folder, (_identity(source), recipe), files, "output_dir") as claim:
        refuse_unfinished(folder, claim.run, overwrite)
        made = _compute(source, recipe, token, shard_dir, written=True)
        from_main(lambda: write_files(folder, made, claim, old))
    return made.curated


def _identity(source: Source) -> str:
    """Return a text that is the same for the same source, without reading it."""
    if isinstance(source, (str, Path)):
        path = user_path(source)
        return str(path.resolve()) if path.exists() else str(source)
    return f"{type(source).__name__} {getattr(source, '_fingerprint', '')}"


class Made(NamedTuple):
    """What a run has made, and what the files of its result tell about its source.

    Args:
        curated ([`Curated`]): the result.
        overview ([`Overview`]): pool and selection, with the embeddings that the map needs.
        stages ([`Pipeline`]): what made the result.
        origin (`dict`), schema ([`Schema`]): the source for the receipt, and how its rows were read.
        own_index (`bool`): the source itself has the index column.
        clusters ([`ClusterModel`]): what labelled the pool.
    """

    curated: Curated
    overview: Overview
    stages: Pipeline
    origin: dict[str, Any]
    schema: Schema
    own_index: bool
    clusters: ClusterModel


def _compute(
    source: Source,
    recipe: Recipe,
    token: str | None,
    shard_dir: str | os.PathLike[str] | None,
    written: bool = False,
) -> Made:
    """Run all stages on a source; `written` says that the result will be written to files."""
    procedure = find_procedure(recipe.procedure)
    opened, dataset, schema, origin = open_source(source, recipe, token)
    refuse_taken_columns(dataset.column_names, recipe)
    refuse_taken_language(dataset.column_names, recipe)
    refuse_unknown_groups(recipe, dataset.column_names)
    marked = add_pins(recipe, dataset, schema)
    _check_settings(marked, recipe, schema)
    examples = None if recipe.like is None else open_examples(recipe, token)  # refused before anything expensive
    decontaminator = decontaminator_of(recipe, token)
    if written and procedure.files:
        refuse_original_names(dataset.column_names, {recipe.score_column: "score", recipe.cluster_column: "label"})
    # The main process alone writes the receipt, and hashes rows in memory for it.
    told = describe_source(origin, opened, recipe) if written and is_main_process() else {}
    stages = resolve(pinned_source(recipe, origin), token)
    marked, counts = add_before_scores(stages, marked, schema, token)
    count_tokens = stages.scorer.count_tokens if isinstance(stages.scorer, QualityScorer) else None
    check_limits(recipe, marked, count_tokens)
    marked = add_contamination(dataset, marked, decontaminator, token, shard_dir)

    pool = ranked(recipe, stages.score(dataset, marked, token=token, shard_dir=shard_dir))
    # Ordered before clustering: k-means and its ties depend on the order of the rows.
    pool = procedure.order(pool, recipe.names)
    clusters = fit_clusters(pool, stages.fit, recipe.names)
    clustered = stages.cluster(pool, clusters)
    pool = add_copies_and_ranks(stages, clustered, schema, examples)
    if pool is not clustered:
        pool = ranked(recipe, pool)  # anew, without the duplicates
    # The receipt names the n1 and the evaluation sets that were used.
    used = settled(stages.recipe, pool).changed(against=named_sets(recipe.against, decontaminator))
    stages = replace(stages, recipe=used)
    curated, overview = select_and_report(stages, pool, schema, counts)
    # `opened` tells the last but one, because `dataset` has the column in any case.
    return Made(curated, overview, stages, told, schema, recipe.index_column in opened.column_names, clusters)


def add_before_scores(
    stages: Pipeline, dataset: Dataset, schema: Schema, token: str | None = None
) -> tuple[Dataset, dict[str, int]]:
    """Add to checked rows the languages, groups and token counts that a recipe wants; also return the languages' counts.

    Raises:
        ValueError: the scorer does not read the languages of the rows, or a group does not exist.
    """
    recipe = stages.recipe
    # By the main process alone, so that all agree: the last digits of a probability differ between machines.
    languages = from_main(lambda: stages.read_languages(dataset, schema))
    counts = count_languages(languages)
    if recipe.languages == "refuse" and LANGUAGE_COLUMN not in recipe.grouped_by:
        refuse_languages(counts, stages.scorer.languages)
    named = dataset.add_column(recipe.names.language, languages) if recipe.names.language else dataset
    return add_token_counts(recipe, add_groups(recipe, named, schema, languages), schema, token), counts


def select_and_report(
    stages: Pipeline, pool: Dataset, schema: Schema, languages: dict[str, int]
) -> tuple[Curated, Overview]:
    """Select from a pool that has all marks, and report.

    Args:
        stages ([`Pipeline`]): with the recipe as the receipt is to name it.
        pool (`Dataset`), schema ([`Schema`]): scored and clustered rows, with or without embeddings.
        languages (`dict[str, int]`): rows by language, for a pool without a column of languages.
    """
    recipe = stages.recipe
    # Selected rows do not need the vectors, which make up most of the size.
    without_vectors = without(pool, recipe.embedding_column)
    selected = stages.select(without_vectors)
    overview = Overview.of(pool, selected, seed=recipe.seed, names=recipe.names, asked=asked_of(recipe))
    report = SelectionReport.from_overview(overview, schema)
    if not recipe.names.language:  # else the report has read them from the column
        chosen = count_languages(languages_of_rows(selected, schema))
        report = replace(report, languages=languages, selected_languages=chosen)
    return Curated(selected, pool if recipe.keep_embeddings else without_vectors, report), overview


def without(dataset: Dataset, column: str) -> Dataset:
    """Return a dataset without a column, which it need not have."""
    return dataset.remove_columns(column) if column in dataset.column_names else dataset


class OpenSource(NamedTuple):
    """A source as it was opened, its rows checked and numbered, the schema that they were read by, and their origin."""

    opened: Dataset
    dataset: Dataset
    schema: Schema
    origin: Origin


def open_source(source: Source, recipe: Recipe, token: str | None = None) -> OpenSource:
    """Open a source by the settings of a recipe, and check and number its rows.

    Args:
        source (`str`, `Path`, list, `DataFrame`, `Dataset` or `DatasetDict`): as in [`curate`].
        recipe ([`Recipe`]): the settings.
        token (`str`, *optional*): for a private source; never stored.

    Raises:
        ValueError: a setting, the source or a row is invalid.
        FileNotFoundError: the source does not exist.
    """
    check_schema(recipe.schema, recipe.columns)  # before a download
    if isinstance(source, (str, Path)):  # rows in memory need no cache
        prepare_cache()
    opened, origin = open_rows(source, reading_of(recipe, token))
    schema = find_schema(opened.column_names, recipe.schema, recipe.columns)
    # Without a format, because a NumPy or PyTorch format would turn nulls and lists into other values.
    dataset = check_rows(
        opened.with_format(None), schema=schema, on_invalid=recipe.on_invalid, index_column=recipe.index_column
    )
    _refuse_lost_media(dataset)
    return OpenSource(opened, dataset, schema, origin)


def _refuse_lost_media(dataset: Dataset) -> None:
    """Raise ValueError if images and the like name files that are not there: Parquet would be written with their bytes.

    The files are only looked for; a URL, or bytes in the dataset itself, are taken as they are.
    """
    for name, feature in dataset.features.items():
        if not any_feature(feature, lambda f: hasattr(f, "decode") and not is_json(f)):
            continue
        paths = (path for batch in column_batches(dataset, name) for path in _files_of(batch.combine_chunks(), feature))
        lost = [path for path in paths if "://" not in path and not Path(path).exists()]
        if lost:
            raise ValueError(
                f"The column {name!r} names {len(lost)} files that are not there, the first {lost[:3]}. Start in the "
                f"folder that the paths begin in, or drop the column: dataset.remove_columns({name!r})."
            )


def _files_of(values: pa.Array, feature: Any) -> list[str]:
    """Return the paths of all images and the like in an array that holds no bytes for them."""
    if isinstance(feature, Mapping):
        return [path for name, part in feature.items() for path in _files_of(pc.struct_field(values, name), part)]
    if hasattr(feature, "feature"):
        return _files_of(pc.list_flatten(values), feature.feature)
    if is_json(feature) or not hasattr(feature, "decode") or not pa.types.is_struct(values.type):
        return []
    without_bytes = pc.struct_field(values, "path").filter(pc.is_null(pc.struct_field(values, "bytes")))
    return list(without_bytes.drop_null().to_pylist())


def _check_settings(dataset: Dataset, recipe: Recipe, schema: Schema) -> None:
    """Raise ValueError if a setting cannot work with the rows that can be scored; nothing is looked up or computed."""
    check_projection(recipe.projection)
    rows = len(dataset)
    if recipe.on_invalid == "mark":
        rows -= len(unscorable_rows(dataset, schema))
        if rows == 0:
            raise ValueError(
                f"All {len(dataset)} rows are marked as ones that cannot be scored: there is nothing to select."
            )
    clusters = number_of_clusters(recipe.k, rows)
    # Rows that are never selected are scored and clustered like all others.
    rows -= int(np.count_nonzero(pinned_values(dataset) == DROPPED)) if recipe.drop is not None else 0
    if rows <= 0:
        raise ValueError(f"drop={recipe.drop!r} names every row: there is nothing to select. Name fewer rows.")
    if recipe.budget is not None and recipe.n2 and recipe.budget < clusters and not recipe.is_limited:
        # Equal rows share a cluster, so there may be fewer clusters with rows than k.
        clusters = min(clusters, _distinct_rows(dataset, schema, clusters))
    fit_settings(recipe)
    # Within bounds, clusters that would take more than the budget give what fits.
    find_procedure(recipe.procedure).check(rows, 1 if recipe.is_limited else clusters, recipe.amounts_of(rows))


def _distinct_rows(dataset: Dataset, schema: Schema, most: int) -> int:
    """Return how many rows have different texts; counting stops at `most`."""
    texts = dataset.select_columns(list(schema.read_columns))
    seen: set[str] = set()
    for row in carried(texts.with_format(None)):
        seen.add(json.dumps(row, default=str))
        if len(seen) >= most:
            break
    return len(seen)


def write_files(folder: Path, made: Made, claim: Claim, old: Sequence[str]) -> None:
    """Write the result into a folder.

    Args:
        folder (`Path`): made if it does not exist.
        made ([`Made`]): the result.
        claim ([`Claim`]): on the folder.
        old (`Sequence[str]`): files of the result that is replaced.
    """
    selected, scored, report = made.curated
    stages = made.stages
    recipe, scorer, names = stages.recipe, stages.scorer, stages.recipe.names
    without_vectors = without(made.overview.pool, recipe.embedding_column)
    # The recipe of the stages, not the caller's: it has the revisions that were really loaded.
    receipt = make_receipt(made.origin, made.schema.name, recipe, scorer, without_vectors, selected, report)
    # The receipt first: hashing and counting may fail, and then nothing has been written.
    pictures = report.pictures(made.overview, recipe.projection, receipt.head())
    claim.check()
    with unfinished(folder, claim.run, old) as place:
        tables = stages.procedure.tables(selected, without_vectors, scorer.objective, names)
        if made.own_index:
            names = replace(names, index="")  # the original's files hold every column of the source
        write_result(place, selected, scored, report, Extra(receipt, pictures, tables, made.clusters), names)


def made_by(receipt: Receipt, source: str, settings: Recipe, token: str | None = None) -> bool:
    """Return True if `curate(source, ..., settings)` would now read the same rows by the same models as a receipt says.

    Args:
        receipt ([`Receipt`]): the receipt of an existing result.
        source (`str`), settings ([`Recipe`]): what [`curate`] would be called with. The Hub is asked for the source's
            current commit, and files are read for their digests.
        token (`str`, *optional*): for private sources and models; never stored.
    """
    wanted = portable_settings(settings).items()
    # A run fills in the revisions that it was not given, so these are compared only if they are asked for.
    filled_in = ("scorer_revision", "embedder_revision")
    given = {name: value for name, value in wanted if name != "revision" and (value or name not in filled_in)}
    if settings.n1 is settings.budget is settings.budget_tokens is None:
        excluded = receipt.counts.get("excluded", {})
        given["n1"] = default_n1(receipt.counts["scored"] - sum(excluded.values()))
    # An older receipt lacks settings that are new, and its result had all duplicates.
    known = {**portable_settings(Recipe()), "duplicates": "keep", **receipt.recipe}
    if any(known[name] != value for name, value in given.items() if name != "against"):
        return False
    # A dataset on the Hub is recorded with its commit.
    pairs = zip(known["against"], given["against"], strict=False)
    if len(known["against"]) != len(given["against"]) or any(b not in (a, a.rpartition("@")[0]) for a, b in pairs):
        return False
    if not _is_source(receipt.source, source, settings, token):
        return False
    # A branch may have moved since, and a folder may hold another model under the same name.
    pins = scorer_pins(scorer_of(settings, token))
    if any(receipt.scorer.get(name) != pin for name, pin in pins.items()):
        return False
    # Without an embedder, the encoder follows from the scorer, or is the one that this version pins.
    if settings.embedder is None:
        return True
    return receipt.embedder["revision"] == revisions.pin_revision(settings.embedder, settings.embedder_revision, token)


def _is_source(known: Mapping[str, Any], source: str, settings: Recipe, token: str | None) -> bool:
    if source == STANDARD_INPUT:
        return False  # what was there is gone
    path = user_path(source)
    # In the order of `open_rows`: an existing path wins over a Hub id of the same name.
    if path.exists() or glob.has_magic(source) or (is_address(source) and hub_address(source) is None):
        origin = find_origin(source, reading_of(settings, token))
        now = describe_source(origin, None, settings)
        return {**known, "files": now.get("files")} == {**now, "files": now.get("files")}
    names = ("kind", "id", "name", "split")
    at = hub_address(source)
    repo_id, revision = (source, None) if at is None else (at.repo_id, at.revision)
    if [known.get(name) for name in names] != ["hub", repo_id, settings.name, settings.split]:
        return False
    revision = settings.revision or revision
    return bool(known["revision"] == revisions.pin_dataset(repo_id, revision, token, FileNotFoundError))
