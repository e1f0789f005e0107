"""The part of the Hub's API that writes: upload modes, large files, commits."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

from tests.hub_server.messages import Answer, Request, ranged
from tests.hub_server.store import Commit, File, Refused, Repo, Store, is_large


def preupload(store: Store, request: Request, kind: str, name: str, revision: str) -> Answer:
    repo = store.find(kind, name, request.user)
    if not request.asks("create_pr"):
        store.writable(kind, name, request)
    present = repo.at(revision).files
    files = []
    for file in request.json["files"]:
        path, oid = file["path"], present[file["path"]].etag if file["path"] in present else None
        mode = "lfs" if is_large(path, file["size"], base64.b64decode(file.get("sample", ""))) else "regular"
        files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return Answer.of({"files": files})


def lfs_batch(store: Store, request: Request, kind: str | None, name: str) -> Answer:
    repo = store.writable(kind or "models", name, request)
    rows = []
    for asked in request.json["objects"]:
        row, path = {"oid": asked["oid"], "size": asked["size"]}, f"{repo.kind}/{repo.id}/{asked['oid']}"
        if asked["oid"] not in repo.large:  # without actions the client skips the upload
            row["actions"] = {
                "upload": {"href": f"{request.large_origin}/large/{path}"},
                "verify": {"href": f"{request.origin}/verify/{path}"},
            }
        rows.append(row)
    return Answer.of({"transfer": "basic", "objects": rows})


def put_large(store: Store, request: Request, kind: str, name: str, oid: str) -> Answer:
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise Refused(400, "The content does not have the digest that was announced.")
    store.repos[kind, name].large[oid] = request.body
    return Answer()


def verify_large(store: Store, request: Request, kind: str, name: str, oid: str) -> Answer:
    content = store.writable(kind, name, request).large.get(oid)
    if content is None or len(content) != request.json["size"]:
        raise Refused(404, "No such object.")
    return Answer.of({})


def get_large(store: Store, request: Request, kind: str, name: str, oid: str) -> Answer:
    return ranged(request, store.repos[kind, name].large[oid], {"ETag": f'"{oid}"'})


def validate_yaml(store: Store, request: Request) -> Answer:
    return Answer.of({"errors": [], "warnings": []})


def commit(store: Store, request: Request, kind: str, name: str, revision: str) -> Answer:
    repo = store.find(kind, name, request.user)
    pull = request.asks("create_pr")
    if not pull:
        store.writable(kind, name, request)
    # The body is ndjson: a header, then one operation per line.
    lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
    header = next(line["value"] for line in lines if line["key"] == "header")
    head = repo.at(revision)
    if header.get("parentCommit") not in (None, head.sha):
        raise Refused(412, "A commit has happened since. Please refresh and try again.")
    if not pull and revision not in {**repo.branches, **repo.pulls}:
        raise Refused(404, f"{revision} is not a branch", "RevisionNotFound")
    files = _changed(repo, head, [line for line in lines if line["key"] != "header"])
    if pull:
        revision = f"refs/pr/{len(repo.pulls) + 1}"
        repo.pulls[revision] = head.sha
    done = repo.commit(revision, files, header["summary"], str(request.user), header.get("description", ""))
    url = f"{request.origin}/{'' if kind == 'models' else kind + '/'}{name}"
    found = {"success": True, "commitOid": done.sha, "commitUrl": f"{url}/commit/{done.sha}"}
    if pull:
        found["pullRequestUrl"] = f"{url}/discussions/{len(repo.pulls)}"
    return Answer.of(found)


def _changed(repo: Repo, head: Commit, operations: list[dict[str, Any]]) -> dict[str, File]:
    """Return the files of `head` after these operations; a bad one raises Refused, and the repository is unchanged."""
    files = dict(head.files)
    for operation in operations:
        key, value = operation["key"], operation["value"]
        path = value["path"]
        if path.startswith("/") or ".." in path.split("/"):
            raise Refused(400, f"{path} is not a path in a repository.")
        if key == "file":
            files[path] = File(base64.b64decode(value["content"]), False)
        elif key == "lfsFile":
            if value["oid"] not in repo.large:
                raise Refused(400, f"The large file of {path} was not uploaded.")
            files[path] = File(repo.large[value["oid"]], True)
        elif key in ("deletedFile", "deletedFolder"):
            gone = [p for p in files if p == path or (key == "deletedFolder" and p.startswith(path.rstrip("/") + "/"))]
            if not gone:
                raise Refused(404, f"{path} does not exist, so it cannot be deleted", "EntryNotFound")
            for p in gone:
                del files[p]
        else:
            raise Refused(400, f"{key} is not an operation.")
    return files
