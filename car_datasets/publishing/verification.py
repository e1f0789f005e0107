"""Check whether a selection, pushed or in a folder, is what its receipt says, and whether a push holds what was sent.

Does: load the source at its revision and compare every row; select again from the stored scores and clusters; score
some rows again on request; read a push back without a cache. Names the first difference.
Does not: push; fit the clusters again, because their last digits differ between machines.
"""

from __future__ import annotations

import glob
import json
import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import Dataset

from car_datasets.clustering.fitting import number_of_clusters
from car_datasets.loading.files import is_address
from car_datasets.loading.hub_datasets import load_split
from car_datasets.loading.schemas import find_schema
from car_datasets.loading.sources import Origin, number_rows, open_rows, source_numbers
from car_datasets.loading.values import carried
from car_datasets.publishing.card import SCORED, data_prefix
from car_datasets.receipt import (
    RECEIPT_FILE,
    Receipt,
    counts_of,
    describe_source,
    embedder_record,
    pool_digest,
    reading_of,
    scorer_record,
)
from car_datasets.recipe import Recipe
from car_datasets.reporting.overview import positions_in_pool
from car_datasets.reporting.report import SelectionReport
from car_datasets.results import REPORT_FILE, Result, read_report, read_result
from car_datasets.scoring.scorer import QualityScorer
from car_datasets.scoring.stage import Rows
from car_datasets.selection.rule import SELECTION_COLUMNS
from car_datasets.stages import scorer_of, select_by
from car_datasets.utils import hub, revisions
from car_datasets.utils.columns import read_numbers
from car_datasets.utils.digests import indices_digest
from car_datasets.utils.files import user_path
from car_datasets.utils.hub import READING_WAITS, asking
from car_datasets.utils.settings import CONFIG_NAME, SPLIT

# How far a score may move with the batch and the machine, by the encoder's dtype. The recipe of an int8 encoder says
# float32. On an H200, 9,229 scores moved by at most 0.065 and 0.0063 from those in float32.
TOLERANCES = {"float32": 1e-5, "bfloat16": 0.08, "float16": 0.008}
BLOCK = 1000  # rows compared at a time


class Verification(NamedTuple):
    """The outcome of [`verify`].

    Args:
        checked (`tuple[str, ...]`): the checks that passed, in words.
        skipped (`tuple[str, ...]`): the checks that were not possible, and why.
        difference (`str`, *optional*): the first difference, at which the checks stopped; `None` if all checks passed.
    """

    checked: tuple[str, ...]
    skipped: tuple[str, ...]
    difference: str | None

    @property
    def matches(self) -> bool:
        """Return True if no difference was found."""
        return self.difference is None


def verify(
    where: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | Sequence[str | Path] | None = None,
    rescore: int = 0,
    seed: int = 0,
    scorer: str | None = None,
    engine: str | None = None,
    tokenizer: str | None = None,
    revision: str | None = None,
    config_name: str = CONFIG_NAME,
    split: str = SPLIT,
    token: str | None = None,
) -> Verification:
    """Check a selection against its receipt: its rows against the source, and its choice against its scores.

    Args:
        where (`str`): a folder that [`curate`] wrote, or a dataset repository that [`push_selection`] wrote.
        source (`str` or a list, *optional*): the file, the files or the folder that was curated. Needed unless that was
            a Hub dataset, because a receipt has the name and digest of a file, but not its path.
        rescore (`int`): number of rows, drawn at random, to score again. Scores may differ by what the recipe's dtype
            allows (1e-5 in float32 and int8, 0.08 in bfloat16, 0.008 in float16).
        seed (`int`): seed of that draw.
        scorer, engine, tokenizer (`str`, *optional*): folders of the models, for `rescore`; needed if they were folders
            when the rows were curated. They are compared by digest.
        revision (`str`, *optional*): branch, tag or commit of the repository.
        config_name, split (`str`): configuration and split of the repository that hold the selected rows.
        token (`str`, *optional*): for private repositories; never stored.

    Returns:
        [`Verification`]: the checks that passed, those that were skipped, and the first difference.

    Raises:
        ValueError: an argument is invalid, or there is no receipt or no source to compare with.
        FileNotFoundError: the file does not exist.
        ConnectionError: the Hub does not answer, which says nothing about the selection.
    """
    if rescore < 0:
        raise ValueError(f"rescore={rescore}: pass a number of rows that is not negative.")
    if seed < 0:
        raise ValueError(f"seed={seed}: pass a number that is not negative.")
    found = _open(where, revision, config_name, split, token)
    receipt = found.receipt
    assert receipt is not None  # neither a folder nor a repository is opened without one
    models = {"scorer": scorer, "engine": engine, "tokenizer": tokenizer}
    try:
        # `changed` checks names and types: a receipt from the Hub may have been edited by hand.
        settings = dict(receipt.recipe)
        if settings.get("budget") is not None:  # earlier versions wrote an n1 next to it, and did not read it
            settings["n1"] = None
        recipe = Recipe().changed(**settings)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}, {RECEIPT_FILE}: its recipe cannot be read: {error}") from error
    checks = _Checks(found, receipt, recipe, token)
    checked: list[str] = []
    difference = None
    try:
        for words in checks.run(source, rescore, seed, models):
            checked.append(words)
    except Difference as error:
        difference = str(error)
    if found.scored is None and difference is None:
        checks.skipped.append(f"the choice, the counts and the pool: there is no split {SCORED!r}")
    return Verification(tuple(checked), tuple(checks.skipped), difference)


