"""What the Hub refuses, or does not answer, in one line that says what to do.

Does: turn what the Hub's clients raise into the errors of this package. A token is never part of a message.
Does not: ask (hub.py), or ask again (retrying.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from car_datasets.retrying import reason, seconds_to_wait


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
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise ValueError(
            f"{shown} is gated: ask for access on its page on the Hub, and log in with `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise missing(
            f"{shown} is neither a local folder nor a {kind} on the Hub that you may see. Check the spelling; for a private "
            f"{kind} pass token=... or log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise missing(f"{shown} has no revision {revision!r}. Name a branch, a tag or a commit that it has.") from error
    except HFValidationError as error:
        raise ValueError(f"{shown} is neither a local folder nor a Hub id of the form 'owner/name'.") from error
    except OfflineModeIsEnabled as error:
        raise ConnectionError(
            f"{shown} is not a local folder, and HF_HUB_OFFLINE=1 keeps the Hub from being asked. Unset it, or pass a folder, or "
            "revision=<the 40-digit commit> of what is in the cache."
        ) from error
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code == 401:
            raise ValueError(
                f"{shown}: the Hub does not know your token (401). HF_TOKEN wins over `hf auth login`; put a new token in the "
                "place of the old one."
            ) from error
        if seconds_to_wait(error) is None:
            raise ValueError(f"{shown}: the Hub refuses ({reason(error)}).") from error
        raise ConnectionError(f"{shown}: the Hub fails ({reason(error)}). {advice}") from error
    except RuntimeError as error:  # an upload's
        if error.__cause__ is None:
            raise
        raise ValueError(f"{shown}: the Hub refuses ({reason(error)}).") from error
    except (HTTPError, LocalEntryNotFoundError, ConnectionError) as error:
        raise ConnectionError(f"{shown}: the Hub does not answer ({reason(error)}). {advice}") from error
