"""Fit k-means in torch, on the CPU or a GPU: Lloyd's algorithm by matrix products, on points read chunk by chunk.

Does: fit on all points, or on a sample of them followed by full passes; assign points to their nearest centre; share
the work among processes. Equal seeds give equal centres.
Does not: hold more than the points it fits on and one block of distances; read rows or compute components.

Results are the same on every run and on any number of processes: parallel sums are made by sorting, never by float
atomics; shares are cut where a single process cuts its chunks; the parts are added in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from car_datasets.utils.columns import Matrix
from car_datasets.utils.processes import Processes
from car_datasets.utils.settings import N_INIT

CPU, ALONE = torch.device("cpu"), Processes()
CHUNK, GPU_CHUNK = 16_384, 2**18  # points whose sums are added up in float32 before they join the float64 totals
CPU_BLOCK, GPU_BLOCK = 2**18, 2**26  # distances in memory at a time: what the second-level cache holds; 256 MB
# Distances of one call from which the kernels of kmeans_triton.py are used, which take some seconds to compile: a full
# chunk and 2,048 centres, so that a fit takes seconds without them.
TRITON_FROM = 2**29
PIECE = 256  # points of a label that a GPU adds one after the other
MAX_ITERATIONS = 100
TOLERANCE = 2e-4  # a pass that lowers the inertia by less than this share is the last
OVER_RELAXATION = 0.5  # a centre first moves past the mean of its points by this share of its way; 0.75 is too far
# Points per first centre to choose from. 20 take the time of two passes; 10 miss groups, all take ten times as long.
CANDIDATES = 20
FULL_PASSES = 2  # passes over all points after the fit on a sample


class KMeansSettings(NamedTuple):
    """Settings of one fit.

    Args:
        k (`int`): number of centres, at most the number of rows.
        seed (`int`): seed of every random draw.
        n_init (`int`): number of runs from different first centres, of which the best is kept.
        sample (`int`): if there are more than `sample * k` rows, fit on that many drawn ones, then correct the centres
            by `FULL_PASSES` passes over all rows; 0 fits on all rows.
    """

    k: int
    seed: int
    n_init: int = N_INIT
    sample: int = 0


class Fitted(NamedTuple):
    """Centres of shape `(k, dimension)`, and the sum of squared distances of all points to the nearest one."""

    centers: Tensor
    inertia: float


class Chunks(NamedTuple):
    """Rows that are read chunk by chunk.

    Args:
        lengths (`Sequence[int]`): number of rows in each chunk, which may be 0.
        read (`Callable`): takes a range of chunks, yields the matrices of those that are not empty.
    """

    lengths: Sequence[int]
    read: Callable[[range], Iterable[Matrix]]


class Pass(NamedTuple):
    """The result of one pass over the points.

    Args:
        sums (`(k, dimension)` float64), counts (`(k,)` int64): of the points of every cluster.
        inertia (`float`): of the centres that the pass was made with.
        far_points (`(up to k, dimension)`): the points farthest from their centre.
        far_labels, far_distances: the clusters that these came from, and their squared distances.
    """

    sums: Tensor
    counts: Tensor
    inertia: float
    far_points: Tensor
    far_labels: Tensor
    far_distances: Tensor


def fit_kmeans(
    chunks: Chunks,
    project: Callable[[Matrix], Tensor],
    settings: KMeansSettings,
    *,
    device: torch.device = CPU,
    processes: Processes = ALONE,
) -> Fitted:
    """Fit centres to rows that are projected as they are read.

    Args:
        chunks ([`Chunks`]): all rows, read once for each pass over them.
        project (`Callable`): takes a chunk of rows, returns its points, `(rows, dimension)` float32, on `device`.
        settings ([`KMeansSettings`]): number of centres, seed, runs, and sample.
        device (`torch.device`): device to compute on.
        processes ([`Processes`]): the processes that share the work; all must call this with the same rows.

    Returns:
        [`Fitted`]: centres (float32, on `device`) and their inertia over all points.
    """
    k, seed, n_init, sample = settings
    rng = np.random.default_rng(seed)  # every process draws the same
    rows = sum(chunks.lengths)
    drawn = sample * k if 0 < sample * k < rows else rows
    # Sorted, since the chunks are read in order.
    places = np.sort(rng.choice(rows, drawn, replace=False, shuffle=False))
    share = processes.share(drawn, CHUNK if device.type == "cpu" else GPU_CHUNK)
    held = processes.barrier(lambda: take(chunks, project, places, share))
    # A generator: the centres of the next run are drawn after Lloyd's algorithm has ended from these.
    first = (first_centers(held, k, rng, share, drawn, processes).to(device) for _ in range(n_init))
    best = min((lloyd(held, centers, processes) for centers in first), key=lambda fitted: fitted.inertia)
    # Fitted on all rows: there is nothing left to correct.
    if drawn == rows:
        return best
    own = processes.share(len(chunks.lengths), 1)
    centers = best.centers
    for _ in range(FULL_PASSES):
        centers = next_centers(pass_of_all(map(project, chunks.read(own)), centers, processes), centers)
    # One more pass, because each of those above measured the centres that it started from.
    inertia = processes.gather(
        lambda: _inertia(map(project, chunks.read(own)), centers), lambda parts: float(sum(parts))
    )
    return Fitted(centers, inertia)


def take(chunks: Chunks, project: Callable[[Matrix], Tensor], places: npt.NDArray[np.int64], share: range) -> Tensor:
    """Return the points of the rows at `places[share]`, or a tensor of shape `(0, 0)` if the share is empty.

    Args:
        chunks ([`Chunks`]): all rows; only chunks that hold a wanted row are read.
        project (`Callable`): takes a chunk of rows, returns its points.
        places (`(drawn,)` int64): sorted row numbers, counted over all chunks.
        share (`range`): positions in `places`.
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
        # All drawn rows of a chunk are projected at once, also those of another process's share: the last digits of a
        # matrix product depend on the number of rows.
        here = places[filled : np.searchsorted(places, start + len(chunk))]
        points = project(chunk if len(here) == len(chunk) else chunk[here - start])
        if held is None:
            held = points.new_empty((int(stop - lowest), points.shape[1]))
        held[filled - int(lowest) : filled - int(lowest) + len(points)] = points
        start, filled = start + len(chunk), filled + len(points)
    if held is None:
        raise ValueError("chunks: no rows were read to fit on; pass at least one row.")
    return held[share.start - int(lowest) : share.stop - int(lowest)]


