"""Turn a recipe into the `Pipeline` that runs it, with every model looked up once: `resolve`.

Does: make scorer, embedder and cluster settings of a recipe; refuse taken columns before anything runs; run SCORE,
EMBED, CLUSTER and SELECT, here or in shards.
Does not: load or check rows, report, or write results.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from datasets.table import InMemoryTable

from car_datasets.choosing import marks_of, select_by
from car_datasets.clustering.fitting import FitSettings
from car_datasets.clustering.model import ClusterModel, checked_fit
from car_datasets.loading.languages import languages_of_rows, sample_of
from car_datasets.loading.schemas import Schema
from car_datasets.loading.templates import CLEAN_TEMPLATE
from car_datasets.recipe import Recipe
from car_datasets.scoring.embedder import TextEmbedder
from car_datasets.scoring.iqs.float8 import for_embedder
from car_datasets.scoring.named import IQS, find_scorer, read_name
from car_datasets.scoring.scorer import QualityScorer
from car_datasets.scoring.shards.run import fill_shards, score_in_shards
from car_datasets.scoring.shards.storage import refuse_blank
from car_datasets.scoring.stage import Stage, add_columns, say
from car_datasets.selection.procedures import Procedure, find_procedure
from car_datasets.selection.rule import SELECTION_COLUMNS
from car_datasets.utils import revisions
from car_datasets.utils.column_names import ColumnNames
from car_datasets.utils.columns import check_columns, join_columns, refuse_overwrite
from car_datasets.utils.processes import from_main, process_rank

if TYPE_CHECKING:
    from car_datasets.scoring.conversations import ConversationScorer
    from car_datasets.scoring.named import Scorer


@dataclass(frozen=True)
class Pipeline:
    """A recipe that is ready to run.

    Args:
        recipe ([`Recipe`]): the settings, with the immutable revisions of scorer and embedder.
        scorer (`Scorer`): adds the score and, if it shares its encoder with the embedder, the embedding.
        embedder ([`TextEmbedder`], *optional*): adds the embedding in a second pass; None if the scorer does, or if no
            embeddings are wanted.
        fit ([`FitSettings`]): the arguments of the cluster model's fit.
        procedure ([`Procedure`]): the rule of selection.
    """

    recipe: Recipe
    scorer: Scorer
    embedder: TextEmbedder | None
    fit: FitSettings
    procedure: Procedure

    def read_languages(self, dataset: Dataset, schema: Schema) -> list[str]:
        """Return the language of each row if the recipe wants them in a column, else those of a sample of the rows.

        Args:
            dataset (`Dataset`): checked rows.
            schema ([`Schema`]): of these rows.
        """
        return languages_of_rows(dataset if self.recipe.names.language else sample_of(dataset), schema)

    def score(
        self,
        dataset: Dataset,
        marked: Dataset | None = None,
        *,
        token: str | None = None,
        shard_dir: str | os.PathLike[str] | None = None,
    ) -> Dataset:
        """Add scores and embeddings: in one pass if scorer and embedder share an encoder, else in two.

        Args:
            dataset (`Dataset`): checked rows.
            marked (`Dataset`, *optional*): the same rows with marks, which get the new columns. What is computed depends on
                `dataset` alone, so that it is read from the cache when nothing but marks differ from an earlier run.
            token (`str`, *optional*): for a `shard_dir` on the Hub.
            shard_dir (`str`, *optional*): keep finished shards there, so that another run resumes. Several processes
                share the work in shards with and without it.

        Raises:
            ValueError: a column of this or a later stage is taken.
        """
        # Without the marks, some of which are there already; what adds them refuses columns of their names.
        own = [
            name for name in (dataset if marked is None else marked).column_names if name not in marks_of(self.recipe)
        ]
        refuse_taken_columns(own, self.recipe, self._embeds)
        # All folders first: a blank shard_dir is refused before the first pass.
        folders = [None if shard_dir is None else shard_folder(shard_dir, name) for _, name, _ in self._passes()]
        say(f"Scoring {len(dataset):,} rows with {self.recipe.scorer}; the time left follows from the first batches.")
        for (description, _, stage), folder in zip(self._passes(), folders, strict=True):
            dataset = run_stage(dataset, stage, description, folder, token)
        return dataset if marked is None else with_new_columns(marked, dataset)

    def fill_shards(
        self, dataset: Dataset, shard_dir: str | os.PathLike[str], *, token: str | None = None
    ) -> dict[str, int]:
        """Score and embed as one of many workers, without waiting for the others.

        Returns:
            `dict[str, int]`: for each folder of shards, the number of rows that other workers have claimed.
        """
        # Without the marks, some of which are there already; what adds them refuses columns of their names.
        own = [name for name in dataset.column_names if name not in marks_of(self.recipe)]
        refuse_taken_columns(own, self.recipe, self._embeds)
        # All folders first: a blank shard_dir is refused before the first pass.
        folders = [(shard_folder(shard_dir, name), note, stage) for note, name, stage in self._passes()]
        return {
            folder: fill_shards(dataset, stage, folder, description=note, token=token)
            for folder, note, stage in folders
        }

    def cluster(self, pool: Dataset, model: ClusterModel) -> Dataset:
        """Add clusters and distances to a scored pool; several processes share the work and get the same labels."""
        return add_near_clusters(self.recipe, model.label(pool, across_processes=True), model)

    def select(self, pool: Dataset) -> Dataset:
        """Return the selected rows of a scored, clustered pool."""
        return select_by(self.recipe, pool)

    def embedding_stage(self) -> TextEmbedder:
        """Return the stage that gives the embeddings alone: the embedder, or that of the scorer's encoder.

        Raises:
            ValueError: the pipeline has no embedder, and its scorer has no sentence-transformers encoder.
        """
        if self.embedder is not None:
            return self.embedder
        if not isinstance(self.scorer, QualityScorer):
            raise ValueError(f"{self.recipe.scorer} embeds no text: resolve(recipe, embed=True) gives it an embedder.")
        return self.scorer.embedder()

    @property
    def _embeds(self) -> bool:
        return self.embedder is not None or self.scorer.embedding_column is not None

    def _passes(self) -> list[tuple[str, str, Stage]]:
        """Return the stages that read text, in order, each after its progress bar's label and its folder of shards."""
        if self.embedder is not None:
            return [("Scoring", "scores", self.scorer), ("Embedding", "embeddings", self.embedder)]
        return [("Scoring and embedding" if self._embeds else "Scoring", "scores", self.scorer)]


