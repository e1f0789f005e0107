"""Write and read the folder of a result: the names of its files, their order on disk, and whether it is complete.

Does: write each file atomically; mark a folder that is being written; read a finished folder; compare files and columns
with the digests in a receipt.
Does not: compute anything that it writes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
from datasets import Dataset

from car_datasets.clustering.model import CLUSTER_MODEL_FILES, ClusterModel
from car_datasets.loading.files import DataFile, listed, read_parquet
from car_datasets.loading.values import as_written
from car_datasets.receipt import RECEIPT_FILE, Receipt
from car_datasets.reporting.page import PAGE_FILE
from car_datasets.reporting.plots import PLOT_FILES, PLOTS, plot_file
from car_datasets.reporting.report import SelectionReport
from car_datasets.selection.procedures import PROCEDURES, Procedure
from car_datasets.selection.published import original_columns, write_original
from car_datasets.selection.rule import SELECTION_COLUMNS
from car_datasets.utils.column_names import ColumnNames
from car_datasets.utils.digests import BLOCK, column_digests, file_digest
from car_datasets.utils.files import (
    RUNS_FOLDER,
    UNFINISHED,
    fresh_folder,
    refuse_in_source,
    temporaries,
    user_path,
    write_content,
    write_whole,
)
from car_datasets.utils.settings import CONFIG_NAME, SPLIT

SELECTED_TABLE = "selected.parquet"
SELECTED_JSON = "selected.json"  # the selected rows in the original's format
SCORED_TABLE = "scored.parquet"
REPORT_FILE = "report.json"
SUMMARY_FILE = "report.md"
README_FILE = "README.md"
PROOF_FILE = "proof.json"  # the next three are written by `car-datasets prove`
PROOF_SUMMARY = "proof.md"
PROOF_PLOT = "proof.png"
PLOTS_FOLDER = "plots"  # the folder of the figures, where `load_dataset` does not take them for the data
# The files that `curate` writes, but for those of its procedure, and those that `prove` adds.
CURATED_FILES = (
    SELECTED_TABLE,
    SELECTED_JSON,
    SCORED_TABLE,
    RECEIPT_FILE,
    *CLUSTER_MODEL_FILES,
    *(f"{PLOTS_FOLDER}/{name}" for name in PLOT_FILES),
    PAGE_FILE,
    README_FILE,
    REPORT_FILE,
    SUMMARY_FILE,
)
# A folder that holds any of them is refused for a new result.
RESULT_FILES = (*CURATED_FILES, PROOF_FILE, PROOF_SUMMARY, f"{PLOTS_FOLDER}/{PROOF_PLOT}")
READ_BACK = (SELECTED_TABLE, SCORED_TABLE, REPORT_FILE, RECEIPT_FILE)  # the others may have been deleted
CLOSE = 1e-6  # the last digits of a mean or a correlation differ between machines
NEW = ".new"  # a folder inside that of a result, for the one that replaces it
OURS = "`car-datasets curate` wrote this folder"  # the words by which our own README.md is known
# `datasets` reads the header, and otherwise would load all Parquet, JSON and PNG files together. Configuration and
# split have the names that a push gives them.
README = f"""---
configs:
- config_name: {CONFIG_NAME}
  data_files:
  - split: {SPLIT}
    path: {SELECTED_TABLE}
- config_name: scored
  data_files:
  - split: scored
    path: {SCORED_TABLE}
---

