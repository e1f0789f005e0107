"""Read and write repositories on the Hub, each change in one atomic commit.

Does: check permissions and visibility; create a repository; read a dataset's files at a commit; commit on top of the commit
that was read, retrying on transient errors.
Does not: know what is pushed, or store a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from car_datasets.asking import asking
from car_datasets.retrying import retry
from car_datasets.tokens import clean_token, refuse_unwritable, who_am_i


class Repository(NamedTuple):
    """The content of a dataset repository at a commit: file names, and the text of its card (`""` if it has no card)."""

    sha: str
    files: tuple[str, ...]
    card: str


class Pushed(NamedTuple):
    """The result of a push: the page of the repository, and the commit that contains the data."""

    url: str
    sha: str


def check_repository(
    repo_id: str, private: bool, token: str | None = None, repo_type: str = "model", argument: str = "push_to"
) -> None:
    """Refuse a push that would fail, before hours of work; nothing is created or uploaded.

    Args:
        repo_id (`str`): `"owner/name"`. The repository need not exist.
        private (`bool`): the visibility that it should have.
        token (`str`, *optional*): a token that may write. Defaults to `HF_TOKEN` or `hf auth login`.
        repo_type (`str`): `"model"` or `"dataset"`.
        argument (`str`): the name of the caller's argument, for messages.

    Raises:
        ValueError: there is no token, or it may not write there, or the repository exists with the other visibility (the
            Hub ignores `private` for an existing repository).
        ConnectionError: the Hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    shown = f"{argument}={repo_id!r}"
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{shown} is not a Hub id of the form 'owner/name'. Correct it.") from error
    api = HfApi(token=clean_token(token))
    refuse_unwritable(who_am_i(api.whoami, shown), repo_id, shown, repo_type)
    with asking(shown, repo_type):
        if retry(lambda: api.repo_exists(repo_id, repo_type=repo_type)):
            _refuse_visibility(api, repo_id, private, repo_type, shown)


def open_repository(
    repo_id: str, private: bool, token: str | None = None, repo_type: str = "model", argument: str = "push_to"
) -> None:
    """Create a repository unless it exists, and check that it may be written to; nothing is uploaded.

    Args:
        repo_id (`str`): `"owner/name"`.
        private (`bool`): the visibility that it must have.
        token (`str`, *optional*): a token that may write. Defaults to `HF_TOKEN` or `hf auth login`.
        repo_type (`str`): `"model"` or `"dataset"`.
        argument (`str`): the name of the caller's argument, for messages.

    Raises:
        ValueError: there is no token, or it may not write there, or the repository has, or was created with, the other
            visibility.
        ConnectionError: the Hub cannot be reached.
    """
    from huggingface_hub import HfApi

    check_repository(repo_id, private, token, repo_type, argument)
    api, shown = HfApi(token=clean_token(token)), f"{argument}={repo_id!r}"
    with asking(shown, repo_type):
        retry(lambda: api.create_repo(repo_id, private=private, exist_ok=True, repo_type=repo_type))
        # Once more: an organisation may force all its new repositories to be private.
        _refuse_visibility(api, repo_id, private, repo_type, shown)


def _refuse_visibility(api: Any, repo_id: str, private: bool, repo_type: str, shown: str) -> None:
    is_private = bool(retry(lambda: api.repo_info(repo_id, repo_type=repo_type)).private)
    if is_private != private:
        option = f"{'' if repo_type == 'model' else f'--repo-type {repo_type} '}--{'private' if private else 'public'}"
        raise ValueError(
            f"{shown} exists and is {'private' if is_private else 'public'}, but private={private} was requested. Change the "
            f"argument or the repository: `hf repos settings {repo_id} {option}`."
        )


def push_folder(folder: Path, repo_id: str, token: str | None = None) -> None:
    """Upload a model folder in one commit to a repository that [`open_repository`] opened."""
    from huggingface_hub import HfApi

    api = HfApi(token=clean_token(token))
    message = "Upload a scorer trained with car_datasets"
    retry(lambda: api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message))


def read_repository(
    repo_id: str, revision: str | None = None, token: str | None = None, waits: Sequence[float] | None = None
) -> Repository:
    """Return the file names and the card of a dataset repository, as they are on the Hub now.

    The revision is resolved to a commit by a request, so that an outdated cache is never read.

    Args:
        repo_id (`str`): `"owner/name"`.
        revision (`str`, *optional*): branch, tag or commit. Defaults to the main branch.
        token (`str`, *optional*): a token for a private repository.
        waits (`Sequence[float]`, *optional*): seconds before each further attempt. Defaults to those for writing, which
            add up to two minutes.

    Raises:
        ValueError: the Hub refuses: no such dataset or revision exists that you may see, or it does not know the token.
        ConnectionError: the Hub cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=clean_token(token))
    with asking(repr(repo_id), "dataset", revision):
        info = retry(lambda: api.dataset_info(repo_id, revision=revision), waits)
        names = tuple(sorted(file.rfilename for file in info.siblings or ()))
        card = read_dataset_file(repo_id, "README.md", str(info.sha), token, waits) if "README.md" in names else b""
    try:
        return Repository(str(info.sha), names, card.decode("utf-8-sig"))  # a BOM would hide the `---` of the header
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{repo_id!r}: its README.md is not UTF-8 ({error}). Save it as UTF-8 and push it again."
        ) from error


def read_dataset_file(
    repo_id: str, name: str, sha: str, token: str | None = None, waits: Sequence[float] | None = None
) -> bytes:
    """Return the content of a file of a dataset repository at the commit `sha`, retrying after `waits` seconds."""
    from huggingface_hub import hf_hub_download

    options: dict[str, Any] = {"repo_type": "dataset", "revision": sha, "token": clean_token(token)}
    return Path(retry(lambda: hf_hub_download(repo_id, name, **options), waits)).read_bytes()


def commit_dataset(
    repo_id: str,
    files: Mapping[str, Path],
    finish: Callable[[Repository], tuple[Mapping[str, bytes], Iterable[str]]],
    message: str,
    token: str | None = None,
) -> Pushed:
    """Upload files in one atomic commit, together with files that depend on the repository's current content.

    Args:
        repo_id (`str`): `"owner/name"`.
        files (`Mapping`): name in the repository to local path.
        finish (`Callable`): called with the current content before each attempt. Returns more files, and the names of
            files to delete. If someone else commits in the meantime, the next attempt builds on their commit.
        message (`str`): the title of the commit.
        token (`str`, *optional*): a token that may write. Defaults to `HF_TOKEN` or `hf auth login`.

    Returns:
        [`Pushed`]: the page and the commit; if the repository contained the data already, the existing commit.

    Raises:
        ValueError: the Hub refuses the commit.
        ConnectionError: the Hub cannot be reached. Nothing is visible there; the same call resumes the upload.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=clean_token(token))

    def attempt() -> Pushed:
        current = read_repository(repo_id, token=token)
        more, obsolete = finish(current)
        content: dict[str, Any] = {**{name: str(path) for name, path in files.items()}, **more}
        operations = [CommitOperationAdd(name, each) for name, each in content.items()]
        deletions = [CommitOperationDelete(name) for name in obsolete]
        # With its parent named, the commit fails with 412 if the repository has changed since it was read.
        commit = api.create_commit(
            repo_id, [*operations, *deletions], commit_message=message, repo_type="dataset", parent_commit=current.sha
        )
        return Pushed(f"{api.endpoint}/datasets/{repo_id}", str(commit.oid))

    return retry(attempt)
