"""Objectives by type through the real command line: divergences from a store, a weight of zero, chosen positions."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.tiny import Tiny, build

from liquid_llm.cli.main import main
from liquid_llm.metrics import read_metrics, without_timings
from liquid_llm.teachers.online import OnlineTeacher
from liquid_llm.teachers.stored import StoredTeacher

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Maths stored with codec topk, code with tail."""
    tiny = build(tmp_path_factory.mktemp("tiny"))
    for codec, changes in (
        ("topk", {"code_logits_dir": None, "topk": 16}),
        ("tail", {"math_logits_dir": None}),
    ):
        words = tiny.capture_words(codec=codec, **changes)
        other = "code" if codec == "topk" else "math_tool"
        assert main(["capture", *words, f"--signal={other}=none"]) == 0
    return tiny


def train(tiny: Tiny, output: Path, **options: Any) -> list[dict[str, Any]]:
    assert main(["train", *tiny.train_words(output, **options)]) == 0
    return read_metrics(output / "run")


def by_type(rows: list[dict[str, Any]], kind: str, type: str, name: str) -> list[Any]:
    found = [row["by_type"].get(type) for row in rows if row["kind"] == kind]
    return [one[name] for one in found if one is not None and name in one]


def test_each_type_has_its_own_divergence_weight_and_temperature(tiny: Tiny, tmp_path: Path) -> None:
    rows = train(
        tiny,
        tmp_path / "out",
        max_steps=30,
        divergence_by_type="lm=jsd:beta=0.3,math_tool=decoupled_topk:k=16,code=tail_aware:k=4:beta=2",
        alpha_by_type="math_tool=0.9",
        temperature_by_type="math_tool=1.7,code=1",
    )
    for type in ("lm", "math_tool", "code"):
        values = by_type(rows, "train", type, "kd")
        assert len(values) > 2, type
        assert values[-1] < values[0], f"{type}: the student goes nearer"
    bound = -(0.3 * torch.tensor(0.3).log() + 0.7 * torch.tensor(0.7).log()).item()
    assert all(value < bound for value in by_type(rows, "train", "lm", "kd")), "a JSD is bounded"
    options = (tmp_path / "out" / "run" / "provenance" / "options.yaml").read_text()
    assert "tail_aware:k=4:beta=2" in options
    again = tmp_path / "again"
    words = [f"--config={tmp_path / 'out' / 'run' / 'provenance' / 'options.yaml'}", f"--output_gcs_uri={again}"]
    assert main(["train", *words]) == 0
    assert [without_timings(row) for row in read_metrics(again / "run")] == [without_timings(row) for row in rows]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"divergence": "reverse_kl"}, ["math_tool", "reverse_kl needs whole distributions", "--codec=full"]),
        ({"divergence_by_type": "math_tool=tail_aware"}, ["math_tool", "tail_aware", "--codec=tail"]),
        ({"divergence_by_type": "math_tool=decoupled_topk"}, ["math_tool", "16 ids", "--topk=32"]),
        ({"kd_positions": 1.2}, ["--kd_positions"]),
    ],
)
def test_what_a_store_cannot_answer_is_refused_before_a_step(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any], parts: list[str]
) -> None:
    assert main(["train", *tiny.train_words(tmp_path / "out", **options)]) == 2
    said = capsys.readouterr().err
    assert all(part in said for part in parts), said
    assert not read_metrics(tmp_path / "out" / "run")


