"""VERIFY: check whether a pushed selection, or one in a folder, is what its receipt says.

Does: load the source at its revision and compare every row; select again from the stored scores and clusters; score some
rows again on request. Names the first difference.
Does not: fit the clusters again, because their last digits differ between machines.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import Dataset

from car_datasets import repositories
from car_datasets.asking import asking
from car_datasets.cluster_fitting import number_of_clusters
from car_datasets.dataset_card import data_folder_of
from car_datasets.formatting import find_schema
from car_datasets.loading import open_dataset
from car_datasets.overview import positions_in_pool
from car_datasets.reading_back import first_difference, load_split
from car_datasets.receipt import RECEIPT_FILE, Receipt, counts_of, describe_source, indices_digest, pool_digest
from car_datasets.recipe import Recipe
from car_datasets.recipe_stages import select_by
from car_datasets.reporting import SelectionReport
from car_datasets.rescoring import Difference, score_again
from car_datasets.results import REPORT_FILE, read_report, read_result
from car_datasets.retrying import READING_WAITS
from car_datasets.selection import SELECTION_COLUMNS
from car_datasets.splits import SCORED


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
    """Check a selection against its receipt: its rows against the source, and its choice against its scores.

    Args:
        where (`str`): a folder that [`curate`] wrote, or a dataset repository that [`push_selection`] wrote.
        source (`str`, *optional*): the file or folder that was curated. Needed unless that was a Hub dataset, because a
            receipt has the name and digest of a file, but not its path.
        rescore (`int`): number of rows, drawn at random, to score again. Scores may differ by what the recipe's dtype
            allows (1e-5 in float32 and int8, 0.03 in bfloat16, 0.005 in float16).
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
    models = {"scorer": scorer, "engine": engine, "tokenizer": tokenizer}
    try:
        recipe = Recipe().changed(**found.receipt.recipe)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}, {RECEIPT_FILE}: its recipe cannot be read: {error}") from error
    checks = _Checks(found, recipe, token)
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


class _Found(NamedTuple):
    """A selection to verify, read from a folder or from a repository."""

    receipt: Receipt
    selected: Dataset
    scored: Dataset | None
    report: SelectionReport | None


def _open(
    where: str | os.PathLike[str], revision: str | None, config_name: str, split: str, token: str | None
) -> _Found:
    folder = Path(where).expanduser()
    if folder.is_dir():
        result = read_result(folder)
        return _Found(Receipt.read(folder), result.selected, result.scored, result.report)
    if folder.exists():
        raise ValueError(f"{str(where)!r} is a file; pass the folder that `car-datasets curate` wrote, or a Hub id.")
    repo_id = str(where)
    seen = repositories.read_repository(repo_id, revision, token, READING_WAITS)
    if RECEIPT_FILE not in seen.files:
        raise ValueError(
            f"{where} has no {RECEIPT_FILE}. Push a folder that `car-datasets curate` wrote: `car-datasets push` adds one."
        )
    with asking(repr(repo_id), "dataset", seen.sha):
        names = [name for name in (RECEIPT_FILE, REPORT_FILE) if name in seen.files]
        texts = {name: repositories.read_dataset_file(repo_id, name, seen.sha, token, READING_WAITS) for name in names}
    receipt = Receipt.from_json(texts[RECEIPT_FILE], f"{where}/{RECEIPT_FILE}")
    report = read_report(texts[REPORT_FILE], f"{where}/{REPORT_FILE}") if REPORT_FILE in texts else None
    start = f"{data_folder_of(config_name)}/{SCORED}-"
    has_pool = any(name.startswith(start) for name in seen.files)
    # Both splits and the receipt must be of one commit; a branch may move between two requests.
    selected = load_split(repo_id, config_name, split, seen.sha, token)
    scored = load_split(repo_id, config_name, SCORED, seen.sha, token) if has_pool else None
    return _Found(receipt, selected, scored, report)


