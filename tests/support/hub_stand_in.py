"""A stand-in for the Hugging Face hub's HTTP interface, as far as huggingface_hub uses it to push and to fetch.

The requests are those of huggingface_hub/hf_api.py, _commit_api.py and lfs.py; large files go by Git LFS
(https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md), Xet is switched off.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml

TOKEN = "hf_" + "standin" * 5
USER = "cat"
PIECE = 1 << 20
LARGE = (".safetensors", ".gguf")  # kept by Git LFS


class Refused(Exception):
    """An answer other than 200; `code` is what the hub calls it."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Repository:
    """Its files by path, each a blob's sha256; `commits` holds the paths that each commit changed."""

    def __init__(self, private: bool) -> None:
        self.private = private
        self.files: dict[str, str] = {}
        self.commits: list[list[str]] = []

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr(self.commits).encode()).hexdigest()


class HubStandIn:
    """What the hub holds, what it was sent, and what is to go wrong.

    `trouble` has {words in a request's path: (status, message), or None to cut the connection}; `once` takes it back
    after the first time. `received` names the requests that carried something, with the number of bytes.
    """

    def __init__(self, folder: Path) -> None:
        self.blobs = folder / "blobs"
        self.blobs.mkdir(parents=True)
        self.repositories: dict[str, Repository] = {}
        self.received: list[tuple[str, int]] = []
        self.bodies: list[bytes] = []
        self.trouble: dict[str, tuple[int, str] | None] = {}
        self.given: list[tuple[str, int, int]] = []  # of each file that was fetched: blob, first byte, size
        self.damage: dict[str, bytes] = {}  # {blob: what is given in its place}
        self.cut: dict[str, int] = {}  # {blob: at which byte the connection is cut, once}
        self.without_ranges = False  # a mirror that answers a part of a file with all of it
        self.once = False
        self.overruled = False  # an organisation that makes every repository public
        self.url = ""

    def sent(self, words: str) -> int:
        """Bytes received in requests whose path holds `words`."""
        return sum(count for path, count in self.received if words in path)

    def content(self, repo_id: str, path: str) -> bytes:
        return (self.blobs / self.repositories[repo_id].files[path]).read_bytes()

    def holds(self, words: bytes) -> list[str]:
        """Where `words` stand in anything that was received."""
        return [path.name for path in self.blobs.iterdir() if words in path.read_bytes()] + \
            [body[:60].decode("utf-8", "replace") for body in self.bodies if words in body]

    def repository(self, repo_id: str) -> Repository:
        if repo_id not in self.repositories:
            raise Refused(404, "Repository not found", "RepoNotFound")
        return self.repositories[repo_id]

    def keep(self, data: bytes) -> str:
        oid = hashlib.sha256(data).hexdigest()
        (self.blobs / oid).write_bytes(data)
        return oid

    def whoami(self, _: Any) -> dict[str, Any]:
        return {"type": "user", "name": USER, "auth": {"accessToken": {"role": "write"}}}

    def create(self, body: dict[str, Any]) -> dict[str, Any]:
        repo_id = f"{body['organization'] or USER}/{body['name']}"
        if repo_id in self.repositories:
            raise Refused(409, "You already created this model repo")
        self.repositories[repo_id] = Repository(body["visibility"] == "private" and not self.overruled)
        return {"url": f"{self.url}/{repo_id}"}

    def validate(self, body: dict[str, Any]) -> dict[str, Any]:
        header = re.match(r"---\n(.*?)\n---\n", body["content"], re.DOTALL)
        try:
            fields = yaml.safe_load(header[1]) if header else {}
        except yaml.YAMLError as error:
            raise Refused(400, str(error)) from None
        if not isinstance(fields, dict) or "/" not in fields.get("base_model", "a/b"):
            raise Refused(400, "base_model must be a hub id")
        return {"errors": [], "warnings": []}

    def hold(self, repo_id: str, folder: Path) -> None:
        """Hold a copy of a folder's files."""
        self.repositories[repo_id] = Repository(private=False)
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            self.repositories[repo_id].files[path.relative_to(folder).as_posix()] = self.keep(path.read_bytes())

    def search(self, _: Any) -> list[dict[str, Any]]:
        return [{"id": repo_id, "modelId": repo_id} for repo_id in self.repositories]

    def info(self, _: Any, repo_id: str, revision: str = "main") -> dict[str, Any]:
        found = self.repository(repo_id)
        if revision not in ("main", found.sha):
            raise Refused(404, f"Revision not found: {revision}", "RevisionNotFound")
        return {"id": repo_id, "modelId": repo_id, "sha": found.sha, "private": found.private, "tags": [],
                "siblings": [{"rfilename": path} for path in found.files]}

    def tree(self, _: Any, repo_id: str, revision: str) -> list[dict[str, Any]]:
        """A large file has Git LFS's hash of it, the others git's own name of the blob."""
        self.info(None, repo_id, revision)
        return [{"type": "file", "path": path, "size": (self.blobs / oid).stat().st_size, "oid": self.blob(oid),
                 **({"lfs": {"oid": oid, "size": (self.blobs / oid).stat().st_size, "pointerSize": 134}}
                    if path.endswith(LARGE) else {})}
                for path, oid in self.repository(repo_id).files.items()]

    def blob(self, oid: str) -> str:
        data = (self.blobs / oid).read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def preupload(self, body: dict[str, Any], repo_id: str) -> dict[str, Any]:
        known = self.repository(repo_id).files
        answer = []
        for file in body["files"]:
            path = file["path"]
            large = file["size"] > 10 * PIECE or path.endswith(LARGE)
            oid = known.get(path)
            if oid and not large:
                oid = self.blob(oid)
            mode = "lfs" if large else "regular"
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answer}

    def batch(self, body: dict[str, Any], repo_id: str) -> dict[str, Any]:
        self.repository(repo_id)
        objects = []
        for wanted in body["objects"]:
            if not (self.blobs / wanted["oid"]).exists():
                wanted["actions"] = {"upload": {"href": f"{self.url}/object/{wanted['oid']}?signature=secret"},
                                     "verify": {"href": f"{self.url}/lfs-verify"}}
            objects.append(wanted)
        return {"transfer": "basic", "objects": objects}

    def verify(self, body: dict[str, Any]) -> dict[str, Any]:
        path = self.blobs / body["oid"]
        if not path.exists() or path.stat().st_size != body["size"]:
            raise Refused(422, "the object has not arrived whole")
        return {}

    def commit(self, body: list[dict[str, Any]], repo_id: str) -> dict[str, Any]:
        found = self.repository(repo_id)
        changed = []
        for line in body:
            value = line["value"]
            if line["key"] == "file":
                found.files[value["path"]] = self.keep(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                if not (self.blobs / value["oid"]).exists():
                    raise Refused(400, f"{value['path']} has not been uploaded")
                found.files[value["path"]] = value["oid"]
            changed += [value["path"]] if line["key"] in ("file", "lfsFile") else []
        found.commits.append(changed)
        return {"success": True, "commitOid": found.sha, "commitUrl": f"{self.url}/{repo_id}/commit/{found.sha}"}

    def resolve(self, repo_id: str, path: str) -> tuple[Path, str]:
        found = self.repository(repo_id)
        if path not in found.files:
            raise Refused(404, "Entry not found", "EntryNotFound")
        return self.blobs / found.files[path], found.sha


NAME = r"([\w.-]+/[\w.-]+)"
CALLS: list[tuple[str, str, Callable[..., Any]]] = [
    ("GET", r"/api/whoami-v2", HubStandIn.whoami),
    ("POST", r"/api/repos/create", HubStandIn.create),
    ("POST", r"/api/validate-yaml", HubStandIn.validate),
    ("GET", r"/api/(?:models|datasets)", HubStandIn.search),
    ("GET", rf"/api/(?:models|datasets)/{NAME}(?:/revision/([\w.-]+))?", HubStandIn.info),
    ("GET", rf"/api/(?:models|datasets)/{NAME}/tree/([\w.-]+)", HubStandIn.tree),
    ("POST", rf"/api/models/{NAME}/preupload/main", HubStandIn.preupload),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", HubStandIn.batch),
    ("POST", r"/lfs-verify", HubStandIn.verify),
    ("POST", rf"/api/models/{NAME}/commit/main", HubStandIn.commit),
]


class Quiet(http.server.BaseHTTPRequestHandler):
    """Keeps connections open, and writes no log."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def listening(handler: type[Quiet]) -> Iterator[str]:
    """The address on this machine where `handler` answers, in a thread."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@contextmanager
def serving(folder: Path) -> Iterator[HubStandIn]:
    """The stand-in at work on this machine; its address is `url`."""
    hub = HubStandIn(folder)

    class Handler(Quiet):
        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if words := next((words for words in hub.trouble if words in path), None):
                wrong = hub.trouble.pop(words) if hub.once else hub.trouble[words]
                self.close_connection = True
                if wrong:
                    self.say({"error": wrong[1]}, wrong[0], "GatedRepo" if "restricted" in wrong[1] else "")
                return
            try:
                if self.command == "PUT":
                    self.take(path.removeprefix("/object/"))
                    return self.say({})
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if body:
                    hub.received.append((path, len(body)))
                    hub.bodies.append(body)
                self.admit()
                if found := re.fullmatch(rf"(?:/datasets)?/{NAME}/resolve/\w+/(.+)", path):
                    return self.give(*hub.resolve(*found.groups()))
                for method, pattern, call in CALLS:
                    if method == self.command and (found := re.fullmatch(pattern, path)):
                        lines = "ndjson" in self.headers.get("Content-Type", "")
                        value = [json.loads(line) for line in body.splitlines()] if lines else json.loads(body or b"{}")
                        return self.say(call(hub, value, *filter(None, found.groups())))
                raise Refused(404, f"no such call: {self.command} {path}")
            except Refused as error:
                self.say({"error": str(error)}, error.status, error.code)

        do_GET = do_HEAD = do_POST = do_PUT = answer

        def admit(self) -> None:
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                raise Refused(401, "Invalid credentials in Authorization header")

        def take(self, oid: str) -> None:
            count = left = int(self.headers["Content-Length"])
            digest = hashlib.sha256()
            partial = hub.blobs / f"{oid}.partial"
            with partial.open("wb") as file:
                while left and (piece := self.rfile.read(min(PIECE, left))):
                    file.write(piece)
                    digest.update(piece)
                    left -= len(piece)
            if digest.hexdigest() != oid:
                partial.unlink()
                raise Refused(400, "another object arrived")
            partial.rename(hub.blobs / oid)
            hub.received.append((f"/object/{oid}", count))

        def give(self, path: Path, sha: str) -> None:
            data = hub.damage.get(path.name) or path.read_bytes()
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if asked and hub.without_ranges and asked[2]:
                asked = None
            begin, whole = int(asked[1]) if asked else 0, len(data)
            data = data[:int(asked[2]) + 1] if asked and asked[2] else data
            self.send_response(206 if asked else 200)
            self.send_header("X-Repo-Commit", sha)
            self.send_header("ETag", f'"{path.name}"')
            self.send_header("Content-Length", str(len(data) - begin))
            if asked:
                self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{whole}")
            self.end_headers()
            if self.command == "GET":
                hub.given.append((path.name, begin, len(data)))
                end = hub.cut.pop(path.name, len(data))
                self.wfile.write(data[begin:end])
                self.close_connection = end < len(data)

        def say(self, value: Any, status: int = 200, code: str = "") -> None:
            text = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            if code:
                self.send_header("X-Error-Code", code)
            if status >= 400:
                self.send_header("X-Error-Message", value["error"])
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(text)

    with listening(Handler) as hub.url:
        yield hub


def use(monkeypatch: pytest.MonkeyPatch, url: str, token: str | None, home: Path) -> None:
    """This process's client asks the hub at `url`: it has read its settings already."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub cache"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
