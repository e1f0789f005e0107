"""A folder in a dataset repository: `hf://datasets/you/work/run-1`, where scoring in shards keeps what is finished.

Does: read at a commit, and add files by a commit on top of the one that was read; the Hub refuses it where another came
first, so that of two who bring the same file one is heard, and nothing is ever half there.
Does not: keep claims. A claim needs a sign of life every few seconds, and the Hub limits the commits of an hour: a shard is
one commit. Workers on one machine claim in a local folder; two machines may score the same shard, and the first one counts.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from car_datasets.asking import asking
from car_datasets.digests import file_digest
from car_datasets.repositories import open_repository
from car_datasets.results import write_whole
from car_datasets.retrying import retry
from car_datasets.tokens import clean_token, refuse_unwritable, who_am_i

T = TypeVar("T")
START = "hf://datasets/"
ADDRESS = re.compile(START + r"(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?(?:/(?P<path>.+))?")
logger = logging.getLogger(__name__)


class HubFolder:
    """A flat folder of whole files in a dataset repository, as [`~car_datasets.claims.Folder`] is one elsewhere.

    Args:
        location (`str`): `hf://datasets/owner/name[@branch][/folder]`. The repository is made, private, when something is
            written.
        token (`str`, *optional*): else that of `HF_TOKEN` or `hf auth login`.

    Raises:
        ValueError: the location names no dataset repository.
    """

    local = None
    claimable = False
    patience = 5.0  # seconds between two looks: each is two requests, and the Hub counts them

    def __init__(self, location: str, token: str | None = None) -> None:
        from huggingface_hub import HfApi

        match = ADDRESS.fullmatch(location.rstrip("/"))
        if match is None:
            raise ValueError(
                f"shard_dir={location!r} names no dataset repository; say {START}you/name, and a folder in it: "
                f"{START}you/name/run-1."
            )
        self.location = location
        self.repo_id, self.revision, self.path = match["repo"], match["revision"], match["path"] or ""
        self._token = clean_token(token)
        self._api = HfApi(token=self._token)
        self._head: str | None = None  # the commit that was read last

    def __str__(self) -> str:
        return self.location

    def make(self) -> None:
        """Make sure of a repository that may be written to: private if it is made here.

        Raises:
            ValueError: there is no token, or one that may not write there.
        """
        shown = f"shard_dir={self.location!r}"
        refuse_unwritable(who_am_i(self._api.whoami, shown), self.repo_id, shown)
        if not self._ask(lambda: self._api.repo_exists(self.repo_id, repo_type="dataset")):
            open_repository(self.repo_id, True, self._token, repo_type="dataset", argument="shard_dir")
        elif not self._ask(lambda: self._api.dataset_info(self.repo_id)).private:
            logger.warning("%s is public: anyone can read the scores that are kept there.", self)
        if self.revision is not None:
            branch = self.revision
            self._ask(lambda: self._api.create_branch(self.repo_id, branch=branch, repo_type="dataset", exist_ok=True))

    def names(self) -> set[str]:
        """The names of what it holds; none where it is not there."""
        return set(self._ask(self._files))

    def read(self, name: str) -> bytes | None:
        """The content of a file, or `None` where it is not there."""

        def attempt() -> bytes | None:
            content: bytes | None = self._remote().cat_file(self._at_head(name)) if name in self._files() else None
            return content

        return self._ask(attempt)

    def write(self, name: str, content: bytes) -> None:
        """Add a small file; one that is there stays."""
        self._add(name, content, lambda file: self.read(name) == content)

    def upload(self, path: Path, name: str, replace: bool = False) -> bool:
        """Add a local file. Where another worker's is there it stays, unless `replace`: whether it is this one then."""
        digest = file_digest(path)
        return self._add(name, str(path), lambda file: file.lfs is not None and file.lfs.sha256 == digest, replace)

    def download(self, name: str, path: Path) -> None:
        """Fetch a file; what is at `path` is always whole."""

        def attempt() -> None:
            if self._head is None:
                self._files()
            write_whole(path, lambda partial: self._remote().get_file(self._at_head(name), partial))

        self._ask(attempt)

    def _add(self, name: str, content: bytes | str, is_same: Callable[[Any], bool], replace: bool = False) -> bool:
        from huggingface_hub import CommitOperationAdd

        path = f"{self.path}/{name}" if self.path else name

        def attempt() -> bool:
            there = self._files().get(name)
            if there is not None and (is_same(there) or not replace):  # ours: the answer to the commit was lost
                return is_same(there)
            self._api.create_commit(
                self.repo_id,
                [CommitOperationAdd(path, content)],
                commit_message=f"Add {path}",
                repo_type="dataset",
                revision=self.revision,
                parent_commit=self._head,
            )
            return True

        return self._ask(attempt)

    def _files(self) -> dict[str, Any]:
        """What the folder holds now, by name, at a commit that is kept for reading."""
        from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

        try:
            self._head = str(self._api.dataset_info(self.repo_id, revision=self.revision).sha)
            tree = list(
                self._api.list_repo_tree(self.repo_id, self.path or None, revision=self._head, repo_type="dataset")
            )
        except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
            return {}
        return {entry.path.rsplit("/", 1)[-1]: entry for entry in tree}

    def _remote(self) -> Any:
        from huggingface_hub import HfFileSystem

        # An instance that is kept has all listings, by commit; ours must not grow.
        return HfFileSystem(token=self._token, skip_instance_cache=True)

    def _at_head(self, name: str) -> str:
        return "/".join(filter(None, (f"datasets/{self.repo_id}@{self._head}", self.path, name)))

    def _ask(self, call: Callable[[], T]) -> T:
        with asking(f"shard_dir={self.location!r}", "dataset", self.revision):
            return retry(call)
