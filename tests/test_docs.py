"""The documentation: every snippet and command runs, and the reference names all that there is.

`make docs` holds the rest, with every warning as an error: each page is in the navigation, and each link leads somewhere.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import car_datasets
from car_datasets import ColumnNames, Recipe
from car_datasets.cli import app
from car_datasets.loading import chats
from car_datasets.scoring.conversations import NOT_RENDERED
from car_datasets.scoring.judges import endpoint, judge
from tests.conftest import ROOT, on_one_thread
from tests.hub_server import Hub
from tests.pages import blocks, commands, lines_without_numbers, run_page

DOCS = ROOT / "docs"
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}
# Pages whose snippets need several GPUs, a cluster or a server. They are compiled, and their commands parsed.
ELSEWHERE = {
    *("how-to/int8.md", "how-to/judges.md", "how-to/many-gpus.md", "how-to/migrate.md", "how-to/prove.md"),
    *("how-to/ray.md", "how-to/slurm.md"),
}
ON_THE_HUB = "how-to/hub.md"
# An explanation shows commands that take minutes, with the figures that they gave.
RUN = [
    name
    for name, text in PAGES.items()
    if blocks(text) and name not in {*ELSEWHERE, ON_THE_HUB} and not name.startswith("explanation/")
]
FACES = ["loading", "scoring", "clustering", "selection", "reporting", "publishing", "proving", "training"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, sample_rows: list[dict[str, Any]]) -> Path:
    """Make the files that the pages read: rows, a result, and what belongs to single options."""
    folder = tmp_path_factory.mktemp("pages")
    shutil.copytree(ROOT / "configs", folder / "configs")
    english = [row for row in sample_rows if row["task"] != "translation"]
    short = sorted(english, key=lambda row: len(row["instruction"] + row["input"] + row["output"]))
    rows, new = short[:96], short[96:108]  # which are scored in little time
    texts = {
        "alpaca_data.json": rows,
        "new_rows.json": new,
        "examples.json": rows[20:24],
        "gold.json": rows[30:32],
    }
    for name, content in texts.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    turns = [
        [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]
        for row in new
    ]
    lines = {
        "chats.jsonl": [{"messages": a + b} for a, b in zip(turns, turns[1:] + turns[:1], strict=True)],
        "exam.jsonl": [
            {"question": row["instruction"] + " " + row["input"], "answer": row["output"]} for row in rows[:3]
        ],
    }
    for name, content in lines.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    with on_one_thread():
        car_datasets.curate(str(folder / "alpaca_data.json"), folder / "out", n1=60)
    return folder


@pytest.fixture
def folder(prepared: Path, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    copy = shutil.copytree(prepared, tmp_path / "work")
    name = request.node.callspec.params["name"] if hasattr(request.node, "callspec") else ON_THE_HUB
    if re.search(r"--output out ", PAGES[name]):  # the page makes it itself
        shutil.rmtree(copy / "out")
    monkeypatch.chdir(copy)
    return copy


# --- snippets and commands


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN)
def test_a_page_runs_and_prints_what_it_shows(name: str, folder: Path, one_thread: None, no_matplotlib: None) -> None:
    _, printed = run_page(PAGES[name])
    lines = lines_without_numbers(printed)
    for shown in (block for language, block in blocks(PAGES[name]) if language == "text"):
        assert [line for line in lines_without_numbers(shown) if line not in lines] == []


@pytest.mark.slow
def test_the_page_on_the_hub_runs(hub: Hub, folder: Path) -> None:
    code = "import os, sys; os.chdir(sys.argv[1]); sys.modules['matplotlib'] = None  # figures take time\n"
    code += "from tests.pages import run_page; run_page(open(sys.argv[2]).read())"
    hub.run(code, folder, DOCS / ON_THE_HUB, env={"OMP_NUM_THREADS": "1"}, check=True)
    pushed = hub.repo("me/alpaca-car")
    assert pushed is not None and pushed.private and "receipt.json" in pushed.files()


def test_all_other_snippets_compile_and_commands_are_understood() -> None:
    """The commands of all pages, also those in a sentence, are parsed in tests/test_readme.py."""
    parser: Any = get_command(app)
    for name, text in PAGES.items():
        for language, block in blocks(text):
            assert language in ("python", "sh", "text", "yaml", "json", "toml", "diff"), name
            if language == "python":
                compile(block, name, "exec")
            for line in commands(block) if language == "sh" else []:
                assert line.split()[0] in (*parser.commands, "--help"), (name, line)


# --- the reference


def api_names() -> list[str]:
    pages = [text for name, text in PAGES.items() if name.startswith("reference/api/")]
    return re.findall(r"^::: (\S+)$", "\n".join(pages), flags=re.MULTILINE)


def test_every_public_name_has_one_place_in_the_reference() -> None:
    """A public name is a line `::: car_datasets.NAME` in docs/reference/api/, of a folder's face also with the folder."""
    listed = api_names()
    assert len(set(listed)) == len(listed)
    ours = [name.removeprefix("car_datasets.") for name in listed if name.count(".") == 1]
    assert sorted(ours) == sorted(set(car_datasets.__all__) - {"__version__"})
    places = []
    for name in listed:
        module, _, attribute = name.rpartition(".")
        places.append(getattr(importlib.import_module(module), attribute))
    for face in FACES:
        module = importlib.import_module(f"car_datasets.{face}")
        missing = [name for name in module.__all__ if not any(getattr(module, name) is each for each in places)]
        assert missing == [], face


def test_the_table_of_commands_is_complete_and_in_the_order_of_the_help() -> None:
    parser: Any = get_command(app)
    listed = re.findall(r"^\| `car-datasets ([a-z-]+) ", PAGES["reference/cli.md"], flags=re.MULTILINE)
    assert listed == list(parser.commands)


def test_commands_and_settings_are_written_from_the_code() -> None:
    specification = importlib.util.spec_from_file_location("docs_hook", ROOT / ".ci" / "docs.py")
    assert specification is not None and specification.loader is not None
    hook = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(hook)
    parser: Any = get_command(app)
    page = hook.on_page_markdown(PAGES["reference/cli.md"])
    for name, command in parser.commands.items():
        section = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
        flags = [p.opts[0] for p in command.params if p.param_type_name == "option" and not p.hidden]
        assert [flag for flag in flags if f"`{flag}`" not in section] == [], name
    page = hook.on_page_markdown(PAGES["reference/recipe.md"])
    assert [f.name for f in fields(Recipe) if f"| `{f.name}` |" not in page] == []


def test_every_status_and_column_is_explained() -> None:
    statuses = re.findall(
        r'^[A-Z_]+ = "([a-z_]+)"', Path(chats.__file__).read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    statuses += [NOT_RENDERED, judge.INVALID_ANSWER, judge.CUT_OFF, judge.REFUSED]
    statuses += [endpoint.NO_ANSWER, endpoint.REJECTED, endpoint.CAP_REACHED]
    assert len(statuses) > 15
    assert [each for each in statuses if f"`{each}" not in PAGES["reference/statuses.md"]] == []
    names = ColumnNames(language="language")
    columns = [getattr(names, each) for each in dir(names) if not each.startswith("_")]
    columns = [each for each in columns if isinstance(each, str)]
    assert len(columns) > 20
    assert [each for each in columns if f"`{each}`" not in PAGES["reference/columns.md"]] == []