def first_centers(
    points: Tensor, k: int, rng: np.random.Generator, share: range, rows: int, processes: Processes = ALONE
) -> Tensor:
    """Return k points far apart: scikit-learn's greedy k-means++ among `CANDIDATES * k` points drawn by `rng`.

    On embeddings, points drawn at random do as well; on rows in tight groups they miss some of the groups.

    Args:
        points (`(len(share), dimension)`): this process's share of the `rows` to draw from.
        k (`int`): number of centres.
        rng (`Generator`): in the same state on every process.
        share (`range`): positions of `points` among the `rows`.
        rows (`int`): number of rows to draw from.
        processes ([`Processes`]): the processes that hold the other shares.
    """
    drawn = np.sort(rng.choice(rows, min(rows, CANDIDATES * k), replace=False))
    seed = int(rng.integers(2**32))
    mine = drawn[(drawn >= share.start) & (drawn < share.stop)] - share.start
    return processes.gather(
        lambda: points[torch.from_numpy(mine).to(points.device)].cpu().numpy(),
        lambda parts: _far_apart(parts, k, seed),
    )


def _far_apart(parts: list[Matrix], k: int, seed: int) -> Tensor:
    from sklearn.cluster import kmeans_plusplus

    # A process without a row to draw from sends an empty matrix of no width.
    candidates = np.concatenate([part for part in parts if len(part) > 0])
    # In float64, because in float32 the sums, and so the drawn centres, differ between processors.
    _, chosen = kmeans_plusplus(candidates.astype(np.float64), k, random_state=seed)
    return torch.from_numpy(candidates[chosen])


