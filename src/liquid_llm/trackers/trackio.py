"""Trackio: a local database that ``trackio show`` draws; TRACKIO_DIR, TRACKIO_PROJECT, TRACKIO_SPACE_ID say where."""

from __future__ import annotations

import contextlib
import os
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from liquid_llm.trackers import PROJECT, configuration, earlier_run, numbers, remember_run, report_of


class TrackioTracker:
    """Rows as scalars, samples and the report as text, the configuration.

    A continued run is the same run there. Rows that are run again appear again, with the same values.
    """

    def __init__(self, run_dir: Path, resume_step: int | None) -> None:
        import trackio

        self._trackio, self._run_dir = trackio, run_dir
        name = earlier_run(run_dir, "trackio", resume_step)
        if name is None:  # a name is all that tells its runs apart
            name = f"{run_dir.name}-{uuid.uuid4().hex[:6]}"
        with _on_stderr():
            self._run: Any = trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", PROJECT),
                name=name,
                space_id=os.environ.get("TRACKIO_SPACE_ID"),
                config=configuration(run_dir),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        remember_run(run_dir, "trackio", name)

    def log(self, row: Mapping[str, Any]) -> None:
        self._run.log(dict(numbers(row)), step=row["step"])

    def log_sample(self, row: Mapping[str, Any]) -> None:
        told = f"**{row['prompt']}**\n\n{row['text']}"
        self._run.log({"samples": self._trackio.Markdown(told)}, step=row["step"])

    def close(self) -> None:
        with _on_stderr():
            if (report := report_of(self._run_dir)) is not None:
                self._run.log({"report": self._trackio.Html(report.read_text(), inject=False, data_is_not_path=True)})
            self._trackio.finish()  # its run alone would be ended again, aloud, when the process ends


def _on_stderr() -> contextlib.redirect_stdout[Any]:
    """What it prints to people; standard output is for results."""
    return contextlib.redirect_stdout(sys.stderr)