def resolve(recipe: Recipe, token: str | None = None, *, embed: bool = True) -> Pipeline:
    """Return the pipeline of a recipe; every model is looked up, downloaded and pinned here, and only here.

    Args:
        recipe ([`Recipe`]): the settings.
        token (`str`, *optional*): for private models; never stored.
        embed (`bool`): False for scores alone.

    Raises:
        ValueError: a model does not exist, or a setting is invalid.
    """
    procedure = find_procedure(recipe.procedure)
    fit = fit_settings(recipe)  # before the models: a wrong seed must not cost a download
    scorer = scorer_of(recipe, token, embed)
    # Branches may move while this runs: what is written down is what is loaded.
    pinned = recipe.changed(scorer_revision=scorer.revision)
    if not embed or scorer.embedding_column is not None:
        return Pipeline(pinned, scorer, None, fit, procedure)
    embedder = TextEmbedder(
        recipe.embedder or revisions.DEFAULT_ENCODER,
        recipe.embedder_revision,
        token,
        template=str(scorer.template),
        output_column=recipe.embedding_column,
        **_reading(recipe) | {"dtype": for_embedder(recipe.dtype)},
    )
    # The default encoder is pinned in the code, and a recipe without an embedder must not name a revision.
    if recipe.embedder is not None:
        pinned = pinned.changed(embedder_revision=embedder.revision)
    return Pipeline(pinned, scorer, embedder, fit, procedure)


