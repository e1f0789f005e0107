"""Check `prove` on a result: its record, its files, resuming after a kill, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("trl")

from car_datasets import prove, verify
from car_datasets.cli import app
from car_datasets.utils.files import claimed

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS: dict[str, Any] = {"seeds": 2, "tokens": 60, "trained": 1}


@pytest.fixture
def folder(result: Path, tmp_path: Path) -> Path:
    """Return a copy of a result, as a proof is written into it."""
    return Path(shutil.copytree(result, tmp_path / "out"))


@pytest.fixture(autouse=True)
def one_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("car_datasets.proving.proof.RATES", (1e-3,))


@pytest.fixture
def evaluation(tmp_path: Path) -> str:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps([{"instruction": f"what follows {i} ?", "output": "one two"} for i in range(4)]))
    return str(path)


def test_the_command_writes_and_prints_a_proof_once(
    folder: Path, result: Path, tiny_llama: str, evaluation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["prove", str(folder), "--model", tiny_llama, "--eval", evaluation, "--seeds", "2"]
    done = CliRunner().invoke(app, [*words, "--trained", "1"])
    assert done.exit_code == 0, done.output
    assert all(re.search(rf"^{arm}\b", done.stdout, flags=re.MULTILINE) for arm in ("selection", "random", "control"))
    proof = json.loads((folder / "proof.json").read_text())
    assert proof["seeds"] == [0, 1] and proof["model"]["template"] == "plain"
    assert set(proof["probes"]) == {"mine", "shipped"}
    assert proof["training"]["trained"] == 1 and proof["training"]["learning_rate"] == 1e-3
    runs = {(run["arm"], run["seed"]): run for run in proof["runs"]}
    assert len(runs) == 2 * len(proof["tables"]["tokens"]["arms"])
    # The control has the rows of the selection in the same order, with shuffled answers.
    assert runs["control", 0]["rows"] == runs["selection", 0]["rows"]
    assert runs["control", 0]["order"] != runs["selection", 0]["order"]
    assert (folder / "proof.md").is_file()
    assert json.loads((folder / "receipt.json").read_text())["proof"]["seeds"] == 2
    # The same command finds its proof, without a model.
    monkeypatch.setattr("car_datasets.proving.proof.load_base_model", None)
    again = CliRunner().invoke(app, [*words, "--trained", "1"])
    assert again.exit_code == 0, again.output
    assert again.stdout == done.stdout
    verified = verify(folder, source=result.with_name("rows.json"))
    assert verified.matches and not any("not in the receipt" in each for each in verified.skipped)
    (folder / "proof.json").write_text("{}")
    assert verify(folder, source=result.with_name("rows.json")).differences == (
        "proof.json does not have the receipt's sha256",
    )


@pytest.mark.parametrize(("finished", "kept"), [(0, "No run was finished yet"), (1, "Finished runs are kept in")])
def test_a_stopped_command_says_what_is_kept(
    folder: Path, tiny_llama: str, finished: int, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: Any) -> None:
        runs = arguments[-1]
        runs.mkdir()
        for number in range(finished):
            (runs / f"run-{number}.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr("car_datasets.proving.proof.carry_out", stop)
    words = ["prove", str(folder), "--model", tiny_llama, "--seeds", "2", "--tokens", "60"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 130
    assert f"car-datasets: stopped. {kept}" in done.stderr and "To resume" in done.stderr
    assert not (folder / ".writing").exists()


def test_a_folder_that_another_process_writes_is_refused(folder: Path) -> None:
    with claimed(folder, (), [folder / "proof.json"]), pytest.raises(ValueError, match="is being written by another"):
        prove(folder, **SETTINGS)


@pytest.mark.slow
def test_both_tables_and_answers_are_made_if_asked_for(folder: Path, tiny_llama: str) -> None:
    proof = prove(folder, model=tiny_llama, equal_rows=True, answers=True, seeds=2, trained="all")
    assert list(proof["tables"]) == ["tokens", "rows"]
    for table in proof["tables"].values():
        assert table["instructions"] is not None
    rows = proof["tables"]["rows"]
    assert {arm["rows"] for arm in rows["arms"].values()} == {rows["budget"]}


@pytest.mark.slow
def test_a_killed_run_resumes_with_what_is_missing(folder: Path, tiny_llama: str, tmp_path: Path) -> None:
    work = tmp_path / "work"
    code = f"from car_datasets import prove; prove({str(folder)!r}, model={tiny_llama!r}, work_dir={str(work)!r}"
    code = f"import torch; torch.set_num_threads(1); {code}, seeds=2, trained=1)"
    started = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(work.glob("run-*.json"))) < 6:
        assert started.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    started.send_signal(signal.SIGKILL)
    started.wait()
    kept = {path: path.read_bytes() for path in work.glob("run-*.json")}
    assert not (folder / "proof.json").exists()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(path.read_bytes() == content for path, content in kept.items())
    resumed = json.loads((folder / "proof.json").read_text())
    # The same seeds give the same numbers in one go.
    shutil.rmtree(work)
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    entire = json.loads((folder / "proof.json").read_text())
    assert entire["tables"] == resumed["tables"]
    assert [run["order"] for run in entire["runs"]] == [run["order"] for run in resumed["runs"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": 1}, "seeds=1: pass at least 2"),
        ({"tokens": 0}, "tokens=0: pass a number of answer tokens above 0"),
        ({"tokens": 10**6}, r"tokens=1000000, but the arm '.*' has .* answer tokens"),
        ({"trained": "some"}, "trained='some': pass 'all', 'lora' or a number"),
        ({"trained": 9}, "trained=9: the model has 3 layers"),
        ({"evaluation": "one.json"}, r"pass a list: evaluation=\['one.json'\]"),
        ({"evaluation": ["nowhere.json"]}, "nowhere.json"),
        ({"arms": {"other": "nowhere"}}, "nowhere"),
        ({"arms": {"longest": "nowhere"}}, "arms has the name 'longest'"),
        ({"work_dir": __file__}, "work_dir=.*: nothing can be written there"),
        ({"model": "./nowhere"}, "no such folder"),
    ],
    ids=str,
)
def test_a_bad_call_is_refused(folder: Path, tiny_llama: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prove(folder, **{"model": tiny_llama, **SETTINGS, **arguments})
    assert not (folder / "proof.json").exists()


def test_arms_are_named_on_the_command_line(tmp_path: Path) -> None:
    for words, message in ((["--arm", "other"], "write NAME=DIR"), (["--arm", "a=b", "--arm", "a=c"], "name each arm")):
        done = CliRunner().invoke(app, ["prove", str(tmp_path), *words])
        assert done.exit_code == 2
        assert message in done.stderr
