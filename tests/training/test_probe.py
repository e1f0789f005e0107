"""probe.py: the probe names what gives a label away, and never guesses a pair that it has seen."""

from __future__ import annotations

import re

import numpy as np
import pytest

from car_datasets.training.measures import TOKEN, clues, cross_validated, fit_probe, pair_metrics, probe_scores

WORDS = ["sea", "north", "deep", "wide", "blue", "cold", "salt", "wave", "sand", "wind", "gull", "boat"]


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
