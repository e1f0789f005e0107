"""Read the selected rows of a result as turns, and write them as the messages that trainers read.

Does: tell the source's columns from ours; keep a message as the source has it where a trainer reads it; move thoughts,
calls of tools and weights to where its format has a place for them, or say that it has none.
Does not: know the file or the configuration of a trainer.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, Value

from car_datasets.loading.chats import ROLES, Turn
from car_datasets.loading.languages import LANGUAGE_COLUMN
from car_datasets.loading.schemas import SCHEMAS, Schema, conversations_of, find_schema
from car_datasets.loading.templates import join_lines, parse_json, split_thought
from car_datasets.loading.values import as_json, carried
from car_datasets.receipt import Receipt
from car_datasets.recipe import column_names_in
from car_datasets.results import read_tables
from car_datasets.scoring.named import ScorerName
from car_datasets.selection.rule import SELECTION_COLUMNS
from car_datasets.utils.column_names import ColumnNames

BATCH = 1_000  # rows that are read at a time
# Columns that a trainer would take for something else.
RESERVED = {
    trainer: names.split()
    for trainer, names in {
        "trl": "prompt completion messages conversations text chosen rejected tools images image input_ids labels label "
        "assistant_masks completion_mask chat_template_kwargs",
        "axolotl": "messages conversations system tools images chosen rejected input_ids labels attention_mask",
        "llama-factory": "messages conversations images videos audios chosen rejected",
    }.items()
}
_CALL_PARTS = ("tool_use", "tool_call", "function_call")
_ARGUMENTS = ("arguments", "input", "parameters", "args")
# Keys of a message that are read; any other one is carried where messages are, and named where they are not.
_KEYS = (
    *("role", "from", "content", "value", "text", "parts", "refusal", "name", "id"),
    *("tool_call_id", "tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "thought"),
    *("weight", "train", "training", "trainable", "loss", "loss_mask"),
)
# Parts of a message that are read as they are; the calls and thoughts of other formats are moved out of them.
_PARTS = {"trl": ("text", "image", "video", "audio"), "openai": ("text", "image_url", "refusal")}
_OPENAI_KEYS = {"role", "content", "name", "tool_calls", "tool_call_id", "weight", "refusal"}
_FROM = {"user": "human", "assistant": "gpt", "tool": "observation", "system": "system"}


# rows ------------------------------------------------------------------------------------------------------------------


class Unfit(Exception):
    """Say that a row has something that a format has no place for; the text is what."""


class TrainingRow(NamedTuple):
    """A row as it is trained on.

    Args:
        values (`Mapping[str, Any]`): its columns.
        turns (`list[Turn]`): what is said in it; empty if it cannot be read.
        messages (`list`): for each turn the message of the source that it was read from, or `None`.
    """

    values: Mapping[str, Any]
    turns: list[Turn]
    messages: list[Mapping[str, Any] | None]


class Selected(NamedTuple):
    """The selected rows, and what is true of all of them.

    Args:
        rows (`Dataset`): the source's columns, and the one by which errors name a row.
        schema ([`Schema`]): how they are read.
        index_column (`str`): the column by which errors name a row.
        own (`list[str]`): the source's columns.
        trainer (`str`): one of `TRAINERS`.
        single (`bool`): each row is a question and an answer in columns of their own, perhaps with a system prompt.
        plain (`bool`): no column holds anything but a text, or pairs of texts as the history.
        calls (`bool`): some row calls a tool in a message of its own kind.
        unscored (`bool`): some answer has weight 0.
        keys (`list[str]`): keys of messages that no format has.
    """

    rows: Dataset
    schema: Schema
    index_column: str
    own: list[str]
    trainer: str
    single: bool = False
    plain: bool = False
    calls: bool = False
    unscored: bool = False
    keys: Sequence[str] = ()

    @property
    def spoken(self) -> list[str]:
        """Return the columns that hold the conversation and its tools."""
        schema = self.schema
        named = (*schema.required, schema.input, schema.system, schema.history, schema.tools)
        return [name for name in named if name is not None]

    @property
    def extras(self) -> list[str]:
        """Return the other columns that a trainer passes over, and that every reader of JSON gives back."""
        taken = {*self.spoken, *RESERVED.get(self.trainer, self.own)}  # other formats have none
        return [name for name in self.own if name not in taken and _is_plain(self.rows.features[name])]

    def read(self) -> Iterator[TrainingRow]:
        """Yield the rows in their order."""
        filled = {name: self.rows.features[name] for name in self.spoken}
        for batch in self.rows.iter(batch_size=BATCH):
            for i, turns in enumerate(conversations_of(batch, self.schema)):
                values = {
                    name: _without_filled(column[i], filled[name]) if name in filled else column[i]
                    for name, column in batch.items()
                }
                if isinstance(turns, str):
                    yield TrainingRow(values, [], [])
                else:
                    yield _with_thoughts(TrainingRow(values, turns, _messages_of(values, turns, self.schema)))


def open_selected(folder: Path, trainer: str) -> Selected:
    """Return the selected rows of a folder, and what is true of all of them.

    Args:
        folder (`Path`): that `car-datasets curate` wrote.
        trainer (`str`): one of `TRAINERS`.

    Raises:
        ValueError: the folder is not a result, or nothing was selected.
    """
    selected, scored = read_tables(folder)
    receipt = Receipt.read(folder)
    if not len(selected):
        raise ValueError(f"{folder} has no selected rows, and a file of none trains nothing; curate with a larger n1.")
    schema = find_schema(
        selected.column_names,
        receipt.schema if receipt.schema in SCHEMAS else "auto",
        receipt.recipe.get("columns", {}),
    )
    names = column_names_in(receipt.recipe)
    own = [name for name in selected.column_names if name not in _added(receipt, names, scored)]
    rows = carried(selected.select_columns(list(dict.fromkeys([*own, names.index]))).with_format(None))
    return _surveyed(Selected(rows, schema, names.index, own, trainer))


def _added(receipt: Receipt, names: ColumnNames, scored: Dataset) -> set[str]:
    """Return the names of the columns that are not the source's."""
    added = {names.score, names.within, names.cluster, names.embedding, names.language}
    added |= {*names.diagnostics, *names.marks, *SELECTION_COLUMNS}
    added.update(ScorerName.of_record(receipt.scorer).further_columns(names.score))
    # An index of another name than ours is the source's own, unless it counts the rows.
    if names.index == ColumnNames.index or scored[names.index][:] == list(range(len(scored))):
        added.add(names.index)
    grouped = [str(receipt.recipe.get(setting)).partition("=")[0] for setting in ("within", "balance", "quota")]
    found = {name for name in (ColumnNames.kind, LANGUAGE_COLUMN) if name in grouped and name in scored.column_names}
    return added | {name for name in found if not _is_own(name, scored.column_names, added | found, names.index)}