{OURS}. `load_dataset(DIR, split="{SPLIT}")` loads the selected rows, and `load_dataset(DIR, "scored",
split="scored")` all rows with their scores and clusters. The figures are in {PAGE_FILE} and {SUMMARY_FILE}; what the
selection was made from is in {RECEIPT_FILE}. `car-datasets push DIR OWNER/NAME` publishes it with a card of its own.
"""


class Result(NamedTuple):
    """A selection and what is known about it: the content of a folder that [`curate`] wrote.

    Args:
        selected (`Dataset`): the selected rows.
        scored (`Dataset`, *optional*): the entire pool with its scores and clusters.
        report ([`SelectionReport`], *optional*): the figures of the selection.
        receipt ([`Receipt`], *optional*): what the selection was made from and with.
        plots (`Sequence[Path]`): the figures that exist, in the order of `PLOTS`.
    """

    selected: Dataset
    scored: Dataset | None = None
    report: SelectionReport | None = None
    receipt: Receipt | None = None
    plots: Sequence[Path] = ()


class Extra(NamedTuple):
    """What [`write_result`] writes in addition to the selection, its pool and its figures.

    Args:
        receipt ([`Receipt`]): without digests of files and columns.
        pictures (`Mapping[str, bytes]`): name to content of page and plots; the plots go into a folder of their own.
        tables (`Mapping[str, Dataset]`): name to rows of the files that only the procedure of the selection has.
        clusters ([`ClusterModel`]): what labelled the pool; [`top_up`] labels new rows by it.
    """

    receipt: Receipt
    pictures: Mapping[str, bytes]
    tables: Mapping[str, Dataset]
    clusters: ClusterModel


def read_result(folder: Path) -> Result:
    """Read the files that [`curate`] wrote into a folder.

    Raises:
        ValueError: a file is missing or invalid, or the run was interrupted while it wrote them.
    """
    missing = [name for name in READ_BACK if not (folder / name).is_file()]
    if missing or (folder / UNFINISHED).exists():
        state = f"has no {', '.join(missing)}" if missing else "was not written to the end"
        raise ValueError(f"{folder} {state}: pass a folder that `car-datasets curate` wrote, or run it again.")
    selected, scored = read_tables(folder)
    report = read_report((folder / REPORT_FILE).read_bytes(), str(folder / REPORT_FILE))
    return Result(selected, scored, report, Receipt.read(folder), plots_in(folder))


def plots_in(folder: Path) -> list[Path]:
    """Return the figures of a result that exist, in the order of `PLOTS` with that of a proof at the end.

    Other pictures in the folder are not its own.
    """
    # Earlier versions wrote the figures directly into the folder. A figure that a caller added is in PLOTS alone.
    places = [(folder / PLOTS_FOLDER / name, folder / name) for name in map(plot_file, PLOTS)]
    found = (next((path for path in both if path.is_file()), None) for both in places)
    proof = folder / PLOTS_FOLDER / PROOF_PLOT
    return [path for path in (*found, proof if proof.is_file() else None) if path is not None]


def update_receipt(folder: Path, proof: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    """Write files that were made from a complete result into its folder, and what they say into its receipt.

    Args:
        folder (`Path`): of the result.
        proof (`Mapping`): the field `proof` of the receipt.
        files (`Mapping[str, bytes]`): name to content; files of these names are replaced.

    Raises:
        ValueError: the folder has no receipt, or an invalid one.
    """
    receipt = replace(Receipt.read(folder), proof=dict(proof))
    if receipt.format != 1:  # which has no digests of files
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        receipt = receipt.sealed({**receipt.files, **digests}, receipt.columns)
    for name, content in {**files, RECEIPT_FILE: receipt.to_json().encode()}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_content(folder / name, content)


def read_tables(folder: Path) -> tuple[Dataset, Dataset]:
    """Read the selected rows and the scored pool of a folder, without report and receipt.

    Raises:
        ValueError: one of the two files is missing or damaged.
    """
    for name in (SCORED_TABLE, SELECTED_TABLE):
        if not (folder / name).is_file():
            raise ValueError(f"'{folder}' holds no {name}; name a folder that `car-datasets curate` wrote, no Hub id.")
    return _read_table(folder / SELECTED_TABLE), _read_table(folder / SCORED_TABLE)


def _read_table(path: Path) -> Dataset:
    """Read a Parquet file by its content: `datasets` alone would take another file of equal path and time for it."""
    try:
        return as_written(read_parquet([DataFile(str(path), str(path), "parquet")]))
    except ValueError as error:
        why = str(error).removeprefix(f"source={str(path)!r} ")
        raise ValueError(f"{path} is not what `car-datasets curate` wrote; curate again. (It {why})") from error


class Compared(NamedTuple):
    """What was compared with the digests in a receipt.

    Args:
        number (`int`): of the files or columns that were compared.
        differences (`list[str]`): those that are not what the receipt says, in words.
        skipped (`list[str]`): what could not be compared, in words.
    """

    number: int
    differences: list[str]
    skipped: list[str]


def files_of(folder: Path, receipt: Receipt) -> tuple[dict[str, str], list[str]]:
    """Return the sha256 of the files in a folder that its receipt names, and the names of all others but the receipt.

    What is no file, such as a folder, has an empty sha256. Of other folders the name alone is returned, and that of the
    finished runs of a proof is left out: they only resume it.
    """
    known = {name: folder / name for name in receipt.files}
    every = {path.relative_to(folder).as_posix() for part in ("*", f"{PLOTS_FOLDER}/*") for path in folder.glob(part)}
    seen = {name: file_digest(p) if p.is_file() else "" for name, p in known.items() if os.path.lexists(p)}
    own = {RECEIPT_FILE, PLOTS_FOLDER, *([RUNS_FOLDER] if (folder / RUNS_FOLDER).is_dir() else [])}
    return seen, sorted(every - {*known, *own})


def compare_files(receipt: Receipt, seen: Mapping[str, str], others: Sequence[str], pushed: bool = False) -> Compared:
    """Compare the files of a result with the digests in its receipt.

    Args:
        receipt ([`Receipt`]): of the result.
        seen (`Mapping[str, str]`): sha256 of the files that it names, as far as they are there.
        others (`Sequence[str]`): the names of files that are there as well.
        pushed (`bool`): they are in a repository, which has some of the files, and the rows in files of its own.
    """
    differences = [f"{name} does not have the receipt's sha256" for name in seen if seen[name] != receipt.files[name]]
    # The README of a repository is its card.
    elsewhere = {SELECTED_TABLE, SCORED_TABLE, README_FILE} if pushed else set()
    missing = [name for name in receipt.files if name not in seen and name not in elsewhere]
    skipped = [f"{listed(missing)}: {'not pushed' if pushed else 'no longer in the folder'}"] if missing else []
    # A file that looks like one of the result would be taken for one.
    procedure = PROCEDURES.get(str(receipt.recipe.get("procedure")))
    ours = {*RESULT_FILES, *PLOT_FILES, *(procedure.files if procedure else ())} if not pushed else set()
    differences += [f"{name} is not in the receipt" for name in others if name in ours]
    if rest := [name for name in others if name not in ours]:
        skipped.append(f"{listed(rest)}: not in the receipt")
    return Compared(len(seen), differences, skipped)


def compare_folder(folder: Path, receipt: Receipt) -> Compared:
    """Compare the files in the folder of a result, and its receipt, with the digests in the receipt."""
    if receipt.format == 1:  # which has none
        return Compared(0, [], [])
    compared = compare_files(receipt, *files_of(folder, receipt))
    if receipt.digest() != receipt.sha256:
        compared.differences.insert(0, f"{RECEIPT_FILE} does not have its own sha256")
    return compared


def compare_columns(receipt: Receipt, name: str, table: Dataset, pushed: bool, with_pool: bool) -> Compared:
    """Compare the columns of a table with the digests in the receipt of its result.

    Args:
        receipt ([`Receipt`]): of the result.
        name (`str`): `"selected"` or `"scored"`.
        table (`Dataset`): its rows.
        pushed (`bool`): a push leaves embeddings out, and gives both tables the same columns.
        with_pool (`bool`): the pool is there as well, so that the columns that it gave the selection can be compared.
    """
    known = receipt.columns.get(name, {})
    given = SELECTION_COLUMNS if name == "scored" else tuple(receipt.columns.get("scored", {}))
    embedding = receipt.recipe.get("embedding_column")
    seen = column_digests(table.with_format("arrow").iter(BLOCK)) if len(table) else {}
    compared = Compared(len(seen.keys() & known.keys()), [], [])
    for column in sorted({*known, *seen}):
        shown = f"the column {column!r} of {name}"
        if column not in known and pushed and column in given:
            if not with_pool:
                compared.skipped.append(f"{shown}: it is the pool's, which was not pushed")
        elif column not in known:
            compared.differences.append(f"{shown} is not in the receipt")
        elif column not in seen and pushed and column == embedding:
            compared.skipped.append(f"{shown}: not pushed")
        elif column not in seen:
            compared.differences.append(f"{shown} is missing")
        elif seen[column] != known[column]:
            compared.differences.append(f"{shown} does not have the receipt's sha256")
    return compared


def read_report(text: bytes, shown: str) -> SelectionReport:
    """Parse the content of a `report.json`.

    Args:
        text (`bytes`): the content of the file.
        shown (`str`): the name of the file in the error message.

    Raises:
        ValueError: it is not a report.
    """
    try:
        return SelectionReport.from_dict(json.loads(text))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{shown} is not a report that `car-datasets curate` wrote ({error!r}); curate again."
        ) from error


def first_other_figure(report: SelectionReport, seen: SelectionReport, languages: bool) -> str | None:
    """Return the first figure of a report that another one has otherwise, in words, or `None` if they are equal.

    Args:
        report ([`SelectionReport`]): as the rows give it.
        seen ([`SelectionReport`]): as it was found.
        languages (`bool`): compare the languages, which can be counted again only if the rows have a column of them.
    """
    figures, others = _flat(report.to_dict()), _flat(seen.to_dict())
    known = (*(f"score_by.{group}." for group in seen.score_by), *(["named_clusters."] if seen.named_clusters else []))
    for name in dict.fromkeys((*figures, *others)):
        field, *part = name.split(".")
        if (field in ("languages", "selected_languages") or part[:1] == ["language"]) and not languages:
            continue
        if field in ("score_by", "named_clusters") and not name.startswith(known):  # of an earlier version
            continue
        wanted, found = figures.get(name), others.get(name)
        if isinstance(wanted, float) and isinstance(found, float):
            same = math.isclose(wanted, found, rel_tol=CLOSE, abs_tol=CLOSE) or (wanted != wanted and found != found)
        else:
            same = wanted == found and isinstance(wanted, bool) == isinstance(found, bool)
        if not same:
            return f"{name} {found!r:.80}; the rows give {wanted!r:.80}"
    return None


def _flat(figures: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested figures by their path, such as `pool.mean_score`."""
    flat: dict[str, Any] = {}
    for name, value in figures.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def files_to_replace(folder: Path, procedure: Procedure, overwrite: bool, source: object) -> list[str]:
    """Return the files of a complete result in a folder, which a new one is to replace; empty for a new folder.

    Args:
        folder (`Path`): need not exist.
        procedure ([`Procedure`]): of the new result; names its extra files.
        overwrite (`bool`): a complete result may be replaced.
        source: what is curated; if it is one of the files to replace, it would be lost.

    Raises:
        ValueError: the folder is a file, holds files of these names that may not be replaced, or lies in a folder that
            is the source.
    """
    refuse_in_source(folder, source, "output_dir")
    old = _complete_result(folder)
    replaced = old if overwrite else []
    readme = folder / README_FILE
    # A README that is not ours must stay, even in the folder of a result.
    if readme.is_file() and OURS not in readme.read_text(encoding="utf-8", errors="replace"):
        raise ValueError(
            f"output_dir={str(folder)!r} holds a {README_FILE} of its own, which would be overwritten. Name a new folder."
        )
    try:
        fresh_folder(folder, [name for name in (*RESULT_FILES, *procedure.files) if name not in replaced])
    except ValueError as error:
        more = " To replace it, pass overwrite=True (--overwrite)." if old and not overwrite else ""
        raise ValueError(f"{error}{more}") from error
    if replaced and isinstance(source, (str, Path)) and user_path(source).exists():
        path = user_path(source).resolve()
        if folder.resolve() in (path, *path.parents):
            raise ValueError(
                f"source={str(source)!r} lies in output_dir={str(folder)!r}, whose result would be replaced. Name "
                "another folder."
            )
    return replaced


