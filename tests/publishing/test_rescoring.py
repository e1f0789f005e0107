"""rescoring.py: how closely a score must come back, and rows that have none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from car_datasets import Recipe, curate
from car_datasets.publishing.verification import TOLERANCES, Difference, score_again
from car_datasets.receipt import Receipt
from tests.test_recipe import as_chats, short_rows


def curated(rows: Dataset, folder: Path, **settings: Any) -> tuple[Dataset, Receipt, Recipe]:
    """The pool, its receipt and its recipe."""
    scored = curate(rows, folder, n1=5, k=3, **settings).scored
    receipt = Receipt.read(folder)
    return scored, receipt, Recipe().changed(**receipt.recipe)


def moved(pool: Dataset, by: float) -> Dataset:
    scores = [None if score is None else score + by for score in pool["iqs_score"][:]]
    features = pool.features.copy()
    return pool.remove_columns("iqs_score").add_column("iqs_score", scores, feature=features["iqs_score"])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", sorted(TOLERANCES))
def test_the_tolerance_is_the_dtypes(dtype: str, tiny_embedder: str, tmp_path: Path) -> None:
    pool, receipt, recipe = curated(short_rows(10), tmp_path / "out", embedder=tiny_embedder, dtype=dtype)
    words = score_again(pool, receipt, recipe, 7)  # seven rows have other company than all ten had
    limit = TOLERANCES[dtype]
    assert words.startswith(f"7 rows, scored again, have their scores within {limit:g}")
    assert ("float16" in words) == (dtype != "float32")
    score_again(moved(pool, limit / 4), receipt, recipe, 10)
    with pytest.raises(Difference, match=r"source row 0 has the score .*; scored again, the score"):
        score_again(moved(pool, -2 * limit), receipt, recipe, 10)


def test_a_sum_may_move_with_each_exchange(tiny_iqs: str, tiny_embedder: str, tmp_path: Path) -> None:
    models = {"scorer": tiny_iqs, "embedder": tiny_embedder}
    pool, receipt, recipe = curated(as_chats(short_rows()), tmp_path / "out", **models, turns="sum")
    again = {"count": 24, "models": {"scorer": tiny_iqs}}
    assert score_again(pool, receipt, recipe, **again).endswith("within 1e-05 for each exchange")
    twice = moved(pool, 1.5e-5)  # every second chat has two exchanges
    score_again(twice.select(range(1, 24, 2)), receipt, recipe, **again)
    with pytest.raises(Difference, match="source row 0 has the score"):
        score_again(twice.select([0]), receipt, recipe, **again)


def test_a_score_where_none_can_be_is_named(tiny_iqs: str, tiny_embedder: str, tmp_path: Path) -> None:
    rows = Dataset.from_list([*short_rows().to_list(), {"instruction": None, "input": "", "output": "x"}])
    models = {"scorer": tiny_iqs, "embedder": tiny_embedder}
    pool, receipt, recipe = curated(rows, tmp_path / "out", **models, on_invalid="mark")
    again = {"count": 25, "models": {"scorer": tiny_iqs}}
    assert score_again(pool, receipt, recipe, **again).startswith("25 rows")
    scores = [0.5 if score is None else score for score in pool["iqs_score"][:]]
    spoiled = pool.remove_columns("iqs_score").add_column("iqs_score", scores, feature=pool.features["iqs_score"])
    with pytest.raises(Difference, match=r"source row 24 has the score 0\.5.*; scored again, no score"):
        score_again(spoiled, receipt, recipe, **again)
