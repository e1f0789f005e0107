"""pairs.py: every form that pairs come in gives the same pairs, and what cannot be read is named by its row."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from car_datasets.loading.templates import Exchange
from car_datasets.training.pairs import (
    Pair,
    as_given,
    cleaned,
    parse_text,
    question,
    read_labelled_rows,
    read_pairs,
    refuse_crossing,
)

SUM = Pair(Exchange("Add them.", "1, 2", "4"), Exchange("Add them.", "1, 2", "3, because 1 and 2 are 3."))
SEA = Pair(Exchange("Name a sea.", "", "Red"), Exchange("Name a sea.", "", 'The "Red Sea",\nfor one.'))
PAIRS = [SUM, SEA]


def write_csv(path: Path, rows: list[list[Any]], end: str = "\n", encoding: str = "utf-8") -> Path:
    file = io.StringIO(newline="")
    csv.writer(file, lineterminator=end).writerows(rows)
    path.write_bytes(file.getvalue().encode(encoding))
    return path


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", newline="")
    return path


def score_rows(labels: list[Any], pairs: list[Pair] = PAIRS) -> list[list[Any]]:
    texts = [as_given(row).whole for pair in pairs for row in pair]
    return [["src", "score"], *map(list, zip(texts, labels, strict=True))]


def ranking_rows(pairs: list[Pair] = PAIRS) -> list[list[Any]]:
    texts = [(as_given(worse), as_given(better)) for worse, better in pairs]
    return [["src", "pos", "neg"], *([f"{b.question} ", b.answer, w.answer] for w, b in texts)]


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


# --- CSV


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_both_csv_formats_hold_the_same_pairs(end: str, encoding: str, tmp_path: Path) -> None:
    scored = write_csv(tmp_path / "scored.csv", score_rows([0, 1, 0, 1]), end, encoding)
    ranked = write_csv(tmp_path / "ranked.csv", ranking_rows(), end, encoding)
    assert read_pairs(scored) == read_pairs(str(ranked)) == PAIRS


@pytest.mark.parametrize("labels", [[0, 1, 0, 1], [0.25, 0.75, 0.1, 0.2], ["0.0", " 1 ", "1e-3", "0.5"]])
def test_the_higher_score_is_the_better_half(labels: list[Any], tmp_path: Path) -> None:
    assert read_pairs(write_csv(tmp_path / "rows.csv", score_rows(labels))) == PAIRS
    turned = [labels[1], labels[0], labels[2], labels[3]]
    expected = [Pair(SUM.better, SUM.worse), SEA]
    assert read_pairs(write_csv(tmp_path / "turned.csv", score_rows(turned))) == expected


def test_other_columns_and_their_order_do_not_matter(tmp_path: Path) -> None:
    header, *rows = ranking_rows()
    mixed = [[*header[::-1], "", ""], *([*row[::-1], i, ""] for i, row in enumerate(rows))]
    assert read_pairs(write_csv(tmp_path / "mixed.csv", mixed)) == PAIRS


def test_an_answer_longer_than_the_limit_of_the_csv_module(tmp_path: Path) -> None:
    long = [SUM._replace(better=SUM.better._replace(response="word " * 40_000 + "end"))]
    before = csv.field_size_limit()
    assert read_pairs(write_csv(tmp_path / "long.csv", score_rows([0, 1], long))) == long
    assert csv.field_size_limit() == before


# --- labels


def test_graded_labels_are_kept_as_they_are(tmp_path: Path) -> None:
    found = read_labelled_rows(write_csv(tmp_path / "graded.csv", score_rows([0.25, 1, 0.5, 0.5])))
    assert found.rows == [row for pair in PAIRS for row in pair]
    assert found.labels.dtype == np.float32
    assert found.labels.tolist() == [0.25, 1, 0.5, 0.5]


def test_an_odd_number_of_labelled_rows_is_no_mistake(tmp_path: Path) -> None:
    rows = write_csv(tmp_path / "odd.csv", score_rows([0.25, 1, 0.5, 0.5])[:-1])
    assert len(read_labelled_rows(rows).rows) == 3
    with pytest.raises(ValueError, match="holds 3 rows: rows 1 and 2, 3 and 4"):
        read_pairs(rows)


def test_pairs_are_labelled_worse_0_and_better_1(tmp_path: Path) -> None:
    for path in (
        write_csv(tmp_path / "ranked.csv", ranking_rows()),
        write_jsonl(
            tmp_path / "chosen.jsonl", [{"chosen": as_given(b).whole, "rejected": as_given(w).whole} for w, b in PAIRS]
        ),
    ):
        found = read_labelled_rows(path)
        assert found.rows == [row for pair in PAIRS for row in pair]
        assert found.labels.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    "label", ["", "good", "nan", "inf", "1e39", "-0.1", "1.01", None, [1], pytest.param(10**400, id="huge")]
)
def test_a_label_that_is_no_number_from_0_to_1(label: Any, tmp_path: Path) -> None:
    row = {"src": as_given(SUM.worse).whole, "score": 0}
    path = write_jsonl(tmp_path / "rows.jsonl", [row, {**row, "score": label}])
    for read in (read_pairs, read_labelled_rows):
        with pytest.raises(ValueError, match=r"rows\.jsonl, row 2: score=.* must be a number from 0 to 1"):
            read(path)


def test_one_class_teaches_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"every label is 0\.5; a model learns nothing"):
        read_labelled_rows(write_csv(tmp_path / "rows.csv", score_rows([0.5] * 4)))


def test_equal_labels_in_a_pair(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rows 3 and 4 have the same score"):
        read_pairs(write_csv(tmp_path / "rows.csv", score_rows([0, 1, 0.5, 0.5])))


# --- preferences


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.json"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_chosen_and_rejected_with_the_marks_of_car(name: str, mark: bytes, tmp_path: Path) -> None:
    rows = [{"rejected": as_given(w).whole, "chosen": as_given(b).whole} for w, b in PAIRS]
    text = json.dumps(rows, indent=1) if name.endswith("json") else "\r\n\r\n".join(map(json.dumps, rows))
    (tmp_path / name).write_bytes(mark + text.encode())
    assert read_pairs(tmp_path / name) == PAIRS


def test_prompt_chosen_and_rejected(tmp_path: Path) -> None:
    rows = [{"prompt": w.instruction, "chosen": b.response, "rejected": w.response} for w, b in [SEA]]
    assert read_pairs(write_jsonl(tmp_path / "rows.jsonl", rows)) == [SEA]


def test_line_ends_of_other_alphabets_stay_inside_a_string(tmp_path: Path) -> None:
    row = {"prompt": "Name\u2028a sea.", "chosen": "Red\x85Sea", "rejected": "Red\x0b"}
    assert read_pairs(write_jsonl(tmp_path / "rows.jsonl", [row]))[0].better == Exchange(
        "Name\u2028a sea.", "", "Red\x85Sea"
    )


def test_half_a_character_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(r'{"prompt": "\ud83d", "chosen": "a \ud83d\ude00", "rejected": "\ude00 b"}')
    assert read_pairs(tmp_path / "rows.jsonl") == [
        Pair(Exchange("\ufffd", "", "\ufffd b"), Exchange("\ufffd", "", "a \U0001f600"))
    ]


@pytest.mark.parametrize("prompt", ["Name a sea.", [said("user", "Name a sea.")], None])
def test_chat_messages(prompt: Any, tmp_path: Path) -> None:
    before = [said("user", "Name a sea.")] if prompt is None else []
    row = {
        "prompt": prompt,
        **{k: [*before, said("assistant", a)] for k, a in (("chosen", "Red Sea"), ("rejected", "Red"))},
    }
    found = read_pairs(write_jsonl(tmp_path / "rows.jsonl", [row]))
    assert found == [Pair(Exchange("Name a sea.", "", "Red"), Exchange("Name a sea.", "", "Red Sea"))]


def test_of_a_chat_the_last_answer_counts_after_all_that_was_said(tmp_path: Path) -> None:
    before = [said("user", "Name a sea."), said("assistant", "Which one?"), said("user", "Any.")]
    row = {"prompt": before, "chosen": [said("assistant", "Red Sea")], "rejected": [said("assistant", "No")]}
    [pair] = read_pairs(write_jsonl(tmp_path / "rows.jsonl", [row]))
    assert pair.worse == Exchange("Name a sea.\nWhich one?\nAny.", "", "No")
    assert pair.better == pair.worse._replace(response="Red Sea")


@pytest.mark.parametrize("write", [write_jsonl, lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path)])
@pytest.mark.parametrize(
    ("prompt", "answers"),
    [
        pytest.param({"conversations": [{"from": "human", "value": "Name a sea."}]}, "from", id="LLaMA-Factory, chats"),
        pytest.param({"messages": [said("user", "Name a sea.")]}, "role", id="axolotl, chats"),
        pytest.param({"instruction": "Name a sea.", "input": ""}, None, id="LLaMA-Factory, alpaca"),
        pytest.param({"question": "Name a sea.", "system": ""}, None, id="axolotl, question"),
        pytest.param({"input": "Name a sea."}, None, id="axolotl, input"),
    ],
)
def test_pairs_of_other_trainers(prompt: dict[str, Any], answers: str | None, write: Any, tmp_path: Path) -> None:
    forms = {None: str, "from": lambda a: {"from": "gpt", "value": a}, "role": lambda a: [said("assistant", a)]}
    row = {**prompt, "chosen": forms[answers]("Red Sea"), "rejected": forms[answers]("Red")}
    path = tmp_path / ("rows.jsonl" if write is write_jsonl else "rows.parquet")
    write(path, [row])
    assert read_pairs(path) == [Pair(Exchange("Name a sea.", "", "Red"), Exchange("Name a sea.", "", "Red Sea"))]


def test_input_system_and_history_belong_to_both_answers(tmp_path: Path) -> None:
    row = {"instruction": "Add.", "input": "1, 2", "system": "Be brief.", "history": [["Hi", "Hello"]]}
    [pair] = read_pairs(
        write_jsonl(tmp_path / "rows.jsonl", [{**row, "chosen": "<think>1 + 2</think>3", "rejected": "4"}])
    )
    assert pair.better == Exchange("Be brief.\nHi\nHello\nAdd.", "1, 2", "3")
    assert pair.worse == pair.better._replace(response="4")


def test_conversations_as_hh_rlhf_writes_them(tmp_path: Path) -> None:
    start = "\n\nHuman: Name a sea.\n\nAssistant: Which one?\n\nHuman: Any.\n\nAssistant:"
    [pair] = read_pairs(
        write_jsonl(tmp_path / "rows.jsonl", [{"chosen": f"{start} Red Sea", "rejected": f"{start} No"}])
    )
    asked = "Name a sea.\n\nAssistant: Which one?\n\nHuman: Any."
    assert pair == Pair(Exchange(asked, "", "No"), Exchange(asked, "", "Red Sea"))


def test_an_empty_answer_is_kept_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": "Name a sea.", "chosen": "Red", "rejected": " "}]
    assert read_pairs(write_jsonl(tmp_path / "rows.jsonl", rows))[0].worse.response == " "
    assert "rows.jsonl, row 1: the answer is empty" in caplog.text


# --- texts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Instruction: Add. Input: 1, 2 Response: 3", Exchange("Add.", "1, 2", "3")),
        ("Instruction: Add. Response: 3", Exchange("Add.", "", "3")),
        ("Instruction: Add.\n Response: 3\n", Exchange("Add.\n", "", "3\n")),
        ("Instruction: Add.  Input:  1  Response:  3 ", Exchange("Add. ", " 1 ", " 3 ")),
        ("Instruction: Add. Response: Response: 3", Exchange("Add.", "", "Response: 3")),
        ("Instruction: Add. Response:", Exchange("Add.", "", "")),
        ("  Instruction:Add.\nResponse:3", Exchange("Add.\n", "", "3")),
        ("Instruction: Add. Input:  Response: 3", Exchange("Add.", "", "3")),
    ],
)
def test_a_text_back_into_its_parts(text: str, expected: Exchange) -> None:
    assert parse_text("rows.csv", 1, text) == expected


@given(st.tuples(*[st.text()] * 3).map(lambda parts: Exchange(*parts)))
@settings(deadline=None)
def test_the_text_is_the_same_after_reading_it(row: Exchange) -> None:
    if (row.instruction + row.response).strip() and "Response:" not in row.instruction + row.input:
        text = as_given(row).whole
        assert as_given(parse_text("rows.csv", 1, text)).whole == text


@pytest.mark.parametrize(
    "text", ["", None, 5, "Name a sea.", "Instruction: Name a sea.", "Instruction: the PreResponse: b"]
)
def test_a_text_of_another_form(text: Any) -> None:
    with pytest.raises(ValueError, match=r"rows\.csv, row 7: a text must have the form 'Instruction: "):
        parse_text("rows.csv", 7, text)


def test_a_text_without_question_and_answer() -> None:
    with pytest.raises(ValueError, match=r"rows\.csv, row 7: the text is empty"):
        parse_text("rows.csv", 7, "Instruction: \n Input: 1 Response: \t")


def test_cleaned_and_question() -> None:
    row = Exchange("Name\\n a  SEA.", "\\u201cnow\\u201d", "“Red”")
    assert cleaned(row) == Exchange("Name a SEA.", '"now"', '"Red"')
    assert question(row) == question(Exchange("name a sea.", '"NOW"', "Blue")) == ("name a sea.", '"now"')


# --- mistakes


@pytest.mark.parametrize(
    ("ending", "content", "message"),
    [
        ("csv", "src,label\na,0\n", r"has the columns \['src', 'label'\]; pairs need src and score"),
        ("jsonl", '{"prompt": "a", "chosen": "b"}', r"has the columns \['prompt', 'chosen'\]"),
        ("csv", "src,score,score\na,0,1\n", "each may occur only once"),
        ("csv", "src,score\nInstruction: a Response: b,0,1\n", "row 1 has more cells than columns"),
        ("csv", "src,pos,neg\nInstruction: a,Response: b,Response: c\nInstruction: a,b\n", "row 2: src, pos and neg"),
        ("csv", "pos,neg,src\nResponse: a,Response: b\n", "row 1: src, pos and neg must be texts"),
        ("csv", "src,score\n", "holds no rows"),
        ("csv", "", "holds no rows"),
        ("json", "[]", "holds no rows"),
        ("jsonl", "\n \n", "holds no rows"),
        ("json", '["a"]', "must hold one JSON object per row"),
        ("jsonl", "null", "must hold one JSON object per row"),
        ("jsonl", '{"chosen": ', "is not JSON"),
        ("json", "[" * 100_000, "is not JSON"),
        ("txt", "a", r"pairs are read from \.csv, \.jsonl, \.json or \.parquet files"),
        ("parquet", "PAR1", r"rows\.parquet is not Parquet"),
        ("jsonl", '{"chosen": "a", "rejected": "b"}', "row 1: there is no prompt, .* Add a prompt column"),
        ("jsonl", '{"prompt": "a", "chosen": "b", "rejected": null}', "row 1: prompt and rejected must be"),
        (
            "jsonl",
            '{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"rejected": "Instruction: a"}',
            "row 2: there is no",
        ),
        (
            "json",
            '[{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a"}]',
            "row 2: prompt and rejected must",
        ),
        ("jsonl", '{"prompt": 5, "chosen": [], "rejected": []}', "row 1: prompt and rejected must be"),
        ("jsonl", '{"prompt": {"a": 1}, "chosen": [], "rejected": []}', "row 1: prompt and rejected must be"),
        (
            "jsonl",
            '{"prompt": "a", "chosen": [], "rejected": []}',
            r"rejected is not a valid chat \(no_assistant_turn\)",
        ),
        ("jsonl", '{"prompt": " ", "chosen": "b", "rejected": "\\n"}', "row 1: the text is empty"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(ending: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / f"rows.{ending}").write_text(content)
    for read in (read_pairs, read_labelled_rows):
        with pytest.raises(ValueError, match=message) as caught:
            read(tmp_path / f"rows.{ending}")
        assert f"rows.{ending}" in str(caught.value)


def test_a_file_that_is_not_there_or_not_utf_8(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"There is no file .*none\.csv"):
        read_pairs(tmp_path / "none.csv")
    with pytest.raises(ValueError, match=r"rows\.csv is not UTF-8"):
        read_pairs(write_csv(tmp_path / "rows.csv", [["src", "score"], ["é", 0]], encoding="latin-1"))


def test_a_split_that_crosses() -> None:
    train, valid = [SUM.worse, SUM.better], [SEA.worse, SUM.worse._replace(instruction="ADD\\n them.", response="5")]
    refuse_crossing(train, [*SEA], ("train.csv", "valid.csv"))
    refuse_crossing(train, [SUM.worse._replace(input="3")], ("train.csv", "valid.csv"))
    with pytest.raises(
        ValueError, match=r"1 of the 2 rows of valid\.csv \(the first: row 2\) .* that train\.csv contains too"
    ):
        refuse_crossing(train, valid, ("train.csv", "valid.csv"))


# --- the original's files


@pytest.mark.shared
def test_the_real_files_give_the_same_pairs_in_both_formats(shared: Path) -> None:
    found = {}
    for side, count in (("train", 2032), ("valid", 254)):
        scored, ranked = (read_pairs(shared / "data" / f"expert_{kind}_{side}.csv") for kind in ("score", "rank"))
        assert len(scored) == len(ranked) == count
        for one, other in zip(scored, ranked, strict=True):  # the ranking files strip the end of what was asked
            assert [part.rstrip() for part in one.better] == [part.rstrip() for part in other.better]
            assert one.worse.response == other.worse.response
        found[side] = [row for pair in scored for row in pair]
    refuse_crossing(found["train"], found["valid"], ("train", "valid"))


@pytest.mark.shared
def test_the_real_texts_are_the_same_after_reading_them(shared: Path) -> None:
    with (shared / "data" / "expert_score_train.csv").open(encoding="utf-8-sig", newline="") as file:
        texts = [row["src"] for row in csv.DictReader(file)]
    assert [as_given(parse_text("train", i, text)).whole for i, text in enumerate(texts, 1)] == texts
