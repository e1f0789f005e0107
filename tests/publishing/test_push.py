"""push.py: pushes from real processes to a Hub on this machine, failing ones included, and the splits they send."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import Dataset, DatasetInfo, Features, Image

import car_datasets.publishing.push as pushing
from car_datasets import curate, select_car
from car_datasets.loading.values import dataset_from_rows
from car_datasets.publishing.push import selection_splits
from car_datasets.receipt import Receipt
from car_datasets.reporting.plots import PLOT_FILES
from car_datasets.results import Result
from car_datasets.utils.columns import join_columns
from car_datasets.utils.digests import indices_digest
from tests.hub_server import Hub
from tests.test_recipe import short_rows
from tests.workers import start

# Waits are noted instead of waited for. A small SHARD_BYTES gives every push several files.
START = """
import json, sys, time
import car_datasets.publishing.push as pushing
import car_datasets.publishing.verification as reading_back
from datasets import Dataset, load_dataset
slept = []
time.sleep = slept.append
pushing.SHARD_BYTES = 200
"""
COMMAND = START + "from car_datasets.cli import app\napp()"


@pytest.fixture(scope="module")
def result(tiny_iqs: str, tiny_embedder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that `curate` writes for 24 rows of a file."""
    folder = tmp_path_factory.mktemp("result")
    short_rows().to_json(folder / "rows.jsonl")
    curate(folder / "rows.jsonl", folder / "out", scorer=tiny_iqs, embedder=tiny_embedder, n1=5, k=3)
    return folder / "out"


def push(hub: Hub, folder: Path, repo: str, *options: object, **run: Any) -> subprocess.CompletedProcess[str]:
    return hub.run(COMMAND, "push", folder, repo, *options, **run)


def splits_of(hub: Hub, repo: str, *, config: str = "default") -> dict[str, list[dict[str, Any]]]:
    """Return what a plain `load_dataset` reads, in a process that has seen nothing of it before."""
    code = "import datasets, json, sys; datasets.config.USE_PARQUET_EXPORT = False\n"
    code += "print(json.dumps({n: d.to_list() for n, d in datasets.load_dataset(*sys.argv[1:]).items()}))"
    fresh = {"HF_HOME": str(hub.folder.parent / f"fresh-{time.monotonic_ns()}")}
    return json.loads(hub.run(code, repo, config, check=True, env=fresh).stdout.splitlines()[-1])


def commits(hub: Hub, repo: str) -> int:
    stored = hub.repo(repo)
    return 0 if stored is None else len(stored.titles) - 1  # without the one that made it


def waiting_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_control_is_drawn_from_the_rows_that_the_named_column_scores() -> None:
    """Rows that were selected by another scorer have no receipt, which would name the column."""
    pool = Dataset.from_dict({"text": list("abc"), "quality": [3.0, None, 1.0], "cluster": [0, 0, 0]})
    pool = pool.add_column("source_index", [0, 1, 2])
    result = Result(select_car(pool, 1, 0, score_column="quality"), pool)
    tables = pushing._tables(result, "train", ("random_control",), False, "quality")
    assert tables["random_control"]["text"][:] in (["a"], ["c"])
    with pytest.raises(ValueError, match=r"no column \['iqs_score'\]"):
        pushing._tables(result, "train", ("random_control",), False, None)


# --- what lands


@pytest.mark.slow
def test_a_result_lands_in_one_commit_with_card_and_receipt(hub: Hub, result: Path) -> None:
    also = "scored,random_control,length_matched_control"
    done = push(hub, result, "me/car", "--also", also, "--check", env={"HF_DEBUG": "1"}, check=True)
    stored = hub.repo("me/car")
    assert stored is not None and stored.private and commits(hub, "me/car") == 1
    assert f"Pushed to {hub.url}/datasets/me/car, commit {stored.sha}." in done.stdout
    found = splits_of(hub, "me/car")
    assert list(found) == ["selected", *also.split(",")]
    selected = Dataset.from_parquet(str(result / "selected.parquet")).to_list()
    assert found["selected"] == selected
    chosen = {row["source_index"]: row for row in selected}
    scored = Dataset.from_parquet(str(result / "scored.parquet")).remove_columns("embedding").to_list()
    nothing = {"selected_by": None, "score_rank": None, "cluster_rank": None}
    assert found["scored"] == [{**row, **nothing, **chosen.get(row["source_index"], {})} for row in scored]
    figures = json.loads((result / "report.json").read_text())
    for name in ("random_control", "length_matched_control"):  # the rows that the report measured
        assert len(found[name]) == len(selected)
        mean = sum(row["iqs_score"] for row in found[name]) / len(selected)
        assert mean == pytest.approx(figures[name]["mean_score"], abs=1e-6)
    files = stored.files()
    for name in ("receipt.json", "report.json"):
        assert files[name] == (result / name).read_bytes()
    uploads = hub.count("PUT", "/large/")
    again = push(hub, result, "me/car", "--also", also, check=True)
    assert stored.sha in again.stdout
    assert (commits(hub, "me/car"), hub.count("PUT", "/large/")) == (1, uploads)
    sent = [row for row in hub.log() if row["path"].startswith("/large/")]
    assert sent and not any(row["token"] for row in sent)


