"""Storage of shards in a dataset repository: `hf://datasets/you/work/run-1`.

Does: read at a commit, and add a file by a commit on top of it, which the Hub refuses if another commit came first: of
two workers that add the same file one succeeds.
Does not: store claims: they need a heartbeat every few seconds, and the Hub limits commits per hour.
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
    """A [`ShardStorage`] in a dataset repository.

    Workers on one machine claim shards in a local folder instead; two machines may score the same shard, and the first
    commit counts.

    Args:
        location (`str`): `hf://datasets/owner/name[@branch][/folder]`. The repository is created, as a private one,
            when something is written.
        token (`str`, *optional*): by default `HF_TOKEN` or the token of `hf auth login`.

    Raises:
        ValueError: the location is not the address of a dataset repository.
    """

    local = None
    patience = 5.0  # a look takes two requests, and the Hub limits requests

    def __init__(self, location: str, token: str | None = None) -> None:
        """Parse the address; no request is made yet."""
        from huggingface_hub import HfApi

        match = ADDRESS.fullmatch(location.rstrip("/"))
        if match is None:
            raise ValueError(
                f"shard_dir={location!r} is not the address of a dataset repository. Pass {START}you/name, or a folder "
                f"in it: {START}you/name/run-1."
            )
        self.location = location
        self.repo_id, self.revision, self.path = match["repo"], match["revision"], match["path"] or ""
        self._token = clean_token(token)
        self._api = HfApi(token=self._token)
        self._head: str | None = None  # the commit of the last listing, at which files are read

    def __str__(self) -> str:
        """Return the location."""
        return self.location

    def make(self) -> None:
        """Check that the token may write to the repository, and create it, as a private one, if it does not exist.

        Raises:
            ValueError: there is no token, or it may not write to the repository.
        """
        shown = f"shard_dir={self.location!r}"
        refuse_unwritable(who_am_i(self._api.whoami, shown), self.repo_id, shown)
        if not self._ask(lambda: self._api.repo_exists(self.repo_id, repo_type="dataset")):
            open_repository(self.repo_id, True, self._token, repo_type="dataset", argument="shard_dir")
        elif not self._ask(lambda: self._api.dataset_info(self.repo_id)).private:
            logger.warning("%s is public: anyone can read the scores that are stored in it.", self)
        if self.revision is not None:
            branch = self.revision
            self._ask(lambda: self._api.create_branch(self.repo_id, branch=branch, repo_type="dataset", exist_ok=True))

    def names(self) -> set[str]:
        """Return the names of the files in it; an empty set if it does not exist."""
        return set(self._ask(self._files))

    def read(self, name: str) -> bytes | None:
        """Return the content of a file, or `None` if it does not exist."""

        def attempt() -> bytes | None:
            content: bytes | None = self._remote().cat_file(self._at_head(name)) if name in self._files() else None
            return content

        return self._ask(attempt)

    def write(self, name: str, content: bytes) -> None:
        """Add a small file; one that exists is kept."""
        self._add(name, content, lambda file: self.read(name) == content)

    def upload(self, path: Path, name: str, replace: bool = False) -> bool:
        """Add a local file, and return True if the folder then holds it.

        Another worker's file of that name is kept, unless `replace` is set.
        """
        digest = file_digest(path)
        return self._add(name, str(path), lambda file: file.lfs is not None and file.lfs.sha256 == digest, replace)

    def download(self, name: str, path: Path) -> None:
        """Copy a file to a local path atomically."""

        def attempt() -> None:
            if self._head is None:
                self._files()
            write_whole(path, lambda partial: self._remote().get_file(self._at_head(name), partial))

        self._ask(attempt)

    def _add(self, name: str, content: bytes | str, is_same: Callable[[Any], bool], replace: bool = False) -> bool:
        """Commit a file, and return True if the folder then holds it.

        Args:
            name (`str`): its name in the folder.
            content (`bytes` or `str`): the content, or the path of a local file.
            is_same (`Callable`): returns True if an entry of the repository has this content.
            replace (`bool`): replace another file of that name.
        """
        from huggingface_hub import CommitOperationAdd

        path = f"{self.path}/{name}" if self.path else name

        def attempt() -> bool:
            # Listed anew for every attempt: if only the response to a commit was lost, our own file is found here.
            present = self._files().get(name)
            if present is not None and (is_same(present) or not replace):
                return is_same(present)
            self._api.create_commit(
                self.repo_id,
                [CommitOperationAdd(path, content)],
                commit_message=f"Add {path}",
                repo_type="dataset",
                revision=self.revision,
                parent_commit=self._head,  # the Hub answers 412 if another commit came first; it is then tried again
            )
            return True

        return self._ask(attempt)

    def _files(self) -> dict[str, Any]:
        """Return the entries of the folder by name, at the newest commit, which later reads refer to."""
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

        # A cached instance would keep the listings of all commits, and grow with every shard.
        return HfFileSystem(token=self._token, skip_instance_cache=True)

    def _at_head(self, name: str) -> str:
        return "/".join(filter(None, (f"datasets/{self.repo_id}@{self._head}", self.path, name)))

    def _ask(self, call: Callable[[], T]) -> T:
        """Return `call()`, repeated on transient errors; other errors name `shard_dir`."""
        with asking(f"shard_dir={self.location!r}", "dataset", self.revision):
            return retry(call)
