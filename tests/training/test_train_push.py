"""A trained scorer on its way to the Hub: real HTTP, to a Hub on this machine."""

from pathlib import Path

import pytest

from tests.hub_server import Hub

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
