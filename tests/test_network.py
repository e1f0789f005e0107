"""SECURITY.md: commands on local files ask no other machine for anything, without any setting that forbids it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# Every look-up and connection of the process, also of the threads of libraries, and whoever swallows the error.
CODE = """
import json, os, socket, sys
seen = []
def hook(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.connect", "socket.sendto"):
        address = arguments[1] if event in ("socket.connect", "socket.sendto") else arguments[:2]
        if isinstance(address, tuple):
            seen.append([event, str(address[0])])
            raise socket.gaierror("no network in this test")
sys.addaudithook(hook)
from car_datasets.cli import app
found = {}
for command in json.loads(sys.argv[1]):
    seen.clear()
    try:
        app(command)
    except SystemExit as stop:
        found[" ".join(command)] = [stop.code, list(seen)]
json.dump(found, open(sys.argv[2], "w"))
"""


@pytest.mark.slow
def test_commands_on_local_files_ask_nobody(tmp_path: Path, sample_file: Path, tiny_embedder: str) -> None:
    # The name of a folder that could be the id of a model on the Hub.
    shutil.copytree(tiny_embedder, tmp_path / "models" / "mine")
    rows = json.loads(sample_file.read_text(encoding="utf-8"))[:30]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    commands = {
        "demo": ["demo", "-o", "demo"],
        "curate": ["curate", "rows.json", "-o", "out", "--n1", "5", "--shards", "shards"],
        "curate, own embedder": ["curate", "rows.json", "-o", "own", "--n1", "5", "--embedder", "models/mine"],
        "verify": ["verify", "out", "--source", "rows.json"],
        "score": ["score", "rows.json", "-o", "scored.parquet"],
        "select": ["select", "out/scored.parquet", "-o", "selected.parquet", "--n1", "5"],
        "cluster": ["cluster", "own/scored.parquet", "-o", "clustered.parquet", "--cluster-column", "group"],
        "a dataset on the Hub": ["curate", "you/rows", "-o", "none"],
    }
    free = ("HF_HUB_OFFLINE", "HF_UPDATE_DOWNLOAD_COUNTS", "HF_HUB_DISABLE_TELEMETRY", "PYTHONPATH")
    environment = {name: value for name, value in os.environ.items() if name not in free}
    environment |= {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(Path(__file__).parents[1])}
    place = tmp_path / "found.json"
    call = [sys.executable, "-c", CODE, json.dumps(list(commands.values())), str(place)]
    done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = dict(zip(commands, json.loads(place.read_text()).values(), strict=True))
    code, seen = found.pop("a dataset on the Hub")
    assert code == 2 and {host for _, host in seen} == {"huggingface.co"}  # what is asked is seen by this test
    assert {name: seen for name, (_, seen) in found.items() if seen} == {}
    assert {name: code for name, (code, _) in found.items() if code not in (0, None)} == {}, done.stderr[-2000:]
