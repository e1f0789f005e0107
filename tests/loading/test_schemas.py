"""schemas.py and templates.py: which columns are the text, what the model reads, and what `clean` undoes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import example, given, settings
from hypothesis import strategies as st

from car_datasets import load_instructions
from car_datasets.loading import schemas, templates
from car_datasets.loading.chats import EMPTY_RESPONSE, NOT_A_STRING, NULL, OK, ROLES
from car_datasets.loading.schemas import (
    SCHEMAS,
    Schema,
    conversations_of,
    exchanges_of,
    find_schema,
    format_batch,
    schema_names,
)
from car_datasets.loading.templates import Exchange, clean, join_surrogates, render, render_call, split_thought
from tests.conftest import ROOT

# --- schemas


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema_is_recognised_from_its_columns(name: str) -> None:
    schema = SCHEMAS[name]
    seen = ["id", *schema.read_columns, *([schema.tools] if schema.tools else []), "source"]
    assert find_schema(seen) == schema
    assert find_schema(iter(seen)) == schema
    assert find_schema(seen, name) == schema


def test_alpaca_without_an_input_column() -> None:
    expected = Schema("alpaca", "instruction", None, "output")
    assert find_schema(["output", "instruction"]) == expected
    assert find_schema(["output", "instruction"], "alpaca") == expected


def test_renamed_columns_alone_make_a_schema() -> None:
    found = find_schema(["task", "answer", "context", "output"], columns={"instruction": "task", "response": "answer"})
    assert (found.instruction, found.input, found.response, found.turns) == ("task", None, "answer", None)
    chat = find_schema(["log"], columns=(("turns", "log"), ("role", "who"), ("content", "text")))
    assert (chat.turns, chat.role, chat.content) == ("log", "who", "text")


def test_renamed_columns_change_a_named_schema() -> None:
    found = find_schema(["instruction", "context", "output"], "alpaca", {"input": "context"})
    assert (found.instruction, found.input, found.response) == ("instruction", "context", "output")
    assert find_schema(["instruction", "input", "text"], "alpaca", {"response": "text"}).input == "input"
    assert find_schema(["dialog"], "conversations", {"turns": "dialog"}).role == "from"


def test_renamed_columns_decide_between_schemas() -> None:
    seen = ["prompt", "completion", "response"]
    assert find_schema(seen, columns={"instruction": "prompt", "response": "response"}).response == "response"
    assert find_schema(seen, "prompt/completion").response == "completion"


@pytest.mark.parametrize(
    ("seen", "options", "message"),
    [
        (["text", "label"], {}, r"No known schema fits the columns \['text', 'label'\].*--columns instruction="),
        ([], {}, r"No known schema fits the columns \[\]"),
        (["instruction", "input"], {}, "No known schema fits"),
        (["prompt", "completion", "response"], {}, r"fit several schemas: \['prompt/completion', 'prompt/response'\]"),
        (["messages", "conversations"], {}, "fit several schemas.*--schema messages"),
        (["instruction"], {"schema": "vicuna"}, "schema='vicuna' is not known; choose one of .*'messages'.*auto"),
        (["task"], {"schema": "alpaca"}, r"Columns \['instruction', 'output'\] are not in the dataset.*\['task'\]"),
        (["a"], {"columns": {"quest": "a"}}, r"columns has the keys \['quest'\]; known are instruction.*question"),
        (["a"], {"columns": {"question": "a"}}, "must name instruction and response, or turns"),
        (
            ["a"],
            {"columns": {"prompt": "a", "question": "b"}},
            r"the keys \['prompt', 'question'\], which mean the same",
        ),
        (["instruction", "output"], {"columns": {"system": "rules"}}, r"Columns \['rules'\] are not in the dataset"),
        (["a"], {"columns": {"instruction": "a"}}, "must name instruction and response, or turns"),
        (["a", "b"], {"columns": {"instruction": "a", "response": "c"}}, r"Columns \['c'\] are not in the dataset"),
        (["instruction", "output"], {"schema": "alpaca", "columns": {"input": "hint"}}, r"Columns \['hint'\] are not"),
    ],
)
def test_schema_that_does_not_fit_is_refused(seen: list[str], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_schema(seen, **options)


def test_a_schema_is_added_in_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCHEMAS, "exam", Schema("exam", "task", "hint", "solution"))
    monkeypatch.setitem(SCHEMAS, "lesson", Schema("lesson", turns="lesson", role="who", content="said"))
    monkeypatch.setitem(ROLES, "pupil", "user")
    monkeypatch.setitem(ROLES, "teacher", "assistant")
    assert schema_names() == ("auto", *SCHEMAS) and {"exam", "lesson"} < set(schema_names())

    (tmp_path / "exam.csv").write_text("task,hint,solution\n6 x 7?,,042\nNA,None,1.50\n", encoding="utf-8")
    exam = load_instructions(tmp_path / "exam.csv")
    assert exam.to_dict() == {
        "task": ["6 x 7?", "NA"],
        "hint": ["", "None"],
        "solution": ["042", "1.50"],  # text, like the columns of every schema
        "source_index": [0, 1],
    }
    assert exam.to_dict() == load_instructions(tmp_path / "exam.csv", schema="exam").to_dict()
    texts = [row.texts[0].whole for row in format_batch(exam[:], find_schema(exam.column_names), "clean-1")]
    assert texts[0] == "Instruction: 6 x 7? Response: 042"
    with pytest.raises(ValueError, match=r"1 of 2 rows cannot be scored: 1 null \(rows 1\)"):
        load_instructions(Dataset.from_dict({"task": ["a", "b"], "solution": ["c", None]}))

    turns = [{"who": "Pupil", "said": "6 x 7?"}, {"who": "Teacher", "said": "42"}]
    lesson = load_instructions(Dataset.from_dict({"lesson": [turns]}))
    [row] = exchanges_of(lesson[:], find_schema(lesson.column_names))
    assert row == [Exchange("6 x 7?", "", "42")]


def test_every_schema_bears_its_key_and_is_described_in_its_page() -> None:
    assert [schema.name for schema in SCHEMAS.values()] == list(SCHEMAS)
    page = (ROOT / "docs" / "reference" / "schemas.md").read_text(encoding="utf-8")
    assert [name for name in SCHEMAS if f"`{name}`" not in page] == []


def test_required_columns_leave_the_input_out() -> None:
    assert SCHEMAS["alpaca"].required == ("instruction", "output")
    assert SCHEMAS["messages"].required == ("messages",)


# --- templates


def test_paper_template_byte_for_byte() -> None:
    assert (
        render(Exchange("Add  them.", "1\n2", ' "3" '), "paper").whole
        == 'Instruction: Add  them. Input: 1\n2 Response:  "3" '
    )
    assert render(Exchange("Hi", "", "Yes."), "paper").whole == "Instruction: Hi Input:  Response: Yes."


def test_clean_template_byte_for_byte() -> None:
    assert (
        render(Exchange("Add\tthem. ", "1\\n2", "“3”"), "clean-1").whole
        == 'Instruction: Add them. Input: 1 2 Response: "3"'
    )
    assert render(Exchange("Hi", "", "Yes.")).whole == "Instruction: Hi Response: Yes."
    assert render(Exchange("Hi", " \\n ", ""), "clean-1").whole == "Instruction: Hi Response: "


def test_unknown_template_is_refused() -> None:
    with pytest.raises(ValueError, match=r"template='clean-0' is not known; choose one of .*'clean-1', 'paper'"):
        render(Exchange("a", "", "b"), "clean-0")


# --- rows of one turn


def test_rows_become_texts_and_a_status() -> None:
    batch = {"instruction": ["a", "b", "c"], "input": ["x", None, ""], "output": ["1", "2", " \n"]}
    found = format_batch(batch, SCHEMAS["alpaca"], "paper")
    assert [([text.whole for text in texts], status) for texts, status in found] == [
        (["Instruction: a Input: x Response: 1"], OK),
        (["Instruction: b Input:  Response: 2"], OK),
        (["Instruction: c Input:  Response:  \n"], EMPTY_RESPONSE),
    ]


@pytest.mark.parametrize(
    ("row", "status"),
    [
        ((None, "", "b"), NULL),
        (("a", "", None), NULL),
        ((1, "", "b"), NOT_A_STRING),
        (("a", 2, "b"), NOT_A_STRING),
        (("a", "", ["b"]), NOT_A_STRING),
        (("a", "", float("nan")), NOT_A_STRING),
    ],
)
def test_row_that_is_no_text_has_no_texts(row: tuple[Any, Any, Any], status: str) -> None:
    batch = dict(zip(("instruction", "input", "output"), ([value] for value in row), strict=True))
    assert [tuple(r) for r in format_batch(batch, SCHEMAS["alpaca"], "clean-1")] == [([], status)]


# --- clean

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
# Arbitrary text hardly ever holds an escape; this holds little else.
ESCAPES = st.lists(
    st.sampled_from(["\\", '"', "'", "‘", "”", "/", "u", "n", "b", "d83d", "2018", "0022", " ", "é", "😀", "\n"])
)
TEXTS = ANY_TEXT | ESCAPES.map("".join) | st.lists(ANY_TEXT | ESCAPES.map("".join), max_size=3).map("".join)
SEARCH = settings(deadline=None, derandomize=True, max_examples=300)


@pytest.mark.parametrize("ascii_only", [True, False])
@SEARCH
@given(TEXTS)
@example("C:\\new\\table")
@example("\\‘quoted\\’")
@example("“😀”\n\\\\u2019 \u2028 \x85")
def test_escapes_make_no_difference_however_often_the_text_was_escaped(ascii_only: bool, text: str) -> None:
    once = json.dumps(text, ensure_ascii=ascii_only)[1:-1]
    twice = json.dumps(once, ensure_ascii=ascii_only)[1:-1]
    assert clean(once) == clean(text)
    assert clean(twice) == clean(text)


@SEARCH
@given(TEXTS)
@example("\\‘")
def test_clean_text_stays_as_it_is(text: str) -> None:
    once = clean(text)
    assert clean(once) == once


@SEARCH
@given(st.text())
def test_cleaned_text_can_be_encoded_and_holds_no_loose_white_space(text: str) -> None:
    cleaned = clean(text)
    assert cleaned.encode("utf-8").decode("utf-8") == cleaned
    assert cleaned == " ".join(cleaned.split())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        (" \t\n ", ""),
        (" a \u00a0\u2003b\r\n\x0bc ", "a b c"),
        ("a\\nb\\tc\\r\\nd", "a b c d"),
        ("‘a’ “b”", "'a' \"b\""),
        (r"it\u2019s \"fine\"", 'it\'s "fine"'),
        (r"https:\/\/x.org", "https://x.org"),
        (r"caf\u00e9 \u00E9", "café é"),
        (r"smile \ud83d\ude00", "smile 😀"),
        ("smile \ud83d\ude00", "smile 😀"),
        (r"\\\\n", ""),
        (r"\q \x41 \u12 \ ", r"\q \x41 \u12 \ ".strip()),
        (r"\d+\.\d", r"\d+\.\d"),
        ("a\ud83db", "a\ufffdb"),
        (r"a\ude00b", "a\ufffdb"),
        ("\ude00\ud83d", "\ufffd\ufffd"),
    ],
)
def test_clean_examples(text: str, expected: str) -> None:
    assert clean(text) == expected


# --- columns that are read


@pytest.mark.parametrize(
    ("seen", "options", "unread", "call"),
    [
        (
            ["question", "answer", "context"],
            {},
            "['context']",
            "columns={'input': 'context'} (--columns input=context)",
        ),
        (["messages", "system", "history"], {}, "['history']", "--columns history=history"),
        (
            ["task", "reply", "input"],
            {"columns": {"instruction": "task", "response": "reply"}},
            "['input']",
            "input=input",
        ),
        (["instruction", "input", "output", "system", "history", "tools"], {}, None, None),
        (["messages", "system_prompt"], {}, None, None),
        (["messages", "system_message"], {}, "['system_message']", "--columns system=system_message"),
        (["instruction", "output", "chat_history"], {}, "['chat_history']", "--columns history=chat_history"),
    ],
)
def test_a_column_that_is_not_read_is_named_once(
    seen: list[str], options: dict[str, Any], unread: str | None, call: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    schemas._warn_unread.cache_clear()
    found = find_schema(seen, **options)
    find_schema(seen, **options)
    assert len(caplog.records) == (unread is not None)
    if unread is not None and call is not None:
        assert unread in caplog.text and call in caplog.text
        role, column = call.rstrip(")").split()[-1].split("=")
        mended = find_schema(seen, columns={**options.get("columns", {}), role: column})
        assert getattr(mended, role) == column and len(caplog.records) == 1
        assert set(found.read_columns) < set(mended.read_columns)


@pytest.mark.parametrize(
    ("columns", "role", "column"),
    [
        ({"output": "reply"}, "response", "reply"),
        ({"context": "facts"}, "input", "facts"),
        ({"system": "rules"}, "system", "rules"),
        ({"history": "before"}, "history", "before"),
        ({"tools": "functions"}, "tools", "functions"),
    ],
)
def test_columns_may_be_named_as_the_schemas_name_them(columns: dict[str, str], role: str, column: str) -> None:
    seen = ["instruction", "input", "output", "reply", "facts", "rules", "before", "functions"]
    for schema in ("auto", "alpaca"):
        found = find_schema(seen, schema, columns)
        assert (found.name, found.instruction, getattr(found, role)) == ("alpaca", "instruction", column)


@pytest.mark.parametrize(
    ("seen", "name"),
    [
        (["instruction", "context", "response"], "dolly"),
        (["system_prompt", "question", "response"], "openorca"),
        (["prompt", "prompt_id", "chosen", "rejected", "messages", "score_chosen"], "messages"),
        (["prompt", "chosen", "rejected", "question"], "prompt/chosen"),
        (["instruction", "output", "chosen", "rejected"], "alpaca"),
        (["question", "answer", "response"], "question/answer"),
        (["messages", "chosen", "rejected"], "messages/chosen"),
        (["conversation", "chosen", "rejected"], "conversation/chosen"),
    ],
)
def test_the_more_specific_schema_wins_and_nothing_is_recognised_anew(seen: list[str], name: str) -> None:
    assert find_schema(seen).name == name
    assert find_schema(find_schema(seen).read_columns).name == name


def test_the_error_proposes_the_columns_that_are_there() -> None:
    with pytest.raises(
        ValueError, match=r"columns=\{'instruction': 'instruction', 'input': 'context', 'response': \.\.\.\}"
    ):
        find_schema(["instruction", "context", "reply"])
    with pytest.raises(ValueError, match=r"\(--columns instruction=input,response=output\)"):
        find_schema(["id", "input", "output"])


def test_rows_of_one_turn_are_read_as_before() -> None:
    """Hold that a system prompt or a history which is null or empty changes nothing, to the byte."""
    rows = {"instruction": [" a\n", "b"], "input": ["", " x "], "output": ["\t1 ", '[{"role": "user"}]']}
    expected = [[Exchange(*row)] for row in zip(*rows.values(), strict=True)]
    for more in ({}, {"system": [None, ""], "history": [[], None]}):
        assert exchanges_of({**rows, **more}, SCHEMAS["alpaca"]) == expected
    assert [row.texts[0].whole for row in format_batch(rows, SCHEMAS["alpaca"], "paper")] == [
        "Instruction:  a\n Input:  Response: \t1 ",
        'Instruction: b Input:  x  Response: [{"role": "user"}]',
    ]


PARTS = [{"type": "text", "text": "q"}]


@pytest.mark.parametrize(
    ("row", "exchanges"),
    [
        ({"instruction": PARTS, "output": [{"type": "text", "text": "r"}]}, [("q", "r")]),
        ({"prompt": PARTS, "response": "r", "system": [{"type": "text", "text": "s"}]}, [("s\nq", "r")]),
        ({"prompt": "q", "response": "r", "system": {"role": "system", "content": "s"}}, [("s\nq", "r")]),
        ({"prompt": "q", "chosen": "\n\nHuman: q\n\nAssistant: r", "rejected": ""}, [("q", "r")]),
        ({"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": "r", "rejected": ""}, [("q", "r")]),
        (
            {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": "\n\nHuman: q\n\nAssistant: r", "rejected": ""},
            [("q", "r")],
        ),
        # A dialogue that was asked for is an answer like any other.
        ({"prompt": "p", "response": "\n\nHuman: q\n\nAssistant: r"}, [("p", "\n\nHuman: q\n\nAssistant: r")]),
        ({"messages": ["q", "r", "q2"], "chosen": ["r2"], "rejected": []}, "not_a_string"),
        (
            {"messages": [["q", "r"]], "chosen": {"role": "assistant", "content": "r"}, "rejected": None},
            [("q", "r")],
        ),
    ],
)
def test_what_a_prompt_and_an_answer_may_be(row: dict[str, Any], exchanges: list[tuple[str, str]] | str) -> None:
    [found] = exchanges_of({key: [value] for key, value in row.items()}, find_schema(row))
    assert (found if isinstance(found, str) else [(e.instruction, e.response) for e in found]) == exchanges


def test_an_error_about_turns_names_their_keys() -> None:
    rows = Dataset.from_list([{"messages": [{"speaker": "user", "said": "q"}, {"speaker": "bot", "said": "r"}]}])
    with pytest.raises(
        ValueError, match=r"bad_turn: keys (said, speaker|speaker, said) .*--columns role=\.\.\.,content"
    ):
        load_instructions(rows)
    assert exchanges_of(rows[:], find_schema(rows.column_names, "auto", {"role": "speaker", "content": "said"})) == [
        [Exchange("q", "", "r")]
    ]


def clean_by_passes(text: str) -> str:
    """`clean` as it is defined: passes over all of the text until nothing changes."""
    quotes = str.maketrans("‘’“”", "''\"\"")
    text = text.translate(quotes)
    while (decoded := templates._ESCAPE.sub(templates._decode, text).translate(quotes)) != text:
        text = decoded
    return " ".join(join_surrogates(text).split())


ESCAPES = [
    "\\",
    "u005c",
    "\\u2019",
    "’",
    "u",
    "00",
    "5c",
    "n",
    '"',
    "'",
    "0",
    "6e",
    "\\u0075",
    "\\u0030",
    "\ud83d",
    "x",
    " ",
]


@settings(max_examples=300, deadline=None)
@given(
    text=st.lists(st.sampled_from(ESCAPES), max_size=40).map("".join) | st.text(max_size=20), passes=st.integers(0, 2)
)
@example(text="\\" + "u005c" * 20 + "n", passes=0)
def test_clean_decodes_as_passes_over_all_of_the_text_would(text: str, passes: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(templates, "_PASSES", passes)  # after which only the signs around the last changes are read
        assert clean(text) == clean_by_passes(text)


@pytest.mark.parametrize("text", ["\\" + "u005c" * 60_000 + "n", ("\\" + "u005c" * 50 + "n") * 1_000, "\\" * 300_000])
def test_cleaning_a_chain_of_escapes_is_linear(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0

    class Counted:
        def sub(self, replace: Any, text: str) -> str:
            nonlocal read
            read += len(text)
            return escape.sub(replace, text)

        def match(self, text: str) -> Any:
            nonlocal read
            read += len(text)
            return escape.match(text)

    escape = templates._ESCAPE
    monkeypatch.setattr(templates, "_ESCAPE", Counted())
    clean(text)
    assert read < 50 * len(text)  # passes over all of the first one would read 30,000 times as much


MARKS = [
    "<tool_call>",
    "<think>",
    "</think>",
    "<thinking>",
    "</thinking>",
    "[THINK]",
    "<|begin_of_thought|>",
    "[",
    "{",
    '"',
    "]",
    "}",
    " ",
    "a",
]


@settings(max_examples=50, deadline=None)
@given(parts=st.lists(st.tuples(st.sampled_from(MARKS), st.sampled_from([1, 2, 3_000])), max_size=6))
def test_any_answer_is_split_and_any_call_is_written(parts: list[tuple[str, int]]) -> None:
    text = "".join(mark * times for mark, times in parts)
    thought, answer = split_thought(text)
    assert len(thought) + len(answer) <= len(text)
    assert isinstance(templates.is_written_call(text), bool)
    assert render_call(templates.parse_json(text), text) is not None
    assert render_call({"name": "f", "arguments": text}, text).startswith('{"name":"f"')


@pytest.mark.parametrize("levels", [201, 350, 700, 100_000])
def test_arguments_that_are_nested_deeply_stay_text(levels: int) -> None:
    text = "[" * levels + "]" * levels
    assert render_call({"name": "f", "arguments": text}, text) == f'{{"name":"f","arguments":"{text}"}}'


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"instruction": "Sum it.", "input": "1, 2", "output": "3", "system": "Be brief."},
            [("system", "Be brief."), ("user", "Sum it.\n\n1, 2"), ("assistant", "3")],
        ),
        ({"instruction": "Sum it.", "input": None, "output": "3"}, [("user", "Sum it."), ("assistant", "3")]),
        ({"instruction": None, "input": "", "output": "3"}, "null"),
        (
            {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Ho"}]},
            [("user", "Hi"), ("assistant", "Ho")],
        ),
        (
            {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}], "system": "Go."},
            [("system", "Go."), ("user", "Hi"), ("assistant", "Ho")],
        ),
        ({"messages": [{"role": "narrator", "content": "Hi"}]}, "unknown_role: narrator"),
    ],
)
def test_a_row_is_read_as_the_turns_of_a_conversation(row: dict[str, Any], said: Any) -> None:
    [found] = conversations_of({key: [value] for key, value in row.items()}, find_schema(row))
    assert (found if isinstance(found, str) else [(turn.kind, turn.text) for turn in found]) == said
