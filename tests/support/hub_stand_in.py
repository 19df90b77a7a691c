"""A Hugging Face hub in a thread: as much of its HTTP interface as uploading and downloading files need.

Repositories are branches of commits, each a whole tree; a file of LFS is its sha256 there, and is fetched by
a redirect, as the hub does. What a request may do is decided by its token.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

OWNER_TOKEN, READER_TOKEN = "hf_owner", "hf_reader"
USER_OF = {OWNER_TOKEN: "user", READER_TOKEN: "reader"}


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        sha = hashlib.sha1(f"{branch} {len(self.commits)} {message}".encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        self.messages.append(message)
        return sha

    def sha(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)


class HubStandIn(ThreadingHTTPServer):
    """`with HubStandIn() as hub:` serves at `hub.url`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.broken: dict[str, int] = {}
        """A status to answer with, by a pattern of the path."""

    def __enter__(self) -> "HubStandIn":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """What a repository holds, LFS or not."""
        repository = self.repositories[repo_id]
        tree = repository.commits[repository.sha(revision) or ""]
        return {path: self.content(blob) for path, blob in tree.items()}

    def content(self, blob: bytes) -> bytes:
        return self.objects[blob[4:].decode()] if blob.startswith(b"lfs:") else blob


class Refusal(Exception):
    def __init__(self, status: int, message: str, code: str = "", **more: str) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.more = status, message, code, more


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    server: HubStandIn
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *_: object) -> None:
        pass

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append(f"{self.command} {path}")
        try:
            for pattern, status in self.server.broken.items():
                if re.search(pattern, path):
                    raise Refusal(status, "The stand-in was told to fail.")
            self.check_token()
            self.route(path, body)
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message, "X-Error-Code": refusal.code}
            self.send(refusal.status, {"error": refusal.message} | refusal.more, headers)

    def send(self, status: int, content: Any = b"", headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # Who asks, and for what

    @property
    def token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def check_token(self) -> None:
        if self.token and self.token not in USER_OF:
            raise Refusal(401, "Invalid credentials in Authorization header")

    def may_write(self, repo_id: str) -> None:
        if not self.token:
            raise Refusal(401, "Invalid username or password.")
        if USER_OF[self.token] != repo_id.split("/")[0]:
            raise Refusal(403, "You don't have the rights to write here")

    def repository(self, repo_id: str) -> Repository:
        found = self.server.repositories.get(repo_id)
        if found is None or (found.private and USER_OF.get(self.token) != repo_id.split("/")[0]):
            raise Refusal(404 if self.token else 401, "Repository not found", "RepoNotFound")
        return found

    def tree(self, repo_id: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repository = self.repository(repo_id)
        sha = repository.sha(revision)
        if sha is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, repository.commits[sha]

    def route(self, path: str, body: bytes) -> None:
        match path.split("/"):
            case ["api", "validate-yaml"]:
                self.send(200, {"errors": [], "warnings": []})
            case ["api", "repos", "create"]:
                self.create(json.loads(body))
            case ["api", "models", user, name]:
                self.info(f"{user}/{name}", "main")
            case ["api", "models", user, name, "revision", *revision]:
                self.info(f"{user}/{name}", "/".join(revision))
            case ["api", "models", user, name, "tree", revision, *_]:
                self.listing(f"{user}/{name}", revision)
            case ["api", "models", user, name, "branch", branch]:
                self.branch(f"{user}/{name}", branch)
            case ["api", "models", user, name, "preupload", _]:
                self.may_write(f"{user}/{name}")
                self.preupload(json.loads(body))
            case ["api", "models", user, name, "commit", branch]:
                self.commit(f"{user}/{name}", branch, [json.loads(line) for line in body.splitlines()])
            case [user, name, "info", "lfs", "objects", "batch"]:
                self.may_write(f"{user}/{name.removesuffix('.git')}")
                self.batch(json.loads(body))
            case ["lfs", oid] if self.command == "PUT":
                if hashlib.sha256(body).hexdigest() != oid:
                    raise Refusal(400, "The content has another hash")
                self.server.objects[oid] = body
                self.send(200)
            case ["lfs", oid]:
                self.send(200, self.server.objects[oid], {"ETag": f'"{oid}"'})
            case [user, name, "resolve", revision, *parts]:
                self.resolve(f"{user}/{name}", revision, "/".join(parts))
            case _:
                raise Refusal(404, f"The stand-in knows no {self.command} {path}")

    # What it does

    def create(self, wanted: dict[str, Any]) -> None:
        repo_id = f"{wanted['organization'] or USER_OF.get(self.token)}/{wanted['name']}"
        self.may_write(repo_id)
        if repo_id in self.server.repositories:
            raise Refusal(409, "You already created this model repo", url=f"{self.server.url}/{repo_id}")
        repository = Repository(wanted.get("visibility") == "private" or bool(wanted.get("private")))
        repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        self.server.repositories[repo_id] = repository
        self.send(200, {"url": f"{self.server.url}/{repo_id}", "name": repo_id, "id": repo_id})

    def info(self, repo_id: str, revision: str) -> None:
        sha, tree = self.tree(repo_id, revision)
        siblings = [{"rfilename": path} for path in tree]
        private = self.repository(repo_id).private
        self.send(
            200, {"id": repo_id, "modelId": repo_id, "sha": sha, "private": private, "siblings": siblings}
        )

    def listing(self, repo_id: str, revision: str) -> None:
        _, tree = self.tree(repo_id, revision)
        self.send(200, [self.entry(path, blob) for path, blob in tree.items()])

    def entry(self, path: str, blob: bytes) -> dict[str, Any]:
        content = self.server.content(blob)
        found = {"type": "file", "path": path, "size": len(content), "oid": git_hash(blob)}
        if blob.startswith(b"lfs:"):
            found["lfs"] = {"oid": blob[4:].decode(), "size": len(content), "pointerSize": 100}
        return found

    def branch(self, repo_id: str, branch: str) -> None:
        self.may_write(repo_id)
        repository = self.repository(repo_id)
        if branch in repository.branches:
            raise Refusal(409, "Reference already exists")
        repository.branches[branch] = repository.branches["main"]
        self.send(200, {})

    def preupload(self, wanted: dict[str, Any]) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in wanted["files"]
        ]
        self.send(200, {"files": files})

    def batch(self, wanted: dict[str, Any]) -> None:
        objects = []
        for item in wanted["objects"]:
            action = {"actions": {"upload": {"href": f"{self.server.url}/lfs/{item['oid']}"}}}
            objects.append(item | ({} if item["oid"] in self.server.objects else action))
        self.send(200, {"transfer": "basic", "objects": objects})

    def commit(self, repo_id: str, branch: str, lines: list[dict[str, Any]]) -> None:
        self.may_write(repo_id)
        sha, tree = self.tree(repo_id, branch)
        header = lines[0]["value"]
        if header.get("parentCommit", sha) != sha:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(tree)
        for line in lines[1:]:
            path = line["value"]["path"]
            if line["key"] == "file":
                files[path] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                if line["value"]["oid"] not in self.server.objects:
                    raise Refusal(400, "The LFS object is missing")
                files[path] = b"lfs:" + line["value"]["oid"].encode()
            elif line["key"] == "deletedFile":
                del files[path]
            else:
                raise Refusal(400, f"The stand-in knows no {line['key']}")
        sha = self.repository(repo_id).commit(branch, files, header["summary"])
        self.send(200, {"commitUrl": f"{self.server.url}/{repo_id}/commit/{sha}", "commitOid": sha})

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        sha, tree = self.tree(repo_id, revision)
        headers = {"X-Repo-Commit": sha}
        if path not in tree:
            self.send(404, b"", headers | {"X-Error-Code": "EntryNotFound", "X-Error-Message": "No entry"})
            return
        blob = tree[path]
        if not blob.startswith(b"lfs:"):
            self.send(200, blob, headers | {"ETag": f'"{git_hash(blob)}"'})
            return
        oid = blob[4:].decode()
        linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(self.server.objects[oid]))}
        elsewhere = self.server.url.replace("127.0.0.1", "localhost")  # another host, as the hub's CDN
        self.send(302, b"", headers | linked | {"Location": f"{elsewhere}/lfs/{oid}"})
