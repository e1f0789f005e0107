"""Render an exchange as the text that models read, with CaR's own template or a cleaned one.

Does: keep templates under versioned names, because scores depend on them; clean up text; split the thought from an
answer; write a tool call as text; parse a chat that is one text.
Does not: know a dataset's columns.
"""

from __future__ import annotations

import ast
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
    if "\\" not in text and text.isascii():  # most texts: there is nothing to decode or straighten
        return " ".join(text.split())
    text = text.translate(_QUOTES)
    for _ in range(_PASSES):
        decoded = _ESCAPE.sub(_decode, text).translate(_QUOTES)  # a straightened quote can end an escape
        if decoded == text:
            break
        text = decoded
    else:
        text = _decode_deep(text)
    return " ".join(join_surrogates(text).split())


_PASSES = 8  # over an entire text; every pass takes off a level of escapes, and few texts have more than two


def _decode_deep(text: str) -> str:
    r"""Return what passes over the text end with, in time linear in its length.

    In `\u005cu005cu005c`, every pass decodes one escape, so that passes over all of the text would be quadratic. An
    escape that a pass finds contains a sign that the pass before it made, so only the signs around those are read.
    """
    signs, after, before = list(text), list(range(1, len(text) + 1)), list(range(-1, len(text) - 1))
    starts = [place for place, sign in enumerate(signs) if sign == "\\"]
    while starts:
        made: list[int] = []
        end = 0
        for start in starts:
            ends = [start]
            while ends[-1] < len(signs) and len(ends) <= _LONGEST:
                ends.append(after[ends[-1]])
            if start >= end and (found := _ESCAPE.match("".join(signs[place] for place in ends[:-1]))):
                end = ends[found.end()]
                signs[start] = _decode(found).translate(_QUOTES)
                after[start] = end
                if end < len(signs):
                    before[end] = start
                made.append(start)
        starts = []
        for place in made:
            near = [place]
            while before[near[-1]] >= 0 and len(near) < _LONGEST:
                near.append(before[near[-1]])
            starts += [at for at in reversed(near) if signs[at] == "\\" and at > (starts or [-1])[-1]]
    place, kept = 0, []
    while place < len(signs):
        kept.append(signs[place])
        place = after[place]
    return "".join(kept)


_LONGEST = 6  # signs of an escape


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

DEEPEST_READ = 200  # levels of lists and objects; Python's recursion and Arrow's reader end not far beyond

# A thought at the start of an answer. Only `<think>` may be left open: the model ran out of tokens while it thought.
_THOUGHT = re.compile(
    r"\s*(?:<think>(.*?)(?:</think>|\Z)|<(?P<tag>thinking|thought|reasoning)>(.*?)</(?P=tag)>"
    r"|<\|begin_of_thought\|>(.*?)<\|end_of_thought\|>|\[THINK\](.*?)\[/THINK\])\s*",
    re.DOTALL | re.IGNORECASE,
)
# What comes after a thought may be marked as the answer.
_MARKED_ANSWER = re.compile(
    r"\s*(?:<\|begin_of_solution\|>(.*?)(?:<\|end_of_solution\|>|\Z)|<(?P<tag>answer|output)>(.*)</(?P=tag)>)\s*\Z",
    re.DOTALL | re.IGNORECASE,
)


def split_thought(text: str) -> tuple[str, str]:
    """Split an answer into the thought at its start and the rest, both without their tags.

    The opening tag may be missing, as where the prompt template of a model ends with it.
    """
    thoughts, position = [], 0
    while (found := _THOUGHT.match(text, position)) and found.end() > position:
        thoughts += [part.strip() for name, part in enumerate(found.groups()) if part is not None and name != 1]
        position = found.end()
    if not thoughts:
        thought, mark, answer = text.partition("</think>")
        if mark and "<think>" not in thought and not thought.endswith("`"):  # not an answer about the tag
            return thought.strip(), _unmarked(answer.lstrip())
        return "", text
    return join_lines(*thoughts), _unmarked(text[position:])


def _unmarked(answer: str) -> str:
    """Return an answer without the tags that mark it as the answer."""
    found = _MARKED_ANSWER.match(answer)
    return answer if found is None else next(p for p in (found[1], found[3]) if p is not None).strip()


# What a model writes into its answer to call a tool, as in Hermes, Glaive, Mistral and Llama.
_WRITTEN_CALL = re.compile(
    r"<functioncall>\s*\{|\A\s*(?:\[TOOL_CALLS\]|<\|python_tag\|>|<function=\w+>)",
    re.DOTALL,
)


def is_written_call(text: str) -> bool:
    """Return True for a tool call that is written into the text of an answer."""
    ends = text.rstrip().endswith("</tool_call>")  # a pattern would look for this end from every start
    return (ends and "<tool_call>" in text) or _WRITTEN_CALL.search(text) is not None


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
            (call[key] for key in ("arguments", "input", "parameters", "args") if call.get(key) is not None), {}
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
    """Return the value that a text holds as JSON; `None` if it is not JSON, or nested too deeply."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return None if is_deep(value, text) else value


def is_deep(value: Any, text: str | None = None) -> bool:
    """Return True if a value holds lists or mappings at more than DEEPEST_READ levels, where recursion would fail.

    Args:
        value: of any kind.
        text (`str`, *optional*): the JSON that it was parsed from, by which most values are spared the walk.
    """
    if text is not None and text.count("[") + text.count("{") <= DEEPEST_READ:
        return False
    level = [value]
    for _ in range(DEEPEST_READ):
        mappings = [part.values() for part in level if isinstance(part, Mapping)]
        level = [part for parts in (*mappings, *(p for p in level if isinstance(p, (list, tuple)))) for part in parts]
    return any(isinstance(part, (list, tuple, Mapping)) for part in level)


# The marks of speakers in a chat that is one text: of HH-RLHF, of Guanaco and of Glaive.
_SPEAKERS = (
    re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):"),
    re.compile(r"###\s*(Human|Assistant):"),
    re.compile(r"(?:\A\s*|\n\n)(SYSTEM|USER|ASSISTANT|FUNCTION RESPONSE):"),
)
_BETWEEN_OBJECTS = re.compile(r"\}[^\S\n]*\n\s*\{")


def parse_chat(text: str) -> Any:
    """Return the chat that a text holds, as JSON, as Python writes a list, or with marked speakers; else `None`."""
    if text.lstrip()[:1] in ("[", "{", '"'):
        value = parse_json(text)
        if isinstance(value, str):  # JSON that was written as JSON once more
            return parse_json(value)
        if value is None:  # pandas writes lists into CSV as Python does, and arrays of NumPy without commas
            try:
                value = ast.literal_eval(_BETWEEN_OBJECTS.sub("}, {", text.strip()))
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                return None
        return value
    return parse_speakers(text)


def parse_speakers(text: str) -> list[dict[str, str]] | None:
    """Return the messages of a text that begins with a mark of a speaker, such as `Human:`; else `None`."""
    for marks in _SPEAKERS:
        before, *speakers = marks.split(text)
        if len(speakers) >= 2 and not before.strip():
            turns = zip(speakers[::2], speakers[1::2], strict=True)
            return [{"role": who, "content": said.strip().removesuffix("<|endoftext|>").strip()} for who, said in turns]
    return None


def join_lines(*parts: str) -> str:
    """Join the parts that are not blank, one per line."""
    return "\n".join(part for part in parts if part.strip())
