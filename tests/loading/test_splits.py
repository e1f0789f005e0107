"""splits.py: the same expressions for every source, by the rules of `datasets`, and each row by its number in the split."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, load_dataset

from car_datasets import load_instructions
from car_datasets.loading.sources import open_dataset

SIZES = {"train": 150, "test": 30}


def rows(split: str) -> Dataset:
    numbers = range(SIZES[split])
    return Dataset.from_dict({"instruction": ["Say it."] * len(numbers), "output": [f"{split} {i}" for i in numbers]})


def in_memory(folder: Path) -> DatasetDict:
    return DatasetDict({split: rows(split) for split in SIZES})


def saved(folder: Path) -> Path:
    in_memory(folder).save_to_disk(folder / "saved")
    return folder / "saved"


def files(folder: Path) -> Path:
    (folder / "files").mkdir(exist_ok=True)
    for split in SIZES:
        text = "".join(json.dumps(row) + "\n" for row in rows(split))
        (folder / "files" / f"{split}.jsonl").write_text(text)
    return folder / "files"


SOURCES: dict[str, Callable[[Path], Any]] = {"DatasetDict": in_memory, "saved": saved, "folder": files}


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize(
    "split",
    ["test", "train[:2%]", "train[10:20]", "train[-3:]", "test+train", "test[1:3]+train[-2:]", "train[50%:](pct1_dropremainder)"],
)  # fmt: skip
def test_an_expression_reads_what_datasets_reads(kind: str, split: str, tmp_path: Path) -> None:
    source, data_files = SOURCES[kind](tmp_path), {name: str(files(tmp_path) / f"{name}.jsonl") for name in SIZES}
    expected = load_dataset("json", data_files=data_files, split=split, cache_dir=str(tmp_path / "cache"))
    loaded = load_instructions(source, split=split)
    assert loaded["output"][:] == expected["output"][:]
    # The number counts through the splits that the expression names, in its order.
    order = list(dict.fromkeys(part.partition("[")[0] for part in split.split("+")))
    numbers = [f"{name} {i}" for name in order for i in range(SIZES[name])]
    assert [numbers[i] for i in loaded["source_index"][:]] == loaded["output"][:]


def test_a_slice_of_a_file(tmp_path: Path) -> None:
    path = files(tmp_path) / "test.jsonl"  # the only split of a file is called train
    assert load_instructions(path, split="train[10:12]")["source_index"][:] == [10, 11]


@pytest.mark.parametrize("kind", SOURCES)
def test_all_splits_come_with_their_names(kind: str, tmp_path: Path) -> None:
    loaded = load_instructions(SOURCES[kind](tmp_path), split="all")
    assert all(row["output"].startswith(row["split"] + " ") for row in loaded)
    assert {name: loaded["split"][:].count(name) for name in SIZES} == SIZES
    assert loaded["source_index"][:] == list(range(180))


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (None, r"has the splits \['test', 'train'\]; say which.*--split train.*split='all'"),
        ("dev", r"split='dev' is not in the source; it has \['test', 'train'\]"),
        ("train[:5]+dev", "is not in the source"),
        ("train[5]", r"cannot be read.*slices are written as 'train\[:10%\]'"),
        ("train[:200%]", "cannot be read"),
        ("test[:50%](pct1_dropremainder)", "cannot be read: .*less than 100"),
        ("train[:5]+train[3:8]", "names some rows twice"),
        ("train[9:9]", r"has no rows in split='train\[9:9\]'"),
    ],
)
def test_an_expression_without_rows_is_refused(split: str | None, message: str, tmp_path: Path) -> None:
    for source in (in_memory(tmp_path), SOURCES["folder"](tmp_path)):
        with pytest.raises(ValueError, match=message):
            open_dataset(source, split=split)


def test_a_split_is_read_only_if_it_is_named(tmp_path: Path) -> None:
    folder = files(tmp_path)
    (folder / "test.jsonl").write_text("{broken")
    assert len(open_dataset(folder, split="train")) == SIZES["train"]


@pytest.mark.parametrize(
    ("ending", "train", "test", "expected"),
    [
        (".json", '{"output": "a", "n": 1}', '{"output": "b", "n": "01"}', [1, "01"]),
        (".json", '{"output": "a", "n": 1}', '{"output": "b", "n": 0.5}', [1, 0.5]),
        (
            ".json",
            '{"output": "a", "n": {"x": 1}}',
            '{"output": "b", "n": {"x": 1, "y": 2}}',
            [{"x": 1}, {"x": 1, "y": 2}],
        ),
        (".json", '{"output": "a", "n": ["1", 1]}', '{"output": "b", "n": ["1"]}', [["1", 1], ["1"]]),
        (".json", '{"output": "a"}', '{"output": "b", "n": 1}', [None, 1]),
        (".csv", "output,n\na,1\n", "output,n\nb,007\n", ["1", "007"]),
        (".csv", "output,n\na,1\n", "n;output\n0.5;b\n", ["1", "0.5"]),
    ],
)
def test_splits_of_files_get_types_that_hold_the_values_of_all(
    ending: str, train: str, test: str, expected: list[Any], tmp_path: Path
) -> None:
    (tmp_path / f"train{ending}").write_text(train, encoding="utf-8")
    (tmp_path / f"test{ending}").write_text(test, encoding="utf-8")
    loaded = open_dataset(tmp_path, split="all", cache_dir=str(tmp_path / "cache"))
    assert [row["n"] for row in loaded] == expected
    assert (loaded["output"][:], loaded["split"][:]) == (["a", "b"], ["train", "test"])


def test_splits_that_do_not_fit_together_are_refused() -> None:
    other = DatasetDict(train=rows("train"), test=rows("test").rename_column("output", "answer"))
    typed = DatasetDict(train=rows("train"), test=Dataset.from_dict({"instruction": ["a"], "output": [1]}))
    taken = DatasetDict(train=rows("train").add_column("split", ["x"] * 150))
    for source, split, message in (
        (other, "all", "different columns"),
        (typed, "train+test", "different types"),
        (taken, "all", "adds a column 'split', which"),
    ):
        with pytest.raises(ValueError, match=message):
            open_dataset(source, split=split)


def test_a_split_called_all_is_that_split() -> None:
    source = DatasetDict(all=rows("test"), rest=rows("train"))
    assert open_dataset(source, split="all").column_names == ["instruction", "output"]
