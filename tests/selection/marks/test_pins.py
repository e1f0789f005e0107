"""Rows that must be selected, and rows that must not be."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from car_datasets.selection.marks.exclusions import excluded_rows
from car_datasets.selection.marks.pins import mark_pins

TEXTS = ("instruction", "output")


def rows() -> Dataset:
    texts = [("Name a fish.", "Cod."), ("Add 2 and 3.", "5"), ("Name a fish.", "Cod."), ("Say hi.", "Hi!")]
    content: dict[str, Any] = {"instruction": [a for a, _ in texts], "output": [b for _, b in texts]}
    return Dataset.from_dict({**content, "good": [False, None, False, True], "source_index": ["w", "x", "y", "z"]})


def write(path: Path, records: list[dict[str, Any]]) -> str:
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_rows_are_found_by_column_by_index_and_by_content(tmp_path: Path) -> None:
    by_index = write(tmp_path / "index.csv", [{"source_index": "x", "output": "of another version"}])
    fish = {"instruction": "Name a fish.", "output": "Cod.", "note": "a column that the data does not have"}
    by_content = write(tmp_path / "content.jsonl", [fish])
    assert mark_pins(rows(), "good", by_index)["pinned"][:] == [None, "drop", None, "keep"]
    # As many copies are kept as the file has, and all are dropped.
    assert mark_pins(rows(), by_content, text_columns=TEXTS)["pinned"][:] == ["keep", None, None, None]
    dropped = mark_pins(rows(), None, by_content, text_columns=TEXTS)
    assert dropped["pinned"][:] == ["drop", None, "drop", None]
    assert excluded_rows(dropped).tolist() == ["drop", "", "drop", ""]
    # A pin wins over what other marks say.
    marked = mark_pins(rows(), "good").add_column("duplicate_of", ["x", None, None, "x"])
    assert excluded_rows(marked).tolist() == ["duplicate", "", "", ""]
    assert excluded_rows(marked, duplicates=False).tolist() == ["", "", "", ""]


@pytest.mark.parametrize(
    ("keep", "drop", "words"),
    [
        ("no-such", None, "keep='no-such' is neither a column of the data .* nor a file"),
        ("output", None, "keep='output': the column holds string, not true and false"),
        (
            [{"source_index": "q"}, {"source_index": "r"}],
            None,
            "2 of its 2 rows are not in the data, the first source_index 'q'",
        ),
        ([{"instruction": "Say hi.", "output": "Bye."}], None, "1 of its 1 rows are not in the data, the first row 0"),
        ([{"instruction": "Say hi."}], None, "it needs the column 'source_index', or .'output'"),
        ([{"source_index": "z"}], "good", "1 rows are in both .* the first with source_index='z'"),
        ([{"source_index": "w"}], None, "1 of its rows cannot be scored, the first with source_index='w'"),
    ],
)
def test_contradictions_are_refused(keep: Any, drop: str | None, words: str, tmp_path: Path) -> None:
    kept = keep if isinstance(keep, str) else write(tmp_path / "rows.jsonl", keep)
    with pytest.raises(ValueError, match=words):
        mark_pins(rows(), kept, drop, text_columns=TEXTS, unscorable=[0])
