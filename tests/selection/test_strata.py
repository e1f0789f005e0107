"""Budgets that are shared out among the values of a column."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset

from car_datasets.selection.strata import parse_quota, quotas_of, read_strata, refuse_unknown_values, whole_quotas


@pytest.mark.parametrize(
    ("budget", "weights", "capacities", "expected"),
    [
        (10, [1, 1, 1], [9, 9, 9], [4, 3, 3]),  # the first of equal remainders
        (100, [0.29, 0.71], [99, 99], [29, 71]),  # 0.29 * 100 is 28.999999999999996
        (10, [1, 1, 1], [9, 1, 9], [5, 1, 4]),  # what the second cannot use is shared, not given to one
        (12, [1, 1, 4], [2, 9, 3], [2, 7, 3]),
        (10, [0, 1], [9, 4], [0, 4]),  # no weight, no part, even where budget is left
        (9, [1, 1], [2, 3], [2, 3]),
        (0, [1, 1], [2, 3], [0, 0]),
    ],
)
def test_whole_parts_add_up_and_pass_on_what_is_not_used(
    budget: int, weights: list[float], capacities: list[int], expected: list[int]
) -> None:
    assert whole_quotas(budget, weights, capacities).tolist() == expected


def test_a_quota_passes_its_unused_rows_to_the_values_that_it_does_not_name_first() -> None:
    values = ["code"] * 5 + ["chat"] * 90 + ["web"] * 30 + ["wiki"] * 15
    every = np.ones(len(values), dtype=bool)
    shares = quotas_of(values, None, every, 100, {"code": 0.2, "chat": 0.5})
    assert dict(zip(shares.names, shares.quotas.tolist(), strict=True)) == {"code": 5, "chat": 50, "": 45}
    assert quotas_of(values, None, every, 110, {"code": 0.2, "chat": 0.5}).quotas.tolist() == [5, 60, 45]
    # In tokens, and with rows that may not be selected.
    costs = np.full(len(values), 10)
    some = np.array([value != "chat" for value in values])
    assert quotas_of(values, costs, some, 400, None).quotas.tolist() == [0, 50, 200, 150]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("code:0.2", "write COLUMN=VALUE:SHARE"),
        ("source=code", "write COLUMN=VALUE:SHARE"),
        ("source=code:many", "the share 'many' must be a number from 0 to 1"),
        ("source=code:1.2", "the share '1.2' must be"),
        ("source=code:nan", "the share 'nan' must be"),
        ("source=code:0.6,chat:0.5", "the shares are 1.1 in total"),
        ("source=code:0.1,code:0.2", "names 'code' twice"),
    ],
)
def test_a_quota_that_cannot_be_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_quota(text)


def test_values_of_columns() -> None:
    assert parse_quota("a=x:y:0.5, z:0.25") == ("a", {"x:y": 0.5, "z": 0.25})  # only the last colon divides
    rows = Dataset.from_dict({"source": ["a", None, "b"], "year": [1, 2, 2], "share": [0.1, 0.2, 0.3]})
    assert read_strata(rows, "source") == ["a", "null", "b"]
    assert read_strata(rows, "year") == ["1", "2", "2"]
    for column, words in (("sourse", "There is no column 'sourse'"), ("share", "holds double")):
        with pytest.raises(ValueError, match=words):
            read_strata(rows, column)
    with pytest.raises(ValueError, match=r"no row has 'c' in the column 'source', which has .'a', 'b'"):
        refuse_unknown_values(["a", "b"], "source", {"a": 0.5, "c": 0.1})
