"""What the Hub refuses, or does not answer, in one line that says what to do.

Does: turn what the Hub's clients raise into the errors of this package. A token is never part of a message.
Does not: ask (hub.py, repositories.py), or ask again (retrying.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from car_datasets.retrying import reason, seconds_to_wait

CACHE_ADVICE = (
    "Run the same again later. What is in the cache is not taken for it unless you say so: HF_HUB_OFFLINE=1, or "
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
    """Runs requests for a repository.

    Args:
        shown (`str`): the caller's argument and its value, as messages begin: `"model_id='you/x'"`.
        kind (`str`): `"model"` or `"dataset"`.
        revision (`str`, *optional*): what was asked for.
        missing (`type`): raised where there is no such repository or revision.
        advice (`str`): what to do where the Hub does not answer.

    Raises:
        ValueError: the Hub refuses: what is asked for is not there, or not for this token.
        ConnectionError: the Hub does not answer, or fails.
    """
    try:
        yield
    except Exception as error:  # the HTTP library's own errors derive from nothing narrower
        told = _explain(error, shown, kind, revision, missing, advice)
        if told is None:
            raise
        raise told from error


def _explain(
    error: BaseException | None, shown: str, kind: str, revision: str | None, missing: type[Exception], advice: str
) -> Exception | None:
    """What to raise in the place of a request's error, or of one that was raised from it; `None` for any other."""
    from huggingface_hub import errors

    while error is not None and not isinstance(error, (errors.HTTPError, errors.HFValidationError, ConnectionError)):  # type: ignore[attr-defined]
        error = error.__cause__
    if error is None:
        return None
    if isinstance(error, errors.GatedRepoError):
        return ValueError(f"{shown} is gated: ask for access on its page on the Hub, and log in with `hf auth login`.")
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
            f"{shown} is not a local folder, and HF_HUB_OFFLINE=1 keeps the Hub from being asked. Unset it, or pass a folder, "
            "or revision=<the 40-digit commit> of what is in the cache."
        )
    if isinstance(error, errors.HfHubHTTPError) and error.response is not None and error.response.status_code == 401:
        return ValueError(
            f"{shown}: the Hub does not know your token (401). HF_TOKEN wins over `hf auth login`; put a new token in the "
            "place of the old one."
        )
    if isinstance(error, errors.HfHubHTTPError) and seconds_to_wait(error) is None:
        return ValueError(f"{shown}: the Hub refuses ({reason(error)}).")
    return ConnectionError(f"{shown}: the Hub could not be asked ({reason(error)}). {advice}")
