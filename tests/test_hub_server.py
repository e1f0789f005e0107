"""The tests' Hub and unmodified clients: their requests, and how they react to its answers and faults."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import LOOKUPS
from tests.hub_server import Hub

START = """
import json, sys
from huggingface_hub import HfApi, HfFileSystem, hf_hub_download, whoami
from huggingface_hub.errors import *
api = HfApi()
def caught(call, *arguments, **options):
    try:
        return call(*arguments, **options)
    except Exception as error:
        response = getattr(error, "response", None)
        return [type(error).__name__, getattr(response, "status_code", None)]
"""


def said(hub: Hub, code: str, *arguments: object, **options: Any) -> Any:
    """Run code that can use `api` and `caught`, and return its last line of output, which is JSON."""
    return json.loads(hub.run(START + code, *arguments, check=True, **options).stdout.splitlines()[-1])


@pytest.mark.slow
def test_datasets_push_and_load(hub: Hub) -> None:
    code = """
import datasets, itertools
rows = datasets.Dataset.from_dict({"a": range(10), "text": ["x"] * 10})
rows.push_to_hub("me/x", private=True)
rows.select(range(4)).push_to_hub("me/x", split="small")
rows.push_to_hub("me/x", config_name="other", num_shards=3)
rows.push_to_hub("me/x", config_name="other", num_shards=2)
before = api.dataset_info("me/x").sha
rows.push_to_hub("me/x", config_name="other", num_shards=2)  # nothing new: no commit
found = datasets.load_dataset("me/x")
streamed = datasets.load_dataset("me/x", "other", split="train", streaming=True)
rows.push_to_hub("me/x", revision="dev")
print(json.dumps([
    found.num_rows, found["train"].to_dict() == rows.to_dict(), len(list(streamed)),
    before == api.dataset_info("me/x").sha, sorted(api.list_repo_files("me/x", repo_type="dataset")),
    [ref.name for ref in api.list_repo_refs("me/x", repo_type="dataset").branches],
]))
"""
    sizes, equal, streamed, same, files, branches = said(hub, code)
    assert (sizes, equal, streamed, same) == ({"train": 10, "small": 4}, True, 10, True)
    assert [f for f in files if f.startswith("other")] == [f"other/train-0000{i}-of-00002.parquet" for i in range(2)]
    assert branches == ["main", "dev"]
    stored = hub.repo("me/x")
    assert stored is not None and stored.private and stored.files().keys() == set(files)
    assert all(not row["token"] for row in hub.log() if row["path"].startswith("/large/"))


def test_a_revision_is_what_it_was(hub: Hub) -> None:
    first = hub.commit("you/x", {"a.txt": b"1", "folder/b.txt": b"2"})
    hub.commit("you/x", {"a.txt": b"3"})
    code = """
read = lambda revision: open(hf_hub_download("you/x", "a.txt", repo_type="dataset", revision=revision)).read()
files = HfFileSystem()
print(json.dumps([
    read(sys.argv[1]), read("main"), caught(read, "nowhere"), caught(read, "0" * 40),
    caught(hf_hub_download, "you/x", "c.txt", repo_type="dataset"),
    sorted(files.find(f"datasets/you/x@{sys.argv[1]}")), files.cat_file("datasets/you/x/folder/b.txt").decode(),
    caught(files.ls, "datasets/you/x/nothing"), [c.title for c in api.list_repo_commits("you/x", repo_type="dataset")],
]))
"""
    old, new, branch, commit, file, listed, content, folder, titles = said(hub, code, first)
    assert (old, new, content) == ("1", "3", "2")
    assert branch == commit == ["RevisionNotFoundError", 404]
    assert file[0].endswith("EntryNotFoundError") and folder[0] == "FileNotFoundError"
    assert listed == [f"datasets/you/x@{first}/{name}" for name in (".gitattributes", "a.txt", "folder/b.txt")]
    assert titles == ["put there by a test", "put there by a test", "initial commit"]


def test_commits_on_a_parent_that_has_moved(hub: Hub) -> None:
    code = """
api.create_repo("me/x", repo_type="dataset")
parent = api.dataset_info("me/x").sha
put = lambda **options: api.upload_file(
    path_or_fileobj=b"1", path_in_repo="a", repo_id="me/x", repo_type="dataset", **options
).oid
first = put(parent_commit=parent)
print(json.dumps([first == api.dataset_info("me/x").sha, caught(api.upload_file, path_or_fileobj=b"2", path_in_repo="b",
    repo_id="me/x", repo_type="dataset", parent_commit=parent),
    caught(api.delete_file, "nothing", "me/x", repo_type="dataset"), caught(put, revision="nowhere"),
    caught(api.create_repo, "me/x", repo_type="dataset")]))
"""
    moved, *refused = said(hub, code)
    assert moved is True
    assert [status for _, status in refused] == [412, 404, 404, 409]
    stored = hub.repo("me/x")
    assert stored is not None and "b" not in stored.files()


def test_who_may_do_what(hub: Hub) -> None:
    hub.commit("me/mine", {"a": b"1"}, private=True)
    hub.commit("you/theirs", {"a": b"1"}, private=True)
    hub.commit("you/public", {"a": b"1"})
    hub.commit("company/shared", {"a": b"1"}, private=True)
    code = """
def read(name): return caught(lambda: open(hf_hub_download(name, "a", repo_type="dataset")).read())
def write(name): return caught(lambda: bool(api.upload_file(
    path_or_fileobj=b"2", path_in_repo="b", repo_id=name, repo_type="dataset")))
