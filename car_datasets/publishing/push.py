"""Push a selection with its card and its receipt to the Hub, in one commit.

Does: check token, owner and visibility before anything is written; give all splits the same columns; write Parquet;
commit splits, card, receipt, report and plots at once, retrying on transient errors.
Does not: use `Dataset.push_to_hub`, which makes a commit of every 50 files and fails when another push comes in
between.

The card and the receipt would need further commits. Here a reader sees all of a push, or nothing of it.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from datasets import Dataset, Features
from huggingface_hub import DatasetCard

from car_datasets.publishing.card import (
    END,
    SCORED,
    SplitFiles,
    Target,
    check_header,
    data_prefix,
    describe,
    forget,
    merge_header,
    place_of,
    read_header,
    render_section,
    stale_files,
    with_section,
)
from car_datasets.publishing.comparing import compare_pushed
from car_datasets.publishing.conflicts import ExistingSelection, refuse_second_selection
from car_datasets.receipt import RECEIPT_FILE, Receipt
from car_datasets.recipe import Recipe
from car_datasets.reporting.overview import CONTROLS, draw_controls, positions_in_pool, row_lengths
from car_datasets.reporting.report import SelectionReport
from car_datasets.results import (
    PLOTS_FOLDER,
    REPORT_FILE,
    SCORED_TABLE,
    SELECTED_TABLE,
    Result,
    compare_folder,
    read_result,
)
from car_datasets.utils import hub
from car_datasets.utils.column_names import ColumnNames
from car_datasets.utils.columns import join_columns, read_numbers
from car_datasets.utils.files import private_folder, write_whole
from car_datasets.utils.hub import Pushed, Repository, reason
from car_datasets.utils.settings import CONFIG_NAME, SEED, SPLIT

SHARD_BYTES = 500_000_000  # in memory; about the size that push_to_hub gives its files
MOST_SHARDS = 50  # data files of one commit, for all its splits together


def push_selection(
    dataset: Dataset | str | os.PathLike[str],
    repo_id: str,
    *,
    scored: Dataset | None = None,
    report: SelectionReport | None = None,
    receipt: Receipt | None = None,
    split: str = SPLIT,
    also: Sequence[str] | None = None,
    private: bool = True,
    config_name: str = CONFIG_NAME,
    embeddings: bool = False,
    check: bool = False,
    token: str | None = None,
) -> Pushed:
    """Push a selection with its card and its receipt, in one commit.

    If the push is interrupted, make the same call again to resume; if it was complete, the call changes nothing.

    Example:
    ```python
    >>> curate("alpaca_data.json", "out", n1=1000)
    >>> url, sha = push_selection("out", "me/alpaca-car")
    ```

    Args:
        dataset (`Dataset` or `str`): the selected rows, or the folder that [`curate`] wrote. With a folder, the next
            three arguments are read from it.
        repo_id (`str`): `"owner/name"` of a dataset repository; created if it does not exist.
        scored (`Dataset`, *optional*): the pool that the rows were selected from, for more splits.
        report ([`SelectionReport`], *optional*), receipt ([`Receipt`], *optional*): of the selection, for the card.
        split (`str`): name of the split that holds the selected rows.
        also (`Sequence[str]`, *optional*): more splits, out of `"scored"` (the entire pool), `"random_control"` and
            `"length_matched_control"`. Defaults to `"scored"` if there is a pool, because [`verify`] selects from it
            again.
        private (`bool`): visibility of the repository; an existing repository must have this visibility.
        config_name (`str`): configuration of the splits. All splits of a configuration have the same columns.
        embeddings (`bool`): push the embeddings of the pool as well.
        check (`bool`): read everything back from the commit and compare it row by row.
        token (`str`, *optional*): defaults to that of `HF_TOKEN` or `hf auth login`; never stored.

    Returns:
        [`Pushed`]: `(url, sha)`, the repository's page and the commit.

    Raises:
        ValueError: there are no rows, a name is invalid, token, owner or visibility do not permit the push, or the
            repository could not be loaded or verified after it (in all these cases nothing was committed); or the Hub
            refuses the upload; or the repository was made public while the push ran (the message says whether rows
            were committed, and where).
        ConnectionError: the Hub does not answer. Nothing is visible there, and the same call resumes; or, with `check`,
            the rows were pushed and cannot be read back, and the message has URL and commit.
    """
    _refuse_bad_names(split, config_name, also or ())
    result = _result(dataset, scored, report, receipt)
    if also is None:
        also = () if result.scored is None else (SCORED,)
    with private_folder("push") as place:  # first, as the cache may be one that cannot be written
        # Before the shards are written, which takes minutes for a large pool.
        hub.open_repository(repo_id, private, token, "dataset", "repo_id")
        tables = _tables(result, split, also, embeddings)
        source_card = None if result.receipt is None else _source_card(result.receipt.source, token)
        # At least 12, since there are four splits at most.
        most = MOST_SHARDS // len(tables)
        written = {name: _write_shards(table, place, config_name, name, most) for name, table in tables.items()}
        files = {name: place / name for each in written.values() for name in each.names}
        files |= {f"{PLOTS_FOLDER}/{plot.name}": plot for plot in result.plots}
        push = Push(Target(repo_id, config_name, split), tables[split].features, written, result, source_card)

        # Called by `commit_dataset` with the state that the commit is made on, again if another push came in between.
        def finish(repository: Repository) -> tuple[dict[str, bytes], list[str]]:
            hub.refuse_visibility(repo_id, private, token, "dataset", "repo_id")
            plan = _plan(push, repository, token)
            return {**plan.files, "README.md": plan.card.encode()}, plan.deletions

        try:
            done = hub.commit_dataset(repo_id, files, finish, f"Upload {', '.join(tables)}", token)
        except ConnectionError as error:
            raise ConnectionError(
                f"{str(error).rstrip('.')}. Nothing is visible in {repo_id}; run the same command again to resume."
            ) from error
        except (OSError, RuntimeError) as error:
            raise ValueError(f"repo_id={repo_id!r}: the Hub refuses the upload ({reason(error)}).") from error
    # The upload may take hours, and anyone with the right to do so may make the repository public meanwhile.
    with hub.pushed_anyway(f"{done.url}, commit {done.sha}"):
        hub.refuse_visibility(repo_id, private, token, "dataset", "repo_id")
    if check:
        try:
            compare_pushed(repo_id, done.sha, tables, config_name, token)
        except ConnectionError as error:
            raise ConnectionError(f"Pushed to {done.url}, commit {done.sha}, but {error}.") from error
    return done


def _refuse_bad_names(split: str, config_name: str, also: Sequence[str]) -> None:
    if not re.fullmatch(r"\w+(\.\w+)*", split):
        raise ValueError(f"split={split!r}: use letters, digits and underscores, with dots between them.")
    if split == "all":
        raise ValueError("split='all': `datasets` reserves that name for all splits together; choose another.")
    refuse_split_names(split, also)
    if not re.fullmatch(r"\w[\w.-]*", config_name) or config_name in ("data", PLOTS_FOLDER):
        raise ValueError(
            f"config_name={config_name!r} cannot be the name of a configuration and its folder; choose another, as "
            "'car'."
        )


def refuse_split_names(split: str, also: Sequence[str]) -> None:
    """Raise ValueError for names of splits that cannot be, before anything is read or requested.

    Raises:
        ValueError: `also` is one string or holds an unknown name, or `split` is the name of the pool or of a control,
            which would then be taken for the selection.
    """
    known = (SCORED, *CONTROLS)
    if isinstance(also, str):
        raise ValueError(f"also={also!r} is one text, and a list of names is needed: also=[{also!r}].")
    if not set(also) <= set(known):
        raise ValueError(f"also={tuple(also)}: choose out of {known}.")
    if split in known:
        raise ValueError(
            f"split={split!r} is the name of the pool or of a control, which also= adds. Give the selected rows "
            "another name, such as split='selected' (--split selected)."
        )


def _result(dataset: object, scored: Dataset | None, report: SelectionReport | None, receipt: Receipt | None) -> Result:
    if isinstance(dataset, (str, os.PathLike)):
        result = read_result(Path(dataset))
        _refuse_changed(Path(dataset), result)
    elif isinstance(dataset, Dataset):
        result = Result(dataset, scored, report, receipt)
    else:
        raise ValueError(
            f"dataset is {type(dataset).__name__}; pass one Dataset of the selected rows (dataset['train'] of a "
            "DatasetDict, Dataset.from_list(list(dataset)) of an IterableDataset), or the folder that `car-datasets "
            "curate` wrote."
        )
    if not len(result.selected) or not result.selected.column_names:
        lacking = "columns" if not result.selected.column_names else "rows"
        raise ValueError(
            f"dataset has no {lacking}, and a split without {lacking} cannot be loaded. Select some first."
        )
    return result


def _refuse_changed(folder: Path, result: Result) -> None:
    """Raise ValueError if what is pushed of a folder is not what its receipt says, which goes with it."""
    assert result.receipt is not None
    pushed = (SELECTED_TABLE, SCORED_TABLE, REPORT_FILE, RECEIPT_FILE, f"{PLOTS_FOLDER}/")
    changed = [words for words in compare_folder(folder, result.receipt).differences if words.startswith(pushed)]
    if changed:
        raise ValueError(
            f"dataset={str(folder)!r} is not as `car-datasets curate` wrote it: {'; '.join(changed[:5])}. Curate again, "
            "or push rows that you have changed as a Dataset, without the receipt: push_selection(dataset, repo_id)."
        )


def _tables(result: Result, split: str, also: Sequence[str], embeddings: bool) -> dict[str, Dataset]:
    recipe = {} if result.receipt is None else result.receipt.recipe
    # The names of columns alone: another version's receipt may hold settings that this one does not know.
    names = Recipe().changed(**{name: value for name, value in recipe.items() if name.endswith("_column")}).names
    return selection_splits(
        result.selected,
        result.scored,
        also,
        split=split,
        names=names,
        left_out=None if embeddings else names.embedding,
        seed=SEED if result.report is None else result.report.seed,
    )


def selection_splits(
    selected: Dataset,
    scored: Dataset | None,
    also: Sequence[str] = (),
    *,
    split: str = SPLIT,
    names: ColumnNames = ColumnNames(),
    left_out: str | None = ColumnNames.embedding,
    seed: int = SEED,
) -> dict[str, Dataset]:
    """Return a selection as a split, and further splits, all with the same columns and types.

    In `scored` and the controls, columns that only the selection has (`selected_by`, ...) are null for rows that were
    not selected; `selected` gets the columns that only the pool has.

    Args:
        selected (`Dataset`), scored (`Dataset`, *optional*): the selected rows and their pool, from [`curate`].
        also (`Sequence[str]`): further splits, out of `"scored"`, `"random_control"` and `"length_matched_control"`.
        split (`str`): name of the split of `selected`.
        names ([`ColumnNames`]): the names of the added columns.
        left_out (`str`, *optional*): a column of `scored` to leave out if `selected` does not have it.
        seed (`int`): seed of the controls; with that of a report they are the rows that the report measured.

    Returns:
        `dict[str, Dataset]`: split to its rows.

    Raises:
        ValueError: a split is unknown, has the name of another or needs `scored`, or a selected row is not in the pool.
    """
    refuse_split_names(split, also)
    selected = selected.with_format(None)
    if scored is None:
        if also:
            raise ValueError(f"also={tuple(also)} need the scored pool: pass scored=...")
        return {split: selected}
    # Rows are matched by this index: the selection is a part of the pool in another order.
    scored = _pool_columns(scored, selected, names.index, left_out)
    positions = positions_in_pool(scored, selected, names.index)
    added = [name for name in selected.column_names if name not in scored.column_names]
    pool = _with_columns_of(scored, selected, positions, added)
    rest = [name for name in scored.column_names if name not in selected.column_names]
    # The order of the selection, so that it looks the same with and without the pool.
    order = [*selected.column_names, *rest]
    features = Features({name: pool.features[name] for name in order})
    filled = selected if not rest else join_columns(selected, pool.select(positions.tolist()).select_columns(rest))
    splits = {split: filled, SCORED: pool}
    if set(also) & set(CONTROLS):
        # Only scored rows may be drawn, as in the report; a selection could not have had the others.
        scores = read_numbers(pool, names.score, np.nan)
        lengths = row_lengths(scored, names)[0]
        drawn = draw_controls(lengths, positions, np.flatnonzero(~np.isnan(scores)), seed)
        splits |= {name: pool.select(rows.tolist()) for name, rows in zip(CONTROLS, drawn, strict=True)}
    return {name: splits[name].select_columns(order).cast(features) for name in (split, *also)}


def _pool_columns(scored: Dataset, selected: Dataset, index_column: str, left_out: str | None) -> Dataset:
    """Return the pool with a row index, and without the column that is left out."""
    scored = scored.with_format(None)
    if left_out in scored.column_names and left_out not in selected.column_names:
        scored = scored.remove_columns(left_out)
    if index_column not in scored.column_names:
        scored = scored.add_column(index_column, np.arange(len(scored), dtype=np.int64))
    return scored


def _with_columns_of(pool: Dataset, selected: Dataset, positions: npt.NDArray[np.int64], names: list[str]) -> Dataset:
    """Return the pool with further columns of its selected rows, null for the others."""
    if not names:
        return pool
    # places[i] is the row of `selected` that row i of the pool is, or -1; Arrow takes a null for a masked place.
    places = np.full(len(pool), -1, dtype=np.int64)
    places[positions] = np.arange(len(positions))
    taken = pa.array(places, mask=places < 0)
    table = selected.select_columns(names).with_format("arrow")[:]
    columns: dict[str, Any] = {name: table[name].combine_chunks().take(taken) for name in names}
    features = Features({name: selected.features[name] for name in names})
    return join_columns(pool, Dataset(pa.table(columns, schema=features.arrow_schema)))


def _write_shards(table: Dataset, place: Path, config_name: str, split: str, most: int) -> SplitFiles:
    """Write a split as Parquet files, `most` at most."""
    # Equal rows give equal bytes, so the Hub is not sent again what it has.
    # A selection shares the table of its pool, so `data.nbytes` counts all rows of the pool.
    size = int(table.data.nbytes * len(table) / max(1, len(table.data)))
    count = max(1, min(most, len(table), math.ceil(size / SHARD_BYTES)))
    names = [f"{data_prefix(config_name, split)}{i:05d}-of-{count:05d}.parquet" for i in range(count)]
    for i, name in enumerate(names):
        (place / name).parent.mkdir(exist_ok=True)
        # Contiguous, so that the files in the order of their names give the rows in order.
        write_whole(place / name, table.shard(count, i, contiguous=True).to_parquet, most=size // count)
    return SplitFiles(names, len(table), size, sum((place / name).stat().st_size for name in names))


def _source_card(source: Mapping[str, Any], token: str | None) -> str | None:
    """Read the card of the dataset that rows come from, for its licence; return `None` if it is not available."""
    if source.get("kind") != "hub":
        return None
    try:
        return hub.read_repository(source["id"], source["revision"], token).card
    # The source may be private or gone; the card then names no licence.
    except (ValueError, OSError):
        return None


class Case(Enum):
    """The meaning of a push for the selection that the repository already holds, according to its `receipt.json`."""

    FIRST = "no receipt is there"
    SAME = "the selection already in the repository"
    RESCORED = "the selected rows that are there, in the same split, chosen from other scores or with other settings"
    REPLACES = "other rows, in the split of the selection already in the repository"
    ALONGSIDE = "rows without receipt and report, in another split than the selection already in the repository"
    REFUSED = "another selection, in another split than the selection already in the repository"


@dataclass(frozen=True)
class Push:
    """The content of a push, as far as it does not depend on the repository.

    Args:
        target ([`Target`]): repository, configuration and split of the selected rows.
        features (`Features`): the columns of all splits.
        splits (`Mapping`): split to its files.
        result ([`Result`]): the selection.
        source_card (`str`, *optional*): the card of the dataset that the rows come from.
    """

    target: Target
    features: Features
    splits: Mapping[str, SplitFiles]
    result: Result
    source_card: str | None

    def case_in(self, repository: Repository, existing: ExistingSelection | None) -> Case:
        """Return what this push means for the selection in a repository.

        Args:
            repository ([`Repository`]): its files and its card.
            existing ([`ExistingSelection`], *optional*): the selection whose receipt it holds.
        """
        receipt = self.result.receipt
        # Rows without a description of their own leave receipt, report and card of another selection as they are.
        bare = receipt is None and self.result.report is None
        replaces = self._replaces_selection(repository)
        if existing is None:
            described = _descriptions(repository) and END in repository.card
            return Case.ALONGSIDE if bare and not replaces and described else Case.FIRST
        # The same rows with other scores: an old pool or control would not fit the new receipt.
        if existing.is_of(receipt):
            return Case.RESCORED if replaces and not existing.has_scores_of(receipt) else Case.SAME
        if replaces:
            return Case.REPLACES
        return Case.ALONGSIDE if bare else Case.REFUSED

    def _replaces_selection(self, repository: Repository) -> bool:
        place = place_of(repository.card)
        if place is not None:
            return place == (self.target.config_name, self.target.split)
        # The card may have lost our section; then the names of the files tell.
        start = data_prefix(self.target.config_name, self.target.split)
        return any(name.startswith(start) for name in repository.files)


def _plan(push: Push, repository: Repository, token: str | None) -> PushPlan:
    """Plan a push with what has to be asked of the Hub: the receipt that is there, and the card of its source."""
    existing = old_source_card = None
    if RECEIPT_FILE in repository.files:
        receipt = hub.read_dataset_file(push.target.repo_id, RECEIPT_FILE, repository.sha, token)
        existing = ExistingSelection.read(receipt, place_of(repository.card))
        if _source_changes(push.case_in(repository, existing), existing, push.result.receipt):
            old_source_card = _source_card(existing.source, token)
    return plan_push(push, repository, existing, old_source_card)


class PushPlan(NamedTuple):
    """The content of a commit in addition to the data.

    Args:
        case ([`Case`]): what the push means for the selection already in the repository.
        card (`str`): the new card.
        files (`dict[str, bytes]`): name to content of receipt and report.
        deletions (`list[str]`): files that the commit deletes.
    """

    case: Case
    card: str
    files: dict[str, bytes]
    deletions: list[str]


def plan_push(
    push: Push, repository: Repository, existing: ExistingSelection | None, old_source_card: str | None = None
) -> PushPlan:
    """Decide what a commit adds, changes and deletes in addition to the data; sends no requests.

    Args:
        push ([`Push`]): what is pushed.
        repository ([`Repository`]): what the repository holds.
        existing ([`ExistingSelection`], *optional*): the selection whose receipt it holds.
        old_source_card (`str`, *optional*): the card of that selection's source, if that is another than the push's.

    Raises:
        ValueError: the push would hide or break what the repository holds.
    """
    target, result = push.target, push.result
    case = push.case_in(repository, existing)
    if existing is not None and case is Case.REFUSED:
        refuse_second_selection(existing, target.config_name, target.split, target.repo_id)
    # A pool or controls of the earlier selection would be taken for those of the new one.
    dropped = {SCORED, *CONTROLS} - set(push.splits) if case in (Case.RESCORED, Case.REPLACES) else set()
    header = read_header(repository.card, target.repo_id)
    check_header(header, target, push.features, push.splits, repository.files, dropped)
    # The header is changed in place: `header.card` is the new card from here on.
    rows = merge_header(header, target, push.features, push.splits, dropped)
    deletions = stale_files(repository.files, target.config_name, push.splits, dropped)
    files: dict[str, bytes] = {}
    if case is not Case.ALONGSIDE:
        if existing is not None and _source_changes(case, existing, result.receipt):
            forget(header.card, existing.source, old_source_card)
        _describe(header.card, push, rows)
        if result.receipt is not None:
            files[RECEIPT_FILE] = result.receipt.to_json().encode()
        if result.report is not None:
            files[REPORT_FILE] = result.report.to_json().encode()
        # A report or plot of the earlier selection must not stay next to the new receipt.
        kept = {*files, *_plot_names(result)}
        deletions += [name for name in _descriptions(repository) if name not in kept]
    return PushPlan(case, str(header.card), files, deletions)


def _source_changes(case: Case, existing: ExistingSelection, receipt: Receipt | None) -> bool:
    return case is Case.REPLACES and existing.source != (None if receipt is None else receipt.source)


def _descriptions(repository: Repository) -> list[str]:
    """Return the files of a repository that describe a selection: receipt, report and plots."""
    return [
        name for name in repository.files if name in (RECEIPT_FILE, REPORT_FILE) or name.startswith(f"{PLOTS_FOLDER}/")
    ]


def _plot_names(result: Result) -> list[str]:
    return [f"{PLOTS_FOLDER}/{plot.name}" for plot in result.plots]


def _describe(card: DatasetCard, push: Push, rows: Mapping[str, int]) -> None:
    receipt, report = push.result.receipt, push.result.report
    carried = describe(card, receipt, push.source_card, sum(rows.values()))
    plots = _plot_names(push.result)
    section = render_section(push.target, rows, list(push.features), report, receipt, carried, plots)
    card.text = with_section(card.text, section, push.target)
