"""evaluation.py: the embedded scorer on a few made-up pairs; what is counted, what brackets what, and what is refused."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from tqdm import tqdm
from typer.testing import CliRunner

from car_datasets import QualityScorer
from car_datasets.cli import app
from car_datasets.loading.templates import Exchange, render
from car_datasets.scoring.inference import TextScores
from car_datasets.training.corruptions import CORRUPTIONS, STYLES, corrupt
from car_datasets.training.evaluation import Evaluation, evaluate_scorer
from car_datasets.training.measures import best_threshold, pair_metrics
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
    """Line breaks, quotes and backslashes are what JSON escapes."""
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
    """A sample without a single copy has no share at all, least of all 0 %."""
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
    monkeypatch.setattr("car_datasets.training.evaluation.tqdm", tqdm)  # that of datasets is disabled in tests
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
