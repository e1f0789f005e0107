"""Put rules of selection next to each other at the same budget: `compare_rules`, and its table.

Does: select from the pool anew by CaR's rule, by gain, at random, at random in equal shares, and by score alone; measure
these selections and the present one by score, clusters covered, and spread of the embeddings.
Does not: tell which selection teaches best; `prove` measures that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from rich.table import Table

from car_datasets.clustering.kmeans import counts_by_label, sums_by_label
from car_datasets.reporting.overview import Overview, count_clusters
from car_datasets.selection.constrained import choose_within
from car_datasets.selection.filling import Room
from car_datasets.selection.gain import choose_by_gain, read_memberships, soft_memberships
from car_datasets.selection.limits import Limits
from car_datasets.selection.rule import Indices
from car_datasets.utils.columns import Matrix, unit_rows

MEASURED = 2_000  # rows of a selection whose spread is measured at most; a sample of a larger one, for all rules


@dataclass(frozen=True)
class RuleFigures:
    """What a rule selects from a pool, in figures.

    Args:
        rule (`str`): what made the selection, in words.
        rows (`int`): rows selected.
        mean_score (`float`): their mean score.
        clusters (`int`): clusters that have a row among them.
        neighbour_distance (`float`): mean over the rows of the cosine distance (0 to 2) to the nearest other row of the
            selection; 0 for copies. NaN for fewer than two rows with embeddings.
        effective_number (`float`): how many entirely different rows would be as diverse, from 1 to `measured`: the
            exponential of the entropy of the eigenvalues of the matrix of cosines, divided by its rows (the Vendi score
            of arXiv 2210.02410). NaN without embeddings.
        measured (`int`): rows that the last two figures are of; they depend on it, so it is the same for all rules that
            have as many rows with embeddings.
    """

    rule: str
    rows: int
    mean_score: float
    clusters: int
    neighbour_distance: float
    effective_number: float
    measured: int


def compare_rules(
    overview: Overview, *, costs: npt.NDArray[np.int64] | None = None, groups: Sequence[str] | None = None
) -> list[RuleFigures]:
    """Return the figures of the present selection, and of what other rules select from the pool at the same budget.

    No other rule has quotas or pinned rows. All choose among the rows that have a score and no mark that keeps them out, but
    for the random ones, which choose among all that have a score.

    Args:
        overview ([`Overview`]): of the pool and its selection; its seed draws the random ones and the samples.
        costs (`(rows,)` int64, *optional*): such as tokens; the budget is then the sum of those of the selected rows.
            Without them it is their number.
        groups (`(rows,)` str, *optional*): the group of every row of the pool, such as its source, by which a balanced
            selection has equal shares; by default its cluster.

    Returns:
        `list[RuleFigures]`: the present selection first. Rules that need embeddings are left out of a pool without any.
    """
    budget = len(overview.positions) if costs is None else int(costs[overview.positions].sum())
    limits = Limits(budget, costs)
    rng = np.random.default_rng(overview.seed)
    selections = [("this selection", overview.positions), *_selections(overview, limits, groups)]
    return [_figures(name, rows, overview, np.random.default_rng(rng.integers(2**32))) for name, rows in selections]


def _selections(overview: Overview, limits: Limits, groups: Sequence[str] | None) -> Iterator[tuple[str, Indices]]:
    """Yield the name of each rule and the positions of the rows that it selects."""
    ranking = np.where(np.isnan(overview.scores), np.nan, overview.eligible)
    n2 = max(1, overview.by_cluster)
    yield "CaR's rule", choose_within(ranking, overview.clusters, n2, limits).positions
    memberships = _memberships(overview)
    if memberships is not None:
        yield "gain", choose_by_gain(ranking, *memberships, limits).positions
    rng = np.random.default_rng(overview.seed)
    shuffled = rng.permutation(overview.scored)
    # The control of the other reports, unless rows differ in cost.
    control = overview.random_control if limits.costs is None else _taken(overview, limits, shuffled)
    yield "random", control
    labels = overview.clusters.astype(str) if groups is None else np.asarray(groups, dtype=np.str_)
    yield (
        f"random, equal shares of {'clusters' if groups is None else 'groups'}",
        _taken(overview, limits, _in_turns(labels, shuffled, limits.costs)),
    )
    yield "best by score", choose_within(ranking, overview.clusters, 0, limits).positions


def _taken(overview: Overview, limits: Limits, order: Indices) -> Indices:
    """Return the rows of an order that fit the budget, each when its turn comes."""
    room = Room(limits, overview.scores)
    room.take_in_order(order.tolist())
    return np.array(room.taken, dtype=np.int64)


def _in_turns(labels: npt.NDArray[np.str_], shuffled: Indices, costs: npt.NDArray[np.int64] | None) -> Indices:
    """Return rows in an order of which any beginning holds each group equally often, or costs each as much."""
    order = shuffled[np.argsort(labels[shuffled], kind="stable")]
    cost = np.ones(len(order), dtype=np.int64) if costs is None else costs[order]
    spent = np.cumsum(cost) - cost
    _, first, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    # What a group has spent before each of its rows; a group that has run out leaves its turns to the others.
    return order[np.argsort(spent - np.repeat(spent[first], sizes), kind="stable")]


def _memberships(overview: Overview) -> tuple[Indices, npt.NDArray[np.float64]] | None:
    """Return the memberships that the pool has, else those in the mean embeddings of its clusters; None without any."""
    names, pool = overview.names, overview.pool
    if {names.near_clusters, names.near_weights} <= set(pool.column_names):
        return read_memberships(pool, names)
    clustered = overview.clusters >= 0
    if overview.embedded == 0 or not clustered.any():
        return None
    numbers, labels = np.unique(overview.clusters[clustered], return_inverse=True)
    place = np.full(len(overview.clusters), len(numbers))  # one more, for the rows in no cluster
    place[clustered] = labels
    sums: torch.Tensor | None = None
    counts = torch.zeros(len(numbers) + 1, dtype=torch.int64)
    for matrix, rows in overview.embedding_batches():
        cluster_of = torch.from_numpy(place[rows])
        part = sums_by_label(torch.tensor(matrix), cluster_of, len(numbers) + 1).double()
        sums = part if sums is None else sums + part
        counts += counts_by_label(cluster_of, len(numbers) + 1)
    assert sums is not None
    centers = (sums / counts.clamp(min=1)[:, None])[:-1].float()
    near: Indices = np.full((len(place), min(3, len(numbers))), -1, dtype=np.int64)
    weights = np.zeros(near.shape)
    for matrix, rows in overview.embedding_batches():
        near[rows], weights[rows] = soft_memberships(torch.tensor(matrix), centers)
    return near, weights


def _figures(name: str, rows: Indices, overview: Overview, rng: np.random.Generator) -> RuleFigures:
    """Return the figures of the rows that a rule selects."""
    matrix: Matrix = np.zeros((0, 0), dtype=np.float32)
    if overview.embedded:
        sample = rows if len(rows) <= MEASURED else np.sort(rng.choice(rows, MEASURED, replace=False))
        matrix = overview.embeddings_of(sample)[0]
    scores = overview.scores[rows]
    mean = float(scores.mean()) if len(rows) else float("nan")
    spread = (neighbour_distance(matrix), effective_number(matrix))
    return RuleFigures(name, len(rows), mean, count_clusters(overview.clusters[rows]), *spread, len(matrix))


def neighbour_distance(matrix: Matrix) -> float:
    """Return the mean cosine distance of each row of a matrix to the nearest other one; NaN for fewer than two."""
    if len(matrix) < 2:
        return float("nan")
    unit = unit_rows(matrix)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -np.inf)
    return float(np.clip(1 - cosines.max(axis=1).astype(np.float64), 0, None).mean())


def effective_number(matrix: Matrix) -> float:
    """Return the exponential of the entropy of the eigenvalues of the rows' cosines (Vendi score); NaN without rows."""
    if len(matrix) == 0:
        return float("nan")
    unit = unit_rows(matrix).astype(np.float64)
    # Both products have the same eigenvalues, but for zeros.
    product = unit @ unit.T if len(unit) <= unit.shape[1] else unit.T @ unit
    values = np.linalg.eigvalsh(product) / len(unit)
    values = values[values > 1e-12]
    return float(np.exp(-(values * np.log(values)).sum()))


def rules_table(figures: Sequence[RuleFigures]) -> Table:
    """Return the figures as a table for the terminal, one line for each rule.

    Example:
    ```python
    >>> rich.print(rules_table(compare_rules(Overview.of(pool, selected))))
    ```
    """
    table = Table(title="rules at the same budget")
    header, *lines = rules_lines(figures)
    for place, name in enumerate(header):
        table.add_column(name, justify="left" if place == 0 else "right")
    for line in lines:
        table.add_row(*line)
    return table


def rules_lines(figures: Sequence[RuleFigures]) -> list[list[str]]:
    """Return a header and a line for each rule, as text; `-` for a figure that needs embeddings."""
    lines = [["rule", "rows", "mean score", "clusters", "distance to the nearest row", "effective number of rows"]]
    for of_rule in figures:
        figures_of_spread = (f"{of_rule.neighbour_distance:.3f}", f"{of_rule.effective_number:.1f}")
        spread = ["-" if text == "nan" else text for text in figures_of_spread]
        lines.append([of_rule.rule, f"{of_rule.rows:,}", f"{of_rule.mean_score:.4f}", f"{of_rule.clusters:,}", *spread])
    return lines
