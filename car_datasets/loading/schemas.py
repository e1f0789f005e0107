"""Recognise the schema of an instruction dataset and turn its rows into the texts that are scored.

Does: know the column names of published datasets; read the exchanges of every row, and render them.
Does not: load files, cut a chat, count tokens, or change a row: a rendered text is read by a model and discarded.
"""

from __future__ import annotations

import logging
import re
import reprlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import repeat
from typing import Any, NamedTuple

from car_datasets.loading.chats import (
    BAD_TURN,
    NO_CONTENT,
    NOT_A_STRING,
    NULL,
    Reading,
    Turn,
    cut_at_answers,
    is_scored,
    join_prompt,
    read_side,
    read_text_chat,
    read_turns,
    status_kind,
    status_of,
)
from car_datasets.loading.templates import Exchange, Text, render, split_thought

logger = logging.getLogger(__name__)
ON_INVALID = ("error", "mark")  # values of the argument: refuse a dataset with unscorable rows, or keep them unscored


class FormattedRow(NamedTuple):
    """The texts of a row, one per exchange, and its status, which says why there are none or what the score lacks."""

    texts: list[Text]
    status: str


@dataclass(frozen=True)
class Schema:
    """The columns of a dataset that contain the instruction, the input and the response, or the turns of a chat.

    The columns `input`, `system`, `history` and `tools` may be missing from a dataset, and their values may be null.

    Args:
        name (`str`): the schema's key in [`SCHEMAS`]; shown in receipts.
        instruction (`str`, *optional*): the column of the instruction; a text, or a chat that the response continues.
        input (`str`, *optional*): the column of the context.
        response (`str`, *optional*): the column of the response; a text, a message or a chat.
        turns (`str`, *optional*): the column that contains a list of turns; then the three above are `None`.
        role (`str`, defaults to `"role"`): the key of a turn's role.
        content (`str`, defaults to `"content"`): the key of a turn's text.
        system (`str`, *optional*): the column of the system prompt.
        history (`str`, *optional*): the column of earlier turns, or of pairs of question and answer.
        tools (`str`, *optional*): the column that defines tools. It is carried, and not part of the text.
        marks (`tuple[str, ...]`): further columns by which the schema is recognised.
    """

    name: str
    instruction: str | None = None
    input: str | None = None
    response: str | None = None
    turns: str | None = None
    role: str = "role"
    content: str = "content"
    system: str | None = None
    history: str | None = None
    tools: str | None = None
    marks: tuple[str, ...] = ()

    @property
    def required(self) -> tuple[str, ...]:
        """Return the columns that every row needs to be scored."""
        return tuple(c for c in (self.instruction, self.response, self.turns) if c is not None)

    @property
    def read_columns(self) -> tuple[str, ...]:
        """Return the columns that are read, and those by which a batch of them is recognised again."""
        optional = (c for c in (self.input, self.system, self.history) if c is not None)
        return tuple(dict.fromkeys((*self.required, *optional, *self.marks)))


ROLE_NAMES = tuple(
    f.name for f in fields(Schema) if f.name not in ("name", "marks")
)  # the keys that `columns` may have
OPTIONAL = ("input", "system", "history", "tools")  # those whose column may be missing from a dataset
# Columns that are text of the conversation in most datasets, by the key of `columns` that reads them.
TEXT_ROLES = {
    **{"context": "input", "input": "input", "history": "history", "chat_history": "history"},
    **dict.fromkeys(("system", "system_prompt", "system_message", "system_instruction"), "system"),
}


def _single(name: str, instruction: str, response: str, **others: Any) -> Schema:
    return Schema(name, instruction, response=response, **{"system": "system", "tools": "tools", **others})


def _chat(turns: str, role: str = "role", content: str = "content", **others: Any) -> Schema:
    return Schema(turns, turns=turns, role=role, content=content, system="system", tools="tools", **others)


