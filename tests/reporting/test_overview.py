"""overview.py: where rows are drawn on the map, which rows are on it, and that a seed fixes both."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest
from datasets import Dataset

from car_datasets import select_car
from car_datasets.reporting import maps
from car_datasets.reporting.maps import map_of
from car_datasets.reporting.overview import Overview
from tests.reporting.test_plots import make_pool


@pytest.fixture(scope="module")
def pool() -> Dataset:
    return make_pool(clusters=3)


@pytest.fixture(scope="module")
def seen(pool: Dataset) -> Overview:
    return Overview.of(pool, select_car(pool, 40, 1))


def test_pca_is_that_of_scikit_learn(pool: Dataset, seen: Overview) -> None:
    from sklearn.decomposition import PCA

    found = map_of(seen)
    assert found is not None
    assert found.method == "PCA"
    assert found.rows.tolist() == list(range(300))
    expected = PCA(2).fit_transform(np.array(pool["embedding"][:]))
    for axis in (0, 1):
        assert abs(np.corrcoef(found.points[:, axis], expected[:, axis])[0, 1]) > 0.9999
    assert np.abs(found.points).max() == 1


@pytest.mark.parametrize("offset", [0, 100])
def test_points_are_the_first_two_components_to_1e_6(offset: float, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    matrix = (rng.normal(size=(500, 24)) * np.linspace(0.4, 0.1, 24)).astype(np.float32)
    matrix[:, 3] += offset  # far from the origin, where float32 has few digits
    centred = matrix - matrix.astype(np.float64).mean(axis=0)
    components = np.linalg.svd(centred, full_matrices=False)[2][:2]
    expected = centred @ (components * np.sign(components[[0, 1], np.abs(components).argmax(axis=1)])[:, None]).T
    found = maps._project(matrix, "pca", seed=42)
    assert np.abs(found - expected).max() < (1e-6 if offset == 0 else 1e-5)  # 100 in float32 is 7.6e-6 apart
    monkeypatch.setattr(maps, "MAP_ROWS", 300)  # components from every other row
    assert np.abs(np.corrcoef(maps._project(matrix, "pca", seed=42)[:, 0], expected[:, 0])[0, 1]) > 0.95


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_clusters_lie_apart_and_a_seed_gives_one_map(pool: Dataset, seen: Overview, method: str) -> None:
    found, again = (map_of(seen, method=method) for _ in range(2))
    assert found is not None
    assert again is not None
    assert np.array_equal(found.points, again.points)
    centers = np.array([found.points[seen.clusters == c].mean(axis=0) for c in range(3)])
    apart = np.linalg.norm(found.points[:, None] - centers, axis=2).argmin(axis=1)
    assert (apart == seen.clusters).mean() > 0.9


@pytest.mark.slow  # numba compiles it first
@pytest.mark.skipif(
    importlib.util.find_spec("umap") is None, reason="needs umap-learn: pip install 'car-datasets[umap]'"
)
def test_umap(pool: Dataset, seen: Overview) -> None:
    found = map_of(seen, method="umap")
    assert found is not None
    assert (found.method, found.points.shape) == ("UMAP", (300, 2))


def test_without_umap_the_error_says_what_to_install(
    pool: Dataset, seen: Overview, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)  # as where it is not installed
    with pytest.raises(ValueError, match=r"pip install 'car-datasets\[umap\]'"):
        map_of(seen, method="umap")


def test_an_unknown_projection_is_named(pool: Dataset, seen: Overview) -> None:
    with pytest.raises(ValueError, match=r"projection='lda' is not known; choose one of \('pca', 'tsne', 'umap'\)"):
        map_of(seen, method="lda")


def test_too_few_rows_for_tsne_are_said_to_be_projected_by_pca(seen: Overview) -> None:
    few = map_of(seen, method="tsne", limit=3)
    assert few is not None
    assert (few.method, few.points.shape) == ("PCA", (3, 2))


def test_a_sample_holds_the_selected_rows_first(pool: Dataset, seen: Overview) -> None:
    found = map_of(seen, limit=120)
    assert found is not None
    assert len(found.rows) == 120
    assert set(seen.positions.tolist()) <= set(found.rows.tolist())
    assert np.array_equal(found.rows, np.sort(found.rows))
    few = map_of(seen, limit=20)
    assert few is not None
    assert np.isin(few.rows, seen.positions).sum() == 10


def test_rows_without_an_embedding_are_not_on_the_map() -> None:
    vectors = [None if i % 3 == 0 else [float(i), float(i % 7)] for i in range(300)]
    gappy = make_pool(embedding=vectors)
    found = map_of(Overview.of(gappy, select_car(gappy, 40, 1)))
    assert found is not None
    assert found.rows.tolist() == [i for i in range(300) if i % 3]
