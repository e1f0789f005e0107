"""The files of a result, each written under a temporary name and moved into place when it is whole."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from car_datasets.column_names import ColumnNames
from car_datasets.original import CLUSTERING_FILE, RANKING_FILES, SELECTED_FILE, original_columns, write_original
from car_datasets.plots import PLOT_FILES
from car_datasets.report_page import PAGE_FILE

if TYPE_CHECKING:
    from datasets import Dataset

    from car_datasets.reporting import SelectionReport

ORIGINAL_FILES = (*RANKING_FILES.values(), CLUSTERING_FILE, SELECTED_FILE)
RESULT_FILES = (
    "selected.parquet",
    "selected.json",
    "scored.parquet",
    "receipt.json",
    *PLOT_FILES,
    PAGE_FILE,
    "report.json",
    "report.md",
)


UNFINISHED = ".unfinished"


def fresh_folder(folder: Path, names: Sequence[str] = RESULT_FILES, argument: str = "output_dir") -> Path:
    """The folder, if it can take files of these names.

    Raises:
        ValueError: it is a file or lies in one, or holds such files already, of a run that was not cut off writing them.
    """
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(f"{argument}={str(folder)!r}: {path} is a file; name a folder.")
    taken = [] if (folder / UNFINISHED).exists() else [name for name in names if (folder / name).exists()]
    if taken:
        raise ValueError(
            f"{argument}={str(folder)!r} already holds a result ({', '.join(taken)}). Name another folder or move it away."
        )
    return folder


@contextlib.contextmanager
def unfinished(folder: Path) -> Iterator[None]:
    """Mark a folder while its files are written, so that a run that is killed meanwhile can be run again."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / UNFINISHED).exists():
        for name in (*RESULT_FILES, *ORIGINAL_FILES):
            for left in folder.glob(f".{name}.*"):  # what write_whole was at
                left.unlink()
    (folder / UNFINISHED).touch()
    yield
    (folder / UNFINISHED).unlink(missing_ok=True)  # two at once, after a kill of what had started one, write the same


def fresh_file(path: Path) -> Path:
    """The path, if a stage can write its dataset there.

    Raises:
        ValueError: it is there already, lies in a file, or is neither Parquet nor JSON.
    """
    if path.suffix not in (".parquet", ".json"):
        raise ValueError(f"--output {path}: name a .parquet file, or a .json file for the original's format.")
    for parent in path.parents:
        if parent.is_file():
            raise ValueError(f"--output {path}: {parent} is a file; name a folder.")
    if path.exists():
        raise ValueError(f"--output {path} is there already; name another file or move it away.")
    return path


def write_table(dataset: Dataset, path: Path, **names: str) -> None:
    """Write the dataset of one stage: Parquet, or for a `.json` path the original's format without columns of ours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        columns = ColumnNames(**{name.removesuffix("_column"): column for name, column in names.items()})
        plain = original_columns(dataset, columns)
        write_whole(path, lambda temporary: write_original(plain, temporary, columns))
    else:
        write_whole(path, dataset.to_parquet)


def write_result(
    folder: Path,
    selected: Dataset,
    scored: Dataset,
    report: SelectionReport,
    files: Mapping[str, bytes],
    score_column: str,
    cluster_column: str,
) -> None:
    """Write the files of [`curate`], receipt, plots and page (`files`) among them; the reports come last, so a folder that has
    them is complete."""
    names = ColumnNames(score=score_column, cluster=cluster_column)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "scored.parquet", scored.to_parquet)
    write_whole(folder / "selected.parquet", selected.to_parquet)
    write_whole(folder / "selected.json", lambda path: write_original(selected, path, names, where_free=True))
    for name, content in files.items():
        write_whole(folder / name, lambda path, content=content: Path(path).write_bytes(content))  # type: ignore[misc]
    write_whole(folder / "report.md", lambda path: Path(path).write_text(report.to_markdown(), encoding="utf-8"))
    write_whole(folder / "report.json", lambda path: Path(path).write_text(report.to_json(), encoding="utf-8"))


def write_original_files(
    folder: Path,
    selected: Dataset,
    ranked: Dataset,
    objective: str,
    *,
    score_column: str,
    cluster_column: str,
    index_column: str,
) -> None:
    """Write the original's three files beside the others, without the columns that it does not have.

    `objective` is the scorer's, `"regression"` (IQS) or `"ranking"` (Comet), after which the first file is called.
    """
    names = ColumnNames(score=score_column, cluster=cluster_column, index=index_column)
    ranking = original_columns(ranked, names)
    chosen = original_columns(selected, names)
    write_whole(
        folder / RANKING_FILES[objective],
        lambda path: write_original(ranking.remove_columns(cluster_column), path, names),
    )
    write_whole(folder / CLUSTERING_FILE, lambda path: write_original(ranking, path, names))
    write_whole(folder / SELECTED_FILE, lambda path: write_original(chosen, path, names))


def write_whole(path: Path, write: Callable[[str], object]) -> None:
    """Call `write(temporary_name)` and move the file to `path`; what is there under that name is always complete."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")  # process ids repeat on another machine
    try:
        write(str(temporary))
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # before its name: a machine that loses power must not keep the name alone
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def write_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `path` and move it there at the end, so that `path` is complete or absent.

    The folder is removed if the block raises. Leftovers of a killed process are removed at the start.
    """
    temporary = path.with_name(f"{path.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for part in temporary.rglob("*"):
            if part.is_file():
                with part.open("rb") as file:
                    os.fsync(file.fileno())  # contents must reach the disk before the name does
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
