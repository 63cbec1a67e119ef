from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.support.checkpoints import metadata_of, state_of
from tests.support.faults import FaultyProxy, faulty_proxy
from tests.support.gcs import Bucket

from liquid_llm import storage
from liquid_llm.checkpoint import upload
from liquid_llm.checkpoint.mirror import Mirror
from liquid_llm.checkpoint.store import CheckpointInfo, CheckpointStore, fetch_latest
from liquid_llm.checkpoint.upload import Uploader
from liquid_llm.errors import StorageError
from liquid_llm.storage.lease import LeaseLost


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def store(run_dir: Path) -> Iterator[CheckpointStore]:
    with CheckpointStore(run_dir, keep_last=2, log=print) as opened:
        yield opened


@pytest.fixture(autouse=True)
def quick_retries() -> Iterator[None]:
    before = storage.set_retry_policy(storage.RetryPolicy(attempts=3, first_seconds=0.01, max_seconds=0.02))
    yield
    storage.set_retry_policy(before)


@pytest.fixture
def remote(gcs: Bucket) -> str:
    return f"{gcs.uri}/out/run"


@pytest.fixture
def proxy(gcs: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """The same bucket, behind a server that fails on demand."""
    with faulty_proxy(gcs.base) as running:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", running.base)
        yield running


def save(store: CheckpointStore, step: int, *also_as: str) -> CheckpointInfo:
    return store.save(state_of(step), metadata_of(step), also_as=also_as)


def remote_names(remote: str) -> list[str]:
    return [info.name for info in storage.list_files(remote)]


def both(*names: str) -> list[str]:
    return sorted(name + suffix for name in names for suffix in (".pt", ".meta.json"))


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def same_files(run_dir: Path, remote: str) -> bool:
    local = {
        path.relative_to(run_dir).as_posix(): path.read_bytes()
        for path in run_dir.rglob("*")
        if path.is_file() and not path.name.startswith(".") and ".upload" not in path.parts
    }
    return {info.name: storage.read_bytes(info.uri) for info in storage.list_files(remote)} == local


# ------------------------------------------------------------------------------------------------------------ mirroring


def test_without_a_remote_nothing_is_done(store: CheckpointStore, run_dir: Path) -> None:
    with Uploader(run_dir, None) as uploader:
        uploader.enqueue_checkpoint(save(store, 1, "last"))
        assert threading.active_count() == 1 or not [t for t in threading.enumerate() if t.name == "uploader"]
    assert not (run_dir / ".upload").exists()


def test_the_mirror_equals_the_run_directory(store: CheckpointStore, run_dir: Path, remote: str) -> None:
    with Uploader(run_dir, remote, every_seconds=0.05) as uploader:
        for step in range(1, 6):
            with (run_dir / "metrics.jsonl").open("a") as stream:
                stream.write(f'{{"step": {step}}}\n')
            uploader.enqueue_checkpoint(save(store, step, "last", *(["best"] if step == 2 else [])))
            time.sleep(0.05)
        (run_dir / "tb").mkdir()
        (run_dir / "tb" / "events").write_bytes(b"e" * 1000)
        (run_dir / "student" / "sub").mkdir(parents=True)
        (run_dir / "student" / "sub" / "model.safetensors").write_bytes(b"w" * 1000)
    assert same_files(run_dir, remote)
    assert set(both("best", "last", "step-00000004", "step-00000005")) < set(remote_names(remote))
    assert not (run_dir / ".upload").exists()


def test_metrics_go_up_while_the_run_goes_on(run_dir: Path, remote: str, store: CheckpointStore) -> None:
    with Uploader(run_dir, remote, every_seconds=0.05):
        for text in ("one\n", "one\ntwo\n"):
            (run_dir / "metrics.jsonl").write_text(text)
            wait_for(
                lambda text=text: (
                    storage.exists(f"{remote}/metrics.jsonl")
                    and storage.read_bytes(f"{remote}/metrics.jsonl") == text.encode()
                )
            )  # type: ignore[misc]


def test_enqueueing_does_not_wait_for_the_line(
    store: CheckpointStore, run_dir: Path, remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = threading.Event()
    sent = Mirror.send_checkpoint

    def slow(*arguments: Any) -> None:
        assert line.wait(20)
        sent(*arguments)

    monkeypatch.setattr(Mirror, "send_checkpoint", slow)
    with Uploader(run_dir, remote) as uploader:
        began = time.monotonic()
        for step in range(1, 6):
            uploader.enqueue_checkpoint(save(store, step, "last"))
        assert time.monotonic() - began < 5
        assert not remote_names(remote)
        line.set()
    # what was forgotten before its turn is not sent; "last" is sent once, as it is now; staged data is let go of
    assert remote_names(remote) == both("last", "step-00000004", "step-00000005")
    assert same_files(run_dir, remote)


def test_how_long_a_checkpoint_is_on_its_way_is_that_of_the_last_one(
    store: CheckpointStore, run_dir: Path, remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pretended line of 1 kB/s: its clock goes on by what is sent."""
    now, send = [0.0], storage.upload

    def slowly(path: Path, target: str) -> None:
        send(path, target)
        now[0] += path.stat().st_size / 1e3

    monkeypatch.setattr("liquid_llm.checkpoint.mirror.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(storage, "upload", slowly)
    with Uploader(run_dir, None) as nowhere:
        assert nowhere.expected_seconds(240_000_000) == 0.0
    with Uploader(run_dir, remote) as uploader:
        assert uploader.expected_seconds(240_000_000) == 1.0, "assumed"
        uploader.enqueue_checkpoint(save(store, 1, "last"))
        wait_for(lambda: uploader.expected_seconds(240_000_000) != 1.0)
        assert uploader.expected_seconds(10_000) == pytest.approx(10.0)


def test_data_is_sent_once_and_copied_there(
    store: CheckpointStore, run_dir: Path, remote: str, proxy: FaultyProxy
) -> None:
    with Uploader(run_dir, remote) as uploader:
        uploader.enqueue_checkpoint(store.save(state_of(1, 256), metadata_of(1), also_as=("last", "best", "final")))
    size = (run_dir / "last.pt").stat().st_size
    uploaded = sum(one.num_bytes for one in proxy.requests if "/upload/" in one.path)
    assert size < uploaded < 1.1 * size
    assert len([one for one in proxy.requests if "rewriteTo" in one.path]) == 3
    assert same_files(run_dir, remote)


def test_a_sidecar_in_the_mirror_always_has_its_data(
    store: CheckpointStore, run_dir: Path, remote: str, proxy: FaultyProxy
) -> None:
    """Whatever the mirror holds between two requests, a sidecar there belongs to the data beside it."""
    with Uploader(run_dir, remote) as uploader:
        for step in (1, 2, 3):
            uploader.enqueue_checkpoint(save(store, step, "last", "best"))
            wait_for(lambda: not uploader._waiting and uploader._doing is None)
    order = [
        (one.method, one.object_name)
        for one in proxy.requests
        if one.method in ("POST", "PUT", "DELETE") and one.object_name
    ]
    for name in ("last", "best"):
        sidecar, data = f"out/run/{name}.meta.json", f"out/run/{name}.pt"
        events = [(method, what) for method, what in order if what in (sidecar, data)]
        assert events == [("DELETE", sidecar), ("POST", data), ("POST", sidecar)] * 3


# ------------------------------------------------------------------------------------------------------------ failures


def test_what_fails_is_said_at_once_and_tried_again(
    store: CheckpointStore, run_dir: Path, remote: str, proxy: FaultyProxy
) -> None:
    said: list[str] = []
    with Uploader(run_dir, remote, retry_seconds=0.1, log=said.append) as uploader:
        proxy.fail(503, path="/upload/")
        uploader.enqueue_checkpoint(save(store, 1, "last"))
        wait_for(lambda: bool(said))
        assert "503" in said[0]
        assert "tried again" in said[0]
        proxy.heal()
        wait_for(lambda: set(remote_names(remote)) == set(both("last", "step-00000001")))
    assert same_files(run_dir, remote)


def test_what_failed_is_tried_again_at_the_end(
    store: CheckpointStore, run_dir: Path, remote: str, proxy: FaultyProxy
) -> None:
    said: list[str] = []
    with Uploader(run_dir, remote, retry_seconds=10_000, log=said.append) as uploader:
        proxy.fail(403, path="/upload/")
        uploader.enqueue_checkpoint(save(store, 1, "last"))
        wait_for(lambda: len(said) == 2)
        proxy.heal()
    assert same_files(run_dir, remote)


def test_staged_data_goes_once_it_is_sent(store: CheckpointStore, run_dir: Path, remote: str) -> None:
    with Uploader(run_dir, remote) as uploader:
        uploader.enqueue_checkpoint(save(store, 1, "last"))
        wait_for(lambda: not list((run_dir / ".upload").iterdir()))
        assert set(remote_names(remote)) == set(both("last", "step-00000001"))


def test_what_failed_to_the_last_is_listed_and_tried_once_more_by_the_next_run(
    store: CheckpointStore, run_dir: Path, remote: str, proxy: FaultyProxy
) -> None:
    proxy.fail(403, path="/upload/")
    (run_dir / "metrics.jsonl").write_text("{}\n")
    uploader = Uploader(run_dir, remote, log=lambda _: None)
    uploader.enqueue_checkpoint(save(store, 1, "last"))
    with pytest.raises(StorageError, match=rf"{remote}: the mirror lacks 3 .* run the same command again") as caught:
        uploader.close()
    for name in ("step-00000001.pt", "last.pt", "metrics.jsonl"):
        assert name in str(caught.value)
    uploader.close()  # a second call has nothing to add
    proxy.heal()
    with Uploader(run_dir, remote):
        pass
    assert same_files(run_dir, remote)


def test_who_is_asked_to_stop_meanwhile_is_not_waited_for(
    store: CheckpointStore, run_dir: Path, remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is the last look at the mirror, which may hang as well."""
    line, stopped_at = threading.Event(), [float("inf")]
    monkeypatch.setattr(Mirror, "missing", lambda *_: line.wait(30) and [])
    uploader = Uploader(run_dir, remote)
    uploader.enqueue_checkpoint(save(store, 1, "last"))
    wait_for(lambda: set(remote_names(remote)) == set(both("last", "step-00000001")))
    threading.Timer(0.3, lambda: stopped_at.__setitem__(0, time.monotonic() + 0.1)).start()
    began = time.monotonic()
    with pytest.raises(StorageError, match=r"lacks 1 .*: the list of what is there"):
        uploader.close(until=lambda: stopped_at[0])
    line.set()
    assert time.monotonic() - began < 15


def test_what_another_has_taken_over_gets_nothing_more(store: CheckpointStore, run_dir: Path, remote: str) -> None:
    lost: list[LeaseLost] = []

    class Fence:
        def require(self) -> None:
            if lost:
                raise lost[0]

        check = require

    (run_dir / "metrics.jsonl").write_text("{}\n")
    uploader = Uploader(run_dir, remote, every_seconds=0.05, lease=Fence())  # type: ignore[arg-type]
    uploader.enqueue_checkpoint(save(store, 1, "last"))
    wait_for(lambda: set(both("last", "step-00000001")) < set(remote_names(remote)))
    uploader.check()
    lost.append(LeaseLost("taken over", where=remote))
    before = {info.name: storage.read_bytes(info.uri) for info in storage.list_files(remote)}
    (run_dir / "metrics.jsonl").write_text("{}\n{}\n")
    uploader.enqueue_checkpoint(save(store, 2, "last"))
    with pytest.raises(LeaseLost, match="taken over"):
        uploader.check()
    with pytest.raises(LeaseLost, match="taken over"):
        uploader.close()
    assert {info.name: storage.read_bytes(info.uri) for info in storage.list_files(remote)} == before


def test_what_was_published_in_the_moment_of_a_takeover_is_taken_back(
    store: CheckpointStore, run_dir: Path, remote: str
) -> None:
    """The owner is paused between its look at the lease and the write: the look after it finds that out."""
    looks = iter([True, True, False])

    def fence() -> None:
        if not next(looks):
            raise LeaseLost("taken over", where=remote)

    info = save(store, 1)
    with pytest.raises(LeaseLost):
        Mirror(run_dir, remote, fence).send_checkpoint(info.name, info.path, info.metadata)
    assert remote_names(remote) == [f"{info.name}.pt"], "data without a sidecar counts for nothing"


def test_a_line_that_hangs_is_given_up_at_the_deadline(
    store: CheckpointStore, run_dir: Path, remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = threading.Event()
    monkeypatch.setattr(Mirror, "send_checkpoint", lambda *_: line.wait(20))
    uploader = Uploader(run_dir, remote)
    thread = uploader._thread
    uploader.enqueue_checkpoint(save(store, 1, "last"))
    began = time.monotonic()
    with pytest.raises(StorageError, match=r"lacks 2 .* after 0 s: step-00000001\.pt, last\.pt"):
        uploader.close(deadline_seconds=0.3)
    assert time.monotonic() - began < 5
    line.set()
    assert thread is not None
    thread.join(20)


def test_a_failing_run_still_sends_and_keeps_its_own_error(
    store: CheckpointStore, run_dir: Path, remote: str, proxy: FaultyProxy
) -> None:
    def failing_run(step: int) -> None:
        with Uploader(run_dir, remote, log=said.append) as uploader:
            uploader.enqueue_checkpoint(save(store, step))
            raise ZeroDivisionError

    said: list[str] = []
    with pytest.raises(ZeroDivisionError):
        failing_run(1)
    assert remote_names(remote) == both("step-00000001")
    proxy.fail(403, path="/upload/")
    with pytest.raises(ZeroDivisionError):
        failing_run(2)
    assert "step-00000002.pt" in said[-1]


def test_a_file_lost_in_the_mirror_is_noticed(store: CheckpointStore, run_dir: Path, remote: str) -> None:
    uploader = Uploader(run_dir, remote)
    uploader.enqueue_checkpoint(save(store, 1, "last"))
    wait_for(lambda: len(remote_names(remote)) == 4)
    storage.write_bytes(f"{remote}/last.pt", b"cut")
    with pytest.raises(StorageError, match=r"lacks 1 .*: last\.pt\. "):
        uploader.close()


def test_staged_data_is_not_hoarded_while_the_line_is_down(
    store: CheckpointStore, run_dir: Path, remote: str, proxy: FaultyProxy
) -> None:
    """With every upload refused, disk use is bounded by what retention keeps."""
    proxy.fail(403, path="/upload/")
    said: list[str] = []
    uploader = Uploader(run_dir, remote, retry_seconds=0.02, log=said.append)
    for step in range(1, 8):
        uploader.enqueue_checkpoint(save(store, step, "last"))
        wait_for(lambda: not uploader._waiting)
    wait_for(lambda: len(list((run_dir / ".upload").iterdir())) <= 3)
    with pytest.raises(StorageError):
        uploader.close()


def test_without_links_files_are_read_where_they_lie(
    store: CheckpointStore, run_dir: Path, remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    with Uploader(run_dir, remote) as uploader:
        for step in (1, 2, 3):
            uploader.enqueue_checkpoint(save(store, step, "last"))
    assert same_files(run_dir, remote)


# --------------------------------------------------------------------------------------------------- the next process


def test_what_a_killed_process_did_not_send_is_sent(store: CheckpointStore, run_dir: Path, remote: str) -> None:
    for step in (1, 2):
        save(store, step, "last")
    storage.upload(run_dir / "last.pt", f"{remote}/last.pt")  # data without its sidecar: killed in between
    with Uploader(run_dir, remote):
        pass
    assert same_files(run_dir, remote)


def test_a_damaged_checkpoint_is_not_sent(store: CheckpointStore, run_dir: Path, remote: str) -> None:
    save(store, 1)
    damaged = save(store, 2)
    damaged.path.write_bytes(b"damaged")
    with pytest.raises(StorageError, match=r"lacks 1 .*step-00000002\.pt"), Uploader(run_dir, remote):
        pass
    assert remote_names(remote) == both("step-00000001")


def test_checkpoints_of_a_history_that_restart_ended_leave_the_mirror(
    store: CheckpointStore, run_dir: Path, remote: str
) -> None:
    with Uploader(run_dir, remote) as uploader:
        uploader.enqueue_checkpoint(save(store, 900, "last", "best", "final"))
    store.set_aside()
    with Uploader(run_dir, remote) as uploader:
        wait_for(lambda: not uploader._waiting and uploader._doing is None)
        assert len(remote_names(remote)) == 8  # nothing is removed before something newer is there
        uploader.enqueue_checkpoint(save(store, 3, "last"))
    assert remote_names(remote) == both("last", "step-00000003")


def test_the_best_of_before_stays_when_another_machine_goes_on(
    store: CheckpointStore, run_dir: Path, remote: str, tmp_path: Path
) -> None:
    with Uploader(run_dir, remote) as uploader:
        uploader.enqueue_checkpoint(save(store, 1, "best"))
        uploader.enqueue_checkpoint(save(store, 2, "last"))
    elsewhere = tmp_path / "elsewhere"
    with CheckpointStore(elsewhere, 2) as other:
        assert fetch_latest(remote, elsewhere) is not None
        with Uploader(elsewhere, remote) as uploader:
            uploader.enqueue_checkpoint(other.save(state_of(3), metadata_of(3), also_as=("last",)))
    assert remote_names(remote) == both("best", "last", "step-00000002", "step-00000003")


# ------------------------------------------------------------------------------------------------------------- fetching


def fill(store: CheckpointStore, run_dir: Path, remote: str) -> None:
    with Uploader(run_dir, remote) as uploader:
        for step in (1, 2, 3):
            (run_dir / "metrics.jsonl").write_text("row\n" * step)
            uploader.enqueue_checkpoint(save(store, step, "last"))


@pytest.mark.parametrize("base", ["gcs", "memory"])
def test_the_newest_is_fetched_with_its_metrics(
    store: CheckpointStore, run_dir: Path, gcs: Bucket, tmp_path: Path, base: str
) -> None:
    remote = f"{gcs.uri}/r" if base == "gcs" else f"memory://{tmp_path.name}/r"
    fill(store, run_dir, remote)
    fresh = tmp_path / "fresh"
    with CheckpointStore(fresh, 2) as other:
        fetched = fetch_latest(remote, fresh)
        assert fetched is not None
        assert fetched == other.latest()
        assert other.load(fetched)[0]["step"] == 3
    assert (fresh / "metrics.jsonl").read_text() == "row\n" * 3


def test_only_something_newer_is_fetched(store: CheckpointStore, run_dir: Path, remote: str, tmp_path: Path) -> None:
    fill(store, run_dir, remote)
    assert fetch_latest(remote, tmp_path / "fresh", newer_than=3) is None
    assert fetch_latest(remote, tmp_path / "fresh", newer_than=2) is not None
    assert fetch_latest(f"{remote}/nothing", tmp_path / "fresh") is None


def test_a_damaged_remote_one_is_skipped(store: CheckpointStore, run_dir: Path, remote: str, tmp_path: Path) -> None:
    fill(store, run_dir, remote)
    for name in ("last", "step-00000003"):
        storage.write_bytes(f"{remote}/{name}.pt", b"damaged")
    said: list[str] = []
    fetched = fetch_latest(remote, tmp_path / "fresh", log=said.append)
    assert fetched is not None
    assert fetched.step == 2
    assert len(said) == 2
    assert sorted(path.name for path in (tmp_path / "fresh").iterdir()) == ["metrics.jsonl", *both("step-00000002")]


def test_data_without_a_sidecar_is_fetched_where_it_is_whole_alone(
    store: CheckpointStore, run_dir: Path, remote: str, tmp_path: Path
) -> None:
    path = save(store, 1).path
    storage.upload(path, f"{remote}/step-00000001.pt")
    storage.write_bytes(f"{remote}/step-00000002.pt", path.read_bytes()[:-100])
    found = fetch_latest(remote, tmp_path / "fresh")
    assert found is not None
    assert (found.step, found.path.read_bytes()) == (1, path.read_bytes())


def test_watched_names_are_those_of_the_design() -> None:
    rows = {"metrics.jsonl", "samples.jsonl", "trackers.json", "tb", "log.txt"}
    assert set(upload.WATCHED) == rows | {"provenance", "summary.json", "report.html", "student"}
