"""exporting.py: files that trainers read, equal to the source's rows, and rows that a format has no place for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset
from typer.testing import CliRunner
from yaml import safe_load

from car_datasets import curate, export_selection
from car_datasets.cli import app
from car_datasets.loading.values import dataset_from_rows
from car_datasets.publishing.exporting import INFO_FILE, TRAINERS
from car_datasets.receipt import Receipt
from car_datasets.results import SCORED_TABLE, SELECTED_TABLE
from tests.proving.tiny import save_llama
from tests.test_recipe import short_rows

Rows = list[dict[str, Any]]

# The keys that the trainers document: LLaMA-Factory's data/README.md, Axolotl's reference of `datasets`, OpenAI's
# reference of the messages of a training file.
INFO_KEYS = {"file_name", "formatting", "columns", "tags"}
INFO_COLUMNS = {"prompt", "query", "response", "history", "messages", "system", "tools"}
INFO_TAGS = {"role_tag", "content_tag", "user_tag", "assistant_tag", "observation_tag", "function_tag", "system_tag"}
AXOLOTL_KEYS = {"path", "ds_type", "type", "field_messages", "message_property_mappings", "field_tools"}
AXOLOTL_KEYS |= {"message_field_training", "roles_to_train", "train_on_eos"}
OPENAI_KEYS = {
    "system": {"role", "content", "name"},
    "user": {"role", "content", "name"},
    "assistant": {"role", "content", "name", "tool_calls", "weight", "refusal"},
    "tool": {"role", "content", "tool_call_id"},
}

ALPACA = [
    {"instruction": "Sum the list.", "input": "1, 2", "output": "3"},
    {"instruction": "Greet\nme ☀.", "input": "", "output": "<think>\nA greeting.\n</think>\n\nHello."},
]
OPENORCA = [
    {"system_prompt": "You are brief.", "question": "Which day follows Monday?", "response": "Tuesday."},
    {"system_prompt": "", "question": "Which follows Friday?", "response": "Saturday."},
]
SHAREGPT = [
    {
        "conversations": [
            {"from": "system", "value": "You are brief."},
            {"from": "human", "value": "Hi"},
            {"from": "gpt", "value": "Hello."},
            {"from": "human", "value": "Bye"},
            {"from": "gpt", "value": "Goodbye."},
        ]
    }
]
LOOKUP = {"name": "look_up", "description": "Look a word up.", "parameters": {"type": "object", "properties": {}}}
GLAIVE = [
    {
        "conversations": [
            {"from": "human", "value": "What is moss?"},
            {"from": "function_call", "value": '{"name": "look_up", "arguments": {"word": "moss", "in": null}}'},
            {"from": "observation", "value": '{"found": "a plant"}'},
            {"from": "gpt", "value": "Moss is a plant."},
        ],
        "tools": json.dumps([LOOKUP]),
    },
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}], "tools": None},
]
CALLS = [
    {
        "messages": [
            {"role": "user", "content": "What is moss?"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "look_up", "arguments": '{"word": "moss"}'}}
                ],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "a plant"},
            {"role": "assistant", "content": "Moss is a plant."},
        ],
        "tools": [{"type": "function", "function": LOOKUP}],
    }
]
CHATS = [
    {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}],
        "page": 2**60,
        "x": 0.1,
    }
]
WEIGHTS = [
    {
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hm.", "weight": 0},
            {"role": "user", "content": "Hi!"},
            {"role": "assistant", "content": "Hello.", "weight": 1},
        ]
    }
]
HISTORY = [{"instruction": "And now?", "input": "", "output": "Two.", "history": [["Count.", "One."]]}]
THOUGHTS = [
    {
        "messages": [
            {"role": "user", "content": "2 + 2?"},
            {"role": "assistant", "content": "4", "reasoning_content": "Two and two."},
        ]
    }
]


@pytest.fixture(scope="module")
def curated(tiny_iqs: str, tiny_embedder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a selection from 24 rows in the alpaca schema."""
    folder = tmp_path_factory.mktemp("exporting") / "out"
    curate(short_rows(), folder, scorer=tiny_iqs, embedder=tiny_embedder, n1=8, k=3, n2=1, duplicates="keep")
    return folder


