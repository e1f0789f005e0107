"""Define the settings of `curate`: `Recipe`, a dataclass that is read from and written to YAML.

Does: give each setting its name, type, default and the help text of its command-line option.
Does not: run a stage or look up a model.
"""

# No `from __future__ import annotations`: the command line reads the types of the fields, which would then be strings.

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from car_datasets.loading.languages import CHOICES, LANGUAGE_COLUMN
from car_datasets.loading.schemas import ROLE_NAMES, SCHEMAS, as_column_names
from car_datasets.loading.templates import TEMPLATES
from car_datasets.scoring.named import IQS, SCORERS, read_name, refuse_judge
from car_datasets.utils import revisions
from car_datasets.utils.column_names import ColumnNames
from car_datasets.utils.digests import public
from car_datasets.utils.settings import (
    EXPLAINED_VARIANCE,
    KMEANS_SAMPLE,
    N_INIT,
    SEED,
    K,
    Settings,
    default_n1,
    refuse_two_amounts,
)

if TYPE_CHECKING:
    from car_datasets.selection.procedures import Amounts

NAMES = ColumnNames()

# The groups of options in the command line's help, in this order.
SOURCE = "Source"
SCORING = "Scoring"
CLUSTERING = "Embedding and clustering"
SELECTION = "Selection"
MARKS = "Rows that must be in, or must not"
SHARES = "Fair shares and a budget in tokens"
COLUMNS = "Names of columns"
OUTPUT = "Output"
PERFORMANCE = "Performance"
HUB = "Hub"
PANELS = (SOURCE, SELECTION, MARKS, SHARES, SCORING, CLUSTERING, COLUMNS, OUTPUT, PERFORMANCE, HUB)


def _setting(default: Any, help: str, panel: str, *, flag: str | None = None, shown: str | None = None) -> Any:
    """Return a field of `Recipe` with its option.

    Args:
        default: the default of the field.
        help (`str`): the help text of the option, in full sentences and without the default.
        panel (`str`): the group of options that it is shown in, one of `PANELS`.
        flag (`str`, *optional*): the option, if it is not called like the field.
        shown (`str`, *optional*): the default as the help shows it, for a default such as None that says nothing.
    """
    return field(default=default, metadata={"help": help, "panel": panel, "flag": flag, "shown": shown})


def listed(names: Iterable[str]) -> str:
    """Return names as `a, b or c`, for a help text."""
    *others, last = names
    return f"{', '.join(others)} or {last}"


