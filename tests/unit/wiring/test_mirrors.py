"""What leaves the machine: the run directory to its mirror, events and the finished student where they are wanted."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest
from tests.support.checkpoints import metadata_of, state_of

from liquid_llm import storage
from liquid_llm.checkpoint.store import CheckpointStore
from liquid_llm.wiring.mirrors import Mirrors, send_what_is_lacking
from liquid_llm.wiring.places import Place

CHECKPOINT = {f"{name}.{suffix}" for name in ("step-00000001", "last") for suffix in ("pt", "meta.json")}
RUN = {"metrics.jsonl", "tb/events", "student/config.json"}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A run directory, and a mirror for it, its events and its student."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    run = tmp_path / "run"
    for name in RUN:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(name)
    return Place(run, "memory://mirror/run", tensorboard="memory://events", model="memory://model")


def there(uri: str) -> set[str]:
    return {info.name for info in storage.list_files(uri)}


def save(place: Place, mirrors: Mirrors | None = None) -> None:
    with CheckpointStore(place.run_dir, keep_last=2) as store:
        info = store.save(state_of(1), metadata_of(1), also_as=("last",))
    if mirrors is not None:
        mirrors.checkpoints.enqueue_checkpoint(info)


def test_everything_is_sent_and_the_student_only_when_the_run_is_finished(place: Place) -> None:
    with Mirrors(place, every_seconds=60) as mirrors:
        save(place, mirrors)
        mirrors.close()
    assert there("memory://mirror/run") == CHECKPOINT | RUN
    assert there("memory://events") == {"events"}
    assert not there("memory://model")
    with Mirrors(place, every_seconds=60) as mirrors:
        mirrors.finish()
    assert there("memory://model") == {"config.json"}


def test_nothing_is_sent_where_nothing_is_named(place: Place) -> None:
    with Mirrors(Place(place.run_dir, None), every_seconds=60) as mirrors:
        save(place, mirrors)
        mirrors.finish()
    send_what_is_lacking(Place(place.run_dir, None))
    assert not fsspec.filesystem("memory").store


def test_a_finished_run_sends_what_its_mirrors_lack_and_nothing_twice(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    save(place)
    with caplog.at_level("INFO"):
        send_what_is_lacking(place)
    assert there("memory://mirror/run") == CHECKPOINT | RUN
    assert (there("memory://events"), there("memory://model")) == ({"events"}, {"config.json"})
    assert len([line for line in caplog.messages if "lacks" in line]) == 3
    caplog.clear()
    (place.run_dir / "metrics.jsonl").write_text("a line more")
    with caplog.at_level("INFO"):
        send_what_is_lacking(place)
    assert ["memory://mirror/run lacks 1 files" in line for line in caplog.messages] == [True]
    assert storage.read_bytes("memory://mirror/run/metrics.jsonl") == b"a line more"