@pytest.mark.slow
def test_json_and_images_are_pushed_as_they_are(hub: Hub, tiny_iqs: str, tiny_embedder: str, tmp_path: Path) -> None:
    """Push an image that cannot be decoded; `--check` compares what was pushed."""
    sides = [2**70, "42", 1.0000000000000002e16, {"id": "007"}]
    rows = dataset_from_rows(
        [{"instruction": f"Say {i}.", "output": "b", "side": side} for i, side in enumerate(sides)]
    )
    picture = {"bytes": b"no picture", "path": "p.png"}
    media = Dataset(pa.table({"picture": [picture] * 4}), DatasetInfo(features=Features(picture=Image())))
    join_columns(rows, media).to_parquet(tmp_path / "rows.parquet")
    settings = {"scorer": tiny_iqs, "embedder": tiny_embedder, "n1": 2, "k": 2, "allow_worse": True}
    curate(tmp_path / "rows.parquet", tmp_path / "out", **settings)
    push(hub, tmp_path / "out", "me/sides", "--also", "scored", "--check", check=True)
    code = "import json; from car_datasets import load_instructions\n"
    code += "rows = load_instructions('me/sides', split='scored', schema='alpaca').remove_columns('picture')\n"
    code += "print(json.dumps(rows['side'][:]))"
    assert json.loads(hub.run(code, check=True).stdout.splitlines()[-1]) == sides


@pytest.mark.slow
def test_public_only_when_asked_for(hub: Hub, result: Path) -> None:
    push(hub, result, "team/open", "--public", "--also", "none", check=True)
    stored = hub.repo("team/open")
    assert stored is not None and not stored.private
    assert list(splits_of(hub, "team/open")) == ["selected"]


