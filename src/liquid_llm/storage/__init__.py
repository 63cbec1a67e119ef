"""The storage seam: every place the project reads or writes, through about ten functions.

    URI      a local path, ``file://…``, or any fsspec URL (``gs://bucket/key``, ``s3://…``, ``https://…``, ``memory://…``)
    remote   a URI that is not on this machine's file system
    publish  make a file or folder appear under its name complete, or not at all

Local files never go through fsspec: they are written to a temporary name beside the target, flushed, fsynced and
renamed. A failure of any backend becomes a StorageError with the URI, the cause in plain words and what to do. Passing
failures (429, 5xx, cut connections, timeouts) are retried with growing, jittered pauses before that.

All functions may be called from any thread and after a fork. Other modules import this one alone, ``storage.streams``
for what is in a file and ``storage.lease`` for who may write where. Only ``storage.backends`` imports fsspec.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import re
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from liquid_llm.errors import StorageError
from liquid_llm.parsing import MAX_JSON_BYTES
from liquid_llm.storage.archive import TORCH_DAMAGE, is_far, unpack_zip, unpacks_far, zip_errors
from liquid_llm.storage.backends import (
    GCS_SCHEMES,
    SCHEME,
    RemoteReader,
    fetch_packed,
    is_elsewhere,
    is_packed,
    scheme_of,
    with_backend,
)
from liquid_llm.storage.failures import (
    Cause,
    RetryPolicy,
    announce_pause,
    describe,
    failure_types,
    retry_policy,
    set_retry_policy,
)
from liquid_llm.storage.local import (
    TEMPORARY_SUFFIX,
    borrow_folder,
    files_below,
    locked,
    matching_files,
    publish,
    publish_folder,
    sha256,
    start_writeback,
    sync,
    translate_errors,
)
from liquid_llm.storage.temporary import scratch

__all__ = [
    "TEMPORARY_SUFFIX",
    "TORCH_DAMAGE",
    "Cause",
    "FileInfo",
    "NoExclusionError",
    "RetryPolicy",
    "announce_pause",
    "borrow_folder",
    "check_writable",
    "copy",
    "create",
    "download",
    "exists",
    "fetch_once",
    "glob",
    "is_far",
    "is_remote",
    "join",
    "list_files",
    "local_path",
    "locked",
    "matches",
    "open_read",
    "publish",
    "publish_folder",
    "read_bytes",
    "read_small",
    "remove",
    "resolve",
    "retry_policy",
    "scratch",
    "set_retry_policy",
    "sha256",
    "start_writeback",
    "stat",
    "sync",
    "translate_errors",
    "unpack_zip",
    "unpacks_far",
    "upload",
    "write_bytes",
    "zip_errors",
]

_READ_BLOCK_BYTES = 16 * 2**20  # a GET costs about 43 ms before its first byte: small blocks waste the line
_BUFFER_BYTES = 2**20
_VERSION_KEYS = ("etag", "ETag", "generation", "md5Hash", "Last-Modified", "LastModified", "mtime", "created")


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One file.

    Attributes:
        uri: where it is, scheme included.
        name: relative to the folder that was listed.
        size: bytes.
        version: changes whenever the content does (etag, generation, hash or time of change); "" for a folder.
        packed: its bucket keeps it with Content-Encoding: gzip: ``size`` is not that of what is read, which can only be
            read whole.
    """

    uri: str
    name: str
    size: int
    version: str
    packed: bool = False

    @property
    def key(self) -> str:
        """32 hex digits that are others for any other file or content."""
        return hashlib.blake2b(f"{self.uri}\n{self.size}\n{self.version}".encode(), digest_size=16).hexdigest()


class NoExclusionError(StorageError):
    """This kind of place has no way to make a file only where there is none."""

    def __init__(self, uri: str) -> None:
        super().__init__(
            f"{scheme_of(uri)} has no way to make a file only where there is none",
            where=uri,
            remedy="write to a local folder and copy it there, or to gs:// or s3://",
        )


# ---------------------------------------------------------------------------------------------------------------- names


def is_remote(uri: str) -> bool:
    """Whether ``uri`` lies outside this machine's file system."""
    return scheme_of(uri) is not None


def join(base: str, *parts: str) -> str:
    """``base`` and ``parts`` with exactly one slash between them; the slashes of a scheme or of the root are kept."""
    joined = base
    for part in parts:
        if not joined:
            joined = part
        elif part:
            joined = (joined if joined.endswith("://") else joined.rstrip("/") + "/") + part.lstrip("/")
    return joined


