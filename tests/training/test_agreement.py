"""agreement.py: planted scores on made-up rated rows; figures against scikit-learn, SciPy or a count by hand."""

from __future__ import annotations

import csv
import json
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from car_datasets import QualityScorer
from car_datasets.cli import app
from car_datasets.loading.kinds import kinds_of
from car_datasets.loading.templates import Exchange
from car_datasets.scoring.inference import TextScores
from car_datasets.scoring.iqs.heads import JUDGED, PARTS
from car_datasets.training.agreement import BOTH, BROKEN, LENGTH, SCORE, Agreement, evaluate_ratings
from car_datasets.training.corruptions import FINE_CORRUPTIONS, FINE_STYLES, STYLES, corrupt
from car_datasets.training.evaluation import KINDS
from car_datasets.training.pairs import Pair, cleaned
from car_datasets.training.ratings import Ratings

ROWS = 120
FAULTS_USED = ("wrong", "incomplete", "constraint")  # the first three, which the rows have in turn
TEXTS = [
    ("Name {} rivers of Europe.", "The Rhine, the Elbe and {} more rivers with long names. They flow north."),
    ("Write a function for {}.", "def number():\n    return {}"),
    ("Which number follows {}?", "It is {}."),
    (
        "Why does tide {} come late?",
        "The moon pulls the sea. Coast {} lies behind a strait that the water has to pass.",
    ),
]


def make_ratings(rows: int = ROWS) -> Ratings:
    """Return rows of two sources whose soundness and worth are drawn at random; every tenth has no worth."""
    rng = np.random.default_rng(3)
    soundness = rng.integers(0, 11, rows).astype(np.float32)
    worth = rng.integers(0, 11, rows).astype(np.float32)
    worth[::10] = np.nan
    fault = np.where(soundness >= 8, 0, 1 + np.arange(rows) % 3)
    texts = [TEXTS[i % 4] for i in range(rows)]
    exchanges = [Exchange(asked.format(i), "", answer.format("a" * (i % 7))) for i, (asked, answer) in enumerate(texts)]
    return Ratings(exchanges, soundness, fault, worth, ["one" if i % 3 else "two" for i in range(rows)], [])


def plant(ratings: Ratings, scores: Any, parts: bool = False) -> QualityScorer:
    """Return a scorer that gives these scores to rated rows and .5 more to copies of them; its parts are the ratings."""
    rows = [cleaned(row) for row in ratings.rows]
    known = {(row.instruction, row.response): i for i, row in enumerate(rows)}
    first = {row.instruction: i for i, row in reversed(list(enumerate(rows)))}

    class Planted(QualityScorer):
        def score_texts(self, texts: Any, rank: int | None = None) -> TextScores:
            asked = [text.question.removeprefix("Instruction: ") for text in texts]
            answers = [text.answer.removeprefix("Response: ") for text in texts]
            at = [known.get(pair, first[pair[0]]) for pair in zip(asked, answers, strict=True)]
            copied = np.array([pair not in known for pair in zip(asked, answers, strict=True)])
            found = (np.asarray(scores)[at] + 0.5 * copied).astype(np.float32)
            judged = np.zeros((len(at), JUDGED), dtype=np.float32)
            judged[:, PARTS.index("soundness")] = ratings.soundness[at]
            empty = np.zeros(len(at), dtype=np.int32)
            return TextScores(found, empty, empty.astype(bool), None, found[:, None], judged if parts else None)

    return Planted()


@pytest.fixture(scope="module")
def ratings() -> Ratings:
    return make_ratings()


@pytest.fixture(scope="module")
def scores(ratings: Ratings) -> Any:
    """Return soundness blurred by noise."""
    return ratings.soundness + np.random.default_rng(4).normal(0, 3, ROWS)


@pytest.fixture(scope="module")
def found(ratings: Ratings, scores: Any) -> Agreement:
    return evaluate_ratings(plant(ratings, scores, parts=True), ratings, samples=40)


def values(figures: dict[str, Any]) -> dict[str, float]:
    return {name: figure["value"] for name, figure in figures.items()}


# --- agreement


def test_agreement_is_that_of_scikit_learn_and_scipy(found: Agreement, ratings: Ratings, scores: Any) -> None:
    told, sound, worth = values(found.agreement[SCORE]), ratings.soundness, ratings.worth
    ends = (sound <= 4) | (sound >= 8)
    scores = scores.astype(np.float32)
    assert told["faulty"] == pytest.approx(roc_auc_score(sound[ends] >= 8, scores[ends]))
    assert told["soundness"] == pytest.approx(spearmanr(scores, sound)[0])
    known = ~np.isnan(worth)
    assert told["worth"] == pytest.approx(spearmanr(scores[known], worth[known])[0])
    assert told["product"] == pytest.approx(spearmanr(scores[known], (sound * worth)[known])[0])
    lengths = [len(cleaned(row).response) for row in ratings.rows]
    a, b, c = (spearmanr(*two)[0] for two in ((scores, sound), (scores, lengths), (sound, lengths)))
    assert told["soundness_length_held"] == pytest.approx((a - b * c) / np.sqrt((1 - b**2) * (1 - c**2)))
    for figures in found.agreement.values():
        assert all(f["low"] <= f["value"] <= f["high"] for f in figures.values())


