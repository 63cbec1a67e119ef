"""What a run's ranks record: all of them count, score and decide together, the main one alone writes."""

from __future__ import annotations

import time
from pathlib import Path
from threading import Event, Timer
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.support.checkpoints import metadata_of
from tests.support.ranks import World

from liquid_llm.checkpoint.store import CheckpointInfo
from liquid_llm.distributed import Engine
from liquid_llm.errors import StorageError
from liquid_llm.framing import Framing
from liquid_llm.losses import LossOutput, Objective
from liquid_llm.metrics import StepAccumulator
from liquid_llm.passes import PassLimit
from liquid_llm.schedules import StepValues
from liquid_llm.training import Progress
from liquid_llm.wiring.recorder import Recorder, RunFiles, describe_evaluation
from liquid_llm.wiring.speech import Speech


class Written:
    """Stands for the metrics, the checkpoint store and the uploader: what was asked of them, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.sent_per_second = float("inf")  # as without a mirror

    def write(self, kind: str, step: int, row: dict[str, Any]) -> dict[str, Any]:
        self.calls.append((kind, step, row.get("loss", row.get("val_loss_student"))))
        return row

    def sync(self) -> None:
        self.calls.append(("sync",))

    def save(self, state: dict[str, Any], metadata: Any, *, kind: str, also_as: tuple[str, ...], **_: Any) -> Any:
        self.calls.append((kind, metadata.step, also_as, state["accumulator"]["sums"][0][0]))
        return CheckpointInfo(Path(__file__), metadata, also_as)

    def publish_as(self, info: Any, names: tuple[str, ...]) -> Any:
        self.calls.append(("publish", info.step, names))
        return info

    def expected_seconds(self, num_bytes: int) -> float:
        return num_bytes / self.sent_per_second

    def check(self) -> None:
        """The mirror is this run's."""

    def enqueue_checkpoint(self, info: Any) -> None:
        self.calls.append(("upload", info.step))


class Plain(Recorder):
    """Metadata is another's subject."""

    def metadata(self) -> Any:
        return metadata_of(self.parts.progress.step)


class Evaluate:
    def __init__(self, **found: float) -> None:
        self.sets = {8: {"lm": [1]}}
        self.passes = PassLimit()
        self.found = found

    def __call__(self, student: Any) -> dict[str, Any]:
        return {"val_loss_student": 2.0, **self.found}


class InPieces(Plain):
    """Of a student of 1000 bytes, of which no rank has all."""

    _in_pieces = True  # type: ignore[assignment]

    def _own_tensors(self) -> dict[str, Any]:
        return {"student": {"w": torch.zeros(250)}}


def recorder(
    engine: Engine, folder: Path, clock: Any, written: Any = None, kind: type[Plain] = Plain
) -> tuple[Plain, Any]:
    written = written or Written()
    written.run_dir = folder
    config = SimpleNamespace(
        output=SimpleNamespace(metrics_every_steps=1, save_every_steps=0, save_every_minutes=1),
        optimizer=SimpleNamespace(steps=3, peak=0.1),
        evaluation=SimpleNamespace(every_steps=0),
    )
    module = SimpleNamespace(state_dict=dict)
    parts = SimpleNamespace(
        engine=engine,
        accumulator=StepAccumulator(("lm",), engine),
        evaluator=Evaluate(),
        speech=Speech(tokenizer=None, framing=Framing(None, 0), end_ids=()),
        progress=Progress(),
        student=SimpleNamespace(model=module, is_dealt_out=False),
        optimizer=module,
        device=torch.device("cpu"),
    )
    files = RunFiles(written, written, written) if engine.is_main else None
    return kind(config, parts, files, waited=lambda: 0.0, clock=clock), written


def take_step(one: Recorder, step: int, loss: float = 1.0) -> None:
    """What a step's hooks do."""
    one.parts.progress.step = step
    zero = torch.zeros(())
    output = LossOutput(torch.tensor(loss), zero, zero, zero, num_positions=1, num_signal=0)
    batch = SimpleNamespace(type="lm", num_tokens=2, num_learnt=2, padded_tokens=2)
    values = StepValues(0.1, Objective())
    scored = [SimpleNamespace(batch=batch, output=output)]
    save = bool(one.parts.engine.sum(torch.tensor(int(one.wants_save()))))  # as the ranks agree on it in a step
    result = SimpleNamespace(step=step, values=values, grad_norm=1.0, scored=scored, save=save)
    for hook, _ in one.hooks(SimpleNamespace(advance=lambda: None, note=lambda _: None)):
        hook(result)


