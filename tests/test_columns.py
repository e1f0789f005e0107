"""New columns beside the old: as `.map` gives them, in fixed-size lists, with the old ones untouched."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, load_dataset

from car_datasets import QualityScorer, TextEmbedder
from car_datasets.columns import add_columns


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
