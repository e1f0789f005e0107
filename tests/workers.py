"""Start processes fast: fork them from a server that has imported the heavy libraries and has run nothing.

`WORKERS` is a context of `multiprocessing`; `run` executes `python -c CODE ...` or `python -m MODULE ...` in such a
process. Libraries read parts of the environment when they are imported, and these parts are the same for all children:
the Hub of the tests is always at `HUB_URL`, and the paths below `HF_HOME` are replaced in the child. A command with any
other `HF_*` variable needs a new Python, which `run` then starts.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator, Mapping
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WORKERS = multiprocessing.get_context("forkserver")
WORKERS.set_forkserver_preload(  # imports only: a fork of a process with threads of torch or OpenMP may hang
    [
        "car_datasets.curation",
        "car_datasets.cli.stages",
        "matplotlib.backends.backend_agg",
        "matplotlib.pyplot",
        "openai",
        "sentence_transformers",
        "sklearn.cluster",
        "sklearn.decomposition",
        "sklearn.manifold",
        "transformers.models.bert.modeling_bert",
    ]
)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


HUB_PORT = _free_port()
HUB_URL = f"http://127.0.0.1:{HUB_PORT}"
NO_HOME = os.path.join(os.environ.get("HF_HOME", tempfile.gettempdir()), "replaced-in-every-child")
# Read once, when huggingface_hub and datasets are imported in the server: all children see these values.
AT_IMPORT = {
    "HF_ENDPOINT": HUB_URL,
    "HF_HOME": NO_HOME,
    "HF_HUB_OFFLINE": "0",
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}


@contextlib.contextmanager
def _as_at_import() -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(AT_IMPORT)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def start_server() -> None:
    """Start the server unless it runs, in the environment that all of its children share."""
    with _as_at_import():  # the server keeps the environment of its start
        forkserver.ensure_running()


def _is_warm(environment: Mapping[str, str]) -> bool:
    """Return True if a child of the server would behave like a new Python with this environment."""
    read_at_import = {name for name in environment if name.startswith(("HF_", "TRANSFORMERS_", "DATASETS_"))}
    read_at_import -= {"HF_HOME", "HF_TOKEN"}  # replaced in the child, and read when it is needed
    return all(environment[name] == AT_IMPORT.get(name) for name in read_at_import)


def _move_home(old: str, home: str) -> None:
    """Replace the paths that the libraries derived from `HF_HOME` when they were imported."""
    for module in list(sys.modules.values()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if type(value) is str and value.startswith(old):
                setattr(module, name, home + value[len(old) :])
            elif type(value) is type(Path()) and str(value).startswith(old):
                setattr(module, name, Path(home + str(value)[len(old) :]))


def _child(command: list[str], environment: dict[str, str], no_home: str, cwd: str, out: str, err: str) -> None:
    """Run `python *command` in this child, in place of the server's code."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    # At the level of descriptors, so that output of C++ libraries and of grandchildren is caught too.
    for number, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    _move_home(no_home, environment["HF_HOME"])
    if threads := environment.get("OMP_NUM_THREADS"):
        import torch  # imported in the server, so the variable comes too late for it

        torch.set_num_threads(int(threads))
    sys.path[:] = [cwd, *(path for path in sys.path if path != cwd)]
    try:
        if command[0] == "-m":
            sys.argv = command[1:]
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = ["-c", *command[2:]]
            main = types.ModuleType("__main__")
            sys.modules["__main__"] = main
            exec(compile(command[1], "<string>", "exec"), main.__dict__)
    finally:
        # A child of multiprocessing ends by os._exit, which runs no functions of atexit.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()


class Process(multiprocessing.context.ForkServerProcess):
    """A child of the server; the first child starts the server in the shared environment."""

    def start(self) -> None:
        main = sys.modules["__main__"]
        # Not to run the script of the parent again in the child, which replaces it anyway and may have no guard.
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            start_server()
            super().start()
        finally:
            sys.modules["__main__"] = main


WORKERS.Process = Process  # type: ignore[assignment]


class Running:
    """A process that runs a command, with the interface of a `subprocess.Popen` with text pipes."""

    def __init__(self, command: list[str], environment: Mapping[str, str], cwd: Path | str = ROOT) -> None:
        self.args, self._folder = command, tempfile.TemporaryDirectory()
        self._out, self._err = (os.path.join(self._folder.name, name) for name in ("out", "err"))
        arguments = (command, dict(environment), NO_HOME, str(cwd), self._out, self._err)
        self._process = WORKERS.Process(target=_child, args=arguments)
        self._process.start()

    @property
    def pid(self) -> int:
        return int(self._process.pid or 0)

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self._process.exitcode

    def printed(self) -> tuple[str, str]:
        """Return the text on stdout and on stderr so far."""
        out, err = (Path(p).read_text(encoding="utf-8") if os.path.exists(p) else "" for p in (self._out, self._err))
        return out, err

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        return self.printed()


def start(command: list[str], environment: Mapping[str, str], cwd: Path | str = ROOT) -> Any:
    """Start `python *command`: as a fork where the environment allows it, otherwise as a new Python."""
    if _is_warm(environment):
        return Running(command, environment, cwd)
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *command], env=dict(environment), cwd=cwd, **options)


def at_home() -> dict[str, str]:
    """Return the environment of this process for a child of the server; no Hub answers in it."""
    return {**os.environ, **AT_IMPORT, "HF_HOME": os.environ["HF_HOME"], "PYTHONPATH": str(ROOT)}


def run_ranks(
    count: int, command: list[str], cwd: Path | str = ROOT, timeout: float = 150
) -> list[subprocess.CompletedProcess[str]]:
    """Run `python *command` in as many processes as torchrun would, with the environment that it gives them."""
    port = str(_free_port())
    group = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        start(
            command,
            {**at_home(), **group, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            cwd,
        )
        for rank in range(count)
    ]
    try:
        printed = [process.communicate(timeout) for process in started]
    finally:
        for process in started:
            process.kill()
    return [
        subprocess.CompletedProcess(command, int(process.returncode), *texts)
        for process, texts in zip(started, printed, strict=True)
    ]


def run(
    command: list[str], environment: Mapping[str, str], cwd: Path | str = ROOT, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run `python *command` to its end, as `subprocess.run` does; see [`start`]."""
    process = start(command, environment, cwd)
    try:
        out, err = process.communicate(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(command, int(process.returncode or 0), out, err)