def test_parts_and_length_are_ranked_by_as_well(found: Agreement) -> None:
    assert list(found.agreement) == [SCORE, "iqs_expert", "iqs_soundness", "iqs_worth", BOTH, LENGTH]
    told = values(found.agreement["iqs_soundness"])
    assert told["faulty"] == pytest.approx(1) and told["soundness"] == pytest.approx(1)
    assert values(found.agreement["iqs_worth"])["soundness"] == 0  # constant
    assert {value for name, value in values(found.agreement[LENGTH]).items() if "held" in name} == {0}


def test_a_score_that_is_length_alone_keeps_nothing_when_length_is_held(ratings: Ratings) -> None:
    lengths = np.array([len(cleaned(row).response) for row in ratings.rows])
    told = values(evaluate_ratings(plant(ratings, lengths), ratings, samples=2).agreement[SCORE])
    assert told["soundness"] != 0 and told["soundness_length_held"] == 0


def test_sources_and_faults_are_those_of_their_rows(found: Agreement, ratings: Ratings, scores: Any) -> None:
    assert found.sources == {"two": 40, "one": 80}
    of_one = np.array(ratings.source) == "one"
    expected = spearmanr(scores[of_one].astype(np.float32), ratings.soundness[of_one])[0]
    assert values(found.by_source["one"][SCORE])["soundness"] == pytest.approx(expected)
    sound = ratings.soundness >= 8
    assert list(found.faults) == list(FAULTS_USED)
    for i, fault in enumerate(FAULTS_USED, 1):
        faulty = ratings.fault == i
        assert found.faults[fault]["rows"] == faulty.sum()
        some = faulty | sound
        expected = roc_auc_score(sound[some], scores[some].astype(np.float32))
        assert found.faults[fault][SCORE]["value"] == pytest.approx(expected)


def test_kinds_of_the_best_tenth_by_hand(found: Agreement, ratings: Ratings, scores: Any) -> None:
    rows = [cleaned(row) for row in ratings.rows]
    kinds = np.array(kinds_of([row.instruction for row in rows], [row.response for row in rows]))
    best = np.isin(np.arange(ROWS), np.argsort(-scores)[:12])
    assert set(found.kinds) == set(kinds)
    for kind, row in found.kinds.items():
        assert row["rows"] == (kinds == kind).sum()
        assert row["pool"]["value"] == pytest.approx((kinds == kind).mean())
        assert row["best_tenth"]["value"] == pytest.approx((kinds[best] == kind).mean())
        assert row["kept"]["value"] == pytest.approx(best[(kinds == kind) & (ratings.soundness >= 8)].mean())


def test_copies_differ_from_their_rows_by_what_was_planted(found: Agreement, ratings: Ratings, scores: Any) -> None:
    assert list(found.styles) == [*STYLES, *FINE_STYLES]
    assert list(found.corruptions) == [*KINDS, *FINE_CORRUPTIONS]
    rows = [cleaned(row) for row in ratings.rows]
    for kind, row in {**found.styles, **found.corruptions}.items():
        assert row["rows"] == sum(copy is not None for copy in corrupt(kind, rows))
        # A copy has the parts of its row, and .5 more of the score.
        score, part = (0.5 / scores.std(), 0) if kind in found.styles else (0, 0.5)
        if row["rows"]:
            assert row[SCORE]["value"] == pytest.approx(score, abs=1e-3)
            assert row["iqs_soundness"]["value"] == part


def test_pairs_that_the_reader_calls_equal_or_decides() -> None:
    asked = [f"Which hill is number {i // 2}?" for i in range(40)]
    rows = [Exchange(asked[i], "", f"Hill {i}, and no other.") for i in range(40)]
    # Ten pairs of equal soundness; of the other ten, the expert's row is the less sound one in four.
    sound = np.array([9, 9] * 10 + [2, 8] * 6 + [8, 2] * 4, dtype=np.float32)
    ratings = Ratings(rows, sound, (sound < 8).astype(np.int64), np.ones(40, np.float32), ["x"] * 40, [])
    pairs = [Pair(rows[i], rows[i + 1]) for i in range(0, 40, 2)]
    liked = np.arange(40) % 2 * 2.0  # of each pair always the second, by 2
    found = evaluate_ratings(
        plant(ratings, liked), ratings, pairs=[*pairs, Pair(*rows[:1], rows[0]._replace(response="?"))], samples=5
    )
    assert found.pair_counts == {"ties": 10, "decided": 10}
    assert found.pairs[SCORE]["ties"]["value"] == pytest.approx(2 / liked.std())
    assert found.pairs[SCORE]["decided"]["value"] == pytest.approx(0.6)
    assert evaluate_ratings(plant(ratings, liked), ratings, samples=2).pairs == {}


