"""The remote half of the storage seam: fsspec filesystems, one a process, with this project's retries and errors.

This is the only module that imports fsspec and gcsfs, and only where a remote URI is first used.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import random
import re
import sys
import tarfile
import threading
import time
import warnings
import zipfile
from base64 import b64encode
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar, cast

from liquid_llm.errors import StorageError, first_line
from liquid_llm.storage.archive import is_far
from liquid_llm.storage.failures import JITTER, announce_pause, describe, failure_types, retry_policy, retrying

T = TypeVar("T")

SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.\-]*)(?:://|::)")
_LOCAL_SCHEMES = ("file", "local")
GCS_SCHEMES = ("gs", "gcs")
_LARGE_BODY_BYTES = 2**20
_JITTERING = (  # modules that draw pauses, and whom to serve next, at random
    *("aiohttp.connector", "gcsfs.retry"),
    *("google.auth._exponential_backoff", "google.api_core.retry.retry_base"),
)
_EXTRAS = {"s3": ("s3", "s3a"), "azure": ("az", "abfs", "abfss", "adl")}  # of ours, which bring what a scheme needs
_READ_ONLY_SCHEMES = ("http", "https", "data", "github")

# What reaches no file of this machine, whatever follows; and what may stand before it in a chain.
_ELSEWHERE = re.compile(
    "gs|gcs|s3a?|https?|az|abfss?|adl|oci|oss|b2|r2|hf|hdfs|webhdfs|ftp|sftp|ssh|smb|memory|data|github|gist|dropbox|gdrive"
)
# what backends raise of a URL that lacks something they need, and of an archive that is none
_BAD_ARCHIVE = (EOFError, zipfile.BadZipFile, tarfile.TarError)
_UNUSABLE = (TypeError, LookupError, *_BAD_ARCHIVE)
_AROUND = frozenset(["simplecache", "filecache", "blockcache", "cached", "zip", "tar"])

_filesystems: dict[tuple[object, ...], Any] = {}
_filesystems_lock = threading.Lock()


def scheme_of(uri: str) -> str | None:
    """The scheme of a remote URI in lower case, None for a local one."""
    match = SCHEME.match(uri)
    scheme = match.group(1).lower() if match else None
    return None if scheme in _LOCAL_SCHEMES else scheme


def is_elsewhere(uri: str) -> bool:
    """Whether reading ``uri`` cannot read a file of this machine; of a chain (``zip://a::gs://b/c.zip``) no part may.

    What is not known to be harmless is not (``reference://``, ``git://`` and ``dir::`` lead to local files too).
    """
    *around, last = uri.split("::")
    schemes = [part.partition("://")[0].lower() for part in around]
    found = re.match(r"([A-Za-z0-9]+)://", last)
    return found is not None and _ELSEWHERE.fullmatch(found[1].lower()) is not None and _AROUND.issuperset(schemes)


def with_backend(
    uri: str, call: Callable[[Any, str], T], *, writing: bool = False, retry: bool = True, where: str | None = None
) -> T:
    """``call(filesystem, path)`` with retries and translated errors; ``where`` is what messages name, else ``uri``."""
    scheme = scheme_of(uri)
    if writing and scheme in _READ_ONLY_SCHEMES:
        raise StorageError(f"{scheme} can only be read", where=uri, remedy="give a bucket or a local folder instead")
    failures = 0
    while True:
        try:
            return call(*filesystem(uri))
        except failure_types() as error:
            failures += 1
            # gcsfs requests are retried one by one (see _new_filesystem), which spares repeating a long upload
            attempts = retry_policy().attempts if retry and scheme not in GCS_SCHEMES else 1
            cause = describe(error, writing=writing)
            if not cause.passing or failures >= attempts:
                raise cause.as_error(where or uri) from error
            time.sleep(announce_pause(uri, cause, failures))
        except _BAD_ARCHIVE as error:
            raise _unusable(where or uri, error) from error


def filesystem(uri: str) -> tuple[Any, str]:
    """The fsspec filesystem of a remote URI and the path in it. One instance serves all threads of a process."""
    import fsspec

    scheme = cast(str, scheme_of(uri))
    emulator = os.environ.get("STORAGE_EMULATOR_HOST", "") if scheme in GCS_SCHEMES else ""
    try:
        if "::" in uri:
            return cast("tuple[Any, str]", fsspec.core.url_to_fs(uri))
        kind = _gcs_class(emulator) if scheme in GCS_SCHEMES else fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        extra = next((one for one, schemes in _EXTRAS.items() if scheme in schemes), None)
        remedy = str(error) if extra is None else f"install it: pip install 'liquid-llm[{extra}]'"
        raise StorageError(f"no backend for {scheme}:// is installed", where=uri, remedy=remedy) from error
    except _UNUSABLE as error:
        raise _unusable(uri, error) from error
    options = dict(kind._get_kwargs_from_urls(uri))
    # the emulator is part of the key: a session made for one server must not outlive it
    key = (os.getpid(), scheme, emulator, repr(sorted(options.items())))
    with _filesystems_lock:
        fs = _filesystems.get(key)
        if fs is None:
            try:
                fs = _filesystems[key] = _new_filesystem(kind, scheme, emulator, options)
            except _UNUSABLE as error:
                raise _unusable(uri, error) from error
            _leave_random_state_alone()
    return fs, kind._strip_protocol(uri)


def _unusable(uri: str, error: Exception) -> StorageError:
    return StorageError(
        "this place cannot be opened",
        where=uri,
        got=f"{type(error).__name__}: {first_line(error)}",
        remedy="correct the URL; where it names an archive, copy that again",
    )


def _leave_random_state_alone() -> None:
    """Have libraries draw their jitter, in whatever thread, from another generator than the one training draws from."""
    for name in _JITTERING:
        module = sys.modules.get(name)
        if module is not None and getattr(module, "random", None) is random:
            vars(module)["random"] = JITTER


def _gcs_class(emulator: str) -> Any:
    if emulator:
        # without this gcsfs asks a gRPC endpoint, which no emulator has, about every bucket: a minute a call
        os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
    with warnings.catch_warnings():
        # on Python 3.10 Google's libraries announce the end of their support, three times, at every import
        warnings.simplefilter("ignore", FutureWarning)
        if emulator:
            from gcsfs.core import GCSFileSystem
        else:
            from gcsfs import GCSFileSystem
    return GCSFileSystem


def _new_filesystem(kind: Any, scheme: str, emulator: str, options: dict[str, Any]) -> Any:
    # listings are never cached: other processes write to the same places
    options = options | {"skip_instance_cache": True, "use_listings_cache": False}
    if scheme in ("http", "https", *GCS_SCHEMES):
        from aiohttp import ClientTimeout

        # aiohttp's own limit is five minutes for a whole transfer; a silent line is what must not last
        limits = {"timeout": ClientTimeout(total=None, sock_connect=20, sock_read=60)}
        options["session_kwargs" if scheme in GCS_SCHEMES else "client_kwargs"] = limits
    if scheme not in GCS_SCHEMES:
        return kind(**options)
    if emulator:
        options |= {"endpoint_url": emulator if "://" in emulator else f"http://{emulator}", "token": "anon"}
    fs = kind(consistency="size", **options)
    # gcsfs has fixed retries of its own; this module's take their place
    for name, retry in (("_request", True), ("_get_file_request", True), ("_get_file_concurrent", False)):
        plain = getattr(getattr(kind, name, None), "__wrapped__", None)
        if plain is not None:
            method = _with_streamed_body(plain.__get__(fs)) if name == "_request" else plain.__get__(fs)
            setattr(fs, name, retrying(method, str(fs._location)) if retry else method)
    gcs_log = logging.getLogger("gcsfs")
    if gcs_log.level == logging.NOTSET:
        gcs_log.setLevel(logging.CRITICAL)  # it prints a traceback for what is raised anyway and explained here
    return fs


def _with_streamed_body(request: Callable[..., Awaitable[T]]) -> Callable[..., Awaitable[T]]:
    """A request that sends a large body piece by piece: aiohttp warns that bytes given whole block its event loop.

    A body that is a file is sent as a copy: aiohttp may close it when the request fails, and it is needed again.
    """

    async def call(*args: Any, **kwargs: Any) -> T:
        body = kwargs.get("data")
        if isinstance(body, io.BytesIO):
            kwargs["data"] = io.BytesIO(body.getvalue())
        elif isinstance(body, (bytes, bytearray, memoryview)) and memoryview(body).nbytes > _LARGE_BODY_BYTES:
            kwargs["data"] = io.BytesIO(body)
        answer = await request(*args, **kwargs)
        _require_whole(answer)
        return answer

    return call


def _require_whole(answer: Any) -> None:
    """Raise ConnectionError where less of an object came than its answer's own headers say, under whatever length."""
    _, headers, _, content = answer
    if headers.get("X-Goog-Stored-Content-Encoding", "identity") != "identity":
        return  # extent and hash are of the packed bytes
    extent = re.match(r"bytes (\d+)-(\d+)/", headers.get("Content-Range", ""))
    if extent is not None:
        whole = len(content) == int(extent[2]) - int(extent[1]) + 1
    else:
        digest = re.search(r"md5=([\w+/=]+)", ",".join(headers.getall("X-Goog-Hash", [])))
        found = b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode()
        whole = digest is None or digest[1] == found
    if not whole:
        raise ConnectionError("a part of the object did not come")


def is_packed(uri: str, details: Mapping[str, Any]) -> bool:
    """Whether the bucket keeps this object packed and hands out what is in it: ``Content-Encoding: gzip``.

    So ``gsutil cp -Z`` and ``gcloud storage cp --gzip-in-flight`` leave it. The size that is named is the packed one,
    and no part of what is in it can be asked for.
    """
    return scheme_of(uri) in GCS_SCHEMES and "gzip" in str(details.get("contentEncoding", "")).lower()


def fetch_packed(fs: Any, path: str, target: str, details: Mapping[str, Any], where: str) -> None:
    """Write what is in a packed object to a local file: its stream as it comes, whole, in one request.

    Raises:
        StorageError: it unpacks to far more than text does.
    """
    from fsspec.callbacks import Callback

    packed = int(details.get("size") or 0)

    class Bound(Callback):  # type: ignore[misc]
        def relative_update(self, inc: int = 1) -> None:
            super().relative_update(inc)
            if is_far(packed, self.value):
                raise StorageError(
                    "this object is packed (Content-Encoding: gzip) and unpacks to far more than it should",
                    where=where,
                    got=f"over {self.value:,} bytes in {packed:,}",
                    remedy="upload it again without -Z or -z",
                )

    # the headers let gcsfs take one request; the length that answer names is that of other bytes
    fs.get_file(path, target, headers={}, consistency=None, callback=Bound())


class RemoteReader(io.RawIOBase):
    """An fsspec file whose failures are StorageErrors; passing ones are retried where it can seek."""

    def __init__(self, uri: str, stream: Any) -> None:
        super().__init__()
        self._uri, self._stream = uri, stream

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._stream.seekable())

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._stream.seek(offset, whence))

    def tell(self) -> int:
        return int(self._stream.tell())

    def readinto(self, buffer: Any) -> int:
        position = self._stream.tell() if self.seekable() else None

        def read(_fs: Any, _path: str) -> bytes:
            if position is not None:
                self._stream.seek(position)
            return bytes(self._stream.read(len(buffer)))

        data = with_backend(self._uri, read, retry=position is not None)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()
