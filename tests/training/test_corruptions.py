"""corruptions.py: a copy differs in what its kind says, in nothing else, and the same way every time."""

from __future__ import annotations

import random
import re
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from car_datasets.loading.templates import Exchange
from car_datasets.training.corruptions import (
    BULLETS,
    CORRUPTIONS,
    FILLERS,
    OPENINGS,
    REFUSALS,
    STYLES,
    corrupt,
    draw_corruptions,
    mismatched,
    sentences,
)

KINDS = ["mismatched", *CORRUPTIONS, *STYLES]
RANDOM_KINDS = ["mismatched", "shuffled_words", "shuffled_sentences", "refusal", "opening", "bullets", "filler"]
ROW = Exchange(
    "Name three seas.", "in Europe", "The North Sea is one. The Baltic is another. Last comes the Black Sea!"
)
WORD = Exchange("Name a sea.", "", "Baltic")
EMPTY = Exchange("Name a sea.", "", " ")
ROWS = st.lists(st.tuples(*[st.text("ab .\n", max_size=12)] * 3).map(lambda parts: Exchange(*parts)), max_size=25)


@pytest.fixture(scope="module")
def sample(sample_rows: list[dict[str, Any]]) -> list[Exchange]:
    return [Exchange(row["instruction"], row["input"], row["output"]) for row in sample_rows]


def copy_of(kind: str, row: Exchange = ROW, seed: int = 0, phrases: str = "evaluate") -> str:
    [copy] = corrupt(kind, [row], seed, phrases)
    assert copy is not None
    return copy.response


# --- all kinds


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("phrases", ["train", "evaluate"])
def test_a_copy_differs_in_its_response_and_only_there(kind: str, phrases: str, sample: list[Exchange]) -> None:
    before = list(sample)
    copies = corrupt(kind, sample, 0, phrases)
    assert sample == before
    assert len(copies) == len(sample)
    assert sum(copy is not None for copy in copies) > len(sample) / 4
    for copy, row in zip(copies, sample, strict=True):
        if copy is not None:
            assert copy[:2] == row[:2]
            assert copy.response.split() != row.response.split()


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_copies(kind: str, sample: list[Exchange]) -> None:
    assert corrupt(kind, sample, 3) == corrupt(kind, sample, 3)
    assert (corrupt(kind, sample, 3) != corrupt(kind, sample, 4)) == (kind in RANDOM_KINDS)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "empty"])
def test_only_one_kind_empties_an_answer(kind: str, sample: list[Exchange]) -> None:
    for copy in corrupt(kind, [*sample, WORD, EMPTY]):
        assert copy is None or copy.response.strip()


@pytest.mark.parametrize(
    ("kind", "response"),
    [
        ("truncated", "Baltic"),
        ("truncated", ""),
        ("repeated", "The Baltic Sea"),
        ("repeated", "sea sea sea sea"),
        ("shuffled_words", "Baltic"),
        ("shuffled_words", "sea sea"),
        ("shuffled_sentences", "The Baltic is one of them."),
        ("shuffled_sentences", "Yes.\nYes."),
        ("empty", " \n"),
        ("echo", "Name  a sea."),
        ("bullets", ""),
        ("mismatched", "Baltic"),
    ],
)
def test_there_is_no_copy_where_nothing_can_change(kind: str, response: str) -> None:
    assert corrupt(kind, [Exchange("Name a sea.", "", response)]) == [None]


@given(ROWS, st.sampled_from(KINDS), st.integers(0, 3))
def test_any_rows_can_be_corrupted(rows: list[Exchange], kind: str, seed: int) -> None:
    copies = corrupt(kind, rows, seed)
    assert len(copies) == len(rows)
    assert all(
        c is None or (c[:2] == r[:2] and c.response.split() != r.response.split())
        for c, r in zip(copies, rows, strict=True)
    )