def _complete_result(folder: Path) -> list[str]:
    """Return the names of the files of a complete result; empty if the folder holds none."""
    if (folder / UNFINISHED).exists() or not all((folder / name).is_file() for name in READ_BACK):
        return []
    try:
        recipe = Receipt.read(folder).recipe
    except ValueError:  # of another version: which files are its own is not known
        return []
    procedure = PROCEDURES.get(recipe.get("procedure", ""))
    # PLOT_FILES without their folder: as earlier versions wrote them.
    names = (*RESULT_FILES, *PLOT_FILES, *(procedure.files if procedure else ()))
    return [name for name in names if (folder / name).is_file()]


def refuse_unfinished(folder: Path, run: str, overwrite: bool) -> None:
    """Raise ValueError if a run other than `run`, a digest as in a claim, has left a folder unfinished."""
    mark = folder / UNFINISHED
    other = mark.read_text(encoding="utf-8", errors="replace") if mark.is_file() else run
    if other not in (run, "") and not overwrite:  # earlier versions left an empty file
        raise ValueError(
            f"output_dir={str(folder)!r} holds a part of a result, which another command was writing when it was "
            "stopped. Run that command again to complete it, name another folder, or replace it with overwrite=True "
            "(--overwrite)."
        )


@contextlib.contextmanager
def unfinished(folder: Path, run: str, old: Sequence[str] = ()) -> Iterator[Path]:
    """Yield the folder to write a result into, marked as unfinished meanwhile, so that the run can be repeated.

    Args:
        folder (`Path`): made if it does not exist.
        run (`str`): a digest of what makes the run, for the mark.
        old (`Sequence[str]`): files of a complete result there. The new one is then written into a folder inside, and
            takes their place file by file once it is complete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / NEW
    shutil.rmtree(new, ignore_errors=True)  # of a killed run
    if not old:
        with _marked(folder, run):
            yield folder
        return
    try:
        new.mkdir()
        yield new
        with _marked(folder, run):
            # Marked only now, because until here the old result is complete.
            written = [path.relative_to(new) for path in new.rglob("*") if path.is_file()]
            # Files that only the old result has, such as those of another procedure.
            for name in set(old) - {path.as_posix() for path in written}:
                (folder / name).unlink()
            for path in written:
                (folder / path).parent.mkdir(exist_ok=True)
                os.replace(new / path, folder / path)
    finally:
        shutil.rmtree(new, ignore_errors=True)


@contextlib.contextmanager
def _marked(folder: Path, run: str) -> Iterator[None]:
    """Keep a file `.unfinished` in the folder until the block has ended without an error; it names the run."""
    if (folder / UNFINISHED).exists():
        # What a killed run has left, which may be of another recipe; a file that this run does not write would stay.
        extra = (name for procedure in PROCEDURES.values() for name in procedure.files)
        files = [folder / name for name in (*RESULT_FILES, *PLOT_FILES, *extra)]
        for left in (*files, *temporaries(files)):
            left.unlink(missing_ok=True)
    write_content(folder / UNFINISHED, run)
    # Not in a `finally`: after an error the marker must stay, since it permits the next run to overwrite.
    yield
    # The marker may be gone: two runs started after the same interruption both write this folder, with equal files.
    (folder / UNFINISHED).unlink(missing_ok=True)


def write_table(dataset: Dataset, path: Path, names: ColumnNames) -> None:
    """Write the dataset of one stage as Parquet, or for a `.json` path in the original's format and columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        plain = original_columns(dataset, names)
        write_whole(path, lambda temporary: write_original(plain, temporary, names))
    else:
        write_whole(path, dataset.to_parquet)