def resolve(path: str, folder: str) -> str:
    """``path`` itself where it names a place from anywhere, else what it names in ``folder``.

    Raises:
        StorageError: it was read in a remote folder, and may lead to files of this machine: who can write there would
            have them read, and sent elsewhere.
    """
    named = is_remote(path) or path.lower().startswith(("/", "file:", "local:"))
    if folder and is_remote(folder):
        kin = "::" not in folder and scheme_of(path) == scheme_of(folder)
        beside = "::" not in path and (kin or not named)
        if not beside and not is_elsewhere(path):
            raise StorageError(
                "what was read from a bucket may not name files of this machine",
                where=folder,
                got=path,
                expected="a path beside it, or a URL",
                remedy="copy the file that names it to this machine, if you trust it, and name that",
            )
    return path if named or not folder else join(folder, path)


def local_path(uri: str) -> Path:
    """The path behind a plain path or ``file://`` URI. Raises StorageError for a remote URI."""
    if is_remote(uri):
        raise StorageError("a local path is needed here", where=uri, remedy="download the file first")
    match = SCHEME.match(uri)
    return Path(uri[match.end() :] if match else uri)


# -------------------------------------------------------------------------------------------------------------- looking


def exists(uri: str) -> bool:
    """Whether a file or folder is there. A place that cannot be asked (403, 503) raises StorageError."""
    return stat(uri) is not None


def stat(uri: str) -> FileInfo | None:
    """The file's name, size and version; None where nothing is. A folder has size 0 and an empty version."""
    name = uri.rstrip("/").rsplit("/", 1)[-1]
    if not is_remote(uri):
        with translate_errors(uri):
            try:
                status = local_path(uri).stat()
            except (FileNotFoundError, NotADirectoryError):
                return None
        if local_path(uri).is_dir():
            return FileInfo(uri, name, 0, "")
        return FileInfo(uri, name, status.st_size, str(status.st_mtime_ns))

    def look(fs: Any, path: str) -> FileInfo | None:
        try:
            details = fs.info(path)
        except FileNotFoundError as error:
            if describe(error, writing=False).kind == "not found":
                return None
            raise  # fsspec's http says "not found" whatever happened
        if details.get("type") == "directory":
            return FileInfo(uri, name, 0, "")
        return FileInfo(uri, name, int(details.get("size") or 0), _version(details), is_packed(uri, details))

    return with_backend(uri, look)


def glob(uri: str) -> list[str]:
    """Sorted URIs, scheme included, of the files matching a pattern (``*``, ``?``, ``[…]``, ``**``).

    A URI without a pattern, or one that names an existing file literally, gives itself; nothing found gives [].
    """
    if not is_remote(uri):
        path = str(local_path(uri))
        prefix = uri[: -len(path)] if uri != path and uri.endswith(path) else ""
        return [prefix + found for found in matching_files(path)]
    base = re.split(r"[*?\[]", uri, maxsplit=1)[0]
    if base == uri:
        found = stat(uri)
        return [uri] if found is not None and found.version else []
    base = base[: base.rfind("/") + 1]

    def look(fs: Any, path: str) -> list[str]:
        try:
            matches = fs.glob(path, detail=True)
        except FileNotFoundError:
            return []
        files = [name for name, details in matches.items() if details.get("type") == "file"]
        return sorted(_full_uri(fs, base, name) for name in files)

    return with_backend(uri, look)


def matches(path: str, pattern: str) -> bool:
    """Whether ``glob(pattern)`` would find a file at ``path``."""
    from fsspec.utils import glob_translate

    try:
        return path == pattern or re.match(glob_translate(pattern), path) is not None
    except ValueError:  # no pattern: ** beside other letters
        return False


def list_files(uri_dir: str) -> list[FileInfo]:
    """Every file below a folder, recursively, sorted by name; [] where the folder is absent."""
    if not is_remote(uri_dir):
        with translate_errors(uri_dir):
            found = [
                FileInfo(join(uri_dir, name), name, status.st_size, str(status.st_mtime_ns))
                for name, status in files_below(local_path(uri_dir))
            ]
        return sorted(found, key=lambda info: info.name)
    base = uri_dir.rstrip("/") + "/"

    def look(fs: Any, path: str) -> list[FileInfo]:
        try:
            entries = fs.find(path.rstrip("/"), detail=True)
        except FileNotFoundError:
            return []
        infos = []
        for name, details in entries.items():
            uri = _full_uri(fs, base, name)
            if uri.startswith(base) and not uri.endswith("/"):
                size, packed = int(details.get("size") or 0), is_packed(uri, details)
                infos.append(FileInfo(uri, uri[len(base) :], size, _version(details), packed))
        return sorted(infos, key=lambda info: info.name)

    return with_backend(uri_dir, look)


