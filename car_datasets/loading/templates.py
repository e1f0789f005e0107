"""Render an exchange as the text that models read, with CaR's own template or a cleaned one.

Does: keep templates under versioned names, because scores depend on them; clean up text; split the thought from an
answer; write a tool call as text.
Does not: know a dataset's columns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

# The version is part of the name, and the name part of fingerprints, receipts and configurations of models.
PAPER_TEMPLATE = "paper"
CLEAN_TEMPLATE = "clean-1"


class Exchange(NamedTuple):
    """A user's request and the answer to it."""

    instruction: str
    input: str
    response: str


class Text(NamedTuple):
    """A rendered exchange, with question and answer apart for the ranking variant, which reads them separately."""

    question: str
    answer: str

    @property
    def whole(self) -> str:
        """Return question and answer in one text, as IQS and the embedder read them."""
        return f"{self.question} {self.answer}"

    @classmethod
    def split(cls, whole: str) -> Text:
        """Split a rendered text at its first `" Response:"`.

        Raises:
            ValueError: the text does not contain it.
        """
        question, mark, answer = whole.partition(" Response:")
        if not mark:
            raise ValueError(f"text={whole[:60]!r} does not contain ' Response:'; pass Text(question, answer).")
        return cls(question, f"Response:{answer}")


def render(exchange: Exchange, template: str = CLEAN_TEMPLATE) -> Text:
    """Render an exchange as the text that the quality model and the embedder read.

    `"paper"` is CaR's inference template byte for byte: an empty input leaves two spaces before `Response:`, and
    nothing is cleaned. `"clean-1"` passes each part through [`clean`] and omits ` Input: ` if there is no input, as
    CaR's own *training* files do (its scoring script renders most rows in a form that the model did not see in
    training).

    Raises:
        ValueError: the template is unknown.
    """
    if template not in TEMPLATES:
        raise ValueError(f"template={template!r} is not known; choose one of {sorted(TEMPLATES)}.")
    return TEMPLATES[template](exchange)


def _paper(exchange: Exchange) -> Text:
    instruction, context, response = exchange
    return Text(f"Instruction: {instruction} Input: {context}", f"Response: {response}")


def _clean(exchange: Exchange) -> Text:
    instruction, context, response = (clean(part) for part in exchange)
    asked = f"Instruction: {instruction} Input: {context}" if context else f"Instruction: {instruction}"
    return Text(asked, f"Response: {response}")


# Scores depend on the template, so a change of wording or of `clean` gets a new name; a published one is never edited.
TEMPLATES: dict[str, Callable[[Exchange], Text]] = {
    PAPER_TEMPLATE: _paper,
    CLEAN_TEMPLATE: _clean,
}

# `\uXXXX`, or a backslash and one of the letters and signs that JSON escapes (and Python: the single quote).
_ESCAPE = re.compile(r"""\\(?:u([0-9a-fA-F]{4})|([nrtbf"'\\/]))""")
_CONTROL = {"n": "\n", "r": "\r", "t": "\t", "b": "\b", "f": "\f"}
_QUOTES = str.maketrans("‘’“”", "''\"\"")
# JSON escapes characters beyond U+FFFF as two halves, which decoding one escape at a time leaves apart.
_SURROGATE = re.compile("[\ud800-\udfff]")


def clean(text: str) -> str:
    r"""Decode literal JSON escapes, straighten quotes and collapse white space.

    45 % of the worse halves of CaR's training pairs contain escapes as characters (`\n`, `\"`, `\u2019`), compared with
    1 % of the better halves; a model that reads them learns to spot the escapes. Decoding is repeated until nothing
    changes, so that `clean(json.dumps(text)[1:-1]) == clean(text)` for every text, however often it was escaped. The
    price: `\nabla` in LaTeX loses its `\n`. Only the scored text is changed, never the row.
    """
    text = text.translate(_QUOTES)
    # This ends: each replacement makes the text shorter.
    while (decoded := _ESCAPE.sub(_decode, text).translate(_QUOTES)) != text:  # a straightened quote can end an escape
        text = decoded
    return " ".join(join_surrogates(text).split())


def _decode(match: re.Match[str]) -> str:
    code, letter = match.groups()
    return chr(int(code, 16)) if code else _CONTROL.get(letter, letter)


def join_surrogates(text: str) -> str:
    """Join surrogate pairs to characters; replace lone surrogates, which no file or tokenizer accepts, by U+FFFD."""
    if _SURROGATE.search(text):  # rare, so most texts are spared the round trip
        # UTF-16 is the encoding that writes such characters as pairs, so its decoder joins them.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


# --- parts of an answer

# A thought at the start of an answer. Only `<think>` may be left open: the model ran out of tokens while it thought.
_THOUGHT = re.compile(
    r"\s*(?:<think>(.*?)(?:</think>|\Z)|<(?P<tag>thinking|thought|reasoning)>(.*?)</(?P=tag)>"
    r"|<\|begin_of_thought\|>(.*?)<\|end_of_thought\|>|\[THINK\](.*?)\[/THINK\])\s*",
    re.DOTALL | re.IGNORECASE,
)


def split_thought(text: str) -> tuple[str, str]:
    """Split an answer into the thought at its start, without its tags, and the rest.

    The opening tag may be missing, as where the prompt template of a model ends with it.
    """
    thoughts, position = [], 0
    while (found := _THOUGHT.match(text, position)) and found.end() > position:
        thoughts += [part.strip() for name, part in enumerate(found.groups()) if part is not None and name != 1]
        position = found.end()
    if not thoughts:
        thought, mark, answer = text.partition("</think>")
        if mark and "<think>" not in thought and not thought.endswith("`"):  # not an answer about the tag
            return thought.strip(), answer.lstrip()
    return join_lines(*thoughts), text[position:]


def render_call(call: Any, given: Any) -> str:
    """Return a tool call as compact JSON of its name and arguments.

    Args:
        call: the call, or a list of calls, as parsed from JSON.
        given: what the dataset holds, which is returned if it does not name a tool: a text as it is.
    """
    if isinstance(call, (list, tuple)):
        return join_lines(*(render_call(each, each) for each in call))
    if isinstance(call, Mapping):
        call = call.get("function") or call
    if isinstance(call, Mapping) and isinstance(call.get("name"), str):
        arguments: Any = next(
            (call[key] for key in ("arguments", "input", "parameters") if call.get(key) is not None), {}
        )
        if isinstance(arguments, str):
            parsed = parse_json(arguments or "{}")
            arguments = arguments if parsed is None else parsed
        shown = compact_json(arguments)
        return f'{{"name":{compact_json(call["name"])},"arguments":{shown}}}'
    if isinstance(given, str):
        return given
    tidy = _tidy(given)
    return compact_json(tidy) if tidy else ""  # Arrow fills in nulls, also for calls that nobody made


def compact_json(value: Any) -> str:
    """Return a value as compact JSON, with sorted keys and without nulls."""
    return json.dumps(_tidy(value), ensure_ascii=False, separators=(",", ":"), default=str)


def _tidy(value: Any) -> Any:
    """Sort keys and drop nulls at any depth: Arrow takes both from other rows, on which a score must not depend."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        tidy = {str(key): _tidy(value[key]) for key in sorted(value, key=str)}
        return {key: inner for key, inner in tidy.items() if inner is not None and inner != {}}
    return [_tidy(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def parse_json(text: str) -> Any:
    """Return the value that a text holds as JSON; `None` if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def join_lines(*parts: str) -> str:
    """Join the parts that are not blank, one per line."""
    return "\n".join(part for part in parts if part.strip())