def _is_own(name: str, columns: Sequence[str], added: Collection[str], index: str) -> bool:
    """Return True if a column of languages or kinds is the source's, of which the columns come before all of ours."""
    after = columns[columns.index(name) + 1 :]
    return (index in added and index in after) or any(other not in added for other in after)


def _surveyed(source: Selected) -> Selected:
    """Return the selection with the fields that only a look at all rows tells."""
    schema, keys = source.schema, dict[str, None]()
    single = plain = schema.turns is None
    calls = unscored = False
    for row in source.read():
        single = single and [turn.kind for turn in row.turns if turn.kind != "system"] == ["user", "assistant"]
        plain = plain and _is_in_columns(row, schema)
        unscored = unscored or not all(turn.scored for turn in row.turns)
        for turn, message in zip(row.turns, row.messages, strict=True):
            if message is not None:
                keys |= dict.fromkeys(key for key in message if key not in (*_KEYS, schema.role, schema.content))
                calls = calls or _has_calls(turn, message, schema)
    return source._replace(single=single, plain=plain, calls=calls, unscored=unscored, keys=list(keys))


def _is_plain(feature: Any) -> bool:
    """Return True for a feature whose values every reader of JSON gives back: texts, numbers, lists, records."""
    if isinstance(feature, Mapping):
        return all(map(_is_plain, feature.values()))
    if hasattr(feature, "feature"):
        return _is_plain(feature.feature)
    return isinstance(feature, Value) and re.match("(large_)?string|bool|u?int|float", feature.dtype) is not None


def _without_filled(value: Any, feature: Any) -> Any:
    """Return a value without the nulls that Arrow fills in for keys that other rows have."""
    if isinstance(feature, Mapping) and isinstance(value, Mapping):
        return {key: _without_filled(part, feature[key]) for key, part in value.items() if part is not None}
    if hasattr(feature, "feature") and isinstance(value, list):
        return [_without_filled(part, feature.feature) for part in value]
    return value