def _open(
    where: str | os.PathLike[str], revision: str | None, config_name: str, split: str, token: str | None
) -> Result:
    """Read a selection and its receipt from a folder or a repository."""
    folder = user_path(where)
    if folder.is_dir():
        return read_result(folder)
    if folder.exists():
        raise ValueError(f"{str(where)!r} is a file; pass the folder that `car-datasets curate` wrote, or a Hub id.")
    repo_id = str(where)
    seen = hub.read_repository(repo_id, revision, token, READING_WAITS)
    if RECEIPT_FILE not in seen.files:
        raise ValueError(
            f"{where} has no {RECEIPT_FILE}. Push a folder that `car-datasets curate` wrote: `car-datasets push` adds "
            "one."
        )
    with asking(repr(repo_id), "dataset", seen.sha):
        names = [name for name in (RECEIPT_FILE, REPORT_FILE) if name in seen.files]
        texts = {name: hub.read_dataset_file(repo_id, name, seen.sha, token, READING_WAITS) for name in names}
    receipt = Receipt.from_json(texts[RECEIPT_FILE], f"{where}/{RECEIPT_FILE}")
    report = read_report(texts[REPORT_FILE], f"{where}/{REPORT_FILE}") if REPORT_FILE in texts else None
    has_pool = any(name.startswith(data_prefix(config_name, SCORED)) for name in seen.files)
    # Both splits and the receipt must be of one commit; a branch may move between two requests.
    selected = load_split(repo_id, config_name, split, seen.sha, token)
    scored = load_split(repo_id, config_name, SCORED, seen.sha, token) if has_pool else None
    return Result(selected, scored, report, receipt)


