"""The Hub's HTTP API: requests to answers, on a store. Uploads and commits are in uploads.py."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, unquote

from tests.hub_server import uploads
from tests.hub_server.messages import Answer, Request, ranged, refusal
from tests.hub_server.store import ORGS, TOKENS, File, Refused, Repo, Store

API = r"/api/(models|datasets|spaces)/([^/]+/[^/]+)"
FILES = r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)"


def answer(store: Store, request: Request) -> Answer:
    """Return the Hub's answer to a request."""
    try:
        _authenticate(request)
        for method, pattern, route in ROUTES:
            match = re.fullmatch(pattern, request.path)
            if match and request.method in method.split():
                return route(store, request, *(None if part is None else unquote(part) for part in match.groups()))
        raise Refused(404, "Sorry, we can't find the page you are looking for.")
    except Refused as error:
        return refusal(error)


def _authenticate(request: Request) -> None:
    # The URLs of large files are signed: their storage refuses a token, and a client that sends one leaks it.
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if given and re.match("/large/", request.path):
        raise Refused(400, "A token was sent to the origin of the large files.")
    if given and given not in TOKENS:
        raise Refused(401, "Invalid credentials in Authorization header")
    request.user, request.may = TOKENS.get(given, (None, None))


def whoami(store: Store, request: Request) -> Answer:
    if request.user is None:
        raise Refused(401, "Invalid username or password.")
    orgs = [
        {"type": "org", "name": name, "roleInOrg": who[request.user]}
        for name, who in ORGS.items()
        if request.user in who
    ]
    token = {"displayName": "test", "role": request.may}
    auth = {"type": "access_token", "accessToken": token}
    return Answer.of({"type": "user", "id": request.user, "name": request.user, "orgs": orgs, "auth": auth})


def create(store: Store, request: Request) -> Answer:
    asked = request.json
    if request.user is None:
        raise Refused(401, "Invalid username or password.")
    kind, owner = asked.get("type", "model") + "s", asked.get("organization") or request.user
    name = f"{owner}/{asked['name']}"
    url = f"{request.origin}/{'' if kind == 'models' else kind + '/'}{name}"
    store.check_write(owner, request.user, request.may, f"create a {kind[:-1]}")
    if (kind, name) in store.repos:
        raise Refused(409, f"You already created this {kind[:-1]} repo", url=url)
    store.create(kind, name, asked.get("visibility") == "private" or asked.get("private") is True, request.user)
    return Answer.of({"url": url, "name": name})


def delete(store: Store, request: Request) -> Answer:
    asked = request.json
    kind, name = asked.get("type", "model") + "s", f"{asked.get('organization') or request.user}/{asked['name']}"
    store.check_write(store.find(kind, name, request.user).owner, request.user, request.may, "delete")
    del store.repos[kind, name]
    return Answer.of({})


def settings(store: Store, request: Request, kind: str, name: str) -> Answer:
    repo = store.writable(kind, name, request)
    asked = request.json
    repo.private = asked["visibility"] == "private" if "visibility" in asked else asked.get("private", repo.private)
    return Answer.of({"visibility": "private" if repo.private else "public"})


def info(store: Store, request: Request, kind: str, name: str, revision: str = "main") -> Answer:
    repo = store.find(kind, name, request.user)
    commit = repo.at(revision)
    files = [{"rfilename": path} for path in sorted(commit.files)]
    found = {
        "_id": name,
        "id": name,
        "author": repo.owner,
        "sha": commit.sha,
        "lastModified": commit.date,
        "createdAt": commit.date,
    }
    return Answer.of(
        {
            **found,
            "private": repo.private,
            "gated": False,
            "disabled": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": files,
        }
    )


def without_owner(store: Store, request: Request, kind: str, name: str) -> Answer:
    raise Refused(404, "Repository not found", "RepoNotFound")


def listing(store: Store, request: Request, kind: str) -> Answer:
    author = parse_qs(request.query).get("author", [None])[0]
    seen = [repo for repo in store.repos.values() if repo.kind == kind and author in (None, repo.owner)]
    seen = [repo for repo in seen if not repo.private or store.role(repo.owner, request.user)]
    return Answer.of(
        [{"id": repo.id, "sha": repo.at("main").sha, "private": repo.private, "tags": []} for repo in seen]
    )


