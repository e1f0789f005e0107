"""The text that models read: CaR's template as it is, and a cleaned one; versioned, because scores depend on it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

PAPER_TEMPLATE = "paper"
CLEAN_TEMPLATE = "clean-1"


class Exchange(NamedTuple):
    """One user request and the answer to it."""

    instruction: str
    input: str
    response: str


class Text(NamedTuple):
    """A rendered exchange: what was asked and what was answered, apart, as the ranking variant reads them."""

    question: str
    answer: str

    @property
    def whole(self) -> str:
        """Both in one, as IQS and the embedder read them."""
        return f"{self.question} {self.answer}"

    @classmethod
    def split(cls, whole: str) -> Text:
        """Cut a rendered text at its first `" Response:"`.

        Raises:
            ValueError: it has none.
        """
        question, mark, answer = whole.partition(" Response:")
        if not mark:
            raise ValueError(f"{whole[:60]!r} has no ' Response:'; pass Text(question, answer).")
        return cls(question, f"Response:{answer}")


def render(exchange: Exchange, template: str = CLEAN_TEMPLATE) -> Text:
    """The text that the quality model and the embedder read.

    `"paper"` is CaR's inference template byte for byte: an empty input leaves two spaces before `Response:`, nothing is
    cleaned. `"clean-1"` passes each part through [`clean`] and leaves ` Input: ` out where there is no input, as CaR's
    own *training* files do (its scoring script scores most rows in a form that was not seen in training).

    Raises:
        ValueError: the template is not known.
    """
    if template not in TEMPLATES:
        raise ValueError(f"template={template!r} is not known; choose one of {sorted(TEMPLATES)}.")
    return TEMPLATES[template](exchange)


def _paper(e: Exchange) -> Text:
    return Text(f"Instruction: {e.instruction} Input: {e.input}", f"Response: {e.response}")


def _clean(e: Exchange) -> Text:
    instruction, context, response = clean(e.instruction), clean(e.input), clean(e.response)
    asked = f"Instruction: {instruction} Input: {context}" if context else f"Instruction: {instruction}"
    return Text(asked, f"Response: {response}")


# Versioned: scores depend on the template, so a change of wording or cleaning is a new name, never an edit.
TEMPLATES: dict[str, Callable[[Exchange], Text]] = {PAPER_TEMPLATE: _paper, CLEAN_TEMPLATE: _clean}

_ESCAPE = re.compile(r"""\\(?:u([0-9a-fA-F]{4})|([nrtbf"'\\/]))""")
_CONTROL = {"n": "\n", "r": "\r", "t": "\t", "b": "\b", "f": "\f"}
_SURROGATE = re.compile("[\ud800-\udfff]")
_QUOTES = str.maketrans("‘’“”", "''\"\"")


def clean(text: str) -> str:
    r"""Undo typed-out JSON escapes, straighten quotes and fold white space.

    45 % of the worse halves of CaR's training pairs hold escapes typed out (`\n`, `\"`, `\u2019` as characters), against
    1 % of the better halves; a model that reads them learns to spot the escapes. Decoding is repeated until nothing
    changes, so that `clean(json.dumps(text)[1:-1]) == clean(text)` for every text, however often it was escaped. The
    price: `\nabla` in LaTeX loses its `\n`. Only the scored text is touched, never the row.
    """
    text = text.translate(_QUOTES)
    while (decoded := _ESCAPE.sub(_decode, text).translate(_QUOTES)) != text:  # a straightened quote can end an escape
        text = decoded
    return " ".join(join_surrogates(text).split())


def join_surrogates(text: str) -> str:
    """Halves of a character that meet form one; a lone half is no text, and no file or tokenizer takes it."""
    if _SURROGATE.search(text):
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _decode(match: re.Match[str]) -> str:
    code, letter = match.groups()
    return chr(int(code, 16)) if code else _CONTROL.get(letter, letter)
