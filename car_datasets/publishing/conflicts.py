"""Refuse a push that would hide data files of a repository, or leave it impossible to load or verify.

Does: say in the error message what was seen, and where to push instead.
Does not: send requests to a Hub; change a card.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from car_datasets.receipt import RECEIPT_FILE, Receipt
from car_datasets.results import PLOTS_FOLDER, REPORT_FILE

TABLES = (".parquet", ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".arrow", ".xml", ".h5", ".hdf5")
DATA_FILES = (*TABLES, ".zip", ".tar")

# Files with these suffixes are data only if their folder or name says so; otherwise they are notes, or pictures of a
# card.
MAYBE_DATA = (".txt", ".png", ".jpg", ".jpeg", ".gif", ".webp", ".wav", ".mp3", ".flac", ".mp4")
SPLIT_WORDS = "train|training|validation|valid|dev|val|test|testing|eval|evaluation"  # `datasets` finds splits by them
PACKED = (".gz", ".zst", ".bz2", ".xz", ".lz4")
NOT_ROWS = (RECEIPT_FILE, REPORT_FILE, "dataset_infos.json")
ELSEWHERE = "Push to another repository"


def refuse_hidden_data(files: Iterable[str], ours: Collection[str], repo_id: str) -> None:
    """Raise ValueError if there are other data files, because a header with `configs` hides all that it does not name.

    Args:
        files (`Iterable`): all names in the repository.
        ours (`Collection`): the names that the push replaces.
        repo_id (`str`): for the error message.

    Raises:
        ValueError: the repository holds data files that the push does not replace.
    """
    others = [name for name in files if _is_data(name) and name not in ours and name not in NOT_ROWS]
    if others:
        raise ValueError(
            f"repo_id={repo_id!r} holds {len(others)} data file(s), such as {others[0]!r}, in splits that its card "
            f"does not name; they would not be loaded any more. {ELSEWHERE}, or name them in the card's `configs`, as "
            "Parquet and in a configuration of their own."
        )


class ExistingSelection(NamedTuple):
    """The selection whose receipt a repository holds.

    Args:
        source (`dict`): the source of its rows.
        selected_sha256 (`str`): the digest of its rows.
        place (`tuple[str, str]`, *optional*): configuration and split that the card names.
        made (`tuple`): scorer, embedder and settings.
    """

    source: dict[str, Any]
    selected_sha256: str
    place: tuple[str, str] | None
    made: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def read(cls, receipt: bytes, place: tuple[str, str] | None) -> ExistingSelection:
        """Parse a `receipt.json`.

        Args:
            receipt (`bytes`): the content of the file.
            place (`tuple[str, str]`, *optional*): configuration and split that the card names.
        """
        try:
            known = Receipt.from_json(receipt)
        except ValueError:  # a receipt of another version; this result is equal to no selection
            return cls({}, "", place)
        return cls(known.source, known.selected_sha256, place, (known.scorer, known.embedder, known.recipe))

    def is_of(self, receipt: Receipt | None) -> bool:
        """Return True if a receipt is of this selection: the same source and the same rows."""
        # Not the entire receipt: versions differ between two runs that make one selection.
        return receipt is not None and (self.source, self.selected_sha256) == (receipt.source, receipt.selected_sha256)

    def has_scores_of(self, receipt: Receipt | None) -> bool:
        """Return True if a receipt is of this selection and of the same scores and clusters of its pool."""
        made = None if receipt is None else (receipt.scorer, receipt.embedder, receipt.recipe)
        return self.is_of(receipt) and made == self.made


def refuse_second_selection(existing: ExistingSelection, config_name: str, split: str, repo_id: str) -> None:
    """Raise ValueError for another selection than the one that a repository holds.

    A repository has one receipt, one report and one section of a card, and so one selection that can be verified.

    Args:
        existing ([`ExistingSelection`]): the selection that the repository holds.
        config_name, split (`str`): where the other was to be pushed.
        repo_id (`str`): for the error message.

    Raises:
        ValueError: always.
    """
    where = "" if existing.place is None else " in configuration {!r}, split {!r}".format(*existing.place)
    name = existing.source.get("id") or existing.source.get("name")
    raise ValueError(
        f"repo_id={repo_id!r} holds the receipt of another selection{f' from {name!r}' if name else ''}{where}. Pushed "
        f"as config_name={config_name!r}, split={split!r}, this one would replace its receipt, report and card, and "
        f"the other could not be verified any more. {ELSEWHERE}, one for each selection."
    )


def refuse_unloadable(
    configs: Mapping[str, Mapping[str, Any]],
    config_name: str,
    splits: Collection[str],
    files: Collection[str],
    repo_id: str,
) -> None:
    """Raise ValueError if a configuration, old or new, could not be loaded after the push.

    `datasets` opens all configurations of a repository with the reader of the first, and allows one default.

    Args:
        configs (`Mapping`): configuration to its entry in the header.
        config_name (`str`), splits (`Collection`): what is pushed; it replaces splits of the same name.
        files (`Collection`): all names in the repository.
        repo_id (`str`): for the error message.

    Raises:
        ValueError: a configuration does not name its files, has files of another format, or is a second default.
    """
    for name, config in configs.items():
        shown = f"repo_id={repo_id!r}: its card's header has the configuration {name!r}"
        if config.get("data_dir") or (name != config_name and not config.get("data_files")):
            seen = f"data_dir={config['data_dir']!r}" if config.get("data_dir") else "no `data_files`"
            raise ValueError(
                f"{shown} with {seen}, which `datasets` fills from the files that it finds, ours among them. "
                f"{ELSEWHERE}, or name its files in `data_files` there."
            )
        # Without the splits that the push replaces, which are Parquet afterwards.
        kept = [path for split, path in _paths(config) if name != config_name or split not in splits]
        if foreign := _first_foreign(kept, files):
            raise ValueError(
                f"{shown} of {foreign!r}, and `datasets` reads all files of a repository in one format, which is "
                f"Parquet for a push. {ELSEWHERE} (another config_name does not help), or make that file Parquet."
            )
    _refuse_second_default(configs, config_name, repo_id)


def _first_foreign(patterns: Iterable[str], files: Collection[str]) -> str | None:
    """Return the first file of these patterns that is not Parquet."""
    return next((file for each in patterns for file in _matches(each, files) if _is_other_format(file)), None)


def _refuse_second_default(configs: Mapping[str, Mapping[str, Any]], config_name: str, repo_id: str) -> None:
    # `default: true` at the configuration `default` itself is not a conflict.
    marked = [name for name, config in configs.items() if config.get("default") and name != "default"]
    if config_name == "default" and marked:
        raise ValueError(
            f"repo_id={repo_id!r}: its card's header has `default: true` at the configuration {marked[0]!r}, and "
            "config_name='default' would be a second default: none could be loaded. Give ours another name: "
            "config_name='car' (--config-name car)."
        )


def refuse_unknown_splits(config: Mapping[str, Any], config_name: str, known: Collection[str], repo_id: str) -> None:
    """Raise ValueError if a header names a split without its number of rows.

    If a header has the number of rows of some splits, `datasets` cannot load any others.

    Args:
        config (`Mapping`): entry of the header for the configuration that is pushed to.
        config_name (`str`): name of that configuration.
        known (`Collection`): the splits whose rows the header will have after the push, and those that are deleted.
        repo_id (`str`): for the error message.

    Raises:
        ValueError: the header names files of another split, and not its rows.
    """
    others = [split for split, _ in _paths(config) if split not in known]
    if others:
        raise ValueError(
            f"repo_id={repo_id!r}: its card's header names files of the split {others[0]!r} in the configuration "
            f"{config_name!r}, and not its rows (`dataset_info`); with ours added neither could be loaded. "
            f"{ELSEWHERE}, or give ours a name of its own: config_name='car' (--config-name car)."
        )


def _is_data(name: str) -> bool:
    # `rows.csv.gz` is data, as `datasets` unpacks it.
    plain = name.lower()
    for packed in PACKED:
        plain = plain.removesuffix(packed)
    if plain.endswith(DATA_FILES):
        return True
    # `datasets` takes such a word between these characters, in the name of a file or folder, as the name of a split.
    says_so = plain.startswith("data/") or re.search(rf"(^|[-._ 0-9/])({SPLIT_WORDS})[-._ 0-9/]", plain)
    return plain.endswith(MAYBE_DATA) and bool(says_so) and not plain.startswith(f"{PLOTS_FOLDER}/")


def _is_other_format(name: str) -> bool:
    suffix = PurePosixPath(name).suffix
    # A suffix with a wildcard says nothing about the format.
    return bool(suffix) and "*" not in suffix and suffix.lower() != ".parquet"


def _paths(config: Mapping[str, Any]) -> list[tuple[str | None, str]]:
    """Return (split, pattern) for the files of a configuration; the split is `None` if the header names none."""
    # `data_files` may be one pattern, a list of patterns, or a list of {split, path}, where path is one or a list.
    data_files = config.get("data_files") or []
    pairs: list[tuple[str | None, str]] = []
    for each in [data_files] if isinstance(data_files, str) else data_files:
        split, path = (each["split"], each["path"]) if isinstance(each, dict) else (None, each)
        pairs += [(split, one) for one in ([path] if isinstance(path, str) else path)]
    return pairs


def _matches(pattern: str, files: Iterable[str]) -> list[str]:
    """Return the data files that a pattern names, or if there are none the pattern, whose suffix tells the format."""
    # Enough of `datasets`' glob patterns for the forms that cards have; `*` here also matches a slash.
    patterns = (pattern, pattern.removeprefix("./"), pattern.removeprefix("**/"))
    return [name for name in files if _is_data(name) and any(fnmatchcase(name, each) for each in patterns)] or [pattern]
