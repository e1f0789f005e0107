"""Figures of a selection, drawn by matplotlib (the extra `plots`), each as wide as a dataset card.

Does: score distributions, map, clusters against rows taken, score against length; equal input gives equal PNG files.
Does not: compute what it shows; use pyplot, or change the user's matplotlib settings.

To add a figure, write a function that draws it and add a row to `PLOTS`.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from car_datasets.reporting.maps import MAP_ROWS, PoolMap
from car_datasets.reporting.naming import NamedCluster
from car_datasets.reporting.overview import Overview
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
SCALE = ("#e8cf3a", "#94c954", "#35a67e", "#21828c", "#31608e", "#443983", "#3b0f57")  # of scores, from low to high
SPAN = (0.1, 0.95)  # quantiles of the scores that the scale spans: outliers would make all other rows look alike
NUMBERED = 12  # clusters whose number is written on the map
BINS = 40  # of the histogram of scores
BEYOND = 0.01  # share of the pool at either end that the first and last bar of the histogram gather
DRAWABLE = 0x530  # characters below it (Latin, Greek, Cyrillic) are in the font, and run from left to right
NUMBER_GAP = 0.1  # least distance between two numbers, on a map 2 wide

# Where a number can be written, relative to the centre of its cluster; the earlier places are preferred.
NUMBER_OFFSETS = 0.075 * np.array([(0, 0), (0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1)])
NUMBER_HALF_SIZE = np.array([0.055, 0.045])  # half the width and height that a number takes, with half a point
NAMED_POINTS = 8  # clusters that are named in the figure of clusters, if their names do not overlap
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


def draw(
    overview: Overview, pool_map: PoolMap | None, named: Mapping[str, NamedCluster] | None = None
) -> dict[str, bytes]:
    """Draw every figure of `PLOTS`.

    Args:
        overview ([`Overview`]): of the pool and its selection.
        pool_map ([`PoolMap`], *optional*): without it, figures that need a map are left out.
        named (`Mapping[str, NamedCluster]`, *optional*): the clusters by their numbers, for figures that name them.

    Returns:
        `dict[str, bytes]`: PNG files by name, in the order of `PLOTS`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    files = {}
    with styled():
        for name, plot in PLOTS.items():
            if pool_map is not None or not plot.needs_map:
                given = [pool_map] if plot.needs_map else []
                files[plot_file(name)] = as_png(plot.draw(overview, *given, *([named or {}] if plot.names else [])))
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
    pool = overview.scores[overview.scored]
    ends = np.quantile(pool, (BEYOND, 1 - BEYOND))
    kept = overview.scores[overview.positions]
    low, high = min(ends[0], kept.min()), max(ends[1], kept.max())
    edges = np.histogram_bin_edges(pool, bins=BINS, range=(low, high))
    groups: list[tuple[str, Indices, dict[str, Any]]] = [
        ("pool", overview.scored, {"fill": True, "color": GREY, "alpha": 0.7}),
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
        shares = 100 * np.histogram(np.clip(scores, low, high), edges)[0] / len(rows)
        # Where there are no rows there is no line, which would lie on the axis.
        axes.stairs(
            np.where(shares > 0, shares, np.nan),
            edges,
            label=f"{name}: {len(rows):,} rows, mean {scores.mean():.2f}",
            **look,
        )
    axes.set_ylim(bottom=0)
    below, above = int((pool < low).sum()), int((pool > high).sum())
    gathered = [f"{n:,} rows {where}" for n, where in ((below, "below"), (above, "above")) if n]
    axes.set_xlabel(f"score; the bars at the ends hold {' and '.join(gathered)} as well" if gathered else "score")
    axes.set_ylabel("share of the group in %")
    _legend_below(figure)
    return figure


def _legend_below(figure: Figure) -> None:
    """Place the legend below the axes, where it never covers data."""
    legend = figure.legend(loc="outside lower center", ncols=2, fontsize=10)
    for handle in legend.legend_handles:
        if (set_sizes := getattr(handle, "set_sizes", None)) is not None:
            set_sizes([36])  # points of a large pool are too small to tell their colour


def draw_map(overview: Overview, pool_map: PoolMap, named: Mapping[str, NamedCluster] | None = None) -> Figure:
    """Draw the pool in two dimensions, coloured by score, with the selected rows ringed and the largest clusters named."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patheffects import withStroke

    rows, points, method = pool_map
    figure, axes = _axes(f"Map of the pool ({method} of the embeddings)", height=6.6)
    scores, clusters, taken = overview.scores[rows], overview.clusters[rows], overview.taken[rows]
    low, high = np.quantile(scores, SPAN)
    look = {"cmap": LinearSegmentedColormap.from_list("score", SCALE), "vmin": low, "vmax": high}
    # Smaller points for more rows, but never so small that a ring around one cannot be seen.
    size = float(np.clip(40_000 / len(rows), 8, 40))
    # Opaque: paler colours are no longer those that colour-blind readers can tell apart.
    axes.scatter(*points[~taken].T, s=0.7 * size, c=scores[~taken], edgecolors="white", linewidths=0.2, **look)
    # The selected rows after the others, which would cover them.
    shown = axes.scatter(
        *points[taken].T, s=1.8 * size, c=scores[taken], edgecolors=DARK, linewidths=0.2 * size**0.5, **look
    )
    bar = figure.colorbar(shown, ax=axes, shrink=0.6, pad=0.01, extend="both")
    bar.set_label("score")
    bar.outline.set_visible(False)
    numbers = _number_places(points, clusters, taken)
    for cluster, place in numbers:
        number = axes.text(*place, str(cluster), ha="center", va="center", fontsize=10, fontweight="bold")
        number.set_path_effects([withStroke(linewidth=3, foreground="white")])  # a filled box would hide rows
    scored = len(overview.scored)
    words = "all scored rows" if len(rows) == scored else f"a sample of {scored:,} scored rows"
    about = f"{len(rows):,} rows, {words}. Ringed: {int(taken.sum()):,} of {len(overview.positions):,} selected rows."
    names = [name for cluster, _ in numbers if (name := _cluster_name(cluster, named or {})) != str(cluster)]
    # A name is not broken between two lines.
    listed = "; ".join(name.replace(" ", "\N{NO-BREAK SPACE}") for name in sorted(names, key=_number_of))
    lines = textwrap.wrap(f"Clusters: {listed}" if names else "", 92)
    axes.set_xlabel("\n".join([about, *lines[:4]]), fontsize=10)
    axes.set(xticks=[], yticks=[], aspect="equal")
    axes.spines[:].set_visible(False)
    return figure


def _cluster_name(cluster: int, named: Mapping[str, NamedCluster], count: int = 2) -> str:
    """Return the number of a cluster with its first keywords, as far as the font has them."""
    words = named[str(cluster)].keywords if str(cluster) in named else []
    drawable = [word for word in words if all(ord(character) < DRAWABLE for character in word)]
    return f"{cluster} {', '.join(drawable[:count])}" if drawable else str(cluster)


def _number_of(name: str) -> int:
    return int(name.split()[0])


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


def draw_clusters(overview: Overview, named: Mapping[str, NamedCluster] | None = None) -> Figure:
    """Draw the size of every cluster against the number of rows taken from it, and name those that differ most."""
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
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("scored rows in the cluster")
    axes.set_ylabel("rows taken from it")
    # Room at both ends, where half of a marker would otherwise be cut off.
    axes.set_ylim(bottom=-0.03 * max(1, taken.max(initial=0)), top=1.12 * max(1, taken.max(initial=0)))
    _legend_below(figure)
    # From the one that differs most from the pool's share, in standard deviations of a random choice.
    order = np.argsort(-np.abs(taken - share * sizes) / np.sqrt(np.maximum(1, sizes)), kind="stable")
    points = [(float(sizes[i]), float(taken[i]), _cluster_name(int(labels[i]), named or {})) for i in order]
    _label_points(figure, axes, points)
    return figure


def _label_points(figure: Figure, axes: Any, points: list[tuple[float, float, str]]) -> None:
    """Name the first points, each on a side where its name covers no point and no other name; others get no name."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # which gives the axes their place
    inside = axes.get_window_extent()
    pixels = [axes.transData.transform((x, y)) for x, y, _ in points]
    taken = [Bbox.from_extents(x - 5, y - 5, x + 5, y + 5) for x, y in pixels]
    for x, y, name in points[:NAMED_POINTS]:
        for side, offset in (("left", (7, 4)), ("right", (-7, 4)), ("left", (7, -13)), ("right", (-7, -13))):
            label = axes.annotate(
                name, (x, y), offset, textcoords="offset points", fontsize=10, horizontalalignment=side
            )
            box = label.get_window_extent()
            fits = inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
            if fits and not any(box.overlaps(other) for other in taken):
                taken.append(box.padded(2))
                break
            label.remove()


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
    # White edges part points that overlap; around small ones they would leave nothing of the colour.
    look = {"color": BLUE, "edgecolors": "white", "linewidths": 0.4 if size > 8 else 0}
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
        draw (`Callable`): takes an [`Overview`], a [`PoolMap`] if `needs_map`, and the named clusters if `names`; returns
            a matplotlib figure.
        alt (`str`): describes the figure on the page to readers who do not see it.
        needs_map (`bool`): leave the figure out if the pool has no embeddings.
        names (`bool`): it names clusters.
    """

    draw: Callable[..., Figure]
    alt: str
    needs_map: bool = False
    names: bool = False


PLOTS = {  # by name, in the order of the page; the file is plot_<name>.png
    "scores": Plot(
        draw_scores, "Distributions of the scores of selection, pool and controls; the means are in the table above."
    ),
    "map": Plot(draw_map, "Map of the pool, coloured by score, the selected rows ringed.", needs_map=True, names=True),
    "clusters": Plot(draw_clusters, "Size of every cluster against the rows taken from it.", names=True),
    "lengths": Plot(draw_lengths, "Score against length of the rows; the title has both correlations."),
}
PLOT_FILES = tuple(plot_file(name) for name in PLOTS)