@pytest.mark.parametrize(("kind", "phrases"), [("reversed", "train"), ("opening", "test")])
def test_a_kind_or_half_that_is_not_known(kind: str, phrases: str) -> None:
    with pytest.raises(ValueError, match=r"kind='reversed' is not known; choose|phrases='test' is not known; choose"):
        corrupt(kind, [ROW], phrases=phrases)


# --- corruptions


def test_truncated_is_the_first_half_of_the_words() -> None:
    assert copy_of("truncated").split() == ROW.response.split()[:7]
    assert copy_of("truncated", ROW._replace(response="one two three")) == "one"


def test_repeated_says_the_first_quarter_four_times() -> None:
    assert copy_of("repeated") == "The North Sea " * 3 + "The North Sea"


@given(st.lists(st.sampled_from(["sea", "north", "red"]), max_size=8), st.integers(0, 5))
def test_shuffled_words_keep_the_words_in_another_order(words: list[str], seed: int) -> None:
    [copy] = corrupt("shuffled_words", [Exchange("Say.", "", " ".join(words))], seed)
    if len(set(words)) < 2:
        assert copy is None
    else:
        assert copy is not None
        assert copy.response.split() != words
        assert Counter(copy.response.split()) == Counter(words)


@pytest.mark.parametrize("seed", range(6))
def test_shuffled_sentences_keep_the_sentences_in_another_order(seed: int) -> None:
    two = ROW._replace(response="It is wide.\nIt is deep.")
    assert copy_of("shuffled_sentences", two, seed) == "It is deep. It is wide."
    assert sorted(sentences(copy_of("shuffled_sentences", seed=seed))) == sorted(sentences(ROW.response))


def test_empty_and_echo() -> None:
    assert copy_of("empty") == ""
    assert copy_of("echo") == "Name three seas. in Europe"
    assert copy_of("echo", WORD) == "Name a sea."


@pytest.mark.parametrize("phrases", ["train", "evaluate"])
def test_phrases_are_those_of_their_half(phrases: str) -> None:
    openings = {f"{opening} {ROW.response}" for opening in OPENINGS[phrases]}
    fillers = {f"{before} {ROW.response} {after}".strip() for before, after in FILLERS[phrases]}
    for kind, known in (("refusal", set(REFUSALS[phrases])), ("opening", openings), ("filler", fillers)):
        seen = {copy_of(kind, seed=seed, phrases=phrases) for seed in range(40)}
        assert seen <= known
        assert len(seen) > min(len(known), 20) / 2


def test_training_and_evaluation_share_no_phrase() -> None:
    for halves in (REFUSALS, OPENINGS):
        assert set(halves["train"]).isdisjoint(halves["evaluate"])
    train, evaluate = ({part for pair in FILLERS[half] for part in pair} - {""} for half in ("train", "evaluate"))
    assert train.isdisjoint(evaluate)


# --- mismatched


@pytest.mark.parametrize("seed", range(3))
def test_mismatched_is_an_answer_of_like_length_to_another_instruction(seed: int, sample: list[Exchange]) -> None:
    lengths = sorted(len(row.response) for row in sample)
    asked: dict[str, set[str]] = {}
    for row in sample:
        asked.setdefault(row.response, set()).add(row.instruction)
    copies = corrupt("mismatched", sample, seed)
    assert sum(copy is not None for copy in copies) > 0.9 * len(sample)
    for copy, row in zip(copies, sample, strict=True):
        if copy is not None:
            assert asked[copy.response] - {row.instruction}
            own, other = (lengths.index(len(response)) for response in (row.response, copy.response))
            ties = max(lengths.count(len(row.response)), lengths.count(len(copy.response)))
            assert abs(own - other) <= 8 + ties


def test_mismatched_never_answers_the_same_instruction() -> None:
    rows = [Exchange(f"Question {i // 2}", "", f"answer {i}") for i in range(12)]
    for seed in range(20):
        for i, copy in enumerate(corrupt("mismatched", rows, seed)):
            assert copy is not None
            assert int(copy.response.split()[1]) // 2 != i // 2


