"""folder.py: a run is bound to every field and every weight that changes a number, and to nothing else."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import Dataset

from car_datasets import QualityScorer, TextEmbedder, score_in_shards
from car_datasets.scoring.shards.folder import describe_run, differences, read_part, run_id
from car_datasets.scoring.shards.storage import check_shards


@pytest.mark.parametrize(
    "other",
    [
        {"dtype": "bfloat16"},
        {"template": "paper"},
        {"turns": "min"},
        {"output_column": "x"},
        {"uncertainty": False},
        {"on_invalid": "mark"},
        {"diagnostics": True},
        {"columns": {"instruction": "output", "response": "output"}},
    ],
)
def test_fields_that_change_columns_are_named(make_tiny_iqs: Any, pairs: Dataset, other: dict[str, Any]) -> None:
    folder = make_tiny_iqs()
    one = describe_run(pairs, QualityScorer(folder), ["output"], 4)
    two = describe_run(pairs, QualityScorer(folder, **other), ["output"], 4)
    assert (one == two) == (other == {"uncertainty": False})
    if one != two:
        assert next(iter(other)) in differences(one, two)
        assert run_id(one) != run_id(two)


def test_the_weights_count_and_where_they_lie_does_not(make_tiny_iqs: Any, tiny_embedder: str, pairs: Dataset) -> None:
    def run(stage: Any, rows: int = 4) -> str:
        return run_id(describe_run(pairs, stage, ["output"], rows))

    one, same, other = make_tiny_iqs(seed=3), make_tiny_iqs(seed=3), make_tiny_iqs(seed=4)
    assert one != same
    assert run(QualityScorer(one)) == run(QualityScorer(same)) == run(QualityScorer(one, batch_tokens=77))
    assert len({run(QualityScorer(one)), run(QualityScorer(other)), run(TextEmbedder(tiny_embedder))}) == 3
    assert run(QualityScorer(one)) != run(QualityScorer(one), rows=5)


@pytest.mark.parametrize("content", [b"[]", b"null", b"5", b"", b"\xff", b"[" * 100_000])
def test_a_damaged_manifest_is_named_in_one_line(content: bytes, tiny_iqs: str, pairs: Dataset, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"shard_dir=.*manifest\.json is damaged\. Pass another folder"):
        score_in_shards(pairs, QualityScorer(tiny_iqs, on_invalid="mark"), shard_dir=tmp_path)


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {},
        {b"huggingface": b"{"},
        {b"huggingface": b"[]"},
        {b"huggingface": b"[" * 100_000},
        {b"huggingface": b"7"},
    ],
)
def test_a_part_whose_metadata_nobody_wrote_is_no_part(metadata: dict[bytes, bytes] | None, tmp_path: Path) -> None:
    table = pa.table({"iqs_score": [1.0]}).replace_schema_metadata(metadata)
    with pa.OSFile(str(tmp_path / "part.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    read = read_part(tmp_path / "part.arrow")
    # Without a fingerprint it is a part of no run; with broken metadata, a message says so.
    assert isinstance(read, str) or read[1] == "None"


def test_a_place_is_probed_without_a_folder_being_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of a launcher that start together probe one new place, so none may make or remove a part of it."""
    made: list[object] = []
    with monkeypatch.context() as patch:
        patch.setattr("os.mkdir", lambda path, *_, **__: made.append(path))
        check_shards(tmp_path / "new" / "shards")
    assert made == [] and list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="nothing can be written there"):
        check_shards(tmp_path / "file" / "shards")
