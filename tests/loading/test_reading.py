"""reading.py: every value of a JSON or CSV file arrives as it was written, and what is broken is named with its line."""

from __future__ import annotations

import csv
import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from car_datasets import QualityScorer, curate, load_instructions
from car_datasets.loading.files import DataFile
from car_datasets.loading.reading import read_csv, read_json
from car_datasets.results import read_result
from car_datasets.selection.published import write_original
from car_datasets.utils.column_names import ColumnNames

TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        ["007", "42", "true", "null", "1e5", "NaN", '"q"', "{}", "[1]", "2024-01-02", "\u2028x", "a\tb", ""]
    ),
)
NUMBERS = st.one_of(
    st.integers(-(2**70), 2**70),
    st.integers(-3, 3),
    st.sampled_from([2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), 2**70]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([1e-12, 0.3, -7.123456789012345e-07, 5e-324, 1.7976931348623157e308]),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS | st.just("k"), inner, max_size=3)),
    max_leaves=12,
)
# Each column draws its rows from one strategy, so that both uniform and mixed columns come up often.
COLUMNS = st.lists(
    st.sampled_from([
        VALUES, NUMBERS, TEXTS, st.integers(0, 2**64 - 1), st.integers(-5, 5) | st.none(), st.lists(VALUES, max_size=3),
        st.lists(st.fixed_dictionaries({"role": TEXTS, "content": VALUES}), max_size=3), st.just([]), st.just({}),
        st.lists(st.lists(NUMBERS | TEXTS, max_size=2), max_size=2), st.fixed_dictionaries({"a": TEXTS, "b": NUMBERS}),
    ]),
    max_size=4,
)  # fmt: skip


@st.composite
def tables(draw: st.DrawFn) -> list[dict[str, Any]]:
    strategies = {f"side {number}": strategy for number, strategy in enumerate(draw(COLUMNS))}
    strategies |= {draw(TEXTS.filter(bool)): VALUES} if draw(st.booleans()) else {}
    strategies = {"instruction": TEXTS, **strategies, "output": TEXTS}
    strategies.pop("source_index", None)
    row = st.fixed_dictionaries({}, optional=strategies).map(lambda row: {"instruction": "a", "output": "b", **row})
    return draw(st.lists(row, min_size=1, max_size=5))