def _kind(message: Mapping[str, Any], schema: Schema) -> str | None:
    """Return what the role of a message means, such as `"call"`."""
    role = next((message[key] for key in (schema.role, "role", "from") if message.get(key) is not None), "")
    return ROLES.get(re.sub(r"[\s-]+", "_", str(role).strip().lower()))


def _has_calls(turn: Turn, message: Mapping[str, Any], schema: Schema) -> bool:
    """Return True for a call of a tool that is more than the text of an answer, and for what a tool answers."""
    if turn.kind == "tool" or _kind(message, schema) == "call":
        return True
    return any(message.get(key) for key in ("tool_calls", "function_call")) or isinstance(
        message.get(schema.content), list
    )


def _messages_of(values: Mapping[str, Any], turns: Sequence[Turn], schema: Schema) -> list[Mapping[str, Any] | None]:
    """Return the source's message of each turn; `None` where a turn is a text, or part of another shape."""
    said = values.get(schema.turns or schema.response or "")
    chat = parse_json(said) if isinstance(said, str) and schema.turns is not None else said
    before: list[Mapping[str, Any] | None] = [None] * (len(turns) - (len(chat) if isinstance(chat, list) else 1))
    if isinstance(chat, list) and len(chat) <= len(turns) and all(isinstance(message, Mapping) for message in chat):
        kinds = [{"call": "assistant"}.get(kind or "", kind) for kind in (_kind(message, schema) for message in chat)]
        if kinds == [turn.kind for turn in turns[len(before) :]]:
            return [*before, *chat]
    last = turns[-1] if turns else Turn("", "")
    if isinstance(said, str) and last.kind == "assistant" and split_thought(said) == (last.thought, last.text):
        return [*before, {"role": "assistant", schema.content: said}]  # the text with the marks of its thought
    return [None] * len(turns)


def _with_thoughts(row: TrainingRow) -> TrainingRow:
    """Return a row in which a thought that is a turn of its own belongs to the answer after it."""
    kept: list[tuple[Turn, Mapping[str, Any] | None]] = []
    thought = ""
    for turn, message in zip(row.turns, row.messages, strict=True):
        if turn.kind == "thought":
            thought = join_lines(thought, turn.text)
        elif thought and turn.kind == "assistant":
            kept.append((turn._replace(thought=join_lines(thought, turn.thought)), message))
            thought = ""
        else:
            kept.append((turn, message))
    if thought:
        kept.append((Turn("thought", thought), None))
    return TrainingRow(row.values, [turn for turn, _ in kept], [message for _, message in kept])


def _is_in_columns(row: TrainingRow, schema: Schema) -> bool:
    """Return True if the row's columns are what LLaMA-Factory reads: texts, and a history of pairs of texts."""
    texts = [row.values.get(name) for name in (schema.input, schema.system) if name is not None]
    sides = [row.values.get(name) for name in (schema.instruction, schema.response) if name is not None]
    if not all(isinstance(text, str) for text in sides) or not all(isinstance(t, (str, type(None))) for t in texts):
        return False
    history = row.values.get(schema.history) if schema.history else None
    pairs = [] if history is None else history
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) for t in pair) for pair in pairs
    ):
        return False
    # More turns mean that a text holds a chat.
    said = [turn.kind for turn in row.turns if turn.kind != "system"]
    return said == ["user", "assistant"] * (len(pairs) + 1)


# messages --------------------------------------------------------------------------------------------------------------


def text_of(turn: Turn, message: Mapping[str, Any] | None, schema: Schema) -> str:
    """Return what a turn says, as the source writes it if that is one text; otherwise its thought comes first.

    Args:
        turn (`Turn`), message (`Mapping`, *optional*): a turn, and the source's message that it was read from.
        schema ([`Schema`]): how the source is read.

    Raises:
        Unfit: a part of it is no text.
    """
    if turn.kind == "thought":
        raise Unfit("end with a thought that no answer follows")
    if turn.partial:
        raise Unfit("have images, audio or other parts that are no text")
    said = None if message is None else message.get(schema.content, message.get("content"))
    if isinstance(said, str) and (turn.kind != "assistant" or split_thought(said)[0] == turn.thought):
        return said
    text = turn.text if message is not None else join_lines(turn.text, turn.call)
    return f"<think>\n{turn.thought}\n</think>\n\n{text}" if turn.thought else text


