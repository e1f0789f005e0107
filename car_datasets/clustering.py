"""CLUSTER: `ClusterModel`, fitted by PCA and k-means (CaR sec. 3.2), saved as safetensors, itself a `.map` callable.

Does: fit on the embeddings of a dataset, give every row its cluster and its distance to the centre, and, as
`cluster_filter`, cluster and select in one call.
Does not: compute embeddings, or fit on more than fits in memory (rows x dimensions x 4 bytes, twice).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from car_datasets.rows import refuse_overwrite
from car_datasets.selection import choose, read_numbers, refuse_worse, select_car
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
    cache_version: str = field(default=CACHE_VERSION, init=False, repr=False)

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
        from sklearn.decomposition import PCA

        if not 0 < explained_variance <= 1:
            raise ValueError(f"explained_variance={explained_variance} must lie in (0, 1].")
        if n_init < 1:
            raise ValueError(f"n_init={n_init} must be at least 1.")
        matrix, _ = read_embeddings(dataset, embedding_column)
        clusters = number_of_clusters(k, len(matrix))
        kept = None if explained_variance == 1.0 or len(matrix) < 2 else explained_variance
        # covariance_eigh is exact, and 15 times faster than the SVD that "auto" takes for wide embeddings.
        pca = PCA(kept, svd_solver="covariance_eigh", random_state=seed)
        projected = pca.fit_transform(matrix)
        kmeans = KMeans(clusters, n_init=n_init, random_state=seed).fit(projected)
        return cls(
            mean=pca.mean_.astype(np.float32),
            components=pca.components_.astype(np.float32),
            centers=kmeans.cluster_centers_.astype(np.float32),
            explained_variance=float(pca.explained_variance_ratio_.sum()),
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
        names = batch.column_names if hasattr(batch, "column_names") else list(batch)
        refuse_overwrite(names, (self.output_column, self.distance_column), "output_column=... to ClusterModel.fit")
        if self.embedding_column not in names:
            raise ValueError(f"There is no column {self.embedding_column!r}; the dataset has {names}.")
        rows = batch[self.embedding_column]
        if not hasattr(rows, "is_valid"):  # Python lists: the dataset is not in Arrow format
            rows = as_arrow(rows)
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
        from datasets import Dataset, concatenate_datasets
        from tqdm.auto import tqdm

        new = (self.output_column, self.distance_column)
        refuse_overwrite(dataset.column_names, new, "output_column=... to ClusterModel.fit")
        columns: dict[str, list[Any]] = {name: [] for name in new}
        vectors = dataset.select_columns([self.embedding_column]).with_format("arrow")
        with tqdm(total=len(dataset), desc="Clustering", unit=" examples") as progress:
            for batch in vectors.iter(batch_size=CHUNK):
                for name, values in self(batch).items():
                    columns[name].extend(values)
                progress.update(len(batch))
        return concatenate_datasets([dataset, Dataset.from_dict(columns, features=self.output_features())], axis=1)

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
        plain = {name: value for name, value in self.__dict__.items() if name not in arrays}
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


def number_of_clusters(k: int | str, rows: int) -> int:
    """`k` as a number, checked against the rows; `"sqrt"` is int(sqrt(rows / 2)), at least 1.

    Raises:
        ValueError: it is not positive, or larger than the number of rows.
    """
    if k == "sqrt":
        k = max(1, int(math.sqrt(rows / 2)))  # the original fails on a single row, with k = 0
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= rows:
        raise ValueError(f"k={k!r} must be 'sqrt' or a number between 1 and the {rows} rows that have an embedding.")
    return k


def cluster_filter(
    dataset: Dataset | Mapping[str, Sequence[Any]],
    *,
    n1: int | float = 1000,
    n2: int = 1,
    budget: int | None = None,
    k: int | str = "sqrt",
    explained_variance: float = 0.95,
    seed: int = 42,
    n_init: int = 1,
    score_column: str = "iqs_score",
    embedding_column: str = "embedding",
    allow_worse: bool = False,
    num_rows: int | None = None,
) -> Dataset | list[bool]:
    """CLUSTER and SELECT in one call, on a dataset that has scores and embeddings.

    As a function of a `Dataset` it returns the selected `Dataset`, with `cluster` and the columns of [`select_car`]:

    ```python
    >>> chosen = cluster_filter(dataset, n1=1000, n2=1)
    ```

    As the function of a `.filter` it returns which rows stay; they keep the dataset's own order and columns. It must see
    the whole dataset at once, and `num_rows` makes sure that it does:

    ```python
    >>> dataset.filter(cluster_filter, batched=True, batch_size=None, fn_kwargs={"n1": 1000, "num_rows": len(dataset)})
    ```

    Args:
        dataset (`Dataset`, or a batch of `.filter`): with `score_column` and `embedding_column`.
        n1, n2, budget, score_column, allow_worse: see [`select_car`].
        k, explained_variance, seed, n_init, embedding_column: see [`ClusterModel.fit`].
        num_rows (`int`): in `.filter` only, `len(dataset)`.

    Raises:
        ValueError: as in the two stages; in `.filter`, the batch is not the whole dataset.
    """
    from datasets import Dataset

    fitting: dict[str, Any] = {"k": k, "explained_variance": explained_variance, "seed": seed, "n_init": n_init}
    if isinstance(dataset, Dataset):
        model = ClusterModel.fit(dataset, embedding_column, **fitting)
        return select_car(
            model.label(dataset), n1, n2, budget=budget, score_column=score_column, allow_worse=allow_worse
        )
    batch = {score_column: dataset[score_column], embedding_column: dataset[embedding_column]}
    if num_rows != len(batch[score_column]):
        raise ValueError(
            f"cluster_filter saw a batch of {len(batch[score_column])} rows with num_rows={num_rows}: it must see the whole "
            "dataset at once. Call dataset.filter(cluster_filter, batched=True, batch_size=None, "
            "fn_kwargs={'num_rows': len(dataset), ...}), without num_proc."
        )
    whole = Dataset.from_dict(batch)
    matrix, present = read_embeddings(whole, embedding_column)
    clusters = np.full(num_rows, -1, dtype=np.int64)
    clusters[present] = ClusterModel.fit(whole, embedding_column, **fitting).assign(matrix)[0]
    scores = read_numbers(whole, score_column, np.nan)
    positions = choose(scores, clusters, n1, n2, budget).positions
    if not allow_worse:
        refuse_worse(scores, positions)
    keep = np.zeros(num_rows, dtype=bool)
    keep[positions] = True
    return keep.tolist()