@pytest.mark.slow
def test_plots_and_embeddings_travel_and_old_plots_go(hub: Hub, result: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(result, folder)
    # An own picture is none of the result's, and earlier versions had no folder of plots.
    (folder / "plots" / "private.png").write_bytes(b"\x89PNG\r\n")
    (folder / "plots" / PLOT_FILES[0]).rename(folder / PLOT_FILES[0])
    push(hub, folder, "me/car", "--embeddings", "--check", check=True)
    card = hub.repo("me/car").files()["README.md"].decode()
    drawn = [f"plots/{name}" for name in PLOT_FILES]
    assert re.findall(r"!\[.*\]\((.*\.png)\)", card) == drawn
    assert {name for name in hub.repo("me/car").files() if name.endswith(".png")} == set(drawn)
    embeddings = Dataset.from_parquet(str(result / "scored.parquet"))["embedding"][:]
    found = splits_of(hub, "me/car")
    assert [row["embedding"] for row in found["scored"]] == embeddings
    assert [row["embedding"] for row in found["selected"]] == [embeddings[r["source_index"]] for r in found["selected"]]
    (folder / PLOT_FILES[0]).unlink()
    push(hub, folder, "me/car", check=True)
    files = hub.repo("me/car").files()
    assert {name for name in files if name.endswith(".png")} == set(drawn[1:])
    assert drawn[0] not in files["README.md"].decode()
    assert "embedding" not in splits_of(hub, "me/car")["scored"][0]


@pytest.mark.slow
def test_a_dataset_is_pushed_from_a_script(hub: Hub, result: Path) -> None:
    code = """
from car_datasets import push_selection
rows = Dataset.from_dict({"text": ["a", None, "c"], "x": [float("nan"), 1.0, 2.0]})
print(json.dumps(push_selection(rows, "me/rows", check=True)))
print(json.dumps(push_selection(rows.select([2, 0]), "me/rows", split="test", check=True)))
"""
    _, second = hub.run(START + code, check=True).stdout.splitlines()[-2:]
    assert json.loads(second) == [f"{hub.url}/datasets/me/rows", hub.repo("me/rows").sha]
    found = splits_of(hub, "me/rows")
    assert [row["text"] for row in found["selected"]] == ["a", None, "c"]
    assert [row["text"] for row in found["test"]] == ["c", "a"]
    card = hub.repo("me/rows").files()["README.md"].decode()
    assert "| `selected` | 3 |" in card and "| `test` | 2 |" in card


# --- what is there already


@pytest.mark.slow
def test_other_columns_leave_a_repository_that_loads(hub: Hub) -> None:
    code = """
from car_datasets import push_selection
old = Dataset.from_dict({"text": ["a", "b"] * 300, "n": range(600)})
new = Dataset.from_dict({"words": [["a"], ["b"]]})
push_selection(old, "me/rows", private=True)
push_selection(new, "me/rows", check=True)  # the only split: it may change, and has fewer files now
push_selection(new, "me/rows", split="second")
try:
    push_selection(old, "me/rows", check=True)
except ValueError as error:
    print(error)
push_selection(old, "me/rows", config_name="old", check=True)
"""
    done = hub.run(START + code, check=True)
    message = done.stdout.splitlines()[-1]
    assert "holds the split(s) ['second'] with other columns or types (['n', 'text', 'words'])" in message
    assert "--config-name another" in message
    assert commits(hub, "me/rows") == 4
    assert splits_of(hub, "me/rows") == {name: [{"words": ["a"]}, {"words": ["b"]}] for name in ("selected", "second")}
    assert len(splits_of(hub, "me/rows", config="old")["selected"]) == 600
    parts = [name for name in hub.repo("me/rows").files() if name.startswith("data/selected")]
    assert parts == ["data/selected-00000-of-00001.parquet"]


CARD = """---
license: mit
tags:
- mine
pretty_name: Mine
---
# My rows

Read this first.
"""


@pytest.mark.slow
def test_a_card_that_is_there_keeps_what_is_not_ours(hub: Hub, result: Path) -> None:
    hub.commit("me/car", {"README.md": CARD.encode(), "notes.txt": b"kept"}, private=True)
    push(hub, result, "me/car", check=True)
    first = hub.repo("me/car").files()["README.md"].decode()
    hub.commit("me/car", {"README.md": (first + "\nThe end.\n").replace("5 of 24", "5 of many").encode()}, private=True)
    push(hub, result, "me/car", "--also", "none", check=True)
    files = hub.repo("me/car").files()
    card = files["README.md"].decode()
    assert files["notes.txt"] == b"kept"
    assert "license: mit" in card and "- mine\n" in card and "pretty_name: Mine" in card
    assert (
        card.index("Read this first.")
        < card.index("<!-- car_datasets: begin config=default split=selected -->")
        < card.index("The end.")
    )
    assert card.count("car_datasets: begin") == 1 and "5 of 24 instruction rows" in card
    assert list(splits_of(hub, "me/car")) == ["selected", "scored"]


@pytest.mark.slow
def test_data_that_no_header_names_are_not_hidden(hub: Hub, result: Path) -> None:
    hub.commit("me/car", {"train.csv": b"a\n1\n"}, private=True)
    done = push(hub, result, "me/car")
    assert done.returncode == 2 and "'train.csv'" in done.stderr
    assert commits(hub, "me/car") == 1 and hub.count("PUT", "/large/") == 0


@pytest.mark.slow
def test_a_selection_without_a_receipt_does_not_keep_the_old_one(hub: Hub, result: Path) -> None:
    push(hub, result, "me/car", check=True)
    code = START + "pushing.push_selection(Dataset.from_parquet(sys.argv[1]), 'me/car', split=sys.argv[2])"
    hub.run(code, result / "selected.parquet", "test", check=True)
    assert "receipt.json" in hub.repo("me/car").files()  # another split takes nothing away
    hub.run(code, result / "selected.parquet", "selected", check=True)
    files = hub.repo("me/car").files()
    assert not {"receipt.json", "report.json"} & set(files)
    assert "What was selected, and why" not in files["README.md"].decode()


def another_result(folder: Path, to: Path, **source: str) -> Path:
    """Return the result with fewer selected rows, as another run of `curate` might have left it."""
    shutil.copytree(folder, to)
    selected = Dataset.from_parquet(str(folder / "selected.parquet")).select([0, 1])
    selected.to_parquet(str(to / "selected.parquet"))
    receipt = Receipt.read(folder)
    receipt = replace(
        receipt,
        selected_sha256=indices_digest(selected["source_index"][:]),
        source=source or receipt.source,
        files={**receipt.files, "selected.parquet": hashlib.sha256((to / "selected.parquet").read_bytes()).hexdigest()},
    )
    (to / "receipt.json").write_text(receipt.sealed(receipt.files, receipt.columns).to_json())
    return to


@pytest.mark.slow
def test_a_second_selection_does_not_take_the_receipt_of_the_first(hub: Hub, result: Path, tmp_path: Path) -> None:
    other = another_result(result, tmp_path / "other")
    push(hub, result, "me/car", check=True)
    before = hub.repo("me/car")
    uploads = hub.count("PUT", "/large/")
    for options in (["--config-name", "b"], ["--split", "second", "--also", "none"]):
        done = push(hub, other, "me/car", *options)
        assert done.returncode == 2 and "in configuration 'default', split 'selected'" in done.stderr
        assert "Push to another repository, one for each selection" in done.stderr
    assert (hub.repo("me/car").sha, hub.count("PUT", "/large/")) == (before.sha, uploads)
    code = START + "pushing.push_selection(Dataset.from_dict({'a': [sys.argv[1]]}), 'me/car', config_name='plain')"
    for word in ("x", "y"):  # rows without a receipt may be pushed in addition, and again
        hub.run(code, word, check=True)
        files = hub.repo("me/car").files()
        assert files["receipt.json"] == (result / "receipt.json").read_bytes() and "report.json" in files
    push(hub, result, "me/car", "--config-name", "again", check=True)  # the same selection may have two names


@pytest.mark.slow
def test_a_licence_goes_with_its_source(hub: Hub, result: Path, tmp_path: Path) -> None:
    header = b"---\nlicense: other\nlicense_name: theirs\nlicense_link: LICENSE\nlanguage: de\n---\n"
    commit = hub.commit("you/rows", {"README.md": header, "LICENSE": b"x"})
    first = another_result(result, tmp_path / "first", kind="hub", id="you/rows", revision=commit)
    push(hub, first, "me/car", check=True)
    card = hub.repo("me/car").files()["README.md"].decode()
    assert "license_name: theirs" in card and f"blob/{commit}/LICENSE" in card and "language: de" in card
    push(hub, result, "me/car", check=True)  # from a file, which has no licence to tell
    card = hub.repo("me/car").files()["README.md"].decode()
    assert not [word for word in ("license:", "theirs", "LICENSE", "language:", "you/rows") if word in card]


@pytest.mark.slow
def test_cards_in_other_encodings(hub: Hub) -> None:
    hub.commit("me/bom", {"README.md": b"\xef\xbb\xbf---\nlicense: mit\n---\n# Mine\n"}, private=True)
    hub.commit("me/latin", {"README.md": b"---\nlicense: mit\n---\n\xe9"}, private=True)
    code = "rows = Dataset.from_dict({'a': [1]})\npushing.push_selection(rows, 'me/bom')\n"
    done = hub.run(START + code + "pushing.push_selection(rows, 'me/latin')")
    card = hub.repo("me/bom").files()["README.md"].decode()
    assert card.startswith("---\nlicense: mit\n") and card.count("---\n") == 2
    assert "ValueError: 'me/latin': its README.md is not UTF-8" in done.stderr and commits(hub, "me/latin") == 1


@pytest.mark.slow
def test_the_pool_of_an_older_selection_goes_with_it(hub: Hub, result: Path, tmp_path: Path) -> None:
    push(hub, result, "me/car", "--also", "scored,random_control", check=True)
    push(hub, result, "me/car", "--also", "none", check=True)
    assert list(splits_of(hub, "me/car")) == ["selected", "scored", "random_control"]  # they are its own
    push(hub, another_result(result, tmp_path / "other"), "me/car", "--also", "none", check=True)
    found = splits_of(hub, "me/car")
    assert list(found) == ["selected"] and len(found["selected"]) == 2
    files = hub.repo("me/car").files()
    assert not [name for name in files if "scored-" in name or "random_control" in name]
    assert "`scored`" not in files["README.md"].decode()


# --- what must not leave


REFUSED: list[tuple[str, list[str], str | None, str]] = [
    ("me/car", [], None, "no token to push with. Log in with `hf auth login`, or set HF_TOKEN"),
    ("me/car", [], "hf_wrong", "does not know your token (401)"),
    ("me/car", [], Hub.read_token, "the token may only read"),
    ("you/car", [], Hub.token, "may not write to repositories of 'you'. Push to one of ['me', 'team', 'company']"),
    ("company/car", [], Hub.token, "may not write to repositories of 'company'"),
    ("car", [], Hub.token, "names no owner; pass 'me/car'"),
    ("me/a b", [], Hub.token, "not a Hub id of the form 'owner/name'"),
    ("me/public", [], Hub.token, "exists and is public, but private=True was requested"),
    ("me/private", ["--public"], Hub.token, "exists and is private, but private=False was requested"),
    ("me/car", ["--also", "everything"], Hub.token, "choose out of ('scored',"),
    ("me/car", ["--split", "a-b"], Hub.token, "split='a-b'"),
    (
        "me/car",
        ["--split", "random_control", "--also", "length_matched_control"],
        Hub.token,
        "split='random_control' is",
    ),
    ("me/car", ["--split", "scored", "--also", "none"], Hub.token, "split='scored' is the name of the pool"),
    ("me/car", ["--split", "all"], Hub.token, "split='all'"),
    ("me/car", ["--config-name", "../x"], Hub.token, "--config-name='../x'"),
]


@pytest.mark.slow
def test_nothing_leaves_where_it_was_not_meant_to_go(hub: Hub, result: Path) -> None:
    hub.commit("me/public", {"a": b"1"})
    hub.commit("me/private", {"a": b"1"}, private=True)
    code = """
import json, sys
from typer.testing import CliRunner
from car_datasets.cli import app
for repo, options, token in json.loads(sys.argv[2]):
    done = CliRunner().invoke(app, ["push", sys.argv[1], repo, *options], env={"HF_TOKEN": token})
    print(json.dumps([done.exit_code, done.output]))
"""
    cases = [(repo, options, token) for repo, options, token, _ in REFUSED]
    lines = hub.run(code, result, json.dumps(cases), check=True).stdout.splitlines()
    for (code, output), (repo, options, _, message) in zip(map(json.loads, lines), REFUSED, strict=True):
        assert (code, len(output.splitlines())) == (2, 1), (repo, options, output)
        assert message in output
        assert "hf_" not in output
    assert not [row for row in hub.log() if row["method"] == "PUT" or "/commit/" in row["path"]]
    assert hub.repo("you/car") is None and hub.repo("company/car") is None


@pytest.mark.slow
def test_a_folder_without_a_whole_result_is_refused_before_the_hub_is_asked(
    hub: Hub, result: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(result, folder)
    (folder / ".unfinished").touch()
    code = (
        START
        + """
for folder in sys.argv[1:]:
    try:
        pushing.push_selection(folder, "me/car")
    except ValueError as error:
        print(error)
"""
    )
    (folder2 := tmp_path / "empty").mkdir()
    shutil.copytree(result, changed := tmp_path / "changed")
    (changed / "plots" / "plot_map.png").write_bytes(b"")
    lines = hub.run(code, folder, folder2, changed, check=True).stdout.splitlines()
    assert "was not written to the end" in lines[0] and "has no selected.parquet" in lines[1]
    assert "is not as `car-datasets curate` wrote it: plots/plot_map.png" in lines[2]
    assert hub.log() == []


@pytest.mark.slow
def test_what_is_no_selection_is_refused_before_the_hub_is_asked(hub: Hub) -> None:
    code = """
from datasets import DatasetDict
rows = Dataset.from_dict({"a": [1, 2], "source_index": [0, 1]})
cases = [
    (rows.select([]), {}), (Dataset.from_dict({}), {}), (DatasetDict({"train": rows}), {}),
    (rows.to_iterable_dataset(), {}), (rows, {"scored": rows, "also": "scored"}),
    (rows, {"scored": rows, "split": "scored", "also": ()}), (rows, {"split": "all"}),
]
for dataset, options in cases:
    try:
        pushing.push_selection(dataset, "me/car", **options)
    except ValueError as error:
        print(error)
"""
    lines = hub.run(START + code, check=True).stdout.splitlines()
    words = ["has no rows", "has no columns", "is DatasetDict; pass", "is IterableDataset; pass", "also=['scored']"]
    for line, word in zip(lines, [*words, "split='scored' is the name", "split='all'"], strict=True):
        assert word in line
    assert hub.log() == []


@pytest.mark.slow
def test_a_token_with_a_line_end_is_still_one_and_a_broken_one_is_not_shown(hub: Hub, result: Path) -> None:
    push(hub, result, "me/car", "--token", Hub.token + "\r\n", token=None, check=True)
    done = push(hub, result, "me/other", "--token", "hf_top secret", token=None)
    assert done.returncode == 2 and "secret" not in done.stdout + done.stderr
    code = START + "pushing.push_selection(Dataset.from_dict({'a': [1]}), 'me/other', token='hf_top\\nsecret')"
    done = hub.run(code)
    assert (
        "ValueError: The token contains white space" in done.stderr and "secret" not in done.stderr.split("Error:")[-1]
    )
    assert hub.repo("me/other") is None


# --- what fails on the way


@pytest.mark.slow
def test_what_passes_is_tried_again(hub: Hub) -> None:
    faults: dict[str, dict[str, Any]] = {
        "a": {"method": "POST", "path": "/me/a/commit/", "times": 2, "status": 503},
        "b": {"method": "POST", "path": "/me/b/commit/", "status": 412},
        "c": {"method": "POST", "path": "/me/c/commit/", "status": 409},
        "d": {"method": "POST", "path": "/me/d/commit/", "status": 429, "headers": {"Retry-After": "77"}},
        "e": {"method": "POST", "path": "/me/e/commit/", "kind": "drop"},
        "f": {"method": "POST", "path": "/me/f/commit/", "kind": "lost"},
        "g": {"method": "GET", "path": "/api/datasets/me/g$", "times": 2, "status": 500},
        "h": {"method": "PUT", "path": "/large/datasets/me/h", "times": 2, "status": 502},
        "i": {"method": "POST", "path": "/me/i/preupload/", "kind": "drop"},
    }
    for fault in faults.values():
        hub.fault(**fault)
    hub.fault("POST", "/api/repos/create", status=502)
    hub.fault("GET", "/api/whoami-v2", status=500)
    code = (
        START
        + """
rows = Dataset.from_dict({"a": range(100)})
for name in sys.argv[1:]:
    pushing.push_selection(rows, f"me/{name}", check=True)
print(max(slept))
"""
    )
    done = hub.run(code, *faults, check=True)
    assert float(done.stdout.splitlines()[-1]) == 77
    assert {row["fault"] for row in hub.log()} == {None, "status", "drop", "lost"}
    assert [commits(hub, f"me/{name}") for name in faults] == [1] * len(faults)


@pytest.mark.slow
def test_what_stays_is_said_in_one_line_and_the_same_command_resumes(hub: Hub, result: Path) -> None:
    hub.fault("POST", "/commit/", times=1000, status=503)
    done = push(hub, result, "me/car")
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert "the Hub failed 8 times" in last and "503" in last and "run the same command again to resume" in last
    assert commits(hub, "me/car") == 0 and set(hub.repo("me/car").files()) == {".gitattributes"}
    uploads = hub.count("PUT", "/large/")
    hub.mend()
    push(hub, result, "me/car", check=True)
    assert commits(hub, "me/car") == 1 and hub.count("PUT", "/large/") == uploads
    hub.fault("POST", "/commit/", times=1000, status=403)
    done = push(hub, result, "me/car", "--embeddings")
    assert done.returncode == 2 and "the Hub refuses the upload (403" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_the_server_goes_down_in_the_middle(hub: Hub, result: Path) -> None:
    hub.fault("PUT", "/large/", times=1000, kind="delay", seconds=600, skip=2)
    child = start(["-c", COMMAND, "push", str(result), "me/car"], hub.env)
    waiting_for(lambda: hub.count("PUT", "/large/") == 2)
    hub.kill()
    printed = "".join(child.communicate(timeout=60))
    assert child.returncode == 2
    assert "run the same command again to resume" in printed and "Traceback" not in printed, printed
    assert hub.token not in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "step", "committed"), [("pushing", "_write_shards", 0), ("HfApi", "create_commit", 1)]
)
def test_a_repository_that_is_made_public_during_the_push_is_said(
    module: str, step: str, committed: int, hub: Hub, result: Path
) -> None:
    opened = f"""
from huggingface_hub import HfApi
before = {module}.{step}
def opened(*arguments, **options):
    HfApi().update_repo_settings("me/car", private=False, repo_type="dataset")
    return before(*arguments, **options)
{module}.{step} = opened
"""
    done = hub.run(START + opened + COMMAND.removeprefix(START), "push", result, "me/car")
    assert done.returncode == 2
    assert "exists and is public, but private=True was requested" in " ".join(done.stderr.split())
    assert "--private" in done.stderr and "Traceback" not in done.stderr
    assert ("Pushed to " in done.stderr) == bool(committed) == (hub.repo("me/car").sha in done.stderr)
    assert commits(hub, "me/car") == committed