def test_baselines_learn_from_other_ratings_of_other_questions(ratings: Ratings, scores: Any) -> None:
    other = make_ratings(200)  # of which the first 120 ask what is measured
    former = plant(ratings, -np.asarray(scores))
    found = evaluate_ratings(plant(ratings, scores), ratings, other=other, former=former, samples=2)
    assert found.bag_of_words_from == 80
    bags = [f"bag of words, {target}" for target in ("soundness", "worth", "product")]
    assert list(found.agreement) == [SCORE, LENGTH, *bags, f"former: {former.model_id}"]
    told, before = (values(found.agreement[name])["soundness"] for name in (SCORE, f"former: {former.model_id}"))
    assert before == pytest.approx(-told)
    with pytest.raises(ValueError, match="other: 0 of its 120 rows ask something that the rated rows do not ask"):
        evaluate_ratings(plant(ratings, scores), ratings, other=ratings)


# --- what it prints


def test_tables_and_json_show_the_figures(found: Agreement) -> None:
    console = Console(file=StringIO(), width=200)
    for table in found.to_tables():
        console.print(table)
    shown = console.file.getvalue()
    for name in (
        "faulty / sound",
        "soundness, length held",
        "iqs_soundness",
        "two (40)",
        "incomplete",
        "code",
        "bullets",
        "shuffled_sentences",
    ):
        assert name in shown, name
    assert f"{found.agreement[SCORE]['faulty']['value']:.3f} [" in shown
    plain = json.loads(found.to_json())
    assert plain["agreement"][SCORE] == found.agreement[SCORE]


# --- bad input, before a model is loaded


def write(folder: Path, rows: list[list[Any]], header: str = "instruction,output,soundness,fault,worth,source") -> Path:
    with (folder / "rated.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header.split(","), *rows])
    return folder / "rated.csv"


GOOD = [[f"What is {i}?", f"It is {i}.", 9 if i % 2 else 3, "none" if i % 2 else "wrong", 4, "mine"] for i in range(8)]


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        ([*GOOD, ["Q?", "A.", 10.5, "none", 1, ""]], None, "row 9: soundness='10.5' must be a number from 0 to 10"),
        ([*GOOD, ["Q?", "A.", 10, "sad", 1, ""]], None, "row 9: fault='sad' is not known"),
        ([[*row[:2], 9, *row[3:]] for row in GOOD], None, "every soundness is 9"),
        ([[*row[:2], row[2] / 9 * 5 + 3, *row[3:]] for row in GOOD], None, "telling faulty rows from sound ones takes both"),
        ([["lost", 0, 9, "none", 1, ""]], "file,row,soundness,fault,worth,source", "file='lost' points nowhere"),
        ([[0, 9, "none", 1, "", ""]], "row,soundness,fault,worth,a,b", "so ['file'] too"),
    ],
)  # fmt: skip
def test_bad_ratings_are_refused_before_a_model_is_loaded(
    rows: list[Any], header: str | None, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path, rows, *([] if header is None else [header]))
    # A model that does not exist would be named first if it were looked up.
    done = CliRunner().invoke(app, ["evaluate", str(tmp_path / "no-model"), "--ratings", str(path)])
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "on --pairs FILE, on --ratings FILE, or on both"),
        (["--pairs", "x.csv", "--former", "y"], "--former y is of use with --ratings FILE only"),
        (["--ratings", "x.csv", "--engine", "y"], "--engine y is of use with --pairs FILE only"),
    ],
)
def test_options_that_lack_their_file_are_refused(options: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["evaluate", "no-model", *options])
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())


def test_the_command_reads_ratings_that_are_columns_of_the_rows(tmp_path: Path) -> None:
    path, output = write(tmp_path, GOOD), tmp_path / "figures.json"
    model = "car-datasets/iqs-minilm"
    options = ["--ratings", path, "--samples", 2, "--former", model, "--json", output]
    done = CliRunner().invoke(app, ["evaluate", model, *map(str, options)])
    assert done.exit_code == 0, done.output
    figures = json.loads(output.read_text(encoding="utf-8"))["ratings"]
    assert figures["sources"] == {"mine": 8}
    # The last digit of a correlation depends on the place of the ranker among the others.
    found, former = figures["agreement"][SCORE], figures["agreement"][f"former: {model}"]
    assert found.keys() == former.keys()
    assert all(former[name] == pytest.approx(figure, rel=1e-12) for name, figure in found.items())


def test_purity_counts_broken_rows_in_the_best_tenth(ratings: Ratings) -> None:
    found = evaluate_ratings(plant(ratings, np.zeros(ROWS), parts=True), ratings, samples=4)
    assert found.purity[SCORE]["value"] == 1  # every copy is planted .5 higher
    # Parts are those of the row, so a copy is only as likely to be there as a row; fewer, as rows come first among equals.
    assert 0 < found.purity["iqs_soundness"]["value"] < BROKEN + 0.1
