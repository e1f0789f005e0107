"""The whole road in one call: `curate`, and `Recipe`, its settings as a dataclass and as YAML.

Does: load, score and embed, cluster, select, report, and write the five result files so that a reader never meets a
half-written one.
Does not: hold logic of a stage; each is a call that a user can make alone.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, DatasetDict, Features

from car_datasets import hub
from car_datasets.clustering import ClusterModel, number_of_clusters, refuse_bad_fit
from car_datasets.embedding import TextEmbedder
from car_datasets.formatting import find_schema
from car_datasets.loading import load_instructions
from car_datasets.reporting import SelectionReport
from car_datasets.rows import as_column_names, refuse_overwrite
from car_datasets.scoring import QualityScorer
from car_datasets.selection import SELECTION_COLUMNS, refuse_impossible, select_car

RESULT_FILES = ("selected.parquet", "selected.json", "scored.parquet", "report.json", "report.md")


@dataclass(frozen=True)
class Recipe:
    """The settings of [`curate`]; every field has the meaning that it has in the stage that it belongs to.

    Args:
        name, split, revision (`str`, *optional*): of the source, see [`load_instructions`].
        schema, columns, index_column, on_invalid: see [`load_instructions`].
        scorer, scorer_revision, template, turns, dtype: see [`QualityScorer`].
        embedder, embedder_revision (`str`, *optional*): a sentence-transformers model; `None`: the scorer's own encoder
            where that is one (one forward pass for both), else the default.
        k, explained_variance, seed, n_init: see [`ClusterModel.fit`]; `seed` also draws the report's controls.
        n1, n2, budget, allow_worse: see [`select_car`].
        score_column, embedding_column, cluster_column (`str`): the new columns (`iqs_tokens`, ... follow the first).
        keep_embeddings (`bool`): write the embeddings into `scored.parquet`, for clustering it again.
    """

    name: str | None = None
    split: str | None = None
    revision: str | None = None
    schema: str = "auto"
    columns: Mapping[str, str] | tuple[tuple[str, str], ...] = ()
    index_column: str = "source_index"
    on_invalid: str = "error"
    scorer: str = hub.DEFAULT_SCORER
    scorer_revision: str | None = None
    template: str | None = None
    turns: str = "mean"
    dtype: str = "float32"
    embedder: str | None = None
    embedder_revision: str | None = None
    k: int | str = "sqrt"
    explained_variance: float = 0.95
    seed: int = 42
    n_init: int = 1
    n1: int | float = 1000
    n2: int = 1
    budget: int | None = None
    allow_worse: bool = False
    score_column: str = "iqs_score"
    embedding_column: str = "embedding"
    cluster_column: str = "cluster"
    keep_embeddings: bool = True

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "columns", as_column_names(self.columns))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"columns={self.columns!r} must map roles to columns, as {{'instruction': 'task'}}."
            ) from error

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], **changes: Any) -> Recipe:
        """Read a recipe; `changes` win over the file.

        Raises:
            ValueError: the file holds a key that no recipe has (the nearest known one is named).
        """
        import yaml

        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not YAML: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path} holds a {type(content).__name__}, not `key: value` lines.")
        return cls().changed(**{**{str(key): value for key, value in content.items()}, **changes})

    def to_yaml(self) -> str:
        """The recipe as YAML that [`~Recipe.from_yaml`] reads back."""
        import yaml

        content: str = yaml.safe_dump({**asdict(self), "columns": dict(self.columns)}, sort_keys=False)
        return content

    def changed(self, **changes: Any) -> Recipe:
        """A copy with other values.

        Raises:
            ValueError: a name is not one of the fields.
        """
        known = [f.name for f in fields(self)]
        for name in changes:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                raise ValueError(
                    f"A recipe has no {name!r}{f'; did you mean {near[0]!r}?' if near else ''} Known: {known}."
                )
        return replace(self, **changes)


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
    **changes: Any,
) -> Curated:
    """Load, score and embed, cluster, select and report; everything that can be wrong is checked before the first stage.

    Example:

    ```python
    >>> selected, scored, report = curate("alpaca_data.json", "out", n1=1000, n2=1)
    ```

    Args:
        source: see [`load_instructions`].
        output_dir (`str`, *optional*): a folder for `selected.parquet`, `selected.json` (the original's format, a list of
            rows), `scored.parquet`, `report.json` and `report.md`. It must not hold a result.
        recipe ([`Recipe`], *optional*): settings; the defaults are the paper's n1 = 1000, n2 = 1, k = int(sqrt(n / 2)).
        token (`str`, *optional*): for private sources and models; never stored.
        changes: fields of [`Recipe`] by name, which win over `recipe`.

    Returns:
        [`Curated`]: `(selected, scored, report)`.

    Raises:
        ValueError: bad settings, bad input, or a folder that holds a result already.
        FileNotFoundError: there is no such file.
    """
    settings = (recipe or Recipe()).changed(**changes)
    folder = None if output_dir is None else _fresh_folder(Path(output_dir))
    dataset = load_instructions(
        source,
        settings.name,
        settings.split,
        revision=settings.revision,
        token=token,
        schema=settings.schema,
        columns=settings.columns,
        on_invalid=settings.on_invalid,
        index_column=settings.index_column,
    ).with_format(None)
    find_schema(dataset.column_names, settings.schema, settings.columns)
    clusters = number_of_clusters(settings.k, len(dataset))
    refuse_bad_fit(settings.explained_variance, settings.n_init, settings.seed)
    refuse_impossible(len(dataset), clusters, settings.n1, settings.n2, settings.budget)
    pool = score_and_embed(dataset, settings, token)
    pool = _fit_clusters(pool, settings).label(pool)
    without_vectors = pool.remove_columns(settings.embedding_column)
    names: dict[str, Any] = {"score_column": settings.score_column, "cluster_column": settings.cluster_column}
    names["index_column"] = settings.index_column
    selected = select_car(
        without_vectors, settings.n1, settings.n2, budget=settings.budget, allow_worse=settings.allow_worse, **names
    )
    report = SelectionReport.from_selection(without_vectors, selected, seed=settings.seed, **names)
    curated = Curated(selected, pool if settings.keep_embeddings else without_vectors, report)
    if folder is not None:
        write_result(folder, curated)
    return curated


def add_columns(dataset: Dataset, stage: QualityScorer | TextEmbedder, description: str) -> Dataset:
    """`dataset.map(stage)` with a progress bar and the stage's own column types (a first batch may hold only nulls)."""
    types = Features({**dataset.features, **stage.output_features()})
    return dataset.map(stage, batched=True, with_rank=True, desc=description, features=types)