@pytest.mark.slow
@pytest.mark.parametrize("fault", [{"kind": "drop"}, {"status": 503}, {"status": 403}])
def test_what_was_pushed_and_cannot_be_read_back_is_said_with_its_commit(
    hub: Hub, result: Path, fault: dict[str, Any]
) -> None:
    hub.fault("GET|HEAD", "/large/", times=1, **{**fault, "status": 503})
    done = push(hub, result, "me/passes", "--check")
    assert done.returncode == 0, done.stderr[-2000:]  # what passes is asked again
    hub.fault("GET|HEAD", "/large/", times=1000, **fault)
    done = push(hub, result, "me/car", "--check")
    assert done.returncode == 2, done.stderr[-2000:]
    last = done.stderr.strip().splitlines()[-1]
    where = f"Pushed to {hub.url}/datasets/me/car, commit {hub.repo('me/car').sha}, but it could not be read back ("
    assert where in last and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_split_is_not_taken_from_an_older_copy(hub: Hub, result: Path) -> None:
    shas = []
    code = """
print(reading_back.load_split("me/rows", "default", "train", sys.argv[1]).num_rows)
for sha in sys.argv[2:]:
    try:
        print(reading_back.load_split("me/rows", "default", "train", sha).num_rows)
    except ConnectionError as error:
        print(error)
"""
    for count in (2, 3):
        rows = result.parent / f"{count}.parquet"
        Dataset.from_dict({"a": list(range(count))}).to_parquet(rows)
        shas.append(hub.commit("me/rows", {"data/train-00000-of-00001.parquet": rows.read_bytes()}))
    hub.fault("GET|HEAD", f"/revision/{shas[1]}", times=1000, status=503)
    lines = hub.run(START + code, *shas, check=True).stdout.splitlines()
    assert lines[0] == "2"
    assert "the Hub could not be asked" in lines[1] and shas[1] in lines[1]


