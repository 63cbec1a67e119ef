from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support import crashing_saves, forked
from tests.support.checkpoints import metadata_of, state_of, trained_model
from tests.support.forked import Forked
from tests.support.limits import largest_file

from liquid_llm import storage
from liquid_llm.checkpoint import discovery
from liquid_llm.checkpoint.store import CheckpointInfo, CheckpointStore
from liquid_llm.errors import CheckpointError, StorageError


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def store(tmp_path: Path, said: list[str]) -> Any:
    with CheckpointStore(tmp_path / "run", keep_last=2, log=said.append) as opened:
        yield opened


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def complete_in(folder: Path) -> list[str]:
    """Names whose sidecar and data agree."""
    found = discovery.sidecars(folder)
    return [
        name for name, metadata in found.items() if storage.sha256(discovery.data_path(folder, name)) == metadata.sha256
    ]


def save(store: CheckpointStore, step: int, *also_as: str, kind: Any = "step") -> CheckpointInfo:
    return store.save(state_of(step), metadata_of(step), kind=kind, also_as=also_as)


# ------------------------------------------------------------------------------------------------------ saving, loading


def test_what_is_saved_is_loaded_bit_for_bit(store: CheckpointStore) -> None:
    model, optimizer = trained_model()
    state = {"student": model.state_dict(), "optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}
    written = metadata_of(12, lr=0.1 + 0.2)
    saved = store.save(state, written)
    info = store.latest()
    assert info == saved
    read, metadata = store.load(info)
    assert metadata.to_dict() == written.to_dict()
    assert info.metadata == replace(metadata, sha256=storage.sha256(info.path))
    assert torch.equal(read["random"], state["random"])
    torch.testing.assert_close(read["student"], dict(state["student"]), rtol=0, atol=0)
    assert read["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]


def test_in_file_metadata_equals_the_sidecar_apart_from_the_hash(store: CheckpointStore) -> None:
    info = save(store, 3, "last")
    inside = torch.load(info.path, weights_only=True)["metadata"]
    for name in info.names:
        sidecar = json.loads((store.run_dir / f"{name}.meta.json").read_text())
        assert sidecar.pop("sha256") == storage.sha256(store.run_dir / f"{name}.pt")
        assert inside | {"sha256": 0} == sidecar | {"sha256": 0}
    assert inside["sha256"] is None


def test_names_are_those_of_the_design(store: CheckpointStore) -> None:
    assert save(store, 2000).path.name == "step-00002000.pt"
    info = store.save(state_of(1), metadata_of(1, created="2026-01-01T02:00:00+02:00"), kind="time")
    assert info.path.name == "time-20260101T000000Z.pt"


def test_the_run_directory_is_made_with_its_parents(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path / "runs" / "today" / "run", keep_last=2) as store:
        assert save(store, 1).path.is_file()


def test_data_is_written_once(store: CheckpointStore) -> None:
    info = save(store, 1, "last", "best", "final")
    assert info.names == ("step-00000001", "last", "best", "final")
    assert len({(store.run_dir / f"{name}.pt").stat().st_ino for name in info.names}) == 1


def test_moving_a_name_leaves_the_others_alone(store: CheckpointStore) -> None:
    save(store, 1, "last", "best")
    save(store, 2, "last")
    assert discovery.read_checkpoint(store.run_dir / "best.pt")[0]["step"] == 1
    assert discovery.read_checkpoint(store.run_dir / "last.pt")[0]["step"] == 2


def test_giving_the_same_name_twice_changes_nothing(store: CheckpointStore) -> None:
    info = save(store, 1, "last")
    again = store.publish_as(replace(info, also_as=()), ("last", "final"))
    assert again.names == ("step-00000001", "last", "final")
    assert sorted(complete_in(store.run_dir)) == ["final", "last", "step-00000001"]
    assert len(names_in(store.run_dir)) == 6


def test_an_unknown_name_is_a_mistake_of_the_caller(store: CheckpointStore) -> None:
    with pytest.raises(ValueError, match="newest"):
        save(store, 1, "newest")


def test_copies_stand_in_where_links_are_impossible(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)  # as on FAT, or a bucket mounted as a folder
    save(store, 1, "last", "best")
    save(store, 2, "last")
    assert sorted(complete_in(store.run_dir)) == ["best", "last", "step-00000001", "step-00000002"]
    assert discovery.read_checkpoint(store.run_dir / "best.pt")[0]["step"] == 1


# ------------------------------------------------------------------------------------------------------------ retention


def test_the_newest_snapshots_are_kept_and_named_data_survives(store: CheckpointStore) -> None:
    save(store, 1, "best")
    for step in (2, 3):
        save(store, step, "last")
    save(store, 4, "last", kind="time")
    assert names_in(store.run_dir) == [
        f"{name}{suffix}"
        for name in ("best", "last", "step-00000003", "time-20260101T000004Z")
        for suffix in (".meta.json", ".pt")
    ]
    assert discovery.read_checkpoint(store.run_dir / "best.pt")[0]["step"] == 1


def test_two_snapshots_of_one_step_are_two(store: CheckpointStore) -> None:
    for step in (1, 2):
        save(store, step)
    info = save(store, 2, kind="time")
    assert complete_in(store.run_dir) == ["step-00000002", info.names[0]]


@pytest.mark.parametrize("whole", [True, False])
def test_of_a_snapshot_written_anew_the_whole_one_is_kept(store: CheckpointStore, whole: bool) -> None:
    """Killed with the old one set aside: whichever is complete stays, the new one where both are."""
    folder, name = store.run_dir, save(store, 7).name
    old = {suffix: (folder / f"{name}{suffix}").read_bytes() for suffix in (".pt", ".meta.json")}
    store.save(state_of(8), metadata_of(7), kind="step")
    new = (folder / f"{name}.pt").read_bytes()
    for suffix, content in old.items():
        (folder / f"{name}.replaced{suffix}").write_bytes(content)
    if not whole:
        (folder / f"{name}.pt").write_bytes(new[:-1])
    store.close()
    with CheckpointStore(folder, keep_last=2) as again:
        assert (folder / f"{name}.pt").read_bytes() == (new if whole else old[".pt"])
        assert again.latest().name == name
    assert not [one for one in names_in(folder) if ".replaced" in one]


def test_zero_keeps_all(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path, keep_last=0) as store:
        for step in range(5):
            save(store, step)
    assert len(complete_in(tmp_path)) == 5


def test_the_checkpoint_just_saved_is_never_dropped(store: CheckpointStore) -> None:
    """A snapshot of a later step (damaged, or of another history) neither counts nor is touched."""
    for step in (10, 11):
        save(store, step)
    for step in (5, 6, 7):
        save(store, step)
    assert complete_in(store.run_dir) == [f"step-{step:08d}" for step in (6, 7, 10, 11)]


def test_files_of_others_are_never_touched(tmp_path: Path) -> None:
    foreign = {
        "notes.meta.json": b"{}",
        "step-00000001.pt": b"someone else's",
        "mine.pt": b"x",
        "step-1.meta.json": b"?",
    }
    for name, data in foreign.items():
        (tmp_path / name).write_bytes(data)
    for _ in range(2):
        with CheckpointStore(tmp_path, keep_last=1) as store:
            for step in (3, 4):
                save(store, step, "last")
    assert {name: (tmp_path / name).read_bytes() for name in foreign} == foreign


def test_restart_sets_everything_aside(store: CheckpointStore) -> None:
    assert store.set_aside() is None
    save(store, 9, "last", "best")
    (store.run_dir / "metrics.jsonl").write_text("{}\n")
    folder = store.set_aside()
    assert folder is not None
    assert store.latest() is None
    assert sorted(complete_in(folder)) == ["best", "last", "step-00000009"]
    assert (folder / "metrics.jsonl").read_text() == "{}\n"
    save(store, 1)
    latest = store.latest()
    assert latest is not None
    assert latest.step == 1


# -------------------------------------------------------------------------------------------------------------- finding


def test_nothing_is_found_where_nothing_is(store: CheckpointStore) -> None:
    assert store.latest() is None


def test_latest_is_by_step_not_by_time_of_writing(store: CheckpointStore) -> None:
    save(store, 20)
    save(store, 3, "last")
    latest = store.latest()
    assert latest is not None
    assert latest.name == "step-00000020"


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "sidecar", "sidecar-garbage", "gone", "version"])
def test_a_damaged_checkpoint_is_reported_and_an_older_one_taken(
    store: CheckpointStore, said: list[str], damage: str
) -> None:
    save(store, 1)
    info = save(store, 2)
    sidecar = store.run_dir / f"{info.name}.meta.json"
    data = bytearray(info.path.read_bytes())
    if damage == "cut":
        info.path.write_bytes(data[:-1])
    elif damage == "flip":
        data[len(data) // 2] ^= 1
        info.path.write_bytes(data)
    elif damage == "empty":
        info.path.write_bytes(b"")
    elif damage == "sidecar":
        sidecar.unlink()
    elif damage == "sidecar-garbage":
        sidecar.write_text('{"step": 2')
    elif damage == "version":
        sidecar.write_text(sidecar.read_text().replace('"format_version": 1', '"format_version": 9'))
    else:
        info.path.unlink()
    latest = store.latest()
    assert latest is not None
    assert latest.step == 1
    if damage not in ("sidecar", "gone"):  # those are what an unfinished save looks like
        assert len(said) == 1
        assert info.name in said[0]


@pytest.mark.parametrize("damage", ["lost", "empty", "garbage", "a field", "no hash"])
def test_a_sidecar_is_made_again_beside_data_that_is_whole(
    store: CheckpointStore, said: list[str], damage: str
) -> None:
    save(store, 1)
    info = save(store, 2)
    sidecar = store.run_dir / f"{info.name}.meta.json"
    whole = sidecar.read_text()
    if damage == "lost":
        sidecar.unlink()
    else:
        was = {"a field": whole.replace('"step"', '"stup"'), "no hash": whole.replace("sha256", "sha25V")}
        sidecar.write_text({"empty": "", "garbage": whole[:30], **was}[damage])
    store.close()
    with CheckpointStore(store.run_dir, keep_last=2, log=said.append) as again:
        assert sidecar.read_text() == whole
        assert again.latest() == info
    assert len(said) == 1
    assert "is made again" in said[0]


def test_a_sidecar_of_a_newer_release_is_never_written_over(store: CheckpointStore) -> None:
    sidecar = store.run_dir / f"{save(store, 2).name}.meta.json"
    sidecar.write_text(sidecar.read_text().replace('"format_version": 1', '"format_version": 9'))
    newer = sidecar.read_text()
    store.close()
    with CheckpointStore(store.run_dir, keep_last=2, log=lambda _: None) as again:
        assert again.latest() is None
    assert sidecar.read_text() == newer


@pytest.mark.parametrize("at", [0, 0.3, 0.6, 0.99])
def test_no_sidecar_is_made_for_data_with_a_flipped_bit(store: CheckpointStore, at: float) -> None:
    info = save(store, 2)
    data = bytearray(info.path.read_bytes())
    data[int(at * len(data))] ^= 4
    info.path.write_bytes(data)
    sidecar = store.run_dir / f"{info.name}.meta.json"
    sidecar.unlink()
    store.close()
    with CheckpointStore(store.run_dir, keep_last=2, log=lambda _: None) as again:
        assert again.latest() is None
        assert again.remains() == [f"{info.name}.pt"]
    assert not sidecar.exists()
    assert info.path.read_bytes() == data


def test_what_is_left_of_a_replaced_snapshot_is_cleared_away(store: CheckpointStore) -> None:
    info = save(store, 2)
    (store.run_dir / f"{info.name}.replaced.pt").write_bytes(info.path.read_bytes())
    store.close()
    with CheckpointStore(store.run_dir, keep_last=2) as again:
        assert again.latest() == info
        assert again.remains() == [f"{info.name}.pt"]


def test_a_sidecar_whose_data_is_lost_is_not_cleared_away(store: CheckpointStore) -> None:
    save(store, 2).path.unlink()
    store.close()
    with CheckpointStore(store.run_dir, keep_last=2) as again:
        assert again.latest() is None
        assert again.remains() == ["step-00000002.pt"]


def test_one_damaged_file_under_many_names_is_read_once(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(store, 1)
    info = save(store, 2, "last", "best")
    with info.path.open("r+b") as stream:
        stream.write(b"damaged")
    read, sha256 = [], storage.sha256
    monkeypatch.setattr(storage, "sha256", lambda path: read.append(path) or sha256(path))
    latest = store.latest()
    assert latest is not None
    assert latest.step == 1
    assert len(read) == 2


def test_a_sidecar_of_another_file_is_refused_on_load(store: CheckpointStore) -> None:
    one, two = save(store, 1), save(store, 2)
    (store.run_dir / f"{one.name}.meta.json").write_bytes((store.run_dir / f"{two.name}.meta.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"sidecar does not belong to this file; got .*; expected .*\. .*\."):
        discovery.read_checkpoint(one.path)


def test_a_sidecar_with_other_values_is_refused_on_load(store: CheckpointStore) -> None:
    info = save(store, 1)
    sidecar = store.run_dir / f"{info.name}.meta.json"
    sidecar.write_text(sidecar.read_text().replace('"block_size": 512', '"block_size": 1024'))
    with pytest.raises(CheckpointError, match="other metadata"):
        discovery.read_checkpoint(info.path)


def test_a_state_dict_is_no_checkpoint_of_a_run(store: CheckpointStore) -> None:
    torch.save({"w": torch.ones(2)}, store.run_dir / "bare.pt")
    with pytest.raises(CheckpointError, match=r"bare\.pt.*not a checkpoint.*resume_gcs_uri"):
        discovery.read_checkpoint(store.run_dir / "bare.pt")


def test_a_checkpoint_without_a_student_is_refused(store: CheckpointStore) -> None:
    info = store.save({**state_of(1), "student": [1, 2]}, metadata_of(1))
    with pytest.raises(CheckpointError, match="no student"):
        store.load(info)


# -------------------------------------------------------------------------------------------------------------- locking


def test_two_runs_in_one_directory_are_refused_naming_the_process(store: CheckpointStore) -> None:
    with pytest.raises(StorageError, match=f"another run, process {os.getpid()}, is using") as caught:
        CheckpointStore(store.run_dir, 1)  # a lock belongs to an open file: this process can be its own rival
    assert str(store.run_dir) in str(caught.value)
    assert store.latest() is None  # and the first one goes on


def test_closing_lets_the_next_one_in(tmp_path: Path) -> None:
    CheckpointStore(tmp_path, 1).close()
    with CheckpointStore(tmp_path, 1), pytest.raises(StorageError, match="another run"):
        CheckpointStore(tmp_path, 1)
    CheckpointStore(tmp_path, 1).close()


def test_a_store_that_was_given_nothing_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for folder in ("made/deep", "there"):
        with CheckpointStore(tmp_path / folder, 1):
            assert (tmp_path / folder / ".lock").exists()
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "there"]


# ----------------------------------------------------------------------------------------------------------- bad disks


def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(store: CheckpointStore) -> None:
    save(store, 1, "last")
    before = names_in(store.run_dir)
    with largest_file(20_000), pytest.raises(StorageError, match=r"step-00000002\.pt: .*larger.*Free some space"):
        store.save(state_of(2, 256), metadata_of(2), also_as=("last",))
    assert names_in(store.run_dir) == before
    latest = store.latest()
    assert latest is not None
    assert latest.step == 1
    save(store, 2)  # and it goes on once there is room


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission_says_so(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="permission denied"):
        CheckpointStore(tmp_path / "run", 1)


def test_a_file_in_the_way_says_so(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(StorageError, match=r"run: "):
        CheckpointStore(tmp_path / "run", 1)


# ------------------------------------------------------------------------------------------------------------- crashes


def check_after_crash(folder: Path, least: int) -> int:
    """A complete checkpoint of the last acknowledged step or later is there, before and after tidying up."""
    found = discovery.latest_checkpoint(folder)
    assert found is not None, names_in(folder)
    assert found.step >= least
    for name, metadata in discovery.sidecars(folder).items():  # a sidecar never stands beside other data
        assert storage.sha256(discovery.data_path(folder, name)) == metadata.sha256, (name, names_in(folder))
    with CheckpointStore(folder, keep_last=2, log=lambda _: None) as store:
        tidied = store.latest()
        assert tidied is not None
        assert tidied.step >= found.step  # data that lacked no more than its sidecar has one now
        state, metadata = store.load(tidied)
        assert metadata.step == state["step"] == tidied.step
        assert torch.equal(state["student"]["w"], torch.full_like(state["student"]["w"], float(tidied.step)))
        left = [name for name in names_in(folder) if name.endswith(".tmp") or ".replaced" in name]
        assert not left
    return tidied.step


def script(*arguments: str) -> list[str]:
    return [str(Path(crashing_saves.__file__)), *arguments]


def environment() -> dict[str, str]:
    root = Path(crashing_saves.__file__).parents[2]
    return {**os.environ, "PYTHONPATH": f"{root}:{root / 'src'}"}


@pytest.fixture
def quick_path() -> Iterator[Path]:
    """A folder in memory where the system has one: a killed process leaves the same there, and fsync costs nothing."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


def test_killed_before_every_single_file_system_call(quick_path: Path) -> None:
    output = forked.run(script("points", str(quick_path)), env=environment(), check=True)
    results = [json.loads(line) for line in output.stdout.splitlines()]
    assert len(results) > 100
    for one in results:
        check_after_crash(Path(one["run"]), one["least"])


def test_killed_at_random_moments(quick_path: Path) -> None:
    rounds = 25
    with Forked(script("random", str(quick_path), str(rounds)), env=environment(), stdin=True, stderr=False) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        acknowledged, killed = 0, 0
        for line in process.stdout:
            if line.startswith("ACK"):
                acknowledged = int(line.split()[1])
                continue
            killed += 1
            step = check_after_crash(quick_path, acknowledged) if acknowledged else 0
            process.stdin.write(f"{step + 1}\n")
            process.stdin.flush()
    assert killed == rounds
    assert acknowledged > rounds / 2  # saves did get through in between
