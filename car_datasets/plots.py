"""Figures of a selection, drawn by matplotlib (the extra `plots`), each as wide as a dataset card.

Does: score distributions, the map, clusters against rows taken, score against length; PNG files that are equal for equal
input. Colours are those of Okabe and Ito, which colour-blind readers tell apart.
Does not: compute what it shows; use pyplot, or change a setting of the user's.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from car_datasets.overview import Overview
from car_datasets.projection import MAP_ROWS, PoolMap
from car_datasets.selection import BY_CLUSTER, Indices

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCORES, MAP, CLUSTERS, LENGTHS = "plot_scores.png", "plot_map.png", "plot_clusters.png", "plot_lengths.png"
PLOT_FILES = (SCORES, MAP, CLUSTERS, LENGTHS)
WIDTH, HEIGHT, DPI = 8.0, 4.6, 120  # inches at which 11 points are readable on a card, 800 px wide
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
ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PURPLE = (
    *("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"),
)
GREY, DARK = "#B8B8B8", "#222222"
PALETTE = (SKY, ORANGE, GREEN, PURPLE, YELLOW, BLUE, RED)
PALETTE_NAMES = (*PALETTE, GREY)  # the last for rows without a cluster
NAMED = 12  # clusters whose number stands on the map
BINS = 40
ROOM = 0.1  # between two numbers there, of a map 2 wide
# Where a number can stand, from its cluster's middle.
ASIDE = 0.075 * np.array([(0, 0), (0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1)])
NUMBER = np.array([0.055, 0.045])  # half the width and height that a number takes, with half a point
TICKS = 9  # on the axis of lengths: more would touch


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    try:
        refuse_no_matplotlib()
    except ImportError:
        return False
    return True


def refuse_no_matplotlib() -> None:
    """Raise an ImportError that says what to install, where matplotlib is not."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'car-datasets[plots]'.") from error


def draw(seen: Overview, pool_map: PoolMap | None) -> dict[str, bytes]:
    """The figures as PNG files, by their names; without a map where there is none.

    Raises:
        ImportError: matplotlib is not installed.
    """
    refuse_no_matplotlib()
    import matplotlib

    settings: Any = {**matplotlib.rcParamsDefault, **STYLE}
    with matplotlib.rc_context(settings):
        figures = {SCORES: draw_scores(seen), CLUSTERS: draw_clusters(seen), LENGTHS: draw_lengths(seen)}
        if pool_map is not None:
            figures[MAP] = draw_map(seen, pool_map)
        return {name: _png(figures[name]) for name in PLOT_FILES if name in figures}


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI, metadata={"Software": None})
    return content.getvalue()


def _axes(title: str, height: float = HEIGHT) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    return figure, axes


def draw_scores(seen: Overview) -> Figure:
    """Scores of pool, selection and both controls, as shares of their group."""
    figure, axes = _axes("Scores of the selection, the pool and two controls of the same size")
    edges = np.histogram_bin_edges(seen.scores[seen.scored], bins=BINS)
    groups: list[tuple[str, Indices, dict[str, Any]]] = [
        ("pool", seen.scored, {"histtype": "stepfilled", "color": GREY, "alpha": 0.7}),
        ("selected", seen.positions, {"color": BLUE, "linewidth": 2.4}),
        ("random control", seen.random_control, {"color": RED, "linewidth": 1.6, "linestyle": "--"}),
        ("length-matched control", seen.length_matched_control, {"color": DARK, "linewidth": 1.6, "linestyle": ":"}),
    ]
    for name, rows, look in groups:
        scores = seen.scores[rows]
        label = f"{name}: {len(rows):,} rows, mean {scores.mean():.2f}"
        axes.hist(
            scores, edges, weights=np.full(len(rows), 100 / len(rows)), label=label, **{"histtype": "step", **look}
        )
    axes.set_xlabel("score")
    axes.set_ylabel("share of the group in %")
    _legend_below(figure)
    return figure


def _legend_below(figure: Figure) -> None:
    """Where no point can lie under it."""
    figure.legend(loc="outside lower center", ncols=2, fontsize=10)


