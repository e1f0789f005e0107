"""Recognise the schema of an instruction dataset and turn its rows into the texts that are scored.

Does: know the column names of published datasets; cut a chat into user-assistant exchanges; render each exchange.
Does not: load files, count tokens, or change a row: a rendered text is read by a model and discarded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

from car_datasets.loading.templates import Exchange, Text, render

# Statuses of a row. They are values of the status column and keys of reports, so renaming one breaks saved results.
OK = "ok"
EMPTY_RESPONSE = "empty_response"  # scored, but marked
TRUNCATED = "truncated"  # scored, but the model did not see the end
NULL = "null"
NOT_A_STRING = "not_a_string"
NO_ASSISTANT_TURN = "no_assistant_turn"
BAD_TURN = "bad_turn"
UNSCORABLE = (NULL, NOT_A_STRING, NO_ASSISTANT_TURN, BAD_TURN)  # a row of any other status has a score

ON_INVALID = ("error", "mark")  # values of the argument: refuse a dataset with unscorable rows, or keep them unscored


class FormattedRow(NamedTuple):
    """The texts of a row, one per exchange, and its status.

    The status is `"ok"`, `"empty_response"`, or one of [`UNSCORABLE`], which says why there are no texts.
    """

    texts: list[Text]
    status: str


@dataclass(frozen=True)
class Schema:
    """The columns of a dataset that contain the instruction, the input and the response, or the turns of a chat.

    Args:
        name (`str`): the schema's key in [`SCHEMAS`]; shown in receipts.
        instruction (`str`, *optional*): the column of the instruction.
        input (`str`, *optional*): the column of the context. It may be missing from a dataset, and its values may be
            null.
        response (`str`, *optional*): the column of the response.
        turns (`str`, *optional*): the column that contains a list of turns; then the three above are `None`.
        role (`str`, defaults to `"role"`): the key of a turn's role.
        content (`str`, defaults to `"content"`): the key of a turn's text.
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
        """Return the columns that every row needs to be scored."""
        return tuple(c for c in (self.instruction, self.response, self.turns) if c is not None)


ROLE_NAMES = tuple(field.name for field in fields(Schema) if field.name != "name")  # the keys that `columns` may have