def lloyd(points: Tensor, centers: Tensor, processes: Processes = ALONE) -> Fitted:
    """Run Lloyd's algorithm on points in memory until a pass lowers the inertia by less than `TOLERANCE` of it.

    Centres first go beyond the mean of their points: on embeddings of 9,229 real rows, 12 passes then reach what takes
    22 without. Once that no longer helps they go to the mean, so the result is a solution of Lloyd's algorithm.

    Args:
        points (`(rows, dimension)` float32): this process's share of the points.
        centers (`(k, dimension)` float32): first centres, the same on every process.
        processes ([`Processes`]): the processes that hold the other shares.
    """
    current = pass_of_all([points], centers, processes)
    beyond = OVER_RELAXATION
    for _ in range(MAX_ITERATIONS):
        centers = next_centers(current, centers, beyond)
        before, current = current.inertia, pass_of_all([points], centers, processes)
        if before - current.inertia <= TOLERANCE * before:
            # The first time this only ends the overshooting, which keeps the centres away from the means.
            if beyond == 0:
                break
            beyond = 0.0
    return Fitted(centers, current.inertia)


def next_centers(current: Pass, centers: Tensor, beyond: float = 0.0) -> Tensor:
    """Return the mean of every cluster's points, overshot by the share `beyond` of the way from the old centre.

    An empty cluster moves to one of the points that are farthest from their centre.
    """
    sums, counts = current.sums.clone(), current.counts.clone()
    empty = (counts == 0).nonzero().flatten().tolist()
    for point, label in zip(current.far_points, current.far_labels.tolist(), strict=True) if empty else ():
        # A point that is alone in its cluster, or equal to its centre, would only move the hole elsewhere.
        if counts[label] > 1 and not torch.equal(point, centers[label]):
            sums[label] -= point
            counts[label] -= 1
            cluster = empty.pop()
            sums[cluster], counts[cluster] = point.double(), 1
        if not empty:
            break
    means = (sums / counts.clamp(min=1).unsqueeze(1)).to(centers.dtype)
    # Still empty if there are fewer different points than centres: the centre stays where it is.
    means = torch.where((counts == 0).unsqueeze(1), centers, means)
    return torch.where((current.counts == 0).unsqueeze(1), means, means + beyond * (means - centers))


def pass_of_all(points: Iterable[Tensor], centers: Tensor, processes: Processes) -> Pass:
    """Return [`one_pass`] over the points of all processes, equal on each; `points` are those of this one."""
    if processes.count == 1:
        return one_pass(points, centers)
    own = processes.barrier(lambda: one_pass(points, centers))
    inertia = torch.tensor([own.inertia], dtype=torch.float64, device=centers.device)
    packed = torch.cat([own.sums.flatten(), own.counts.double(), inertia])  # one message in place of three
    sums, counts, inertia = processes.all_reduce(lambda: packed).split([centers.numel(), len(centers), 1])
    far = own[3:]
    if (counts == 0).any():  # only an empty cluster needs them: it takes one of the farthest points of all processes
        far = processes.gather(lambda: tuple(t.cpu() for t in own[3:]), lambda parts: _farthest(parts, len(centers)))
    return Pass(sums.view_as(centers), counts.long(), float(inertia), *(t.to(centers.device) for t in far))


def one_pass(points: Iterable[Tensor], centers: Tensor) -> Pass:
    """Assign every point to its nearest centre, and add up what the next centres are computed from."""
    sums = torch.zeros(centers.shape, dtype=torch.float64, device=centers.device)
    counts = torch.zeros(len(centers), dtype=torch.int64, device=centers.device)
    inertia = torch.zeros((), dtype=torch.float64, device=centers.device)
    # k of them are enough, since fewer than k clusters can be empty.
    far = centers[:0], counts[:0], centers.new_empty(0)
    for chunk in _chunks(points):
        labels, distances = nearest(chunk, centers)
        sums += sums_by_label(chunk, labels, len(centers))
        counts += counts_by_label(labels, len(centers))
        inertia += distances.double().sum()
        farthest = distances.topk(min(len(centers), len(chunk)))
        far = _farthest([far, (chunk[farthest.indices], labels[farthest.indices], farthest.values)], len(centers))
    return Pass(sums, counts, float(inertia), *far)


