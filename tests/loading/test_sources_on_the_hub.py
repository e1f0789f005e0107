"""Datasets of the Hub: the commit that was asked for, or an error that says what to do. Real clients, a Hub on this machine."""

from __future__ import annotations

import gzip
import io
import json
import time
import zipfile
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
    """Return the files of a dataset with these answers."""
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
        ("you/open", {"split": "test"}, "hf_me_writes", "split='test' is not in the source; it has ['train']"),
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


# --- JSON and CSV: the readers of this machine

TRY = """
import json, logging, sys
logging.basicConfig(level=logging.WARNING, format="%(message)s")
from car_datasets import load_instructions
for source, options in json.loads(sys.argv[1]):
    try:
        rows = load_instructions(source, **options)
        found = [rows["output"][:], rows["source_index"][:]]
    except (ValueError, OSError) as error:
        found = f"{type(error).__name__}: {error}"
    print(json.dumps(found))
"""


def try_all(hub: Hub, *wanted: tuple[str, dict[str, Any]], **run: Any) -> list[Any]:
    done = hub.run(TRY, json.dumps(wanted), check=True, **run)
    assert "Traceback" not in done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def jsonl(*answers: Any, **more: str) -> bytes:
    rows = ({"instruction": "a", "output": answer, **more} for answer in answers)
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_values_stay_what_they_are_in_the_files(hub: Hub) -> None:
    """Load text of which `datasets` alone makes numbers, dates and nulls, and chats that it takes for traces of agents."""
    texts = ["007", "3", "NA", "None", "2024-01-02", "true", "1e-12"]
    table = "instruction,output\n" + "".join(f"a,{text}\n" for text in texts)
    hub.commit("you/csv", {"rows.csv": table.encode()})
    hub.commit("you/tsv", {"rows.tsv": table.replace(",", "\t").encode()})
    hub.commit("you/dates", {"rows.json": json.dumps([{"instruction": "a", "output": "2024-01-02"}] * 2).encode()})
    hub.commit("you/traces", {"train.jsonl": jsonl("b", id="r", source="forum", model="m", system_prompt="s")})
    splits = {f"data/{name}.jsonl.gz": gzip.compress(jsonl(*map(str, range(4)))) for name in ("train", "test")}
    hub.commit("you/splits", splits)
    everything = list(range(len(texts)))
    page = f"{hub.url}/datasets/you"
    assert try_all(
        hub,
        ("you/csv", {}),
        ("you/tsv", {}),
        ("you/dates", {}),
        ("you/traces", {}),
        ("you/splits", {"split": "test[1:3]"}),
        ("you/splits", {"split": "all"}),
        (f"{page}/dates", {}),
        (f"{page}/csv/resolve/main/rows.csv", {}),
        ("hf://datasets/you/dates/rows.json", {}),
        ("hf://datasets/you/splits/data/*.gz", {"glob": True}),
    ) == [
        [texts, everything],
        [texts, everything],
        [["2024-01-02"] * 2, [0, 1]],
        [["b"], [0]],
        [["1", "2"], [1, 2]],
        [["0", "1", "2", "3"] * 2, list(range(8))],
        [["2024-01-02"] * 2, [0, 1]],
        [texts, everything],
        [["2024-01-02"] * 2, [0, 1]],
        [["0", "1", "2", "3"] * 2, list(range(8))],
    ]