# The one table of schemas: a new entry is recognised, can be named with `schema=`, and is listed by `schema_names`.
SCHEMAS: dict[str, Schema] = {
    schema.name: schema
    for schema in (
        _single("alpaca", "instruction", "output", input="input", history="history"),
        _single("prompt/completion", "prompt", "completion"),
        _single("prompt/response", "prompt", "response"),
        _single("question/answer", "question", "answer"),
        _chat("messages"),
        _chat("conversations", "from", "value"),
        _single("dolly", "instruction", "response", input="context", marks=("context",)),
        _single("instruction/response", "instruction", "response", input="input", history="history"),
        _single("openorca", "question", "response", system="system_prompt", marks=("system_prompt",)),
        _single("question/response", "question", "response"),
        _single("query/response", "query", "response"),
        _single("inputs/targets", "inputs", "targets"),
        _chat("conversation"),
        _chat("data", marks=("id",)),  # UltraChat; a column "data" alone may be anything
        _single("prompt/chosen", "prompt", "chosen", marks=("rejected",)),
        _single("question/chosen", "question", "chosen", marks=("rejected",)),
        _single("instruction/chosen", "instruction", "chosen", input="input", history="history", marks=("rejected",)),
        _single(
            *("conversations/chosen", "conversations", "chosen"), role="from", content="value", marks=("rejected",)
        ),
        _single("messages/chosen", "messages", "chosen", marks=("rejected",)),
        _single("conversation/chosen", "conversation", "chosen", marks=("rejected",)),
        _chat("chosen", marks=("rejected",)),
    )
}
# Where several schemas fit, one of the first of these groups wins over all that are not in it. The second group is the
# table as it was: what is added to the table must not change how a dataset is read.
FIRST = (
    ("conversations/chosen", "messages/chosen"),
    ("alpaca", "prompt/completion", "prompt/response", "question/answer", "messages", "conversations"),
    ("prompt/chosen",),
)


def schema_names() -> tuple[str, ...]:
    """Return the values that `schema` may have: `"auto"` and the keys of [`SCHEMAS`], in the order of the table."""
    return ("auto", *SCHEMAS)


def find_schema(
    column_names: Iterable[str], schema: str = "auto", columns: Mapping[str, str] | Iterable[tuple[str, str]] = ()
) -> Schema:
    """Recognise the schema of a dataset from its column names, or check the one that was named.

    A column that looks like a part of the conversation and is not read is named in a warning, once per process.

    Args:
        column_names (`Iterable[str]`): the columns of the dataset.
        schema (`str`, defaults to `"auto"`): a key of [`SCHEMAS`], or `"auto"`.
        columns (`Mapping[str, str]`, *optional*): columns whose names differ from the schema's, such as
            `{"instruction": "task", "response": "answer"}`; keys are `instruction`, `input`, `response`, `turns`,
            `role`, `content`, `system`, `history` or `tools`, or a schema's own name of such a column, such as
            `output`. With `"auto"`, they alone define the schema if they name instruction and response, or turns;
            otherwise they are added to the recognised one.

    Raises:
        ValueError: no schema fits, more than one fits, or a named column is missing.
    """
    available = list(column_names)
    check_schema(schema, columns)
    renamed = _by_role(columns)
    if schema == "auto" and ("turns" in renamed or {"instruction", "response"} <= set(renamed)):
        known = Schema(name="named columns", **renamed)
    elif schema == "auto":
        known = _recognise(available, renamed)
    else:
        known = _present(replace(SCHEMAS[schema], **renamed), available, renamed)
    optional = [getattr(known, role) for role in OPTIONAL]
    _refuse_missing([c for c in (*known.required, *optional) if c is not None], available)
    _warn_unread(known, tuple(c for c in TEXT_ROLES if c in available and c not in known.read_columns))
    return known


def _refuse_missing(named: Iterable[str], available: Sequence[str]) -> None:
    if missing := [column for column in named if column not in available]:
        raise ValueError(
            f"Columns {missing} are not in the dataset, which has {available}. Name the right ones in `columns`."
        )


def _present(schema: Schema, available: Sequence[str], renamed: Mapping[str, Any]) -> Schema:
    """Return the schema without the optional columns that a dataset lacks; one that the user names is kept."""
    absent = [role for role in OPTIONAL if role not in renamed and getattr(schema, role) not in available]
    changes: dict[str, Any] = dict.fromkeys(absent)
    if "system" in absent and schema.system is not None and "system_prompt" in available:
        changes["system"] = "system_prompt"
    return replace(schema, **changes)


