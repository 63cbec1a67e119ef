"""Small checkpoints for tests: metadata of a step, and a model with its optimizer."""

from __future__ import annotations

from typing import Any

import torch

from liquid_llm.checkpoint.metadata import CheckpointMetadata


def metadata_of(step: int, **changes: Any) -> CheckpointMetadata:
    """Plausible metadata; ``changes`` replace fields."""
    fields: dict[str, Any] = {
        "step": step,
        "tokens_seen": step * 1000,
        "block_size": 512,
        "kd_alpha": 0.7,
        "kd_temperature": 1.2,
        "alpha_schedule": "0:0.7,400:0.5",
        "temp_schedule": None,
        "schedule_state": {"alpha": 1, "temperature": None},
        "grad_accum": 2,
        "warmup_steps": 10,
        "lr": 2.7e-4 / 3,
        "lr_peak": None,
        "positional_embedding": "rotary",
        "rope_scale": None,
        "eval_ctx_lens": (512, 1024),
        "student": {"spec": "liquid-16m", "config": {"hidden_size": 8, "id2label": {0: "a"}}},
        "tokenizer_hash": "ab" * 32,
        "data_position": step * 2,
        "best_val_loss": 3.25,
        "created": f"2026-01-01T{step // 3600 % 24:02d}:{step // 60 % 60:02d}:{step % 60:02d}Z",
        "run": {"face": "anneal"},
    }
    return CheckpointMetadata(**(fields | changes))


def state_of(step: int, size: int = 64) -> dict[str, Any]:
    """A state whose every number says which step it is of, so that a mixture of two cannot pass."""
    weights = torch.full((size, size), float(step))
    return {"student": {"w": weights}, "optimizer": {"state": {0: {"step": torch.tensor(float(step))}}}, "step": step}


def trained_model(dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model with tied weights and an AdamW state that is not trivial."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(11, 6), "head": torch.nn.Linear(6, 11, bias=False)}).to(
        dtype
    )
    model["head"].weight = model["embed"].weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        loss = model["head"](model["embed"](torch.arange(11))).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer
