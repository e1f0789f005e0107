"""Write and read the folder of a result: the names of its files, their order on disk, and whether it is complete.

Does: write each file atomically; mark a folder that is being written; read a finished folder.
Does not: compute anything that it writes.
"""

from __future__ import annotations

import contextlib
import glob
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset

from car_datasets.loading.values import as_written
from car_datasets.receipt import RECEIPT_FILE, Receipt
from car_datasets.reporting.page import PAGE_FILE
from car_datasets.reporting.plots import PLOT_FILES
from car_datasets.reporting.report import SelectionReport
from car_datasets.selection.procedures import PROCEDURES
from car_datasets.selection.published import original_columns, write_original
from car_datasets.utils.column_names import ColumnNames
from car_datasets.utils.files import UNFINISHED, write_whole

SELECTED_TABLE = "selected.parquet"
SELECTED_JSON = "selected.json"  # the selected rows in the original's format
SCORED_TABLE = "scored.parquet"
REPORT_FILE = "report.json"
SUMMARY_FILE = "report.md"
# All files of a result but those of its procedure. A folder that holds any of them is refused for a new result.
RESULT_FILES = (
    SELECTED_TABLE,
    SELECTED_JSON,
    SCORED_TABLE,
    RECEIPT_FILE,
    *PLOT_FILES,
    PAGE_FILE,
    REPORT_FILE,
    SUMMARY_FILE,
)


class Result(NamedTuple):
    """A selection and what is known about it: the content of a folder that [`curate`] wrote.

    Args:
        selected (`Dataset`): the selected rows.
        scored (`Dataset`, *optional*): the entire pool with its scores and clusters.
        report ([`SelectionReport`], *optional*): the figures of the selection.
        receipt ([`Receipt`], *optional*): what the selection was made from and with.
        plots (`Sequence[Path]`): PNG files.
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
    names = (SELECTED_TABLE, SCORED_TABLE, REPORT_FILE, RECEIPT_FILE)
    # `selected.json`, page and plots may have been deleted; only these four are read back.
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or (folder / UNFINISHED).exists():
        state = f"has no {', '.join(missing)}" if missing else "was not written to the end"
        raise ValueError(f"{folder} {state}: pass a folder that `car-datasets curate` wrote, or run it again.")
    selected, scored = read_tables(folder)
    report = read_report((folder / REPORT_FILE).read_bytes(), str(folder / REPORT_FILE))
    return Result(selected, scored, report, Receipt.read(folder), sorted(folder.rglob("*.png")))


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


@contextlib.contextmanager
def unfinished(folder: Path) -> Iterator[None]:
    """Mark a folder as unfinished while its files are written, so that an interrupted run can be repeated."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / UNFINISHED).exists():
        extra = (name for procedure in PROCEDURES.values() for name in procedure.files)
        for name in (*RESULT_FILES, *extra):
            for left in folder.glob(f".{name}.*"):  # temporary files of an interrupted write_whole
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
        files (`Mapping`): name to content of receipt, plots and page.
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
        write_whole(folder / name, lambda path, content=content: Path(path).write_bytes(content))  # type: ignore[misc]
    for name, table in tables.items():
        write_table(table, folder / name, names)
    write_whole(folder / SUMMARY_FILE, lambda path: Path(path).write_text(report.to_markdown(), encoding="utf-8"))
    write_whole(folder / REPORT_FILE, lambda path: Path(path).write_text(report.to_json(), encoding="utf-8"))