def test_a_weight_of_zero_asks_no_teacher_but_validation_that_is_told_to(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of an experiment: the numbers of a run without teachers, and the teacher's distance if wanted."""
    asked: list[str] = []
    for teacher in (OnlineTeacher, StoredTeacher):
        prepare = teacher.prepare
        monkeypatch.setattr(
            teacher,
            "prepare",
            lambda self, batch, temperature, prepare=prepare: (
                asked.append(f"{batch.type} at {temperature:g}"),
                prepare(self, batch, temperature),
            )[1],
        )
    zero = {"kd_alpha_start": 0, "kd_alpha_end": 0, "max_steps": 8, "eval_every": 8}
    rows = train(tiny, tmp_path / "zero", **zero, eval_teacher="true")
    assert {one.partition(" at ")[2] for one in asked} == {"1"}, "only validation asks, and at T = 1"
    assert all(row["kd_coverage"] == 0.0 and row["kd"] is None for row in rows if row["kind"] == "train")
    assert all(by_type(rows, "eval", type, "val_kd") for type in ("lm", "math_tool", "code"))
    asked.clear()
    loaded: list[object] = []
    for opener in ("online.load_teacher", "stored.open_store"):
        monkeypatch.setattr(f"liquid_llm.teachers.{opener}", lambda *args, **options: loaded.append(args))
    alone = train(tiny, tmp_path / "alone", **zero)
    assert not asked, "no teacher is asked"
    assert not loaded, "nor even loaded"
    assert not [key for row in alone for key in row if "teacher" in key or key.startswith("val_kd")]
    assert [row["loss"] for row in rows if row["kind"] == "train"] == [
        row["loss"] for row in alone if row["kind"] == "train"
    ]
    assert [row["val_loss_student"] for row in rows if row["kind"] == "eval"] == [
        row["val_loss_student"] for row in alone if row["kind"] == "eval"
    ]
    monkeypatch.undo()
    none = {"lm_teacher_id": None, "math_logits_dir": None, "code_logits_dir": None}
    words = tiny.train_words(tmp_path / "none", **zero, **none)
    assert main(["train", *words, "--signal=lm=none,math_tool=none,code=none"]) == 0
    plain = read_metrics(tmp_path / "none" / "run")
    assert [row["loss"] for row in rows if row["kind"] == "train"] == [
        row["loss"] for row in plain if row["kind"] == "train"
    ]


def test_chosen_positions_are_the_share_asked_for_and_a_continued_run_chooses_the_same(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = tmp_path / "whole"
    rows = train(tiny, whole, max_steps=30, kd_positions=0.25, keep_last=9)
    last = [row for row in rows if row["kind"] == "train"][-10:]
    # So young a student, of such a learning rate, changes more from step to step than its positions differ.
    assert 0.1 < sum(row["kd_coverage"] for row in last) / len(last) <= 1
    assert {type for row in last for type in row["kd_min_entropy"]} == {"lm", "math_tool", "code"}
    killed = tmp_path / "killed"
    shutil.copytree(whole, killed)
    for path in (killed / "run").iterdir():  # as it was after step 15
        if path.is_file() and not path.name.startswith(("step-00000015", "metrics")):
            path.unlink()
    assert (killed / "run" / "step-00000015.pt").exists(), sorted(one.name for one in (whole / "run").iterdir())
    state = torch.load(killed / "run" / "step-00000015.pt", weights_only=True)
    assert set(state["selection"]["counts"]) == {"lm", "math_tool", "code"}
    assert main(["train", *tiny.train_words(killed, max_steps=30, kd_positions=0.25, keep_last=9)]) == 0
    mine, theirs = ([without_timings(row) for row in read_metrics(one / "run")] for one in (killed, whole))
    assert mine == theirs
    ends = [torch.load(one / "run" / "final.pt", weights_only=True) for one in (killed, whole)]
    assert all(torch.equal(ends[0]["student"][name], one) for name, one in ends[1]["student"].items())
    assert "changes its course" not in caplog.text
    assert main(["train", *tiny.train_words(killed, max_steps=30, keep_last=9)]) == 0
    assert "--kd_positions is 1.0, and was 0.25 in the run so far: the run changes its course" in caplog.text


def test_a_store_of_chosen_positions_is_smaller_and_serves_a_run(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Captured and read through the command lines: the others train on cross-entropy."""
    sizes = {}
    for share in (1, 0.25):
        store = tmp_path / str(share)
        words = tiny.capture_words(math_logits_dir=store, code_logits_dir=None, codec="tail", kd_positions=share)
        assert main(["capture", *words, "--signal=code=none"]) == 0
        sizes[share] = sum(path.stat().st_size for path in store.iterdir())
    assert sizes[0.25] < 0.4 * sizes[1]
    rows = train(tiny, tmp_path / "out", math_logits_dir=tmp_path / "0.25", max_steps=12)
    shares = by_type(rows, "train", "math_tool", "kd_coverage")
    assert shares
    assert all(0.2 < share < 0.35 for share in shares)
    assert by_type(rows, "eval", "math_tool", "val_kd")
    words = tiny.capture_words(math_logits_dir=tmp_path / "0.25", code_logits_dir=None, codec="tail")
    assert main(["capture", *words, "--signal=code=none"]) == 3
    assert "positions" in capsys.readouterr().err
