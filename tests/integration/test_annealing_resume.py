"""Resuming by the real command line: what goes on, what starts afresh, and which value wins."""

import math
from pathlib import Path

import pytest
import torch
from tests.support.annealing import anneal, as_of, metadata, rows
from tests.support.tiny import Tiny

from liquid_llm.metrics import without_timings
from liquid_llm.models.positions import resize_learned_positions

pytestmark = pytest.mark.slow
TABLE = "transformer.wpe.weight"


def checkpoint(run: Path, name: str = "final") -> dict:
    return torch.load(run / f"{name}.pt", weights_only=True)


def optimizer_steps(run: Path) -> set[float]:
    return {float(moments["step"]) for moments in checkpoint(run)["optimizer"]["state"].values()}


# context length


def test_a_longer_context_with_the_flag_starts_the_optimizer_afresh(tiny, short, tmp_path):
    options = {"resume_gcs_uri": short / "best.pt", "block_size": 128, "reset_optim_on_ctx_change": "true"}
    assert anneal(tiny, tmp_path, lr_peak=1e-3, grad_accum=2, eval_ctx_lens="32,128", train_steps=4, **options) == 0
    steps = rows(tmp_path)
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert steps[0]["lr"] == pytest.approx(5e-4)
    assert steps[1]["lr"] == pytest.approx(1e-3)
    after = torch.load(tmp_path / "final.pt", weights_only=True)["student"]
    assert after["transformer.wpe.weight"].shape[0] == 128
    assert metadata(tmp_path)["block_size"] == 128


def test_a_longer_context_without_the_flag_goes_on_and_says_so(tiny, short, tmp_path, caplog):
    with caplog.at_level("INFO"):
        assert anneal(tiny, tmp_path, resume_gcs_uri=short / "last.pt", block_size=64, train_steps=10) == 0
    assert [row["step"] for row in rows(tmp_path)] == [9, 10]
    assert "optimizer and step 8 go on" in caplog.text


def test_reset_optim_starts_afresh_at_the_same_length(tiny, short, tmp_path):
    assert anneal(tiny, tmp_path, resume_gcs_uri=short / "last.pt", reset_optim="true", train_steps=2) == 0
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]


def test_a_context_past_the_table_without_the_flag_keeps_optimizer_and_step(tiny, short, tmp_path, caplog):
    """The table grows, so the moments of its rows must too: torch's kernel would read past the end of shorter ones."""
    with caplog.at_level("INFO"):
        assert anneal(tiny, tmp_path, resume_gcs_uri=short / "last.pt", block_size=128, train_steps=11) == 0
    assert "context length changes from 32 to 128 tokens" in caplog.text
    assert "optimizer and step 8 go on" in caplog.text
    assert [row["step"] for row in rows(tmp_path)] == [9, 10, 11]
    assert optimizer_steps(tmp_path) == {11.0}
    after = checkpoint(tmp_path)
    assert after["student"][TABLE].shape[0] == 128
    assert (tmp_path / "best.pt").exists(), "losses at 32 tokens and of another run are no measure here"
    again = tmp_path / "again"
    assert anneal(tiny, again, resume_gcs_uri=tmp_path / "last.pt", block_size=128, train_steps=12) == 0
    assert all(math.isfinite(row["loss"]) for row in rows(again))


def test_weights_are_kept_when_the_optimizer_starts_afresh(tiny, tmp_path, caplog):
    """A rotary student is the same function at any length, so its loss says whether the weights are the same."""
    first, second = tmp_path / "first", tmp_path / "second"
    options = {"student": tiny.root / "llama.json", "eval_ctx_lens": "32", "alpha_schedule": "0:0.7,3:0.4"}
    assert anneal(tiny, first, **options) == 0
    afresh = {"block_size": 64, "reset_optim_on_ctx_change": "true", "lr_peak": 1e-3, "train_steps": 4}
    with caplog.at_level("INFO"):
        assert anneal(tiny, second, resume_gcs_uri=first / "final.pt", **afresh) == 0
    assert "optimizer, LR schedule and step start afresh; weights are kept" in caplog.text
    assert "alpha schedule 0:0.7,3:0.4 is not taken up" in caplog.text
    start = rows(second, "eval")[0]
    assert start["step"] == 0
    assert start["val_loss_student@32"] == pytest.approx(rows(first, "eval")[-1]["val_loss_student"], rel=1e-6)
    assert optimizer_steps(second) == {4.0}
    assert {row["kd_alpha"] for row in rows(second)} == {0.4}, "the value in the metadata"
    assert metadata(second)["student"]["spec"] == str(tiny.root / "llama.json"), "as the checkpoint says"
    assert metadata(second)["best_val_loss"] == min(row["val_loss_student"] for row in rows(second, "eval"))


def test_learned_rows_are_interpolated_when_a_run_begins_longer(tiny, short, tmp_path):
    afresh = {"reset_optim_on_ctx_change": "true", "lr_peak": 1e-30, "weight_decay": 0, "train_steps": 1}
    assert anneal(tiny, tmp_path, resume_gcs_uri=short / "final.pt", block_size=128, **afresh) == 0
    before, after = checkpoint(short)["student"][TABLE], checkpoint(tmp_path)["student"][TABLE]
    torch.testing.assert_close(after, resize_learned_positions(before[:32], 128))  # 32 of its 64 rows were trained


