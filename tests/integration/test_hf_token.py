"""The Hugging Face token from every source, sent to a hub and shown nowhere: real clients against loopback servers."""

import base64
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from google.oauth2.service_account import Credentials

from liquid_llm.config import build_run_config
from liquid_llm.errors import StorageError, UsageError
from liquid_llm.wiring.tokens import read_token

SECRET = "projects/a-project/secrets/hf-token"
ACCESS_TOKEN = "ya29.access-token-of-the-account"


@dataclass
class Cloud:
    """Google's token endpoint, Secret Manager and a hub that knows no token, on one port.

    Attributes:
        answers: secret version -> (status, body).
        asked: (path, Authorization) of every request.
    """

    base: str = ""
    answers: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    asked: list[tuple[str, str | None]] = field(default_factory=list)

    def put(self, token: str | bytes, version: str = "latest") -> None:
        data = base64.b64encode(token if isinstance(token, bytes) else token.encode()).decode()
        self.answers[version] = (200, json.dumps({"name": SECRET, "payload": {"data": data}}).encode())


@pytest.fixture
def cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    cloud = Cloud()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(200, json.dumps({"access_token": ACCESS_TOKEN, "expires_in": 3600}).encode())

        def do_GET(self) -> None:
            cloud.asked.append((self.path, self.headers.get("Authorization")))
            version = self.path.removeprefix(f"/v1/{SECRET}/versions/").removesuffix(":access")
            allowed = self.headers.get("Authorization") == f"Bearer {ACCESS_TOKEN}"
            if not self.path.startswith("/v1/"):
                self.answer(401, b"{}")
            else:
                self.answer(*cloud.answers.get(version, (404, b"{}")) if allowed else (403, b"{}"))

        do_HEAD = do_GET

        def answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        cloud.base = f"http://127.0.0.1:{server.server_port}"
        (tmp_path / "account.json").write_text(json.dumps(service_account(cloud.base)))
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "account.json"))
        monkeypatch.setenv("SECRET_MANAGER_ENDPOINT", cloud.base)
        # a thread of google-auth asks iamcredentials.googleapis.com about the account: nothing here leaves this machine
        monkeypatch.setattr(Credentials, "_is_regional_access_boundary_lookup_required", lambda _: False, raising=False)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        yield cloud
        server.shutdown()


def service_account(base: str) -> dict[str, str]:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return {
        "type": "service_account",
        "client_email": "trainer@a-project.example",
        "private_key": key.private_bytes(*form).decode(),
        "token_uri": f"{base}/token",
    }


def read(**sources: str) -> str | None:
    given = {f"token_{name}": sources.get(name) for name in ("file", "uri", "secret")}
    return read_token(replace(build_run_config("anneal", {"dataset_name": "wikitext"}).teacher, **given))


def test_the_environment_the_file_the_object_and_the_secret(cloud, gcs, tmp_path, monkeypatch):
    from liquid_llm import storage

    assert read() is None
    (tmp_path / "token").write_text("from-file\n")
    storage.write_bytes(f"{gcs.uri}/token", b" from-object \n")
    cloud.put("from-secret\n")
    cloud.put("of-version-3", version="3")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "from-older-name")
    assert read() == "from-older-name"
    monkeypatch.setenv("HF_TOKEN", "from-environment")
    assert read() == "from-environment"
    assert read(file=str(tmp_path / "token")) == "from-file"
    assert read(uri=f"{gcs.uri}/token") == "from-object"
    assert read(secret=SECRET) == "from-secret"
    assert read(secret=f"{SECRET}/versions/3") == "of-version-3"
    assert {authorization for _, authorization in cloud.asked} == {f"Bearer {ACCESS_TOKEN}"}


@pytest.mark.parametrize(
    ("sources", "kind", "words"),
    [
        ({"file": "/no/such/token"}, UsageError, "cannot read the token file"),
        ({"file": "empty"}, UsageError, "--hf_token_file: the token is empty"),
        ({"file": "binary"}, UsageError, "--hf_token_file: the token is not text"),
        ({"file": "lines"}, UsageError, "several lines"),
        ({"uri": "memory://nowhere/token"}, StorageError, "memory://nowhere/token"),
        ({"secret": "hf-token"}, UsageError, "projects/PROJECT/secrets/NAME"),
        ({"secret": f"{SECRET}/versions/404"}, StorageError, "HTTP 404. Check its name"),
        ({"secret": f"{SECRET}/versions/strange"}, StorageError, "without a secret"),
        ({"secret": f"{SECRET}/versions/torn"}, StorageError, "without a secret"),
        ({"secret": f"{SECRET}/versions/binary"}, UsageError, "--hf_token_secret: the token is not text"),
    ],
)
def test_a_token_that_cannot_be_had_is_one_message(cloud, tmp_path, monkeypatch, sources, kind, words):
    monkeypatch.chdir(tmp_path)
    for name, content in (("empty", b" \n"), ("binary", b"\xff\xfe"), ("lines", b"one\ntwo\n")):
        Path(name).write_bytes(content)
    cloud.answers["strange"] = (200, b'{"payload": {}}')
    cloud.answers["torn"] = (200, b"{")
    cloud.put(b"\xff\xfe", version="binary")
    with pytest.raises(kind, match=re.escape(words)) as caught:
        read(**sources)
    assert ACCESS_TOKEN not in str(caught.value)


def test_an_unreachable_secret_manager_is_a_storage_error(cloud, monkeypatch):
    monkeypatch.setenv("SECRET_MANAGER_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="cannot reach Secret Manager"):
        read(secret=SECRET)


EVERY_SOURCE = """
import os, sys
from liquid_llm.cli.main import main
words = ["anneal", "--teacher_name=org/private", "--dataset_name=texts", "--train_steps=1", "--output_gcs_uri=run"]
print([main([*words, *given.split()]) for given in sys.argv[1:]])
"""


@pytest.mark.slow
def test_the_hub_is_asked_with_the_token_and_nothing_shows_it(cloud, tmp_path):
    given = {"from-file": "--hf_token_file=token", "from-secret": f"--hf_token_secret={SECRET}", "from-environment": ""}
    (tmp_path / "token").write_text("from-file")
    cloud.put("from-secret")
    done = subprocess.run(
        [sys.executable, "-c", EVERY_SOURCE, *given.values()],
        cwd=tmp_path,
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))},
            "HF_ENDPOINT": cloud.base,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_TOKEN": "from-environment",
            "PYTHONPATH": str(Path(__file__).resolve().parents[2] / "src"),
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.strip() == "[2, 2, 2]"
    assert done.stderr.count("error: ") == 3
    sent = [authorization for path, authorization in cloud.asked if path.startswith("/org/private")]
    assert list(dict.fromkeys(sent)) == [f"Bearer {token}" for token in given]
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path.name not in ("token", "account.json")]
    for token in (*given, ACCESS_TOKEN):
        assert token not in done.stderr
        assert not [path for path in written if token.encode() in path.read_bytes()]
