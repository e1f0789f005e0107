"""Twenty shapes of public datasets, five rows each, and what is scored of every row.

The rows are made up; only the columns, keys and roles are those of the datasets. docs/reference/schemas.md describes the
same in words.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from datasets import Dataset

from car_datasets import QualityScorer, load_instructions
from car_datasets.loading.chats import is_scored
from car_datasets.loading.schemas import find_schema, read_rows
from car_datasets.loading.templates import Exchange, render


class Shape(NamedTuple):
    """A shape of datasets.

    Args:
        schema (`str`): the schema that is recognised.
        rows (`list[dict]`): five rows.
        scored (`list`): of every row its exchanges, as (instruction, input, response), and its status.
    """

    schema: str
    rows: list[dict[str, Any]]
    scored: list[tuple[list[tuple[str, str, str]], str]]


def ok(*exchanges: tuple[str, str, str]) -> tuple[list[tuple[str, str, str]], str]:
    return list(exchanges), "ok"


def marked(status: str, *exchanges: tuple[str, str, str]) -> tuple[list[tuple[str, str, str]], str]:
    return list(exchanges), status


def m(role: str, content: Any, **others: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **others}


def f(who: str, value: Any, **others: Any) -> dict[str, Any]:
    return {"from": who, "value": value, **others}


CALL = [{"id": "1", "type": "function", "function": {"name": "clock", "arguments": '{"zone": "CET"}'}}]
SHOWN = '{"name":"clock","arguments":{"zone":"CET"}}'

SHAPES = {
    "Alpaca": Shape(
        "alpaca",
        [
            {"instruction": "Add the numbers.", "input": "2, 3", "output": "5"},
            {"instruction": "Name a river.", "input": "", "output": "The Oder."},
            {"instruction": "Grüße auf Japanisch?", "input": None, "output": "こんにちは"},
            {"instruction": "Say nothing.", "input": "", "output": " "},
            {"instruction": "Name a lake.", "input": "", "output": None},
        ],
        [
            ok(("Add the numbers.", "2, 3", "5")),
            ok(("Name a river.", "", "The Oder.")),
            ok(("Grüße auf Japanisch?", "", "こんにちは")),
            marked("empty_response", ("Say nothing.", "", " ")),
            marked("null"),
        ],
    ),
    "LLaMA-Factory's alpaca": Shape(
        "alpaca",
        [
            {
                "instruction": "And a lake?",
                "input": "",
                "output": "Garda.",
                "system": "Be brief.",
                "history": [["A river?", "Po."]],
            },
            {"instruction": "A river?", "input": "in Italy", "output": "Po.", "system": "", "history": []},
            {"instruction": "A river?", "input": "", "output": "Po.", "system": "Be brief.", "history": None},
            {
                "instruction": "And?",
                "input": "x",
                "output": "Y.",
                "system": None,
                "history": [["A?", "B."], ["C?", "D."]],
            },
            {"instruction": "And?", "input": "", "output": "Y.", "system": None, "history": [["A?", None]]},
        ],
        [
            ok(("Be brief.\nA river?", "", "Po."), ("Be brief.\nA river?\nPo.\nAnd a lake?", "", "Garda.")),
            ok(("A river?", "in Italy", "Po.")),
            ok(("Be brief.\nA river?", "", "Po.")),
            ok(("A?", "", "B."), ("A?\nB.\nC?", "", "D."), ("A?\nB.\nC?\nD.\nAnd?", "x", "Y.")),
            marked("null"),
        ],
    ),
    "Dolly": Shape(
        "dolly",
        [
            {
                "instruction": "When was it built?",
                "context": "The mill dates from 1840.",
                "response": "In 1840.",
                "category": "qa",
            },
            {"instruction": "Name a colour.", "context": "", "response": "Red.", "category": "open"},
            {"instruction": "Name a colour.", "context": None, "response": "Blue.", "category": "open"},
            {"instruction": "Name a colour.", "context": "", "response": "", "category": "open"},
            {"instruction": None, "context": "", "response": "Red.", "category": "open"},
        ],
        [
            ok(("When was it built?", "The mill dates from 1840.", "In 1840.")),
            ok(("Name a colour.", "", "Red.")),
            ok(("Name a colour.", "", "Blue.")),
            marked("empty_response", ("Name a colour.", "", "")),
            marked("null"),
        ],
    ),
    "instruction, input, response": Shape(
        "instruction/response",
        [
            {"instruction": "Sum.", "input": "1 2", "response": "3"},
            {"instruction": "Sum.", "input": "", "response": "<think>Nothing to add.</think>0"},
            {"instruction": "Sum.", "input": None, "response": "0"},
            {"instruction": "Sum.", "input": "1", "response": ""},
            {"instruction": "Sum.", "input": "1", "response": None},
        ],
        [
            ok(("Sum.", "1 2", "3")),
            ok(("Sum.", "", "0")),
            ok(("Sum.", "", "0")),
            marked("empty_response", ("Sum.", "1", "")),
            marked("null"),
        ],
    ),
    "OpenOrca": Shape(
        "openorca",
        [
            {"id": "niv.1", "system_prompt": "You explain.", "question": "Why rain?", "response": "Clouds cool."},
            {"id": "niv.2", "system_prompt": "", "question": "Why rain?", "response": "Clouds cool."},
            {"id": "cot.3", "system_prompt": None, "question": "2 + 2?", "response": "4"},
            {"id": "t0.4", "system_prompt": "You count.", "question": "2 + 2?", "response": ""},
            {"id": "t0.5", "system_prompt": "You count.", "question": None, "response": "4"},
        ],
        [
            ok(("You explain.\nWhy rain?", "", "Clouds cool.")),
            ok(("Why rain?", "", "Clouds cool.")),
            ok(("2 + 2?", "", "4")),
            marked("empty_response", ("You count.\n2 + 2?", "", "")),
            marked("null"),
        ],
    ),
    "MetaMathQA": Shape(
        "query/response",
        [
            {"type": "GSM", "query": f"What is {n} + 1?", "original_question": "?", "response": answer}
            for n, answer in ((1, "2"), (2, "The answer is: 3"), (3, ""), (4, None), (5, "6 ≥ 5"))
        ],
        [
            ok(("What is 1 + 1?", "", "2")),
            ok(("What is 2 + 1?", "", "The answer is: 3")),
            marked("empty_response", ("What is 3 + 1?", "", "")),
            marked("null"),
            ok(("What is 5 + 1?", "", "6 ≥ 5")),
        ],
    ),
    "prompt and completion": Shape(
        "prompt/completion",
        [
            {"prompt": "The sky is", "completion": " blue."},
            {"prompt": "[1, 2]", "completion": "[3]"},
            {"prompt": "", "completion": "Hello."},
            {"prompt": "Write JSON.", "completion": '[{"role": "user", "content": "hi"}]'},
            {"prompt": "Hm?", "completion": ""},
        ],
        [
            ok(("The sky is", "", " blue.")),
            ok(("[1, 2]", "", "[3]")),
            ok(("", "", "Hello.")),
            ok(("Write JSON.", "", '[{"role": "user", "content": "hi"}]')),
            marked("empty_response", ("Hm?", "", "")),
        ],
    ),
    "TRL's conversational prompt and completion": Shape(
        "prompt/completion",
        [
            {"prompt": [m("user", "A fruit?")], "completion": [m("assistant", "Plum.")]},
            {"prompt": [m("system", "Be brief."), m("user", "A fruit?")], "completion": [m("assistant", "Plum.")]},
            {"prompt": [m("user", "A?"), m("assistant", "B."), m("user", "C?")], "completion": [m("assistant", "D.")]},
            {"prompt": [m("user", "A fruit?")], "completion": [m("assistant", "<think>Plum?</think>Plum.")]},
            {"prompt": [m("user", "A fruit?")], "completion": []},
        ],
        [
            ok(("A fruit?", "", "Plum.")),
            ok(("Be brief.\nA fruit?", "", "Plum.")),
            ok(("A?", "", "B."), ("A?\nB.\nC?", "", "D.")),
            ok(("A fruit?", "", "Plum.")),
            marked("no_assistant_turn"),
        ],
    ),
    "question and answer": Shape(
        "question/answer",
        [
            {"question": "2 + 2?", "answer": "4"},
            {"question": "2 + 2?", "answer": "2 + 2 = 4\n#### 4"},
            {"question": "Où est Lyon ?", "answer": "En France."},
            {"question": "2 + 2?", "answer": "\n"},
            {"question": "2 + 2?", "answer": None},
        ],
        [
            ok(("2 + 2?", "", "4")),
            ok(("2 + 2?", "", "2 + 2 = 4\n#### 4")),
            ok(("Où est Lyon ?", "", "En France.")),
            marked("empty_response", ("2 + 2?", "", "\n")),
            marked("null"),
        ],
    ),
    "OpenAI's messages with tools": Shape(
        "messages",
        [
            {
                "messages": [
                    m("user", "Time?"),
                    m("assistant", None, tool_calls=CALL),
                    m("tool", "9:00"),
                    m("assistant", "Nine."),
                ]
            },
            {"messages": [m("user", "Time?"), m("assistant", "", tool_calls=CALL)]},
            {
                "messages": [
                    m("developer", "Be brief."),
                    m("user", "Hi"),
                    m("assistant", "Hello."),
                    m("user", "Time?"),
                    m("assistant", "Nine."),
                ]
            },
            {"messages": [m("user", "Hi"), m("narrator", "He waves."), m("assistant", "Hello.")]},
            {"messages": [m("user", "Hi"), m("assistant", "")]},
        ],
        [
            ok((f"Time?\n{SHOWN}\n9:00", "", "Nine.")),
            marked("tool_call", ("Time?", "", SHOWN)),
            ok(("Be brief.\nHi", "", "Hello."), ("Be brief.\nHi\nHello.\nTime?", "", "Nine.")),
            marked("unknown_role: narrator"),
            marked("empty_response", ("Hi", "", "")),
        ],
    ),
    "content parts": Shape(
        "messages",
        [
            {
                "messages": [
                    m("user", [{"type": "text", "text": "A fruit?"}]),
                    m("assistant", [{"type": "text", "text": "Plum."}]),
                ]
            },
            {
                "messages": [
                    m("user", [{"type": "text", "text": "What is it?"}, {"type": "image", "text": None}]),
                    m("assistant", [{"type": "text", "text": "A cat."}]),
                ]
            },
            {
                "messages": [
                    m("user", [{"type": "text", "text": "A"}, {"type": "text", "text": "B?"}]),
                    m("assistant", [{"type": "text", "text": "C."}]),
                ]
            },
            {
                "messages": [
                    m("user", [{"type": "audio", "text": None}]),
                    m("assistant", [{"type": "text", "text": "Heard."}]),
                ]
            },
            {"messages": [m("user", [{"type": "text", "text": "A?"}]), m("assistant", None)]},
        ],
        [
            ok(("A fruit?", "", "Plum.")),
            marked("other_parts", ("What is it?", "", "A cat.")),
            ok(("A\nB?", "", "C.")),
            marked("other_parts", ("", "", "Heard.")),
            marked("null"),
        ],
    ),
    "reasoning": Shape(
        "messages",
        [
            {"messages": [m("user", "2 + 2?"), m("assistant", "4", reasoning_content="Easy.")]},
            {
                "messages": [
                    m("user", "2 + 2?"),
                    m("assistant", "<think>\nEasy.\n</think>\n\n4", reasoning_content=None),
                ]
            },
            {"messages": [m("user", "2 + 2?"), m("assistant", "Easy.\n</think>\n4", reasoning_content=None)]},
            {"messages": [m("user", "2 + 2?"), m("assistant", "<think>Easy, but", reasoning_content=None)]},
            {"messages": [m("user", "2 + 2?"), m("assistant", None, reasoning_content="Easy.")]},
        ],
        [
            *[ok(("2 + 2?", "", "4"))] * 3,
            *[marked("empty_response", ("2 + 2?", "", ""))] * 2,
        ],
    ),
    "ShareGPT with system and tools": Shape(
        "conversations",
        [
            {
                "conversations": [
                    f("human", "Time?"),
                    f("function_call", SHOWN),
                    f("observation", "9:00"),
                    f("gpt", "Nine."),
                ],
                "system": "Be brief.",
                "tools": "[]",
            },
            {
                "conversations": [f("system", "Be brief."), f("human", "Hi"), f("gpt", "Hello.")],
                "system": "Be brief.",
                "tools": None,
            },
            {
                "conversations": [f("gpt", "Welcome."), f("human", "Hi"), f("gpt", "Hello.")],
                "system": None,
                "tools": None,
            },
            {"conversations": [f("human", "Time?"), f("function_call", SHOWN)], "system": "", "tools": "[]"},
            {"conversations": [f("human", "Hi")], "system": "", "tools": None},
        ],
        [
            ok((f"Be brief.\nTime?\n{SHOWN}\n9:00", "", "Nine.")),
            ok(("Be brief.\nHi", "", "Hello.")),
            ok(("Welcome.\nHi", "", "Hello.")),
            marked("tool_call", ("Time?", "", SHOWN)),
            marked("no_assistant_turn"),
        ],
    ),
    "OpenHermes with weights": Shape(
        "conversations",
        [
            {"conversations": [f("human", "Hi", weight=0), f("gpt", "Hello.", weight=1)], "system_prompt": "Be kind."},
            {
                "conversations": [
                    f("human", "Hi", weight=0),
                    f("gpt", "Hello.", weight=0),
                    f("human", "A?", weight=None),
                    f("gpt", "B.", weight=1),
                ],
                "system_prompt": None,
            },
            {"conversations": [f("human", "Hi", weight=0), f("gpt", "Hello.", weight=0)], "system_prompt": None},
            {"conversations": [f("human", "Hi", weight=None), f("gpt", "Hello.", weight=None)], "system_prompt": ""},
            {"conversations": [f("human", None, weight=None), f("gpt", "Hello.", weight=None)], "system_prompt": ""},
        ],
        [
            ok(("Be kind.\nHi", "", "Hello.")),
            ok(("Hi\nHello.\nA?", "", "B.")),
            marked("no_assistant_turn"),
            ok(("Hi", "", "Hello.")),
            marked("null"),
        ],
    ),
    "LIMA": Shape(
        "conversations",
        [
            {"conversations": ["A fruit?", "Plum."], "source": "a"},
            {"conversations": ["A fruit?", "Plum.", "And?", "Fig."], "source": "a"},
            {"conversations": ["A fruit?"], "source": "a"},
            {"conversations": ["A fruit?", ""], "source": "a"},
            {"conversations": [], "source": "a"},
        ],
        [
            ok(("A fruit?", "", "Plum.")),
            ok(("A fruit?", "", "Plum."), ("A fruit?\nPlum.\nAnd?", "", "Fig.")),
            marked("no_assistant_turn"),
            marked("empty_response", ("A fruit?", "", "")),
            marked("no_assistant_turn"),
        ],
    ),
    "UltraChat": Shape(
        "data",
        [
            {"id": "1", "data": ["A?", "B."]},
            {"id": "2", "data": ["A?", "B.", "C?", "D."]},
            {"id": "3", "data": ["A?", "B.", "C?"]},
            {"id": "4", "data": ["¿Qué?", "Nada."]},
            {"id": "5", "data": None},
        ],
        [
            ok(("A?", "", "B.")),
            ok(("A?", "", "B."), ("A?\nB.\nC?", "", "D.")),
            ok(("A?", "", "B.")),
            ok(("¿Qué?", "", "Nada.")),
            marked("null"),
        ],
    ),
    "Capybara": Shape(
        "conversation",
        [
            {"source": "a", "conversation": [{"input": "A?", "output": "B."}]},
            {"source": "a", "conversation": [{"input": "A?", "output": "B."}, {"input": "C?", "output": "D."}]},
            {"source": "a", "conversation": [{"input": "A?", "output": ""}]},
            {"source": "a", "conversation": [{"input": "A?", "output": None}]},
            {"source": "a", "conversation": []},
        ],
        [
            ok(("A?", "", "B.")),
            ok(("A?", "", "B."), ("A?\nB.\nC?", "", "D.")),
            marked("empty_response", ("A?", "", "")),
            marked("null"),
            marked("no_assistant_turn"),
        ],
    ),
    "UltraFeedback and other prompts with chats": Shape(
        "prompt/chosen",
        [
            {
                "prompt": "A?",
                "chosen": [m("user", "A?"), m("assistant", "B.")],
                "rejected": [m("user", "A?"), m("assistant", "X.")],
            },
            {"prompt": "A?", "chosen": [m("system", "S"), m("user", "A? "), m("assistant", "B.")], "rejected": []},
            {"prompt": "A?", "chosen": [m("assistant", "B.")], "rejected": [m("assistant", "X.")]},
            {"prompt": "A?", "chosen": [m("assistant", "")], "rejected": [m("assistant", "X.")]},
            {"prompt": "A?", "chosen": None, "rejected": [m("assistant", "X.")]},
        ],
        [
            ok(("A?", "", "B.")),
            ok(("S\nA? ", "", "B.")),
            ok(("A?", "", "B.")),
            marked("empty_response", ("A?", "", "")),
            marked("null"),
        ],
    ),
    "preferences without a prompt": Shape(
        "chosen",
        [
            {"chosen": "\n\nHuman: A?\n\nAssistant: B.", "rejected": "\n\nHuman: A?\n\nAssistant: X."},
            {"chosen": "\n\nHuman: A?\n\nAssistant: B.\n\nHuman: C?\n\nAssistant: D.", "rejected": "X"},
            {"chosen": "\n\nHuman: A?\n\nAssistant:", "rejected": "X"},
            {"chosen": "Just a text.", "rejected": "X"},
            {"chosen": None, "rejected": "X"},
        ],
        [
            ok(("A?", "", "B.")),
            ok(("A?", "", "B."), ("A?\nB.\nC?", "", "D.")),
            marked("empty_response", ("A?", "", "")),
            marked("bad_turn"),
            marked("null"),
        ],
    ),
    "Orca's preferences": Shape(
        "question/chosen",
        [
            {"system": "Be brief.", "question": "A?", "chosen": "B.", "rejected": "X."},
            {"system": "", "question": "A?", "chosen": "B.", "rejected": "X."},
            {"system": None, "question": "A?", "chosen": "[B]", "rejected": "X."},
            {"system": "Be brief.", "question": "A?", "chosen": "", "rejected": "X."},
            {"system": "Be brief.", "question": "A?", "chosen": None, "rejected": "X."},
        ],
        [
            ok(("Be brief.\nA?", "", "B.")),
            ok(("A?", "", "B.")),
            ok(("A?", "", "[B]")),
            marked("empty_response", ("Be brief.\nA?", "", "")),
            marked("null"),
        ],
    ),
    "LLaMA-Factory's preferences": Shape(
        "conversations/chosen",
        [
            {"conversations": [f("human", "A?")], "chosen": f("gpt", "B."), "rejected": f("gpt", "X.")},
            {
                "conversations": [f("system", "S"), f("human", "A?")],
                "chosen": f("gpt", "B."),
                "rejected": f("gpt", "X."),
            },
            {
                "conversations": [f("human", "A?"), f("gpt", "B."), f("human", "C?")],
                "chosen": f("gpt", "D."),
                "rejected": f("gpt", "X."),
            },
            {"conversations": [f("human", "A?")], "chosen": f("gpt", ""), "rejected": f("gpt", "X.")},
            {"conversations": [f("human", "A?")], "chosen": f("bard of old", "B."), "rejected": f("gpt", "X.")},
        ],
        [
            ok(("A?", "", "B.")),
            ok(("S\nA?", "", "B.")),
            ok(("A?", "", "B."), ("A?\nB.\nC?", "", "D.")),
            marked("empty_response", ("A?", "", "")),
            marked("unknown_role: bard of old"),
        ],
    ),
    "a chat as JSON text": Shape(
        "messages",
        [
            {"id": 1, "messages": '[{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}]'},
            {"id": 2, "messages": "[{'role': 'user', 'content': 'A?'}, {'role': 'assistant', 'content': \"It's B.\"}]"},
            {"id": 3, "messages": '["A?", "B."]'},
            {"id": 4, "messages": "A? B."},
            {"id": 5, "messages": None},
        ],
        [
            ok(("A?", "", "B.")),
            ok(("A?", "", "It's B.")),
            ok(("A?", "", "B.")),
            marked("bad_turn"),
            marked("null"),
        ],
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_scored_of_a_shape(name: str) -> None:
    shape = SHAPES[name]
    assert len(shape.rows) == len(shape.scored) == 5
    expected = [([Exchange(*exchange) for exchange in exchanges], status) for exchanges, status in shape.scored]
    columns = {key: [row[key] for row in shape.rows] for key in shape.rows[0]}
    assert read_rows(columns, find_schema(columns)) == expected
    # Arrow gives every row the keys of all, with nulls.
    dataset = load_instructions(Dataset.from_list(shape.rows), on_invalid="mark")
    schema = find_schema(dataset.column_names)
    assert schema.name == shape.schema
    assert read_rows(dataset[:], schema) == expected
    # A stage is given the columns that are read alone, and must recognise the same schema in them.
    assert read_rows(dataset.select_columns(list(schema.read_columns))[:], find_schema(schema.read_columns)) == expected
    bad = sum(not is_scored(status) for _, status in expected)
    if bad:
        with pytest.raises(ValueError, match=f"{bad} of 5 rows cannot be scored"):
            load_instructions(Dataset.from_list(shape.rows))


def test_scores_are_those_of_the_exchanges(tiny_iqs: str) -> None:
    """Hold that a scorer finds in the columns what the table says, with a few of its rows."""
    scorer = QualityScorer(tiny_iqs, on_invalid="mark", diagnostics=True)
    for name in ("Dolly", "OpenAI's messages with tools", "UltraFeedback and other prompts with chats"):
        shape = SHAPES[name]
        found = Dataset.from_list(shape.rows).map(scorer, batched=True)
        assert found["iqs_status"][:] == [status for _, status in shape.scored]
        for score, (exchanges, _) in zip(found["iqs_score"], shape.scored, strict=True):
            texts = [render(Exchange(*exchange)) for exchange in exchanges]
            alone = scorer.score_texts(texts).scores
            assert score == (pytest.approx(float(alone.mean()), abs=1e-5) if texts else None)
