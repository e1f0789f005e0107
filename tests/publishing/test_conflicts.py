"""conflicts.py: what a push would hide or break is refused; real loads from a Hub say what that is."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import pytest
from datasets import Dataset, Features, Value

from car_datasets.publishing import card
from car_datasets.publishing.card import END, SplitFiles, Target
from car_datasets.publishing.conflicts import ExistingSelection, refuse_hidden_data, refuse_unloadable
from car_datasets.publishing.push import Case, Push, plan_push
from car_datasets.receipt import Receipt
from car_datasets.results import Result
from car_datasets.utils.hub import Repository
from tests.hub_server import Hub


def parquet() -> bytes:
    buffer = io.BytesIO()
    Dataset.from_dict({"text": ["a", "b"]}).to_parquet(buffer)
    return buffer.getvalue()


def header(**config: Any) -> bytes:
    configs = [{"config_name": config.pop("name", "default"), **config}]
    return f"---\nconfigs: {json.dumps(configs)}\n---\n".encode()


LINES = b'{"text": "a"}\n{"text": "b"}\n'
TRAIN = [{"split": "train", "path": "train.jsonl"}]
PUSH = """
import json, sys
import datasets; datasets.config.USE_PARQUET_EXPORT = False
from datasets import Dataset, load_dataset
from car_datasets import push_selection
rows = Dataset.from_dict({"text": ["x"]})
for repo, config in json.loads(sys.argv[1]):
    try:
        push_selection(rows, repo, config_name=config, check=True)
    except ValueError as error:
        print(json.dumps(str(error)))
    else:
        names = datasets.get_dataset_config_names(repo)
        print(json.dumps({n: {s: len(d) for s, d in load_dataset(repo, n).items()} for n in names}))
