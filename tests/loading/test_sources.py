"""loading.py: every kind of source gives the same rows in the same order, and bad input is refused by name."""

from __future__ import annotations

import csv
import io
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from car_datasets import load_instructions
from car_datasets.loading import files, reading, schemas, sources
from car_datasets.loading.sources import check_rows, open_dataset

COLUMNS = ("instruction", "input", "output", "id")
ROWS = [
    dict(zip(COLUMNS, row, strict=True))
    for row in [
        ('Say "hi", twice.', "a, b\nc\td", 'hi,\n"hi"', 7),
        ("How much is 6 x 7?", "", "42", 3),
        ("Name the symbol of sodium.", "NA", "None", 11),
        ("Was heißt „Katze“ auf Französisch? 😀", "", "le chat\\n", 5),
        ("Say nothing.", " ", "", 2),
        ("1.50", "null", "nan", 1),
    ]
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
GOOD = '{"instruction": "a", "output": "b"}'


def table(separator: str) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, delimiter=separator)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue()


def save(name: str, text: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(text.encode("utf-8"))
        return path

    return write


def save_parquet(folder: Path) -> Path:
    Dataset.from_list(ROWS).to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


def save_to_disk(folder: Path) -> Path:
    Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    return folder / "saved"


def save_dict_to_disk(folder: Path) -> Path:
    DatasetDict(train=Dataset.from_list(ROWS)).save_to_disk(folder / "saved")
    return folder / "saved"


def save_folder_of_files(folder: Path) -> Path:
    (folder / "rows").mkdir()
    for number, rows in enumerate((ROWS[:2], ROWS[2:])):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "rows" / f"part-{number}.jsonl").write_text(text, encoding="utf-8")
    return folder / "rows"


def save_folder_of_csv(folder: Path) -> Path:
    (folder / "rows").mkdir()
    return save("rows.csv", table(","))(folder / "rows").parent


SOURCES: dict[str, Callable[[Path], Any]] = {
    "JSON list": save("rows.json", json.dumps(ROWS)),
    "JSON list as the original writes it": save("rows.json", json.dumps(ROWS, indent=4, ensure_ascii=False)),
    "JSON list with BOM": save("rows.json", "\ufeff" + json.dumps(ROWS)),
    "JSON list after white space": save("rows.json", "\n  " + json.dumps(ROWS) + "\n"),
    "JSONL": save("rows.jsonl", LINES),
    "JSONL without a last newline": save("rows.jsonl", LINES.rstrip()),
    "JSONL with BOM": save("rows.jsonl", "\ufeff" + LINES),
    "JSONL called .json": save("rows.json", LINES),
    "NDJSON": save("rows.ndjson", LINES),
    "CSV": save("rows.csv", table(",")),
    "CSV with BOM": save("rows.csv", "\ufeff" + table(",")),
    "TSV": save("rows.tsv", table("\t")),
    "Parquet": save_parquet,
    "save_to_disk of a Dataset": save_to_disk,
    "save_to_disk of a DatasetDict": save_dict_to_disk,
    "folder of files": save_folder_of_files,
    "folder of CSV": save_folder_of_csv,
    "Dataset": lambda _: Dataset.from_list(ROWS),
    "DatasetDict": lambda _: DatasetDict(rows=Dataset.from_list(ROWS)),
    "list of rows": lambda _: ROWS,
    "DataFrame": lambda _: pd.DataFrame(ROWS),
    "DataFrame with an index of its own": lambda _: pd.DataFrame(ROWS, index=list("cafebd")),
    "list of paths": lambda folder: [save("rows.jsonl", LINES)(folder)],
}


@pytest.mark.parametrize("kind", SOURCES)
def test_source_gives_its_rows_unchanged_in_order_and_numbered(kind: str, tmp_path: Path) -> None:
    loaded = load_instructions(SOURCES[kind](tmp_path))
    assert loaded.to_list() == [{**row, "source_index": i} for i, row in enumerate(ROWS)]
    assert loaded.features["source_index"].dtype == "int64"


def test_path_as_text_is_the_same_as_a_path(tmp_path: Path) -> None:
    path = SOURCES["JSONL"](tmp_path)
    assert load_instructions(str(path)).to_list() == load_instructions(path).to_list()


def test_csv_columns_named_by_the_user_are_text_too(tmp_path: Path) -> None:
    path = save("rows.csv", "task,solution\n12,007\nNA,\n")(tmp_path)
    loaded = load_instructions(path, columns={"instruction": "task", "response": "solution"})
    assert loaded["task"][:] == ["12", "NA"]
    assert loaded["solution"][:] == ["007", ""]


