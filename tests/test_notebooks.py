"""Check the notebooks and their stored outputs, and run them by nbclient in an empty folder, against a Hub here.

Only the cell that installs the package is skipped. Data and models are those of the notebooks, which are small.
`python -m tests.refresh_notebooks` stores the outputs anew.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from datasets import Dataset
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from car_datasets.reporting.plots import PLOTS
from tests.conftest import ROOT
from tests.hub_server import Hub
from tests.refresh_notebooks import FOLDER, UNSTORED, kinds, read, running, stored

NOTEBOOKS = [
    *("01_quickstart", "02_chain_map_and_push", "03_your_own_scorer", "04_many_gpus_and_resume"),
    "05_train_on_it",
]
BADGE = (
    "[![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    "(https://colab.research.google.com/github/car-datasets/car_datasets/blob/main/notebooks/{}.ipynb)"
)
# One variable names the package, which is on no index under our name.
INSTALL = re.compile(
    r'# Or the path of a wheel file, as "car_datasets-[\d.]+-py3-none-any\.whl(?P<extras>(?:\[[\w,-]+\])?)"\.\n'
    r'PACKAGE = "car-datasets(?P=extras) @ git\+https://github\.com/car-datasets/car_datasets"\n'
    r'%pip install -q "\{PACKAGE\}"'
)
MOST_BYTES = 300_000
# Paths of a machine, tokens, speeds, and bars of progress.
OF_A_MACHINE = re.compile(
    r"/(?:tmp|home|root|work|usr|Users)/|site-packages|hf_[A-Za-z0-9]{4}|127\.0\.0\.1|it/s\b|\d+%\||\b[IWE]\d{4} \d\d:"
)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def python_of(notebook: Any) -> Iterator[ast.Module]:
    """Return the code of the cells and of the files that they write, without IPython's own lines."""
    for cell in code_cells(notebook):
        yield ast.parse("\n".join(line for line in cell.source.splitlines() if not line.startswith(("%", "!"))))


# --- as files


def test_these_are_all() -> None:
    assert sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb")) == NOTEBOOKS


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_valid_and_its_outputs_are_small(name: str) -> None:
    notebook = read(name)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"
    assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells)
    names = [cell.id for cell in notebook.cells]  # written by hand, so that a change of one is a change of one line
    assert len(set(names)) == len(names) and all(re.fullmatch(r"[a-z0-9-]+", each) for each in names)
    assert (FOLDER / f"{name}.ipynb").stat().st_size < MOST_BYTES
    for cell in code_cells(notebook):
        assert cell.execution_count is None
        assert not cell.outputs or not set(cell.metadata.get("tags", ())) & {*UNSTORED}
        assert all(output.output_type in ("stream", "display_data", "execute_result") for output in cell.outputs), (
            cell.id
        )
        texts = [
            json.dumps({k: v for k, v in output.get("data", output).items() if k != "image/png"})
            for output in cell.outputs
        ]
        assert [found[0] for text in texts if (found := OF_A_MACHINE.search(text))] == [], cell.id
    shown = [kind for cell in code_cells(notebook) for kind in kinds(cell.outputs)]
    assert len(shown) > 5 and ("image/png" in shown) == (name == "01_quickstart")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_opens_with_its_badge_and_installs(name: str) -> None:
    notebook = read(name)
    first = notebook.cells[0]
    assert first.cell_type == "markdown"
    assert first.source.startswith("# ")
    assert BADGE.format(name) in first.source
    install, *others = code_cells(notebook)
    assert INSTALL.fullmatch(install.source)
    assert install.metadata.tags == ["install"]
    assert all(cell.metadata.get("tags", ["timing"]) == ["timing"] for cell in others)
    assert all("pip install" not in cell.source.split("print(")[0] for cell in others)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_names_and_extras_of_ours_exist(name: str) -> None:
    notebook, found = read(name), 0
    for tree in python_of(notebook):
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "car_datasets":
                module = importlib.import_module(str(node.module))
                assert [each.name for each in node.names if not hasattr(module, each.name)] == []
                found += 1
    assert found
    settings = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    for extras in re.findall(r"car-datasets\[([\w,-]+)\]", "".join(cell.source for cell in notebook.cells)):
        assert all(f"\n{extra} =\n" in settings for extra in extras.split(","))


# --- as they run


class Ran:
    """A notebook that ran to its end, and its kernel, which can evaluate expressions."""

    def __init__(self, client: NotebookClient) -> None:
        self._client = client

    def __call__(self, expression: str) -> Any:
        cell = nbformat.v4.new_code_cell(f"import json\nprint(json.dumps({expression}))")
        self._client.execute_cell(cell, -1)
        return json.loads("".join(output.text for output in cell.outputs if output.get("name") == "stdout"))


@pytest.fixture
def execute(tmp_path: Path, hub: Hub) -> Iterator[Callable[[Any], Ran]]:
    """Run all cells of a notebook except the one that installs; their outputs must be of the kinds that are stored."""
    with contextlib.ExitStack() as kernels:

        def run(notebook: Any) -> Ran:
            before = {cell.id: kinds(cell.outputs) for cell in code_cells(notebook)}
            client = kernels.enter_context(running(notebook, tmp_path, hub))
            after = {cell.id: kinds(stored(cell, tmp_path, hub)) for cell in code_cells(notebook)}
            assert after == before, "run python -m tests.refresh_notebooks"
            return Ran(client)

        yield run


