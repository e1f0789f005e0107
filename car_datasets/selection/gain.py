"""Select rows by what they add: the better and the rarer a row's kind is among the chosen, the more (`rule="gain"`).

Does: give every row its soft memberships in the clusters; choose rows greedily by a concave gain of the clusters' mass,
under budget, costs, quotas and pins.
Does not: fit clusters, score rows, or decide which rows are pinned.

The objective is the sum over clusters of mass ** 0.8, after MIG (arXiv 2504.13835). A row adds its memberships times its
score's percentile, which lies between 0 and 1 whatever the scale and the sign of the scores; so a mass counts rows,
weighted by quality. The more a cluster holds, the less the next of its rows adds.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from datasets import Dataset
from datasets.table import InMemoryTable

from car_datasets.clustering.fitting import Projection, clustering_device
from car_datasets.clustering.model import ClusterModel
from car_datasets.selection.filling import Floats, Room, choice_of
from car_datasets.selection.limits import Limits
from car_datasets.selection.rule import BY_GAIN, Choice, Indices
from car_datasets.utils.column_names import ColumnNames
from car_datasets.utils.columns import (
    BATCH,
    Matrix,
    check_columns,
    embedding_batches,
    join_columns,
    matrix_of,
    refuse_other_datasets,
    refuse_overwrite,
)

NEAREST = 3  # clusters that a row belongs to
POWER = 0.8  # of a cluster's mass
UNSCORED = 0.5  # in place of the percentile of a pinned row that has no score
# Gains are compared as whole numbers of this unit: the last digits of a power differ between processors, and would
# decide between rows that add the same.
UNIT = 1e-9
CANDIDATES = 8_192  # rows that are looked at one by one, until another row may add more than they do
DISTANCES = 2**22  # held at a time


# memberships ----------------------------------------------------------------------------------------------------------


def add_memberships(pool: Dataset, model: ClusterModel, names: ColumnNames = ColumnNames()) -> Dataset:
    """Add the nearest clusters of every row, nearest first, and its soft memberships in them.

    A membership is the inverse of the squared distance to the centre in the model's PCA space, divided by the sum over
    the row's clusters, as in fuzzy c-means. The first cluster is the row's label.

    Args:
        pool (`Dataset`): rows with embeddings, of which one batch is read at a time.
        model ([`ClusterModel`]): the model that labelled the pool.
        names ([`ColumnNames`]): names the column of embeddings and the two new columns.

    Returns:
        `Dataset`: the pool with `near_clusters` (lists of int32) and `near_weights` (lists of float32 that sum to 1), of
        `NEAREST` entries, or k if that is less; both are null in rows without an embedding.

    Raises:
        ValueError: a column is missing or would be overwritten, or the embeddings do not fit the model.
    """
    refuse_other_datasets(pool, "add_memberships", "it with the rows in memory: Dataset.from_list(list(pool))")
    new = (names.near_clusters, names.near_weights)
    refuse_overwrite(pool.column_names, new, "other names to the columns, or remove_columns")
    check_columns(pool.column_names, (names.embedding,), ())
    wide = min(NEAREST, model.k)
    near = np.zeros((len(pool), wide), dtype=np.int32)
    weights = np.zeros((len(pool), wide), dtype=np.float32)
    missing = np.ones(len(pool), dtype=bool)
    device = clustering_device()
    project = Projection(model.mean, model.components, device)
    centers = torch.from_numpy(model.centers).to(device)
    for matrix, rows in embedding_batches(pool, names.embedding):
        if matrix.shape[1] != len(model.mean):
            raise ValueError(
                f"The column {names.embedding!r} holds embeddings of {matrix.shape[1]} numbers, the cluster model was "
                f"fitted on {len(model.mean)}. Pass the model that labelled these rows."
            )
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            near[part], weights[part] = soft_memberships(project(matrix[start : start + BATCH]), centers)
        missing[rows] = False
    table = pa.table([_lists(array, missing) for array in (near, weights)], names=new)
    return join_columns(pool, Dataset(InMemoryTable(table)))


def soft_memberships(points: torch.Tensor, centers: torch.Tensor) -> tuple[npt.NDArray[np.int32], Matrix]:
    """Return the `NEAREST` centres of every point, nearest first, and the point's memberships in them.

    Args:
        points (`(rows, dimension)`), centers (`(k, dimension)`): on one device.

    Returns:
        Two arrays of shape `(rows, min(NEAREST, k))`; of equally near centres the lower number comes first.
    """
    wide = min(NEAREST, len(centers))
    near = np.empty((len(points), wide), dtype=np.int32)
    squares = np.empty((len(points), wide), dtype=np.float32)
    half_lengths = (centers**2).sum(dim=1) / 2
    rows = max(1, DISTANCES // len(centers))
    for start in range(0, len(points), rows):
        block = points[start : start + rows]
        # As in k-means: half the squared distance, but for half the squared length of the point.
        halves = torch.addmm(half_lengths, block, centers.T, alpha=-1)
        for place in range(wide):
            # Not topk, which leaves open which of equally near centres it returns.
            half, label = torch.min(halves, dim=1)
            near[start : start + rows, place] = label.cpu().numpy()
            squares[start : start + rows, place] = (2 * half + (block**2).sum(dim=1)).cpu().numpy()
            halves.scatter_(1, label[:, None], torch.inf)
    inverse = 1 / np.maximum(squares, np.float32(1e-9))  # a point that is a centre belongs to it alone
    return near, inverse / inverse.sum(axis=1, keepdims=True)


def _lists(matrix: npt.NDArray[np.int32] | Matrix, missing: npt.NDArray[np.bool_]) -> pa.Array:
    """Return the rows of a matrix as lists, null where they are missing."""
    ends = np.arange(len(matrix) + 1, dtype=np.int32) * matrix.shape[1]
    return pa.ListArray.from_arrays(ends, pa.array(matrix.reshape(-1)), mask=pa.array(missing))


def read_memberships(pool: Dataset, names: ColumnNames = ColumnNames()) -> tuple[Indices, Floats]:
    """Return what [`add_memberships`] added as two arrays of shape `(rows, clusters of a row)`.

    A row without an embedding has the clusters -1 and the memberships 0.

    Args:
        pool (`Dataset`): with both columns.
        names ([`ColumnNames`]): names them.

    Raises:
        ValueError: a column is missing, or does not hold lists of numbers of one length.
    """
    new = (names.near_clusters, names.near_weights)
    check_columns(pool.column_names, new, ())
    table = pool.select_columns(list(new)).with_format("arrow")[:]
    (near, places), (weights, _) = (matrix_of(table[name], name) for name in new)
    found = np.full((len(pool), near.shape[1]), -1, dtype=np.int64), np.zeros((len(pool), near.shape[1]))
    for array, matrix in zip(found, (near, weights), strict=True):
        array[places] = matrix
    return found


# the choice -----------------------------------------------------------------------------------------------------------


def choose_by_gain(scores: npt.ArrayLike, near: npt.ArrayLike, weights: npt.ArrayLike, limits: Limits) -> Choice:
    """Choose rows greedily by how much they raise the sum over clusters of mass ** `POWER`.

    Args:
        scores (`(rows,)` float): higher is better; of any scale, since their percentiles count. NaN marks a row that is
            never chosen, unless it is pinned.
        near (`(rows, m)` int): the clusters of each row, nearest first; -1 where it has none. Rows in no cluster are
            taken for one more cluster.
        weights (`(rows, m)` float): the row's memberships in them, not negative.
        limits ([`Limits`]): budget, costs, quotas and pins. With costs, rows are chosen once by gain and once by gain
            per cost, and the better of the two by the objective is returned: at least half of (1 - 1/e) of the best
            possible. A rest of the budget is then used by swaps, as [`~car_datasets.selection.filling.Room`] explains.

    Returns:
        [`Choice`]: best score first; `cluster_rank` is the rank within the nearest cluster. `selected_by` is `"gain"`
        or `"pin"`. Of rows that add the same the earlier one is chosen.

    Raises:
        ValueError: arrays do not match, a membership is negative, or the pinned rows exceed budget or quota.
    """
    score, clusters, adds = _checked(scores, near, weights)
    rooms = []
    for per_cost in (False, True) if limits.costs is not None else (False,):
        room = Room(limits, score)
        _take_greedily(room, clusters, adds, per_cost)
        room.use_rest()
        rooms.append(room)
    best = max(rooms, key=lambda room: _objective(np.array(room.taken, dtype=np.int64), clusters, adds))
    return choice_of(best, np.asarray(near, dtype=np.int64)[:, 0], BY_GAIN)


def objective_of(rows: npt.ArrayLike, scores: npt.ArrayLike, near: npt.ArrayLike, weights: npt.ArrayLike) -> float:
    """Return the objective of some rows of a pool, which [`choose_by_gain`] raises.

    Args:
        rows (`(chosen,)` int): positions in the pool.
        scores (`(rows,)` float), near (`(rows, m)` int), weights (`(rows, m)` float): as of [`choose_by_gain`].
    """
    _, clusters, adds = _checked(scores, near, weights)
    return _objective(np.asarray(rows, dtype=np.int64), clusters, adds)


def _objective(rows: Indices, clusters: Indices, adds: Floats) -> float:
    mass = np.bincount(clusters[rows].reshape(-1), adds[rows].reshape(-1))
    return float((mass**POWER).sum())


def percentiles_of(scores: Floats) -> Floats:
    """Return the share of the scored rows below each score, counting half of the equal ones; NaN without a score."""
    ordered = np.sort(scores[~np.isnan(scores)])
    below, through = (np.searchsorted(ordered, scores, side=side) for side in ("left", "right"))
    return np.where(np.isnan(scores), np.nan, (below + through) / (2 * max(1, len(ordered))))


def _checked(scores: npt.ArrayLike, near: npt.ArrayLike, weights: npt.ArrayLike) -> tuple[Floats, Indices, Floats]:
    """Return the scores, the clusters of each row and what the row adds to their mass."""
    score = np.asarray(scores, dtype=np.float64)
    clusters, shares = np.array(near, dtype=np.int64), np.array(weights, dtype=np.float64)
    if score.ndim != 1 or clusters.ndim != 2 or clusters.shape != shares.shape or len(clusters) != len(score):
        raise ValueError(
            f"scores have the shape {score.shape}, near {clusters.shape} and weights {shares.shape}; they must be (rows,) "
            "and twice (rows, m)."
        )
    outside = clusters < 0
    shares[outside] = 0
    if not (np.isfinite(shares).all() and (shares >= 0).all()):
        raise ValueError("weights must be finite and not negative. Compute them anew by add_memberships.")
    # Rows in no cluster make one more.
    alone = outside.all(axis=1)
    clusters[outside] = clusters.max(initial=-1) + 1
    shares[alone, 0] = 1
    values = percentiles_of(score)
    values[np.isnan(values)] = UNSCORED
    return score, clusters, shares * values[:, None]


class _Masses:
    """The mass of each cluster while rows are taken, and what a row would add to the objective.

    Numbers of Python, because single rows are looked at far more often than many.
    """

    def __init__(self, clusters: Indices, adds: Floats) -> None:
        self.clusters, self.adds = clusters, adds
        self.mass = [0.0] * (int(clusters.max(initial=0)) + 1)
        self.powers = list(self.mass)

    def put(self, clusters: Sequence[int], adds: Sequence[float]) -> None:
        """Add the masses of one row."""
        for cluster, add in zip(clusters, adds, strict=True):
            self.mass[cluster] += add
            self.powers[cluster] = self.mass[cluster] ** POWER

    def gain(self, clusters: Sequence[int], adds: Sequence[float]) -> int:
        """Return what one row would add to the objective, in `UNIT`s."""
        gain = 0.0
        for cluster, add in zip(clusters, adds, strict=True):
            gain += (self.mass[cluster] + add) ** POWER - self.powers[cluster]
        return round(gain / UNIT)

    def gains(self, rows: Indices) -> Floats:
        """Return what each of some rows would add to the objective, in `UNIT`s."""
        mass, powers = np.array(self.mass), np.array(self.powers)
        clusters = self.clusters[rows]
        gains: Floats = np.rint(((mass[clusters] + self.adds[rows]) ** POWER - powers[clusters]).sum(axis=1) / UNIT)
        return gains


def _take_greedily(room: Room, clusters: Indices, adds: Floats, per_cost: bool) -> None:
    """Take the row of the largest gain, or gain per cost, until no row fits.

    Gains only fall as clusters fill, so a gain that was computed earlier is an upper bound, and only rows of the highest
    bounds have to be computed again ("lazy greedy"). The choice is that of a search through all rows at each step.
    """
    masses = _Masses(clusters, adds)
    for row in room.taken:
        masses.put(clusters[row].tolist(), adds[row].tolist())
    divisors = np.maximum(room.costs, 1) if per_cost else np.ones_like(room.costs)
    left = np.flatnonzero(room.open)
    bounds = np.full(len(adds), -np.inf)
    bounds[left] = masses.gains(left) / divisors[left]
    while len(left := left[bounds[left] >= 0]) and room.left >= room.costs[left].min():
        # All rows outside of `rows` are bound to add less than `floor`.
        floor = np.partition(bounds[left], -min(CANDIDATES, len(left)))[-min(CANDIDATES, len(left))]
        rows = left[bounds[left] >= floor]
        bounds[rows] = masses.gains(rows) / divisors[rows]
        _take_down_to(floor, rows[bounds[rows] >= floor], bounds, (room, masses, divisors))


def _take_down_to(
    floor: float, rows: Indices, bounds: Floats, state: tuple[Room, _Masses, npt.NDArray[np.int64]]
) -> None:
    """Take rows in the order of their gains until these fall below `floor`; bring `bounds` up to date.

    Rows that were taken or do not fit get the bound -inf.
    """
    room, masses, divisors = state
    of_row = {
        row: numbers
        for row, *numbers in zip(
            rows.tolist(),
            masses.clusters[rows].tolist(),
            masses.adds[rows].tolist(),
            divisors[rows].tolist(),
            strict=True,
        )
    }
    # Of equal gains the earlier row comes first.
    heap = list(zip((-bounds[rows]).tolist(), rows.tolist(), strict=True))
    heapq.heapify(heap)
    while heap and room.left > 0:
        bound, row = heap[0]
        clusters, adds, divisor = of_row[row]
        if not room.fits(row):
            bounds[row] = -np.inf
            heapq.heappop(heap)
            continue
        gain = masses.gain(clusters, adds) / divisor
        if gain < -bound:
            bounds[row] = gain
            (heapq.heapreplace(heap, (-gain, row)) if gain >= floor else heapq.heappop(heap))
            continue
        heapq.heappop(heap)
        room.take(row)
        masses.put(clusters, adds)
        bounds[row] = -np.inf
