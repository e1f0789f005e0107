"""Render an exchange as the text that models read, with CaR's own template or a cleaned one.

Does: keep templates under versioned names, because scores depend on them; clean up text.
Does not: know a dataset's columns.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

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
TEMPLATES: dict[str, Callable[[Exchange], Text]] = {PAPER_TEMPLATE: _paper, CLEAN_TEMPLATE: _clean}

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
