"""Figures of a selection, drawn by matplotlib (the extra `plots`), each as wide as a dataset card.

Does: score distributions, map, clusters against rows taken, score against length; equal input gives equal PNG files.
Does not: compute what it shows; use pyplot, or change the user's matplotlib settings.

To add a figure, write a function that draws it and add a row to `PLOTS`.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from car_datasets.reporting.maps import MAP_ROWS, PoolMap
from car_datasets.reporting.overview import Overview, count_clusters
from car_datasets.selection.rule import BY_CLUSTER, Indices
from car_datasets.utils.settings import refuse_missing_extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, HEIGHT, DPI = 8.0, 4.6, 120  # inches, and pixels per inch; 11 points stay readable on a card, 800 px wide
STYLE = {
    "font.family": "DejaVu Sans",  # it comes with matplotlib
    "font.size": 11,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}

# The palette of Okabe and Ito, which colour-blind readers can tell apart.
ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PURPLE = (
    *("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"),
)
GREY, DARK = "#B8B8B8", "#222222"
PALETTE = (SKY, ORANGE, GREEN, PURPLE, YELLOW, BLUE, RED)
PALETTE_NAMES = (*PALETTE, GREY)  # the last for rows without a cluster
NUMBERED = 12  # clusters whose number is written on the map
BINS = 40  # of the histogram of scores
NUMBER_GAP = 0.1  # least distance between two numbers, on a map 2 wide

# Where a number can be written, relative to the centre of its cluster; the earlier places are preferred.
NUMBER_OFFSETS = 0.075 * np.array([(0, 0), (0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1)])
NUMBER_HALF_SIZE = np.array([0.055, 0.045])  # half the width and height that a number takes, with half a point
MOST_TICKS = 9  # labels on the axis of lengths at most: more would touch


def can_draw() -> bool:
    """Return True if matplotlib is installed."""
    try:
        refuse_no_matplotlib()
    except ImportError:
        return False
    return True


def refuse_no_matplotlib() -> None:
    """Raise ImportError that says what to install if matplotlib is missing."""
    refuse_missing_extra("plots", "A plot", {"matplotlib": "matplotlib"}, ImportError, load=True)


def plot_file(name: str) -> str:
    """Return the file name of the figure with this name in `PLOTS`."""
    return f"plot_{name}.png"


def draw(overview: Overview, pool_map: PoolMap | None) -> dict[str, bytes]:
    """Draw every figure of `PLOTS`.

    Args:
        overview ([`Overview`]): of the pool and its selection.
        pool_map ([`PoolMap`], *optional*): without it, figures that need a map are left out.

    Returns:
        `dict[str, bytes]`: PNG files by name, in the order of `PLOTS`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    files = {}
    with styled():
        for name, plot in PLOTS.items():
            if not plot.needs_map:
                files[plot_file(name)] = as_png(plot.draw(overview))
            elif pool_map is not None:
                files[plot_file(name)] = as_png(plot.draw(overview, pool_map))
    return files


def styled() -> Any:
    """Return a context in which matplotlib draws in the style of all figures, whatever the user's settings are."""
    refuse_no_matplotlib()
    import matplotlib

    return matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE})


def as_png(figure: Figure) -> bytes:
    """Return a figure as a PNG file; equal figures give equal bytes."""
    content = io.BytesIO()
    # Without the version of matplotlib, which would make equal figures differ.
    figure.savefig(content, format="png", dpi=DPI, metadata={"Software": None})
    return content.getvalue()


def _axes(title: str, height: float = HEIGHT) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    return figure, axes


