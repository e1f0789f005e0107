"""stage.py: new columns are as `.map` gives them, in fixed-size lists, and the old ones are untouched."""

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict, Features, Value, load_dataset

from car_datasets import (
    ClusterModel,
    QualityScorer,
    Recipe,
    TextEmbedder,
    cluster_filter,
    combine_scores,
    score_in_shards,
    select_car,
    stages,
)
from car_datasets.scoring import stage as stage_module
from car_datasets.scoring.engines import OnRay, estimate_scoring
from car_datasets.scoring.stage import Stage, add_columns, read_columns


@dataclass(frozen=True)
class Lengths:
    """The least that makes a stage: no schema, no model, no method of its own that names columns."""

    column: str = "output"

    @property
    def output_columns(self) -> tuple[str, ...]:
        return ("characters",)

    def output_features(self) -> Features:
        return Features({"characters": Value("int32")})

    def __call__(self, batch: Mapping[str, Any], rank: int | None = None) -> dict[str, Any]:
        return {"characters": [len(text) for text in batch[self.column]]}


@dataclass(frozen=True)
class Choosy(Lengths):
    """A stage that names the columns which it reads."""

    def read_columns(self, column_names: list[str]) -> list[str]:
        return [self.column]


@pytest.mark.parametrize("stage", [Lengths(), Choosy()])
def test_any_stage_adds_its_columns(stage: Lengths, pairs: Dataset) -> None:
    assert isinstance(stage, Stage)
    expected = [len(text) for text in pairs["output"]]
    assert add_columns(pairs, stage, "Counting")["characters"][:] == expected
    table = OnRay(stage)(pairs.with_format("arrow")[:])
    assert table.column("characters").to_pylist() == expected
    assert table.column_names == [*pairs.column_names, "characters"]
    estimate = estimate_scoring(pairs, stage)
    assert (estimate.rows, estimate.sample, estimate.tokens, estimate.waste) == (6, 6, None, None)
    assert f"rows/s on {estimate.device}, timed on 6 rows" in str(estimate)
    with pytest.raises(ValueError, match=r"already has the column\(s\) \['characters'\].*output columns to"):
        add_columns(pairs.add_column("characters", [1] * 6), stage, "Counting")


