"""Unpacking a zip so that its members can never decide a path outside their folder."""

from __future__ import annotations

import shutil
import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from liquid_llm.errors import StorageError
from liquid_llm.storage.local import publish_folder

_REMEDY = "make the archive again from a plain folder"


def unpack_zip(archive: Path, folder: Path) -> None:
    """Unpack every member below ``folder``, which appears complete or not at all; one that is there stays.

    Raises:
        StorageError: a member with an absolute path, ``..``, a drive, a backslash, a link or a special file, two
            members of one name, encryption, a damaged archive, more than the disk has room for. Nothing is left behind.
    """
    try:
        with publish_folder(folder, replace=False) as fresh, zipfile.ZipFile(archive) as opened:
            _unpack_members(opened, archive, fresh)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise StorageError("this zip is damaged", where=archive, got=str(error), remedy="copy it again") from error


def _unpack_members(opened: zipfile.ZipFile, archive: Path, folder: Path) -> None:
    seen: set[str] = set()
    targets = []
    for member in opened.infolist():  # all are looked at before anything is written
        name = _safe_name(member, archive)
        if name.lower() in seen:
            raise StorageError("two members have one name", where=archive, got=member.filename, remedy=_REMEDY)
        seen.add(name.lower())
        targets.append((member, folder / name))
    # zipfile never unpacks more of a member than the size it states
    size, free = sum(member.file_size for member, _ in targets), shutil.disk_usage(folder).free
    if size > free:
        problem = "this zip holds more than the disk has room for"
        raise StorageError(problem, where=archive, got=f"{size:,} bytes", expected=f"at most {free:,} bytes")
    for member, target in targets:
        if member.is_dir():
            target.mkdir(parents=True, exist_ok=True)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        with opened.open(member) as source, target.open("xb") as stream:
            shutil.copyfileobj(source, stream, 2**20)


def _safe_name(member: zipfile.ZipInfo, archive: Path) -> str:
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
    raise StorageError(problem, where=archive, got=f"{name!r:.120}", remedy=_REMEDY)