def test_a_bare_table_shorter_than_the_presets_is_taken_as_it_is(tiny, short, tmp_path):
    torch.save(checkpoint(short)["student"], tmp_path / "bare.pt")
    config = tmp_path / "longer.json"
    config.write_text((tiny.root / "gpt2.json").read_text().replace('"n_positions": 64', '"n_positions": 256'))
    assert anneal(tiny, tmp_path / "run", resume_gcs_uri=tmp_path / "bare.pt", student=config, train_steps=1) == 0
    assert checkpoint(tmp_path / "run")["student"][TABLE].shape[0] == 64


def test_rope_scale_reaches_the_model_and_goes_on_with_the_checkpoint(tiny, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert anneal(tiny, first, student=tiny.root / "llama.json", rope_scale=2.0, train_steps=2) == 0
    assert anneal(tiny, second, resume_gcs_uri=first / "final.pt", block_size=128, train_steps=4) == 0
    for run in (first, second):
        saved = metadata(run)
        assert (saved["rope_scale"], saved["positional_embedding"]) == (2.0, "rotary")
        assert saved["student"]["config"]["rope_parameters"]["factor"] == 2.0
    assert metadata(second)["student"]["config"]["max_position_embeddings"] == 128


# which value wins


def test_a_level_given_over_an_inherited_schedule_survives_being_killed_and_resumed(tiny, short, tmp_path):
    """Alpha 0.6 replaces what the schedule has reached at step 8; its entry at step 20 stays."""
    options = {"resume_gcs_uri": short / "last.pt", "alpha": 0.6, "train_steps": 24, "keep_last": 9}
    assert anneal(tiny, tmp_path / "whole", **options) == 0
    expected = [0.6] * 12 + [0.3] * 4
    assert [row["kd_alpha"] for row in rows(tmp_path / "whole")] == expected
    assert metadata(tmp_path / "whole", "step-00000012")["alpha_schedule"] == "8:0.6,20:0.3"
    assert metadata(tmp_path / "whole", "step-00000012")["schedule_state"] == {"alpha": 1, "temperature": 2}
    for step in (12, 20):
        killed = as_of(tmp_path / "whole", step, tmp_path / f"killed-{step}")
        assert anneal(tiny, killed, **options) == 0
        runs = (rows(killed), rows(tmp_path / "whole"))
        assert [without_timings(row) for row in runs[0]] == [without_timings(row) for row in runs[1]]
    later = {"resume_gcs_uri": tmp_path / "whole" / "step-00000012.pt", "train_steps": 24}
    assert anneal(tiny, tmp_path / "later", **later) == 0
    assert [row["kd_alpha"] for row in rows(tmp_path / "later")] == expected[4:]


@pytest.mark.parametrize("step", [4, 8, 12, 16])
def test_schedules_are_continued_exactly_from_every_snapshot(tiny, tmp_path_factory, step):
    whole = continued(tiny, tmp_path_factory)
    killed = as_of(whole, step, tmp_path_factory.mktemp("killed") / "run")
    assert anneal(tiny, killed, **CONTINUED) == 0
    mine, theirs = ([without_timings(row) for row in rows(run)] for run in (killed, whole))
    assert mine == theirs
    one, other = checkpoint(killed)["student"], checkpoint(whole)["student"]
    assert all(torch.equal(value, other[name]) for name, value in one.items())


CONTINUED = {
    "alpha_schedule": "1:0.7,8:0.5,9:0.25,17:0.1",
    "temp_schedule": "3:1.5,16:2.0",
    "train_steps": 18,
    "keep_last": 9,
}
_DONE: list[Path] = []


def continued(tiny: Tiny, tmp_path_factory) -> Path:
    if not _DONE:
        _DONE.append(tmp_path_factory.mktemp("whole"))
        assert anneal(tiny, _DONE[0], **CONTINUED) == 0
        pending = [metadata(_DONE[0], f"step-{step:08d}")["schedule_state"] for step in (4, 8, 12, 16)]
        assert [state["alpha"] for state in pending] == [1, 2, 3, 3]
        assert [state["temperature"] for state in pending] == [1, 1, 1, 2]
    return _DONE[0]


def test_the_optimizers_settings_come_from_the_command_line_then_from_the_checkpoint(tiny, tmp_path):
    first = tmp_path / "first"
    assert anneal(tiny, first, weight_decay=0.3, betas="0.8,0.9", train_steps=2, lr=3e-3) == 0
    for name, given, expected in (
        ("same", {}, (0.3, (0.8, 0.9), 3e-3)),
        ("other", {"weight_decay": 0.2, "betas": "0.7,0.95", "lr": 1e-3}, (0.2, (0.7, 0.95), 1e-3)),
    ):
        run = tmp_path / name
        assert anneal(tiny, run, resume_gcs_uri=first / "final.pt", train_steps=3, **given) == 0
        groups = checkpoint(run)["optimizer"]["param_groups"]
        assert [group["weight_decay"] for group in groups] == [expected[0], 0.0]
        assert {tuple(group["betas"]) for group in groups} == {expected[1]}
        assert metadata(run)["lr"] == expected[2]
        assert optimizer_steps(run) == {3.0}
