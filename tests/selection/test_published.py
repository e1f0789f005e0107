"""The original's files and its published procedure; where that is a bug, the default does right, and both are shown."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from typer.testing import CliRunner

from car_datasets import ClusterModel, curate, select_car
from car_datasets.cli import app
from car_datasets.loading.sources import open_dataset
from car_datasets.results import write_table
from car_datasets.selection.procedures import PROCEDURES, Amounts
from car_datasets.selection.published import (
    from_original,
    original_columns,
    rank_rows,
    select_as_published,
    write_original,
)
from car_datasets.utils.column_names import ColumnNames

CASES = [(f, i) for f in ("expected.json", "expected_n_init10.json") for i in range(12)]


@pytest.fixture(scope="session")
def oracle(shared: Path) -> Path:
    return shared / "oracle"


@pytest.fixture(scope="session")
def clustering_rows(oracle: Path) -> Dataset:
    rows = [json.loads(line) for line in (oracle / "clustering" / "rows.jsonl").read_text().splitlines()]
    return Dataset.from_list(rows).add_column("embedding", list(np.load(oracle / "clustering" / "vectors.npy")))


@pytest.mark.shared
@pytest.mark.parametrize(("file", "case"), CASES)
def test_clustering_oracle(file: str, case: int, oracle: Path, clustering_rows: Dataset) -> None:
    content = json.loads((oracle / "clustering" / file).read_text())
    assert len(content["cases"]) == 12
    expected = content["cases"][case]
    k = expected["k"] if expected["k_given"] else "sqrt"
    model = ClusterModel.fit(clustering_rows, k=k, n_init=expected["n_init"], kmeans="sklearn")
    assert len(model.components) == expected["pca_components"]
    labelled = model.label(clustering_rows)
    assert [int(x) for x in content["labels_by_k"][str(expected["k"])]] == labelled["cluster"][:]
    n1, n2 = expected["n1"], expected["n2"]
    found = select_as_published(labelled, n1, n2, score_column="score", index_column="id")
    assert found["id"][:] == expected["selected_ids"]


SIZES = [(1000, 1), (100, 1), (100, 3), (20, 1)]


@pytest.fixture(scope="session")
def from_text(oracle: Path) -> dict[str, Any]:
    """Return the original's run from text: its input, ranking, labels and selections, and the first row of each text."""
    source = oracle / "e2e" / "input.json"
    first: dict[tuple[str, ...], int] = {}
    for i, row in enumerate(json.loads(source.read_text())):
        first.setdefault((row["instruction"], row["input"], row["output"]), i)
    expected = json.loads((oracle / "e2e" / "expected.json").read_text())
    models = {"scorer": str(oracle / "instruction_score"), "embedder": str(oracle / "e2e" / "sentence_bert")}
    vectors = np.load(oracle / "e2e" / "sentence_vectors_ranking_order.npy")
    return {"source": source, "first": first, "expected": expected, "models": models, "vectors": vectors}


def in_the_originals_terms(rows: Iterable[dict[str, Any]], first: dict[tuple[str, ...], int]) -> list[list[Any]]:
    """Return rows as `[first input row with the same text, score, label]`, which is how the oracle names them."""
    return [[first[r["instruction"], r["input"], r["output"]], r["score"], r.get("label")] for r in rows]


