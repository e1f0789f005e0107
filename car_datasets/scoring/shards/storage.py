"""Storage of shards: a folder that all workers see, an fsspec URL, or a dataset repository (`hf://datasets/you/work`).

Does: create, read, list and remove files atomically. In a repository, a file is added by a commit on top of the one
that was read, which the Hub refuses if another came first: of two workers that add the same file, one succeeds.
Does not: store claims in a repository, as they need a heartbeat every few seconds and the Hub limits commits per hour.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from car_datasets.utils.digests import file_digest
from car_datasets.utils.files import refuse_in_source, write_content, write_whole
from car_datasets.utils.hub import asking, clean_token, open_repository, refuse_unwritable, retry, who_am_i

START = "hf://datasets/"
MANIFEST = "manifest.json"  # of a run; the folder that holds it is a folder of shards
ADDRESS = re.compile(START + r"(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?(?:/(?P<path>.+))?")
T = TypeVar("T")
logger = logging.getLogger(__name__)


class ShardStorage(Protocol):
    """A flat folder in which workers share the files of a run; a file is never seen half-written.

    Attributes:
        patience (`float`): seconds that a waiting worker leaves between two looks at the folder.
    """

    patience: float

    @property
    def local(self) -> Path | None:
        """Return the path of the folder if it is local, else `None`."""

    def make(self) -> None:
        """Create the folder, and raise ValueError if nothing may be written to it."""

    def names(self) -> set[str]:
        """Return the names of the files in it; an empty set if it does not exist."""

    def read(self, name: str) -> bytes | None:
        """Return the content of a file, or `None` if it does not exist."""

    def write(self, name: str, content: bytes) -> None:
        """Write a small file atomically."""

    def upload(self, path: Path, name: str, replace: bool = False) -> bool:
        """Store a local file atomically as `name`.

        Args:
            path (`Path`): the local file.
            name (`str`): its name in the folder.
            replace (`bool`): replace a file of that name even where the storage would keep it.

        Returns:
            `bool`: False if the folder keeps another worker's file instead.
        """

    def download(self, name: str, path: Path) -> None:
        """Copy a file to a local path atomically."""


def open_storage(location: str | os.PathLike[str], token: str | None = None) -> ShardStorage:
    """Return the storage at an address; nothing is created or requested yet.

    Args:
        location (`str` or `PathLike`): a folder, an fsspec URL, or `hf://datasets/...`.
        token (`str`, *optional*): for a repository.

    Raises:
        ValueError: it is empty, an address on the Hub that is not that of a dataset repository, or a URL whose
            filesystem is not installed or not known.
    """
    refuse_blank(location)
    address = os.fspath(location)
    # Buckets on the Hub are object stores, which fsspec can write; repositories take commits.
    on_the_hub = address.startswith("hf://") and not address.startswith("hf://buckets/")
    return HubFolder(address, token) if on_the_hub else Folder(address)


def refuse_blank(shard_dir: str | os.PathLike[str]) -> None:
    """Raise ValueError for an empty name (of an unset variable, say), which would be the working directory."""
    if not os.fspath(shard_dir).strip():
        raise ValueError("shard_dir='' is empty. Pass a folder (--shards DIR), or leave it out.")


def check_shards(location: str | os.PathLike[str], output: Path | None = None, source: object = None) -> None:
    """Check that shards can be kept at an address, before a row is read or a model is loaded.

    Args:
        location (`str` or `PathLike`): a folder, an fsspec URL, or `hf://datasets/...`, as a run is called with it.
        output (`Path`, *optional*): the folder or file that the run will write.
        source (*optional*): what the run reads.

    Raises:
        ValueError: it is not such an address, its filesystem is not installed, nothing can be written there, or it lies
            in the output or in the source.
    """
    storage = open_storage(location)
    if not isinstance(storage, Folder):
        return
    place = storage.local
    if place is not None and output is not None and output.resolve() in (place.resolve(), *place.resolve().parents):
        raise ValueError(
            f"shard_dir={str(storage)!r} lies in the output, {str(output)!r}, which is the result alone. Name a folder "
            "next to it."
        )
    if place is not None:
        refuse_in_source(place, source, "shard_dir")
    # Finished shards may be read where nothing can be written; a run that has to write there says so when it does.
    if place is None or not any(place.glob(f"*/{MANIFEST}")):
        storage.probe()


class Folder:
    """A [`ShardStorage`] in a local folder or behind any fsspec URL (`s3://...`, `memory://...`), in which claims work.

    Args:
        location (`str` or `PathLike`): created when something is written.
    """

    patience = 0.5

    def __init__(self, location: str | os.PathLike[str]) -> None:
        """Open the folder, which need not exist."""
        from fsspec.core import url_to_fs
        from fsspec.implementations.local import LocalFileSystem

        self.location = os.fspath(location)
        shown = f"shard_dir={self.location!r}"
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/(?!/)", self.location):  # else a local folder `s3:` would be made
            raise ValueError(f"{shown} is neither a folder nor a URL: a URL has two slashes, as in s3://bucket/run-1.")
        try:
            self._fs, self._path = url_to_fs(self.location)
        except (ImportError, ValueError) as error:  # not installed, or not known to fsspec
            raise ValueError(
                f"{shown}: no filesystem is installed for this URL ({error}). Install its package, such as s3fs for "
                "s3://, or name a local folder."
            ) from error
        # Local paths bypass fsspec where the system's own calls are atomic (O_EXCL, rename).
        self.local = Path(self._path) if isinstance(self._fs, LocalFileSystem) else None

    def __str__(self) -> str:
        """Return the location."""
        return self.location

    def make(self) -> None:
        """Create the folder and its parents."""
        self._fs.makedirs(self._path, exist_ok=True)

    def probe(self) -> None:
        """Raise ValueError if nothing can be written to it, and leave no trace."""
        name = f".{uuid.uuid4().hex}"
        try:
            if self.local is None:
                self.make()
                self.write(name, b"")
                self.remove(name)
            else:
                # In the nearest folder that exists: of processes that start together, one that made and removed the
                # folder could take it away from another.
                place = next(folder for folder in (self.local, *self.local.parents) if folder.exists())
                write_content(place / name, b"")
                (place / name).unlink()
        # Each filesystem behind fsspec has errors of its own, for missing keys, say.
        except Exception as error:
            raise ValueError(
                f"shard_dir={self.location!r}: nothing can be written there ({error or type(error).__name__}). Name "
                "another folder or URL, or mend this one."
            ) from error

    def names(self) -> set[str]:
        """Return the names of the files in it; an empty set if it does not exist."""
        self._fs.invalidate_cache()  # object stores keep listings, which would hide the files of other workers
        try:
            return {str(path).rstrip("/").rsplit("/", 1)[-1] for path in self._fs.ls(self._path, detail=False)}
        except FileNotFoundError:
            return set()

    def read(self, name: str) -> bytes | None:
        """Return the content of a file, or `None` if it does not exist."""
        try:
            content: bytes = self._fs.cat_file(self._at(name))
        except FileNotFoundError:
            return None
        return content

    def create(self, name: str, content: bytes) -> bool:
        """Create a file and return True, or return False if it exists; of several workers that try, one succeeds.

        Local filesystems use O_EXCL, object stores a conditional put. On a filesystem that supports neither, several
        workers may succeed; they then do the same work, with equal results.
        """
        try:
            if self.local is not None:
                _create(self.local / name, content)
            else:
                self._fs.pipe_file(self._at(name), content, mode="create")
        except FileExistsError:
            return False
        return True

    def write(self, name: str, content: bytes) -> None:
        """Write a small file atomically, replacing any other of that name."""
        if self.local is not None:
            write_content(self.local / name, content)
        else:
            self._fs.pipe_file(self._at(name), content)  # object stores put an object atomically

    def upload(self, path: Path, name: str, replace: bool = False) -> bool:
        """Store a local file as `name`, replacing any other: under a temporary name first, then moved. Return True."""
        # A dot and the name of the part, by which `remove_leftovers` recognises what a killed worker has left.
        partial = f".{name}.{uuid.uuid4().hex[:8]}"
        self._fs.put_file(str(path), self._at(partial))
        self._fs.mv(self._at(partial), self._at(name))
        return True

    def download(self, name: str, path: Path) -> None:
        """Copy a file to a local path atomically."""
        write_whole(path, lambda partial: self._fs.get_file(self._at(name), partial))

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._at(name))

    def _at(self, name: str) -> str:
        return f"{self._path.rstrip('/')}/{name}"


def _create(path: Path, content: bytes) -> None:
    """Create a small file and write it; raise FileExistsError if it exists."""
    with path.open("xb") as file:  # O_CREAT | O_EXCL
        try:
            file.write(content)
            file.flush()
        except OSError:  # a full disk: an empty claim would block other workers until it expires
            path.unlink()
            raise


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

    # Parts are downloaded before they are read, as Arrow maps local files only.
    local = None
    patience = 5.0  # a look takes two requests, and the Hub limits requests

    def __init__(self, location: str, token: str | None = None) -> None:
        """Parse the address; no request is made yet."""
        from huggingface_hub import HfApi

        self.location = location
        self._shown = f"shard_dir={location!r}"  # how messages name the argument
        match = ADDRESS.fullmatch(location.rstrip("/"))
        if match is None:
            raise ValueError(
                f"{self._shown} is not the address of a dataset repository. Pass {START}you/name, or a folder "
                f"in it: {START}you/name/run-1."
            )
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
        # Before any work: else a token that may not write would fail only once the first shard is finished.
        refuse_unwritable(who_am_i(self._api.whoami, self._shown), self.repo_id, self._shown)
        if not self._ask(lambda: self._api.repo_exists(self.repo_id, repo_type="dataset")):
            open_repository(self.repo_id, True, self._token, repo_type="dataset", argument="shard_dir")
        elif not self._ask(lambda: self._api.dataset_info(self.repo_id)).private:
            logger.warning("%s is public: anyone can read the scores that are stored in it.", self)
        # The Hub refuses commits to a branch that does not exist.
        if self.revision is not None:
            branch = self.revision
            self._ask(lambda: self._api.create_branch(self.repo_id, branch=branch, repo_type="dataset", exist_ok=True))

    def names(self) -> set[str]:
        """Return the names of the files in it; an empty set if it does not exist."""
        return set(self._ask(self._files))

    def read(self, name: str) -> bytes | None:
        """Return the content of a file, or `None` if it does not exist."""

        def attempt() -> bytes | None:
            # The listing tells if the file exists, and sets the commit that `_at_head` names.
            content: bytes | None = self._remote().cat_file(self._at_head(name)) if name in self._files() else None
            return content

        return self._ask(attempt)

    def write(self, name: str, content: bytes) -> None:
        """Add a small file; one that exists is kept."""
        # Small files are not stored by LFS, so their entries hold no sha256 to compare: the content is read.
        self._add(name, content, lambda file: self.read(name) == content)

    def upload(self, path: Path, name: str, replace: bool = False) -> bool:
        """Add a local file, and return True if the folder then holds it.

        Another worker's file of that name is kept, unless `replace` is set.
        """
        # The repository stores Arrow files by LFS, under the sha256 of their content.
        digest = file_digest(path)
        return self._add(name, str(path), lambda file: file.lfs is not None and file.lfs.sha256 == digest, replace)

    def download(self, name: str, path: Path) -> None:
        """Copy a file to a local path atomically."""

        def attempt() -> None:
            if self._head is None:  # nothing was listed yet
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
            if present is not None:
                same = is_same(present)
                if same or not replace:
                    return same
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
            # At that commit, not at the branch, which may have moved since: `_add` commits on top of `_head`.
            tree = list(
                self._api.list_repo_tree(self.repo_id, self.path or None, revision=self._head, repo_type="dataset")
            )
        except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
            return {}  # `make` creates the repository and the branch, a first commit the folder
        return {entry.path.rsplit("/", 1)[-1]: entry for entry in tree}

    def _remote(self) -> Any:
        from huggingface_hub import HfFileSystem

        # A cached instance would keep the listings of all commits, and grow with every shard.
        return HfFileSystem(token=self._token, skip_instance_cache=True)

    def _at_head(self, name: str) -> str:
        return "/".join(filter(None, (f"datasets/{self.repo_id}@{self._head}", self.path, name)))

    def _ask(self, call: Callable[[], T]) -> T:
        """Return `call()`, repeated on transient errors; other errors name `shard_dir`."""
        with asking(self._shown, "dataset", self.revision):
            return retry(call)