def _recognise(available: list[str], renamed: Mapping[str, Any]) -> Schema:
    """Return the schema of [`SCHEMAS`] whose columns, or those named for them, are all there."""
    fitting = [
        schema for schema in SCHEMAS.values() if all(c in available for c in _needed(replace(schema, **renamed)))
    ]
    if not fitting and renamed:
        _refuse_missing((column for role, column in renamed.items() if role not in ("role", "content")), available)
        raise ValueError(f"columns={dict(renamed)} must name instruction and response, or turns.")
    if not fitting:
        raise ValueError(
            f"No known schema fits the columns {available}. Known: {sorted(SCHEMAS)}. {_proposal(available)}"
        )
    if "prompt" in available:  # UltraFeedback has the prompt and the chosen answer in `messages` as well
        fitting = [schema for schema in fitting if schema.name != "messages/chosen"]
    for group in FIRST:
        if any(schema.name in group for schema in fitting):
            fitting = [schema for schema in fitting if schema.name in group]
            break
    # The more specific schema wins: dolly has the columns of instruction/response, and one more.
    fitting = [s for s in fitting if not any(_needed(s) < _needed(other) for other in fitting)]
    if len(fitting) > 1:
        raise ValueError(
            f"The columns {available} fit several schemas: {[s.name for s in fitting]}. Choose one: "
            f"schema={fitting[0].name!r} (--schema {fitting[0].name})."
        )
    return _present(replace(fitting[0], **renamed), available, renamed)


def _needed(schema: Schema) -> frozenset[str]:
    """Return the columns by which a schema is recognised."""
    return frozenset((*schema.required, *schema.marks))


def _proposal(available: Sequence[str]) -> str:
    """Return the call that names the columns, as far as their names say what they are."""
    known = {**_own_names(), **TEXT_ROLES}
    found = {known[column]: column for column in reversed(available) if column in known}
    if "instruction" not in found and "input" in found:  # alone, it is what was asked
        found["instruction"] = found.pop("input")
    found = {role: found.get(role, "...") for role in ROLE_NAMES if role in (*found, "instruction", "response")}
    call = ", ".join(f"{role!r}: {column if column == '...' else repr(column)}" for role, column in found.items())
    option = ",".join(f"{role}={column}" for role, column in found.items())
    return f"Name the columns: columns={{{call}}} (--columns {option}), or of a chat columns={{'turns': ...}}."


@lru_cache(maxsize=256)  # every batch finds its schema again; one warning is enough
def _warn_unread(schema: Schema, unread: tuple[str, ...]) -> None:
    if not unread:
        return
    # A column whose role another one has can only be read in its place.
    roles = {TEXT_ROLES[column]: column for column in reversed(unread)}
    option = ",".join(f"{role}={column}" for role, column in roles.items())
    logger.warning(
        "The column(s) %s look like text of the conversation, but the schema %r does not read them. "
        "columns=%s (--columns %s) reads them.",
        list(unread),
        schema.name,
        roles,
        option,
    )


def check_schema(schema: str, columns: Mapping[str, str] | Iterable[tuple[str, str]]) -> None:
    """Raise ValueError if the schema or a key of `columns` is unknown; no dataset is needed for this check."""
    if schema != "auto" and schema not in SCHEMAS:
        raise ValueError(f"schema={schema!r} is not known; choose one of {sorted(SCHEMAS)} or 'auto'.")
    _by_role(columns)


def _by_role(columns: Mapping[str, str] | Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Return a `columns` argument by the names of [`Schema`]'s fields.

    Raises:
        ValueError: a key is unknown, or two keys mean the same.
    """
    pairs, known = as_column_names(columns), _own_names()
    unknown = {key for key, _ in pairs} - set(ROLE_NAMES) - set(known)
    if unknown:
        raise ValueError(
            f"columns has the keys {sorted(unknown)}; known are {', '.join(ROLE_NAMES)}, and the names that the "
            f"schemas have for them: {', '.join(sorted(set(known) - set(ROLE_NAMES)))}."
        )
    roles = {key: key if key in ROLE_NAMES else known[key] for key, _ in pairs}
    twice = sorted(key for key in roles if list(roles.values()).count(roles[key]) > 1)
    if twice:
        raise ValueError(f"columns has the keys {twice}, which mean the same; leave one of them out.")
    return {roles[key]: column for key, column in pairs}


def _own_names() -> dict[str, str]:
    """Return the fields of [`Schema`] by the names that the schemas of the table have for their columns."""
    wanted = ("turns", *OPTIONAL, "instruction", "response")  # for a name with two meanings the last one counts
    return {
        column: role for role in wanted for schema in SCHEMAS.values() if (column := getattr(schema, role)) is not None
    }


def as_column_names(columns: Mapping[str, str] | Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Return a `columns` argument as sorted pairs, which are hashable and have the same hash in every process.

    Raises:
        ValueError: `columns` does not map names to names.
    """
    try:
        pairs = tuple(sorted(dict(columns).items()))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"columns={reprlib.repr(columns)} must map roles to columns, such as {{'instruction': 'task'}}."
        ) from error
    if not all(isinstance(name, str) for pair in pairs for name in pair):
        raise ValueError(f"columns={reprlib.repr(columns)} must map names to names, such as {{'instruction': 'task'}}.")
    return pairs


