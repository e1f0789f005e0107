"""k-means in torch, on the CPU or a GPU: Lloyd's algorithm by matrix products, over points that come chunk by chunk.

Does: fit on all points, or on a sample of them followed by full passes; give points their nearest centre. Everything is
deterministic for a seed: what is added in parallel is added by sorting, never by float atomics. Several processes read,
project and hold a part of the points each; what they add is cut where one process cuts it, and joined in float64.
Does not: hold more than the points it fits on and one block of distances; read data or project it (cluster_fitting.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from car_datasets.collectives import Processes
from car_datasets.vectors import Matrix

CPU, ALONE = torch.device("cpu"), Processes()
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


class Chunks(NamedTuple):
    """Rows that come in chunks: how many lie in each, and what reads a range of the chunks, without those that are empty."""

    lengths: Sequence[int]
    read: Callable[[range], Iterable[Matrix]]


class Pass(NamedTuple):
    """What one pass over the points leaves: per cluster the sum (float64) and the number of its points, the inertia of
    the centres that the pass was made with, and the points farthest from theirs, with the clusters they came from and their
    squared distances."""

    sums: Tensor
    counts: Tensor
    inertia: float
    far_points: Tensor
    far_labels: Tensor
    far_distances: Tensor


def fit_kmeans(
    chunks: Chunks,
    project: Callable[[Matrix], Tensor],
    k: int,
    *,
    seed: int,
    n_init: int = 1,
    sample: int = 0,
    device: torch.device = CPU,
    processes: Processes = ALONE,
) -> Fitted:
    """Fit k centres.

    Args:
        chunks ([`Chunks`]): all rows; read once for each pass over them.
        project (`callable`): from a chunk of rows to its points, `(rows, dimension)` float32, on `device`.
        k (`int`): centres, at most as many as rows.
        seed (`int`): of whatever is drawn; n_init (`int`): the best of so many first centres is kept.
        sample (`int`): where there are more than `sample * k` rows, fit on so many drawn ones, then correct the centres by
            two passes over all, and count the inertia by a third; 0 fits on all.
        device (`torch.device`): to compute on.
        processes ([`Processes`]): that share the reading and the passes; all must call this with the same rows.

    Returns:
        [`Fitted`]: centres (float32, on `device`) and their inertia over all points.
    """
    rng = np.random.default_rng(seed)
    rows = sum(chunks.lengths)
    drawn = sample * k if 0 < sample * k < rows else rows
    places = np.sort(rng.choice(rows, drawn, replace=False, shuffle=False))
    share = processes.share(drawn, CHUNK if device.type == "cpu" else GPU_CHUNK)
    held = processes.each(lambda: take(chunks, project, places, share))
    first = (first_centers(held, k, rng, share, drawn, processes).to(device) for _ in range(n_init))
    best = min((lloyd(held, centers, processes) for centers in first), key=lambda fitted: fitted.inertia)
    if drawn == rows:
        return best
    own = processes.share(len(chunks.lengths), 1)
    centers = best.centers
    for _ in range(FULL_PASSES):
        centers = next_centers(pass_of_all(map(project, chunks.read(own)), centers, processes), centers)

    def inertia() -> float:
        return sum(float(nearest(points, centers)[1].double().sum()) for points in map(project, chunks.read(own)))

    return Fitted(centers, processes.joined(inertia, lambda parts: float(sum(parts))))


def take(chunks: Chunks, project: Callable[[Matrix], Tensor], places: npt.NDArray[np.int64], share: range) -> Tensor:
    """The points of the rows at `places[share]`; `places` ascend and are counted over all chunks. None have the shape `(0, 0)`.

    Only chunks that hold some are read, and what is drawn from one is projected at once, whoever's share it is: the last
    digits of a product of matrices depend on the number of rows.
    """
    if len(share) == 0:
        return torch.empty(0, 0)
    ends = np.cumsum(chunks.lengths)
    first, last = np.searchsorted(ends, places[[share.start, share.stop - 1]], side="right")
    start = int(ends[first]) - chunks.lengths[first]
    held: Tensor | None = None
    lowest, stop = np.searchsorted(places, (start, ends[last]))
    filled = int(lowest)
    for chunk in chunks.read(range(int(first), int(last) + 1)):
        here = places[filled : np.searchsorted(places, start + len(chunk))]
        points = project(chunk if len(here) == len(chunk) else chunk[here - start])
        if held is None:
            held = points.new_empty((int(stop - lowest), points.shape[1]))
        held[filled - int(lowest) : filled - int(lowest) + len(points)] = points
        start, filled = start + len(chunk), filled + len(points)
    if held is None:
        raise ValueError("There are no rows to fit on.")
    return held[share.start - int(lowest) : share.stop - int(lowest)]


def first_centers(
    points: Tensor, k: int, rng: np.random.Generator, share: range, rows: int, processes: Processes = ALONE
) -> Tensor:
    """k different points, far apart: scikit-learn's greedy k-means++ among `CANDIDATES * k` points drawn by `rng`.

    On embeddings points drawn at random do as well; on rows in tight groups they miss some.

    Args:
        points (`(len(share), dimension)`): this process's share of the `rows` to draw from.
        k (`int`), rng (`Generator`), processes ([`Processes`]): see [`fit_kmeans`].
    """
    drawn = np.sort(rng.choice(rows, min(rows, CANDIDATES * k), replace=False))
    seed = int(rng.integers(2**32))

    def own() -> Matrix:
        mine = drawn[(drawn >= share.start) & (drawn < share.stop)] - share.start
        found: Matrix = points[torch.from_numpy(mine).to(points.device)].cpu().numpy()
        return found

    def choose(parts: list[Matrix]) -> Tensor:
        from sklearn.cluster import kmeans_plusplus

        candidates = np.concatenate([part for part in parts if len(part) > 0])
        _, chosen = kmeans_plusplus(candidates.astype(np.float64), k, random_state=seed)
        return torch.from_numpy(candidates[chosen])

    return processes.joined(own, choose)


def lloyd(points: Tensor, centers: Tensor, processes: Processes = ALONE) -> Fitted:
    """Lloyd's algorithm on points in memory, until a pass lowers the inertia by less than `TOLERANCE` of it.

    Centres first go beyond the mean of their points: on embeddings of 9,229 real rows 12 passes then reach what takes 22
    without. Once that no longer helps they go to the mean, so that what is found is a solution of Lloyd's.
    """
    found = pass_of_all([points], centers, processes)
    beyond = BEYOND
    for _ in range(MAX_ITERATIONS):
        centers = next_centers(found, centers, beyond)
        before, found = found.inertia, pass_of_all([points], centers, processes)
        if before - found.inertia <= TOLERANCE * before:
            if beyond == 0:
                break
            beyond = 0.0
    return Fitted(centers, found.inertia)


def pass_of_all(points: Iterable[Tensor], centers: Tensor, processes: Processes) -> Pass:
    """[`one_pass`] over the points of all processes, of which `points` are this one's: the same on all."""
    if processes.count == 1:
        return one_pass(points, centers)
    own: list[Pass] = []

    def totals() -> Tensor:
        own.append(one_pass(points, centers))
        inertia = torch.tensor([own[0].inertia], dtype=torch.float64, device=centers.device)
        return torch.cat([own[0].sums.flatten(), own[0].counts.double(), inertia])

    sums, counts, inertia = processes.added(totals).split([centers.numel(), len(centers), 1])
    far = own[0][3:]
    if (counts == 0).any():  # an empty cluster takes one of the farthest points of all
        far = processes.joined(lambda: tuple(t.cpu() for t in own[0][3:]), lambda parts: _farthest(parts, len(centers)))
    return Pass(sums.view_as(centers), counts.long(), float(inertia), *(t.to(centers.device) for t in far))