def test_the_scorer_of_the_guide_is_complete(pairs: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scorer of one's own is one file, which others of our functions take as it is."""
    text = (Path(__file__).parents[2] / "docs" / "how-to" / "own-scorer.md").read_text(encoding="utf-8")
    [code] = [part.split("```")[0] for part in text.split("```python\n")[1:] if "class LengthScorer" in part]
    (tmp_path / "my_scorer.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    scorer = importlib.import_module("my_scorer").LengthScorer(enough=5)
    found = score_in_shards(pairs, scorer, tmp_path / "shards")
    assert found["length_score"][:] == pytest.approx([0.8, 1.0, 0.2, 0.0, 0.2, 0.6])
    assert found["length_status"][3] == "empty_response"
    assert scorer({"messages": [None]}) == {"length_score": [None], "length_status": ["null"]}
    combined = combine_scores(found, {"length_score": 1}, output_column="twice")
    assert (
        select_car(combined.add_column("cluster", [0] * 6), 1, 0, score_column="twice")["output"]
        == pairs["output"][1:2]
    )


def test_a_stage_is_given_the_columns_that_it_names(tiny_iqs: str, tiny_embedder: str) -> None:
    names = ["instruction", "input", "output", "source_index", "label"]
    assert read_columns(names, Lengths()) == names
    assert read_columns(names, Choosy()) == ["output", "source_index"]
    assert read_columns(names, Choosy(), with_index=False) == ["output"]
    for stage in (QualityScorer(tiny_iqs), TextEmbedder(tiny_embedder)):
        assert isinstance(stage, Stage)
        assert sorted(read_columns(names, stage, with_index=False)) == ["input", "instruction", "output"]
        assert list(stage.output_columns) == list(stage.output_features())


def test_as_map_gives_them_in_fixed_size_lists(tiny_embedder: str, pairs: Dataset) -> None:
    stage = TextEmbedder(tiny_embedder)
    found, mapped = add_columns(pairs, stage, "Embedding"), pairs.map(stage, batched=True)
    assert found.column_names == mapped.column_names
    assert found.data.column("embedding").type == pa.list_(pa.float32(), 32)
    assert found.to_dict() == mapped.to_dict()


def test_half_precision_takes_half_the_room_and_survives_parquet(
    tiny_embedder: str, pairs: Dataset, tmp_path: Path
) -> None:
    whole = add_columns(pairs, TextEmbedder(tiny_embedder), "Embedding")
    half = add_columns(pairs, TextEmbedder(tiny_embedder, embedding_dtype="float16"), "Embedding")
    assert half.data.column("embedding").type == pa.list_(pa.float16(), 32)
    half.to_parquet(tmp_path / "half.parquet")
    read = load_dataset("parquet", data_files=str(tmp_path / "half.parquet"), cache_dir=str(tmp_path))["train"]
    assert read.features == half.features
    assert np.allclose(read["embedding"][:], whole["embedding"][:], atol=1e-3)
    with pytest.raises(ValueError, match="embedding_dtype='int8'"):
        TextEmbedder(tiny_embedder, embedding_dtype="int8")


def test_other_columns_are_not_read(tiny_iqs: str, pairs: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[str]] = []
    ordinary = QualityScorer.__call__

    def watched(self: QualityScorer, batch: Any, rank: int | None = None) -> Any:
        seen.append(set(batch))
        return ordinary(self, batch, rank)

    monkeypatch.setattr(QualityScorer, "__call__", watched)
    wide = pairs.add_column("vector", [[0.5] * 100] * 6).add_column("source_index", list(range(10, 16)))
    found = add_columns(wide, QualityScorer(tiny_iqs), "Scoring")
    assert seen == [{"instruction", "input", "output", "source_index"}]
    assert found["vector"][:] == wide["vector"][:]


def test_rows_without_a_text_get_nulls_of_the_same_type(tiny_iqs: str, pairs: Dataset) -> None:
    rows = Dataset.from_list([{**row, "output": None} for row in pairs])
    found = add_columns(rows, QualityScorer(tiny_iqs, on_invalid="mark"), "Scoring")
    assert found["iqs_score"][:] == [None] * 6
    assert found.data.column("iqs_score").type == pa.float32()


def test_the_second_time_is_read_from_the_cache(
    tiny_iqs: str, pairs: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs.to_parquet(tmp_path / "rows.parquet")

    def score() -> Dataset:
        rows = load_dataset("parquet", data_files=str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path))["train"]
        return add_columns(rows, QualityScorer(tiny_iqs), "Scoring")

    first = score()
    monkeypatch.setattr(QualityScorer, "__call__", None)
    assert score().to_dict() == first.to_dict()


def test_a_taken_name_is_refused_before_the_model_runs(tiny_iqs: str, pairs: Dataset) -> None:
    with pytest.raises(ValueError, match="iqs_score"):
        add_columns(pairs.add_column("iqs_score", [1.0] * 6), QualityScorer(tiny_iqs), "Scoring")


# --- progress


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[], list[str]]:
    """Switch progress on, with a line after every forward pass, and return what reads the lines since the last call."""
    monkeypatch.setattr(stage_module, "_bars_are_off", lambda: False)
    monkeypatch.setattr(stage_module, "FIRST_ESTIMATE", 0.0)
    monkeypatch.setattr(stage_module, "LINE_EVERY", 0.0)
    return lambda: [line for line in capsys.readouterr().err.splitlines() if line.startswith(("Scoring", "\rScoring"))]


@pytest.mark.parametrize("chats", [False, True], ids=["pairs", "chats"])
@pytest.mark.parametrize("in_shards", [False, True], ids=["map", "shards"])
def test_progress_is_told_after_every_forward_pass(
    in_shards: bool, chats: bool, tiny_iqs: str, pairs: Dataset, tmp_path: Path, told: Callable[[], list[str]]
) -> None:
    scorer = QualityScorer(tiny_iqs, batch_tokens=1)  # every text is a batch
    if chats:
        turns = [{"role": role, "content": "sea"} for role in ("user", "assistant")]
        pairs = Dataset.from_dict({"messages": [turns * (1 + i % 3) for i in range(6)]})
    pairs.to_parquet(tmp_path / "rows.parquet")  # `datasets` keeps no cache for rows in memory
    pairs = load_dataset("parquet", data_files=str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path))["train"]

    def run() -> Dataset:
        return score_in_shards(pairs, scorer, tmp_path / "s") if in_shards else add_columns(pairs, scorer, "Scoring")

    first = run()
    lines = told()
    assert len(lines) == (12 if chats else 6) - 1  # from the second pass on, which gives a speed
    assert all(
        re.fullmatch(r"Scoring: \d of 6 rows, [\d,.]+ rows/s(, about \d+ seconds left)?\.", line) for line in lines
    )
    done = [int(line.split()[1]) for line in lines]
    assert done == sorted(done)
    assert done[-1] == 6
    assert run().to_dict() == first.to_dict()
    [line] = told()
    assert re.search("6 rows are finished already" if in_shards else "6 rows were computed before.*the cache", line)


