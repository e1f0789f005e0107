"""constraints.py: every check, with an answer that keeps it and one that does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from car_datasets.proving.constraints import CONSTRAINTS, is_satisfied, read_instructions

CASES: list[tuple[str, dict[str, Any], str, str]] = [  # name, arguments, an answer that keeps it, one that does not
    ("words", {"at_least": 3, "at_most": 4}, "a well-known don't-rule", "one two three four five"),
    ("words", {"at_most": 1}, "Cold.", "It's cold."),
    ("sentences", {"at_least": 2, "at_most": 2}, 'One is 3.5 m long. "Really?"', "Only one, with 3.5 m."),
    ("sentences", {"at_most": 1}, "no full stop", "One! Two"),
    ("bullets", {"at_least": 3, "at_most": 3}, "Here:\n- a\n * b\n3. c", "- a\n-b\n- c"),
    ("paragraphs", {"at_least": 2, "at_most": 2}, "One.\n\n \nTwo.\nStill two.", "One.\nTwo."),
    ("lines", {"at_least": 4, "at_most": 4}, "a\n\nb\nc\nd\n", "a\nb\nc"),
    ("contains", {"words": ["bench", "fountain"]}, "A Bench by the fountain.", "Benches by the fountain."),
    ("contains", {"words": ["window"], "at_least": 2}, "Window to window.", "A window, and windows."),
    ("avoids", {"words": ["ice"]}, "Nice and icy.", "Ice!"),
    ("starts_with", {"text": "In short,"}, "\nIn short, yes.", "Well, in short, yes."),
    ("ends_with", {"text": "?"}, "Is it? \n", "Is it? No."),
    ("json_only", {"keys": ["a"]}, '{"a": 1, "b": 2}', '```json\n{"a": 1}\n```'),
    ("json_only", {}, '["a"]', '{"a": 1}'),
    ("case", {"case": "upper"}, "BLUE, 1 OF 2.", "Blue"),
    ("case", {"case": "lower"}, "in the north.", "123"),
    ("no_commas", {}, "One and two.", "One, two."),
    ("language", {"code": "de"}, "Beim Bäcker kaufe ich am Morgen frisches Brot.", "I buy fresh bread in the morning."),
]


@pytest.mark.parametrize(("name", "arguments", "kept", "broken"), CASES)
def test_every_check(name: str, arguments: dict[str, Any], kept: str, broken: str) -> None:
    constraint = {"name": name, **arguments}
    assert is_satisfied(kept, constraint)
    assert not is_satisfied(broken, constraint)
    assert not is_satisfied(" \n", constraint)


def test_the_table_has_every_check_and_the_shipped_instructions_use_it() -> None:
    assert {case[0] for case in CASES} == set(CONSTRAINTS)
    shipped = read_instructions()
    assert len(shipped) == 40
    assert {each["name"] for instruction in shipped for each in instruction.constraints} == set(CONSTRAINTS)
    assert all(instruction.constraints for instruction in shipped)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"prompt": "x", "constraints": [{"name": "rhymes"}]}], "no known name"),
        ([{"prompt": "x", "constraints": [{"name": "words", "most": 3}]}], "the arguments of its check"),
        ([{"constraints": []}], "'prompt'"),
        ("text", "not a list of records"),
    ],
)
def test_a_file_of_another_form_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_instructions(path)
