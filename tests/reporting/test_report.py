"""report.py: every figure against the same figure computed by hand, the two controls, and the four ways to print them."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, fields, replace
from io import StringIO
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from markdown_it import MarkdownIt
from rich.console import Console

from car_datasets import SelectionReport, select_car
from car_datasets.reporting.likes import ScoreByGroup
from car_datasets.reporting.overview import LENGTH_BINS, Overview, length_matched, row_lengths
from car_datasets.reporting.report import QUANTILES, GroupFigures
from car_datasets.utils.column_names import ColumnNames


@pytest.fixture(scope="module")
def pool() -> Dataset:
    """Return ten rows in four clusters: eight scored, of which two are marked; two rejected."""
    return Dataset.from_dict(
        {
            "source_index": [100 + i for i in range(10)],
            "text": ["x" * (i + 1) for i in range(10)],
            "iqs_score": [0.1, 0.9, 0.3, None, 0.5, 0.7, 0.2, None, 0.8, 0.4],
            "iqs_tokens": [10, 90, 30, 0, 50, 70, 20, 0, 80, 40],
            "iqs_status": [
                *("ok", "truncated", "ok", "null", "ok", "ok", "empty_response", "not_a_string", "truncated", "ok")
            ],
            "cluster": [0, 1, 0, 2, 0, 1, 3, None, 1, None],
        }
    )


@pytest.fixture(scope="module")
def selected(pool: Dataset) -> Dataset:
    return select_car(pool, n1=2, n2=1)


@pytest.fixture(scope="module")
def report(pool: Dataset, selected: Dataset) -> SelectionReport:
    return SelectionReport.from_selection(pool, selected)


def figures_of(pool: Dataset, rows: list[int]) -> GroupFigures:
    """Compute in plain Python, the quantiles by linear interpolation between the two nearest scores."""
    scores, tokens, clusters = (pool[name][:] for name in ("iqs_score", "iqs_tokens", "cluster"))
    ordered = sorted(scores[i] for i in rows)
    quantiles = {}
    for q in QUANTILES:
        place = q * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        quantiles[str(q)] = pytest.approx(ordered[low] + (place - low) * (ordered[high] - ordered[low]))
    return GroupFigures(
        rows=len(rows),
        mean_score=pytest.approx(sum(ordered) / len(rows)),
        score_quantiles=quantiles,
        mean_length=pytest.approx(sum(tokens[i] for i in rows) / len(rows)),
        clusters=len({clusters[i] for i in rows} - {None}),
    )


@pytest.mark.parametrize("score", [float("inf"), -float("inf"), 1e308])
def test_scores_without_a_mean_are_named(score: float, pool: Dataset, selected: Dataset) -> None:
    absurd = [score if old == 0.3 else old for old in pool["iqs_score"]]
    pool = pool.remove_columns("iqs_score").add_column("iqs_score", absurd)
    with pytest.raises(ValueError, match=r"'iqs_score' holds infinite or absurd scores in 1 rows, the first \[2\]"):
        SelectionReport.from_selection(pool, selected)


# the figures ----------------------------------------------------------------------------------------------------------


def test_many_details_of_one_status_are_counted_together(pool: Dataset, selected: Dataset) -> None:
    statuses = [*(f"unknown_role: {c}" for c in "aabcdefg"), "tool_call", "ok"]
    found = SelectionReport.from_selection(
        pool.remove_columns("iqs_status").add_column("iqs_status", statuses), selected
    )
    assert found.marked == {"tool_call": 1}
    assert found.rejected["unknown_role: a"] == found.rejected["unknown_role: others"] == 2
    assert len(found.rejected) == 6 and sum(found.rejected.values()) == 8


def test_counts_of_a_small_selection(report: SelectionReport, selected: Dataset) -> None:
    assert selected["source_index"][:] == [101, 108, 104, 106]  # 0.9 and 0.8 by score; the best of clusters 0 and 3
    assert (report.rows_in, report.rows_scored) == (10, 8)
    assert report.rejected == {"null": 1, "not_a_string": 1}
    assert report.marked == {"truncated": 2, "empty_response": 1}
    assert report.selected_by == {"score": 1, "cluster": 2, "both": 1}
    assert (report.clusters, report.clusters_by_score) == (4, 1)
    assert report.length_unit == "tokens"
    assert report.seed == 42


def test_figures_of_pool_and_selection(report: SelectionReport, pool: Dataset) -> None:
    assert report.pool == figures_of(pool, [0, 1, 2, 4, 5, 6, 8, 9])
    assert report.selected == figures_of(pool, [1, 8, 4, 6])
    assert report.selected.mean_score == pytest.approx(0.6)
    assert report.selected.score_quantiles["0.5"] == pytest.approx(0.65)
    assert report.selected.mean_length == pytest.approx(60)
    assert (report.pool.clusters, report.selected.clusters) == (3, 3)  # cluster 2 holds no row with a score


def test_correlation_with_length() -> None:
    pool = Dataset.from_dict({"iqs_score": [1.0, 2.0, 3.0, 10.0], "iqs_tokens": [1, 2, 3, 4], "cluster": [0] * 4})
    found = SelectionReport.from_selection(pool, select_car(pool, 2)).score_length_correlation
    assert found == {"pearson": pytest.approx(np.corrcoef([1, 2, 3, 10], [1, 2, 3, 4])[0, 1]), "spearman": 1.0}


@pytest.mark.parametrize(
    ("scores", "tokens"),
    [([1.0, 1.0], [1, 2]), ([1.0, 2.0], [3, 3]), ([1.0], [1])],
    ids=["scores", "tokens", "one row"],
)
def test_no_correlation_where_nothing_varies(scores: list[float], tokens: list[int]) -> None:
    pool = Dataset.from_dict({"iqs_score": scores, "iqs_tokens": tokens, "cluster": [0] * len(scores)})
    report = SelectionReport.from_selection(pool, select_car(pool, 1))
    assert report.score_length_correlation == {"pearson": 0.0, "spearman": 0.0}
    assert json.loads(report.to_json(), parse_constant=pytest.fail) == report.to_dict()  # no NaN in the file


def test_without_a_status_column_rows_without_a_score_are_counted(pool: Dataset, selected: Dataset) -> None:
    report = SelectionReport.from_selection(pool.remove_columns("iqs_status"), selected)
    assert (report.rows_scored, report.rejected, report.marked) == (8, {"no_score": 2}, {})


def test_other_column_names(pool: Dataset, report: SelectionReport) -> None:
    names = {old: old.replace("iqs", "quality") for old in ("iqs_score", "iqs_tokens", "iqs_status")}
    other = pool.rename_columns({**names, "cluster": "topic", "source_index": "id"})
    options = {"score_column": "quality_score", "cluster_column": "topic", "index_column": "id"}
    chosen = select_car(other, 2, 1, **options)
    columns = ColumnNames(score="quality_score", cluster="topic", index="id")
    assert SelectionReport.from_selection(other, chosen, names=columns) == report


def test_columns_of_the_stages_are_not_the_users() -> None:
    names = ColumnNames(score="quality", embedding="vector")
    pool = Dataset.from_dict({"quality": [0.5, 1.0], "cluster": [0, 0], "vector": [[1.0], [2.0]], "source": ["a", "b"]})
    for column in (*names.diagnostics, "score_rank"):
        pool = pool.add_column(column, [0, 0])
    chosen = select_car(pool.remove_columns("score_rank"), 1, 0, score_column="quality")
    assert Overview.of(pool, chosen, names=names).user_columns == ["source"]


@pytest.mark.parametrize("kind", ["arrow", "numpy", "torch", "pandas"])
def test_the_format_of_the_datasets_changes_nothing(
    pool: Dataset, selected: Dataset, report: SelectionReport, kind: str
) -> None:
    again = SelectionReport.from_selection(pool.with_format(kind), selected.with_format(kind))
    assert again == report
    assert again.to_json() == report.to_json()


# lengths --------------------------------------------------------------------------------------------------------------


def test_length_is_in_tokens_where_the_scorer_kept_them(pool: Dataset) -> None:
    lengths, unit = row_lengths(pool)
    assert (lengths.tolist(), unit) == (pool["iqs_tokens"][:], "tokens")


def test_length_is_in_characters_where_there_are_no_tokens() -> None:
    texts = {"instruction": ["ab", None, "äö€"], "output": ["c", "def", "\U0001f600"], "n": [1, 2, 3]}
    lengths, unit = row_lengths(Dataset.from_dict(texts))
    assert (lengths.tolist(), unit) == ([3, 3, 4], "characters")


def test_length_of_another_score_is_not_that_of_iqs(pool: Dataset) -> None:
    assert (
        row_lengths(pool.select_columns(["text", "iqs_tokens"]), ColumnNames(score="quality_score"))[1] == "characters"
    )


def test_a_status_is_no_text(pool: Dataset) -> None:
    lengths, unit = row_lengths(pool.select_columns(["text", "iqs_status"]))
    assert (lengths.tolist(), unit) == ([float(i + 1) for i in range(10)], "characters")


def test_chats_have_a_length_too() -> None:
    chats = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "x" * n}] for n in range(1, 21)]
    pool = Dataset.from_dict({"messages": chats, "iqs_score": np.arange(20.0), "cluster": [0] * 20})
    report = SelectionReport.from_selection(pool, select_car(pool, 5))
    assert report.pool.mean_length > 0
    assert report.score_length_correlation["spearman"] == pytest.approx(1.0)


# the controls ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large() -> Dataset:
    """Return a thousand rows whose score grows with their length; 50 have no score."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 400, 1000)
    scores = np.where(np.arange(1000) % 20 == 3, np.nan, tokens / 100 + rng.normal(size=1000))
    return Dataset.from_dict({"iqs_score": scores, "iqs_tokens": tokens, "cluster": rng.integers(0, 30, 1000)})


