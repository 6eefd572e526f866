"""A stand-in for ModelScope's HTTP interface, as far as the package modelscope-hub uses it to fetch and to push.

The requests are those of its _legacy_api.py (/api/v1) and _openapi.py (/openapi/v1).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from support.hub_stand_in import Quiet, listening

TOKEN = "ms-stand-in-0123456789"
USER = "cat"
PUBLIC, PRIVATE = 5, 1


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class ModelScopeStandIn:
    """What the hub holds: {("models" or "datasets", id): {path: bytes}}; who may see what; what was committed."""

    def __init__(self) -> None:
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}
        self.visibility: dict[str, int] = {}
        self.made: list[dict[str, Any]] = []
        self.blobs: dict[str, bytes] = {}
        self.commits: list[list[str]] = []
        self.url = ""

    def hold(self, kind: str, name: str, folder: Path) -> None:
        """Hold a copy of a folder's files."""
        self.files[kind, name] = {str(path.relative_to(folder)): path.read_bytes()
                                  for path in sorted(folder.rglob("*")) if path.is_file()}

    def of(self, kind: str, name: str) -> dict[str, bytes]:
        if (kind, name) not in self.files:
            raise Refused(404, f"{name} is not here")
        return self.files[kind, name]

    def answer(self, method: str, path: str, query: dict[str, str], body: bytes) -> Any:
        """The answer's data; bytes are a file."""
        name = r"([\w.-]+/[\w.-]+)"
        if path == "/openapi/v1/users/me":
            return {"username": USER, "email": "cat@example.com"}
        if found := re.fullmatch(rf"(?:/openapi|/api)/v1/(models|datasets)/{name}", path):
            self.of(*found.groups())
            return {"Path": found[2].split("/")[0], "Name": found[2].split("/")[1],
                    "Visibility": self.visibility.get(found[2], PUBLIC)}
        if method == "POST" and path == "/api/v1/models":
            asked = json.loads(body)
            made = f"{asked['Path']}/{asked['Name']}"
            if ("models", made) in self.files:  # the library tries it before every upload, as a public one
                raise Refused(400, f"{made} already exists")
            self.made.append(asked)
            self.files["models", made], self.visibility[made] = {}, asked["Visibility"]
            return asked
        if found := re.fullmatch(rf"/api/v1/(models|datasets)/{name}/repo/(?:files|tree)", path):
            return {"Files": [{"Path": path, "Name": Path(path).name, "Type": "blob", "Size": len(data),
                               "Sha256": hashlib.sha256(data).hexdigest()}
                              for path, data in self.of(*found.groups()).items()]}
        if found := re.fullmatch(rf"/api/v1/(models|datasets)/{name}/repo", path):
            return self.of(*found.groups())[query["FilePath"]]
        if found := re.fullmatch(rf"/api/v1/repos/models/{name}/info/lfs/objects/batch", path):
            objects = json.loads(body)["objects"]
            return {"objects": [{**wanted, "actions": {"upload": {"href": f"{self.url}/blob/{wanted['oid']}"}}}
                                for wanted in objects if wanted["oid"] not in self.blobs]}
        if found := re.fullmatch(r"/blob/(\w+)", path):
            if hashlib.sha256(body).hexdigest() != found[1]:
                raise Refused(400, "another object arrived")
            self.blobs[found[1]] = body
            return {}
        if found := re.fullmatch(rf"/api/v1/repos/models/{name}/commit/master", path):
            return self.commit(found[1], json.loads(body)["actions"])
        raise Refused(404, f"no such call: {method} {path}")

    def commit(self, name: str, actions: list[dict[str, Any]]) -> dict[str, Any]:
        files = self.of("models", name)
        for action in actions:
            lfs = action["type"] == "lfs"
            files[action["path"]] = self.blobs[action["sha256"]] if lfs else base64.b64decode(action["content"])
        self.commits.append([action["path"] for action in actions])
        return {"oid": hashlib.sha1(repr(self.commits).encode()).hexdigest()}


@contextmanager
def serving() -> Iterator[ModelScopeStandIn]:
    """The stand-in at work on this machine; its address is `url`."""
    hub = ModelScopeStandIn()

    class Handler(Quiet):
        def answer(self) -> None:
            address = urlsplit(self.path)
            path = unquote(address.path)
            query = {name: values[0] for name, values in parse_qs(address.query).items()}
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            try:
                if self.command in ("POST", "PUT") or path == "/openapi/v1/users/me":
                    self.admit()
                self.say(hub.answer(self.command, path, query, body))
            except Refused as error:
                self.say({"Message": str(error)}, error.status)

        do_GET = do_HEAD = do_POST = do_PUT = answer

        def admit(self) -> None:
            if TOKEN not in self.headers.get("Authorization", "") + self.headers.get("Cookie", ""):
                raise Refused(401, "the token is not valid")

        def say(self, data: Any, status: int = 200) -> None:
            if isinstance(data, bytes):
                text, begin = data, 0
                if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                    begin, status = int(found[1]), 206
                    end = min(int(found[2] or len(data) - 1), len(data) - 1)
                    text = data[begin:end + 1]
            else:
                good = status == 200
                text = json.dumps({"Code": status, "Success": good, "success": good, "Data": data, "data": data,
                                   **({} if good else data)}).encode()
            self.send_response(status)
            if status == 206:
                self.send_header("Content-Range", f"bytes {begin}-{begin + len(text) - 1}/{len(data)}")
            self.send_header("Content-Type", "application/octet-stream" if isinstance(data, bytes) else
                             "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(text)

    with listening(Handler) as hub.url:
        yield hub
