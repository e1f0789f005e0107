"""How commands end: two on one output, places that cannot be written, signals, and a full disk."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from datasets import Dataset, config
from typer.testing import CliRunner

from car_datasets.cli import app
from car_datasets.results import CURATED_FILES
from car_datasets.utils.files import take_claim
from tests.conftest import full_disk
from tests.workers import at_home, start


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_refused(result: Result, message: str) -> None:
    assert result.exit_code == 2, result.output
    assert re.fullmatch(rf"car-datasets: [^\n]*(?:{message})[^\n]*\n", result.stderr), result.stderr


# Each command that writes, on a source that is not there, and what it says of that. `{}` is the place it writes to.
WRITE = {
    "curate": ("curate nope.json -o {}/out", "no such file"),
    "demo": ("demo -o {}/out --budget 100000", "budget=100000"),
    "score": ("score nope.json -o {}/out.parquet", "no such file"),
    "cluster": ("cluster nope.parquet -o {}/out.parquet", "no such file"),
    "cluster model": ("cluster nope.parquet -o other.parquet --save-model {}/model", "no such file"),
    "select": ("select nope.parquet -o {}/out.parquet", "no such file"),
    "prepare": ("prepare nope.json -o {}/out", "nope.json"),
    "convert": ("convert ./none {}/out", "no such folder"),
    "train": ("train train.yaml -o {}/out", "nope.json"),
    "evaluate": ("evaluate car-datasets/iqs-minilm --pairs nope.csv --json {}/out.json", "nope.csv"),
    "curate's shards": ("curate nope.json -o out --shards {}/shards", "no such file"),
    "score's shards": ("score nope.json --shards {}/shards", "no such file"),
}
CLAIMED = {name: case for name, case in WRITE.items() if "shards" not in name}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    Path("train.yaml").write_text("kind: head\ntrain: nope.json\nvalid: nope.json\n")
    return folder


@pytest.mark.parametrize(("line", "otherwise"), CLAIMED.values(), ids=CLAIMED)
def test_a_place_that_another_run_writes_is_refused(line: str, otherwise: str) -> None:
    words = line.format("new").split()
    target = Path(next(word for word in words if word.startswith("new/")))
    # A folder that is filled holds its claim itself, one that appears when it is complete has it next to it.
    inside = words[0] in ("curate", "demo") or "--save-model" in words
    claim = take_claim(target, ("other",), [target / "report.json"] if inside else ())
    assert_refused(run(*words), "is being written by another command, process")
    claim.release()
    assert_refused(run(*words), otherwise)
    assert [path.name for path in Path().iterdir()] == ["train.yaml"]


@pytest.mark.parametrize(("line", "_"), WRITE.values(), ids=WRITE)
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_read(line: str, _: str, read_only: Path) -> None:
    assert_refused(run(*line.format(read_only).split()), "nothing can be written")
    assert [path.name for path in Path().iterdir()] == ["train.yaml"]


@pytest.mark.parametrize("path", ["", " ", "s3://bucket/out", "gs://bucket/out", "az:/out", "hf://datasets/me/x"])
@pytest.mark.parametrize(
    "words",
    [
        ("curate", "nope.json", "--output"),
        ("demo", "-o"),
        ("score", "nope.json", "-o"),
        ("select", "nope.json", "-o"),
        ("cluster", "nope.json", "-o", "out.parquet", "--save-model"),
        ("evaluate", "car-datasets/iqs-minilm", "--pairs", "nope.csv", "--json"),
        ("prepare", "nope.json", "-o"),
        ("convert", "./none"),
    ],
    ids=" ".join,
)
def test_an_output_that_is_no_path_is_refused(words: tuple[str, ...], path: str) -> None:
    result = run(*words, path)
    assert result.exit_code == 2
    assert re.search("is empty; name a path" if not path.strip() else "is an address of the scheme", result.stderr)
    assert [path.name for path in Path().iterdir()] == ["train.yaml"]


@pytest.mark.parametrize("command", ["curate", "score"])
@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ("", "is empty"),
        ("hf://datasets/name", "is not the address of a dataset repository.*you/name"),
        ("hf://datasets/name/", "is not the address of a dataset repository"),
        ("hf://models/me/name", "is not the address of a dataset repository"),
        ("s3:/bucket/run-1", "a URL has two slashes"),
        ("nope://bucket/run-1", "no filesystem is installed for this URL .*nope"),
        ("http://127.0.0.1:1/run-1", "no filesystem is installed|nothing can be written there"),
        ("train.yaml", "nothing can be written there"),
        ("out.parquet", "lies in the output"),
        ("out.parquet/shards", "lies in the output"),
    ],
)
def test_shards_that_cannot_be_kept_are_refused_before_anything_is_read(
    command: str, shards: str, message: str
) -> None:
    assert_refused(run(command, "nope.json", "-o", "out.parquet", "--shards", shards), message)
    assert [path.name for path in Path().iterdir()] == ["train.yaml"]


@pytest.mark.parametrize(
    "line",
    [
        "curate rows -o rows",
        "curate rows -o rows/more/out",
        "curate ROWS -o rows/out",
        "curate rows -o out --shards rows/shards",
        "score rows -o rows/out.parquet",
        "score rows --shards rows/shards",
        "cluster rows -o rows/out.parquet",
        "cluster rows -o out.parquet --save-model rows/model",
        "select rows -o rows/out.json",
    ],
)
def test_nothing_is_written_into_the_folder_that_is_read(line: str) -> None:
    Path("rows").mkdir()
    Path("ROWS").symlink_to("rows")
    Path("rows/rows.json").write_text("[]")
    before = sorted(Path().rglob("*"))
    assert_refused(run(*line.split()), "lies in the source, the folder '(rows|ROWS)'")
    assert sorted(Path().rglob("*")) == before


def test_two_commands_on_one_output_and_the_same_one_after_a_kill(tiny_iqs: str, tiny_embedder: str) -> None:
    rows = [{"instruction": f"Write {i}.", "output": "red " * (1 + i % 5)} for i in range(24)]
    Path("rows.json").write_text(json.dumps(rows))
    line = ["curate", "rows.json", "-o", "out", "--scorer", tiny_iqs, "--embedder", tiny_embedder, "--k", "3"]
    first = start(["-m", "car_datasets", *line, "--n1", "5"], at_home(), Path.cwd())
    deadline = time.monotonic() + 60
    while not Path("out/.writing").exists():
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(first.pid, signal.SIGSTOP)
    assert_refused(run(*line, "--n1", "6"), f"'out' is being written by another command, process {first.pid}")
    assert_refused(run(*line, "--n1", "5"), f"'out' is being written by the same command, process {first.pid}")
    first.kill()
    first.wait(60)
    assert run(*line, "--n1", "5").exit_code == 0
    files = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*") if path.is_file()}
    assert sorted(path.relative_to("out").as_posix() for path in files) == sorted(CURATED_FILES)
    # As after a kill between the result and the end of the command.
    Path("out/.writing").write_text("{}")
    again = run(*line, "--n1", "5")
    assert again.exit_code == 0 and "holds this result already: it is complete" in again.stdout
    assert_refused(run(*line, "--n1", "6"), "already holds a result .*--overwrite")
    assert {path: path.stat().st_mtime_ns for path in Path("out").rglob("*") if path.is_file()} == files
    # A result that was changed is not called complete, and one that another command has begun is not completed.
    Path("out/report.html").write_text("other")
    assert_refused(run(*line, "--n1", "5"), "not as it was written: report.html does not have .*--overwrite")
    assert run(*line, "--n1", "5", "--overwrite").exit_code == 0
    Path("out/report.md").unlink()
    again = run(*line, "--n1", "5")
    assert again.exit_code == 0 and again.stderr.startswith("Warning: out lacks report.md, which was deleted")
    Path("out/.unfinished").write_text("another run")
    Path("out/proof.json").write_text("{}")
    assert_refused(run(*line, "--n1", "5"), "which another command was writing when it was stopped.*--overwrite")
    assert run(*line, "--n1", "6", "--overwrite").exit_code == 0
    assert sorted(path for path in Path("out").rglob("*") if path.is_file()) == sorted(files)
    assert run("verify", "out", "--source", "rows.json").exit_code == 0


# --- signals

WAITING = """
import sys, time
from car_datasets import curation
from car_datasets.__main__ import main
from car_datasets.loading import sources
from car_datasets.publishing import push
from car_datasets.results import Result
from datasets import Dataset, config
def say_and_wait(*_, **__):
    print("waiting", flush=True)
    time.sleep(600)
