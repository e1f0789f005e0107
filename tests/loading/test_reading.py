"""reading.py: every value of a JSON or CSV file arrives as it was written, and what is broken is named with its line."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from car_datasets import load_instructions
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


def same(one: Any, other: Any) -> bool:
    """Tell True from 1 and "1", which Python calls equal, and compare objects without regard to the order of keys."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True) or (
        type(one) is type(other)
        and (
            len(one) == len(other) and all(map(same, one, other))
            if isinstance(one, list)
            else one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
            if isinstance(one, dict)
            else one == other
        )
    ) or (not isinstance(one, bool) and not isinstance(other, bool) and isinstance(one, (int, float)) and one == other)  # fmt: skip


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
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
    assert same([found[i] for i in range(len(found))], wanted)
    assert same({name: found[name][:] for name in keys}, {name: [row[name] for row in wanted] for name in keys})
    found.to_parquet(folder / "rows.parquet")
    again = load_instructions(folder / "rows.parquet", schema="alpaca", on_invalid="mark", cache_dir=str(folder))
    assert same(list(again), wanted)
    write_original(again, folder / "selected.json", ColumnNames())
    assert same(json.loads((folder / "selected.json").read_text()), wanted)
