"""Kilobytes that stand for gigabytes, in every format that packs: refused, or read a bounded piece at a time."""

from __future__ import annotations

import io
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
import torch
import zstandard
from pyarrow import parquet

from liquid_llm.checkpoint.discovery import read_sidecar
from liquid_llm.checkpoint.files import read_archive
from liquid_llm.checkpoint.mending import read_whole
from liquid_llm.checkpoint.resume import read_student_weights
from liquid_llm.cli.parse import load_yaml
from liquid_llm.data import manifest as manifest_module
from liquid_llm.data.manifest import read_manifest
from liquid_llm.data.records import read_records
from liquid_llm.errors import CheckpointError, DataError, LiquidError
from liquid_llm.parsing import MAX_DIGITS, ParseError, parse_yaml
from liquid_llm.preparation.catalog import read_catalog
from liquid_llm.preparation.formats import Reading, documents
from liquid_llm.signal_store.pt import from_bytes
from liquid_llm.signal_store.records import RecordError
from liquid_llm.signal_store.store import open_store
from liquid_llm.storage.streams import CHUNK_BYTES, unpack
from liquid_llm.study.folder import StudyFolder

MIB = 2**20


@pytest.fixture(scope="module")
def zst_bomb() -> bytes:
    """256 MiB of nothing, in one chunk of a file."""
    packer, piece = zstandard.ZstdCompressor(level=1).compressobj(), bytes(MIB)
    return b"".join([*(packer.compress(piece) for _ in range(256)), packer.flush()])


def test_zst_comes_in_bounded_pieces(zst_bomb: bytes) -> None:
    assert len(zst_bomb) < CHUNK_BYTES
    sizes = list(map(len, unpack(io.BytesIO(zst_bomb), "zst")))
    assert sum(sizes) == 256 * MIB
    assert max(sizes) <= 64 * MIB


@pytest.mark.parametrize("count", [1, 200])
def test_zst_of_many_frames(count: int) -> None:
    frames = b"".join(zstandard.compress(b"%d\n" % number) for number in range(count))
    assert b"".join(unpack(io.BytesIO(frames), "zst")) == b"".join(b"%d\n" % number for number in range(count))


def repeated(folder: Path) -> Path:
    """64 rows of one text of 4 MiB, which is there once and packed well: 256 MiB when they are taken out."""
    path = folder / "bomb.parquet"
    table = pyarrow.table({"text": ["x" * 4 * MIB] * 64})
    parquet.write_table(table, path, compression="zstd", dictionary_pagesize_limit=2**30)
    return path


def test_a_parquet_bomb_is_refused_by_training_and_by_preparation(tmp_path: Path) -> None:
    path = repeated(tmp_path)
    assert path.stat().st_size < 50_000
    before = pyarrow.total_allocated_bytes()
    for read in (
        lambda: next(iter(read_records(str(path), "lm"))),
        lambda: next(documents(str(path), Reading("lm"), lambda size: None)),
    ):
        with pytest.raises(DataError, match="unpacks to far more than it should"):
            read()
    assert pyarrow.total_allocated_bytes() - before < MIB


def test_texts_that_repeat_are_no_bomb(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["the same text, again and again"] * 50_000}), path, compression="zstd")
    assert sum(1 for _ in read_records(str(path), "lm")) == 50_000


def test_a_member_of_a_zip_that_unpacks_a_thousandfold_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jsonl", bytes(16 * MIB))
    with pytest.raises(DataError, match=r"a\.jsonl unpacks to far more than it should"):
        list(documents(str(path), Reading("lm"), lambda size: None))


def packed_again(saved: bytes) -> bytes:
    """torch's archive with its members deflated, as it reads them too."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved)) as source, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.infolist():
            target.writestr(member.filename, source.read(member))
    return stream.getvalue()


def test_a_torch_file_that_unpacks_a_thousandfold_is_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = io.BytesIO()
    torch.save({"w": torch.zeros(4 * MIB)}, saved)
    bomb = packed_again(saved.getvalue())
    assert len(bomb) < 50_000
    path = tmp_path / "a.pt"
    path.write_bytes(saved.getvalue())
    assert read_archive(path)["w"].numel() == 4 * MIB
    path.write_bytes(bomb)
    monkeypatch.setattr(torch, "load", lambda *args, **options: pytest.fail("opened"))
    with pytest.raises(CheckpointError, match="unpacks to far more than it should; it was not opened"):
        read_archive(path)
    assert read_whole(path) is None
    with pytest.raises(RecordError, match="unpacks to far more"):
        from_bytes(bomb)


def test_a_record_of_more_values_than_are_stored_is_refused() -> None:
    saved = io.BytesIO()
    content = {"header": {"checksum": 0}, "payload": {"gaps": torch.zeros(1, dtype=torch.uint8).expand(2**50)}}
    torch.save(content, saved)
    with pytest.raises(RecordError, match="unreadable: ValueError"):
        from_bytes(saved.getvalue())


def huge(path: Path) -> str:
    """Half a gigabyte that takes no room on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        stream.write(b"{")
        stream.truncate(2**29)
    return str(path)


def as_model(path: Path) -> None:
    huge(path / "config.json")
    read_student_weights(str(path), path)


def as_store(path: Path) -> None:
    (path / "store.json").parent.mkdir()
    huge(path / "store.json")
    open_store(str(path))


READERS: dict[str, Callable[[Path], object]] = {
    "last.meta.json": lambda path: read_sidecar(Path(huge(path)).parent, "last"),
    "manifest.jsonl": lambda path: read_manifest(huge(path)),
    "datasets.yaml": lambda path: read_catalog(huge(path)),
    "config.yaml": lambda path: load_yaml(Path(huge(path))),
    "model": as_model,
    "store": as_store,
    "plan.json": lambda path: StudyFolder(Path(huge(path)).parent).read(path.name),
}


@pytest.mark.parametrize("name", READERS)
def test_a_file_far_too_large_is_not_read_to_its_end(name: str, tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(LiquidError):
        READERS[name](tmp_path / name)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # kilobytes: half of it


def test_a_manifest_has_no_more_entries_than_anybody_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_module, "_MAX_ENTRIES", 3)
    path, line = tmp_path / "m.jsonl", '{"path": "a", "type": "lm"}\n'
    path.write_text(line * 3)
    assert len(read_manifest(str(path))) == 3
    path.write_text(line * 4)
    with pytest.raises(DataError, match=r"m\.jsonl:4: this is no manifest; got more than 3 entries"):
        read_manifest(str(path))


def test_a_number_in_base_60_without_end_is_no_yaml() -> None:
    assert parse_yaml("a: 1:30") == {"a": 90}
    for text in ("1:" + "1:" * MAX_DIGITS + "1", "1:" + "1:" * MAX_DIGITS + "1.5"):
        with pytest.raises(ParseError, match="a number of thousands of digits"):
            parse_yaml(f"a: {text}")
    assert parse_yaml("a: " + "x" * 2 * MAX_DIGITS) == {"a": "x" * 2 * MAX_DIGITS}
