"""The whole road in one call: `curate`.

Does: load, score and embed, cluster, select and report, with every check before the first expensive stage.
Does not: hold logic of a stage; each is a call that a user can make alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, DatasetDict

from car_datasets import hub
from car_datasets.cluster_fitting import checked_fit, number_of_clusters
from car_datasets.clustering import ClusterModel
from car_datasets.column_names import ColumnNames
from car_datasets.formatting import find_schema
from car_datasets.loading import load_instructions, open_dataset, unscorable_rows
from car_datasets.original import PROCEDURES, rank_rows, refuse_taken, select_as_published
from car_datasets.overview import Overview
from car_datasets.parallel import from_main, is_main_process
from car_datasets.projection import check_projection
from car_datasets.receipt import (
    RECEIPT_FILE,
    Receipt,
    describe_source,
    make_receipt,
    pinned_source,
    portable_settings,
    scorer_pins,
)
from car_datasets.recipe import Recipe
from car_datasets.recipe_stages import score_and_embed, scorer_of
from car_datasets.reporting import SelectionReport
from car_datasets.results import (
    ORIGINAL_FILES,
    RESULT_FILES,
    fresh_folder,
    unfinished,
    write_original_files,
    write_result,
)
from car_datasets.scoring import QualityScorer
from car_datasets.selection import refuse_impossible, select_car


class Curated(NamedTuple):
    """What [`curate`] returns: the chosen rows, the whole pool with its columns, and the figures."""

    selected: Dataset
    scored: Dataset
    report: SelectionReport


def curate(
    source: str | Path | Dataset | DatasetDict,
    output_dir: str | os.PathLike[str] | None = None,
    recipe: Recipe | None = None,
    *,
    token: str | None = None,
    shard_dir: str | os.PathLike[str] | None = None,
    **changes: Any,
) -> Curated:
    """Load, score and embed, cluster, select and report; everything that can be wrong is checked before the first stage.

    Under `accelerate launch` or `torchrun` every process calls this and returns the same; they share the scoring and
    the clustering, the main one writes. With `shard_dir`, or in several processes, the same call goes on after a kill.

    Example:

    ```python
    >>> selected, scored, report = curate("alpaca_data.json", "out", n1=1000, n2=1)
    ```

    Args:
        source: see [`load_instructions`].
        output_dir (`str`, *optional*): a folder for `selected.parquet`, `selected.json` (the original's format, a list of
            rows), `scored.parquet`, `receipt.json` ([`Receipt`]), `report.json`, `report.md`, `report.html` and, with
            matplotlib, four `plot_*.png`. It must not hold a result.
        recipe ([`Recipe`], *optional*): settings; the defaults are the paper's n1 = 1000, n2 = 1, k = int(sqrt(n / 2)).
        token (`str`, *optional*): for private sources and models; never stored.
        shard_dir (`str`, *optional*): score in shards and keep them there, so that a second run, or more processes, go on
            with what is missing; see [`score_in_shards`], which several processes use in any case.
        changes: fields of [`Recipe`] by name, which win over `recipe`.

    Returns:
        [`Curated`]: `(selected, scored, report)`.

    Raises:
        ValueError: bad settings, bad input, or a folder that holds a result already.
        FileNotFoundError: there is no such file.
    """
    settings = (recipe or Recipe()).changed(**changes)
    names = (*RESULT_FILES, *ORIGINAL_FILES) if settings.procedure == "paper" else RESULT_FILES
    folder = None if output_dir is None else fresh_folder(Path(output_dir), names)
    opened = open_dataset(
        source, settings.name, settings.split, revision=settings.revision, token=token, columns=settings.columns
    )
    dataset = load_instructions(
        opened.with_format(None),
        schema=settings.schema,
        columns=settings.columns,
        on_invalid=settings.on_invalid,
        index_column=settings.index_column,
    )
    _check_numbers(dataset, settings)
    if folder is not None and settings.procedure == "paper":
        refuse_taken(dataset.column_names, {settings.score_column: "score", settings.cluster_column: "label"})
    origin = describe_source(source, opened, settings) if folder is not None and is_main_process() else {}
    settings = pinned_source(settings, source, opened)
    scorer = scorer_of(settings, token)
    settings = settings.changed(scorer_revision=scorer.revision)  # branches may move while this runs
    if settings.embedder is not None:
        pin = hub.pin_revision(settings.embedder, settings.embedder_revision, token)
        settings = settings.changed(embedder_revision=pin)
    pool = score_and_embed(dataset, settings, token, shard_dir=shard_dir)
    if settings.procedure == "paper":
        pool = rank_rows(pool, settings.score_column)
    pool = _add_clusters(pool, settings)
    without_vectors = pool.remove_columns(settings.embedding_column)
    selected = select_by(settings, without_vectors)
    seen = Overview.of(without_vectors, selected, seed=settings.seed, **settings.names)
    report = SelectionReport.from_overview(seen)
    curated = Curated(selected, pool if settings.keep_embeddings else without_vectors, report)
    if folder is not None:
        own_index = settings.index_column in opened.column_names
        from_main(lambda: _write_files(folder, curated, pool, seen, settings, scorer, origin, own_index))
    return curated


def _write_files(
    folder: Path,
    curated: Curated,
    pool: Dataset,
    seen: Overview,
    settings: Recipe,
    scorer: QualityScorer,
    origin: dict[str, Any],
    own_index: bool,
) -> None:
    selected, scored, report = curated
    without_vectors = pool.remove_columns(settings.embedding_column)
    receipt = make_receipt(origin, settings, scorer, without_vectors, selected, report)
    with unfinished(folder):
        names = {**settings.names, "embedding_column": settings.embedding_column}
        pictures = report.pictures(pool, seen, settings.projection, **names)
        files = {RECEIPT_FILE: receipt.to_json().encode(), **pictures}
        columns = ColumnNames(
            settings.score_column, settings.cluster_column, settings.index_column, settings.embedding_column
        )
        write_result(folder, selected, scored, report, files, columns)
        if settings.procedure == "paper":
            if own_index:
                columns = replace(columns, index="")  # a row index of the user's own stays in the original's files
            write_original_files(folder, selected, without_vectors, scorer.objective, columns)


def _check_numbers(dataset: Dataset, settings: Recipe) -> None:
    """What k, n1, n2, budget and the procedure can be wrong about before there are scores."""
    if settings.procedure not in PROCEDURES:
        raise ValueError(f"procedure={settings.procedure!r} is not known; choose one of {PROCEDURES}.")
    check_projection(settings.projection)
    rows = len(dataset)
    if settings.on_invalid == "mark":
        rows -= len(unscorable_rows(dataset, find_schema(dataset.column_names, settings.schema, settings.columns)))
        if rows == 0:
            raise ValueError(
                f"All {len(dataset)} rows are marked as ones that cannot be scored: there is nothing to select."
            )
    clusters = number_of_clusters(settings.k, rows)
    checked_fit(
        settings.k,
        settings.explained_variance,
        settings.seed,
        settings.n_init,
        settings.kmeans_engine,
        settings.kmeans_sample,
    )
    if settings.procedure == "default":
        refuse_impossible(rows, clusters, settings.n1, settings.n2, settings.budget)
    else:
        _refuse_unpublished(settings)


def select_by(settings: Recipe, pool: Dataset) -> Dataset:
    """SELECT of a recipe on a scored, clustered dataset: by [`select_car`], or by the published rule."""
    if settings.procedure == "paper":
        _refuse_unpublished(settings)
        return select_as_published(pool, int(settings.n1), settings.n2, **settings.names)
    return select_car(
        pool, settings.n1, settings.n2, budget=settings.budget, allow_worse=settings.allow_worse, **settings.names
    )


def _refuse_unpublished(settings: Recipe) -> None:
    numbers = (settings.n1, settings.n2)
    if settings.budget is not None or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise ValueError(
            f"procedure='paper' takes whole numbers n1={settings.n1} and n2={settings.n2} that are not negative, and no "
            f"budget={settings.budget}."
        )


def _add_clusters(pool: Dataset, settings: Recipe) -> Dataset:
    """CLUSTER of a recipe; several processes share it and get the same labels."""
    model = ClusterModel.fit(
        pool,
        settings.embedding_column,
        k=settings.k,
        explained_variance=settings.explained_variance,
        seed=settings.seed,
        n_init=settings.n_init,
        kmeans=settings.kmeans_engine,
        kmeans_sample=settings.kmeans_sample,
        output_column=settings.cluster_column,
        distance_column=f"{settings.cluster_column}_distance",
    )
    return model.label(pool, across_processes=True)


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
    if any(receipt.recipe.get(name) != value for name, value in given.items()):
        return False
    if not _is_source(receipt.source, source, settings, token):
        return False
    # A branch may have moved since, and a folder may hold another model under the same name.
    pins = scorer_pins(scorer_of(settings, token))
    if any(receipt.scorer.get(name) != pin for name, pin in pins.items()):
        return False
    if settings.embedder is None:
        return True
    return receipt.embedder["revision"] == hub.pin_revision(settings.embedder, settings.embedder_revision, token)


def _is_source(known: Mapping[str, Any], source: str, settings: Recipe, token: str | None) -> bool:
    if Path(source).expanduser().exists():
        return known == describe_source(source, None, settings)
    names = ("kind", "id", "name", "split")
    if [known.get(name) for name in names] != ["hub", source, settings.name, settings.split]:
        return False
    return bool(known["revision"] == hub.pin_dataset(source, settings.revision, token, FileNotFoundError))
