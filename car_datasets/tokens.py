"""Check a Hub token, and its permission to write, before expensive work.

Does: clean a token; ask the Hub for its owner and scopes; refuse a push that would fail.
Does not: store or show a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from car_datasets.asking import asking
from car_datasets.retrying import retry


def clean_token(token: str | None) -> str | None:
    """Return a token without surrounding white space, such as the line end of a file, or `None` for a blank one.

    Raises:
        ValueError: the text cannot be a token. This message does not show it; that of an HTTP library would.
    """
    cleaned = (token or "").strip()
    if not all(c.isascii() and c.isprintable() and c != " " for c in cleaned):
        raise ValueError(
            "The token contains white space or other characters that no token has (it is not shown here). Copy it again."
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
    access = (user.get("auth") or {}).get("accessToken") or {}
    if access.get("role") == "read":
        raise ValueError(
            f"{shown}: the token may only read. Create one that may write, and log in with `hf auth login`."
        )
    organisations = {str(org.get("name")): org.get("roleInOrg") for org in user.get("orgs") or ()}
    # The Hub compares names of owners without regard to case.
    roles = {name.lower(): role for name, role in {**organisations, own: "admin"}.items()}
    if roles.get(owner.lower(), "no member") in ("read", "no member"):
        raise ValueError(
            f"{shown}: your account on the Hub is {own!r}, which may not write to repositories of {owner!r}. Push to one of "
            f"{[own, *organisations]}."
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
