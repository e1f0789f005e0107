"""model.py: `ClusterModel` against scikit-learn, as a file and as a callable of `.map`."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher
from datasets.table import InMemoryTable
from safetensors.numpy import load_file, save_file
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

from car_datasets import ClusterModel
from car_datasets.clustering.fitting import number_of_clusters
from car_datasets.utils.columns import BATCH
from tests.workers import WORKERS

NEW = {"cluster": Value("int32"), "cluster_distance": Value("float32")}


def vectors(rows: int, width: int = 12, seed: int = 0) -> np.ndarray:
    """Return normal rows with less and less variance per column, so that PCA drops some."""
    return (np.random.default_rng(seed).normal(size=(rows, width)) * 0.8 ** np.arange(width)).astype(np.float32)


def dataset_of(rows: Any, **columns: Any) -> Dataset:
    types = Features({"embedding": List(Value("float32"))})
    dataset = Dataset.from_dict({"embedding": [None if row is None else list(row) for row in rows]}, features=types)
    for name, values in columns.items():
        dataset = dataset.add_column(name, values)
    return dataset


@pytest.fixture(scope="module")
def data() -> Dataset:
    return dataset_of(vectors(300), id=[f"r{i}" for i in range(300)])


@pytest.fixture(scope="module")
def model(data: Dataset) -> ClusterModel:
    return ClusterModel.fit(data)


# fit and assign -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "seed", "share", "n_init"), [("sqrt", 42, 0.95, 1), (25, 0, 0.95, 1), (7, 1, 0.5, 4)])
def test_fit_equals_pca_and_k_means_of_scikit_learn(k: Any, seed: int, share: float, n_init: int) -> None:
    matrix, new = vectors(900), vectors(200, seed=1)
    options: dict[str, Any] = {"k": k, "seed": seed, "explained_variance": share, "n_init": n_init}
    model = ClusterModel.fit(dataset_of(matrix), kmeans="sklearn", **options)
    pca = PCA(share, random_state=seed)
    projected = pca.fit_transform(matrix)
    kmeans = KMeans(21 if k == "sqrt" else k, n_init=n_init, random_state=seed).fit(projected)
    assert model.k == kmeans.n_clusters
    assert 1 < len(model.components) == pca.n_components_ < matrix.shape[1]
    assert model.explained_variance == pytest.approx(pca.explained_variance_ratio_.sum(), rel=1e-5)
    assert model.inertia == pytest.approx(kmeans.inertia_, rel=1e-5)
    assert model.assign(matrix)[0].tolist() == kmeans.labels_.tolist()
    labels, distances = model.assign(new)
    assert labels.tolist() == kmeans.predict(pca.transform(new)).tolist()
    np.testing.assert_allclose(distances, kmeans.transform(pca.transform(new)).min(axis=1), rtol=1e-4)
    assert (labels.dtype, distances.dtype) == (np.int32, np.float32)


def test_all_components_are_kept_on_request() -> None:
    model = ClusterModel.fit(dataset_of(vectors(50)), explained_variance=1.0)
    assert model.components.shape == (12, 12)
    assert model.explained_variance == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize(("rows", "k"), [(1, 1), (2, 1), (7, 1), (8, 2), (49, 4), (50, 5), (9_000, 67), (10**7, 2236)])
def test_sqrt_is_the_papers_rule(rows: int, k: int) -> None:
    assert number_of_clusters("sqrt", rows) == k


@pytest.mark.parametrize(("rows", "k"), [(1, 1), (2, 1), (8, 2), (50, 5)])
def test_fit_takes_that_many_clusters(rows: int, k: int) -> None:
    data = dataset_of(vectors(rows))
    model = ClusterModel.fit(data)
    assert model.k == k
    assert len(set(model.label(data)["cluster"])) == k


def test_as_many_clusters_as_rows() -> None:
    data = dataset_of(vectors(9))
    labelled = ClusterModel.fit(data, k=9, explained_variance=1.0).label(data)
    assert sorted(labelled["cluster"]) == list(range(9))
    np.testing.assert_allclose(labelled["cluster_distance"], 0, atol=1e-5)


def test_numbers_may_be_numpys(data: Dataset, tmp_path: Path) -> None:
    numbers = {"k": 3, "n_init": 2, "seed": 7, "kmeans_sample": 50}
    model = ClusterModel.fit(
        data, explained_variance=np.float32(0.5), **{name: np.int64(n) for name, n in numbers.items()}
    )
    assert model.digest == ClusterModel.fit(data, explained_variance=0.5, **numbers).digest
    model.save_pretrained(tmp_path)
    assert ClusterModel.from_pretrained(tmp_path).seed == 7


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_equal_rows_fall_into_one_cluster() -> None:
    data = dataset_of([[1.0, 2.0, 3.0]] * 20)
    assert set(ClusterModel.fit(data).label(data)["cluster"]) == {0}


def test_labels_do_not_depend_on_how_many_rows_come_at_once(model: ClusterModel) -> None:
    matrix = vectors(BATCH + 100)
    labels, distances = model.assign(matrix)
    parts = [model.assign(part) for part in np.array_split(matrix, 7)]
    assert np.array_equal(labels, np.concatenate([part[0] for part in parts]))
    np.testing.assert_allclose(distances, np.concatenate([part[1] for part in parts]), rtol=1e-4)


def test_the_seed_decides(data: Dataset, model: ClusterModel) -> None:
    again = ClusterModel.fit(data)
    assert again.digest == model.digest
    assert Hasher.hash(again) == Hasher.hash(model)
    other = ClusterModel.fit(data, seed=43)
    assert other.digest != model.digest
    assert Hasher.hash(other) != Hasher.hash(model)


def test_rows_without_an_embedding_are_left_out_of_the_fit(data: Dataset, model: ClusterModel) -> None:
    rows = [None, *vectors(300), None]
    assert ClusterModel.fit(dataset_of(rows)).digest == model.digest


def test_other_column_names(data: Dataset) -> None:
    model = ClusterModel.fit(
        data.rename_column("embedding", "vector"), "vector", output_column="topic", distance_column="far"
    )
    labelled = model.label(data.rename_column("embedding", "vector"))
    assert labelled.column_names == ["vector", "id", "topic", "far"]
    assert model.output_features() == Features({"topic": Value("int32"), "far": Value("float32")})


# the callable ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [7, 1000])
def test_map_and_label_give_the_same(data: Dataset, model: ClusterModel, batch_size: int) -> None:
    mapped = data.map(model, batched=True, with_rank=True, batch_size=batch_size)
    labelled = model.label(data)
    assert mapped.features == labelled.features == Features({**data.features, **NEW})
    matrix = vectors(300)
    for dataset in (mapped, labelled):
        assert dataset["cluster"][:] == model.assign(matrix)[0].tolist()
        np.testing.assert_allclose(dataset["cluster_distance"], model.assign(matrix)[1], rtol=1e-5)
        assert dataset.select_columns(["id", "embedding"])[:] == data.select_columns(["id", "embedding"])[:]


@pytest.mark.parametrize("kind", ["numpy", "torch", "arrow", "pandas"])
def test_label_in_any_format(data: Dataset, model: ClusterModel, kind: str) -> None:
    assert model.label(data.with_format(kind)).with_format(None)[:] == model.label(data)[:]


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_map_in_the_formats_that_give_rows(data: Dataset, model: ClusterModel, kind: str) -> None:
    mapped = data.with_format(kind).map(model, batched=True, with_rank=True)
    assert mapped.with_format(None)[:] == model.label(data)[:]


@pytest.mark.parametrize("kind", ["arrow", "pandas"])
def test_map_in_the_formats_that_give_tables_loses_no_column(data: Dataset, model: ClusterModel, kind: str) -> None:
    """Check tables, of which `.map` keeps only what a function returns: the model must return the rest, or refuse."""
    try:
        names = data.with_format(kind).map(model, batched=True, with_rank=True).column_names
    except ValueError as error:
        assert "format" in str(error)
    else:
        assert set(names) == {"id", "embedding", "cluster", "cluster_distance"}


def test_parts_of_a_dataset_get_their_own_labels(data: Dataset, model: ClusterModel) -> None:
    label_of = dict(zip(data["id"], model.label(data)["cluster"], strict=True))
    for part in (data.shuffle(seed=1), data.select([5, 3, 200]), data.select(range(100, 150))):
        for labelled in (model.label(part), part.map(model, batched=True, with_rank=True, batch_size=16)):
            assert labelled["id"][:] == part["id"][:]
            assert labelled["cluster"][:] == [label_of[name] for name in part["id"]]


def test_labelling_a_shuffled_dataset_leaves_its_whole_numbers_whole(data: Dataset, model: ClusterModel) -> None:
    counted = data.add_column("count", [None, *range(1, 300)]).with_format("numpy").select(range(299, -1, -1))
    assert model.label(counted).features["count"] == Value("int64")


def test_rows_without_an_embedding_get_no_cluster(model: ClusterModel) -> None:
    rows = [None if i in (1, 4, 5) else row for i, row in enumerate(vectors(8))]
    data = dataset_of(rows)
    labels = model.assign(vectors(8))[0].tolist()
    expected = [None if row is None else label for row, label in zip(rows, labels, strict=True)]
    for labelled in (model.label(data), data.map(model, batched=True, with_rank=True)):
        assert labelled["cluster"][:] == expected
        assert [d is None for d in labelled["cluster_distance"]] == [row is None for row in rows]
        assert {name: labelled.features[name] for name in NEW} == NEW


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_with_its_types_named_map_may_begin_with_nulls(model: ClusterModel, batch_size: int) -> None:
    data = dataset_of([None, None, *vectors(4)])
    types = Features({**data.features, **model.output_features()})
    mapped = data.map(model, batched=True, with_rank=True, batch_size=batch_size, features=types)
    assert mapped.features == types
    assert mapped["cluster"][:] == model.label(data)["cluster"][:]


FORKED = """
import numpy as np
from datasets import Dataset
from car_datasets import ClusterModel
rows = np.random.default_rng(0).normal(size=(20_000, 32)).astype(np.float32)
data = Dataset.from_dict({"embedding": list(rows)})
model = ClusterModel.fit(data)
assert data.map(model, batched=True, num_proc=2)["cluster"][:] == model.label(data)["cluster"][:]
"""


@pytest.mark.slow
def test_map_in_forked_processes_does_not_wait_for_threads_that_a_fork_lost(tmp_path: Path) -> None:
    # On the CPU, since a fork of a process that has used a GPU cannot use it.
    environment = {**os.environ, "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", FORKED], env=environment, timeout=120, check=True)


def test_no_rows_get_the_columns_too(data: Dataset, model: ClusterModel) -> None:
    assert model.label(data.select([])).features == Features({**data.features, **NEW})


def test_a_second_map_finds_the_first_in_the_cache(data: Dataset, model: ClusterModel) -> None:
    first = data.map(model, batched=True, with_rank=True)
    second = data.map(pickle.loads(pickle.dumps(model)), batched=True, with_rank=True)
    assert first._fingerprint == second._fingerprint


# files, pickles, fingerprints -----------------------------------------------------------------------------------------


@pytest.fixture
def saved(model: ClusterModel, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "deep" / "clusters")
    return tmp_path / "deep" / "clusters"


def test_a_saved_model_comes_back_equal(model: ClusterModel, saved: Path) -> None:
    loaded = ClusterModel.from_pretrained(saved)
    assert {path.name for path in saved.iterdir()} == {"cluster_model.safetensors", "cluster_model.json"}
    assert loaded.digest == model.digest
    for name in ("explained_variance", "inertia", "seed", "embedding_column", "output_column", "distance_column"):
        assert getattr(loaded, name) == getattr(model, name)
    for got, wanted in zip(loaded.assign(vectors(500, seed=5)), model.assign(vectors(500, seed=5)), strict=True):
        assert np.array_equal(got, wanted)


def save_and_die(model: ClusterModel, folder: Path, nth: int) -> None:
    """Save, in a child that is killed before the n-th file is moved into place."""
    ordinary, left = os.replace, [nth]

    def deadly(*given: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        ordinary(*given)

    os.replace = deadly  # type: ignore[assignment]
    model.save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("before", ["nothing", "another model"])
def test_killed_while_saving_it_leaves_no_model_that_loads(
    model: ClusterModel, tmp_path: Path, nth: int, before: str
) -> None:
    if before == "another model":
        replace(model, centers=model.centers + 1, seed=9).save_pretrained(tmp_path)
    worker = WORKERS.Process(target=save_and_die, args=(model, tmp_path, nth))
    worker.start()
    worker.join(60)
    assert worker.exitcode == -signal.SIGKILL
    with pytest.raises(ValueError, match="holds no cluster model"):
        ClusterModel.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert ClusterModel.from_pretrained(tmp_path).digest == model.digest


@pytest.mark.parametrize("wanted", [True, False])
def test_the_bar_is_that_of_datasets(
    model: ClusterModel, data: Dataset, wanted: bool, capfd: Any, monkeypatch: Any
) -> None:
    # Under conftest's setting of the environment neither call would do anything.
    monkeypatch.setattr(sys.modules["datasets.utils.tqdm"], "HF_DATASETS_DISABLE_PROGRESS_BARS", None)
    (datasets.enable_progress_bars if wanted else datasets.disable_progress_bars)()
    try:
        model.label(data)
    finally:
        datasets.disable_progress_bars()
    assert ("Clustering: 100%" in capfd.readouterr().err) is wanted


def test_a_saved_model_keeps_its_fingerprint(model: ClusterModel, saved: Path) -> None:
    assert Hasher.hash(ClusterModel.from_pretrained(saved)) == Hasher.hash(model)


def test_a_model_saved_by_the_first_version_still_labels(model: ClusterModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    plain = tmp_path / "cluster_model.json"
    plain.write_text(plain.read_text().replace(f'"cache_version": "{model.cache_version}"', '"cache_version": "1"'))
    assert '"cache_version": "1"' in plain.read_text()
    assert ClusterModel.from_pretrained(tmp_path).digest == model.digest


def test_a_pickled_model_comes_back_equal(model: ClusterModel) -> None:
    loaded = pickle.loads(pickle.dumps(model))
    assert (loaded.digest, Hasher.hash(loaded)) == (model.digest, Hasher.hash(model))


def test_the_version_of_the_code_is_part_of_the_fingerprint(model: ClusterModel) -> None:
    assert b"cache_version" in pickle.dumps(model)


def test_another_model_has_another_fingerprint(model: ClusterModel) -> None:
    others = [
        replace(model, centers=model.centers + 1),
        replace(model, mean=model.mean + 1),
        replace(model, components=-model.components),
        replace(model, embedding_column="vector"),
        replace(model, output_column="topic"),
    ]
    assert len({Hasher.hash(m) for m in [model, *others]}) == 6
    assert len({m.digest for m in [model, *others[:3]]}) == 4


HASH = (
    "import sys; from datasets.fingerprint import Hasher; from car_datasets import ClusterModel; "
    "print(Hasher.hash(ClusterModel.from_pretrained(sys.argv[1])))"
)


def test_every_process_computes_the_same_fingerprint(saved: Path) -> None:
    started = [
        subprocess.Popen(
            [sys.executable, "-c", HASH, str(saved)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    hashes = [process.communicate(timeout=60)[0].strip() for process in started]
    assert hashes == [Hasher.hash(ClusterModel.from_pretrained(saved))] * 2


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no cluster model: there is no cluster_model\.json"):
        ClusterModel.from_pretrained(tmp_path)


def test_a_folder_without_the_numbers_is_refused(saved: Path) -> None:
    (saved / "cluster_model.safetensors").unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=r"cluster_model\.safetensors"):
        ClusterModel.from_pretrained(saved)


def test_a_model_of_another_version_is_refused(saved: Path) -> None:
    plain = json.loads((saved / "cluster_model.json").read_text())
    (saved / "cluster_model.json").write_text(json.dumps({**plain, "cache_version": "0"}))
    with pytest.raises(ValueError, match=r"a cluster model of version '0'; this code reads \('1', '2'\)"):
        ClusterModel.from_pretrained(saved)


# errors ---------------------------------------------------------------------------------------------------------------

BAD_FITS: dict[str, tuple[dict[str, Any], str]] = {
    "k above the rows": ({"k": 7}, "k=7 must be 'sqrt' or a number between 1 and the 6 rows that can be clustered"),
    "k = 0": ({"k": 0}, "k=0 must be"),
    "k negative": ({"k": -3}, "k=-3 must be"),
    "k a word": ({"k": "root"}, "k='root' must be 'sqrt'"),
    "k a fraction": ({"k": 2.5}, r"k=2\.5 must be"),
    "k a bool": ({"k": True}, "k=True must be"),
    "variance 0": ({"explained_variance": 0.0}, r"explained_variance=0\.0 must lie in \(0, 1\]"),
    "variance above 1": ({"explained_variance": 1.5}, "explained_variance=1.5 must lie"),
    "k a number as text": ({"k": "12"}, "k='12' must be 'sqrt' or an integer"),
    "k of numpy, a fraction": ({"k": np.float64(3)}, "k=.*3.0.* must be"),
    "variance a bool": ({"explained_variance": True}, "explained_variance=True must lie"),
    "variance a word": ({"explained_variance": "0.9"}, "explained_variance='0.9' must lie"),
    "no runs": ({"n_init": 0}, "n_init=0 must be at least 1"),
    "runs a fraction": ({"n_init": 1.5}, "n_init=1.5 must be at least 1"),
    "runs a bool": ({"n_init": True}, "n_init=True must be"),
    "seed a fraction": ({"seed": 1.5}, "seed=1.5 must be an integer"),
    "seed a bool": ({"seed": False}, "seed=False must be"),
    "seed negative": ({"seed": -1}, "seed=-1 must be"),
    "sample a fraction": ({"kmeans_sample": 2.5}, "kmeans_sample=2.5 must be a number of rows"),
    "no column": ({"embedding_column": "vector"}, r"no column 'vector'; it has \['embedding'\]"),
}


@pytest.mark.parametrize(("options", "message"), BAD_FITS.values(), ids=BAD_FITS)
def test_fit_refuses_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClusterModel.fit(dataset_of([*vectors(6), None]), **options)


BAD_ROWS: dict[str, tuple[Any, str]] = {
    "unequal": ([[1, 2], [1, 2, 3]], r"embeddings of the lengths \[2, 3\]"),
    "NaN": ([[1, 2], [float("nan"), 3]], r"not finite in 1 rows, the first \[1\]"),
    "infinite": ([[1, 2], [3, float("inf")]], "not finite in 1 rows"),
    "only nulls": ([None, None], "holds no embeddings, only nulls"),
    "no rows": ([], "holds no embeddings"),
}


@pytest.mark.parametrize(("rows", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_fit_refuses_rows(rows: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClusterModel.fit(dataset_of(rows))


def run_map(model: ClusterModel, dataset: Dataset) -> Dataset:
    return dataset.map(model, batched=True, with_rank=True)


@pytest.mark.parametrize("run", [ClusterModel.label, run_map], ids=["label", "map"])
@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (dataset_of(vectors(5, width=3)), r"have the shape \(5, 3\); this model was fitted on 12 columns"),
        (dataset_of([[1.0] * 12, [float("nan")] * 12]), "not finite in 1 rows"),
        (dataset_of(vectors(5), cluster=[0] * 5), r"already has the column\(s\) \['cluster'\].*output_column="),
        (dataset_of(vectors(5), cluster_distance=[0.0] * 5), r"already has the column\(s\) \['cluster_distance'\]"),
        (dataset_of(vectors(5)).rename_column("embedding", "vector"), "'?embedding'?.*vector"),
    ],
    ids=["dimension", "NaN", "label taken", "distance taken", "no column"],
)
def test_labelling_refuses(model: ClusterModel, run: Any, dataset: Dataset, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(model, dataset)


def test_assign_refuses_a_single_vector(model: ClusterModel) -> None:
    with pytest.raises(ValueError, match=r"have the shape \(12,\)"):
        model.assign(vectors(1)[0])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads its memory from /proc")
def test_labelling_leaves_no_memory_behind(tmp_path: Path) -> None:
    """Measure memory, of which holes between small results once took as much as the embeddings, here 460 MB."""
    matrix = np.random.default_rng(0).normal(size=(300_000, 384)).astype(np.float32)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), 384)
    Dataset(InMemoryTable(pa.table({"embedding": lists}))).save_to_disk(tmp_path / "pool")
    code = """