def score_and_embed(dataset: Dataset, settings: Recipe, token: str | None = None, embed: bool = True) -> Dataset:
    """SCORE and EMBED of a recipe: in one pass where scorer and embedder share an encoder, else in two.

    Raises:
        ValueError: a model does not exist, or a column of this or a later stage is taken.
    """
    reading: dict[str, Any] = {
        "schema": settings.schema,
        "columns": settings.columns,
        "on_invalid": settings.on_invalid,
        "dtype": settings.dtype,
    }
    scorer = QualityScorer(
        settings.scorer,
        settings.scorer_revision,
        token,
        template=settings.template,
        turns=settings.turns,
        output_column=settings.score_column,
        diagnostics=True,
        **reading,
    )
    if not embed:
        refuse_overwrite(dataset.column_names, scorer.output_columns, "score_column= (--score-column)")
        return add_columns(dataset, scorer, "Scoring")
    _refuse_taken_columns(dataset, scorer, settings)
    if settings.embedder is None and scorer.shares_encoder:
        both = replace(scorer, embedding_column=settings.embedding_column)
        return add_columns(dataset, both, "Scoring and embedding")
    embedder = TextEmbedder(
        settings.embedder or hub.DEFAULT_ENCODER,
        settings.embedder_revision,
        token,
        template=str(scorer.template),
        output_column=settings.embedding_column,
        **reading,
    )
    return add_columns(add_columns(dataset, scorer, "Scoring"), embedder, "Embedding")


def _refuse_taken_columns(dataset: Dataset, scorer: QualityScorer, settings: Recipe) -> None:
    """Every column that any stage will add, checked before the first one runs."""
    new = [
        *scorer.output_columns,
        settings.embedding_column,
        settings.cluster_column,
        f"{settings.cluster_column}_distance",
    ]
    twice = sorted({name for name in [*new, *SELECTION_COLUMNS] if [*new, *SELECTION_COLUMNS].count(name) > 1})
    if twice:
        raise ValueError(f"The column name(s) {twice} are given to two new columns; name one of them differently.")
    option = "score_column=, embedding_column= or cluster_column= (--score-column, ...)"
    refuse_overwrite(dataset.column_names, new, option)
    refuse_overwrite(dataset.column_names, SELECTION_COLUMNS, "rename_column on the dataset (these have no option)")


def _fit_clusters(pool: Dataset, settings: Recipe) -> ClusterModel:
    return ClusterModel.fit(
        pool,
        settings.embedding_column,
        k=settings.k,
        explained_variance=settings.explained_variance,
        seed=settings.seed,
        n_init=settings.n_init,
        output_column=settings.cluster_column,
        distance_column=f"{settings.cluster_column}_distance",
    )


def _fresh_folder(folder: Path) -> Path:
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(f"output_dir={str(folder)!r}: {path} is a file; name a folder.")
    taken = [name for name in RESULT_FILES if (folder / name).exists()]
    if taken:
        raise ValueError(
            f"output_dir={str(folder)!r} already holds a result ({', '.join(taken)}). Name another folder or move it away."
        )
    return folder


def write_result(folder: Path, curated: Curated) -> None:
    """Write the five files, each under a temporary name that is moved into place when it is whole; the reports last."""
    folder.mkdir(parents=True, exist_ok=True)
    selected, scored, report = curated
    write_whole(folder / "scored.parquet", lambda path: scored.to_parquet(path))
    write_whole(folder / "selected.parquet", lambda path: selected.to_parquet(path))
    write_whole(folder / "selected.json", lambda path: write_json_list(path, selected))
    write_whole(folder / "report.md", lambda path: Path(path).write_text(report.to_markdown(), encoding="utf-8"))
    write_whole(folder / "report.json", lambda path: Path(path).write_text(report.to_json(), encoding="utf-8"))


def write_whole(path: Path, write: Any) -> None:
    """Call `write(temporary_name)` and move the file to `path`; what is there under that name is always complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(str(temporary))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json_list(path: str, dataset: Dataset) -> None:
    """A JSON list of rows as the original writes it: indented, non-ASCII text as it is."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump([dict(row) for row in dataset], file, indent=4, ensure_ascii=False, default=str)
