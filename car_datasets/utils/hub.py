"""Requests to the Hub: read and write repositories, each change in one atomic commit; and the cards that it shows.

Does: check token, permissions and visibility before expensive work; create a repository; read its files at a commit;
commit on top of the commit that was read; retry on transient errors (408, 409, 412, 429, 5xx, dropped connections);
turn every exception of the Hub's clients into one line that says what to do; render a card from its template.
Does not: decide what is pushed; store or show a token.

huggingface_hub and jinja2 are imported where they are needed, since the command line reads this module for its help.
"""

from __future__ import annotations

import contextlib
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from car_datasets.utils.files import data_folder
from car_datasets.utils.settings import refuse_huge_header

if TYPE_CHECKING:
    from jinja2 import Environment

T = TypeVar("T")
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)  # seconds before the second, third, ... attempt
READING_WAITS = WAITS[:3]  # for reads, at the start of a run: little work is lost, and a user may be waiting
LONGEST = 300.0  # seconds; the longest wait that a server may ask for
TRANSIENT = (408, 409, 412, 429)  # timeout, concurrent commit, parent commit has moved, rate limit
CACHE_ADVICE = (
    "Run the same again later. The cache is only used instead if you ask for it: HF_HUB_OFFLINE=1, or "
    "revision=<its 40-digit commit>."
)


def retry(call: Callable[[], T], waits: Sequence[float] | None = None) -> T:
    """Return `call()`, repeating it on transient errors.

    huggingface_hub repeats uploads, but not the requests that look up or create a repository, or commit.

    Args:
        call (`Callable`): a request that is safe to repeat.
        waits (`Sequence[float]`, *optional*): seconds before each further attempt. Defaults to [`WAITS`].

    Raises:
        ConnectionError: the last attempt failed as well.
        Exception: an error that is not transient is raised at once.
    """
    waits = WAITS if waits is None else waits
    # The None at the end is the last attempt, after which nothing is waited for.
    for wait in (*waits, None):
        try:
            return call()
        except Exception as error:  # the HTTP library's own errors derive from nothing narrower
            requested = seconds_to_wait(error)
            if requested is None:
                raise
            if wait is None:
                raise ConnectionError(
                    f"the Hub failed {len(waits) + 1} times, most recently: {reason(error)}"
                ) from error
            # Random, so that workers which failed together do not come back together.
            time.sleep(min(LONGEST, max(requested, wait * random.uniform(0.75, 1.25))))
    raise AssertionError("the last attempt returns or raises")