@pytest.fixture
def result_of(curated: Path, tmp_path: Path) -> Any:
    """Return a function that makes the folder of a result whose selection is all of some rows."""

    def make(rows: Rows) -> Path:
        folder = tmp_path / "rows"
        folder.mkdir()
        table = dataset_from_rows([{**row, "source_index": i, "iqs_score": 0.5} for i, row in enumerate(rows)])
        for name in (SELECTED_TABLE, SCORED_TABLE):
            table.to_parquet(folder / name)
        (folder / "receipt.json").write_text(replace(Receipt.read(curated), schema="auto").to_json())
        return folder

    return make


def lines(path: Path) -> Rows:
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


def said(*texts: str) -> list[dict[str, str]]:
    """Return messages by user and assistant in turn; a text after `system:` is the system prompt."""
    start = [{"role": "system", "content": texts[0].removeprefix("system:")}] if texts[0].startswith("system:") else []
    roles = ("user", "assistant")
    return [*start, *({"role": roles[i % 2], "content": text} for i, text in enumerate(texts[len(start) :]))]


# --- files


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_real_result_is_read_back_in_its_order_without_our_columns(
    trainer: str, curated: Path, tmp_path: Path
) -> None:
    source = short_rows()
    chosen = lines(curated / "selected.json")
    wanted = [{name: row[name] for name in source.column_names} for row in chosen]
    assert all(row in source.to_list() for row in wanted) and len(wanted) >= 8
    done = CliRunner().invoke(app, ["export", str(curated), "--for", trainer, "--output", str(tmp_path / "new")])
    assert done.exit_code == 0, done.output
    [file] = (tmp_path / "new").glob("train.json*")
    found = load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache")).to_list()
    if trainer in ("openai", "axolotl"):
        found = [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in found]
    if trainer in ("alpaca", "llama-factory"):
        assert found == wanted
    else:
        asked = [f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"] for row in wanted]
        messages = [said(question, row["output"]) for question, row in zip(asked, wanted, strict=True)]
        assert found == [{"prompt": m[:1], "completion": m[1:]} for m in messages]
    assert str(file) in done.stdout and "Next:" in done.stderr


MADE = {
    ("trl", "alpaca"): [
        {"prompt": said("Sum the list.\n\n1, 2"), "completion": said("", "3")[1:]},
        {"prompt": said("Greet\nme ☀."), "completion": said("", ALPACA[1]["output"])[1:]},
    ],
    ("trl", "openorca"): [
        {"prompt": said("system:You are brief.", "Which day follows Monday?"), "completion": said("", "Tuesday.")[1:]},
        {"prompt": said("Which follows Friday?"), "completion": said("", "Saturday.")[1:]},
    ],
    ("trl", "chats"): CHATS,
    ("trl", "calls"): [{**CALLS[0], "tools": json.dumps(CALLS[0]["tools"])}],
    ("trl", "sharegpt"): [{"messages": said("system:You are brief.", "Hi", "Hello.", "Bye", "Goodbye.")}],
    ("trl", "history"): [{"messages": said("Count.", "One.", "And now?", "Two.")}],
    ("trl", "thoughts"): THOUGHTS,
    ("llama-factory", "alpaca"): ALPACA,
    ("llama-factory", "openorca"): OPENORCA,
    ("llama-factory", "history"): HISTORY,
    ("llama-factory", "chats"): CHATS,
    ("llama-factory", "sharegpt"): SHAREGPT,
    ("llama-factory", "glaive"): GLAIVE,
    ("axolotl", "sharegpt"): SHAREGPT,
    ("axolotl", "chats"): CHATS,
    ("axolotl", "calls"): CALLS,
    ("axolotl", "weights"): [
        {"messages": [{**m, "train": False} if m.get("weight") == 0 else m for m in WEIGHTS[0]["messages"]]}
    ],
    ("openai", "chats"): [{"messages": CHATS[0]["messages"]}],
    ("openai", "calls"): CALLS,
    ("openai", "weights"): WEIGHTS,
    ("openai", "thoughts"): [{"messages": said("2 + 2?", "<think>\nTwo and two.\n</think>\n\n4")}],
    ("openai", "glaive"): [
        {
            "messages": [
                {"role": "user", "content": "What is moss?"},
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [
                        {
                            "id": "call_0",
                            "type": "function",
                            "function": {"name": "look_up", "arguments": '{"word": "moss", "in": null}'},
                        }
                    ],
                },
                {"role": "tool", "content": '{"found": "a plant"}', "tool_call_id": "call_0"},
                {"role": "assistant", "content": "Moss is a plant."},
            ],
            "tools": [{"type": "function", "function": LOOKUP}],
        },
        {"messages": said("Hi", "Hello.")},
    ],
    ("alpaca", "alpaca"): ALPACA,
    ("alpaca", "chats"): [{"instruction": "Hi", "input": "", "output": "Hello."}],
}
SHAPES = {
    **{"alpaca": ALPACA, "openorca": OPENORCA, "sharegpt": SHAREGPT, "glaive": GLAIVE, "calls": CALLS, "chats": CHATS},
    **{"weights": WEIGHTS, "history": HISTORY, "thoughts": THOUGHTS},
}


