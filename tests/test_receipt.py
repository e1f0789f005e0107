"""receipt.py: the fields of a receipt, and what it must not contain."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from car_datasets import QualityScorer, Recipe, __version__, curate
from car_datasets.curation import made_by
from car_datasets.receipt import Receipt, pool_digest
from car_datasets.utils import digests
from car_datasets.utils.column_names import ColumnNames
from car_datasets.utils.digests import indices_digest, rows_digest
from tests.hub_server import Hub
from tests.test_recipe import short_rows


@pytest.fixture(scope="module")
def tiny(tiny_iqs: str, tiny_embedder: str) -> dict[str, Any]:
    return {"scorer": tiny_iqs, "embedder": tiny_embedder, "n1": 5, "k": 3, "duplicates": "keep"}


@pytest.fixture(scope="module")
def run(tiny: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Dataset]:
    """Return source, folder and selected rows of one run."""
    folder = tmp_path_factory.mktemp("run")
    source = folder / "my rows.jsonl"
    short_rows().to_json(source)
    return source, folder / "out", curate(str(source), folder / "out", **tiny).selected


def test_it_says_what_was_used(run: tuple[Path, Path, Dataset], tiny: dict[str, Any]) -> None:
    source, folder, selected = run
    receipt = Receipt.read(folder)
    assert receipt.source == {"kind": "file", "name": "my rows.jsonl", "sha256": digests.file_digest(source)}
    assert (receipt.schema, receipt.template) == ("alpaca", "clean-1")
    scorer = QualityScorer(tiny["scorer"])
    assert receipt.scorer["revision"] == receipt.recipe["scorer_revision"] == scorer.revision
    assert receipt.scorer["weights"] == digests.weights_digest(Path(tiny["scorer"]))
    assert receipt.embedder["model_id"] == Path(tiny["embedder"]).name
    assert receipt.embedder["weights"] == digests.weights_digest(Path(tiny["embedder"]))
    assert {name: receipt.recipe[name] for name in ("seed", "k", "n1", "n2")} == {"seed": 42, "k": 3, "n1": 5, "n2": 1}
    counts = {name: receipt.counts[name] for name in ("rows", "scored", "clusters", "selected")}
    assert counts == {"rows": 24, "scored": 24, "clusters": 3, "selected": len(selected)}
    assert receipt.selected_sha256 == indices_digest(selected["source_index"][:])
    pool = Dataset.from_parquet(str(folder / "scored.parquet"))
    assert receipt.scored_sha256 == pool_digest(pool, ColumnNames())
    assert receipt.versions["car-datasets"] == __version__ and "torch" in receipt.versions
    assert Receipt.from_json(receipt.to_json()) == receipt
    assert Recipe().changed(**receipt.recipe).k == 3


def test_equal_runs_give_equal_receipts_wherever_they_run(
    run: tuple[Path, Path, Dataset], tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, folder, _ = run
    elsewhere = tmp_path / "another place"
    for name in ("scorer", "embedder"):
        shutil.copytree(tiny[name], elsewhere / Path(tiny[name]).name)
    shutil.copy(source, elsewhere)
    monkeypatch.chdir(elsewhere)
    models = {name: str(Path(tiny[name]).name) for name in ("scorer", "embedder")}
    curate(source.name, "out", **{**tiny, **models})
    text = (elsewhere / "out" / "receipt.json").read_bytes()
    assert text == (folder / "receipt.json").read_bytes()
    for word in (str(source.parent), str(elsewhere), os.path.expanduser("~"), tiny["scorer"], "hf_"):
        assert word.encode() not in text


def test_sources_in_memory_and_in_folders_have_digests(tiny: dict[str, Any], tmp_path: Path) -> None:
    curate(short_rows(), tmp_path / "memory", **tiny)
    source = Receipt.read(tmp_path / "memory").source
    assert source == {"kind": "memory", "sha256": rows_digest(short_rows())}
    reordered = short_rows().select_columns(["output", "instruction", "input"])
    assert rows_digest(reordered) == source["sha256"] != rows_digest(short_rows().select(range(23)))
    short_rows().save_to_disk(tmp_path / "saved")
    curate(tmp_path / "saved", tmp_path / "folder", **tiny)
    source = Receipt.read(tmp_path / "folder").source
    assert (source["kind"], source["name"], len(source["sha256"])) == ("folder", "saved", len("sha256:") + 64)


def test_every_file_is_named_without_its_folder(tiny: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    rows = short_rows()
    for name, wanted in {"in/b/x.jsonl": range(12), "in/a/x.jsonl": range(12, 24)}.items():
        (tmp_path / name).parent.mkdir(parents=True)
        rows.select(wanted).to_json(tmp_path / name)
    named = {name: digests.file_digest(tmp_path / "in" / name / "x.jsonl") for name in "ab"}
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper((tmp_path / "in/a/x.jsonl").open("rb")))
    settings, seen = {**tiny, "k": 2}, {}
    for kind, source in {
        "list": [tmp_path / "in/b/x.jsonl", tmp_path / "in/a/x.jsonl"],
        "folder": tmp_path / "in",
        "-": "-",
    }.items():
        curate(source, tmp_path / kind, **settings)
        text = (tmp_path / kind / "receipt.json").read_text()
        assert str(tmp_path) not in text
        seen[kind] = Receipt.from_json(text).source
        if kind != "list":  # the command line has no lists; standard input is gone
            assert made_by(Receipt.from_json(text), str(source), Recipe(**settings)) == (kind == "folder")
    files = {name: {"name": f"{name}/x.jsonl", "sha256": named[name]} for name in "ab"}
    assert seen["list"]["kind"] == "files" and seen["list"]["files"] == [files["b"], files["a"]]
    assert seen["folder"]["files"] == [files["a"], files["b"]]
    assert seen["-"] == {"kind": "file", "name": "-", "sha256": named["a"]}


def test_a_receipt_of_before_is_read_and_recognised(run: tuple[Path, Path, Dataset], tiny: dict[str, Any]) -> None:
    """Read a receipt without the settings that are new, and without the names of several files."""
    source, folder, _ = run
    before = Receipt.read(folder)
    del before.recipe["glob"]
    assert made_by(Receipt.from_json(before.to_json()), str(source), Recipe(**tiny))


def test_the_same_command_is_recognised(run: tuple[Path, Path, Dataset], tiny: dict[str, Any], tmp_path: Path) -> None:
    source, folder, _ = run
    receipt, settings = Receipt.read(folder), Recipe(**tiny)
    assert made_by(receipt, str(source), settings)
    assert not made_by(receipt, str(source), settings.changed(n2=2))
    assert not made_by(receipt, str(source), settings.changed(scorer_revision="sha256:another"))
    assert not made_by(receipt, "you/rows", settings)
    other = tmp_path / source.name
    other.write_text(source.read_text().replace("red", "blue"))
    assert not made_by(receipt, str(other), settings)


def test_another_model_in_a_folder_of_the_same_name_is_another(
    run: tuple[Path, Path, Dataset], tiny: dict[str, Any], make_tiny_iqs: Any, tmp_path: Path
) -> None:
    source, folder, _ = run
    receipt, settings = Receipt.read(folder), Recipe(**tiny)
    for model, trained in (("scorer", make_tiny_iqs(seed=5)), ("embedder", tiny["embedder"])):
        place = tmp_path / Path(tiny[model]).name
        shutil.copytree(trained, place)
        if model == "embedder":
            (place / "notes.json").write_text("{}")
        assert not made_by(receipt, str(source), settings.changed(**{model: str(place)})), model


def test_reading_a_receipt_needs_no_torch() -> None:
    code = "import sys, car_datasets.receipt; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


CURATE = """
from car_datasets.cli import app
app()
"""


@pytest.mark.slow
def test_a_source_on_the_hub_is_pinned_and_known_when_it_moves(hub: Hub, tiny: dict[str, Any], tmp_path: Path) -> None:
    rows = short_rows().to_json(tmp_path / "rows.jsonl") and (tmp_path / "rows.jsonl").read_bytes()
    first = hub.commit("me/rows", {"rows.jsonl": rows})
    options = [f"--{name}={value}" for name, value in tiny.items()]
    line = ["curate", "me/rows", "--output", tmp_path / "out", *options, "--push", "me/car"]
    hub.run(CURATE, *line, check=True)
    receipt = Receipt.read(tmp_path / "out")
    assert receipt.recipe["revision"] == receipt.source["revision"] == first
    assert f"revision: {first}" in hub.repo("me/car").files()["README.md"].decode()
    assert "holds this result already" in hub.run(CURATE, *line, check=True).stdout
    hub.commit("me/rows", {"rows.jsonl": rows.replace(b"red", b"blue")})
    moved = hub.run(CURATE, *line)
    assert moved.returncode == 2 and "holds" in moved.stderr
    hub.run(CURATE, *line, "--revision", first, check=True)  # what was asked for is what is there


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "not a receipt"),
        ("3", "not a receipt: it holds a int"),
        ('{"format": 99}', r"has the keys \['format'\]; missing are \['columns'"),
    ],
)
def test_what_is_no_receipt_is_said_to_be_none(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Receipt.from_json(text)
    with pytest.raises(ValueError, match=r"has no receipt\.json"):
        Receipt.read(tmp_path)


def test_digest_of_indices_is_of_their_order_and_kind() -> None:
    digests_seen = [indices_digest(x) for x in ([1, 2], [2, 1], ["1", "2"], [12])]
    assert len(set(digests_seen)) == 4


def test_digest_of_a_pool_is_of_its_order_scores_and_clusters() -> None:
    pools: list[dict[str, list[Any]]] = [
        {"i": [1, 2], "s": [0.5, 1.5], "c": [0, 1]},
        {"i": [2, 1], "s": [0.5, 1.5], "c": [0, 1]},
        {"i": [1, 2], "s": [1.5, 0.5], "c": [0, 1]},
        {"i": [1, 2], "s": [0.5, 1.5], "c": [1, 0]},
        {"i": [1, 2], "s": [0.5, None], "c": [0, 1]},
        {"i": [1, 2], "s": [0.5, float("nan")], "c": [0, 1]},
        {"i": [1, 2], "s": [0.5, 1.5], "c": [0, None]},
    ]
    names = ColumnNames(score="s", cluster="c", index="i")
    seen = {pool_digest(Dataset.from_dict(pool), names) for pool in pools}
    assert len(seen) == len(pools)