def test_a_terminal_gets_a_bar_and_a_quiet_run_nothing(
    tiny_iqs: str, pairs: Dataset, told: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_module, "_can_draw", lambda: True)
    add_columns(pairs, QualityScorer(tiny_iqs, batch_tokens=1), "Scoring")
    assert any("Scoring: 100%" in line and "6/6" in line for line in told())
    monkeypatch.setattr(stage_module, "_bars_are_off", lambda: True)
    add_columns(pairs, QualityScorer(tiny_iqs, batch_tokens=2), "Scoring")
    assert told() == []


def test_a_run_says_how_many_rows_it_scores_with_which_model(
    tiny_iqs: str, pairs: Dataset, told: Callable[[], list[str]]
) -> None:
    stages.resolve(Recipe(scorer=tiny_iqs), embed=False).score(pairs)
    assert told()[0].startswith(f"Scoring 6 rows with {tiny_iqs};")


# --- called in a wrong way


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda stage, rows: stage("Say hi", "Hi"), "called with a str.*batch of columns, such as"),
        (lambda stage, rows: stage(rows.to_list()), "called with a list.*batch of columns, such as"),
        (lambda stage, rows: stage(rows), r"called with a Dataset.*Pass the stage to the dataset: dataset\.map\("),
        (
            lambda stage, rows: stage(rows.to_iterable_dataset()),
            r"called with a IterableDataset.*to the dataset: dataset\.map\(",
        ),
        (lambda stage, rows: stage(rows[0]), "This is a row, not a batch of rows"),
        (lambda stage, rows: stage({"messages": [{"role": "user", "content": "a"}]}), "This is a row, not a batch"),
        (lambda stage, rows: rows.map(stage), "This is a row, not a batch of rows"),
        (lambda stage, rows: rows.map(stage, batched=True, input_columns=["output"]), "leave out input_columns"),
        (lambda stage, rows: rows.with_format("arrow").map(stage, batched=True), "Arrow, pandas or polars format"),
    ],
    ids=["texts", "list", "dataset", "stream", "row", "chat", "rows", "input_columns", "arrow"],
)
def test_a_wrong_call_is_told_its_own_mistake(
    wrong: Callable[[Any, Dataset], Any], message: str, tiny_iqs: str, tiny_embedder: str, pairs: Dataset
) -> None:
    vectors = pairs.add_column("embedding", [[float(i), 1.0] for i in range(6)])
    for stage in (QualityScorer(tiny_iqs), TextEmbedder(tiny_embedder), ClusterModel.fit(vectors, k=2)):
        rows = vectors if isinstance(stage, ClusterModel) else pairs
        with pytest.raises(ValueError, match=message):
            wrong(stage, rows)


def test_a_dataset_or_one_text_in_a_wrong_place_is_named(tiny_iqs: str, tiny_embedder: str, pairs: Dataset) -> None:
    for stage in (QualityScorer, TextEmbedder):
        with pytest.raises(ValueError, match=r"model_id is a Dataset, .*dataset\.map\(QualityScorer\(\)"):
            stage(pairs)
    for method in (QualityScorer(tiny_iqs).score_texts, TextEmbedder(tiny_embedder).embed_texts):
        with pytest.raises(ValueError, match=r"texts is one text; pass a list of texts: \[text\]"):
            method("Say hi")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda rows: ClusterModel.fit(rows.to_iterable_dataset()), r"a stream.*ClusterModel\.fit\(Dataset\.from_list"),
        (lambda rows: ClusterModel.fit({"embedding": rows["embedding"][:]}), "this is a dict. Pass a Dataset"),
        (lambda rows: cluster_filter(rows.to_iterable_dataset()), "a stream.*select_car_streaming"),
        (lambda rows: cluster_filter(DatasetDict(train=rows)), "is a DatasetDict. Pass one of its splits"),
        (lambda rows: rows.filter(cluster_filter), r"saw a single row.*dataset\.filter\(cluster_filter, batched=True"),
    ],
    ids=["fit a stream", "fit a dict", "filter a stream", "filter splits", "filter row by row"],
)
def test_what_cannot_be_clustered_is_told_the_call_that_works(wrong: Callable[[Dataset], Any], message: str) -> None:
    rows = Dataset.from_dict({"embedding": [[float(i), 1.0] for i in range(6)], "iqs_score": [0.5] * 6})
    with pytest.raises(ValueError, match=message):
        wrong(rows)
