"""One server that is asked over HTTP by several threads.

What may pass by itself (429, 5xx, a cut or refused connection, a time limit, an answer that is no JSON) is repeated
under the retry policy of storage, after the time that the server asks for where it names one. A server that has too
many requests is left alone by all threads for that time, and is given up when it has answered nobody in as many such
pauses as the policy has attempts. No answer is read past the size that the question can have, and nobody is followed to
another address: the key is for this server alone.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any
from urllib.parse import urlsplit

from liquid_llm import storage
from liquid_llm.errors import LiquidError, StorageError, first_line
from liquid_llm.parsing import ParseError, parse_json
from liquid_llm.storage import Cause

log = logging.getLogger(__name__)

KEY_VARIABLE = "LIQUID_TEACHER_API_KEY"
SMALL_BYTES = 4 * 2**20  # of an answer that is not the signal of a text
_CONNECT_SECONDS, _SILENT_SECONDS, _ANSWER_SECONDS = 10.0, 300.0, 900.0
_MOST_PAUSE_SECONDS = 120.0  # whatever a server asks for
_READ_BYTES = 2**16

_LATER = "see that the server runs and is reached from here, then run the same command again to go on"
_DENIED = f"give the server's key in the environment variable {KEY_VARIABLE}"
_REFUSED = Cause("no connection", "could not connect to the teacher's server", _LATER, passing=True)
_CUT = Cause("connection cut", "the connection to the teacher's server was cut", _LATER, passing=True)
_SLOW = Cause("timeout", "the teacher's server did not answer in time", _LATER, passing=True)
_BUSY = Cause("throttled", "the teacher's server has too many requests (429)", _LATER, passing=True)
_ELSEWHERE = "name the address that answers itself"
_FAILED = "the teacher's server failed"


class Refused(Exception):
    """The server will not answer this question, and would not if it were asked again: a status from 400 to 499.

    Attributes:
        status: of HTTP.
        message, parameter: what the server says of it, as far as it says something.
    """

    def __init__(self, status: int, message: str, parameter: str | None) -> None:
        self.status, self.message, self.parameter = status, message, parameter
        super().__init__(f"{message} ({status})")


class ServerFailed(StorageError):
    """The server has failed as often as is tolerated. ``status``: the last one of HTTP, None where there was none."""

    status: int | None = None


class Abandoned(Exception):
    """Nobody waits for the answer any more."""


class Server:
    """An address with the paths of an OpenAI-compatible server below it; safe to use from several threads.

    Args:
        url: ``http(s)://HOST[:PORT][/PREFIX]``, with or without ``/v1`` behind it.
        key: sent as the bearer's, never shown.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._key = key
        self._local = threading.local()
        self._given_up = threading.Event()
        self._lock = threading.Lock()
        self._said_until = 0.0  # when what was said of a failure is over
        self._paused_at = self._paused_until = -1.0  # of the last pause of all threads
        self._pauses = 0  # of all threads, since the server has answered any of them

    def get(self, path: str) -> Any:
        """The JSON value at ``path``; raises as ``post``."""
        return self.ask("GET", path, None, SMALL_BYTES)

    def post(self, path: str, body: dict[str, Any], most_bytes: int = SMALL_BYTES) -> Any:
        """What the server answers to ``body``, a JSON value of at most so many bytes.

        Raises:
            Refused: a status from 400 to 499 that says so of this question.
            StorageError: the server cannot be reached, fails, refuses everybody, or sends something else.
            Abandoned: ``give_up`` was called meanwhile.
        """
        return self.ask("POST", path, body, most_bytes)

    def ask(self, method: str, path: str, body: dict[str, Any] | None, most_bytes: int) -> Any:
        """As ``post``, by any method."""
        where, failures = self.url + path, 0
        while True:
            began = self._wait_for_turn()
            try:
                answer = self._once(method, where, body, most_bytes)
            except _Failure as failure:
                if failure.cause is _BUSY:  # of which no question is the reason
                    self._pause_all(where, failure, began)
                    continue
                failures += 1
                if not failure.cause.passing or failures >= storage.retry_policy().attempts:
                    raise failure.given_up(where) from None
                pause = self._announce(where, failure.cause, failures, failure.wait_seconds)
            except Refused:
                self._pauses = 0  # that is an answer
                raise
            else:
                self._pauses = 0
                return answer
            if self._given_up.wait(pause):
                raise Abandoned

    def is_healthy(self) -> bool:
        """Whether the server says of itself, asked once, that it is well."""
        try:
            self._once("GET", f"{self.url}/health", None, SMALL_BYTES)
        except _Failure as failure:
            return failure.status == 200  # whose answer is empty, as vLLM's is
        except (Refused, LiquidError):
            return False
        return True

    def give_up(self) -> None:
        """End all waiting between requests, now and until ``resume``; what is being read is read by nobody."""
        self._given_up.set()

    def resume(self) -> None:
        """Ask again after ``give_up``: what came of one piece of work is not what becomes of the next."""
        self._pauses = 0
        self._given_up.clear()

    def _wait_for_turn(self) -> float:
        """Wait until no pause is under way; the moment then. Raises Abandoned."""
        while not self._given_up.is_set():
            now = time.monotonic()
            if now >= self._paused_until:
                return now
            self._given_up.wait(self._paused_until - now)
        raise Abandoned

    def _pause_all(self, where: str, failure: _Failure, began: float) -> None:
        """Have all threads wait: the server has refused one that asked at ``began`` for having too many.

        Raises:
            ServerFailed: it has done so as often as is tolerated and answered nobody in between.
        """
        with self._lock:
            asked_seconds = min(failure.wait_seconds, _MOST_PAUSE_SECONDS)
            if began > self._paused_at:  # others that were refused with it are of the same pause
                self._pauses += 1
                if self._pauses < storage.retry_policy().attempts:
                    asked_seconds = storage.announce_pause(where, failure.cause, self._pauses, asked_seconds)
                    self._paused_at = time.monotonic()
            if self._pauses >= storage.retry_policy().attempts:
                raise failure.given_up(where) from None
            self._paused_until = max(self._paused_until, time.monotonic() + asked_seconds)

    def _announce(self, where: str, cause: Cause, failures: int, asked_seconds: float) -> float:
        """Seconds to wait; said once where many requests meet the same trouble together."""
        asked_seconds = min(asked_seconds, _MOST_PAUSE_SECONDS)
        with self._lock:
            if time.monotonic() < self._said_until:
                return max(storage.retry_policy().pause_seconds(failures), asked_seconds)
            pause = storage.announce_pause(where, cause, failures, asked_seconds)
            self._said_until = time.monotonic() + pause
            return pause

    def _once(self, method: str, where: str, body: dict[str, Any] | None, most_bytes: int) -> Any:
        import requests

        try:
            with self._session().request(
                method,
                where,
                json=body,
                timeout=(_CONNECT_SECONDS, _SILENT_SECONDS),
                stream=True,
                allow_redirects=False,
            ) as response:
                content = self._read(response, where, most_bytes)
                status, headers = response.status_code, response.headers
        except (requests.RequestException, _while_reading()) as error:
            raise _Failure(_cause_of(error), first_line(_innermost(error))) from error
        if status == 200:
            try:
                return parse_json(content, most=most_bytes)
            except ParseError as error:
                no_json = Cause("other", "the teacher's server sent something that is no answer", _LATER, passing=True)
                raise _Failure(no_json, first_line(error), status) from error
        raise _of_status(status, headers, content, where)

    def _session(self) -> Any:
        """This thread's own: a session is not made for several."""
        import requests

        session = getattr(self._local, "session", None)
        if session is None:
            session = self._local.session = requests.Session()
            session.auth = self._sign  # named, so that no .netrc signs in the key's place
            session.headers["User-Agent"] = "liquid-llm"
        return session

    def _sign(self, request: Any) -> Any:
        if self._key is not None:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def _read(self, response: Any, where: str, most_bytes: int) -> bytes:
        """The whole answer. Raises StorageError where it is larger than any answer to the question can be."""
        content, ends = bytearray(), time.monotonic() + _ANSWER_SECONDS
        # What has come, not a whole block: of a server that lets bytes drip a block never ends. (An old urllib3 reads
        # blocks alone.)
        read = getattr(response.raw, "read1", response.raw.read)
        while part := read(_READ_BYTES, decode_content=True):
            content += part
            if len(content) > most_bytes:
                raise StorageError(
                    "the teacher's server sends more than an answer can be",
                    where=where,
                    got=f"more than {most_bytes:,} bytes",
                    remedy="see what answers at this address",
                )
            if self._given_up.is_set():
                raise Abandoned
            if time.monotonic() > ends:
                raise _Failure(_SLOW, f"an answer unfinished after {_ANSWER_SECONDS:.0f} s")
        return bytes(content)


