"""near_pairs.py: all similar pairs of a cell and across its walls, with cosines that no order of sums can change."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset

from car_datasets.selection.marks import near_pairs as module
from car_datasets.selection.marks.near_pairs import SCALE, near_pairs, rounded


@pytest.mark.parametrize("block", [1, 1 << 22])
def test_pairs_and_cosines_are_those_of_integers(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    rng = np.random.default_rng(0)
    vectors = np.repeat(rng.normal(size=(40, 384)), 3, axis=0) + 0.4 * rng.normal(size=(120, 384))
    dataset = Dataset.from_dict({"embedding": vectors.astype(np.float32).tolist()})
    whole = rounded(vectors.astype(np.float32)).astype(np.int64)
    products = whole @ whole.T
    assert products.max() < 2**24
    least = 0.8 * SCALE * SCALE
    skip = np.arange(120) == 7
    expected = {(i, j) for i in range(120) for j in range(i + 1, 120) if products[i, j] >= least and 7 not in (i, j)}
    assert len(expected) > 50
    for clusters in (None, np.arange(120) // 3 % 5, np.full(120, -1)):
        found = {}
        for pairs in near_pairs(dataset, "embedding", clusters, skip, 0.8):
            for one, other, cosine in zip(*(part.tolist() for part in pairs), strict=True):
                found[min(one, other), max(one, other)] = cosine
        assert found.keys() == expected
        assert all(cosine == np.float32(products[pair] / SCALE**2) for pair, cosine in found.items())