def test_json_answers_that_look_like_dates_are_text(tmp_path: Path) -> None:
    path = save("rows.json", '[{"instruction": "When?", "output": "2020-01-01", "made": "2021-02-03"}]')(tmp_path)
    assert load_instructions(path, on_invalid="mark")[0] == {
        "instruction": "When?",
        "output": "2020-01-01",
        "made": "2021-02-03",
        "source_index": 0,
    }


def test_file_that_changed_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for answer in ("first", "other"):  # of equal length
        path.write_text(json.dumps({"instruction": "a", "output": answer}), encoding="utf-8")
        assert load_instructions(path)["output"][:] == [answer]


def test_file_wins_over_a_hub_id_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "me").mkdir()
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "me" / "rows")
    monkeypatch.chdir(tmp_path)
    assert len(load_instructions("me/rows")) == len(ROWS)


def test_columns_and_their_types_stay() -> None:
    dataset = Dataset.from_list(ROWS).add_column("vector", [np.arange(3, dtype=np.float32)] * len(ROWS))
    loaded = load_instructions(dataset)
    assert loaded.column_names == [*dataset.column_names, "source_index"]
    assert loaded.remove_columns("source_index").features == dataset.features
    assert "source_index" not in dataset.column_names


# --- the index column


def test_index_column_of_the_user_is_kept() -> None:
    rows = Dataset.from_list(ROWS)
    assert load_instructions(rows.add_column("source_index", [9, 4, 7, 1, 0, 3]))["source_index"][:] == [
        9,
        4,
        7,
        1,
        0,
        3,
    ]
    assert load_instructions(rows, index_column="id").column_names == list(COLUMNS)
    assert load_instructions(rows, index_column="input_row")["input_row"][:] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("values", [[1, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, None]], ids=["duplicates", "nulls"])
def test_index_column_that_does_not_tell_rows_apart_is_refused(values: list[int | None]) -> None:
    dataset = Dataset.from_list(ROWS).add_column("source_index", values)
    with pytest.raises(ValueError, match=r"'source_index' does not tell rows apart.*--index-column"):
        load_instructions(dataset)
    assert load_instructions(dataset, index_column="row")["row"][:] == list(range(6))


CHOICES: dict[str, tuple[Callable[[Dataset], Dataset], list[int] | None]] = {
    "filter": (lambda rows: rows.filter(lambda row: row["id"] > 4), [0, 2, 3]),
    "select": (lambda rows: rows.select([4, 1]), [4, 1]),
    "first rows": (lambda rows: rows.select(range(2)), [0, 1]),
    "sort": (lambda rows: rows.sort("id"), [5, 4, 1, 3, 0, 2]),
    "filter twice": (lambda rows: rows.filter(lambda row: row["id"] > 1).filter(lambda row: row["id"] < 6), [1, 3, 4]),
    "shuffle": (lambda rows: rows.shuffle(seed=1), None),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_rows_that_the_user_chose_keep_their_numbers(choice: str, caplog: pytest.LogCaptureFixture) -> None:
    choose, expected = CHOICES[choice]
    loaded = load_instructions(choose(Dataset.from_list(ROWS)))
    assert [ROWS[i]["output"] for i in loaded["source_index"][:]] == loaded["output"][:]
    assert expected is None or loaded["source_index"][:] == expected
    assert "row numbers" not in caplog.text


@pytest.mark.parametrize(
    ("choose", "reason"),
    [
        (lambda rows: rows.select(range(2, 5)), "a part of a larger one"),
        (lambda rows: rows.select([1, 1, 0]), "than once"),
    ],
)
def test_rows_whose_numbers_datasets_forgot_are_numbered_with_a_warning(
    choose: Callable[[Dataset], Dataset], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = load_instructions(choose(Dataset.from_list(ROWS)))
    assert loaded["source_index"][:] == [0, 1, 2]
    assert reason in caplog.text and "index_column=" in caplog.text


def test_numbers_count_through_several_files(tmp_path: Path) -> None:
    parts = [save(f"{name}.jsonl", json.dumps(row))(tmp_path) for name, row in zip("ba", ROWS, strict=False)]
    loaded = load_instructions(parts)
    assert loaded["source_index"][:] == [0, 1] and loaded["output"][:] == [row["output"] for row in ROWS[:2]]


def test_a_wrong_setting_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    for setting in ({"schema": "chats"}, {"columns": {"colour": "a"}}, {"on_invalid": "drop"}):
        with pytest.raises(ValueError, match="known"):
            load_instructions(tmp_path / "there-is-no-such-file.json", **setting)


# --- splits


def two_splits() -> DatasetDict:
    return DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:1]))


