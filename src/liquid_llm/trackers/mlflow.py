"""MLflow. MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME say where to; without the first, files in ``RUN/mlruns``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from liquid_llm.trackers import PROJECT, configuration, earlier_run, numbers, remember_run, report_of

_LONGEST_VALUE, _MOST_PARAMETERS = 500, 100  # of one call; MLflow's own limits


class MlflowTracker:
    """Rows as metrics, the configuration as parameters, samples and the report as artifacts.

    A continued run is the same run there. Rows that are run again appear again, with the same values.
    """

    def __init__(self, run_dir: Path, resume_step: int | None) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param, RunStatus

        self._metric, self._finished = Metric, RunStatus.to_string(RunStatus.FINISHED)
        self._run_dir = run_dir
        self._said, self._said_at = 0, -1
        where = os.environ.get("MLFLOW_TRACKING_URI") or (run_dir / "mlruns").absolute().as_uri()
        if where.startswith("file:"):
            # releases of 2026 ask for consent before they write files: whoever named a folder has given it
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self._client: Any = MlflowClient(tracking_uri=where)
        earlier = earlier_run(run_dir, "mlflow", resume_step)
        if earlier is None:
            run = self._client.create_run(self._experiment(), run_name=run_dir.name)
            self._run = str(run.info.run_id)
            parameters = [Param(key, value) for key, value in _parameters(configuration(run_dir))]
            for first in range(0, len(parameters), _MOST_PARAMETERS):
                self._client.log_batch(self._run, params=parameters[first : first + _MOST_PARAMETERS])
        else:
            self._run = earlier
            self._client.update_run(earlier, status="RUNNING")
        remember_run(run_dir, "mlflow", self._run)

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id if found is not None else self._client.create_experiment(name))

    def log(self, row: Mapping[str, Any]) -> None:
        stamp = int(row.get("time", 0) * 1000)
        metrics = [self._metric(key, value, stamp, row["step"]) for key, value in numbers(row)]
        self._client.log_batch(self._run, metrics=metrics)

    def log_sample(self, row: Mapping[str, Any]) -> None:
        self._said = self._said + 1 if self._said_at == row["step"] else 0
        self._said_at = row["step"]
        place = f"samples/step-{row['step']:08d}-{self._said}.json"
        self._client.log_dict(self._run, {"prompt": row["prompt"], "text": row["text"]}, place)

    def close(self) -> None:
        if (report := report_of(self._run_dir)) is not None:
            self._client.log_artifact(self._run, str(report))
        self._client.set_terminated(self._run, self._finished)


def _parameters(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names and texts, ``optimizer.lr``: all that MLflow takes as a parameter."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _parameters(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", str(value)[:_LONGEST_VALUE]
