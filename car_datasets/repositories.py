"""Repositories on the Hub: may they be written to, what do they hold, and all of a change in one commit.

With hub.py, downloads.py and hub_folder.py, what touches `HfApi`.

Does: check and open a repository, read a dataset's at a commit, commit to it on top of what was read, again after what passes.
Does not: know what is pushed (pushing.py, training.py), or keep a token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from car_datasets.asking import asking
from car_datasets.retrying import reason, retry
from car_datasets.tokens import clean_token, refuse_unwritable, who_am_i


class Repository(NamedTuple):
    """A dataset repository at one moment: commit, names of files, and the text of its card, `""` without one."""

    sha: str
    files: tuple[str, ...]
    card: str


class Pushed(NamedTuple):
    """Where data went: the repository's page, and the commit that holds them."""

    url: str
    sha: str


def check_repository(
    repo_id: str, private: bool, token: str | None = None, repo_type: str = "model", argument: str = "push_to"
) -> None:
    """Refuse a push that must fail, as far as can be told before hours of work, while nothing is made or uploaded.

    Args:
        repo_id (`str`): `"owner/name"`, which need not be there.
        private (`bool`): its visibility.
        token (`str`, *optional*): one that may write; else that of `HF_TOKEN` or `hf auth login`.
        repo_type (`str`): `"model"` or `"dataset"`.
        argument (`str`): what the caller's argument is called, for messages.

    Raises:
        ValueError: there is no token or one that may not write there, or the repository is there with the other visibility
            (the Hub ignores `private` then).
        ConnectionError: the Hub does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    shown = f"{argument}={repo_id!r}"
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{shown} is no Hub id of the form 'owner/name'.") from error
    api = HfApi(token=clean_token(token))
    refuse_unwritable(who_am_i(api.whoami), repo_id, shown, repo_type)
    with _explaining(shown):
        if retry(lambda: api.repo_exists(repo_id, repo_type=repo_type)):
            _refuse_visibility(api, repo_id, private, repo_type, shown)


def open_repository(
    repo_id: str, private: bool, token: str | None = None, repo_type: str = "model", argument: str = "push_to"
) -> None:
    """Make sure that a repository is there, may be written to, and is as private as was asked; nothing is uploaded.

    Args:
        repo_id, private, token, repo_type, argument: see [`check_repository`]; here it is made if it is not there.

    Raises:
        ValueError: see [`check_repository`], or it cannot be made, or not with that visibility.
        ConnectionError: the Hub does not answer.
    """
    from huggingface_hub import HfApi

    check_repository(repo_id, private, token, repo_type, argument)
    api, shown = HfApi(token=clean_token(token)), f"{argument}={repo_id!r}"
    with _explaining(shown):
        retry(lambda: api.create_repo(repo_id, private=private, exist_ok=True, repo_type=repo_type))
        _refuse_visibility(api, repo_id, private, repo_type, shown)  # an organisation may make all of its own private


@contextlib.contextmanager
def _explaining(shown: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        raise ValueError(
            f"{shown} cannot be written to ({reason(error)}). Log in with `hf auth login`, or pass a token that may."
        ) from error


def _refuse_visibility(api: Any, repo_id: str, private: bool, repo_type: str, shown: str) -> None:
    seen = bool(retry(lambda: api.repo_info(repo_id, repo_type=repo_type)).private)
    if seen != private:
        option = f"{'' if repo_type == 'model' else f'--repo-type {repo_type} '}--{'private' if private else 'public'}"
        raise ValueError(
            f"{shown} is there and {'private' if seen else 'public'}, but private={private} was asked for. Change one of the "
            f"two: `hf repos settings {repo_id} {option}`."
        )


def push_folder(folder: Path, repo_id: str, token: str | None = None) -> None:
    """Upload a model folder to a repository of [`open_repository`], in one commit."""
    from huggingface_hub import HfApi

    api = HfApi(token=clean_token(token))
    message = "Upload a scorer trained with car_datasets"
    retry(lambda: api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message))


def read_repository(
    repo_id: str, revision: str | None = None, token: str | None = None, waits: Sequence[float] | None = None
) -> Repository:
    """What a dataset repository holds. Nothing is taken from the cache by name.

    Args:
        waits (`Sequence[float]`, *optional*): before further attempts, see [`~car_datasets.retrying.retry`].

    Raises:
        ValueError: the Hub refuses: there is no such dataset or revision that you may see, or it does not know the token.
        ConnectionError: the Hub does not answer.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=clean_token(token))
    with asking(repr(repo_id), "dataset", revision):
        info = retry(lambda: api.dataset_info(repo_id, revision=revision), waits)
        names = tuple(sorted(file.rfilename for file in info.siblings or ()))
        card = read_dataset_file(repo_id, "README.md", str(info.sha), token, waits) if "README.md" in names else b""
    try:
        return Repository(str(info.sha), names, card.decode("utf-8-sig"))  # with a BOM before it, `---` is no header
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{repo_id!r}: README.md there is not UTF-8 ({error}). Save it as UTF-8 and push it again."
        ) from error


def read_dataset_file(
    repo_id: str, name: str, sha: str, token: str | None = None, waits: Sequence[float] | None = None
) -> bytes:
    """A file of a dataset repository at a commit; for `waits` see [`read_repository`]."""
    from huggingface_hub import hf_hub_download

    place: dict[str, Any] = {"repo_type": "dataset", "revision": sha, "token": clean_token(token)}
    return Path(retry(lambda: hf_hub_download(repo_id, name, **place), waits)).read_bytes()


def commit_dataset(
    repo_id: str,
    files: Mapping[str, Path],
    finish: Callable[[Repository], tuple[Mapping[str, bytes], Iterable[str]]],
    message: str,
    token: str | None = None,
) -> Pushed:
    """Upload files and commit them at once, with what depends on the repository as it is at that moment.

    Args:
        files (`Mapping`): name in the repository to file here.
        finish (`Callable`): called with the repository before each attempt; gives more files, and the names of those to
            delete. Others may commit at the same time: the attempt that loses is made again, on what they left.

    Returns:
        [`Pushed`]: where it is now; for data that were there already, the commit that had them.

    Raises:
        ValueError: the Hub refuses it.
        ConnectionError: the Hub does not answer; nothing is visible there, and the same call goes on.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=clean_token(token))

    def attempt() -> Pushed:
        seen = read_repository(repo_id, token=token)
        more, gone = finish(seen)
        content: dict[str, Any] = {**{name: str(path) for name, path in files.items()}, **more}
        operations = [CommitOperationAdd(name, each) for name, each in content.items()]
        deletions = [CommitOperationDelete(name) for name in gone]
        done = api.create_commit(
            repo_id, [*operations, *deletions], commit_message=message, repo_type="dataset", parent_commit=seen.sha
        )
        return Pushed(f"{api.endpoint}/datasets/{repo_id}", str(done.oid))

    return retry(attempt)
