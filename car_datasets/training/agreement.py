"""Evaluate a scorer on ratings of single rows: what a reader finds right, wrong and worth learning, and what is kept.

Does: compare scores, their baselines and a former scorer with the ratings, also with length held constant, by source and
by fault; count kinds of answers in the best tenth; measure pairs of which the reader says that they are equal, broken copies
and changes of style. Every figure has a bootstrap interval, by drawing questions.
Does not: train a scorer, or read files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from car_datasets.loading.kinds import KINDS, kinds_of
from car_datasets.loading.templates import Exchange, join_lines, render
from car_datasets.scoring.iqs.heads import FAULTS, PARTS
from car_datasets.training.corruptions import FINE_CORRUPTIONS, FINE_STYLES, STYLES, corrupt
from car_datasets.training.evaluation import KINDS as BROKEN_KINDS
from car_datasets.training.evaluation import (
    TEXTS_PER_STEP,
    Figures,
    as_number,
    as_percent,
    with_intervals,
)
from car_datasets.training.pairs import Pair, cleaned, question
from car_datasets.training.ratings import FAULTY, FEWEST, SOUND, Ratings, bags_of_words, correlations, shares_apart
from car_datasets.utils.files import table_text, without_nan
from car_datasets.utils.settings import BOOTSTRAP_SAMPLES

if TYPE_CHECKING:
    from rich.table import Table

    from car_datasets.scoring.scorer import QualityScorer

Numbers = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]
SCORE, LENGTH = "iqs_score", "length"  # two of the things that rank the rows
BOTH = "iqs_soundness x iqs_worth"
TARGETS = ("soundness", "worth", "product")
HEADS = {"faulty": "faulty / sound", "soundness": "soundness", "worth": "worth", "product": "soundness x worth"}
BROKEN = 0.3  # share of corrupted copies in the pool of `purity`


@dataclass(frozen=True)
class Agreement:
    """The result of [`evaluate_ratings`]. Every figure is `{"value", "low", "high"}`: the value and its 95 % interval.

    Args:
        model, revision (`str`): id and immutable revision of the scorer.
        rows (`int`): rated rows.
        sources (`dict[str, int]`): rated rows by source.
        bag_of_words_from (`int`): rated rows that the bag of words was trained on; 0 if there is none.
        agreement (`dict`): by what ranks the rows (`"iqs_score"`, the parts of a scorer that has them and soundness x
            worth, `"length"`, a bag of words per rating, the former scorer): `faulty`, the share of all combinations of a
            faulty row (soundness up to 4) and a sound one (from 8) in the right order; `soundness`, `worth` and `product`
            (of both), rank correlations; and `..._length_held`, the same with the length of the answer held constant.
        by_source (`dict`): the same for the rows of each source.
        faults (`dict`): for each fault `rows`, and by what ranks the rows the share of combinations of such a row and a
            sound one in the right order; only `rows` if there are fewer than `FEWEST`.
        kinds (`dict`): for each kind of answer `rows`; `pool` and `best_tenth`, its shares of all rows and of the best
            tenth by score; `kept`, the share of its sound rows that are in the best tenth.
        pairs (`dict`): by what ranks the rows: `ties`, the mean of score(better) - score(worse), in standard deviations of
            the scores of all rows, over pairs of equal soundness; `decided`, the share of the other pairs in the reader's
            order. Empty without pairs.
        pair_counts (`dict`): `ties` and `decided`, the numbers of these pairs.
        corruptions (`dict`): for each kind of corrupted copy `rows`, and by what the scorer tells (score and parts) the
            share of rows that it puts above their copy, ties counted half.
        styles (`dict`): for each change of style `rows`, and by what the scorer tells the mean change, in standard
            deviations of what it tells of all rows.
        purity (`dict`): by what the scorer tells: the share of corrupted copies in the best tenth of a pool of which they
            are `BROKEN`.
    """

    model: str
    revision: str
    rows: int
    sources: dict[str, int]
    bag_of_words_from: int
    agreement: dict[str, Figures]
    by_source: dict[str, dict[str, Figures]]
    faults: dict[str, dict[str, Any]]
    kinds: dict[str, dict[str, Any]]
    pairs: dict[str, Figures]
    pair_counts: dict[str, int]
    corruptions: dict[str, dict[str, Any]]
    styles: dict[str, dict[str, Any]]
    purity: Figures

    def to_json(self) -> str:
        """Return all figures as JSON, with `null` for figures without a single row."""
        return json.dumps(without_nan(asdict(self)), indent=2, allow_nan=False)

    def to_tables(self) -> list[Table]:
        """Return tables for a terminal: agreement, by source if there are several, faults, kinds, and what should not count."""
        from rich.table import Column, Table

        held = {f"{target}_length_held": f"{head}, length held" for target, head in HEADS.items() if target in TARGETS}
        tables = []
        title: Any = table_text(f"{self.model} on {self.rows:,} rated rows", "table.title")
        for heads in (HEADS, held):
            tables.append(Table("ranked by", *heads.values(), title=title, title_justify="left"))
            title = None
            for name, figures in self.agreement.items():
                tables[-1].add_row(table_text(name), *_cells(figures, tuple(heads)))
        bag = f"; bag of words: trained on {self.bag_of_words_from:,} other rows" if self.bag_of_words_from else ""
        caption = f"AUC of rows rated up to {FAULTY:g} against those from {SOUND:g}; Spearman [95 % interval]{bag}"
        tables[1].caption = table_text(caption, "table.caption")
        if len(self.by_source) > 1:
            tables.append(Table("source", "ranked by", *HEADS.values(), title_justify="left"))
            for source, by_name in self.by_source.items():
                for name, figures in by_name.items():
                    label = table_text(f"{source} ({self.sources[source]:,})")
                    tables[-1].add_row(label, table_text(name), *_cells(figures, tuple(HEADS)))
        names = [name for name in self.agreement if any(name in row for row in self.faults.values())]
        columns = (Column(table_text(name)) for name in names)
        faults = Table("fault, against sound rows", *columns, "rows", title_justify="left")
        for fault, row in self.faults.items():
            faults.add_row(fault, *_cells(row, names), f"{row['rows']:,}")
        kinds = Table(
            "kind of answer", "of all rows", "of the best tenth", "its sound rows kept", "rows", title_justify="left"
        )
        for kind, row in self.kinds.items():
            cells = (_percent(row[name]) for name in ("pool", "best_tenth", "kept"))
            kinds.add_row(kind, *cells, f"{row['rows']:,}")
        return [*tables, faults, kinds, *self._shifts()]

    def _shifts(self) -> list[Table]:
        from rich.table import Table

        tables = []
        if self.pairs:
            heads = [
                f"{name} ({self.pair_counts[key]:,} pairs)"
                for key, name in (("ties", "equal: shift"), ("decided", "decided: agrees"))
            ]
            pairs = Table("pairs, ranked by", *heads, title_justify="left")
            for name, figures in self.pairs.items():
                agrees = as_percent(figures["decided"]) if "decided" in figures else "-"
                pairs.add_row(table_text(name), _cells(figures, ("ties",), "+.3f")[0], agrees)
            tables.append(pairs)
        for head, by_kind, form in (
            ("row outranks its copy, by", self.corruptions, as_percent),
            ("shift in standard deviations, of", self.styles, lambda figure: as_number(figure, "+.3f")),
        ):
            tables.append(Table(head, *self.purity, "rows", title_justify="left"))
            for kind, row in by_kind.items():
                tables[-1].add_row(kind, *(form(row[name]) for name in self.purity), f"{row['rows']:,}")
        purity = Table("ranked by", f"broken rows in the best tenth, of {BROKEN:.0%} in the pool", title_justify="left")
        for name, figure in self.purity.items():
            purity.add_row(table_text(name), as_percent(figure))
        return [*tables, purity]


def _cells(figures: Mapping[str, Any], names: Sequence[str], form: str = ".3f") -> list[str]:
    there = [name in figures and not np.isnan(figures[name]["value"]) for name in names]
    return [as_number(figures[name], form) if known else "-" for name, known in zip(names, there, strict=True)]


def _percent(figure: Mapping[str, float]) -> str:
    return "-" if np.isnan(figure["value"]) else as_percent(figure)


class Rated(NamedTuple):
    """Rated rows as arrays of one entry per row, and what ranks them."""

    rated: Numbers  # soundness, worth and product, (3, rows); NaN where unknown
    lengths: Numbers
    rankers: dict[str, Numbers]
    questions: list[Rows]  # the rows of each question, which the bootstrap draws together

    def among(self, rows: Rows) -> Rated:
        """Return the same for some of the rows, ascending."""
        place = np.full(self.rated.shape[1], -1)
        place[rows] = np.arange(len(rows))
        questions = [kept for of in self.questions if len(kept := place[of][place[of] >= 0])]
        rankers = {name: scores[rows] for name, scores in self.rankers.items()}
        return Rated(self.rated[:, rows], self.lengths[rows], rankers, questions)


def evaluate_ratings(
    scorer: QualityScorer,
    ratings: Ratings,
    *,
    pairs: Sequence[Pair] = (),
    other: Ratings | None = None,
    former: QualityScorer | None = None,
    samples: int = BOOTSTRAP_SAMPLES,
    seed: int = 0,
) -> Agreement:
    """Evaluate a scorer on rows that a reader has rated.

    Args:
        scorer ([`QualityScorer`]): the scorer; its parts, and soundness x worth, are measured as well if it has any.
        ratings ([`Ratings`]): the rows and their ratings, as read by [`read_ratings`].
        pairs (`Sequence[Pair]`, *optional*): pairs of these rows, for the figures of `pairs`.
        other ([`Ratings`], *optional*): other rated rows, which train a bag of words. Those that ask a question of the
            rated rows are left out.
        former ([`QualityScorer`], *optional*): another scorer to measure on the same rows.
        samples (`int`): bootstrap samples for each interval.
        seed (`int`): seed of bootstrap and changes of style.

    Raises:
        ValueError: no row is rated faulty, or none sound, `other` has no rows left, `samples` is below 1, or a score is
            not finite.
    """
    # Here, because other users of this module's figures start in half the time without it.
    from datasets.utils import tqdm

    refuse_one_class(ratings)
    scorer = scorer.with_parts()
    rows = [cleaned(row) for row in ratings.rows]
    copies = {kind: corrupt(kind, rows, seed) for kind in (*BROKEN_KINDS, *FINE_CORRUPTIONS, *STYLES, *FINE_STYLES)}
    known = None if other is None else _apart(other, ratings)
    broken = _broken(rows, seed)
    total = len(rows) * (1 if former is None else 2) + sum(row is not None for of in copies.values() for row in of)
    total += len(broken)
    with tqdm(total=total, desc="Scoring rated rows", unit=" texts") as bar:
        scores = _scores(scorer, rows, bar)
        rankers = {**scores, LENGTH: np.array([len(row.response) for row in rows], dtype=np.float64)}
        if known is not None:
            rankers |= bags_of_words(known, rows)
        if former is not None:
            rankers[f"former: {former.model_id}"] = _scores(former, rows, bar)[SCORE]
        moved = {kind: _scores(scorer, [row for row in of if row is not None], bar) for kind, of in copies.items()}
        of_broken = _scores(scorer, list(broken.values()), bar)
    sound, worth = ratings.soundness.astype(np.float64), ratings.worth.astype(np.float64)
    rated = Rated(np.stack([sound, worth, sound * worth]), rankers[LENGTH], rankers, questions_of(rows))
    draw = Draw(samples, seed)
    sources = {name: np.flatnonzero(np.array(ratings.source) == name) for name in dict.fromkeys(ratings.source)}
    compared, counts = _compare_pairs(ratings, pairs, rated, draw)
    return Agreement(
        model=scorer.model_id,
        revision=str(scorer.revision),
        rows=len(rows),
        sources={name: len(at) for name, at in sources.items()},
        bag_of_words_from=0 if known is None else len(known.rows),
        agreement=draw.by_ranker(rated, agree),
        by_source={name: draw.by_ranker(rated.among(at), agree) for name, at in sources.items()},
        faults=_by_fault(ratings, rated, draw),
        kinds=_by_kind(rows, rated, draw),
        pairs=compared,
        pair_counts=counts,
        corruptions={
            kind: _of_copies(_outranked, copies[kind], moved[kind], scores, draw)
            for kind in (*BROKEN_KINDS, *FINE_CORRUPTIONS)
        },
        styles={kind: _of_copies(_shift, copies[kind], moved[kind], scores, draw) for kind in (*STYLES, *FINE_STYLES)},
        purity=_purity(rated.questions, scores, list(broken), of_broken, draw),
    )


def refuse_one_class(ratings: Ratings) -> None:
    """Raise ValueError if no row is rated faulty, or none sound: then nothing can be told from anything."""
    counts = np.count_nonzero(ratings.soundness <= FAULTY), np.count_nonzero(ratings.soundness >= SOUND)
    if not all(counts):
        raise ValueError(
            f"ratings: {counts[0]} rows are rated {FAULTY:g} or less in soundness and {counts[1]} are rated {SOUND:g} or "
            "more; telling faulty rows from sound ones takes both. Rate some of the other kind."
        )


def _apart(other: Ratings, ratings: Ratings) -> Ratings:
    """Return the other ratings without rows that ask what the rated rows ask, which a bag of words would remember."""
    known = other.without({question(row) for row in ratings.rows})
    if len(known.rows) < FEWEST:
        raise ValueError(
            f"other: {len(known.rows)} of its {len(other.rows)} rows ask something that the rated rows do not ask; a bag of "
            f"words takes at least {FEWEST}. Add ratings of other rows, or leave it out."
        )
    return known


# what ranks the rows --------------------------------------------------------------------------------------------------


def _scores(scorer: QualityScorer, rows: Sequence[Exchange], bar: Any) -> dict[str, Numbers]:
    """Return the scores of rows by name: the score, and the parts and their product of a scorer that has parts."""
    texts = [render(row, str(scorer.template)) for row in rows]
    found: dict[str, Numbers] = {}
    steps = -(-len(texts) // TEXTS_PER_STEP)
    # Every n-th text, so that the steps take equally long.
    for step in range(steps):
        told = scorer.score_texts(texts[step::steps])
        columns = {SCORE: told.scores}
        if told.parts is not None:
            columns |= {f"iqs_{name}": told.parts[:, i] for i, name in enumerate(PARTS)}
            columns[BOTH] = columns["iqs_soundness"] * columns["iqs_worth"]
        for name, values in columns.items():
            found.setdefault(name, np.empty(len(texts)))[step::steps] = values
        bar.update(len(told.scores))
    found.setdefault(SCORE, np.empty(0))
    bad = int((~np.isfinite(found[SCORE])).sum())
    if bad:
        raise ValueError(f"{bad} of {len(texts)} scores of {scorer.model_id} are not finite; check its weights.")
    return found


def questions_of(rows: Sequence[Exchange]) -> list[Rows]:
    """Return the positions of the rows that ask each question, which a bootstrap draws together."""
    found: dict[tuple[str, str], list[int]] = {}
    for i, row in enumerate(rows):
        found.setdefault(question(row), []).append(i)
    return [np.array(of, dtype=np.int64) for of in found.values()]


# figures --------------------------------------------------------------------------------------------------------------


class Draw(NamedTuple):
    """The bootstrap of all figures."""

    samples: int
    seed: int

    def figures(self, measure: Callable[[Rows], Mapping[str, float]], groups: Sequence[Rows]) -> Figures:
        """Return figures with intervals; groups of rows are drawn, as answers to one question are not independent."""

        def of_drawn(at: Rows) -> Mapping[str, float]:
            return measure(np.concatenate([groups[i] for i in at]))

        return with_intervals(of_drawn, len(groups), self.samples, self.seed)

    def by_ranker(self, rated: Rated, measure: Callable[[Rated, Rows], Mapping[str, Numbers]]) -> dict[str, Figures]:
        """Return the figures of a measure that gives one number per ranker, by ranker."""
        names = list(rated.rankers)

        def flat(at: Rows) -> dict[str, float]:
            found = measure(rated, at).items()
            return {f"{figure}:{i}": float(values[i]) for figure, values in found for i in range(len(names))}

        found: dict[str, Figures] = {name: {} for name in names}
        for key, interval in self.figures(flat, rated.questions).items():
            figure, _, i = key.partition(":")
            found[names[int(i)]][figure] = interval
        return found


def agree(rated: Rated, at: Rows) -> dict[str, Numbers]:
    """Return how well each ranker agrees with the ratings of some rows: arrays of one number per ranker, by figure."""
    scores = np.stack([values[at] for values in rated.rankers.values()])
    ratings, lengths = rated.rated[:, at], rated.lengths[at]
    faulty, sound = ratings[0] <= FAULTY, ratings[0] >= SOUND
    found = {"faulty": shares_apart(scores, faulty, sound)}
    known = ~np.isnan(ratings[1])
    for target, values in zip(TARGETS, ratings, strict=True):
        kept = np.ones(len(at), dtype=bool) if target == "soundness" else known
        found[target], found[f"{target}_length_held"] = correlations(scores[:, kept], values[kept], lengths[kept])
    return found


def _by_fault(ratings: Ratings, rated: Rated, draw: Draw) -> dict[str, dict[str, Any]]:
    """Return for each fault that occurs how well its rows, unless rated sound, are told from sound ones."""
    sound = ratings.soundness >= SOUND
    found: dict[str, dict[str, Any]] = {}
    for i, fault in enumerate(FAULTS[1:], 1):
        faulty = (ratings.fault == i) & ~sound
        if not faulty.any():
            continue
        found[fault] = {"rows": int(faulty.sum())}
        if found[fault]["rows"] >= FEWEST:
            some = rated.among(np.flatnonzero(faulty | sound))
            # Below SOUND a row of these is one with the fault.
            by_name = draw.by_ranker(
                some,
                lambda of, at: {
                    "faulty": shares_apart(
                        np.stack([s[at] for s in of.rankers.values()]),
                        of.rated[0, at] < SOUND,
                        of.rated[0, at] >= SOUND,
                    )
                },
            )
            found[fault] |= {name: figures["faulty"] for name, figures in by_name.items()}
    return found


def _by_kind(rows: Sequence[Exchange], rated: Rated, draw: Draw) -> dict[str, dict[str, Any]]:
    """Return for each kind of answer its share of the rows and of the best tenth by score."""
    kinds = kinds_of([join_lines(row.instruction, row.input) for row in rows], [row.response for row in rows])
    codes, scores = np.array([KINDS.index(kind) for kind in kinds]), rated.rankers[SCORE]
    sound = rated.rated[0] >= SOUND

    def measure(at: Rows) -> dict[str, float]:
        best = np.zeros(len(at), dtype=bool)
        best[best_tenth(scores[at])] = True
        found = {}
        for i, kind in enumerate(KINDS):
            of_kind = codes[at] == i
            right = of_kind & sound[at]
            found[f"pool:{kind}"] = float(of_kind.mean())
            found[f"best_tenth:{kind}"] = float(of_kind[best].mean())
            found[f"kept:{kind}"] = float(best[right].mean()) if right.any() else np.nan
        return found

    kinds_found: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS if kind in kinds}
    for key, interval in draw.figures(measure, rated.questions).items():
        name, _, kind = key.partition(":")
        if kind in kinds_found:
            kinds_found[kind] |= {name: interval, "rows": kinds.count(kind)}
    return kinds_found


def _compare_pairs(
    ratings: Ratings, pairs: Sequence[Pair], rated: Rated, draw: Draw
) -> tuple[dict[str, Figures], dict[str, int]]:
    """Return the figures of pairs by ranker, and the numbers of pairs of equal and of different soundness."""
    at = {row: i for i, row in enumerate(map(cleaned, ratings.rows))}
    places = [(at.get(cleaned(pair.worse)), at.get(cleaned(pair.better))) for pair in pairs]
    both = np.array([place for place in places if None not in place], dtype=np.int64).reshape(-1, 2)
    worse, better = (rated.rated[0, side] for side in both.T)
    tied, decided = both[worse == better], both[worse != better]
    counts = {"ties": len(tied), "decided": len(decided)}
    found: dict[str, Figures] = {}
    for name, scores in rated.rankers.items():
        shift = (scores[tied[:, 1]] - scores[tied[:, 0]]) / _spread(scores)
        # In the reader's order, not in that of the labels.
        sign = np.sign(rated.rated[0, decided[:, 1]] - rated.rated[0, decided[:, 0]])
        step = sign * (scores[decided[:, 1]] - scores[decided[:, 0]])
        kinds = {"ties": shift, "decided": (step > 0) + 0.5 * (step == 0)}
        found[name] = {key: mean_of(values, draw) for key, values in kinds.items() if len(values) >= FEWEST}
    return {name: figures for name, figures in found.items() if figures}, counts


def _of_copies(
    measure: Callable[[Numbers, Numbers, Numbers], Numbers],
    copies: Sequence[Exchange | None],
    moved: Mapping[str, Numbers],
    scores: Mapping[str, Numbers],
    draw: Draw,
) -> dict[str, Any]:
    """Return the number of copies, and by ranker the mean of a measure of copies, their rows, and all rows."""
    at = [i for i, row in enumerate(copies) if row is not None]
    means = {
        name: mean_of(measure(moved.get(name, values[:0]), values[at], values), draw) for name, values in scores.items()
    }
    return {"rows": len(at), **means}


def _outranked(copies: Numbers, rows: Numbers, every: Numbers) -> Numbers:
    return (copies < rows) + 0.5 * (copies == rows)


def _shift(copies: Numbers, rows: Numbers, every: Numbers) -> Numbers:
    return (copies - rows) / _spread(every)


def _broken(rows: Sequence[Exchange], seed: int) -> dict[int, Exchange]:
    """Return corrupted copies of some rows, by the place of the row: `BROKEN` of rows and copies together."""
    by_kind = [corrupt(kind, rows, seed) for kind in BROKEN_KINDS]
    places = np.random.default_rng(seed).permutation(len(rows))[: round(len(rows) * BROKEN / (1 - BROKEN))].tolist()
    # Each kind in turn; a row that has no copy of its kind is left out.
    drawn = {place: by_kind[i % len(by_kind)][place] for i, place in enumerate(places)}
    return {place: copy for place, copy in drawn.items() if copy is not None}


def _purity(
    questions: Sequence[Rows],
    scores: Mapping[str, Numbers],
    broken: Sequence[int],
    of_broken: Mapping[str, Numbers],
    draw: Draw,
) -> Figures:
    """Return by ranker the share of corrupted copies among the best tenth of rows and copies."""
    place = np.full(len(scores[SCORE]), -1)
    place[list(broken)] = np.arange(len(broken))

    def measure(at: Rows) -> dict[str, float]:
        copies = place[at][place[at] >= 0]
        pools = {name: np.concatenate([values[at], of_broken[name][copies]]) for name, values in scores.items()}
        return {name: float(np.mean(best_tenth(pool) >= len(at))) for name, pool in pools.items()}

    return draw.figures(measure, questions)


def _spread(scores: Numbers) -> float:
    return float(np.std(scores)) or np.nan  # if all scores are equal, there is no unit


def best_tenth(scores: Numbers) -> Rows:
    """Return the positions of the best tenth by score, rounded up, best first; the earlier of equal ones counts."""
    return np.argsort(-scores, kind="stable")[: -(-len(scores) // 10)]


def mean_of(values: Numbers, draw: Draw) -> dict[str, float]:
    """Return the mean of values of shape `(n,)` with its interval; NaN without any."""
    if not len(values):
        return dict.fromkeys(("value", "low", "high"), float("nan"))
    return with_intervals(lambda at: {"mean": float(values[at].mean())}, len(values), *draw)["mean"]