@pytest.mark.shared
def test_from_text_to_ranking_and_vectors(from_text: dict[str, Any], tmp_path: Path) -> None:
    """Hold an exact ranking, scores and vectors within their tolerance, and the labels of the selection's own run.

    k-means from text depends on the last bit of the embeddings, which differs between processors: there is no label to
    compare with, unless the vectors are equal to the bit.
    """
    first, expected = from_text["first"], from_text["expected"]
    found = curate(from_text["source"], tmp_path / "out", procedure="paper", n1=100, n2=3, **from_text["models"])

    def read(name: str) -> list[list[Any]]:
        rows = json.loads((tmp_path / "out" / name).read_text())
        assert list(rows[0])[:4] == ["instruction", "input", "output", "score"]
        return in_the_originals_terms(rows, first)

    ranking = read("ranking_IQS_result.json")
    assert [(i, label) for i, _, label in ranking] == [(i, None) for i, _ in expected["ranking_iqs"]]
    assert [score for _, score, _ in ranking] == pytest.approx([s for _, s in expected["ranking_iqs"]], abs=5e-5)
    clustering = read("clustering_result.json")
    assert [i for i, _, _ in clustering] == [i for i, _, _ in expected["clustering_in_ranking_order"]]
    vectors = np.array(found.scored["embedding"][:], dtype=np.float32)
    np.testing.assert_allclose(vectors, from_text["vectors"], atol=1e-5)
    if np.array_equal(vectors, from_text["vectors"]):
        assert clustering == expected["clustering_in_ranking_order"]
    assert len({label for _, _, label in clustering}) == len({r[2] for r in expected["clustering_in_ranking_order"]})
    chosen = select_as_published(found.scored, 100, 3)
    written = json.loads((tmp_path / "out" / "CaR_selected_result.json").read_text())
    assert [(r["output"], int(r["label"])) for r in written] == list(
        zip(chosen["output"][:], chosen["cluster"][:], strict=True)
    )


@pytest.mark.shared
@pytest.mark.parametrize(("n1", "n2"), SIZES)
def test_from_stored_vectors_to_selection(n1: int, n2: int, from_text: dict[str, Any]) -> None:
    """Hold the original's labels and selection, row for row, from the vectors that it clustered."""
    expected = from_text["expected"]
    source = json.loads(from_text["source"].read_text())
    rows = [
        {name: source[i][name] for name in ("instruction", "input", "output")} | {"iqs_score": score}
        for i, score in expected["ranking_iqs"]
    ]
    pool = Dataset.from_list(rows).add_column("embedding", list(from_text["vectors"]))
    labelled = ClusterModel.fit(pool, kmeans="sklearn").label(pool)
    wanted = expected["clustering_in_ranking_order"]
    assert labelled["cluster"][:] == [int(label) for _, _, label in wanted]
    plain = labelled.remove_columns(["embedding", "cluster_distance"])
    chosen = select_as_published(plain, n1, n2)
    named = [r | {"score": r["iqs_score"], "label": str(r["cluster"])} for r in chosen]
    found = in_the_originals_terms(named, from_text["first"])
    assert found == expected["selected_by_n1_n2"][f"n1={n1},n2={n2}"]


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.parametrize(
    ("folder", "key"), [("instruction_score", "ranking_iqs"), ("instruction_comet", "ranking_comet")]
)
def test_ranking_file_of_both_scorers(folder: str, key: str, oracle: Path, tmp_path: Path) -> None:
    """Compare `car-datasets score ... --output X.json` with `python split_IQS.py` and `split_comet.py`."""
    source, output = oracle / "e2e" / "input.json", tmp_path / "ranking.json"
    done = CliRunner().invoke(app, ["score", str(source), "--output", str(output), "--scorer", str(oracle / folder)])
    assert done.exit_code == 0, done.output
    found = json.loads(output.read_text())
    expected = json.loads((oracle / "e2e" / "expected.json").read_text())[key]
    assert [row["score"] for row in found] == pytest.approx([score for _, score in expected], abs=5e-5)
    assert list(found[0]) == ["instruction", "input", "output", "score"]


ROWS = [
    {"instruction": "a", "input": "", "output": "1", "score": 0.5, "label": "9"},
    {"instruction": "b", "input": "", "output": "2", "score": 0.9, "label": "89"},
    {"instruction": "b", "input": "", "output": "2", "score": 0.9, "label": "89"},
    {"instruction": "c", "input": "é", "output": "3", "score": 0.1, "label": "9"},
    {"instruction": "d", "input": "", "output": "4", "score": 0.1, "label": "7"},
]


@pytest.fixture
def scored(tmp_path: Path) -> Dataset:
    (tmp_path / "clustering_result.json").write_text(json.dumps(ROWS), encoding="utf-8")
    return from_original(open_dataset(tmp_path / "clustering_result.json"))


def test_files_round_trip(scored: Dataset, tmp_path: Path) -> None:
    assert scored.features["cluster"].dtype == "int32"
    assert scored["cluster"][:] == [9, 89, 89, 9, 7]
    write_original(scored, tmp_path / "again.json", ColumnNames())
    assert json.loads((tmp_path / "again.json").read_text(encoding="utf-8")) == ROWS
    assert "é" in (tmp_path / "again.json").read_text(encoding="utf-8")


