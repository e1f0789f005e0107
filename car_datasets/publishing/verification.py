"""Check whether a selection, pushed or in a folder, is what its receipt says.

Does: compare files and columns with their digests; load the source at its revision and compare every row; select again
from the stored scores, clusters and marks. Names every difference, and what it did not check.
Does not: push; run models, which `rescoring` does; fit the clusters again, because their last digits differ between
machines.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset

from car_datasets.choosing import select_by
from car_datasets.clustering.fitting import number_of_clusters
from car_datasets.loading.files import is_address
from car_datasets.loading.hub_datasets import load_split
from car_datasets.loading.schemas import find_schema
from car_datasets.loading.sources import Origin, number_rows, open_rows, source_numbers
from car_datasets.publishing.card import SCORED, data_prefix
from car_datasets.publishing.comparing import OLD, PARTS, labels_of, places_of
from car_datasets.publishing.rescoring import Difference, Rescoring
from car_datasets.receipt import (
    RECEIPT_FILE,
    TOPPED_UP,
    Receipt,
    counts_of,
    describe_source,
    mark_counts,
    pool_digest,
    reading_of,
)
from car_datasets.recipe import Recipe
from car_datasets.reporting.overview import positions_in_pool
from car_datasets.reporting.report import SelectionReport
from car_datasets.results import (
    README_FILE,
    REPORT_FILE,
    RESULT_FILES,
    compare_columns,
    compare_files,
    files_of,
    first_other_figure,
    read_report,
    read_result,
)
from car_datasets.scoring.named import ScorerName
from car_datasets.selection.marks.exclusions import DROPPED, KEEP, pinned_values
from car_datasets.selection.marks.pins import read_flags
from car_datasets.selection.rule import SELECTION_COLUMNS
from car_datasets.utils import hub
from car_datasets.utils.digests import first_difference, indices_digest
from car_datasets.utils.files import user_path
from car_datasets.utils.hub import READING_WAITS, asking
from car_datasets.utils.settings import CONFIG_NAME, SPLIT


class Verification(NamedTuple):
    """The outcome of [`verify`].

    Args:
        checked (`tuple[str, ...]`): the checks that passed, in words.
        skipped (`tuple[str, ...]`): what was not checked, and why.
        differences (`tuple[str, ...]`): first all that do not have their digests, then the first row, setting or count
            that differs from what it should be, at which the checks stopped; empty if all checks passed.
    """

    checked: tuple[str, ...]
    skipped: tuple[str, ...]
    differences: tuple[str, ...]

    @property
    def difference(self) -> str | None:
        """Return the difference that says most, the last one, or `None` if there is none."""
        return self.differences[-1] if self.differences else None

    @property
    def matches(self) -> bool:
        """Return True if no difference was found."""
        return not self.differences


def verify(
    where: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | Sequence[str | Path] | None = None,
    rescore: int = 0,
    seed: int = 0,
    scorer: str | None = None,
    engine: str | None = None,
    tokenizer: str | None = None,
    embedder: str | None = None,
    revision: str | None = None,
    config_name: str = CONFIG_NAME,
    split: str = SPLIT,
    token: str | None = None,
) -> Verification:
    """Check a selection against its receipt: its files, its rows against the source, its choice against its scores.

    A receipt is no signature: it shows that files and rows belong together, not who wrote them. Who changes a result
    can write a receipt that fits it, except for what the source and the models, which are read anew, do not give.

    Args:
        where (`str`): a folder that [`curate`] wrote, or a dataset repository that [`push_selection`] wrote.
        source (`str` or a list, *optional*): the file, the files or the folder that was curated. Needed unless that was
            a Hub dataset, because a receipt has the name and digest of a file, but not its path.
        rescore (`int`): number of rows, drawn at random, to score and embed again. Scores may differ by what the recipe's
            dtype allows (1e-5 in float32 and int8, 0.08 in bfloat16, 0.008 in float16, 0.5 in float8); those of other
            kinds of scorers by 2e-4 in float32, and relatively where they exceed 1.
        seed (`int`): seed of that draw.
        scorer, engine, tokenizer (`str`, *optional*): folders of the models, for `rescore`; needed if they were folders
            when the rows were curated. They are compared by digest.
        embedder (`str`, *optional*): the same for the embedder, which is not checked without it.
        revision (`str`, *optional*): branch, tag or commit of the repository.
        config_name, split (`str`): configuration and split of the repository that hold the selected rows.
        token (`str`, *optional*): for private repositories; never stored.

    Returns:
        [`Verification`]: the checks that passed, what was not checked, and the differences.

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
    models = {"scorer": scorer, "engine": engine, "tokenizer": tokenizer, "embedder": embedder}
    try:
        # `changed` checks names and types: a receipt from the Hub may have been edited by hand.
        settings = dict(receipt.recipe)
        if settings.get("budget") is not None:  # earlier versions wrote an n1 next to it, and did not read it
            settings["n1"] = None
        # A receipt without this key was made before rows were marked, and then all could be selected.
        settings.setdefault("duplicates", "keep")
        recipe = Recipe().changed(**settings)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}, {RECEIPT_FILE}: its recipe cannot be read: {error}") from error
    checks = _Checks(found, receipt, recipe, token)
    checks.digests()
    try:
        for words in checks.run(source, Rescoring(receipt, recipe, rescore, seed, models, token)):
            checks.passed.append(words)
    except Difference as error:
        checks.differences.append(str(error))
        checks.skipped.append("what comes after the last difference: the rows, the choice, the counts or the models")
    if found.scored is None and not checks.differences:
        checks.skipped.append(f"the choice, the counts and the pool: there is no split {SCORED!r}")
    return Verification(tuple(checks.passed), tuple(checks.skipped), tuple(checks.differences))