def draw_scores(overview: Overview) -> Figure:
    """Draw the score distributions of pool, selection and both controls, each as a share of its group."""
    figure, axes = _axes("Scores of the selection, the pool and two controls of the same size")
    # One set of edges for all groups, and shares in place of counts: the pool is far larger than the others.
    edges = np.histogram_bin_edges(overview.scores[overview.scored], bins=BINS)
    groups: list[tuple[str, Indices, dict[str, Any]]] = [
        ("pool", overview.scored, {"histtype": "stepfilled", "color": GREY, "alpha": 0.7}),
        ("selected", overview.positions, {"color": BLUE, "linewidth": 2.4}),
        ("random control", overview.random_control, {"color": RED, "linewidth": 1.6, "linestyle": "--"}),
        (
            "length-matched control",
            overview.length_matched_control,
            {"color": DARK, "linewidth": 1.6, "linestyle": ":"},
        ),
    ]
    for name, rows, look in groups:
        scores = overview.scores[rows]
        label = f"{name}: {len(rows):,} rows, mean {scores.mean():.2f}"
        axes.hist(
            scores, edges, weights=np.full(len(rows), 100 / len(rows)), label=label, **{"histtype": "step", **look}
        )
    axes.set_xlabel("score")
    axes.set_ylabel("share of the group in %")
    _legend_below(figure)
    return figure


def _legend_below(figure: Figure) -> None:
    """Place the legend below the axes, where it never covers data."""
    figure.legend(loc="outside lower center", ncols=2, fontsize=10)


def draw_map(overview: Overview, pool_map: PoolMap) -> Figure:
    """Draw the pool in two dimensions, coloured by cluster, with the selected rows ringed."""
    from matplotlib.patheffects import withStroke

    rows, points, method = pool_map
    figure, axes = _axes(f"Map of the pool ({method} of the embeddings)", height=6.4)
    clusters, taken = overview.clusters[rows], overview.taken[rows]
    colours = np.array(PALETTE_NAMES)[colours_of(points, clusters)]
    # Smaller points for more rows, but never so small that a ring around one cannot be seen.
    size = float(np.clip(40_000 / len(rows), 8, 40))
    # Opaque: paler colours are no longer those that colour-blind readers can tell apart.
    axes.scatter(*points[~taken].T, s=0.7 * size, c=colours[~taken], edgecolors="white", linewidths=0.2)
    # The selected rows after the others, which would cover them.
    axes.scatter(*points[taken].T, s=1.8 * size, c=colours[taken], edgecolors=DARK, linewidths=0.2 * size**0.5)
    for cluster, place in _number_places(points, clusters, taken):
        number = axes.text(*place, str(cluster), ha="center", va="center", fontsize=10, fontweight="bold")
        number.set_path_effects([withStroke(linewidth=3, foreground="white")])  # a filled box would hide rows
    scored = len(overview.scored)
    shown = "all scored rows" if len(rows) == scored else f"a sample of {scored:,} scored rows"
    fewer = " (colours repeat)" if count_clusters(clusters) > len(PALETTE) else ""
    axes.set_xlabel(
        f"{len(rows):,} rows, {shown}. Neighbouring clusters have different colours{fewer};\n"
        f"numbers name the largest. Ringed: {int(taken.sum()):,} of {len(overview.positions):,} selected rows.",
        fontsize=10,
    )
    axes.set(xticks=[], yticks=[], aspect="equal")
    axes.spines[:].set_visible(False)
    return figure


def _centers(points: npt.NDArray[np.float64], clusters: Indices) -> tuple[Indices, npt.NDArray[np.float64]]:
    """Return the clusters on a map, largest first, and their median points."""
    labels, counts = np.unique(clusters[clusters >= 0], return_counts=True)
    labels = labels[np.argsort(-counts, kind="stable")]
    # The median: a few rows far away would move a mean out of the cluster.
    return labels, np.array([np.median(points[clusters == label], axis=0) for label in labels]).reshape(-1, 2)


