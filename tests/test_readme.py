"""Every Python snippet and every car-datasets command of the README runs, in order, in a folder with an alpaca file."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from car_datasets.cli import app
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, sample_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(sample_file, tmp_path / "alpaca_data.json")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_python_snippets_run(folder: Path) -> None:
    snippets = blocks("python")
    assert len(snippets) >= 3
    names: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)
    assert len(names["chosen"]) > 0
    assert (folder / "out" / "selected.json").is_file()


@pytest.mark.slow
def test_commands_run(folder: Path) -> None:
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("car-datasets ")]
    assert len(lines) >= 6
    for line in lines:
        done = CliRunner().invoke(app, shlex.split(line)[1:])
        assert done.exit_code == 0, (line, done.output)


def test_the_two_commands_stand_first_and_exist() -> None:
    first = blocks("sh")[0]
    targets = re.findall(r"^make ([a-z-]+)", first, flags=re.MULTILINE)
    assert targets == ["demo", "test"]
    for target in (*targets, "lint", "test-all", "certify", "default-scorer"):
        command = ["make", "--dry-run", target]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ, check=False)
        assert done.returncode == 0, done.stderr


def test_linked_files_exist() -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link