def refuse_taken_columns(columns: Sequence[str], recipe: Recipe, embed: bool = True) -> None:
    """Raise ValueError if a column that a stage adds is taken, or is added by two stages; no model is looked up.

    Args:
        columns (`Sequence[str]`): columns of the rows.
        recipe ([`Recipe`]): names the new columns.
        embed (`bool`): False for scores alone, which leave the columns of later stages to their owner.
    """
    names = recipe.names
    std = [names.std] if recipe.uncertainty else []
    parts = names.parts if recipe.parts else ()
    scores = [names.score, *std, *parts, *recipe.further_columns, names.tokens, names.truncated, names.status]
    within = [names.within] if recipe.languages == "within" or recipe.within else []
    if not embed:
        refuse_overwrite(columns, scores, "score_column= (--score-column)")
        return
    new = [*scores, *within, names.embedding, names.cluster, names.distance, *marks_of(recipe)]
    # Counted, because two options may give two columns one name, of which one would be lost.
    every = [*new, *SELECTION_COLUMNS]
    twice = sorted({name for name in every if every.count(name) > 1})
    if twice:
        raise ValueError(f"The column name(s) {twice} are given to two new columns; name one of them differently.")
    # The names of the selection cannot be changed, so they are checked apart, by `check_columns`.
    if taken := [name for name in marks_of(recipe) if name in columns]:
        found = {names.duplicate_of, names.duplicate_similarity}.intersection(taken)
        copies = ", or pass duplicates='keep' (--duplicates keep)" if found else ""
        raise ValueError(
            f"The dataset has the column(s) {taken} already, in which rows would be marked for the selection. Rename them "
            f"in the source, as dataset.rename_column({taken[0]!r}, ...) does{copies}."
        )
    option = "score_column=, embedding_column= or cluster_column= (--score-column, ...)"
    if names.score in columns:
        seen = [name for name in new if name in columns]
        raise ValueError(
            f"The dataset already has the column(s) {seen}, which would be overwritten. To select by the scores that are "
            f"there, run `car-datasets cluster` on the rows, then `car-datasets select --score-column {names.score}`. To "
            f"score the rows, pass {option} to name the new columns differently, or drop the old ones: "
            f"dataset.remove_columns({seen})."
        )
    refuse_overwrite(columns, new, option)
    check_columns(columns, (), SELECTION_COLUMNS)


def refuse_taken_language(columns: Sequence[str], recipe: Recipe) -> None:
    """Raise ValueError if the column of languages that a recipe wants is taken, or is a column of a stage."""
    names = recipe.names
    if not names.language:
        return
    own = (names.score, names.embedding, names.cluster, names.within, *names.diagnostics, *SELECTION_COLUMNS)
    if names.language in own:
        raise ValueError(f"language_column={names.language!r} is the name of another new column; name it differently.")
    refuse_overwrite(columns, [names.language], "language_column= (--language-column)")


def add_near_clusters(recipe: Recipe, pool: Dataset, model: ClusterModel) -> Dataset:
    """Add the soft memberships that the rule `gain` weighs, if the recipe selects by it."""
    if recipe.rule != "gain":
        return pool
    from car_datasets.selection.gain import add_memberships

    names = recipe.names
    marks = [names.near_clusters, names.near_weights]
    return joined_from_main(pool, lambda: add_memberships(pool, model, names), marks)


def joined_from_main(dataset: Dataset, compute: Callable[[], Dataset], columns: Sequence[str]) -> Dataset:
    """Add columns that the main process alone computes, since the last digits of numbers differ between machines.

    Args:
        dataset (`Dataset`): gets the columns.
        compute (`Callable`): returns a dataset of as many rows that has them.
        columns (`Sequence[str]`): their names.
    """
    found = from_main(lambda: compute().select_columns(list(columns)).with_format("arrow")[:])
    return join_columns(dataset, Dataset(InMemoryTable(found)))


def fit_settings(recipe: Recipe) -> FitSettings:
    """Return the settings of the cluster model's fit.

    Raises:
        ValueError: one of them is invalid whatever the dataset.
    """
    return checked_fit(
        recipe.k, recipe.explained_variance, recipe.seed, recipe.n_init, recipe.kmeans_engine, recipe.kmeans_sample
    )