sources.open_dataset = curation.open_source = say_and_wait
push._result = lambda *_: Result(Dataset.from_dict({"a": [1]}))
push.hub.open_repository = say_and_wait
main()
"""
STOPPED = {
    "curate": ("curate rows.json -o out", "--shards DIR"),
    "curate with shards": ("curate rows.json -o out --shards shards", "Finished shards are kept in shards"),
    "demo": ("demo -o out", "Nothing was written to out"),
    "score": ("score rows.json -o out.parquet", "--shards DIR"),
    "cluster": ("cluster rows.json -o out.parquet --save-model model", "Nothing was written to out.parquet"),
    "select": ("select rows.json -o out.parquet", "Nothing was written to out.parquet"),
    "estimate": ("estimate rows.json", "Nothing was kept"),
    "push": ("push out me/x", "Nothing was kept"),
}
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@pytest.mark.parametrize("sent", SIGNALS, ids=lambda sent: sent.name)
@pytest.mark.parametrize(("line", "kept"), STOPPED.values(), ids=STOPPED)
def test_every_signal_ends_every_command_in_one_line(
    line: str, kept: str, sent: signal.Signals, tmp_path: Path
) -> None:
    home = {"HF_HOME": str(tmp_path / "home")}
    process = start(["-c", WAITING, *line.split()], {**at_home(), **home}, Path.cwd())
    deadline = time.monotonic() + 60
    while "waiting" not in process.printed()[0]:
        assert process.poll() is None and time.monotonic() < deadline, process.printed()
        time.sleep(0.01)
    os.kill(process.pid, sent)
    errors = process.communicate(60)[1]
    assert process.returncode == SIGNALS[sent], errors
    assert re.fullmatch(rf"\ncar-datasets: stopped\. [^\n]*{kept}[^\n]* To (resume|start again)[^\n]*\n", errors)
    assert [path.name for path in Path().iterdir()] == ["train.yaml"]
    assert [path for path in (tmp_path / "home").rglob("temporary/*")] == []


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=lambda sent: sent.name)
def test_a_signal_during_the_imports_is_no_traceback(sent: signal.Signals) -> None:
    code = f"""