def tree(store: Store, request: Request, kind: str, name: str, revision: str, folder: str | None = None) -> Answer:
    repo = store.find(kind, name, request.user)
    commit = repo.at(revision)
    start = f"{folder}/" if folder else ""
    inside = {path: file for path, file in sorted(commit.files.items()) if path.startswith(start)}
    if folder and not inside:
        raise Refused(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
    rows: dict[str, Any] = {}
    # The store holds files only, but the Hub lists directories too: they follow from the paths.
    for path, file in inside.items():
        parts = path[len(start) :].split("/")
        for depth in range(1, len(parts)):
            parent = start + "/".join(parts[:depth])
            rows[parent] = {
                "type": "directory",
                "path": parent,
                "oid": hashlib.sha1(parent.encode()).hexdigest(),
                "size": 0,
            }
        rows[path] = _described(repo, path, file, request.asks("expand"))
    if not request.asks("recursive"):
        rows = {path: row for path, row in rows.items() if "/" not in path[len(start) :]}
    return Answer.of(list(rows.values()))


def paths_info(store: Store, request: Request, kind: str, name: str, revision: str) -> Answer:
    repo = store.find(kind, name, request.user)
    files = repo.at(revision).files
    asked = parse_qs(request.body.decode())
    rows = []
    for path in asked.get("paths", []):
        if path in files:
            rows.append(_described(repo, path, files[path], asked.get("expand", [""])[0].lower() == "true"))
        elif any(other.startswith(f"{path}/") for other in files):
            rows.append({"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0})
    return Answer.of(rows)


def _described(repo: Repo, path: str, file: File, expand: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "file", "path": path, "size": len(file.content), "oid": file.oid}
    if file.large:
        found["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": 130}
    if expand:
        commit = repo.commits[file.commit]
        found["lastCommit"] = {"id": commit.sha, "title": commit.title, "date": commit.date}
    return found


def add_branch(store: Store, request: Request, kind: str, name: str, branch: str) -> Answer:
    repo = store.writable(kind, name, request)
    if branch in repo.branches:
        raise Refused(409, f"Reference already exists: {branch}")
    repo.branches[branch] = repo.at(request.json.get("startingPoint") or "main").sha
    return Answer.of({})


def delete_branch(store: Store, request: Request, kind: str, name: str, branch: str) -> Answer:
    if store.writable(kind, name, request).branches.pop(branch, None) is None:
        raise Refused(404, f"Invalid rev id: {branch}", "RevisionNotFound")
    return Answer.of({})


def add_tag(store: Store, request: Request, kind: str, name: str, revision: str) -> Answer:
    repo = store.writable(kind, name, request)
    repo.tags[request.json["tag"]] = repo.at(revision).sha
    return Answer.of({})


def refs(store: Store, request: Request, kind: str, name: str) -> Answer:
    repo = store.find(kind, name, request.user)
    rows = {
        word: [{"name": n, "ref": f"refs/{where}/{n}", "targetCommit": sha} for n, sha in names.items()]
        for word, where, names in (("branches", "heads", repo.branches), ("tags", "tags", repo.tags))
    }
    return Answer.of({**rows, "converts": [], "pullRequests": []})


def history(store: Store, request: Request, kind: str, name: str, revision: str) -> Answer:
    found = store.find(kind, name, request.user).history(revision)
    return Answer.of(
        [
            {"id": c.sha, "authors": [{"user": c.author}], "date": c.date, "title": c.title, "message": c.message}
            for c in found
        ]
    )


def resolve(store: Store, request: Request, kind: str | None, name: str, revision: str, path: str) -> Answer:
    repo = store.find(kind or "models", name, request.user)
    commit = repo.at(revision)
    here = {"X-Repo-Commit": commit.sha}
    if path not in commit.files:
        missing = refusal(Refused(404, "Entry not found", "EntryNotFound"))
        missing.headers.update(here)
        return missing
    file = commit.files[path]
    if not file.large:
        return ranged(request, file.content, {**here, "ETag": f'"{file.etag}"', "Content-Disposition": "inline"})
    at = f"{request.large_origin}/large/{repo.kind}/{repo.id}/{file.sha256}"
    linked = {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.content))}
    return Answer(302, b"", {**here, **linked, "ETag": f'"{file.etag}"', "Location": at})


ROUTES: list[tuple[str, str, Callable[..., Answer]]] = [
    ("GET", "/api/whoami-v2", whoami),
    ("POST", "/api/repos/create", create),
    ("DELETE", "/api/repos/delete", delete),
    ("POST", "/api/validate-yaml", uploads.validate_yaml),
    ("GET", r"/api/(models|datasets|spaces)", listing),
    ("GET", r"/api/(models|datasets|spaces)/([^/]+)", without_owner),
    ("GET", API, info),
    ("GET", API + r"/revision/([^/]+)", info),
    ("GET", API + r"/tree/([^/]+)(?:/(.+))?", tree),
    ("POST", API + r"/paths-info/([^/]+)", paths_info),
    ("POST", API + r"/preupload/([^/]+)", uploads.preupload),
    ("POST", API + r"/commit/([^/]+)", uploads.commit),
    ("POST", API + r"/branch/([^/]+)", add_branch),
    ("DELETE", API + r"/branch/([^/]+)", delete_branch),
    ("POST", API + r"/tag/([^/]+)", add_tag),
    ("GET", API + r"/refs", refs),
    ("GET", API + r"/commits/([^/]+)", history),
    ("PUT", API + r"/settings", settings),
    ("POST", FILES + r"\.git/info/lfs/objects/batch", uploads.lfs_batch),
    ("PUT", r"/large/(\w+)/([^/]+/[^/]+)/(\w+)", uploads.put_large),
    ("GET HEAD", r"/large/(\w+)/([^/]+/[^/]+)/(\w+)", uploads.get_large),
    ("POST", r"/verify/(\w+)/([^/]+/[^/]+)/(\w+)", uploads.verify_large),
    ("GET HEAD", FILES + r"/resolve/([^/]+)/(.+)", resolve),
]
