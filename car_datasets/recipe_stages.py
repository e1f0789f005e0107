"""SCORE and EMBED as a recipe has them: which callables, in one pass or two, here or in shards.

Does: make a recipe's scorer and embedder, refuse columns that are taken before anything runs, say how long a large dataset
will take, add the columns.
Does not: cluster or select (curation.py).
"""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm

from car_datasets import hub
from car_datasets.columns import add_columns
from car_datasets.embedding import TextEmbedder
from car_datasets.estimation import LARGE, estimate_scoring
from car_datasets.parallel import is_main_process, process_rank, start_processes
from car_datasets.recipe import Recipe
from car_datasets.rows import refuse_overwrite
from car_datasets.scoring import QualityScorer
from car_datasets.selection import SELECTION_COLUMNS, check_columns
from car_datasets.shard_files import refuse_blank
from car_datasets.shards import fill_shards, score_in_shards
from car_datasets.templates import CLEAN_TEMPLATE


def embed_where_missing(
    dataset: Dataset, column: str, embedder: str | None = None, template: str = CLEAN_TEMPLATE
) -> Dataset:
    """EMBED for a dataset that was scored elsewhere; one that has `column` comes back as it is."""
    if column in dataset.column_names:
        return dataset
    stage = TextEmbedder(embedder or hub.DEFAULT_ENCODER, template=template, output_column=column)
    return _add(dataset, stage, "Embedding")


def scorer_of(settings: Recipe, token: str | None = None, embed: bool = True) -> QualityScorer:
    """The scorer of a recipe, which also embeds where scorer and embedder share an encoder and `embed` is asked for."""
    scorer = QualityScorer(
        settings.scorer,
        settings.scorer_revision,
        token,
        template=settings.template,
        turns=settings.turns,
        uncertainty=settings.uncertainty,
        tokenizer=settings.tokenizer,
        engine=settings.engine,
        output_column=settings.score_column,
        diagnostics=True,
        compile=settings.compile,
        **_reading(settings),
    )
    if embed and settings.embedder is None and scorer.shares_encoder:
        return replace(scorer, embedding_column=settings.embedding_column)
    return scorer


def _reading(settings: Recipe) -> dict[str, Any]:
    """What scorer and embedder have in common."""
    names = ("schema", "columns", "on_invalid", "dtype", "batch_tokens", "embedding_dtype")
    return {name: getattr(settings, name) for name in names}


def score_and_embed(
    dataset: Dataset,
    settings: Recipe,
    token: str | None = None,
    embed: bool = True,
    shard_dir: str | os.PathLike[str] | None = None,
) -> Dataset:
    """SCORE and EMBED of a recipe: in one pass where scorer and embedder share an encoder, else in two.

    With a `shard_dir`, or in one of several processes, in shards: see [`curate`].

    Raises:
        ValueError: a model does not exist, or a column of this or a later stage is taken.
    """
    start_processes()
    stages = _stages(dataset, settings, token, embed)
    folders = [None if shard_dir is None else _shards_of(stage, shard_dir) for _, stage in stages]
    begun = shard_dir is not None and ("://" in str(shard_dir) or any(Path(shard_dir).glob("*/part-*")))
    if len(dataset) >= LARGE and is_main_process() and not begun:
        with contextlib.suppress(ValueError):  # rows that cannot be scored are the stage's matter
            tqdm.write(str(estimate_scoring(dataset, stages[0][1])), file=sys.stderr)
    for (description, stage), folder in zip(stages, folders, strict=True):
        dataset = _add(dataset, stage, description, folder, token)
    return dataset


def fill_shards_of(
    dataset: Dataset, settings: Recipe, shard_dir: str | os.PathLike[str], token: str | None = None, embed: bool = True
) -> dict[str, int]:
    """SCORE and EMBED of a recipe as one of many workers, see [`fill_shards`]: the rows left to others, by folder."""
    folders = [(_shards_of(stage, shard_dir), note, stage) for note, stage in _stages(dataset, settings, token, embed)]
    return {
        folder: fill_shards(dataset, stage, folder, description=note, token=token) for folder, note, stage in folders
    }


def _stages(dataset: Dataset, settings: Recipe, token: str | None, embed: bool) -> list[tuple[str, Any]]:
    """The scorer, and the embedder where the scorer does not embed, each with what a progress bar says of it."""
    scorer = scorer_of(settings, token, embed)
    if embed:
        _refuse_taken_columns(dataset, scorer, settings)
    else:
        refuse_overwrite(dataset.column_names, scorer.output_columns, "score_column= (--score-column)")
    if not embed or scorer.embedding_column is not None:
        return [("Scoring and embedding" if embed else "Scoring", scorer)]
    embedder = TextEmbedder(
        settings.embedder or hub.DEFAULT_ENCODER,
        settings.embedder_revision,
        token,
        template=str(scorer.template),
        output_column=settings.embedding_column,
        **_reading(settings),
    )
    return [("Scoring", scorer), ("Embedding", embedder)]


def _add(
    dataset: Dataset,
    stage: QualityScorer | TextEmbedder,
    description: str,
    folder: str | None = None,
    token: str | None = None,
) -> Dataset:
    """The columns of a stage, computed here, or by all processes in shards."""
    if folder is None and process_rank()[1] == 1:
        return add_columns(dataset, stage, description)
    return score_in_shards(dataset, stage, folder, description=description, token=token)


def _shards_of(stage: QualityScorer | TextEmbedder, shard_dir: str | os.PathLike[str]) -> str:
    """Each stage has a folder of its own there."""
    refuse_blank(shard_dir)
    return f"{os.fspath(shard_dir).rstrip('/')}/{'scores' if isinstance(stage, QualityScorer) else 'embeddings'}"


def _refuse_taken_columns(dataset: Dataset, scorer: QualityScorer, settings: Recipe) -> None:
    """Every column that any stage will add, checked before the first one runs."""
    new = [
        *(name for name in scorer.output_columns if name != scorer.embedding_column),
        settings.embedding_column,
        settings.cluster_column,
        f"{settings.cluster_column}_distance",
    ]
    twice = sorted({name for name in [*new, *SELECTION_COLUMNS] if [*new, *SELECTION_COLUMNS].count(name) > 1})
    if twice:
        raise ValueError(f"The column name(s) {twice} are given to two new columns; name one of them differently.")
    option = "score_column=, embedding_column= or cluster_column= (--score-column, ...)"
    refuse_overwrite(dataset.column_names, new, option)
    check_columns(dataset.column_names, (), SELECTION_COLUMNS)