import os, sys
class Stop:
    def find_spec(self, name, *_):
        if name == "car_datasets.cli.scorers":
            os.kill(os.getpid(), {int(sent)})
sys.meta_path.insert(0, Stop())
from car_datasets.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code, "demo", "-o", "out"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (SIGNALS[sent], "", "")


# A kill while the file is written, in each command that writes one, and the same command again.
DEADLY = """
import os, signal, sys
from car_datasets.__main__ import main
target, ordinary = sys.argv.pop(), os.fsync
def deadly(handle):
    if f".{target}." in os.readlink(f"/proc/self/fd/{handle}"):
        os.kill(os.getpid(), signal.SIGKILL)
    ordinary(handle)
os.fsync = deadly
main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="finds the file by /proc")
@pytest.mark.parametrize(
    ("line", "target"),
    [
        ("cluster pool.parquet -o out.parquet --k 2 --save-model model", "out.parquet"),
        ("cluster pool.parquet -o out.parquet --k 2 --save-model model", "cluster_model.safetensors"),
        ("select clustered.parquet -o out.parquet --n1 2 --n2 1", "out.parquet"),
        ("select clustered.parquet -o out.json --n1 2 --n2 1", "out.json"),
    ],
)
def test_after_a_kill_the_same_command_leaves_no_hidden_file(line: str, target: str) -> None:
    columns: dict[str, Any] = {
        "instruction": [f"a{i}" for i in range(9)],
        "output": ["b"] * 9,
        "iqs_score": [i / 9 for i in range(9)],
        "embedding": [[float(i), i % 3] for i in range(9)],
    }
    Dataset.from_dict(columns).to_parquet("pool.parquet")
    Dataset.from_dict({**columns, "cluster": [i % 2 for i in range(9)]}).to_parquet("clustered.parquet")
    before = set(Path().iterdir())
    process = start(["-c", DEADLY, *line.split(), target], at_home(), Path.cwd())
    process.wait(60)
    assert process.returncode == -signal.SIGKILL, process.printed()
    assert any(path.name.startswith(f".{target}.") for path in Path().rglob("*"))
    again = run(*line.split(), *(["--overwrite"] if target not in line else []))
    assert again.exit_code == 0, again.output
    found = {path.name for path in Path().rglob("*") if path.is_file()} - {path.name for path in before}
    assert not [name for name in found if name.startswith(".")], found


# --- a full disk


def test_a_full_disk_is_one_line_with_the_file_and_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = {"text": [hashlib.sha256(bytes([i])).hexdigest() for i in range(99)], "iqs_score": [0.5] * 99}
    Dataset.from_dict({**columns, "cluster": [0] * 99}).to_parquet("pool.parquet")
    line = ["select", "pool.parquet", "-o", "out.parquet", "--n1", "50"]
    assert run(*line[:3], "cached.parquet").exit_code == 0  # the rows are in the cache from now on
    before = set(Path().iterdir())
    monkeypatch.setattr(sys, "argv", ["car-datasets", *line])
    with full_disk():
        result = run(*line)
    message = (
        r"out.parquet cannot be written: .* full after [\d,]+ bytes.* MB left.* To start again: car-datasets select"
    )
    assert_refused(result, message)
    assert set(Path().iterdir()) == before
    with full_disk():  # the cache is where the rows are read into
        monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(Path("cache").absolute()))
        assert_refused(run(*line), "MB left.* To start again: car-datasets select")