def calls_of(message: Mapping[str, Any] | None, schema: Schema) -> list[dict[str, Any]]:
    """Return the calls of tools in a message: `name`, `arguments` as the source has them, and `id` or `None`.

    Args:
        message (`Mapping`, *optional*), schema ([`Schema`]): a message of the source, and how it is read.

    Raises:
        Unfit: a call cannot be read.
    """
    if message is None:
        return []
    content = message.get(schema.content, message.get("content"))
    given = [message.get("tool_calls"), message.get("function_call")]
    if _kind(message, schema) == "call":
        given.insert(0, content)
    elif isinstance(content, list):
        given.insert(0, [p for p in content if isinstance(p, Mapping) and p.get("type") in _CALL_PARTS])
    found = []
    for value in given:
        parsed = parse_json(value) if isinstance(value, str) else value
        if value and parsed is None:
            raise Unfit("call tools in a text that is not JSON")
        for call in parsed if isinstance(parsed, list) else [parsed] if parsed else []:
            inner = (call.get("function") or call) if isinstance(call, Mapping) else {}
            if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
                raise Unfit("call tools without a name")
            arguments: Any = next((inner[key] for key in _ARGUMENTS if inner.get(key) is not None), {})
            found.append({"name": inner["name"], "arguments": arguments, "id": call.get("id")})
    return found


def _is_ready(turn: Turn, message: Mapping[str, Any], source: Selected) -> bool:
    """Return True for a message that the trainer reads as it is."""
    schema = source.schema
    if (schema.role, schema.content) != ("role", "content") or message.get("role") != turn.kind:
        return False
    content, calls = message.get("content"), message.get("tool_calls") or []
    kinds = _PARTS.get(source.trainer, ())
    parts = isinstance(content, list) and all(isinstance(p, Mapping) and p.get("type") in kinds for p in content)
    if not (isinstance(content, str) or parts or (calls and content is None)) or message.get("function_call"):
        return False
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) and call.get("function") for call in calls):
        return False
    if source.trainer != "openai":
        return True
    whole = all(
        call.get("id") and call.get("type") and isinstance(call["function"].get("arguments"), str) for call in calls
    )
    answered = turn.kind != "tool" or "tool_call_id" in message
    return whole and answered and set(message) <= _OPENAI_KEYS and (turn.scored or message.get("weight") == 0)


def as_messages(row: TrainingRow, source: Selected) -> list[dict[str, Any]]:
    """Return a row as messages of `role` and `content`; a message of the source that is one stays as it is.

    Args:
        row ([`TrainingRow`]), source ([`Selected`]): one of the selected rows, and the selection.

    Raises:
        Unfit: the trainer has no place for something in the row.
    """
    written: list[dict[str, Any]] = []
    waiting: list[str | None] = []  # calls that no tool has answered yet
    made = 0
    for turn, said in zip(row.turns, row.messages, strict=True):
        calls = calls_of(said, source.schema)
        if source.trainer == "openai":  # which wants to know which call a tool answers
            calls = [{**call, "id": call["id"] or f"call_{made + i}"} for i, call in enumerate(calls)]
        made += len(calls)
        waiting += [call["id"] for call in calls]
        answered = waiting.pop(0) if turn.kind == "tool" and waiting else None
        if said is not None and _is_ready(turn, said, source):
            message = {"role": turn.kind, "content": None, **said}
        else:
            message = _message(turn, said, calls, source)
        if turn.kind == "tool" and (name := message.get("tool_call_id") or answered):
            message["tool_call_id"] = name
        written.append(message if turn.scored else {**message, **unweighted(source.trainer)})
    return written


def _message(
    turn: Turn, said: Mapping[str, Any] | None, calls: Sequence[Mapping[str, Any]], source: Selected
) -> dict[str, Any]:
    """Return a turn as a message that the source does not have in this form, with the other keys that it has."""
    known = (*_KEYS, source.schema.role, source.schema.content)
    others = {key: value for key, value in (said or {}).items() if key not in known and source.trainer != "openai"}
    others |= {key: said[key] for key in ("name", "tool_call_id") if said is not None and said.get(key)}
    if calls:
        content = text_of(turn._replace(call=""), None, source.schema)
        return {
            "role": "assistant",
            "content": content,
            "tool_calls": _tool_calls(calls, source.trainer),
            **others,
        }
    return {"role": turn.kind, "content": text_of(turn, said, source.schema), **others}