def test_other_datasets_keep_their_names() -> None:
    ours = Dataset.from_dict({"score": [1.0], "iqs_score": [2.0], "label": ["spam"]})
    assert from_original(ours).column_names == ["score", "iqs_score", "label"]


def test_ranking_is_stable(scored: Dataset) -> None:
    assert rank_rows(scored)["instruction"][:] == ["b", "b", "a", "c", "d"]


def outputs(dataset: Dataset) -> list[str]:
    return dataset["output"][:]


def test_equal_rows_merge_in_the_second_stage_only(scored: Dataset) -> None:
    assert outputs(select_as_published(scored, n1=2, n2=2)) == ["2", "2", "1", "3", "4"]
    assert outputs(select_as_published(scored, n1=0, n2=2)) == ["1", "3", "2", "4"]  # one of the equal rows is gone
    assert outputs(select_car(scored, n1=0, n2=2, allow_worse=True)) == ["2", "2", "1", "3", "4"]  # rows are rows


def test_published_order_of_clusters_is_that_of_text(scored: Dataset) -> None:
    assert select_as_published(scored, n1=0, n2=1)["cluster"][:] == [9, 89, 7]
    assert select_car(scored, n1=0, n2=1, allow_worse=True)["cluster"][:] == [89, 9, 7]  # best score first


def test_no_rows_per_cluster_acts_like_one_in_the_original(scored: Dataset) -> None:
    assert outputs(select_as_published(scored, n1=1, n2=0)) == outputs(select_as_published(scored, n1=1, n2=1))
    assert outputs(select_car(scored, n1=1, n2=0)) == ["2"]


@pytest.mark.parametrize("numbers", [{"n1": 0.5}, {"n1": True}, {"n2": 1.5}, {"n2": -1}], ids=str)
def test_a_share_of_the_rows_is_refused(numbers: dict[str, Any], scored: Dataset) -> None:
    with pytest.raises(ValueError, match=r"n1=.* and n2=.* must not be negative; pass integers"):
        select_as_published(scored, **numbers)


def test_more_rows_than_there_are(scored: Dataset) -> None:
    assert len(select_as_published(scored, n1=99, n2=1)) == 5
    with pytest.raises(ValueError, match="n1=99"):
        select_car(scored, n1=99)


def test_reasons_and_ranks_come_along(scored: Dataset) -> None:
    found = select_as_published(scored, n1=3, n2=1)
    assert found["selected_by"][:] == ["both", "score", "both", "cluster"]
    assert found["score_rank"][:] == [1, 2, 3, 5]


def test_a_row_without_a_cluster_is_kept_by_its_score_alone() -> None:
    pool = Dataset.from_dict({"iqs_score": [3.0, 2.0, 1.0], "cluster": [None, 0, 0], "output": ["a", "b", "c"]})
    chosen = select_as_published(pool, n1=2, n2=1)
    assert chosen["selected_by"][:] == ["score", "both"]
    assert chosen["cluster_rank"][:] == [0, 1]


def test_a_row_without_a_score_is_left_out() -> None:
    rows = Dataset.from_dict({"iqs_score": [0.1, None, 0.3], "cluster": [0, 0, 1], "output": ["a", "b", "c"]})
    assert outputs(select_as_published(rows, n1=3, n2=1)) == ["c", "a"]


