"""TensorBoard shows a run's rows once, however often it was continued."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from tensorboard.summary.writer.record_writer import RecordWriter
from tests.support.failing_disk import fail_with, watch

from liquid_llm.errors import StorageError
from liquid_llm.metrics import MetricsWriter
from liquid_llm.trackers import open_trackers


def write_steps(folder: Path, steps: range, resume_step: int | None, run: int = 0) -> None:
    trackers = open_trackers(["tensorboard"], folder, resume_step)
    with MetricsWriter(folder, resume_step=resume_step, trackers=trackers) as writer:
        for step in steps:
            values = {"loss": 1.0 / step, "by_type": {"lm": {"ce": step * 0.5}}, "tokens_per_second": 100.0 + run}
            writer.write("train", step, {**values, "kd": None, "choice": "a word"})
            if step % 3 == 0:
                writer.write("eval", step, {"val_loss_student": 2.0 / step})


def series(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tb"))
    events.Reload()
    return [(event.step, round(event.value, 5)) for event in events.Scalars(tag)]


@pytest.mark.parametrize("earlier_writers", [0, 9])
def test_a_continued_run_is_shown_once(tmp_path: Path, earlier_writers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # The writers' running number is the last part of their files' names, where 10 comes before 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(earlier_writers))
    write_steps(tmp_path, range(1, 7), None)
    write_steps(tmp_path, range(5, 9), 4, run=1)
    assert series(tmp_path, "train/loss") == [(step, round(1 / step, 5)) for step in range(1, 9)]
    assert series(tmp_path, "train/by_type/lm/ce") == [(step, step * 0.5) for step in range(1, 9)]
    assert series(tmp_path, "eval/val_loss_student") == [(3, 0.66667), (6, 0.33333)]
    rates = dict(series(tmp_path, "train/tokens_per_second"))
    assert [rates[step] for step in range(1, 9)] == [100.0] * 4 + [101.0] * 4


def test_a_fresh_start_forgets_the_earlier_run(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 6), None)
    write_steps(tmp_path, range(1, 3), None, run=1)
    assert len(list((tmp_path / "tb").iterdir())) == 1
    assert [step for step, _ in series(tmp_path, "train/loss")] == [1, 2]


def test_events_from_a_clock_ahead_of_ours_are_named_in_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_steps(tmp_path, range(1, 3), None)
    (event_file,) = (tmp_path / "tb").iterdir()
    parts = event_file.name.split(".")
    parts[3] = str(int(parts[3]) + 3600)
    event_file.rename(event_file.with_name(".".join(parts)))
    write_steps(tmp_path, range(3, 5), 2)
    assert "ahead of this clock" in caplog.text


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        open_trackers(["tensorboard"], tmp_path / "file", None)


def test_a_full_disk_is_said_once_and_by_whoever_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[BaseException | None] = []
    monkeypatch.setattr(threading, "excepthook", lambda failure: said.append(failure.exc_value))
    (tracker,) = open_trackers(["tensorboard"], tmp_path, None)

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RecordWriter, "write", fail)
    with pytest.raises(StorageError, match="no space left"):
        tracker.log({"kind": "train", "step": 1, "loss": 1.0})
    assert said == []
    own = threading.Thread(target=fail)
    own.start()
    own.join()
    assert [type(one) for one in said] == [OSError]


def test_a_disk_that_has_no_room_for_the_first_event_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[BaseException | None] = []
    monkeypatch.setattr(threading, "excepthook", hook := lambda failure: said.append(failure.exc_value))
    (tmp_path / "tb").mkdir()
    with watch(tmp_path / "tb", fail_with(1, errno.ENOSPC)), pytest.raises(StorageError, match="no space left"):
        open_trackers(["tensorboard"], tmp_path, resume_step=1)
    assert said == []
    assert threading.excepthook is hook