def list_folders(uri_dir: str) -> list[str]:
    """The names of the folders directly in a folder, sorted, without a look into them; [] where it is absent."""
    if not is_remote(uri_dir):
        with translate_errors(uri_dir):
            folder = local_path(uri_dir)
            return sorted(one.name for one in folder.iterdir() if one.is_dir()) if folder.is_dir() else []

    def look(fs: Any, path: str) -> list[str]:
        try:
            entries = fs.ls(path.rstrip("/"), detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        folders = [str(one["name"]).rstrip("/") for one in entries if one.get("type") == "directory"]
        return sorted(name.rpartition("/")[2] for name in folders)

    return with_backend(uri_dir, look)


def _full_uri(fs: Any, base: str, name: str) -> str:
    """The URI of ``name`` as a backend lists it, found below ``base`` (backends drop the scheme, some the host too)."""
    if "://" in name:
        return name
    root = fs._strip_protocol(base).strip("/")
    return base + name.lstrip("/")[len(root) :].lstrip("/")


def _version(details: dict[str, Any]) -> str:
    for key in _VERSION_KEYS:
        if details.get(key):
            return str(details[key])
    return f"size {details.get('size')}"


# -------------------------------------------------------------------------------------------------------------- reading


def open_read(uri: str) -> BinaryIO:
    """A buffered binary stream for ``with``, read block by block so that memory stays flat; usually seekable."""
    if not is_remote(uri):
        with translate_errors(uri):
            return local_path(uri).open("rb", buffering=_BUFFER_BYTES)

    def begin(fs: Any, path: str) -> Any:
        if scheme_of(uri) == "memory":
            return io.BytesIO(fs.cat_file(path))  # fsspec hands the one shared object to every reader
        stream = fs.open(path, "rb", block_size=_READ_BLOCK_BYTES, cache_type="readahead")
        details = getattr(stream, "details", {})  # what comes through a local cache has none
        if not is_packed(uri, details):
            return stream
        with scratch("packed") as folder:  # its data lives until it is closed
            whole = folder / "whole"
            fetch_packed(fs, path, str(whole), details, uri)
            return whole.open("rb")

    return cast(BinaryIO, io.BufferedReader(RemoteReader(uri, with_backend(uri, begin)), _BUFFER_BYTES))


def read_bytes(uri: str, start: int | None = None, end: int | None = None) -> bytes:
    """The whole file, or its bytes ``[start, end)`` with one ranged request; what lies past the end is left out."""
    if not is_remote(uri):
        with translate_errors(uri), local_path(uri).open("rb") as stream:
            stream.seek(start or 0)
            return stream.read(-1 if end is None else max(0, end - (start or 0)))
    if end is not None and end <= (start or 0):
        return b""

    def fetch(fs: Any, path: str) -> bytes:
        try:
            data = bytes(fs.cat_file(path, start=start, end=end))
        except failure_types() as error:
            if describe(error, writing=False).kind == "past the end":
                return b""
            raise
        if end is not None and len(data) > end - (start or 0):
            data = data[start:end]  # an HTTP server that knows no ranges sends everything
        return data

    return with_backend(uri, fetch)


def read_small(uri: str) -> bytes:
    """A file that is parsed whole: of one that is larger than ``parsing`` takes, one byte more than that."""
    return read_bytes(uri, 0, MAX_JSON_BYTES + 1)


# -------------------------------------------------------------------------------------------------------------- writing


def write_bytes(uri: str, data: bytes) -> None:
    """Publish ``data`` as one file, making the folders above it."""
    if is_remote(uri):
        with_backend(uri, lambda fs, path: fs.pipe_file(path, data), writing=True)
        return
    with publish(local_path(uri), uri) as temporary, temporary.open("xb") as stream:
        stream.write(data)


def create(uri: str, data: bytes) -> bool:
    """As ``write_bytes`` under a name that nobody has; False where it is taken. Of several callers one is told True.

    Raises:
        NoExclusionError: this kind of place cannot promise that; nothing is written.
    """
    if not is_remote(uri):
        with translate_errors(uri, writing=True):
            local_path(uri).parent.mkdir(parents=True, exist_ok=True)
            try:
                with local_path(uri).open("xb") as stream:
                    stream.write(data)
            except FileExistsError:
                return False
        return True

    def put(fs: Any, path: str) -> bool:
        # a backend that has no such parameter may take it for one of the request's, and write over what is there
        if "mode" not in inspect.signature(getattr(type(fs), "_pipe_file", type(fs).pipe_file)).parameters:
            raise NoExclusionError(uri)
        try:
            fs.pipe_file(path, data, mode="create")
        except FileExistsError:
            # where an answer was lost the request was sent again, and met itself
            return bytes(fs.cat_file(path)) == data
        except NotImplementedError:
            raise NoExclusionError(uri) from None
        return True

    return with_backend(uri, put, writing=True)


def upload(local: str | Path, uri: str) -> None:
    """Publish a copy of a local file at ``uri``. The file must not change meanwhile."""
    _publish_copy(Path(local), local, uri)


def _publish_copy(local: Path, source: object, uri: str) -> None:
    with translate_errors(source), local.open("rb"):
        pass  # a missing or unreadable source is told from a missing target here
    if is_remote(uri):
        with_backend(uri, lambda fs, path: fs.put_file(str(local), path), writing=True)
        return
    with publish(local_path(uri), uri) as temporary:
        shutil.copyfile(local, temporary)


def download(uri: str, local: str | Path) -> None:
    """Publish a copy of ``uri`` as a local file, making the folders above it."""
    if not is_remote(uri):
        _publish_copy(local_path(uri), uri, str(local))
        return
    with publish(Path(local), local) as temporary:
        where = f"{uri} -> {local}"

        def fetch(fs: Any, path: str) -> None:
            details = fs.info(path) if scheme_of(uri) in GCS_SCHEMES else {}
            if is_packed(uri, details):
                fetch_packed(fs, path, str(temporary), details, where)
            else:
                fs.get_file(path, str(temporary))
                if temporary.stat().st_size < int(details.get("size") or 0):
                    raise ConnectionError("a part of the object did not come")

        with_backend(uri, fetch, where=where)


def fetch_once(uri: str, folder: Path, found: FileInfo | None = None) -> Path:
    """A local file with the content of ``uri``: itself where it is local, else a copy below its name in ``folder``.

    The copy is made once, and again when the size or version changes (a note beside it says which it has).

    Args:
        found: what ``stat`` or a listing says of it, where that is known.
    """
    if not is_remote(uri):
        return local_path(uri)
    found = found or stat(uri)
    if found is None:
        raise StorageError("not found", where=uri, remedy="check the spelling of the path")
    path = folder / found.name
    note = path.with_name(path.name + ".origin")
    origin = json.dumps([uri, found.size, found.version]).encode()
    with translate_errors(path):
        known = note.is_file() and note.read_bytes() == origin
        if known and path.is_file() and (found.packed or path.stat().st_size == found.size):
            return path
    remove(str(note))
    download(uri, path)
    write_bytes(str(note), origin)
    return path


def copy(source: str, target: str) -> None:
    """Publish a copy of a file within one store: the data of an object does not pass through this machine."""
    if not is_remote(source):
        _publish_copy(local_path(source), source, target)
        return
    with_backend(target, lambda fs, path: fs.cp_file(fs._strip_protocol(source), path), where=f"{source} -> {target}")


def remove(uri: str, missing_ok: bool = True) -> None:
    """Remove one file. Raises StorageError where it cannot be removed or, with ``missing_ok=False``, is not there."""
    if not is_remote(uri):
        with translate_errors(uri):
            local_path(uri).unlink(missing_ok=missing_ok)
        return

    def delete(fs: Any, path: str) -> None:
        try:
            fs.rm_file(path)
        except FileNotFoundError:
            if not missing_ok:
                raise

    with_backend(uri, delete)


def check_writable(uri: str) -> None:
    """Prove that files can be made in, and removed from, the folder ``uri`` by doing so; nothing is left behind."""
    probe = join(uri, f".write-check-{uuid.uuid4().hex[:12]}")
    if is_remote(uri):
        write_bytes(probe, b"write check")
        remove(probe, missing_ok=False)
        return
    with borrow_folder(local_path(uri)):
        write_bytes(probe, b"write check")
        remove(probe)