def test_mismatched_has_no_copy_among_rows_of_one_instruction_or_one_answer() -> None:
    rng = random.Random(0)
    assert mismatched([Exchange("Same", "", f"answer {i}") for i in range(5)], rng) == [None] * 5
    assert mismatched(
        [Exchange(f"Question {i}", "", "same  answer" if i else "same answer") for i in range(5)], rng
    ) == ([None] * 5)
    assert mismatched([], rng) == []


# --- styles


@pytest.mark.parametrize("kind", STYLES)
@pytest.mark.parametrize("seed", range(4))
def test_a_change_of_style_keeps_every_word_in_order(kind: str, seed: int, sample: list[Exchange]) -> None:
    for copy, row in zip(corrupt(kind, sample, seed), sample, strict=True):
        if row.response or kind != "bullets":
            assert copy is not None
            left = iter(copy.response.split())
            assert all(word in left for word in row.response.split())


def test_bullets_mark_each_sentence() -> None:
    found = {copy_of("bullets", seed=seed) for seed in range(20)}
    lines = ["The North Sea is one.", "The Baltic is another.", "Last comes the Black Sea!"]
    assert found == {"\n".join(f"{mark} {line}" for line in lines) for mark in BULLETS}


def test_sentences_end_at_marks_and_lines() -> None:
    assert sentences(" It is 3.5 m. Deep?\n\nYes!  No ") == ["It is 3.5 m.", "Deep?", "Yes!", "No"]
    assert sentences(" \n ") == []


def test_no_row_of_a_pair_gets_the_other_ones_answer(sample: list[Exchange]) -> None:
    paired = [half for row in sample[:60] for half in (row, row._replace(instruction=f"{row.instruction} Please."))]
    paired = [row._replace(response=f"{row.response} {i % 2}") for i, row in enumerate(paired)]
    for seed in range(5):
        for i, copy in enumerate(corrupt("mismatched", paired, seed, paired=True)):
            assert copy is None or copy.response != paired[i ^ 1].response


def test_a_draw_gives_every_row_one_broken_copy_of_the_kinds_asked_for(sample: list[Exchange]) -> None:
    drawn = draw_corruptions(sample, 0, {"refusal": 1.0, "shuffled_words": 3.0})
    refused = [copy.response in REFUSALS["train"] for copy in drawn]
    assert 0.1 < sum(refused) / len(refused) < 0.6
    for copy, row, is_refusal in zip(drawn, sample, refused, strict=True):
        assert is_refusal or sorted(copy.response.split()) == sorted(row.response.split())
    assert drawn == draw_corruptions(sample, 0, {"refusal": 1.0, "shuffled_words": 3.0})
    assert drawn != draw_corruptions(sample, 1, {"refusal": 1.0, "shuffled_words": 3.0})


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        ("changed_number", "It took 7 days.", r"It took [1-689] days\."),
        ("changed_number", "1. One. 2. Two.", None),  # the marks of items are not facts
        ("exchanged_names", "We saw Ann meet Bob, and then Ann left.", "We saw Bob meet Ann, and then Bob left."),
        ("exchanged_names", "We saw Ann.", None),
        ("dropped_sentence", "One. Two. Three.", r"One\. (Two|Three)\."),
        ("dropped_sentence", "One. Two.", None),
        ("plain", "Sure! Here are two: - **red** wine - blue cheese", "red wine blue cheese"),
        ("plain", "Here is the answer: two and two are of course four. I hope this helps!", r"two .* four\."),
        ("plain", "Two and two are four.", None),
        ("numbered", "Boil it. Eat it.", r"1[.)] Boil it\. 2[.)] Eat it\."),
    ],
)
def test_fine_changes_by_hand(kind: str, before: str, after: str | None) -> None:
    [copy] = corrupt(kind, [Exchange("q", "", before)], 0, "train")
    assert (copy is None) if after is None else re.fullmatch(after, copy.response)
