"""Selections by a recipe, from the columns of a pool."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from car_datasets import Recipe
from car_datasets.choosing import select_by

SOURCES = ("code", "chat", "web")


def pool(bias: float = 0.0, rows: int = 2_000) -> Dataset:
    """Return scored, clustered rows of three sources, one of which scores `bias` standard deviations better."""
    rng = np.random.default_rng(3)
    source = rng.choice(SOURCES, rows, p=[0.2, 0.5, 0.3])
    scores = rng.normal(size=rows) + bias * (source == "code")
    columns: dict[str, Any] = {
        "source": source.tolist(),
        "source_index": list(range(rows)),
        "iqs_score": scores.astype(np.float32),
        "iqs_tokens": rng.integers(20, 400, rows).astype(np.int32),
        "cluster": rng.integers(0, 20, rows).astype(np.int32),
    }
    return Dataset.from_dict(columns)


def shares(chosen: Dataset) -> dict[str, float]:
    return {name: chosen["source"][:].count(name) / len(chosen) for name in SOURCES}


@pytest.mark.parametrize(
    "settings", [{"within": "source"}, {"quota": "source=code:0.2,chat:0.5"}, {"balance": "source"}]
)
@pytest.mark.parametrize("amount", [{"budget": 200}, {"n1": 180}])
def test_a_bias_of_two_standard_deviations_moves_no_share(settings: dict[str, Any], amount: dict[str, Any]) -> None:
    recipe = Recipe(**settings, **amount)
    fair, biased = (shares(select_by(recipe, pool(bias))) for bias in (0.0, 2.0))
    assert max(abs(fair[name] - biased[name]) for name in SOURCES) <= 0.01
    # Without fair shares, the bias shows.
    ordinary = [shares(select_by(Recipe(**amount), pool(bias)))["code"] for bias in (0.0, 2.0)]
    assert ordinary[1] > ordinary[0] + 0.3


def test_quotas_are_exact() -> None:
    chosen = select_by(Recipe(quota="source=code:0.25,web:0.5", budget=201), pool(2.0))
    assert {name: chosen["source"][:].count(name) for name in SOURCES} == {"code": 50, "chat": 50, "web": 101}
    chosen = select_by(Recipe(balance="source", budget_tokens="30k"), pool(2.0))
    tokens = [sum(t for s, t in zip(chosen["source"], chosen["iqs_tokens"], strict=True) if s == n) for n in SOURCES]
    assert max(tokens) <= 10_000 and sum(tokens) >= 0.999 * 30_000


def test_marked_rows_are_left_out_and_ranks_count_the_others() -> None:
    rows = pool(rows=50)
    best = int(np.argmax(rows["iqs_score"][:]))
    out = [None if row != best else 7 for row in range(50)]
    marked = rows.add_column("duplicate_of", out)
    kept = [row for row in range(50) if row != best]
    expected = select_by(Recipe(n1=5), rows.select(kept))
    assert select_by(Recipe(n1=5), marked).remove_columns("duplicate_of").to_list() == expected.to_list()
    # A rule within bounds leaves it out as well, and `keep` (of duplicates) does not.
    assert best not in select_by(Recipe(budget_tokens=2_000), marked)["source_index"][:]
    assert best in select_by(Recipe(n1=5, duplicates="keep"), marked)["source_index"][:]
    assert best in select_by(Recipe(n1=5, procedure="paper"), marked)["source_index"][:]
    # More rows than are left: all of them, and no error after hours of work.
    assert len(select_by(Recipe(budget=50), marked)) == 49
    pinned = marked.add_column("pinned", ["keep" if row == best else None for row in range(50)])
    chosen = select_by(Recipe(n1=5, keep="gold"), pinned)
    assert chosen["selected_by"][:][chosen["source_index"][:].index(best)] == "pin"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"within": "sourse"}, "There is no column 'sourse'"),
        ({"quota": "source=code:0.2,poem:0.1"}, "no row has 'poem' in the column 'source'"),
        ({"budget_tokens": 500, "budget_tokenizer": "x"}, "needs the column 'budget_tokens'"),
        ({"keep": "gold"}, "needs the column 'pinned'"),
        ({"rule": "gain"}, "needs the column 'near_clusters'"),
        ({"like": "examples.jsonl"}, "needs the column 'like_rank'"),
        ({"budget_tokens": 5}, "leave no row to select"),
    ],
)
def test_what_the_pool_does_not_have_is_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        select_by(Recipe(**settings), pool(rows=60))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"duplicates": "some"}, "duplicates='some' is not known"),
        ({"rule": "best"}, "rule='best' is not known"),
        ({"balance": "source", "quota": "source=code:1"}, "leave one of the two out"),
        ({"quota": "source=code:2"}, "must be a number from 0 to 1"),
        ({"budget_tokens": "2X"}, "pass a number of tokens above 0"),
        ({"budget_tokens": 9, "budget": 3}, "Leave n1 and budget out"),
        ({"budget_tokenizer": "gpt2"}, "needs budget_tokens"),
        ({"keep": "gold", "drop": "gold"}, "a row cannot be both"),
        ({"keep": "gold", "procedure": "paper"}, "needs procedure='default'"),
        ({"within": "source", "procedure": "paper"}, "within='source' needs another procedure"),
        ({"within": "source", "languages": "within"}, "both rank the rows"),
        ({"like": "x.jsonl", "rule": "gain"}, "ranks by examples"),
        ({"against": ("",)}, "against is empty"),
        ({"against": 3}, "against=3 must be of the type"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Recipe(**settings)
