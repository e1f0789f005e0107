"""combining.py: scores of any scale make one, row by row in their order; rows that lack one get none."""

from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from scipy.stats import rankdata, zscore

from car_datasets import combine_scores

RNG = np.random.default_rng(0)
A, B = RNG.normal(size=40), RNG.exponential(size=40) * 1e6
GROUPS = [("en", "de", None)[i % 3] for i in range(40)]


def rows(**columns: Any) -> Dataset:
    return Dataset.from_dict({"a_score": A, "b": B, "language": GROUPS, **columns})


@pytest.mark.parametrize("within", [None, "language"])
@pytest.mark.parametrize(
    ("how", "scale"), [("rank", lambda x: (rankdata(x) - 0.5) / len(x)), ("zscore", lambda x: zscore(x))]
)
def test_a_sum_of_scaled_scores(how: str, scale: Any, within: str | None) -> None:
    expected = np.empty(40)
    for group in {*GROUPS} if within else {None}:
        places = np.flatnonzero([within is None or value == group for value in GROUPS])
        expected[places] = (2 * scale(A[places]) - scale(B[places])) / 3
    found = combine_scores(rows(), {"a_score": 2, "b": -1}, how, within)
    assert found["combined_score"][:] == pytest.approx(expected)
    assert found.column_names == ["a_score", "b", "language", "combined_score"]
    assert found.features["combined_score"].dtype == "float64"
    assert found.remove_columns("combined_score").to_dict() == rows().to_dict()


@pytest.mark.parametrize("how", ["rank", "zscore"])
def test_rows_that_lack_a_score_get_none_and_move_no_other(how: str) -> None:
    gaps = rows(
        a_score=[None if i == 3 else x for i, x in enumerate(A)], b=[np.nan if i == 5 else x for i, x in enumerate(B)]
    )
    found = combine_scores(gaps, {"a_score": 1, "b": 1}, how)["combined_score"][:]
    kept = [i for i in range(40) if i not in (3, 5)]
    assert [found[3], found[5]] == [None, None]
    alone = combine_scores(rows().select(kept), {"a_score": 1, "b": 1}, how)
    assert [found[i] for i in kept] == alone["combined_score"][:]


def test_equal_scores_share_their_place_and_tell_nothing() -> None:
    same = rows(a_score=[0.1] * 40)
    assert combine_scores(same, {"a_score": 1})["combined_score"][:] == [0.5] * 40
    assert combine_scores(same, {"a_score": 1}, how="zscore")["combined_score"][:] == [0.0] * 40
    ties = Dataset.from_dict({"x": [1, 2, 2, 3]})
    assert combine_scores(ties, {"x": 1})["combined_score"][:] == [0.125, 0.5, 0.5, 0.875]


def test_shuffled_and_formatted_rows_keep_their_scores() -> None:
    order = RNG.permutation(40).tolist()
    plain = combine_scores(rows(), {"a_score": 1, "b": 1}, within="language")["combined_score"][:]
    shuffled = combine_scores(rows().select(order).with_format("numpy"), {"a_score": 1, "b": 1}, within="language")
    assert list(shuffled.with_format(None)["combined_score"]) == [plain[i] for i in order]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": {}}, "weights={} must map columns of scores"),
        ({"weights": ["a_score"]}, r"weights=\['a_score'\] must map"),
        ({"weights": {"a_score": 0}}, "weights has 'a_score': 0; a weight is a number other than 0"),
        ({"weights": {"a_score": float("nan")}}, "weights has 'a_score': nan"),
        ({"weights": {"a_score": "1"}}, "weights has 'a_score': '1'"),
        ({"weights": {"a_score": True}}, "weights has 'a_score': True"),
        ({"weights": {"c": 1}}, r"The dataset has no column \['c'\]"),
        ({"weights": {"language": 1}}, "The column 'language' holds string, not numbers"),
        ({"how": "mean"}, r"how='mean' is not known; choose one of \['rank', 'zscore'\]"),
        ({"within": "source"}, r"The dataset has no column \['source'\]"),
        ({"output_column": "b"}, r"already has the column\(s\) \['b'\].*output_column"),
        ({"dataset": rows(b=[np.inf] * 40)}, "The column 'b' holds infinite scores in 40 rows"),
        ({"dataset": rows(b=[None] * 40)}, r"No row has a score in all of the columns.*'b' has 0 of 40"),
        ({"dataset": rows().to_iterable_dataset()}, "combine_scores reads a Dataset, and this is a stream"),
        ({"dataset": rows(chat=[[1]] * 40), "within": "chat"}, "within='chat' holds .*one text or number per row"),
    ],
)
def test_mistakes_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        combine_scores(**{"dataset": rows(), "weights": {"a_score": 1, "b": 1}, **arguments})
