"""Read the turns of a chat, whatever their writer called them, and cut them into the exchanges that are scored.

Does: know the roles, keys and content parts of public chat formats; tell answers, tool calls, thoughts and context
apart; say by a status why a chat cannot be scored, or what a reader should know about its score.
Does not: know the columns of a dataset, render a text, or change a row.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from car_datasets.loading.templates import (
    Exchange,
    compact_json,
    is_written_call,
    join_lines,
    parse_chat,
    parse_json,
    parse_speakers,
    render_call,
    split_thought,
)

# Statuses of a row. They are values of the status column and keys of reports, so renaming one breaks saved results. A
# status may have a detail after a colon, such as "unknown_role: narrator".
OK = "ok"
EMPTY_RESPONSE = "empty_response"  # scored, but marked
TRUNCATED = "truncated"  # scored, but the model did not see the end
TOOL_CALL = "tool_call"  # scored on the text of a tool call, with which the chat ends
OTHER_PARTS = "other_parts"  # scored without images, audio and other parts that are not text
NULL = "null"
NOT_A_STRING = "not_a_string"
NO_ASSISTANT_TURN = "no_assistant_turn"
TOO_LONG = "too_long"  # its exchanges would repeat the system prompt to more than MOST_REPEATED characters
BAD_TURN = "bad_turn"  # with the keys of the message, if it has any
NO_CONTENT = "no_content"  # with the role of the message
UNKNOWN_ROLE = "unknown_role"  # with the role
SCORED = (OK, EMPTY_RESPONSE, TRUNCATED, TOOL_CALL, OTHER_PARTS)  # a row of any other status has no score

# What a role means, by its name in lower case with `_` for spaces and hyphens.
ROLES: dict[str, str] = {
    **dict.fromkeys(("system", "developer", "system_prompt"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "ai", "chatbot", "bot", "model", "llm"), "assistant"),
    **dict.fromkeys(("bard", "bing", "claude"), "assistant"),
    **dict.fromkeys(("function_call", "function_calls", "tool_call", "tool_calls", "tool_use"), "call"),
    **dict.fromkeys(("tool", "tools", "tool_response", "tool_result", "tool_results", "tool_output"), "tool"),
    **dict.fromkeys(("function", "function_response", "function_result", "function_output", "api"), "tool"),
    **dict.fromkeys(("observation", "ipython", "environment", "code_output", "execution"), "tool"),
    **dict.fromkeys(("thought", "thoughts", "thinking", "reasoning"), "thought"),
}
ROLE_KEYS = ("role", "from")
_CONTENT_KEYS = ("content", "value", "text", "parts")
# Keys of an entry that contains question and answer of one exchange.
_ASKED_KEYS = ("instruction", "human", "user", "question", "prompt", "query", "input")
_ANSWER_KEYS = ("output", "assistant", "gpt", "bot", "answer", "response", "completion")
_THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking", "thought")
_WEIGHT_KEYS = ("weight", "train", "training", "trainable", "loss", "loss_mask", "output_with_loss")
_ZERO = ("0", "0.0", "false", "no")
_TEXT_PARTS = (None, "text", "input_text", "output_text", "refusal")
_CALL_PARTS = ("tool_use", "tool_call", "function_call")

CONTEXT_CHARACTERS = 1_000  # of earlier turns that an exchange is given to read
# About what a model with 512 tokens reads in English. Earlier turns fill only the part that the exchange leaves free:
# they come before the answer, and must not push its end out of the model's sight.
READ_CHARACTERS = 2_000
MOST_REPEATED = 1 << 24  # characters of system prompts in all exchanges of a chat


class Reading(NamedTuple):
    """The exchanges of a row and its status; a row that cannot be scored has no exchanges, and a status says why."""

    exchanges: list[Exchange]
    status: str


class Turn(NamedTuple):
    """A turn of a chat.

    Args:
        kind (`str`): `"system"`, `"user"`, `"assistant"`, `"tool"` (a tool's answer) or `"thought"`.
        text (`str`): what was said, without thoughts and calls.
        thought (`str`): what the assistant thought before it said this.
        call (`str`): the tool calls that the assistant makes, one per line; `""` for none.
        scored (`bool`): False for a turn of weight 0, which is context.
        partial (`bool`): True if parts of the turn are not text (images, audio, ...).
    """

    kind: str
    text: str
    thought: str = ""
    call: str = ""
    scored: bool = True
    partial: bool = False


class _Content(NamedTuple):
    text: str
    thought: str = ""
    call: str = ""
    partial: bool = False


def is_scored(status: str) -> bool:
    """Return True if rows of this status have a score."""
    return status_kind(status) in SCORED


def status_kind(status: str) -> str:
    """Return a status without its detail: `"unknown_role"` for `"unknown_role: narrator"`."""
    return status.partition(": ")[0]


def read_turns(chat: Any, role: str = "role", content: str = "content") -> list[Turn] | str:
    """Read the turns of a chat, or return the status that says why it cannot be read.

    One turn that cannot be read makes the chat unreadable, rather than a score for a part of it.

    Args:
        chat: a list of messages, of texts (the user's first) or of pairs of question and answer; a dict of lists; any
            of these as JSON text; or the text of a chat that marks its turns by `Human:` and `Assistant:`.
        role, content (`str`): keys of a message; `role` or `from`, and `content`, `value` or `text`, are known.
    """
    if chat is None or (isinstance(chat, str) and not chat.strip()):
        return NULL
    entries = _entries(chat)
    if entries is None:
        return BAD_TURN
    keys = ((role, *ROLE_KEYS), (content, *_CONTENT_KEYS))
    turns = []
    for message in _messages(entries, keys[0]):
        turn = _read_message(message, *keys)
        if isinstance(turn, str):
            return turn
        turns.append(turn)
    return turns


def read_side(value: Any, kind: str, role: str = "role", content: str = "content") -> list[Turn] | str:
    """Read a prompt or an answer that is a text, a message or a chat, or return the status that says why it is none.

    Args:
        value: the text, the message or the list of messages.
        kind (`str`): `"user"` or `"assistant"`, who says a text.
        role, content (`str`): keys of a message.
    """
    if isinstance(value, str):
        thought, text = split_thought(value) if kind == "assistant" else ("", value)
        return [Turn(kind, text, thought)]
    if isinstance(value, Mapping) and any(value.get(key) is not None for key in (role, *ROLE_KEYS)):
        value = [value]
    if value is None:
        return NULL
    value = value.tolist() if isinstance(value, np.ndarray) else value
    if _has_text_parts(value) and all(part.get(key) is None for part in value for key in (role, *ROLE_KEYS)):
        value = [{"role": kind, "content": value}]
    # A list of texts is no chat here, but several answers to choose from.
    if not isinstance(value, (list, tuple, np.ndarray)) or any(isinstance(entry, str) for entry in value):
        return NOT_A_STRING
    return read_turns(value, role, content)


def read_text_chat(text: Any, role: str = "role", content: str = "content") -> list[Turn] | None:
    """Return the turns of a chat that is JSON text or marks its speakers; `None` for a text that is read as it is."""
    if not isinstance(text, str):
        return None
    value = parse_json(text) if text.lstrip()[:1] in ("[", "{") and '"' in text else parse_speakers(text)
    value = [value] if isinstance(value, Mapping) else value
    if not value or not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        return None
    turns = read_turns(value, role, content)
    return None if isinstance(turns, str) else turns


def join_prompt(prompt: Sequence[Turn], chat: Sequence[Turn]) -> list[Turn]:
    """Join a prompt and the chat that follows it, which may repeat the prompt; what it repeats counts once."""
    asked, said = ([turn for turn in turns if turn.kind != "system"] for turns in (prompt, chat))
    keys = [[(turn.kind, turn.text.strip()) for turn in turns] for turns in (asked, said)]
    if keys[1] and keys[0][-len(keys[1]) :] == keys[1]:  # the prompt is the entire chat
        return list(prompt)
    # A prompt of one turn may also be the last question of a longer chat.
    repeated = keys[1][: len(asked)] == keys[0] or (len(asked) == 1 and keys[0][0] in keys[1])
    system = [turn for turn in prompt if turn.kind == "system"]
    return [*(system if repeated else prompt), *chat]


def _entries(chat: Any) -> list[Any] | None:
    """Return a chat as a list, or `None` if it is none."""
    if isinstance(chat, np.ndarray):
        chat = chat.tolist()
    if isinstance(chat, str):
        chat = parse_chat(chat)
    if isinstance(chat, Mapping):  # `datasets` before 4.0 passes a list of dicts as a dict of lists
        columns = [value.tolist() if isinstance(value, np.ndarray) else value for value in chat.values()]
        if not all(isinstance(c, (list, tuple)) for c in columns) or len({len(c) for c in columns}) > 1:
            return None
        return [dict(zip(chat, values, strict=True)) for values in zip(*columns, strict=True)]
    return list(chat) if isinstance(chat, (list, tuple)) else None


def _messages(entries: Sequence[Any], role_keys: Sequence[str]) -> list[Any]:
    """Return one message per turn, where a chat is a list of texts or of pairs."""
    if any(isinstance(entry, str) for entry in entries) and all(e is None or isinstance(e, str) for e in entries):
        parsed = [parse_json(e) if e is not None and e.lstrip()[:1] == "{" else None for e in entries]
        if all(isinstance(message, Mapping) for message in parsed):  # every message as JSON text
            return parsed
        return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(entries)]
    messages: list[Any] = []
    for entry in entries:
        pair = _pair_of(entry, role_keys)
        messages += [entry] if pair is None else pair
    return messages


def _pair_of(entry: Any, role_keys: Sequence[str]) -> list[dict[str, Any]] | None:
    """Return the messages of an entry that holds question and answer; `None` for any other entry."""
    if isinstance(entry, np.ndarray):
        entry = entry.tolist()
    if isinstance(entry, (list, tuple)) and len(entry) == 2:
        system, marks, (asked, answered) = None, {}, entry
    elif isinstance(entry, Mapping) and all(entry.get(key) is None for key in role_keys):
        asked_keys, answer_keys = ([k for k in keys if k in entry] for keys in (_ASKED_KEYS, _ANSWER_KEYS))
        if not asked_keys or not answer_keys:
            return None
        asks = [entry[k] for k in asked_keys if entry[k] is not None]
        asked = (
            "\n".join(asks) if len(asks) > 1 and all(isinstance(text, str) for text in asks) else next(iter(asks), None)
        )
        answered = next((entry[k] for k in answer_keys if entry[k] is not None), None)
        if asked is None and answered is None:
            return None
        system, marks = entry.get("system"), {key: entry[key] for key in _WEIGHT_KEYS if key in entry}
    else:
        return None
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered, **marks}]
    return [{"role": "system", "content": system}, *messages] if system else messages


def _read_message(message: Any, role_keys: Sequence[str], content_keys: Sequence[str]) -> Turn | str:
    """Return a message as a turn, or the status that says why it cannot be read."""
    role = None
    if isinstance(message, Mapping):
        role = next((message[key] for key in role_keys if message.get(key) is not None), None)
    if role is None:
        keys = (
            ", ".join(str(key) for key in message if message[key] is not None) if isinstance(message, Mapping) else ""
        )
        return f"{BAD_TURN}: keys {_shown(keys)}" if keys else BAD_TURN
    kind = ROLES.get(re.sub(r"[\s-]+", "_", str(role).strip().lower()))
    if kind is None:
        return f"{UNKNOWN_ROLE}: {_shown(role)}"
    # A file that mixes two formats has the keys of both in every row, with nulls.
    given = [key for key in content_keys if key in message]
    content = next((message[key] for key in given if message[key] is not None), message.get("refusal"))
    thought = "\n".join(message[key] for key in _THOUGHT_KEYS if isinstance(message.get(key), str))
    call = _calls_of(message) if kind in ("assistant", "call") else ""
    if content is None and kind != "tool" and not call and not (thought and kind == "assistant"):
        return NULL if given else f"{NO_CONTENT}: {_shown(role)}"
    read = _read_content(content, kind)
    if isinstance(read, str):
        return read
    if kind == "call":  # the content of such a turn is the call
        return Turn("assistant", "", thought, join_lines(read.text, call), _has_weight(message), read.partial)
    if kind == "assistant":
        inner, text = split_thought(read.text)
        call = join_lines(read.call, call)
        if not call and is_written_call(text):
            text, call = "", text
        thought = join_lines(thought, read.thought, inner)
        return Turn(kind, text, thought, call, _has_weight(message), read.partial)
    return Turn(kind, read.text, partial=read.partial)


def _shown(role: Any) -> str:
    """Return a role for a status: short, and without characters that a terminal would obey."""
    text = "".join(c if c.isprintable() else "?" for c in str(role)[:200].strip())
    return text if len(text) <= 40 else f"{text[:39]}…"


def _has_weight(message: Mapping[str, Any]) -> bool:
    """Return False for a turn that its writer excludes from the loss."""
    values = (message.get(key) for key in _WEIGHT_KEYS)
    return not any(str(value).strip().lower() in _ZERO for value in values if value is not None)


# --- content


def _read_content(content: Any, kind: str) -> _Content | str:
    """Return the content of a message, or the status that says why it cannot be read."""
    if isinstance(content, np.ndarray):
        content = content.tolist()
    if content is None:
        return _Content("")
    if kind == "call":
        return _Content(render_call(parse_json(content) if isinstance(content, str) else content, content))
    if isinstance(content, str):
        return _Content(content)
    if kind == "tool" and not _has_text_parts(content):
        return _Content(compact_json(content))  # a tool may answer anything
    parts = [content] if isinstance(content, Mapping) and isinstance(content.get("type"), str) else content
    if isinstance(parts, (list, tuple)) and all(isinstance(part, (str, Mapping)) for part in parts):
        return _read_parts(parts)
    return NOT_A_STRING


def _has_text_parts(content: Any) -> bool:
    """Return True for a list with a part such as `{"type": "text", "text": "..."}`."""
    if not isinstance(content, (list, tuple)) or not all(isinstance(part, Mapping) for part in content):
        return False
    return any(part.get("type") in _TEXT_PARTS[1:] for part in content)


def _read_parts(parts: Iterable[Any]) -> _Content | str:
    """Join the text of content parts; the parts that are not text only mark the turn."""
    texts, thoughts, calls, partial = [], [], [], False
    for part in parts:
        kind = None if isinstance(part, str) else part.get("type")
        if isinstance(part, str):
            texts.append(part)
        elif kind in _TEXT_PARTS:
            text = part.get("refusal" if kind == "refusal" else "text")
            if isinstance(text, str):
                texts.append(text)
            elif kind is None and part.get("functionCall") is not None:  # Gemini's
                calls.append(render_call(part["functionCall"], part["functionCall"]))
            elif kind is None and part.get("functionResponse") is not None:
                texts.append(compact_json(part["functionResponse"]))
            elif kind is None and any(value is not None for value in part.values()):
                partial = True  # such as {"image": ...}
            else:
                return NULL if text is None else NOT_A_STRING
        elif kind in _THOUGHT_KEYS:
            thoughts += [part[key] for key in (kind, "text") if isinstance(part.get(key), str)][:1]
        elif kind in _CALL_PARTS:
            calls.append(render_call(part, part))
        elif kind == "tool_result":
            result = _read_content(part.get("content"), "tool")
            texts.append(result if isinstance(result, str) else result.text)
        else:
            partial = True
    return _Content("\n".join(texts), join_lines(*thoughts), join_lines(*calls), partial)


def _calls_of(message: Mapping[str, Any]) -> str:
    """Return the calls in a message's `tool_calls` and `function_call`, one per line."""
    calls: list[Any] = []
    for key in ("tool_calls", "function_call"):
        value = message.get(key)
        parsed = parse_json(value) if isinstance(value, str) else value
        if isinstance(parsed, np.ndarray):
            parsed = parsed.tolist()
        found = value if parsed is None else parsed  # a text that is not JSON is shown as it is
        calls += found if isinstance(found, (list, tuple)) else [found]
    return join_lines(*(render_call(call, call) for call in calls))


# --- exchanges


def cut_at_answers(turns: Iterable[Turn], score_thoughts: bool = False) -> Reading:
    """Cut a chat into one exchange per answer.

    The instruction of an exchange is the system prompt, the nearest earlier turns that fit, and what was said since the
    last answer: by the user, in calls of tools, and by the tools. An opening turn of the assistant answers nothing, and
    is an earlier turn of the first exchange. A call with which the chat ends is an answer.

    Args:
        turns (`Iterable[Turn]`): from [`read_turns`].
        score_thoughts (`bool`): put the thoughts of an exchange in front of its answer.
    """
    chat, partial = _Cut(score_thoughts), False
    for turn in turns:
        partial = partial or turn.partial
        if turn.kind == "thought":
            chat.thoughts.append(turn.text)
        elif turn.kind == "assistant":
            chat.say(turn)
        else:
            chat.ask(turn)
    ends_in_call = chat.close()
    if chat.repeated > MOST_REPEATED:
        return Reading([], TOO_LONG)
    if not chat.exchanges:
        return Reading([], NO_ASSISTANT_TURN)
    if partial:
        return Reading(chat.exchanges, OTHER_PARTS)
    if ends_in_call:
        return Reading(chat.exchanges, TOOL_CALL)
    return Reading(chat.exchanges, status_of(chat.exchanges))


def status_of(exchanges: Iterable[Exchange]) -> str:
    """Return `"empty_response"` if an answer is empty or blank, else `"ok"`."""
    return OK if all(exchange.response.strip() for exchange in exchanges) else EMPTY_RESPONSE


class _Cut:
    """The state of a chat that is being cut; every turn is looked at a bounded number of times."""

    def __init__(self, score_thoughts: bool) -> None:
        self.exchanges: list[Exchange] = []
        self.repeated = 0  # characters of system prompts, beyond the first exchange
        self.thoughts: list[str] = []  # since the last answer
        self._score_thoughts = score_thoughts
        self._system: dict[str, None] = {}  # in order; a lookup in a list would take longer with each
        self._earlier: deque[str] = deque()  # the newest earlier turns, as many as fit in CONTEXT_CHARACTERS
        self._size = 0
        self._asked: list[str] = []
        self._answer: list[str] = []
        self._calls: tuple[int, int] | None = None  # where in `_asked` the last calls are that nothing has answered
        self._answered_unscored = False  # the last turn in `_asked` is an answer of weight 0

    def ask(self, turn: Turn) -> None:
        """Take a turn of the system, the user or a tool."""
        if turn.kind == "system" and not (self._asked or self._answer or self.exchanges):
            self._system[turn.text] = None  # a column and the first message may have the same prompt
            return
        self._finish()
        if self._answered_unscored and turn.kind != "tool":
            self._remember(self._asked)
            self._asked = []
        self._answered_unscored = False
        self._asked.append(turn.text)

    def say(self, turn: Turn) -> None:
        """Take a turn of the assistant; an answer may have several."""
        if turn.call:
            # What the assistant says with a call, or directly before it, belongs to the call.
            before, self._answer = self._answer, []
            if turn.thought:
                self.thoughts.append(turn.thought)
            self._call(join_lines(*before, turn.text, turn.call), turn.scored)
        elif not turn.scored:
            self._finish()
            self.thoughts = []
            self._asked.append(turn.text)
            self._calls, self._answered_unscored = None, True
        elif self._answer or self._asked or self._system:
            if turn.thought:
                self.thoughts.append(turn.thought)
            self._answer.append(turn.text)
        else:
            self._remember([turn.text])

    def close(self) -> bool:
        """Finish the last exchange; return True if it ends in a call."""
        self._finish()
        if self._calls is None:
            return False
        start, end = self._calls
        self._answer, self._asked = self._asked[start:end], self._asked[:start]
        if not (self._asked or self._system or self._earlier):
            return False  # a call that nobody asked for
        self._finish()
        return True

    def _call(self, text: str, scored: bool) -> None:
        place = len(self._asked)
        self._asked.append(text)
        start = self._calls[0] if self._calls is not None and self._calls[1] == place else place
        self._calls = (start, place + 1) if scored else None

    def _finish(self) -> None:
        """Make an exchange of what was asked and answered, if there is an answer."""
        if not self._answer or self.repeated > MOST_REPEATED:
            return
        answer = "\n".join(self._answer)
        thought = join_lines(*self.thoughts) if self._score_thoughts else ""
        response = f"{thought}\n{answer}" if thought else answer
        system = sum(len(text) + 1 for text in self._system)
        own = system + sum(len(text) + 1 for text in self._asked) + len(response)
        asked = [*self._system, *self._nearest(READ_CHARACTERS - own), *self._asked]
        self.repeated += system if self.exchanges else 0
        self.exchanges.append(Exchange("\n".join(asked), "", response))
        self._remember([*self._asked, answer])
        self._asked, self._answer, self.thoughts, self._calls = [], [], [], None
        self._answered_unscored = False

    def _remember(self, texts: Iterable[str]) -> None:
        for text in texts:
            self._earlier.append(text)
            self._size += len(text) + 1
        while self._size > CONTEXT_CHARACTERS:
            self._size -= len(self._earlier.popleft()) + 1

    def _nearest(self, room: int) -> list[str]:
        """Return the newest earlier turns that fit entirely into so many characters, oldest first."""
        found: list[str] = []
        for text in reversed(self._earlier):
            room -= len(text) + 1
            if room < 0:
                break
            found.append(text)
        return found[::-1]
