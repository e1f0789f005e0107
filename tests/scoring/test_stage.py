"""stage.py: new columns are as `.map` gives them, in fixed-size lists, and the old ones are untouched."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, Features, Value, load_dataset

from car_datasets import QualityScorer, TextEmbedder
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
    assert "rows/s on cpu, timed on 6 rows" in str(estimate)
    with pytest.raises(ValueError, match=r"already has the column\(s\) \['characters'\].*output columns to"):
        add_columns(pairs.add_column("characters", [1] * 6), stage, "Counting")


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
