"""A Hub for the tests: real HTTP on this machine, spoken to by unmodified `datasets`, `huggingface_hub` and `transformers`.

The fixture `hub` (conftest.py) is a [`Hub`]: a server process of its own for each test, empty at first. The libraries read
where the Hub is when they are imported, and pytest's own process stays offline; so what speaks to the server runs in child
processes:

```python
def test_push(hub):
    done = hub.run("from datasets import Dataset; Dataset.from_dict({'a': [1]}).push_to_hub('me/x', private=True)")
    assert done.returncode == 0, done.stderr
    assert hub.repo("me/x").private and "README.md" in hub.repo("me/x").files()
```

- `hub.run(code, *arguments, token=..., check=False)` runs Python code as `me` (`sys.argv[1:]` are the arguments), with the
  repository's root on its path; `token=hub.read_token`, `hub.other_token` (`you`), `None` (logged out), or any text.
  `hub.env` is that environment, for a `subprocess.Popen` or a command line of your own. HF_HOME is new for each test.
- `hub.commit("you/x", {"data/train.parquet": b"..."}, private=True)` puts files there past all checks, as another
  machine might: the new commit's sha. The repository is made if it is not there.
- `hub.repo("me/x", kind="models")` is what a repository holds, or `None`: `.private`, `.branches`, `.sha`, `.files(revision)`
  (path to bytes), `.titles` (commits of main, newest first).
- `hub.fault("POST", "/commit/", times=2, status=503)` makes coming requests fail, see [`~tests.hub_server.faults.Fault`] for
  `kind="drop"`, `"delay"`, `"lost"` (done, but the answer never comes) and `"cut"`, `skip=` and headers; `hub.mend()` ends it.
- `hub.log()` is every request so far: method, path, query, status, user, token (was one sent), size, fault.
  `hub.count("PUT", "/large/")` counts them.

Accounts: `me` owns `team` and only reads `company`; `you` is another. Large files are PUT and read at another origin, at
`/large/...`. At the end of a test the fixture fails it where a token is found in a repository, a file below `tmp_path` or
what a child printed, or where the server itself broke.
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
    """What a repository held when it was asked for."""

    private: bool
    branches: dict[str, str]
    tags: dict[str, str]
    pulls: dict[str, str]
    commits: dict[str, Any]
    large: list[str]

    @property
    def sha(self) -> str:
        """The commit of main."""
        return self.branches["main"]

    @property
    def titles(self) -> list[str]:
        """The titles of the commits of main, newest first."""
        found, sha = [], self.sha
        while sha is not None:
            found.append(self.commits[sha]["title"])
            sha = self.commits[sha]["parent"]
        return found

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Path to content."""
        sha = {**self.branches, **self.tags, **self.pulls}.get(revision, revision)
        return {path: base64.b64decode(text) for path, text in self.commits[sha]["files"].items()}


class Hub:
    """A running server, and how tests speak to it; see the top of this file."""

    token, read_token, other_token = "hf_me_writes", "hf_me_reads", "hf_you_write"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        command = [sys.executable, "-m", "tests.hub_server", str(HUB_PORT)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True)
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip()
        self._printed: list[str] = []

    @property
    def env(self) -> dict[str, str]:
        """The environment in which a child process finds this server, as `me`."""
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
        """Run Python code in a child process; with `check` it must succeed."""
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
        """Put files into a repository from elsewhere: the new commit."""
        encoded = {path: base64.b64encode(content).decode() for path, content in files.items()}
        found: str = self._ask("commit", kind=kind, name=name, files=encoded, private=private, branch=branch)
        return found

    def repo(self, name: str, kind: str = "datasets") -> Stored | None:
        """What a repository holds now."""
        found = self._ask("repo?" + urlencode({"kind": kind, "name": name}))
        return None if found is None else Stored(**found)

    def fault(self, method: str, path: str, times: int = 1, kind: str = "status", **options: Any) -> None:
        """Make coming requests fail, see [`~tests.hub_server.faults.Fault`]."""
        self._ask("fault", **asdict(Fault(method, path, times, kind, **options)))

    def mend(self) -> None:
        """Forget all faults."""
        self._ask("mend")

    def log(self) -> list[dict[str, Any]]:
        """Every request so far, in the order in which they were answered."""
        found: list[dict[str, Any]] = self._ask("log")
        return found

    def count(self, method: str, part: str) -> int:
        """Requests so far with this method and `part` in their path."""
        return sum(row["method"] == method and part in row["path"] for row in self.log())

    def kill(self) -> None:
        """The server is gone, and with it all that it held."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Stop the server, and look for tokens where they should not be.

        Raises:
            AssertionError: one was found, or the server broke.
        """
        broken, texts = [], dict(enumerate(self._printed))
        if self._process.poll() is None:
            broken = [row["broken"] for row in self.log() if "broken" in row]
            for kind, name in self._ask("repos"):
                repo = self.repo(name, kind)
                texts |= {f"{name}/{p}": str(c) for sha in repo.commits for p, c in repo.files(sha).items()}
            self._process.stdin.close()
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
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as reply:
            return json.load(reply)
