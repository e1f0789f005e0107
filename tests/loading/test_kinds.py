"""kinds.py: the kind of task, by plain rules, of rows in our own words."""

from __future__ import annotations

import pytest

from car_datasets.loading.kinds import KINDS, kinds_of

ROWS = [
    ("Write a function that doubles a number.", "Sure:\n\ndef double(x):\n    return 2 * x", "code"),
    ("What does this print?\n\n```\necho hi\n```", "It prints hi.", "code"),
    ("How do I list all tables in a database?", "SELECT name FROM sqlite_master;", "code"),
    ("How much is 12 × 12?", "144", "maths"),
    ("A train covers 90 km in 45 minutes. How fast is it?", "90 / 0.75 = 120, so 120 km/h.", "maths"),
    ("Write a short poem about mist.", "Mist on the meadow,\nmist on the mill.", "writing"),
    ("Compose a letter to the mayor.", "Dear Mayor, ...", "writing"),
    ("Name four colours.", "Red, blue, green and grey.", "lists"),
    ("How do I plant a tree?", "1. Dig a hole.\n2. Put the tree in.\n3. Fill it up.", "lists"),
    ("Which river flows through Rome?", "The Tiber.", "short facts"),
    (
        "Why do leaves fall in autumn?",
        "A tree loses water through its leaves, and in winter it cannot take up enough from the frozen ground.",
        "other",
    ),
    ("Extract the name as JSON: I am Ada.", '```json\n{"name": "Ada"}\n```', "short facts"),
    ("Which iron turns to rust, and how many days does it take in 2 winters?", "It depends.", "short facts"),
    ("Convert 5-7-1998 to another format, please.", "1998-07-05", "short facts"),
]


@pytest.mark.parametrize(("prompt", "answer", "kind"), ROWS, ids=[row[0][:30] for row in ROWS])
def test_kinds(prompt: str, answer: str, kind: str) -> None:
    assert kinds_of([prompt], [answer]) == [kind]


def test_every_kind_is_in_the_table_and_rows_must_pair() -> None:
    assert {row[2] for row in ROWS} == set(KINDS)
    with pytest.raises(ValueError, match="answers has 1 rows and prompts 2"):
        kinds_of(["a", "b"], ["c"])
