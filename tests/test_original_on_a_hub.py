"""A Hub id in the original's layout, from a server on this machine that answers as the Hub does, to real clients."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL = "GyQAQ/Instruction-quality-scoring"
BASE = "someone/tiny-xlmr"

SCORE = """
import json, sys
from car_datasets import IQSModel, QualityScorer
scorer = QualityScorer(sys.argv[1], tokenizer=sys.argv[2])
rows = [json.loads(line) for line in open(sys.argv[3], encoding="utf-8")]
batch = {name: [row[name] for row in rows] for name in ("instruction", "input", "output")}
again = QualityScorer(sys.argv[1], scorer.revision, tokenizer=sys.argv[2])
model = IQSModel.from_pretrained(sys.argv[1], tokenizer=sys.argv[4])
print(json.dumps([scorer.revision, again == scorer, model.config.objective, [float(s) for s in scorer(batch)["iqs_score"]]]))
"""


class Hub(BaseHTTPRequestHandler):
    """Serves `server.repos`, a dict from model id to folder, each at one commit."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.requests.append(f"{self.command} {path}")
        for name, folder in self.server.repos.items():
            files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
            if path in (f"api/models/{name}", f"api/models/{name}/revision/{COMMIT}"):
                return self.send({"id": name, "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]})
            if path == f"api/models/{name}/tree/{COMMIT}":
                return self.send([{"type": "file", "path": f, "oid": "0" * 40, "size": 1} for f in files])
            for revision in (COMMIT, "main"):
                file = path.removeprefix(f"{name}/resolve/{revision}/")
                if file in files:
                    return self.send_file((folder / file).read_bytes())
        self.send(
            {"error": "not found"}, 404, {"X-Error-Code": "EntryNotFound" if "/resolve/" in path else "RepoNotFound"}
        )

    def send(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.answer(json.dumps(content).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def send_file(self, content: bytes) -> None:
        self.answer(content, 200, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT})

    def answer(self, body: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(shared: Path) -> Iterator[ThreadingHTTPServer]:
    oracle = shared / "oracle"
    found = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    found.requests = []
    found.repos = {BASE: oracle / "tiny-xlmr"}
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()


@pytest.mark.shared
def test_hub_id_in_the_originals_layout(server: ThreadingHTTPServer, shared: Path, tmp_path: Path) -> None:
    oracle = shared / "oracle"
    published = tmp_path / "published"
    for name in ("instruction_score", "instruction_comet"):  # what the Hub repository holds
        for file in (oracle / name).rglob("*"):
            if file.is_file():
                copy = published / file.relative_to(oracle)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(file.read_bytes())
    server.repos[MODEL] = published
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
    # The number of heads of so small an encoder is not known: the base model's configuration tells, from id or folder.
    arguments = [MODEL, BASE, str(oracle / "inputs.jsonl"), str(oracle / "tiny-xlmr")]
    command = [sys.executable, "-c", SCORE, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    revision, equal, objective, scores = json.loads(done.stdout.splitlines()[-1])
    assert (revision, equal, objective) == (COMMIT, True, "regression")
    expected = json.loads((oracle / "expected_scores.json").read_text(encoding="utf-8"))["variants"]["iqs"][
        "scores_bs1"
    ]
    assert scores == pytest.approx(expected, abs=5e-5)
