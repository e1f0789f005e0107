"""Compute how well scores separate better from worse answers, with bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

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
    measure: Callable[[npt.NDArray[np.int64]], Mapping[str, float]], pairs: int, samples: int = 1000, seed: int = 0
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
        raise ValueError(f"samples={samples} must be at least 1; 1000 is the default.")
    rng = np.random.default_rng(seed)
    value = measure(np.arange(pairs))
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
