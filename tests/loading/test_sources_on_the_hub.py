"""Datasets of the Hub: the commit that was asked for, or an error that says what to do. Real clients, a Hub on this machine."""

from __future__ import annotations

import io
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.hub_server import Hub

LOAD = """
import json, logging, sys, time
logging.basicConfig(level=logging.INFO, format="%(message)s")
from car_datasets import load_instructions
time.sleep = lambda seconds: None  # the clients' own waits
source, options = json.loads(sys.argv[1])
try:
    print(json.dumps(load_instructions(source, **options)["output"][:]))
except (ValueError, OSError) as error:
    print(json.dumps(f"{type(error).__name__}: {error}"))
"""


def data(*answers: str) -> dict[str, bytes]:
    """The files of a dataset with these answers."""
    file = io.BytesIO()
    pq.write_table(pa.table({"instruction": ["Name a colour."] * len(answers), "output": list(answers)}), file)
    return {"data/train-00000-of-00001.parquet": file.getvalue()}


def load(hub: Hub, source: str, run: dict[str, Any] | None = None, **options: Any) -> Any:
    done = hub.run(LOAD, json.dumps([source, options]), check=True, **(run or {}))
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_every_revision_is_the_one_that_was_asked_for(hub: Hub) -> None:
    first = hub.commit("me/rows", data("red"), private=True)
    assert load(hub, "me/rows") == ["red"]
    second = hub.commit("me/rows", data("blue", "green"))
    hub.commit("me/rows", data("old"), branch="v1")
    assert load(hub, "me/rows") == ["blue", "green"]
    assert load(hub, "me/rows", revision="v1") == ["old"]
    assert load(hub, "me/rows", revision=first) == ["red"]
    done = hub.run(LOAD, json.dumps(["me/rows", {}]), check=True)
    assert f"source='me/rows': commit {second} is loaded." in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        {"status": 401, "code": "RepoNotFound"},
        {"status": 503},
        {"status": 403},
        {"status": 404},
        {"status": 429},
        {"status": 500},
        {"kind": "drop"},
    ],
    ids=lambda fault: "-".join(map(str, fault.values())),
)
def test_a_cached_revision_is_never_taken_for_a_newer_one(hub: Hub, fault: dict[str, Any]) -> None:
    hub.commit("me/rows", data("red"))
    assert load(hub, "me/rows") == ["red"]
    hub.commit("me/rows", data("blue", "green"))
    # The Hub tells its newest commit, and fails from then on: here `datasets` alone gives the old rows, and says nothing.
    hub.fault("GET|HEAD", "/resolve/|/tree/|/revision/", times=-1, **fault)
    message = load(hub, "me/rows")
    assert "source='me/rows'" in message and "Error: " in message
    hub.mend()
    hub.fault("GET", "/api/datasets/me/rows$", times=-1, **fault)  # it does not tell even that
    message = load(hub, "me/rows")
    assert message.startswith(
        ("ConnectionError: source='me/rows'", "ValueError: source='me/rows'", "FileNotFoundError:")
    )
    hub.mend()
    assert load(hub, "me/rows") == ["blue", "green"]


@pytest.mark.slow
def test_a_hub_that_is_gone_is_said_and_the_cache_is_there_for_those_who_ask(hub: Hub) -> None:
    commit = hub.commit("me/rows", data("red"))
    assert load(hub, "me/rows") == ["red"]
    hub.kill()
    message = load(hub, "me/rows")
    assert message.startswith("ConnectionError: source='me/rows': the Hub could not be asked (")
    assert "HF_HUB_OFFLINE=1, or revision=<its 40-digit commit>" in message
    assert load(hub, "me/rows", revision=commit) == ["red"]
    assert load(hub, "me/rows", {"env": {"HF_HUB_OFFLINE": "1"}}) == ["red"]
    other = load(hub, "me/rows", {"env": {"HF_HUB_OFFLINE": "1"}}, revision="0" * 40)
    assert (
        f"commit {'0' * 40} could not be loaded" in other
        and f"the cache holds {commit}, which is a different commit" in other
    )


def test_an_answer_that_breaks_off_is_asked_for_again(hub: Hub) -> None:
    hub.commit("me/rows", data("red"))
    hub.fault("GET", "/large/", kind="cut", times=2)
    assert load(hub, "me/rows") == ["red"]
    assert sum(row["fault"] == "cut" for row in hub.log()) == 2


@pytest.mark.parametrize(
    ("source", "options", "token", "message"),
    [
        ("you/hidden", {}, "hf_me_writes", "FileNotFoundError: source='you/hidden' is neither a local folder nor a dataset"),
        ("you/hidden", {}, None, "for a private dataset pass token=... or log in with `hf auth login`"),
        ("me/nothing", {}, "hf_me_writes", "on the Hub that you may see. Check the spelling"),
        ("you/open", {"revision": "v9"}, "hf_me_writes", "source='you/open' has no revision 'v9'. Name a branch, a tag or"),
        ("you/open", {"revision": "0" * 40}, "hf_me_writes", "you/open"),
        ("you/open", {}, "hf_wrong", "ValueError: source='you/open': the Hub does not know your token (401). HF_TOKEN wins"),
        ("you/open", {"split": "test"}, "hf_me_writes", 'Unknown split "test"'),
        ("you/x y", {}, "hf_me_writes", "nor a Hub id of the form 'owner/name'"),
        ("you/header", {}, "hf_me_writes", "ValueError: source='you/header': the header of its README.md is not valid YAML"),
    ],
)  # fmt: skip
def test_what_cannot_be_loaded_says_what_to_do(
    hub: Hub, source: str, options: dict[str, str], token: str | None, message: str
) -> None:
    hub.commit("you/hidden", data("red"), private=True)
    hub.commit("you/header", {**data("red"), "README.md": b"---\nconfigs: [\n---\n"})
    hub.commit("you/open", data("red"))
    assert message in load(hub, source, {"token": token}, **options)


@pytest.mark.slow
def test_on_the_command_line_it_is_one_line_without_a_token(hub: Hub) -> None:
    hub.commit("you/hidden", data("red"), private=True)
    code = "import sys; from car_datasets.cli import app; app(sys.argv[1:])"
    done = hub.run(code, "score", "you/hidden", "--output", hub.folder.parent / "out.parquet")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("car-datasets: source='you/hidden' is neither")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("token", ["hf_me\nwrites", "with space"])
def test_a_token_that_cannot_be_one_is_refused_unseen(hub: Hub, token: str) -> None:
    message = load(hub, "me/rows", {"token": None}, token=token)
    assert "The token contains white space" in message and token not in message