def test_what_cannot_be_built_is_one_line_with_the_name_of_the_file(hub: Hub) -> None:
    packed, number, text = io.BytesIO(), io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("rows.csv", "instruction,output\na,007\n")
    pq.write_table(pa.table({"instruction": ["a"], "output": [7]}), number)
    pq.write_table(pa.table({"instruction": ["a"], "output": ["007"]}), text)
    hub.commit("you/types", {"a.parquet": number.getvalue(), "b.parquet": text.getvalue()})
    header = b"---\nconfigs:\n- config_name: default\n  data_files: rows.csv\n  header: null\n  names: [a, b]\n---\n"
    hub.commit("you/names", {"README.md": header, "rows.csv": b"a,007\n"})
    two = b"---\nconfigs:\n- config_name: one\n  data_files: a.json\n- config_name: two\n  data_files: a.json\n---\n"
    hub.commit("you/configs", {"README.md": two, "a.json": jsonl("b")})
    broken = {
        "cut": ("rows.jsonl", jsonl("b") + jsonl("c")[:20]),
        "latin": ("data/rows.csv", "instruction,output\ncafé,b\n".encode("latin-1")),
        "empty": ("rows.jsonl", b""),
        "gzip": ("rows.json.gz", b"not compressed"),
        "parquet": ("data/train-00000-of-00001.parquet", b"PAR1 and no more"),
        "script": ("script.py", b"raise SystemExit"),
        "zip": ("rows.zip", packed.getvalue()),
    }
    for name, (file, content) in broken.items():
        hub.commit(f"you/{name}", {file: content})
    unclear = {
        "types": "cannot be loaded from a.parquet, b.parquet: files have columns of different types",
        "names": "the configuration 'default' of its README.md has ['header', 'names'], which are for `datasets` itself",
        "configs": "cannot be loaded: Config name is missing. Please pick one among the available configs: ['one', 'two']",
    }
    for message, expected in zip(try_all(hub, *((f"you/{n}", {}) for n in unclear)), unclear.values(), strict=True):
        assert message.startswith("ValueError: source='you/") and expected in message, message
        assert "\n" not in message
    missing = [("hf://datasets/you/cut/none.csv", {}), ("hf://datasets/you/none/rows.csv", {})]
    found = try_all(hub, *((f"you/{name}", {}) for name in broken), *missing)
    for (name, (file, _)), message in zip(broken.items(), found, strict=False):
        assert message.startswith("ValueError: source=") and f"you/{name}" in message and file in message, message
    assert all(message.startswith("FileNotFoundError: source=") for message in found[-2:]), found[-2:]


@pytest.mark.slow
def test_what_is_huge_in_memory_is_refused(hub: Hub) -> None:
    names = "a0: &a0 [" + "x, " * 10 + "]\n"
    names += "".join(f"a{i}: &a{i} [" + f"*a{i - 1}, " * 10 + "]\n" for i in range(1, 9)) + "configs: *a8\n"
    hub.commit("you/names", {**data("red"), "README.md": f"---\n{names}---\n".encode()})
    hub.commit("you/more", {**data("red"), ".huggingface.yaml": names.encode()})
    wide = io.BytesIO()
    pq.write_table(pa.table({f"c{i}": [1] for i in range(20_000)}), wide)
    hub.commit("you/wide", {"rows.parquet": wide.getvalue()})
    hub.commit("you/bomb", {"rows.jsonl.gz": gzip.compress(jsonl("red") + b"\n" * (1 << 27))})
    expected = {
        "names": "the header of its README.md has more than 16,777,216 characters",
        "more": "the header of its README.md has more than 16,777,216 characters",
        "wide": "20,000 columns, and at most 10,000 are read",
        "bomb": "rows.jsonl.gz' decompresses to more than 200 times its size",
    }
    start = time.monotonic()
    for message, (name, part) in zip(
        try_all(hub, *((f"you/{n}", {}) for n in expected)), expected.items(), strict=True
    ):
        assert message.startswith(f"ValueError: source='you/{name}") and part in message and len(message) < 500, message
    assert time.monotonic() - start < 60


@pytest.mark.slow
def test_files_are_cached_by_their_commit(hub: Hub) -> None:
    first = hub.commit("me/rows", {"train.jsonl": jsonl("red"), "test.jsonl": jsonl("grey")}, private=True)
    assert try_all(hub, ("me/rows", {"split": "train"})) == [[["red"], [0]]]
    second = hub.commit("me/rows", {"train.jsonl": jsonl("blue")})
    wanted = [("me/rows", {"split": "train"}), ("me/rows", {"split": "train", "revision": first})]
    assert try_all(hub, *wanted) == [[["blue"], [0]], [["red"], [0]]]
    hub.kill()
    offline: dict[str, Any] = {"env": {"HF_HUB_OFFLINE": "1"}}
    assert try_all(hub, *wanted, **offline) == [[["blue"], [0]], [["red"], [0]]]
    # A split that was never downloaded is not taken for an empty one, nor for that of another commit.
    [message] = try_all(hub, ("me/rows", {"split": "test", "revision": second}), **offline)
    assert message.startswith("ConnectionError: source='me/rows'")
    [message] = try_all(hub, ("me/rows", {"split": "train", "revision": "0" * 40}), **offline)
    assert message.startswith(("ConnectionError: source='me/rows'", "FileNotFoundError: source='me/rows'"))