def test_the_main_rank_alone_writes_what_all_have_summed_and_its_clock_is_enough_to_save(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("liquid_llm.wiring.recorder.describe_metadata", lambda metadata: "")

    def work(engine: Engine) -> tuple[list[Any], float]:
        now = [0.0]
        one, written = recorder(engine, tmp_path, lambda: now[0])
        for step in (1, 2):
            now[0] += 70.0 if engine.is_main == (step == 2) else 1.0  # its minute is over, and another's was before
            take_step(one, step, loss=1.0 + engine.rank)
        with one:
            one.stop()  # until the save of the last step is whole, which others would be written behind
            one.evaluate()
            one.finish()
        return written.calls, one.parts.progress.best_val_loss

    (main, best), (other, other_best) = World(2).run(work)
    assert other == []
    assert best == other_best == 2.0
    assert main == [
        ("train", 1, 1.5),
        ("train", 2, 1.5),
        ("sync",),
        ("time", 2, ("last",), 0.0),
        ("upload", 2),
        ("eval", 2, 2.0),
        ("sync",),
        ("step", 2, ("last", "best"), 0.0),
        ("upload", 2),
        ("publish", 2, ("final",)),
        ("upload", 2),
    ]


class SlowlyWritten(Written):
    """Saves are whole when the gate is open, or fail."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = Event()
        self.error: Exception | None = None

    def save(self, *arguments: Any, given_up: Any, **options: Any) -> Any:
        deadline = time.monotonic() + 20
        while not self.gate.wait(0.005) and not given_up():
            assert time.monotonic() < deadline, "nobody opened the gate"
        if self.error is not None or given_up():
            raise self.error or OSError("given up")
        return super().save(*arguments, **options)

    def saves(self) -> list[tuple[str, int]]:
        return [call[:2] for call in self.calls if call[0] in ("step", "time")]


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Any:
    monkeypatch.setattr("liquid_llm.wiring.recorder.describe_metadata", lambda metadata: "")
    caplog.set_level("INFO")
    return caplog


def test_a_time_save_is_not_waited_for_but_taken_when_the_one_before_is_whole(tmp_path: Path, described: Any) -> None:
    now = [0.0]
    one, written = recorder(Engine(), tmp_path, lambda: now[0], SlowlyWritten())
    with one:
        for step in range(1, 5):
            now[0] += 61.0
            take_step(one, step)  # due after each of them
        assert written.saves() == []
        written.gate.set()
        one._saver.wait()
        now[0] += 1.0
        take_step(one, 5)
    assert written.saves() == [("time", 1), ("time", 5)]


def test_training_ends_with_what_a_save_failed_with_at_the_next_step(tmp_path: Path, described: Any) -> None:
    now = [0.0]
    one, written = recorder(Engine(), tmp_path, lambda: now[0], SlowlyWritten())
    written.error = StorageError("the disk is full")

    def run() -> None:
        with one:
            now[0] += 61.0
            take_step(one, 1)
            now[0] += 1.0
            take_step(one, 2)  # it is under way
            written.gate.set()
            one._saver._work.result.exception()
            for step in (3, 4):
                now[0] += 1.0
                take_step(one, step)

    with pytest.raises(StorageError, match="full"):
        run()
    assert written.calls[-1][:2] == ("train", 3)


def test_a_stop_saves_this_step_in_place_of_the_save_under_way_where_there_is_time_for_one(
    tmp_path: Path, described: Any
) -> None:
    now = [0.0]
    one, written = recorder(Engine(), tmp_path, lambda: now[0], SlowlyWritten())
    one._saver.prepare = lambda *_: setattr(one._saver, "num_bytes", int(20 * 240e6))

    def open_the_gate() -> None:
        now[0] += 20.0
        written.gate.set()

    with one:
        now[0] += 61.0
        take_step(one, 1)
        now[0] += 1.0
        take_step(one, 2)
        Timer(0.2, open_the_gate).start()
        one.stop()
        assert written.saves() == [("step", 2)]
        assert "the save under way was given up" in described.text
        written.gate.clear()
        now[0] += 61.0
        take_step(one, 3)
        Timer(0.2, open_the_gate).start()
        one.stop()  # of this very step: it is waited for
    assert written.saves() == [("step", 2), ("time", 3)]


def test_a_save_that_takes_longer_than_a_machine_waits_is_said_at_the_start(tmp_path: Path, described: Any) -> None:
    for num_bytes, warned in ((int(29 * 240e6), False), (int(31 * 240e6), True)):
        described.clear()
        now = [0.0]
        one, _ = recorder(Engine(), tmp_path, lambda now=now: now[0], SlowlyWritten())
        one._saver.prepare = lambda *_, size=num_bytes, saver=one._saver: setattr(saver, "num_bytes", size)
        with one:
            for step in (1, 2):
                now[0] += 1.0
                take_step(one, step)
        text = "a save takes about 31 s: 6.93 GiB at 240 MB/s, as long as none was measured. A machine that leaves 30 s"
        assert (text in described.text) == warned
        assert described.text.count("a save takes") == warned


@pytest.mark.parametrize(("rate", "warned"), [(32.0, True), (40.0, False)])
def test_of_pieces_it_is_said_as_well_for_what_all_ranks_write(
    tmp_path: Path, described: Any, monkeypatch: pytest.MonkeyPatch, rate: float, warned: bool
) -> None:
    monkeypatch.setattr("liquid_llm.checkpoint.background.ASSUMED_BYTES_PER_SECOND", rate)
    now = [0.0]
    one, _ = recorder(Engine(), tmp_path, lambda: now[0], kind=InPieces)
    with one:
        now[0] += 1.0
        take_step(one, 1)
        assert ("a save takes about 31 s: 1,000 bytes" in described.text) == warned
        assert described.text.count("a save takes") == warned


@pytest.mark.parametrize(("sent_per_second", "warned"), [(600e6, False), (240e6, True)])
def test_419_million_parameters_are_saved_within_30_seconds_or_it_is_said_that_they_are_not(
    tmp_path: Path, described: Any, sent_per_second: float, warned: bool
) -> None:
    """5 GB take 21 s to a disk of 240 MB/s. As many to a mirror at that rate are too many; at 600 MB/s they are 8."""
    now = [0.0]
    one, written = recorder(Engine(), tmp_path, lambda: now[0], SlowlyWritten())
    written.sent_per_second = sent_per_second
    one._saver.prepare = lambda *_: setattr(one._saver, "num_bytes", 419_000_000 * 12)
    with one:
        now[0] += 1.0
        take_step(one, 1)
    text = "a save takes about 42 s: 4.68 GiB at 240 MB/s to the disk and 21 s more to the mirror, as long as none"
    assert (text in described.text) == warned
    assert ("a save takes" in described.text) == warned


def test_a_disk_that_proves_too_slow_is_said_after_the_first_save(tmp_path: Path, described: Any) -> None:
    now = [0.0]
    one, written = recorder(Engine(), tmp_path, lambda: now[0], SlowlyWritten())
    with one:
        now[0] += 61.0
        take_step(one, 1)
        assert "a save takes" not in described.text
        now[0] += 45.0
        written.gate.set()
    assert "a save takes about 45 s" in described.text
    assert "as measured" in described.text


def test_the_log_says_of_an_evaluation_what_was_asked_for(tmp_path: Path, caplog: Any) -> None:
    one, _ = recorder(Engine(), tmp_path, lambda: 0.0)
    asked = {"val_loss_student@16": 2.5, "val_kd": 0.25, "val_agreement": 0.5, "answers_right": 3, "answers": 20}
    one.parts.evaluator = Evaluate(**asked)
    with caplog.at_level("INFO"):
        one.evaluate()
    said = "held-out loss 2.000 · KL 0.250 · at 16 tokens 2.500 · agrees 50% · answers right 3/20"
    assert caplog.messages == [f"step 0 · {said}"]


def test_an_evaluation_names_the_teacher_where_it_was_asked_and_each_type() -> None:
    types = {"lm": {"val_loss": 3.0, "val_loss_teacher": 2.5}, "code": {"val_loss": 1.0}}
    row = {"val_loss_student": 2.0, "val_loss_teacher": 2.5, "by_type": types}
    of_types = "lm 3.000 (teacher 2.500), code 1.000"
    assert describe_evaluation(row) == f"held-out loss 2.000 (teacher 2.500) · {of_types}"
    partly = {**row, "val_loss_student_with_teacher": 3.0}
    assert describe_evaluation(partly) == f"held-out loss 2.000 · {of_types}", "2.0 is not of the teacher's texts"
