"""A Hugging Face hub on this machine, as far as one who writes a model to it asks of it."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import yaml

TOKEN = "hf_" + "aBcD1234" * 4
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """What was written to it, and how it is to answer.

    Attributes:
        files: repository -> path -> content.
        private: repository -> whether it was asked for as a private one.
        writers: tokens that may write.
        faults: statuses of the next answers, in turn, in place of what was asked for.
        asked: method and path of every request.
    """

    base: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, Any] = field(default_factory=dict)
    writers: set[str] = field(default_factory=lambda: {TOKEN})
    readers: set[str] = field(default_factory=set)
    faults: list[int] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)

    def answer(self, method: str, path: str, token: str, body: bytes) -> tuple[int, Any]:
        """Status and JSON of one request."""
        self.asked.append(f"{method} {path}")
        if self.faults and (status := self.faults.pop(0)):
            return status, {"error": "told to"}
        if path.startswith("/objects/"):  # signed addresses ask for no token
            self.objects[path.removeprefix("/objects/")] = body
            return 200, {}
        if token not in self.writers | self.readers:
            return 401, {"error": "Invalid credentials in Authorization header"}
        if path == "/api/whoami-v2":
            return 200, {"name": "owner", "type": "user", "auth": {}}
        if token not in self.writers:
            return 403, {"error": "Forbidden"}
        asked = json.loads(body) if body and not path.endswith("/commit/main") else {}
        if path == "/api/validate-yaml":  # the front matter of a card
            front = yaml.safe_load(asked["content"].split("---\n")[1])
            known = front.get("license") in (None, "apache-2.0", "mit", "other")
            errors = [] if known else [{"message": '"license" must be one of those that are known'}]
            return (400 if errors else 200), {"errors": errors, "warnings": []}
        if path == "/api/repos/create":
            repo = f"{asked.get('organization') or 'owner'}/{asked['name']}"
            if repo in self.files:
                return 409, {"url": f"{self.base}/{repo}", "error": "You already created this model repo"}
            self.files[repo], self.private[repo] = {}, asked.get("private") or asked.get("visibility")
            return 200, {"url": f"{self.base}/{repo}"}
        return self._of_repository(method, path, asked, body)

    def _of_repository(self, method: str, path: str, asked: Any, body: bytes) -> tuple[int, Any]:
        if path.endswith(".git/info/lfs/objects/batch"):
            found = [
                {**one, "actions": {"upload": {"href": f"{self.base}/objects/{one['oid']}", "header": {}}}}
                for one in asked["objects"]
            ]
            return 200, {"transfer": "basic", "objects": found}
        _, _, _, owner, name, what, *_ = path.partition("?")[0].split("/") + [""] * 3
        files = self.files[f"{owner}/{name}"]
        if what == "preupload":
            modes = [
                {"path": one["path"], "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular"}
                for one in asked["files"]
            ]
            return 200, {"files": [{**one, "shouldIgnore": False} for one in modes]}
        if what == "commit":
            for line in map(json.loads, body.splitlines()):
                self._commit(files, line["key"], line["value"])
            return 200, {"commitUrl": f"{self.base}/{owner}/{name}/commit/{COMMIT}", "commitOid": COMMIT}
        listed = [{"type": "file", "path": path, "size": len(data), "oid": COMMIT} for path, data in files.items()]
        if what == "tree":
            return 200, listed
        if method == "GET":  # what is in it
            siblings = [{"rfilename": path} for path in files]
            return 200, {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": siblings}
        return 404, {"error": path}

    def _commit(self, files: dict[str, bytes], key: str, value: Any) -> None:
        if key == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            files[value["path"]] = self.objects[value["oid"]]
        elif key == "deletedFile":
            del files[value["path"]]


@contextmanager
def running_hub(patch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub that the client in this process asks, which sends large files in the plain way; nobody is signed in."""
    from huggingface_hub import constants

    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def _do(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            status, said = hub.answer(self.command, self.path, token, body)
            content = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = _do

        def log_message(self, *words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    hub.base = f"http://127.0.0.1:{server.server_address[1]}"
    patch.setattr(constants, "ENDPOINT", hub.base)
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "HF_TOKEN_PATH", "/nowhere/token")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        patch.delenv(name, raising=False)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