def test_controls_have_the_size_of_the_selection(large: Dataset) -> None:
    for n1 in (1, 60, 950):
        selected = select_car(large, n1, 0)
        report = SelectionReport.from_selection(large, selected)
        assert report.random_control.rows == report.length_matched_control.rows == report.selected.rows == n1


def test_controls_of_all_rows_are_all_rows(large: Dataset) -> None:
    report = SelectionReport.from_selection(large, select_car(large, 950, 0))
    for control in (report.random_control, report.length_matched_control):
        assert control.mean_score == pytest.approx(report.pool.mean_score)
        assert control.score_quantiles == report.pool.score_quantiles
        assert control.clusters == report.pool.clusters


def test_what_the_controls_are_for(large: Dataset) -> None:
    """Use a pool whose long rows score well: the random control is as short as the pool, the matched one is not."""
    report = SelectionReport.from_selection(large, select_car(large, 100, 1))
    assert report.selected.mean_length > report.pool.mean_length + 50
    assert report.random_control.mean_length == pytest.approx(report.pool.mean_length, abs=40)
    assert report.length_matched_control.mean_length == pytest.approx(report.selected.mean_length, abs=10)
    assert report.random_control.mean_score < report.length_matched_control.mean_score < report.selected.mean_score


def test_the_seed_draws_the_controls_and_nothing_else(large: Dataset) -> None:
    selected = select_car(large, 60, 1)
    one, again, other = (asdict(SelectionReport.from_selection(large, selected, seed=s)) for s in (1, 1, 2))
    assert one == again
    differing = {name for name in one if one[name] != other[name]}
    assert differing == {"random_control", "length_matched_control", "seed"}


