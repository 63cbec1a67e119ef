"""What a dry run says a run will take, against what is really written and held."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.support.models import tiny_model

from liquid_llm.config import build_run_config
from liquid_llm.jobs.dry_run import check_place, estimate
from liquid_llm.optimizers import build_optimizer
from liquid_llm.options import TRAIN
from liquid_llm.wiring.places import Place


def test_sizes_are_those_of_what_a_run_holds_and_writes(tmp_path: Path) -> None:
    """Of a real model and a real optimizer that has taken a step."""
    model, teacher = tiny_model("llama", 512), tiny_model("llama", 512).to(torch.bfloat16)
    optimizer = build_optimizer(model, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    own = {id(one): one for one in model.parameters()}.values()
    weights = sum(one.nbytes for one in own)
    moments = sum(one.nbytes for state in optimizer.state.values() for one in state.values() if one.dim())
    gradients = sum(one.grad.nbytes for one in own if one.grad is not None)
    given = {"dataset_manifest": "m.jsonl", "max_steps": 10, "save_every": 4, "keep_last": 2}
    found = estimate(build_run_config(TRAIN, given), model, optimizer, [teacher])
    assert found["parameters"] == weights // 4
    assert found["checkpoint_bytes"] == weights + moments
    assert found["memory_weights_gradients_moments_bytes"] == weights + moments + gradients
    assert found["memory_teacher_bytes"] == sum(one.nbytes for one in teacher.parameters())
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "all.pt")
    assert (tmp_path / "all.pt").stat().st_size == pytest.approx(found["checkpoint_bytes"], rel=0.1)
    # Snapshots of steps 4 and 8 and the end; two are kept, and the best may be a third; the student goes beside them.
    assert found["upload_bytes"] == 3 * (weights + moments) + weights
    assert found["disk_bytes"] == (2 + 1) * (weights + moments) + weights
    near = {**given, "keep_old_logit_l2": 0.1, "resume_gcs_uri": "x"}
    held = estimate(build_run_config(TRAIN, near), model, optimizer, [])
    assert held["memory_weights_gradients_moments_bytes"] == 2 * weights + moments + gradients


def test_looking_at_a_place_leaves_it_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for folder in ("there", "made/deep"):
        found = check_place(Place(tmp_path / folder, None, model=str(tmp_path / "model")))
        assert found["model"] == str(tmp_path / "model")
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]