def colours_of(points: npt.NDArray[np.float64], clusters: Indices) -> Indices:
    """Give neighbouring clusters different colours.

    From the largest to the smallest, each cluster takes the colour whose nearest cluster is farthest away.

    Args:
        points (`(n, 2)` float64): the rows on the map.
        clusters (`(n,)` int64): their clusters, -1 for a row without one.

    Returns:
        `(n,)` int64: index in `PALETTE_NAMES` for every row, the last one for rows without a cluster.
    """
    labels, centers = _centers(points, clusters)
    given = np.full(len(labels), -1)
    for i, center in enumerate(centers):
        apart = np.linalg.norm(centers[:i] - center, axis=1)
        # A colour that no cluster has yet is infinitely far away.
        distances = [min(apart[given[:i] == colour], default=np.inf) for colour in range(len(PALETTE))]
        given[i] = int(np.argmax(distances))
    colours = np.full(len(clusters), len(PALETTE))
    for label, colour in zip(labels, given, strict=True):
        colours[clusters == label] = colour
    return colours


def _number_places(
    points: npt.NDArray[np.float64], clusters: Indices, taken: npt.NDArray[np.bool_]
) -> list[tuple[int, npt.NDArray[np.float64]]]:
    """Return places for the numbers of the largest clusters.

    The numbers do not touch. Of the free places each takes the one that hides fewest selected rows, then fewest rows.
    """
    written: list[tuple[int, npt.NDArray[np.float64]]] = []
    for label, center in zip(*_centers(points, clusters), strict=True):
        # Those that a number written before leaves free.
        spots = [
            spot
            for spot in center + NUMBER_OFFSETS
            if all(np.linalg.norm(spot - place) > NUMBER_GAP for _, place in written)
        ]
        if len(written) < NUMBERED and spots:
            hidden = [(np.abs(points - spot) < NUMBER_HALF_SIZE).all(axis=1) for spot in spots]
            # The index decides among equally good places, because the preferred ones come first.
            best = min(range(len(spots)), key=lambda i: (int(hidden[i][taken].sum()), int(hidden[i].sum()), i))
            written.append((int(label), spots[best]))
    return written


