"""measures.py: figures against scikit-learn, SciPy or a count by hand; intervals; the bag-of-words baseline."""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau
from sklearn.metrics import roc_auc_score

from car_datasets.training.measures import (
    TOKEN,
    best_threshold,
    clues,
    cross_validated,
    fit_probe,
    kendall,
    pair_metrics,
    probe_scores,
    with_intervals,
)

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


# --- figures


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
    """Of pairs that are all ranked right by a hair, every sample is; rows drawn apart would overlap."""
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
    """Each group has a word of its own on each side: a probe that has seen the group knows it, another cannot."""
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
