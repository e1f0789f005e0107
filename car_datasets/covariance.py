"""Compute principal components in one pass over the rows, in any number of chunks, on any number of machines.

Does: add up the mean and the products of rows chunk by chunk, merge the sums of several readers, project onto
components. Does not: hold rows. Its memory does not grow with them: (dimension + 1) x dimension x 8 bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from car_datasets.vectors import Matrix

if TYPE_CHECKING:
    from torch import Tensor

Doubles = npt.NDArray[np.float64]
MatrixOrTensor = TypeVar("MatrixOrTensor", Matrix, "Tensor")


def project(matrix: MatrixOrTensor, mean: MatrixOrTensor, components: MatrixOrTensor) -> MatrixOrTensor:
    """Return the coordinates of rows along principal components, `(rows, kept)`.

    Args:
        matrix (`(rows, dimension)` float32): rows, as a numpy array or a tensor; the other two are of the same kind.
        mean (`(dimension,)` float32): mean of the rows that the components were computed from.
        components (`(kept, dimension)` float32): directions of length 1.
    """
    return (matrix - mean) @ components.T


@dataclass
class Covariance:
    """Mean and centred products of the rows seen so far; two of these can be merged.

    Every chunk is centred by its own mean before its product is taken in float32, and the parts are merged in float64
    by the rule of Chan, Golub and LeVeque (1979). Rows far from the origin therefore lose no digits, and the order of
    the chunks hardly matters (1e-6).

    Args:
        rows (`int`): number of rows seen.
        mean (`(dimension,)` float64): mean of these rows.
        products (`(dimension, dimension)` float64): sum over the rows of (row - mean) (row - mean)^T.
    """

    rows: int
    mean: Doubles
    products: Doubles

    @classmethod
    def of(cls, chunk: Matrix) -> Covariance:
        """Return the covariance of one chunk, `(rows, dimension)` float32, with at least one row."""
        center = chunk.mean(axis=0)
        centred = chunk - center
        # The mean was rounded to float32, so the centred rows still have a small mean of their own.
        rest = centred.mean(axis=0).astype(np.float64)
        # numpy recognises a matrix times its own transpose, and computes only one half (BLAS syrk).
        products = (centred.T @ centred).astype(np.float64)
        return cls(len(chunk), center + rest, products - len(chunk) * np.outer(rest, rest))

    @classmethod
    def of_all(cls, chunks: Iterable[Matrix]) -> Covariance | None:
        """Return the covariance of the rows of all chunks, or `None` if there are no chunks."""
        total: Covariance | None = None
        for chunk in chunks:
            if total is None:
                total = cls.of(chunk)
            else:
                total.merge(cls.of(chunk))
        return total

    def merge(self, other: Covariance) -> None:
        """Add the rows that `other` has seen, in place."""
        apart = other.mean - self.mean
        share = other.rows / (self.rows + other.rows)
        self.products += other.products
        self.products += np.outer(apart, apart) * (self.rows * share)
        self.mean = self.mean + apart * share
        self.rows += other.rows

    def principal_components(self, share: float) -> tuple[Doubles, float]:
        """Return the fewest components that hold `share` of the variance, as scikit-learn's `PCA(share)` counts it.

        Args:
            share (`float`): share of the variance in (0, 1]; 1 keeps min(rows, dimension), as scikit-learn does.

        Returns:
            Components `(kept, dimension)` of length 1 in order of falling variance, and the share of the variance that
            they hold. If all rows are equal: one axis, and 1.0.
        """
        dimension = len(self.mean)
        # Below this the variance is nothing but float32 rounding of equal rows, and its directions are noise.
        rounding = float(np.finfo(np.float32).eps) * np.abs(self.mean).max()
        if np.trace(self.products) <= self.rows * dimension * rounding**2:
            return np.eye(1, dimension), 1.0
        values, vectors = np.linalg.eigh(self.products)  # in order of rising eigenvalues
        shares = values[::-1].clip(min=0).cumsum()
        shares /= shares[-1]
        kept = min(self.rows, dimension)
        if share < 1:
            kept = min(kept, int(np.searchsorted(shares, share, side="right")) + 1)
        components = vectors.T[::-1][:kept]
        # The sign of a component is arbitrary: make its largest entry positive, so that equal rows give equal models.
        largest = np.abs(components).argmax(axis=1)
        signs = np.sign(components[np.arange(kept), largest])
        return components * signs[:, None], float(shares[kept - 1])
