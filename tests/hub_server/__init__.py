"""A Hub for the tests: real HTTP on this machine, used by unmodified `datasets`, `huggingface_hub` and `transformers`.

The fixture `hub` (conftest.py) is a [`Hub`], a server process that starts empty for each test. The libraries read the
address of the Hub when they are imported, and pytest's own process stays offline, so code that calls the server runs in
child processes:

```python
def test_push(hub):
    done = hub.run("from datasets import Dataset; Dataset.from_dict({'a': [1]}).push_to_hub('me/x', private=True)")
    assert done.returncode == 0, done.stderr
    assert hub.repo("me/x").private and "README.md" in hub.repo("me/x").files()
```

- `hub.run(code, *arguments, token=..., check=False)` runs Python code as `me`, with the root of our repository on its
  path; `sys.argv[1:]` are the arguments. `token` may be `hub.read_token`, `hub.other_token` (of `you`), `None` (logged
  out) or any text. `hub.env` is the environment of this code, for a `subprocess.Popen` or a command line. HF_HOME is
  new for each test.
- `hub.commit("you/x", {"data/train.parquet": b"..."}, private=True)` commits files without any check, as if from
  another machine, and returns the new commit's sha. A repository that does not exist is created.
- `hub.repo("me/x", kind="models")` returns the contents of a repository, or `None`: `.private`, `.branches`, `.sha`,
  `.files(revision)` (path to bytes), `.titles` (of the commits of main, newest first).
- `hub.fault("POST", "/commit/", times=2, status=503)` makes the next requests fail; [`~tests.hub_server.faults.Fault`]
  documents the kinds `"drop"`, `"delay"`, `"lost"` (the request is executed, but not answered) and `"cut"`, `skip=` and
  headers. `hub.mend()` removes all faults.
- `hub.log()` returns all requests so far: method, path, query, status, user, token (`True` if one was sent), size,
  fault. `hub.count("PUT", "/large/")` counts them.

Accounts: `me` owns `team` and can only read `company`; `you` is another user. Large files are written and read at
another origin, at `/large/...`. At its end a test fails if a token is in a repository, in a file below `tmp_path` or in
the output of a child, or if the server raised an error.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from tests.hub_server.faults import Fault
from tests.workers import AT_IMPORT, HUB_PORT, run

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Stored:
    """The contents of a repository at the time of the request."""

    private: bool
    branches: dict[str, str]
    tags: dict[str, str]
    pulls: dict[str, str]
    commits: dict[str, Any]
    large: list[str]

    @property
    def sha(self) -> str:
        """Return the sha of the last commit of main."""
        return self.branches["main"]

    @property
    def titles(self) -> list[str]:
        """Return the titles of the commits of main, newest first."""
        found, sha = [], self.sha
        while sha is not None:
            found.append(self.commits[sha]["title"])
            sha = self.commits[sha]["parent"]
        return found

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Return the content of each file, by path."""
        sha = {**self.branches, **self.tags, **self.pulls}.get(revision, revision)
        return {path: base64.b64decode(text) for path, text in self.commits[sha]["files"].items()}


class Hub:
    """A running server and its control by tests; see the top of this file."""

    token, read_token, other_token = "hf_me_writes", "hf_me_reads", "hf_you_write"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        command = [sys.executable, "-m", "tests.hub_server", str(HUB_PORT)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True)
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip()  # printed once the port is open
        self._printed: list[str] = []

    @property
    def env(self) -> dict[str, str]:
        """Return the environment in which a child process uses this server, as `me`."""
        return {
            **os.environ,
            **AT_IMPORT,
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.token,
            "HF_HOME": str(self.folder),
            "NO_PROXY": "127.0.0.1,localhost",
            "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)])),
        }

    def run(
        self,
        code: str,
        *arguments: object,
        token: str | None = token,
        env: Mapping[str, str] | None = None,
        timeout: float = 120,
        check: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """Run Python code in a child process; with `check`, fail if it fails."""
        environment = {**self.env, "HF_TOKEN": token or "", **(env or {})}
        done = run(["-c", code, *map(str, arguments)], environment, timeout=timeout)
        self._printed += [done.stdout, done.stderr]
        assert not check or done.returncode == 0, done.stderr[-4000:]
        return done

    def commit(
        self,
        name: str,
        files: Mapping[str, bytes],
        kind: str = "datasets",
        private: bool = False,
        branch: str = "main",
    ) -> str:
        """Commit files to a repository without any check, and return the sha."""
        encoded = {path: base64.b64encode(content).decode() for path, content in files.items()}
        found: str = self._ask("commit", kind=kind, name=name, files=encoded, private=private, branch=branch)
        return found

    def repo(self, name: str, kind: str = "datasets") -> Stored | None:
        """Return the present contents of a repository, or None if it does not exist."""
        found = self._ask("repo?" + urlencode({"kind": kind, "name": name}))
        return None if found is None else Stored(**found)

    def fault(self, method: str, path: str, times: int = 1, kind: str = "status", **options: Any) -> None:
        """Make the next requests fail; see [`~tests.hub_server.faults.Fault`]."""
        self._ask("fault", **asdict(Fault(method, path, times, kind, **options)))

    def mend(self) -> None:
        """Remove all faults."""
        self._ask("mend")

    def log(self) -> list[dict[str, Any]]:
        """Return all requests so far, in the order in which they were answered."""
        found: list[dict[str, Any]] = self._ask("log")
        return found

    def count(self, method: str, part: str) -> int:
        """Count the requests so far with this method and `part` in their path."""
        return sum(row["method"] == method and part in row["path"] for row in self.log())

    def kill(self) -> None:
        """Kill the server, whose repositories are lost."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Stop the server, and search repositories, files and output for tokens.

        Raises:
            AssertionError: a token was found, or the server raised an error.
        """
        broken, texts = [], dict(enumerate(self._printed))
        if self._process.poll() is None:
            broken = [row["broken"] for row in self.log() if "broken" in row]
            for kind, name in self._ask("repos"):
                repo = self.repo(name, kind)
                texts |= {f"{name}/{p}": str(c) for sha in repo.commits for p, c in repo.files(sha).items()}
            self._process.stdin.close()  # the server serves until its standard input ends
            self._process.wait(10)
        self._process.stdout.close()
        for path in self.folder.parent.rglob("*"):
            if path.is_file() and not path.is_symlink():
                texts[str(path)] = str(path.read_bytes())
        tokens = (self.token, self.read_token, self.other_token)
        leaks = [str(where) for where, text in texts.items() if any(token in text for token in tokens)]
        assert not broken, broken[0]
        assert not leaks, f"a token is in {leaks}"

    def _ask(self, what: str, **content: Any) -> Any:
        request = urllib.request.Request(f"{self.url}/_control/{what}", json.dumps(content).encode(), method="POST")
        # Without the proxies of the environment, which could not reach this machine's own address.
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as reply:
            return json.load(reply)
