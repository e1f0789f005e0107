"""fitting.py: the default engine against scikit-learn, columns in batches, bad settings, streamed covariance."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Features, List, Value, concatenate_datasets, load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA

from car_datasets import ClusterModel, Recipe, cluster_filter
from car_datasets.clustering.fitting import Covariance, FitSettings, Numbers, number_of_clusters, project
from car_datasets.clustering.model import ENGINES
from car_datasets.utils import columns
from car_datasets.utils.columns import Matrix, read_embeddings


def embeddings(rows: int, width: int = 12, seed: int = 0) -> np.ndarray:
    """Return unit vectors around some 30 topics, whose columns have less and less variance."""
    rng = np.random.default_rng(seed)
    topics = rng.normal(size=(30, width)) * 0.9 ** np.arange(width)
    found = topics[rng.integers(0, 30, rows)] + 0.4 * rng.normal(size=(rows, width)) * 0.9 ** np.arange(width)
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def dataset_of(rows: Any, kind: Any = None) -> Dataset:
    types = Features({"embedding": kind or List(Value("float32"))})
    return Dataset.from_dict({"embedding": [None if r is None else list(r) for r in rows]}, features=types)


@pytest.fixture(scope="module")
def data() -> Dataset:
    return dataset_of(embeddings(2_000))


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "BATCH", 300)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("share", [0.5, 0.95, 1.0])
def test_components_are_those_of_scikit_learn(data: Dataset, share: float) -> None:
    model = ClusterModel.fit(data, explained_variance=share)
    pca = PCA(None if share == 1 else share, svd_solver="full").fit(embeddings(2_000).astype(np.float64))
    np.testing.assert_allclose(model.components, pca.components_, atol=1e-4)
    np.testing.assert_allclose(model.mean, pca.mean_, atol=1e-6)
    assert model.explained_variance == pytest.approx(pca.explained_variance_ratio_.sum(), abs=1e-6)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize(("sample", "allowed"), [(256, 1.01), (0, 1.01), (16, 1.03)])
def test_clusters_are_as_tight_as_scikit_learns(data: Dataset, sample: int, allowed: float) -> None:
    references = [ClusterModel.fit(data, seed=seed, kmeans="sklearn").inertia for seed in range(3)]
    found = [ClusterModel.fit(data, seed=seed, kmeans_sample=sample) for seed in range(3)]
    assert np.mean([model.inertia for model in found]) <= allowed * np.mean(references)
    for model in found:
        assert model.inertia == pytest.approx((model.assign(embeddings(2_000))[1] ** 2).sum(), rel=1e-4)


@pytest.mark.parametrize("sample", [256, 0, 16])
def test_the_way_the_column_is_stored_does_not_matter(data: Dataset, tmp_path: Path, sample: int) -> None:
    expected = ClusterModel.fit(data, kmeans_sample=sample)
    data.save_to_disk(tmp_path / "saved", num_shards=3)
    kinds = (load_from_disk(tmp_path / "saved"), data.cast_column("embedding", List(Value("float32"), length=12)))
    for stored in (*kinds, concatenate_datasets([data.select(range(700)), data.select(range(700, 2_000))])):
        found = ClusterModel.fit(stored, kmeans_sample=sample)
        np.testing.assert_allclose(found.centers, expected.centers, atol=1e-5)


def test_half_precision_hardly_changes_the_clusters(data: Dataset) -> None:
    half = data.cast_column("embedding", List(Value("float16"), length=12))
    assert ClusterModel.fit(half).inertia == pytest.approx(ClusterModel.fit(data).inertia, rel=0.01)


@pytest.mark.usefixtures("small_batches")
def test_whole_batches_without_an_embedding(data: Dataset) -> None:
    rows = [*[None] * 400, *embeddings(2_000), *[None] * 700]
    model = ClusterModel.fit(dataset_of(rows), k=20)
    labels = model.label(dataset_of(rows))["cluster"][:]
    assert [label is None for label in labels] == [row is None for row in rows]
    np.testing.assert_allclose(model.inertia, ClusterModel.fit(data, k=20).inertia, rtol=0.02)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kmeans_sample", [256, 2])
def test_equal_rows_and_constant_columns(kmeans_sample: int) -> None:
    equal = dataset_of([[1.0, 2.0, 3.0]] * 40)
    model = ClusterModel.fit(equal, kmeans_sample=kmeans_sample)
    assert (model.inertia, set(model.label(equal)["cluster"])) == (0, {0})
    rows = embeddings(200)
    rows[:, 3:] = 0.5
    model = ClusterModel.fit(dataset_of(rows), kmeans_sample=kmeans_sample, explained_variance=0.9999)
    assert len(model.components) <= 3


def test_every_row_its_own_cluster() -> None:
    data = dataset_of(embeddings(40))
    for kmeans in ("torch", "sklearn"):
        labels = ClusterModel.fit(data, k=40, kmeans=kmeans, explained_variance=1.0).label(data)["cluster"]
        assert sorted(labels) == list(range(40))


@pytest.mark.parametrize("fit", [ClusterModel.fit, lambda data, **options: cluster_filter(data, n1=5, **options)])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kmeans": "faiss"}, re.escape(f"kmeans='faiss' is not known; choose one of {tuple(ENGINES)}")),
        ({"kmeans_sample": -1}, "kmeans_sample=-1 must be a number of rows per cluster, or 0 for all rows"),
        ({"kmeans_sample": 2.5}, r"kmeans_sample=2\.5 must be"),
        ({"kmeans_sample": True}, "kmeans_sample=True must be"),
    ],
    ids=str,
)
def test_bad_settings_are_named(data: Dataset, fit: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(data.add_column("iqs_score", np.arange(2_000.0)), **options)


@pytest.mark.parametrize(
    ("settings", "engine"),
    [
        ({}, "torch"),
        ({"procedure": "paper"}, "sklearn"),
        ({"procedure": "paper", "kmeans": "torch"}, "torch"),
        ({"kmeans": "sklearn"}, "sklearn"),
    ],
    ids=str,
)
def test_the_paper_keeps_scikit_learn(settings: dict[str, str], engine: str) -> None:
    assert Recipe(**settings).kmeans_engine == engine


def fit_first_rows(dataset: Dataset, column: str, settings: FitSettings) -> Numbers:
    """Fit as an engine from outside the package: the first k rows are the centres, and nothing is projected away."""
    matrix, _ = read_embeddings(dataset, column)
    k, width = number_of_clusters(settings.k, len(matrix)), matrix.shape[1]
    mean, components = matrix.mean(axis=0), np.eye(width, dtype=np.float32)
    return Numbers(mean, components, project(matrix[:k], mean, components), 1.0, 0.0)


def test_an_engine_is_a_function_and_a_row_in_the_table(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENGINES, "first rows", fit_first_rows)
    model = ClusterModel.fit(data, k=7, kmeans="first rows")
    assert model.label(data)["cluster"][:7] == list(range(7))
    with pytest.raises(ValueError, match=re.escape(f"choose one of {tuple(ENGINES)}")):
        ClusterModel.fit(data, kmeans="faiss")


# --- streamed covariance, against scikit-learn's PCA and float64 arithmetic


def correlated(count: int, width: int = 16, seed: int = 0) -> Matrix:
    """Return correlated rows whose directions each have their own variance, away from the origin."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(count, width)) * 0.8 ** np.arange(width) @ rng.normal(size=(width, width))
    return (mixed + rng.normal(size=width)).astype(np.float32)


