"""Evaluation items in rows: copies are found however they are hidden, and what only resembles an item is left alone."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from datasets.fingerprint import Hasher

from car_datasets import score_in_shards
from car_datasets.scoring.stage import Stage, add_columns
from car_datasets.selection import Decontaminator
from tests.benchmarks.contamination import COPIES, SUMS, WHY, batch_of, families, filled
from tests.hub_server import Hub

QUESTIONS = [
    "Why did the clockmaker of Brunn leave his workshop to a stranger, although his own daughter had learned the trade "
    "and had asked him for it in two letters?",
    "Which of the four rivers that meet below the old fortress carries the most silt in spring?",
    "Who painted the ceiling of Saint Orsola?",
]
ANSWERS = [
    "He feared that she would be refused by the guild, so he sold the shop in secret, and the stranger paid her half of "
    "the price as he had promised.",
    "The northern one.",
    "Leocadia Bram",
]


def marks(stage: Decontaminator, *texts: str) -> list[str | None]:
    """Return what the stage writes for rows that have these answers."""
    return list(stage({"instruction": ["Reply."] * len(texts), "output": list(texts)})["contaminated_by"])


@pytest.mark.parametrize("kind", COPIES)
def test_copies_are_found(kind: str) -> None:
    rng = random.Random(71)
    items = filled((*WHY, *SUMS), 108, rng)
    found = Decontaminator({"facts": items})(batch_of([COPIES[kind](item, rng) for item in items]))
    right = [by == f"facts:{i}" for i, by in enumerate(found["contaminated_by"])]
    assert np.mean(right) >= 0.95
    assert min(share for share, ok in zip(found["contaminated_share"], right, strict=True) if ok) >= 0.8


@pytest.mark.parametrize("family", ["other numbers", "quotations", "formulas"])
@pytest.mark.parametrize("alone", [True, False])
def test_what_resembles_an_item_is_left_alone(family: str, alone: bool) -> None:
    made = families(random.Random(72))
    items, rows = made[family]
    known = items if alone else [item for others, _ in made.values() for item in others]
    stage = Decontaminator([known])
    assert sum(by is not None for by in stage(batch_of(rows))["contaminated_by"]) <= 1
    assert None not in marks(stage, *items)


def test_short_items_count_word_for_word_and_trivial_ones_never() -> None:
    short = [
        "Who painted the ceiling of Saint Orsola?",
        "Define osmosis",
        "42",
        "Paris",
        "What is it?",
        "1, 2, 3, 4, 5",
    ]
    stage = Decontaminator([short])
    assert marks(stage, "I was asked: who painted the ceiling of SAINT ORSOLA? No idea.") == ["texts:0"]
    assert marks(stage, "Who painted the ceiling of Saint Agnes?", "Define osmosis", "I define osmosis so.") == [
        *(None, "texts:1", None)
    ]
    assert marks(stage, "42", "Paris", "What is it?", "Count: 1, 2, 3, 4, 5, 6.", "") == [None] * 5


def test_answers_of_items_count_if_they_are_long() -> None:
    stage = Decontaminator([Dataset.from_dict({"question": QUESTIONS, "answer": ANSWERS})])
    assert marks(stage, *ANSWERS) == ["dataset:0", None, None]
    assert marks(stage, *QUESTIONS) == ["dataset:0", "dataset:1", "dataset:2"]


def test_a_text_that_many_items_share_names_none_of_them() -> None:
    rows = [
        {"question": question, "subject": "medieval history of Brunn"}
        for question in [*QUESTIONS, "And the bishop of Trent?"]
    ]
    stage = Decontaminator([rows])
    assert marks(stage, "A book on the medieval history of Brunn.", QUESTIONS[1]) == [None, "dataset:1"]


def test_rows_of_every_kind_are_read() -> None:
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Ask away."}]
    chat += [{"role": "user", "content": QUESTIONS[0]}, {"role": "assistant", "content": "Because."}]
    stage = Decontaminator([[*QUESTIONS, "为什么布伦的钟表匠把作坊留给了一个陌生人而不是留给他的女儿呢"]])
    assert stage({"messages": [chat, chat[:2]]})["contaminated_by"] == ["texts:0", None]
    thought = f"<think>The task says: {QUESTIONS[1]}</think>The second."
    broken = {"instruction": [QUESTIONS[0], "Think."], "output": [None, thought]}
    assert stage(broken)["contaminated_by"] == ["texts:0", "texts:1"]
    assert marks(stage, "有人问:为什么布伦的钟表匠把作坊留给了一个陌生人,而不是留给他的女儿呢?") == ["texts:3"]
    assert stage({"instruction": [], "output": []}) == {"contaminated_by": [], "contaminated_share": []}


def test_sets_come_from_files_and_memory(tmp_path: Path) -> None:
    rows = [{"question": q, "answer": a} for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
    files = [tmp_path / f"exam.{kind}" for kind in ("json", "jsonl", "csv", "parquet", "txt")]
    files[0].write_text(json.dumps(rows))
    files[1].write_text("\n".join(json.dumps(row) for row in rows))
    Dataset.from_list(rows).to_csv(files[2])
    pq.write_table(pa.Table.from_pylist(rows), files[3])
    files[4].write_text("\n".join(QUESTIONS))
    expected = ["exam:0", "exam:1", "exam:2", None]
    for file in files:
        stage = Decontaminator([str(file)])
        assert marks(stage, *QUESTIONS, "Nothing of the kind.") == expected, file.suffix
        assert [each.name for each in stage.against] == ["exam"]
    for source in (Dataset.from_list(rows), rows, QUESTIONS):
        assert marks(Decontaminator({"exam": source}), *QUESTIONS, "Nothing of the kind.") == expected
    # Of two equal items the first is named.
    both = Decontaminator(
        [files[0], files[4], ["Another question, which is about the moons of Jupiter and their orbits."]]
    )
    assert [each.name for each in both.against] == ["exam", "exam-2", "texts"]
    assert marks(both, QUESTIONS[0], "A question which is about the moons of Jupiter and their orbits.")[0] == "exam:0"
    named = Decontaminator([rows], item_columns=["answer"], threshold=0.9)
    assert marks(named, QUESTIONS[0], ANSWERS[0]) == [None, "dataset:0"]


def test_the_content_of_the_sets_is_part_of_the_identity(tmp_path: Path) -> None:
    file = tmp_path / "exam.txt"
    file.write_text("\n".join(QUESTIONS))
    one, two = Decontaminator([file]), Decontaminator([str(file)])
    file.write_text("\n".join(QUESTIONS[:2]))
    other = Decontaminator([file])
    assert one == two and Hasher.hash(one) == Hasher.hash(two)
    assert one != other and Hasher.hash(one) != Hasher.hash(other)
    file.unlink()  # workers need the stage alone
    copy = pickle.loads(pickle.dumps(one))
    assert copy == one and Hasher.hash(copy) == Hasher.hash(one)
    assert marks(copy, *QUESTIONS) == ["exam:0", "exam:1", "exam:2"]


def test_it_is_a_stage(tmp_path: Path) -> None:
    stage = Decontaminator([QUESTIONS])
    assert isinstance(stage, Stage)
    rows = Dataset.from_dict(
        {"task": ["Say.", QUESTIONS[1], "Go."], "reply": [QUESTIONS[0], "Yes.", "No."], "id": [7, 8, 9]}
    )
    named = Decontaminator([QUESTIONS], columns={"instruction": "task", "response": "reply"})
    added = add_columns(rows, named, "Decontaminating")
    assert added["contaminated_by"][:] == ["texts:0", "texts:1", None]
    assert added.features == {**rows.features, **named.output_features()}
    assert added["contaminated_share"][2] == 0
    assert rows.map(named, batched=True, num_proc=2).to_dict() == added.to_dict()
    assert score_in_shards(rows, named, tmp_path / "shards").to_dict() == added.to_dict()
    with pytest.raises(ValueError, match="another"):
        score_in_shards(rows, Decontaminator([QUESTIONS[:1]], columns=named.columns), tmp_path / "shards")
    with pytest.raises(ValueError, match="already has the column"):
        named(added[:])


@pytest.mark.parametrize(
    ("against", "options", "message"),
    [
        ([], {}, "against is empty; pass at least one"),
        (3, {}, "against is a int; pass a list"),
        (QUESTIONS, {}, r"against holds texts.*against=\[\[\.\.\.\]\]"),
        (["missing.jsonl"], {}, "against='missing.jsonl': .*no such file"),
        (["missing.txt"], {}, "'missing.txt' does not exist"),
        (["empty.jsonl"], {}, "against='empty.jsonl'.*is an empty file"),
        (["empty.txt"], {}, "against='empty.txt': no row has a text"),
        (["broken.json"], {}, r"against='broken\.json'"),
        (["numbers.csv"], {}, r"against='numbers.csv': none of its columns \['a', 'b'\] holds text"),
        (
            ["exam.json"],
            {"item_columns": ["prompt"]},
            r"item_columns=\['prompt'\] are not in the set, which has \['question'\]",
        ),
        (["exam.json"], {"columns": ["question"]}, r"by item_columns=\['question'\]"),
        (["exam.json"], {"threshold": 1.2}, "threshold=1.2 is a share"),
        (["exam.json"], {"threshold": "high"}, "threshold='high' is a share"),
        ([["42", "Paris", ""]], {}, "none of the 3 items of 'texts' could be found"),
    ],
)
def test_bad_input_is_refused(
    against: Any, options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").touch()
    Path("empty.txt").write_text("\n \n")
    Path("broken.json").write_text('[{"question": "Why')
    Path("numbers.csv").write_text("a,b\n1,2\n3,4\n")
    Path("exam.json").write_text(json.dumps([{"question": QUESTIONS[0]}]))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Decontaminator(against, **options)


def test_a_set_that_is_the_source_itself_is_refused(tmp_path: Path) -> None:
    rows = Dataset.from_dict(batch_of(filled(WHY, 60, random.Random(73))))
    file = tmp_path / "mine.parquet"
    rows.to_parquet(file)
    stage = Decontaminator([file])
    with pytest.raises(ValueError, match=r"'mine' contains 60 of 60 rows.*evaluation sets there, and not the source"):
        stage.refuse_own(rows.shuffle(seed=0))
    with pytest.raises(ValueError, match="'mine' is the file that the rows are from"):
        stage.refuse_own(rows.select([0]), [stage.against[0].sha256])
    stage.refuse_own(Dataset.from_dict(batch_of([*QUESTIONS * 20, *rows["output"][:]])))


@pytest.mark.slow
def test_a_set_on_the_hub_is_read_at_one_commit(hub: Hub) -> None:
    code = """
import json, sys
from car_datasets.selection import Decontaminator
stage = Decontaminator([sys.argv[1]])
found = stage({"instruction": ["Reply."], "output": [sys.argv[2]]})["contaminated_by"]
print(json.dumps([stage.against, found]))
try:
    Decontaminator(["me/exam"])
except ValueError as error:
    print(error)
"""
    lines = {
        f"data/{split}.jsonl": json.dumps({"question": QUESTIONS[i]}).encode()
        for i, split in enumerate(("train", "test"))
    }
    commit = hub.commit("me/exam", lines, private=True)
    done = hub.run(code, "me/exam:test", QUESTIONS[1], check=True)
    first, error = done.stdout.splitlines()[-2:]
    ((name, _, revision),), found = json.loads(first)
    assert (name, revision, found) == ("exam", commit, ["exam:0"])
    assert "owner/name:split" in error