def draw_clusters(overview: Overview) -> Figure:
    """Draw the size of every cluster against the number of rows taken from it."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _axes("Where the selection comes from: one point per cluster")
    # Rows without a score cannot be taken, so they do not count towards the size.
    scored = overview.clusters[overview.scored]
    labels, sizes = np.unique(scored[scored >= 0], return_counts=True)
    taken = np.array([np.count_nonzero(overview.clusters[overview.positions] == label) for label in labels])
    by_score = overview.clusters[overview.positions[overview.selected_by != BY_CLUSTER]]
    reached = np.isin(labels, by_score)
    share = len(overview.positions) / max(1, len(overview.scored))
    if len(labels):
        # A random choice would take the same share of every cluster: those above this line are preferred.
        line = np.array([sizes.min(), sizes.max()])
        axes.plot(line, share * line, color=DARK, linewidth=1, linestyle="--", label=f"the pool's share, {share:.1%}")
    looks = (
        (reached & (taken > 0), BLUE, "o", "reached by score"),
        (~reached & (taken > 0), RED, "^", "by clustering only"),
        (taken == 0, GREY, "x", "nothing taken"),
    )
    for which, colour, marker, group in looks:
        if which.any():
            edge = {} if marker == "x" else {"edgecolors": "white", "linewidths": 0.6}  # a cross has no edge to colour
            label = f"{group}: {int(which.sum()):,} {'cluster' if which.sum() == 1 else 'clusters'}"
            axes.scatter(sizes[which], taken[which], s=46, color=colour, marker=marker, alpha=0.85, label=label, **edge)
    _label_largest(axes, labels, sizes, taken)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("scored rows in the cluster")
    axes.set_ylabel("rows taken from it")
    # Room at both ends, where half of a marker would otherwise be cut off.
    axes.set_ylim(bottom=-0.03 * max(1, taken.max(initial=0)), top=1.12 * max(1, taken.max(initial=0)))
    _legend_below(figure)
    return figure


def _label_largest(axes: Any, labels: Indices, sizes: Indices, taken: Indices, count: int = 4) -> None:
    """Write the numbers of the clusters from which most rows were taken, unless they would overlap."""
    shown: list[tuple[float, float]] = []  # as shares of the width and height of the axes
    for i in np.argsort(-taken, kind="stable")[:count]:
        # As shares of the axes: whether two numbers overlap depends on the picture, not on the counts.
        place = float(sizes[i] / max(1, np.ptp(sizes))), float(taken[i] / max(1, taken.max()))
        if taken[i] and all(abs(place[0] - x) > 0.1 or abs(place[1] - y) > 0.07 for x, y in shown):
            axes.annotate(f"{labels[i]}", (sizes[i], taken[i]), (6, 5), textcoords="offset points", fontsize=10)
            shown.append(place)


def draw_lengths(overview: Overview) -> Figure:
    """Draw scores against lengths, with their correlations in the title."""
    correlation = overview.score_length_correlation()
    words = f"Pearson {correlation['pearson']:+.2f}, Spearman {correlation['spearman']:+.2f}"
    figure, axes = _axes(f"Score and length: {words}")
    rows, taken = overview.scored, overview.positions
    lengths = np.maximum(overview.lengths, 1)  # the axis is logarithmic
    # The selected rows are drawn in full below, so the sample is of the others.
    shown = np.setdiff1d(overview.sample(MAP_ROWS), taken)
    others = "the other rows" if len(shown) + len(taken) >= len(rows) else f"{len(shown):,} of the other rows"
    spread = float(np.clip(20_000 / len(rows), 4, 20))
    axes.scatter(lengths[shown], overview.scores[shown], s=spread, color=GREY, alpha=0.6, linewidths=0, label=others)
    axes.set_xscale("log")
    size = float(np.clip(6_000 / len(taken), 3, 26))
    look = {"color": ORANGE, "edgecolors": DARK, "linewidths": 0.3}
    axes.scatter(lengths[taken], overview.scores[taken], s=size, label="selected", **look)
    axes.set_xlabel(f"length in {overview.length_unit}")
    axes.set_ylabel("score")
    ticks = _ticks_between(float(lengths[rows].min()), float(lengths[rows].max()))
    axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    # A logarithmic axis has minor ticks, whose labels would lie between ours.
    axes.set_xticks([], minor=True)
    _legend_below(figure)
    return figure


def _ticks_between(low: float, high: float) -> npt.NDArray[np.float64]:
    """Return round numbers between the ends of an axis, or its ends and middle if too few lie there."""
    ticks = np.zeros(0)
    for steps in ((1, 2, 5), (1, 3), (1,)):  # from fine to coarse
        ticks = np.outer(10.0 ** np.arange(10), steps).ravel()
        ticks = ticks[(ticks >= low) & (ticks <= high)]
        if len(ticks) <= MOST_TICKS:
            break
    return ticks if len(ticks) > 2 else np.unique(np.linspace(low, high, 3).round())


class Plot(NamedTuple):
    """A figure of the report.

    Args:
        draw (`Callable`): takes an [`Overview`], and a [`PoolMap`] if `needs_map`; returns a matplotlib figure.
        alt (`str`): describes the figure on the page to readers who do not see it.
        needs_map (`bool`): leave the figure out if the pool has no embeddings.
    """

    draw: Callable[..., Figure]
    alt: str
    needs_map: bool = False


PLOTS = {  # by name, in the order of the page; the file is plot_<name>.png
    "scores": Plot(
        draw_scores, "Distributions of the scores of selection, pool and controls; the means are in the table above."
    ),
    "map": Plot(draw_map, "Map of the pool, coloured by cluster, the selected rows ringed.", needs_map=True),
    "clusters": Plot(draw_clusters, "Size of every cluster against the rows taken from it."),
    "lengths": Plot(draw_lengths, "Score against length of the rows; the title has both correlations."),
}
PLOT_FILES = tuple(plot_file(name) for name in PLOTS)
