"""explaining.py: the place of a row, its neighbours and the reason, against the same found by hand."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset

from car_datasets import explain, select_car
from car_datasets.reporting.explaining import explain_rows
from car_datasets.reporting.overview import Overview
from car_datasets.utils import columns
from tests.reporting.test_plots import make_pool


@pytest.fixture(scope="module")
def pool() -> Dataset:
    ids = np.arange(300) + 1000
    status = ["truncated" if i == 7 else "null" if i == 8 else "ok" for i in range(300)]
    scores = [None if i == 8 else float(x) for i, x in enumerate(np.random.default_rng(1).normal(size=300))]
    return make_pool(source_index=ids, iqs_status=status, iqs_score=scores)


@pytest.fixture(scope="module")
def selected(pool: Dataset) -> Dataset:
    return select_car(pool.remove_columns("embedding"), 40, 2)


def test_every_row_is_told_as_it_is(pool: Dataset, selected: Dataset) -> None:
    scores = np.array([np.nan if x is None else x for x in pool["iqs_score"][:]])
    clusters, vectors = np.array(pool["cluster"][:]), np.array(pool["embedding"][:])
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    kept = dict(zip(selected["source_index"][:], selected["selected_by"][:], strict=True))
    told = explain_rows(Overview.of(pool, selected), range(300))
    for i, found in enumerate(told):
        assert found.row == 1000 + i
        assert found.selected_by == kept.get(found.row)
        similar = units @ units[i]
        similar[i] = -2
        same = np.where((clusters == clusters[i]), similar, -2)
        assert [n.row for n in found.neighbours] == (1000 + np.argsort(-same)[:3]).tolist()
        assert found.neighbours[0].similarity == pytest.approx(same.max(), abs=1e-5)
        chosen = np.where(np.isin(np.arange(300) + 1000, list(kept)), similar, -2)
        assert found.nearest_selected is not None
        assert found.nearest_selected.row == 1000 + chosen.argmax()
        assert found.nearest_selected.selected
        if i == 8:
            continue
        assert found.score_rank == 1 + (scores > scores[i]).sum()
        assert found.percentile == pytest.approx(100 * (scores <= scores[i]).sum() / 299)
        members = scores[(clusters == clusters[i]) & ~np.isnan(scores)]
        assert (found.cluster_rank, found.cluster_size) == (1 + (members > scores[i]).sum(), len(members))
        assert found.why.startswith("kept" if found.selected_by else "not kept:")


def test_the_reason_in_words(pool: Dataset, selected: Dataset) -> None:
    by = {reason: row for row, reason in zip(selected["source_index"][:], selected["selected_by"][:], strict=True)}
    assert explain(pool, selected, by["score"]).why.startswith("kept by score: rank ")
    assert "of its cluster, which gives its best 2" in explain(pool, selected, by["cluster"]).why
    assert explain(pool, selected, by["both"]).why.startswith("kept by both: rank ")
    assert explain(pool, selected, 1008).why == "not kept: it has no score (null)."
    assert explain(pool, selected, 1007).truncated
    text = str(explain(pool, selected, 1007))
    assert "row 1007: " in text
    assert "cut before its end" in text
    assert "nearest selected row: row " in text


def test_a_row_left_out_by_another_rule_is_said_to_be(pool: Dataset, selected: Dataset) -> None:
    without_best = selected.select(range(1, len(selected)))
    why = explain(pool, without_best, selected["source_index"][0]).why
    assert why.startswith("not kept, though it is rank 1 of 299")


def test_batches_change_nothing(pool: Dataset, selected: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [explain(pool, selected, row, neighbours=5) for row in (1000, 1008, 1123)]
    monkeypatch.setattr(columns, "BATCH", 7)
    for row, before in zip((1000, 1008, 1123), whole, strict=True):
        assert [n.row for n in explain(pool, selected, row, neighbours=5).neighbours] == [
            n.row for n in before.neighbours
        ]


def test_without_embeddings_there_are_no_neighbours(pool: Dataset, selected: Dataset) -> None:
    found = explain(pool.remove_columns("embedding"), selected, 1003)
    assert (found.neighbours, found.nearest_selected) == ((), None)


def test_without_an_index_column_rows_are_counted(pool: Dataset) -> None:
    plain = pool.remove_columns("source_index")
    chosen = select_car(plain, 40, 2)
    assert explain(plain, chosen, 5).row == explain(plain, chosen, np.int64(5)).row == 5
    with pytest.raises(ValueError, match="the pool has the rows 0 to 299"):
        explain(plain, chosen, 300)


def test_a_row_that_is_not_there_is_named(pool: Dataset, selected: Dataset) -> None:
    with pytest.raises(ValueError, match=r"row=5 is not in the pool's column 'source_index', which starts with \[1000"):
        explain(pool, selected, 5)
    with pytest.raises(ValueError, match="row=True is not in the pool's column"):
        explain(pool, selected, True)
    with pytest.raises(ValueError, match="neighbours=-1"):
        explain(pool, selected, 1005, neighbours=-1)
    with pytest.raises(ValueError, match="neighbours=True must be a whole number"):
        explain(pool, selected, 1005, neighbours=True)
    assert len(explain(pool, selected, 1005, neighbours=2).neighbours) == 2
