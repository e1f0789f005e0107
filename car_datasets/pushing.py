"""PUSH: `push_selection`, a selection on its way to the Hub, with its card and its receipt, in one commit.

Does: check token, owner and visibility before anything is written; write Parquet; commit splits, card, receipt, report and
plots at once, again after what passes.
Does not: talk to the Hub itself (repositories.py), read back what was pushed (reading_back.py), lay out splits (splits.py),
or write the card's text (dataset_card.py).

`datasets`' own push_to_hub commits 50 files at a time and does not come through a conflict with another push, and a card
and a receipt would need commits of their own. Here a reader sees all of a push or nothing of it.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from huggingface_hub import DatasetCard

from car_datasets import repositories
from car_datasets.conflicts import Standing, refuse_second_selection
from car_datasets.dataset_card import (
    END,
    SplitFiles,
    data_folder_of,
    describe,
    forget,
    place_of,
    render_section,
    stale_files,
    with_header,
    with_section,
)
from car_datasets.reading_back import compare_pushed
from car_datasets.receipt import RECEIPT_FILE, Receipt
from car_datasets.reporting import SelectionReport
from car_datasets.repositories import Pushed, Repository
from car_datasets.results import UNFINISHED
from car_datasets.retrying import reason
from car_datasets.splits import CONTROLS, SCORED, refuse_split_names, selection_splits

SHARD_BYTES = 500_000_000
MOST_SHARDS = 50  # of a commit, for all its splits together
REPORT_FILE = "report.json"
PLOTS = "plots"


def push_selection(
    dataset: Dataset | str | os.PathLike[str],
    repo_id: str,
    *,
    scored: Dataset | None = None,
    report: SelectionReport | None = None,
    receipt: Receipt | None = None,
    split: str = "selected",
    also: Sequence[str] | None = None,
    private: bool = True,
    config_name: str = "default",
    embeddings: bool = False,
    check: bool = False,
    token: str | None = None,
) -> Pushed:
    """Push a selection with its card and its receipt, in one commit; the same call again goes on, or changes nothing.

    Example:

    ```python
    >>> curate("alpaca_data.json", "out", n1=1000)
    >>> url, sha = push_selection("out", "me/alpaca-car")
    ```

    Args:
        dataset (`Dataset` or `str`): the selected rows, or the folder that [`curate`] wrote, which brings the next three.
        repo_id (`str`): `"owner/name"` of a dataset repository; made if it is not there.
        scored (`Dataset`, *optional*), report ([`SelectionReport`], *optional*), receipt ([`Receipt`], *optional*): of the
            same selection, for more splits and for the card.
        split (`str`): the name of the split that holds `dataset`.
        also (`Sequence[str]`, *optional*): more splits, out of `"scored"` (the whole pool), `"random_control"` and
            `"length_matched_control"`. By default the first, where there is a pool: [`verify`] selects from it again.
        private (`bool`): visibility of the repository; one that is there must have it already.
        config_name (`str`): all splits of a configuration have the same columns; other columns need another one.
        embeddings (`bool`): push the embeddings of the pool as well.
        check (`bool`): read everything back by commit and compare it, row for row.
        token (`str`, *optional*): else that of `HF_TOKEN` or `hf auth login`; never stored.

    Returns:
        [`Pushed`]: `(url, sha)`, the repository's page and the commit.

    Raises:
        ValueError: there are no rows, a name cannot be, the token, the owner or the visibility does not allow it, or what the
            repository holds could not be loaded or checked afterwards; nothing was uploaded then. Or the Hub refuses the upload.
        ConnectionError: the Hub does not answer. Nothing is visible there, and the same call goes on; or, with `check`, it
            was pushed and cannot be read back, and the message has URL and commit.
    """
    _refuse_bad_names(split, config_name, also or ())
    result = _result(dataset, scored, report, receipt)
    if also is None:
        also = () if result.scored is None else (SCORED,)
    repositories.open_repository(repo_id, private, token, "dataset", "repo_id")
    tables = _tables(result, split, also, embeddings)
    source_card = None if result.receipt is None else _source_card(result.receipt.source, token)
    with tempfile.TemporaryDirectory(prefix="car-datasets-push-") as place:
        most = MOST_SHARDS // len(tables)
        written = {name: _write_shards(table, Path(place), config_name, name, most) for name, table in tables.items()}
        files = {name: Path(place, name) for each in written.values() for name in each.names}
        files |= {f"{PLOTS}/{plot.name}": plot for plot in result.plots}
        contents = _Contents(repo_id, config_name, split, tables[split], written, result, source_card, token)
        try:
            done = repositories.commit_dataset(repo_id, files, contents.beside, f"Upload {', '.join(tables)}", token)
        except ConnectionError as error:
            raise ConnectionError(
                f"{str(error).rstrip('.')}. Nothing is visible in {repo_id}; the same command goes on."
            ) from error
        except (OSError, RuntimeError) as error:
            raise ValueError(f"repo_id={repo_id!r}: the Hub refuses the upload ({reason(error)}).") from error
    if check:
        try:
            compare_pushed(repo_id, done.sha, tables, config_name, token)
        except ConnectionError as error:
            raise ConnectionError(f"Pushed to {done.url}, commit {done.sha}, but {error}.") from error
    return done


class Result(NamedTuple):
    """A selection and what is known about it; as [`curate`] returns and writes it."""

    selected: Dataset
    scored: Dataset | None = None
    report: SelectionReport | None = None
    receipt: Receipt | None = None
    plots: Sequence[Path] = ()


def _result(dataset: object, scored: Dataset | None, report: SelectionReport | None, receipt: Receipt | None) -> Result:
    if isinstance(dataset, (str, os.PathLike)):
        result = read_result(Path(dataset))
    elif isinstance(dataset, Dataset):
        result = Result(dataset, scored, report, receipt)
    else:
        raise ValueError(
            f"dataset is {type(dataset).__name__}; pass one Dataset of the selected rows (dataset['train'] of a DatasetDict, "
            "Dataset.from_list(list(dataset)) of an IterableDataset), or the folder that `car-datasets curate` wrote."
        )
    if not len(result.selected) or not result.selected.column_names:
        lacking = "columns" if not result.selected.column_names else "rows"
        raise ValueError(
            f"dataset has no {lacking}, and a split without {lacking} cannot be loaded. Select some first."
        )
    return result


def read_result(folder: Path) -> Result:
    """The files that [`curate`] wrote into a folder.

    Raises:
        ValueError: one of them is missing, or a run was cut off writing them.
    """
    names = ("selected.parquet", "scored.parquet", REPORT_FILE, RECEIPT_FILE)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or (folder / UNFINISHED).exists():
        state = f"has no {', '.join(missing)}" if missing else "was not written to the end"
        raise ValueError(f"{folder} {state}: pass a folder that `car-datasets curate` wrote, or run it again.")
    selected, scored = (Dataset.from_parquet(str(folder / name)) for name in names[:2])
    report = read_report((folder / REPORT_FILE).read_bytes(), str(folder / REPORT_FILE))
    return Result(selected, scored, report, Receipt.read(folder), sorted(folder.rglob("*.png")))


def read_report(text: bytes, shown: str) -> SelectionReport:
    """The content of a `report.json`; a ValueError, which calls it `shown`, where it is none."""
    try:
        return SelectionReport.from_dict(json.loads(text))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{shown} is no report that `car-datasets curate` wrote ({error!r}); curate again.") from error


def _refuse_bad_names(split: str, config_name: str, also: Sequence[str]) -> None:
    if not re.fullmatch(r"\w+(\.\w+)*", split):
        raise ValueError(f"split={split!r}: a split's name has letters, digits, underscores, and points between them.")
    if split == "all":
        raise ValueError("split='all': `datasets` keeps that name for all splits together; choose another.")
    refuse_split_names(split, also)
    if not re.fullmatch(r"\w[\w.-]*", config_name) or config_name in ("data", PLOTS):
        raise ValueError(f"config_name={config_name!r} cannot be the name of a configuration and of its folder.")


def _tables(result: Result, split: str, also: Sequence[str], embeddings: bool) -> dict[str, Dataset]:
    recipe = {} if result.receipt is None else result.receipt.recipe
    return selection_splits(
        result.selected,
        result.scored,
        also,
        split=split,
        score_column=recipe.get("score_column", "iqs_score"),
        index_column=recipe.get("index_column", "source_index"),
        left_out=None if embeddings else recipe.get("embedding_column", "embedding"),
        seed=42 if result.report is None else result.report.seed,
    )


def _write_shards(table: Dataset, place: Path, config_name: str, split: str, most: int) -> SplitFiles:
    """Write a split as at most so many Parquet files. Equal rows give equal bytes: what the Hub has already is not sent again."""
    size = int(
        table.data.nbytes * len(table) / max(1, len(table.data))
    )  # where rows were chosen, data holds all of them
    count = max(1, min(most, len(table), math.ceil(size / SHARD_BYTES)))
    names = [f"{data_folder_of(config_name)}/{split}-{i:05d}-of-{count:05d}.parquet" for i in range(count)]
    for i, name in enumerate(names):
        (place / name).parent.mkdir(exist_ok=True)
        table.shard(count, i, contiguous=True).to_parquet(str(place / name))
    return SplitFiles(names, len(table), size, sum((place / name).stat().st_size for name in names))


def _source_card(source: Mapping[str, Any], token: str | None) -> str | None:
    """The card of the dataset that rows come from, for its licence; `None` where it cannot be had."""
    if source.get("kind") != "hub":
        return None
    try:
        return repositories.read_repository(source["id"], source["revision"], token).card
    except (ValueError, OSError):
        return None


@dataclass(frozen=True)
class _Contents:
    """What a commit holds beside the data, which depends on what the repository holds by then."""

    repo_id: str
    config_name: str
    split: str
    table: Dataset
    written: Mapping[str, SplitFiles]
    result: Result
    source_card: str | None
    token: str | None

    def beside(self, seen: Repository) -> tuple[dict[str, bytes], list[str]]:
        """Card, receipt and report, and the names of what they and the data replace."""
        report, receipt = self.result.report, self.result.receipt
        features = self.table.features
        place = place_of(seen.card)
        standing = self._standing(seen)
        taken = f"{data_folder_of(self.config_name)}/{self.split}-"
        here = (self.config_name, self.split)
        replaces = place == here if place else any(name.startswith(taken) for name in seen.files)
        another = standing is not None and not standing.is_of(receipt)
        if standing is not None and another and not replaces and (report is not None or receipt is not None):
            refuse_second_selection(standing, *here, self.repo_id)
        # pool and controls of a selection that goes do not stay beside the next one
        goes = standing is not None and replaces and not standing.has_scores_of(receipt)
        dropped = {SCORED, *CONTROLS} - set(self.written) if goes else set()
        where = (seen.card, seen.files, self.config_name)
        card, rows = with_header(*where, features, self.written, self.repo_id, dropped)
        files: dict[str, bytes] = {}
        gone = stale_files(seen.files, self.config_name, self.written, dropped)
        about = [name for name in seen.files if name in (RECEIPT_FILE, REPORT_FILE) or name.startswith(f"{PLOTS}/")]
        unmarked = standing is None and END not in seen.card
        if report is not None or receipt is not None or replaces or not about or unmarked:
            if standing is not None and another and standing.source != (receipt and receipt.source):
                forget(card, standing.source, _source_card(standing.source, self.token))
            self._describe(card, rows)
            if receipt is not None:
                files[RECEIPT_FILE] = receipt.to_json().encode()
            if report is not None:
                files[REPORT_FILE] = report.to_json().encode()
            new = {*files, *(f"{PLOTS}/{plot.name}" for plot in self.result.plots)}
            gone += [name for name in about if name not in new]  # of the selection that was there
        files["README.md"] = str(card).encode()
        return files, gone

    def _standing(self, seen: Repository) -> Standing | None:
        if RECEIPT_FILE not in seen.files:
            return None
        return Standing.read(
            repositories.read_dataset_file(self.repo_id, RECEIPT_FILE, seen.sha, self.token), place_of(seen.card)
        )

    def _describe(self, card: DatasetCard, rows: Mapping[str, int]) -> None:
        receipt, report = self.result.receipt, self.result.report
        carried = describe(card, receipt, self.source_card, sum(rows.values()))
        plots = [f"{PLOTS}/{plot.name}" for plot in self.result.plots]
        section = render_section(
            self.repo_id, self.config_name, self.split, rows, self.table.column_names, report, receipt, carried, plots
        )
        card.text = with_section(card.text, section, self.repo_id)
