"""What a dataset repository holds that a push would hide, or leave such that it cannot be loaded or checked.

Does: refuse such a push, in words that say what was seen and where else to go.
Does not: ask a Hub, or change a card (dataset_card.py).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from car_datasets.receipt import Receipt

TABLES = (".parquet", ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".arrow", ".xml", ".h5", ".hdf5")
DATA_FILES = (*TABLES, ".zip", ".tar")
# Data where the name says so; beside data they are notes and pictures of a card.
MAYBE_DATA = (".txt", ".png", ".jpg", ".jpeg", ".gif", ".webp", ".wav", ".mp3", ".flac", ".mp4")
SPLIT_WORDS = "train|training|validation|valid|dev|val|test|testing|eval|evaluation"  # `datasets` finds splits by them
PACKED = (".gz", ".zst", ".bz2", ".xz", ".lz4")
NOT_ROWS = ("receipt.json", "report.json", "dataset_infos.json")
ELSEWHERE = "Push to another repository"


def refuse_hidden_data(files: Iterable[str], ours: Collection[str], repo_id: str) -> None:
    """A header with `configs` hides every data file that it does not name.

    Args:
        files (`Iterable`): all names in the repository; ours (`Collection`): those of them that the push replaces.
        repo_id (`str`): for the message.

    Raises:
        ValueError: there are data files beside ours.
    """
    others = [name for name in files if _is_data(name) and name not in ours and name not in NOT_ROWS]
    if others:
        raise ValueError(
            f"repo_id={repo_id!r} holds {len(others)} data file(s), such as {others[0]!r}, in splits that its card does not "
            f"name; they would not be loaded any more. {ELSEWHERE}, or name them in the card's `configs`, as Parquet and in a "
            "configuration of their own."
        )


class Standing(NamedTuple):
    """The selection whose receipt a repository holds: its source and its rows, and where its card says that it is."""

    source: dict[str, Any]
    selected_sha256: str
    place: tuple[str, str] | None
    made: tuple[Mapping[str, Any], ...] = ()  # scorer, embedder and settings

    @classmethod
    def read(cls, receipt: bytes, place: tuple[str, str] | None) -> Standing:
        """From a `receipt.json`; one that this version cannot read is of another selection than any."""
        try:
            known = Receipt.from_json(receipt)
        except ValueError:
            return cls({}, "", place)
        return cls(known.source, known.selected_sha256, place, (known.scorer, known.embedder, known.recipe))

    def is_of(self, receipt: Receipt | None) -> bool:
        """Whether this is the selection of a receipt."""
        return receipt is not None and (self.source, self.selected_sha256) == (receipt.source, receipt.selected_sha256)

    def has_scores_of(self, receipt: Receipt | None) -> bool:
        """Whether the scores and clusters of its pool are those of a receipt, so that both choose the same from it."""
        made = None if receipt is None else (receipt.scorer, receipt.embedder, receipt.recipe)
        return self.is_of(receipt) and made == self.made


def refuse_second_selection(standing: Standing, config_name: str, split: str, repo_id: str) -> None:
    """A repository has one receipt, one report and one section of a card, and so one selection that can be checked.

    Raises:
        ValueError: always; call it where another selection would go beside the one that stands there.
    """
    where = "" if standing.place is None else " in configuration {!r}, split {!r}".format(*standing.place)
    name = standing.source.get("id") or standing.source.get("name")
    raise ValueError(
        f"repo_id={repo_id!r} holds the receipt of another selection{f' from {name!r}' if name else ''}{where}. Beside it, as "
        f"config_name={config_name!r}, split={split!r}, this one would take its place in receipt, report and card, and the "
        f"other could not be verified any more. {ELSEWHERE}, one for each selection."
    )


def refuse_unloadable(
    configs: Mapping[str, Mapping[str, Any]],
    config_name: str,
    splits: Collection[str],
    files: Collection[str],
    repo_id: str,
) -> None:
    """`datasets` opens all configurations of a repository with one reader, that of the first, and wants one default.

    Args:
        configs (`Mapping`): name of a configuration to what the header says of it.
        config_name (`str`), splits (`Collection`): what is pushed; it replaces splits of the same name.
        files (`Collection`): all names in the repository.
        repo_id (`str`): for the message.

    Raises:
        ValueError: after the push, one of them, old or new, could not be loaded.
    """
    for name, config in configs.items():
        shown = f"repo_id={repo_id!r}: its card's header has the configuration {name!r}"
        if config.get("data_dir") or (name != config_name and not config.get("data_files")):
            seen = f"data_dir={config['data_dir']!r}" if config.get("data_dir") else "no `data_files`"
            raise ValueError(
                f"{shown} with {seen}, which `datasets` fills from the files that it finds, ours among them. {ELSEWHERE}, or "
                "name its files in `data_files` there."
            )
        kept = [path for split, path in _paths(config) if name != config_name or split not in splits]
        foreign = [file for path in kept for file in _matches(path, files) if _is_other_format(file)]
        if foreign:
            raise ValueError(
                f"{shown} of {foreign[0]!r}, and `datasets` reads all files of a repository in one format, which is Parquet for "
                f"a push. {ELSEWHERE} (another config_name does not help), or make that file Parquet."
            )
    marked = [name for name, config in configs.items() if config.get("default") and name != "default"]
    if config_name == "default" and marked:
        raise ValueError(
            f"repo_id={repo_id!r}: its card's header has `default: true` at the configuration {marked[0]!r}, and "
            "config_name='default' would be a second default: none could be loaded. Give ours another name: "
            "config_name='car' (--config-name car)."
        )


def refuse_unknown_splits(config: Mapping[str, Any], config_name: str, known: Collection[str], repo_id: str) -> None:
    """Where a header tells the rows of some splits, `datasets` loads nothing if there are others.

    Args:
        config (`Mapping`), config_name (`str`): what the header says of the configuration that is pushed to, and its name.
        known (`Collection`): the splits whose rows the header will tell, and those that go.
        repo_id (`str`): for the message.

    Raises:
        ValueError: the header names files of another split and does not tell its rows.
    """
    others = [split for split, _ in _paths(config) if split not in known]
    if others:
        raise ValueError(
            f"repo_id={repo_id!r}: its card's header names files of the split {others[0]!r} in the configuration "
            f"{config_name!r}, and not its rows (`dataset_info`); with ours beside it neither could be loaded. {ELSEWHERE}, or "
            "give ours a name of its own: config_name='car' (--config-name car)."
        )


def _is_data(name: str) -> bool:
    plain = name.lower()
    for packed in PACKED:
        plain = plain.removesuffix(packed)
    if plain.endswith(DATA_FILES):
        return True
    # as a split's name `datasets` takes a word between these characters, of a file or a folder
    says_so = plain.startswith("data/") or re.search(rf"(^|[-._ 0-9/])({SPLIT_WORDS})[-._ 0-9/]", plain)
    return plain.endswith(MAYBE_DATA) and bool(says_so) and not plain.startswith("plots/")


def _is_other_format(name: str) -> bool:
    suffix = PurePosixPath(name).suffix
    return bool(suffix) and "*" not in suffix and suffix.lower() != ".parquet"


def _paths(config: Mapping[str, Any]) -> list[tuple[str | None, str]]:
    """Split (`None` where the header names none) and pattern of its files, in all the forms that a header may have."""
    data_files = config.get("data_files") or []
    found: list[tuple[str | None, str]] = []
    for each in [data_files] if isinstance(data_files, str) else data_files:
        split, path = (each["split"], each["path"]) if isinstance(each, dict) else (None, each)
        found += [(split, one) for one in ([path] if isinstance(path, str) else path)]
    return found


def _matches(pattern: str, files: Iterable[str]) -> list[str]:
    """The files that a pattern of the header names; the pattern itself where there is none, as its ending may tell."""
    patterns = (pattern, pattern.removeprefix("./"), pattern.removeprefix("**/"))
    return [name for name in files if _is_data(name) and any(fnmatchcase(name, each) for each in patterns)] or [pattern]
