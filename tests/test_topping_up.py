"""topping_up.py: new rows join a finished selection as if they had been there, and what was chosen stays."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from car_datasets import Receipt, curate, curation, top_up, verify
from car_datasets.clustering import ClusterModel
from car_datasets.reporting import report

WORDS = "red green blue sea poem list sum name good bad short input write colours three about"
OLD, ALL = 36, 44
COPY = 40  # a new row that is an old one with a word more


def rows_of(numbers: range) -> list[dict[str, str]]:
    rows = []
    for i in numbers:
        words = [WORDS.split()[(i * j + i // 5 + j * j) % 16] for j in range(1, 14 + i % 7)]
        rows.append({"instruction": f"Write about the {words[0]} {words[1]} number {i}.", "output": " ".join(words)})
    return rows


def every_row() -> list[dict[str, str]]:
    rows = rows_of(range(ALL))
    rows[COPY] = {**rows[7], "output": f"{rows[7]['output']} and"}
    return rows


@pytest.fixture(scope="module")
def models(tiny_iqs: str, tiny_embedder: str) -> dict[str, str]:
    return {"scorer": tiny_iqs, "embedder": tiny_embedder}


@pytest.fixture(scope="module", autouse=True)
def no_plots() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:  # they take most of the time, and are those of any result
        patch.setattr(report, "can_draw", lambda: False)
        yield


@pytest.fixture(scope="module")
def old(models: dict[str, str], no_plots: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a result of the first rows, without their embeddings."""
    folder = tmp_path_factory.mktemp("old") / "result"
    curate(every_row()[:OLD], folder, n1=9, k=4, **models)
    return folder


def test_what_was_chosen_stays(old: Path, models: dict[str, str], tmp_path: Path) -> None:
    source = tmp_path / "new.json"
    source.write_text(json.dumps(every_row()[OLD:]))
    topped, drift = top_up(old, source, tmp_path / "out", **models)
    before = Dataset.from_parquet(str(old / "selected.parquet"))
    selected, scored = topped.selected, topped.scored
    assert set(before["source_index"][:]) < set(selected["source_index"][:])
    by = dict(zip(selected["source_index"][:], selected["selected_by"][:], strict=True))
    assert {by[index] for index in before["source_index"][:]} == {"pin"}
    assert scored["source_index"][:] == list(range(ALL))
    marks = dict(zip(scored["source_index"][:], scored["duplicate_of"][:], strict=True))
    assert marks[COPY] == 7 or marks[7] == COPY
    assert drift.rows == ALL - OLD and 0 <= drift.far <= 1 and 0 <= drift.outside <= drift.rows
    # The old scores and labels are read, not computed.
    known = Dataset.from_parquet(str(old / "scored.parquet"))
    for column in ("iqs_score", "cluster", "cluster_distance"):
        assert scored[column][:OLD] == known[column][:]
    source_of = Receipt.read(tmp_path / "out").source
    receipt = Receipt.read(old)
    assert (source_of["selected_sha256"], source_of["scored_sha256"]) == (
        receipt.selected_sha256,
        receipt.scored_sha256,
    )
    assert source_of["old"] == receipt.source and source_of["new"]["name"] == "new.json"
    found = verify(tmp_path / "out")
    assert found.matches, found.difference
    assert any("rows of an earlier result" in words for words in found.skipped)
    assert Receipt.read(tmp_path / "out").recipe["n1"] == round(9 * ALL / OLD)
    # And once more, on what was topped up.
    again = top_up(tmp_path / "out", rows_of(range(50, 53)), tmp_path / "more", **models)
    assert len(again.curated.scored) == ALL + 3
    assert set(selected["source_index"][:]) <= set(again.curated.selected["source_index"][:])
    # Selected anew, what stayed in between need not stay.
    anew = top_up(tmp_path / "out", rows_of(range(50, 53)), tmp_path / "anew", reselect=True, **models).curated
    assert "pin" not in anew.selected["selected_by"][:] and "pinned" not in anew.scored.column_names


