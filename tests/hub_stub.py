"""A hub of models on localhost, as far as huggingface_hub asks one: create, upload, commit, list, download."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse


class Hub:
    """What the server holds: commits of repositories, each a dict of files, and large files by their hash."""

    def __init__(self) -> None:
        self.commits: dict[str, list[dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.large: dict[str, bytes] = {}
        self.sent: list[str] = []  # hashes of large files, in the order they came
        self.url = ""
        self.fail_after: int | None = None  # uploads that still work
        self.broken: set[str] = set()  # files whose download fails
        self.meanwhile: Callable[[], None] | None = None  # what somebody else does while a commit is made ready

    def at(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]]:
        commits = self.commits[repo]
        shas = [hashlib.sha1(f"{repo}{number}".encode()).hexdigest() for number in range(len(commits))]
        number = len(commits) - 1 if revision == "main" else shas.index(revision)
        return shas[number], commits[number]


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, content: Any, status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self) -> bytes:
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        data = b""
        while size := int(self.rfile.readline(), 16):  # sent in chunks
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def do_POST(self) -> None:
        path, data = unquote(urlparse(self.path).path), self.body()
        if path == "/api/repos/create":
            asked = json.loads(data)
            repo = f"{asked['organization']}/{asked['name']}"
            there = repo in self.hub.commits
            self.hub.commits.setdefault(repo, [{}])
            self.hub.private.setdefault(repo, asked.get("private", asked.get("visibility") == "private"))
            self.answer({"url": f"{self.hub.url}/{repo}"}, 409 if there else 200)
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            if self.hub.meanwhile:
                self.hub.meanwhile()
            names = [file["path"] for file in json.loads(data)["files"]]
            kinds = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
            self.answer(
                {"files": [{"path": n, "uploadMode": kind, "shouldIgnore": False} for n, kind in kinds.items()]}
            )
        elif path.endswith("/info/lfs/objects/batch"):
            objects = []
            for one in json.loads(data)["objects"]:
                upload = {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}}
                objects.append(one | ({} if one["oid"] in self.hub.large else upload))
            self.answer({"transfer": "basic", "objects": objects})
        elif found := re.fullmatch(r"/api/models/(.+?)/commit/(.+)", path):
            self.commit(found[1], [json.loads(line) for line in data.splitlines() if line.strip()])
        else:
            self.answer({"error": f"not here: {path}"}, 404)

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        files = dict(self.hub.commits[repo][-1])
        for line in lines:
            value = line["value"]
            if value.get("parentCommit") not in (None, self.hub.at(repo, "main")[0]):
                self.answer({"error": "the branch has moved"}, 412)
                return
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.hub.commits[repo].append(files)
        sha, _ = self.hub.at(repo, "main")
        self.answer({"commitUrl": f"{self.hub.url}/{repo}/commit/{sha}", "commitOid": sha, "success": True})

    def do_PUT(self) -> None:
        oid, data = self.path.rpartition("/")[2], self.body()
        if self.hub.fail_after is not None:
            self.hub.fail_after -= 1
            if self.hub.fail_after < 0:
                self.answer({"error": "out of order"}, 403)
                return
        assert hashlib.sha256(data).hexdigest() == oid
        self.hub.large[oid] = data
        self.hub.sent.append(oid)
        self.answer({})

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        resolve = re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path)
        tree = re.fullmatch(r"/api/models/(.+?)/tree/([^/]+)", path)
        about = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path)
        repo = next((found[1] for found in (resolve, tree, about) if found), "")
        if repo not in self.hub.commits:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            return
        revision = (resolve or tree or about)[2] or "main"
        try:
            sha, files = self.hub.at(repo, revision)
        except ValueError:
            self.answer({"error": "Invalid rev id"}, 404, X_Error_Code="RevisionNotFound")
            return
        if resolve and resolve[3] not in files:
            self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        elif resolve and resolve[3] in self.hub.broken and self.command == "GET":
            self.answer({"error": "out of order"}, 403)
        elif resolve:
            data = files[resolve[3]]
            self.answer(data, ETag=f'"{hashlib.sha256(data).hexdigest()}"', X_Repo_Commit=sha)
        elif tree:
            self.answer(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in files.items()
                ]
            )
        else:
            self.answer({"id": repo, "sha": sha, "private": True, "siblings": [{"rfilename": name} for name in files]})

    do_HEAD = do_GET


@contextmanager
def serving() -> Iterator[Hub]:
    """Run the server."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