def test_split_is_chosen_by_name(tmp_path: Path) -> None:
    two_splits().save_to_disk(tmp_path / "saved")
    assert len(load_instructions(two_splits(), split="test")) == 1
    assert len(load_instructions(tmp_path / "saved", split="train")) == len(ROWS)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (None, r"The source has the splits \['test', 'train'\]; say which, .*--split train"),
        ("validation", r"split='validation' is not in the source; it has \['test', 'train'\]"),
    ],
)
def test_unclear_split_is_refused(split: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_instructions(two_splits(), split=split)


# --- bad input: files


@pytest.mark.parametrize("name", ["nope.json", "nope.csv", "./nope", "~/no/such/folder", "/no/such/folder"])
def test_missing_file_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"{name}.*no such file or folder"):
        load_instructions(name)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rows.json", "", "is an empty file"),
        ("rows.csv", "", "is an empty file"),
        ("rows.json", "[]", "is an empty list"),
        ("rows.json", "\ufeff [ ]\n", "is an empty list"),
        ("rows.json", '["a", "b"]', "is neither a list of objects nor JSON Lines"),
        ("rows.json", "[1, 2]", "is neither a list of objects nor JSON Lines"),
        ("rows.json", "[[1], [2]]", "is neither a list of objects nor JSON Lines"),
        ("rows.json", "null", "is neither a list of objects nor JSON Lines"),
        ("rows.json", '"text"', "is neither a list of objects nor JSON Lines"),
        ("rows.json", " \n ", "is neither a list of objects nor JSON Lines"),
        ("rows.json", "instruction,output\na,b\n", "is neither a list of objects nor JSON Lines"),
        ("rows.jsonl", f"{GOOD}\n{GOOD[:20]}", "cannot be read as json"),
        ("rows.json", f"[{GOOD}, {GOOD[:20]}", "cannot be read as json"),
        ("rows.json", f"[{GOOD}, 3]", "cannot be read as json"),
        ("rows.json", f'[{GOOD}, "text"]', "cannot be read as json"),
        ("rows.json", f"[{GOOD}, [1]]", "cannot be read as json"),
        ("rows.jsonl", '{"instruction": "a", "instruction": "c", "output": "b"}', "cannot be read as json"),
        ("rows.json", "[{}]", "has no rows|No known schema fits"),
        ("rows.csv", "instruction,output\n", "has no rows"),
        ("rows.csv", "instruction,output\ncaf\udce9,b\n", "cannot be read as csv"),
        ("rows.csv", "instruction,output\na,b,c\nd,e,f\n", "cannot be read as csv"),
        ("rows.csv", "instruction,output\na,b\nd,e,f\n", "cannot be read as csv"),
        ("rows.parquet", "PAR1 and no more", "cannot be read as parquet"),
        ("rows.txt", "text", r"the file extension '\.txt' is not known; use one of .*'\.jsonl'"),
    ],
)
def test_file_that_is_not_what_its_name_says_is_refused_by_name(
    name: str, text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=message) as caught:
        load_instructions(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_object_instead_of_a_list_shows_its_keys(tmp_path: Path) -> None:
    path = save("rows.json", json.dumps({"version": 1, "data": ROWS}, indent=2))(tmp_path)
    with pytest.raises(ValueError, match=r"No known schema fits the columns \['version', 'data'\]"):
        load_instructions(path)


def test_unknown_columns_are_listed_with_the_option_that_names_them(tmp_path: Path) -> None:
    path = save("rows.csv", "task,solution\na,b\n")(tmp_path)
    with pytest.raises(ValueError, match=r"\['task', 'solution'\].*--columns instruction="):
        load_instructions(path)


def test_folder_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path}.*folder without data"):
        load_instructions(tmp_path)


def test_folder_with_a_truncated_file_is_refused(tmp_path: Path) -> None:
    save("rows.jsonl", f"{GOOD}\n{GOOD[:20]}")(tmp_path)
    with pytest.raises(ValueError, match="cannot be read"):
        load_instructions(tmp_path)


def test_hub_id_without_a_network_is_an_error_at_once() -> None:
    start = time.monotonic()
    with pytest.raises(ConnectionError, match="someone/no-such-dataset"):
        load_instructions("someone/no-such-dataset")
    assert time.monotonic() - start < 10


# --- bad input: datasets and rows


@pytest.mark.parametrize("source", ["", " "])
def test_empty_text_is_no_source(source: str) -> None:
    with pytest.raises(ValueError, match="source is empty"):
        load_instructions(source)


