"""VERIFY: is a pushed selection, or one in a folder, what its receipt says?

Does: load the source again at its revision and compare every row; select again from the pushed scores and clusters; on
request score some rows again. Names the first difference.
Does not: fit clusters again, whose last digits differ from one machine to the next.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, load_dataset

from car_datasets import hub
from car_datasets.curation import select_by
from car_datasets.dataset_card import data_folder_of
from car_datasets.loading import open_dataset
from car_datasets.overview import positions_in_pool
from car_datasets.pushing import first_difference, read_result
from car_datasets.receipt import RECEIPT_FILE, Receipt, describe_source, indices_digest
from car_datasets.recipe import Recipe
from car_datasets.recipe_stages import scorer_of
from car_datasets.selection import SELECTION_COLUMNS, read_numbers
from car_datasets.splits import SCORED
from car_datasets.tokens import clean_token

TOLERANCE = 1e-5  # of a score, in float32, on another machine


class Verification(NamedTuple):
    """What [`verify`] found.

    Args:
        checked (`tuple[str, ...]`): what was looked at and is as it should be, in words.
        skipped (`tuple[str, ...]`): what could not be looked at, and why.
        difference (`str`, *optional*): the first difference, at which it stopped; `None`: all that was looked at matches.
    """

    checked: tuple[str, ...]
    skipped: tuple[str, ...]
    difference: str | None

    @property
    def matches(self) -> bool:
        """Whether no difference was found."""
        return self.difference is None


class _Difference(Exception):
    """A check that failed, in words."""


def verify(
    where: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | None = None,
    rescore: int = 0,
    seed: int = 0,
    scorer: str | None = None,
    engine: str | None = None,
    tokenizer: str | None = None,
    revision: str | None = None,
    config_name: str = "default",
    split: str = "selected",
    token: str | None = None,
) -> Verification:
    """Check a selection against its receipt: its rows against the source, its choice against its scores.

    Args:
        where (`str`): a folder that [`curate`] wrote, or a dataset repository that [`push_selection`] wrote.
        source (`str`, *optional*): the file or folder that was curated, where that was no Hub dataset: the receipt has its
            name and digest, not its place.
        rescore (`int`): so many rows, drawn at random, are scored again, to within 1e-5.
        seed (`int`): of that draw.
        scorer, engine, tokenizer (`str`, *optional*): for `rescore`, where these were folders; compared by digest.
        revision (`str`, *optional*), config_name, split (`str`): of the repository.
        token (`str`, *optional*): for private repositories; never stored.

    Returns:
        [`Verification`]: what was looked at, and the first difference.

    Raises:
        ValueError: there is nothing to verify: no receipt, no source, or bad arguments.
        FileNotFoundError: there is no such file.
    """
    if rescore < 0:
        raise ValueError(f"rescore={rescore}: a number of rows.")
    found = _open(where, revision, config_name, split, token)
    models = {"scorer": scorer, "engine": engine, "tokenizer": tokenizer}
    checks = _Checks(found, Recipe().changed(**found.receipt.recipe), token)
    checked: list[str] = []
    try:
        for words in checks.run(source, rescore, seed, models):
            checked.append(words)
    except _Difference as error:
        return Verification(tuple(checked), (), str(error))
    skipped = () if found.scored is not None else (f"the choice: there is no split {SCORED!r} with the pool's scores",)
    return Verification(tuple(checked), skipped, None)


class _Found(NamedTuple):
    receipt: Receipt
    selected: Dataset
    scored: Dataset | None


def _open(
    where: str | os.PathLike[str], revision: str | None, config_name: str, split: str, token: str | None
) -> _Found:
    folder = Path(where).expanduser()
    if folder.is_dir():
        result = read_result(folder)
        return _Found(Receipt.read(folder), result.selected, result.scored)
    if folder.exists():
        raise ValueError(f"{str(where)!r} is a file; pass the folder that `car-datasets curate` wrote, or a Hub id.")
    seen = hub.read_repository(str(where), revision, token)
    if RECEIPT_FILE not in seen.files:
        raise ValueError(
            f"{where} has no {RECEIPT_FILE}; `car-datasets push` of a folder by `car-datasets curate` writes one."
        )
    receipt = Receipt.from_json(hub.read_dataset_file(str(where), RECEIPT_FILE, seen.sha, token))
    start = f"{data_folder_of(config_name)}/{SCORED}-"
    options: dict[str, Any] = {
        "revision": seen.sha,
        "token": clean_token(token),
    }  # by commit: no older copy will do
    names = [split, *([SCORED] if any(name.startswith(start) for name in seen.files) else [])]
    tables = [load_dataset(str(where), config_name, split=name, **options) for name in names]
    return _Found(receipt, tables[0], tables[1] if len(tables) > 1 else None)


@dataclass(frozen=True)
class _Checks:
    """The checks, in order; each gives words for what is as it should be, or raises a _Difference."""

    found: _Found
    recipe: Recipe
    token: str | None

    def run(
        self, source: str | os.PathLike[str] | None, rescore: int, seed: int, models: dict[str, str | None]
    ) -> Iterator[str]:
        """The words, one check after the other."""
        receipt, selected, scored = self.found
        yield self._indices()
        rows = self._open_source(source)
        yield f"the source is the receipt's ({receipt.source['kind']})"
        for name, table in {"selected": selected, SCORED: scored}.items():
            if table is not None:
                yield self._same_rows(rows, table, name)
        if scored is not None:
            yield self._choice(scored)
        if rescore:
            yield self._scores(selected if scored is None else scored, rescore, seed, models)

    def _indices(self) -> str:
        receipt, selected, _ = self.found
        name = self.recipe.index_column
        if name not in selected.column_names:
            raise _Difference(f"the selected rows have no column {name!r}")
        if len(selected) != receipt.counts["selected"]:
            raise _Difference(f"{len(selected)} rows are selected, by the receipt {receipt.counts['selected']}")
        if indices_digest(selected[name][:]) != receipt.selected_sha256:
            raise _Difference("the source indices of the selected rows do not have the receipt's sha256")
        return f"{len(selected)} selected rows have the receipt's indices"

    def _open_source(self, source: str | os.PathLike[str] | None) -> Dataset:
        known = self.found.receipt.source
        if source is None:
            if known["kind"] != "hub":
                what = f"{known['kind']} {known['name']!r}" if "name" in known else "dataset in memory"
                raise ValueError(f"The source was a {what}; say where it is: source=... (--source FILE).")
            name, split, revision = (known.get(key) for key in ("name", "split", "revision"))
            return open_dataset(known["id"], name, split, revision=revision, token=self.token)
        path = Path(source).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"source={str(source)!r}: there is no such file or folder.")
        opened = open_dataset(path, split=known.get("split"), columns=dict(self.recipe.columns))
        seen = describe_source(opened if known["kind"] == "memory" else path, opened, self.recipe)
        if known["kind"] != "hub" and seen["sha256"] != known["sha256"]:
            raise _Difference(f"the source has the sha256 {seen['sha256']}, by the receipt {known['sha256']}")
        return opened

    def _same_rows(self, source: Dataset, table: Dataset, name: str) -> str:
        if name == SCORED and len(table) != self.found.receipt.counts["rows"]:
            raise _Difference(f"{SCORED} has {len(table)} rows, by the receipt {self.found.receipt.counts['rows']}")
        missing = [column for column in source.column_names if column not in table.column_names]
        if missing:
            raise _Difference(f"{name} has no column {missing} of the source")
        try:
            places = positions_in_pool(source, table, self.recipe.index_column)
            same = table.select_columns(source.column_names).cast(source.features)
        except ValueError as error:  # Arrow's errors are some as well
            raise _Difference(f"{name} does not fit the source: {error}") from error
        if difference := first_difference(source.select(places.tolist()), same):
            raise _Difference(f"{name} is not what the source holds: {difference}")
        return f"{len(table)} rows of {name} are the source's"

    def _choice(self, scored: Dataset) -> str:
        selected, name = self.found.selected, self.recipe.index_column
        pool = scored.remove_columns([column for column in SELECTION_COLUMNS if column in scored.column_names])
        try:
            expected = select_by(self.recipe, pool)
        except ValueError as error:
            raise _Difference(f"nothing can be selected from the scores: {error}") from error
        pairs = zip(selected[name][:], expected[name][:], strict=False)
        for row, (seen, wanted) in enumerate(pairs):
            if seen != wanted:
                raise _Difference(f"selected, row {row}, is source row {seen}; by scores and clusters it is {wanted}")
        shared = [column for column in expected.column_names if column in selected.column_names]
        parts = [each.select_columns(shared) for each in (expected, selected)]
        if difference := first_difference(*parts):
            raise _Difference(f"selected is not what scores and clusters give: {difference}")
        return f"scores and clusters of {len(scored)} rows give the same {len(selected)}, for the same reasons"

    def _scores(self, table: Dataset, count: int, seed: int, models: dict[str, str | None]) -> str:
        column, recipe = self.recipe.score_column, self.recipe
        missing = [name for name in models if models[name] is None and self._was_folder(name)]
        if missing:
            options = ", ".join(f"{name}=... (--{name})" for name in missing)
            raise ValueError(f"rescore={count}: these were folders, and the receipt does not say where: {options}.")
        given = {name: value or getattr(recipe, name) for name, value in models.items()}
        scorer = scorer_of(recipe.changed(**given, scorer_revision=recipe.scorer_revision), self.token, embed=False)
        if (scorer.engine_revision or "") != self.found.receipt.scorer.get("engine_revision", ""):
            raise ValueError(f"engine={scorer.engine!r} is not the int8 encoder of the receipt.")
        scores = read_numbers(table, column, np.nan)
        known = np.flatnonzero(~np.isnan(scores))
        drawn = np.sort(np.random.default_rng(seed).choice(known, min(count, len(known)), replace=False))
        batch = table.select(drawn.tolist())
        batch = batch.remove_columns([name for name in scorer.output_columns if name in batch.column_names])
        for row, again in zip(drawn.tolist(), scorer(batch[:])[column], strict=True):
            if abs(float(again) - scores[row]) > TOLERANCE:
                at = table[row][recipe.index_column]
                raise _Difference(f"source row {at} has the score {scores[row]:.6f}; scored again, {float(again):.6f}")
        return f"{len(drawn)} rows, scored again, have their scores within {TOLERANCE:g}"

    def _was_folder(self, name: str) -> bool:
        if name == "scorer":
            return self.recipe.scorer != hub.DEFAULT_SCORER and str(self.recipe.scorer_revision).startswith("sha256:")
        if name == "tokenizer":
            pin = self.found.receipt.scorer.get("tokenizer_revision", "")
            return self.recipe.tokenizer is not None and not re.fullmatch("[0-9a-f]{40}", pin)
        return self.recipe.engine is not None