def _tool_calls(calls: Sequence[Mapping[str, Any]], trainer: str) -> list[dict[str, Any]]:
    written = []
    for call in calls:
        arguments = call["arguments"]
        if trainer == "trl":  # chat templates of models write the arguments themselves
            arguments = _parsed(arguments)
        elif not isinstance(arguments, str):
            arguments = as_json(arguments)
        name = {"id": call["id"]} if call["id"] else {}
        written.append({**name, "type": "function", "function": {"name": call["name"], "arguments": arguments}})
    return written


def unweighted(trainer: str) -> dict[str, Any]:
    """Return the mark of an answer that is not trained on.

    Args:
        trainer (`str`): one of `TRAINERS`.

    Raises:
        Unfit: it has no such mark.
    """
    if trainer not in ("openai", "axolotl"):
        raise Unfit("have answers of weight 0, on which this trainer would train")
    return {"weight": 0} if trainer == "openai" else {"train": False}


def as_sharegpt(row: TrainingRow, source: Selected) -> list[dict[str, Any]]:
    """Return a row as messages of `from` and `value`.

    Args:
        row ([`TrainingRow`]), source ([`Selected`]): one of the selected rows, and the selection.

    Raises:
        Unfit: the trainer has no place for something in the row.
    """
    written = []
    for turn, said in zip(row.turns, row.messages, strict=True):
        mark = {} if turn.scored else unweighted(source.trainer)
        if calls := calls_of(said, source.schema):
            if turn.text.strip() or turn.thought:
                raise Unfit("say something next to a call of a tool")
            made = [{"name": call["name"], "arguments": _parsed(call["arguments"])} for call in calls]
            given = (said or {}).get(source.schema.content)
            as_given = isinstance(given, str) and _kind(said or {}, source.schema) == "call"
            value = str(given) if as_given else as_json(made if len(made) > 1 else made[0])
            written.append({"from": "function_call", "value": value, **mark})
        else:
            written.append({"from": _FROM[turn.kind], "value": text_of(turn, said, source.schema), **mark})
    return written


def _parsed(arguments: Any) -> Any:
    parsed = parse_json(arguments) if isinstance(arguments, str) else arguments
    return arguments if parsed is None else parsed


def tools_of(row: TrainingRow, source: Selected) -> list[dict[str, Any]] | None:
    """Return the definitions of a row's tools, or `None` if it has none.

    Args:
        row ([`TrainingRow`]), source ([`Selected`]): one of the selected rows, and the selection.

    Raises:
        Unfit: they are a text that is not JSON.
    """
    given = row.values.get(source.schema.tools) if source.schema.tools else None
    tools = parse_json(given) if isinstance(given, str) and given.strip() else given
    if given and tools is None and str(given).strip():
        raise Unfit("define tools in a text that is not JSON")
    tools = [tools] if isinstance(tools, Mapping) else tools
    return list(tools) if tools and isinstance(tools, list) else None


def tools_text(row: TrainingRow, source: Selected) -> str | None:
    """Return the definitions of a row's tools as JSON text, which is the source's own if it has a text.

    Args:
        row ([`TrainingRow`]), source ([`Selected`]): one of the selected rows, and the selection.

    Raises:
        Unfit: they are a text that is not JSON.
    """
    given = row.values.get(source.schema.tools) if source.schema.tools else None
    tools = tools_of(row, source)
    return None if tools is None else given if isinstance(given, str) else as_json(tools)


def refuse_other_orders(said: Sequence[Mapping[str, Any]], role: str, asks: Sequence[str]) -> None:
    """Raise `Unfit` unless questions and answers take turns, as LLaMA-Factory needs them; it skips other rows.

    Args:
        said (`Sequence[Mapping]`): the messages of a row.
        role (`str`): the key of their role.
        asks (`Sequence[str]`): the roles that ask: those of the user and of a tool.
    """
    kinds = [message[role] in asks for message in said if message[role] != "system"]
    if said and any(message[role] == "system" for message in said[1:]):
        raise Unfit("have a system prompt after the first message")
    if kinds != [i % 2 == 0 for i in range(len(kinds))] or len(kinds) % 2:
        raise Unfit("do not take turns from a question to an answer, and LLaMA-Factory would skip them")
