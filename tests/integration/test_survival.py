"""Signals, readers that leave, stores that die, and two machines on one output, under the real commands."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, tzinfo
from pathlib import Path

import pytest
from tests.support.faults import FaultyProxy, faulty_proxy
from tests.support.forked import Forked
from tests.support.gcs import Bucket
from tests.support.plain_stores import Overwriting, register
from tests.support.tiny import Tiny, build, start
from tests.support.undisturbed import require_same_run

from liquid_llm import storage
from liquid_llm.checkpoint.discovery import latest_checkpoint
from liquid_llm.checkpoint.files import HashingWriter
from liquid_llm.cli.main import main
from liquid_llm.training import Trainer
from liquid_llm.wiring import mirrors, recorder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Of one type, which needs no stored signal."""
    built = build(tmp_path_factory.mktemp("tiny"))
    built.manifest.write_text(built.manifest.read_text().splitlines()[0])
    return built


@pytest.fixture
def proxy(gcs: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    with faulty_proxy(gcs.base) as running:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", running.base)
        yield running


def words(tiny: Tiny, output: Path | str, **options: object) -> list[str]:
    of_lm = {"mc_teacher_id": None, "math_logits_dir": None, "code_logits_dir": None}
    short = {"max_steps": 6, "eval_every": 0, "eval_tokens": 64, "save_every": 0}
    return ["train", *tiny.train_words(output, **{**of_lm, **short, **options})]


def at_step(monkeypatch: pytest.MonkeyPatch, number: int, action: Callable[[], object]) -> None:
    """Have something happen in the middle of a step."""
    step = Trainer.step

    def doing(trainer):
        if trainer.progress.step == number - 1:
            action()
        return step(trainer)

    monkeypatch.setattr(Trainer, "step", doing)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_each_signal_that_asks_for_an_end_leaves_the_step_saved(
    number: int, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at_step(monkeypatch, 3, lambda: os.kill(os.getpid(), number))
    assert main(words(tiny, tmp_path)) == 75
    found = latest_checkpoint(tmp_path / "run")
    assert found is not None
    assert found.step == 3
    assert "stopped at step 3 of 6 with the state saved" in capsys.readouterr().err


def test_a_run_whose_log_nobody_reads_any_more_goes_on_to_its_end(tiny: Tiny, tmp_path: Path) -> None:
    process = start("liquid_llm", words(tiny, tmp_path, max_steps=40))
    assert process.stderr is not None
    assert process.stdout is not None
    for line in process.stderr:
        if "step 2/" in line:
            break
    process.stderr.close()
    process.stdout.close()
    assert process.wait(240) == 0
    assert (tmp_path / "run" / "final.meta.json").exists()


def test_a_store_that_dies_before_the_signal_costs_no_state_and_not_the_time_there_is(
    tiny: Tiny,
    gcs: Bucket,
    proxy: FaultyProxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the pauses between its retries as they are: a store that is asked for half a minute is not waited for."""
    monkeypatch.setattr(mirrors, "SENDING_SECONDS", 1.0)
    asked: list[float] = []

    def die() -> None:
        proxy.fail(503)
        asked.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    given = words(tiny, f"{gcs.uri}/out", local_workdir=tmp_path / "work", max_steps=8)
    with monkeypatch.context() as patch:
        at_step(patch, 5, die)
        assert main(given) == 75
    assert time.monotonic() - asked[0] < 20
    said = capsys.readouterr().err
    (run_dir,) = (tmp_path / "work").iterdir()
    assert f"{run_dir}: stopped at step 5 of 8 with the state saved" in said
    assert f"run the same command again on this machine: {gcs.uri}/out/run is not up to date" in said.lower()
    assert latest_checkpoint(run_dir).step == 5  # type: ignore[union-attr]
    proxy.heal()
    assert main(given) == 0
    there = {info.name: info.size for info in storage.list_files(f"{gcs.uri}/out/run")}
    assert there["final.pt"] == (run_dir / "final.pt").stat().st_size


def test_a_disk_that_fills_is_told_with_what_is_kept(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill() -> None:
        monkeypatch.setattr(HashingWriter, "write", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))

    at_step(monkeypatch, 4, fill)
    assert main(words(tiny, tmp_path, save_every=2)) == 4
    said = capsys.readouterr().err
    assert "no space left on the disk" in said
    assert "a checkpoint of step 2 is whole: what came after it is lost" in said
    assert latest_checkpoint(tmp_path / "run").step == 2  # type: ignore[union-attr]


def test_a_clock_that_is_set_back_changes_nothing_but_dates(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a day at every look; the names of checkpoints by the clock then fall while their steps grow."""
    assert main(words(tiny, tmp_path / "right", max_steps=6)) == 0
    days = itertools.count()

    class SetBack(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return datetime.now(tz) - timedelta(days=next(days))

    began = time.time()
    monkeypatch.setattr(recorder, "datetime", SetBack)
    monkeypatch.setattr(time, "time", lambda: began - 86400 * next(days))
    by_the_clock = {"save_every_minutes": 1e-6, "keep_last": 2}
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert main(words(tiny, tmp_path / "back", **by_the_clock)) == 75
    found = latest_checkpoint(tmp_path / "back" / "run")
    assert found is not None
    assert found.step == 4
    assert main(words(tiny, tmp_path / "back", **by_the_clock)) == 0
    assert next(days) > 10
    require_same_run(str(tmp_path / "right" / "run"), str(tmp_path / "back" / "run"))


@pytest.mark.parametrize("option", ["output_gcs_uri", "tensorboard_uri", "model_uri"])
def test_an_output_that_cannot_be_written_is_said_before_the_first_step(
    option: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Trainer, "step", lambda trainer: pytest.fail("a step was taken"))
    (tmp_path / "file").write_text("")
    places = {"output_gcs_uri": tmp_path / "out", option: f"{tmp_path}/file/below"}
    assert main(words(tiny, **{"output": places.pop("output_gcs_uri"), **places})) == 4
    assert "a part of the path is a file, not a folder" in capsys.readouterr().err
    if option != "output_gcs_uri":
        assert main(words(tiny, tmp_path / "zero", max_steps=0, **places)) == 0, (
            "nothing is tried where nothing is done"
        )


def test_a_store_without_leases_is_written_to_as_ever_and_that_is_said(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uri = f"{register(Overwriting)}://{tmp_path.name}/out"
    assert main(words(tiny, uri, local_workdir=tmp_path / "work", save_every=3)) == 0
    assert "do not start two runs with this output" in caplog.text
    there = {info.name: info.size for info in storage.list_files(f"{uri}/run")}
    (run_dir,) = (tmp_path / "work").iterdir()
    assert there["final.pt"] == (run_dir / "final.pt").stat().st_size


# A machine whose lease runs out soon, and who waits before its fifth step for a file.
MACHINE = """
import os, sys, time
from liquid_llm.cli.main import main
from liquid_llm.storage.lease import Lease
from liquid_llm.training import Trainer
Lease.__init__.__kwdefaults__.update(expires_seconds=8.0, beat_seconds=0.5)
step = Trainer.step
def waiting(trainer):
    while trainer.progress.step == 4 and not os.path.exists(sys.argv[1]):
        time.sleep(0.05)
    return step(trainer)
Trainer.step = waiting
sys.exit(main(sys.argv[2:]))
"""


def everything(uri: str) -> dict[str, bytes]:
    """All that is published; what one that was thought dead writes into its own old lease counts for nothing."""
    return {info.name: storage.read_bytes(info.uri) for info in storage.list_files(uri) if ".lease/" not in info.name}


def test_two_machines_on_one_output(
    tiny: Tiny, gcs: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second is refused; it goes on when the first is heard of no more; that one wakes, and publishes nothing."""
    uri = f"{gcs.uri}/out"

    def given(machine: str) -> list[str]:
        return words(tiny, uri, local_workdir=tmp_path / machine, max_steps=12, save_every=2, upload_interval=0.1)

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = Forked(["-c", MACHINE, str(tmp_path / "go"), *given("a")], env=environment, stdout=False)
    try:
        end = time.monotonic() + 240
        while not storage.exists(f"{uri}/run/step-00000004.meta.json"):
            assert time.monotonic() < end, "the first has saved nothing"
            assert first.poll() is None
            time.sleep(0.2)
        assert main(given("b")) == 4
        assert f"another run is writing to this output; got process {first.pid} on" in capsys.readouterr().err
        first.send_signal(signal.SIGSTOP)
        assert main(given("b")) == 0
        before = everything(uri)
        assert "run/final.meta.json" in before
        first.send_signal(signal.SIGCONT)
        (tmp_path / "go").touch()
        _, said = first.communicate(timeout=240)
        assert first.returncode == 4, said
        assert "another run has taken this output over, and nothing more is published there" in said
        assert everything(uri) == before
    finally:
        first.kill()
        first.communicate()