@dataclass(frozen=True)
class _Checks:
    """The checks, in order. Each returns a sentence about what it compared, or raises a [`Difference`]."""

    found: Result
    receipt: Receipt
    recipe: Recipe
    token: str | None
    skipped: list[str] = field(default_factory=list)

    def run(
        self,
        source: str | os.PathLike[str] | Sequence[str | Path] | None,
        rescore: int,
        seed: int,
        models: dict[str, str | None],
    ) -> Iterator[str]:
        """Yield the sentence of one check after the other."""
        receipt, selected, scored = self.receipt, self.found.selected, self.found.scored
        yield self._indices()
        self._settings()
        rows = self._open_source(source)
        yield f"the source is the receipt's ({receipt.source['kind']})"
        for name, table in {"selected": selected, SCORED: scored}.items():
            if table is not None:
                yield self._same_rows(rows, table, name)
        if scored is not None:
            yield self._choice(scored)
        if rescore:
            table = selected if scored is None else scored
            yield score_again(table, receipt, self.recipe, rescore, seed, models, self.token)
        if scored is not None:  # last, because unlike the others these cannot name the row that differs
            yield self._counts(scored)
            yield self._digest(scored)

    def _indices(self) -> str:
        receipt, selected = self.receipt, self.found.selected
        name = self.recipe.index_column
        if name not in selected.column_names:
            raise Difference(f"the selected rows have no column {name!r}")
        if len(selected) != receipt.counts["selected"]:
            raise Difference(f"{len(selected)} rows are selected; the receipt says {receipt.counts['selected']}")
        if indices_digest(selected[name][:]) != receipt.selected_sha256:
            raise Difference("the source indices of the selected rows do not have the receipt's sha256")
        return f"{len(selected)} selected rows have the receipt's indices"

    def _settings(self) -> None:
        """Compare what the receipt says twice, since a changed recipe alone would go unnoticed."""
        receipt, recipe = self.receipt, self.recipe
        pairs = {"scorer.revision": (receipt.scorer["revision"], recipe.scorer_revision)}
        if recipe.embedder is not None:
            pairs["embedder.revision"] = (receipt.embedder["revision"], recipe.embedder_revision)
        for name, (seen, wanted) in pairs.items():
            if seen != wanted:
                raise Difference(f"the receipt's {name} is {seen!r}; its recipe says {wanted!r}")
        try:
            schema = find_schema(self.found.selected.column_names, recipe.schema, recipe.columns).name
        except ValueError as error:
            raise Difference(f"the selected rows have no text: {error}") from error
        if schema != receipt.schema:
            raise Difference(f"the rows have the schema {schema!r}; the receipt says {receipt.schema!r}")

    def _open_source(self, source: str | os.PathLike[str] | Sequence[str | Path] | None) -> Dataset:
        known = self.receipt.source
        reading = reading_of(self.recipe, self.token)._replace(name=known.get("name"), split=known.get("split"))
        if source is None:
            if known["kind"] != "hub":
                what = f"a {known['kind']} {known['name']!r}" if "name" in known else _WHAT[known["kind"]]
                raise ValueError(f"The source was {what}; say where it is: source=... (--source FILE).")
            return self._numbered(open_rows(known["id"], reading._replace(revision=known.get("revision"))).dataset)
        if isinstance(source, (str, os.PathLike)):
            place = os.fspath(source)
            if not (user_path(place).exists() or is_address(place) or (self.recipe.glob and glob.has_magic(place))):
                raise FileNotFoundError(f"source={place!r}: there is no such file or folder.")
            source = place
        # The name of a file or folder is not that of a configuration; a dataset in memory may be given as a file.
        of_memory = known["kind"] == "memory"
        name = self.recipe.name if known["kind"] == "folder" else None
        opened, origin = open_rows(source, reading._replace(name=name, split=None if of_memory else reading.split))
        seen = describe_source(Origin("memory") if of_memory else origin, opened, self.recipe)
        if known["kind"] != "hub" and seen["sha256"] != known["sha256"]:
            raise Difference(f"the source has the sha256 {seen['sha256']}; the receipt says {known['sha256']}")
        return self._numbered(opened)

    def _numbered(self, opened: Dataset) -> Dataset:
        """Return the source with the numbers that its rows have in the split, if it is a slice."""
        return opened if source_numbers(opened) is None else number_rows(opened, self.recipe.index_column)

    def _same_rows(self, source: Dataset, table: Dataset, name: str) -> str:
        if name == SCORED and len(table) != self.receipt.counts["rows"]:
            raise Difference(f"{SCORED} has {len(table)} rows; the receipt says {self.receipt.counts['rows']}")
        missing = [column for column in source.column_names if column not in table.column_names]
        if missing:
            raise Difference(f"{name} has no column {missing} of the source")
        try:
            # By the index, not by position: the selection has another order.
            by_content = "numbered" in self.receipt.source and self.recipe.index_column not in source.column_names
            index = self.recipe.index_column
            places = _places(source, table) if by_content else positions_in_pool(source, table, index)
            if len(twice := np.flatnonzero(np.bincount(places) > 1)):
                raise Difference(f"{name} holds the source's row at position {twice[0]} twice")
            # Cast, because Parquet and JSON may give other types for equal values.
            same = table.select_columns(source.column_names).cast(source.features)
        except ValueError as error:  # Arrow's errors derive from it
            raise Difference(f"{name} does not fit the source: {error}") from error
        if difference := first_difference(source.select(list(places)), same):
            raise Difference(f"{name} is not what the source holds: {difference}")
        return f"{len(table)} rows of {name} are the source's"

    def _choice(self, scored: Dataset) -> str:
        selected, name = self.found.selected, self.recipe.index_column
        # A pushed pool has the columns of the selection, null for rows that were not selected.
        pool = scored.remove_columns([column for column in SELECTION_COLUMNS if column in scored.column_names])
        try:
            expected = select_by(self.recipe, pool)
        except ValueError as error:
            raise Difference(f"nothing can be selected from the scores: {error}") from error
        # Not strict: a different number of rows is found by `first_difference`, after the first row that differs.
        pairs = zip(selected[name][:], expected[name][:], strict=False)
        for row, (seen, wanted) in enumerate(pairs):
            if seen != wanted:
                raise Difference(f"selected, row {row}, is source row {seen}; scores and clusters give {wanted}")
        shared = [column for column in expected.column_names if column in selected.column_names]
        parts = [each.select_columns(shared) for each in (expected, selected)]
        if difference := first_difference(*parts):
            raise Difference(f"selected is not what scores and clusters give: {difference}")
        return f"scores and clusters of {len(scored)} rows give the same {len(selected)}, for the same reasons"

    def _counts(self, scored: Dataset) -> str:
        receipt, recipe = self.receipt, self.recipe
        try:
            report = SelectionReport.from_selection(scored, self.found.selected, names=recipe.names, seed=recipe.seed)
            k = number_of_clusters(recipe.k, report.rows_scored)
        except ValueError as error:
            raise Difference(f"nothing can be counted: {error}") from error
        for name, count in counts_of(report).items():
            if count != receipt.counts[name]:
                raise Difference(f"counts.{name} is {count!r}; the receipt says {receipt.counts[name]!r}")
        if report.clusters > k:
            raise Difference(f"the pool has {report.clusters} clusters; the recipe says k={k}")
        if report.clusters < k:  # possible in a true selection, when there are fewer distinct texts than k
            self.skipped.append(f"k: there are {report.clusters} clusters of k={k}; only fitting again could tell why")
        if self.found.report is None:
            self.skipped.append(f"the seed: there is no {REPORT_FILE}")
        elif self.found.report.seed != recipe.seed:
            raise Difference(f"{REPORT_FILE} has the seed {self.found.report.seed}; the recipe says {recipe.seed}")
        return f"the receipt's counts are those of {len(scored)} rows"

    def _digest(self, scored: Dataset) -> str:
        if pool_digest(scored, self.recipe.names) != self.receipt.scored_sha256:
            raise Difference(f"indices, scores and clusters of {SCORED} do not have the receipt's sha256")
        return f"indices, scores and clusters of {len(scored)} rows have the receipt's sha256"