def format_batch(
    batch: Mapping[str, Sequence[Any]], schema: Schema, template: str, score_thoughts: bool = False
) -> list[FormattedRow]:
    """Render the rows of a `.map` batch.

    Args:
        batch (`Mapping[str, Sequence]`): columns of equal length, as `.map(batched=True)` passes them.
        schema ([`Schema`]): the columns that contain the text.
        template (`str`): `"paper"` (CaR's, byte for byte) or `"clean-1"` (white space and escapes cleaned up).
        score_thoughts (`bool`): put the thoughts of an answer in front of it, instead of leaving them out.

    Returns:
        `list[FormattedRow]`: one entry per row. A row that cannot be scored has no texts and a status that says why.
    """
    return [
        FormattedRow([render(exchange, template) for exchange in row.exchanges], row.status)
        for row in read_rows(batch, schema, score_thoughts)
    ]


def exchanges_of(
    batch: Mapping[str, Sequence[Any]], schema: Schema, score_thoughts: bool = False
) -> list[list[Exchange] | str]:
    """Return the exchanges of every row of a batch, or for a row without any the status that says why."""
    rows = read_rows(batch, schema, score_thoughts)
    return [row.exchanges if is_scored(row.status) else row.status for row in rows]


def read_rows(batch: Mapping[str, Sequence[Any]], schema: Schema, score_thoughts: bool = False) -> list[Reading]:
    """Return exchanges and status of every row of a batch."""
    count = len(batch[schema.required[0]])

    def values(column: str | None) -> Iterable[Any]:
        return repeat(None, count) if column is None or column not in batch else batch[column]

    before = zip(values(schema.system), values(schema.history), strict=True)
    if schema.turns is not None:
        rows = zip(batch[schema.turns], before, strict=True)
        return [_read_chat(turns, *given, schema, score_thoughts) for turns, given in rows]
    texts = zip(values(schema.instruction), values(schema.input), values(schema.response), strict=True)
    return [_read_pair(row, *given, schema, score_thoughts) for row, given in zip(texts, before, strict=True)]


def conversations_of(batch: Mapping[str, Sequence[Any]], schema: Schema) -> list[list[Turn] | str]:
    """Return the turns of every row of a batch, or for a row that cannot be read the status that says why.

    The context of an instruction (`input`) follows the instruction after an empty line, in one turn.
    """

    def values(column: str | None) -> Iterable[Any]:
        return repeat(None) if column is None or column not in batch else batch[column]

    before = (
        _turns_before(*given, schema) for given in zip(values(schema.system), values(schema.history), strict=False)
    )
    if schema.turns is not None:
        chats = (read_turns(turns, schema.role, schema.content) for turns in batch[schema.turns])
    else:
        assert schema.instruction is not None and schema.response is not None
        columns = (batch[schema.instruction], batch[schema.response], values(schema.input))
        chats = (_conversation(*row, schema) for row in zip(*columns, strict=False))
    rows = zip(chats, before, strict=False)  # columns that are absent have no end
    return [
        next((part for part in (chat, given) if isinstance(part, str)), None) or [*given, *chat] for chat, given in rows
    ]


def _conversation(instruction: Any, response: Any, context: Any, schema: Schema) -> list[Turn] | str:
    """Return the turns of a row that has its instruction and its response in two columns."""
    if instruction is None or response is None:
        return NULL
    asked, said = _read_sides(instruction, response, schema)
    if isinstance(asked, str) or isinstance(said, str):
        return asked if isinstance(asked, str) else said
    if context is not None and not isinstance(context, str):
        return NOT_A_STRING
    turns = join_prompt(asked, said)
    last = max((i for i, turn in enumerate(turns) if turn.kind == "user"), default=None)
    if context and context.strip() and last is not None:
        turns[last] = turns[last]._replace(text=f"{turns[last].text}\n\n{context}")
    return turns


def _read_chat(turns: Any, system: Any, history: Any, schema: Schema, score_thoughts: bool) -> Reading:
    before, chat = _turns_before(system, history, schema), read_turns(turns, schema.role, schema.content)
    if isinstance(chat, str) or isinstance(before, str):
        return Reading([], chat if isinstance(chat, str) else str(before))
    return cut_at_answers([*before, *chat], score_thoughts)


