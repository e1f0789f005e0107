"""How well scores tell better from worse, with intervals: pure arithmetic on arrays, no model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.floating[Any]]
Figures = dict[str, dict[str, float]]  # name -> value, low, high


def pair_metrics(worse: Scores, better: Scores, threshold: float = 0.5) -> dict[str, float]:
    """The four figures of a file of pairs.

    Args:
        worse, better (`(pairs,)` float): scores of the two halves.
        threshold (`float`): a row is called good above it.

    Returns:
        `dict`: `rows`, share of rows on the right side of the threshold (the definition that CaR's 84.25 % most likely
        has); `pairs`, share of pairs whose better half scores higher, ties counted half; `kendall`, tau-b of scores
        and 0/1 labels, CaR's criterion for choosing a checkpoint; `auc`, share of all (worse, better) combinations in
        the right order.
    """
    auc = _auc(worse, better)
    return {
        "rows": float((np.mean(worse <= threshold) + np.mean(better > threshold)) / 2),
        "pairs": float(np.mean(better > worse) + np.mean(better == worse) / 2),
        "kendall": _tau_b(worse, better, auc),
        "auc": auc,
    }


def kendall(scores: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Tau-b of scores and graded labels (`scipy.stats.kendalltau`); 0 where either is constant."""
    from scipy.stats import kendalltau

    found = float(kendalltau(np.asarray(scores), np.asarray(labels)).statistic)
    return 0.0 if math.isnan(found) else found


def best_threshold(worse: Scores, better: Scores) -> float:
    """The threshold with the highest row accuracy on these rows; the middle one if several are equally good."""
    ordered = np.unique(np.concatenate([worse, better]))
    between = np.append((ordered[1:] + ordered[:-1]) / 2, ordered[-1])  # the last one calls no row good
    wrong_worse = len(worse) - np.searchsorted(np.sort(worse), between, side="right")
    wrong_better = np.searchsorted(np.sort(better), between, side="right")
    wrong = wrong_worse + wrong_better
    best = np.flatnonzero(wrong == wrong.min())
    return float(between[best[len(best) // 2]])


def with_intervals(
    measure: Callable[[npt.NDArray[np.int64]], Mapping[str, float]], pairs: int, samples: int = 1000, seed: int = 0
) -> Figures:
    """A measure of pairs and its 95 % percentile interval, by a bootstrap that draws whole pairs.

    Args:
        measure (`Callable`): positions of pairs, shape `(pairs,)`, to named figures.
        pairs (`int`): how many there are.
        samples, seed (`int`): of the bootstrap.

    Returns:
        `dict`: per figure `value`, `low` and `high`.

    Raises:
        ValueError: `samples` is below 1.
    """
    if samples < 1:
        raise ValueError(f"samples={samples} must be at least 1.")
    rng = np.random.default_rng(seed)
    value = measure(np.arange(pairs))
    drawn = [measure(rng.integers(pairs, size=pairs)) for _ in range(samples)]
    figures = {}
    for name, at in value.items():
        low, high = np.percentile([d[name] for d in drawn], [2.5, 97.5])
        figures[name] = {"value": at, "low": float(low), "high": float(high)}
    return figures


def _auc(worse: Scores, better: Scores) -> float:
    ordered = np.sort(worse)
    below = np.searchsorted(ordered, better, side="left") + np.searchsorted(ordered, better, side="right")
    return float(below.mean() / (2 * len(worse)))


def _tau_b(worse: Scores, better: Scores, auc: float) -> float:
    """Tau-b against two classes is a scaled AUC: (2 AUC - 1) n1 n2 / sqrt(n1 n2 x pairs without a tied score)."""
    n1, n2 = len(worse), len(better)
    counts = np.unique(np.concatenate([worse, better]), return_counts=True)[1].astype(np.int64)
    total = (n1 + n2) * (n1 + n2 - 1) // 2
    untied = total - int((counts * (counts - 1) // 2).sum())
    return float((2 * auc - 1) * n1 * n2 / math.sqrt(n1 * n2 * untied)) if untied else 0.0