def fit_clusters(pool: Dataset, fit: FitSettings, names: ColumnNames) -> ClusterModel:
    """Fit the cluster model of a pool, which labels rows in the columns of these names."""
    return ClusterModel.fit(
        pool, names.embedding, **fit._asdict(), output_column=names.cluster, distance_column=names.distance
    )


def scorer_of(recipe: Recipe, token: str | None = None, embed: bool = True) -> Scorer:
    """Return the scorer of a recipe; with `embed`, it also embeds if scorer and embedder share an encoder."""
    if read_name(recipe.scorer).kind != IQS:
        names = ("schema", "columns", "score_thoughts", "on_invalid", "dtype", "batch_tokens")
        reading = {name: getattr(recipe, name) for name in names}
        other: ConversationScorer = find_scorer(
            recipe.scorer, token, revision=recipe.scorer_revision, output_column=recipe.score_column, **reading
        )
        return other
    scorer = QualityScorer(
        recipe.scorer,
        recipe.scorer_revision,
        token,
        template=recipe.template,
        turns=recipe.turns,
        uncertainty=recipe.uncertainty,
        parts=recipe.parts,
        tokenizer=recipe.tokenizer,
        engine=recipe.engine,
        output_column=recipe.score_column,
        diagnostics=True,
        compile=recipe.compile,
        **_reading(recipe),
    )
    # One forward pass then gives both, in half the time of two.
    if embed and recipe.embedder is None and scorer.shares_encoder:
        return scorer.with_embeddings(recipe.embedding_column)
    return scorer


def embed_where_missing(dataset: Dataset, recipe: Recipe) -> Dataset:
    """Add embeddings to a dataset that was scored elsewhere; a dataset that has them is returned as it is.

    Args:
        dataset (`Dataset`): with text of the recipe's schema, unless it has the embedding column.
        recipe ([`Recipe`]): its embedder defaults to all-MiniLM-L6-v2, and its template to that of the default scorer,
            `"clean-1"`.
    """
    column = recipe.names.embedding
    if column in dataset.column_names:
        return dataset
    return run_stage(dataset, embedder_of(recipe), "Embedding")


def embedder_of(recipe: Recipe) -> TextEmbedder:
    """Return the embedder of a dataset that was scored elsewhere, with the defaults of [`embed_where_missing`]."""
    return TextEmbedder(
        recipe.embedder or revisions.DEFAULT_ENCODER,
        template=recipe.template or CLEAN_TEMPLATE,
        output_column=recipe.embedding_column,
        schema=recipe.schema,
        columns=recipe.columns,
    )


def _reading(recipe: Recipe) -> dict[str, Any]:
    """Return the arguments that scorer and embedder have in common."""
    # Equal for both, so that they read the same columns and skip the same rows.
    names = ("schema", "columns", "score_thoughts", "on_invalid", "dtype", "batch_tokens", "embedding_dtype")
    return {name: getattr(recipe, name) for name in names}


def run_stage(
    dataset: Dataset,
    stage: Stage,
    description: str,
    folder: str | None = None,
    token: str | None = None,
) -> Dataset:
    """Return the dataset with the columns of a stage, computed here, or by all processes in shards."""
    # Several processes share the work in shards even without a folder; `score_in_shards` then chooses one.
    if folder is None and process_rank()[1] == 1:
        return add_columns(dataset, stage, description)
    return score_in_shards(dataset, stage, folder, description=description, token=token)


def with_new_columns(dataset: Dataset, found: Dataset) -> Dataset:
    """Return a dataset with those columns of another one, of the same rows, that it lacks."""
    new = [name for name in found.column_names if name not in dataset.column_names]
    return join_columns(dataset, found.select_columns(new))


def shard_folder(shard_dir: str | os.PathLike[str], name: str) -> str:
    """Return the folder of one stage's shards: scores and embeddings do not mix."""
    refuse_blank(shard_dir)
    return f"{os.fspath(shard_dir).rstrip('/')}/{name}"
