"""What a token is, and what it may do: plain checks before the Hub is asked for more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from car_datasets.retrying import retry


def clean_token(token: str | None) -> str | None:
    """A token without the line end that it may have been read with; blank ones are none.

    Raises:
        ValueError: it cannot be one. The message does not show it; an HTTP library's would.
    """
    cleaned = (token or "").strip()
    if not all(c.isascii() and c.isprintable() and c != " " for c in cleaned):
        raise ValueError("The token holds white space or letters that no token has (it is not shown here).")
    return cleaned or None


def who_am_i(ask: Callable[[], Any]) -> dict[str, Any]:
    """The Hub's answer to `whoami`, which `ask` fetches; a ValueError where there is no token, or one it does not know."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    try:
        return dict(retry(ask))
    except LocalTokenNotFoundError as error:
        raise ValueError("There is no token to push with. Log in with `hf auth login`, or set HF_TOKEN.") from error
    except HfHubHTTPError as error:
        raise ValueError(
            f"The Hub does not know this token ({error.response.status_code}). HF_TOKEN wins over `hf auth login`; make a "
            "new token that may write, and use it in the place of the old one."
        ) from error


def refuse_unwritable(user: dict[str, Any], repo_id: str, shown: str, repo_type: str = "dataset") -> None:
    """Raise a ValueError where the Hub's answer to `whoami` tells that a push must fail.

    Args:
        user (`dict`): the answer.
        repo_id (`str`), repo_type (`str`): where to; a model and a dataset may have one name.
        shown (`str`): what the message calls it.
    """
    owner, own = repo_id.split("/")[0], str(user.get("name"))
    if "/" not in repo_id:
        raise ValueError(f"{shown} names no owner; say {own + '/' + repo_id!r}.")
    access = (user.get("auth") or {}).get("accessToken") or {}
    if access.get("role") == "read":
        raise ValueError(f"{shown}: the token may only read. Make one that may write, and log in with `hf auth login`.")
    organisations = {str(org.get("name")): org.get("roleInOrg") for org in user.get("orgs") or ()}
    roles = {name.lower(): role for name, role in {**organisations, own: "admin"}.items()}
    if roles.get(owner.lower(), "no member") in ("read", "no member"):
        raise ValueError(
            f"{shown}: you are {own!r} there, and may not write to what belongs to {owner!r}. Push to one of "
            f"{[own, *organisations]}."
        )
    scopes = (access.get("fineGrained") or {}).get("scoped")
    if scopes is not None and not any(_may_write(scope, repo_id, repo_type) for scope in scopes):
        raise ValueError(f"{shown}: the fine-grained token may not write there. Give it `repo.write` for {owner!r}.")


def _may_write(scope: dict[str, Any], repo_id: str, repo_type: str) -> bool:
    """Whether a scope of a fine-grained token covers a repository: by itself, or by its owner."""
    entity = scope.get("entity") or {}
    name, kind = str(entity.get("name")).lower(), entity.get("type", repo_type)
    covers = name == repo_id.split("/")[0].lower() or (name == repo_id.lower() and kind == repo_type)
    return covers and "repo.write" in (scope.get("permissions") or ())