@pytest.mark.parametrize(
    "source",
    [{"instruction": "a", "output": "b"}, None, 3, ["rows.json", {"output": "b"}], pd.Series(["a"]), np.array(["a"])],
)
def test_source_of_another_type_is_refused(source: Any) -> None:
    with pytest.raises(ValueError, match=f"source is a {type(source).__name__}; pass a path"):
        load_instructions(source)


def test_streaming_dataset_is_refused() -> None:
    stream = IterableDataset.from_generator(lambda: iter(ROWS))
    for source in (stream, IterableDatasetDict(train=stream)):
        with pytest.raises(ValueError, match=r"streaming dataset.*streaming=True.*score_in_shards\(stream"):
            load_instructions(source)


def test_dataset_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="has no rows"):
        load_instructions(Dataset.from_list(ROWS).select([]))


BAD_ROWS = [
    pytest.param(
        {"instruction": ["a", None] * 8, "output": ["b"] * 16},
        r"8 of 16 rows cannot be scored: 8 null \(rows 1, 3, 5, 7, 9, \.\.\.\)\. .*--on-invalid mark",
        id="nulls",
    ),
    pytest.param({"instruction": ["a", "b"], "output": [None, None]}, r"2 null \(rows 0, 1\)", id="only nulls"),
    pytest.param(
        {"instruction": ["a", None, "c"], "output": [1, 2, 3]},
        r"3 of 3 rows cannot be scored: 2 not_a_string \(rows 0, 2\); 1 null \(rows 1\)",
        id="numbers",
    ),
    pytest.param(
        {"instruction": ["a"], "input": [["x"]], "output": ["b"]}, r"1 not_a_string \(rows 0\)", id="lists as input"
    ),
    pytest.param(
        {"messages": [[{"role": "user", "content": "a"}], [{"role": "wizard", "content": "a"}], None]},
        r"1 no_assistant_turn \(rows 0\); 1 unknown_role: wizard \(rows 1\); 1 null \(rows 2\)",
        id="chats",
    ),
    pytest.param(
        {"conversations": [[{"from": "human", "value": "a"}, {"from": "gpt", "value": None}]]},
        r"1 of 1 rows cannot be scored: 1 null \(rows 0\)",
        id="null content",
    ),
]


@pytest.mark.parametrize(("columns", "message"), BAD_ROWS)
def test_rows_that_cannot_be_scored_are_counted_and_refused_or_kept_for_marking(
    columns: dict[str, list[Any]], message: str
) -> None:
    dataset = Dataset.from_dict(columns)
    with pytest.raises(ValueError, match=message):
        load_instructions(dataset)
    assert load_instructions(dataset, on_invalid="mark").remove_columns("source_index").to_list() == dataset.to_list()
    assert len(open_dataset(dataset)) == len(dataset)


def test_bad_rows_of_a_file_are_counted_over_the_whole_file(tmp_path: Path) -> None:
    rows = [{"instruction": "a", "output": None if i in (3, 12_345) else "b"} for i in range(12_346)]
    path = save("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))(tmp_path)
    with pytest.raises(ValueError, match=r"2 of 12346 rows cannot be scored: 2 null \(rows 3, 12345\)"):
        load_instructions(path)


def test_null_or_missing_inputs_and_empty_answers_are_no_errors(pairs: Dataset) -> None:
    assert load_instructions(pairs).remove_columns("source_index").to_list() == pairs.to_list()
    assert len(load_instructions(pairs.remove_columns("input"))) == len(pairs)


def test_opening_and_checking_are_the_two_halves_of_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    find_schema = schemas.find_schema
    monkeypatch.setattr(sources, "find_schema", lambda *args: calls.append(args) or find_schema(*args))
    path = save("rows.csv", "task,solution,key\n12,007,a\nNA,,b\n")(tmp_path)
    options: dict[str, Any] = {"columns": {"instruction": "task", "response": "solution"}}
    opened = open_dataset(path, **options)
    assert calls == [] and opened.column_names == ["task", "solution", "key"]
    checked = check_rows(opened, index_column="row", **options)
    assert len(calls) == 1  # the schema is found once per dataset
    assert checked.to_dict() == load_instructions(path, index_column="row", **options).to_dict()
    assert check_rows(opened, index_column="key", **options).to_dict() == opened.to_dict()
    with pytest.raises(ValueError, match="No known schema fits"):
        check_rows(opened)
    with pytest.raises(ValueError, match="on_invalid='drop' is not known"):
        check_rows(opened, on_invalid="drop", **options)


def test_unknown_way_with_bad_rows_is_refused(pairs: Dataset) -> None:
    with pytest.raises(ValueError, match="on_invalid='drop' is not known"):
        load_instructions(pairs, on_invalid="drop")


# --- readers that would change values


def test_text_among_numbers_is_not_changed_in_silence(tmp_path: Path) -> None:
    """Load a column that `datasets` stores as JSON, from which it reads "42" as a number and '"q"' without its quotes."""
    rows = [{"instruction": "a", "output": value} for value in ("42", '"q"', "null", 3, "plain")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=r"1 of 5 rows cannot be scored: 1 not_a_string \(rows 3\)"):
        load_instructions(tmp_path / "rows.json")
    loaded = load_instructions(tmp_path / "rows.json", on_invalid="mark")
    assert loaded["output"][:] == ["42", '"q"', "null", 3, "plain"]


def test_text_that_looks_like_dates_stays_text_and_keeps_all_columns(tmp_path: Path) -> None:
    rows = [{"instruction": "a", "output": "2024-01-02"}, {"instruction": "b", "input": "late", "output": "2024-01-03"}]
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(json.dumps(r, ensure_ascii=False) for r in [*rows, {**rows[0], "output": "\u2028x"}])
    )
    found = load_instructions(tmp_path / "rows.jsonl")
    assert found["output"][:] == ["2024-01-02", "2024-01-03", "\u2028x"]
    assert found["input"][:] == [None, "late", None]


