"""Name scorers in one word, as a command line does: `find_scorer("ifd:HuggingFaceTB/SmolLM2-135M")`.

Does: make the stage of a kind and a model.
Does not: take the further settings of each kind, or score.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from car_datasets.scoring.perplexity import IFDScorer, PerplexityScorer
from car_datasets.scoring.reward import RewardScorer
from car_datasets.scoring.scorer import QualityScorer

IQS = "iqs"
# The column of scores of each is its `output_column`.
SCORERS: dict[str, Callable[..., Any]] = {
    IQS: QualityScorer,
    "reward": RewardScorer,
    "ifd": IFDScorer,
    "perplexity": PerplexityScorer,
}


def find_scorer(name: str, token: str | None = None, **settings: Any) -> Any:
    """Return the scorer that a name such as `"reward:OWNER/MODEL"` means.

    Args:
        name (`str`): a key of [`SCORERS`], a colon and a model, on the Hub or in a folder; a model alone is an IQS model.
        token (`str`, *optional*): for a private model.
        settings: further arguments of the scorer.

    Returns:
        the stage, whose scores are in the column of its field `output_column`.

    Raises:
        ValueError: the name has no model, or the model is not of this kind.
    """
    kind, model = kind_of(name)
    if not model:
        raise ValueError(f"{name!r} names no model; write {kind}:MODEL, a Hub id or a folder.")
    return SCORERS[kind](model, token=token, **settings)


def kind_of(name: str) -> tuple[str, str]:
    """Return the kind and the model of a name.

    Args:
        name (`str`): as of [`find_scorer`].

    Returns:
        a key of [`SCORERS`], and the model, which may be `""`.
    """
    kind, colon, model = name.partition(":")
    return (kind, model) if colon and kind in SCORERS else (IQS, name)