def marked(value: Any) -> Any:
    """Replace booleans, which Python calls equal to 1 and 0."""
    if isinstance(value, dict):
        return {key: marked(part) for key, part in value.items()}
    if isinstance(value, list):
        return [marked(part) for part in value]
    return ("boolean", str(value)) if isinstance(value, bool) else value


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=tables(), escaped=st.booleans(), listed=st.booleans(), indent=st.sampled_from([None, 2]))
def test_any_json_comes_back_as_it_was(
    rows: list[dict[str, Any]],
    escaped: bool,
    listed: bool,
    indent: int | None,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("any")
    if listed:
        text = json.dumps(rows, ensure_ascii=escaped, indent=indent)
    else:
        text = "\r\n".join(json.dumps(row, ensure_ascii=escaped) for row in rows)
    (folder / "rows.json").write_bytes(text.encode())
    found = load_instructions(folder / "rows.json", schema="alpaca", on_invalid="mark", cache_dir=str(folder))
    keys = dict.fromkeys(key for row in rows for key in row)
    wanted = [{key: row.get(key) for key in keys} | {"source_index": i} for i, row in enumerate(rows)]
    assert marked([found[i] for i in range(len(found))]) == marked(wanted)
    assert marked([found[name][:] for name in keys]) == marked([[row[name] for row in wanted] for name in keys])
    found.to_parquet(folder / "rows.parquet")
    again = load_instructions(folder / "rows.parquet", schema="alpaca", on_invalid="mark", cache_dir=str(folder))
    assert marked(list(again)) == marked(wanted)
    write_original(again, folder / "selected.json", ColumnNames())
    assert marked(json.loads((folder / "selected.json").read_text(encoding="utf-8"))) == marked(wanted)


# --- JSON, by hand

GOOD = '{"instruction": "a", "output": "b"}'
AWKWARD = [
    {
        "instruction": f"Name the number {i}.",
        "output": answer,
        "share": share,
        "meta": meta,
        "tags": tags,
    }
    for i, (answer, share, meta, tags) in enumerate(
        [
            ("Seven is a number.", 1e-12, {"id": "007"}, []),
            ("42", -7.123456789012345e-07, {"id": 7, "big": 2**70}, [{"a": 1}, {"b": "null"}]),
            ("true", 0.3, {"id": "1.10"}, [{"a": None}]),
            ("2024-01-02", 5e-324, None, None),
        ]
    )
]


def save(folder: Path, name: str, text: str | bytes) -> Path:
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return folder / name


def test_a_run_carries_awkward_columns_through(tmp_path: Path, tiny_iqs: str, tiny_embedder: str) -> None:
    source = save(tmp_path, "rows.jsonl", "\n\n".join(map(json.dumps, AWKWARD)))
    curate(source, tmp_path / "out", n1=2, k=2, scorer=tiny_iqs, embedder=tiny_embedder, allow_worse=True)
    result = read_result(tmp_path / "out")
    assert result.scored is not None
    written = json.loads((tmp_path / "out" / "selected.json").read_text(encoding="utf-8"))
    for rows in (list(result.selected), list(result.scored), written):
        assert rows
        for row in rows:
            assert {name: row[name] for name in AWKWARD[0]} == AWKWARD[row["source_index"]]


def test_map_and_its_cache_leave_the_values(tmp_path: Path, tiny_iqs: str) -> None:
    """Compare the values, because `datasets` would encode them anew, and read cached ones with fewer digits."""
    answers = [*(row["output"] for row in AWKWARD), 1.0000000000000002e16]
    rows = [{"instruction": "a", "output": answer, "side": [1.0000000000000002e16, str(answer)]} for answer in answers]
    source = save(tmp_path, "rows.json", json.dumps(rows))
    for _ in range(2):
        loaded = load_instructions(source, on_invalid="mark", cache_dir=str(tmp_path))
        scored = loaded.map(QualityScorer(tiny_iqs, on_invalid="mark"), batched=True, batch_size=2)
        scored = scored.select(range(len(scored))).map(lambda batch: {"new": [1] * len(batch["side"])}, batched=False)
        assert scored["output"][:] == answers
        assert [isinstance(answer, str) for answer in scored["output"][:]] == [True] * 4 + [False]
    assert loaded.map(QualityScorer(tiny_iqs, on_invalid="mark"), batched=True)["side"][:] == [r["side"] for r in rows]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([None, None], "null"),
        ([True, None], "bool"),
        ([1, -(2**63)], "int64"),
        ([1, 2**64 - 1], "uint64"),
        ([1, 2.5], "float64"),
        (["1", "2"], "string"),
        ([2**53 + 1, 0.5], "fractions and integers beyond 2**53"),
        ([2**70], "integers beyond 64 bits"),
        ([-1, 2**63], "integers beyond 64 bits"),
        ([1, True], "mixes booleans and numbers"),
        ([{"a": 1}, {"b": 1}], "objects of differing keys"),
        ([{}], "objects without keys"),
    ],
)
def test_a_column_has_the_narrowest_type_that_holds_it(
    values: list[Any], kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(tmp_path, "rows.json", json.dumps([{"instruction": "a", "output": "b", "side": v} for v in values]))
    for _ in range(2):  # the warning comes from the cached file as well
        caplog.clear()
        loaded = load_instructions(path, cache_dir=str(tmp_path))
        assert loaded["side"][:] == values
        if hasattr(datasets, "Json") and isinstance(loaded.features["side"], datasets.Json):
            assert caplog.text.count("kept as JSON") == 1 and kind in caplog.text
        else:
            assert loaded.features["side"].dtype == kind and not caplog.text


@pytest.mark.parametrize("listed", [True, False], ids=["list", "lines"])
def test_half_a_surrogate_pair_is_replaced_with_a_warning(
    listed: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [GOOD, r'{"instruction": "\ud83d\ude00 smile", "output": "half \uD83D of it"}']
    path = save(tmp_path, "rows.json", f"[{', '.join(rows)}]" if listed else "\n".join(rows))
    for _ in range(2):
        caplog.clear()
        assert load_instructions(path, cache_dir=str(tmp_path))["output"][:] == ["b", "half \ufffd of it"]
        assert re.search(r"rows\.json'.*1 rows hold half of a surrogate pair.*rows 1", caplog.text)
    assert load_instructions(path, cache_dir=str(tmp_path))["instruction"][1] == "😀 smile"


BROKEN_JSON = [
    ("rows.jsonl", f"{GOOD}\n\n{GOOD}\n{GOOD[:20]}", "line 4: "),
    ("rows.jsonl", f"{GOOD}\r\n[1]\r\n", r"line 2: this row is not an object but '\[1\]'"),
    ("rows.jsonl", f"{GOOD}\n{GOOD} {GOOD}", "line 2: there is more after the object"),
    ("rows.jsonl", f'{GOOD}\n{{"instruction": "a", "output": "b", "m": {{"k": 1, "k": 2}}}}', "line 2: .*a key twice"),
    ("rows.jsonl", f'{GOOD}\n{{"instruction": "a", "output": 1e999}}', "line 2: the number 1e999"),
    (
        "rows.jsonl",
        f"{GOOD}\n{GOOD}\n{GOOD}\n".encode() + b'{"output": "caf\xe9"}',
        r"line 4: .*not UTF-8 \(byte 0xE9\)",
    ),
    ("rows.jsonl", f"{GOOD}\n" + "[" * 100_000, "line 2: "),
    ("rows.json", f"[\n{GOOD},\n{GOOD},\n]", "line 4: "),
    ("rows.json", f"[\n{GOOD}\n{GOOD}]", "line 3: a comma or the end of the list is missing"),
    ("rows.json", f"[\n{GOOD}]\n{GOOD}", "line 3: there is more after the end"),
    ("rows.json", f'[\n{GOOD},\n{{"a": 1,\n "a": 2}}]', "line 3: .*a key twice"),
    ("rows.json", f"[{GOOD}]".encode("utf-16"), "line 1: it is UTF-16"),
    ("rows.json", f"[\n{GOOD},\n".encode() + b'{"output": "\xff"}]', "line 3: it is not UTF-8"),
]


@pytest.mark.parametrize(("name", "text", "message"), BROKEN_JSON)
def test_a_broken_row_is_named_with_its_line(name: str, text: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{name}' cannot be read as json: {message}"):
        load_instructions(save(tmp_path, name, text))


def test_equal_bytes_are_read_once_and_have_one_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (save(tmp_path, name, f"{GOOD}\n") for name in ("one.jsonl", "other.json"))
    first = load_instructions(one, cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr("car_datasets.loading.reading._write", None)
    again = load_instructions(other, cache_dir=str(tmp_path / "cache"))
    assert first._fingerprint == again._fingerprint and first.to_list() == again.to_list()


# --- CSV


def test_a_csv_column_is_a_number_only_if_nothing_is_lost(tmp_path: Path) -> None:
    header = "instruction,output,whole,part,zeros,mixed,none,wide,empty"
    lines = ["1,2,7,0.5,007,1,NA,9007199254740993,", '"a\n\nb",,,,1,2.5,nan,-1,', ",None,-3,1e-12,2,x,,0,"]
    path = save(tmp_path, "rows.csv", "\ufeff" + "\r\n".join([header, *lines]) + "\r\n\r\n")
    assert load_instructions(path, cache_dir=str(tmp_path))[:] == {
        "instruction": ["1", "a\n\nb", ""],
        "output": ["2", "", "None"],
        "whole": [7, None, -3],
        "part": [0.5, None, 1e-12],
        "zeros": ["007", "1", "2"],
        "mixed": ["1", "2.5", "x"],
        "none": ["NA", "nan", ""],
        "wide": [9007199254740993, -1, 0],
        "empty": ["", "", ""],
        "source_index": [0, 1, 2],
    }


@pytest.mark.parametrize("sign", [";", "|", "\t"])
def test_another_separator_is_found_and_said(sign: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = save(tmp_path, "rows.csv", f"instruction{sign}output\na,b{sign}c\n")
    assert load_instructions(path, cache_dir=str(tmp_path))[0] == {
        "instruction": "a,b",
        "output": "c",
        "source_index": 0,
    }
    assert f"separated by {sign!r}" in caplog.text


@pytest.mark.parametrize("text", ['"instruction";"output"\n"a, b";"c"\n', "sep=;\ninstruction;output\na, b;c\n"])
def test_headers_as_spreadsheets_write_them(text: str, tmp_path: Path) -> None:
    path = save(tmp_path, "rows.csv", text)
    assert load_instructions(path, cache_dir=str(tmp_path)).to_list() == [
        {"instruction": "a, b", "output": "c", "source_index": 0}
    ]


def test_a_long_field_is_read_and_the_limit_of_the_process_stays(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    path = save(tmp_path, "rows.csv", f"instruction,output\na,{'step ' * 40_000}\n")
    assert load_instructions(path, cache_dir=str(tmp_path))["output"][0] == "step " * 40_000
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('instruction,output\n"a\n\nb",c\n\nd\n', "line 6 has 1 fields, the header has 2"),
        ('instruction,output\na,b\nc,"d\n', "line 3: unexpected end of data"),
        (",instruction,output\n0,a,b\n", r"line 1: columns \[1\] of the header have no name .*index=False"),
        ("instruction,output,output\na,b,c\n", r"line 1: the header has \['output'\] more than once"),
        (b"instruction,output\na,b\ncaf\xe9,d\n", r"line 3: it is not UTF-8 \(byte 0xE9\)"),
        ("instruction,output\na,b\n".encode("utf-16"), "line 1: it is UTF-16"),
    ],
)
def test_a_broken_table_is_named_with_its_line(text: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"rows.csv' cannot be read as csv: {message}"):
        load_instructions(save(tmp_path, "rows.csv", text))


def test_tables_of_different_columns_are_refused(tmp_path: Path) -> None:
    texts = {"one.csv": "instruction,output\na,b\n", "two.csv": "instruction,answer\na,b\n"}
    files = [DataFile(str(save(tmp_path, name, text)), name, "csv") for name, text in texts.items()]
    with pytest.raises(ValueError, match=r"'two.csv' has the columns .*answer.* and 'one.csv' has"):
        read_csv(files, ())


# --- what a stranger may send

NESTED = [("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")]


@pytest.mark.parametrize("levels", [300, 990, 10_000, 100_000])
@pytest.mark.parametrize(("start", "end"), NESTED)
def test_json_that_is_nested_deeply_is_refused_with_its_line(start: str, end: str, levels: int, tmp_path: Path) -> None:
    value = f"{start * levels}1{end * levels}"
    for row in (f'"x": {value}', f'"messages": [{{"role": "user", "content": {value}}}]'):
        (tmp_path / "rows.jsonl").write_text(f'{{"instruction": "a", "output": "b"}}\n{{{row}}}\n')
        with pytest.raises(ValueError, match=r"line 2: it is nested (more than 200 levels deep|too deeply)"):
            load_instructions(str(tmp_path / "rows.jsonl"))


def test_rows_in_memory_that_are_nested_deeply_or_in_themselves_are_refused() -> None:
    deep: Any = 1
    for _ in range(300):
        deep = [deep]
    endless: list[Any] = []
    endless.append(endless)
    for value in (deep, endless):
        rows = [{"instruction": "a", "output": "b", "x": value}]
        for source in (rows, pd.DataFrame(rows)):
            with pytest.raises(ValueError, match="nested more than 200 levels deep"):
                load_instructions(source)


@pytest.mark.parametrize("name", ["rows.csv", "rows.json", "rows.parquet", None])
def test_a_source_of_very_many_columns_is_refused(name: str | None, tmp_path: Path) -> None:
    row = {"instruction": "a", "output": "b", **{f"c{i}": "1" for i in range(10_000)}}
    source: Any = [row] if name is None else str(tmp_path / name)
    if name == "rows.csv":
        (tmp_path / name).write_text(",".join(row) + "\n" + ",".join(row.values()) + "\n")
    elif name == "rows.json":
        (tmp_path / name).write_text(json.dumps([row]))
    elif name is not None:
        pq.write_table(pa.table({column: [value] for column, value in row.items()}), source)
    with pytest.raises(ValueError, match="has 10,002 columns, and at most 10,000 are read"):
        load_instructions(source)


def test_an_object_of_very_many_keys_is_kept_as_json(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([{"x": {f"k{i}": i for i in range(50_000)}}]))
    [row] = read_json([DataFile(str(tmp_path / "rows.json"), "rows", "json")])
    assert row["x"]["k49999"] == 49_999


PIECES = [
    *(b'{"a":', b"[", b"]", b"}", b'"', b"\\u", b"d83d", b"1", b"e9", b",", b"\n", b"\xff", b"\xef\xbb\xbf"),
    *(b"null", b"-", b"\t", b";"),
]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(st.tuples(st.sampled_from(PIECES), st.sampled_from([1, 2, 3_000])), min_size=1, max_size=8))
def test_any_bytes_are_rows_or_one_line_of_explanation(pieces: list[tuple[bytes, int]], tmp_path: Path) -> None:
    content = b"".join(piece * times for piece, times in pieces)
    for kind in ("json", "csv"):
        (tmp_path / f"rows.{kind}").write_bytes(content)
        file = DataFile(str(tmp_path / f"rows.{kind}"), "rows", kind)
        try:
            rows = read_json([file], str(tmp_path)) if kind == "json" else read_csv([file], [], str(tmp_path))
        except ValueError as error:
            assert str(error).startswith("source='rows'") and len(str(error)) < 2_000
        else:
            assert len(rows) <= content.count(b"\n") + content.count(b"{") + 1


@pytest.mark.parametrize("first", ['{"instruction": "a",', '{"instruction": "a', '{"instruction": "a"}}', "{"])
def test_a_file_whose_first_line_is_broken_is_not_read_to_its_end(first: str, tmp_path: Path) -> None:
    path = save(tmp_path, "rows.jsonl", f"{first}\n" + '{"instruction": "a", "output": "b"}\n' * 600_000)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"line [12]"):
            read_json([DataFile(str(path), "rows.jsonl", "json")], str(tmp_path / "cache"))
        assert tracemalloc.get_traced_memory()[1] < 12_000_000  # of 22 MB; the digest of the file takes 8 MB
    finally:
        tracemalloc.stop()