@dataclass(frozen=True)
class _Checks:
    """The checks, in order. Each returns a sentence about what it compared, or raises a [`Difference`]."""

    found: _Found
    recipe: Recipe
    token: str | None
    skipped: list[str] = field(default_factory=list)

    def run(
        self, source: str | os.PathLike[str] | None, rescore: int, seed: int, models: dict[str, str | None]
    ) -> Iterator[str]:
        """Yield the sentence of one check after the other."""
        receipt, selected, scored, _ = self.found
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
        receipt, selected = self.found.receipt, self.found.selected
        name = self.recipe.index_column
        if name not in selected.column_names:
            raise Difference(f"the selected rows have no column {name!r}")
        if len(selected) != receipt.counts["selected"]:
            raise Difference(f"{len(selected)} rows are selected, by the receipt {receipt.counts['selected']}")
        if indices_digest(selected[name][:]) != receipt.selected_sha256:
            raise Difference("the source indices of the selected rows do not have the receipt's sha256")
        return f"{len(selected)} selected rows have the receipt's indices"

    def _settings(self) -> None:
        """Compare what the receipt says twice, since a changed recipe alone would go unnoticed."""
        receipt, recipe = self.found.receipt, self.recipe
        pairs = {"scorer.revision": (receipt.scorer["revision"], recipe.scorer_revision)}
        if recipe.embedder is not None:
            pairs["embedder.revision"] = (receipt.embedder["revision"], recipe.embedder_revision)
        for name, (seen, wanted) in pairs.items():
            if seen != wanted:
                raise Difference(f"by the receipt's {name} it is {seen!r}, by its recipe {wanted!r}")
        try:
            schema = find_schema(self.found.selected.column_names, recipe.schema, recipe.columns).name
        except ValueError as error:
            raise Difference(f"the selected rows have no text: {error}") from error
        if schema != receipt.schema:
            raise Difference(f"the rows have the schema {schema!r}, by the receipt {receipt.schema!r}")

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
            raise Difference(f"the source has the sha256 {seen['sha256']}, by the receipt {known['sha256']}")
        return opened

    def _same_rows(self, source: Dataset, table: Dataset, name: str) -> str:
        if name == SCORED and len(table) != self.found.receipt.counts["rows"]:
            raise Difference(f"{SCORED} has {len(table)} rows, by the receipt {self.found.receipt.counts['rows']}")
        missing = [column for column in source.column_names if column not in table.column_names]
        if missing:
            raise Difference(f"{name} has no column {missing} of the source")
        try:
            places = positions_in_pool(source, table, self.recipe.index_column)
            if len(twice := np.flatnonzero(np.bincount(places) > 1)):
                raise Difference(f"{name} holds the source's row at position {twice[0]} twice")
            same = table.select_columns(source.column_names).cast(source.features)
        except ValueError as error:  # Arrow's errors derive from it
            raise Difference(f"{name} does not fit the source: {error}") from error
        if difference := first_difference(source.select(places.tolist()), same):
            raise Difference(f"{name} is not what the source holds: {difference}")
        return f"{len(table)} rows of {name} are the source's"

    def _choice(self, scored: Dataset) -> str:
        selected, name = self.found.selected, self.recipe.index_column
        pool = scored.remove_columns([column for column in SELECTION_COLUMNS if column in scored.column_names])
        try:
            expected = select_by(self.recipe, pool)
        except ValueError as error:
            raise Difference(f"nothing can be selected from the scores: {error}") from error
        pairs = zip(selected[name][:], expected[name][:], strict=False)
        for row, (seen, wanted) in enumerate(pairs):
            if seen != wanted:
                raise Difference(f"selected, row {row}, is source row {seen}; by scores and clusters it is {wanted}")
        shared = [column for column in expected.column_names if column in selected.column_names]
        parts = [each.select_columns(shared) for each in (expected, selected)]
        if difference := first_difference(*parts):
            raise Difference(f"selected is not what scores and clusters give: {difference}")
        return f"scores and clusters of {len(scored)} rows give the same {len(selected)}, for the same reasons"

    def _counts(self, scored: Dataset) -> str:
        receipt, recipe = self.found.receipt, self.recipe
        try:
            report = SelectionReport.from_selection(scored, self.found.selected, names=recipe.names, seed=recipe.seed)
            k = number_of_clusters(recipe.k, report.rows_scored)
        except ValueError as error:
            raise Difference(f"nothing can be counted: {error}") from error
        for name, count in counts_of(report).items():
            if count != receipt.counts[name]:
                raise Difference(f"counts.{name} is {count!r}, by the receipt {receipt.counts[name]!r}")
        if report.clusters > k:
            raise Difference(f"the pool has {report.clusters} clusters, by the recipe k={k}")
        if report.clusters < k:  # possible in a true selection, when there are fewer distinct texts than k
            self.skipped.append(
                f"k: the pool has {report.clusters} clusters of k={k}; only fitting again could tell why"
            )
        if self.found.report is None:
            self.skipped.append(f"the seed: there is no {REPORT_FILE}")
        elif self.found.report.seed != recipe.seed:
            raise Difference(f"{REPORT_FILE} has the seed {self.found.report.seed}, by the recipe it is {recipe.seed}")
        return f"the receipt's counts are those of {len(scored)} rows"

    def _digest(self, scored: Dataset) -> str:
        if pool_digest(scored, self.recipe.names) != self.found.receipt.scored_sha256:
            raise Difference(f"indices, scores and clusters of {SCORED} do not have the receipt's sha256")
        return f"indices, scores and clusters of {len(scored)} rows have the receipt's sha256"
