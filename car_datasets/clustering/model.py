"""Cluster embeddings by PCA and k-means (CaR sec. 3.2): `ClusterModel`, a `.map` callable that is saved as safetensors.

Does: check the settings of a fit, and run it by one of the engines in `ENGINES`; give every row its cluster and its
distance to the centre; save and load a model.
Does not: compute embeddings.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from datasets import Dataset, Features, Value
from datasets.formatting.formatting import LazyBatch
from datasets.table import InMemoryTable
from datasets.utils import tqdm
from safetensors.numpy import load_file, save

from car_datasets.clustering.fitting import (
    Engine,
    FitSettings,
    Identity,
    Projection,
    check_same_data,
    clustering_device,
    fit_sklearn,
    fit_torch,
)
from car_datasets.clustering.kmeans import nearest
from car_datasets.utils.column_names import ColumnNames
from car_datasets.utils.columns import (
    BATCH,
    Matrix,
    as_arrow,
    column_batches,
    join_columns,
    matrix_of,
    refuse_no_embeddings,
    refuse_other_datasets,
    refuse_overwrite,
    refuse_tables,
)
from car_datasets.utils.digests import public
from car_datasets.utils.files import write_content
from car_datasets.utils.processes import Processes, all_processes, mend_threads_after_fork, note_that_torch_runs
from car_datasets.utils.settings import EXPLAINED_VARIANCE, KMEANS, KMEANS_SAMPLE, N_INIT, SEED, K, is_integer

CONFIG_FILE = "cluster_model.json"
WEIGHTS_FILE = "cluster_model.safetensors"
CLUSTER_MODEL_FILES = (CONFIG_FILE, WEIGHTS_FILE)
CACHE_VERSION = "2"  # part of the fingerprint by which `datasets` finds cached labels
REFIT = "Fit the clusters again, and save them by save_pretrained."
READABLE_VERSIONS = ("1", "2")  # versions of saved models; both are read, since labels follow from the numbers alone

# To add an engine, write a function of this signature in a module of its own, and name it here.
ENGINES: dict[str, Engine] = {
    "torch": fit_torch,
    "sklearn": fit_sklearn,
}


@public
@dataclass(frozen=True, eq=False)
class ClusterModel:
    """A projection and k centres: `dataset.map(ClusterModel.fit(dataset), batched=True, with_rank=True)`.

    Args:
        mean (`(dimension,)` float32): mean of the embeddings that it was fitted on.
        components (`(kept, dimension)` float32): principal components.
        centers (`(k, kept)` float32): centres of k-means, in the projected space.
        explained_variance (`float`): share of the variance that the kept components hold.
        inertia (`float`): sum of squared distances of the rows that it was fitted on to their centres.
        seed (`int`): seed of PCA and k-means.
        embedding_column (`str`): column that is read.
        output_column (`str`): column of labels that is added.
        distance_column (`str`): column of distances to the centre that is added.
    """

    mean: Matrix
    components: Matrix
    centers: Matrix
    explained_variance: float
    inertia: float
    seed: int
    embedding_column: str = ColumnNames.embedding
    output_column: str = ColumnNames.cluster
    distance_column: str = ColumnNames().distance
    cache_version: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Bring the arrays into one layout; raise ValueError for parts that do not fit, or two columns of one name."""
        # One type and layout in memory, so that equal models have equal fingerprints.
        for name in ("mean", "components", "centers"):
            object.__setattr__(self, name, np.array(getattr(self, name), dtype=np.float32, order="C", copy=True))
        _check_parts(self)
        if self.output_column == self.distance_column:
            raise ValueError(
                f"output_column and distance_column are both {self.output_column!r}; name one differently."
            )
        # Set here, since the default of a field is not part of the pickle that `datasets` hashes.
        # The dataclass is frozen, hence object.__setattr__.
        object.__setattr__(self, "cache_version", CACHE_VERSION)

    @property
    def k(self) -> int:
        """Return the number of clusters."""
        return len(self.centers)

    @property
    def digest(self) -> str:
        """Return the sha256 over all numbers; models with equal digests give equal labels."""
        content = hashlib.sha256()
        for array in (self.mean, self.components, self.centers):
            content.update(np.ascontiguousarray(array).tobytes())
        return "sha256:" + content.hexdigest()

    @classmethod
    def fit(
        cls,
        dataset: Dataset,
        embedding_column: str = ColumnNames.embedding,
        *,
        k: int | str = K,
        explained_variance: float = EXPLAINED_VARIANCE,
        seed: int = SEED,
        n_init: int = N_INIT,
        kmeans: str = KMEANS,
        kmeans_sample: int = KMEANS_SAMPLE,
        output_column: str = ColumnNames.cluster,
        distance_column: str = ColumnNames().distance,
    ) -> ClusterModel:
        """Fit PCA and k-means on the embeddings of a dataset; rows without an embedding are left out.

        Under `accelerate launch` or `torchrun` all processes call this with the same rows, share the passes over them,
        and get one model: that of a single process, except for the last digits (some 1e-7 of a number, so a row can
        change its cluster only if two centres are equally near). With `"sklearn"` the main process computes alone.

        The rows that k-means is fitted on are held in memory, projected: all of them, or a sample.

        Args:
            dataset (`Dataset`): rows with a column of embeddings of equal length.
            embedding_column (`str`): column of embeddings.
            k (`int` or `"sqrt"`): number of clusters; `"sqrt"` is the paper's int(sqrt(rows / 2)).
            explained_variance (`float`): PCA keeps the fewest components that hold this share; 1.0 keeps all.
            seed (`int`): seed of k-means.
            n_init (`int`): number of runs, of which the best is kept.
            kmeans (`str`): engine. `"torch"`, or `"sklearn"` for scikit-learn's PCA and k-means (k-means++, Lloyd) on
                all rows and with all of them in memory, as in the paper; slower.
            kmeans_sample (`int`): for `"torch"`, rows per cluster to fit on. If there are more, that many are drawn,
                and the centres are then corrected by two passes over all rows; 0 fits on all rows.
            output_column (`str`): column of labels that the model adds.
            distance_column (`str`): column of distances that the model adds.

        Raises:
            ValueError: the column is missing, embeddings are of unequal length or not finite, there are more clusters
                than rows, a setting is invalid, or processes pass different rows.
        """
        refuse_other_datasets(
            dataset,
            "ClusterModel.fit",
            "it with a sample: ClusterModel.fit(Dataset.from_list(list(dataset.shuffle(seed=0).take(50_000))), k=...)",
        )
        settings = checked_fit(k, explained_variance, seed, n_init, kmeans, kmeans_sample)
        note_that_torch_runs()
        return cls(
            *ENGINES[kmeans](dataset, embedding_column, settings),
            seed=settings.seed,
            embedding_column=embedding_column,
            output_column=output_column,
            distance_column=distance_column,
        )

    def output_features(self) -> Features:
        """Return the types of the columns that this callable adds."""
        return Features({self.output_column: Value("int32"), self.distance_column: Value("float32")})

    def __call__(self, batch: Mapping[str, Sequence[Any]], rank: int | None = None) -> dict[str, Any]:
        """Return the label (int32) and the distance to its centre (float32, projected space) of every row of a batch.

        Args:
            batch (`Mapping`): columns of a `.map(batched=True)` batch.
            rank (`int`, *optional*): rank that `.map(with_rank=True)` passes; it chooses the GPU, if there is one.
        """
        refuse_tables(batch, "ClusterModel.label(dataset)")
        self._refuse_columns(list(batch))
        *arrays, missing = self._label(_column(batch, self.embedding_column), rank)
        if missing.any():
            # Arrays have no null. Lists of numpy's own numbers do, and `.map` still infers int32 and float32 from them.
            arrays = [[None if gone else x for x, gone in zip(array, missing, strict=True)] for array in arrays]
        return dict(zip((self.output_column, self.distance_column), arrays, strict=True))

    def _refuse_columns(self, columns: list[str]) -> None:
        """Raise ValueError if a column that would be added exists, or the embeddings are missing."""
        refuse_overwrite(columns, (self.output_column, self.distance_column), "output_column=... to ClusterModel.fit")
        refuse_no_embeddings(columns, self.embedding_column)

    def _label(self, rows: pa.Array | pa.ChunkedArray, rank: int | None = None) -> tuple[Any, Any, Any]:
        """Return labels, distances, and a mask of the rows that have neither, each of shape `(rows,)`."""
        mend_threads_after_fork()  # `.map(num_proc=n)` may have forked this process after torch started its threads
        matrix, present = matrix_of(rows, self.embedding_column)
        # Rows without an embedding keep these zeros, which the mask hides.
        labels, distances = np.zeros(len(rows), dtype=np.int32), np.zeros(len(rows), dtype=np.float32)
        missing = np.ones(len(rows), dtype=bool)
        if len(present) > 0:
            labels[present], distances[present] = self.assign(matrix, rank)
            missing[present] = False
        return labels, distances, missing

    def label_arrow(self, rows: pa.Array | pa.ChunkedArray) -> pa.Table:
        """Return a table of the two columns that this callable adds, from a column of embeddings; nulls stay null."""
        return self._table(*self._label(rows))

    def _table(self, labels: Any, distances: Any, missing: Any) -> pa.Table:
        columns = [pa.array(array, mask=missing) for array in (labels, distances)]
        return pa.table(columns, names=(self.output_column, self.distance_column))

    def label(self, dataset: Dataset, *, across_processes: bool = False) -> Dataset:
        """Return what `dataset.map(self)` returns, without copying the other columns; embeddings are read from Arrow.

        Args:
            dataset (`Dataset`): rows with a column of embeddings.
            across_processes (`bool`): share the work among the processes of `accelerate launch` or `torchrun`. All of
                them call this with the same rows and all get the entire result. Without it each process labels all
                rows.

        Raises:
            ValueError: a column is missing or would be overwritten, or processes pass different rows or models.
        """
        refuse_other_datasets(dataset, "ClusterModel.label", "dataset.map(clusters, batched=True)")
        self._refuse_columns(dataset.column_names)
        with all_processes() if across_processes else nullcontext(Processes()) as processes:
            table = processes.gather(lambda: self._label_share(dataset, processes), _joined_labels)
        return join_columns(dataset, Dataset(InMemoryTable(table)))

    def _label_share(self, dataset: Dataset, processes: Processes) -> tuple[Identity | None, pa.Table]:
        """Label this process's share of the rows, and return it with the fingerprint of its work."""
        share = processes.share(len(dataset), BATCH)
        # Filled in place: small results kept from every batch would lie between the large buffers that are freed, and
        # leave the process with holes as large as all embeddings.
        labels, distances, missing = (np.empty(len(share), dtype=kind) for kind in (np.int32, np.float32, np.bool_))
        done = 0
        with tqdm(total=len(dataset), desc="Clustering", unit=" examples", disable=processes.rank > 0) as progress:
            for batch in column_batches(dataset, self.embedding_column, share):
                rows = slice(done, done := done + len(batch))
                labels[rows], distances[rows], missing[rows] = self._label(batch)
                # Only the main process shows a bar, and the others label as many rows in the same time.
                progress.update(min(len(batch) * processes.count, progress.total - progress.n))
        identity = Identity.of(dataset, self.embedding_column, (self.digest,), processes)
        return identity, self._table(labels, distances, missing)

    def assign(self, embeddings: Matrix, rank: int | None = None) -> tuple[npt.NDArray[np.int32], Matrix]:
        """Return the label of every embedding and its distance to the centre, both of shape `(rows,)`.

        Args:
            embeddings (`(rows, dimension)` float32): any number of rows; `BATCH` of them are projected at a time.
            rank (`int`, *optional*): rank of a `.map` worker; it chooses the GPU, if there is one.

        Raises:
            ValueError: the embeddings have another dimension than those that this model was fitted on.
        """
        if embeddings.ndim != 2 or embeddings.shape[1] != len(self.mean):
            raise ValueError(
                f"embeddings have the shape {embeddings.shape}; this model was fitted on {len(self.mean)} columns. "
                "Embed the rows by the same model as those that it was fitted on."
            )
        labels = np.empty(len(embeddings), dtype=np.int32)
        distances = np.empty(len(embeddings), dtype=np.float32)
        project = Projection(self.mean, self.components, clustering_device(rank))
        centers = torch.from_numpy(self.centers).to(project.device)
        for start in range(0, len(embeddings), BATCH):
            rows = slice(start, start + BATCH)
            points = project(embeddings[rows])
            nearest_labels, _ = nearest(points, centers)
            labels[rows] = nearest_labels.cpu().numpy()
            # Computed again from the difference: the distances of `nearest` lose their digits close to 0.
            distances[rows] = (points - centers[nearest_labels]).norm(dim=1).cpu().numpy()
        return labels, distances

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `cluster_model.safetensors` and `cluster_model.json` into `folder`.

        If the process is killed in between, the folder holds no model, never a mixture of two.
        """
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        arrays = {"mean": self.mean, "components": self.components, "centers": self.centers}
        # Everything but the arrays is plain, and stays readable without this package.
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in arrays}
        text = json.dumps(plain, indent=2) + "\n"
        # The JSON file marks a complete model: an old one is deleted first, the new one is written last.
        (path / CONFIG_FILE).unlink(missing_ok=True)
        # Not save_file, whose files only their owner can read.
        write_content(path / WEIGHTS_FILE, save(arrays))
        write_content(path / CONFIG_FILE, text)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> ClusterModel:
        """Load a model that [`~ClusterModel.save_pretrained`] wrote.

        Raises:
            ValueError: the folder holds no cluster model, a damaged one, or one of an unknown version.
        """
        path = Path(folder)
        if not (path / CONFIG_FILE).is_file():
            raise ValueError(
                f"{str(folder)!r} holds no cluster model: there is no {CONFIG_FILE}. Write one by save_pretrained."
            )
        try:
            plain = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path / CONFIG_FILE} is damaged: {error}. {REFIT}") from error
        if not isinstance(plain, dict):
            raise ValueError(f"{path / CONFIG_FILE} is damaged: it is no JSON object. {REFIT}")
        # Not an argument of the class: a loaded model gets the version of this code.
        version = plain.pop("cache_version", None)
        if version not in READABLE_VERSIONS:
            raise ValueError(
                f"{str(folder)!r} holds a cluster model of version {version!r}; this code reads {READABLE_VERSIONS}. "
                "Fit it again."
            )
        try:
            return cls(**load_file(path / WEIGHTS_FILE), **plain)
        except Exception as error:  # of safetensors, of a part that is missing, or of `__post_init__`
            raise ValueError(f"The cluster model in {str(folder)!r} is damaged: {error} {REFIT}") from error


def _check_parts(model: ClusterModel) -> None:
    """Raise ValueError if the parts of a model do not fit each other: all rows would fall into cluster 0."""
    shapes = {name: getattr(model, name).shape for name in ("mean", "components", "centers")}
    mean, components, centers = shapes.values()
    fits = len(mean) == 1 and len(components) == len(centers) == 2
    if not fits or mean[0] != components[1] or components[0] != centers[1] or not all(mean + components + centers):
        raise ValueError(f"{shapes} must be the shapes (dimension,), (kept, dimension) and (k, kept), without a 0.")
    if broken := [name for name in shapes if not np.isfinite(getattr(model, name)).all()]:
        raise ValueError(f"{' and '.join(broken)} must be finite numbers, without NaN.")
    columns = {name: getattr(model, name) for name in ("embedding_column", "output_column", "distance_column")}
    if odd := {name: value for name, value in columns.items() if not isinstance(value, str) or not value}:
        raise ValueError(f"{odd} must be the names of columns.")
    if not is_integer(model.seed) or not all(
        isinstance(number, (int, float, np.number)) for number in (model.explained_variance, model.inertia)
    ):
        raise ValueError("seed, explained_variance and inertia must be numbers.")


def checked_fit(
    k: int | str, explained_variance: float, seed: int, n_init: int, kmeans: str, kmeans_sample: int
) -> FitSettings:
    """Return the settings of a fit, with numpy's numbers as Python's own; arguments as of [`FitSettings`].

    Raises:
        ValueError: a setting that no fit can have. A k above the number of rows is refused later, when they are
            counted.
    """
    k, seed, n_init, kmeans_sample = (_plain(value) for value in (k, seed, n_init, kmeans_sample))
    if k != "sqrt" and (not is_integer(k) or k < 1):
        raise ValueError(f"k={k!r} must be 'sqrt' or an integer, at least 1.")
    real = is_integer(explained_variance) or isinstance(explained_variance, (float, np.floating))
    if not real or not 0 < explained_variance <= 1:
        raise ValueError(f"explained_variance={explained_variance!r} must lie in (0, 1].")
    if not is_integer(n_init) or n_init < 1:
        raise ValueError(f"n_init={n_init!r} must be at least 1 and an integer.")
    if not is_integer(seed) or not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed!r} must be an integer from 0 to 2**32 - 1.")
    if kmeans not in ENGINES:
        raise ValueError(f"kmeans={kmeans!r} is not known; choose one of {tuple(ENGINES)}.")
    if not is_integer(kmeans_sample) or kmeans_sample < 0:
        raise ValueError(f"kmeans_sample={kmeans_sample!r} must be a number of rows per cluster, or 0 for all rows.")
    return FitSettings(k, float(explained_variance), seed, n_init, kmeans, kmeans_sample)


def _plain(value: Any) -> Any:
    """Return numpy's integers as Python's, so that a saved model can hold them as JSON."""
    return int(value) if isinstance(value, np.integer) else value


def _column(batch: Any, name: str) -> pa.Array | pa.ChunkedArray:
    """Return a column of a batch of `.map` in Arrow."""
    # From the table behind the batch, if nobody has read or changed the column: as Python lists the vectors take longer
    # than their labels.
    if isinstance(batch, LazyBatch) and name in batch.keys_to_format:
        return batch.pa_table[name]
    return as_arrow(batch[name])


def _joined_labels(parts: list[tuple[Identity | None, pa.Table]]) -> pa.Table:
    """Join the labels of all processes, in the order of the rows."""
    check_same_data("labels", [identity for identity, _ in parts])
    return pa.concat_tables([table for _, table in parts])
