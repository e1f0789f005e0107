"""rescoring.py: how close scores are when they are computed again, by dtype and by the exchanges of a chat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from car_datasets import Recipe, curate
from car_datasets.publishing.rescoring import TOLERANCES, Difference, Rescoring
from car_datasets.receipt import Receipt
from car_datasets.scoring.iqs.float8 import FLOAT8
from tests.scoring.iqs.test_float8 import NEEDS_FLOAT8
from tests.test_recipe import as_chats, short_rows


def curated(rows: Dataset, folder: Path, **settings: Any) -> tuple[Dataset, Receipt, Recipe]:
    """Return the pool, its receipt and its recipe."""
    scored = curate(rows, folder, n1=5, k=3, **settings).scored
    receipt = Receipt.read(folder)
    return scored, receipt, Recipe().changed(**receipt.recipe)


def moved(pool: Dataset, by: float) -> Dataset:
    scores = [None if score is None else score + by for score in pool["iqs_score"][:]]
    features = pool.features.copy()
    return pool.remove_columns("iqs_score").add_column("iqs_score", scores, feature=features["iqs_score"])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [*sorted(set(TOLERANCES) - {FLOAT8}), pytest.param(FLOAT8, marks=NEEDS_FLOAT8)])
def test_the_tolerance_is_the_dtypes(dtype: str, tiny_embedder: str, tmp_path: Path) -> None:
    pool, receipt, recipe = curated(short_rows(10), tmp_path / "out", embedder=tiny_embedder, dtype=dtype)
    words = Rescoring(receipt, recipe, 7).scores(pool)  # seven rows have other company than all ten had
    limit = TOLERANCES[dtype]
    assert words.startswith(f"7 rows, scored again, have their scores within {limit:g}")
    assert (dtype in words) == (dtype != "float32")
    Rescoring(receipt, recipe, 10).scores(moved(pool, limit / 4))
    with pytest.raises(Difference, match=r"source row 0 has the score .*; scored again, the score"):
        Rescoring(receipt, recipe, 10).scores(moved(pool, -2 * limit))


def test_a_sum_may_move_with_each_exchange(tiny_iqs: str, tiny_embedder: str, tmp_path: Path) -> None:
    models = {"scorer": tiny_iqs, "embedder": tiny_embedder}
    pool, receipt, recipe = curated(as_chats(short_rows()), tmp_path / "out", **models, turns="sum")
    again = Rescoring(receipt, recipe, 24, models={"scorer": tiny_iqs})
    assert again.scores(pool).endswith("within 1e-05 for each exchange")
    twice = moved(pool, 1.5e-5)  # every second chat has two exchanges
    again.scores(twice.select(range(1, 24, 2)))
    with pytest.raises(Difference, match="source row 0 has the score"):
        again.scores(twice.select([0]))


def test_a_score_where_none_can_be_is_named(tiny_iqs: str, tiny_embedder: str, tmp_path: Path) -> None:
    rows = Dataset.from_list([*short_rows().to_list(), {"instruction": None, "input": "", "output": "x"}])
    models = {"scorer": tiny_iqs, "embedder": tiny_embedder}
    pool, receipt, recipe = curated(rows, tmp_path / "out", **models, on_invalid="mark")
    again = Rescoring(receipt, recipe, 25, models={"scorer": tiny_iqs})
    assert again.scores(pool).startswith("25 rows")
    scores = [0.5 if score is None else score for score in pool["iqs_score"][:]]
    spoiled = pool.remove_columns("iqs_score").add_column("iqs_score", scores, feature=pool.features["iqs_score"])
    with pytest.raises(Difference, match=r"source row 24 has the score 0\.5.*; scored again, no score"):
        again.scores(spoiled)