# The one table of schemas: a new entry is recognised, can be named with `schema=`, and is listed by `schema_names`.
SCHEMAS: dict[str, Schema] = {
    "alpaca": Schema("alpaca", "instruction", "input", "output"),
    "prompt/completion": Schema("prompt/completion", "prompt", None, "completion"),
    "prompt/response": Schema("prompt/response", "prompt", None, "response"),
    "question/answer": Schema("question/answer", "question", None, "answer"),
    "messages": Schema("messages", turns="messages"),
    "conversations": Schema("conversations", turns="conversations", role="from", content="value"),
}
# The spellings (in lower case) in OpenAI, ShareGPT and Vicuna files. The output of a tool is something that the
# assistant is given to read, so it counts as part of the question.
ROLES: dict[str, str] = {
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


def schema_names() -> tuple[str, ...]:
    """Return the values that `schema` may have: `"auto"` and the keys of [`SCHEMAS`], in the order of the table."""
    return ("auto", *SCHEMAS)


def find_schema(
    column_names: Iterable[str], schema: str = "auto", columns: Mapping[str, str] | Iterable[tuple[str, str]] = ()
) -> Schema:
    """Recognise the schema of a dataset from its column names, or check the one that was named.

    Args:
        column_names (`Iterable[str]`): the columns of the dataset.
        schema (`str`, defaults to `"auto"`): a key of [`SCHEMAS`], or `"auto"`.
        columns (`Mapping[str, str]`, *optional*): columns whose names differ from the schema's, such as
            `{"instruction": "task", "response": "answer"}`; keys are `instruction`, `input`, `response` or `turns`,
            `role`, `content`. With `"auto"`, they alone define the schema.

    Raises:
        ValueError: no schema fits, more than one fits, or a named column is missing.
    """
    available = list(column_names)
    renamed = dict(as_column_names(columns))
    check_schema(schema, columns)
    if schema == "auto" and not renamed:
        return _recognise(available)
    if schema == "auto":
        known = Schema(name="named columns", **renamed)
        if not known.turns and not (known.instruction and known.response):
            raise ValueError(f"columns={renamed} must name instruction and response, or turns.")
    else:
        settings = {**asdict(SCHEMAS[schema]), **renamed}
        if "input" not in renamed and settings["input"] not in available:
            settings["input"] = None  # the schema's own input is optional, one that the user names is not
        known = Schema(**settings)
    missing = [c for c in (*known.required, known.input) if c is not None and c not in available]
    if missing:
        raise ValueError(
            f"Columns {missing} are not in the dataset, which has {available}. Name the right ones in `columns`."
        )
    return known


def _recognise(column_names: list[str]) -> Schema:
    """Return the only schema of [`SCHEMAS`] whose required columns are all there."""
    fitting = [schema for schema in SCHEMAS.values() if all(c in column_names for c in schema.required)]
    if not fitting:
        raise ValueError(
            f"No known schema fits the columns {column_names}. Known: {sorted(SCHEMAS)}. "
            "Name the columns: columns={'instruction': ..., 'response': ...} (--columns instruction=...,response=...)."
        )
    if len(fitting) > 1:
        raise ValueError(
            f"The columns {column_names} fit several schemas: {[s.name for s in fitting]}. Choose one: "
            f"schema={fitting[0].name!r} (--schema {fitting[0].name})."
        )
    [schema] = fitting
    # Many Alpaca-like datasets leave out the column `input`.
    return schema if schema.input in column_names else replace(schema, input=None)


def check_schema(schema: str, columns: Mapping[str, str] | Iterable[tuple[str, str]]) -> None:
    """Raise ValueError if the schema or a key of `columns` is unknown; no dataset is needed for this check."""
    unknown = {role for role, _ in as_column_names(columns)} - set(ROLE_NAMES)
    if unknown:
        raise ValueError(f"columns has the keys {sorted(unknown)}; known are {', '.join(ROLE_NAMES)}.")
    if schema != "auto" and schema not in SCHEMAS:
        raise ValueError(f"schema={schema!r} is not known; choose one of {sorted(SCHEMAS)} or 'auto'.")


def as_column_names(columns: Mapping[str, str] | Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Return a `columns` argument as sorted pairs, which are hashable and have the same hash in every process.

    Raises:
        ValueError: `columns` does not map names to names.
    """
    try:
        pairs = tuple(sorted(dict(columns).items()))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"columns={columns!r} must map roles to columns, such as {{'instruction': 'task'}}."
        ) from error
    if not all(isinstance(name, str) for pair in pairs for name in pair):
        raise ValueError(f"columns={columns!r} must map names to names, such as {{'instruction': 'task'}}.")
    return pairs


def format_batch(batch: Mapping[str, Sequence[Any]], schema: Schema, template: str) -> list[FormattedRow]:
    """Render the rows of a `.map` batch.

    Args:
        batch (`Mapping[str, Sequence]`): columns of equal length, as `.map(batched=True)` passes them.
        schema ([`Schema`]): the columns that contain the text.
        template (`str`): `"paper"` (CaR's, byte for byte) or `"clean-1"` (white space and escapes cleaned up).

    Returns:
        `list[FormattedRow]`: one entry per row. A row that cannot be scored has no texts and a status that says why.
    """
    rows = []
    for exchanges in exchanges_of(batch, schema):
        if isinstance(exchanges, str):
            rows.append(FormattedRow([], exchanges))
        else:
            # An empty response is text all the same: the row is scored, and only marked.
            empty = any(not e.response.strip() for e in exchanges)
            rows.append(FormattedRow([render(e, template) for e in exchanges], EMPTY_RESPONSE if empty else OK))
    return rows


def exchanges_of(batch: Mapping[str, Sequence[Any]], schema: Schema) -> list[list[Exchange] | str]:
    """Return the exchanges of every row of a batch, or for a row without any the status that says why."""
    if schema.turns is not None:
        return [_chat_exchanges(_turn_list(turns), schema) for turns in batch[schema.turns]]
    instructions, responses = batch[str(schema.instruction)], batch[str(schema.response)]
    inputs = batch[schema.input] if schema.input is not None else [None] * len(responses)
    return [_pair(i, x, r) for i, x, r in zip(instructions, inputs, responses, strict=True)]


def _pair(instruction: Any, context: Any, response: Any) -> list[Exchange] | str:
    if instruction is None or response is None:
        return NULL
    context = "" if context is None else context  # published datasets use null and "" alike for "no input"
    if not (isinstance(instruction, str) and isinstance(context, str) and isinstance(response, str)):
        return NOT_A_STRING
    return [Exchange(instruction, context, response)]


def _turn_list(turns: Any) -> Any:
    """Return a chat as a list of turns; `datasets` before 4.0 passes a list of dicts as a dict of lists."""
    if isinstance(turns, Mapping):
        keys = list(turns)
        if not all(isinstance(v, list) for v in turns.values()) or len({len(v) for v in turns.values()}) > 1:
            return [None]  # not a dict of lists of equal length: one invalid turn makes the row a `bad_turn`
        return [dict(zip(keys, values, strict=True)) for values in zip(*turns.values(), strict=True)]
    return turns


def _chat_exchanges(turns: Any, schema: Schema) -> list[Exchange] | str:
    """Cut a chat into exchanges, or return the status that says why it has none."""
    if turns is None:
        return NULL
    if isinstance(turns, str) or not isinstance(turns, Sequence):  # a str is a Sequence too
        return BAD_TURN
    read: list[_Turn] = []
    for raw in turns:
        turn = _read_turn(raw, schema)
        if isinstance(turn, str):
            return turn  # one invalid turn makes the row unscorable, rather than a score for a part of the chat
        if turn is not None:
            read.append(turn)
    return _cut_at_answers(read) or NO_ASSISTANT_TURN


class _Turn(NamedTuple):
    role: str
    content: str


def _read_turn(turn: Any, schema: Schema) -> _Turn | str | None:
    """Return a turn, the status that says why it is invalid, or `None` for a tool call, which says nothing."""
    keys = _turn_keys(turn, schema)
    role = None if keys is None else ROLES.get(str(turn[keys[0]]).lower())
    if keys is None or role is None:
        return BAD_TURN
    content = turn[keys[1]]
    if content is None and role == "assistant" and (turn.get("tool_calls") or turn.get("function_call")):
        return None  # the assistant's answer follows the tool's
    if content is None:
        return NULL
    return _Turn(role, content) if isinstance(content, str) else NOT_A_STRING


def _turn_keys(turn: Any, schema: Schema) -> tuple[str, str] | None:
    """Return the keys of role and content: the schema's, or one of the two usual pairs, which many files mix."""
    if isinstance(turn, Mapping):
        for role, content in ((schema.role, schema.content), ("role", "content"), ("from", "value")):
            if turn.get(role) is not None and content in turn:
                return role, content
    return None


def _cut_at_answers(turns: Iterable[_Turn]) -> list[Exchange]:
    """Make one exchange per answer; its instruction is the system prompt and what was asked since the last answer."""
    system: list[str] = []
    asked: list[str] = []
    exchanges: list[Exchange] = []
    previous = ""
    for role, content in turns:
        if role == "system":
            system.append(content)
        elif role == "user":
            asked.append(content)
        elif previous == "assistant" and exchanges and not asked:  # one answer in two turns
            exchanges[-1] = exchanges[-1]._replace(response=exchanges[-1].response + "\n" + content)
        elif asked or system:  # an opening turn of the assistant answers nothing, and is left out
            exchanges.append(Exchange("\n".join([*system, *asked]), "", content))
            asked = []
        previous = role
    return exchanges


def invalid_rows_message(statuses: Sequence[str], names: Sequence[Any], total: int, where: str = "") -> str:
    """Return `3 of 1000 rows cannot be scored: 2 null (rows 4, 17), 1 not_a_string (row 9). ...`."""
    parts = []
    for kind in dict.fromkeys(statuses):
        which = [str(n) for s, n in zip(statuses, names, strict=True) if s == kind]
        shown = ", ".join(which[:5]) + (", ..." if len(which) > 5 else "")
        parts.append(f"{len(which)} {kind} (rows {shown})")
    return (
        f"{len(statuses)} of {total} rows{where} cannot be scored: {'; '.join(parts)}. Fix or drop them, or pass "
        "on_invalid='mark' (--on-invalid mark) to keep them without a score."
    )
