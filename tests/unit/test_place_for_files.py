"""Files of tests lie in memory only where that has room and nobody has said otherwise (tests/support/files.py)."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from tests.support import files


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TMPDIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", "/usual")
    monkeypatch.setattr(files, "MEMORY", tmp_path)
    monkeypatch.setattr(files, "LEAST_FREE_BYTES", 1)


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="what is free is not known")
def test_memory_is_taken_where_it_has_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert files.place_for_files() == str(tmp_path)
    monkeypatch.setattr(files, "LEAST_FREE_BYTES", 2**60)
    assert files.place_for_files() == "/usual"


def test_memory_is_not_taken_where_it_is_unwanted_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "own"))
    assert files.place_for_files() == "/usual"
    monkeypatch.delenv("TMPDIR")
    monkeypatch.setattr(files, "MEMORY", tmp_path / "none")
    assert files.place_for_files() == "/usual"


def test_memory_whose_size_is_not_known_or_that_holds_no_programs_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = os.statvfs(tmp_path)
    barred = os.statvfs_result([*here[:8], here.f_flag | os.ST_NOEXEC, *here[9:]])
    with monkeypatch.context() as other:
        other.setattr(os, "statvfs", lambda _: barred)
        assert files.place_for_files() == "/usual"
    monkeypatch.setattr(files, "_MEMINFO", tmp_path / "none")
    assert files.place_for_files() == "/usual"


def test_what_a_killed_session_left_is_removed_and_what_another_uses_is_not(tmp_path: Path) -> None:
    (first, holding), (second, other) = (files.begin_folder(str(tmp_path)) for _ in range(2))
    assert sorted(map(str, tmp_path.iterdir())) == sorted([first, second])
    holding.close()  # as the system does when its process ends
    third, another = files.begin_folder(str(tmp_path))
    assert sorted(map(str, tmp_path.iterdir())) == sorted([second, third])
    other.close()
    another.close()
