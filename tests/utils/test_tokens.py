"""tokens.py: what the Hub says of a token, and whether a push with it can work."""

from __future__ import annotations

from typing import Any

import pytest

from car_datasets.utils.hub import refuse_unwritable

WRITE = ["repo.content.read", "repo.write"]


def user(*scopes: dict[str, Any]) -> dict[str, Any]:
    """The answer to `whoami` for a fine-grained token of these scopes."""
    token = {"role": "fineGrained", "fineGrained": {"scoped": list(scopes)}}
    return {"name": "me", "orgs": [{"name": "team", "roleInOrg": "write"}], "auth": {"accessToken": token}}


def scope(kind: str, name: str, permissions: Any = WRITE) -> dict[str, Any]:
    return {"entity": {"type": kind, "name": name}, "permissions": permissions}


@pytest.mark.parametrize(
    "scopes",
    [
        [scope("user", "me")],
        [scope("dataset", "Me/X")],
        [scope("model", "me/x"), scope("dataset", "me/x")],
        [{"entity": {"name": "me/x"}, "permissions": WRITE}],
    ],
)
def test_a_token_that_may_write_passes(scopes: list[dict[str, Any]]) -> None:
    refuse_unwritable(user(*scopes), "me/x", "repo_id='me/x'")


@pytest.mark.parametrize(
    "scopes",
    [
        [],
        [scope("model", "me/x")],
        [scope("dataset", "me/y")],
        [scope("user", "me", ["repo.content.read"])],
        [scope("user", "me", None)],
        [{"entity": None, "permissions": WRITE}],
        [scope("org", "team")],
    ],
)
def test_one_that_may_not_is_refused(scopes: list[dict[str, Any]]) -> None:
    with pytest.raises(
        ValueError, match=r"repo_id='me/x': the fine-grained token may not write there\. Give it `repo.write`"
    ):
        refuse_unwritable(user(*scopes), "me/x", "repo_id='me/x'")


def test_a_model_is_no_dataset() -> None:
    refuse_unwritable(user(scope("model", "me/x")), "me/x", "repo_id='me/x'", "model")
