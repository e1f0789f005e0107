"""`Recipe`: the settings of `curate` as a dataclass and as YAML, each checked by type and name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from car_datasets import hub
from car_datasets.formatting import as_column_names
from car_datasets.settings import Settings


@dataclass(frozen=True)
class Recipe(Settings):
    """The settings of [`curate`]; every field has the meaning that it has in the stage that it belongs to.

    Args:
        name, split, revision (`str`, *optional*): of the source, see [`load_instructions`].
        schema, columns, index_column, on_invalid: see [`load_instructions`].
        scorer, scorer_revision, template, turns, uncertainty, dtype, batch_tokens, embedding_dtype, compile, engine: see
            [`QualityScorer`].
        embedder, embedder_revision (`str`, *optional*): a sentence-transformers model; `None`: the scorer's own encoder
            where that is one (one forward pass for both), else the default.
        k, explained_variance, seed, n_init, kmeans, kmeans_sample: see [`ClusterModel.fit`]; `seed` also draws the report's
            controls; without `kmeans` it is `"sklearn"` for `procedure="paper"`, else `"torch"`.
        n1, n2, budget, allow_worse: see [`select_car`].
        score_column, embedding_column, cluster_column (`str`): the new columns (`iqs_tokens`, ... follow the first).
        procedure (`str`): `"default"`, or `"paper"`: clusters fitted on the score-sorted rows and the published rule of
            selection, see original.py; the result then holds the original's three files as well.
        tokenizer (`str`, *optional*): for a scorer in the original's layout, see [`QualityScorer`].
        keep_embeddings (`bool`): write the embeddings into `scored.parquet`, for clustering it again.
        projection (`str`): of the map in plots and page: `"pca"`, `"tsne"`, or `"umap"` (with umap-learn).
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
    uncertainty: bool = False
    dtype: str = "float32"
    embedder: str | None = None
    embedder_revision: str | None = None
    k: int | str = "sqrt"
    explained_variance: float = 0.95
    seed: int = 42
    n_init: int = 1
    kmeans: str | None = None
    kmeans_sample: int = 256
    n1: int | float = 1000
    n2: int = 1
    budget: int | None = None
    allow_worse: bool = False
    score_column: str = "iqs_score"
    embedding_column: str = "embedding"
    cluster_column: str = "cluster"
    procedure: str = "default"
    tokenizer: str | None = None
    batch_tokens: int | None = None
    embedding_dtype: str = "float32"
    compile: bool = False
    engine: str | None = None
    keep_embeddings: bool = True
    projection: str = "pca"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "columns", as_column_names(self.columns))
        if self.embedder_revision is not None and self.embedder is None:
            raise ValueError(
                f"embedder_revision={self.embedder_revision!r} needs an embedder=... that it is a revision of."
            )

    def changed(self, **changes: Any) -> Recipe:
        """As in [`Settings`]; another scorer does not keep the revision, tokenizer and engine of the one before."""
        if changes.get("scorer", self.scorer) != self.scorer:
            changes = {"scorer_revision": None, "tokenizer": None, "engine": None, **changes}
        return super().changed(**changes)

    @property
    def kmeans_engine(self) -> str:
        """`kmeans`, or the one of the procedure."""
        return self.kmeans or ("sklearn" if self.procedure == "paper" else "torch")

    @property
    def names(self) -> dict[str, str]:
        """The columns that SELECT and REPORT read, as their arguments."""
        return {
            "score_column": self.score_column,
            "cluster_column": self.cluster_column,
            "index_column": self.index_column,
        }
