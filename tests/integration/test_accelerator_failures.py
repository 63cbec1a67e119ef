"""A device that runs full or is lost, through the real commands: what goes on, what is kept, how it ends."""

from __future__ import annotations

import gc
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.accelerator import NAME, install
from tests.support.tiny import QUICK, Tiny, build

from liquid_llm.checkpoint.store import CheckpointStore
from liquid_llm.cli.main import main
from liquid_llm.metrics import read_metrics, without_timings

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("accelerator", "few_to_collect")]

GIVEN: dict[str, object] = {
    "precision": "float32",
    "teacher_precision": "float32",
    "device": NAME,
    "batch_size": 8,
    "max_steps": 4,
    "lr": 1e-3,
    "save_every": 1,
    "eval_every": 2,
    "eval_tokens": 256,
    "grad_checkpoint": "false",
    "num_workers": 1,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    made = build(tmp_path_factory.mktemp("tiny"))
    assert main(["capture", *made.capture_words(**QUICK, device="cpu", teacher_precision="float32")]) == 0
    return made


@pytest.fixture(scope="module")
def whole(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on a device with room for everything."""
    output = tmp_path_factory.mktemp("whole")
    (output / "held").write_text(str(held_now()))
    with install().record() as log:
        assert main(["train", *tiny.train_words(output, **GIVEN)]) == 0
    (output / "launches").write_text(str(log.count("launch")))
    return output / "run"


@pytest.fixture(scope="module")
def cut(tiny: Tiny, whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on a device with less room; what was logged is in the file ``said`` beside it."""
    output = tmp_path_factory.mktemp("cut")
    heard, package = logging.FileHandler(output / "said"), logging.getLogger("liquid_llm")
    package.addHandler(heard)
    try:
        with install().memory_limit(limit_of(whole, 0.8)):
            assert main(["train", *tiny.train_words(output, **GIVEN)]) == 0
    finally:
        package.removeHandler(heard)
        heard.close()
    return output / "run"


def held_now() -> int:
    """Bytes that tests before this one left on the device, without what only waits to be collected."""
    gc.collect()
    return install().memory.allocated


def rows_of(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    return [without_timings(row) for row in read_metrics(run) if row["kind"] == kind]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    with CheckpointStore(run, keep_last=3) as store:
        found = store.latest()
        assert found is not None
        state, _ = store.load(found)
    return state["student"]


def limit_of(run: Path, share: float) -> int:
    """So much of what the run itself has held at most, beside what is held already."""
    peak = max(row["device_peak_memory_bytes"] for row in read_metrics(run) if row["kind"] == "train")
    before = int((run.parent / "held").read_text())
    return held_now() + int(share * (peak - before))


def passes_of(run: Path) -> list[int | None]:
    return [json.loads(path.read_text())["run"]["max_pass_tokens"] for path in sorted(run.glob("step-*.meta.json"))]


def test_a_run_that_runs_out_of_memory_goes_on_with_the_same_losses(whole: Path, cut: Path) -> None:
    assert "out of memory" in (cut.parent / "said").read_text()
    run = cut
    assert passes_of(run)[-1] is not None
    assert passes_of(whole) == [None] * len(passes_of(whole))
    assert len(rows_of(run)) == len(rows_of(whole)) == 4
    for mine, theirs in zip(rows_of(whole), rows_of(run), strict=True):
        for key in ("loss", "ce", "kd", "grad_norm"):
            assert math.isclose(mine[key], theirs[key], rel_tol=1e-4), (mine["step"], key)
        assert {key: mine[key] for key in ("tokens", "kd_coverage", "tokens_seen")} == {
            key: theirs[key] for key in ("tokens", "kd_coverage", "tokens_seen")
        }
    for mine, theirs in zip(rows_of(whole, "eval"), rows_of(run, "eval"), strict=True):
        assert mine["val_loss_student"] == pytest.approx(theirs["val_loss_student"], rel=1e-4)


def test_a_cut_is_kept_so_that_a_continued_run_has_the_same_bits_on_a_larger_device_too(
    tiny: Tiny, whole: Path, cut: Path, tmp_path: Path
) -> None:
    with install().memory_limit(limit_of(whole, 0.8)):
        first = tiny.train_words(tmp_path / "two", **GIVEN)
        # The same schedules, stopped after step 2 as a signal would.
        _stop_after(2, first)
    kept = passes_of(tmp_path / "two" / "run")[-1]
    assert kept is not None
    assert main(["train", *first]) == 0  # with room for all
    assert passes_of(tmp_path / "two" / "run")[-1] == kept
    assert rows_of(tmp_path / "two" / "run") == rows_of(cut)
    one, two = weights_of(cut), weights_of(tmp_path / "two" / "run")
    assert all(torch.equal(one[name], two[name]) for name in one)


def _stop_after(step: int, words: list[str]) -> None:
    from liquid_llm.jobs import train
    from liquid_llm.runtime import StopSignal
    from liquid_llm.wiring.recorder import Recorder

    original = Recorder.hooks
    signals: list[StopSignal] = []

    class Watched(StopSignal):
        def __init__(self) -> None:
            super().__init__()
            signals.append(self)

    def hooks(self: Recorder, *given: Any) -> Any:
        return [*original(self, *given), (lambda result: signals[0].request() if result.step == step else None, 1)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "hooks", hooks)
        patch.setattr(train, "StopSignal", Watched)
        assert main(["train", *words]) == 75


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_a_lost_device_ends_with_6_leaves_whole_checkpoints_and_the_run_goes_on_from_them(
    tiny: Tiny, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], share: float
) -> None:
    words = tiny.train_words(tmp_path, **GIVEN)
    launches = int((whole.parent / "launches").read_text())
    capsys.readouterr()
    with install().lost_after(int(share * launches)):
        assert main(["train", *words]) == 6
    message = capsys.readouterr().err
    assert "error: the device failed" in message
    assert "run the same command again" in message.lower()
    assert "Traceback" not in message
    run = tmp_path / "run"
    with CheckpointStore(run, keep_last=3) as store:
        found = store.latest()
        if found is not None:
            store.load(found)  # whole, by its hash
            assert found.step < 4
        assert (found is not None) == (share > 0.5)
    assert main(["train", *words]) == 0
    assert rows_of(run) == rows_of(whole)
    assert all(torch.equal(one, weights_of(whole)[name]) for name, one in weights_of(run).items())


def test_capture_on_a_small_device_writes_everything(tiny: Tiny, tmp_path: Path, caplog: Any) -> None:
    device = install()

    def words(name: str) -> list[str]:
        given = {"math_logits_dir": tmp_path / name / "math", "code_logits_dir": tmp_path / name / "code"}
        given["codec_options"] = "draws_t1=48,draws_t2=30,draws_t4=8"  # with more, the draws outweigh so tiny a teacher
        return ["capture", *tiny.capture_words(device=NAME, teacher_precision="float32", batch_size=16, **given)]

    before, memory = held_now(), device.memory
    memory.reset_peak()
    assert main(words("whole")) == 0
    limit = int(0.75 * (memory.peak - before)) + held_now()
    with device.memory_limit(limit):
        assert main(words("cut")) == 0
    assert "tokens a batch from now on" in caplog.text
    found = [sorted(path.name for path in (tmp_path / name).rglob("*.pt")) for name in ("whole", "cut")]
    assert found[0] == found[1]


def test_a_capture_for_which_there_is_no_room_ends_with_6_and_the_largest_consumers(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    device = install()
    few = tmp_path / "few.jsonl"
    few.write_text("".join((tiny.root / "math_tool.jsonl").read_text().splitlines(keepends=True)[:5]))
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text(json.dumps({"path": str(few), "type": "math_tool", "weight": 1.0}) + "\n")
    given = {"dataset_manifest": manifest, "math_logits_dir": tmp_path / "math", "code_logits_dir": None}
    words = ["capture", *tiny.capture_words(device=NAME, teacher_precision="float32", **given)]
    teacher_bytes = sum(path.stat().st_size for path in tiny.teacher.glob("*.safetensors"))
    with device.memory_limit(held_now() + teacher_bytes + 400 * 1024):
        assert main(words) == 6
    message = capsys.readouterr().err
    assert "do not fit" in message
    assert "teacher weights" in message
    assert "Traceback" not in message


def test_rows_report_and_summary_tell_the_devices_memory_from_the_hosts(whole: Path) -> None:
    for row in read_metrics(whole):
        if row["kind"] == "train":
            assert 0 < row["device_peak_memory_bytes"] <= row["device_reserved_bytes"] < row["peak_memory_bytes"]
    page = (whole / "report.html").read_text()
    assert "Peak device memory" in page
    assert "Peak host memory" in page