@pytest.mark.slow
def test_killed_in_the_middle_the_same_command_resumes(hub: Hub, result: Path) -> None:
    hub.fault("PUT", "/large/", times=1000, kind="delay", seconds=600, skip=3)
    child = start(["-c", COMMAND, "push", str(result), "me/car"], hub.env)
    waiting_for(lambda: hub.count("PUT", "/large/") == 3)
    child.kill()
    child.wait(60)
    assert set(hub.repo("me/car").files()) == {".gitattributes"}
    hub.mend()
    push(hub, result, "me/car", "--check", check=True)
    stored = hub.repo("me/car")
    parts = [name for name in stored.files() if name.endswith((".parquet", ".png"))]
    assert len(parts) > 5 and hub.count("PUT", "/large/") == len(parts)  # three of them before the kill
    assert commits(hub, "me/car") == 1
    assert len(splits_of(hub, "me/car")["scored"]) == 24


@pytest.mark.slow
def test_four_pushes_at_once_all_land(hub: Hub) -> None:
    code = """
import sys
from datasets import Dataset
from car_datasets import push_selection
push_selection(Dataset.from_dict({"split": [sys.argv[1]] * 7}), "me/rows", split=sys.argv[1], check=True)
"""
    names = ["one", "two", "three", "four"]
    hub.fault("POST", "/commit/", times=4, kind="delay", seconds=0.5)  # so that they do meet
    children = [start(["-c", code, name], hub.env) for name in names]
    assert [child.wait(120) for child in children] == [0] * 4
    assert splits_of(hub, "me/rows").keys() == set(names)
    assert 412 in {row["status"] for row in hub.log()}
    assert commits(hub, "me/rows") == 4