def seconds_to_wait(error: BaseException | None) -> float | None:
    """Return the wait in seconds that a server asks for after a transient error (0 if unsaid), `None` after others."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]

    while error is not None:
        if isinstance(error, ConnectionError):  # from a retry inside this one, or because HF_HUB_OFFLINE is set
            return None
        if isinstance(error, HfHubHTTPError):
            response = error.response
            if response is None or not (response.status_code in TRANSIENT or response.status_code >= 500):
                return None
            after = response.headers.get("Retry-After", "")
            window = re.search(r";r=0;t=(\d+)", response.headers.get("ratelimit", ""))  # of the public Hub
            return float(after) if after.isdecimal() else float(window[1]) if window else 0.0
        if isinstance(error, HTTPError):
            # The client itself refuses such a request, and would do so again.
            return None if type(error).__name__ in ("LocalProtocolError", "UnsupportedProtocol") else 0.0
        if isinstance(error, RuntimeError) and "client has been closed" in str(error):
            return 0.0  # huggingface_hub's threads share a client; one that loses its connection closes it for all
        error = error.__cause__  # a failed upload is a RuntimeError whose cause is the error of the request
    return None


def reason(error: BaseException) -> str:
    """Return an error in one line; for a failed upload, the error of the request that caused it."""
    while not str(error) or (isinstance(error, RuntimeError) and error.__cause__ is not None):
        if error.__cause__ is None:
            return type(error).__name__
        error = error.__cause__
    return " ".join(str(error).split())


@contextlib.contextmanager
def asking(
    shown: str,
    kind: str = "model",
    revision: str | None = None,
    missing: type[Exception] = ValueError,
    advice: str = "Run the same again later.",
) -> Iterator[None]:
    """Run requests for a repository and explain their errors.

    Args:
        shown (`str`): the caller's argument and its value, with which messages begin: `"model_id='you/x'"`.
        kind (`str`): `"model"` or `"dataset"`.
        revision (`str`, *optional*): the branch, tag or commit that was requested.
        missing (`type`): the exception for a repository or revision that does not exist, or that the token may not see.
        advice (`str`): what to do if the Hub cannot be reached.

    Raises:
        ValueError: the Hub refuses the request, or there is no valid token for it.
        ConnectionError: the Hub cannot be reached, or fails.
    """
    try:
        yield
    except Exception as error:  # the errors of the HTTP library have no narrower base class
        explained = _explain(error, shown, kind, revision, missing, advice)
        if explained is None:
            raise
        raise explained from error


def _explain(
    error: BaseException | None, shown: str, kind: str, revision: str | None, missing: type[Exception], advice: str
) -> Exception | None:
    """Return the exception to raise in place of a request's error, or of one caused by it; `None` for other errors."""
    from huggingface_hub import errors

    requests = (errors.HTTPError, errors.HFValidationError, errors.LocalTokenNotFoundError, ConnectionError)  # type: ignore[attr-defined]
    # `datasets` and huggingface_hub's uploads wrap the error of the request in their own.
    while error is not None and not isinstance(error, requests):
        error = error.__cause__
    # From here on the narrower class comes before its base: a gated repository, for one, counts as not found.
    if error is None:
        return None
    if isinstance(error, errors.LocalTokenNotFoundError):
        return ValueError(f"{shown}: there is no token to push with. Log in with `hf auth login`, or set HF_TOKEN.")
    if isinstance(error, errors.GatedRepoError):
        return ValueError(f"{shown} is gated: request access on its page on the Hub, and log in with `hf auth login`.")
    if isinstance(error, errors.RepositoryNotFoundError):
        return missing(
            f"{shown} is neither a local folder nor a {kind} on the Hub that you may see. Check the spelling; for a "
            f"private {kind} pass token=... or log in with `hf auth login`."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return missing(f"{shown} has no revision {revision!r}. Name a branch, a tag or a commit that it has.")
    if isinstance(error, errors.HFValidationError):
        return ValueError(f"{shown} is neither a local folder nor a Hub id of the form 'owner/name'.")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return ConnectionError(
            f"{shown} is not a local folder, and HF_HUB_OFFLINE=1 forbids requests to the Hub. Unset it, or pass a "
            "folder, or revision=<the 40-digit commit> of a cached copy."
        )
    # Told apart from a lack of rights, because another token helps here and access does not.
    if isinstance(error, errors.HfHubHTTPError) and error.response is not None and error.response.status_code == 401:
        return ValueError(
            f"{shown}: the Hub does not know your token (401). HF_TOKEN wins over `hf auth login`: set it to a "
            "valid token, or unset it and log in."
        )
    if isinstance(error, errors.HfHubHTTPError) and seconds_to_wait(error) is None:
        return ValueError(
            f"{shown}: the Hub refuses ({reason(error)}). Log in with `hf auth login`, or pass a token with access."
        )
    return ConnectionError(f"{shown}: the Hub could not be asked ({reason(error)}). {advice}")


def clean_token(token: str | None) -> str | None:
    """Return a token without surrounding white space, such as the line end of a file, or `None` for a blank one.

    Raises:
        ValueError: the text cannot be a token. This message does not show it; that of an HTTP library would.
    """
    cleaned = (token or "").strip()
    if not all(c.isascii() and c.isprintable() and c != " " for c in cleaned):
        raise ValueError(
            "The token contains white space or other characters that no token has (it is not shown here). "
            "Copy it again."
        )
    return cleaned or None


def who_am_i(ask: Callable[[], Any], shown: str) -> dict[str, Any]:
    """Return the Hub's answer to `whoami`: the owner of the token and its permissions.

    Args:
        ask (`Callable`): sends the request.
        shown (`str`): the caller's argument and its value, with which messages begin: `"push_to='you/x'"`.

    Raises:
        ValueError: there is no token, or the Hub does not know it.
        ConnectionError: the Hub cannot be reached.
    """
    with asking(shown):
        return dict(retry(ask))


def refuse_unwritable(user: dict[str, Any], repo_id: str, shown: str, repo_type: str = "dataset") -> None:
    """Raise ValueError if the Hub's answer to `whoami` shows that a push would fail.

    Args:
        user (`dict`): the answer to `whoami`.
        repo_id (`str`): the repository to push to, `"owner/name"`.
        shown (`str`): the caller's argument and its value, with which messages begin.
        repo_type (`str`): `"model"` or `"dataset"`, since one of each may have the same name.
    """
    owner, own = repo_id.split("/")[0], str(user.get("name"))
    if "/" not in repo_id:
        raise ValueError(f"{shown} names no owner; pass {own + '/' + repo_id!r}.")
    # The answer may lack any of these entries; then only the push itself can tell.
    access = (user.get("auth") or {}).get("accessToken") or {}
    if access.get("role") == "read":
        raise ValueError(
            f"{shown}: the token may only read. Create one that may write, and log in with `hf auth login`."
        )
    # An account may belong to several organisations, with another role in each.
    organisations = {str(org.get("name")): org.get("roleInOrg") for org in user.get("orgs") or ()}
    # The Hub compares names of owners without regard to case.
    roles = {name.lower(): role for name, role in {**organisations, own: "admin"}.items()}
    if roles.get(owner.lower(), "no member") in ("read", "no member"):
        raise ValueError(
            f"{shown}: your account on the Hub is {own!r}, which may not write to repositories of {owner!r}. Push to "
            f"one of {[own, *organisations]}."
        )
    # Only fine-grained tokens have scopes; an ordinary token may write wherever its owner may.
    scopes = (access.get("fineGrained") or {}).get("scoped")
    if scopes is not None and not any(_may_write(scope, repo_id, repo_type) for scope in scopes):
        raise ValueError(f"{shown}: the fine-grained token may not write there. Give it `repo.write` for {owner!r}.")


def _may_write(scope: dict[str, Any], repo_id: str, repo_type: str) -> bool:
    """Return True if a scope of a fine-grained token allows writing to a repository, by its own name or its owner's."""
    entity = scope.get("entity") or {}
    name, kind = str(entity.get("name")).lower(), entity.get("type", repo_type)
    covers = name == repo_id.split("/")[0].lower() or (name == repo_id.lower() and kind == repo_type)
    return covers and "repo.write" in (scope.get("permissions") or ())


class Repository(NamedTuple):
    """The content of a dataset repository at a commit: file names, and the text of its card, `""` without a card."""

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
        ValueError: there is no token, or it may not write there, or the repository exists with the other visibility
            (the Hub ignores `private` for an existing repository).
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

    # Before it is created, so that a refused push leaves no empty repository behind.
    check_repository(repo_id, private, token, repo_type, argument)
    api, shown = HfApi(token=clean_token(token)), f"{argument}={repo_id!r}"
    with asking(shown, repo_type):
        retry(lambda: api.create_repo(repo_id, private=private, exist_ok=True, repo_type=repo_type))
        # Once more: an organisation may force all its new repositories to be private.
        _refuse_visibility(api, repo_id, private, repo_type, shown)


def refuse_visibility(
    repo_id: str, private: bool, token: str | None = None, repo_type: str = "model", argument: str = "push_to"
) -> None:
    """Raise ValueError if a repository, which exists, has another visibility now than the one that was asked for.

    Args:
        repo_id, private, token, repo_type, argument: as in [`open_repository`], after which anyone may have changed it.

    Raises:
        ValueError: it has the other visibility, or the Hub refuses to tell.
        ConnectionError: the Hub cannot be reached.
    """
    from huggingface_hub import HfApi

    shown = f"{argument}={repo_id!r}"
    with asking(shown, repo_type):
        _refuse_visibility(HfApi(token=clean_token(token)), repo_id, private, repo_type, shown)


@contextlib.contextmanager
def pushed_anyway(where: str) -> Iterator[None]:
    """Say with an error of the block that the rows or weights are on the Hub all the same, and where."""
    try:
        yield
    except (ValueError, ConnectionError) as error:
        raise type(error)(f"Pushed to {where}, but {error}") from error


def _refuse_visibility(api: Any, repo_id: str, private: bool, repo_type: str, shown: str) -> None:
    is_private = bool(retry(lambda: api.repo_info(repo_id, repo_type=repo_type)).private)
    if is_private != private:
        option = f"{'' if repo_type == 'model' else f'--repo-type {repo_type} '}--{'private' if private else 'public'}"
        raise ValueError(
            f"{shown} exists and is {'private' if is_private else 'public'}, but private={private} was requested. "
            f"Change the argument or the repository: `hf repos settings {repo_id} {option}`."
        )


def push_folder(folder: Path, repo_id: str, token: str | None = None, private: bool = True) -> None:
    """Upload a model folder in one commit to a repository that [`open_repository`] opened.

    Raises:
        ValueError: the repository has another visibility than `private` says, before the upload or after it.
    """
    from huggingface_hub import HfApi

    # Hours may have passed since it was opened.
    refuse_visibility(repo_id, private, token)
    api = HfApi(token=clean_token(token))
    message = "Upload a scorer trained with car_datasets"
    done = retry(lambda: api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message))
    with pushed_anyway(f"{api.endpoint}/{repo_id}, commit {done.oid}"):
        refuse_visibility(repo_id, private, token)


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
        # At the commit of the names: a push in between must not mix two states.
        card = read_dataset_file(repo_id, "README.md", str(info.sha), token, waits) if "README.md" in names else b""
    try:
        text = card.decode("utf-8-sig")  # a BOM would hide the `---` of the header
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{repo_id!r}: its README.md is not UTF-8 ({error}). Save it as UTF-8 and push it again."
        ) from error
    refuse_huge_header(text, repr(repo_id))
    return Repository(str(info.sha), names, text)


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


