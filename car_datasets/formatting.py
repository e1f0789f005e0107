"""Rows to the text that is scored: schemas and multi-turn chats.

Does: recognise the columns of an instruction dataset, cut a chat into user-assistant exchanges, render each exchange
with a template (templates.py). The only module that knows a column name of the user's.
Does not: load files (loading.py), count tokens (scoring.py), or change a row: what is rendered is read by a model and
then thrown away.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from car_datasets.templates import Exchange, Text, render

OK = "ok"
EMPTY_RESPONSE = "empty_response"  # scored, but marked
TRUNCATED = "truncated"  # scored, but the model did not see the end
NULL = "null"
NOT_A_STRING = "not_a_string"
NO_ASSISTANT_TURN = "no_assistant_turn"
BAD_TURN = "bad_turn"
UNSCORABLE = (NULL, NOT_A_STRING, NO_ASSISTANT_TURN, BAD_TURN)


class FormattedRow(NamedTuple):
    """The texts of a row, one per exchange, and a status (`"ok"`, `"empty_response"` or why there are no texts)."""

    texts: list[Text]
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

ROLE_NAMES = ("instruction", "input", "response", "turns", "role", "content")

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
    renamed = dict(as_column_names(columns))
    check_schema(schema, columns)
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


def as_column_names(columns: Mapping[str, str] | Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """A `columns` argument as sorted pairs, which hash the same in every process.

    Raises:
        ValueError: it does not map names to names.
    """
    try:
        pairs = tuple(sorted(dict(columns).items()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"columns={columns!r} must map roles to columns, as {{'instruction': 'task'}}.") from error
    if not all(isinstance(name, str) for pair in pairs for name in pair):
        raise ValueError(f"columns={columns!r} must map names to names, as {{'instruction': 'task'}}.")
    return pairs


def check_schema(schema: str, columns: Mapping[str, str] | Iterable[tuple[str, str]]) -> None:
    """Raise a ValueError for a schema or roles that no dataset could have."""
    unknown = {role for role, _ in as_column_names(columns)} - set(ROLE_NAMES)
    if unknown:
        raise ValueError(f"columns has the keys {sorted(unknown)}; known are {', '.join(ROLE_NAMES)}.")
    if schema != "auto" and schema not in SCHEMAS:
        raise ValueError(f"schema={schema!r} is not known; choose one of {sorted(SCHEMAS)} or 'auto'.")


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
        keys = _turn_keys(turn, schema)
        if keys is None:
            return BAD_TURN
        role, content = ROLES.get(str(turn[keys[0]]).lower()), turn[keys[1]]
        if role is None:
            return BAD_TURN
        if content is None and role == "assistant" and (turn.get("tool_calls") or turn.get("function_call")):
            continue  # the assistant calls a tool and says nothing; its answer comes after the tool's
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


def _turn_keys(turn: Any, schema: Schema) -> tuple[str, str] | None:
    """The keys of role and content: the schema's, or the other of the two usual pairs, which many files mix."""
    if isinstance(turn, Mapping):
        for role, content in ((schema.role, schema.content), ("role", "content"), ("from", "value")):
            if turn.get(role) is not None and content in turn:
                return role, content
    return None
