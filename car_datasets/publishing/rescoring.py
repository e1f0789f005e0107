"""Score and embed rows of a selection again, and compare them, and the models, with what its receipt says.

Does: load the models that the receipt names, or the folders that they were; draw rows; compare all that a model gave.
Does not: read a selection or its receipt, which `verification` does; fit clusters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from datasets import Dataset

from car_datasets.loading.schemas import find_schema
from car_datasets.loading.values import carried
from car_datasets.receipt import Receipt, embedder_record, scorer_pins, scorer_record
from car_datasets.recipe import Recipe
from car_datasets.scoring.named import IQS, moved, read_name
from car_datasets.scoring.stage import Rows
from car_datasets.stages import Pipeline, resolve, scorer_of
from car_datasets.utils import revisions
from car_datasets.utils.columns import read_numbers

if TYPE_CHECKING:
    from car_datasets.scoring.named import Scorer

# How far a score may move with the batch and the machine, by the encoder's dtype. The recipe of an int8 encoder says
# float32.
# On an H200, 9,229 scores moved by at most 0.065 in bfloat16 and 0.0074 in float16 from those in float32; on a CPU that
# rounds as float8 does, 1,000 scores moved by at most 0.42.
TOLERANCES = {"float32": 1e-5, "bfloat16": 0.08, "float16": 0.008, "float8": 0.5}
# Of other kinds of scorers, relative where a number exceeds 1: a perplexity has no bound.
TOLERANCE_OF_OTHERS = 2e-4  # in float32
HALF = 1e-3  # how far a number of float16 may be from the one that was stored


class Difference(Exception):
    """A check of `verify` that failed; the message says what was found and what the receipt says."""


class _NotHere(Exception):
    """A model that cannot be compared; the message says why."""


@dataclass(frozen=True)
class Rescoring:
    """Rows to be scored again, and by which models.

    Args:
        receipt ([`Receipt`]), recipe ([`Recipe`]): those of the selection.
        count (`int`): number of rows to draw; rows without a score are drawn as well.
        seed (`int`): seed of the draw.
        models (`dict`): folders of `scorer`, `engine`, `tokenizer` and `embedder`, for models that were folders.
        token (`str`, *optional*): for private models; never stored.
    """

    receipt: Receipt
    recipe: Recipe
    count: int
    seed: int = 0
    models: Mapping[str, str | None] = field(default_factory=dict)
    token: str | None = None

    def run(self, table: Dataset, skipped: list[str]) -> Iterator[str]:
        """Yield a sentence about the scores and one about the embeddings of a table.

        Args:
            table (`Dataset`): the selection or its pool.
            skipped (`list[str]`): gets what could not be checked.

        Raises:
            Difference: a value or a model is not what the table or the receipt has.
            ValueError: a model cannot be loaded.
        """
        yield self.scores(table)
        try:
            yield self.embeddings(table)
        except _NotHere as error:
            skipped.append(f"the embedder {self.receipt.embedder['model_id']!r} and its embeddings: {error}")

    def scores(self, table: Dataset) -> str:
        """Score rows again and compare all that the scorer gives with the table; return what was compared, in words.

        Raises:
            Difference: a value differs, is missing or is there for a row that has none, or the scorer is not the
                receipt's.
            ValueError: a model cannot be loaded.
        """
        recipe, scorer, limit = self.recipe, self._scorer(), self._tolerance
        self._compare_scorer(scorer)
        rows = self._draw(table)
        batch = rows.remove_columns([name for name in scorer.output_columns if name in rows.column_names])[:]
        # One per row.
        tolerances = np.full(len(rows), limit)
        if recipe.turns == "sum":  # the score of every exchange may move that far
            schema = find_schema(batch, scorer.schema, scorer.columns)
            tolerances *= np.maximum(1, Rows.from_batch(batch, schema, str(scorer.template), "mark").counts)
        again = scorer(batch)
        self._compare_numbers(rows, recipe.score_column, again, tolerances)
        others = [name for name in scorer.output_columns if name != recipe.score_column and name in rows.column_names]
        for name in others:
            if rows.features[name].dtype.startswith("float"):
                self._compare_numbers(rows, name, again, tolerances)
                continue
            for row, (seen, new) in enumerate(zip(rows[name][:], again[name], strict=True)):
                if seen != new:
                    raise Difference(f"source row {self._at(rows, row)} has {name} {seen}; scored again, {new}")
        words = f"{len(rows)} rows, scored again, have their scores within {limit:g}"
        words += "" if self._is_iqs else ", relative for numbers above 1"
        words += " for each exchange" if recipe.turns == "sum" else ""
        return words if recipe.dtype == "float32" else f"{words} ({recipe.dtype})"

    def embeddings(self, table: Dataset) -> str:
        """Compare the embedder with the receipt, and embed rows again; return what was compared, in words.

        Raises:
            Difference: an embedding differs, or the embedder is not the receipt's.
            _NotHere: the embedder is not on this machine.
        """
        stages = self._stages()
        self._compare("embedder", embedder_record(stages.recipe, stages.scorer), self.receipt.embedder)
        column = self.recipe.embedding_column
        if column not in table.column_names:
            return "the embedder is the receipt's (there are no embeddings to compare)"
        rows = self._draw(table)
        embedder = stages.embedding_stage()
        again = embedder(rows.remove_columns(column)[:])[column]
        tolerance = TOLERANCES[self.recipe.dtype] + (HALF if self.recipe.embedding_dtype == "float16" else 0)
        for row, (seen, new) in enumerate(zip(rows[column][:], again, strict=True)):
            same = (seen is None) == (new is None)
            if same and seen is not None:
                one, other = (np.asarray(each, dtype=np.float64) for each in (seen, new))
                same = one.shape == other.shape and bool(
                    np.all(np.abs(one - other) <= tolerance * max(1.0, np.abs(other).max()))
                )
            if not same:
                raise Difference(f"source row {self._at(rows, row)} has another embedding than the text gives again")
        return f"{len(rows)} rows, embedded again, have their embeddings within {tolerance:g}"

    @property
    def _is_iqs(self) -> bool:
        return read_name(self.recipe.scorer).kind == IQS

    @property
    def _tolerance(self) -> float:
        is_exact = self.recipe.dtype == "float32" and not self._is_iqs
        return TOLERANCE_OF_OTHERS if is_exact else TOLERANCES[self.recipe.dtype]

    def _draw(self, table: Dataset) -> Dataset:
        drawn = np.random.default_rng(self.seed).choice(len(table), min(self.count, len(table)), replace=False)
        return carried(table.select(np.sort(drawn).tolist()))  # sorted, so that the rows are read in order

    def _at(self, rows: Dataset, row: int) -> Any:
        return rows[row][self.recipe.index_column]

    def _compare_numbers(
        self, rows: Dataset, name: str, again: Mapping[str, Any], tolerances: npt.NDArray[np.float64]
    ) -> None:
        pairs = zip(read_numbers(rows, name, np.nan), again[name], tolerances, strict=True)
        for row, (number, result, tolerance) in enumerate(pairs):
            new = np.nan if result is None else float(result)
            # NaN is the lack of a score; a comparison with NaN is False, so it is tested apart.
            size = 1.0 if self._is_iqs else max(1.0, abs(new))
            if np.isnan(number) != np.isnan(new) or abs(new - number) > tolerance * size:
                what = "score" if name == self.recipe.score_column else name
                told = [f"no {what}" if np.isnan(each) else f"the {what} {each:.6f}" for each in (number, new)]
                raise Difference(f"source row {self._at(rows, row)} has {told[0]}; scored again, {told[1]}")

    def _settings(self, *names: str) -> Recipe:
        given = {name: self.models.get(name) or getattr(self.recipe, name) for name in names}
        given["scorer"] = moved(self.recipe.scorer, given["scorer"])
        pins = {f"{name}_revision": getattr(self.recipe, f"{name}_revision") for name in ("scorer", "embedder")}
        # With "mark", a row that cannot be scored any more is reported as a difference instead of ending the run.
        return self.recipe.changed(**given, **pins, on_invalid="mark")

    def _scorer(self) -> Scorer:
        names = ("scorer", "engine", "tokenizer")
        missing = [name for name in names if self.models.get(name) is None and self._was_folder(name)]
        if missing:
            options = ", ".join(f"{name}=... (--{name})" for name in missing)
            raise ValueError(
                f"rescore={self.count}: these were folders, whose paths are not in the receipt. Pass them: {options}."
            )
        scorer = scorer_of(self._settings(*names), self.token, embed=False)
        if scorer_pins(scorer).get("engine_revision") != self.receipt.scorer.get("engine_revision"):
            raise ValueError(
                f"engine={self.models.get('engine')!r} is not the int8 encoder of the receipt. Pass the folder that was used."
            )
        return scorer

    def _stages(self) -> Pipeline:
        """Return scorer and embedder as `resolve` loads them."""
        if self._was_folder("embedder") and self.models.get("embedder") is None:
            raise _NotHere("it was a folder, whose path is not in the receipt; pass embedder=... (--embedder)")
        settings = self._settings("scorer", "engine", "tokenizer", "embedder")
        try:
            return resolve(settings, self.token)
        except (ConnectionError, ValueError) as error:
            if self.models.get("embedder") is not None:
                raise
            raise _NotHere(f"it cannot be loaded ({error})") from error

    def _was_folder(self, name: str) -> bool:
        recipe = self.recipe
        if name == "scorer":
            return recipe.scorer != revisions.DEFAULT_SCORER and str(recipe.scorer_revision).startswith("sha256:")
        if name == "tokenizer":
            # A commit SHA is of a model on the Hub, anything else is the digest of a folder.
            pin = self.receipt.scorer.get("tokenizer_revision", "")
            return recipe.tokenizer is not None and not re.fullmatch("[0-9a-f]{40}", pin)
        if name == "embedder":
            return recipe.embedder is not None and str(recipe.embedder_revision).startswith("sha256:")
        return recipe.engine is not None

    def _compare_scorer(self, scorer: Scorer) -> None:
        wanted = self.receipt.template
        if str(scorer.template) != wanted:
            raise Difference(f"the scorer's template is {str(scorer.template)!r}; the receipt says {wanted!r}")
        self._compare("scorer", scorer_record(self.recipe, scorer), self.receipt.scorer)

    def _compare(self, model: str, seen: Mapping[str, str], known: Mapping[str, str]) -> None:
        """Compare the record of a model with the receipt's, except for its name, because a folder may have been renamed."""
        for name in sorted({*seen, *known} - {"model_id"}):
            if seen.get(name) != known.get(name):
                raise Difference(f"the {model}'s {name} is {seen.get(name)!r}; the receipt says {known.get(name)!r}")
