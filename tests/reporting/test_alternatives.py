"""alternatives.py: every line of `what_if` is the selection that select_car makes of those numbers."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset

from car_datasets import select_car, what_if
from tests.reporting.test_plots import make_pool


@pytest.fixture(scope="module")
def pool() -> Dataset:
    return make_pool()


@pytest.fixture(scope="module")
def selected(pool: Dataset) -> Dataset:
    return select_car(pool, 40, 1)


def test_every_line_is_what_select_car_takes(pool: Dataset, selected: Dataset) -> None:
    present = set(selected["source_index"][:])
    lines = what_if(pool, selected, n1=[0, 10, 100], n2=[1, 3])
    assert [(line.n1, line.n2) for line in lines] == [(0, 1), (0, 3), (10, 1), (10, 3), (100, 1), (100, 3)]
    for line in lines:
        other = select_car(pool, line.n1, line.n2, allow_worse=True)
        rows = set(other["source_index"][:])
        assert line.rows == len(other)
        assert line.mean_score == pytest.approx(np.mean(other["iqs_score"][:]))
        assert (line.k, line.clusters_covered) == (12, len(set(other["cluster"][:])))
        assert line.in_common == len(rows & present)
        assert line.overlap == pytest.approx(len(rows & present) / len(rows | present))


def test_the_present_choice_is_found_and_overlaps_wholly(pool: Dataset, selected: Dataset) -> None:
    lines = what_if(pool, selected)
    [present] = [line for line in lines if (line.n1, line.n2, line.k) == (40, 1, 12)]
    assert (present.overlap, present.in_common) == (1.0, len(selected))
    assert {line.k for line in lines} == {6, 12, 24}
    assert all(line.rows > 0 for line in lines)


def test_another_k_makes_so_many_clusters(pool: Dataset, selected: Dataset) -> None:
    one, again = (what_if(pool, selected, n1=[0], n2=[1], k=[4, 12, 30]) for _ in range(2))
    assert one == again
    assert [line.k for line in one] == [4, 12, 30]
    assert [line.rows for line in one] == [line.clusters_covered for line in one]
    assert one[0].rows == 4
    assert one[2].rows > 20


def test_without_embeddings_k_stays(pool: Dataset, selected: Dataset) -> None:
    plain = pool.remove_columns("embedding")
    assert {line.k for line in what_if(plain, selected)} == {12}
    with pytest.raises(ValueError, match="'embedding'"):
        what_if(plain, selected, k=[5])


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
def test_numbers_that_do_not_fit(pool: Dataset, selected: Dataset, numbers: dict[str, list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        what_if(pool, selected, **numbers)