@public
@dataclass(frozen=True)
class Recipe(Settings):
    """The settings of [`curate`], one for each choice of a stage.

    Args:
        name, split, revision (`str`, *optional*): configuration, split and commit of the source; a split may be a slice
            such as `"train[:10%]"`, or `"all"`, and a source with a single split needs none.
        glob (`bool`): a source that is not an existing path is a pattern, and all files that fit it are read.
        schema (`str`): `"alpaca"`, `"messages"`, ..., or `"auto"` to recognise it from the column names.
        columns (`Mapping[str, str]`): columns under other names: `{"instruction": "task", "response": "answer"}`; also
            `system`, `history` and `tools`.
        index_column (`str`): the column that identifies a row, added as the row's number unless the source has it.
        on_invalid (`str`): `"error"` refuses rows that cannot be scored, `"mark"` keeps them without a score.
        language_column (`str`, *optional*): also add the language of each row, a code of ISO 639-1 or `"und"`.
        languages (`str`): what to do if more than 5 % of the rows whose language can be told are in languages that the
            scorer's configuration does not list (10,000 rows are looked at, all if there is a language column):
            `"refuse"`; `"within"`: rank within each language, by the share of its rows that score worse, so that
            n1 is divided in proportion to the rows of each language and each cluster gives its best by that rank;
            `"across"`: compare the scores of all languages. `"within"` adds the columns `language` and
            `iqs_score_within`. If the scorer's languages are not known, nothing is refused.
        scorer, scorer_revision (`str`): an IQS model, on the Hub or in a folder, and its branch, tag, commit or digest; or
            `"reward:MODEL"`, `"ifd:MODEL"` or `"perplexity:MODEL"` with options of [`RewardScorer`], [`IFDScorer`] or
            [`PerplexityScorer`], as in `"reward:MODEL,labels=softmax(good)"`. These add `reward_score`, `ifd_score` or
            `perplexity_score`, of which higher is better: of perplexity, the likelier answers. The embedding then comes
            from `embedder`, or the default encoder, in a pass of its own.
        template (`str`, *optional*): the text that is scored; defaults to the one the scorer was trained with.
        turns (`str`): how the exchanges of a chat make one score: `"mean"`, `"min"`, `"last"` or `"sum"`.
        score_thoughts (`bool`): put the thoughts of an answer in front of it; by default the answer alone is scored.
        uncertainty (`bool`): also add the standard deviation over the members of the scorer's head.
        parts (`bool`): also add what a scorer with parts judges: `iqs_expert`, `iqs_soundness`, `iqs_worth`, `iqs_fault`.
        dtype (`str`): precision of the encoder: `"float32"`, `"bfloat16"`, `"float16"` or `"float8"`.
        embedder, embedder_revision (`str`, *optional*): a sentence-transformers model; None takes the scorer's
            encoder (one forward pass for both) if that is an unchanged sentence-transformers model, else the default
            encoder.
        k (`int` or `"sqrt"`): clusters; `"sqrt"` is the paper's int(sqrt(rows / 2)).
        explained_variance (`float`): PCA keeps the fewest components that hold this share of the variance.
        seed (`int`): seed of k-means and of the report's control samples.
        n_init (`int`): number of k-means runs, of which the best is kept.
        kmeans (`str`, *optional*): `"torch"` or `"sklearn"`; None takes the engine of the procedure.
        kmeans_sample (`int`): with `"torch"`, fit on this many rows per cluster if there are more; 0 fits on all.
        n1 (`int` or `float`, *optional*): rows by score, or a share of the scored rows. None takes what follows from
            `budget`, or without one 1000, but at most half of the scored rows.
        n2 (`int`): rows from every cluster.
        budget (`int`, *optional*): total number of rows; n1 then follows from it and from n2, and must not be given.
        allow_worse (`bool`): accept a selection whose mean score is below the pool's.
        score_column, embedding_column, cluster_column (`str`): the new columns; `iqs_tokens`, ... follow the first. The
            default of `score_column` is that of the scorer: `"iqs_score"` for an IQS model.
        procedure (`str`): `"default"`, or `"paper"`: the published rule on clusters of the score-sorted rows, which
            also writes the original's three files; or another key of `PROCEDURES`.
        rule (`str`): `"car"`, the best rows by score and of every cluster; or `"gain"`, the rows that add most to what
            the selection covers, by a concave gain of cluster mass.
        like (`str`, *optional*): a file of example rows, or a dataset on the Hub. Rows are then ranked by how near they are
            to the examples, in a round robin, and not by score, and clusters give none of their own.
        duplicates (`str`, *optional*): `"drop"` leaves out near-duplicates of a better row, `"only-exact"` only rows
            that are equal but for case and punctuation, `"keep"` none; None takes what the procedure says.
        against (`tuple[str, ...]`): evaluation sets, files or datasets on the Hub; rows that give away one of their
            items are left out.
        keep, drop (`str`, *optional*): rows that must be selected, and rows that must not be: a boolean column of the
            data, or a file of these rows, found by the index column if it has that, else by their content. Kept rows
            count towards budget, quotas and the rows of their cluster.
        within (`str`, *optional*): rank the rows within each value of this column, as `languages="within"` does within
            each language; `"language"` and `"kind"` (of task) are found if the data has no such column.
        balance (`str`, *optional*): select equal shares of each value of this column; what a value cannot use is
            passed on to the others.
        quota (`str`, *optional*): shares by value of a column, as in `"source=code:0.2,chat:0.5"`. The rest of the budget
            is open to all other values.
        budget_tokens (`int` or `str`, *optional*): the most tokens that the selected rows may have, such as 500000,
            `"500k"` or `"2M"`, in place of n1 and budget.
        budget_tokenizer (`str`, *optional*): count them by this tokenizer, a Hub id or a folder; None takes the counts
            of the scorer.
        tokenizer (`str`, *optional*): the base model's tokenizer, for a scorer in the original's layout.
        batch_tokens (`int`, *optional*): padded tokens in one forward pass; None chooses by the device.
        embedding_dtype (`str`): type of the embedding column: `"float32"` or `"float16"`.
        compile (`bool`): compile the encoder from the first text on. In half precision on a GPU it is compiled anyway,
            once a run is long enough to gain by it.
        engine (`str`, *optional*): a folder with the scorer's encoder in int8, for the CPU.
        keep_embeddings (`bool`): write the embeddings into `scored.parquet`, to cluster it again later.
        projection (`str`): projection of the map in plots and page: `"pca"`, `"tsne"`, or `"umap"` (needs umap-learn).
    """

    _called = "recipe"

    name: str | None = _setting(None, "Read this configuration of a Hub dataset.", SOURCE)
    split: str | None = _setting(
        None,
        "Read this split, a slice such as train[:10%], or all. A source with a single split needs no name.",
        SOURCE,
    )
    revision: str | None = _setting(None, "Read this branch, tag or commit of a Hub dataset.", SOURCE)
    glob: bool = _setting(
        False, "Read SOURCE as a pattern with * ? [ ] if there is no such path, and all files that fit it.", SOURCE
    )
    schema: str = _setting(
        "auto",
        f"Read the columns of this schema: {listed(SCHEMAS)}. With auto, the column names tell which one it is.",
        SOURCE,
    )
    columns: Mapping[str, str] | tuple[tuple[str, str], ...] = _setting(
        (),
        f"Name columns that are called differently, as in instruction=task,response=answer. A key is {listed(ROLE_NAMES)}.",
        SOURCE,
    )
    index_column: str = _setting(
        NAMES.index,
        "This column identifies a row; the row's number is added under this name if it is missing.",
        COLUMNS,
    )
    on_invalid: str = _setting(
        "error", "Say what to do with rows that cannot be scored: error refuses them, mark keeps them unscored.", SOURCE
    )
    scorer: str = _setting(
        revisions.DEFAULT_SCORER,
        "Score with this IQS model, a Hub id or a folder, or with another as reward:MODEL, ifd:MODEL or perplexity:MODEL.",
        SCORING,
    )
    scorer_revision: str | None = _setting(
        None, "Take this branch, tag or commit of the scorer, or expect this digest of its folder.", SCORING
    )
    template: str | None = _setting(
        None,
        f"Score the text as this template writes it: {listed(TEMPLATES)}.",
        SCORING,
        shown="the scorer's own",
    )
    turns: str = _setting("mean", "Combine the scores of a chat's exchanges by mean, min, sum or last.", SCORING)
    uncertainty: bool = _setting(
        False, "Also add the standard deviation over the members of the scorer's head.", SCORING
    )
    parts: bool = _setting(
        False, "Also add what the scorer judges by part: expert, soundness, worth and the likeliest fault.", SCORING
    )
    score_thoughts: bool = _setting(
        False, "Put the thoughts of an answer, as in <think>, in front of it before it is scored.", SCORING
    )
    language_column: str | None = _setting(
        None, "Also add the language of each row, in a column of this name.", COLUMNS
    )
    languages: str = _setting(
        "refuse",
        "Say what to do if over 5 % of the rows are in languages that the scorer does not read: refuse ends the run, "
        "within ranks the rows of each language by themselves, across compares all scores.",
        SCORING,
    )
    dtype: str = _setting(
        "float32",
        "Run the encoder in float32, or in float16, bfloat16 or float8, which are faster on a GPU and less exact.",
        PERFORMANCE,
    )
    embedder: str | None = _setting(
        None, "Embed with this sentence-transformers model.", CLUSTERING, shown="the scorer's own encoder"
    )
    embedder_revision: str | None = _setting(None, "Take this branch, tag or commit of --embedder.", CLUSTERING)
    k: int | str = _setting(K, "Make this number of clusters, or int(sqrt(rows / 2)) of them with sqrt.", CLUSTERING)
    explained_variance: float = _setting(
        EXPLAINED_VARIANCE, "Cluster on the principal components that hold this share of the variance.", CLUSTERING
    )
    seed: int = _setting(SEED, "Seed k-means and the report's control samples with this number.", CLUSTERING)
    n_init: int = _setting(N_INIT, "Run k-means this many times, and keep the best run.", CLUSTERING)
    kmeans: str | None = _setting(
        None,
        "Run k-means in torch or, on all rows as in the paper, in sklearn.",
        CLUSTERING,
        shown="by procedure",
    )
    kmeans_sample: int = _setting(
        KMEANS_SAMPLE, "Fit on this many rows per cluster if there are more; 0 fits on all rows.", CLUSTERING
    )
    n1: int | float | None = _setting(
        None,
        "Take this many rows by score, or this share of them, such as 0.05.",
        SELECTION,
        shown="1000, but at most half of the scored rows",
    )
    n2: int = _setting(1, "Take this many rows from every cluster.", SELECTION)
    budget: int | None = _setting(
        None, "Take this many rows in total, in place of --n1, which then follows from it.", SELECTION
    )
    allow_worse: bool = _setting(
        False, "Accept a selection whose mean score is below that of the entire pool.", SELECTION
    )
    score_column: str = _setting(
        NAMES.score, "Name the score column.", COLUMNS, shown=f"{NAMES.score}, or that of another kind of scorer"
    )
    embedding_column: str = _setting(NAMES.embedding, "Name the embedding column.", COLUMNS)
    cluster_column: str = _setting(NAMES.cluster, "Name the cluster column.", COLUMNS)
    procedure: str = _setting(
        "default",
        "Follow the procedure default, or paper, which selects as the published code does, oddities included.",
        SELECTION,
    )
    rule: str = _setting(
        "car", "Select by the rule car, or by gain, which takes the rows that add most to what is covered.", SELECTION
    )
    like: str | None = _setting(
        None,
        "Rank the rows by how near they are to the examples in this file or Hub dataset, and not by score.",
        SELECTION,
    )
    duplicates: str | None = _setting(
        None,
        "Leave out near-duplicates of a better row with drop, equal rows alone with only-exact, none with keep.",
        MARKS,
        shown="by procedure",
    )
    against: tuple[str, ...] = _setting(
        (), "Leave out rows that give away an item of this evaluation set, a file or Hub dataset; repeat it.", MARKS
    )
    keep: str | None = _setting(
        None, "Select the rows of this file, or those for which this boolean column is true, in any case.", MARKS
    )
    drop: str | None = _setting(
        None, "Never select the rows of this file, or those for which this boolean column is true.", MARKS
    )
    within: str | None = _setting(
        None, "Rank the rows within each value of this column, or within each language or kind of task.", SHARES
    )
    balance: str | None = _setting(
        None, "Select equal shares of each value of this column, or of each language or kind.", SHARES
    )
    quota: str | None = _setting(
        None, "Select these shares by value of a column, as in source=code:0.2,chat:0.5; the rest is open.", SHARES
    )
    budget_tokens: int | str | None = _setting(
        None, "Select rows of so many tokens at most, such as 500k or 2M, in place of --n1 and --budget.", SHARES
    )
    budget_tokenizer: str | None = _setting(
        None,
        "Count the tokens of --budget-tokens by this tokenizer, a Hub id or a folder.",
        SHARES,
        shown="the scorer's",
    )
    tokenizer: str | None = _setting(
        None, "Name the base model's tokenizer, a folder or Hub id, for a scorer in the original's layout.", SCORING
    )
    batch_tokens: int | None = _setting(
        None, "Read this many tokens in one forward pass, padding included.", PERFORMANCE, shown="by device"
    )
    embedding_dtype: str = _setting("float32", "Store the embeddings as float32 or float16.", OUTPUT)
    compile: bool = _setting(
        False, "Compile the encoder from the first text on, for large datasets on a GPU.", PERFORMANCE
    )
    engine: str | None = _setting(
        None, "Score on the CPU with the int8 encoder in this folder, which `quantise` wrote.", PERFORMANCE
    )
    keep_embeddings: bool = _setting(True, "Keep the embeddings in scored.parquet.", OUTPUT, flag="--embeddings")
    projection: str = _setting(
        "pca", "Draw the map by the projection pca, tsne or umap, which needs the extra umap.", OUTPUT
    )

    def __post_init__(self) -> None:
        # A list from YAML or JSON, or a single name; the class is frozen, hence object.__setattr__.
        against = (self.against,) if isinstance(self.against, str) else self.against
        object.__setattr__(self, "against", tuple(against) if isinstance(against, list) else against)
        super().__post_init__()
        # A mapping cannot be hashed, and its order means nothing.
        object.__setattr__(self, "columns", as_column_names(self.columns))
        if self.languages not in CHOICES:
            raise ValueError(f"languages={self.languages!r} is not known; choose one of {CHOICES}.")
        if self.languages == "within" and self.procedure == "paper":
            raise ValueError("languages='within' needs another procedure: procedure='paper' compares all scores.")
        if self.embedder_revision is not None and self.embedder is None:
            raise ValueError(
                f"embedder_revision={self.embedder_revision!r} needs an embedder=... that it is a revision of."
            )
        refuse_two_amounts(self.n1, self.budget)
        self._check_scorer()
        self._check_choices()
        self._check_shares()

    def _check_scorer(self) -> None:
        """Take the columns of another kind of scorer; raise ValueError for an option that only an IQS model has."""
        name = read_name(self.scorer)
        refuse_judge(name)
        object.__setattr__(self, "scorer", str(name))
        if name.kind == IQS:
            return
        own = ("template", "turns", "uncertainty", "parts", "tokenizer", "compile", "engine")
        given = [each for each in own if getattr(self, each) != getattr(type(self), each)]
        if self.dtype == "float8" or given:
            option = given[0] if given else "dtype"
            raise ValueError(
                f"{option}={getattr(self, option)!r} is for an IQS model, and scorer={self.scorer!r} is of another kind. "
                + (f"Leave {option} out." if given else "Choose float32, bfloat16 or float16.")
            )
        if self.score_column == NAMES.score:
            object.__setattr__(self, "score_column", SCORERS[name.kind].column)

    def _check_choices(self) -> None:
        """Raise ValueError if a setting of the selection is not one of its words, or needs another one."""
        for name, choices in (("duplicates", (None, "drop", "keep", "only-exact")), ("rule", ("car", "gain"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known; choose one of {choices}.")
        blank = [name for name in ("keep", "drop", "like", "within", "balance") if getattr(self, name) == ""]
        if blank or not all(isinstance(each, str) and each for each in self.against):
            raise ValueError(f"{(blank or ['against'])[0]} is empty: name a file or a column, or leave it out.")
        if self.keep is not None and self.keep == self.drop:
            raise ValueError(
                f"keep={self.keep!r} and drop are the same: a row cannot be both. Leave one of the two out."
            )
        others = ("rule", "keep", "balance", "quota", "budget_tokens", "like")
        if self.is_limited and self.procedure != "default":
            given = [name for name in others if getattr(self, name) not in (None, "car")]
            raise ValueError(
                f"{given[0]}={getattr(self, given[0])!r} needs procedure='default': procedure={self.procedure!r} selects "
                "by a rule of its own."
            )
        if self.within and self.procedure == "paper":
            raise ValueError(f"within={self.within!r} needs another procedure: procedure='paper' compares all scores.")
        if self.like is not None and (self.rule == "gain" or self.within or self.languages == "within"):
            raise ValueError(
                f"like={self.like!r} ranks by examples, and neither by gain nor within groups: leave out rule, within and "
                "languages='within', or like."
            )

    def _check_shares(self) -> None:
        """Raise ValueError if shares or a budget in tokens cannot be read, or are given twice."""
        if self.balance is not None and self.quota is not None:
            raise ValueError(f"balance={self.balance!r} and quota={self.quota!r}: leave one of the two out.")
        if self.within is not None and self.languages == "within":
            raise ValueError(
                f"within={self.within!r} and languages='within' both rank the rows: leave one of them out."
            )
        # Imported here, because the command line reads this class for its help.
        if self.quota is not None:
            from car_datasets.selection.strata import parse_quota

            parse_quota(self.quota)
        if self.budget_tokens is None:
            if self.budget_tokenizer is not None:
                raise ValueError(f"budget_tokenizer={self.budget_tokenizer!r} needs budget_tokens=... to count for.")
            return
        from car_datasets.selection.limits import parse_tokens

        parse_tokens(self.budget_tokens)
        if self.n1 is not None or self.budget is not None:
            raise ValueError(
                f"budget_tokens={self.budget_tokens!r} with n1={self.n1} and budget={self.budget}: with a budget in tokens, "
                "the number of rows follows from it. Leave n1 and budget out."
            )

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], **changes: Any) -> "Recipe":
        """Read a recipe from a YAML file; `changes` win over the file; an n1 also replaces its budget, and a budget its n1.

        Raises:
            ValueError: the file is not YAML, or holds a key that is not a field (the message names the nearest field).
        """
        return super().from_yaml(path).changed(**changes)

    def changed(self, **changes: Any) -> "Recipe":
        """Return a copy with other values.

        Another scorer does not keep revision, tokenizer and engine of the previous one, nor one of another kind the
        default name of its score, and another embedder not the revision. A new n1, budget or budget_tokens replaces the
        other two.

        Raises:
            ValueError: a name is not a field, or a value does not have the field's type.
        """
        # Values that are given along with the new model win over these resets.
        if changes.get("scorer", self.scorer) != self.scorer:
            if self.score_column == SCORERS[read_name(self.scorer).kind].column:
                changes = {"score_column": NAMES.score, **changes}  # which then becomes that of the new kind
            changes = {"scorer_revision": None, "tokenizer": None, "engine": None, **changes}
        if changes.get("embedder", self.embedder) != self.embedder:
            changes = {"embedder_revision": None, **changes}
        amounts = ("n1", "budget", "budget_tokens")
        for name in amounts:
            if changes.get(name) is not None:
                changes = {**{other: None for other in amounts if other != name}, **changes}
        return super().changed(**changes)

    @property
    def names(self) -> ColumnNames:
        """Return the names of the columns that the stages add."""
        # Ranking within languages needs the column, so it is added even if nobody has named it.
        language = self.language_column or (LANGUAGE_COLUMN if self.languages == "within" else "")
        return ColumnNames(self.score_column, self.cluster_column, self.index_column, self.embedding_column, language)

    @property
    def further_columns(self) -> tuple[str, ...]:
        """Return the columns that only the recipe's kind of scorer adds, such as `ifd` next to `ifd_score`."""
        return read_name(self.scorer).further_columns(self.score_column)

    @property
    def is_limited(self) -> bool:
        """Return True if the selection keeps bounds that CaR's rule by itself does not know."""
        bounds = (self.keep, self.balance, self.quota, self.budget_tokens, self.like)
        return self.rule != "car" or any(bound is not None for bound in bounds)

    @property
    def has_pins(self) -> bool:
        """Return True if some rows must be selected, or must not be."""
        return self.keep is not None or self.drop is not None

    @property
    def grouped_by(self) -> tuple[str, ...]:
        """Return the columns whose values are the groups of `within`, `balance` and `quota`, each once."""
        from car_datasets.selection.strata import parse_quota

        columns = (self.within, self.balance, None if self.quota is None else parse_quota(self.quota)[0])
        return tuple(dict.fromkeys(column for column in columns if column is not None))

    def amounts_of(self, rows: int) -> "Amounts":
        """Return how many rows to select from a pool with so many scored rows."""
        from car_datasets.selection.procedures import Amounts

        # The default depends on the scored rows, so it is not known before they are counted.
        n1 = default_n1(rows) if self.n1 is self.budget is self.budget_tokens is None else self.n1
        return Amounts(n1, self.n2, self.budget, self.allow_worse)

    @property
    def kmeans_engine(self) -> str:
        """Return `kmeans`, or the engine of the procedure if that is None."""
        from car_datasets.selection.procedures import find_procedure

        return self.kmeans or find_procedure(self.procedure).kmeans

    @property
    def marking(self) -> str:
        """Return `duplicates`, or what the procedure says if that is None: `"drop"`, `"only-exact"` or `"keep"`."""
        from car_datasets.selection.procedures import find_procedure

        return self.duplicates or find_procedure(self.procedure).duplicates


def column_names_in(settings: Mapping[str, Any]) -> ColumnNames:
    """Return the names of columns among the settings of a receipt, also of a version with settings unknown to this one."""
    return Recipe().changed(**{name: value for name, value in settings.items() if name.endswith("_column")}).names