def draw_map(seen: Overview, pool_map: PoolMap) -> Figure:
    """The pool in two dimensions, coloured by cluster, with the selected rows marked."""
    from matplotlib.patheffects import withStroke

    rows, points, method = pool_map
    figure, axes = _axes(f"Map of the pool ({method} of the embeddings)", height=6.4)
    clusters, taken = seen.clusters[rows], np.isin(rows, seen.positions)
    colours = np.array(PALETTE_NAMES)[colours_of(points, clusters)]
    size = float(np.clip(40_000 / len(rows), 8, 40))
    # no transparency: paler, the colours are no longer those that colour-blind readers tell apart
    axes.scatter(*points[~taken].T, s=0.7 * size, c=colours[~taken], edgecolors="white", linewidths=0.2)
    axes.scatter(*points[taken].T, s=1.8 * size, c=colours[taken], edgecolors=DARK, linewidths=0.2 * size**0.5)
    for cluster, place in _places(points, clusters, taken):
        number = axes.text(*place, str(cluster), ha="center", va="center", fontsize=10, fontweight="bold")
        number.set_path_effects([withStroke(linewidth=3, foreground="white")])  # a box would hide rows
    shown = "all scored rows" if len(rows) == len(seen.scored) else f"a sample of {len(seen.scored):,} scored rows"
    fewer = " (there are fewer colours than clusters)" if len(np.unique(clusters[clusters >= 0])) > len(PALETTE) else ""
    axes.set_xlabel(
        f"{len(rows):,} rows, {shown}. Colours part neighbouring clusters{fewer};\n"
        f"numbers name the largest. Ringed: {int(taken.sum()):,} of {len(seen.positions):,} selected rows.",
        fontsize=10,
    )
    axes.set(xticks=[], yticks=[], aspect="equal")
    axes.spines[:].set_visible(False)
    return figure


