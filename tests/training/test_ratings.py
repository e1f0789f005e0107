"""ratings.py: rated rows are found in their files, what cannot be right is named by its line, and agreement is measured."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from car_datasets.loading.templates import Exchange
from car_datasets.scoring.iqs.heads import FAULTS
from car_datasets.training.ratings import correlations, read_ratings, told_apart

ROWS = [
    ["pool", 0, 10, "none", 2],
    ["pool", 2, 3, "wrong", ""],
    ["texts", 1, 6.5, "shallow", 7],
]


def write(folder: Path, rows: list[list[object]] = ROWS, header: str = "file,row,soundness,fault,worth") -> Path:
    """Write ratings, and the two files that they point to: a dataset of three rows, and two texts."""
    pool = [{"instruction": f"Question {i}?", "input": "", "output": f"Answer {i}."} for i in range(3)]
    (folder / "pool.json").write_text(json.dumps(pool))
    texts = [["src", "score"], ["Instruction: a Response: b", 0], ["Instruction: c Input: d Response: e", 1]]
    for name, content in (("texts.csv", texts), ("ratings.csv", [header.split(","), *rows])):
        with (folder / name).open("w", newline="") as file:
            csv.writer(file).writerows(content)
    return folder / "ratings.csv"


def test_rated_rows_are_found_and_the_others_returned(tmp_path: Path) -> None:
    found = read_ratings(write(tmp_path))
    assert found.rows == [
        Exchange("Question 0?", "", "Answer 0."),
        Exchange("Question 2?", "", "Answer 2."),
        Exchange("c", "d", "e"),
    ]
    assert found.soundness.tolist() == [10, 3, 6.5]
    assert np.isnan(found.worth).tolist() == [False, True, False]
    assert [FAULTS[i] for i in found.fault] == ["none", "wrong", "shallow"]
    assert found.source == ["pool", "pool", "texts"]
    assert found.unrated == [Exchange("Question 1?", "", "Answer 1."), Exchange("a", "", "b")]
    less = found.without({("question 2?", ""), ("a", "")})
    assert [row.response for row in less.rows] == ["Answer 0.", "e"]
    assert [row.response for row in less.unrated] == ["Answer 1."]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["pool", 1, 11, "none", 2], "row 4: soundness='11' must be a number from 0 to 10"),
        (["pool", 1, "nan", "none", 2], "row 4: soundness='nan' must be a number"),
        (["pool", 1, "", "none", 2], "row 4: soundness='' must be a number"),
        (["pool", 1, 5, "none", -1], "row 4: worth='-1' must be a number from 0 to 10"),
        (["pool", 1, 5, "ugly", 1], "row 4: fault='ugly' is not known"),
        (["pool", 3, 5, "none", 1], "row 4: row='3' points nowhere: pool has 3 rows"),
        (["pool", 1.5, 5, "none", 1], "row 4: row='1.5' points nowhere"),
        (["pool", -1, 5, "none", 1], "row 4: row='-1' points nowhere"),
        (["lost", 1, 5, "none", 1], "row 4: file='lost' points nowhere"),
        (["../pool", 1, 5, "none", 1], "must be the name of a file in the folder"),
        (["pool", 2, 5, "none", 1], "row 4: row 2 of pool is rated in row 2 too"),
    ],
)
def test_a_bad_rating_is_named_by_its_line(row: list[object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ratings\.csv") as error:
        read_ratings(write(tmp_path, [*ROWS, row]))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        (ROWS, "file,row,sound,fault,worth", r"so \['soundness'\] too"),
        ([[*row[:2], 7, *row[3:]] for row in ROWS], "file,row,soundness,fault,worth", "every soundness is 7"),
        ([[*row[:3], "none", row[4]] for row in ROWS], "file,row,soundness,fault,worth", "no row has a fault"),
    ],
)
def test_columns_and_classes_must_be_there(rows: list, header: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_ratings(write(tmp_path, rows, header))


def test_a_rated_row_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = write(tmp_path)
    pool = json.loads((tmp_path / "pool.json").read_text())
    pool[2]["output"] = None
    (tmp_path / "pool.json").write_text(json.dumps(pool))
    with pytest.raises(ValueError, match="row 2: row 2 of pool has no question"):
        read_ratings(path)


def test_agreement_by_hand() -> None:
    rng = np.random.default_rng(0)
    length = rng.normal(size=400)
    sound = rng.normal(size=400)
    plain, held = correlations(np.stack([2 * length, sound + 3 * length]), length - sound, length)
    assert abs(held[1]) > 0.9  # opposite, once length is held
    assert plain[1] > 0.3
    assert correlations(2 * length[None], length, length)[0] == pytest.approx(1)
    assert correlations(np.ones((1, 5)), np.arange(5), np.arange(5))[0] == 0
    rated = np.array([1.0, 9, 10, 3, 6]), np.array([1.0, 2, np.nan, 4, 5])
    figures = told_apart((np.array([2.0, 8, 1, 0, 5]), np.array([1.0, 2, 9, 3, 4])), rated, np.arange(5))
    assert figures["faulty"] == pytest.approx(0.75)
    assert figures["worth"] == pytest.approx(1)