_WHAT = {"memory": "a dataset in memory", "files": "several files"}


def _places(source: Dataset, table: Dataset) -> list[int]:
    """Return the position in the source of each row of a table, found by content; equal rows are interchangeable.

    Raises:
        ValueError: a row is not in the source, or more often than there.
    """
    columns = source.column_names
    known: dict[str, list[int]] = defaultdict(list)
    for position, row in enumerate(carried(source.with_format(None))):
        known[json.dumps(row, sort_keys=True, default=str)].append(position)
    places = []
    for position, row in enumerate(carried(table.with_format(None).select_columns(columns))):
        found = known[json.dumps(row, sort_keys=True, default=str)]
        if not found:
            raise ValueError(f"row {position} is not in the source, or is there less often")
        places.append(found.pop(0))
    return places


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
    # Sorted, so that the rows are read from disk in order.
    drawn = np.sort(np.random.default_rng(seed).choice(len(table), min(count, len(table)), replace=False))
    rows = table.select(drawn.tolist())
    batch = rows.remove_columns([name for name in scorer.output_columns if name in rows.column_names])[:]
    # One per row.
    tolerances = np.full(len(drawn), TOLERANCES[recipe.dtype])
    if recipe.turns == "sum":  # the score of every exchange may move that far
        schema = find_schema(batch, scorer.schema, scorer.columns)
        tolerances *= np.maximum(1, Rows.from_batch(batch, schema, str(scorer.template), "mark").counts)
    pairs = zip(read_numbers(rows, column, np.nan), scorer(batch)[column], tolerances, strict=True)
    for row, (score, again, tolerance) in enumerate(pairs):
        new = np.nan if again is None else float(again)
        # NaN is the lack of a score; a comparison with NaN is False, so it is tested apart.
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
        return recipe.scorer != revisions.DEFAULT_SCORER and str(recipe.scorer_revision).startswith("sha256:")
    if name == "tokenizer":
        # A commit SHA is of a model on the Hub, anything else is the digest of a folder.
        pin = receipt.scorer.get("tokenizer_revision", "")
        return recipe.tokenizer is not None and not re.fullmatch("[0-9a-f]{40}", pin)
    return recipe.engine is not None


