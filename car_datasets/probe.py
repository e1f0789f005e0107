"""Fit a bag-of-words probe: a baseline for scorers, and a detector of labels that leak through single tokens.

Does: fit a logistic regression on the set of tokens in a text, rank pairs, name the tokens that reveal the label.
Does not: use the order, meaning or number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

# Typed-out escapes (before words, which would otherwise take their letter), words, line breaks and single signs.
TOKEN = r"\\u[0-9a-fA-F]{4}|\\.|\w+|\n|[^\w\s]"


class Clue(NamedTuple):
    """A token that reveals a label: shares of worse and better texts that contain it, and its weight (> 0: better)."""

    token: str
    worse: float
    better: float
    weight: float


def fit_probe(worse: Sequence[str], better: Sequence[str]) -> Any:
    """Return a scikit-learn pipeline, a binary bag of words and a logistic regression, fitted to tell both apart."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    probe = make_pipeline(
        CountVectorizer(binary=True, token_pattern=TOKEN, min_df=2),
        LogisticRegression(C=0.1, solver="liblinear", random_state=0),
    )
    return probe.fit([*worse, *better], np.repeat([0, 1], [len(worse), len(better)]))


def probe_scores(probe: Any, texts: Sequence[str]) -> npt.NDArray[np.float64]:
    """Return the probe's probability that each text is the better half of its pair, shape (texts,)."""
    return np.asarray(probe.predict_proba(list(texts))[:, 1])


def cross_validated(
    worse: Sequence[str], better: Sequence[str], groups: Sequence[int] | None = None, folds: int = 5
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return cross-validated probe scores of both halves, shape (pairs,) each.

    Args:
        worse, better (`Sequence[str]`): the halves of the pairs.
        groups (`Sequence[int]`, *optional*): group of each pair; pairs of one group stay in one fold. By default, each
            pair is a group of its own.
        folds (`int`): number of folds; reduced to the number of groups if there are fewer.

    Raises:
        ValueError: there are fewer than two groups.
    """
    from sklearn.model_selection import GroupKFold

    groups = range(len(worse)) if groups is None else groups
    count = len(set(groups))
    if count < 2:
        raise ValueError(f"groups: a cross-validated probe needs pairs of at least 2 groups, found {count}; add pairs.")
    scores = np.empty((2, len(worse)))
    splitter = GroupKFold(min(folds, count))
    for known, unseen in splitter.split(np.zeros(len(worse)), groups=np.asarray(groups)):
        probe = fit_probe([worse[i] for i in known], [better[i] for i in known])
        scores[0, unseen] = probe_scores(probe, [worse[i] for i in unseen])
        scores[1, unseen] = probe_scores(probe, [better[i] for i in unseen])
    return scores[0], scores[1]


def clues(worse: Sequence[str], better: Sequence[str], top: int = 10) -> list[Clue]:
    """Return the most revealing tokens: those with a large weight and different shares on both sides."""
    probe = fit_probe(worse, better)
    counter, model = probe[0], probe[-1]
    tokens = counter.get_feature_names_out()
    shares = [np.asarray(counter.transform(list(side)).mean(axis=0)).ravel() for side in (worse, better)]
    weights = model.coef_[0]
    # Weight alone would favour rare tokens.
    order = np.argsort(-np.abs(weights * (shares[1] - shares[0])), kind="stable")[:top]
    return [Clue(str(tokens[i]), float(shares[0][i]), float(shares[1][i]), float(weights[i])) for i in order]