class _Found(NamedTuple):
    """A selection as it lies in a folder or a repository.

    Args:
        selected (`Dataset`), scored (`Dataset`, *optional*): its rows and their pool.
        report ([`SelectionReport`], *optional*), receipt ([`Receipt`]): its figures and its receipt.
        files (`Mapping[str, str]`): sha256 of the files that the receipt names, as far as they are there.
        others (`Sequence[str]`): files that it does not name.
        pushed (`bool`): True in a repository, which has some of the files, and the rows in files of its own.
    """

    selected: Dataset
    scored: Dataset | None
    report: SelectionReport | None
    receipt: Receipt
    files: Mapping[str, str]
    others: Sequence[str]
    pushed: bool


def _open(
    where: str | os.PathLike[str], revision: str | None, config_name: str, split: str, token: str | None
) -> _Found:
    """Read a selection and its receipt from a folder or a repository."""
    folder = user_path(where)
    if folder.is_dir():
        result = read_result(folder)
        receipt = Receipt.read(folder)
        files, others = files_of(folder, receipt)
        return _Found(result.selected, result.scored, result.report, receipt, files, others, pushed=False)
    if folder.exists():
        raise ValueError(f"{str(where)!r} is a file; pass the folder that `car-datasets curate` wrote, or a Hub id.")
    repo_id = str(where)
    seen = hub.read_repository(repo_id, revision, token, READING_WAITS)
    if RECEIPT_FILE not in seen.files:
        raise ValueError(
            f"{where} has no {RECEIPT_FILE}. Push a folder that `car-datasets curate` wrote: `car-datasets push` adds "
            "one."
        )

    def read(names: Iterable[str]) -> dict[str, bytes]:
        with asking(repr(repo_id), "dataset", seen.sha):
            return {
                n: hub.read_dataset_file(repo_id, n, seen.sha, token, READING_WAITS) for n in names if n in seen.files
            }

    texts = read((RECEIPT_FILE, REPORT_FILE))
    receipt = Receipt.from_json(texts[RECEIPT_FILE], f"{where}/{RECEIPT_FILE}")
    report = read_report(texts[REPORT_FILE], f"{where}/{REPORT_FILE}") if REPORT_FILE in texts else None
    has_pool = any(name.startswith(data_prefix(config_name, SCORED)) for name in seen.files)
    # Both splits and the receipt must be of one commit; a branch may move between two requests.
    selected = load_split(repo_id, config_name, split, seen.sha, token)
    scored = load_split(repo_id, config_name, SCORED, seen.sha, token) if has_pool else None
    # The card has the name of the folder's README. Of other names nothing is fetched, whatever a receipt says.
    texts |= read(name for name in RESULT_FILES if name in receipt.files and name not in (*texts, README_FILE))
    files = {name: hashlib.sha256(text).hexdigest() for name, text in texts.items() if name in receipt.files}
    read_here = tuple(data_prefix(config_name, name) for name in (split, SCORED))
    others = [n for n in seen.files if n not in (*files, RECEIPT_FILE) and not n.startswith((".", *read_here))]
    return _Found(selected, scored, report, receipt, files, others, pushed=True)