def _compare_models(receipt: Receipt, recipe: Recipe, scorer: QualityScorer) -> None:
    """Compare the models with the receipt, except for their names, because a folder may have been renamed."""
    if str(scorer.template) != receipt.template:
        raise Difference(f"the scorer's template is {str(scorer.template)!r}; the receipt says {receipt.template!r}")
    pairs = {"scorer": (scorer_record(scorer), receipt.scorer)}
    if recipe.embedder is None and scorer.shares_encoder:
        pairs["embedder"] = (embedder_record(recipe, scorer), receipt.embedder)
    for model, (seen, known) in pairs.items():
        for name in sorted({*seen, *known} - {"model_id"}):
            if seen.get(name) != known.get(name):
                raise Difference(f"the {model}'s {name} is {seen.get(name)!r}; the receipt says {known.get(name)!r}")


def compare_pushed(
    repo_id: str, sha: str, tables: Mapping[str, Dataset], config_name: str = CONFIG_NAME, token: str | None = None
) -> None:
    """Load splits from a commit into an empty cache and compare them with `tables`, row by row.

    Args:
        repo_id (`str`), sha (`str`): the dataset repository and the commit.
        tables (`Mapping[str, Dataset]`): split to the rows that it should hold.
        config_name (`str`): the configuration of the splits.
        token (`str`, *optional*): for private repositories; never stored.

    Raises:
        ValueError: they differ; the message names the first row and column.
        ConnectionError: they could not be read back, which says nothing about their content.
    """
    with tempfile.TemporaryDirectory(prefix="car-datasets-check-") as place:
        for name, table in tables.items():
            try:
                # An empty cache, because a cached copy would be compared with itself.
                seen = load_split(repo_id, config_name, name, sha, token, place)
            except (ConnectionError, ValueError) as error:
                raise ConnectionError(f"it could not be read back ({error})") from error
            if difference := first_difference(table, seen):
                raise ValueError(f"{repo_id} at {sha}, split {name!r}, is not what was pushed: {difference}.")


def first_difference(expected: Dataset, seen: Dataset) -> str | None:
    """Return the first difference between two datasets in words, `None` if they are equal; NaN equals NaN."""
    if expected.features != seen.features:
        return f"the columns are {seen.features}, expected {expected.features}"
    if len(expected) != len(seen):
        return f"it has {len(seen)} rows, expected {len(expected)}"
    pair = [each.with_format("arrow").iter(BLOCK) for each in (expected, seen)]
    for number, (one, other) in enumerate(zip(*pair, strict=True)):
        # Arrow compares a block at once; only a block that differs is read row by row.
        if one.equals(other):
            continue
        for row, (wanted, found) in enumerate(zip(one.to_pylist(), other.to_pylist(), strict=True), BLOCK * number):
            for column in wanted:
                # NaN != NaN, but their representations are equal.
                if repr(wanted[column]) != repr(found[column]):
                    return f"row {row}, column {column!r}: {_short(found[column])}, expected {_short(wanted[column])}"
    return None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
