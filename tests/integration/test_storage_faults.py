"""A bucket that fails under the real commands: what passes is waited for, what does not ends with exit code 4."""

import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.faults import CUT, LOST, FaultyProxy, faulty_proxy
from tests.support.gcs import Bucket
from tests.support.tiny import QUICK, Tiny, build

from liquid_llm import storage
from liquid_llm.cli.main import main
from liquid_llm.metrics import read_metrics
from liquid_llm.training import Trainer

pytestmark = pytest.mark.slow
PASSING = [429, 503, CUT, LOST]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tiny:
    built = build(tmp_path_factory.mktemp("tiny"))
    assert main(["capture", *built.capture_words(**QUICK)]) == 0
    return built


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    before = storage.set_retry_policy(storage.RetryPolicy(attempts=4, first_seconds=0.01, max_seconds=0.02))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    storage.set_retry_policy(before)


@pytest.fixture
def proxy(gcs: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    with faulty_proxy(gcs.base) as running:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", running.base)
        yield running


def capture_words(tiny: Tiny, uri: str) -> list[str]:
    return tiny.capture_words(math_logits_dir=f"{uri}/math", code_logits_dir=f"{uri}/code", logits_format="pt", **QUICK)


def short_words(tiny: Tiny, output: str, **options: object) -> list[str]:
    return tiny.train_words(output, **{"max_steps": 6, "eval_every": 0, "save_every": 2, **options})


@pytest.mark.parametrize("fault", PASSING)
def test_capture_waits_for_a_failure_that_passes(tiny: Tiny, gcs: Bucket, proxy: FaultyProxy, fault, capsys) -> None:
    proxy.fail(fault, times=2)
    proxy.fail(fault, times=3, path="/upload/")
    assert main(["capture", *capture_words(tiny, f"{gcs.uri}/signal")]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["written"], summary["failed"]) == (80, 0)
    stored = [one.name for one in storage.list_files(f"{gcs.uri}/signal") if "provenance/" not in one.name]
    kept = [name for name in stored if "/held_out/" not in name]
    assert len(kept) == 80 + 2
    assert len(stored) > len(kept) + 2, "what is held out is stored too, and described"


@pytest.mark.parametrize(
    ("fault", "words"), [(403, "permission denied"), (404, "does not exist"), (503, "unavailable")]
)
def test_capture_into_a_bucket_that_refuses_ends_with_4(
    tiny: Tiny, gcs: Bucket, proxy: FaultyProxy, fault, words, capsys
) -> None:
    proxy.fail(fault, path="/upload/")
    assert main(["capture", *capture_words(tiny, f"{gcs.uri}/signal")]) == 4
    error = capsys.readouterr().err
    assert words in error
    assert f"{gcs.uri}/signal/" in error
    proxy.heal()
    assert main(["capture", *capture_words(tiny, f"{gcs.uri}/signal")]) == 0


@pytest.mark.parametrize("fault", PASSING)
def test_training_waits_for_a_failure_that_passes(tiny: Tiny, gcs: Bucket, proxy: FaultyProxy, fault) -> None:
    proxy.fail(fault, times=3)
    proxy.fail(fault, times=3, path="/upload/")
    assert main(["train", *short_words(tiny, f"{gcs.uri}/out", local_workdir=tiny.root / f"work-{fault}")]) == 0
    there = {info.name for info in storage.list_files(f"{gcs.uri}/out/run")}
    assert {"final.pt", "final.meta.json", "metrics.jsonl", "report.html", "student/config.json"} <= there


def test_a_mirror_that_refuses_uploads_is_never_a_success(
    tiny: Tiny, gcs: Bucket, proxy: FaultyProxy, tmp_path: Path, capsys, caplog, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.step
    closes = iter([lambda: proxy.fail(403, path="/upload/")])  # with the first step: before, it is not begun
    monkeypatch.setattr(Trainer, "step", lambda trainer: (next(closes, lambda: None)(), step(trainer))[1])
    words = short_words(tiny, f"{gcs.uri}/out", local_workdir=tmp_path / "work")
    assert main(["train", *words]) == 4
    error = capsys.readouterr().err
    assert "final.pt" in error
    assert str(tmp_path / "work") in error
    assert "permission denied (403)" in caplog.text
    (final,) = (tmp_path / "work").rglob("final.pt")
    before = final.read_bytes()
    proxy.heal()
    assert main(["train", *words]) == 0  # nothing is trained again: what is there is sent
    there = {info.name: info.size for info in storage.list_files(f"{gcs.uri}/out/run")}
    assert there["final.pt"] == len(before) == final.stat().st_size


def test_a_slow_bucket_that_keeps_up_is_never_waited_for(
    tiny: Tiny, gcs: Bucket, proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record takes 60 ms to come and a step longer: but for the first ones, signal is there when it is needed."""
    assert main(["capture", *capture_words(tiny, f"{gcs.uri}/signal")]) == 0
    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda trainer: (time.sleep(0.2), step(trainer))[1])
    proxy.delay_seconds = 0.06
    folders = {"math_logits_dir": f"{gcs.uri}/signal/math", "code_logits_dir": f"{gcs.uri}/signal/code"}
    assert main(["train", *short_words(tiny, str(tmp_path), max_steps=12, save_every=0, **folders)]) == 0
    rows = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "train" and row["step"] > 2]
    waits = [row["signal_wait_seconds"] for row in rows if {"math_tool", "code"} & row["by_type"].keys()]
    assert len(waits) > 2
    assert statistics.median(waits) < proxy.delay_seconds / 4
