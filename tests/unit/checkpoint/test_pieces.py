"""Checkpoints in pieces: which folder is whose, how ranks write theirs behind the steps, what is found of damage."""

import dataclasses
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tests.support.checkpoints import metadata_of
from tests.support.ranks import World
from torch import Tensor

from liquid_llm.checkpoint import pieces
from liquid_llm.checkpoint.background import BackgroundSaver
from liquid_llm.checkpoint.discovery import latest_checkpoint, read_checkpoint
from liquid_llm.checkpoint.metadata import FORMAT_VERSION, IN_PIECES, CheckpointMetadata
from liquid_llm.checkpoint.pieces import (
    PieceWriter,
    drop_unused,
    find_damage,
    find_unused,
    folder_name,
    join_pieces,
    piece_files,
    require_folder,
    write_piece,
)
from liquid_llm.checkpoint.store import CheckpointStore
from liquid_llm.distributed import Engine
from liquid_llm.errors import CheckpointError, RankError, StorageError
from liquid_llm.sharding import read_tensors
from liquid_llm.storage import sha256

WHOLE = torch.arange(15.0).view(5, 3)


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
    listed = {piece.name: [3, sha256(piece)]}
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


@given(
    rows=st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(any),
    columns=st.integers(1, 3),
    dtypes=st.lists(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.int64]), min_size=1),
)
@settings(max_examples=10)
def test_torch_and_safetensors_read_what_each_rank_writes_of_its_rows(
    tmp_path_factory: pytest.TempPathFactory, rows: list[int], columns: int, dtypes: list[torch.dtype]
) -> None:
    folder = tmp_path_factory.mktemp("pieces")
    wholes = {f"student/{n}": torch.randn(sum(rows), columns).to(dtype) for n, dtype in enumerate(dtypes)}
    begin = 0
    for rank, count in enumerate(rows):
        own = {name: whole[begin : begin + count] for name, whole in wholes.items()}
        path = folder / f"{rank}.safetensors"
        digest = write_piece(path, own, dict.fromkeys(own, (begin, 0)), lambda: False)
        assert digest == sha256(path)
        begin += count
        read = load_file(path)
        assert all(torch.equal(read[name], one) for name, one in own.items() if count)
    found = read_tensors(folder)
    assert found.keys() == wholes.keys()
    assert all(torch.equal(found[name], one) for name, one in wholes.items())


class Ranks:
    """Two ranks in threads, each with its rows of one tensor, and what the main one alone has."""

    def __init__(self, run_dir: Path, engine: Engine, tensor: Tensor) -> None:
        self.run_dir, self.engine = run_dir, engine
        self.begin, self.end = ((0, 3), (3, 5))[engine.rank]
        self.tensors = {"student/w": tensor[self.begin : self.end].clone()}
        self.store = CheckpointStore(run_dir, keep_last=1) if engine.is_main else None
        self.saver = BackgroundSaver(self.store, torch.device("cpu"))

    def save(self, step: int) -> None:
        metadata = in_pieces(step)
        stack = ExitStack()
        names = self.engine.gather(0)  # both are here
        assert len(names) == 2
        if self.store is not None:
            self.run_dir.joinpath("folder").write_text(str(stack.enter_context(self.store.open_pieces(metadata))))
        self.engine.gather(0)
        folder = Path(self.run_dir.joinpath("folder").read_text())
        writer = PieceWriter(self.engine, folder, {"student/w": (self.begin, 0)}, stack)
        rest: dict[str, Any] = {"student": {"w": {"piece": "student/w"}}, "count": torch.tensor(step)}
        self.saver.save_in_pieces(writer, self.tensors, rest, metadata, also_as=("last",), began=0.0)
        rest["count"].add_(100)


def test_training_goes_on_while_ranks_write_and_the_checkpoint_is_there_when_all_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    real = write_piece

    def slow(path: Path, *rest: Any) -> str:
        assert "shard-00001" in path.name or gate.wait(60)
        return real(path, *rest)

    def work(engine: Engine) -> None:
        ranks = Ranks(tmp_path / "run", engine, WHOLE)
        with ranks.saver as saver:
            gate.set()
            ranks.save(1)
            saver.wait_for_own()
            engine.gather(0)
            saver.wait()
            engine.gather(0)
            gate.clear()
            ranks.tensors["student/w"].add_(100)
            ranks.save(2)
            ranks.tensors["student/w"].zero_()  # the run goes on
            if engine.is_main:
                saver.wait_for_own()
                assert saver.busy
                found = latest_checkpoint(tmp_path / "run")
                assert found is not None
                assert (found.step, found.name) == (1, "step-00000001")
                gate.set()
            saver.wait()
            assert not list((tmp_path / "run").glob(".*tmp")) or not engine.is_main
        if ranks.store is not None:
            ranks.store.close()

    monkeypatch.setattr(pieces, "write_piece", slow)
    World(2).run(work)
    state, metadata = read_checkpoint(tmp_path / "run" / "last.pt")
    assert metadata.step == 2
    assert torch.equal(state["student"]["w"], WHOLE + 100)
    assert state["count"] == 2
    assert [path.name[:15] for path in (tmp_path / "run").glob("pieces-*")] == ["pieces-00000002"]


def test_a_rank_that_cannot_write_leaves_the_checkpoint_before_and_nobody_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails at its next step; the main one hears of that in an exchange, as ``RankError``."""
    real, calls = write_piece, []

    def broken(path: Path, *rest: Any) -> str:
        calls.append(path.name)
        if calls.count(path.name) == 2 and "shard-00002" in path.name:
            raise OSError(28, "No space left on device")
        return real(path, *rest)

    def work(engine: Engine) -> None:
        ranks = Ranks(tmp_path / "run", engine, WHOLE)
        failure: Any = None
        try:
            with ranks.saver as saver:
                ranks.save(1)
                saver.wait()
                engine.gather(0)
                ranks.save(2)
                if engine.is_main:
                    raise RankError("another rank has failed", exit_code=4, speaks=False)
                saver.wait_for_own()
        except (RankError, StorageError) as error:
            failure = error
        assert ("no space left" in str(failure)) == (engine.rank == 1), failure
        if ranks.store is not None:
            ranks.store.close()

    monkeypatch.setattr(pieces, "write_piece", broken)
    World(2).run(work)
    found = latest_checkpoint(tmp_path / "run")
    assert found is not None
    assert found.step == 1
    assert torch.equal(read_checkpoint(tmp_path / "run" / "last.pt")[0]["student"]["w"], WHOLE)
    assert [path.name[:15] for path in (tmp_path / "run").glob("*pieces-*")] == ["pieces-00000001"]


def test_pieces_that_a_killed_process_was_writing_are_removed(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path, keep_last=1) as store, store.open_pieces(in_pieces(1)) as folder:
        left = tmp_path / f"{folder.name[:-5]}other.tmp"
    left.mkdir()
    (left / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half")
    with CheckpointStore(tmp_path, keep_last=1):
        assert not left.exists()
