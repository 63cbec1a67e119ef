"""A user's file: what mypy makes of the package's names from outside, run by no one."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from typing_extensions import assert_type

import liquid_llm
from liquid_llm import LiquidError, Run, Store, codecs, distill, losses, open_store
from liquid_llm.losses import LossOutput, Objective, OutputHead


def train() -> Path:
    try:
        run = distill({"student": "liquid-16m", "max_steps": 3, "betas": (0.9, 0.95)}, command="train")
    except LiquidError as error:
        raise SystemExit(error.exit_code) from error
    assert_type(run, Run)
    rows: list[dict[str, Any]] = run.metrics()
    assert rows
    return run.student


def read(uri: str) -> float:
    with open_store(uri) as store:
        assert_type(store, Store)
        record = store["one"]
        signal = record.signal(temperature=2.0)
        assert_type(len(store), int)
        return float(record.arrays()["log_probs"].max()) + signal.num_positions


def step(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    encoded = codecs.encode(weight, "topk", k=8)
    out = losses.fused_loss(hidden, OutputHead(weight), labels, signal=encoded.decode(), objective=Objective(alpha=0.5))
    assert_type(out, LossOutput)
    return out.loss / out.num_positions


version: str = liquid_llm.__version__
module: ModuleType = liquid_llm.errors
