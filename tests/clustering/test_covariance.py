"""Streamed covariance and its components against scikit-learn's PCA and float64 arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA

from car_datasets.clustering.fitting import Covariance
from car_datasets.utils.columns import Matrix


def rows(count: int, width: int = 16, seed: int = 0) -> Matrix:
    """Correlated, each direction with its own variance, away from the origin."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(count, width)) * 0.8 ** np.arange(width) @ rng.normal(size=(width, width))
    return (mixed + rng.normal(size=width)).astype(np.float32)


def joined(parts: list[Matrix]) -> Covariance:
    """All parts, one after the other."""
    found = Covariance.of(parts[0])
    for part in parts[1:]:
        found.merge(Covariance.of(part))
    return found


@pytest.mark.parametrize("share", [0.3, 0.95, 0.999, 1.0])
@pytest.mark.parametrize("count", [5, 17, 400])
def test_components_are_those_of_scikit_learn(count: int, share: float) -> None:
    matrix = rows(count)
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
    matrix = rows(40)
    whole = Covariance.of(matrix)
    parts = [part for part in np.split(matrix, sorted(cuts)) if len(part) > 0]
    order.shuffle(parts)  # type: ignore[attr-defined]
    found = joined(parts)
    assert found.rows == 40
    np.testing.assert_allclose(found.mean, whole.mean, atol=1e-6)
    np.testing.assert_allclose(found.products, whole.products, atol=1e-5 * np.trace(whole.products))


def test_readers_can_be_joined_in_a_tree() -> None:
    parts = [Covariance.of(part) for part in np.array_split(rows(300), 4)]
    left, right = joined(np.array_split(rows(300), 4)[:2]), parts[2]
    right.merge(parts[3])
    left.merge(right)
    whole = Covariance.of(rows(300))
    np.testing.assert_allclose(left.products, whole.products, atol=1e-5 * np.trace(whole.products))


def test_rows_far_from_the_origin_lose_no_digits() -> None:
    """The sum of squares minus the square of the sum would leave nothing here: 1e8 beside 1, in float32."""
    matrix = rows(2_000) + np.float32(1e4)
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
    matrix = rows(200, 6)
    matrix[:, [1, 4]] = 0.3, 7.0
    components, _ = joined(np.array_split(matrix, 3)).principal_components(0.9999)
    assert 1 < len(components) <= 4
    np.testing.assert_allclose(components[:, [1, 4]], 0, atol=1e-6)


def test_the_largest_entry_of_a_component_is_positive() -> None:
    components, _ = Covariance.of(rows(50)).principal_components(1)
    assert (components[np.arange(16), np.abs(components).argmax(axis=1)] > 0).all()
    np.testing.assert_allclose(components @ components.T, np.eye(16), atol=1e-9)
