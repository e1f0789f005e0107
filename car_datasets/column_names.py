"""`ColumnNames`: the names of the columns that the stages add, and of those that follow from them.

Does: say once what every column is called.
Does not: read or check columns.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ColumnNames:
    """The names of the columns that scoring, embedding and clustering add to a dataset.

    Args:
        score (`str`): quality score, float32. The diagnostics of the scorer are named after it.
        cluster (`str`): k-means label, int32. The distance to the centroid is named after it.
        index (`str`): what identifies a row: its position in the source, or an id column of the dataset.
        embedding (`str`): sentence embedding, a list of float32 or float16.

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

    @property
    def _stem(self) -> str:
        return self.score.removesuffix("_score")

    @property
    def tokens(self) -> str:
        """Return the name of the length of the scored text in tokens, int32."""
        return f"{self._stem}_tokens"

    @property
    def truncated(self) -> str:
        """Return the name of the flag for a text that was longer than the scorer reads, bool."""
        return f"{self._stem}_truncated"

    @property
    def status(self) -> str:
        """Return the name of the reason why a row has no score, or deserves a look, string."""
        return f"{self._stem}_status"

    @property
    def std(self) -> str:
        """Return the name of the disagreement between the members of the scorer's head, float32."""
        return f"{self.score}_std"

    @property
    def distance(self) -> str:
        """Return the name of the distance to the centroid after PCA, float32."""
        return f"{self.cluster}_distance"

    @property
    def diagnostics(self) -> tuple[str, ...]:
        """Return the columns that follow from the score column and the cluster column."""
        return (self.tokens, self.truncated, self.status, self.std, self.distance)
