"""plots.py: complete PNG files of the promised width, equal for equal input, whatever the pool looks like."""

from __future__ import annotations

import itertools
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from car_datasets import SelectionReport, select_car
from car_datasets.reporting.maps import map_of
from car_datasets.reporting.naming import NamedCluster
from car_datasets.reporting.overview import Overview
from car_datasets.reporting.plots import (
    PLOT_FILES,
    PLOTS,
    STYLE,
    Plot,
    can_draw,
    colours_of,
    draw,
    draw_clusters,
    draw_lengths,
    draw_map,
    draw_scores,
    plot_file,
)

WITHOUT_MAP = [name for name, plot in PLOTS.items() if not plot.needs_map]


def make_pool(rows: int = 300, clusters: int = 12, **changes: Any) -> Dataset:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, clusters, rows)
    columns = {
        "source_index": np.arange(rows),
        "text": [f"text {i}" for i in range(rows)],
        "iqs_score": rng.normal(size=rows).astype(np.float32),
        "iqs_tokens": rng.integers(5, 500, rows),
        "cluster": labels,
        "embedding": list(rng.normal(size=(clusters, 8))[labels] + rng.normal(size=(rows, 8)) / 4),
    }
    return Dataset.from_dict({**columns, **changes})


@pytest.fixture(scope="module")
def pool() -> Dataset:
    return make_pool()


@pytest.fixture(scope="module")
def selected(pool: Dataset) -> Dataset:
    return select_car(pool.remove_columns("embedding"), 40, 1)


def test_plot_writes_every_figure_as_wide_as_a_card(pool: Dataset, selected: Dataset, tmp_path: Path) -> None:
    report = SelectionReport.from_selection(pool, selected)
    paths = report.plot(tmp_path / "a" / "new", pool, selected)
    assert [path.name for path in paths] == list(PLOT_FILES)
    for path in paths:
        content = path.read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        assert struct.unpack(">I", content[16:20]) == (960,)
        assert b"matplotlib" not in content  # no version, which would make equal figures differ
    again = report.plot(tmp_path / "again", pool, selected)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in paths]


def test_without_embeddings_there_is_no_map(pool: Dataset, selected: Dataset, tmp_path: Path) -> None:
    report = SelectionReport.from_selection(pool, selected)
    paths = report.plot(tmp_path, pool.remove_columns("embedding"), selected)
    assert [path.name for path in paths] == [plot_file(name) for name in WITHOUT_MAP]


