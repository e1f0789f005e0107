"""duplicates.py: what is marked and what is spared, which row of a group stays, and how well planted copies are found."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from car_datasets import ColumnNames, TextEmbedder, duplicate_losses, mark_duplicates
from car_datasets.loading.schemas import SCHEMAS
from car_datasets.selection.marks.resembling import resembling_rows
from tests.selection.marks.planted import LEARN, TEST, Half, Row, edited, templated, word_vectors

LONG = "Bake it for forty minutes in a hot oven, let it cool on a rack, and serve it with cream, sugar and a cup of strong tea."


def pool(*rows: tuple[str, str], **columns: Any) -> Dataset:
    made = [{"instruction": asked, "output": said} for asked, said in rows]
    return Dataset.from_dict(
        {
            "instruction": [row["instruction"] for row in made],
            "output": [row["output"] for row in made],
            "embedding": word_vectors(made).tolist(),
            **columns,
        }
    )


def marked(dataset: Dataset, how: str = "near", **options: Any) -> list[Any]:
    # The directions of words are unrelated here, so that cosines are lower than a model's.
    options = {"similarity": 0.4, **options} if how == "near" else options
    return mark_duplicates(dataset, how, **options)["duplicate_of"][:]


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        (("What is a noun?", "A word."), ("what IS\na  noun", "“A word”"), True),
        (("What is ﬁre?", "Heat…"), ("What is fire?", "Heat..."), True),
        (("What is 5?", "5"), ("What is 5?", "-5"), False),
        (("A", "B C"), ("A B", "C"), False),
        (("A", "B"), ("A", "C"), False),
        (("?", "!"), ("?", "?"), False),
    ],
)
def test_equal_rows(one: tuple[str, str], other: tuple[str, str], equal: bool) -> None:
    dataset = pool(one, other).remove_columns("embedding")
    assert marked(dataset, "exact") == [None, 0 if equal else None]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("How do I bake a cake?", LONG), ("How do I bake a cake?", f"Sure! Here is how. {LONG}")),
        (("How do I bake a cake?", LONG), ("How do I bake a cake?", f"{LONG} I hope that you like it.")),
        (("How do I bake a cake?", LONG), ("Tell me how I bake a cake", LONG.replace("strong", "good"))),
        (("How do I bake a cake?", LONG), ("How do I bake cakes?", LONG.replace("minutes", "minuts"))),
        (
            ("What is the capital of France?", "It is Paris."),
            ("Please, what is the capital of France?", "It is Paris."),
        ),
        (
            ("请写一首关于春天的短诗，要有花和鸟", "春风吹过花满园，小鸟枝头唱新天"),
            ("请写一首关于春天的短诗，要有花和鸟。", "好的：春风吹过花满园，小鸟枝头唱新天"),
        ),
    ],
)
def test_edited_rows_are_marked(one: tuple[str, str], other: tuple[str, str]) -> None:
    assert marked(pool(one, other)) == [None, 0]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("What is 3+4?", "It is a number."), ("What is 3+5?", "It is a number.")),
        (("What is 3 - 4?", "A number."), ("What is 3 + 4?", "A number.")),
        (("What is 4 - 3?", "A number."), ("What is 3 - 4?", "A number.")),
        (("Name three fruits.", LONG), ("Name five fruits.", LONG)),
        (("Who was the first king of France?", LONG), ("Who was the first king of Spain?", LONG)),
        (("Translate dog to French.", "Un chien"), ("Translate cat to French.", "Un chat")),
        (("Is a tomato a fruit?", "Yes"), ("Is a lemon a fruit?", "Yes")),
        (("Should I bake it?", LONG), ("Should I not bake it?", LONG)),
        (("Describe a red cake.", f"The red cake. {LONG}"), ("Describe a blue cake.", f"The blue cake. {LONG}")),
        (("How do I bake a cake?", LONG), ("How do I bake a cake?", "Ask your aunt, who bakes very well.")),
        (("How do I bake a cake?", LONG), ("How do I bake a cake?", f"{LONG} {' '.join(map(str, range(100, 250)))}")),
        (("Put this in order: a dog bites a man", "x"), ("Put this in order: a man bites a dog", "y")),
    ],
)
def test_rows_of_a_template_are_spared(one: tuple[str, str], other: tuple[str, str]) -> None:
    assert marked(pool(one, other)) == [None, None]


def test_the_best_row_stays_and_no_chain_joins_rows() -> None:
    """Each step leaves out a seventh of the text: neighbours are duplicates, the ends are not."""
    parts = ("ba", "ke", "lo", "mi", "nu", "ri", "so"), ("dor", "fel", "gim", "pas", "tul", "van")
    words = [f"{start}{end}" for start in parts[0] for end in parts[1]]
    steps = [("How do I bake a cake?", " ".join(words[4 * i : 4 * i + 28])) for i in range(4)]
    assert marked(pool(*steps, iqs_score=[0.9, 0.8, 0.7, 0.6])) == [None, 0, None, 2]
    # From the best row down: the second takes both of its neighbours.
    assert marked(pool(*steps, iqs_score=[0.7, 0.9, None, 0.6])) == [1, None, 1, None]
    assert marked(pool(*steps)) == [None, 0, None, 2]


def test_equal_rows_follow_their_equal_and_indices_keep_their_type() -> None:
    rows = [
        ("How do I bake a cake?", LONG),
        ("How do I bake a cake", LONG.upper()),
        ("How do I bake a cake?", f"Sure! {LONG}"),
    ]
    dataset = pool(*rows, ("Who?", "Me."), iqs_score=[0.1, 0.2, 0.9, 0.5], key=["a", "b", "c", "d"]).with_format(
        "numpy"
    )
    found = mark_duplicates(dataset, names=ColumnNames(index="key"))
    assert found.with_format(None)["duplicate_of"][:] == ["c", "c", None, None]
    assert found.features["duplicate_similarity"].dtype == "float32"
    similarity = found.with_format(None)["duplicate_similarity"][:]
    assert similarity[0] == similarity[1] and 0.8 < similarity[0] < 1 and similarity[2:] == [None, None]
    # In any order of rows the same row stays; a selection of rows is read through its indices.
    turned = mark_duplicates(dataset.select([3, 2, 1, 0]), names=ColumnNames(index="key"))
    assert turned.with_format(None)["duplicate_of"][:] == [None, None, "c", "c"]


def test_chats_are_compared_by_what_each_side_says() -> None:
    def chat(system: str, asked: str, said: str) -> list[dict[str, str]]:
        roles = {"system": system, "user": asked, "assistant": said}
        return [{"role": role, "content": text} for role, text in roles.items() if text]

    chats = [
        chat("", "Hello", "Hi"),
        chat("", "hello!", "Hi."),
        chat("Be rude.", "Hello", "Hi"),
        chat("", "Hi", "Hello"),
    ]
    assert marked(Dataset.from_dict({"messages": chats}), "exact") == [None, 0, None, None]
    assert marked(Dataset.from_dict({"messages": []}), "exact") == []


def planted(half: Half, base: list[Row]) -> tuple[list[Row], int]:
    """Return rows, their edited copies in the same order, and templated rows; and how many were copied."""
    rng = random.Random(0)
    rows = base[half is TEST :: 2]
    return [*rows, *(edited(row, half, rng) for row in rows), *templated(half is TEST)], len(rows)


def check_planted(found: list[int | None], copied: int) -> None:
    """Hold the aims: pair F1 of .95, and at most 1 % of the templated rows lost."""
    pairs = {(i, of) if of < i else (of, i) for i, of in enumerate(found) if of is not None}
    right = {(copied + i, i) for i in range(copied)}
    hits = len(right & pairs)
    assert 2 * hits / (len(right) + len(pairs)) >= 0.95
    distinct = found[2 * copied :]
    assert sum(of is not None for of in distinct) <= 0.01 * len(distinct)


@pytest.mark.parametrize("half", [LEARN, TEST], ids=["learn", "test"])
def test_planted_copies_are_found(half: Half, sample_rows: list[Row]) -> None:
    rows, copied = planted(half, sample_rows)
    dataset = Dataset.from_list(rows).add_column("embedding", word_vectors(rows).tolist())
    check_planted(marked(dataset), copied)


def test_new_rows_without_words_resemble_no_old_row() -> None:
    old = Dataset.from_list([{"instruction": "Name a tall old tree", "input": "", "output": "It is the oak"}])
    new = Dataset.from_list([{"instruction": "???", "input": "", "output": "!!!"}])
    assert resembling_rows(old, new, SCHEMAS["alpaca"]).tolist() == []
    assert resembling_rows(old, old, SCHEMAS["alpaca"]).tolist() == [0]


@pytest.mark.slow
def test_planted_copies_are_found_by_their_embeddings(sample_rows: list[Row]) -> None:
    rows, copied = planted(TEST, sample_rows)
    dataset = Dataset.from_list(rows).map(TextEmbedder(), batched=True, with_rank=True)
    check_planted(mark_duplicates(dataset)["duplicate_of"][:], copied)


def test_losses_are_told_by_column_and_by_template() -> None:
    rows = [(f"Say the word {'abcdefghijklmnopqrst'[i // 2] * 3}", "Yes") for i in range(40)] + [("Who?", "Me")] * 2
    found = mark_duplicates(pool(*rows, source=["web"] * 40 + ["own"] * 2), "exact")
    assert duplicate_losses(found, "source") == ["20 of 40 rows with source 'web' are duplicates (50 %)."]
    assert duplicate_losses(found) == ["20 of 40 rows whose prompt begins with 'Say the word' are duplicates (50 %)."]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"how": "fuzzy"}, "choose one of"),
        ({"similarity": 0}, "similarity=0 must be"),
        ({"containment": 1.5}, "containment=1.5 must be"),
        ({"schema": "alpaco"}, "alpaco"),
        ({"names": ColumnNames(embedding="vector")}, "Run TextEmbedder"),
    ],
)
def test_bad_input_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mark_duplicates(pool(("A", "B")), **options)


def test_columns_are_not_overwritten() -> None:
    with pytest.raises(ValueError, match="already has"):
        mark_duplicates(mark_duplicates(pool(("A", "B")), "exact"))
    with pytest.raises(ValueError, match="duplicate_of"):
        duplicate_losses(pool(("A", "B")))


def test_clusters_do_not_hide_pairs(sample_rows: list[Row]) -> None:
    """Find the same duplicates with any clusters, and without scores."""
    rows, _ = planted(LEARN, sample_rows)
    vectors = word_vectors(rows)
    dataset = Dataset.from_list(rows).add_column("embedding", vectors.tolist())
    expected = marked(dataset)
    labels = np.argmax(vectors @ vectors[::60].T, axis=1)
    labels[::50] = -1
    assert marked(dataset.add_column("cluster", labels)) == expected