import sys
from datasets import Dataset
from car_datasets import ClusterModel

def megabytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) // 1024

pool = Dataset.load_from_disk(sys.argv[1])
model = ClusterModel.fit(pool.select(range(2000)), k=20)
before = megabytes()
labelled = model.label(pool)
print(megabytes() - before)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "pool")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) < 200


def changed(**parts: Any) -> Any:
    """Return a function that saves the arrays of a model with some of them replaced, or left out if None."""

    def save(folder: Path) -> None:
        arrays = load_file(folder / "cluster_model.safetensors")
        arrays.update({name: make(arrays[name]) for name, make in parts.items()})
        save_file({k: v for k, v in arrays.items() if v is not None}, folder / "cluster_model.safetensors")

    return save


def said(content: Any) -> Any:
    """Return a function that writes the JSON file of a model, or replaces entries in it."""

    def save(folder: Path) -> None:
        path = folder / "cluster_model.json"
        plain = json.loads(path.read_text())
        path.write_text(content if isinstance(content, str) else json.dumps({**plain, **content}))

    return save


DAMAGES = {
    "no centres": changed(centers=lambda old: None),
    "a centre of NaN": changed(centers=lambda old: np.where(np.arange(len(old))[:, None] == 1, np.nan, old)),
    "an infinite mean": changed(mean=lambda old: old + np.inf),
    "components of other rows": changed(components=lambda old: old[:, :-1].copy()),
    "components that are too few": changed(components=lambda old: old[:-1].copy()),
    "a flat mean": changed(mean=lambda old: old[None].copy()),
    "centres without a row": changed(centers=lambda old: old[:0].copy()),
    "numbers of a stranger": changed(mean=lambda old: old.astype(np.float32)[:1].copy()),
    "cut numbers": lambda folder: os.truncate(folder / "cluster_model.safetensors", 300),
    "no numbers": lambda folder: os.truncate(folder / "cluster_model.safetensors", 0),
    "a list": said("[]"),
    "no JSON": said("{"),
    "deep JSON": said("[" * 100_000),
    "a column that is a number": said({"output_column": 5}),
    "an entry too many": said({"more": 1}),
    "a seed of text": said({"seed": "x"}),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_model_is_refused_in_one_line(damage: Any, saved: Path) -> None:
    damage(saved)
    with pytest.raises(ValueError, match=r"is damaged: .*Fit the clusters again") as error:
        ClusterModel.from_pretrained(saved)
    assert str(saved) in str(error.value) and "\n" not in str(error.value)