@pytest.mark.parametrize(("trainer", "shape"), MADE, ids=lambda part: part)
def test_each_shape_is_written_as_the_trainer_documents(trainer: str, shape: str, result_of: Any) -> None:
    done = export_selection(result_of(SHAPES[shape]), trainer)
    assert lines(done.file) == MADE[trainer, shape]
    if trainer == "openai":
        for row in lines(done.file):
            assert set(row) <= {"messages", "tools"}
            assert all(set(message) <= OPENAI_KEYS[message["role"]] for message in row["messages"])
            assert row["messages"][-1]["role"] == "assistant"
    if trainer == "llama-factory":
        [entry] = json.loads((done.file.parent / INFO_FILE).read_text()).values()
        assert entry["file_name"] == done.file.name and set(entry) <= INFO_KEYS
        assert set(entry["columns"]) <= INFO_COLUMNS and set(entry.get("tags", ())) <= INFO_TAGS
        assert set(entry["columns"].values()) <= set(lines(done.file)[0])
    if trainer == "axolotl":
        [entry] = safe_load(done.stanza)["datasets"]
        assert set(entry) <= AXOLOTL_KEYS and entry["field_messages"] in lines(done.file)[0]
        assert entry["path"] == str(done.file)


def test_what_is_left_out_is_named(result_of: Any) -> None:
    rows = [{**CHATS[0], "prompt": "Hi", "mixed": 1}, {**CHATS[0], "prompt": "Hi", "mixed": "one"}]
    rows[0]["messages"] = [{**message, "time": 3} for message in CHATS[0]["messages"]]
    folder = result_of(rows)
    assert export_selection(folder, "trl").left_out == ("prompt", "mixed")  # TRL would read the column prompt
    assert export_selection(folder, "openai").left_out == ("page", "x", "prompt", "mixed", "messages[].time")


def test_an_index_of_the_source_is_its_own_column(result_of: Any) -> None:
    folder = result_of([{**ALPACA[0], "id": "b7"}, {**ALPACA[1], "id": "a3"}])
    receipt = Receipt.read(folder)
    (folder / "receipt.json").write_text(replace(receipt, recipe={**receipt.recipe, "index_column": "id"}).to_json())
    assert [row["id"] for row in lines(export_selection(folder, "trl").file)] == ["b7", "a3"]


@pytest.mark.parametrize(
    ("before", "after", "scorer", "own"),
    [
        (
            {"kind": "poem"},
            {},
            {},
            {"kind": "poem"},
        ),  # grouped by, but the source's: it comes before the columns of ours
        ({}, {"kind": "poem"}, {}, {}),
        ({}, {"ifd": 0.5}, {"kind": "ifd"}, {}),  # the number that a scorer of this kind adds next to its score
    ],
)
def test_no_column_of_ours_is_taken_for_the_source_s(
    before: dict[str, str], after: dict[str, Any], scorer: dict[str, str], own: dict[str, str], result_of: Any
) -> None:
    folder = result_of(ALPACA)
    receipt = Receipt.read(folder)
    score = "ifd_score" if scorer else "iqs_score"
    settings = {**receipt.recipe, "balance": "kind", "score_column": score}
    (folder / "receipt.json").write_text(
        replace(receipt, recipe=settings, scorer={**receipt.scorer, **scorer}).to_json()
    )
    rows = [{**row, **before, "source_index": i, **after, score: 0.5} for i, row in enumerate(ALPACA)]
    for name in (SELECTED_TABLE, SCORED_TABLE):
        dataset_from_rows(rows).to_parquet(folder / name)
    assert lines(export_selection(folder, "llama-factory").file) == [{**row, **own} for row in ALPACA]


# --- refusals


ENDLESS = [{"messages": [*said("Hi", "Hello.", "And?")]}, {"messages": said("Hi", "Hello.")}]
NEXT_TO = [
    {
        "messages": [
            CALLS[0]["messages"][0],
            {**CALLS[0]["messages"][1], "content": "I look."},
            *CALLS[0]["messages"][2:],
        ]
    }
]