def _chunks(points: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the points in pieces that are small enough to be added up in float32."""
    for tensor in points:
        if len(tensor) == 0:
            continue
        yield from tensor.split(CHUNK if tensor.device.type == "cpu" else GPU_CHUNK)


def _farthest(parts: Sequence[tuple[Tensor, ...]], count: int) -> tuple[Tensor, ...]:
    """Return the `count` farthest of points that come in parts, each of points, labels and squared distances."""
    points, labels, distances = map(torch.cat, zip(*parts, strict=True))
    kept = distances.topk(min(count, len(distances)))
    return points[kept.indices], labels[kept.indices], kept.values


def nearest(points: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Return the label of the nearest centre and the squared distance to it, both of shape `(points,)`.

    Labels are int64, and the first of equally near centres is taken. Distances are float32. They come from the matrix
    product, so they are exact to some 1e-6 of the squared lengths; on large problems on a GPU they are more exact, while
    labels are the same, except where two centres are equally near to within this.
    """
    if points.is_cuda and len(points) * len(centers) >= TRITON_FROM:
        from car_datasets.clustering import kmeans_triton  # imports Triton, which takes a second

        found = kmeans_triton.nearest(points, centers, lambda unsure: nearest_by_products(unsure, centers)[0])
        if found is not None:
            return found
    labels, halves = nearest_by_products(points, centers)
    return labels, (2 * halves + torch.linalg.vector_norm(points, dim=1) ** 2).clamp_(min=0)


def nearest_by_products(points: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Return the label of the nearest centre, and half the squared distance to it minus half that to the origin."""
    labels = torch.empty(len(points), dtype=torch.int64, device=points.device)
    halves = torch.empty(len(points), dtype=points.dtype, device=points.device)
    # |x - c|^2 = |x|^2 + 2 (|c|^2 / 2 - x c): the bracket alone decides which centre is nearest.
    half_lengths = (centers**2).sum(dim=1) / 2
    rows = max(1, (CPU_BLOCK if points.device.type == "cpu" else GPU_BLOCK) // len(centers))
    for start in range(0, len(points), rows):
        block = slice(start, start + rows)
        products = torch.addmm(half_lengths, points[block], centers.T, alpha=-1)
        torch.min(products, dim=1, out=(halves[block], labels[block]))
    return labels, halves


def counts_by_label(labels: Tensor, k: int) -> Tensor:
    """Return the number of points of every label, `(k,)` int64, without a wait for the GPU as in `bincount`."""
    return labels.new_zeros(k).index_add_(0, labels, torch.ones_like(labels))  # integers: their order does not matter


def sums_by_label(points: Tensor, labels: Tensor, k: int) -> Tensor:
    """Return the sum of the points of every label, `(k, dimension)`, added in a fixed order."""
    if points.device.type == "cpu":
        return points.new_zeros((k, points.shape[1])).index_add_(0, labels, points)
    return segment_sums(points, labels, k)  # on a GPU index_add_ adds floats by atomics, in an order that varies


def segment_sums(points: Tensor, labels: Tensor, k: int) -> Tensor:
    """Return [`sums_by_label`], computed by sorting the points by label and adding them in pieces of one label.

    One thread adds the numbers of a piece, so a label of many points must be cut, or all others would wait for it.
    """
    order = labels.to(torch.int16 if k < 2**15 else torch.int32).argsort(stable=True)  # fewer bits to sort by
    counts = counts_by_label(labels, k)
    pieces = (counts + PIECE - 1) // PIECE
    ends = pieces.cumsum(0)
    # As many pieces as there can be, since their true number is known to the GPU alone; those left over are empty.
    number = torch.arange(len(points) // PIECE + k, device=points.device)
    owner = torch.searchsorted(ends, number, right=True).clamp_(max=k - 1)
    begun = (number - (ends - pieces)[owner]) * PIECE
    lengths = (counts[owner] - begun).clamp_(0, PIECE)
    parts = torch.segment_reduce(points[order], "sum", lengths=lengths, axis=0, unsafe=True)
    return torch.segment_reduce(parts, "sum", lengths=pieces, axis=0, unsafe=True)


def _inertia(points: Iterable[Tensor], centers: Tensor) -> float:
    return sum(float(nearest(chunk, centers)[1].double().sum()) for chunk in points)
