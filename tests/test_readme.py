"""README: short, its links lead to files that exist, and its snippets and commands run next to an alpaca file.

CONTRIBUTING: the map names every module, and the diffs apply to the code.
"""

import importlib
import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from car_datasets.cli import app
from car_datasets.training.head import HeadTraining
from car_datasets.training.parts import PartsTraining
from car_datasets.training.train import ScorerTraining
from car_datasets.utils.settings import read_kind
from tests.conftest import ROOT
from tests.hub_server import Hub

README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
# The path in an address of a file or a picture of this repository.
OURS = r"https://(?:github\.com|raw\.githubusercontent\.com)/car-datasets/car_datasets/(?:(?:blob|tree)/)?main/([^#]+)"


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, sample_rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "alpaca_data.json").write_text(json.dumps(sample_rows[:160]), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_python_snippets_run(folder: Path, one_thread: None) -> None:
    snippets = blocks("python")
    assert len(snippets) >= 2
    names: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)
    assert len(names["chosen"]) > 0
    assert (folder / "out" / "selected.json").is_file()


@pytest.mark.slow
def test_commands_run(folder: Path, one_thread: None) -> None:
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("car-datasets ")]
    assert len(lines) >= 4
    for line in lines:
        done = CliRunner().invoke(app, shlex.split(line, comments=True)[1:])
        assert done.exit_code == 0, (line, done.output)


@pytest.mark.slow
def test_the_line_from_hub_to_hub_runs(hub: Hub, tmp_path: Path, sample_rows: list[dict[str, Any]]) -> None:
    (line,) = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("car-datasets ")]
    command, source, *options = shlex.split(line)[1:]
    hub.commit(source, {"data.json": json.dumps(sample_rows[:60]).encode()})
    code = "import os, sys; os.chdir(sys.argv.pop(1)); from car_datasets.__main__ import main; main()"
    hub.run(code, tmp_path, command, source, *options, check=True)
    pushed = hub.repo(options[-1])
    assert pushed.private and "receipt.json" in pushed.files()


def shown_commands() -> list[tuple[str, str]]:
    """Return the commands with arguments of all pages, comments and messages, with the file that shows each."""
    folders = [ROOT / name for name in ("configs", "docs", "hub_cards", "notebooks", "car_datasets")]
    paths = [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(path for folder in folders for path in folder.rglob("*.*")),
    ]
    found = []
    for path in paths:
        if path.suffix in (".md", ".yaml", ".jinja", ".ipynb", ".py"):
            lines = re.findall(
                r"`car-datasets ([^`\n]+)`|^(?:#\s+|\$ )?car-datasets (.+)$|Example: car-datasets (.+)\"",
                path.read_text(encoding="utf-8"),
                flags=re.MULTILINE,
            )
            texts = [text for forms in lines for text in next(filter(None, forms)).split(" && car-datasets ")]
            found += [(path.name, text) for text in texts]
    # Left out: names of commands alone, and lines that a program fills in.
    return [(name, line) for name, line in found if " " in line and not re.search(r"[{$]|\.\.\.|--help", line)]


def test_every_command_that_a_page_shows_is_understood() -> None:
    """Parse every command: it and its options exist, values have the right types, and nothing is missing."""
    parser: Any = get_command(app)
    commands = shown_commands()
    assert len(commands) > 40
    for page, line in commands:
        try:
            name, *words = shlex.split(line, comments=True)
            parser.commands[name].make_context(name, words)
        except Exception as error:
            pytest.fail(f"{page}: car-datasets {line}: {error!r}")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("train_*.yaml")), ids=lambda path: path.name)
def test_the_settings_that_a_comment_shows_are_accepted(path: Path) -> None:
    kinds: dict[str, Any] = {"head": HeadTraining, "parts": PartsTraining}
    kind = kinds.get(read_kind(path, ("iqs", "ranking", *kinds)), ScorerTraining)
    given = re.findall(r"--set (\w+=[\w./-]+)", path.read_text(encoding="utf-8").replace("key=value", ""))
    changed = kind.from_yaml(path, given=given)
    assert {f"{name}={getattr(changed, name)}" for name in (each.partition("=")[0] for each in given)} == set(given)


def test_the_two_commands_come_first_and_exist() -> None:
    first = blocks("sh")[0]
    targets = re.findall(r"^make ([a-z-]+)", first, flags=re.MULTILINE)
    assert targets == ["demo", "test"]
    for target in (*targets, "lint", "test-all", "certify", "default-scorer"):
        command = ["make", "--dry-run", target]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ, check=False)
        assert done.returncode == 0, done.stderr


def test_readme_takes_three_minutes() -> None:
    assert len(README.splitlines()) < 200


def test_linked_files_exist() -> None:
    """README is also the page on the package index, where only absolute links lead anywhere."""
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert [link for link in links if not link.startswith("https://")] == []
    files = [found[1] for link in links if (found := re.match(OURS, link))]
    assert len(files) > 20 and "docs/images/strip.png" in files
    for file in files:
        assert (ROOT / file).exists(), file
    assert (ROOT / "docs" / "images" / "strip.png").stat().st_size < 400_000


def test_every_import_path_exists() -> None:
    pages = [README, *(path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md"))]
    for name in re.findall(r"`(?:from )?(car_datasets(?:\.\w+)+)", "\n".join(pages)):
        module, _, attribute = name.rpartition(".")
        found = importlib.import_module(module)
        assert hasattr(found, attribute) or importlib.import_module(name), name


def test_the_map_names_every_module() -> None:
    folder, listed = "", []
    for first in re.findall(r"^\| (\S+) \|", CONTRIBUTING, flags=re.MULTILINE):
        if first.startswith("**"):
            folder = "" if first == "**root**" else first.strip("*`")
        elif first.endswith(".py`"):
            listed.append(folder + first.strip("`"))
    package = ROOT / "car_datasets"
    modules = {str(path.relative_to(package)) for path in package.rglob("*.py") if path.name != "__init__.py"}
    assert sorted(listed) == sorted(modules)


def test_the_diffs_change_lines_that_are_there() -> None:
    checked = 0
    for diff in blocks("diff", CONTRIBUTING):
        lines: list[str] = []
        for line in diff.splitlines():
            if line.startswith(" # "):
                lines = (ROOT / re.split(r"[:,]", line[3:])[0]).read_text(encoding="utf-8").splitlines()
            elif not line.startswith("+"):
                assert line[1:] in lines, line
                checked += 1
    assert checked > 5


def test_the_tests_that_add_one_from_outside_exist() -> None:
    texts = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", CONTRIBUTING):
        assert f"def {name}(" in texts, name