def _read_pair(row: tuple[Any, Any, Any], system: Any, history: Any, schema: Schema, score_thoughts: bool) -> Reading:
    """Read a row that has its instruction and its response in two columns."""
    instruction, context, response = row
    if instruction is None or response is None:
        return Reading([], NULL)
    context = "" if context is None else context  # published datasets use null and "" alike for "no input"
    before = _turns_before(system, history, schema)
    if not before and _is_plain(response) and isinstance(instruction, str) and not _OPEN_END.search(instruction):
        if not isinstance(context, str):
            return Reading([], NOT_A_STRING)
        thought, answer = split_thought(response)
        exchanges = [Exchange(instruction, context, f"{thought}\n{answer}" if thought and score_thoughts else answer)]
        return Reading(exchanges, status_of(exchanges))
    asked, said = _read_sides(instruction, response, schema)
    if isinstance(asked, str) or isinstance(said, str) or isinstance(before, str):
        return Reading([], next(side for side in (asked, said, before) if isinstance(side, str)))
    if not isinstance(context, str):
        return Reading([], NOT_A_STRING)
    found = cut_at_answers([*before, *join_prompt(asked, said)], score_thoughts)
    if context and found.exchanges:
        found.exchanges[-1] = found.exchanges[-1]._replace(input=context)
    return found


def _is_plain(response: Any) -> bool:
    """Return True for a text that cannot be a chat, as most answers are."""
    return isinstance(response, str) and response.lstrip()[:1] not in ("[", "{") and not _SPEAKER.search(response)


_SPEAKER = re.compile("Assistant:|ASSISTANT:")
_OPEN_END = re.compile(r"(?:Assistant|ASSISTANT):\s*\Z")  # the prompt of a model, as HH-RLHF writes it


def _read_sides(instruction: Any, response: Any, schema: Schema) -> tuple[list[Turn] | str, list[Turn] | str]:
    """Return the turns of instruction and response, or a status for one that is neither a text nor a chat."""
    asked = read_side(instruction, "user", schema.role, schema.content)
    said = read_side(response, "assistant", schema.role, schema.content)
    # Text that could be a chat as JSON is taken for one only if both are, or if it repeats the instruction, and if it
    # can be scored: an answer may well be JSON.
    chat = read_text_chat(response, schema.role, schema.content)
    if chat is not None and not isinstance(instruction, str):
        return asked, chat
    prompt = read_text_chat(instruction, schema.role, schema.content)
    if prompt is not None and isinstance(instruction, str) and _OPEN_END.search(instruction):
        prompt = asked = prompt[:-1]  # the last turn is the one that the response fills
    if chat is None:
        return asked, said
    repeated = any((turn.kind, turn.text.strip()) == ("user", instruction.strip()) for turn in chat)
    if prompt is None and not repeated:
        return asked, said
    joined = join_prompt([] if prompt is None else prompt, chat)
    return ([], joined) if cut_at_answers(joined).exchanges else (asked, said)


def _turns_before(system: Any, history: Any, schema: Schema) -> list[Turn] | str:
    """Return what the columns of system prompt and history hold, or a status for what cannot be read."""
    turns: list[Turn] = []
    if isinstance(system, str):
        turns += [Turn("system", system)] if system.strip() else []
    elif system is not None:
        prompt = read_side(system, "system", schema.role, schema.content)
        if isinstance(prompt, str):
            return prompt
        turns += prompt
    if history is None or (isinstance(history, str) and not history.strip()):
        return turns
    earlier = read_turns(history, schema.role, schema.content)
    return earlier if isinstance(earlier, str) else [*turns, *earlier]


def invalid_rows_message(statuses: Sequence[str], names: Sequence[Any], total: int, where: str = "") -> str:
    """Return `3 of 1000 rows cannot be scored: 2 null (rows 4, 17), 1 not_a_string (row 9). ...`."""
    rows = defaultdict(list)
    for status, name in zip(statuses, names, strict=True):
        rows[status].append(str(name))
    parts = [
        f"{len(which)} {status} (rows {', '.join(which[:5])}{', ...' if len(which) > 5 else ''})"
        for status, which in list(rows.items())[:8]
    ]
    parts += [f"{sum(map(len, list(rows.values())[8:]))} others"] if len(rows) > 8 else []
    keys = ""
    if any(status_kind(status) in (BAD_TURN, NO_CONTENT) for status in rows):
        keys = (
            " A chat is a list of messages with a role and a content; if their keys have other names, pass columns="
            "{'role': ..., 'content': ...} (--columns role=...,content=...)."
        )
    return (
        f"{len(statuses)} of {total} rows{where} cannot be scored: {'; '.join(parts)}.{keys} Fix or drop them, or pass "
        "on_invalid='mark' (--on-invalid mark) to keep them without a score."
    )
