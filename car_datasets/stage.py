"""`Stage`: the interface shared by scorers, embedders and other callables that add columns.

Does: state the protocol that shards, estimates, Ray and the certificate rely on.
Does not: know any one stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from datasets import Features


@runtime_checkable
class Stage(Protocol):
    """A callable for `dataset.map(stage, batched=True, with_rank=True)` that returns new columns only.

    Implement it as a frozen dataclass of plain values, so that equal stages have equal fingerprints in every process. Model
    weights belong in a module-level cache, never in a field. [`QualityScorer`] and [`TextEmbedder`] are stages.

    A stage may also have a method `read_columns(column_names) -> list[str]`: it is then given those columns alone, and a run
    in shards is bound to their content. Without it, the stage is given all columns.
    """

    @property
    def output_columns(self) -> tuple[str, ...]:
        """Return the names of the columns that the stage adds."""

    def output_features(self) -> Features:
        """Return the types of the columns that the stage adds."""

    def __call__(self, batch: Mapping[str, Any], rank: int | None = None) -> dict[str, Any]:
        """Return the new columns for a batch of columns; `rank` is the index of the process."""