@dataclass(frozen=True)
class _Checks:
    """The checks, in order. Those of `run` return a sentence about what they compared, or raise a [`Difference`]."""

    found: _Found
    receipt: Receipt
    recipe: Recipe
    token: str | None
    passed: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)

    def digests(self) -> None:
        """Compare the receipt, the files and the columns with the digests in the receipt, and note every difference."""
        receipt, found = self.receipt, self.found
        if receipt.format == 1:
            self.skipped.append(OLD)
            return
        if receipt.digest() != receipt.sha256:
            self.differences.append(f"{RECEIPT_FILE} does not have its own sha256: it was changed after it was written")
        compared = [compare_files(receipt, found.files, found.others, found.pushed)]
        for name, table in {"selected": found.selected, SCORED: found.scored}.items():
            if table is not None:
                compared.append(compare_columns(receipt, name, table, found.pushed, found.scored is not None))
        self.differences.extend(words for each in compared for words in each.differences)
        self.skipped.extend(words for each in compared for words in each.skipped)
        if not self.differences:
            counts = f"{compared[0].number} files and {sum(each.number for each in compared[1:])} columns"
            self.passed.append(f"the receipt, {counts} have the receipt's sha256 (which is no signature)")

    def run(self, source: str | os.PathLike[str] | Sequence[str | Path] | None, rescoring: Rescoring) -> Iterator[str]:
        """Yield the sentence of one check after the other."""
        receipt, selected, scored = self.receipt, self.found.selected, self.found.scored
        yield self._indices()
        self._settings()
        if receipt.source["kind"] == TOPPED_UP:
            self.skipped.append(PARTS)
        else:
            rows = self._open_source(source)
            yield f"the source is the receipt's ({receipt.source['kind']})"
            tables = {"selected": selected, SCORED: scored}.items()
            yield from (self._same_rows(rows, table, name) for name, table in tables if table is not None)
        if scored is not None:
            yield self._choice(scored)
            self._marks(scored)
        if rescoring.count:
            yield from rescoring.run(selected if scored is None else scored, self.skipped)
        else:
            self.skipped.append(
                f"the models: scores, token counts and embeddings, the scorer {self.recipe.scorer!r} (weights, "
                f"revision, template, dtype) and the embedder {receipt.embedder['model_id']!r}; `verify --rescore N` "
                "checks them on N rows"
            )
        self.skipped.append(
            "whether the clusters and distances follow from the embeddings, the versions, and settings that leave no "
            "trace in the rows (such as n_init and batch_tokens): only the receipt tells them"
        )
        if scored is not None:  # last, because unlike the others these cannot name the row that differs
            report = self._report(scored)
            yield self._counts(report, scored)
            yield self._digest(scored)
            if self.found.report is not None:
                yield self._figures(report)

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
        if receipt.format > 1:
            pairs["scorer.model_id"] = (str(ScorerName.of_record(receipt.scorer)), recipe.scorer)
            if recipe.embedder is not None:
                pairs["embedder.model_id"] = (receipt.embedder["model_id"], recipe.embedder)
            if recipe.template is not None:
                pairs["template"] = (receipt.template, recipe.template)
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
            opened, origin = open_rows(known["id"], reading._replace(revision=known.get("revision")))
            self._same_files(describe_source(origin, opened, self.recipe), source)
            return self._numbered(opened)
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
        if known["kind"] == "hub":
            self.skipped.append(f"that {source} is the dataset {known['id']!r}: only its rows are compared")
        elif known["kind"] == seen["kind"]:
            self._same_files(seen, source)
        return self._numbered(opened)

    def _same_files(self, seen: Mapping[str, Any], source: object) -> None:
        """Compare what the receipt says about single files of a source whose digest, or commit, is the receipt's."""
        known = self.receipt.source
        # The names of several files are relative to the folder that all are in, which may be another one here.
        named = known["kind"] in ("hub", "folder")
        pairs = [[(f["sha256"], f["name"] if named else "") for f in each.get("files", ())] for each in (seen, known)]
        if "files" in known and "files" in seen and pairs[0] != pairs[1]:
            raise Difference(f"the source has the files {seen['files']}; the receipt says {known['files']}")
        if seen.get("name") != known.get("name"):
            told = f"the receipt says {known.get('name')!r}, and the rows are in {str(source)!r}, with the same sha256"
            self.skipped.append(f"the source's name: {told}")

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
            places = places_of(source, table) if by_content else positions_in_pool(source, table, index)
            if len(twice := np.flatnonzero(np.bincount(places) > 1)):
                raise Difference(f"{name} holds the source's row at position {twice[0]} twice")
            for column, names in labels_of(source).items():
                if labels_of(table).get(column, names) != names:
                    raise Difference(f"{name} names the labels of {column!r} otherwise than the source, {names}")
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
        self._reasons(scored)
        return f"scores and clusters of {len(scored)} rows give the same {len(selected)}, for the same reasons"

    def _marks(self, scored: Dataset) -> None:
        """Check the marks by which rows are left out or kept, as far as the pool alone tells, and note the rest."""
        recipe, names = self.recipe, self.recipe.names
        if recipe.marking != "keep" and names.duplicate_of in scored.column_names:
            others = scored[names.duplicate_of][:]
            kept = {index for index, other in zip(scored[names.index][:], others, strict=True) if other is None}
            if wrong := [row for row, other in enumerate(others) if other is not None and other not in kept]:
                seen = others[wrong[0]]
                raise Difference(f"{SCORED}, row {wrong[0]}, is a copy of {seen!r}, which is not a row that was kept")
        for word, column in ((KEEP, recipe.keep), (DROPPED, recipe.drop)):
            if column is not None and column in scored.column_names:
                wanted = read_flags(scored, column, word)
                if len(wrong := np.flatnonzero(wanted != (pinned_values(scored) == word)).tolist()):
                    raise Difference(f"{SCORED}, row {wrong[0]}, column {names.pinned!r}, is not what {column!r} says")
        self.skipped.extend(_not_checked(recipe, scored.column_names))

    def _reasons(self, scored: Dataset) -> None:
        """Compare the columns that a pushed pool has of the selection, which are null for rows that were not selected."""
        positions = positions_in_pool(scored, self.found.selected, self.recipe.index_column).tolist()
        for column in [name for name in SELECTION_COLUMNS if name in scored.column_names]:
            wanted = dict(zip(positions, self.found.selected[column][:], strict=True))
            for row, seen in enumerate(scored[column][:]):
                if seen != wanted.get(row):
                    raise Difference(f"{SCORED}, row {row}, column {column!r}: {seen!r}, expected {wanted.get(row)!r}")

    def _report(self, scored: Dataset) -> SelectionReport:
        names, seed = self.recipe.names, self.recipe.seed
        try:
            schema = find_schema(scored.column_names, self.recipe.schema, self.recipe.columns)
            report = SelectionReport.from_selection(scored, self.found.selected, names=names, seed=seed, schema=schema)
            number_of_clusters(self.recipe.k, report.rows_scored)
            return report
        except ValueError as error:
            raise Difference(f"nothing can be counted: {error}") from error

    def _counts(self, report: SelectionReport, scored: Dataset) -> str:
        receipt, recipe = self.receipt, self.recipe
        k = number_of_clusters(recipe.k, report.rows_scored)
        marks = {"excluded": None, "pinned": None} | mark_counts(scored, recipe)  # keys that a receipt may not have
        for name, count in (counts_of(report) | marks).items():
            if count != (known := receipt.counts.get(name)):
                raise Difference(f"counts.{name} is {count!r}; the receipt says {known!r}")
        if report.clusters > k:
            raise Difference(f"the pool has {report.clusters} clusters; the recipe says k={k}")
        if report.clusters < k:  # possible in a true selection, when there are fewer distinct texts than k
            self.skipped.append(f"k: there are {report.clusters} clusters of k={k}; only fitting again could tell why")
        if self.found.report is None:
            self.skipped.append(f"the seed: there is no {REPORT_FILE}")
        elif self.found.report.seed != recipe.seed:
            raise Difference(f"{REPORT_FILE} has the seed {self.found.report.seed}; the recipe says {recipe.seed}")
        return f"the receipt's counts are those of {report.rows_in} rows"

    def _figures(self, report: SelectionReport) -> str:
        seen, has_languages = self.found.report, bool(self.recipe.names.language)
        if seen is not None and (words := first_other_figure(report, seen, has_languages)):
            raise Difference(f"{REPORT_FILE} has {words}")
        return f"the figures of {REPORT_FILE} are those of the rows"

    def _digest(self, scored: Dataset) -> str:
        if pool_digest(scored, self.recipe.names) != self.receipt.scored_sha256:
            raise Difference(f"indices, scores and clusters of {SCORED} do not have the receipt's sha256")
        return f"indices, scores and clusters of {len(scored)} rows have the receipt's sha256"


def _not_checked(recipe: Recipe, columns: Sequence[str]) -> Iterator[str]:
    """Yield what the marks of rows depend on, and a result does not hold."""
    if recipe.marking != "keep" and recipe.names.duplicate_of in columns:
        yield "duplicates: whether the rows that are marked, and no others, resemble the rows that are kept"
    if recipe.against:
        yield f"contamination: the evaluation sets {', '.join(recipe.against)} are not part of a result"
    for word, name in (("keep", recipe.keep), ("drop", recipe.drop), ("like", recipe.like)):
        if name is not None and (word == "like" or name not in columns):
            yield f"{word}: the rows of {name} are not part of a result"
    if recipe.budget_tokenizer is not None:
        yield f"the token counts: the tokenizer {recipe.budget_tokenizer} is not part of a result"
    if recipe.rule == "gain":
        yield "the memberships in near clusters: only fitting again could tell them"


_WHAT = {"memory": "a dataset in memory", "files": "several files"}
