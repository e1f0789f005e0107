"""Run the notebooks and keep their outputs in them: `python -m tests.refresh_notebooks [NAME ...]`.

Without names all notebooks are run, against a Hub on this machine, in some ten minutes on two cores. What is kept is
small and says nothing of this machine: no path, no progress bar, no speed, pictures of few colours.
`tests/test_notebooks.py` runs the notebooks in the same way, and compares the kinds of their outputs with those kept.
"""

from __future__ import annotations

import base64
import contextlib
import io
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

from tests.conftest import ROOT
from tests.hub_server import Hub

FOLDER = ROOT / "notebooks"
UNSTORED = ("install", "timing")  # tags of cells whose output is not kept
KEPT = ("image/png", "text/html", "text/markdown", "text/plain")  # kinds of output that a code host shows
WIDTH, COLOURS = 480, 32  # of stored pictures
HUB = "https://huggingface.co"
WIDGET = r"<[\w.]+ object at 0x[0-9a-f]+>"


def read(name: str) -> Any:
    """Return a notebook as it is stored."""
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=nbformat.NO_CONVERT)


@contextlib.contextmanager
def running(notebook: Any, folder: Path, hub: Hub) -> Iterator[NotebookClient]:
    """Run all cells of a notebook but those that install, on this Python, and yield the client with its kernel.

    Args:
        notebook: whose cells get their outputs.
        folder (`Path`): an empty one, in which it runs.
        hub ([`Hub`]): stands for the public one.
    """
    work = folder / "work"
    work.mkdir()
    own = {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}  # `!torchrun` is ours
    own |= {"IPYTHONDIR": str(folder / "ipython"), "MPLCONFIGDIR": str(folder / "matplotlib")}
    own |= {f"JUPYTER_{name}_DIR": str(folder / name.lower()) for name in ("RUNTIME", "CONFIG", "DATA")}
    own |= {"CUDA_VISIBLE_DEVICES": ""}  # `!torchrun` starts more processes than there may be GPUs, which NCCL refuses
    # None but the kernel of sys.executable.
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    client = NotebookClient(
        notebook, km=manager, timeout=600, record_timing=False, resources={"metadata": {"path": str(work)}}
    )
    with client.setup_kernel(env={**hub.env, **own}):
        for i, cell in enumerate(notebook.cells):
            if "install" not in cell.metadata.get("tags", []):
                client.execute_cell(cell, i)
        yield client


def stored(cell: Any, folder: Path, hub: Hub) -> list[Any]:
    """Return the outputs of a cell as they are kept."""
    if set(cell.metadata.get("tags", ())) & {*UNSTORED}:
        return []
    found: list[Any] = []
    for output in cell.outputs:
        if output.output_type == "stream":
            text = _plain(output.text, folder, hub) if output.name == "stdout" else ""
            if text.strip() and found and found[-1].output_type == "stream":
                found[-1]["text"] += text
            elif text.strip():
                found.append(nbformat.v4.new_output("stream", name="stdout", text=text))
        elif output.output_type != "error":
            data = {kind: output.data[kind] for kind in KEPT if kind in output.data}
            if rich := [kind for kind in ("image/png", "text/markdown") if kind in data]:
                data = {rich[0]: data[rich[0]]}
            data = {k: _small(v) if k == "image/png" else _plain(v, folder, hub) for k, v in data.items()}
            if not any(text.strip() and not re.fullmatch(WIDGET, text.strip()) for text in data.values()):
                continue  # a bar that was taken away, or an object that only a browser shows
            if data:
                more: Mapping[str, Any] = {"execution_count": None} if output.output_type == "execute_result" else {}
                found.append(nbformat.v4.new_output(output.output_type, data=data, **more))
    return found


def kinds(outputs: list[Any]) -> list[str]:
    """Return what stored outputs show: `"text"`, or the richest kind of data."""
    return [
        "text" if output.output_type == "stream" else next(k for k in KEPT if k in output.data) for output in outputs
    ]


def _plain(text: str, folder: Path, hub: Hub) -> str:
    """Return a text without paths of this machine and without what a terminal would have overwritten."""
    lines = [line.rpartition("\r")[2] for line in text.replace("\r\n", "\n").split("\n")]
    # Bars of progress, and the log of a launcher with its times.
    lines = [line for line in lines if not re.search(r"\d+%\||^[IWE]\d{4} \d\d:", line)]
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", "\n".join(lines)).replace(hub.env["HF_ENDPOINT"], HUB)
    for place in (
        folder / "work",
        folder.resolve() / "work",
        ROOT,
        Path(sys.prefix),
        Path(sys.base_prefix),
        Path.home(),
    ):
        text = text.replace(f"{place}{os.sep}", "").replace(str(place), ".")
    return text


def _small(png: str) -> str:
    """Return a picture of fewer pixels and colours, in base64."""
    from PIL import Image

    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    size = (WIDTH, round(picture.height * WIDTH / picture.width))
    file = io.BytesIO()
    picture.resize(size, Image.Resampling.LANCZOS).quantize(COLOURS).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode("ascii")


def refresh(name: str) -> None:
    """Run a notebook, and write it with its outputs."""
    with tempfile.TemporaryDirectory() as made:
        folder, notebook = Path(made), read(name)
        hub = Hub(folder / "hf-home")
        try:
            with running(notebook, folder, hub):
                pass
        finally:
            hub.close()
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = stored(cell, folder, hub), None
    nbformat.write(notebook, FOLDER / f"{name}.ipynb")


if __name__ == "__main__":
    for each in sys.argv[1:] or sorted(path.stem for path in FOLDER.glob("*.ipynb")):
        print(each, flush=True)
        refresh(each)
