"""CLUSTER: `ClusterModel`, fitted by PCA and k-means (CaR sec. 3.2), saved as safetensors, itself a `.map` callable.

Does: fit on the embeddings of a dataset, give every row its cluster and its distance to the centre.
Does not: compute embeddings, or fit on more than fits in memory (rows x dimensions x 4 bytes, twice).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from car_datasets.rows import refuse_overwrite, refuse_tables
from car_datasets.vectors import Matrix, as_arrow, matrix_of, read_embeddings

if TYPE_CHECKING:
    from datasets import Dataset, Features

CACHE_VERSION = "1"
CHUNK = 65_536  # rows whose distances to all centres are in memory at a time


@dataclass(frozen=True, eq=False)
class ClusterModel:
    """A projection and k centres: `dataset.map(ClusterModel.fit(dataset), batched=True, with_rank=True)`.

    Args:
        mean (`(dimension,)` float32), components (`(kept, dimension)` float32): of the PCA.
        centers (`(k, kept)` float32): of k-means, in the projected space.
        explained_variance (`float`): share of the variance that the kept components hold.
        inertia (`float`): sum of squared distances of the rows it was fitted on to their centres.
        seed (`int`): of PCA and k-means.
        embedding_column, output_column, distance_column (`str`): read, and added.
    """

    mean: Matrix
    components: Matrix
    centers: Matrix
    explained_variance: float
    inertia: float
    seed: int
    embedding_column: str = "embedding"
    output_column: str = "cluster"
    distance_column: str = "cluster_distance"
    cache_version: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("mean", "components", "centers"):  # one layout in memory, so that equal models hash equally
            object.__setattr__(self, name, np.array(getattr(self, name), dtype=np.float32, order="C", copy=True))
        if self.output_column == self.distance_column:
            raise ValueError(
                f"output_column and distance_column are both {self.output_column!r}; name one differently."
            )
        object.__setattr__(self, "cache_version", CACHE_VERSION)  # a default alone would not be hashed

    @property
    def k(self) -> int:
        """The number of clusters."""
        return len(self.centers)

    @property
    def digest(self) -> str:
        """sha256 over all numbers: equal models give equal labels."""
        content = hashlib.sha256()
        for array in (self.mean, self.components, self.centers):
            content.update(np.ascontiguousarray(array).tobytes())
        return "sha256:" + content.hexdigest()

    @classmethod
    def fit(
        cls,
        dataset: Dataset,
        embedding_column: str = "embedding",
        *,
        k: int | str = "sqrt",
        explained_variance: float = 0.95,
        seed: int = 42,
        n_init: int = 1,
        output_column: str = "cluster",
        distance_column: str = "cluster_distance",
    ) -> ClusterModel:
        """Fit PCA and k-means on the embeddings of a dataset; rows without an embedding are left out.

        Args:
            dataset (`Dataset`): with a column of embeddings of equal length.
            embedding_column (`str`): that column.
            k (`int` or `"sqrt"`): clusters; `"sqrt"` is the paper's int(sqrt(rows / 2)).
            explained_variance (`float`): PCA keeps the fewest components that hold this share; 1.0 keeps all.
            seed (`int`), n_init (`int`): of scikit-learn's k-means (k-means++, Lloyd), the best of `n_init` runs.
            output_column, distance_column (`str`): the columns that the model adds.

        Raises:
            ValueError: no such column, embeddings of unequal length or not finite, more clusters than rows.
        """
        from sklearn.cluster import KMeans

        refuse_bad_fit(explained_variance, n_init, seed)
        matrix, _ = read_embeddings(dataset, embedding_column)
        clusters = number_of_clusters(k, len(matrix))
        mean, components, share = _principal_components(matrix, explained_variance, seed)
        kmeans = KMeans(clusters, n_init=n_init, random_state=seed).fit((matrix - mean) @ components.T)
        return cls(
            mean=mean,
            components=components,
            centers=kmeans.cluster_centers_,
            explained_variance=share,
            inertia=float(kmeans.inertia_),
            seed=seed,
            embedding_column=embedding_column,
            output_column=output_column,
            distance_column=distance_column,
        )

    def output_features(self) -> Features:
        """The types of the columns that this callable adds."""
        from datasets import Features, Value

        return Features({self.output_column: Value("int32"), self.distance_column: Value("float32")})

    def __call__(self, batch: Mapping[str, Sequence[Any]], rank: int | None = None) -> dict[str, Any]:
        """A `.map(batched=True)` batch to the label (int32) and the distance to its centre (float32, projected space).

        `rank` is taken because `.map(with_rank=True)` passes it; this is plain arithmetic on the CPU.
        """
        refuse_tables(batch, "ClusterModel.label(dataset)")
        names = list(batch)
        refuse_overwrite(names, (self.output_column, self.distance_column), "output_column=... to ClusterModel.fit")
        if self.embedding_column not in names:
            raise ValueError(f"There is no column {self.embedding_column!r}; the dataset has {names}.")
        return self._label(as_arrow(batch[self.embedding_column]))

    def _label(self, rows: pa.Array | pa.ChunkedArray) -> dict[str, Any]:
        matrix, present = matrix_of(rows, self.embedding_column)
        if len(present) == 0:
            return {self.output_column: [None] * len(rows), self.distance_column: [None] * len(rows)}
        labels, distances = self.assign(matrix)
        if len(present) == len(rows):
            return {self.output_column: labels, self.distance_column: distances}
        place = {int(row): i for i, row in enumerate(present)}
        return {
            self.output_column: [labels[place[i]] if i in place else None for i in range(len(rows))],
            self.distance_column: [distances[place[i]] if i in place else None for i in range(len(rows))],
        }

    def label(self, dataset: Dataset) -> Dataset:
        """What `dataset.map(self)` gives, read from Arrow's buffers, with the other columns left where they are."""
        from datasets import Dataset, Features, concatenate_datasets
        from tqdm.auto import tqdm

        new = (self.output_column, self.distance_column)
        refuse_overwrite(dataset.column_names, new, "output_column=... to ClusterModel.fit")
        columns: dict[str, list[Any]] = {name: [] for name in new}
        if self.embedding_column not in dataset.column_names:
            raise ValueError(f"There is no column {self.embedding_column!r}; the dataset has {dataset.column_names}.")
        if len(dataset) == 0:  # concatenate_datasets drops what has no rows
            types = Features({**dataset.features, **self.output_features()})
            return Dataset.from_dict({name: [] for name in types}, features=types)
        vectors = dataset.select_columns([self.embedding_column]).with_format("arrow")
        with tqdm(total=len(dataset), desc="Clustering", unit=" examples") as progress:
            for batch in vectors.iter(batch_size=CHUNK):
                for name, values in self._label(batch[self.embedding_column]).items():
                    columns[name].extend(values)
                progress.update(len(batch))
        new_columns = Dataset.from_dict(columns, features=self.output_features())
        # In Arrow's format: numpy's would turn whole numbers beside a null into floats where selected rows are copied.
        return concatenate_datasets(
            [dataset.with_format("arrow"), new_columns.with_format("arrow")], axis=1
        ).with_format(dataset.format["type"], **dataset.format["format_kwargs"])

    def assign(self, embeddings: Matrix) -> tuple[npt.NDArray[np.int32], Matrix]:
        """Embeddings of shape `(rows, dimension)` to labels and distances, both of shape `(rows,)`.

        Raises:
            ValueError: the embeddings have another dimension than the ones this was fitted on.
        """
        if embeddings.ndim != 2 or embeddings.shape[1] != len(self.mean):
            raise ValueError(
                f"embeddings have the shape {embeddings.shape}; this model was fitted on {len(self.mean)} columns."
            )
        labels = np.empty(len(embeddings), dtype=np.int32)
        distances = np.empty(len(embeddings), dtype=np.float32)
        lengths = (self.centers**2).sum(axis=1)
        for start in range(0, len(embeddings), CHUNK):
            rows = slice(start, start + CHUNK)
            projected = (embeddings[rows] - self.mean) @ self.components.T
            nearest = (lengths - 2 * projected @ self.centers.T).argmin(axis=1)
            labels[rows] = nearest
            distances[rows] = np.linalg.norm(projected - self.centers[nearest], axis=1)
        return labels, distances

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `cluster_model.safetensors` and `cluster_model.json` into `folder`."""
        from safetensors.numpy import save_file

        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        arrays = {"mean": self.mean, "components": self.components, "centers": self.centers}
        save_file({name: np.ascontiguousarray(a) for name, a in arrays.items()}, path / "cluster_model.safetensors")
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in arrays}
        (path / "cluster_model.json").write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> ClusterModel:
        """Read what [`~ClusterModel.save_pretrained`] wrote.

        Raises:
            ValueError: the folder holds no cluster model, or one of another version.
        """
        from safetensors.numpy import load_file

        path = Path(folder)
        if not (path / "cluster_model.json").is_file():
            raise ValueError(f"{str(folder)!r} holds no cluster model: there is no cluster_model.json.")
        plain = json.loads((path / "cluster_model.json").read_text(encoding="utf-8"))
        version = plain.pop("cache_version", None)
        if version != CACHE_VERSION:
            raise ValueError(
                f"{str(folder)!r} holds a cluster model of version {version!r}; this code reads {CACHE_VERSION!r}."
            )
        return cls(**load_file(path / "cluster_model.safetensors"), **plain)


def _principal_components(matrix: Matrix, explained_variance: float, seed: int) -> tuple[Matrix, Matrix, float]:
    """Mean, components and the share of variance that they hold."""
    from sklearn.decomposition import PCA

    if (matrix == matrix[0]).all():  # one row, or equal ones: no variance to explain
        return matrix[0], np.eye(1, matrix.shape[1], dtype=np.float32), 1.0
    kept = None if explained_variance == 1.0 else explained_variance
    # covariance_eigh is exact, and 15 times faster than the SVD that "auto" takes for wide embeddings.
    pca = PCA(kept, svd_solver="covariance_eigh", random_state=seed).fit(matrix)
    return pca.mean_.astype(np.float32), pca.components_.astype(np.float32), float(pca.explained_variance_ratio_.sum())


def refuse_bad_fit(explained_variance: float, n_init: int, seed: int) -> None:
    """Raise a ValueError for settings that no fit can have."""
    if not isinstance(explained_variance, (int, float)) or not 0 < explained_variance <= 1:
        raise ValueError(f"explained_variance={explained_variance!r} must lie in (0, 1].")
    if not isinstance(n_init, int) or n_init < 1:
        raise ValueError(f"n_init={n_init!r} must be at least 1.")
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed!r} must be a whole number from 0 to 2**32 - 1.")


def number_of_clusters(k: int | str, rows: int) -> int:
    """`k` as a number, checked against the rows; `"sqrt"` is int(sqrt(rows / 2)), at least 1.

    Raises:
        ValueError: it is not positive, or larger than the number of rows.
    """
    if isinstance(k, np.integer):
        k = int(k)
    if k == "sqrt":
        k = max(1, int(math.sqrt(rows / 2)))  # the original fails on a single row, with k = 0
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= rows:
        raise ValueError(f"k={k!r} must be 'sqrt' or a number between 1 and the {rows} rows that can be clustered.")
    return k
