"""kmeans.py against brute force and scikit-learn: fixed points, quality, empty clusters, samples, equal rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from car_datasets.clustering import kmeans
from car_datasets.clustering.kmeans import (
    Chunks,
    Fitted,
    KMeansSettings,
    fit_kmeans,
    lloyd,
    nearest,
    next_centers,
    one_pass,
    segment_sums,
    sums_by_label,
)
from car_datasets.utils.columns import Matrix


def groups(rows: int, width: int = 8, of: int = 12, seed: int = 0) -> Matrix:
    """Return points about `of` places, near enough that the borders matter."""
    rng = np.random.default_rng(seed)
    places = rng.normal(size=(of, width)) * 1.5
    return (places[rng.integers(0, of, rows)] + rng.normal(size=(rows, width))).astype(np.float32)


def read_in(points: Matrix, chunks: int = 3) -> Chunks:
    parts = np.array_split(points, chunks)
    return Chunks([len(part) for part in parts], lambda chosen: parts[chosen.start : chosen.stop])


def fit(points: Matrix, k: int, chunks: int = 3, **options: int) -> Fitted:
    return fit_kmeans(read_in(points, chunks), torch.from_numpy, KMeansSettings(k, **{"seed": 0, **options}))


def squared_distances(points: Matrix, centers: Tensor) -> np.ndarray:
    """Return all squared distances, in float64, without a matrix product."""
    apart = points[:, None, :].astype(np.float64) - centers.numpy()[None].astype(np.float64)
    return (apart**2).sum(axis=2)


# one pass -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 50, 2**19])
def test_nearest_equals_brute_force(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans, "CPU_BLOCK", block)
    points, centers = groups(333), torch.from_numpy(groups(20, seed=1))
    labels, distances = nearest(torch.from_numpy(points), centers)
    exact = squared_distances(points, centers)
    assert labels.tolist() == exact.argmin(axis=1).tolist()
    np.testing.assert_allclose(distances, exact.min(axis=1), rtol=1e-4)


def test_the_first_of_equal_centers_is_taken() -> None:
    labels, distances = nearest(torch.ones(4, 2), torch.tensor([[3.0, 3.0], [1.0, 1.0], [1.0, 1.0]]))
    assert labels.tolist() == [1] * 4
    assert distances.tolist() == [0] * 4  # never below


def test_sorting_adds_as_indexing_does() -> None:
    """Compare the sums of a GPU with those of the CPU; one label has no points."""
    points, labels = (
        torch.from_numpy(groups(500)),
        torch.randint(0, 9, (500,), generator=torch.Generator().manual_seed(0)),
    )
    labels[labels == 4] = 5
    expected = np.stack([points.numpy()[labels.numpy() == i].astype(np.float64).sum(axis=0) for i in range(9)])
    for sums in (segment_sums, sums_by_label):
        np.testing.assert_allclose(sums(points, labels, 9), expected, atol=1e-4)


def test_a_pass_does_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    points, centers = torch.from_numpy(groups(300)), torch.from_numpy(groups(15, seed=3))
    whole = one_pass([points], centers)
    monkeypatch.setattr(kmeans, "CHUNK", 7)
    parts = one_pass(points.split(50), centers)
    assert parts.counts.tolist() == whole.counts.tolist()
    assert parts.inertia == pytest.approx(whole.inertia, rel=1e-6)
    torch.testing.assert_close(parts.sums, whole.sums, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(parts.far_points, whole.far_points)
    assert parts.far_labels.tolist() == whole.far_labels.tolist()


def test_empty_clusters_move_to_the_farthest_points() -> None:
    points = torch.tensor([[0.0], [1.0], [2.0], [30.0], [50.0]])
    centers = torch.tensor([[0.0], [900.0], [800.0]])
    found = next_centers(one_pass([points], centers), centers)
    assert sorted(found.flatten().tolist()) == [1.0, 30.0, 50.0]  # and their old cluster has lost them


def test_a_step_beyond_the_mean() -> None:
    points, centers = torch.tensor([[0.0], [2.0], [30.0]]), torch.tensor([[0.0], [40.0], [900.0]])
    found = one_pass([points], centers)
    assert next_centers(found, centers).flatten().tolist() == [
        0.0,
        30.0,
        2.0,
    ]  # the empty one takes the farthest that it may
    assert next_centers(found, centers, 0.5).flatten().tolist() == [0.0, 25.0, 2.0]  # and is not drawn any further


def test_more_centers_than_different_points_stay_where_they_are() -> None:
    points = torch.tensor([[1.0], [1.0], [2.0], [2.0]])
    centers = torch.tensor([[1.0], [2.0], [1.0]])
    assert next_centers(one_pass([points], centers), centers).tolist() == centers.tolist()


# the fit --------------------------------------------------------------------------------------------------------------


def test_from_the_same_centers_it_ends_where_scikit_learn_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans, "TOLERANCE", 0.0)
    monkeypatch.setattr(kmeans, "OVER_RELAXATION", 0.0)
    points = groups(800)
    reference = KMeans(12, init=points[:12], n_init=1, tol=0).fit(points)
    found = lloyd(torch.from_numpy(points), torch.from_numpy(points[:12]))
    np.testing.assert_allclose(found.centers, reference.cluster_centers_, atol=1e-4)
    assert found.inertia == pytest.approx(reference.inertia_, rel=1e-5)


def test_long_steps_end_in_a_solution_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans, "TOLERANCE", 0.0)
    points = groups(800)
    found = lloyd(torch.from_numpy(points), torch.from_numpy(points[:12]))
    further = KMeans(12, init=found.centers.numpy(), n_init=1, tol=0).fit(points)
    np.testing.assert_allclose(further.cluster_centers_, found.centers, atol=1e-4)


def test_long_steps_take_fewer_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    points, counted = torch.from_numpy(groups(4_000, width=32, of=500)), []
    monkeypatch.setattr(kmeans, "TOLERANCE", 1e-5)
    monkeypatch.setattr(kmeans, "one_pass", lambda *given: counted.append(1) or one_pass(*given))
    inertias, passes = [], []
    for beyond in (0.0, kmeans.OVER_RELAXATION):
        monkeypatch.setattr(kmeans, "OVER_RELAXATION", beyond)
        counted.clear()
        inertias.append(np.mean([lloyd(points, points[i : i + 40]).inertia for i in range(0, 800, 200)]))
        passes.append(len(counted))
    assert passes[1] < 0.9 * passes[0]
    assert inertias[1] <= 1.002 * inertias[0]


@pytest.mark.parametrize(("k", "sample", "allowed"), [(12, 0, 1.01), (40, 0, 1.01), (12, 100, 1.02)])
def test_as_good_as_scikit_learn(k: int, sample: int, allowed: float) -> None:
    points = groups(4_000, of=40)
    references = [KMeans(k, n_init=1, random_state=seed).fit(points).inertia_ for seed in range(3)]
    found = [fit(points, k, seed=seed, sample=sample).inertia for seed in range(3)]
    assert np.mean(found) <= allowed * np.mean(references)


@pytest.mark.parametrize("sample", [0, 20])
def test_the_inertia_is_that_of_the_centers(sample: int) -> None:
    points = groups(900)
    found = fit(points, 10, sample=sample)
    assert found.inertia == pytest.approx(squared_distances(points, found.centers).min(axis=1).sum(), rel=1e-5)


@pytest.mark.parametrize("sample", [0, 20])
def test_the_seed_decides(sample: int) -> None:
    points = groups(900)
    first, again, other = (fit(points, 10, seed=seed, sample=sample) for seed in (1, 1, 2))
    assert torch.equal(first.centers, again.centers)
    assert first.inertia == again.inertia
    assert not torch.equal(first.centers, other.centers)


def test_the_best_run_is_kept() -> None:
    points = groups(900, of=30)
    runs = [fit(points, 30, n_init=n).inertia for n in (1, 2, 6)]
    assert runs == sorted(runs, reverse=True)
    assert runs[-1] < runs[0]


def test_a_sample_is_all_that_is_held() -> None:
    """Read 1,000 rows in chunks of 100, of which 5 per cluster are held; the full passes see one chunk at a time."""
    points, seen = groups(1_000), []

    def project(chunk: Matrix) -> Tensor:
        seen.append(len(chunk))
        return torch.from_numpy(chunk)

    fit_kmeans(read_in(points, 10), project, KMeansSettings(4, seed=0, sample=5))
    assert (sum(seen[:10]), seen[10:]) == (20, [100] * 30)


def test_full_passes_mend_what_a_sample_missed() -> None:
    points = groups(3_000, of=40)
    exact, sampled = fit(points, 30).inertia, fit(points, 30, sample=8)
    rng = np.random.default_rng(0)  # what the sampled fit draws
    places = np.sort(rng.choice(3_000, 240, replace=False, shuffle=False))
    held = kmeans.take(read_in(points), torch.from_numpy, places, range(240))
    alone = lloyd(held, kmeans.first_centers(held, 30, rng, range(240), 240)).centers
    assert exact <= sampled.inertia < squared_distances(points, alone).min(axis=1).sum()


@pytest.mark.parametrize("places", [[], [0], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [2, 3, 9], [4, 5]])
def test_take_finds_rows_over_chunks(places: list[int]) -> None:
    rows = np.arange(20, dtype=np.float32).reshape(10, 2)
    found = [
        kmeans.take(read_in(rows, 4), torch.from_numpy, np.array(places, dtype=np.int64), share).tolist()
        for share in (range(len(places)), range(len(places) // 2), range(len(places) // 2, len(places)))
    ]
    assert found[0] == found[1] + found[2] == rows[places].tolist()


# what data can be like ------------------------------------------------------------------------------------------------


def test_one_cluster_is_the_mean() -> None:
    points = groups(200)
    np.testing.assert_allclose(fit(points, 1).centers[0], points.mean(axis=0), atol=1e-5)


def test_as_many_clusters_as_rows() -> None:
    points = groups(50)
    found = fit(points, 50)
    assert sorted(nearest(torch.from_numpy(points), found.centers)[0].tolist()) == list(range(50))
    assert found.inertia == pytest.approx(0, abs=1e-3)


@pytest.mark.filterwarnings("error")
def test_equal_rows_and_one_row() -> None:
    for points, k in ((np.ones((30, 3), dtype=np.float32), 4), (np.ones((1, 3), dtype=np.float32), 1)):
        found = fit(points, k, chunks=1)
        assert found.centers.tolist() == [[1.0, 1.0, 1.0]] * k
        assert found.inertia == 0


def test_many_copies_of_one_row_leave_clusters_for_the_others() -> None:
    """Fit rows of which nine in ten are equal; they take one of 20 clusters."""
    points = groups(1_000, of=25)
    points[100:] = points[0]
    labels, _ = nearest(torch.from_numpy(points), fit(points, 20).centers)
    assert len(set(labels[100:].tolist())) == 1
    assert len(set(labels.tolist())) == 20


@pytest.mark.parametrize("rows", [500, 5_000])
def test_vectors_of_length_one(rows: int) -> None:
    points = groups(rows, width=64, of=40)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    reference = KMeans(20, n_init=3, random_state=0).fit(points).inertia_
    assert fit(points, 20, n_init=3).inertia <= 1.01 * reference


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("sample", [0, 64])
def test_on_a_gpu_the_seed_decides_too(sample: int) -> None:
    points = groups(60_000, width=64, of=80)

    def on_gpu(chunk: Matrix) -> Tensor:
        return torch.from_numpy(chunk).cuda()

    first, again = (
        fit_kmeans(read_in(points), on_gpu, KMeansSettings(64, seed=0, sample=sample), device=torch.device("cuda"))
        for _ in range(2)
    )
    assert torch.equal(first.centers, again.centers)
    assert first.inertia == again.inertia
    assert first.inertia <= 1.01 * fit(points, 64, sample=sample).inertia
