"""Rows to the text that is scored: schemas, multi-turn chats, templates and the cleaning of text.

Does: recognise the columns of an instruction dataset, cut a chat into user-assistant exchanges, render each exchange
with CaR's template, undo typed-out escapes. The only module that knows a column name of the user's.
Does not: load files (loading.py), count tokens (scoring.py), or change a row: what is rendered is read by a model and
then thrown away.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

OK = "ok"
EMPTY_RESPONSE = "empty_response"  # scored, but marked
TRUNCATED = "truncated"  # scored, but the model did not see the end
NULL = "null"
NOT_A_STRING = "not_a_string"
NO_ASSISTANT_TURN = "no_assistant_turn"
BAD_TURN = "bad_turn"
UNSCORABLE = (NULL, NOT_A_STRING, NO_ASSISTANT_TURN, BAD_TURN)

PAPER_TEMPLATE = "paper"
CLEAN_TEMPLATE = "clean-1"


class Exchange(NamedTuple):
    """One user request and the answer to it."""

    instruction: str
    input: str
    response: str


class FormattedRow(NamedTuple):
    """The texts of a row, one per exchange, and a status (`"ok"`, `"empty_response"` or why there are no texts)."""

    texts: list[str]
    status: str


@dataclass(frozen=True)
class Schema:
    """Which columns of a dataset hold the instruction, the input and the response, or the turns of a chat.

    Args:
        name (`str`): `"alpaca"`, `"prompt/completion"`, `"messages"`, ...; shown in reports.
        instruction, input, response (`str`, *optional*): columns of single-turn rows. `input` may be absent.
        turns (`str`, *optional*): the column that holds a list of turns; then the three above are `None`.
        role, content (`str`): the keys of a turn.
    """

    name: str
    instruction: str | None = None
    input: str | None = None
    response: str | None = None
    turns: str | None = None
    role: str = "role"
    content: str = "content"

    @property
    def required(self) -> tuple[str, ...]:
        """The columns without which a row cannot be scored."""
        return tuple(c for c in (self.instruction, self.response, self.turns) if c is not None)


SCHEMAS = {
    "alpaca": Schema("alpaca", "instruction", "input", "output"),
    "prompt/completion": Schema("prompt/completion", "prompt", None, "completion"),
    "prompt/response": Schema("prompt/response", "prompt", None, "response"),
    "question/answer": Schema("question/answer", "question", None, "answer"),
    "messages": Schema("messages", turns="messages"),
    "conversations": Schema("conversations", turns="conversations", role="from", content="value"),
}

# The spellings met in OpenAI, ShareGPT and Vicuna files. A tool's answer is something the assistant is given to read.
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "tool": "user",
    "function": "user",
    "observation": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "bot": "assistant",
}


def find_schema(
    column_names: Iterable[str], schema: str = "auto", columns: Mapping[str, str] | Iterable[tuple[str, str]] = ()
) -> Schema:
    """Recognise the schema of a dataset from its column names, or check the one that was named.

    Args:
        column_names (`Iterable[str]`): the columns of the dataset.
        schema (`str`, defaults to `"auto"`): a key of [`SCHEMAS`], or `"auto"`.
        columns (`Mapping[str, str]`, *optional*): columns under other names than the schema's, as
            `{"instruction": "task", "response": "answer"}`; keys are `instruction`, `input`, `response` or `turns`,
            `role`, `content`. With `"auto"`, they alone make the schema.

    Raises:
        ValueError: no schema fits, more than one fits, or a named column is not there.
    """
    seen = list(column_names)
    renamed = dict(columns)
    unknown = set(renamed) - {"instruction", "input", "response", "turns", "role", "content"}
    if unknown:
        raise ValueError(
            f"columns has the keys {sorted(unknown)}; known are instruction, input, response, turns, role, content."
        )
    if schema != "auto" and schema not in SCHEMAS:
        raise ValueError(f"schema={schema!r} is not known; choose one of {sorted(SCHEMAS)} or 'auto'.")
    if schema == "auto" and not renamed:
        return _recognise(seen)
    if schema == "auto":
        found = Schema(name="named columns", **renamed)
        if not found.turns and not (found.instruction and found.response):
            raise ValueError(f"columns={renamed} must name instruction and response, or turns.")
    else:
        fields = {**SCHEMAS[schema].__dict__, **renamed}
        if "input" not in renamed and fields["input"] not in seen:
            fields["input"] = None
        found = Schema(**fields)
    missing = [c for c in (*found.required, found.input) if c is not None and c not in seen]
    if missing:
        raise ValueError(
            f"Columns {missing} are not in the dataset, which has {seen}. Name the right ones in `columns`."
        )
    return found


def _recognise(seen: list[str]) -> Schema:
    fitting = [s for s in SCHEMAS.values() if all(c in seen for c in s.required)]
    if not fitting:
        raise ValueError(
            f"No known schema fits the columns {seen}. Known: {sorted(SCHEMAS)}. "
            "Name the columns: columns={'instruction': ..., 'response': ...} (--columns instruction=...,response=...)."
        )
    if len(fitting) > 1:
        raise ValueError(
            f"The columns {seen} fit several schemas: {[s.name for s in fitting]}. Say which: schema={fitting[0].name!r} "
            f"(--schema {fitting[0].name})."
        )
    found = fitting[0]
    if found.input is not None and found.input not in seen:
        found = Schema(found.name, found.instruction, None, found.response)
    return found


def format_batch(batch: Mapping[str, Sequence[Any]], schema: Schema, template: str) -> list[FormattedRow]:
    """Render the rows of a `.map` batch.

    Args:
        batch (`Mapping[str, Sequence]`): columns of equal length, as `.map(batched=True)` gives them.
        schema ([`Schema`]): where the text is.
        template (`str`): `"paper"` (CaR's, byte for byte) or `"clean-1"` (see [`render`]).

    Returns:
        `list[FormattedRow]`: one entry per row. A row that cannot be scored has no texts and a status that says why.
    """
    rows = []
    for exchanges in exchanges_of(batch, schema):
        if isinstance(exchanges, str):
            rows.append(FormattedRow([], exchanges))
        else:
            empty = any(not e.response.strip() for e in exchanges)
            rows.append(FormattedRow([render(e, template) for e in exchanges], EMPTY_RESPONSE if empty else OK))
    return rows


def exchanges_of(batch: Mapping[str, Sequence[Any]], schema: Schema) -> list[list[Exchange] | str]:
    """The exchanges of every row of a batch, or the status that says why a row has none."""
    if schema.turns is not None:
        return [_chat_exchanges(_turn_list(turns), schema) for turns in batch[schema.turns]]
    instructions, responses = batch[str(schema.instruction)], batch[str(schema.response)]
    inputs = batch[schema.input] if schema.input is not None else [None] * len(responses)
    return [_pair(i, x, r) for i, x, r in zip(instructions, inputs, responses, strict=True)]


def _pair(instruction: Any, context: Any, response: Any) -> list[Exchange] | str:
    if instruction is None or response is None:
        return NULL
    context = "" if context is None else context  # a missing input is an empty one, in every published dataset
    if not (isinstance(instruction, str) and isinstance(context, str) and isinstance(response, str)):
        return NOT_A_STRING
    return [Exchange(instruction, context, response)]


def _turn_list(turns: Any) -> Any:
    """`datasets` before 4.0 hands a list of dicts over as a dict of lists."""
    if isinstance(turns, Mapping):
        keys = list(turns)
        if not all(isinstance(v, list) for v in turns.values()) or len({len(v) for v in turns.values()}) > 1:
            return [None]  # a bad turn: this is no dict of lists
        return [dict(zip(keys, values, strict=True)) for values in zip(*turns.values(), strict=True)]
    return turns


def _chat_exchanges(turns: Any, schema: Schema) -> list[Exchange] | str:
    """Cut a chat at every answer: what was said since the last answer is the instruction, after the system prompt."""
    if turns is None:
        return NULL
    if isinstance(turns, str) or not isinstance(turns, Sequence):
        return BAD_TURN
    system: list[str] = []
    asked: list[str] = []
    exchanges: list[Exchange] = []
    last = ""
    for turn in turns:
        if not isinstance(turn, Mapping) or schema.role not in turn or schema.content not in turn:
            return BAD_TURN
        role, content = ROLES.get(str(turn[schema.role]).lower()), turn[schema.content]
        if role is None:
            return BAD_TURN
        if content is None:
            return NULL
        if not isinstance(content, str):
            return NOT_A_STRING
        if role == "system":
            system.append(content)
        elif role == "user":
            asked.append(content)
        elif last == "assistant" and exchanges and not asked:  # one answer in two turns
            exchanges[-1] = exchanges[-1]._replace(response=exchanges[-1].response + "\n" + content)
        elif asked or system:  # a chat that opens with the assistant has nothing that was asked
            exchanges.append(Exchange("\n".join([*system, *asked]), "", content))
            asked = []
        last = role
    return exchanges or NO_ASSISTANT_TURN


def render(exchange: Exchange, template: str = CLEAN_TEMPLATE) -> str:
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


def _paper(e: Exchange) -> str:
    return f"Instruction: {e.instruction} Input: {e.input} Response: {e.response}"


def _clean(e: Exchange) -> str:
    instruction, context, response = clean(e.instruction), clean(e.input), clean(e.response)
    return (
        f"Instruction: {instruction} Input: {context} Response: {response}"
        if context
        else (f"Instruction: {instruction} Response: {response}")
    )


# Versioned: scores depend on the template, so a change of wording or cleaning is a new name, never an edit.
TEMPLATES: dict[str, Callable[[Exchange], str]] = {PAPER_TEMPLATE: _paper, CLEAN_TEMPLATE: _clean}

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
    if _SURROGATE.search(text):  # halves that meet form one character; a lone half is no text
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return " ".join(text.split())


def _decode(match: re.Match[str]) -> str:
    code, letter = match.groups()
    return chr(int(code, 16)) if code else _CONTROL.get(letter, letter)