def test_a_scored_file_is_clustered_and_selected_without_scoring(
    tmp_path: Path, tiny_embedder: str, sample_rows: list[dict[str, Any]]
) -> None:
    """Compare with `python cluster.py --input='XX.json'`."""
    rows = [
        {k: r[k] for k in ("instruction", "input", "output")} | {"score": -i / 10}
        for i, r in enumerate(sample_rows[:30])
    ]
    (tmp_path / "XX.json").write_text(json.dumps(rows))
    clustered, selected = str(tmp_path / "clustering_result.json"), str(tmp_path / "CaR_selected_result.json")
    run = CliRunner().invoke
    options = ["--embedder", tiny_embedder, "--template", "paper", "--n-init", "10"]
    done = run(app, ["cluster", str(tmp_path / "XX.json"), "--output", clustered, *options])
    assert done.exit_code == 0, done.output
    found = json.loads(Path(clustered).read_text())
    assert [{k: v for k, v in row.items() if k != "label"} for row in found] == rows
    assert {row["label"] for row in found} == {"0", "1", "2"}  # int(sqrt(30 / 2))
    done = run(app, ["select", clustered, "--output", selected, "--n1", "5", "--n2", "1", "--procedure", "paper"])
    assert done.exit_code == 0, done.output
    chosen = json.loads(Path(selected).read_text())
    assert chosen[:5] == found[:5]
    assert {row["label"] for row in chosen} == {"0", "1", "2"}


@pytest.mark.parametrize("changes", [{"budget": 5}, {"n1": 0.5}, {"n1": -1}, {"n2": -1}])
def test_numbers_that_the_published_procedure_does_not_take(changes: dict[str, Any], pairs: Dataset) -> None:
    with pytest.raises(ValueError, match="procedure='paper' takes integers"):
        curate(pairs, procedure="paper", **changes)


def test_an_unknown_procedure_is_named(pairs: Dataset) -> None:
    with pytest.raises(ValueError, match="procedure='papre'"):
        curate(pairs, procedure="papre", n1=1)


def test_rows_equal_by_what_the_files_hold_are_equal() -> None:
    """Ignore the distance to the centre, which may differ in its last bit: the original's files do not have it."""
    rows = {"output": ["o", "o", "p"], "iqs_score": [1.0, 1.0, 0.5], "cluster": [0, 0, 1]}
    distances = {"cluster_distance": np.array([0.5, 0.50000006, 0.1], dtype=np.float32)}
    assert outputs(select_as_published(Dataset.from_dict(rows | distances), n1=1, n2=2)) == ["o", "p"]


def test_equality_counts_a_users_own_column_embedding_and_not_ours_of_another_name() -> None:
    """Compare a column `embedding` of the source, which the files hold if ours has another name."""
    rows: dict[str, Any] = {"output": ["o", "o", "p"], "iqs_score": [1.0, 1.0, 0.5], "cluster": [0, 0, 1]}
    pool = Dataset.from_dict(rows | {"embedding": ["a", "b", "c"], "vectors": [[0.0], [0.0], [1.0]]})
    chosen = select_as_published(pool, n1=1, n2=2, embedding_column="vectors")
    assert chosen["embedding"][:] == ["a", "c", "b"]  # clusters in descending order of their label
    pool = Dataset.from_dict(rows | {"vectors": [[0.0], [0.1], [1.0]]})
    assert outputs(select_as_published(pool, n1=1, n2=2, embedding_column="vectors")) == ["o", "p"]
    by_procedure = PROCEDURES["paper"].select(pool, Amounts(1, 2), ColumnNames(embedding="vectors"))
    assert outputs(by_procedure) == ["o", "p"]