def _while_reading() -> type[Exception]:
    """What urllib3 raises when an answer breaks off; requests hands it on."""
    import requests

    kind: type[Exception] = requests.exceptions.BaseHTTPError  # type: ignore[attr-defined]  # not in its stubs
    return kind


class _Failure(Exception):
    """One attempt that came to nothing."""

    def __init__(self, cause: Cause, got: str, status: int | None = None, wait_seconds: float = 0.0) -> None:
        self.cause, self.got, self.status, self.wait_seconds = cause, got, status, wait_seconds
        super().__init__(got)

    def given_up(self, where: str) -> ServerFailed:
        """What it is when no other attempt follows."""
        error = ServerFailed(self.cause.problem, where=where, got=self.got, remedy=_LATER)
        error.status = self.status
        return error


def _cause_of(error: BaseException) -> Cause:
    """What an exception of the HTTP client means; classes by name, as what is inside differs by its release."""
    names = {kind.__name__ for one in _chain(error) for kind in type(one).__mro__}
    if names & {"InvalidURL", "InvalidSchema", "MissingSchema", "LocationParseError"}:
        return Cause("name", "this is not a usable address", "check the spelling of --teacher_url")
    if names & {"SSLError", "SSLCertVerificationError"}:
        told = "the teacher's server has no certificate that is trusted here"
        return Cause("certificate", told, "name its host as its certificate does, or set REQUESTS_CA_BUNDLE")
    if names & {"ConnectTimeout", "NewConnectionError", "NameResolutionError", "ProxyError"}:
        return _REFUSED
    if names & {"Timeout", "TimeoutError", "ReadTimeoutError"}:
        return _SLOW
    return _CUT


