"""An HTTP server that stands before a real one and fails on demand: status codes, cut connections, silence.

Faults are either told one by one (``fail``) or drawn for every request from a seed (``draw_faults``).
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import random
import socket
import struct
import threading
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

CUT = "cut"  # the connection breaks off in the middle of the answer
DROP = "drop"  # the connection is closed without an answer
LOST = "lost"  # the request is done, and its answer does not arrive
RESET = "reset"  # the connection is reset in the middle of the answer
SHORT = "short"  # half of an object, under a status and a length that look right
SLOW = "slow"  # the answer trickles
STALE = "stale"  # a listing lacks what was written last
KINDS: tuple[int | str, ...] = (429, 500, 502, 503, CUT, DROP, LOST, RESET, SHORT, SLOW)
_TRICKLE_SECONDS = 0.05
_KEPT = ("Content-Type", "Range", "Content-Range", "ETag", "X-Goog-Hash", "X-Goog-Stored-Content-Encoding")


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
    """``base`` is the URL to talk to; ``requests`` is everything that came, in order; each waits ``delay_seconds``.

    Attributes:
        page_size: at most so many objects are in one answer to a listing; 0 is as many as the server gives.
        fresh: listings whose URL contains this are never without what was written last; "" is none.
        counts: how often each fault has struck.
    """

    base: str
    delay_seconds: float = 0.0
    page_size: int = 0
    fresh: str = ""
    counts: dict[int | str, int] = field(default_factory=dict)
    requests: list[Seen] = field(default_factory=list)
    _faults: list[_Fault] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _random: random.Random = field(default_factory=random.Random)
    _share: float = 0.0
    _kinds: Sequence[int | str] = KINDS

    def fail(self, what: int | str, *, times: int = 10**9, path: str = "", method: str = "") -> None:
        """Answer the next ``times`` requests whose path contains ``path`` with a status code, or break them."""
        with self._lock:
            self._faults.append(_Fault(what, path, method, times))

    def draw_faults(self, seed: int, share: float, kinds: Sequence[int | str] = KINDS) -> None:
        """From now on let this share of all requests suffer one of ``kinds``, as a generator of this seed has it."""
        with self._lock:
            self._random, self._share, self._kinds = random.Random(seed), share, kinds

    def heal(self) -> None:
        with self._lock:
            self._faults.clear()
            self._share = 0.0

    def fault_for(self, method: str, path: str) -> int | str | None:
        with self._lock:
            found = self._find_fault(method, path)
            if found is not None:
                self.counts[found] = self.counts.get(found, 0) + 1
            return found

    def _find_fault(self, method: str, path: str) -> int | str | None:
        for fault in self._faults:
            if fault.left > 0 and fault.path in path and fault.method in ("", method):
                fault.left -= 1
                return fault.what
        if self._random.random() < self._share:
            found = self._random.choice(self._kinds)
            if found == STALE and self.fresh and self.fresh in path:
                return None
            return CUT if found == SHORT and not _is_object(method, path) else found
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
            if _is_listing(self.command, self.path):
                data = _list_in_part(data, self.path, self.proxy.page_size, stale=fault == STALE)
            if fault == SHORT:
                data = data[: len(data) // 2]
            self._answer(status, headers, data, fault)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = forward

    def _ask(self, body: bytes) -> tuple[int, dict[str, str | None], bytes]:
        host = urllib.parse.urlsplit(self.target).netloc
        path = self.path.partition("&pageToken=")[0] if _is_listing(self.command, self.path) else self.path
        headers = {name: value for name, value in self.headers.items() if name.lower() != "transfer-encoding"}
        connection = http.client.HTTPConnection(host, timeout=30)
        connection.request(self.command, path, body, headers | {"Host": host, "Content-Length": str(len(body))})
        reply = connection.getresponse()
        data = reply.read()
        connection.close()
        kept = {name: reply.getheader(name) for name in _KEPT}
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

    def _answer(self, status: int, headers: dict[str, str | None], data: bytes, fault: int | str | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            if value:
                self.send_header(name, value)
        broken = fault in (CUT, RESET)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client lost interest
            self.end_headers()
            if self.command != "HEAD":
                self._write(data[: len(data) // 2] if broken else data, slowly=fault == SLOW)
        self.close_connection = broken
        if fault == RESET:
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def _write(self, data: bytes, slowly: bool) -> None:
        size = max(1, len(data) // 4) if slowly else len(data)
        for start in range(0, len(data), max(1, size)):
            self.wfile.write(data[start : start + size])
            if slowly:
                self.wfile.flush()
                time.sleep(_TRICKLE_SECONDS / 4)

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


def _is_object(method: str, path: str) -> bool:
    """Whether the content of an object is asked for."""
    return method == "GET" and "alt=media" in path


def _is_listing(method: str, path: str) -> bool:
    return method == "GET" and urllib.parse.urlsplit(path).path.endswith("/o")


def _list_in_part(data: bytes, path: str, page_size: int, *, stale: bool) -> bytes:
    """A listing as a page of it; without the object that was written last where it is ``stale``."""
    listing = json.loads(data)
    items = listing.get("items", [])
    if stale and items:
        items.remove(max(items, key=lambda item: int(item["generation"])))
    if page_size:
        asked = urllib.parse.parse_qs(urllib.parse.urlsplit(path).query)
        start = int(asked.get("pageToken", ["0"])[0])
        if start + page_size < len(items):
            listing["nextPageToken"] = str(start + page_size)
        items = items[start : start + page_size]
        if start:
            listing.pop("prefixes", None)
    return json.dumps({**listing, "items": items}).encode()


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