def bins_of(lengths: np.ndarray, rows: np.ndarray, scored: np.ndarray) -> Counter[int]:
    """Count how many of `rows` fall between the same inner edges of LENGTH_BINS equal parts of the scored pool."""
    edges = [float(np.quantile(lengths[scored], i / LENGTH_BINS)) for i in range(1, LENGTH_BINS)]
    return Counter(sum(edge <= lengths[row] for edge in edges) for row in rows)


@pytest.mark.parametrize("seed", range(5))
def test_the_length_matched_control_has_the_lengths_of_the_selection(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.permutation(np.arange(1.0, 801.0))
    scored = np.sort(rng.choice(800, 700, replace=False))
    positions = rng.choice(scored[lengths[scored] > 300], 90, replace=False)
    drawn = length_matched(lengths, positions, scored, rng)
    assert len(set(drawn.tolist())) == len(drawn) == 90
    assert set(drawn.tolist()) <= set(scored.tolist())
    assert set(drawn.tolist()) != set(positions.tolist())
    assert bins_of(lengths, drawn, scored) == bins_of(lengths, positions, scored)


@pytest.mark.parametrize("counts", [(52, 48), (32, 40, 28), (97, 3), (100,)], ids=str)
def test_lengths_that_many_rows_share_are_matched_too(counts: tuple[int, ...]) -> None:
    """Use lengths that most rows share, as where texts were cut at the model's limit."""
    lengths = np.repeat([8.0, 64.0, 512.0][: len(counts)], counts)
    positions = np.array([0, 1, 97, 98, 99])
    for seed in range(5):
        drawn = length_matched(lengths, positions, np.arange(100), np.random.default_rng(seed))
        assert sorted(lengths[drawn]) == sorted(lengths[positions])


# rows that do not fit -------------------------------------------------------------------------------------------------


def test_without_an_index_column_the_pools_rows_are_counted_from_0(pool: Dataset, report: SelectionReport) -> None:
    plain = pool.remove_columns("source_index")
    assert SelectionReport.from_selection(plain, select_car(plain, 2, 1)) == report


def test_the_order_of_pool_and_selection_does_not_matter(pool: Dataset, selected: Dataset) -> None:
    report = SelectionReport.from_selection(pool, selected)
    again = SelectionReport.from_selection(pool.shuffle(seed=1), selected.shuffle(seed=2))
    assert again.selected.score_quantiles == report.selected.score_quantiles
    assert (again.clusters_by_score, again.selected_by) == (report.clusters_by_score, report.selected_by)
    assert again.rejected == report.rejected


def test_ids_may_be_text(pool: Dataset, report: SelectionReport) -> None:
    named = pool.remove_columns("source_index").add_column("source_index", [f"row {i}" for i in range(10)])
    assert SelectionReport.from_selection(named, select_car(named, 2, 1)) == report


def test_selected_rows_that_are_not_in_the_pool_are_named(pool: Dataset, selected: Dataset) -> None:
    with pytest.raises(
        ValueError, match=r"2 selected rows are not in the pool by 'source_index', the first \[108, 106\]"
    ):
        SelectionReport.from_selection(pool.select([0, 1, 2, 3, 4]), selected)


def test_positions_beyond_the_pool_are_named(pool: Dataset) -> None:
    plain = pool.remove_columns("source_index")
    with pytest.raises(ValueError, match=r"2 selected rows are not in the pool.*\[8, 6\]"):
        SelectionReport.from_selection(plain.select(range(5)), select_car(plain, 2, 1))


def test_ids_that_are_not_unique_are_refused(pool: Dataset) -> None:
    twice = pool.remove_columns("source_index").add_column("source_index", [0, 1, 2, 3, 4] * 2)
    with pytest.raises(ValueError, match=r"'source_index'"):
        SelectionReport.from_selection(twice, select_car(twice, 2, 1))


@pytest.mark.parametrize("column", ["iqs_score", "cluster"])
def test_a_pool_without_scores_or_clusters_is_refused(pool: Dataset, selected: Dataset, column: str) -> None:
    with pytest.raises(ValueError, match=column):
        SelectionReport.from_selection(pool.remove_columns(column), selected)


# the four ways to print -----------------------------------------------------------------------------------------------


def test_json_holds_every_figure_in_order(report: SelectionReport) -> None:
    plain = json.loads(report.to_json())
    assert list(plain) == [field.name for field in fields(SelectionReport)]
    assert SelectionReport.from_dict(plain) == report


def cells(table: list[Any]) -> list[list[str]]:
    """Return the rows of a parsed Markdown table."""
    rows: list[list[str]] = []
    for token in table:
        if token.type == "tr_open":
            rows.append([])
        elif token.type == "inline":
            rows[-1].append(token.content)
    return rows


def test_markdown_is_a_title_a_list_and_a_valid_table(large: Dataset) -> None:
    report = SelectionReport.from_selection(large, select_car(large, 60, 1))
    tokens = MarkdownIt("commonmark").enable("table").parse(report.to_markdown())
    blocks = [token.type for token in tokens if token.level == 0 and token.nesting == 1]
    assert blocks == ["heading_open", "paragraph_open", "bullet_list_open", "table_open", "heading_open", "table_open"]
    first, second = (i for i, token in enumerate(tokens) if token.type == "table_open")
    end = next(i for i, token in enumerate(tokens) if token.type == "table_close")
    assert cells(tokens[first:end]) == report.comparison()
    most = max(report.named_clusters, key=lambda label: report.named_clusters[label].selected)
    assert len(cells(tokens[second:])) == 21
    named = report.named_clusters[cells(tokens[second:])[1][0]]
    assert named.selected == report.named_clusters[most].selected
    assert cells(tokens[second:])[1][3:] == [str(named.rows), str(named.selected)]
    assert " ".join(report.verdict()) in [token.content for token in tokens if token.type == "inline"]
    assert [token.content for token in tokens if token.type == "inline" and token.level == 3] == report.sentences()


def test_the_comparison_holds_the_numbers(report: SelectionReport) -> None:
    header, *rows = report.comparison()
    assert header == ["", "pool", "selected", "random control", "length-matched control"]
    by_name = {name: values for name, *values in rows}
    assert by_name["rows"] == ["8", "4", "4", "4"]
    assert float(by_name["mean score"][0]) == pytest.approx(0.4875, abs=6e-4)
    assert by_name["mean score"][1] == "0.600"
    assert by_name["lowest score"][:2] == ["0.100", "0.200"]
    assert by_name["median score"][:2] == ["0.450", "0.650"]
    assert by_name["highest score"][:2] == ["0.900", "0.900"]
    assert by_name["95 % quantile"][:2] == ["0.865", "0.885"]
    assert by_name["mean length (tokens)"][:2] == ["48.8", "60.0"]
    assert by_name["clusters"][:2] == ["3", "3"]
    assert len(rows) == 4 + len(QUANTILES)


def test_the_sentences_hold_the_counts(report: SelectionReport) -> None:
    scored, marked, chosen, covered, correlation = report.sentences()
    assert scored == "10 rows in, 8 scored, 2 rejected (1 null, 1 not_a_string)"
    assert marked == "scored but marked: 3 (2 truncated, 1 empty_response)"
    assert (
        chosen
        == "4 selected (40.00 % of the rows in) with n1 = 2: 1 by score, 1 by both, 2 added by clustering (50.0 %)"
    )
    assert covered == "3 of 4 clusters covered; the rows taken by score alone cover 1"
    assert correlation == "score against length in tokens: Pearson +1.00, Spearman +1.00"


@pytest.mark.parametrize(
    ("change", "second"),
    [
        (
            {},
            "Clustering added 2 rows (the best by score reach 1 of 4 clusters by themselves), and too few rows have a",
        ),
        (
            {"selected_by": {"score": 0, "cluster": 0, "both": 0, "gain": 4}},
            "They come from 3 of 4 clusters, and too few",
        ),
        (
            {"score_by": {"a": ScoreByGroup(1000, 100, 100, 0.1, {"x": 0.5}, {"x": 0.5}, {"x": 0.4})}},
            "score follows the",
        ),
        (
            {"score_by": {"a": ScoreByGroup(1000, 100, 100, 0.1, {"x": 0.5}, {"x": 0.1}, {"x": 0.4})}},
            "all but loses x (a)",
        ),
    ],
)
def test_the_verdict_is_two_sentences(report: SelectionReport, change: dict[str, Any], second: str) -> None:
    told = replace(report, **change).verdict()
    assert told[0] == (
        "4 of 10 rows were selected (40.0 %): their mean score is 0.60, against 0.49 in the pool and "
        f"{report.length_matched_control.mean_score:.2f} in as many rows of the same lengths drawn at random."
    )
    assert second in told[1] and len(told) == 2


def test_large_numbers_are_grouped() -> None:
    pool = Dataset.from_dict({"iqs_score": np.arange(12_000.0), "cluster": np.zeros(12_000, int)})
    report = SelectionReport.from_selection(pool, select_car(pool, 1500))
    assert report.sentences()[0] == "12,000 rows in, 12,000 scored, 0 rejected"
    assert report.comparison()[1] == ["rows", "12,000", "1,500", "1,500", "1,500"]


def test_the_terminal_table_shows_every_cell_and_sentence(report: SelectionReport) -> None:
    console = Console(file=StringIO(), width=120)
    console.print(report.to_table())
    shown = console.file.getvalue()
    for row in report.comparison():
        assert any(all(cell in line for cell in row) for line in shown.splitlines()), row
    for sentence in report.sentences():
        assert sentence in " ".join(shown.split()), sentence
