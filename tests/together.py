"""Fit clusters in all processes of a launcher, `torchrun ... -m tests.together ROWS`, and compare with one process.

Rows are read in batches of 64 here, so that a small dataset is enough for every process to have some. The main process
prints a JSON object: for each case the share of rows with another label, and the largest differences of a centre and of
a distance.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, List, Value

from car_datasets import ClusterModel
from car_datasets.clustering import fitting, kmeans
from car_datasets.clustering import model as labelling
from car_datasets.utils import columns
from car_datasets.utils.columns import Matrix
from car_datasets.utils.processes import Processes, all_processes, alone, from_main

PIECE = 64


def in_pieces_of(rows: int) -> None:
    """Set the number of rows that are read, held and labelled at a time."""
    columns.BATCH = labelling.BATCH = kmeans.CHUNK = rows


def dataset_of(rows: Any) -> Dataset:
    types = Features({"embedding": List(Value("float32"))})
    return Dataset.from_dict({"embedding": [None if r is None else list(r) for r in rows]}, features=types)


def topics(rows: int, width: int = 12, spread: float = 0.4) -> Matrix:
    """Return unit vectors around some 30 topics, whose columns have less and less variance."""
    rng = np.random.default_rng(0)
    places = rng.normal(size=(30, width)) * 0.9 ** np.arange(width)
    found = places[rng.integers(0, 30, rows)] + spread * rng.normal(size=(rows, width)) * 0.9 ** np.arange(width)
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def cases(source: str | None) -> Iterator[tuple[str, Dataset, dict[str, Any]]]:
    """Yield the name, rows and settings of each fit."""
    data = dataset_of(topics(2_000))
    yield "groups far apart", dataset_of(topics(1_000, spread=0.02)), {"k": 30}
    yield "exact", data, {"kmeans_sample": 0}
    yield "exact, the best of 3", data, {"kmeans_sample": 0, "n_init": 3}
    yield "sampled", data, {"kmeans_sample": 16}
    yield "sampled, a share has no row of it", data, {"k": 2, "kmeans_sample": 40}
    yield "shuffled", data.shuffle(seed=1), {"kmeans_sample": 16}
    yield "nulls", dataset_of([*[None] * 150, *topics(700), None, *topics(300), *[None] * 300]), {"kmeans_sample": 16}
    yield "copies of one row", dataset_of([*topics(60), *[topics(1)[0]] * 500]), {"k": 50, "kmeans_sample": 4}
    yield "equal rows", dataset_of([[1.0, 2.0, 3.0]] * 200), {"k": 10}
    yield "two rows", dataset_of(topics(2)), {"k": 2}
    yield "one row", dataset_of(topics(1)), {}
    yield "scikit-learn", data, {"kmeans": "sklearn", "n_init": 2}
    if source is not None:
        yield "embeddings", Dataset.from_parquet(source), {"kmeans_sample": 8}
        yield "embeddings, exact", Dataset.from_parquet(source), {"kmeans_sample": 0}


def differences(dataset: Dataset, settings: dict[str, Any]) -> tuple[float, float, float]:
    """Return how the clusters of all processes differ from those of one: share of labels, centres, distances."""
    model = ClusterModel.fit(dataset, **settings)
    labelled = model.label(dataset, across_processes=True)
    with alone():
        reference = ClusterModel.fit(dataset, **settings)
        expected = reference.label(dataset)
    with all_processes() as processes:
        digests = processes.gather(lambda: model.digest, lambda found: found)
    if len(set(digests)) != 1:
        raise AssertionError("the processes have different models")
    if [x is None for x in labelled["cluster"]] != [x is None for x in dataset["embedding"]]:
        raise AssertionError("other rows have a label than have an embedding")
    mine, theirs = (np.array([x for x in found["cluster"] if x is not None]) for found in (labelled, expected))
    far, near = (np.array([x for x in found["cluster_distance"] if x is not None]) for found in (labelled, expected))
    same_shape = model.components.shape == reference.components.shape
    # With another number of components the centres cannot be subtracted: 9 is far above every tolerance.
    apart = np.abs(model.centers - reference.centers).max() if same_shape else 9
    return float((mine != theirs).mean()), float(apart), float(np.abs(far - near).max())


def relocated(processes: Processes) -> tuple[float, float, float]:
    """Return the same differences for Lloyd's algorithm that must move 9 empty centres to the farthest points."""
    points = torch.from_numpy(topics(1_000))
    # 9 centres far from the unit sphere on which all points lie, so no point is nearest to them.
    first = torch.cat([points[:11], torch.full((9, points.shape[1]), 50.0) + torch.arange(9).unsqueeze(1)])
    if int((kmeans.one_pass([points], first).counts == 0).sum()) != 9:
        raise AssertionError("not exactly 9 centres are empty, so the case tests nothing")
    share = processes.share(len(points), kmeans.CHUNK)
    found = kmeans.lloyd(points[share.start : share.stop], first, processes).centers
    expected = kmeans.lloyd(points, first).centers
    labels = [kmeans.nearest(points, centers)[0] for centers in (found, expected)]
    return float((labels[0] != labels[1]).float().mean()), float((found - expected).abs().max()), 0.0


