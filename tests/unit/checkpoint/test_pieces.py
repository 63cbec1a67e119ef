"""Checkpoints in pieces: which folder is whose, and what is found of one that is not as it was written."""

import dataclasses
from pathlib import Path

import pytest
from tests.support.checkpoints import metadata_of

from liquid_llm.checkpoint.metadata import FORMAT_VERSION, IN_PIECES, CheckpointMetadata
from liquid_llm.checkpoint.pieces import (
    describe,
    drop_unused,
    find_damage,
    find_unused,
    folder_name,
    join_pieces,
    piece_files,
    require_folder,
)
from liquid_llm.errors import CheckpointError, StorageError
from liquid_llm.storage import sha256


def in_pieces(step: int, created: str = "2026-11-27T03:00:00.000001+00:00") -> CheckpointMetadata:
    return dataclasses.replace(metadata_of(step), format_version=IN_PIECES, created=created)


def test_two_saves_of_one_step_in_one_second_have_two_folders() -> None:
    one, other = in_pieces(6), in_pieces(6, "2026-11-27T03:00:00.000002+00:00")
    assert folder_name(one) == "pieces-00000006-20261127030000000001"
    assert folder_name(one) != folder_name(other)


def test_pieces_to_which_no_checkpoint_leads_are_removed_and_nothing_else(tmp_path: Path) -> None:
    kept, gone = folder_name(in_pieces(6)), folder_name(in_pieces(4))
    for name in (kept, gone, "pieces-of-mine"):
        (tmp_path / name).mkdir()
    whole = dataclasses.replace(in_pieces(4), format_version=FORMAT_VERSION)
    drop_unused(tmp_path, [in_pieces(6), whole])
    assert {path.name for path in tmp_path.iterdir()} == {kept, "pieces-of-mine"}
    files = [f"{kept}/a", f"{gone}/a", f"{gone}/b", "last.pt", "pieces-of-mine/a"]
    assert find_unused(files, [in_pieces(6)]) == [f"{gone}/a", f"{gone}/b"]


def test_what_is_wrong_with_a_piece_is_said(tmp_path: Path) -> None:
    folder = tmp_path / folder_name(in_pieces(6))
    folder.mkdir()
    piece = folder / "shard-1.safetensors"
    piece.write_bytes(b"abc")
    (folder / "shard-1.safetensors.origin").write_text("a note of a download")
    listed = describe(folder, {piece.name: sha256(piece)})
    assert find_damage(listed, folder) is None
    assert list(piece_files(tmp_path, in_pieces(6))) == [f"{folder.name}/{piece.name}"]
    assert piece_files(tmp_path, metadata_of(6)) == {}
    for content, words in ((b"abd", "sha256"), (b"ab", "2 bytes instead of 3")):
        piece.write_bytes(content)
        assert words in str(find_damage(listed, folder))
    piece.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        join_pieces({"pieces": listed}, in_pieces(6), tmp_path, "last.pt")
    assert join_pieces({"student": {}}, metadata_of(6), tmp_path, "last.pt") == {"student": {}}


def test_a_host_that_does_not_share_the_run_directory_says_so(tmp_path: Path) -> None:
    require_folder(tmp_path)
    with pytest.raises(StorageError, match=r"does not see the run directory.*--local_workdir"):
        require_folder(tmp_path / "elsewhere")