def test_a_figure_is_a_function_and_a_row_of_the_table(
    pool: Dataset, selected: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tuple(plot_file(name) for name in PLOTS) == PLOT_FILES

    def draw_toy(overview: Overview) -> Any:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4))
        figure.add_subplot().plot(overview.scores)
        return figure

    monkeypatch.setitem(PLOTS, "toy", Plot(draw_toy, "Scores in the order of the rows."))
    report = SelectionReport.from_selection(pool, selected)
    paths = report.plot(tmp_path, pool, selected)
    assert [path.name for path in paths] == [*PLOT_FILES, "plot_toy.png"]
    assert (tmp_path / "plot_toy.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert 'alt="Scores in the order of the rows."' in report.to_html(pool, selected)


def texts_in(figure: Any) -> list[str]:
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def test_figures_name_what_they_show(pool: Dataset, selected: Dataset) -> None:
    seen = Overview.of(pool, selected)
    groups = [text for text in texts_in(draw_scores(seen)) if "rows, mean" in text]
    report = SelectionReport.from_selection(pool, selected)
    assert groups == [
        f"{name}: {group.rows} rows, mean {group.mean_score:.2f}"
        for name, group in (
            ("pool", report.pool),
            ("selected", report.selected),
            ("random control", report.random_control),
            ("length-matched control", report.length_matched_control),
        )
    ]
    both = report.score_length_correlation
    title = f"Score and length: Pearson {both['pearson']:+.2f}, Spearman {both['spearman']:+.2f}"
    assert title in texts_in(draw_lengths(seen))


def words_of(figure: Any) -> list[Any]:
    """Return all text of a figure; a tick beyond its axis has a label too, which is not drawn."""
    found = [text for legend in figure.legends for text in legend.get_texts()]
    for axes in figure.axes:
        found += [*axes.texts, axes._left_title, axes.xaxis.label, axes.yaxis.label]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            found += [label for tick in ticks for label in (tick.label1, tick.label2) if label.get_visible()]
    return [text for text in found if text.get_text()]


def test_no_words_of_a_figure_overlap_or_leave_it(pool: Dataset, selected: Dataset) -> None:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    seen = Overview.of(pool, selected)
    pool_map = map_of(seen)
    assert pool_map is not None
    named = {str(i): NamedCluster(["keyword", "another", "third"], None, 1, 1) for i in range(0, 12, 2)}
    with matplotlib.rc_context(STYLE):
        clusters = draw_clusters(seen, named)
        assert any(re.fullmatch(r"\d+ keyword, another", text) for text in texts_in(clusters))
        for figure in (draw_scores(seen), clusters, draw_lengths(seen), draw_map(seen, pool_map, named)):
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
            boxes = {text.get_text(): text.get_window_extent() for text in words_of(figure)}
            assert len(boxes) > 2
            width, height = canvas.get_width_height()
            for name, box in boxes.items():
                assert min(box.x0, box.y0, width - box.x1, height - box.y1) > -1, name
                assert not [other for other in boxes if other < name and box.overlaps(boxes[other])], name


@pytest.mark.parametrize(
    "changes",
    [
        {"iqs_score": [1.0] * 300},
        {"iqs_tokens": [7] * 300},
        {"iqs_tokens": [0] * 300},
        {"embedding": [[1.0, 2.0]] * 300},
        {"embedding": [[float(i)] for i in range(300)]},
        {"embedding": [None] * 299 + [[1.0, 2.0]]},
        {"embedding": [None] * 300},
        {"cluster": [None] * 299 + [3]},
        {"iqs_score": [None] * 298 + [1.0, 2.0]},
    ],
    ids=[
        "one score",
        "one length",
        "no length",
        "one point",
        "1-D",
        "one embedding",
        "no embeddings",
        "one clustered",
        "two",
    ],
)
def test_odd_pools_are_drawn_too(changes: dict[str, Any], tmp_path: Path) -> None:
    odd = make_pool(**changes)
    chosen = select_car(odd, 2, 1, allow_worse=True)
    paths = SelectionReport.from_selection(odd, chosen).plot(tmp_path, odd, chosen)
    assert len(paths) in (len(WITHOUT_MAP), len(PLOTS))
    assert all(path.stat().st_size > 5_000 for path in paths)


def test_the_map_names_its_clusters_in_letters_that_the_font_has(pool: Dataset, selected: Dataset) -> None:
    seen = Overview.of(pool, selected)
    named = {"3": NamedCluster(["écran", "智能"], None, 1, 1), "4": NamedCluster(["智能"], None, 1, 1)}
    found = map_of(seen)
    assert found is not None
    (axes, _) = draw_map(seen, found, named).axes
    assert axes.get_xlabel().splitlines()[1:] == ["Clusters: 3\N{NO-BREAK SPACE}écran"]


def test_a_single_row_is_drawn(tmp_path: Path) -> None:
    one = make_pool().select([0])
    chosen = select_car(one, 1, 1)
    assert len(SelectionReport.from_selection(one, chosen).plot(tmp_path, one, chosen)) == len(PLOTS)


def test_neighbouring_clusters_have_different_colours() -> None:
    grid = np.array([[x, y] for x in range(4) for y in range(4)], dtype=float)
    found = colours_of(np.repeat(grid, 3, axis=0), np.repeat(np.arange(16), 3))[::3]
    for i in range(16):
        for j in range(i):
            assert found[i] != found[j] or np.abs(grid[i] - grid[j]).sum() > 1


def test_numbers_on_the_map_hide_no_selected_row_that_they_need_not() -> None:
    twelve = make_pool(12, cluster=np.arange(12) % 8)
    seen = Overview.of(twelve, select_car(twelve.remove_columns("embedding"), 3, 1, allow_worse=True))
    found = map_of(seen)
    assert found is not None
    figure = draw_map(seen, found)
    figure.canvas.draw()
    axes, _ = figure.axes  # the second is the scale of colours
    taken = axes.transData.transform(found.points[np.isin(found.rows, seen.positions)])
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 8
    assert not any(box.contains(*point) for box in boxes for point in taken)


def test_rows_are_counted_in_whole_numbers() -> None:
    small = make_pool(12, cluster=np.arange(12) % 8)
    seen = Overview.of(small, select_car(small.remove_columns("embedding"), 1, 0))
    figure = draw_clusters(seen)
    figure.canvas.draw()
    (axes,) = figure.axes
    assert all(float(tick).is_integer() for axis in (axes.get_xticks(), axes.get_yticks()) for tick in axis)


@pytest.mark.parametrize(("low", "high"), [(1, 1_000_000), (1, 50_000), (8, 20_006), (60, 95), (210, 490), (7, 7)])
def test_lengths_have_marks_and_not_too_many(low: int, high: int) -> None:
    rows = make_pool(iqs_tokens=np.linspace(low, high, 300).astype(int))
    figure = draw_lengths(Overview.of(rows, select_car(rows.remove_columns("embedding"), 40, 1)))
    figure.canvas.draw()
    (axes,) = figure.axes
    marks = [mark.get_window_extent() for mark in axes.get_xticklabels() if mark.get_text()]
    assert 1 + 2 * (low < high) <= len(marks) <= 9
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(marks))


def test_the_users_settings_are_neither_used_nor_changed(pool: Dataset, selected: Dataset) -> None:
    import matplotlib

    seen = Overview.of(pool, selected)
    before = draw(seen, None)["plot_scores.png"]
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black"}):
        assert draw(seen, None)["plot_scores.png"] == before
        assert matplotlib.rcParams["font.size"] == 30


def test_without_matplotlib_the_error_says_what_to_install(
    pool: Dataset, selected: Dataset, tmp_path: Path, no_matplotlib: None
) -> None:
    report = SelectionReport.from_selection(pool, selected)
    with pytest.raises(ImportError, match=r"pip install 'car-datasets\[plots\]'"):
        report.plot(tmp_path / "plots", pool, selected)
    assert not (tmp_path / "plots").exists()
    assert not can_draw()
    page = report.to_html(pool, selected)
    assert "car-datasets[plots]" in page.replace("&#39;", "'")
    assert "data:image/png" not in page
