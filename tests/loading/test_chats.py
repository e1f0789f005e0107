"""chats.py: who said what in a chat of any public format, how it is cut, and what its status says."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from car_datasets.loading.chats import (
    BAD_TURN,
    CONTEXT_CHARACTERS,
    EMPTY_RESPONSE,
    NO_ASSISTANT_TURN,
    NOT_A_STRING,
    NULL,
    OK,
    OTHER_PARTS,
    READ_CHARACTERS,
    TOO_LONG,
    TOOL_CALL,
    is_scored,
    read_turns,
)
from car_datasets.loading.schemas import SCHEMAS, Schema, exchanges_of, format_batch, read_rows
from car_datasets.loading.templates import Exchange

SHAREGPT = SCHEMAS["conversations"]

# --- chats: turns are written "role: content", `s`, `u`, `a`, `t` for system, user, assistant and tool

ROLE = {"s": "system", "u": "user", "a": "assistant", "t": "tool", "d": "developer"}


def chat(*turns: str) -> list[dict[str, str]]:
    return [{"role": ROLE[turn[0]], "content": turn[2:]} for turn in turns]


def cut(turns: Any, schema: Schema = SCHEMAS["messages"]) -> list[tuple[str, str]] | str:
    """Return (instruction, response) of every exchange, or the status."""
    [row] = exchanges_of({schema.turns: [turns]}, schema)
    if isinstance(row, str):
        return row
    assert all(exchange.input == "" for exchange in row)
    return [(exchange.instruction, exchange.response) for exchange in row]


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        pytest.param(["u q", "a r"], [("q", "r")], id="one exchange"),
        pytest.param(["u q", "a r", "u q2", "a r2"], [("q", "r"), ("q\nr\nq2", "r2")], id="several exchanges"),
        pytest.param(
            ["s rules", "u q", "a r", "u q2", "a r2"],
            [("rules\nq", "r"), ("rules\nq\nr\nq2", "r2")],
            id="the system prompt belongs to every instruction",
        ),
        pytest.param(["d rules", "u q", "a r"], [("rules\nq", "r")], id="a developer's prompt is a system prompt"),
        pytest.param(["s rules", "a r"], [("rules", "r")], id="a system prompt alone asks"),
        pytest.param(["u q", "u more", "a r"], [("q\nmore", "r")], id="consecutive user turns"),
        pytest.param(["u q", "a r", "a r2"], [("q", "r\nr2")], id="consecutive assistant turns are one answer"),
        pytest.param(["a hello", "u q", "a r"], [("hello\nq", "r")], id="opening assistant turn"),
        pytest.param(
            ["a hello", "a again", "u q", "a r"], [("hello\nagain\nq", "r")], id="two opening assistant turns"
        ),
        pytest.param(["u q", "a r", "u q2"], [("q", "r")], id="trailing user turn"),
        pytest.param(["u q", "a call", "t result", "a r"], [("q", "call"), ("q\ncall\nresult", "r")], id="tool"),
        pytest.param(["u q", "a "], [("q", "")], id="empty answer"),
        pytest.param([], NO_ASSISTANT_TURN, id="no turns"),
        pytest.param(["s rules", "u q"], NO_ASSISTANT_TURN, id="no assistant turn"),
        pytest.param(["a hello", "u q"], NO_ASSISTANT_TURN, id="only an opening assistant turn"),
    ],
)
def test_chat_is_cut_at_every_answer(turns: list[str], expected: list[tuple[str, str]] | str) -> None:
    turns_of_row = chat(*turns)
    assert cut(turns_of_row) == expected
    assert cut(tuple(turns_of_row)) == expected
    renamed = {"system": "system", "user": "human", "assistant": "gpt", "tool": "tool", "developer": "system"}
    assert cut([{"from": renamed[t["role"]], "value": t["content"]} for t in turns_of_row], SHAREGPT) == expected


@pytest.mark.parametrize(
    ("turns", "status"),
    [
        pytest.param(None, NULL, id="no chat"),
        pytest.param("user: q", BAD_TURN, id="text instead of turns"),
        pytest.param(7, BAD_TURN, id="a number instead of turns"),
        pytest.param([None], BAD_TURN, id="a null turn"),
        pytest.param([{"role": "user"}], "no_content: user", id="a turn without content"),
        pytest.param([{"content": "q"}], "bad_turn: keys content", id="a turn without a role"),
        pytest.param(
            [*chat("u q", "a r"), {"role": "narrator", "content": "x"}], "unknown_role: narrator", id="unknown role"
        ),
        pytest.param([{"role": None, "content": "q"}], "bad_turn: keys content", id="null role"),
        pytest.param([*chat("u q"), {"role": "assistant", "content": None}], NULL, id="null content"),
        pytest.param([{"role": "user", "content": 7}], NOT_A_STRING, id="a number"),
        pytest.param([*chat("u q"), {"role": "assistant", "content": {"answer": "r"}}], NOT_A_STRING, id="an object"),
        pytest.param([{"role": "user", "content": [7]}], NOT_A_STRING, id="a list of numbers"),
        pytest.param([{"role": "user", "content": [{"type": "text", "text": None}]}], NULL, id="a part without text"),
        pytest.param(" ", NULL, id="a blank text"),
        pytest.param('[{"role": "user"', BAD_TURN, id="broken JSON"),
        pytest.param(
            [{"role": "\x1b[31m" + "n" * 90, "content": "x"}], f"unknown_role: ?[31m{'n' * 34}…", id="escapes"
        ),
        pytest.param({"role": "user", "content": "q"}, BAD_TURN, id="one turn that is no list"),
        pytest.param({"role": ["user", "assistant"], "content": ["q"]}, BAD_TURN, id="lists of unequal length"),
        pytest.param({"role": None, "content": None}, BAD_TURN, id="null lists"),
    ],
)
def test_chat_that_cannot_be_read_says_why(turns: Any, status: str) -> None:
    assert cut(turns) == status


@pytest.mark.parametrize("role", ["ASSISTANT", "Assistant", "gpt", "model", "bot", "ai", "chatbot", " gpt "])
def test_other_names_of_the_assistant(role: str) -> None:
    assert cut([*chat("u q"), {"role": role, "content": "r"}]) == [("q", "r")]


@pytest.mark.parametrize("role", ["human", " human", "Prompter"])
def test_other_names_of_the_user(role: str) -> None:
    assert cut([{"role": role, "content": "q"}, *chat("a r")]) == [("q", "r")]


def test_chat_as_a_dict_of_lists() -> None:
    assert cut({"role": ["system", "user", "assistant"], "content": ["rules", "q", "r"]}) == [("rules\nq", "r")]
    assert cut({"from": ["human", "gpt"], "value": ["q", "r"]}, SHAREGPT) == [("q", "r")]
    assert cut({"role": [], "content": []}) == NO_ASSISTANT_TURN


def test_chat_becomes_one_text_per_exchange() -> None:
    batch = {"messages": [chat("s rules", "u q", "a r", "u q2", "a "), chat("u q"), chat("u q", "a r")]}
    found = format_batch(batch, SCHEMAS["messages"], "clean-1")
    assert [([text.whole for text in texts], status) for texts, status in found] == [
        (["Instruction: rules q Response: r", "Instruction: rules q r q2 Response: "], EMPTY_RESPONSE),
        ([], NO_ASSISTANT_TURN),
        (["Instruction: q Response: r"], OK),
    ]


def test_keys_of_the_other_schema_and_tool_calls_are_read() -> None:
    mixed = [{"from": "human", "value": "q"}, {"role": "assistant", "content": "r"}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    tools = [*chat("u q"), call, {"role": "tool", "content": "42"}, {"role": "assistant", "content": "It is 42."}]
    found = format_batch({"messages": [mixed, tools]}, SCHEMAS["messages"], "clean-1")
    assert [[text.whole for text in texts] for texts, _ in found] == [
        ["Instruction: q Response: r"],
        ['Instruction: q {"id":"1"} 42 Response: It is 42.'],
    ]


# --- keys, forms and parts

QA = [("q", "r")]
TEXT_PARTS = [{"role": r, "content": [{"type": "text", "text": t}]} for r, t in (("user", "q"), ("assistant", "r"))]


@pytest.mark.parametrize(
    "turns",
    [
        pytest.param(["q", "r"], id="texts"),
        pytest.param([["q", "r"]], id="pairs"),
        pytest.param([{"input": "q", "output": "r"}], id="input and output"),
        pytest.param([{"human": "q", "assistant": "r"}], id="speakers as keys"),
        pytest.param([{"role": "prompter", "text": "q"}, {"from": "gpt", "content": "r"}], id="mixed keys"),
        pytest.param([{"role": "user", "value": "q", "from": None}, {"role": "model", "text": "r"}], id="null keys"),
        pytest.param(TEXT_PARTS, id="parts"),
        pytest.param([{"role": "user", "content": ["q"]}, *chat("a r")], id="parts that are strings"),
        pytest.param(np.array(chat("u q", "a r"), dtype=object), id="numpy"),
        pytest.param({"role": np.array(["user", "assistant"]), "content": np.array(["q", "r"])}, id="numpy columns"),
        pytest.param(json.dumps(chat("u q", "a r")), id="JSON text"),
        pytest.param(str(chat("u q", "a r")), id="text as Python writes it"),
        pytest.param([json.dumps(turn) for turn in chat("u q", "a r")], id="every turn as JSON text"),
        pytest.param("\n\nHuman: q\n\nAssistant: r", id="marked speakers"),
        pytest.param("### Human: q### Assistant: r", id="speakers as in Guanaco"),
        pytest.param("USER: q\n\n\nASSISTANT: r <|endoftext|>", id="speakers as in Glaive"),
        pytest.param(str(chat("u q", "a r")).replace("}, {", "}\n {"), id="text as NumPy writes it"),
        pytest.param(json.dumps(json.dumps(chat("u q", "a r"))), id="JSON text twice"),
        pytest.param([{"query": "q", "response": "r"}], id="query and response"),
        pytest.param([{"human": "q", "bot": "r"}], id="human and bot"),
        pytest.param(
            [{"role": "user", "parts": [{"text": "q"}]}, {"role": "model", "parts": [{"text": "r"}]}], id="Gemini"
        ),
    ],
)
def test_one_chat_in_many_forms(turns: Any) -> None:
    assert cut(turns) == QA


def test_a_numpy_format_gives_the_same() -> None:
    rows = Dataset.from_dict({"messages": [chat("s rules", "u q", "a r")], "instruction": ["q"], "output": ["r"]})
    for name in ("messages", "alpaca"):
        expected = read_rows(rows[:], SCHEMAS[name])
        assert read_rows(rows.with_format("numpy")[:], SCHEMAS[name]) == expected
        assert expected[0].status == OK


def test_parts_that_are_not_text_are_left_out_and_marked() -> None:
    for part in ({"type": "image_url", "image_url": {"url": "x"}}, {"type": "image", "text": None}, {"image": "x"}):
        turns = [{"role": "user", "content": [{"type": "text", "text": "q"}, part]}, *chat("a r")]
        [row] = read_rows({"messages": [turns]}, SCHEMAS["messages"])
        assert row == ([Exchange("q", "", "r")], OTHER_PARTS)
        assert is_scored(row.status)


# --- calls of tools

CALL = {"function": {"name": "weather", "arguments": '{"unit": "C", "city": "Bonn"}'}}
SHOWN = '{"name":"weather","arguments":{"city":"Bonn","unit":"C"}}'


def calling(**message: Any) -> dict[str, Any]:
    return {"role": "assistant", **message}


CALLS = [
    pytest.param(
        {"role": "model", "parts": [{"functionCall": {"name": "weather", "args": {"unit": "C", "city": "Bonn"}}}]},
        id="Gemini",
    ),
    pytest.param(calling(content=None, tool_calls=[CALL]), id="null"),
    pytest.param(calling(content="", tool_calls=[CALL]), id="empty"),
    pytest.param(calling(tool_calls=[CALL]), id="without content"),
    pytest.param(calling(content="", tool_calls=[CALL], function_call={"name": None}), id="filled in by Arrow"),
    pytest.param(calling(content="", tool_calls=json.dumps([CALL])), id="JSON text"),
    pytest.param(calling(content=None, function_call=CALL["function"]), id="function_call"),
    pytest.param({"role": "function_call", "content": json.dumps(CALL["function"])}, id="role function_call"),
    pytest.param({"from": "tool_call", "value": SHOWN}, id="role tool_call"),
    pytest.param(
        calling(content=[{"type": "tool_use", "name": "weather", "input": {"city": "Bonn", "unit": "C", "day": None}}]),
        id="part",
    ),
]


@pytest.mark.parametrize("message", CALLS)
def test_a_call_and_its_answer_are_context_of_the_answer(message: dict[str, Any]) -> None:
    asked = chat("u Weather?")
    assert cut([*asked, message, *chat("t 12", "a It is 12.")]) == [(f"Weather?\n{SHOWN}\n12", "It is 12.")]
    [last] = read_rows({"messages": [[*asked, message]]}, SCHEMAS["messages"])
    assert last == ([Exchange("Weather?", "", SHOWN)], TOOL_CALL)
    assert read_rows({"messages": [[*asked, message, *chat("t 12")]]}, SCHEMAS["messages"]) == [last]
    assert cut([message]) == NO_ASSISTANT_TURN  # nobody asked


@pytest.mark.parametrize(
    "role",
    [
        *("tool", "function", "observation", "ipython", "environment", "tool_response", "tool_result"),
        *("function_response", "Function Response", "tool-result"),
    ],
)
@pytest.mark.parametrize(("answer", "shown"), [("12", "12"), ({"b": 1, "a": None}, '{"b":1}'), (12, "12"), (None, "")])
def test_a_tool_may_answer_anything(role: str, answer: Any, shown: str) -> None:
    turns = [*chat("u q"), calling(tool_calls=[CALL]), {"role": role, "content": answer}, *chat("a r")]
    assert cut(turns) == [(f"q\n{SHOWN}\n{shown}", "r")]


def test_what_is_said_with_a_call_belongs_to_it() -> None:
    with_it = [*chat("u q"), calling(content="Let me look.", tool_calls=[CALL])]
    before = [*chat("u q", "a Let me look."), {"role": "function_call", "content": SHOWN}]
    for turns in (with_it, before):
        assert cut([*turns, *chat("t 12", "a r")]) == [(f"q\nLet me look.\n{SHOWN}\n12", "r")]
        assert cut(turns) == [("q", f"Let me look.\n{SHOWN}")]


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\n{'name': 'f'}\n</tool_call>\n",
        "I will look.\n<tool_call>{}</tool_call>\n<tool_call>{}</tool_call> ",
        '<functioncall> {"name": "f"} ',
        'Let me see. <functioncall> {"name": "f"}',
        '[TOOL_CALLS][{"name": "f"}]',
        "<|python_tag|>f(1)",
        "<function=f>{}</function>",
    ],
)
def test_a_call_that_is_written_into_the_text_is_a_call(text: str) -> None:
    turns = chat("u q", f"a {text}")
    assert cut([*turns, *chat("t 1", "a r")]) == [(f"q\n{text}\n1", "r")]
    assert read_rows({"messages": [turns]}, SCHEMAS["messages"]) == [([Exchange("q", "", text)], TOOL_CALL)]
    about = chat("u q", "a Write <tool_call>...</tool_call>, or <functioncall>, and no more.")
    assert cut(about) == [("q", about[1]["content"])]


# --- thoughts, weights


@pytest.mark.parametrize(
    "answer",
    [
        {"content": "<think>\nhm\n</think>\n\nr"},
        {"content": "hm\n</think>\n\nr"},
        {"content": "<thinking>hm</thinking> r"},
        {"content": "<|begin_of_thought|>hm<|end_of_thought|>r"},
        {"content": "<|begin_of_thought|>hm<|end_of_thought|>\n<|begin_of_solution|>\nr\n<|end_of_solution|>"},
        {"content": "<think>hm</think>\n<answer> r </answer>"},
        {"content": "hm</think><answer>r</answer>"},
        {"content": "r", "reasoning_content": "hm"},
        {"content": "r", "thinking": "hm"},
        {"content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "r"}]},
    ],
)
def test_a_thought_is_apart_from_the_answer(answer: dict[str, Any]) -> None:
    turns = [*chat("u q"), calling(**answer)]
    assert cut(turns) == QA
    assert exchanges_of({"messages": [turns]}, SCHEMAS["messages"], True) == [[Exchange("q", "", "hm\nr")]]
    if isinstance(answer["content"], str) and len(answer) == 1:
        alpaca = {"instruction": ["q"], "output": [answer["content"]]}
        assert exchanges_of(alpaca, SCHEMAS["alpaca"]) == [[Exchange("q", "", "r")]]
        assert exchanges_of(alpaca, SCHEMAS["alpaca"], True) == [[Exchange("q", "", "hm\nr")]]


def test_a_thought_without_an_answer_is_an_empty_answer() -> None:
    for answer in ({"content": "<think>hm"}, {"content": None, "reasoning": "hm"}):
        [row] = read_rows({"messages": [[*chat("u q"), calling(**answer)]]}, SCHEMAS["messages"])
        assert row == ([Exchange("q", "", "")], EMPTY_RESPONSE)


@pytest.mark.parametrize(
    "answer", ["Write `</think>` at the end.", "<answer>1</answer>", "The tag <think> opens it.", "1 </thinking> 2"]
)
def test_an_answer_about_thoughts_is_an_answer(answer: str) -> None:
    assert cut(chat("u q", f"a {answer}")) == [("q", answer)]


@pytest.mark.parametrize(
    "mark",
    [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": False}, {"trainable": False}, {"loss_mask": 0}],
)
def test_a_turn_of_weight_0_is_context(mark: dict[str, Any]) -> None:
    unscored = calling(content="r", **mark)
    assert cut([*chat("u q"), unscored, *chat("u q2", "a r2")]) == [("q\nr\nq2", "r2")]
    assert cut([*chat("u q"), unscored]) == NO_ASSISTANT_TURN
    scored = calling(content="r", **{key: 1 for key in mark})
    assert cut([*chat("u q"), scored]) == cut([*chat("u q"), calling(content="r", weight=None)]) == QA


# --- long chats


def test_an_exchange_reads_the_nearest_earlier_turns_that_fit() -> None:
    words = ["s rules", "u a", "a " + "b" * 600, "u " + "c" * 300, "a " + "d" * 600, "u e", "a f", "u g", "a h"]
    found = cut(chat(*words))
    assert found[1][0] == "\n".join(["rules", "a", "b" * 600, "c" * 300])
    assert found[2][0] == "\n".join(["rules", "c" * 300, "d" * 600, "e"])
    assert found[3][0] == "\n".join(["rules", "c" * 300, "d" * 600, "e", "f", "g"])


def test_earlier_turns_never_push_an_answer_out_of_sight() -> None:
    long = "r" * (READ_CHARACTERS - 20)
    assert cut(chat("u q", "a " + "b" * 50, "u q2", f"a {long}"))[1] == ("q2", long)


def test_the_time_is_linear_in_the_turns() -> None:
    def seconds(count: int) -> float:
        turns = chat("u q", *["a r"] * count, *["s note", "u q", "t x", "a "] * count)
        start = time.process_time()
        [row] = read_rows({"messages": [turns]}, SCHEMAS["messages"])
        assert max(len(e.instruction) for e in row.exchanges) < CONTEXT_CHARACTERS + 100
        return time.process_time() - start

    seconds(100)
    assert seconds(16_000) < 40 * seconds(1_000) + 0.5


def test_a_pair_loses_nothing() -> None:
    assert cut([{"instruction": "q", "input": "1", "output": "r"}]) == [("q\n1", "r")]
    pairs = [{"input": "q", "output": "r", "output_with_loss": False}, {"input": "q2", "output": "r2"}]
    assert cut(pairs) == [("q\nr\nq2", "r2")]


# --- what a stranger may send


def test_a_system_prompt_is_not_repeated_without_end() -> None:
    exchanges = chat(*["u q", "a r"] * 2_000)
    assert cut([*chat("s " + "x" * 8_000), *exchanges]) != TOO_LONG
    assert cut([*chat("s " + "x" * 20_000), *exchanges]) == TOO_LONG
    assert cut([*chat(*(f"s {i}" for i in range(20_000))), *exchanges]) == TOO_LONG
    assert cut([*chat("s " + "x" * (1 << 25)), *chat("u q", "a r")]) != TOO_LONG  # long, but there is no repetition


PARTS = [
    "[",
    "{",
    "(",
    "]",
    "}",
    "-",
    "not ",
    "1+",
    "'a'",
    '"role": ',
    "'",
    ", ",
    "\n\n",
    "Human:",
    " Assistant:",
    "\\",
    "### ",
]


@settings(max_examples=80, deadline=None)
@given(parts=st.lists(st.tuples(st.sampled_from(PARTS), st.sampled_from([1, 2, 500, 20_000])), max_size=5))
def test_any_text_is_a_chat_or_has_a_status(parts: list[tuple[str, int]]) -> None:
    turns = read_turns("".join(part * times for part, times in parts))
    assert isinstance(turns, str) or all(isinstance(turn.text, str) for turn in turns)
