"""CLUSTER: `ClusterModel`, fitted by PCA and k-means (CaR sec. 3.2), saved as safetensors, itself a `.map` callable.

Does: fit on the embeddings of a dataset, give every row its cluster and its distance to the centre. Reads them batch by batch
and holds the rows that k-means fits on, projected: all of them, or a sample.
Does not: compute embeddings; find the components and centres (cluster_fitting.py).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from car_datasets.cluster_fitting import (
    Identity,
    Projection,
    checked_fit,
    clustering_device,
    fit_sklearn,
    fit_torch,
    refuse_others,
)
from car_datasets.collectives import Processes
from car_datasets.kmeans import nearest
from car_datasets.parallel import all_processes, mend_threads_after_fork, note_that_torch_runs
from car_datasets.results import write_whole
from car_datasets.rows import refuse_overwrite, refuse_tables
from car_datasets.vectors import BATCH, Matrix, as_arrow, beside, column_batches, matrix_of

if TYPE_CHECKING:
    from datasets import Dataset, Features

CACHE_VERSION = "2"
FORMATS = ("1", "2")  # of saved models; their labels follow from their numbers, whatever fitted them


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
        kmeans: str = "torch",
        kmeans_sample: int = 256,
        output_column: str = "cluster",
        distance_column: str = "cluster_distance",
    ) -> ClusterModel:
        """Fit PCA and k-means on the embeddings of a dataset; rows without an embedding are left out.

        Under `accelerate launch` or `torchrun` all processes call this with the same rows, share the passes over them, and
        get one model: that of a single process, but for the last digits (some 1e-7 of a number, so that a row may change its
        cluster only where two centres are equally near). `"sklearn"` leaves the work to the main process.

        Args:
            dataset (`Dataset`): with a column of embeddings of equal length.
            embedding_column (`str`): that column.
            k (`int` or `"sqrt"`): clusters; `"sqrt"` is the paper's int(sqrt(rows / 2)).
            explained_variance (`float`): PCA keeps the fewest components that hold this share; 1.0 keeps all.
            seed (`int`): of k-means; n_init (`int`): the best of so many runs is kept.
            kmeans (`str`): `"torch"`, or `"sklearn"`: scikit-learn's PCA and k-means (k-means++, Lloyd), on all rows and with
                all of them in memory, as the paper has it; slower.
            kmeans_sample (`int`): of `"torch"`: where there are more than so many rows per cluster, fit on so many drawn ones,
                then correct the centres by two passes over all rows; 0 fits on all.
            output_column, distance_column (`str`): the columns that the model adds.

        Raises:
            ValueError: no such column, embeddings of unequal length or not finite, more clusters than rows, a setting that
                is no number of its kind; processes that pass different rows.
        """
        settings = checked_fit(k, explained_variance, seed, n_init, kmeans, kmeans_sample)
        note_that_torch_runs()
        fit = fit_sklearn if kmeans == "sklearn" else fit_torch
        return cls(
            *fit(dataset, embedding_column, settings),
            seed=settings.seed,
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

        `rank` is taken because `.map(with_rank=True)` passes it: it chooses the GPU, where there is one.
        """
        refuse_tables(batch, "ClusterModel.label(dataset)")
        names = list(batch)
        refuse_overwrite(names, (self.output_column, self.distance_column), "output_column=... to ClusterModel.fit")
        if self.embedding_column not in names:
            raise ValueError(f"There is no column {self.embedding_column!r}; the dataset has {names}.")
        *arrays, missing = self._label(as_arrow(batch[self.embedding_column]), rank)
        if missing.any():  # as numpy's own numbers, from which `.map` infers int32 and float32
            arrays = [[None if gone else x for x, gone in zip(array, missing, strict=True)] for array in arrays]
        return dict(zip((self.output_column, self.distance_column), arrays, strict=True))

    def _label(self, rows: pa.Array | pa.ChunkedArray, rank: int | None = None) -> tuple[Any, Any, Any]:
        """Labels, distances, and which rows have neither, each of shape `(rows,)`."""
        mend_threads_after_fork()
        matrix, present = matrix_of(rows, self.embedding_column)
        labels, distances = np.zeros(len(rows), dtype=np.int32), np.zeros(len(rows), dtype=np.float32)
        missing = np.ones(len(rows), dtype=bool)
        if len(present) > 0:
            labels[present], distances[present] = self.assign(matrix, rank)
            missing[present] = False
        return labels, distances, missing

    def label_arrow(self, rows: pa.Array | pa.ChunkedArray) -> pa.Table:
        """A column of embeddings to a table of the two columns that this callable adds; null where there is no embedding."""
        return self._table(*self._label(rows))

    def _table(self, labels: Any, distances: Any, missing: Any) -> pa.Table:
        columns = [pa.array(array, mask=missing) for array in (labels, distances)]
        return pa.table(columns, names=(self.output_column, self.distance_column))

    def label(self, dataset: Dataset, *, across_processes: bool = False) -> Dataset:
        """What `dataset.map(self)` gives, read from Arrow's buffers, with the other columns left where they are.

        Args:
            dataset (`Dataset`): with a column of embeddings.
            across_processes (`bool`): the processes of `accelerate launch` or `torchrun`, which all call this with the same
                rows, label a part each and get the whole. Without it each labels all the rows that it passes.

        Raises:
            ValueError: a column is missing or taken; processes that pass different rows, or label by different models.
        """
        from datasets import Dataset
        from datasets.table import InMemoryTable
        from datasets.utils import tqdm

        new = (self.output_column, self.distance_column)
        refuse_overwrite(dataset.column_names, new, "output_column=... to ClusterModel.fit")
        if self.embedding_column not in dataset.column_names:
            raise ValueError(f"There is no column {self.embedding_column!r}; the dataset has {dataset.column_names}.")
        with all_processes() if across_processes else nullcontext(Processes()) as processes:
            share = processes.share(len(dataset), BATCH)

            def own() -> tuple[Identity | None, pa.Table]:
                # Filled in place: small results kept from every batch would lie between the large ones that are freed, and
                # leave a process with holes as large as all embeddings.
                labels, distances, missing = (np.empty(len(share), dtype=t) for t in (np.int32, np.float32, np.bool_))
                at = 0
                with tqdm(
                    total=len(dataset), desc="Clustering", unit=" examples", disable=processes.rank > 0
                ) as progress:
                    for batch in column_batches(dataset, self.embedding_column, share):
                        rows = slice(at, at := at + len(batch))
                        labels[rows], distances[rows], missing[rows] = self._label(batch)
                        progress.update(
                            min(len(batch) * processes.count, progress.total - progress.n)
                        )  # others do as much
                same = Identity.of(dataset, self.embedding_column, (self.digest,), processes)
                return same, self._table(labels, distances, missing)

            def join(parts: list[tuple[Identity | None, pa.Table]]) -> pa.Table:
                refuse_others("labels", [identity for identity, _ in parts])
                return pa.concat_tables([labelled for _, labelled in parts])

            table = processes.joined(own, join)
        return beside(dataset, Dataset(InMemoryTable(table)))

    def assign(self, embeddings: Matrix, rank: int | None = None) -> tuple[npt.NDArray[np.int32], Matrix]:
        """Embeddings of shape `(rows, dimension)` to labels and distances, both of shape `(rows,)`.

        Args:
            embeddings (`(rows, dimension)` float32): of any number of rows; `BATCH` of them are projected at a time.
            rank (`int`, *optional*): of a `.map` worker, see [`device_for`].

        Raises:
            ValueError: the embeddings have another dimension than the ones this was fitted on.
        """
        if embeddings.ndim != 2 or embeddings.shape[1] != len(self.mean):
            raise ValueError(
                f"embeddings have the shape {embeddings.shape}; this model was fitted on {len(self.mean)} columns."
            )
        labels = np.empty(len(embeddings), dtype=np.int32)
        distances = np.empty(len(embeddings), dtype=np.float32)
        project = Projection(self.mean, self.components, clustering_device(rank))
        centers = torch.from_numpy(self.centers).to(project.device)
        for start in range(0, len(embeddings), BATCH):
            rows = slice(start, start + BATCH)
            points = project(embeddings[rows])
            found, _ = nearest(points, centers)
            labels[rows] = found.cpu().numpy()
            distances[rows] = (points - centers[found]).norm(dim=1).cpu().numpy()  # exact, also where it is next to 0
        return labels, distances

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `cluster_model.safetensors` and `cluster_model.json` into `folder`.

        The latter is written last, and one that is there goes first: cut off meanwhile, the folder holds no model, never a
        mixture of two.
        """
        from safetensors.numpy import save_file

        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        arrays = {"mean": self.mean, "components": self.components, "centers": self.centers}
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in arrays}
        text = json.dumps(plain, indent=2) + "\n"
        (path / "cluster_model.json").unlink(missing_ok=True)
        write_whole(path / "cluster_model.safetensors", lambda name: save_file(arrays, name))
        write_whole(path / "cluster_model.json", lambda name: Path(name).write_text(text, encoding="utf-8"))

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
        if version not in FORMATS:
            raise ValueError(
                f"{str(folder)!r} holds a cluster model of version {version!r}; this code reads {FORMATS}."
            )
        return cls(**load_file(path / "cluster_model.safetensors"), **plain)