PARTS = [{"type": "text", "text": "What is this?"}, {"type": "image", "image": "moss.png"}]
PICTURE = [{"messages": [{"role": "user", "content": PARTS}, {"role": "assistant", "content": "Moss."}]}]


@pytest.mark.parametrize(
    ("rows", "trainer", "message"),
    [
        (ENDLESS, "openai", r"1 of 2 selected rows have: 1 do not end with an answer \(rows 0\)\. Nothing was written"),
        (ENDLESS, "llama-factory", "1 do not take turns"),
        (SHAREGPT, "alpaca", "1 have a system prompt"),
        (HISTORY, "alpaca", "1 have other turns"),
        (GLAIVE, "alpaca", r"1 define tools \(rows 0\)"),
        (WEIGHTS, "trl", "1 have answers of weight 0"),
        (WEIGHTS, "llama-factory", "1 have answers of weight 0"),
        (PICTURE, "openai", "1 have images, audio or other parts"),
        (NEXT_TO, "llama-factory", "1 say something next to a call of a tool"),
    ],
)
def test_what_has_no_place_is_refused(rows: Rows, trainer: str, message: str, result_of: Any) -> None:
    folder = result_of(rows)
    with pytest.raises(ValueError, match=message):
        export_selection(folder, trainer, folder.parent / "new")
    assert not (folder.parent / "new").exists()


def test_nothing_is_overwritten_and_other_datasets_stay(result_of: Any, tmp_path: Path) -> None:
    folder, place = result_of(ALPACA), tmp_path / "data"
    place.mkdir()
    (place / INFO_FILE).write_text('{"other": {"file_name": "other.json"}}')
    export_selection(folder, "llama-factory", place)
    assert list(json.loads((place / INFO_FILE).read_text())) == ["other", "rows"]
    with pytest.raises(ValueError, match=r"is there already; .*--overwrite"):
        export_selection(folder, "llama-factory", place)
    export_selection(folder, "llama-factory", place, overwrite=True)
    known = {"rows": {"file_name": "theirs.json"}}
    (place / INFO_FILE).write_text(json.dumps(known))
    with pytest.raises(ValueError, match=r"another dataset of the name 'rows'.*--output .*rows-2\.jsonl"):
        export_selection(folder, "llama-factory", place, overwrite=True)
    assert json.loads((place / INFO_FILE).read_text()) == known
    export_selection(folder, "llama-factory", place / "rows-2.jsonl")
    assert list(json.loads((place / INFO_FILE).read_text())) == ["rows", "rows_2"]
    for trainer, output, message in (
        ("unsloth", None, "choose one of trl, llama-factory, axolotl, openai, alpaca"),
        ("trl", place / "rows.json", r"reads \.jsonl files"),
        ("trl", folder / "new", "lies in the source"),
        ("trl", place / INFO_FILE / "new", "is a file; name a folder"),
    ):
        with pytest.raises(ValueError, match=message):
            export_selection(folder, trainer, output)
    with pytest.raises(ValueError, match="name a folder that `car-datasets curate` wrote"):
        export_selection(tmp_path / "nowhere", "trl")


# --- the trainer itself

TEMPLATE = (
    "{% if tools %}### {{ tools | tojson }}\n{% endif %}{% for message in messages %}### {{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] or '-' }} <end>{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant\n{% endif %}"
)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["calls", "sharegpt"])  # the notebook 05 trains on prompts and completions
def test_trl_trains_on_it(shape: str, result_of: Any, tmp_path: Path, on_cpu: None) -> None:
    trl = pytest.importorskip("trl")
    from transformers import AutoTokenizer

    done = export_selection(result_of(SHAPES[shape]), "trl")
    save_llama(str(tmp_path / "llama"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llama")
    tokenizer.chat_template, tokenizer.pad_token = TEMPLATE, tokenizer.eos_token
    rows = load_dataset("json", data_files=str(done.file), split="train", cache_dir=str(tmp_path / "cache"))
    settings = trl.SFTConfig(
        output_dir=str(tmp_path / "trained"),
        assistant_only_loss="assistant_only_loss=True" in done.stanza,
        max_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
    )
    trainer = trl.SFTTrainer(
        model=str(tmp_path / "llama"), args=settings, train_dataset=rows, processing_class=tokenizer
    )
    assert trainer.train().global_step == 1
    # The answers alone are trained on.
    assert all(0 < sum(label != -100 for label in row) < len(row) for row in trainer.train_dataset["labels"])