def _centers(points: npt.NDArray[np.float64], clusters: Indices) -> tuple[Indices, npt.NDArray[np.float64], Indices]:
    """The clusters on a map, largest first, their median points, and how many rows of them are there."""
    names, counts = np.unique(clusters[clusters >= 0], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    centers = np.array([np.median(points[clusters == name], axis=0) for name in names[order]]).reshape(-1, 2)
    return names[order], centers, counts[order]


def colours_of(points: npt.NDArray[np.float64], clusters: Indices) -> Indices:
    """A number in the palette for every row, the last for rows without a cluster: each cluster takes the colour whose
    nearest other cluster is farthest."""
    names, centers, _ = _centers(points, clusters)
    given = np.full(len(names), -1)
    for i, center in enumerate(centers):
        apart = np.linalg.norm(centers[:i] - center, axis=1)
        free = [min(apart[given[:i] == colour], default=np.inf) for colour in range(len(PALETTE))]
        given[i] = int(np.argmax(free))
    found = np.full(len(clusters), len(PALETTE))
    for name, colour in zip(names, given, strict=True):
        found[clusters == name] = colour
    return found


def _places(
    points: npt.NDArray[np.float64], clusters: Indices, taken: npt.NDArray[np.bool_]
) -> list[tuple[int, npt.NDArray[np.float64]]]:
    """Where the numbers of the largest clusters can stand without touching, and hide fewest selected rows, then rows."""
    found: list[tuple[int, npt.NDArray[np.float64]]] = []
    for name, center, _ in zip(*_centers(points, clusters), strict=True):
        spots = [spot for spot in center + ASIDE if all(np.linalg.norm(spot - place) > ROOM for _, place in found)]
        if len(found) < NAMED and spots:
            hidden = [(np.abs(points - spot) < NUMBER).all(axis=1) for spot in spots]
            best = min(range(len(spots)), key=lambda i: (int(hidden[i][taken].sum()), int(hidden[i].sum()), i))
            found.append((int(name), spots[best]))
    return found


def draw_clusters(seen: Overview) -> Figure:
    """Every cluster's size against the rows taken from it."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _axes("Where the selection comes from: one point per cluster")
    scored = seen.clusters[seen.scored]
    names, sizes = np.unique(scored[scored >= 0], return_counts=True)
    taken = np.array([np.count_nonzero(seen.clusters[seen.positions] == name) for name in names])
    by_score = seen.clusters[seen.positions[seen.selected_by != BY_CLUSTER]]
    reached = np.isin(names, by_score)
    share = len(seen.positions) / max(1, len(seen.scored))
    if len(names):
        line = np.array([sizes.min(), sizes.max()])
        axes.plot(line, share * line, color=DARK, linewidth=1, linestyle="--", label=f"the pool's share, {share:.1%}")
    looks = (
        (reached & (taken > 0), BLUE, "o", "reached by score"),
        (~reached & (taken > 0), RED, "^", "by clustering only"),
    )
    for which, colour, marker, label in (*looks, (taken == 0, GREY, "x", "nothing taken")):
        if which.any():
            edge = {} if marker == "x" else {"edgecolors": "white", "linewidths": 0.6}
            name = f"{label}: {int(which.sum()):,} {'cluster' if which.sum() == 1 else 'clusters'}"
            axes.scatter(sizes[which], taken[which], s=46, color=colour, marker=marker, alpha=0.85, label=name, **edge)
    _name_the_most(axes, names, sizes, taken)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("scored rows in the cluster")
    axes.set_ylabel("rows taken from it")
    axes.set_ylim(bottom=-0.03 * max(1, taken.max(initial=0)), top=1.12 * max(1, taken.max(initial=0)))
    _legend_below(figure)
    return figure


def _name_the_most(axes: Any, names: Indices, sizes: Indices, taken: Indices, count: int = 4) -> None:
    """The numbers of the clusters from which most rows were taken, where they stand apart."""
    shown: list[tuple[float, float]] = []
    for i in np.argsort(-taken, kind="stable")[:count]:
        place = float(sizes[i] / max(1, np.ptp(sizes))), float(taken[i] / max(1, taken.max()))
        if taken[i] and all(abs(place[0] - x) > 0.1 or abs(place[1] - y) > 0.07 for x, y in shown):
            axes.annotate(f"{names[i]}", (sizes[i], taken[i]), (6, 5), textcoords="offset points", fontsize=10)
            shown.append(place)


def draw_lengths(seen: Overview) -> Figure:
    """Scores against lengths, with the correlations that say how far one stands for the other."""
    figure, axes = _axes("Does the score follow the length?")
    rows, taken = seen.scored, seen.positions
    lengths = np.maximum(seen.lengths, 1)
    shown = np.setdiff1d(seen.sample(MAP_ROWS), taken)
    name = "the other rows" if len(shown) + len(taken) >= len(rows) else f"{len(shown):,} of the other rows"
    spread = float(np.clip(20_000 / len(rows), 4, 20))
    axes.scatter(lengths[shown], seen.scores[shown], s=spread, color=GREY, alpha=0.6, linewidths=0, label=name)
    axes.set_xscale("log")
    size = float(np.clip(6_000 / len(taken), 3, 26))
    axes.scatter(
        lengths[taken], seen.scores[taken], s=size, color=ORANGE, edgecolors=DARK, linewidths=0.3, label="selected"
    )
    axes.set_xlabel(f"length in {seen.length_unit}")
    axes.set_ylabel("score")
    ticks = _ticks_between(float(lengths[rows].min()), float(lengths[rows].max()))
    axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    axes.set_xticks([], minor=True)
    correlation = seen.score_length_correlation()
    words = f"Pearson {correlation['pearson']:+.2f}, Spearman {correlation['spearman']:+.2f}"
    axes.set_title(f"Score and length: {words}")
    _legend_below(figure)
    return figure


def _ticks_between(low: float, high: float) -> npt.NDArray[np.float64]:
    """Round numbers for a logarithmic axis, as many as have room; where there is hardly one, the ends and the middle."""
    ticks = np.zeros(0)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = np.outer(10.0 ** np.arange(10), steps).ravel()
        ticks = ticks[(ticks >= low) & (ticks <= high)]
        if len(ticks) <= TICKS:
            break
    return ticks if len(ticks) > 2 else np.unique(np.linspace(low, high, 3).round())
