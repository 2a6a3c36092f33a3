"""A stand-in for the Hub's HTTP interface, for the real huggingface_hub client: repositories in memory, commits,
branches, private repositories with a token, and connections that are lost when they are asked to be."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_stand_in"
USER = "user"


@dataclass
class Repo:
    """One model repository: its commits by hash, and the commit that each branch points to."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.commit("main", {}, "initial commit")

    def commit(self, branch: str, changes: dict[str, bytes | None], message: str) -> str:
        files = dict(self.files(branch) or {})
        for path, content in changes.items():
            if content is None:
                files.pop(path, None)
            else:
                files[path] = content
        sha = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        self.messages.append(message)
        return sha

    def sha(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)

    def files(self, revision: str) -> dict[str, bytes] | None:
        return self.commits.get(self.sha(revision) or "")


class Hub:
    """The server, and its repositories by name. Use as a context manager; `endpoint` is what HF_ENDPOINT takes."""

    def __init__(self, port: int = 0) -> None:
        self.repos: dict[str, Repo] = {}
        #: by the name of an action in ROUTES, at how many of its next calls the connection is lost: "before" the
        #: server has done anything, or "after" it is done and only the answer is lost
        self.lost: dict[tuple[str, str], int] = {}
        self.server = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def clear(self) -> None:
        """Forget all repositories."""
        self.repos.clear()
        self.lost.clear()

    def __enter__(self) -> Hub:
        Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    _cut = False

    def log_message(self, *_: Any) -> None:
        """Stay silent."""

    def do_GET(self) -> None:
        self._route("GET")

    def do_HEAD(self) -> None:
        self._route("HEAD")

    def do_POST(self) -> None:
        self._route("POST")

    def _route(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for verb, pattern, action in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and verb == ("GET" if method == "HEAD" else method):
                if self._loses(action, "before"):
                    return
                self._cut = self._loses(action, "after")
                getattr(self, action)(*found.groups(), *([body] if method == "POST" else []))
                return
        self._json({"error": f"no route for {method} {path}"}, 404)

    def _loses(self, action: str, when: str) -> bool:
        left = self.hub.lost.get((action, when), 0)
        if left:
            self.hub.lost[action, when] = left - 1
            self.close_connection = True
        return bool(left)

    def _answer(self, content: bytes, status: int = 200, **headers: str) -> None:
        if self._cut:
            return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: Any, status: int = 200, **headers: str) -> None:
        self._answer(json.dumps(value).encode(), status, Content_Type="application/json", **headers)

    @property
    def _authorised(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _found(self, name: str) -> Repo | None:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self._authorised):
            status = 404 if self._authorised else 401
            self._json({"error": "Repository not found"}, status, X_Error_Code="RepoNotFound")
            return None
        return repo

    def _refused(self) -> bool:
        if not self._authorised:
            self._json({"error": "a token is needed to write"}, 401)
        return not self._authorised

    def lose(self, action: str, when: str, count: str, body: bytes) -> None:
        """No call of the Hub's: how a test that runs in another process asks for lost connections."""
        self.hub.lost[action, when] = int(count)
        self._json({})

    def whoami(self) -> None:
        if not self._refused():
            self._json({"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def validate(self, body: bytes) -> None:
        self._json({"errors": [], "warnings": []})

    def create(self, body: bytes) -> None:
        if self._refused():
            return
        asked = json.loads(body)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        url = f"{self.hub.endpoint}/{name}"
        if name in self.hub.repos:
            self._json({"error": "You already created this model repo", "url": url}, 409)
            return
        self.hub.repos[name] = Repo(private=bool(asked.get("private")) or asked.get("visibility") == "private")
        self._json({"url": url, "name": name, "id": name})

    def branch(self, name: str, branch: str, body: bytes) -> None:
        if not self._refused() and (repo := self._found(name)):
            start = json.loads(body or b"{}").get("startingPoint", "main")
            repo.branches.setdefault(branch, repo.sha(start) or repo.branches["main"])
            self._json({})

    def preupload(self, name: str, revision: str, body: bytes) -> None:
        if not self._refused() and self._found(name):
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                     for f in json.loads(body)["files"]]  # fmt: skip
            self._json({"files": files})

    def commit(self, name: str, revision: str, body: bytes) -> None:
        if self._refused() or not (repo := self._found(name)):
            return
        if repo.sha(revision) is None:
            self._json({"error": "Revision not found"}, 404, X_Error_Code="RevisionNotFound")
            return
        changes: dict[str, bytes | None] = {}
        message = ""
        for line in body.decode().splitlines():
            part = json.loads(line)
            value = part["value"]
            if part["key"] == "header":
                message = value["summary"]
            elif part["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif part["key"] == "deletedFile":
                changes[value["path"]] = None
        sha = repo.commit(revision, changes, message)
        self._json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.endpoint}/{name}/commit/{sha}"})

    def info(self, name: str, revision: str | None = None) -> None:
        if repo := self._found(name):
            sha = repo.sha(revision or "main")
            if sha is None:
                self._json({"error": "Revision not found"}, 404, X_Error_Code="RevisionNotFound")
                return
            siblings = [{"rfilename": path} for path in repo.commits[sha]]
            self._json({"id": name, "modelId": name, "sha": sha, "private": repo.private, "siblings": siblings,
                        "tags": [], "downloads": 0, "likes": 0})  # fmt: skip

    def tree(self, name: str, revision: str) -> None:
        if repo := self._found(name):
            files = repo.files(revision) or {}
            self._json([{"type": "file", "path": p, "size": len(c), "oid": _oid(c)} for p, c in files.items()])

    def resolve(self, name: str, revision: str, path: str) -> None:
        if not (repo := self._found(name)):
            return
        sha = repo.sha(revision)
        if sha is None:
            self._json({"error": "Revision not found"}, 404, X_Error_Code="RevisionNotFound")
        elif path not in repo.commits[sha]:
            self._json({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        else:
            content = repo.commits[sha][path]
            self._answer(content, ETag=f'"{_oid(content)}"', X_Repo_Commit=sha)


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


_NAME, _REVISION = r"([^/]+/[^/]+)", r"([^/]+)"
ROUTES = [
    ("POST", "/lose/(.+)/(.+)/(.+)", "lose"),
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/validate-yaml", "validate"),
    ("POST", "/api/repos/create", "create"),
    ("POST", f"/api/models/{_NAME}/branch/(.+)", "branch"),
    ("POST", f"/api/models/{_NAME}/preupload/{_REVISION}", "preupload"),
    ("POST", f"/api/models/{_NAME}/commit/{_REVISION}", "commit"),
    ("GET", f"/api/models/{_NAME}/tree/{_REVISION}", "tree"),
    ("GET", f"/api/models/{_NAME}/revision/{_REVISION}", "info"),
    ("GET", f"/api/models/{_NAME}", "info"),
    ("GET", f"/{_NAME}/resolve/{_REVISION}/(.+)", "resolve"),
]
