"""What went wrong in a storage backend, in plain words, and how often to try again.

Backends report the same trouble in many ways: errno, HTTP status, exceptions of aiohttp, gcsfs, requests, google-auth
or botocore. ``describe`` maps them all to one Cause: what happened, whether it may pass by itself, and what to do.
Classes are recognised by name, so that nothing heavy is imported to explain a full disk.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import random
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from liquid_llm.errors import StorageError

T = TypeVar("T")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Cause:
    """One failure: ``kind`` for code, ``problem`` and ``remedy`` for people, ``passing`` if trying again may help."""

    kind: str
    problem: str
    remedy: str | None = None
    passing: bool = False

    def as_error(self, where: object) -> StorageError:
        return StorageError(self.problem, where=where, remedy=self.remedy)


_SPELLING = "check the spelling of the path"
_ACCESS = "grant this account read and write access there, or choose another place"
_LATER = "run again in a few minutes"
_SPACE = "free some space, or choose another place"
_LOGIN = "check the credentials (GOOGLE_APPLICATION_CREDENTIALS, or gcloud auth application-default login)"

_NOT_FOUND = Cause("not found", "not found", _SPELLING)
_NO_BUCKET = Cause("not found", "the bucket or folder to write to does not exist", "create it, or check its spelling")
_CUT = Cause("connection cut", "the connection was cut", _LATER, passing=True)
_NO_CONNECTION = Cause("no connection", "could not connect", "check the network and the host name", passing=True)
_TIMEOUT = Cause("timeout", "timed out", _LATER, passing=True)
_DENIED = Cause("permission", "permission denied", _ACCESS)

_ENCODED = Cause(
    "encoded",
    "what is sent is packed (Content-Encoding) in a way that cannot be unpacked, as a part of a file is",
    "upload it again without Content-Encoding (-Z or -z of gsutil and gcloud storage)",
)

_BY_ERRNO = {
    errno.ENOENT: _NOT_FOUND,
    errno.EACCES: _DENIED,
    errno.EPERM: _DENIED,
    errno.EROFS: Cause("permission", "the file system is read-only", "choose another place"),
    errno.ENOSPC: Cause("no space", "no space left on the disk", _SPACE),
    errno.EDQUOT: Cause("no space", "the disk quota is used up", _SPACE),
    errno.EFBIG: Cause("no space", "the file would be larger than this system allows", _SPACE),
    errno.EEXIST: Cause("not a folder", "a part of the path is a file, not a folder", _SPELLING),
    errno.ENOTDIR: Cause("not a folder", "a part of the path is a file, not a folder", _SPELLING),
    errno.EISDIR: Cause("a folder", "this is a folder, not a file", "name a file in it"),
    errno.ENAMETOOLONG: Cause("name", "the name is too long", "choose a shorter one"),
    errno.EMFILE: Cause("limits", "too many open files", "raise the limit (ulimit -n)"),
    errno.EIO: Cause("broken", "the disk reports an input/output error", "check the disk"),
    errno.ECONNREFUSED: _NO_CONNECTION,
    errno.ECONNRESET: _CUT,
    errno.ECONNABORTED: _CUT,
    errno.EPIPE: _CUT,
    errno.ETIMEDOUT: _TIMEOUT,
}

_BY_STATUS = {
    400: Cause("refused", "the request was refused (400)", "check the bucket's name and the path"),
    401: Cause("permission", "not signed in (401)", _LOGIN),
    403: Cause("permission", "permission denied (403)", _ACCESS),
    404: Cause("not found", "not found (404)", _SPELLING),
    408: Cause("timeout", "timed out (408)", _LATER, passing=True),
    410: Cause("not found", "no longer there (410)", _SPELLING),
    412: Cause("changed", "another writer has changed it meanwhile (412)", "see that one run alone writes there"),
    413: Cause("refused", "the service refuses so large a file (413)", "choose another place"),
    416: Cause("past the end", "the requested range lies past the end of the file (416)"),
    429: Cause("throttled", "throttled: too many requests (429)", _LATER, passing=True),
    503: Cause("unavailable", "the storage service is unavailable (503)", _LATER, passing=True),
    507: Cause("no space", "no space left at the storage service (507)", _SPACE),
    504: Cause("timeout", "timed out (504)", _LATER, passing=True),
}

# first match wins: the more particular class first
_BY_CLASS: tuple[tuple[frozenset[str], Cause], ...] = (
    (frozenset({"InvalidURL", "InvalidUrlClientError"}), Cause("name", "this is not a usable URL", _SPELLING)),
    (frozenset({"TimeoutError", "Timeout"}), _TIMEOUT),
    (frozenset({"ContentEncodingError"}), _ENCODED),
    (frozenset({"GoogleAuthError", "NoCredentialsError"}), Cause("permission", "no usable credentials", _LOGIN)),
    (frozenset({"ClientConnectorError", "ConnectionRefusedError", "gaierror"}), _NO_CONNECTION),
    (frozenset({"ProxyError"}), Cause("unavailable", "the storage service is unavailable (502)", _LATER, passing=True)),
    (frozenset({"ClientError", "ConnectionError", "RequestException", "ChecksumError", "IncompleteRead"}), _CUT),
    (frozenset({"FileNotFoundError"}), _NOT_FOUND),
    (frozenset({"PermissionError"}), _DENIED),
)

# modules whose errors do not derive from the built-in ones, and the base class of each
_FOREIGN = (
    ("aiohttp", "ClientError"),
    ("gcsfs.retry", "HttpError"),
    ("gcsfs.retry", "ChecksumError"),
    ("requests", "RequestException"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("http.client", "HTTPException"),
)


def failure_types() -> tuple[type[BaseException], ...]:
    """The exception classes a backend may raise, of the modules loaded so far (for ``except failure_types()``)."""
    # backends raise bare ValueError and RuntimeError for replies they did not expect
    builtin: tuple[type[BaseException], ...] = (OSError, asyncio.TimeoutError, ValueError, RuntimeError)
    loaded = [(sys.modules[module], name) for module, name in _FOREIGN if module in sys.modules]
    return builtin + tuple(getattr(module, name) for module, name in loaded)


def describe(error: BaseException, *, writing: bool) -> Cause:
    """The cause behind an exception of a backend.

    Args:
        error: what was raised; what it was raised from is looked at too.
        writing: a missing place then means a missing bucket or folder.
    """
    status = _http_status(error)
    if status is None and isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        status = _http_status(error.__cause__)  # fsspec's http wraps every failure as "not found"
    cause = _known(error, status)
    if cause is not None:
        return _NO_BUCKET if writing and cause.kind == "not found" else cause
    words = " ".join(str(error).split()) or type(error).__name__
    return Cause("other", words[:300])


def _known(error: BaseException, status: int | None) -> Cause | None:
    if status is not None:
        unavailable = Cause("unavailable", f"the storage service failed ({status})", _LATER, passing=True)
        return _BY_STATUS.get(status, unavailable if status >= 500 else None)
    number = getattr(error, "errno", None)
    if number in _BY_ERRNO:
        return _BY_ERRNO[number]
    names = {kind.__name__ for kind in type(error).__mro__}
    for wanted, cause in _BY_CLASS:
        if names & wanted:
            wrapped = error.__cause__
            # fsspec's http says "not found" for a line that broke
            if cause is _NOT_FOUND and wrapped is not None:
                return _known(wrapped, None) or cause
            return cause
    return None


def _http_status(error: BaseException) -> int | None:
    for name in ("status", "code"):  # aiohttp, gcsfs
        value = getattr(error, name, None)
        if isinstance(value, int) and 400 <= value < 600:
            return value
        if isinstance(value, str) and value.isdigit():
            return int(value)
    if isinstance(error, OSError) and str(error).startswith("Forbidden"):
        return 403  # gcsfs
    if isinstance(error, ValueError) and str(error).startswith("Bad Request"):
        return 400
    return None


# What training draws from, and a checkpoint keeps, is the module's own generator: no thread may move it.
JITTER = random.Random()


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long a passing failure is tolerated: the defaults give up after about half a minute."""

    attempts: int = 6
    first_seconds: float = 1.0
    max_seconds: float = 16.0

    def pause_seconds(self, failures: int) -> float:
        """Seconds to wait after that many failures: doubled each time, then half to one and a half of it at random."""
        return float(min(self.first_seconds * 2 ** (failures - 1), self.max_seconds) * JITTER.uniform(0.5, 1.5))