def one_pass(points: Iterable[Tensor], centers: Tensor) -> Pass:
    """Give every point to its nearest centre, and add up what the next centres are made of."""
    sums = torch.zeros(centers.shape, dtype=torch.float64, device=centers.device)
    counts = torch.zeros(len(centers), dtype=torch.int64, device=centers.device)
    inertia = torch.zeros((), dtype=torch.float64, device=centers.device)
    far = centers[:0], counts[:0], centers.new_empty(0)
    for chunk in _chunks(points):
        labels, distances = nearest(chunk, centers)
        sums += sums_by_label(chunk, labels, len(centers))
        counts += torch.bincount(labels, minlength=len(centers))
        inertia += distances.double().sum()
        farthest = distances.topk(min(len(centers), len(chunk)))
        far = _farthest([far, (chunk[farthest.indices], labels[farthest.indices], farthest.values)], len(centers))
    return Pass(sums, counts, float(inertia), *far)


def _farthest(parts: Sequence[tuple[Tensor, ...]], count: int) -> tuple[Tensor, ...]:
    """Of points, their labels and their squared distances in several parts, the `count` that lie farthest."""
    points, labels, distances = map(torch.cat, zip(*parts, strict=True))
    kept = distances.topk(min(count, len(distances)))
    return points[kept.indices], labels[kept.indices], kept.values


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
        if len(tensor) == 0:
            continue
        yield from tensor.split(CHUNK if tensor.device.type == "cpu" else GPU_CHUNK)
