"""k-means in torch, on the CPU or a GPU: Lloyd's algorithm by matrix products, over points that come chunk by chunk.

Does: fit on all points, or on a sample of them followed by full passes; give points their nearest centre. Everything is
deterministic for a seed: what is added in parallel is added by sorting, never by float atomics.
Does not: hold more than the points it fits on and one block of distances; read data or project it (cluster_fitting.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from car_datasets.vectors import Matrix

CHUNK, GPU_CHUNK = 16_384, 2**18  # points whose sums are added up in float32 before they join the float64 totals
CPU_BLOCK, GPU_BLOCK = 2**18, 2**26  # distances in memory at a time: what the second-level cache holds; 256 MB
MAX_ITERATIONS = 100
TOLERANCE = 2e-4  # a pass that lowers the inertia by less than this share is the last
BEYOND = 0.5  # how far beyond the mean of its points a centre first goes; 0.75 is too far
CANDIDATES = 20  # points to choose each first centre from, two passes' time; 10 miss groups, all take ten times as long
FULL_PASSES = 2  # over all points, after the fit on a sample


class Fitted(NamedTuple):
    """Centres of shape `(k, dimension)`, and the sum of squared distances of all points to the nearest one."""

    centers: Tensor
    inertia: float


class Pass(NamedTuple):
    """What one pass over the points leaves: per cluster the sum (float64) and the number of its points, the inertia of
    the centres that the pass was made with, and the points farthest from theirs, with the clusters they came from."""

    sums: Tensor
    counts: Tensor
    inertia: float
    far_points: Tensor
    far_labels: Tensor


def fit_kmeans(
    read: Callable[[], Iterable[Matrix]],
    project: Callable[[Matrix], Tensor],
    rows: int,
    k: int,
    *,
    seed: int,
    n_init: int = 1,
    sample: int = 0,
) -> Fitted:
    """Fit k centres.

    Args:
        read (`callable`): gives all rows, chunk by chunk; called once for each pass over them.
        project (`callable`): from a chunk of rows to its points, `(rows, dimension)` float32, on the device to compute on.
        rows (`int`): in all.
        k (`int`): centres, at most `rows`.
        seed (`int`): of whatever is drawn; n_init (`int`): the best of so many first centres is kept.
        sample (`int`): where there are more than `sample * k` rows, fit on so many drawn ones, then correct the centres by
            two passes over all, and count the inertia by a third; 0 fits on all.

    Returns:
        [`Fitted`]: centres (float32, on the points' device) and their inertia over all points.
    """
    rng = np.random.default_rng(seed)
    drawn = sample * k if 0 < sample * k < rows else rows
    held = take(read(), project, np.sort(rng.choice(rows, drawn, replace=False, shuffle=False)))
    runs = [lloyd(held, first_centers(held, k, rng)) for _ in range(n_init)]
    best = min(runs, key=lambda fitted: fitted.inertia)
    if drawn == rows:
        return best
    centers = best.centers
    for _ in range(FULL_PASSES):
        centers = next_centers(one_pass(map(project, read()), centers), centers)
    return Fitted(centers, sum(float(nearest(points, centers)[1].double().sum()) for points in map(project, read())))


def take(chunks: Iterable[Matrix], project: Callable[[Matrix], Tensor], places: npt.NDArray[np.int64]) -> Tensor:
    """The points of the rows at `places` (ascending, counted over all chunks), filled into one tensor chunk by chunk."""
    held: Tensor | None = None
    start = filled = 0
    for chunk in chunks:
        first, last = np.searchsorted(places, (start, start + len(chunk)))
        wanted = chunk if last - first == len(chunk) else chunk[places[first:last] - start]
        points = project(wanted)
        if held is None:
            held = points.new_empty((len(places), points.shape[1]))
        held[filled : filled + len(points)] = points
        start, filled = start + len(chunk), filled + len(points)
    if held is None:
        raise ValueError("There are no rows to fit on.")
    return held


def first_centers(points: Tensor, k: int, rng: np.random.Generator) -> Tensor:
    """k different points, far apart: scikit-learn's greedy k-means++ among `CANDIDATES * k` points drawn by `rng`.

    On embeddings points drawn at random do as well; on rows in tight groups they miss some.
    """
    from sklearn.cluster import kmeans_plusplus

    drawn = np.sort(rng.choice(len(points), min(len(points), CANDIDATES * k), replace=False))
    candidates = points[torch.from_numpy(drawn).to(points.device)].cpu().numpy()
    _, chosen = kmeans_plusplus(candidates.astype(np.float64), k, random_state=int(rng.integers(2**32)))
    return points[torch.from_numpy(drawn[chosen]).to(points.device)]


def lloyd(points: Tensor, centers: Tensor) -> Fitted:
    """Lloyd's algorithm on points in memory, until a pass lowers the inertia by less than `TOLERANCE` of it.

    Centres first go beyond the mean of their points: on embeddings of 9,229 real rows 12 passes then reach what takes 22
    without. Once that no longer helps they go to the mean, so that what is found is a solution of Lloyd's.
    """
    found = one_pass([points], centers)
    beyond = BEYOND
    for _ in range(MAX_ITERATIONS):
        centers = next_centers(found, centers, beyond)
        before, found = found.inertia, one_pass([points], centers)
        if before - found.inertia <= TOLERANCE * before:
            if beyond == 0:
                break
            beyond = 0.0
    return Fitted(centers, found.inertia)


def one_pass(points: Iterable[Tensor], centers: Tensor) -> Pass:
    """Give every point to its nearest centre, and add up what the next centres are made of."""
    sums = torch.zeros(centers.shape, dtype=torch.float64, device=centers.device)
    counts = torch.zeros(len(centers), dtype=torch.int64, device=centers.device)
    inertia = torch.zeros((), dtype=torch.float64, device=centers.device)
    far_distances, far_points, far_labels = centers.new_empty(0), centers[:0], counts[:0]
    for chunk in _chunks(points):
        labels, distances = nearest(chunk, centers)
        sums += sums_by_label(chunk, labels, len(centers))
        counts += torch.bincount(labels, minlength=len(centers))
        inertia += distances.double().sum()
        farthest = distances.topk(min(len(centers), len(chunk)))
        far_distances = torch.cat([far_distances, farthest.values])
        kept = far_distances.topk(min(len(centers), len(far_distances)))
        far_distances = kept.values
        far_points = torch.cat([far_points, chunk[farthest.indices]])[kept.indices]
        far_labels = torch.cat([far_labels, labels[farthest.indices]])[kept.indices]
    return Pass(sums, counts, float(inertia), far_points, far_labels)


def nearest(points: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Labels (int64) of the nearest centres, the first among equals, and squared distances (float32), of shape `(points,)`.

    The distances come from the matrix product: they are exact to some 1e-6 of the squared lengths.
    """
    labels = torch.empty(len(points), dtype=torch.int64, device=points.device)
    halves = torch.empty(len(points), dtype=points.dtype, device=points.device)  # |c|^2 / 2 - x c, at its least
    half_lengths = (centers**2).sum(dim=1) / 2
    rows = max(1, (CPU_BLOCK if points.device.type == "cpu" else GPU_BLOCK) // len(centers))
    for start in range(0, len(points), rows):
        block = slice(start, start + rows)
        products = torch.addmm(half_lengths, points[block], centers.T, alpha=-1)
        torch.min(products, dim=1, out=(halves[block], labels[block]))
    return labels, (2 * halves + torch.linalg.vector_norm(points, dim=1) ** 2).clamp_(min=0)


def sums_by_label(points: Tensor, labels: Tensor, k: int) -> Tensor:
    """The sum of the points of every label, `(k, dimension)`, in a fixed order of addition."""
    if points.device.type == "cpu":
        return points.new_zeros((k, points.shape[1])).index_add_(0, labels, points)
    return segment_sums(points, labels, k)  # index_add_ adds by atomics on a GPU, in whatever order


def segment_sums(points: Tensor, labels: Tensor, k: int) -> Tensor:
    """As [`sums_by_label`], by sorting: every label's points lie together and are added one after the other."""
    order = labels.argsort(stable=True)
    return torch.segment_reduce(points[order], "sum", lengths=torch.bincount(labels, minlength=k), axis=0)


def next_centers(found: Pass, centers: Tensor, beyond: float = 0.0) -> Tensor:
    """The mean of every cluster's points, or a point `beyond` it by that share of the way that leads there.

    An empty cluster gets one of the points that lie farthest from their centre.
    """
    sums, counts = found.sums.clone(), found.counts.clone()
    empty = (counts == 0).nonzero().flatten().tolist()
    for point, label in zip(found.far_points, found.far_labels.tolist(), strict=True) if empty else ():
        if counts[label] > 1 and not torch.equal(point, centers[label]):
            sums[label] -= point
            counts[label] -= 1
            cluster = empty.pop()
            sums[cluster], counts[cluster] = point.double(), 1
        if not empty:
            break
    means = (sums / counts.clamp(min=1).unsqueeze(1)).to(centers.dtype)
    means = torch.where((counts == 0).unsqueeze(1), centers, means)  # with fewer different points than centres
    return torch.where((found.counts == 0).unsqueeze(1), means, means + beyond * (means - centers))


def _chunks(points: Iterable[Tensor]) -> Iterator[Tensor]:
    for tensor in points:
        yield from tensor.split(CHUNK if tensor.device.type == "cpu" else GPU_CHUNK)
