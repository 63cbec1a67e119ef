"""Zips: names, links, sizes and bytes of their members."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

from tests.fuzz.bytes_to_choices import Choices, edit_bytes
from tests.fuzz.driver import attempt

from liquid_llm.preparation.formats import Reading, documents
from liquid_llm.storage import unpack_zip

_NAMES = (
    *("a.jsonl", "b/c.jsonl", "../x", "/x", "b/../../x", "c:x", "a\\b", "A.jsonl", "", "b/", "x\0y", "~/x", "b", "."),
    *("é.txt", "a" * 300, "d.json.gz", "__MACOSX/a.jsonl", "CON", "e/./f", "e//g"),
)
_MODES = (0, 0o100644, 0o120777, 0o040755, 0o020666, 0o010644, 0o140777)


def seeds() -> Iterator[bytes]:
    yield b""
    yield bytes([2, 0, 0, 1, 1, 1, 0])
    yield bytes(range(24))


def check(data: bytes, folder: Path) -> None:
    choices, stream = Choices(data), io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for _ in range(choices.below(4)):
            member = zipfile.ZipInfo("x")
            member.filename = member.orig_filename = choices.one(_NAMES)
            member.external_attr = choices.one(_MODES) << 16
            member.compress_type = choices.one((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
            content = choices.one((b'{"text": "a"}\n', b"../../outside", b"\0" * 2**20, b""))
            with archive.open(member, "w") as opened:
                opened.write(content)
    packed = stream.getvalue()
    while choices:
        packed = edit_bytes(packed, choices)
    path = folder / "a.zip"
    path.write_bytes(packed)
    (folder / "around").mkdir()
    attempt(lambda: unpack_zip(path, folder / "around" / "out", max_bytes=2**21))
    files = [one for one in folder.rglob("*") if one.is_symlink() or not one.is_dir()]
    outside = [one for one in files if one != path and (folder / "around" / "out") not in one.parents]
    assert not [one for one in outside if not one.name.endswith(".lock")]
    assert not [one for one in files if one.is_symlink()]
    for found in documents(str(path), Reading("lm"), lambda size: None):
        str(found).encode("utf-8", "surrogatepass")
