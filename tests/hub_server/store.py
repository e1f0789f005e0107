"""The state of the Hub: accounts, tokens, repositories of immutable commits, and each repository's large files."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import time
from dataclasses import dataclass, field
from typing import Any

# token -> (user, permission). `me` owns the organisation `team` and can only read `company`.
TOKENS = {"hf_me_writes": ("me", "write"), "hf_me_reads": ("me", "read"), "hf_you_write": ("you", "write")}
ORGS = {"team": {"me": "admin"}, "company": {"me": "read", "you": "admin"}}
# Files uploaded as large files (LFS), before their commit; on the Hub the repository's .gitattributes lists them.
LARGE = (".parquet", ".arrow", ".safetensors", ".bin", ".ckpt", ".pt", ".npy", ".gz", ".zip", ".png")
EPOCH = 1_700_000_000  # in seconds; a commit is dated this plus its number, independent of the clock


class Refused(Exception):
    """An error answer to a request: status, message, the Hub's error code, and further fields of the answer."""

    def __init__(self, status: int, message: str, code: str | None = None, **fields: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.fields = status, message, code, fields


@dataclass(frozen=True)
class File:
    content: bytes
    large: bool
    commit: str = ""

    @property
    def oid(self) -> str:
        """Return the git blob id; for a large file, that of the LFS pointer which git stores in its place."""
        content = self.content
        if self.large:
            content = b"version https://git-lfs.github.com/spec/v1\noid sha256:%b\nsize %d\n" % (
                self.sha256.encode(),
                len(content),
            )
        return hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.oid


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    title: str
    message: str
    author: str
    number: int
    files: dict[str, File]  # never mutated: a new commit has a dict of its own

    @property
    def date(self) -> str:
        return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(EPOCH + self.number))


@dataclass
class Repo:
    kind: str  # models, datasets or spaces
    id: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[str, str] = field(default_factory=dict)
    large: dict[str, bytes] = field(
        default_factory=dict
    )  # by sha256; per repository, so a file uploaded to another one is not found here
    numbers: Any = field(default_factory=itertools.count)

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    def at(self, revision: str) -> Commit:
        """Return the commit of a branch, tag, pull request or sha."""
        for names in (self.branches, self.tags, self.pulls):
            revision = names.get(revision, revision)
        if revision not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[revision]

    def commit(self, branch: str, files: dict[str, File], title: str, author: str, message: str = "") -> Commit:
        """Commit `files`, the complete tree, on top of a branch."""
        parent = self.branches.get(branch) or self.pulls.get(branch)
        number = next(self.numbers)
        listing = "".join(f"{path} {file.oid}\n" for path, file in sorted(files.items()))
        sha = hashlib.sha1(f"{self.id} {parent} {number} {title}\n{listing}".encode()).hexdigest()
        # Files from the parent keep the commit that last changed them, which `expand` reports.
        files = {p: f if f.commit else dataclasses.replace(f, commit=sha) for p, f in files.items()}
        found = self.commits[sha] = Commit(sha, parent, title, message, author, number, files)
        (self.pulls if branch in self.pulls else self.branches)[branch] = sha
        return found

    def history(self, revision: str) -> list[Commit]:
        """Return the commits from a revision back to the first."""
        found = [self.at(revision)]
        while found[-1].parent is not None:
            found.append(self.commits[found[-1].parent])
        return found


class Store:
    """All repositories, and the rules on who may read and change them."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}

    def create(self, kind: str, name: str, private: bool, author: str) -> Repo:
        repo = self.repos[kind, name] = Repo(kind, name, private)
        repo.commit("main", {".gitattributes": File(b"*.parquet filter=lfs\n", False)}, "initial commit", author)
        return repo

    def find(self, kind: str, name: str, user: str | None) -> Repo:
        """Return a repository that the user may read; a private one of others is reported as missing.

        Raises:
            Refused: 404, or 401 without a token, as on the Hub.
        """
        repo = self.repos.get((kind, name))
        if repo is not None and (not repo.private or self.role(repo.owner, user)):
            return repo
        if user is None:
            raise Refused(401, "Invalid username or password.", "RepoNotFound")
        raise Refused(404, "Repository not found", "RepoNotFound")

    def role(self, owner: str, user: str | None) -> str | None:
        """Return the role of a user in a namespace: `admin`, `read` or None."""
        if user is not None and owner == user:
            return "admin"
        return ORGS.get(owner, {}).get(user or "")

    def writable(self, kind: str, name: str, request: Any) -> Repo:
        """Return a repository that the request's user may change, or raise Refused."""
        repo = self.find(kind, name, request.user)
        self.check_write(repo.owner, request.user, request.may, "write")
        return repo

    def check_write(self, owner: str, user: str | None, may: str | None, what: str) -> None:
        """Raise Refused unless the user's token may write to a namespace."""
        if user is None:
            raise Refused(401, "Invalid username or password.")
        if may != "write" or self.role(owner, user) != "admin":
            raise Refused(403, f"You don't have the rights to {what} under the namespace {owner!r}.")


def is_large(path: str, size: int, sample: bytes) -> bool:
    """Return True if a file is uploaded before its commit, as a large file; empty files never are."""
    return size > 0 and (path.endswith(LARGE) or size > 10_000_000 or b"\0" in sample)
