"""hub.py: whether a token may write to a repository, and a folder pushed over real HTTP to a Hub on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from car_datasets.utils.hub import refuse_unwritable
from tests.hub_server import Hub

WRITE = ["repo.content.read", "repo.write"]


def user(*scopes: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to `whoami` for a fine-grained token of these scopes."""
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


def test_a_scope_on_models_allows_a_model() -> None:
    refuse_unwritable(user(scope("model", "me/x")), "me/x", "repo_id='me/x'", "model")


# --- a model folder pushed

PUSH = """
import sys
from pathlib import Path
from car_datasets.utils import hub
hub.open_repository(sys.argv[1], sys.argv[2] == "private")
hub.push_folder(Path(sys.argv[3]), sys.argv[1])
"""


def test_a_model_folder_is_pushed_whole_and_private(hub: Hub, tiny_iqs: str) -> None:
    hub.run(PUSH, "me/scorer", "private", tiny_iqs, check=True)
    stored = hub.repo("me/scorer", kind="models")
    assert stored is not None and stored.private
    files = stored.files()
    assert all(files[file.name] == file.read_bytes() for file in Path(tiny_iqs).iterdir())


@pytest.mark.parametrize(
    ("name", "visibility", "message"),
    [
        ("me/public", "private", "exists and is public, but private=True was requested"),
        ("you/scorer", "private", "may not write to repositories of 'you'"),
    ],
)
def test_nothing_leaves_where_it_was_not_meant_to_go(
    hub: Hub, tiny_iqs: str, name: str, visibility: str, message: str
) -> None:
    before = hub.commit("me/public", {}, kind="models")
    done = hub.run(PUSH, name, visibility, tiny_iqs)
    assert done.returncode == 1
    assert message in done.stderr
    stored = hub.repo("me/public", kind="models")
    assert stored is not None and stored.sha == before
    assert hub.repo("you/scorer", kind="models") is None and hub.count("PUT", "/large/") == 0


def test_a_model_repository_that_was_made_public_is_said(hub: Hub, tiny_iqs: str) -> None:
    opened = "from huggingface_hub import HfApi\nHfApi().update_repo_settings(sys.argv[1], private=False)\n"
    before = PUSH.replace("hub.push_folder(", f"{opened}hub.push_folder(")
    done = hub.run(before, "me/scorer", "private", tiny_iqs)
    assert done.returncode == 1 and "exists and is public, but private=True" in done.stderr
    assert hub.count("PUT", "/large/") == 0
    during = f"""
from huggingface_hub import HfApi
upload = HfApi.upload_folder
def opened(api, **options):
    api.update_repo_settings(options["repo_id"], private=False)
    return upload(api, **options)
HfApi.upload_folder = opened
{PUSH}"""
    done = hub.run(during, "me/other", "private", tiny_iqs)
    assert done.returncode == 1
    assert f"Pushed to {hub.url}/me/other, commit {hub.repo('me/other', kind='models').sha}, but" in done.stderr