"""
REPOSITORIES: dict[str, dict[str, bytes]] = {
    "lines": {"README.md": header(data_files=TRAIN), "train.jsonl": LINES},
    "other": {"README.md": header(name="other", data_files=TRAIN), "train.jsonl": LINES},
    "folder": {"README.md": header(data_dir="d"), "d/train.jsonl": LINES},
    "gz": {"train.jsonl.gz": b"1"},
    "text": {"train.txt": b"a\nb\n"},
    "untold": {
        "README.md": header(data_files=[{"split": "train", "path": "train.parquet"}]),
        "train.parquet": parquet(),
    },
    "default": {
        "README.md": header(name="other", default=True, data_files=[{"split": "train", "path": "o/t-*"}]),
        "o/t-0.parquet": parquet(),
    },
}
SEEN = {
    "lines": "'default' of 'train.jsonl', and `datasets` reads all files of a repository in one format",
    "other": "'other' of 'train.jsonl', and `datasets` reads all files of a repository in one format",
    "folder": "'default' with data_dir='d'",
    "gz": "'train.jsonl.gz', in splits that its card does not name",
    "text": "'train.txt', in splits that its card does not name",
    "untold": "names files of the split 'train' in the configuration 'default', and not its rows",
    "default": "`default: true` at the configuration 'other'",
}


@pytest.mark.slow
def test_a_push_leaves_only_what_loads(hub: Hub) -> None:
    for name, files in REPOSITORIES.items():
        hub.commit(f"me/{name}", files, private=True)
    cases = [[f"me/{name}", "default"] for name in REPOSITORIES] + [["me/lines", "ours"], ["me/folder", "ours"]]
    cases += [["me/default", "car"], ["me/untold", "car"]]
    found = [json.loads(line) for line in hub.run(PUSH, json.dumps(cases), check=True).stdout.splitlines()]
    for name, message in zip(REPOSITORIES, found, strict=False):
        assert SEEN[name] in message
        assert len(hub.repo(f"me/{name}").titles) == (3 if name in ("default", "untold") else 2)
    assert SEEN["lines"] in found[-4] and SEEN["folder"] in found[-3]
    ours = {"car": {"selected": 1}}  # by the way out that was named
    assert found[-2:] == [{**ours, "other": {"train": 2}}, {**ours, "default": {"train": 2}}]


def a_receipt() -> Receipt:
    model = {"model_id": "me/iqs", "revision": "a" * 40, "weights": "sha256:0"}
    counts = {"rows": 2, "scored": 2, "clusters": 1, "selected": 1, "rejected": {}, "marked": {}, "selected_by": {}}
    source = {"kind": "memory", "sha256": "c"}
    return Receipt(source, "alpaca", "clean-1", model, model, {"n1": 1}, counts, "0", {"torch": "2"})


def test_which_selection_a_repository_holds() -> None:
    first, model = a_receipt(), a_receipt().scorer
    existing = ExistingSelection.read(first.to_json().encode(), None)
    assert existing.is_of(first) and existing.has_scores_of(replace(first, versions={"torch": "3"}))
    for other in (replace(first, source={"kind": "memory", "sha256": "d"}), replace(first, selected_sha256="1"), None):
        assert not existing.is_of(other) and not existing.has_scores_of(other)
    again = replace(first, scorer={**model, "revision": "b" * 40})  # the same rows, by other scores
    assert existing.is_of(again) and not existing.has_scores_of(again)
    assert not ExistingSelection.read(b'{"shop": 1}', None).is_of(first)


@pytest.mark.parametrize(
    "name",
    [
        "a.csv",
        "data/x.parquet",
        "a.JSON",
        "x.ndjson",
        "train.txt",
        "my-train.txt",
        "test/1.png",
        "data/a.txt",
        "a.csv.zst",
    ],
)
def test_data_are_known_by_their_names(name: str) -> None:
    with pytest.raises(ValueError, match=r"holds 1 data file\(s\)"):
        refuse_hidden_data([name], (), "me/x")
    refuse_hidden_data([name], [name], "me/x")


@pytest.mark.parametrize("name", ["notes.txt", "plots/test.png", "logo.png", "train.py", "README.md", "receipt.json"])
def test_notes_and_pictures_are_no_data(name: str) -> None:
    refuse_hidden_data([name], (), "me/x")


@pytest.mark.parametrize(
    "data_files",
    [
        "t.csv",
        ["t.*"],
        ["a/**/t.csv"],
        [{"split": "x", "path": ["a.parquet", "t.csv"]}],
        "**/t.csv",
        "https://x.org/t.csv",
    ],
)
def test_every_form_of_a_header_is_read(data_files: Any) -> None:
    for name, splits in (("default", ["selected"]), ("b", ["x"])):
        with pytest.raises(ValueError, match=rf"'{name}' of '.*t\.csv'"):
            refuse_unloadable({name: {"data_files": data_files}}, "default", splits, ["t.csv", "a/b/t.csv"], "me/x")


def test_what_goes_together_is_let_through() -> None:
    ours = {"data_files": [{"split": "selected", "path": "s.csv"}, {"split": "train", "path": "data/train-*"}]}
    other = {"data_files": "b/*", "default": True}
    files = ["s.csv", "data/train-00000-of-00001.parquet", "b/x.parquet", "b/notes.txt"]
    refuse_unloadable({"car": ours, "b": other, "default": other}, "car", ["selected"], files, "me/x")
    with pytest.raises(ValueError, match="'b' with no `data_files`"):
        refuse_unloadable({"car": ours, "b": {}}, "car", ["selected"], files, "me/x")


POOL = "data/scored-00000-of-00001.parquet"
HELD = ("README.md", "data/selected-00000-of-00001.parquet", POOL, "receipt.json", "plots/old.png")
SECTION = f"<!-- car_datasets: begin config=default split=selected -->\nold\n{END}\n"
OTHER = replace(a_receipt(), selected_sha256="1")
RESCORED = replace(a_receipt(), scorer={**a_receipt().scorer, "revision": "b" * 40})
PLANS: dict[str, tuple[Receipt | None, str, tuple[str, ...], Receipt | None, Case]] = {
    # name: the receipt and the split that are pushed, the files and the receipt that are there, the case
    "an empty repository": (a_receipt(), "selected", (), None, Case.FIRST),
    "rows alone, nothing described": (None, "selected", (), None, Case.FIRST),
    "the same again": (a_receipt(), "selected", HELD, a_receipt(), Case.SAME),
    "the same under another name": (a_receipt(), "top", HELD, a_receipt(), Case.SAME),
    "the same rows by other scores": (RESCORED, "selected", HELD, a_receipt(), Case.RESCORED),
    "other scores under another name": (RESCORED, "top", HELD, a_receipt(), Case.SAME),
    "other rows in its split": (OTHER, "selected", HELD, a_receipt(), Case.REPLACES),
    "rows alone in its split": (None, "selected", HELD, a_receipt(), Case.REPLACES),
    "rows alone in another split": (None, "top", HELD, a_receipt(), Case.ALONGSIDE),
    "rows alone, a report without receipt": (None, "top", ("report.json",), None, Case.ALONGSIDE),
    "a selection in another split": (OTHER, "top", HELD, a_receipt(), Case.REFUSED),
}


@pytest.mark.parametrize("name", PLANS)
def test_what_a_push_does_to_the_selection_that_is_there(name: str) -> None:
    receipt, split, held, there, case = PLANS[name]
    rows = Dataset.from_dict({"text": ["a"]})
    files = {split: SplitFiles([f"data/{split}-00000-of-00001.parquet"], 1, 8, 9)}
    header = ""
    if POOL in held:
        first = Push(
            Target("me/x", "default", "selected"),
            rows.features,
            {"selected": SplitFiles([HELD[1]], 1, 8, 9), "scored": SplitFiles([POOL], 2, 16, 18)},
            Result(rows, receipt=there),
            None,
        )
        header = plan_push(first, Repository("0" * 40, (), ""), None).card
    elif held:
        header = SECTION
    repository = Repository("0" * 40, held, header)
    push = Push(
        Target("me/x", "default", split),
        Features({"text": Value("string")}),
        files,
        Result(rows, receipt=receipt),
        None,
    )
    existing = None if there is None else ExistingSelection.read(there.to_json().encode(), card.place_of(header))
    assert push.case_in(repository, existing) is case
    if case is Case.REFUSED:
        with pytest.raises(ValueError, match="Push to another repository"):
            plan_push(push, repository, existing)
        return
    plan = plan_push(push, repository, existing)
    assert plan.case is case
    assert set(plan.files) == ({"receipt.json"} if receipt is not None else set())
    assert (POOL in plan.deletions) is (case in (Case.RESCORED, Case.REPLACES))
    assert ("plots/old.png" in plan.deletions) is (held == HELD and case is not Case.ALONGSIDE)
    assert ("receipt.json" in plan.deletions) is (case is Case.REPLACES and receipt is None)
    described = card.place_of(plan.card)
    assert described == (("default", "selected") if case is Case.ALONGSIDE else ("default", split))
