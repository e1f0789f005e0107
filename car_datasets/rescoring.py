"""Score some rows of a selection again with the scorer that its receipt names, and compare.

Does: load that scorer and compare it with the receipt; draw rows, with and without a score, and compare their scores.
Does not: load the embedder if it is another model than the scorer's encoder; run the other checks of `verify`.
"""

from __future__ import annotations

import re

import numpy as np
from datasets import Dataset

from car_datasets import hub
from car_datasets.formatting import find_schema
from car_datasets.receipt import Receipt, embedder_record, scorer_record
from car_datasets.recipe import Recipe
from car_datasets.recipe_stages import scorer_of
from car_datasets.rows import Rows
from car_datasets.scoring import QualityScorer
from car_datasets.selection import read_numbers

# How far a score may move with the batch and the machine, by the encoder's dtype. The recipe of an int8 encoder says float32.
TOLERANCES = {"float32": 1e-5, "bfloat16": 0.03, "float16": 0.005}


class Difference(Exception):
    """A check of `verify` that failed; the message says what was found and what the receipt says."""


def score_again(
    table: Dataset,
    receipt: Receipt,
    recipe: Recipe,
    count: int,
    seed: int = 0,
    models: dict[str, str | None] | None = None,
    token: str | None = None,
) -> str:
    """Score rows of a table again and compare the results with the scores in the table.

    Args:
        table (`Dataset`): the selection or its pool.
        receipt ([`Receipt`]), recipe ([`Recipe`]): those of the selection.
        count (`int`): number of rows to draw; rows without a score are drawn as well.
        seed (`int`): seed of the draw.
        models (`dict`, *optional*): folders of `scorer`, `engine` and `tokenizer`, for models that were folders.
        token (`str`, *optional*): for private models; never stored.

    Returns:
        `str`: a sentence about what was compared, and how closely.

    Raises:
        Difference: a score differs, is missing or is there for a row that has none, or the scorer is not the receipt's.
        ValueError: a model cannot be loaded.
    """
    scorer = _scorer(receipt, recipe, count, models or {}, token)
    _compare_models(receipt, recipe, scorer)
    column = recipe.score_column
    drawn = np.sort(np.random.default_rng(seed).choice(len(table), min(count, len(table)), replace=False))
    rows = table.select(drawn.tolist())
    batch = rows.remove_columns([name for name in scorer.output_columns if name in rows.column_names])[:]
    tolerances = np.full(len(drawn), TOLERANCES[recipe.dtype])
    if recipe.turns == "sum":  # the score of every exchange may move that far
        schema = find_schema(batch, scorer.schema, scorer.columns)
        tolerances *= np.maximum(1, Rows.from_batch(batch, schema, str(scorer.template), "mark").counts)
    pairs = zip(read_numbers(rows, column, np.nan), scorer(batch)[column], tolerances, strict=True)
    for row, (score, again, tolerance) in enumerate(pairs):
        new = np.nan if again is None else float(again)
        if np.isnan(score) != np.isnan(new) or abs(new - score) > tolerance:
            at = rows[row][recipe.index_column]
            raise Difference(f"source row {at} has {_shown(score)}; scored again, {_shown(new)}")
    words = f"{len(drawn)} rows, scored again, have their scores within {TOLERANCES[recipe.dtype]:g}"
    words += " for each exchange" if recipe.turns == "sum" else ""
    return words if recipe.dtype == "float32" else f"{words} ({recipe.dtype})"


def _shown(score: float) -> str:
    return "no score" if np.isnan(score) else f"the score {score:.6f}"


def _scorer(
    receipt: Receipt, recipe: Recipe, count: int, models: dict[str, str | None], token: str | None
) -> QualityScorer:
    missing = [name for name in models if models[name] is None and _was_folder(name, receipt, recipe)]
    if missing:
        options = ", ".join(f"{name}=... (--{name})" for name in missing)
        raise ValueError(
            f"rescore={count}: these were folders, whose paths are not in the receipt. Pass them: {options}."
        )
    given = {name: value or getattr(recipe, name) for name, value in models.items()}
    # With "mark", a row that cannot be scored any more is reported as a difference instead of ending the run.
    settings = recipe.changed(**given, scorer_revision=recipe.scorer_revision, on_invalid="mark")
    scorer = scorer_of(settings, token, embed=False)
    if (scorer.engine_revision or "") != receipt.scorer.get("engine_revision", ""):
        raise ValueError(
            f"engine={scorer.engine!r} is not the int8 encoder of the receipt. Pass the folder that was used."
        )
    return scorer


def _was_folder(name: str, receipt: Receipt, recipe: Recipe) -> bool:
    if name == "scorer":
        return recipe.scorer != hub.DEFAULT_SCORER and str(recipe.scorer_revision).startswith("sha256:")
    if name == "tokenizer":
        pin = receipt.scorer.get("tokenizer_revision", "")
        return recipe.tokenizer is not None and not re.fullmatch("[0-9a-f]{40}", pin)
    return recipe.engine is not None


def _compare_models(receipt: Receipt, recipe: Recipe, scorer: QualityScorer) -> None:
    """Compare the models with the receipt, except for their names, because a folder may have been renamed."""
    if str(scorer.template) != receipt.template:
        raise Difference(f"the scorer's template is {str(scorer.template)!r}, by the receipt {receipt.template!r}")
    pairs = {"scorer": (scorer_record(scorer), receipt.scorer)}
    if recipe.embedder is None and scorer.shares_encoder:
        pairs["embedder"] = (embedder_record(recipe, scorer), receipt.embedder)
    for model, (seen, known) in pairs.items():
        for name in sorted({*seen, *known} - {"model_id"}):
            if seen.get(name) != known.get(name):
                raise Difference(f"the {model}'s {name} is {seen.get(name)!r}, by the receipt {known.get(name)!r}")
