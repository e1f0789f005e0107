"""Principal components from one pass over the rows, in any number of chunks, on any number of machines.

Does: add up mean and products of rows chunk by chunk, join the sums of several readers, find the components.
Does not: hold rows. What it holds does not grow with them: (dimension + 1) x dimension x 8 bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from car_datasets.vectors import Matrix

Doubles = npt.NDArray[np.float64]


@dataclass
class Covariance:
    """How rows vary together: their mean and their centred products, which two of these can join.

    Every chunk is centred by its own mean before its product is taken in float32, and the parts are joined in float64 by the
    rule of Chan, Golub and LeVeque (1979): rows far from the origin lose no digits, and the order hardly matters (1e-6).

    Args:
        rows (`int`): rows seen.
        mean (`(dimension,)` float64): of them.
        products (`(dimension, dimension)` float64): sum over the rows of (row - mean) (row - mean)^T.
    """

    rows: int
    mean: Doubles
    products: Doubles

    @classmethod
    def of(cls, chunk: Matrix) -> Covariance:
        """Of one chunk, `(rows, dimension)` float32, with at least one row."""
        center = chunk.mean(axis=0)
        centred = chunk - center
        rest = centred.mean(axis=0).astype(np.float64)  # what the mean's rounding to float32 has left
        products = (centred.T @ centred).astype(np.float64)  # numpy sees the transpose, and halves the work (syrk)
        return cls(len(chunk), center + rest, products - len(chunk) * np.outer(rest, rest))

    @classmethod
    def of_all(cls, chunks: Iterable[Matrix]) -> Covariance | None:
        """Of the rows of all chunks; `None` where there are none."""
        found: Covariance | None = None
        for chunk in chunks:
            if found is None:
                found = cls.of(chunk)
            else:
                found.merge(cls.of(chunk))
        return found

    def merge(self, other: Covariance) -> None:
        """Take in the rows that `other` has seen."""
        apart = other.mean - self.mean
        share = other.rows / (self.rows + other.rows)
        self.products += other.products
        self.products += np.outer(apart, apart) * (self.rows * share)
        self.mean = self.mean + apart * share
        self.rows += other.rows

    def principal_components(self, share: float) -> tuple[Doubles, float]:
        """The fewest components that hold `share` of the variance, counted as scikit-learn's `PCA(share)` counts.

        Args:
            share (`float`): in (0, 1]; 1 keeps min(rows, dimension), as scikit-learn does.

        Returns:
            components `(kept, dimension)`, each of length 1, the one with the most variance first, its largest entry positive
            (a component's sign is arbitrary, and the result must not be); and the share of the variance that they hold. Rows
            that are all equal give one axis and 1.0.
        """
        dimension = len(self.mean)
        rounding = float(np.finfo(np.float32).eps) * np.abs(self.mean).max()
        if np.trace(self.products) <= self.rows * dimension * rounding**2:
            return np.eye(1, dimension), 1.0
        values, vectors = np.linalg.eigh(self.products)
        shares = values[::-1].clip(min=0).cumsum()
        shares /= shares[-1]
        kept = min(self.rows, dimension)
        if share < 1:
            kept = min(kept, int(np.searchsorted(shares, share, side="right")) + 1)
        components = vectors.T[::-1][:kept]
        largest = np.abs(components).argmax(axis=1)
        signs = np.sign(components[np.arange(kept), largest])
        return components * signs[:, None], float(shares[kept - 1])


def project(vectors: Matrix, mean: Matrix, components: Matrix) -> Matrix:
    """Return the coordinates `(rows, kept)` of vectors `(rows, dimension)` on components `(kept, dimension)`."""
    return (vectors - mean) @ components.T
