"""Assign points to their nearest centres on an NVIDIA GPU, by Triton kernels that never write the distances to memory.

Does: keep the best and the second best centre of every point while the matrix product is made in float16; let the
caller decide in float32 wherever rounding could have decided otherwise; compute exact distances to the chosen centres.
Does not: run on small problems, or anywhere without Triton, where the products of kmeans.py do the same work.

The product in float16 has the ten bits of TF32 at twice its speed. Points are divided by their largest coordinate, and
centres by that of all, so no number leaves its range. What rounding does is known, because the rounded numbers are: for
a point x, rounded to x', and centres c, rounded to c', the difference of two scores x c is off by at most
2 |x - x'| max |c'| + 2 |x| max |c - c'|. Only where the second best centre is nearer than that can the labels differ.
"""

# No `from __future__ import annotations`: Triton reads the annotations of kernels.

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton comes with torch for GPUs, not with torch for CPUs
    triton = None

WIDEST = 256  # coordinates of a point: they are held on the chip at once
PADDED = 128  # centres are filled up to a multiple of this, the most that any configuration reads at a time

SUMMED = 2.0**-15  # share of |x| |c| by which adding up in float32 can move the difference of two scores
ROWS = 16  # points at a time of the kernels that only read them

_given_up: set[str] = set()  # the reason, once a kernel has failed in this process

