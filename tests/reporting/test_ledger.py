"""ledger.py: a row for each mark, bound and rule, selected by a recipe and told in a line; the command `explain`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Value
from typer.testing import CliRunner

from car_datasets import SelectionReport, curate
from car_datasets.choosing import asked_of, select_by
from car_datasets.cli import app
from car_datasets.recipe import Recipe
from car_datasets.reporting.ledger import ledger
from car_datasets.reporting.overview import Overview

ROWS = 20


@pytest.fixture(scope="module")
def pool() -> Dataset:
    """Return rows that score worse from row to row, of two sources and two clusters; row 19 has no score."""
    rows = Dataset.from_dict(
        {
            "instruction": [f"Name the river of valley {i}." for i in range(ROWS)],
            "output": [f"It is called the {i}." for i in range(ROWS)],
            "source": ["web" if i < 12 else "book" for i in range(ROWS)],
            "source_index": list(range(100, 100 + ROWS)),
            "iqs_score": [None if i == 19 else 1 - i / 100 for i in range(ROWS)],
            "iqs_status": ["empty_response" if i == 19 else "ok" for i in range(ROWS)],
            "iqs_tokens": [50 if i == 5 else 10 for i in range(ROWS)],
            "cluster": [i % 2 for i in range(ROWS)],
            "like_rank": list(range(ROWS, 0, -1)),
        }
    )
    marks: dict[str, dict[int, Any]] = {
        "duplicate_of": {3: 102},
        "duplicate_similarity": {3: 0.97},
        "contaminated_by": {4: "exam:17"},
        "contaminated_share": {4: 0.9},
        "pinned": {6: "drop", 15: "keep"},
    }
    for name, values in marks.items():
        kind = {"duplicate_of": "int64", "contaminated_by": "string", "pinned": "string"}.get(name, "float32")
        rows = rows.add_column(name, [values.get(i) for i in range(ROWS)], feature=Value(kind))
    return rows


def told(pool: Dataset, **settings: Any) -> tuple[list[str], Overview]:
    """Return a line per row for the selection by a recipe."""
    recipe = Recipe(keep="pinned", drop="gone", **settings)  # both are in the column `pinned` already
    chosen = select_by(recipe, pool)
    overview = Overview.of(pool, chosen, names=recipe.names, asked=asked_of(recipe))
    return list(ledger(overview)), overview


def test_marks_and_pins_are_named_first(pool: Dataset) -> None:
    lines, overview = told(pool, n1=3, n2=0)
    assert len(lines) == ROWS and [line.split(":")[0] for line in lines] == [f"row {100 + i}" for i in range(ROWS)]
    assert lines[0].startswith("row 100: kept by score: rank 1 of 16 by score")
    assert lines[3] == "row 103: not kept: duplicate of 102 (similarity 0.970)."
    assert lines[4] == "row 104: not kept: contaminated by exam:17, of which it gives away 90 %."
    assert lines[6] == "row 106: not kept: it is one of the rows that must not be in."
    assert lines[15].startswith("row 115: kept as a row that must be in: rank 13 of 16 by score")
    assert lines[19] == "row 119: not kept: it has no score (empty_response)."
    report = SelectionReport.from_overview(overview)
    assert report.excluded == {"vetoed": 1, "contaminated": 1, "duplicates": 1}
    assert "left out before the choice: 1 vetoed, 1 contaminated, 1 duplicate" in report.sentences()


def test_bounds_are_named_where_they_kept_a_better_row_out(pool: Dataset) -> None:
    lines, _ = told(pool, budget=6, n2=0, quota="source=web:0.5,book:0.5")
    assert "quota of source web was full" in lines[7] and "quota" not in lines[18]
    lines, _ = told(pool, budget_tokens=70, n2=0)
    assert lines[5].startswith("row 105: not kept: it did not fit into what was left of the budget in tokens")
    assert lines[7].startswith("row 107: kept by score")


def test_likeness_has_places_of_its_own(pool: Dataset) -> None:
    lines, overview = told(pool, n1=3, n2=0, like="examples.json", allow_worse=True)
    kept = [i for i, line in enumerate(lines) if ": kept" in line]
    assert 15 in kept and "must be in" in lines[15]
    for i in set(kept) - {15}:
        assert f"most like the examples: place {ROWS - i} in the round robin" in lines[i]
    assert "place 20 in the round robin" in lines[0]
    lines, _ = told(pool, budget=6, like="examples.json", quota="source=web:0.5,book:0.5")
    assert "the quota of source book was full; it is place 4 in the round robin" in lines[16]
    assert "quota" not in lines[8]
    assert any("as most like the examples" in line for line in SelectionReport.from_overview(overview).sentences())


def test_the_command_explains_rows_and_all_rows(tiny_iqs: str, tiny_embedder: str, tmp_path: Path) -> None:
    rows = [
        {"instruction": f"Name tide {i}.", "input": "", "output": f"It is {'high' * (i % 4)} at {i}."}
        for i in range(16)
    ]
    curate(rows, tmp_path / "out", scorer=tiny_iqs, embedder=tiny_embedder, n1=4, k=2, duplicates="keep")
    runner = CliRunner()
    done = runner.invoke(app, ["explain", str(tmp_path / "out"), "--explain-all"])
    lines = done.stdout.splitlines()
    assert len(lines) == 16 and sum(": kept" in line for line in lines) == sum("not kept" not in line for line in lines)
    one = runner.invoke(app, ["explain", str(tmp_path / "out"), "3", "5"])
    assert [line for line in one.stdout.splitlines() if line.startswith("row ")] == [lines[3], lines[5]]
    for arguments, message in (
        ([], "--explain-all"),
        (["99"], "is not in the pool's column"),
        (["3", "--explain-all"], "Name rows"),
    ):
        failed = runner.invoke(app, ["explain", str(tmp_path / "out"), *arguments])
        assert failed.exit_code == 2 and message in failed.stderr
