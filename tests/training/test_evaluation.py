"""evaluation.py: the embedded scorer on a few made-up pairs; figures against scikit-learn, SciPy or a count by hand."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy.stats import kendalltau
from sklearn.metrics import roc_auc_score
from tqdm import tqdm
from typer.testing import CliRunner

from car_datasets import QualityScorer
from car_datasets.cli import app
from car_datasets.loading.templates import Exchange, render
from car_datasets.scoring.inference import TextScores
from car_datasets.training.corruptions import CORRUPTIONS, STYLES, corrupt
from car_datasets.training.evaluation import (
    TOKEN,
    Evaluation,
    best_threshold,
    clues,
    cross_validated,
    evaluate_scorer,
    fit_probe,
    kendall,
    pair_metrics,
    probe_scores,
    with_intervals,
)
from car_datasets.training.pairs import Pair, as_given, cleaned

TOLD = [
    ("Name three seas.", "", "Baltic", "The North Sea, the Baltic and the Black Sea."),
    ("Add the numbers.", "4, 5, 6", "4 and 5 and 6", "The sum is 15: 4 and 5 make 9, and 6 more make 15."),
    (
        "Why is the sky blue?",
        "",
        "It is.\\nIt is \\u201cblue\\u201d.",
        "Air scatters short waves most.\nBlue is short.",
    ),
    ("Write a line about rain.", "", "rain rain rain rain rain", "Rain taps the roof. It asks to be let in."),
    ("Is the review kind?", "The soup was cold.", "yes I think so it is.", 'No. "Cold" is a complaint.'),
    ("Translate to French.", "Good evening", "Good evening in French", "Bonsoir"),
    ("List two fruits.", "", "carrot, potato, leek", "1. Apple\n2. Pear"),
    ("Explain tides briefly.", "", "Water goes up.", "The moon pulls the sea. Coasts turn through the two bulges."),
    ("Give a synonym of quick.", "", "quickly quicker", "Fast is one. Rapid is another."),
    ("Shorten the sentence.", "He was very, very tired.", "He was very, very tired.", "He was worn out."),
]
PAIRS = [Pair(Exchange(asked, given, worse), Exchange(asked, given, better)) for asked, given, worse, better in TOLD]
OTHER = [Pair(*(row._replace(instruction=f"Please: {row.instruction}") for row in pair)) for pair in PAIRS[:6]]
FIGURES = {"rows", "pairs", "kendall", "auc"}
MUTE = [
    Pair(Exchange(f"Say {word}.", "", f"{word}s"), Exchange(f"Say {word}.", "", word))
    for word in ("sea", "rain", "soup")
]


class ConstantScorer(QualityScorer):
    """Score every text as equally good."""

    def score_texts(self, texts: Any, rank: int | None = None) -> TextScores:
        empty = np.zeros(len(texts), dtype=np.int32)
        same = np.ones(len(texts), dtype=np.float32)
        return TextScores(same, empty, empty.astype(bool), None, same[:, None])


@pytest.fixture(scope="module")
def scorer() -> QualityScorer:
    return QualityScorer()


@pytest.fixture(scope="module")
def evaluation(scorer: QualityScorer) -> Evaluation:
    return evaluate_scorer(scorer, PAIRS, samples=50)


@pytest.fixture(scope="module")
def with_other(scorer: QualityScorer) -> Evaluation:
    return evaluate_scorer(scorer, PAIRS, other=OTHER, samples=5)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pairs")
    found = {}
    for name, pairs in (("pairs", PAIRS), ("other", OTHER)):
        rows = [{"chosen": as_given(better).whole, "rejected": as_given(worse).whole} for worse, better in pairs]
        found[name] = folder / f"{name}.jsonl"
        found[name].write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return found


def score_halves(scorer: QualityScorer, pairs: list[Pair], clean_text: bool) -> list[Any]:
    form = (lambda row: render(cleaned(row), str(scorer.template))) if clean_text else as_given
    return [scorer.score_texts([form(pair[side]) for pair in pairs]).scores for side in (0, 1)]


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["evaluate", "car-datasets/iqs-minilm", *map(str, arguments)])


# --- accuracy


def test_the_structure_is_the_documented_one(evaluation: Evaluation, scorer: QualityScorer) -> None:
    assert (evaluation.model, evaluation.revision, evaluation.pairs) == (scorer.model_id, scorer.revision, 10)
    assert {text: set(found) for text, found in evaluation.accuracy.items()} == dict.fromkeys(
        ("as given", "cleaned"), FIGURES
    )
    assert set(evaluation.baselines) == {"length", "bag of words"}
    for baseline, figures in (("length", FIGURES - {"rows"}), ("bag of words", FIGURES)):
        assert {text: set(found) for text, found in evaluation.baselines[baseline].items()} == dict.fromkeys(
            ("as given", "cleaned"), figures
        )
    assert list(evaluation.corruptions) == ["mismatched", *CORRUPTIONS]
    assert list(evaluation.styles) == list(STYLES)


def test_intervals_bracket_their_values(evaluation: Evaluation) -> None:
    figures = [found for by_name in evaluation.accuracy.values() for found in by_name.values()]
    figures += [
        found for by_text in evaluation.baselines.values() for by_name in by_text.values() for found in by_name.values()
    ]
    figures += [found["outranked"] for found in evaluation.corruptions.values()]
    figures += [found["shift"] for found in evaluation.styles.values()]
    assert len(figures) == 8 + 14 + 8 + 3
    for figure in figures:
        assert set(figure) == {"value", "low", "high"}
        assert figure["low"] <= figure["value"] <= figure["high"]


@pytest.mark.parametrize("text", ["as given", "cleaned"])
def test_accuracy_is_that_of_the_scores(text: str, evaluation: Evaluation, scorer: QualityScorer) -> None:
    expected = pair_metrics(*score_halves(scorer, PAIRS, text == "cleaned"), evaluation.threshold)
    assert {name: figure["value"] for name, figure in evaluation.accuracy[text].items()} == pytest.approx(expected)


def test_length_is_that_of_the_whole_text(evaluation: Evaluation) -> None:
    worse, better = (np.array([len(as_given(pair[side]).whole) for pair in PAIRS]) for side in (0, 1))
    found = {name: figure["value"] for name, figure in evaluation.baselines["length"]["as given"].items()}
    expected = pair_metrics(worse, better)
    assert found == pytest.approx({name: expected[name] for name in FIGURES - {"rows"}})


def test_without_other_pairs_the_threshold_is_fixed(evaluation: Evaluation) -> None:
    assert (evaluation.threshold, evaluation.threshold_from) == (0.5, "fixed")
    assert evaluation.bag_of_words_from == "cross-validated on these pairs"


def test_other_pairs_choose_the_thresholds(with_other: Evaluation, scorer: QualityScorer) -> None:
    assert with_other.threshold == pytest.approx(best_threshold(*score_halves(scorer, OTHER, True)), abs=1e-5)
    assert with_other.threshold_from == "chosen on other pairs"
    assert with_other.bag_of_words_from == "trained on other pairs"
    assert set(with_other.baselines["length"]["cleaned"]) == FIGURES
    assert with_other.pairs == 10


# --- corruptions and styles


def test_counts_are_those_of_the_rows_that_can_be_corrupted(evaluation: Evaluation) -> None:
    rows = [cleaned(row) for pair in PAIRS for row in pair]
    for kind, found in {**evaluation.corruptions, **evaluation.styles}.items():
        assert found["rows"] == sum(copy is not None for copy in corrupt(kind, rows)), kind
    counts = {kind: found["rows"] for kind, found in evaluation.corruptions.items()}
    assert counts["truncated"] == 18  # two answers are one word
    assert counts["shuffled_words"] == 17  # and one repeats a word
    assert counts["empty"] == counts["refusal"] == 20


def test_outranked_and_shift_by_hand(evaluation: Evaluation, scorer: QualityScorer) -> None:
    rows = [cleaned(row) for pair in PAIRS for row in pair]

    def scores(of: list[Exchange]) -> Any:
        return scorer.score_texts([render(row, str(scorer.template)) for row in of]).scores.astype(float)

    of_rows = scores(rows)
    there = {i: copy for i, copy in enumerate(corrupt("truncated", rows)) if copy is not None}
    won = of_rows[list(there)] > scores(list(there.values()))
    assert evaluation.corruptions["truncated"]["outranked"]["value"] == pytest.approx(won.mean())
    opened = scores([copy for copy in corrupt("opening", rows) if copy is not None])
    shift = (opened - of_rows).mean() / of_rows.std()
    assert evaluation.styles["opening"]["shift"]["value"] == pytest.approx(shift, abs=1e-3)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_figures(scorer: QualityScorer) -> None:
    first, same, other = (evaluate_scorer(scorer, PAIRS[:4], samples=9, seed=seed) for seed in (0, 0, 1))
    assert same == first
    scores, again = first.accuracy["cleaned"]["auc"], other.accuracy["cleaned"]["auc"]
    assert again["value"] == scores["value"]
    assert again != scores


def test_escapes_change_nothing_for_a_scorer_that_cleans(evaluation: Evaluation) -> None:
    """Evaluate texts with line breaks, quotes and backslashes, which JSON escapes."""
    assert evaluation.escapes == {"changed": 0, "largest": 0.0, "rows": 4}


@pytest.mark.slow
def test_escapes_change_the_score_of_the_paper_template() -> None:
    found = evaluate_scorer(QualityScorer(template="paper"), PAIRS[:5], samples=2)
    assert found.escapes["rows"] == 3
    assert 1 <= found.escapes["changed"] <= 3
    assert found.escapes["largest"] > 1e-3


@pytest.mark.slow
def test_kinds_that_no_row_can_have_are_null(scorer: QualityScorer) -> None:
    found = evaluate_scorer(scorer, MUTE, samples=5)
    assert found.corruptions["truncated"]["rows"] == found.corruptions["shuffled_sentences"]["rows"] == 0
    assert math.isnan(found.corruptions["truncated"]["outranked"]["value"])
    content = json.loads(found.to_json(), parse_constant=pytest.fail)
    assert content["corruptions"]["truncated"] == {"outranked": dict.fromkeys(("value", "low", "high")), "rows": 0}


@pytest.mark.slow
def test_intervals_draw_only_pairs_that_have_a_copy(scorer: QualityScorer) -> None:
    """Draw no sample without a copy, which would have no share rather than one of 0 %."""
    long = Exchange("Name three seas.", "", "The North Sea is the one in the north.")
    found = evaluate_scorer(scorer, [*MUTE, Pair(MUTE[0].worse, long)], samples=50).corruptions["repeated"]
    assert found["rows"] == 1
    assert found["outranked"]["low"] == found["outranked"]["value"] == found["outranked"]["high"]


def test_a_scorer_without_an_opinion_ties_with_everything() -> None:
    found = evaluate_scorer(ConstantScorer(), PAIRS, samples=5)
    assert found.accuracy["cleaned"]["pairs"] == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert found.accuracy["cleaned"]["kendall"]["value"] == 0
    assert {part["outranked"]["value"] for part in found.corruptions.values()} == {0.5}
    assert all(part["rows"] == 0 and math.isnan(part["shift"]["value"]) for part in found.styles.values())


# --- printing


def test_to_json_round_trips(evaluation: Evaluation, with_other: Evaluation) -> None:
    for found in (evaluation, with_other):
        assert Evaluation(**json.loads(found.to_json(), parse_constant=pytest.fail)) == found
    assert [field.name for field in dataclasses.fields(Evaluation)] == list(json.loads(evaluation.to_json()))


def test_the_tables_print_every_kind(evaluation: Evaluation, with_other: Evaluation) -> None:
    for found, rows in ((evaluation, "fixed"), (with_other, "chosen on other pairs")):
        console = Console(file=io.StringIO(), width=140)
        tables = found.to_tables()
        assert [table.row_count for table in tables] == [6, 8, 4]
        for table in tables:
            console.print(table)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        value = 100 * found.accuracy["cleaned"]["pairs"]["value"]
        for part in (
            "on 10 pairs",
            f"{value:.1f} % [",
            "scorer, text as given",
            *CORRUPTIONS,
            *STYLES,
            rows,
            "0 scores change",
        ):
            assert part in text


# --- mistakes


@pytest.mark.parametrize("pairs", [[], PAIRS[:1]])
def test_fewer_than_two_pairs(pairs: list[Pair], scorer: QualityScorer) -> None:
    with pytest.raises(ValueError, match=f"pairs: {len(pairs)} given; intervals need at least 2"):
        evaluate_scorer(scorer, pairs)


def test_no_samples(scorer: QualityScorer) -> None:
    with pytest.raises(ValueError, match="samples=0 must be at least 1"):
        evaluate_scorer(scorer, PAIRS, samples=0)


@pytest.mark.parametrize("answer", ["Baltic", ""], ids=["a row", "a copy"])
def test_scores_that_are_not_finite_are_refused(answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class BrokenScorer(ConstantScorer):
        def score_texts(self, texts: Any, rank: int | None = None) -> TextScores:
            found = super().score_texts(texts, rank)
            found.scores[[text.answer == f"Response: {answer}" for text in texts]] = np.nan
            return found

    with pytest.raises(ValueError, match=r"\d+ of \d+ scores of car-datasets/iqs-minilm are not finite"):
        evaluate_scorer(BrokenScorer(), PAIRS, samples=2)


# --- the command


def test_the_command_prints_and_writes_the_figures(
    files: dict[str, Path], with_other: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.utils.tqdm", tqdm)  # that of datasets is disabled in tests
    output = tmp_path / "new" / "figures.json"
    done = run("--pairs", files["pairs"], "--other", files["other"], "--samples", 5, "--json", output)
    assert done.exit_code == 0, done.output
    assert json.loads(output.read_text(encoding="utf-8")) == json.loads(with_other.to_json())
    assert "on 10 pairs" in done.stdout
    assert "mismatched" in done.stdout
    assert "bullets" in done.stdout
    assert re.search(r"Scoring: 100%\|.*\| (\d+)/\1 ", done.stderr)


def test_the_command_overwrites_nothing(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "figures.json").write_text("mine")
    done = run("--pairs", files["pairs"], "--json", tmp_path / "figures.json")
    assert done.exit_code == 2
    assert "is there already; name another file" in done.stderr
    assert done.stderr.count("\n") == 1
    assert (tmp_path / "figures.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("src,score\n", (), "holds no rows"),
        (None, (), "There is no file"),
        ("src,pos,neg\nInstruction: a,Response: b,Response: c\n", (), "pairs: 1 given"),
        ("src,pos,neg\n" + "Instruction: a,Response: b,Response: c\n" * 2, ("--samples", 0), "samples=0 must be"),
    ],
)
def test_a_mistake_is_one_line(content: str | None, options: tuple[Any, ...], message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "pairs.csv").write_text(content)
    done = run("--pairs", tmp_path / "pairs.csv", *options)
    assert done.exit_code == 2
    assert done.stderr.startswith("car-datasets: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


# The measures: figures, thresholds, intervals, and the bag-of-words baseline.

WORDS = ["sea", "north", "deep", "wide", "blue", "cold", "salt", "wave", "sand", "wind", "gull", "boat"]
Halves = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]


def halves(values: st.SearchStrategy[float]) -> st.SearchStrategy[Halves]:
    columns = st.lists(st.tuples(values, values), min_size=1, max_size=30)
    return columns.map(lambda rows: (np.array([a for a, _ in rows]), np.array([b for _, b in rows])))


WITH_TIES = halves(st.integers(-3, 3).map(float))
WITHOUT = halves(st.floats(-1e6, 1e6))
SCORES = st.one_of(WITH_TIES, WITHOUT)


def row_accuracy(worse: npt.NDArray[np.float64], better: npt.NDArray[np.float64], threshold: float) -> float:
    return (np.mean([w <= threshold for w in worse]) + np.mean([b > threshold for b in better])) / 2


# --- measures


@given(SCORES)
@settings(deadline=None)
def test_auc_and_tau_are_those_of_scikit_learn_and_scipy(scores: Halves) -> None:
    together, labels = np.concatenate(scores), np.repeat([0, 1], len(scores[0]))
    found = pair_metrics(*scores)
    assert found["auc"] == pytest.approx(roc_auc_score(labels, together))
    if len(set(together.tolist())) > 1:
        assert found["kendall"] == pytest.approx(kendalltau(together, labels).statistic, abs=1e-9)
    else:
        assert found["kendall"] == 0
    assert found["kendall"] == pytest.approx(kendall(together, labels), abs=1e-9)


def test_pairs_and_rows_by_hand() -> None:
    worse, better = np.array([0.1, 0.5, 0.7, 0.9]), np.array([0.6, 0.5, 0.2, 0.95])
    found = pair_metrics(worse, better)
    assert found["pairs"] == (1 + 0.5 + 0 + 1) / 4
    assert found["rows"] == (2 + 2) / 8  # 0.5 is not above the threshold
    assert pair_metrics(worse, better, 0.55)["rows"] == 4 / 8
    assert pair_metrics(worse, better, 2.0)["rows"] == 0.5


@given(SCORES)
@settings(deadline=None)
def test_halves_in_the_other_order_mirror_the_figures(scores: Halves) -> None:
    found, mirrored = pair_metrics(*scores), pair_metrics(*scores[::-1])
    assert mirrored["pairs"] == pytest.approx(1 - found["pairs"])
    assert mirrored["auc"] == pytest.approx(1 - found["auc"])
    assert mirrored["kendall"] == pytest.approx(-found["kendall"])


def test_many_ties_do_not_overflow() -> None:
    scores = np.zeros(200_000), np.ones(200_000)
    assert pair_metrics(*scores) == {"rows": 1.0, "pairs": 1.0, "kendall": pytest.approx(1), "auc": 1.0}


def test_kendall_of_graded_labels() -> None:
    assert kendall([1, 2, 3, 4], [0.1, 0.2, 0.4, 0.3]) == pytest.approx(4 / 6)
    assert kendall([1, 2, 3], [0.5, 0.5, 0.5]) == 0
    assert kendall([2, 2, 2], [0.1, 0.5, 0.7]) == 0


# --- threshold


@given(SCORES)
@settings(deadline=None)
def test_no_threshold_is_better_than_the_best(scores: Halves) -> None:
    values = sorted({*scores[0], *scores[1]})
    every = [values[0] - 1, *values, *((a + b) / 2 for a, b in pairwise(values))]
    best = max(row_accuracy(*scores, threshold) for threshold in every)
    found = best_threshold(*scores)
    assert row_accuracy(*scores, found) == pytest.approx(best)
    assert pair_metrics(*scores, found)["rows"] == pytest.approx(best)


def test_best_threshold_lies_in_the_middle_of_the_gap() -> None:
    assert best_threshold(np.array([0.1, 0.2]), np.array([0.6, 0.9])) == pytest.approx(0.4)
    assert best_threshold(np.array([0.5]), np.array([0.5])) == 0.5


def test_a_scorer_that_ranks_backwards_is_best_without_good_rows() -> None:
    worse, better = np.array([3.0, 4.0]), np.array([1.0, 2.0])
    assert pair_metrics(worse, better, best_threshold(worse, better))["rows"] == 0.5


# --- intervals


def mean_of(values: npt.NDArray[np.float64], samples: int = 500, seed: int = 0) -> dict[str, float]:
    return with_intervals(lambda at: {"mean": float(values[at].mean())}, len(values), samples, seed)["mean"]


def test_an_interval_holds_the_value_and_depends_on_the_seed_only() -> None:
    values = np.random.default_rng(0).normal(size=100)
    found = mean_of(values)
    assert found["value"] == pytest.approx(values.mean())
    assert found["low"] < found["value"] < found["high"]
    assert found == mean_of(values)
    assert found != mean_of(values, seed=1)


def test_more_pairs_make_a_narrower_interval() -> None:
    values = np.random.default_rng(0).normal(size=4000)
    few, many = mean_of(values[:100]), mean_of(values)
    assert many["high"] - many["low"] < (few["high"] - few["low"]) / 3


def test_the_interval_of_a_mean_is_the_one_that_theory_gives() -> None:
    values = np.random.default_rng(0).normal(size=1000)
    found = mean_of(values, samples=2000)
    error = values.std() / 1000**0.5
    assert found["low"] == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert found["high"] == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_where_nothing_varies_the_interval_is_a_point() -> None:
    assert mean_of(np.full(5, 0.25)) == {"value": 0.25, "low": 0.25, "high": 0.25}


def test_whole_pairs_are_drawn() -> None:
    """Draw from pairs that are all ranked right by a little: rows drawn one by one would overlap."""
    worse = np.random.default_rng(0).normal(size=50)
    found = with_intervals(lambda at: pair_metrics(worse[at], worse[at] + 1e-6), 50, 100)
    assert found["pairs"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert set(found) == {"rows", "pairs", "kendall", "auc"}


@pytest.mark.parametrize("samples", [0, -1])
def test_no_interval_without_samples(samples: int) -> None:
    with pytest.raises(ValueError, match=f"samples={samples} must be at least 1"):
        mean_of(np.ones(3), samples)


# --- the bag-of-words baseline names what gives a label away, and never guesses a pair that it has seen


def random_texts(count: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [
        f"Instruction: name {' '.join(rng.choice(WORDS, 4))} Response: {' '.join(rng.choice(WORDS, 6))}"
        for _ in range(count)
    ]


def test_tokens_are_escapes_words_line_breaks_and_signs() -> None:
    text = 'a\\nb \\u2019s\n"c", d_1 é\t!'
    assert re.findall(TOKEN, text) == ["a", "\\n", "b", "\\u2019", "s", "\n", '"', "c", '"', ",", "d_1", "é", "!"]


@pytest.mark.parametrize(
    ("token", "planted"),
    [
        ("\\n", "one\\ntwo"),
        ("\n", "one\ntwo"),
        ('\\"', 'one\\" two'),
        ("\\u2019", "one\\u2019 two"),
        ("•", "one • two"),
    ],
)
@pytest.mark.parametrize("side", ["worse", "better"])
def test_a_planted_clue_is_the_first(token: str, planted: str, side: str) -> None:
    plain, marked = random_texts(60, 0), [f"{text} {planted}" for text in random_texts(60, 1)]
    plain = [f"{text} one two" for text in plain]
    worse, better = (marked, plain) if side == "worse" else (plain, marked)
    first, *_ = found = clues(worse, better)
    assert first.token == token
    assert (first.worse, first.better) == pytest.approx((1, 0) if side == "worse" else (0, 1))
    assert (first.weight > 0) == (side == "better")
    assert len(found) == 10
    assert len(clues(worse, better, top=3)) == 3
    assert pair_metrics(*cross_validated(worse, better))["pairs"] > 0.95


def test_shares_count_texts_and_not_occurrences() -> None:
    worse, better = ["sea sea sea", "wind", "wind", "sea"], ["wind wind"] * 4
    found = {clue.token: clue for clue in clues(worse, better)}
    assert (found["sea"].worse, found["sea"].better) == (0.5, 0)
    assert (found["wind"].worse, found["wind"].better) == (0.5, 1)


def test_the_probe_reads_no_order() -> None:
    probe = fit_probe(["north sea deep"] * 5, ["wide blue sea"] * 5)
    assert probe_scores(probe, ["deep north sea"])[0] == probe_scores(probe, ["sea sea deep north"])[0] < 0.5


def test_random_texts_are_guessed_no_better_than_by_chance() -> None:
    assert pair_metrics(*cross_validated(random_texts(200, 0), random_texts(200, 1)))["pairs"] == pytest.approx(
        0.5, abs=0.1
    )


def test_cross_validation_does_not_see_its_own_group() -> None:
    """Give each group a word of its own on each side, by which a probe that has seen the group knows it."""
    groups = [i // 4 for i in range(80)]
    worse, better = ([f"Response: {side}{group}" for group in groups] for side in ("left", "right"))
    apart = cross_validated(worse, better, groups)
    assert pair_metrics(*apart)["pairs"] == 0.5
    assert pair_metrics(*cross_validated(worse, better))["pairs"] == 1.0


def test_there_are_as_many_folds_as_groups_at_most() -> None:
    worse, better = ["sea north"] * 6, ["sea wide"] * 6
    found = cross_validated(worse, better, [0, 0, 0, 7, 7, 7])
    assert [half.shape for half in found] == [(6,), (6,)]
    assert (found[1] > found[0]).all()


def test_constant_texts_tell_nothing() -> None:
    worse, better = cross_validated(["sea"] * 6, ["sea"] * 6)
    assert worse.tolist() == better.tolist() == [0.5] * 6
    assert [(clue.token, clue.weight) for clue in clues(["sea"] * 6, ["sea"] * 6)] == [("sea", 0.0)]


@pytest.mark.parametrize("texts", [["", "", ""], ["one", "two", "three"]], ids=["empty", "no word twice"])
def test_texts_without_a_word_in_common_are_refused(texts: list[str]) -> None:
    with pytest.raises(ValueError, match=r"empty vocabulary|no terms remain"):
        cross_validated(texts, [text.upper() + "s" * bool(text) for text in texts])


@pytest.mark.parametrize(("pairs", "groups"), [(3, [4, 4, 4]), (1, None), (0, None)])
def test_fewer_than_two_groups(pairs: int, groups: list[int] | None) -> None:
    with pytest.raises(ValueError, match=f"at least 2 groups, found {min(pairs, 1)}"):
        cross_validated(["sea"] * pairs, ["wind"] * pairs, groups)
