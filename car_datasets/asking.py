"""Explain failed Hub requests in one line that says what to do.

Does: turn every exception of the Hub's clients into a ValueError or a ConnectionError, never showing a token.
Does not: send or repeat requests.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from car_datasets.retrying import reason, seconds_to_wait

CACHE_ADVICE = (
    "Run the same again later. The cache is only used instead if you ask for it: HF_HUB_OFFLINE=1, or "
    "revision=<its 40-digit commit>."
)


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
    """Return the exception to raise instead of a request's error, or of one caused by it; `None` for any other error."""
    from huggingface_hub import errors

    requests = (errors.HTTPError, errors.HFValidationError, errors.LocalTokenNotFoundError, ConnectionError)  # type: ignore[attr-defined]
    while error is not None and not isinstance(error, requests):
        error = error.__cause__
    if error is None:
        return None
    if isinstance(error, errors.LocalTokenNotFoundError):
        return ValueError(f"{shown}: there is no token to push with. Log in with `hf auth login`, or set HF_TOKEN.")
    if isinstance(error, errors.GatedRepoError):
        return ValueError(f"{shown} is gated: request access on its page on the Hub, and log in with `hf auth login`.")
    if isinstance(error, errors.RepositoryNotFoundError):
        return missing(
            f"{shown} is neither a local folder nor a {kind} on the Hub that you may see. Check the spelling; for a private "
            f"{kind} pass token=... or log in with `hf auth login`."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return missing(f"{shown} has no revision {revision!r}. Name a branch, a tag or a commit that it has.")
    if isinstance(error, errors.HFValidationError):
        return ValueError(f"{shown} is neither a local folder nor a Hub id of the form 'owner/name'.")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return ConnectionError(
            f"{shown} is not a local folder, and HF_HUB_OFFLINE=1 forbids requests to the Hub. Unset it, or pass a folder, or "
            "revision=<the 40-digit commit> of a cached copy."
        )
    if isinstance(error, errors.HfHubHTTPError) and error.response is not None and error.response.status_code == 401:
        return ValueError(
            f"{shown}: the Hub does not know your token (401). HF_TOKEN wins over `hf auth login`: set it to a valid token, "
            "or unset it and log in."
        )
    if isinstance(error, errors.HfHubHTTPError) and seconds_to_wait(error) is None:
        return ValueError(
            f"{shown}: the Hub refuses ({reason(error)}). Log in with `hf auth login`, or pass a token with access."
        )
    return ConnectionError(f"{shown}: the Hub could not be asked ({reason(error)}). {advice}")
