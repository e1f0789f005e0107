"""What a bag of words can do: the baseline that reads no sentence, and the detector of labels that leak.

Does: fit a logistic regression on which words and signs a text holds; rank pairs by it; name what gives the label away.
Does not: read order, meaning, or how often a word occurs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

# Words, typed-out escapes (before the words, which would swallow their letter), line breaks and single signs.
TOKEN = r"\\u[0-9a-fA-F]{4}|\\.|\w+|\n|[^\w\s]"


class Clue(NamedTuple):
    """A token that speaks for one side: share of worse and of better texts that hold it, and its weight (> 0: better)."""

    token: str
    worse: float
    better: float
    weight: float


def fit_probe(worse: Sequence[str], better: Sequence[str]) -> Any:
    """A scikit-learn pipeline of a binary bag of words and a logistic regression, fitted to tell the two apart."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    probe = make_pipeline(
        CountVectorizer(binary=True, token_pattern=TOKEN, min_df=2),
        LogisticRegression(C=0.1, solver="liblinear", random_state=0),
    )
    return probe.fit([*worse, *better], np.repeat([0, 1], [len(worse), len(better)]))


def probe_scores(probe: Any, texts: Sequence[str]) -> npt.NDArray[np.float64]:
    """Probability that a text is the better half of its pair, by the probe."""
    return np.asarray(probe.predict_proba(list(texts))[:, 1])


def cross_validated(
    worse: Sequence[str], better: Sequence[str], groups: Sequence[int] | None = None, folds: int = 5
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Probe scores of both halves, each by a probe that has not seen the pair, nor any other of its group.

    Args:
        worse, better (`Sequence[str]`): the halves of the pairs.
        groups (`Sequence[int]`, *optional*): pairs of one group stay in one fold; by default each pair is one.
        folds (`int`): at most as many as there are groups.

    Raises:
        ValueError: there are fewer than two groups.
    """
    from sklearn.model_selection import GroupKFold

    groups = range(len(worse)) if groups is None else groups
    count = len(set(groups))
    if count < 2:
        raise ValueError(f"A probe needs pairs of at least 2 groups, found {count}.")
    found = np.empty((2, len(worse)))
    splitter = GroupKFold(min(folds, count))
    for known, unseen in splitter.split(np.zeros(len(worse)), groups=np.asarray(groups)):
        probe = fit_probe([worse[i] for i in known], [better[i] for i in known])
        found[0, unseen] = probe_scores(probe, [worse[i] for i in unseen])
        found[1, unseen] = probe_scores(probe, [better[i] for i in unseen])
    return found[0], found[1]


def clues(worse: Sequence[str], better: Sequence[str], top: int = 10) -> list[Clue]:
    """The tokens that give the label away most: of the heaviest weights, those that also part the texts."""
    probe = fit_probe(worse, better)
    counter, model = probe[0], probe[-1]
    names = counter.get_feature_names_out()
    shares = [np.asarray(counter.transform(list(side)).mean(axis=0)).ravel() for side in (worse, better)]
    weights = model.coef_[0]
    order = np.argsort(-np.abs(weights * (shares[1] - shares[0])), kind="stable")[:top]
    return [Clue(str(names[i]), float(shares[0][i]), float(shares[1][i]), float(weights[i])) for i in order]
