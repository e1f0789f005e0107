"""Serve until the standard input ends: `python -m tests.hub_server [PORT]`. The first line on stdout is the address.

To try a command against it by hand, start it in one terminal, from the root of the repository, and set in another:

```sh
export HF_ENDPOINT=http://127.0.0.1:8765  # the address that was printed; here with 8765 as PORT
export HF_TOKEN=hf_me_writes              # the user `me`, who may write to me/NAME; `Hub` has the other tokens
export HF_HUB_DISABLE_XET=1               # this server has no Xet storage: without this, every push ends with 404
export HF_HOME=$(mktemp -d)               # so that nothing gets into your own cache
```

The server forgets everything when it ends.
"""

from __future__ import annotations

import base64
import json
import socket
import sys
import threading
import time
import traceback
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.hub_server.faults import Fault, Faults
from tests.hub_server.messages import Answer, Request
from tests.hub_server.routes import answer
from tests.hub_server.store import File, Repo, Store, is_large

CONTROL = "/_control/"


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.store, self.faults, self.lock = Store(), Faults(), threading.Lock()
        self.log: list[dict[str, Any]] = []
        # Two names of this machine are two origins to a client, as the Hub and its file storage are.
        self.origin, self.large_origin = (f"http://{host}:{self.server_port}" for host in ("127.0.0.1", "localhost"))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def serve(self) -> None:
        body = self._body()
        if self.path.startswith(CONTROL):
            with self.server.lock:
                return self._send(self._control(body))
        url = urlsplit(self.path)
        request = Request(
            self.command,
            url.path,
            url.query,
            {name.lower(): value for name, value in self.headers.items()},
            body,
            self.server.origin,
            self.server.large_origin,
        )
        # The lock is not held while a fault delays the answer, so other requests are served meanwhile.
        with self.server.lock:
            fault = self.server.faults.take(self.command, self.path)
        kind = None if fault is None else fault.kind
        if fault is not None and kind == "delay":
            time.sleep(fault.seconds)
        reply = None
        if fault is not None and kind == "status":
            code = {"X-Error-Code": fault.code} if fault.code else {}
            reply = Answer.of({"error": fault.message}, fault.status, **code, **fault.headers)
        elif kind != "drop":
            reply = self._answer(request)
        entry = {"method": self.command, "path": url.path, "query": url.query, "fault": kind}
        entry["status"] = None if reply is None or kind == "lost" else reply.status
        entry |= {"user": request.user, "token": "authorization" in request.headers, "size": len(body)}
        with self.server.lock:
            self.server.log.append(entry)
        if reply is None or kind == "lost":
            return self._hang_up()
        self._send(reply, cut=kind == "cut")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def _answer(self, request: Request) -> Answer:
        try:
            with self.server.lock:
                return answer(self.server.store, request)
        except Exception:  # otherwise the connection would close, and the client would retry five times
            trace = traceback.format_exc()
            with self.server.lock:
                self.server.log.append({"method": request.method, "path": request.path, "broken": trace})
            return Answer.of({"error": trace}, 500)

    def _send(self, reply: Answer, cut: bool = False) -> None:
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body[: len(reply.body) // 2] if cut else reply.body)
        if cut:
            self._hang_up()

    def _hang_up(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        # http.server does not decode chunked bodies: a size in hexadecimal, CRLF, the bytes, CRLF; size 0 ends them.
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _control(self, body: bytes) -> Answer:
        """Answer a request of the tests themselves, which knows no accounts and faults and is not logged."""
        store, what = self.server.store, urlsplit(self.path).path.removeprefix(CONTROL)
        asked = json.loads(body or b"{}")
        if what == "log":
            return Answer.of(self.server.log)
        if what == "fault":
            self.server.faults.rules.append(Fault(**asked))
        elif what == "mend":
            self.server.faults.rules.clear()
        elif what == "commit":
            return Answer.of(_commit(store, **asked))
        elif what == "repo":
            query = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
            repo = store.repos.get((query["kind"], query["name"]))
            return Answer.of(None if repo is None else _shown(repo))
        elif what == "repos":
            return Answer.of([[repo.kind, repo.id] for repo in store.repos.values()])
        return Answer.of({})

    def log_message(self, *arguments: object) -> None:
        pass


def _commit(store: Store, kind: str, name: str, files: dict[str, str], private: bool, branch: str) -> str:
    """Commit files without any check, creating the repository if it does not exist, and return the sha."""
    owner = name.split("/")[0]
    repo = store.repos.get((kind, name)) or store.create(kind, name, private, owner)
    before = dict(repo.at(branch if branch in repo.branches else "main").files)
    for path, text in files.items():
        content = base64.b64decode(text)
        large = is_large(path, len(content), content[:512])
        before[path] = File(content, large)
        if large:
            repo.large[before[path].sha256] = content
    return repo.commit(branch, before, "put there by a test", owner).sha


def _shown(repo: Repo) -> dict[str, Any]:
    commits = {
        sha: {**asdict(c), "files": {p: base64.b64encode(f.content).decode() for p, f in c.files.items()}}
        for sha, c in repo.commits.items()
    }
    found = {"private": repo.private, "branches": repo.branches, "tags": repo.tags, "pulls": repo.pulls}
    return {**found, "commits": commits, "large": sorted(repo.large)}


def main() -> None:
    server = Server(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    print(server.origin, flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()  # ends when the parent process does, even if that is killed


if __name__ == "__main__":
    main()
