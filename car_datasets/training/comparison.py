"""Compare scorers of any kind on the same rows: `compare_scorers`, with length and chance in the same tables.

Does: score rated rows, pairs, corrupted copies and changes of style by every stage that adds a column of scores; measure
each, with bootstrap intervals; tell how far the scorers agree, what each likes, how fast each is and what memory it takes.
Does not: train or choose a scorer, or read files.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from car_datasets.loading.kinds import KINDS, kinds_of
from car_datasets.loading.templates import Exchange, join_lines
from car_datasets.training.agreement import (
    HEADS,
    LENGTH,
    Draw,
    Numbers,
    Rated,
    Rows,
    agree,
    best_tenth,
    mean_of,
    questions_of,
    refuse_one_class,
)
from car_datasets.training.corruptions import CORRUPTIONS, STYLES, corrupt
from car_datasets.training.evaluation import Figures, as_number, as_percent, pair_metrics, with_intervals
from car_datasets.training.pairs import Pair, cleaned
from car_datasets.training.ratings import Ratings
from car_datasets.utils.files import table_text, without_nan
from car_datasets.utils.settings import BOOTSTRAP_SAMPLES

if TYPE_CHECKING:
    from rich.table import Table

    from car_datasets.scoring.stage import Stage

RANDOM = "random"  # the name of the baseline that no scorer should be near
WARM_UP = 8  # rows that are scored before the clock starts, so that the model is loaded
LENGTH_GROUPS = 5
BYTES_PER_MB = 1_000_000


class Judge(NamedTuple):
    """A stage and the column of its scores, of which higher is better.

    Args:
        stage ([`Stage`]): called with a batch of `instruction`, `input` and `output`.
        column (`str`): one of its output columns.
    """

    stage: Stage
    column: str


@dataclass(frozen=True)
class Comparison:
    """The result of [`compare_scorers`]. Every figure is `{"value", "low", "high"}`: the value and its 95 % interval.

    Args:
        scorers (`dict`): for each scorer `unscored`, the rows that it gave no score; `rows_per_second`, without the time
            in which its model is loaded; and `memory_mb`, the most memory of the process that it added meanwhile.
        rows (`int`): rated rows that all scorers have scored; the others are left out for all.
        agreement (`dict`): by scorer, and for length and chance, the figures of [`evaluate_ratings`]. Empty without
            ratings.
        pairs (`int`): pairs of which all scorers have scored both halves.
        in_order (`dict`): by scorer, and for length and chance, the share of pairs whose better half scores higher, ties
            counted half. Empty without pairs.
        corruptions (`dict`): for each kind, by scorer, the share of rows that score higher than their corrupted copy; a
            copy without a score counts as lower. Empty without corruptions, as is `styles`.
        styles (`dict`): for each change of style, by scorer, the mean change of the score in standard deviations of its
            scores of all rows.
        between (`dict`): for each two scorers, length and chance among them, as `"a, b"`: `spearman`, their rank
            correlation over all rows, and `overlap`, the share of the best tenth by one that is in the best tenth by the
            other.
        likes (`dict`): by scorer: `length` and `kind`, the shares of the variance of its scores that fifths of the
            answers' length, and kinds of answer, explain (eta squared, not adjusted for the number
            of groups); and for each kind its share of the best tenth. The entry
            `"all rows"` has the share of each kind in all rows.
    """

    scorers: dict[str, dict[str, float]]
    rows: int
    agreement: dict[str, Figures]
    pairs: int
    in_order: Figures
    corruptions: dict[str, Figures]
    styles: dict[str, Figures]
    between: dict[str, dict[str, float]]
    likes: dict[str, dict[str, float]]

    def to_json(self) -> str:
        """Return all figures as JSON, with `null` for figures without a single row."""
        return json.dumps(without_nan(asdict(self)), indent=2, allow_nan=False)

    def to_tables(self) -> list[Table]:
        """Return tables for a terminal, with a row per scorer."""
        tables = [
            _table(
                "what it takes",
                ("rows/s", "MB more", "rows unscored"),
                {
                    name: (f"{of['rows_per_second']:,.1f}", f"{of['memory_mb']:,.0f}", f"{of['unscored']:,.0f}")
                    for name, of in self.scorers.items()
                },
            )
        ]
        if self.agreement:
            cells = {name: [as_number(of[h], ".3f") for h in HEADS] for name, of in self.agreement.items()}
            tables.append(_table(f"{self.rows:,} rated rows", tuple(HEADS.values()), cells))
        if self.in_order:
            shares = {name: [as_percent(figure)] for name, figure in self.in_order.items()}
            tables.append(_table(f"{self.pairs:,} pairs", ("in order",), shares))
        names = list(self.scorers)
        for title, found, form in (
            ("row outranks its copy", self.corruptions, as_percent),
            ("shift in standard deviations", self.styles, lambda figure: as_number(figure, "+.2f")),
        ):
            if found:
                rows = {kind: [form(of[name]) for name in names] for kind, of in found.items()}
                tables.append(_table(title, names, rows))
        pairs = {of: [f"{row['spearman']:.3f}", f"{100 * row['overlap']:.0f} %"] for of, row in self.between.items()}
        if pairs:
            tables.append(_table("two scorers", ("Spearman", "best tenths in common"), pairs))
        kinds = [kind for kind in KINDS if kind in self.likes["all rows"]]
        heads = ("length explains", "kind explains", *(f"best tenth: {kind}" for kind in kinds))
        columns = ("length", "kind", *kinds)
        likes = {name: [_share(of.get(column)) for column in columns] for name, of in self.likes.items()}
        return [*tables, _table("what it likes", heads, likes)]


def _share(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{100 * value:.1f} %"


def _table(first: str, heads: Sequence[str], rows: Mapping[str, Sequence[str]]) -> Table:
    from rich.table import Column, Table

    table = Table(Column(table_text(first)), *(Column(table_text(head)) for head in heads), title_justify="left")
    for name, cells in rows.items():
        table.add_row(table_text(name), *cells)
    return table


def compare_scorers(
    scorers: Mapping[str, Judge],
    *,
    ratings: Ratings | None = None,
    pairs: Sequence[Pair] = (),
    corruptions: bool = True,
    samples: int = BOOTSTRAP_SAMPLES,
    seed: int = 0,
) -> Comparison:
    """Compare scorers of any kind on rated rows, on pairs, or on both.

    Example:
    ```python
    >>> judges = {"iqs": Judge(QualityScorer(), "iqs_score"), "ifd": Judge(IFDScorer(), "ifd_score")}
    >>> compare_scorers(judges, ratings=read_ratings("ratings_valid.csv")).agreement["ifd"]["soundness"]
    ```

    Args:
        scorers (`Mapping[str, Judge]`): name to stage and column. The texts are cleaned as for the embedded scorer.
        ratings ([`Ratings`], *optional*): rows and their ratings, as read by `read_ratings`.
        pairs (`Sequence[Pair]`, *optional*): worse and better answers, as read by `read_pairs`.
        corruptions (`bool`): also score a corrupted copy of every row for each kind of corruption and change of style,
            which takes some twelve times as long as the rows alone, and a `JudgeScorer` a call for each copy.
        samples (`int`): bootstrap samples for each interval; questions and pairs are drawn, not rows.
        seed (`int`): seed of bootstrap, chance, corruptions and changes of style.

    Raises:
        ValueError: there are neither ratings nor pairs, no scorer, one named like a baseline, a column that a stage does
            not add, or rows of which fewer than two are scored by all.
    """
    _check(scorers, ratings, pairs)
    rated = [] if ratings is None else [cleaned(row) for row in ratings.rows]
    halves = [cleaned(row) for pair in pairs for row in pair]
    rows = [*rated, *halves]
    copies = {kind: corrupt(kind, rows, seed) for kind in (*CORRUPTIONS, *STYLES) if corruptions}
    found = {name: _score(judge, rows, copies) for name, judge in scorers.items()}
    known = np.all([np.isfinite(of.rows) for of in found.values()], axis=0)
    if np.count_nonzero(known) < 2:
        raise ValueError(
            f"scorers: {np.count_nonzero(known)} of {len(rows)} rows have a score by each of {list(scorers)}; two are needed. "
            "Look at the status column of each scorer."
        )
    draw = Draw(samples, seed)
    baselines = {
        LENGTH: np.array([len(row.response) for row in rows], dtype=np.float64),
        RANDOM: np.random.default_rng(seed).random(len(rows)),
    }
    rankers = {**{name: of.rows for name, of in found.items()}, **baselines}
    at = np.flatnonzero(known)
    both = known[len(rated) :].reshape(-1, 2).all(axis=1)
    return Comparison(
        scorers={name: of.cost() for name, of in found.items()},
        rows=int(np.count_nonzero(known[: len(rated)])),
        agreement={} if ratings is None else _agreement(ratings, rated, rankers, known[: len(rated)], draw),
        pairs=int(np.count_nonzero(both)),
        in_order=_in_order(rankers, len(rated), np.flatnonzero(both), draw),
        corruptions={
            kind: {n: of.outranked(kind, draw) for n, of in found.items()} for kind in CORRUPTIONS if kind in copies
        },
        styles={kind: {n: of.shift(kind, draw) for n, of in found.items()} for kind in STYLES if kind in copies},
        between=_between({name: scores[at] for name, scores in rankers.items()}),
        likes=_likes([rows[i] for i in at], {name: scores[at] for name, scores in rankers.items()}),
    )


def _check(scorers: Mapping[str, Judge], ratings: Ratings | None, pairs: Sequence[Pair]) -> None:
    if ratings is None and not pairs:
        raise ValueError(
            "Pass ratings=read_ratings(FILE), pairs=read_pairs(FILE), or both: there are no rows to score."
        )
    if not scorers:
        raise ValueError('scorers={} names none; pass {"iqs": Judge(QualityScorer(), "iqs_score")}, for example.')
    if taken := [name for name in scorers if name in (LENGTH, RANDOM)]:
        raise ValueError(f"scorers: {taken[0]!r} is the name of a baseline; give the scorer another one.")
    for name, judge in scorers.items():
        if judge.column not in judge.stage.output_columns:
            raise ValueError(
                f"scorers[{name!r}] adds the columns {list(judge.stage.output_columns)}, and not {judge.column!r}; name one "
                "of them."
            )
    if ratings is not None:
        refuse_one_class(ratings)


# scores ---------------------------------------------------------------------------------------------------------------


class _Scored(NamedTuple):
    """What one scorer has told: of the rows, (rows,), and of the copies of each kind, NaN where there is no copy."""

    rows: Numbers
    copies: dict[str, Numbers]
    copied: dict[str, npt.NDArray[np.bool_]]
    seconds: float
    timed: int
    memory: float

    def cost(self) -> dict[str, float]:
        return {
            "unscored": float(np.count_nonzero(~np.isfinite(self.rows))),
            "rows_per_second": self.timed / self.seconds,
            "memory_mb": self.memory / BYTES_PER_MB,
        }

    def outranked(self, kind: str, draw: Draw) -> dict[str, float]:
        """Return the share of rows that outrank their copy, a tie counted half."""
        at = np.flatnonzero(self.copied[kind] & np.isfinite(self.rows))
        # A copy that a scorer gives no score is never selected, which is what the figure asks for.
        copy = np.where(np.isnan(self.copies[kind]), -np.inf, self.copies[kind])[at]
        return mean_of((self.rows[at] > copy) + 0.5 * (self.rows[at] == copy), draw)

    def shift(self, kind: str, draw: Draw) -> dict[str, float]:
        """Return the mean change of the score, in standard deviations."""
        change = (self.copies[kind] - self.rows) / (float(np.nanstd(self.rows)) or np.nan)
        return mean_of(change[np.isfinite(change)], draw)


def _score(judge: Judge, rows: Sequence[Exchange], copies: Mapping[str, Sequence[Exchange | None]]) -> _Scored:
    """Score rows and copies, and measure time and memory."""
    _values(judge, rows[:WARM_UP])
    with _Memory() as memory:
        started = time.perf_counter()
        of_rows = _values(judge, rows)
        seconds = time.perf_counter() - started
        of_copies, copied = {}, {}
        for kind, each in copies.items():
            copied[kind] = np.array([copy is not None for copy in each], dtype=bool)
            of_copies[kind] = np.full(len(rows), np.nan)
            of_copies[kind][copied[kind]] = _values(judge, [copy for copy in each if copy is not None])
    return _Scored(of_rows, of_copies, copied, max(seconds, 1e-9), len(rows), memory.most)


def _values(judge: Judge, rows: Sequence[Exchange]) -> Numbers:
    """Return the scores of rows, NaN for a row that the stage gives none."""
    if not rows:
        return np.zeros(0)
    batch = {
        "instruction": [row.instruction for row in rows],
        "input": [row.input for row in rows],
        "output": [row.response for row in rows],
    }
    values = judge.stage(batch)[judge.column]
    return np.array([np.nan if value is None else float(value) for value in values], dtype=np.float64)


class _Memory:
    """The most memory that this process has taken since the block began, on the host and on a GPU, in bytes."""

    def __enter__(self) -> _Memory:
        import psutil
        import torch

        self._process, self._start = psutil.Process(), psutil.Process().memory_info().rss
        self._gpu = torch.cuda.is_available()
        if self._gpu:
            torch.cuda.reset_peak_memory_stats()
            self._gpu_start = torch.cuda.memory_allocated()
        self._peak, self._stop = self._start, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self._peak = max(self._peak, self._process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.most = float(max(self._peak, self._process.memory_info().rss) - self._start)
        if self._gpu:
            import torch

            self.most += float(torch.cuda.max_memory_allocated() - self._gpu_start)


# figures --------------------------------------------------------------------------------------------------------------


def _agreement(
    ratings: Ratings,
    rows: Sequence[Exchange],
    rankers: Mapping[str, Numbers],
    known: npt.NDArray[np.bool_],
    draw: Draw,
) -> dict[str, Figures]:
    sound, worth = ratings.soundness.astype(np.float64), ratings.worth.astype(np.float64)
    of_rows = {name: scores[: len(rows)] for name, scores in rankers.items()}
    rated = Rated(np.stack([sound, worth, sound * worth]), of_rows[LENGTH], of_rows, questions_of(rows))
    return draw.by_ranker(rated.among(np.flatnonzero(known)), agree)


def _in_order(rankers: Mapping[str, Numbers], first: int, pairs: Rows, draw: Draw) -> Figures:
    """Return the share of pairs in the right order; the halves of the pairs follow each other from `first` on."""
    if not len(pairs):
        return {}
    found = {}
    for name, scores in rankers.items():
        worse, better = scores[first:].reshape(-1, 2)[pairs].T
        measure = _pair_share(worse, better)
        found[name] = with_intervals(measure, len(pairs), *draw)["pairs"]
    return found


def _pair_share(worse: Numbers, better: Numbers) -> Callable[[Rows], dict[str, float]]:
    return lambda at: {"pairs": pair_metrics(worse[at], better[at])["pairs"]}


def _between(rankers: Mapping[str, Numbers]) -> dict[str, dict[str, float]]:
    """Return how far each two rankers agree."""
    from scipy.stats import spearmanr

    names, found = list(rankers), {}
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            both = rankers[one], rankers[other]
            best, others = (best_tenth(scores) for scores in both)
            constant = any(np.ptp(scores) == 0 for scores in both)
            found[f"{one}, {other}"] = {
                "spearman": 0.0 if constant else float(spearmanr(*both).statistic),
                "overlap": len(np.intersect1d(best, others)) / len(best),
            }
    return found


def _likes(rows: Sequence[Exchange], rankers: Mapping[str, Numbers]) -> dict[str, dict[str, float]]:
    """Return what explains the scores of each ranker, and the kinds of answer in its best tenth."""
    kinds = kinds_of([join_lines(row.instruction, row.input) for row in rows], [row.response for row in rows])
    codes = np.array([KINDS.index(kind) for kind in kinds])
    there = [(i, kind) for i, kind in enumerate(KINDS) if kind in kinds]
    lengths = rankers[LENGTH]
    fifths = np.digitize(lengths, np.unique(np.quantile(lengths, np.arange(1, LENGTH_GROUPS) / LENGTH_GROUPS)))
    found = {"all rows": {kind: float(np.mean(codes == i)) for i, kind in there}}
    for name, scores in rankers.items():
        best = codes[best_tenth(scores)]
        explained = {"length": _explained(scores, fifths), "kind": _explained(scores, codes)}
        found[name] = {**explained, **{kind: float(np.mean(best == i)) for i, kind in there}}
    return found


def _explained(scores: Numbers, groups: npt.NDArray[np.int64]) -> float:
    """Return the share of the variance of scores between groups (eta squared)."""
    total = float(np.square(scores - scores.mean()).sum())
    if total == 0:
        return 0.0
    counts = np.bincount(groups)
    means = np.bincount(groups, scores) / np.maximum(counts, 1)
    return float((counts * np.square(means - scores.mean())).sum() / total)
