"""Write and read the folder of a result: the names of its files, their order on disk, and whether it is complete.

Does: write each file atomically; mark a folder that is being written; read a finished folder.
Does not: compute anything that it writes.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset

from car_datasets.loading.values import as_written
from car_datasets.receipt import RECEIPT_FILE, Receipt
from car_datasets.reporting.page import PAGE_FILE
from car_datasets.reporting.plots import PLOT_FILES, PLOTS, plot_file
from car_datasets.reporting.report import SelectionReport
from car_datasets.selection.procedures import PROCEDURES, Procedure
from car_datasets.selection.published import original_columns, write_original
from car_datasets.utils.column_names import ColumnNames
from car_datasets.utils.files import UNFINISHED, fresh_folder, user_path, write_whole
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
# All files of a result but those of its procedure. A folder that holds any of them is refused for a new result.
RESULT_FILES = (
    SELECTED_TABLE,
    SELECTED_JSON,
    SCORED_TABLE,
    RECEIPT_FILE,
    *(f"{PLOTS_FOLDER}/{name}" for name in PLOT_FILES),
    PAGE_FILE,
    README_FILE,
    REPORT_FILE,
    SUMMARY_FILE,
    PROOF_FILE,
    PROOF_SUMMARY,
    f"{PLOTS_FOLDER}/{PROOF_PLOT}",
)
READ_BACK = (SELECTED_TABLE, SCORED_TABLE, REPORT_FILE, RECEIPT_FILE)  # the others may have been deleted
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
    for name, content in {**files, RECEIPT_FILE: receipt.to_json().encode()}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_whole(folder / name, lambda path, content=content: Path(path).write_bytes(content))  # type: ignore[misc]


def read_tables(folder: Path) -> tuple[Dataset, Dataset]:
    """Read the selected rows and the scored pool of a folder, without report and receipt.

    Raises:
        ValueError: one of the two files is missing.
    """
    for name in (SCORED_TABLE, SELECTED_TABLE):
        if not (folder / name).is_file():
            raise ValueError(f"{str(folder)!r} holds no {name}; name a folder that `car-datasets curate` wrote.")
    # Escaped, because `datasets` takes every path for a pattern.
    selected, scored = (glob.escape(str(folder / name)) for name in (SELECTED_TABLE, SCORED_TABLE))
    return as_written(Dataset.from_parquet(selected)), as_written(Dataset.from_parquet(scored))


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


def files_to_replace(folder: Path, procedure: Procedure, overwrite: bool, source: object) -> list[str]:
    """Return the files of a complete result in a folder, which a new one is to replace; empty for a new folder.

    Args:
        folder (`Path`): need not exist.
        procedure ([`Procedure`]): of the new result; names its extra files.
        overwrite (`bool`): a complete result may be replaced.
        source: what is curated; if it is one of the files to replace, it would be lost.

    Raises:
        ValueError: the folder is a file, or holds files of these names that may not be replaced.
    """
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


@contextlib.contextmanager
def unfinished(folder: Path, old: Sequence[str] = ()) -> Iterator[Path]:
    """Yield the folder to write a result into, marked as unfinished meanwhile, so that the run can be repeated.

    Args:
        folder (`Path`): made if it does not exist.
        old (`Sequence[str]`): files of a complete result there. The new one is then written into a folder inside, and
            takes their place file by file once it is complete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / NEW
    shutil.rmtree(new, ignore_errors=True)  # of a killed run
    if not old:
        with _marked(folder):
            yield folder
        return
    try:
        new.mkdir()
        yield new
        with _marked(folder):
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
def _marked(folder: Path) -> Iterator[None]:
    """Keep a file `.unfinished` in the folder until the block has ended without an error."""
    if (folder / UNFINISHED).exists():
        extra = (name for procedure in PROCEDURES.values() for name in procedure.files)
        for path in (folder / name for name in (*RESULT_FILES, *extra)):
            for left in path.parent.glob(f".{path.name}.*"):  # temporary files of an interrupted write_whole
                left.unlink()
    (folder / UNFINISHED).touch()
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
    files: Mapping[str, bytes],
    tables: Mapping[str, Dataset],
    names: ColumnNames,
) -> None:
    """Write the files of [`curate`]; the reports come last, so a folder that has them is complete.

    Args:
        folder (`Path`): made if it does not exist.
        selected, scored (`Dataset`), report ([`SelectionReport`]): the selection, its pool and its figures.
        files (`Mapping`): name to content of receipt, plots and page; the plots go into a folder of their own.
        tables (`Mapping`): name to rows of the files that only the procedure of the selection has.
        names ([`ColumnNames`]): the names of the added columns.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / SCORED_TABLE, scored.to_parquet)
    write_whole(folder / SELECTED_TABLE, selected.to_parquet)
    # A user's own column `score` or `label` stays here; curate refuses it before the original's files are written.
    write_whole(folder / SELECTED_JSON, lambda path: write_original(selected, path, names, where_free=True))
    # `content` is bound as a default because a closure would see the last value of the loop.
    for name, content in files.items():
        place = folder / PLOTS_FOLDER / name if name.endswith(".png") else folder / name
        place.parent.mkdir(exist_ok=True)
        write_whole(place, lambda path, content=content: Path(path).write_bytes(content))  # type: ignore[misc]
    for name, table in tables.items():
        write_table(table, folder / name, names)
    write_whole(folder / README_FILE, lambda path: Path(path).write_text(README, encoding="utf-8"))
    write_whole(folder / SUMMARY_FILE, lambda path: Path(path).write_text(report.to_markdown(), encoding="utf-8"))
    write_whole(folder / REPORT_FILE, lambda path: Path(path).write_text(report.to_json(), encoding="utf-8"))
