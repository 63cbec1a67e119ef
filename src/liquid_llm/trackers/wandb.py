"""Weights & Biases. Its own variables say where to: WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE=offline, WANDB_API_KEY."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from liquid_llm.trackers import PROJECT, configuration, earlier_run, numbers, remember_run, report_of


class WandbTracker:
    """Rows as scalars over ``step``, samples as a table, the configuration, the report.

    A continued run is the same run there. Rows that are run again appear again, with the same values.
    """

    def __init__(self, run_dir: Path, resume_step: int | None) -> None:
        import wandb

        self._wandb, self._run_dir = wandb, run_dir
        name = earlier_run(run_dir, "wandb", resume_step) or uuid.uuid4().hex[:12]
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=name,
            name=run_dir.name,
            resume="allow",
            dir=str(run_dir),
            config=configuration(run_dir),
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._said: list[list[Any]] = []
        remember_run(run_dir, "wandb", name)

    def log(self, row: Mapping[str, Any]) -> None:
        self._run.log({**dict(numbers(row)), "step": row["step"]})

    def log_sample(self, row: Mapping[str, Any]) -> None:
        # A table is logged whole each time: one that grows is what is shown of a run.
        self._said.append([row["step"], row["prompt"], row["text"]])
        table = self._wandb.Table(columns=["step", "prompt", "text"], data=self._said)
        self._run.log({"samples": table, "step": row["step"]})

    def close(self) -> None:
        if (report := report_of(self._run_dir)) is not None:
            self._run.log({"report": self._wandb.Html(report.read_text(), inject=False)})
        self._run.finish()