def errors(rank: int) -> list[str]:
    """Return the error that this process gets in each case where the input of one or of all is wrong."""
    rows, more = topics(400), topics(400)
    rows[[70, 200, 399]] = np.nan
    unequal = [*more[:300], *more[300:, :8]]
    ordinary = fitting.embedding_batches

    def broken(*given: Any) -> Any:
        if rank == 1:
            raise RuntimeError("rank 1 has lost its disk")
        return ordinary(*given)

    told = []
    for data, breaking, settings in (
        (dataset_of(rows), ordinary, {}),
        (dataset_of(unequal), ordinary, {}),
        (dataset_of([None] * 300), ordinary, {}),
        (dataset_of(more), ordinary, {"k": 401}),
        (dataset_of(more), ordinary, {"embedding_column": "vector"}),
        # From here on the processes disagree: one fails, or has other rows, another order or another setting.
        (dataset_of(more), broken, {}),
        (dataset_of(more[rank:]), ordinary, {}),
        (dataset_of(more[::-1] if rank else more), ordinary, {}),
        (dataset_of(more), ordinary, {"seed": rank}),
        (dataset_of([more[0], *more[:0:-1]] if rank else more), ordinary, {}),
        (dataset_of([more[0], *more[:0:-1]] if rank else more), ordinary, {"kmeans": "sklearn"}),
    ):
        fitting.embedding_batches = breaking
        try:
            ClusterModel.fit(data, **settings)
        except (ValueError, RuntimeError) as error:
            told.append(f"{type(error).__name__}: {error}")
    fitting.embedding_batches = ordinary
    model = from_main(lambda: ClusterModel.fit(dataset_of(more)))  # by one process, for which no other must wait
    other = replace(model, centers=model.centers + rank)
    turned = [more[0], *more[:0:-1]] if rank else more
    for labeller, labelled in ((model, rows), (model, turned), (other, more)):
        try:
            labeller.label(dataset_of(labelled), across_processes=True)
        except ValueError as error:
            told.append(f"ValueError: {error}")
    return told


def main(source: str | None) -> None:
    in_pieces_of(PIECE)
    found: dict[str, Any] = {name: differences(data, settings) for name, data, settings in cases(source)}
    with all_processes() as processes:
        found["relocated"] = relocated(processes)
    in_pieces_of(1)
    found["rows one by one"] = differences(dataset_of(topics(5)), {"k": 3})
    in_pieces_of(PIECE)
    told = errors(processes.rank)
    with all_processes() as processes:
        found["errors"] = processes.gather(lambda: told, lambda parts: parts)
    if processes.rank == 0:
        sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
