"""A trained scorer on its way to the Hub: real HTTP, to a server on this machine that answers as the Hub does."""

import base64
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
PUSH = """
import sys
from pathlib import Path
from car_datasets import hub
hub.open_repository(sys.argv[1], sys.argv[2] == "private", "hf_secret")
hub.push_folder(Path(sys.argv[3]), sys.argv[1], "hf_secret")
"""


class Hub(BaseHTTPRequestHandler):
    """Repositories are `server.repos`: name to {"private", "files"}. Every file travels inside the commit."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        repo = self.server.repos.get("/".join(parts[2:4]))
        if repo is None or parts[0] != "api":
            return self.answer({"error": "not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        siblings = [{"rfilename": name} for name in repo["files"]]
        self.answer({"id": "/".join(parts[2:4]), "sha": COMMIT, "private": repo["private"], "siblings": siblings})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != "Bearer hf_secret" and "validate-yaml" not in self.path:
            return self.answer({"error": "no token"}, 401)
        path = urlsplit(self.path).path
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        name = "/".join(path.split("/")[3:5])
        repo = self.server.repos[name]
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            return self.answer(
                {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for n in names]}
            )
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                repo["files"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        url = f"http://{self.headers['Host']}/{name}/commit/{COMMIT}"
        self.answer({"commitOid": COMMIT, "commitUrl": url, "success": True})

    def create(self, asked: dict[str, str]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        url = f"http://{self.headers['Host']}/{name}"
        if name in self.server.repos:
            return self.answer({"error": "is there", "url": url}, 409)
        if asked["organization"] != "me":
            return self.answer({"error": "You don't have the rights to create a model under this namespace"}, 403)
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.server.repos[name] = {"private": private, "files": {}}
        self.answer({"url": url, "name": name})

    def answer(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    found = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    found.repos = {"me/public": {"private": False, "files": {}}}
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()


def run(server: ThreadingHTTPServer, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-c", PUSH, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_model_folder_is_pushed_whole_and_private(server: ThreadingHTTPServer, tiny_iqs: str, tmp_path: Path) -> None:
    done = run(server, tmp_path, "me/scorer", "private", tiny_iqs)
    assert done.returncode == 0, done.stderr[-3000:]
    repo = server.repos["me/scorer"]
    assert repo["private"] is True
    for file in Path(tiny_iqs).iterdir():
        assert repo["files"][file.name] == file.read_bytes()
    assert b"hf_secret" not in b"".join(repo["files"].values())


@pytest.mark.parametrize(
    ("name", "visibility", "message"),
    [
        ("me/public", "private", "is there and public, but private=True was asked for"),
        ("you/scorer", "private", "cannot be written to"),
    ],
)
def test_nothing_leaves_where_it_was_not_meant_to_go(
    server: ThreadingHTTPServer, tiny_iqs: str, tmp_path: Path, name: str, visibility: str, message: str
) -> None:
    done = run(server, tmp_path, name, visibility, tiny_iqs)
    assert done.returncode == 1
    assert message in done.stderr
    assert all(not repo["files"] for repo in server.repos.values())
