"""Zips of others: what is unpacked never decides a path outside its folder, nor takes far more room than its zip.

torch's files are zips too, and a damaged or hostile one is looked at here before torch opens it.
"""

from __future__ import annotations

import errno
import lzma
import pickle
import shutil
import stat
import struct
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from liquid_llm.errors import StorageError
from liquid_llm.storage.local import publish_folder

_MAX_RATIO = 200  # text and code pack ten-fold, weights not at all; a bomb packs a thousand-fold
_MAX_MEMBERS = 20_000
_REMEDY = "make the archive again from a plain folder"

_DAMAGE = (EOFError, NotImplementedError, OverflowError, UnicodeDecodeError, lzma.LZMAError, struct.error, zlib.error)
TORCH_DAMAGE = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    EOFError,
    OSError,
    OverflowError,
    MemoryError,
    AssertionError,
    struct.error,
    pickle.UnpicklingError,
)
"""What ``torch.load`` raises on damaged bytes (found by fuzzing)."""


@contextmanager
def zip_errors() -> Iterator[None]:
    """While entered, all that zipfile raises of a damaged zip is BadZipFile; a disk that fails is what it was."""
    try:
        yield
    except _DAMAGE as error:
        raise zipfile.BadZipFile(str(error) or type(error).__name__) from error
    except RuntimeError as error:
        if type(error) is not RuntimeError:
            raise
        raise zipfile.BadZipFile(str(error)) from error  # it says that a member is encrypted
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):
            raise
        raise zipfile.BadZipFile("bytes that cannot be unpacked, or an offset outside the file") from error


def unpacks_far(archive: Path | IO[bytes]) -> bool:
    """Whether a zip unpacks to so much more than its own size that nobody means it. False of what is no zip."""
    try:
        with zip_errors(), zipfile.ZipFile(archive) as opened:
            members = opened.infolist()
    except zipfile.BadZipFile:
        return False
    return is_far(sum(one.compress_size for one in members), sum(one.file_size for one in members))


def is_far(packed: int, unpacked: int) -> bool:
    """Whether so many bytes unpack to so many that nobody means it."""
    return unpacked > _MAX_RATIO * packed + 2**20


def unpack_zip(archive: Path, folder: Path, *, max_bytes: int | None = None, where: object = None) -> None:
    """Unpack every member below ``folder``, which appears complete or not at all; one that is there stays.

    Args:
        archive: a local zip.
        max_bytes: the most it may unpack to; the room on the disk is a limit too.
        where: what messages name, else the archive.

    Raises:
        StorageError: a member with an absolute path, ``..``, a drive, a backslash, a link or a special file, two
            members of one name, encryption, a damaged archive, far too many members or bytes. Nothing is left behind.
    """
    where = where or archive
    try:
        with zip_errors(), publish_folder(folder, replace=False) as fresh, zipfile.ZipFile(archive) as opened:
            members = [(member, fresh / _safe_name(member, where)) for member in opened.infolist()]
            _require_modest([member for member, _ in members], archive.stat().st_size, fresh, max_bytes, where)
            [(name, count)] = Counter(str(target).lower() for _, target in members).most_common(1) or [("", 1)]
            if count > 1:
                raise StorageError("two members have one name", where=where, got=Path(name).name, remedy=_REMEDY)
            for member, target in members:  # all were looked at before anything is written
                if member.is_dir():
                    target.mkdir(parents=True, exist_ok=True)
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                with opened.open(member) as source, target.open("xb") as stream:
                    shutil.copyfileobj(source, stream, 2**20)
    except zipfile.BadZipFile as error:
        raise StorageError("this zip is damaged", where=where, got=str(error), remedy="copy it again") from error


def _require_modest(
    members: list[zipfile.ZipInfo], packed: int, folder: Path, max_bytes: int | None, where: object
) -> None:
    size = sum(one.file_size for one in members)  # zipfile never unpacks more of a member than the size it states
    most = min(_MAX_RATIO * packed + 2**20, shutil.disk_usage(folder).free, max_bytes or sys.maxsize)
    if len(members) > _MAX_MEMBERS or size > most:
        raise StorageError(
            "this zip unpacks to far more than it should, or than the disk has room for",
            where=where,
            got=f"{len(members):,} members of {size:,} bytes in {packed:,}",
            expected=f"at most {_MAX_MEMBERS:,} members and {most:,} bytes",
            remedy=_REMEDY,
        )


def _safe_name(member: zipfile.ZipInfo, where: object) -> str:
    # zipfile shortens names at a NUL and may change separators: the name as stored is what is judged
    name = member.orig_filename
    path = PurePosixPath(name)
    file_type = stat.S_IFMT(member.external_attr >> 16)
    strange = path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or ":" in name
    if strange or not path.parts:
        problem = "a member would be written outside the folder, or has a name with \\, : or NUL"
    elif file_type not in (0, stat.S_IFREG, stat.S_IFDIR):
        problem = "a member is a link or a special file"
    elif member.flag_bits & 1:
        problem = "a member is encrypted"
    else:
        return str(path)
    raise StorageError(problem, where=where, got=f"{name!r:.120}", remedy=_REMEDY)