def test_a_quota_grows_with_rows_that_lack_one_of_its_values(models: dict[str, str], tmp_path: Path) -> None:
    rows = [{**row, "source": "ab"[i % 2], "gold": i in (3, 37)} for i, row in enumerate(every_row()[:40])]
    settings = {
        "quota": "source=a:0.5,b:0.5",
        "budget_tokens": "300",
        "keep": "gold",
        "k": 4,
        "allow_worse": True,
        **models,
    }
    curate(rows[:OLD], tmp_path / "old", **settings)
    new = [{**row, "source": "a"} for row in rows[OLD:]]
    topped = top_up(tmp_path / "old", new, tmp_path / "out", budget_tokens=600, **models).curated
    assert 37 in topped.selected["source_index"][:] and sum(topped.selected["iqs_tokens"][:]) <= 600
    grown = top_up(tmp_path / "old", new, tmp_path / "anew", reselect=True, **models)
    assert Receipt.read(tmp_path / "anew").recipe["budget_tokens"] == round(300 * 40 / OLD)
    # The rows to keep are still known after a top-up, and those that only stayed are not kept.
    again = top_up(
        tmp_path / "out",
        [{**rows_of(range(60, 61))[0], "source": "b", "gold": True}],
        tmp_path / "more",
        reselect=True,
        **models,
    ).curated
    by = dict(zip(again.selected["source_index"][:], again.selected["selected_by"][:], strict=True))
    assert {index for index, reason in by.items() if reason == "pin"} == {3, 37, 40}
    assert verify(tmp_path / "more").matches and len(grown.curated.scored) == 40


@pytest.mark.slow
def test_selected_anew_it_equals_a_run_over_all_rows_at_the_same_centres(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curate(every_row()[:OLD], tmp_path / "old", n1=9, k=4, keep_embeddings=True, **models)
    topped = top_up(tmp_path / "old", every_row()[OLD:], tmp_path / "new", reselect=True, n1=11, **models).curated
    model = ClusterModel.from_pretrained(tmp_path / "old")
    monkeypatch.setattr(curation, "fit_clusters", lambda *arguments: model)
    full = curate(every_row(), tmp_path / "full", n1=11, k=4, keep_embeddings=True, **models)
    assert topped.selected.to_dict() == full.selected.to_dict()
    expected = full.scored.to_dict()
    for column, values in topped.scored.to_dict().items():
        if column in ("embedding", "cluster_distance", "iqs_score", "duplicate_similarity"):
            assert values == [pytest.approx(value, abs=1e-5) for value in expected[column]], column
        else:
            assert values == expected[column], column
    assert verify(tmp_path / "new").matches


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([{"instruction": "a", "output": "b", "note": "c"}], {}, r"have the columns \['note'\]"),
        ([{"question": "a", "answer": "b"}], {}, "the schema 'question/answer', and the old ones 'alpaca'"),
        (
            [{"instruction": "a", "output": "b", "source_index": 3}],
            {},
            r"index of an old row in 'source_index', the first \[3\]",
        ),
        (None, {"seed": 3}, "seed cannot be changed for new rows alone"),
        (None, {"n1": 3, "budget": 9}, "n1 and budget are both given"),
        (None, {"budget": 3}, "is below the .* of the rows that were selected before"),
    ],
)
def test_bad_input_is_refused(
    old: Path, models: dict[str, str], tmp_path: Path, rows: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        top_up(old, rows or every_row()[OLD:], tmp_path / "out", **{**models, **changes})
    assert not (tmp_path / "out").exists()


def test_results_that_cannot_be_topped_up_are_refused(old: Path, models: dict[str, str], tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(old, copy)
    with pytest.raises(ValueError, match="is the old result"):
        top_up(copy, every_row()[OLD:], copy, overwrite=True, **models)
    (copy / "report.md").write_text("other")
    with pytest.raises(ValueError, match=r"report\.md does not have the receipt's sha256"):
        top_up(copy, every_row()[OLD:], tmp_path / "out", **models)
    (copy / "cluster_model.json").unlink()
    with pytest.raises(ValueError, match=r"holds no cluster model.*Curate again"):
        top_up(copy, every_row()[OLD:], tmp_path / "out", **models)