def make(name): return caught(lambda: bool(api.create_repo(name, private=True)))
print(json.dumps([
    [read(name) for name in ("me/mine", "you/theirs", "you/public", "company/shared", "you/nothing")],
    [write(name) for name in ("me/mine", "you/theirs", "you/public", "company/shared")],
    [make(name) for name in ("me/new", "team/new", "company/new", "you/new")],
    caught(lambda: [whoami()["name"], whoami()["auth"]["accessToken"]["role"], [o["name"] for o in whoami()["orgs"]]]),
]))
"""
    hidden, refused = ["RepositoryNotFoundError", 404], ["HfHubHTTPError", 403]
    no_token, bad_token = ["RepositoryNotFoundError", 401], ["HfHubHTTPError", 401]
    assert said(hub, code) == [
        ["1", hidden, "1", "1", hidden],
        [True, hidden, refused, refused],
        [True, True, refused, refused],
        ["me", "write", ["team", "company"]],
    ]
    assert said(hub, code, token=hub.read_token)[1:3] == [
        [refused, hidden, refused, refused],
        [refused] * 4,
    ]
    home = {"HF_HOME": str(hub.folder.parent / "another")}  # a client that has seen a file reads it from its cache
    reads, writes, makes, me = said(hub, code, token=None, env=home)
    assert reads[1:] == [no_token, "1", no_token, no_token] and me[0] == "LocalTokenNotFoundError"
    assert {status for _, status in (*writes, *makes)} == {401}
    assert said(hub, code, token="hf_wrong")[1:3] == [[bad_token] * 4] * 2
    stored = hub.repo("me/new", kind="models")
    assert stored is not None and stored.private


@pytest.mark.slow
def test_transformers_push_and_load(hub: Hub) -> None:
    code = """
import torch
from transformers import AutoModel, BertConfig, BertModel
config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
model = BertModel(config)
model.push_to_hub("me/model", private=True)
again = AutoModel.from_pretrained("me/model")
print(json.dumps(all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))))
"""
    assert said(hub, code) is True
    stored = hub.repo("me/model", kind="models")
    assert stored is not None and "model.safetensors" in stored.files() and len(stored.large) == 1


def test_faults_befall_what_they_name(hub: Hub) -> None:
    hub.commit("me/x", {"a": b"1", "b.bin": bytes(range(256)) * 4096})
    hub.fault("GET", "/api/datasets/me/x", status=429, headers={"Retry-After": "1"}, skip=1)
    hub.fault("POST", "/commit/", kind="drop")
    hub.fault("POST", "/commit/", kind="lost")
    hub.fault("POST", "/api/repos/create", kind="delay", seconds=1)
    hub.fault("GET", "/large/", kind="cut")
    code = """
import time
seen = [caught(lambda: bool(api.dataset_info("me/x"))) for _ in range(3)]
put = lambda name: caught(lambda: bool(api.upload_file(
    path_or_fileobj=b"2", path_in_repo=name, repo_id="me/x", repo_type="dataset")))
puts = [put("dropped"), put("lost"), put("good")]
began = time.monotonic()
api.create_repo("me/y")
waited = time.monotonic() - began
size = len(open(hf_hub_download("me/x", "b.bin", repo_type="dataset"), "rb").read())
print(json.dumps([seen, puts, waited, size]))
"""
    seen, puts, waited, size = said(hub, code)
    assert seen == [True, ["HfHubHTTPError", 429], True]
    assert puts[0][1] is None and puts[1][1] is None and puts[2] is True  # no answer: no status
    stored = hub.repo("me/x")
    assert stored is not None and {"lost", "good"} <= stored.files().keys() and "dropped" not in stored.files()
    assert 1 <= waited < 10 and size == 256 * 4096
    assert [row["fault"] for row in hub.log() if row["fault"]] == ["status", "drop", "lost", "delay", "cut"]
    assert hub.count("POST", "/commit/") == 3
    with pytest.raises(ValueError, match="kind='nonsense'"):
        hub.fault("GET", "/", kind="nonsense")


def test_a_token_that_leaks_fails_the_test(tmp_path: Path) -> None:
    for number, leak in enumerate(
        ("import os; print(os.environ['HF_TOKEN'])", "open('leak', 'w').write('hf_you_write')")
    ):
        (tmp_path / str(number)).mkdir()
        hub = Hub(tmp_path / str(number) / "hf-home")
        hub.run(f"import os; os.chdir({str(tmp_path / str(number))!r}); {leak}", check=True)
        with pytest.raises(AssertionError, match="a token is in"):
            hub.close()
    hub = Hub(tmp_path / "2" / "hf-home")
    hub.commit("me/x", {"README.md": b"my token is hf_me_writes"})
    with pytest.raises(AssertionError, match=r"a token is in \['me/x/README.md'\]"):
        hub.close()


def test_no_server_outlives_its_test(tmp_path: Path) -> None:
    hub = Hub(tmp_path / "hf-home")
    hub.close()
    assert hub._process.returncode == 0


def test_other_hosts_are_refused_in_child_processes_too() -> None:
    code = "import socket\ntry: socket.getaddrinfo('example.org', 80)\nexcept OSError as error: print(error)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "the tests look up no other host" in done.stdout
    assert LOOKUPS.read_text().startswith("example.org (socket.getaddrinfo, process ")
    LOOKUPS.write_text("")  # else the guard fails this test, as it should
    began = time.monotonic()
    with pytest.raises(OSError, match="no other host"):
        socket.create_connection(("192.0.2.1", 80), timeout=5)
    assert time.monotonic() - began < 1
    assert "192.0.2.1" in LOOKUPS.read_text()
    LOOKUPS.write_text("")
