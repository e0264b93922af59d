"""A stand-in of the Hub on loopback: the HTTP requests that `huggingface_hub` makes to create, commit and fetch.

Repositories are dictionaries in memory. `.safetensors` go through LFS, other files into the commit itself, as on the Hub. A
commit has a random SHA. `Hub.corrupted` names files that arrive changed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_stand_in"


@dataclass
class Repository:
    """Commits by SHA (files by name), and the SHA of each branch."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        sha = secrets.token_hex(20)
        self.commits[sha], self.branches[branch] = files, sha
        self.messages.append(message)
        return sha

    def sha_of(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.branches.get(revision)


class Hub:
    """The server. `with Hub() as hub:` runs it; `hub.url` is its address."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.corrupted: dict[tuple[str, str], bytes] = {}  # repository and file: what arrives instead
        self.before_commit = lambda: None  # runs when a commit arrives
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.storage = f"http://localhost:{self._server.server_port}"  # another host, as on the Hub

    def last(self, name: str, branch: str = "main") -> dict[str, bytes]:
        """Files of the last commit of a repository."""
        repository = self.repositories[name]
        return repository.commits[repository.branches[branch]]

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for method, pattern, handle in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method:
                handle(self, *found.groups())
                return
        self.send(404, {"error": f"no route {self.command} {path}"})

    do_HEAD = do_POST = do_PUT = do_GET

    def send(self, status: int, content: object = None, **headers: str):
        data = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    @property
    def may_write(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def found(self, name: str, revision: str | None = None):
        """Repository and SHA, or None after an answer that says what is missing."""
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self.may_write):
            self.send(404 if self.may_write else 401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return None
        sha = repository.sha_of(revision or "main")
        if sha is None:
            self.send(404, {"error": f"Invalid rev id: {revision}"}, X_Error_Code="RevisionNotFound")
            return None
        return repository, sha

    def refused(self) -> bool:
        if not self.may_write:
            self.send(401, {"error": "Invalid username or password."})
        return not self.may_write

    def create(self):
        if self.refused():
            return
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repositories:
            self.send(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
            return
        repository = Repository(asked.get("visibility") == "private" or bool(asked.get("private")))
        repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        self.hub.repositories[name] = repository
        self.send(200, {"url": f"{self.hub.url}/{name}", "name": name})

    def branch(self, name, branch):
        if self.refused() or not (found := self.found(name)):
            return
        repository, sha = found
        status = 409 if branch in repository.branches else 201
        repository.branches.setdefault(branch, sha)
        self.send(status, {"error": "Reference already exists"} if status == 409 else {})

    def info(self, name, revision=None):
        if found := self.found(name, revision):
            repository, sha = found
            files = [{"rfilename": file} for file in repository.commits[sha]]
            self.send(200, {"id": name, "sha": sha, "private": repository.private, "siblings": files, "tags": []})

    def validate(self):
        self.send(200, {})

    def preupload(self, name, revision):
        if self.refused() or not (found := self.found(name, revision)):
            return
        repository, sha = found
        files = []
        for file in json.loads(self.body)["files"]:
            mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
            entry = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            if (data := repository.commits[sha].get(file["path"])) is not None:
                entry["oid"] = oid(data, mode)
            files.append(entry)
        self.send(200, {"files": files})

    def batch(self, _):
        if self.refused():
            return
        objects = json.loads(self.body)["objects"]
        for entry in objects:
            if entry["oid"] not in self.hub.lfs:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"}}
        self.send(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, wanted):
        if hashlib.sha256(self.body).hexdigest() != wanted:
            self.send(400, {"error": "digest"})
            return
        self.hub.lfs[wanted] = self.body
        self.send(200)

    def commit(self, name, branch):
        if self.refused() or not (found := self.found(name, branch)):
            return
        repository, _ = found
        self.hub.before_commit()
        sha = repository.sha_of(branch)
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        if header["value"].get("parentCommit", sha) != sha:
            self.send(412, {"error": "A commit has happened since. Please refresh and try again."})
            return
        files = dict(repository.commits[sha])
        for operation in operations:
            value = operation["value"]
            lfs = operation["key"] == "lfsFile"
            files[value["path"]] = self.hub.lfs[value["oid"]] if lfs else base64.b64decode(value["content"])
        made = repository.commit(branch, files, header["value"]["summary"])
        self.send(200, {"commitOid": made, "commitUrl": f"{self.hub.url}/{name}/commit/{made}", "hookOutput": ""})

    def resolve(self, name, revision, file):
        if not (found := self.found(name, revision)):
            return
        repository, sha = found
        data = repository.commits[sha].get(file)
        if data is None:
            self.send(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
            return
        mode = "lfs" if file.endswith(".safetensors") else "regular"
        etag = oid(data, mode)
        data = self.hub.corrupted.get((name, file), data)
        headers = {"X_Repo_Commit": sha, "ETag": f'"{etag}"'}
        if mode == "lfs":  # as on the Hub, the content lies elsewhere
            stored = oid(data, mode)
            self.hub.lfs[stored] = data
            headers |= {"Location": f"{self.hub.storage}/lfs/{stored}", "X_Linked_ETag": f'"{etag}"'}
            self.send(302, b"", **headers, X_Linked_Size=str(len(data)))
            return
        self.send(200, data, **headers)

    def lfs_get(self, wanted):
        self.send(200, self.hub.lfs[wanted], ETag=f'"{wanted}"')


def oid(data: bytes, mode: str) -> str:
    """Digest of a file as the Hub names it: SHA-256 in LFS, git's SHA-1 of a blob otherwise."""
    if mode == "lfs":
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    (("POST",), "/api/repos/create", Handler.create),
    (("POST",), "/api/validate-yaml", Handler.validate),
    (("POST",), f"/api/models/{NAME}/branch/(.+)", Handler.branch),
    (("POST",), f"/api/models/{NAME}/preupload/(.+)", Handler.preupload),
    (("POST",), f"/api/models/{NAME}/commit/(.+)", Handler.commit),
    (("GET",), f"/api/models/{NAME}/revision/(.+)", Handler.info),
    (("GET",), f"/api/models/{NAME}", Handler.info),
    (("POST",), rf"/{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    (("PUT",), "/lfs/([0-9a-f]{64})", Handler.lfs_put),
    (("GET", "HEAD"), "/lfs/([0-9a-f]{64})", Handler.lfs_get),
    (("GET", "HEAD"), f"/{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
]
