"""`ColumnNames`: the names of the columns that the stages add.

Does: state each name once; the defaults of arguments such as `score_column` come from here.
Does not: read or check columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from car_datasets.utils.digests import public


def further_column(score: str, number: str) -> str:
    """Return the name of the column of plain numbers of which a score is made, such as `ifd` of `ifd_score`.

    Args:
        score (`str`): the column of scores.
        number (`str`): what the number is; `quality` gives `quality_ratio`, as the name without `_score` is taken.
    """
    stem = score.removesuffix("_score")
    return stem if stem != score else f"{stem}_{number}"


@public
@dataclass(frozen=True)
class ColumnNames:
    """The names of the columns that scoring, embedding and clustering add to a dataset.

    Args:
        score (`str`): quality score, float32. The diagnostics of the scorer are named after it.
        cluster (`str`): k-means label, int32. The distance to the centre is named after it.
        index (`str`): identity of a row: its position in the source, or an id column of the dataset.
        embedding (`str`): sentence embedding, a list of float32 or float16.
        language (`str`): code of the row's language, text; `""` if there is no such column.

    Example:
    ```python
    >>> ColumnNames(score="my_score").tokens
    'my_tokens'
    ```
    """

    score: str = "iqs_score"
    cluster: str = "cluster"
    index: str = "source_index"
    embedding: str = "embedding"
    language: str = ""

    # What says of a row that it may not be selected, must be, or belongs somewhere. These names are fixed, so that
    # `select` and `verify` find the columns in any file.

    #: The index of the row that is kept instead of this copy, or null; of the type of the index column.
    duplicate_of: ClassVar[str] = "duplicate_of"
    #: How similar the two are, 0 to 1, float32, or null.
    duplicate_similarity: ClassVar[str] = "duplicate_similarity"
    #: The evaluation item that the row gives away, as `SET:ITEM`, or null; string.
    contaminated_by: ClassVar[str] = "contaminated_by"
    #: The share of this item that the row covers, 0 to 1, float32.
    contaminated_share: ClassVar[str] = "contaminated_share"
    #: `"keep"` for a row that must be selected, `"drop"` for one that must not be, or null; string.
    pinned: ClassVar[str] = "pinned"
    #: The three nearest clusters, nearest first, a list of int32.
    near_clusters: ClassVar[str] = "near_clusters"
    #: The row's soft memberships in them, of sum 1, a list of float32.
    near_weights: ClassVar[str] = "near_weights"
    #: The row's place in a round robin over examples, from 1, or null without an embedding; int64.
    like_rank: ClassVar[str] = "like_rank"
    #: The kind of task of the row; string.
    kind: ClassVar[str] = "kind"
    #: Tokens of prompt and answer by the tokenizer of a budget, int64, or null for a row without text.
    budget_tokens: ClassVar[str] = "budget_tokens"
    #: All of these but the kind, which is a property of the row and not of a selection.
    marks: ClassVar[tuple[str, ...]] = (
        pinned,
        contaminated_by,
        contaminated_share,
        duplicate_of,
        duplicate_similarity,
        near_clusters,
        near_weights,
        like_rank,
        budget_tokens,
    )

    @property
    def _stem(self) -> str:
        # "iqs_score" gives "iqs_tokens"; a name without the suffix, such as "quality", gives "quality_tokens".
        return self.score.removesuffix("_score")

    # What a scorer with parts says of a row; the names are those of the score's stem, as `iqs_expert`.

    @property
    def expert(self) -> str:
        """Return the name of the column of probabilities that an expert has revised the answer, float32."""
        return f"{self._stem}_expert"

    @property
    def soundness(self) -> str:
        """Return the name of the column of expected ratings of soundness, 0 to 10, float32."""
        return f"{self._stem}_soundness"

    @property
    def worth(self) -> str:
        """Return the name of the column of expected ratings of worth, 0 to 10, float32."""
        return f"{self._stem}_worth"

    @property
    def fault(self) -> str:
        """Return the name of the column of likeliest faults, string."""
        return f"{self._stem}_fault"

    @property
    def parts(self) -> tuple[str, ...]:
        """Return the names of the columns that a scorer with parts adds on request."""
        return (self.expert, self.soundness, self.worth, self.fault)

    # The next three describe the text that was scored, so they are named after the stem; `std` belongs to the score.

    @property
    def tokens(self) -> str:
        """Return the name of the column of lengths of the scored text in tokens, int32."""
        return f"{self._stem}_tokens"

    @property
    def truncated(self) -> str:
        """Return the name of the column that flags texts longer than the scorer reads, bool."""
        return f"{self._stem}_truncated"

    @property
    def status(self) -> str:
        """Return the name of the column of reasons why a row has no score, or deserves a look, string."""
        return f"{self._stem}_status"

    @property
    def std(self) -> str:
        """Return the name of the column of standard deviations over the members of the scorer's head, float32."""
        return f"{self.score}_std"

    @property
    def within(self) -> str:
        """Return the name of the column that ranks within languages or other groups, the share that scores worse, float64."""
        return f"{self.score}_within"

    @property
    def distance(self) -> str:
        """Return the name of the column of distances to the cluster's centre after PCA, float32."""
        return f"{self.cluster}_distance"

    @property
    def diagnostics(self) -> tuple[str, ...]:
        """Return the names of the columns that scoring and clustering add next to score and label."""
        return (self.tokens, self.truncated, self.status, self.std, *self.parts, self.distance)
