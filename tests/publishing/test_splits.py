"""splits.py: all splits of a configuration have the same columns, and no value is lost or made up."""

from __future__ import annotations

import pytest
from datasets import Dataset

from car_datasets import select_car
from car_datasets.publishing.push import selection_splits


def pool() -> Dataset:
    return Dataset.from_dict(
        {
            "text": [f"t{i}" for i in range(6)],
            "iqs_score": [0.1, 0.9, None, 0.5, 0.7, 0.3],
            "cluster": [0, 0, 1, 1, 2, 2],
            "embedding": [[float(i)] for i in range(6)],
        }
    )


def test_columns_are_shared_and_filled_in() -> None:
    selected = select_car(pool(), 2, 1).remove_columns("embedding")
    selected = selected.add_column("note", [f"n{i}" for i in range(len(selected))])
    found = selection_splits(selected, pool(), ["scored", "random_control", "length_matched_control"])
    assert {tuple(split.column_names) for split in found.values()} == {tuple(selected.column_names)}
    assert len({str(split.features) for split in found.values()}) == 1
    assert found["selected"].to_list() == selected.to_list()
    chosen = {row["source_index"]: row for row in selected}
    for row in found["scored"]:
        wanted = chosen.get(row["source_index"], {"note": None, "selected_by": None, "score_rank": None})
        assert {name: row[name] for name in wanted} == wanted
    assert found["scored"]["text"][:] == pool()["text"][:]
    for name in ("random_control", "length_matched_control"):
        assert len(found[name]) == len(set(found[name]["text"][:])) == len(selected)
        assert None not in found[name]["iqs_score"][:]


def test_embeddings_only_where_they_are_wanted() -> None:
    selected = select_car(pool(), 2, 1)
    assert "embedding" in selection_splits(selected, pool(), ["scored"])["scored"].column_names
    bare = selected.remove_columns("embedding")
    assert "embedding" not in selection_splits(bare, pool(), ["scored"])["scored"].column_names
    kept = selection_splits(bare, pool(), ["scored"], left_out=None)
    assert kept["selected"]["embedding"][:] == selected["embedding"][:]


def test_what_cannot_be_is_refused() -> None:
    selected = select_car(pool(), 2, 1)
    with pytest.raises(ValueError, match="pass scored="):
        selection_splits(selected, None, ["scored"])
    with pytest.raises(ValueError, match="choose out of"):
        selection_splits(selected, pool(), ["everything"])
    for split, also in (("scored", ["scored"]), ("random_control", ["length_matched_control"]), ("scored", [])):
        with pytest.raises(ValueError, match=f"split='{split}' is the name of the pool or of a control"):
            selection_splits(selected, pool(), also, split=split)
    with pytest.raises(ValueError, match=r"also='scored' is one text.*also=\['scored'\]"):
        selection_splits(selected, pool(), "scored")
    other = Dataset.from_dict({**selected.to_dict(), "source_index": [99] * len(selected)})
    with pytest.raises(ValueError, match="not in the pool"):
        selection_splits(other, pool(), ["scored"])
