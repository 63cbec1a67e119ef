"""An HTTP server that stands before a real one and fails on demand: status codes, cut connections, silence."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import threading
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

CUT = "cut"  # the connection breaks off in the middle of the answer
DROP = "drop"  # the connection is closed without an answer
LOST = "lost"  # the request is done, and its answer does not arrive


@dataclass(frozen=True)
class Seen:
    """One request that was let through or not. ``object_name`` is the object of a storage API it is about, or ""."""

    method: str
    path: str
    num_bytes: int
    object_name: str


@dataclass
class _Fault:
    what: int | str
    path: str
    method: str
    left: int


@dataclass
class FaultyProxy:
    """``base`` is the URL to talk to; ``requests`` is everything that came, in order; each waits ``delay_seconds``."""

    base: str
    delay_seconds: float = 0.0
    requests: list[Seen] = field(default_factory=list)
    _faults: list[_Fault] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def fail(self, what: int | str, *, times: int = 10**9, path: str = "", method: str = "") -> None:
        """Answer the next ``times`` requests whose path contains ``path`` with a status code, or break them."""
        with self._lock:
            self._faults.append(_Fault(what, path, method, times))

    def heal(self) -> None:
        with self._lock:
            self._faults.clear()

    def fault_for(self, method: str, path: str) -> int | str | None:
        with self._lock:
            for fault in self._faults:
                if fault.left > 0 and fault.path in path and fault.method in ("", method):
                    fault.left -= 1
                    return fault.what
        return None


class _Handler(http.server.BaseHTTPRequestHandler):
    """Forwards to ``target`` what no fault is set for."""

    protocol_version = "HTTP/1.1"
    proxy: FaultyProxy
    target: str

    def forward(self) -> None:
        body = self._body()
        name = _object_name(self.path, body)
        self.proxy.requests.append(Seen(self.command, self.path, len(body), name))
        time.sleep(self.proxy.delay_seconds)
        fault = self.proxy.fault_for(self.command, self.path)
        if isinstance(fault, int):
            self._answer(fault, {}, f'{{"error": {{"code": {fault}, "message": "as asked"}}}}'.encode())
        elif fault == DROP:
            self.close_connection = True
        else:
            status, headers, data = self._ask(body)
            if fault == LOST:
                self.close_connection = True
                return
            self._answer(status, headers, data, cut=fault == CUT)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = forward

    def _ask(self, body: bytes) -> tuple[int, dict[str, str | None], bytes]:
        host = urllib.parse.urlsplit(self.target).netloc
        headers = {name: value for name, value in self.headers.items() if name.lower() != "transfer-encoding"}
        connection = http.client.HTTPConnection(host, timeout=30)
        connection.request(self.command, self.path, body, headers | {"Host": host, "Content-Length": str(len(body))})
        reply = connection.getresponse()
        data = reply.read()
        connection.close()
        kept = {name: reply.getheader(name) for name in ("Content-Type", "Range", "Content-Range", "ETag")}
        # a resumable upload names the address to go on with: keep it behind this proxy
        kept["Location"] = (reply.getheader("Location") or "").replace(self.target, self.proxy.base)
        if self.command == "HEAD":
            kept["Content-Length"] = reply.getheader("Content-Length")
        return reply.status, kept, data

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, status: int, headers: dict[str, str | None], data: bytes, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            if value:
                self.send_header(name, value)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client lost interest
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data[: len(data) // 2] if cut else data)
        self.close_connection = cut

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def faulty_proxy(target: str) -> Iterator[FaultyProxy]:
    """Serve on a free loopback port, forwarding to ``target`` (``http://host:port``)."""
    proxy = FaultyProxy("")
    handler = type("Handler", (_Handler,), {"proxy": proxy, "target": target})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    proxy.base = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _object_name(path: str, body: bytes) -> str:
    """The object a request of the JSON storage API changes or reads."""
    parts = urllib.parse.urlsplit(path)
    name = urllib.parse.parse_qs(parts.query).get("name")
    if name:
        return name[0]
    if "/upload/" in parts.path and b'"name": "' in body[:500]:
        return body[:500].split(b'"name": "')[1].split(b'"')[0].decode()
    if "/rewriteTo/" in parts.path:
        return urllib.parse.unquote(parts.path.rsplit("/o/", 1)[1])
    return urllib.parse.unquote(parts.path.split("/o/", 1)[1]) if "/o/" in parts.path else ""
