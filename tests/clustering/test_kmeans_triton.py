"""kmeans_triton.py: without Triton or a GPU torch's products do the work; on a GPU both give the same labels."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from car_datasets.clustering import kmeans, kmeans_triton
from car_datasets.clustering.kmeans import nearest, nearest_by_products, one_pass

NEEDS_GPU = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0), reason="needs an NVIDIA GPU"
)


def draw(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def refuse(*_: Any) -> Any:
    raise RuntimeError("no compiler")


def test_a_kernel_that_fails_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    given_up: set[str] = set()
    monkeypatch.setattr(kmeans_triton, "triton", object())
    monkeypatch.setattr(kmeans_triton, "_given_up", given_up)
    monkeypatch.setattr(kmeans_triton, "_labels", refuse)
    points = draw(40, 8)
    assert kmeans_triton.nearest(points, points[:5], refuse) is None
    assert given_up == {"RuntimeError: no compiler"}
    monkeypatch.setattr(kmeans_triton, "_labels", lambda *_: pytest.fail("tried again"))
    assert kmeans_triton.nearest(points, points[:5], refuse) is None


@pytest.mark.parametrize(
    ("points", "centers"),
    [
        (draw(8, 40).T, draw(5, 8)),
        (draw(40, 300), draw(5, 300)),
        (draw(40, 8).double(), draw(5, 8).double()),
        (draw(40, 8), draw(1, 8)),
    ],
    ids=["in columns", "wide", "float64", "one centre"],
)
def test_what_the_kernels_do_not_read_is_left_to_torch(
    points: Tensor, centers: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kmeans_triton, "triton", object())
    monkeypatch.setattr(kmeans_triton, "_labels", lambda *_: pytest.fail("read them"))
    assert kmeans_triton.nearest(points, centers, refuse) is None


def test_points_that_rounding_could_decide_are_decided_again(monkeypatch: pytest.MonkeyPatch) -> None:
    points, centers = draw(40, 8), draw(5, 8, seed=1)
    labels, _ = nearest(points, centers)
    unsure = torch.zeros(40, dtype=torch.int8)
    unsure[[3, 17]] = 1
    monkeypatch.setattr(kmeans_triton, "triton", object())
    monkeypatch.setattr(kmeans_triton, "_given_up", set())
    # Wrong exactly where it says that it is not sure.
    monkeypatch.setattr(kmeans_triton, "_labels", lambda *_: (torch.where(unsure > 0, labels + 1, labels), unsure))
    monkeypatch.setattr(kmeans_triton, "_squared_distances", lambda x, c, at: ((x - c[at]) ** 2).sum(dim=1))
    asked: list[int] = []

    def decide(some: Tensor) -> Tensor:
        asked.append(len(some))
        return nearest_by_products(some, centers)[0]

    found = kmeans_triton.nearest(points, centers, decide)
    assert found is not None
    assert torch.equal(found[0], labels)
    torch.testing.assert_close(found[1], nearest(points, centers)[1], rtol=1e-4, atol=1e-4)
    assert asked == [2]


INTERPRETED = """
import torch
from car_datasets.clustering import kmeans_triton
from car_datasets.clustering.kmeans import nearest_by_products

torch.manual_seed(0)
for rows, width, k, size in ((300, 243, 70, 1.0), (257, 8, 300, 1e-3), (5, 3, 2, 1e4)):
    points = torch.randn(rows, width) * size
    centers = torch.cat([points[: k // 2], torch.randn(k, width) * size])[:k]
    labels, near = kmeans_triton._labels(points, centers, False)
    exact = torch.cdist(points.double(), centers.double()).argmin(dim=1)
    assert ((labels == exact) | (near != 0)).all()
    assert (near != 0).float().mean() < 0.1
    found = kmeans_triton.nearest(points, centers, lambda x: nearest_by_products(x, centers)[0], tuned=False)
    assert torch.equal(found[0], exact)
    assert torch.allclose(found[1], ((points - centers[exact]) ** 2).sum(dim=1), rtol=1e-5)
print("equal")
"""


@pytest.mark.slow
def test_interpreted_on_the_cpu_the_kernels_are_sure_of_right_labels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="needs Triton, which comes with torch for GPUs")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True, check=False)
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("the interpreter of Triton does not know this numpy")
    assert done.stdout == "equal\n", done.stderr[-2000:]


@NEEDS_GPU
@pytest.mark.parametrize(("rows", "width", "k", "size"), [(20_000, 243, 700, 1.0), (9_999, 30, 2_000, 1e-3)])
def test_on_a_gpu_labels_are_those_of_float32(
    rows: int, width: int, k: int, size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kmeans, "TRITON_FROM", 2**60)
    points = (draw(rows, width) * size).cuda()
    centers = torch.cat([points[: k // 2], (draw(k - k // 2, width, seed=1) * size).cuda()])
    expected, _ = nearest(points, centers)
    by_torch = one_pass([points], centers)
    monkeypatch.setattr(kmeans, "TRITON_FROM", 0)
    monkeypatch.setattr(kmeans_triton, "_given_up", set())
    labels, distances = nearest(points, centers)
    assert kmeans_triton._given_up == set()
    apart = ((points[:, None] - centers[torch.stack([labels, expected], 1)]).double() ** 2).sum(dim=2)
    # Another label only where both centres are equally near, as far as float32 can tell.
    tie = 1e-6 * (points.double() ** 2).sum(dim=1)
    assert ((labels == expected) | ((apart[:, 0] - apart[:, 1]).abs() <= tie)).all()
    assert (labels != expected).sum() <= 2
    torch.testing.assert_close(distances.double(), apart[:, 0], rtol=1e-5, atol=0)
    first, again = (one_pass([points], centers) for _ in range(2))
    assert torch.equal(first.sums, again.sums)
    assert first.inertia == again.inertia
    assert first.inertia == pytest.approx(by_torch.inertia, rel=1e-5)
    assert (first.counts - by_torch.counts).abs().sum() <= 4