def joined(parts: list[Matrix]) -> Covariance:
    """Return the covariance of all parts, merged one after the other."""
    found = Covariance.of(parts[0])
    for part in parts[1:]:
        found.merge(Covariance.of(part))
    return found


@pytest.mark.parametrize("share", [0.3, 0.95, 0.999, 1.0])
@pytest.mark.parametrize("count", [5, 17, 400])
def test_components_of_merged_covariances_are_those_of_scikit_learn(count: int, share: float) -> None:
    matrix = correlated(count)
    pca = PCA(None if share == 1 else share, svd_solver="full").fit(matrix.astype(np.float64))
    components, held = joined(np.array_split(matrix, 4)).principal_components(share)
    variances = pca.explained_variance_ratio_
    real = variances > 1e-5  # with fewer rows than columns, the last component is any direction without variance
    assert len(components) == len(variances)
    np.testing.assert_allclose(components[real], pca.components_[real], atol=1e-4)  # in their signs too
    assert held == pytest.approx(variances.sum(), abs=1e-6)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(st.lists(st.integers(1, 39), max_size=5), st.randoms(use_true_random=False))
def test_cuts_and_their_order_hardly_matter(cuts: list[int], order: object) -> None:
    matrix = correlated(40)
    whole = Covariance.of(matrix)
    parts = [part for part in np.split(matrix, sorted(cuts)) if len(part) > 0]
    order.shuffle(parts)  # type: ignore[attr-defined]
    found = joined(parts)
    assert found.rows == 40
    np.testing.assert_allclose(found.mean, whole.mean, atol=1e-6)
    np.testing.assert_allclose(found.products, whole.products, atol=1e-5 * np.trace(whole.products))


def test_readers_can_be_joined_in_a_tree() -> None:
    parts = [Covariance.of(part) for part in np.array_split(correlated(300), 4)]
    left, right = joined(np.array_split(correlated(300), 4)[:2]), parts[2]
    right.merge(parts[3])
    left.merge(right)
    whole = Covariance.of(correlated(300))
    np.testing.assert_allclose(left.products, whole.products, atol=1e-5 * np.trace(whole.products))


def test_rows_far_from_the_origin_lose_no_digits() -> None:
    """Use rows whose sum of squares minus the square of the sum has no correct digit: 1e8 and 1, in float32."""
    matrix = correlated(2_000) + np.float32(1e4)
    exact = np.cov(matrix.astype(np.float64), rowvar=False) * (len(matrix) - 1)
    found = joined(np.array_split(matrix, 7))
    np.testing.assert_allclose(found.products, exact, atol=1e-5 * np.trace(exact))
    np.testing.assert_allclose(found.mean, matrix.astype(np.float64).mean(axis=0), rtol=1e-9)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
@pytest.mark.parametrize("count", [1, 3, 5_000])
def test_equal_rows_have_one_axis(count: int, value: float) -> None:
    parts = [np.full((count, 3), value, dtype=np.float32)] * 3
    components, share = joined(parts).principal_components(0.95)
    assert components.tolist() == [[1, 0, 0]]
    assert share == 1.0


def test_constant_columns_are_in_no_component() -> None:
    matrix = correlated(200, 6)
    matrix[:, [1, 4]] = 0.3, 7.0
    components, _ = joined(np.array_split(matrix, 3)).principal_components(0.9999)
    assert 1 < len(components) <= 4
    np.testing.assert_allclose(components[:, [1, 4]], 0, atol=1e-6)


def test_the_largest_entry_of_a_component_is_positive() -> None:
    components, _ = Covariance.of(correlated(50)).principal_components(1)
    assert (components[np.arange(16), np.abs(components).argmax(axis=1)] > 0).all()
    np.testing.assert_allclose(components @ components.T, np.eye(16), atol=1e-9)