def column(path: Path, name: str) -> list[Any]:
    return Dataset.from_parquet(str(path), cache_dir=str(path.parent / "cache"))[name][:]


@pytest.mark.slow
def test_quickstart(execute: Callable[[Any], Ran], tmp_path: Path, sample_rows: list[dict[str, Any]]) -> None:
    notebook = read("01_quickstart")
    ask = execute(notebook)
    assert ask("__import__('sys').executable") == sys.executable
    assert Path(ask("__import__('car_datasets').__file__")).parent == ROOT / "car_datasets"
    folder = tmp_path / "work" / "curated"
    chosen = column(folder / "selected.parquet", "source_index")
    assert ask("selected['source_index'][:]") == chosen
    assert 40 < len(chosen) < len(sample_rows)
    assert len(column(folder / "scored.parquet", "iqs_score")) == len(sample_rows)
    assert ask("found.matches")
    shown = [output.data for cell in code_cells(notebook) for output in cell.outputs if "data" in output]
    assert sum("image/png" in data for data in shown) == len(list(folder.glob("plots/plot_*.png"))) == len(PLOTS)
    assert any("length-matched control" in data.get("text/markdown", "") for data in shown)


@pytest.mark.slow
def test_chain_map_and_push(execute: Callable[[Any], Ran], hub: Hub) -> None:
    ask = execute(read("02_chain_map_and_push"))
    chats, selection = hub.repo("me/car-notebook-chats"), hub.repo("me/car-notebook-selection")
    assert chats is not None and chats.private
    assert selection is not None and selection.private
    splits = {path.split("/")[1].split("-")[0] for path in selection.files() if path.endswith(".parquet")}
    assert splits == {"selected", "scored"}
    receipt = json.loads(selection.files()["receipt.json"])
    assert receipt["source"] == {"kind": "hub", "id": "me/car-notebook-chats", "revision": chats.sha}
    assert receipt["schema"] == "messages"
    assert ask("found.matches") and ask("[len(train), found.difference]") == [receipt["counts"]["selected"], None]
    assert ask("train['source_index'][:]") == ask("chosen['source_index'][:]")
    assert len(ask("train[0]['messages']")) == 5


@pytest.mark.slow
def test_your_own_scorer(execute: Callable[[Any], Ran], tmp_path: Path) -> None:
    notebook = read("03_your_own_scorer")
    ask = execute(notebook)
    work = tmp_path / "work"
    figures = json.loads((work / "toy-scorer" / "figures.json").read_text(encoding="utf-8"))
    train, valid = ((work / f"{side}.jsonl").read_text(encoding="utf-8").splitlines() for side in ("train", "valid"))
    assert figures["pairs"] == len(valid) == 16
    assert not {json.loads(line)["prompt"] for line in train} & {json.loads(line)["prompt"] for line in valid}
    assert figures["corruptions"]["truncated"]["outranked"]["value"] > 0.6  # it learned what it was shown
    assert 0 < ask("scores.corr(method='spearman').loc['toy_score', 'iqs_score']") < 1
    [table] = [cell for cell in notebook.cells if cell.id == "corruptions"]
    shown = table.outputs[0].data["text/plain"]
    assert all(name in shown for name in ("toy", "embedded", "mismatched", "shuffled_sentences", "echo"))


@pytest.mark.slow
def test_many_gpus_and_resume(execute: Callable[[Any], Ran], hub: Hub, tmp_path: Path) -> None:
    ask = execute(read("04_many_gpus_and_resume"))
    before, after = ask("[before, after]")
    assert 3 <= len(before) < len(after) == 16
    assert before.items() <= after.items()
    assert min(written for name, written in after.items() if name not in before) > max(before.values())
    folder = tmp_path / "work" / "killed"
    assert {name: (folder / name).stat().st_mtime_ns for name in after} == after
    assert ask("[resumed['source_index'][:], len(together), len(mapped)]") == [[*range(0, 384, 6)], 64, 64]
    stored = hub.repo("me/car-notebook-work")
    assert stored is not None and stored.private
    parts = sorted(path for path in stored.files() if path.endswith(".arrow"))
    assert parts == sorted(ask("complete")) and len(parts) == 4
    assert 1 <= len(ask("kept")) < 4
    assert sum("part-" in title for title in stored.titles) == 4  # each was brought once
    assert ask("worker.returncode") == -9


@pytest.mark.slow
def test_train_on_it(execute: Callable[[Any], Ran], tmp_path: Path) -> None:
    pytest.importorskip("trl")
    ask = execute(read("05_train_on_it"))
    chosen = json.loads((tmp_path / "work" / "curated" / "selected.json").read_text(encoding="utf-8"))
    written = [json.loads(line) for line in (tmp_path / "work" / "data" / "train.jsonl").read_text().splitlines()]
    assert [row["completion"][0]["content"] for row in written] == [row["output"] for row in chosen]
    assert len(written) == 40
    for part in ("trained on", "held out"):
        before, after = ask(f"losses.loc[{part!r}].tolist()")
        assert after < before - 0.2


@pytest.mark.slow
def test_a_cell_that_fails_fails_the_test(execute: Callable[[Any], Ran]) -> None:
    notebook = read("01_quickstart")
    [load] = [cell for cell in notebook.cells if cell.id == "load"]
    load.source = load.source.replace("sample_file(), {}", "'no-such-file.json', {}")
    with pytest.raises(CellExecutionError, match=r"no-such-file\.json"):
        execute(notebook)