if triton is not None:
    # One entry per shape of work on the chip: points and centres at a time, warps, and steps read ahead.
    _CONFIGURATIONS = [
        triton.Config({"ROWS": rows, "COLUMNS": columns}, num_warps=warps, num_stages=stages)
        for rows, columns, warps, stages in ((128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (256, 64, 8, 2))
    ]

    def _round(
        points,
        limits,
        halves,
        factors,
        allowed,
        count,
        width,
        ROWS: tl.constexpr,
        WIDTH: tl.constexpr,
        SUMMED: tl.constexpr,
    ):
        """Write points rounded to float16, what their products are to be multiplied by, and how far a score can be off."""
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        place = tl.arange(0, WIDTH)
        inside = (row < count)[:, None] & (place < width)[None, :]
        x = tl.load(points + row[:, None] * width + place[None, :], mask=inside, other=0.0)
        largest = tl.max(tl.abs(x), axis=1)
        largest = tl.where(largest > 0.0, largest, 1.0)
        scaled = x / largest[:, None]
        half = scaled.to(tl.float16)
        lost = scaled - half.to(tl.float32)
        off = tl.sqrt(tl.sum(lost * lost, axis=1)) * largest
        length = tl.sqrt(tl.sum(x * x, axis=1))
        # What centres were divided by, the greatest length of a rounded centre, and of what rounding took from one.
        unit, longest, furthest = tl.load(limits), tl.load(limits + 1), tl.load(limits + 2)
        limit = 2.0 * (off * longest + length * furthest) + SUMMED * length * longest
        tl.store(halves + row[:, None] * WIDTH + place[None, :], half, mask=(row < count)[:, None])
        tl.store(factors + row, largest * unit, mask=row < count)
        tl.store(allowed + row, limit, mask=row < count)

    def _assign(
        halves,
        rounded,
        half_lengths,
        factors,
        allowed,
        labels,
        near,
        count,
        centers,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        WIDTH: tl.constexpr,
    ):
        """Write the label of every point, and whether the second best centre is nearer than rounding allows."""
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        place = tl.arange(0, WIDTH)
        column = tl.arange(0, COLUMNS)
        half = tl.load(halves + row[:, None] * WIDTH + place[None, :], mask=(row < count)[:, None], other=0.0)
        factor = tl.load(factors + row, mask=row < count, other=0.0)
        best = tl.full([ROWS], float("inf"), tl.float32)
        second = tl.full([ROWS], float("inf"), tl.float32)
        label = tl.zeros([ROWS], tl.int32)
        for start in range(0, centers, COLUMNS):
            block = tl.load(rounded + (start + column)[None, :] * WIDTH + place[:, None])
            score = tl.load(half_lengths + start + column)[None, :] - tl.dot(half, block) * factor[:, None]
            least = tl.min(score, axis=1)
            at = tl.min(tl.where(score == least[:, None], column[None, :], COLUMNS), axis=1)
            next_least = tl.min(tl.where(column[None, :] == at[:, None], float("inf"), score), axis=1)
            second = tl.minimum(tl.maximum(best, least), tl.minimum(second, next_least))
            label = tl.where(least < best, start + at, label)
            best = tl.minimum(best, least)
        tl.store(labels + row, label, mask=row < count)
        # Written as "not greater", so that NaN is left to the caller as well.
        sure = second - best > tl.load(allowed + row, mask=row < count, other=0.0)
        tl.store(near + row, (1 - sure.to(tl.int32)).to(tl.int8), mask=row < count)

    def _distances(points, centers, labels, distances, count, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        place = tl.arange(0, WIDTH)
        inside = (row < count)[:, None] & (place < width)[None, :]
        label = tl.load(labels + row, mask=row < count, other=0)
        x = tl.load(points + row[:, None] * width + place[None, :], mask=inside, other=0.0)
        c = tl.load(centers + label[:, None] * width + place[None, :], mask=inside, other=0.0)
        tl.store(distances + row, tl.sum((x - c) * (x - c), axis=1), mask=row < count)

    _assign_tuned = triton.autotune(_CONFIGURATIONS, key=["WIDTH"], cache_results=True)(
        triton.jit(do_not_specialize=["count"])(_assign)
    )
    _round_alone = triton.jit(do_not_specialize=["count"])(_round)
    _distances_alone = triton.jit(do_not_specialize=["count"])(_distances)


def nearest(
    points: Tensor, centers: Tensor, decide: Callable[[Tensor], Tensor], tuned: bool = True
) -> tuple[Tensor, Tensor] | None:
    """Return the label of the nearest centre of every point and the squared distance to it, or `None` if it cannot.

    Args:
        points (`(rows, dimension)` float32): points, on a GPU.
        centers (`(k, dimension)` float32): centres, on the same one.
        decide (`Callable`): takes the points that lie within rounding of two centres, returns their labels.
        tuned (`bool`): try the configurations and keep the fastest one; else take the first.

    Returns:
        labels (`(rows,)` int64) and squared distances (`(rows,)` float32, added up from the differences), or `None` if
        there is no Triton, a kernel has failed in this process, or the points are of a kind that it does not read.
    """
    if triton is None or _given_up or not _fits(points, centers):
        return None
    try:
        labels, near = _labels(points, centers, tuned)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler that is missing, or does not know the card; torch's products need none
        _given_up.add(f"{type(error).__name__}: {error}")
        logging.getLogger(__name__).info("k-means computes without its Triton kernels.", exc_info=error)
        return None
    again = near.nonzero().flatten()
    labels[again] = decide(points[again])
    return labels, _squared_distances(points, centers, labels)


def _fits(points: Tensor, centers: Tensor) -> bool:
    same = points.dtype == centers.dtype == torch.float32
    return bool(same and points.is_contiguous() and 0 < points.shape[1] <= WIDEST and len(centers) > 1)


def _labels(points: Tensor, centers: Tensor, tuned: bool) -> tuple[Tensor, Tensor]:
    """Return the labels of all points, and a mask of those whose label rounding could have decided."""
    count, width = points.shape
    filled = -(-len(centers) // PADDED) * PADDED
    whole = max(16, 1 << (width - 1).bit_length())
    unit = centers.abs().amax()
    unit = torch.where(unit > 0, unit, 1.0)
    rounded = torch.zeros((filled, whole), dtype=torch.float16, device=points.device)
    rounded[: len(centers), :width] = centers / unit
    back = rounded[: len(centers), :width].float() * unit
    longest, furthest = (matrix.norm(dim=1).amax() for matrix in (back, centers - back))
    half_lengths = torch.full((filled,), float("inf"), device=points.device)
    half_lengths[: len(centers)] = (centers**2).sum(dim=1) / 2
    new = points.new_empty
    halves, factors, allowed = new((count, whole), dtype=torch.float16), new(count), new(count)
    labels, near = new(count, dtype=torch.int64), new(count, dtype=torch.int8)
    limits = torch.stack([unit, longest, furthest])
    _round_alone[(triton.cdiv(count, ROWS),)](
        points, limits, halves, factors, allowed, count, width, ROWS=ROWS, WIDTH=whole, SUMMED=SUMMED
    )
    given = (halves, rounded, half_lengths, factors, allowed, labels, near, count, filled)

    def grid(meta: Any) -> tuple[int]:
        return (triton.cdiv(count, meta["ROWS"]),)

    if tuned:
        _assign_tuned[grid](*given, WIDTH=whole)
    else:
        _assign_tuned.fn[grid](*given, **_CONFIGURATIONS[0].kwargs, WIDTH=whole)
    return labels, near


def _squared_distances(points: Tensor, centers: Tensor, labels: Tensor) -> Tensor:
    """Return the squared distance of every point to the centre of its label, from their difference."""
    count, width = points.shape
    distances = torch.empty(count, device=points.device)
    # Of a fixed shape, not a tuned one: the order of adding must not depend on which was fastest today.
    whole = max(16, 1 << (width - 1).bit_length())
    _distances_alone[(triton.cdiv(count, ROWS),)](
        points, centers.contiguous(), labels, distances, count, width, ROWS=ROWS, WIDTH=whole
    )
    return distances
