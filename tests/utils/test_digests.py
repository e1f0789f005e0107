"""digests.py: equal contents have one digest however they are stored, and every value, name and row order counts."""

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, LargeList, List, Value, concatenate_datasets, load_dataset

from car_datasets.utils import digests
from car_datasets.utils.digests import column_digests, content_digest, file_digest

ROWS = {
    "text": ["a", "", None, "ü", "long " * 9, "f"],
    "turns": [[{"role": "u", "content": "x"}], [], None, [{"role": "a", "content": None}, {"role": "b", "content": ""}]]
    + [[{"role": "u", "content": "y"}]] * 2,
}


@pytest.fixture
def rows() -> Dataset:
    return Dataset.from_dict(ROWS)


def test_storage_does_not_count(rows: Dataset, tmp_path: Path) -> None:
    digest = content_digest(rows, list(ROWS))
    rows.to_parquet(tmp_path / "rows.parquet")
    loaded = load_dataset("parquet", data_files=str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path))["train"]
    turn = {"role": Value("large_string"), "content": Value("string")}
    large = Features({"text": Value("large_string"), "turns": LargeList(turn)})
    chunks = concatenate_datasets([rows.select(range(2)), rows.select(range(2, 5)), rows.select([5])])
    shuffled = rows.select([5, 4, 3, 2, 1, 0]).select([5, 4, 3, 2, 1, 0])
    table = pa.table(rows.data.table)
    sliced = Dataset(pa.concat_tables([table.slice(3), table]).slice(3))
    wider = rows.add_column("more", [1] * 6).with_format("numpy")
    for same in (loaded, rows.cast(large), chunks, shuffled, sliced, wider):
        assert content_digest(same, list(ROWS)) == digest
    assert loaded._fingerprint != rows._fingerprint  # which is why shards are not bound to it


@pytest.mark.parametrize(
    "change",
    [
        {"text": ["", "a", *ROWS["text"][2:]]},
        {"text": [None, *ROWS["text"][1:]]},
        {"text": ["a", None, "", *ROWS["text"][3:]]},
        {"text": ["au", "", None, "̈", *ROWS["text"][4:]]},
        {"turns": [[], *ROWS["turns"][1:]]},
        {"turns": [None, [], *ROWS["turns"][2:]]},
        {
            "turns": [
                *ROWS["turns"][:3],
                [{"role": "a", "content": ""}, {"role": "b", "content": None}],
                *ROWS["turns"][4:],
            ]
        },
    ],
)
def test_every_value_counts(rows: Dataset, change: dict[str, Any]) -> None:
    other = Dataset.from_dict({**ROWS, **change}, features=rows.features)
    assert content_digest(other, list(ROWS)) != content_digest(rows, list(ROWS))


def test_order_names_and_boundaries_count() -> None:
    one = Dataset.from_dict({"a": ["x", "y"], "b": ["y", "x"]})
    seen = {
        content_digest(one, ["a", "b"]),
        content_digest(one, ["b", "a"]),
        content_digest(one.select([1, 0]), ["a", "b"]),
        content_digest(one, ["a"]),
        content_digest(one.rename_column("a", "c"), ["c"]),
        content_digest(Dataset.from_dict({"a": ["xy", ""]}), ["a"]),
        content_digest(Dataset.from_dict({"a": [1, 2]}), ["a"]),
        content_digest(Dataset.from_dict({"a": [2, 1]}), ["a"]),
    }
    assert len(seen) == 8


def test_fixed_size_lists_and_windows() -> None:
    features = Features({"v": List(Value("float32"), length=2)})
    many = [[float(i), 1.0] for i in range(20_000)]
    one = Dataset.from_dict({"v": many}, features=features)
    many[19_999][1] = 2.0
    other = Dataset.from_dict({"v": many}, features=features)
    assert content_digest(one, ["v"]) != content_digest(other, ["v"])


def test_digests_of_columns_are_of_their_values_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(digests, "BLOCK", 4)
    values = {
        "i": [1, None, 3, 4, 5, 6],
        "f": [0.5, float("nan"), None, 1.0, 2.0, 3.0],
        "b": [b"a", b"", None, b"bc", b"d", b"e"],
    }
    vectors = {"v": [[0.5, 1.0]] * 5 + [None], "n": [None] * 6}
    rows = Dataset.from_dict({**ROWS, **values, **vectors})
    wanted = column_digests(rows.with_format("arrow").iter(6))
    rows.to_parquet(tmp_path / "rows.parquet", batch_size=3)
    narrow = {"i": Value("int32"), "f": Value("float32"), "v": List(Value("float16")), "text": Value("large_string")}
    cast = rows.cast(Features({**rows.features, **narrow, "n": Value("string")}))
    for same in (
        rows.with_format("arrow").iter(1),
        rows.select([1, 0, 2, 3, 4, 5]).select([1, 0, 2, 3, 4, 5]).with_format("arrow").iter(5),
        cast.with_format("arrow").iter(5),
        pq.ParquetFile(tmp_path / "rows.parquet").iter_batches(2),
    ):
        assert column_digests(same) == wanted
    assert len({*wanted.values()}) == len(wanted)
    for name, change in {
        "i": [1, 3, None, 4, 5, 6],
        "f": [0.5, None, float("nan"), 1.0, 2.0, 3.0],
        "b": [b"", b"a", None, b"b", b"cd", b"e"],
        "v": [[0.5], [1.0, 0.5]] + [[0.5, 1.0]] * 3 + [None],
    }.items():
        other = Dataset.from_dict({name: change}).with_format("arrow").iter(6)
        assert column_digests(other)[name] != wanted[name]


def test_a_digest_is_not_remembered_for_a_file_that_was_just_replaced_by_an_old_one(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    for content in (b"red", b"tan"):
        path.write_bytes(content)
        os.utime(path, (1e9, 1e9))
        assert file_digest(path) == digests._sha256(path)
