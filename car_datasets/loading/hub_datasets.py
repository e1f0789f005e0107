"""Find the rows of a dataset on the Hub at one commit, and download its files.

Does: resolve a revision once; list the JSON and CSV files of each split, so that they are read as on this machine; let
`datasets` prepare Parquet and other formats, which have types of their own; turn what cannot be loaded into one error.
Does not: parse a file, or choose a split.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import yaml
from datasets import Dataset, DatasetBuilder, DatasetDict, config, load_dataset_builder
from datasets.config import HF_ENDPOINT, HF_HUB_OFFLINE
from datasets.exceptions import DatasetsError

from car_datasets.loading.files import DataFile, data_file, kind_of, listed, quiet_readers
from car_datasets.utils import revisions
from car_datasets.utils.columns import refuse_casts
from car_datasets.utils.files import cache_folder, write_content
from car_datasets.utils.hub import READING_WAITS, asking, clean_token, reason, retry
from car_datasets.utils.settings import refuse_huge_header

logger = logging.getLogger(__name__)


class HubDataset(NamedTuple):
    """A dataset of the Hub at a commit.

    Args:
        commit (`str`): the commit.
        files (`dict`): the names of the JSON or CSV files of each split; empty if `datasets` read the rows.
        rows (`DatasetDict`, *optional*): the rows of each split of any other format.
    """

    commit: str
    files: dict[str, list[str]]
    rows: DatasetDict | None = None


def find_dataset(
    repo_id: str,
    name: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
) -> HubDataset:
    """Find the splits of a dataset on the Hub at the commit that `revision` means now.

    The commit is resolved before anything is loaded, so that a branch which moves meanwhile makes no difference.

    Args:
        repo_id (`str`): `"owner/name"`.
        name (`str`, *optional*): the configuration.
        revision (`str`, *optional*): branch, tag or commit.
        token (`str`, *optional*): a token for a private dataset.
        cache_dir (`str`, *optional*): where `datasets` keeps its Arrow files.

    Raises:
        FileNotFoundError: the Hub has no such dataset or revision that you may see.
        ConnectionError: the Hub cannot be reached.
        ValueError: the Hub rejects the token, or the dataset cannot be loaded.
    """
    shown = f"source={repo_id!r}"
    resolved = revisions.is_commit(revision) or HF_HUB_OFFLINE  # offline, the branch is looked up in the cache
    commit = revision if resolved else revisions.pin_dataset(repo_id, revision, token, FileNotFoundError)
    note = _note(repo_id, name, commit, cache_dir)
    try:
        with asking(shown, "dataset", revision, FileNotFoundError):
            found = _read_note(note)
            if found is None:
                found = _ask_datasets(repo_id, name, commit, token, cache_dir)
            # Offline this may be an old commit, which the user should see without asking for it.
            level = logging.WARNING if HF_HUB_OFFLINE else logging.INFO
            logger.log(level, "%s: commit %s is loaded.", shown, found.commit)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{shown} is not a local file or folder, and as a Hub id: {error}") from error
    except yaml.YAMLError as error:
        raise ValueError(
            f"{shown}: the header of its README.md is not valid YAML ({' '.join(str(error).split())}). "
            "Correct it, or download the data files and pass their paths."
        ) from error
    except (DatasetsError, RuntimeError, ImportError, StopIteration) as error:
        raise ValueError(f"{shown} cannot be loaded: {reason(error.__cause__ or error)[:300]}") from error
    except ValueError as error:
        if str(error).startswith(shown):
            raise
        advice = " Say which: name=... (--name)." if "config" in str(error).lower() else ""
        raise ValueError(f"{shown} cannot be loaded: {reason(error)[:300]}{advice}") from error
    if found.files:
        for each in {note, _note(repo_id, name, found.commit, cache_dir), _note(repo_id, name, revision, cache_dir)}:
            _write_note(each, found)
    return found


def _ask_datasets(
    repo_id: str, name: str | None, commit: str | None, token: str | None, cache_dir: str | None
) -> HubDataset:
    builder = builder_at_commit(repo_id, name, commit, token, cache_dir)
    if builder.name in ("json", "csv"):
        return HubDataset(str(builder.hash), _plain_files(builder))
    if builder.name in ("parquet", "arrow"):
        refuse_casts(builder)
    try:
        with quiet_readers():
            builder.download_and_prepare()
    except (DatasetsError, pa.ArrowException) as error:
        # The error of `datasets` says only that there was one; its cause says which.
        found = [
            file.rpartition(f"@{builder.hash}/")[2]
            for split in (builder.config.data_files or {}).values()
            for file in split
        ]
        raise ValueError(
            f"source={repo_id!r} cannot be loaded from {listed(found)}: {reason(error.__cause__ or error)[:300]}"
        ) from error
    return HubDataset(str(builder.hash), {}, builder.as_dataset())


def _plain_files(builder: DatasetBuilder) -> dict[str, list[str]]:
    """Return the JSON or CSV files of each split.

    Raises:
        ValueError: only `datasets` can read them, which would change values.
    """
    shown, advice = f"source={builder.repo_id!r}", "Open it with datasets.load_dataset, and pass the Dataset."
    plain = builder.BUILDER_CONFIG_CLASS()
    ours = {"name", "version", "data_dir", "data_files", "description", "sep", "delimiter", "encoding"}
    changed = {f.name for f in fields(plain) if getattr(builder.config, f.name) != getattr(plain, f.name)} - ours
    prefix = f"hf://datasets/{builder.repo_id}@{builder.hash}/"
    files = builder.config.data_files or {}
    if changed:
        raise ValueError(
            f"{shown}: the configuration {builder.config.name!r} of its README.md has {sorted(changed)}, which are for "
            f"`datasets` itself. {advice}"
        )
    if odd := [file for split in files.values() for file in split if not (file.startswith(prefix) and kind_of(file))]:
        raise ValueError(
            f"{shown}: {listed([file.removeprefix(prefix) for file in odd])}: only `datasets` itself reads such files. "
            f"{advice}"
        )
    return {str(split): [file.removeprefix(prefix) for file in found] for split, found in files.items()}


def download_splits(
    repo_id: str, found: HubDataset, splits: Sequence[str], token: str | None = None
) -> dict[str, list[DataFile]]:
    """Return the files of some splits of [`find_dataset`], downloaded or from the cache, which has them by commit.

    Raises:
        ConnectionError: the Hub cannot be reached.
        ValueError: the Hub refuses, or a file is empty.
    """
    from huggingface_hub import hf_hub_download

    options: dict[str, Any] = {"repo_type": "dataset", "revision": found.commit, "token": clean_token(token)}

    def fetch(name: str) -> DataFile:
        path = retry(lambda: hf_hub_download(repo_id, name, **options), READING_WAITS)
        return data_file(path, f"{repo_id}/{name}")

    with asking(f"source={repo_id!r}", "dataset", found.commit), ThreadPoolExecutor(8) as pool:
        return {split: list(pool.map(fetch, found.files[split])) for split in splits}


# Which files a revision has is noted, since the cache of the Hub's client does not know whether it has all of them.


def _note(repo_id: str, name: str | None, revision: str | None, cache_dir: str | None) -> Path:
    key = json.dumps([HF_ENDPOINT, repo_id, name, revision or "main"])
    return cache_folder(cache_dir) / "hub" / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


def _read_note(path: Path) -> HubDataset | None:
    try:
        return HubDataset(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # what cannot be read is looked up again
        return None


def _write_note(path: Path, found: HubDataset) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"commit": found.commit, "files": found.files})
    write_content(path, text)


def load_split(
    repo_id: str, config_name: str, split: str, sha: str, token: str | None = None, cache_dir: str | None = None
) -> Dataset:
    """Load a split of a dataset repository at a commit, retrying on transient errors.

    Raises:
        ValueError: the configuration or split does not exist, the Hub refuses it, or its files cannot be read.
        ConnectionError: the Hub does not answer.
    """
    shown = f"{repo_id!r}, split {split!r}"

    def load() -> Dataset:
        builder = builder_at_commit(repo_id, config_name, sha, clean_token(token), cache_dir)
        builder.download_and_prepare()
        return builder.as_dataset(split)

    try:
        with asking(shown, "dataset", sha):
            return retry(load, READING_WAITS)
    except DatasetsError as error:
        raise ValueError(f"{shown}: its files cannot be read ({reason(error)}).") from error


def _refuse_huge_headers(repo_id: str, revision: str | None, token: str | None) -> None:
    """Raise ValueError if the YAML by which `datasets` opens a repository is huge in memory; it has no such limit."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    options: dict[str, Any] = {"repo_type": "dataset", "revision": revision, "token": clean_token(token)}
    for name in (config.REPOCARD_FILENAME, config.REPOYAML_FILENAME):
        try:
            path = retry(functools.partial(hf_hub_download, repo_id, name, **options), READING_WAITS[:1])
            text = Path(path).read_text(encoding="utf-8", errors="replace")
        except (HTTPError, OSError, ValueError):  # `datasets`, which needs the file next, does without it or explains
            continue
        refuse_huge_header(text, f"source={repo_id!r}")


