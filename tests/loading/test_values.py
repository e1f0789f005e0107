"""values.py: Python values get exact types, and images and audio are carried as bytes and paths."""

from __future__ import annotations

import datetime
import decimal
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Audio, Dataset, DatasetDict, Features, Image, List, Value

from car_datasets import QualityScorer, curate, score_in_shards, select_car_streaming
from car_datasets.loading.sources import open_dataset
from car_datasets.loading.values import as_written, carried, dataset_from_pandas, dataset_from_rows
from car_datasets.receipt import Receipt
from car_datasets.scoring.engines import estimate_scoring
from car_datasets.selection.published import write_original
from car_datasets.utils.column_names import ColumnNames
from car_datasets.utils.columns import join_columns


def test_python_rows_come_back_equal() -> None:
    rows = [
        {"output": "42", "n": np.int64(7), "side": ("a", 1), "when": datetime.datetime(2024, 1, 2, 3, 4, 5, 6)},
        {"output": 42, "n": np.float32(0.1), "side": {"k": np.array([1, 2])}, "raw": b"\xff", "cost": decimal.Decimal("1.10")},
    ]  # fmt: skip
    assert list(dataset_from_rows(rows)) == [
        {"output": "42", "n": 7, "side": ["a", 1], "when": rows[0]["when"], "raw": None, "cost": None},
        {"output": 42, "n": float(np.float32(0.1)), "side": {"k": [1, 2]}, "when": None, "raw": b"\xff",
         "cost": decimal.Decimal("1.10")},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"a": 1}, 3], r"1 rows that are no mappings \(the first are \[1\]\)"),
        ([{"a": 1}, {"a": {1: 2}}], r"row 1: an object has keys that are no text"),
        ([{"a": b"x"}, {"a": "x"}], "The column 'a' holds values that Arrow cannot give back"),
        ([{"a": object()}], "The column 'a' holds values that Arrow cannot give back"),
    ],
)
def test_rows_that_would_be_changed_are_refused(rows: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataset_from_rows(rows)


def test_a_data_frame_comes_back_equal() -> None:
    columns = {
        "instruction": ["a", None],
        "output": ["42", 42],
        "n": [1.5, np.nan],
        "whole": [3, 2**62],
        "yes": [True, False],
    }
    frame = pd.DataFrame({**columns, "output": pd.Series(columns["output"], dtype=object)})
    found = dataset_from_pandas(frame)
    assert found[:] == columns | {"n": [1.5, None]}
    assert dataset_from_pandas(frame.set_index("whole"))["whole"][:] == columns["whole"]
    with pytest.raises(ValueError, match="rename them, so that each has a text of its own"):
        dataset_from_pandas(pd.DataFrame({0: ["a"]}))


def test_a_json_feature_of_datasets_is_read_exactly() -> None:
    stored = pa.ExtensionArray.from_storage(pa.json_(), pa.array(["1.0000000000000002e+16", str(2**70), '"42"', None]))
    given = Dataset(pa.table({"j": stored}), datasets.DatasetInfo(features=Features(j=datasets.Json())))
    shuffled = given.select([2, 1, 0, 3]).with_format("numpy", columns=["j"])
    written = as_written(shuffled)
    assert written.format == shuffled.format
    assert written.with_format(None)["j"][:] == ["42", 2**70, 1.0000000000000002e16, None]
    assert as_written(written) is written
    assert len(datasets.concatenate_datasets([given, written.with_format(None)])) == 8


PIXEL = {"bytes": b"no picture at all: decoding it would fail", "path": None}
SOUND = {"bytes": b"no sound either", "path": "a.wav"}


@pytest.fixture
def media() -> Dataset:
    """Return rows with an image, audio, and images inside of chats, none of which can be decoded."""
    words = ("sea", "list", "poem", "colours")
    turn = {"role": "assistant", "content": "It is blue.", "image": PIXEL}
    rows = [
        {"messages": [{"role": "user", "content": f"What of the {word}?", "image": None}, turn], "picture": PIXEL,
         "sound": SOUND, "raw": PIXEL}
        for word in words
    ]  # fmt: skip
    chat = List({"role": Value("string"), "content": Value("string"), "image": Image()})
    features = Features(messages=chat, picture=Image(), sound=Audio(), raw=Image(decode=False))
    table = pa.Table.from_pylist(rows, schema=pa.schema(features.arrow_schema))
    return Dataset(table, datasets.DatasetInfo(features=features))


def test_no_stage_decodes_media_and_every_one_keeps_them(
    media: Dataset, tiny_iqs: str, tiny_embedder: str, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"scorer": tiny_iqs, "embedder": tiny_embedder, "n1": 2, "k": 2, "allow_worse": True}
    selected, scored, _ = curate(media, tmp_path / "out", **settings)
    assert Receipt.read(tmp_path / "out").source["kind"] == "memory"
    scorer = QualityScorer(tiny_iqs)
    assert estimate_scoring(media, scorer, sample=2).sample == 2
    mapped = media.map(scorer, batched=True)
    sharded = score_in_shards(media, scorer, tmp_path / "shards")
    streamed = score_in_shards(media.to_iterable_dataset(), scorer, tmp_path / "streamed")
    stream = mapped.add_column("cluster", [0, 0, 1, 1]).to_iterable_dataset()
    chosen = select_car_streaming(stream, n1=2, n2=1, allow_worse=True)
    stored = Dataset.from_parquet(str(tmp_path / "out" / "scored.parquet"))
    for result in (selected, scored, mapped, sharded, streamed, chosen, stored):
        assert {name: result.features[name] for name in media.features} == media.features
        for row in carried(result):
            assert (row["picture"], row["sound"], row["raw"]) == (PIXEL, SOUND, PIXEL)
            assert [turn["image"] for turn in row["messages"]] == [None, PIXEL]


def test_images_whose_files_are_gone_are_refused_before_scoring(tmp_path: Path) -> None:
    (tmp_path / "here.png").write_bytes(b"no picture")
    rows = Dataset.from_dict({"instruction": ["a", "b"], "output": ["c", "d"]})
    for column, feature in ((["here.png", "gone.png"], Image()), ([[None], ["here.png", "gone.png"]], List(Image()))):
        paths = [
            [f and str(tmp_path / f) for f in row] if isinstance(row, list) else str(tmp_path / row) for row in column
        ]
        media = Dataset.from_dict({"picture": paths}, features=Features(picture=feature))
        with pytest.raises(ValueError, match=r"The column 'picture' names 1 files that are not there, .*gone\.png"):
            curate(join_columns(rows, media), tmp_path / "out", scorer="no/scorer", n1=1)


def test_what_json_does_not_have_is_written_as_text(media: Dataset, tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "raw": b"\x00\xff", "day": datetime.date(2024, 1, 2), "at": datetime.datetime(2024, 1, 2, 3, 4, 5, 6),
        "clock": datetime.time(1, 2, 3), "took": datetime.timedelta(seconds=1.5), "cost": decimal.Decimal("1.10"),
    }  # fmt: skip
    write_original(Dataset.from_list([values]), tmp_path / "out.json", ColumnNames())
    assert json.loads((tmp_path / "out.json").read_text()) == [
        {"raw": "AP8=", "day": "2024-01-02", "at": "2024-01-02T03:04:05.000006", "clock": "01:02:03",
         "took": "P0DT0H0M1.5S", "cost": "1.10"}
    ]  # fmt: skip
    write_original(media, tmp_path / "media.json", ColumnNames())
    written = json.loads((tmp_path / "media.json").read_text())[0]
    assert written["sound"] == {"bytes": "bm8gc291bmQgZWl0aGVy", "path": "a.wav"}
    assert written["messages"][0]["image"] is None


@pytest.mark.skipif(not hasattr(datasets, "Json"), reason="datasets before 5 has no type for JSON")
@pytest.mark.parametrize("feature", [lambda json: json, lambda json: List(json), lambda json: {"key": json}])
def test_json_that_is_nested_deeply_is_refused_in_rows_that_datasets_holds(feature: Any, tmp_path: Path) -> None:
    """In memory, in a saved folder and in Parquet, at each place of a column; rows that were filtered out may have it."""
    features = Features({"instruction": Value("string"), "output": Value("string"), "x": feature(datasets.Json())})
    for value, good in (("[" * 5_000 + "]" * 5_000, False), (json.dumps("[" * 5_000), True)):
        texts = pa.array([value, "1"], pa.string())
        column = pa.ExtensionArray.from_storage(pa.json_(), texts)
        if isinstance(features["x"], List):
            column = pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), column)
        elif isinstance(features["x"], dict):
            column = pa.StructArray.from_arrays([column], ["key"])
        arrays = [pa.array(["a", "b"]), pa.array(["c", "d"]), column]
        rows = Dataset(pa.Table.from_arrays(arrays, schema=features.arrow_schema))
        place = tmp_path / str(good)
        rows.save_to_disk(place / "saved")
        rows.to_parquet(place / "rows.parquet")
        for source in (rows, place / "saved", place / "rows.parquet"):
            if good:
                assert len(open_dataset(source)) == 2
                continue
            with pytest.raises(ValueError, match=r"column 'x' holds JSON that is nested more than 200.* \(row 0\)"):
                open_dataset(source)
        assert len(open_dataset(rows.select([1]))) == 1


def test_rows_that_datasets_holds_may_have_as_many_columns_as_a_file(tmp_path: Path) -> None:
    names = [f"c{i}" for i in range(10_001)]
    wide = Dataset(pa.table({name: [1] for name in names}))
    wide.save_to_disk(tmp_path / "saved")
    pq.write_table(wide.data.table, tmp_path / "rows.parquet")
    for source in (wide, DatasetDict({"train": wide}), tmp_path / "saved", tmp_path / "rows.parquet"):
        with pytest.raises(ValueError, match=r"has 10,001 columns, and at most 10,000 are read"):
            open_dataset(source)
    assert len(open_dataset(wide.remove_columns("c0"))) == 1
