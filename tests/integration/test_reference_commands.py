"""The README's commands for the three faces, run word for word but for the number of steps, in the offline world.

The first of hybrid's is started as a reader's shell does, and so is the help of annealing's; the others, whose start
would be the same, are forked.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.support import readme
from tests.support.world import BUCKET, STAGE0_STUDENT, World

SIDECAR_FIELDS = {"step", "block_size", "kd_alpha", "kd_temperature", "alpha_schedule", "temp_schedule", "grad_accum"}
PROVENANCE = {"config", "manifest_snapshot", "data_readiness", "datasets_snapshot", "environment"}


def succeed(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return done


def rows(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def assert_complete(run: Path) -> None:
    """The run directory has every file a run leaves behind, and each checkpoint its sidecar."""
    for name in ("metrics.jsonl", "best.pt", "last.pt", "final.pt", "student/config.json", "report.html"):
        assert (run / name).is_file(), f"{name} is missing; there are {sorted(p.name for p in run.iterdir())}"
    for checkpoint in run.glob("*.pt"):
        sidecar = json.loads((run / f"{checkpoint.stem}.meta.json").read_text(encoding="utf-8"))
        assert sidecar.keys() >= SIDECAR_FIELDS
    assert {path.stem for path in (run / "provenance").iterdir()} >= PROVENANCE
    assert list((run / "tb").iterdir())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_hybrid_commands_run_as_written(fresh_world: World) -> None:
    capture = readme.command("stage1_hybrid.precompute_hybrid_logits")
    summary = json.loads(succeed(fresh_world.run(capture)).stdout.splitlines()[-1])
    assert (summary["written"], summary["skipped"], summary["failed"]) == (128, 0, 0)
    again = json.loads(succeed(fresh_world.run_forked(capture)).stdout.splitlines()[-1])
    assert (again["written"], again["skipped"]) == (0, 128)

    train = readme.command(
        "stage1_hybrid.cli",
        max_steps=4,
        warmup_steps=1,
        metrics_interval=1,
        eval_every=2,
        save_every=2,
        keep_old_logit_l2_fade_step=3,
        batch_size=2,
    )
    succeed(fresh_world.run_forked(train))
    (run,) = (fresh_world.bucket / "stage1" / "Checkpoints" / "vertex-runs").iterdir()
    assert_complete(run)
    steps = rows(run, "train")
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert {kind for row in steps for kind in row["by_type"]} <= {"lm", "math_tool", "code"}
    assert all(row["kd_coverage"] == 1.0 and row["kd_temperature"] == 2.0 for row in steps)
    assert steps[0]["kd_alpha"] == pytest.approx(0.7)
    assert steps[0]["l2"] == 0.0, "unchanged weights are where the reference student is"
    assert steps[1]["l2"] > 0.0
    assert steps[3]["l2"] == 0.0, "the term has faded out"
    place = f"gs://{BUCKET}/stage1/Checkpoints/vertex-runs/{run.name}"
    report = fresh_world.run_forked(f"liquid inspect --json {place}")
    found = json.loads(succeed(report).stdout)
    assert (found["kind"], found["step"], found["finished"]) == ("run", 4, True)
    assert found["last_train"]["step"] == 4, "rows are read in the bucket too"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_annealing_commands_run_as_written(fresh_world: World) -> None:
    runs = fresh_world.bucket / "stage0" / "checkpoints" / "vertex_runs"
    shorter = {"warmup_steps": 1, "log_interval": 1, "eval_every": 2, "save_every": 2, "eval_tokens": 4096}

    first = readme.command("trainer.entrypoint", "--block_size=512", train_steps=4, **shorter)
    succeed(fresh_world.run_forked(first))
    (dated,) = [path for path in runs.iterdir() if path.name != "20251007-174419"]
    assert len(dated.name) == len("20251108-090000")
    assert_complete(dated)
    train, evaluations = rows(dated, "train"), rows(dated, "eval")
    assert [row["kd_alpha"] for row in train] == [0.7] * 4
    assert {row["kd_temperature"] for row in train} == {1.2}
    keys = {"val_loss_student", "val_loss_student@512", "val_loss_student@1024"}
    assert evaluations
    assert all(row.keys() >= keys for row in evaluations)

    second = readme.command("trainer.entrypoint", "--block_size=1024", train_steps=2, **shorter)
    (resumed,) = re.findall(r"--resume_gcs_uri=(\S+)", second)
    earlier = resumed.rpartition("/")[0]
    for name in ("best.pt", "best.meta.json"):
        fresh_world.put(f"{earlier.removeprefix(f'gs://{BUCKET}/')}/{name}", (dated / name).read_bytes())
    succeed(fresh_world.run_forked(second))
    (last,) = [path for path in runs.iterdir() if path.name not in ("20251007-174419", dated.name, Path(earlier).name)]
    assert_complete(last)
    sidecar = json.loads((last / "final.meta.json").read_text(encoding="utf-8"))
    assert (sidecar["step"], sidecar["block_size"], sidecar["grad_accum"]) == (2, 1024, 2)
    assert [row["kd_alpha"] for row in rows(last, "train")] == [0.5, 0.5]


ENTRY = "python -m trainer.entrypoint"
DATA = "--block_size=512 --teacher_name=gpt2-xl --dataset_name=wikitext --dataset_config=wikitext-103-raw-v1"
EVERY_STEP = "--eval_every=1 --save_every=1 --log_interval=1"


@pytest.mark.slow
def test_the_three_smoke_checks_of_annealing(world: World) -> None:
    shown = succeed(world.run(f"{ENTRY} --help")).stdout
    for option in ("alpha", "T", "alpha_schedule", "temp_schedule", "eval_ctx_lens", "reset_optim_on_ctx_change"):
        assert f"--{option}" in shown

    world.new_bucket("dummy")  # so that a write would succeed, and show
    zero = "--alpha=0.6 --T=1.1 --alpha_schedule=0:0.6,1:0.5 --temp_schedule=0:1.1,1:1.0 --train_steps=0"
    place = "--local_workdir=liquid_test --output_gcs_uri=gs://dummy"
    nothing = f"{ENTRY} --resume_gcs_uri {STAGE0_STUDENT} {DATA} {zero} {EVERY_STEP} {place}"
    done = succeed(world.run_forked(nothing))
    assert "0 steps" in done.stderr
    assert "at step 0 the teacher weighs 0.6 (alpha), at temperature 1.1" in done.stderr
    assert world.objects(BUCKET), "the server is asked rightly"
    assert world.objects("dummy") == []
    assert not list((world.workdir / "liquid_test").rglob("*.pt"))

    one = "--train_steps=1 --alpha=0.5 --T=1.0 --alpha_schedule=0:0.5,1:0.4 --temp_schedule=0:1.0,1:0.9"
    succeed(world.run_forked(f"{ENTRY} {DATA} {EVERY_STEP} {one} --eval_ctx_lens=512,1024 --local_workdir=liquid_test"))
    run = world.workdir / "liquid_test"
    assert_complete(run)
    (row,) = rows(run, "train")
    assert (row["kd_alpha"], row["kd_temperature"]) == (0.5, 1.0)
    assert {"val_loss_student@512", "val_loss_student@1024", "val_loss_teacher@1024"} <= rows(run, "eval")[-1].keys()
    sidecar = json.loads((run / "final.meta.json").read_text(encoding="utf-8"))
    assert (sidecar["kd_alpha"], sidecar["kd_temperature"]) == (0.4, 0.9), "what the next step would take"

    saved = nothing.replace(STAGE0_STUDENT, str(run / "best.pt"))
    merged = succeed(world.run_forked(saved)).stderr
    assert '"alpha_schedule": "0:0.5,1:0.4"' in merged, "the checkpoint's metadata is logged"
    # The schedules given win, at the checkpoint's step.
    assert "at step 1 the teacher weighs 0.5 (alpha), at temperature 1\n" in merged
    assert world.objects("dummy") == []