def card_templates() -> Environment:
    """Return the environment of the card templates.

    Filters: `percent` and `number` format a figure with its 95 % interval; `code` removes from a name what could end a
    code span or start markup; `span` writes any text as a code span, unchanged, with as many backticks as it needs.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        # Strict: a misspelt value in a template would otherwise be a gap in a published card.
        loader=FileSystemLoader(data_folder("hub_cards")),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters["percent"] = lambda figure: "{value:.1f} % ({low:.1f} to {high:.1f})".format(
        **{name: 100 * value for name, value in figure.items()}
    )
    environment.filters["code"] = lambda text: "".join(c for c in str(text) if c not in "`'<>[]|" and c.isprintable())
    environment.filters["span"] = code_span
    environment.filters["number"] = lambda figure: "{value:.3f} ({low:.3f} to {high:.3f})".format(**figure)
    return environment


def code_span(text: str) -> str:
    """Return any text as a code span in Markdown; characters that cannot be printed become Python escapes."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text) or '""'
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    around = " " if shown[0] in "` " or shown[-1] in "` " else ""  # Markdown strips one space from each side
    return f"{fence}{around}{shown}{around}{fence}"


def write_card(folder: Path, template: str, **values: Any) -> None:
    """Render a card template to `README.md` in `folder`; every value that the template uses must be given."""
    (folder / "README.md").write_text(card_templates().get_template(template).render(**values), encoding="utf-8")