def write_result(
    folder: Path,
    selected: Dataset,
    scored: Dataset,
    report: SelectionReport,
    extra: Extra,
    names: ColumnNames,
) -> None:
    """Write the files of [`curate`]; the receipt, with the digests of all others, comes last.

    Args:
        folder (`Path`): made if it does not exist.
        selected, scored (`Dataset`), report ([`SelectionReport`]): the selection, its pool and its figures.
        extra ([`Extra`]): the other files.
        names ([`ColumnNames`]): the names of the added columns.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / SCORED_TABLE, scored.to_parquet)
    write_whole(folder / SELECTED_TABLE, selected.to_parquet)
    # A user's own column `score` or `label` stays here; curate refuses it before the original's files are written.
    write_whole(folder / SELECTED_JSON, lambda path: write_original(selected, path, names, where_free=True))
    pictures = {f"{PLOTS_FOLDER}/{n}" if n.endswith(".png") else n: content for n, content in extra.pictures.items()}
    texts = {README_FILE: README, SUMMARY_FILE: report.to_markdown(), REPORT_FILE: report.to_json()}
    for name, table in extra.tables.items():
        write_table(table, folder / name, names)
    extra.clusters.save_pretrained(folder)
    written: dict[str, str | bytes] = {**pictures, **texts}
    for name, content in written.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_content(folder / name, content)
    files = (SCORED_TABLE, SELECTED_TABLE, SELECTED_JSON, *CLUSTER_MODEL_FILES, *pictures, *extra.tables, *texts)
    columns = {"selected": folder / SELECTED_TABLE, "scored": folder / SCORED_TABLE}
    receipt = extra.receipt.sealed(
        {name: file_digest(folder / name) for name in files},
        {name: column_digests(pq.ParquetFile(path).iter_batches()) for name, path in columns.items()},
    )
    write_content(folder / RECEIPT_FILE, receipt.to_json())