@pytest.mark.slow
def test_a_commit_has_at_most_fifty_files_of_data(hub: Hub, result: Path) -> None:
    code = """
pushing.SHARD_BYTES = 1
print(pushing.push_selection(sys.argv[1], "me/car", also=["scored", "random_control", "length_matched_control"], check=True))
"""
    hub.run(START + code, result, check=True)
    data = [name for name in hub.repo("me/car").files() if name.endswith(".parquet")]
    assert len(data) <= 50 and sum("/scored-" in name for name in data) == 12  # a quarter of 50


# --- curate --push


@pytest.mark.slow
def test_curate_asks_before_it_works_and_resumes_after_a_kill(
    hub: Hub, tiny_iqs: str, tiny_embedder: str, tmp_path: Path
) -> None:
    short_rows().to_json(tmp_path / "rows.jsonl")
    models = ["--scorer", tiny_iqs, "--embedder", tiny_embedder, "--n1", "5", "--k", "3"]
    line = ["curate", tmp_path / "rows.jsonl", "--output", tmp_path / "out", *models]
    refused = hub.run(COMMAND, *line, "--push", "you/car")
    assert (
        refused.returncode == 2
        and "may not write to repositories of 'you'" in refused.stderr
        and not (tmp_path / "out").exists()
    )
    assert hub.run(COMMAND, *line, "--check").returncode == 2
    hub.fault("POST", "/commit/", times=1000, status=503)
    failed = hub.run(COMMAND, *line, "--push", "me/car")
    assert failed.returncode == 2 and "run the same command again to resume" in failed.stderr
    before = (tmp_path / "out" / "scored.parquet").stat().st_mtime_ns
    hub.mend()
    done = hub.run(COMMAND, *line, "--push", "me/car", "--check", check=True)
    assert "holds this result already" in done.stdout and hub.repo("me/car").sha in done.stdout
    assert (tmp_path / "out" / "scored.parquet").stat().st_mtime_ns == before
    mistaken = hub.run(COMMAND, *line, "--n2", "2", "--push", "me/other")  # another result is not overwritten
    assert mistaken.returncode == 2 and hub.repo("me/other") is None
    assert Receipt.read(tmp_path / "out").source["name"] == "rows.jsonl"


