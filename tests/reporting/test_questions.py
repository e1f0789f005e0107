"""questions.py: `explain` against what is found by hand; each line of `what_if` against select_car."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset

from car_datasets import Recipe, explain, select_car, what_if
from car_datasets.choosing import asked_of, select_by
from car_datasets.reporting.overview import Asked, Overview
from car_datasets.reporting.questions import explain_rows, try_out
from car_datasets.utils import columns
from tests.reporting.test_plots import make_pool

# explain --------------------------------------------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match="neighbours=True must be an integer"):
        explain(pool, selected, 1005, neighbours=True)
    assert len(explain(pool, selected, 1005, neighbours=2).neighbours) == 2


# what_if --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain_pool() -> Dataset:
    return make_pool()


@pytest.fixture(scope="module")
def plain_selected(plain_pool: Dataset) -> Dataset:
    return select_car(plain_pool, 40, 1)


def test_every_line_is_what_select_car_takes(plain_pool: Dataset, plain_selected: Dataset) -> None:
    present = set(plain_selected["source_index"][:])
    lines = what_if(plain_pool, plain_selected, n1=[0, 10, 100], n2=[1, 3])
    assert [(line.n1, line.n2) for line in lines] == [(0, 1), (0, 3), (10, 1), (10, 3), (100, 1), (100, 3)]
    for line in lines:
        other = select_car(plain_pool, line.n1, line.n2, allow_worse=True)
        rows = set(other["source_index"][:])
        assert line.rows == len(other)
        assert line.mean_score == pytest.approx(np.mean(other["iqs_score"][:]))
        assert (line.k, line.clusters_covered) == (12, len(set(other["cluster"][:])))
        assert line.in_common == len(rows & present)
        assert line.overlap == pytest.approx(len(rows & present) / len(rows | present))


def test_the_present_choice_is_found_and_overlaps_wholly(plain_pool: Dataset, plain_selected: Dataset) -> None:
    lines = what_if(plain_pool, plain_selected)
    [present] = [line for line in lines if (line.n1, line.n2, line.k) == (40, 1, 12)]
    assert (present.overlap, present.in_common) == (1.0, len(plain_selected))
    assert {line.k for line in lines} == {6, 12, 24}
    assert all(line.rows > 0 for line in lines)


def test_another_k_makes_so_many_clusters(plain_pool: Dataset, plain_selected: Dataset) -> None:
    one, again = (what_if(plain_pool, plain_selected, n1=[0], n2=[1], k=[4, 12, 30]) for _ in range(2))
    assert one == again
    assert [line.k for line in one] == [4, 12, 30]
    assert [line.rows for line in one] == [line.clusters_covered for line in one]
    assert one[0].rows == 4
    assert one[2].rows > 20


def test_the_numbers_of_a_recipe_are_named_where_the_rows_do_not_show_them(plain_pool: Dataset) -> None:
    """Ask about a pool in which no cluster has 90 rows, and not all of 20 centres have rows."""
    chosen = select_car(plain_pool, 40, 90)
    known = Overview.of(plain_pool, chosen, asked=Asked(90, 20))
    assert "of its cluster, which gives its best 90;" in explain_rows(known, known.positions[-1:].tolist())[0].why
    [present] = [line for line in try_out(known) if (line.n1, line.n2, line.k) == (40, 90, 20)]
    assert (present.overlap, present.cells()[5]) == (1.0, "12 of 20")
    assert Overview.of(plain_pool, chosen).by_cluster < 90
    assert Overview.of(plain_pool, chosen, asked=Asked(0, "sqrt")).k == 12  # int(sqrt(300 / 2))


def test_quotas_stay(plain_pool: Dataset) -> None:
    pool = plain_pool.add_column("source", np.where(np.arange(300) % 3, "web", "book"))
    recipe = Recipe(budget=60, n2=1, k=12, quota="source=book:0.75", duplicates="keep")
    overview = Overview.of(pool, select_by(recipe, pool), asked=asked_of(recipe))
    n1 = overview.by_score
    present, more = try_out(overview, n1=[n1, 2 * n1], n2=[1])
    assert present.overlap == 1
    choice = select_by(recipe.changed(budget=more.rows), pool)
    assert choice["source"][:].count("book") == round(0.75 * more.rows)
    assert more.mean_score == pytest.approx(np.mean(choice["iqs_score"][:]))


def test_without_embeddings_k_stays(plain_pool: Dataset, plain_selected: Dataset) -> None:
    plain = plain_pool.remove_columns("embedding")
    assert {line.k for line in what_if(plain, plain_selected)} == {12}
    with pytest.raises(ValueError, match="'embedding'"):
        what_if(plain, plain_selected, k=[5])


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"n1": [301]}, "n1=301 must be between 0 and the 300 rows"),
        ({"n2": [-1]}, "n2=-1 must be"),
        ({"n1": [0], "n2": [0]}, "n1=0 and n2=0 select no rows"),
        ({"k": [0]}, "k=0 must be between 1 and the 300 rows"),
        ({"k": [301]}, "k=301 must be"),
        ({"n1": 60}, r"n1=60 must be the numbers to try, such as n1=\[1, 10\]"),
        ({"k": []}, r"k=\[\] must be the numbers to try"),
    ],
)
def test_numbers_that_do_not_fit(
    plain_pool: Dataset, plain_selected: Dataset, numbers: dict[str, list[int]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        what_if(plain_pool, plain_selected, **numbers)


def test_pool_and_selection_in_the_wrong_order(plain_pool: Dataset, plain_selected: Dataset) -> None:
    with pytest.raises(ValueError, match=r"no column \['selected_by'\].* Pass the pool first"):
        what_if(plain_selected, plain_pool)
