"""combining.py: scores of any scale make one, row by row in their order; rows that lack one get none."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from scipy.stats import rankdata, zscore
from typer.testing import CliRunner

from car_datasets import (
    ColumnNames,
    SelectionReport,
    cluster_filter,
    combine_scores,
    explain,
    select_car,
    select_car_streaming,
    what_if,
)
from car_datasets.cli import app
from car_datasets.publishing.push import selection_splits
from car_datasets.reporting.overview import row_lengths

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


# --- read wherever a score is read


@pytest.fixture
def pool() -> Dataset:
    """Return rows with a combined score and no other that a selection reads by default."""
    texts = {"instruction": [f"Say {i}" for i in range(40)], "output": ["word"] * 40, "source_index": list(range(40))}
    judged = {"a_tokens": [3] * 40, "a_status": ["ok"] * 40, "cluster": [i % 4 for i in range(40)]}
    embedded = {"embedding": RNG.normal(size=(40, 3)).astype(np.float32).tolist()}
    gaps = [None if i == 7 else float(x) for i, x in enumerate(A)]
    return combine_scores(rows(**texts, **judged, **embedded, a_score=gaps), {"a_score": 1, "b": -0.5})


def test_every_reader_of_a_score_reads_a_combined_one(pool: Dataset) -> None:
    names = ColumnNames(score="combined_score")
    scores = np.array(pool["combined_score"][:], float)
    best = np.argsort(-np.nan_to_num(scores, nan=-1))[:5].tolist()
    chosen = select_car(pool, n1=5, n2=0, score_column="combined_score")
    assert sorted(chosen["source_index"]) == sorted(best)
    streamed = select_car_streaming(pool.to_iterable_dataset(), n1=5, n2=0, score_column="combined_score")
    assert sorted(row["source_index"] for row in streamed) == sorted(best)
    unlabelled = pool.remove_columns("cluster")
    filtered = cluster_filter(unlabelled, score_column="combined_score", n1=5, n2=0, k=2)
    assert sorted(filtered["source_index"]) == sorted(best)
    report = SelectionReport.from_selection(pool, chosen, names=names)
    assert (report.rows_in, report.rows_scored) == (40, 39)
    assert report.selected.mean_score == pytest.approx(scores[best].mean())
    assert explain(pool, chosen, best[0], names=names).score_rank == 1
    assert explain(pool, chosen, 7, names=names).score is None
    assert what_if(pool, chosen, n1=[5], names=names)[0].in_common == 5
    drawn = selection_splits(chosen, pool, ("random_control",), names=names)["random_control"]
    assert len(drawn) == 5 and 7 not in drawn["source_index"]
    with pytest.raises(ValueError, match=r"no column \['iqs_score'\].*score_column=\.\.\."):
        selection_splits(chosen, pool, ("random_control",))


def test_what_scorers_say_is_no_text_of_a_row(pool: Dataset) -> None:
    plain = pool.remove_columns(["a_status", "a_tokens", "language"])
    assert row_lengths(plain)[0].tolist() == row_lengths(pool.remove_columns("language"))[0].tolist()


@pytest.mark.parametrize("column", ["combined_score", "score"])
def test_the_command_line_selects_by_it(column: str, pool: Dataset, tmp_path: Path) -> None:
    """A user's column called `score` was taken for the original's, and renamed."""
    pool.rename_columns({"combined_score": column} if column != "combined_score" else {}).to_parquet(
        tmp_path / "in.parquet"
    )
    arguments = ["--n1", "5", "--n2", "0", "--score-column", column]
    done = CliRunner().invoke(app, ["select", f"{tmp_path}/in.parquet", "-o", f"{tmp_path}/out.parquet", *arguments])
    assert done.exit_code == 0, done.stderr
    found = Dataset.from_parquet(f"{tmp_path}/out.parquet")
    assert found["source_index"][:] == select_car(pool, 5, 0, score_column="combined_score")["source_index"][:]
    assert column in found.column_names