# --- the splits of a configuration: the same columns in all, and no value is lost or made up


def pool() -> Dataset:
    return Dataset.from_dict(
        {
            "text": [f"t{i}" for i in range(6)],
            "iqs_score": [0.1, 0.9, None, 0.5, 0.7, 0.3],
            "cluster": [0, 0, 1, 1, 2, 2],
            "embedding": [[float(i)] for i in range(6)],
        }
    )


def test_columns_are_shared_and_filled_in() -> None:
    selected = select_car(pool(), 2, 1).remove_columns("embedding")
    selected = selected.add_column("note", [f"n{i}" for i in range(len(selected))])
    found = selection_splits(selected, pool(), ["scored", "random_control", "length_matched_control"])
    assert {tuple(split.column_names) for split in found.values()} == {tuple(selected.column_names)}
    assert len({str(split.features) for split in found.values()}) == 1
    assert found["selected"].to_list() == selected.to_list()
    chosen = {row["source_index"]: row for row in selected}
    for row in found["scored"]:
        wanted = chosen.get(row["source_index"], {"note": None, "selected_by": None, "score_rank": None})
        assert {name: row[name] for name in wanted} == wanted
    assert found["scored"]["text"][:] == pool()["text"][:]
    for name in ("random_control", "length_matched_control"):
        assert len(found[name]) == len(set(found[name]["text"][:])) == len(selected)
        assert None not in found[name]["iqs_score"][:]