def builder_at_commit(
    repo_id: str, name: str | None, revision: str | None, token: str | None = None, cache_dir: str | None = None
) -> DatasetBuilder:
    """Return the builder of a Hub dataset at exactly the commit `revision`, never at another one from the cache.

    If the Hub fails, `datasets` falls back to any revision in its cache without a warning; that fallback is refused.

    Args:
        repo_id (`str`): `"owner/name"`.
        name (`str`, *optional*): the configuration.
        revision (`str`, *optional*): a commit. A branch, a tag or `None` is not checked: offline, its current commit
            cannot be known.
        token (`str`, *optional*): a token for a private dataset.
        cache_dir (`str`, *optional*): where `datasets` keeps its Arrow files.

    Raises:
        ConnectionError: the cache holds another commit, and the Hub did not provide this one.
    """
    _refuse_huge_headers(repo_id, revision, token)
    builder = load_dataset_builder(repo_id, name, revision=revision, token=token, cache_dir=cache_dir)
    # For a Hub dataset `hash` is the commit that the builder reads; a cached builder carries that of its own commit.
    if revisions.is_commit(revision) and str(builder.hash) != revision:
        raise ConnectionError(
            f"commit {revision} could not be loaded, and the cache holds {builder.hash}, which is a different commit"
        )
    return builder