def test_a_run_that_fails_at_a_table_of_the_procedure_leaves_no_report(
    tiny_iqs: str, tiny_embedder: str, pairs: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hold that the reports are written last, so that a folder which has them is complete."""

    def fail(dataset: Dataset, path: str, *args: Any, **kwargs: Any) -> None:
        if "clustering_result" in str(path):
            raise OSError("the disk is full")
        write_original(dataset, path, *args, **kwargs)

    monkeypatch.setattr("car_datasets.results.write_original", fail)
    rows = pairs.filter(lambda row: row["output"] != "")
    models = {"scorer": tiny_iqs, "embedder": tiny_embedder}
    with pytest.raises(OSError, match="the disk is full"):
        curate(rows, tmp_path / "out", procedure="paper", n1=1, k=2, **models)
    assert (tmp_path / "out" / "ranking_IQS_result.json").is_file()
    assert not (tmp_path / "out" / "report.json").exists() and not (tmp_path / "out" / "report.md").exists()


def test_a_label_that_is_no_cluster_is_not_lost(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"output": ["a"], "label": ["²"], "iqs_score": [1.0], "cluster": [0]})
    assert from_original(rows)["label"][:] == ["²"]
    with pytest.raises(ValueError, match=r"column\(s\) \['label'\] of their own"):
        write_original(rows, tmp_path / "out.json", ColumnNames())
    write_original(rows, tmp_path / "out.json", ColumnNames(), where_free=True)
    written = [{"output": "a", "label": "²", "score": 1.0, "cluster": 0}]
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8")) == written


def test_a_score_of_the_users_stays_and_is_refused_before_scoring_where_the_format_wants_ours(
    tiny_iqs: str, tiny_embedder: str, pairs: Dataset, tmp_path: Path
) -> None:
    rows = pairs.filter(lambda row: row["output"] != "").add_column("score", [7, 8, 9, 10, 11])
    settings = {"scorer": tiny_iqs, "embedder": tiny_embedder, "n1": 1, "k": 2, "allow_worse": True}
    with pytest.raises(ValueError, match=r"column\(s\) \['score'\] of their own"):
        curate(rows, tmp_path / "paper", **settings, procedure="paper")
    assert not (tmp_path / "paper").exists()
    selected, _, _ = curate(rows, tmp_path / "out", **settings)
    written = json.loads((tmp_path / "out" / "selected.json").read_text(encoding="utf-8"))
    assert [row["score"] for row in written] == selected["score"][:]
    assert [row["iqs_score"] for row in written] == pytest.approx(selected["iqs_score"][:])
    assert [row["label"] for row in written] == [str(cluster) for cluster in selected["cluster"][:]]


@pytest.mark.shared
def test_the_paper_procedure_overwrites_nothing_and_names_its_ranking(oracle: Path, tmp_path: Path) -> None:
    rows = Dataset.from_list(json.loads((oracle / "e2e" / "input.json").read_text())[:40])
    models = {"scorer": str(oracle / "instruction_comet"), "embedder": str(oracle / "e2e" / "sentence_bert")}
    curate(rows, tmp_path / "out", procedure="paper", n1=5, **models)
    assert (tmp_path / "out" / "ranking_Comet_result.json").is_file()
    assert not (tmp_path / "out" / "ranking_IQS_result.json").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "ranking_IQS_result.json").write_text("precious")
    with pytest.raises(ValueError, match="already holds a result"):
        curate(rows, tmp_path / "mine", procedure="paper", n1=5, **models)
    assert (tmp_path / "mine" / "ranking_IQS_result.json").read_text() == "precious"


def test_a_row_number_of_the_users_own_stays(tmp_path: Path, tiny_iqs: str, tiny_embedder: str) -> None:
    words = ("sea", "list", "poem", "colours")
    rows = [{"instruction": "write", "output": word, "source_index": 100 + i} for i, word in enumerate(words)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    ranking = str(tmp_path / "ranking.json")
    done = CliRunner().invoke(app, ["score", str(tmp_path / "rows.json"), "-o", ranking, "--scorer", tiny_iqs])
    assert done.exit_code == 0, done.output
    assert sorted(row["source_index"] for row in json.loads(Path(ranking).read_text())) == [100, 101, 102, 103]
    models = {"scorer": tiny_iqs, "embedder": tiny_embedder}
    curate(tmp_path / "rows.json", tmp_path / "out", procedure="paper", n1=2, k=2, **models)
    chosen = json.loads((tmp_path / "out" / "CaR_selected_result.json").read_text())
    assert all(row["output"] == words[row["source_index"] - 100] for row in chosen)


@pytest.mark.parametrize("score", ["iqs_score", "quality"])
def test_no_column_of_ours_is_in_the_originals_files(score: str, tmp_path: Path) -> None:
    """Run with `--uncertainty`, whose `iqs_score_std` was once in them."""
    names = ColumnNames(score=score)
    ours = (*names.diagnostics, names.index, names.embedding, "selected_by", "score_rank", "cluster_rank")
    assert f"{score}_std" in ours
    pool = Dataset.from_dict({"output": ["a"], score: [1.0], "cluster": [3]} | {column: [0] for column in ours})
    assert original_columns(pool, names).column_names == ["output", score, "cluster"]
    write_table(pool, tmp_path / "out.json", names)
    assert json.loads((tmp_path / "out.json").read_text()) == [{"output": "a", "score": 1.0, "label": "3"}]