_retry_policy = RetryPolicy()


def set_retry_policy(policy: RetryPolicy) -> RetryPolicy:
    """Use another policy from now on, in every thread; returns the previous one."""
    global _retry_policy
    previous, _retry_policy = _retry_policy, policy
    return previous


def retry_policy() -> RetryPolicy:
    """The policy in force."""
    return _retry_policy


def retrying(method: Callable[..., Awaitable[T]], where: str) -> Callable[..., Awaitable[T]]:
    """An asynchronous request method under the retry policy."""

    async def request(*args: Any, **kwargs: Any) -> T:
        failures = 0
        while True:
            try:
                return await method(*args, **kwargs)
            except failure_types() as error:
                failures += 1
                cause = describe(error, writing=False)
                if not cause.passing or failures >= _retry_policy.attempts:
                    raise
                await asyncio.sleep(announce_pause(where, cause, failures))

    return request


def announce_pause(where: str, cause: Cause, failures: int, least_seconds: float = 0.0) -> float:
    """Seconds to wait after that many failures, logged as a warning so that a waiting run does not look dead.

    Args:
        least_seconds: what the other side asks for.
    """
    seconds = max(_retry_policy.pause_seconds(failures), least_seconds)
    _log.warning(
        "%s: %s; trying again in %.1f s (%d of %d)", where, cause.problem, seconds, failures, _retry_policy.attempts - 1
    )
    return seconds
