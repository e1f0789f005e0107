"""Measure how well scores separate better from worse answers, with bootstrap intervals and a bag-of-words baseline.

Does: rank pairs and rows; fit a logistic regression on the set of tokens in a text, and name the tokens that reveal the
label. Does not: run a scorer, or use the order, meaning or number of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from car_datasets.utils.settings import BOOTSTRAP_SAMPLES

Scores = npt.NDArray[np.floating[Any]]
Figures = dict[str, dict[str, float]]  # name -> value, low and high end of its interval


def pair_metrics(worse: Scores, better: Scores, threshold: float = 0.5) -> dict[str, float]:
    """Return four accuracies of the scores of pairs.

    Args:
        worse, better (`(pairs,)` float): scores of the two halves.
        threshold (`float`): rows with a score above it count as good.

    Returns:
        `dict`: four shares or correlations by name.

        - `rows`: rows on the right side of the threshold, most likely the definition of CaR's 84.25 %.
        - `pairs`: pairs whose better half scores higher, ties counted half.
        - `kendall`: tau-b of scores and 0/1 labels, CaR's criterion for choosing a checkpoint.
        - `auc`: combinations (worse, better) of all rows in the right order, ties counted half.
    """
    auc = _auc(worse, better)
    return {
        "rows": float((np.mean(worse <= threshold) + np.mean(better > threshold)) / 2),
        "pairs": float(np.mean(better > worse) + np.mean(better == worse) / 2),
        "kendall": _tau_b(worse, better, auc),
        "auc": auc,
    }


def kendall(scores: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Return Kendall's tau-b of scores and graded labels (`scipy.stats.kendalltau`), or 0 if either is constant."""
    from scipy.stats import kendalltau

    tau = float(kendalltau(np.asarray(scores), np.asarray(labels)).statistic)
    # SciPy returns NaN for constant scores, by which no checkpoint could be compared.
    return 0.0 if math.isnan(tau) else tau


def best_threshold(worse: Scores, better: Scores) -> float:
    """Return the threshold with the highest row accuracy on these scores, the middle one of equally good ones."""
    # Accuracy only changes at a score, so midpoints between neighbouring scores are all that need trying.
    ordered = np.unique(np.concatenate([worse, better]))
    between = np.append((ordered[1:] + ordered[:-1]) / 2, ordered[-1])  # above the last one no row counts as good
    wrong_worse = len(worse) - np.searchsorted(np.sort(worse), between, side="right")
    wrong_better = np.searchsorted(np.sort(better), between, side="right")
    wrong = wrong_worse + wrong_better
    best = np.flatnonzero(wrong == wrong.min())
    return float(between[best[len(best) // 2]])


def with_intervals(
    measure: Callable[[npt.NDArray[np.int64]], Mapping[str, float]],
    pairs: int,
    samples: int = BOOTSTRAP_SAMPLES,
    seed: int = 0,
) -> Figures:
    """Return the figures of a measure with 95 % percentile intervals, by a bootstrap that resamples pairs.

    Pairs are drawn, not rows, because the two halves of a pair are not independent.

    Args:
        measure (`Callable`): maps indices of pairs, shape `(pairs,)`, to named figures.
        pairs (`int`): number of pairs.
        samples (`int`): bootstrap samples.
        seed (`int`): seed of the bootstrap.

    Returns:
        `dict`: `value`, `low` and `high` of each figure.

    Raises:
        ValueError: `samples` is below 1.
    """
    if samples < 1:
        raise ValueError(f"samples={samples} must be at least 1; {BOOTSTRAP_SAMPLES} is the default.")
    rng = np.random.default_rng(seed)
    value = measure(np.arange(pairs))
    # Resampled with replacement, as many pairs as there are.
    drawn = [measure(rng.integers(pairs, size=pairs)) for _ in range(samples)]
    figures = {}
    for name, at in value.items():
        low, high = np.percentile([d[name] for d in drawn], [2.5, 97.5])
        figures[name] = {"value": at, "low": float(low), "high": float(high)}
    return figures


# The bootstrap calls the next two functions 1,000 times for each set of figures. Both only sort, and are much faster
# than scikit-learn's `roc_auc_score` and SciPy's `kendalltau`, with which the tests compare them.


def _auc(worse: Scores, better: Scores) -> float:
    """Return the share of (worse, better) combinations in the right order, ties counted half."""
    ordered = np.sort(worse)
    # left: worse scores below; right: below or equal. Their mean counts ties half.
    below = np.searchsorted(ordered, better, side="left") + np.searchsorted(ordered, better, side="right")
    return float(below.mean() / (2 * len(worse)))


def _tau_b(worse: Scores, better: Scores, auc: float) -> float:
    """Return Kendall's tau-b of scores and two classes, which is a scaled AUC."""
    # (2 AUC - 1) n1 n2 / sqrt(n1 n2 x pairs of rows without a tied score)
    n1, n2 = len(worse), len(better)
    counts = np.unique(np.concatenate([worse, better]), return_counts=True)[1].astype(np.int64)
    total = (n1 + n2) * (n1 + n2 - 1) // 2
    untied = total - int((counts * (counts - 1) // 2).sum())
    return float((2 * auc - 1) * n1 * n2 / math.sqrt(n1 * n2 * untied)) if untied else 0.0


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
        # min_df: a token of one text alone reveals that text, not the label.
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
    # Deterministic, unlike a shuffled split.
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