def test_dates_inside_chats_stay_text(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "2024-01-01"}, {"role": "assistant", "content": "2024-01-02"}]
    (tmp_path / "rows.json").write_text(json.dumps([{"messages": chat}] * 3))
    assert load_instructions(tmp_path / "rows.json")[2]["messages"] == chat


@pytest.mark.skipif(not hasattr(datasets, "Json"), reason="datasets before 5 has no type for them, and says so")
def test_objects_of_varying_keys_are_kept(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b", "meta": meta} for meta in ({"x": 1}, {"x": "one"}, {"y": [1]})]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert load_instructions(tmp_path / "rows.jsonl")["meta"][:] == [row["meta"] for row in rows]


def test_a_line_with_too_few_fields_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("instruction,input,output\nq1,,a1\nq2,\n")
    with pytest.raises(ValueError, match="line 3 has 2 fields, the header has 3"):
        load_instructions(tmp_path / "rows.csv")


def test_endings_in_capitals(tmp_path: Path) -> None:
    (tmp_path / "ROWS.JSON").write_text('[{"instruction": "a", "output": "b"}]')
    assert load_instructions(tmp_path / "ROWS.JSON")["output"][:] == ["b"]


# --- other bytes under the same name


def write_colour(path: Path, colour: str) -> None:
    """Write one row, in the format of the file's name, at a time long ago."""
    rows = Dataset.from_dict({"instruction": ["Name a colour."], "output": [colour]})
    state = (path / "state.json").read_bytes() if path.is_dir() else None
    if path.suffix == ".parquet":
        rows.to_parquet(path)
    elif path.suffix == ".csv":
        rows.to_csv(path)
    elif path.suffix:
        rows.to_json(path)
    else:
        rows.save_to_disk(path)
        (path / "state.json").write_bytes(state or (path / "state.json").read_bytes())
    for each in (path, *path.glob("*")):
        os.utime(each, ns=(10**18, 10**18))


def shout(row: dict[str, Any]) -> dict[str, Any]:
    return {"output": row["output"].upper()}


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv", "rows.parquet", "saved"])
def test_other_rows_at_the_same_path_and_time_are_read_and_mapped_anew(name: str, tmp_path: Path) -> None:
    for colour in ("red", "tan"):
        write_colour(tmp_path / name, colour)
        rows = open_dataset(tmp_path / name)
        assert rows["output"][:] == [colour]
        assert rows.map(shout)["output"][:] == [colour.upper()]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet"])
def test_rows_of_a_file_that_changes_while_it_is_read_are_not_kept(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name  # of colours that no other test has put into the cache
    write_colour(path, "olive")

    def after_a_change(ordinary: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*arguments: Any, **options: Any) -> Any:
            write_colour(path, "azure")
            return ordinary(*arguments, **options)

        return changed

    with monkeypatch.context() as patch:
        patch.setattr(reading, "_write", after_a_change(reading._write))
        patch.setattr(files.Parquet, "download_and_prepare", after_a_change(files.Parquet.download_and_prepare))
        with pytest.raises(ValueError, match="was changed while it was read"):
            open_dataset(path)
    write_colour(path, "olive")
    assert open_dataset(path)["output"][:] == ["olive"]
