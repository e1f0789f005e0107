"""Define the settings of `curate`: `Recipe`, a dataclass that is read from and written to YAML.

Does: give each setting its name, type, default and the help text of its command-line option.
Does not: run a stage or look up a model.
"""

# No `from __future__ import annotations`: the command line reads the types of the fields, which would then be strings.

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from car_datasets.loading.schemas import as_column_names
from car_datasets.utils import revisions
from car_datasets.utils.column_names import ColumnNames
from car_datasets.utils.public import public
from car_datasets.utils.settings import EXPLAINED_VARIANCE, KMEANS_SAMPLE, N1, SEED, Settings

if TYPE_CHECKING:
    from car_datasets.selection.procedures import Amounts

NAMES = ColumnNames()


def _setting(default: Any, help: str, *, flag: str | None = None, shown: str | None = None) -> Any:
    """Return a field of `Recipe` with its option.

    Args:
        default: the default of the field.
        help (`str`): the help text of the option, without the default.
        flag (`str`, *optional*): the option, if it is not called like the field.
        shown (`str`, *optional*): the default as the help shows it, for a default such as None that says nothing.
    """
    return field(default=default, metadata={"help": help, "flag": flag, "shown": shown})


@public
@dataclass(frozen=True)
class Recipe(Settings):
    """The settings of [`curate`], one for each choice of a stage.

    Args:
        name, split, revision (`str`, *optional*): configuration, split and commit of the source; a split may be a slice
            such as `"train[:10%]"`, or `"all"`, and a source with a single split needs none.
        glob (`bool`): a source that is not an existing path is a pattern, and all files that fit it are read.
        schema (`str`): `"alpaca"`, `"messages"`, ..., or `"auto"` to recognise it from the column names.
        columns (`Mapping[str, str]`): columns under other names: `{"instruction": "task", "response": "answer"}`.
        index_column (`str`): the column that identifies a row, added as the row's number unless the source has it.
        on_invalid (`str`): `"error"` refuses rows that cannot be scored, `"mark"` keeps them without a score.
        scorer, scorer_revision (`str`): an IQS model, on the Hub or in a folder, and its branch, tag, commit or digest.
        template (`str`, *optional*): the text that is scored; defaults to the one the scorer was trained with.
        turns (`str`): how the exchanges of a chat make one score: `"mean"`, `"min"`, `"last"` or `"sum"`.
        uncertainty (`bool`): also add the standard deviation over the members of the scorer's head.
        dtype (`str`): precision of the encoder: `"float32"`, `"bfloat16"` or `"float16"`.
        embedder, embedder_revision (`str`, *optional*): a sentence-transformers model; None takes the scorer's
            encoder (one forward pass for both) if that is an unchanged sentence-transformers model, else the default
            encoder.
        k (`int` or `"sqrt"`): clusters; `"sqrt"` is the paper's int(sqrt(rows / 2)).
        explained_variance (`float`): PCA keeps the fewest components that hold this share of the variance.
        seed (`int`): seed of k-means and of the report's control samples.
        n_init (`int`): number of k-means runs, of which the best is kept.
        kmeans (`str`, *optional*): `"torch"` or `"sklearn"`; None takes the engine of the procedure.
        kmeans_sample (`int`): with `"torch"`, fit on this many rows per cluster if there are more; 0 fits on all.
        n1 (`int` or `float`): rows by score, or a share of the scored rows.
        n2 (`int`): rows from every cluster.
        budget (`int`, *optional*): total number of rows; n1 then follows from it and from n2.
        allow_worse (`bool`): accept a selection whose mean score is below the pool's.
        score_column, embedding_column, cluster_column (`str`): the new columns; `iqs_tokens`, ... follow the first.
        procedure (`str`): `"default"`, or `"paper"`: the published rule on clusters of the score-sorted rows, which
            also writes the original's three files; or another key of `PROCEDURES`.
        tokenizer (`str`, *optional*): the base model's tokenizer, for a scorer in the original's layout.
        batch_tokens (`int`, *optional*): padded tokens in one forward pass; None chooses by the device.
        embedding_dtype (`str`): type of the embedding column: `"float32"` or `"float16"`.
        compile (`bool`): compile the encoder; worthwhile only for large datasets on a GPU.
        engine (`str`, *optional*): a folder with the scorer's encoder in int8, for the CPU.
        keep_embeddings (`bool`): write the embeddings into `scored.parquet`, to cluster it again later.
        projection (`str`): projection of the map in plots and page: `"pca"`, `"tsne"`, or `"umap"` (needs umap-learn).
    """

    name: str | None = _setting(None, "Configuration of a Hub dataset.")
    split: str | None = _setting(None, "Split, if the source has several, a slice such as train[:10%], or all.")
    revision: str | None = _setting(None, "Branch, tag or commit of a Hub dataset.")
    glob: bool = _setting(False, "Read SOURCE as a pattern with * ? [ ], if there is no such path: all files that fit.")
    schema: str = _setting(
        "auto", "Schema: alpaca, prompt/completion, messages, conversations, ...; auto recognises it."
    )
    columns: Mapping[str, str] | tuple[tuple[str, str], ...] = _setting(
        (), "Columns under other names: instruction=task,response=answer."
    )
    index_column: str = _setting(NAMES.index, "Column that identifies a row; added if it does not exist.")
    on_invalid: str = _setting(
        "error", "Rows that cannot be scored: error refuses them, mark keeps them without a score."
    )
    scorer: str = _setting(revisions.DEFAULT_SCORER, "An IQS model: Hub id or folder.")
    scorer_revision: str | None = _setting(None, "Branch, tag or commit of the scorer; of a folder, its digest.")
    template: str | None = _setting(None, "Text that is scored: clean-1, or paper.", shown="the scorer's own")
    turns: str = _setting("mean", "Score of a chat from its exchanges: mean, min, last or sum.")
    uncertainty: bool = _setting(False, "Also add the standard deviation over the members of the scorer's head.")
    dtype: str = _setting(
        "float32", "Precision of the encoder: float32; or bfloat16 or float16, which are faster on a GPU."
    )
    embedder: str | None = _setting(None, "A sentence-transformers model.", shown="the scorer's own encoder")
    embedder_revision: str | None = _setting(None, "Branch, tag or commit of --embedder.")
    k: int | str = _setting("sqrt", "Clusters: a number, or sqrt for int(sqrt(rows / 2)).")
    explained_variance: float = _setting(EXPLAINED_VARIANCE, "Share of the variance that PCA keeps before k-means.")
    seed: int = _setting(SEED, "Seed of k-means and of the report's control samples.")
    n_init: int = _setting(1, "k-means runs, of which the best is kept.")
    kmeans: str | None = _setting(
        None, "k-means engine: torch, or sklearn (on all rows, as in the paper).", shown="by procedure"
    )
    kmeans_sample: int = _setting(KMEANS_SAMPLE, "Rows per cluster to fit on, if there are more; 0 fits on all.")
    n1: int | float = _setting(N1, "Rows by score: a number, or a share such as 0.05.")
    n2: int = _setting(1, "Rows from every cluster.")
    budget: int | None = _setting(None, "Total number of rows to select; n1 then follows from it.")
    allow_worse: bool = _setting(False, "Accept a selection whose mean score is below the pool's.")
    score_column: str = _setting(NAMES.score, "Name of the score column.")
    embedding_column: str = _setting(NAMES.embedding, "Name of the embedding column.")
    cluster_column: str = _setting(NAMES.cluster, "Name of the cluster column.")
    procedure: str = _setting("default", "Rule of selection: default, or paper, the published one with its oddities.")
    tokenizer: str | None = _setting(
        None, "For a scorer in the original's layout: folder or Hub id of its base model's tokenizer."
    )
    batch_tokens: int | None = _setting(None, "Padded tokens in one forward pass.", shown="by device")
    embedding_dtype: str = _setting("float32", "Type of the embedding column: float32 or float16.")
    compile: bool = _setting(False, "Compile the encoder; worthwhile only for large datasets on a GPU.")
    engine: str | None = _setting(None, "Score with the int8 encoder in this folder, which `quantise` wrote.")
    keep_embeddings: bool = _setting(True, "Keep the embeddings in scored.parquet.", flag="--embeddings")
    projection: str = _setting("pca", "Projection of the map: pca, tsne, or umap (needs the extra umap).")

    def __post_init__(self) -> None:
        super().__post_init__()
        # A mapping cannot be hashed, and its order means nothing; the class is frozen, hence object.__setattr__.
        object.__setattr__(self, "columns", as_column_names(self.columns))
        if self.embedder_revision is not None and self.embedder is None:
            raise ValueError(
                f"embedder_revision={self.embedder_revision!r} needs an embedder=... that it is a revision of."
            )

    def changed(self, **changes: Any) -> "Recipe":
        """Return a copy with other values.

        Another scorer does not keep revision, tokenizer and engine of the previous one, nor another embedder its
        revision.

        Raises:
            ValueError: a name is not a field, or a value does not have the field's type.
        """
        # Values that are given along with the new model win over these resets.
        if changes.get("scorer", self.scorer) != self.scorer:
            changes = {"scorer_revision": None, "tokenizer": None, "engine": None, **changes}
        if changes.get("embedder", self.embedder) != self.embedder:
            changes = {"embedder_revision": None, **changes}
        return super().changed(**changes)

    @property
    def names(self) -> ColumnNames:
        """Return the names of the columns that the stages add."""
        return ColumnNames(self.score_column, self.cluster_column, self.index_column, self.embedding_column)

    @property
    def amounts(self) -> "Amounts":
        """Return how many rows to select."""
        # Imported here, because the command line reads this class for its help.
        from car_datasets.selection.procedures import Amounts

        return Amounts(self.n1, self.n2, self.budget, self.allow_worse)

    @property
    def kmeans_engine(self) -> str:
        """Return `kmeans`, or the engine of the procedure if that is None."""
        from car_datasets.selection.procedures import find_procedure

        return self.kmeans or find_procedure(self.procedure).kmeans
