"""Check by code whether an answer keeps the instructions that code can verify.

Does: count words, sentences, bullets and paragraphs; look for keywords, beginnings and ends; check case, commas, JSON
and language.
Does not: judge what an answer says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from car_datasets.loading.languages import detect_languages
from car_datasets.utils.files import ASSETS

INSTRUCTIONS = ASSETS / "verifiable.json"  # instructions of our own, each with its constraints

_WORD = re.compile(r"\w+(?:['’-]\w+)*")
# A sentence ends with these signs before white space or the end; abbreviations with two points do not occur in tasks.
_SENTENCE = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s|$)")
_BULLET = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+\S", re.MULTILINE)


class Instruction(NamedTuple):
    """A prompt whose answer can be checked by code.

    Args:
        prompt (`str`): what the model is asked.
        constraints (`tuple`): records with `name`, a key of [`CONSTRAINTS`], and the arguments of that check.
    """

    prompt: str
    constraints: tuple[dict[str, Any], ...]


def _within(count: int, at_least: int = 0, at_most: int | None = None) -> bool:
    return at_least <= count and (at_most is None or count <= at_most)


def _words(answer: str, at_least: int = 0, at_most: int | None = None) -> bool:
    return _within(len(_WORD.findall(answer)), at_least, at_most)


def _sentences(answer: str, at_least: int = 0, at_most: int | None = None) -> bool:
    text = answer.strip()
    ends = len(_SENTENCE.findall(text))
    unended = bool(text) and not re.search(r"[.!?…]+[\"'”’)\]]*$", text)
    return _within(ends + unended, at_least, at_most)


def _bullets(answer: str, at_least: int = 0, at_most: int | None = None) -> bool:
    return _within(len(_BULLET.findall(answer)), at_least, at_most)


def _paragraphs(answer: str, at_least: int = 0, at_most: int | None = None) -> bool:
    return _within(len([part for part in re.split(r"\n\s*\n", answer) if part.strip()]), at_least, at_most)


def _lines(answer: str, at_least: int = 0, at_most: int | None = None) -> bool:
    return _within(len([line for line in answer.splitlines() if line.strip()]), at_least, at_most)


def _count(answer: str, word: str) -> int:
    return len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", answer, re.IGNORECASE))


def _contains(answer: str, words: Sequence[str], at_least: int = 1) -> bool:
    return all(_count(answer, word) >= at_least for word in words)


def _avoids(answer: str, words: Sequence[str]) -> bool:
    return not any(_count(answer, word) for word in words)


def _starts_with(answer: str, text: str) -> bool:
    return answer.strip().startswith(text)


def _ends_with(answer: str, text: str) -> bool:
    return answer.strip().endswith(text)


def _json_only(answer: str, keys: Sequence[str] = ()) -> bool:
    try:
        value = json.loads(answer)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, list) if not keys else isinstance(value, dict) and set(keys) <= set(value)


def _case(answer: str, case: str) -> bool:
    return answer == (answer.upper() if case == "upper" else answer.lower()) and any(c.isalpha() for c in answer)


def _no_commas(answer: str) -> bool:
    return "," not in answer


def _language(answer: str, code: str) -> bool:
    return detect_languages([answer]) == [code]


# The checks by name, with the arguments that an instruction must or may give.
CONSTRAINTS: dict[str, Callable[..., bool]] = {
    "words": _words,
    "sentences": _sentences,
    "bullets": _bullets,
    "paragraphs": _paragraphs,
    "lines": _lines,
    "contains": _contains,
    "avoids": _avoids,
    "starts_with": _starts_with,
    "ends_with": _ends_with,
    "json_only": _json_only,
    "case": _case,
    "no_commas": _no_commas,
    "language": _language,
}


def is_satisfied(answer: str, constraint: Mapping[str, Any]) -> bool:
    """Return True if an answer keeps a constraint; an empty answer keeps none.

    Args:
        answer (`str`): what the model wrote.
        constraint (`Mapping`): `name`, a key of [`CONSTRAINTS`], and the arguments of that check.

    Raises:
        ValueError: there is no check of this name, or it does not take these arguments.
    """
    arguments = {key: value for key, value in constraint.items() if key != "name"}
    check = CONSTRAINTS.get(constraint.get("name", ""))
    if check is None:
        raise ValueError(f"constraint={dict(constraint)} has no known name; choose one of {sorted(CONSTRAINTS)}.")
    try:
        kept = check(answer, **arguments)
    except TypeError as error:
        raise ValueError(f"constraint={dict(constraint)} does not have the arguments of its check: {error}") from error
    return bool(answer.strip()) and kept


def read_instructions(path: str | Path = INSTRUCTIONS) -> list[Instruction]:
    """Read verifiable instructions from a JSON file: a list of records with `prompt` and `constraints`.

    Args:
        path (`str` or `Path`): defaults to the file that the package ships.

    Raises:
        ValueError: the file has another form, or names a check that there is not.
    """
    try:
        records = json.loads(Path(path).read_text(encoding="utf-8"))
        found = [Instruction(str(each["prompt"]), tuple(each["constraints"])) for each in records]
        for instruction in found:
            for constraint in instruction.constraints:
                is_satisfied("", constraint)  # names and arguments are checked before a model answers
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{str(path)!r} is not a list of records with a prompt and constraints ({error}); "
            'such as [{"prompt": "Name three fish.", "constraints": [{"name": "words", "at_most": 9}]}].'
        ) from error
    return found
