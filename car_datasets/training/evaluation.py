"""Evaluate a scorer on pairs: accuracy against two baselines, corrupted copies, and changes of style; the measures.

Does: measure accuracy on text as given and cleaned, how often a row outranks its corrupted copy, and how far a change
of style shifts the score, all with bootstrap intervals; fit a bag of words, and name the tokens that reveal the label.
Does not: train a scorer, or read files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from car_datasets.loading.templates import Exchange, Text, render
from car_datasets.training.corruptions import CORRUPTIONS, STYLES, corrupt
from car_datasets.training.pairs import Pair, as_given, cleaned, refuse_crossing
from car_datasets.utils.files import table_text, without_nan
from car_datasets.utils.settings import BOOTSTRAP_SAMPLES

if TYPE_CHECKING:
    from rich.table import Table

    from car_datasets.scoring.scorer import QualityScorer

Scores = npt.NDArray[np.floating[Any]]
Figures = dict[str, dict[str, float]]  # name -> value, low and high end of its interval
Halves = tuple[Scores, Scores]  # of the worse and of the better answers, (pairs,) each
TextHalves = tuple[list[Text], list[Text]]
KINDS = ("mismatched", *CORRUPTIONS)  # of corrupted copies
TEXTS_PER_STEP = 128  # texts between two steps of the progress bar
Measure = Callable[[npt.NDArray[np.int64]], Mapping[str, float]]  # indices of pairs -> figures


@dataclass(frozen=True)
class Evaluation:
    """The result of [`evaluate_scorer`]. Every figure is `{"value", "low", "high"}`: the value and its 95 % interval.

    Args:
        model, revision (`str`): id and immutable revision of the scorer.
        engine (`str`, *optional*): folder of the engine that ran the encoder; `None` for torch.
        pairs (`int`): number of pairs.
        threshold (`float`): score above which a row counts as good, for `rows`.
        threshold_from (`str`): `"fixed"` or `"chosen on other pairs"`.
        accuracy (`dict`): `"as given"` and `"cleaned"`, each with `rows`, the share of rows on the right side of the
            threshold; `pairs`, the share of pairs in the right order; `kendall`, tau-b of scores and 0/1 labels; `auc`,
            the share of all (worse, better) combinations in the right order.
        baselines (`dict`): the same for `"length"` (the longer text is better) and `"bag of words"`. `"length"` lacks
            `rows` unless other pairs gave it a threshold.
        bag_of_words_from (`str`): the data that the bag of words was trained on.
        corruptions (`dict`): for each kind, `outranked`, the share of rows that score higher than their own corrupted
            copy (a tie counts half), and `rows`, the number of rows that could be corrupted in this way.
        styles (`dict`): for each kind, `shift`, the mean of score(changed) - score(row) in standard deviations of the
            scores of all rows, and `rows`, the number of rows that could be changed.
        escapes (`dict`): comparison with the same text, its escapes typed out: `changed`, the number of scores that
            differ at all, `largest`, the largest difference, and `rows`, the number of texts that differ.
    """

    model: str
    revision: str
    engine: str | None
    pairs: int
    threshold: float
    threshold_from: str
    accuracy: dict[str, Figures]
    baselines: dict[str, dict[str, Figures]]
    bag_of_words_from: str
    corruptions: dict[str, dict[str, Any]]
    styles: dict[str, dict[str, Any]]
    escapes: dict[str, Any]

    def to_json(self) -> str:
        """Return all figures as JSON, with `null` for figures without a single row."""
        return json.dumps(without_nan(asdict(self)), indent=2, allow_nan=False)

    def to_tables(self) -> list[Table]:
        """Return three tables for a terminal: accuracy, corruptions, style."""
        from rich.table import Table

        by = "" if self.engine is None else f" in int8 ({self.engine})"
        title = table_text(f"{self.model}{by} on {self.pairs:,} pairs", "table.title")
        accuracy = Table(title=title, title_justify="left")
        for name in ("", "pairs", "rows", "Kendall tau-b", "AUC"):
            accuracy.add_column(name)
        for text, figures in self.accuracy.items():
            accuracy.add_row(f"scorer, text {text}", *_accuracy_cells(figures))
        for baseline, by_text in self.baselines.items():
            for text, figures in by_text.items():
                accuracy.add_row(f"{baseline}, text {text}", *_accuracy_cells(figures))
        accuracy.caption = table_text(
            f"rows: threshold {self.threshold:.3f} ({self.threshold_from}); bag of words: {self.bag_of_words_from}; "
            "[95 % interval]",
            "table.caption",
        )
        corruptions = Table("corruption", "row outranks its copy", "rows", title_justify="left")
        for kind, row in self.corruptions.items():
            corruptions.add_row(kind, as_percent(row["outranked"]), f"{row['rows']:,}")
        styles = Table("change of style", "shift in standard deviations", "rows", title_justify="left")
        for kind, row in self.styles.items():
            styles.add_row(kind, as_number(row["shift"], "+.3f"), f"{row['rows']:,}")
        changed = f"{self.escapes['changed']:,} scores change, by {self.escapes['largest']:.2g} at most"
        styles.add_row("escapes typed out", changed, f"{self.escapes['rows']:,}")
        return [accuracy, corruptions, styles]


def _accuracy_cells(figures: Figures) -> list[str]:
    rows = as_percent(figures["rows"]) if "rows" in figures else "-"
    return [as_percent(figures["pairs"]), rows, as_number(figures["kendall"], ".3f"), as_number(figures["auc"], ".3f")]


def as_percent(figure: Mapping[str, float]) -> str:
    """Return a share with its interval, in percent."""
    return f"{100 * figure['value']:.1f} % [{100 * figure['low']:.1f}, {100 * figure['high']:.1f}]"


def as_number(figure: Mapping[str, float], form: str) -> str:
    """Return a figure with its interval, each in a format such as `".3f"`."""
    return f"{figure['value']:{form}} [{figure['low']:{form}}, {figure['high']:{form}}]"


def evaluate_scorer(
    scorer: QualityScorer,
    pairs: Sequence[Pair],
    *,
    other: Sequence[Pair] = (),
    samples: int = BOOTSTRAP_SAMPLES,
    seed: int = 0,
) -> Evaluation:
    """Evaluate a scorer on pairs of a worse and a better answer.

    Args:
        scorer ([`QualityScorer`]): the scorer; text is rendered with its own template.
        pairs (`Sequence[Pair]`): the pairs, as read by [`read_pairs`].
        other (`Sequence[Pair]`, *optional*): other pairs of the same kind, such as the training file. They choose the
            thresholds of row accuracy and train the bag of words. Without them the threshold is 0.5 and the bag of
            words is cross-validated on `pairs`.
        samples (`int`): bootstrap samples for each interval; pairs are drawn, not rows.
        seed (`int`): seed of bootstrap and corruptions.

    Raises:
        ValueError: there are fewer than 2 pairs, `other` shares instructions with them, `samples` is below 1, or a
            score is not finite.
    """
    # Here, because `prepare` and the trainer use only the measures of this module, and start in half the time without it.
    from datasets.utils import tqdm

    if len(pairs) < 2:
        raise ValueError(f"pairs: {len(pairs)} given; intervals need at least 2. Add pairs.")
    # Thresholds and bag of words from rows with the same questions would measure memory.
    refuse_crossing([r for p in other for r in p], [r for p in pairs for r in p], ("other", "pairs"))

    def figures(measure: Measure, count: int = len(pairs)) -> Figures:
        return with_intervals(measure, count, samples, seed)

    def accuracy(halves: Halves, threshold: float | None) -> Figures:
        by_name = figures(lambda at: pair_metrics(halves[0][at], halves[1][at], threshold or 0.0))
        # Without a threshold the share of rows on its right side means nothing.
        return {name: figure for name, figure in by_name.items() if name != "rows" or threshold is not None}

    rows = [row for pair in pairs for row in pair]
    # As given and cleaned, every copy, and twice for the escapes.
    count = len(rows) * (2 + len(KINDS) + len(STYLES) + 2) + 2 * len(other)
    with tqdm(total=count, desc="Scoring", unit=" texts") as bar:
        reader = _Reader(scorer, bar)
        given, clean_text = _texts(pairs, as_given), _texts(pairs, lambda row: _cleaned_text(row, scorer))
        cleaned_halves = reader.halves(clean_text)
        known = _texts(other, lambda row: _cleaned_text(row, scorer))
        threshold = best_threshold(*reader.halves(known)) if other else 0.5
        baselines: dict[str, dict[str, Figures]] = {"length": {}, "bag of words": {}}
        for name, texts, rest in (("as given", given, _texts(other, as_given)), ("cleaned", clean_text, known)):
            limit = best_threshold(*_lengths(rest)) if other else None
            baselines["length"][name] = accuracy(_lengths(texts), limit)
            baselines["bag of words"][name] = accuracy(_bag_of_words(texts, rest), 0.5)
        tables = _Tables(reader, rows, [cleaned(row) for row in rows], cleaned_halves, figures, seed)
        return Evaluation(
            model=scorer.model_id,
            revision=str(scorer.revision),
            engine=scorer.engine,
            pairs=len(pairs),
            threshold=threshold,
            threshold_from="chosen on other pairs" if other else "fixed",
            accuracy={
                "as given": accuracy(reader.halves(given), threshold),
                "cleaned": accuracy(cleaned_halves, threshold),
            },
            baselines=baselines,
            bag_of_words_from="trained on other pairs" if other else "cross-validated on these pairs",
            corruptions={kind: tables.corruption(kind) for kind in KINDS},
            styles={kind: tables.style(kind) for kind in STYLES},
            escapes=tables.escapes(),
        )


def _texts(pairs: Sequence[Pair], form: Callable[[Exchange], Text]) -> TextHalves:
    return [form(pair.worse) for pair in pairs], [form(pair.better) for pair in pairs]


def _cleaned_text(row: Exchange, scorer: QualityScorer) -> Text:
    return render(cleaned(row), str(scorer.template))


@dataclass(frozen=True)
class _Reader:
    """A scorer and the progress bar of all texts that it scores."""

    scorer: QualityScorer
    bar: Any

    def halves(self, texts: TextHalves) -> Halves:
        """Return the scores of both halves of pairs."""
        # One call for both: texts are batched by length, and more of them waste less padding.
        scores = self.scores([*texts[0], *texts[1]])
        return scores[: len(texts[0])], scores[len(texts[0]) :]

    def scores(self, texts: Sequence[Text], without: int = 0) -> npt.NDArray[np.float64]:
        """Return the scores of texts, (texts,); the bar also counts the rows `without` a text.

        Raises:
            ValueError: a score is not finite.
        """
        scores = np.empty(len(texts))
        steps = -(-len(texts) // TEXTS_PER_STEP)
        # Every n-th text, so that the steps take equally long, and equal lists of texts are cut alike.
        for step in range(steps):
            scores[step::steps] = self.scorer.score_texts(texts[step::steps]).scores
            self.bar.update(len(scores[step::steps]))
        self.bar.update(without)
        finite = np.isfinite(scores)
        if not finite.all():
            raise ValueError(
                f"{(~finite).sum()} of {len(scores)} scores of {self.scorer.model_id} are not finite; check its "
                "weights."
            )
        return scores


def _lengths(texts: TextHalves) -> Halves:
    worse, better = (np.array([len(text.whole) for text in half], dtype=np.float64) for half in texts)
    return worse, better


def _bag_of_words(texts: TextHalves, other: TextHalves) -> Halves:
    worse, better = ([text.whole for text in half] for half in texts)
    if not other[0]:
        return cross_validated(worse, better)
    probe = fit_probe(*([text.whole for text in half] for half in other))
    return probe_scores(probe, worse), probe_scores(probe, better)


@dataclass(frozen=True)
class _Tables:
    """The data that the corruption, style and escape figures share."""

    reader: _Reader
    as_given: list[Exchange]  # worse and better in turn
    rows: list[Exchange]  # the same rows, cleaned
    halves: Halves  # scores of `rows`
    figures: Callable[[Measure, int], Figures]
    seed: int

    def corruption(self, kind: str) -> dict[str, Any]:
        """Return the share of rows that outrank their corrupted copy, and the number of rows with a copy."""
        # `paired`, because the answer of the partner is not a wrong answer to the question.
        difference = self._differences(corrupt(kind, self.rows, self.seed, paired=True))
        # A copy that scores less is a win, a tie half of one; NaN where there is no copy.
        won = np.where(np.isnan(difference), np.nan, (difference < 0) + 0.5 * (difference == 0))
        return {"outranked": self._mean(won), "rows": int(np.isfinite(won).sum())}

    def style(self, kind: str) -> dict[str, Any]:
        """Return the mean shift of the score in standard deviations, and the number of rows with a copy."""
        spread = float(np.std(np.concatenate(self.halves))) or np.nan  # if all scores are equal, there is no unit
        difference = self._differences(corrupt(kind, self.rows, self.seed)) / spread
        return {"shift": self._mean(difference), "rows": int(np.isfinite(difference).sum())}

    def escapes(self) -> dict[str, Any]:
        """Compare the scores of the rows as given with those of the same rows with escapes typed out."""
        # Both are scored in the same order, so that equal texts share a batch with equal texts and score exactly alike.
        # JSON without its quotes: the escapes that careless exports leave in text.
        typed = [Exchange(*(json.dumps(part)[1:-1] for part in row)) for row in self.as_given]
        scores = []
        for rows in (self.as_given, typed):
            texts = [render(row, str(self.reader.scorer.template)) for row in rows]
            scores.append(np.stack(self.reader.halves((texts[::2], texts[1::2]))))
        difference = np.abs(scores[1] - scores[0]).ravel()
        count = sum(copy != row for copy, row in zip(typed, self.as_given, strict=True))
        return {"changed": int((difference > 0).sum()), "largest": float(difference.max()), "rows": count}

    def _differences(self, copies: Sequence[Exchange | None]) -> npt.NDArray[np.float64]:
        """Return score(copy) - score(row), NaN for rows without a copy; shape (pairs, 2)."""
        # Indices of the flat rows, worse and better in turn, as in `as_given`.
        places = [i for i, copy in enumerate(copies) if copy is not None]
        rows = np.stack(self.halves, axis=1).ravel()
        differences = np.full(len(rows), np.nan)
        texts = [render(copy, str(self.reader.scorer.template)) for copy in copies if copy is not None]
        differences[places] = self.reader.scores(texts, len(rows) - len(texts)) - rows[places]
        return differences.reshape(-1, 2)

    def _mean(self, values: npt.NDArray[np.float64]) -> dict[str, float]:
        """Return the mean over all rows that have a value, with its interval; `values` has the shape (pairs, 2)."""
        # Only pairs with a value are drawn: a sample without any would have no mean.
        values = values[np.isfinite(values).any(axis=1)]
        if not len(values):
            return dict.fromkeys(("value", "low", "high"), float("nan"))
        # Sums and counts per pair, so that a bootstrap sample needs no pass over the rows.
        sums, counts = np.nansum(values, axis=1), np.isfinite(values).sum(axis=1)
        return self.figures(lambda at: {"mean": float(sums[at].sum() / counts[at].sum())}, len(values))["mean"]


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
    auc = share_in_order(worse, better)
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
    measure: Measure,
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
        # Without samples that lack what a figure is about, such as any row of one kind.
        told = [d[name] for d in drawn if not math.isnan(d[name])]
        low, high = np.percentile(told, [2.5, 97.5]) if told else (math.nan, math.nan)
        figures[name] = {"value": at, "low": float(low), "high": float(high)}
    return figures


# The bootstrap calls the next two functions 1,000 times for each set of figures. Both only sort, and are much faster
# than scikit-learn's `roc_auc_score` and SciPy's `kendalltau`, with which the tests compare them.


def share_in_order(worse: Scores, better: Scores) -> float:
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