def test_embeddings_only_where_they_are_wanted() -> None:
    selected = select_car(pool(), 2, 1)
    assert "embedding" in selection_splits(selected, pool(), ["scored"])["scored"].column_names
    bare = selected.remove_columns("embedding")
    assert "embedding" not in selection_splits(bare, pool(), ["scored"])["scored"].column_names
    kept = selection_splits(bare, pool(), ["scored"], left_out=None)
    assert kept["selected"]["embedding"][:] == selected["embedding"][:]


def test_what_cannot_be_is_refused() -> None:
    selected = select_car(pool(), 2, 1)
    with pytest.raises(ValueError, match="pass scored="):
        selection_splits(selected, None, ["scored"])
    with pytest.raises(ValueError, match="choose out of"):
        selection_splits(selected, pool(), ["everything"])
    for split, also in (("scored", ["scored"]), ("random_control", ["length_matched_control"]), ("scored", [])):
        with pytest.raises(ValueError, match=f"split='{split}' is the name of the pool or of a control"):
            selection_splits(selected, pool(), also, split=split)
    with pytest.raises(ValueError, match=r"also='scored' is one text.*also=\['scored'\]"):
        selection_splits(selected, pool(), "scored")
    other = Dataset.from_dict({**selected.to_dict(), "source_index": [99] * len(selected)})
    with pytest.raises(ValueError, match="not in the pool"):
        selection_splits(other, pool(), ["scored"])