def _chain(error: BaseException) -> list[BaseException]:
    """The exception and what it was made of: the client hands the inner one on as an argument or as a reason."""
    found: list[BaseException] = []
    left: list[BaseException | None] = [error]
    while left and len(found) < 20:
        one = left.pop()
        if one is None or one in found:
            continue
        found.append(one)
        left += [getattr(one, "reason", None), *one.args]
        left = [inner for inner in left if isinstance(inner, BaseException)]
    return found


def _innermost(error: BaseException) -> BaseException:
    return _chain(error)[-1]


def _of_status(status: int, headers: Any, content: bytes, where: str) -> Exception:
    """What a status other than 200 means."""
    message, parameter = _told(content)
    if 300 <= status < 400:
        got = f"{status} to {urlsplit(headers.get('Location', '')).netloc or 'another path'}"
        return StorageError("the address leads to another one", where=where, got=got, remedy=_ELSEWHERE)
    if status in (401, 403):
        return StorageError("the teacher's server refuses this key", where=where, got=status, remedy=_DENIED)
    if status == 429:
        return _Failure(_BUSY, message, status, _wait_seconds(headers))
    if status in (408, 409, 425) or status >= 500:
        cause = Cause("unavailable", f"{_FAILED} ({status})", _LATER, passing=status != 501)
        return _Failure(cause, message, status, _wait_seconds(headers))
    return Refused(status, message, parameter)


def _told(content: bytes) -> tuple[str, str | None]:
    """What an answer that is no success says: its message, and the name of the field that it is about."""
    try:
        value = parse_json(content[:SMALL_BYTES])
    except ParseError:
        return first_line(content[:2000].decode("utf-8", "replace")) or "nothing more", None
    error = value.get("error", value) if isinstance(value, dict) else value
    if not isinstance(error, dict):
        return first_line(error), None
    parameter = error.get("param")
    return first_line(error.get("message") or error), parameter if isinstance(parameter, str) else None


def _wait_seconds(headers: Any) -> float:
    """Seconds of ``Retry-After``; one that is a date is left out, as clocks differ."""
    text = str(headers.get("Retry-After", "")).strip()
    return float(text) if text.isdecimal() else 0.0
