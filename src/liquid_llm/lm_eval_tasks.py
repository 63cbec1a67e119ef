"""Benchmarks of lm-eval (EleutherAI's language model evaluation harness) on a model that is open.

    task     a benchmark: one that lm-eval knows by name (``arc_easy``, ``mmlu_*``), or a YAML file of one's own
    extra    lm-eval is no dependency: ``pip install 'liquid-llm[lm-eval]'`` brings it (decision 18)

A task of one's own may name Python functions that lie beside it, as lm-eval's do: they run, so it is named by a person
alone. Tasks that are known by name get their data from the Hugging Face hub.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml

from liquid_llm.errors import DataError, UsageError, first_line
from liquid_llm.generation import can_pad_left
from liquid_llm.runtime import random_state, set_random_state

_YAML = (".yaml", ".yml")
_BOOTSTRAPS = 1000  # for the error of metrics that have no formula for it


@dataclass(frozen=True)
class TaskPlan:
    """Which tasks are to be run, and how.

    Attributes:
        names: as lm-eval knows them, its wildcards resolved when they are run.
        folders: where tasks of one's own lie.
        knows_all: lm-eval's own tasks are asked for too; finding them takes half a minute.
        limit: most samples of a task; None: all.
        num_fewshot: examples before each question; None: as the task says.
    """

    names: tuple[str, ...]
    folders: tuple[str, ...] = ()
    knows_all: bool = True
    limit: int | None = None
    num_fewshot: int | None = None


def plan_tasks(tasks: Sequence[str], *, limit: int | None = None, num_fewshot: int | None = None) -> TaskPlan:
    """What ``--tasks`` names: tasks by name, YAML files, or folders of such files, all of whose tasks are meant.

    Raises:
        UsageError: lm-eval is not installed, or a file or folder holds no task.
    """
    if find_spec("lm_eval") is None:
        raise UsageError(
            "--tasks needs lm-eval, which is not installed",
            where=f"--tasks={','.join(tasks)}",
            remedy="install it: pip install 'liquid-llm[lm-eval]'",
        )
    names: list[str] = []
    folders: list[str] = []
    knows_all = False
    for task in tasks:
        path = Path(task).expanduser()
        if not (task.endswith(_YAML) or path.is_dir()):
            names.append(task)
            knows_all = True
            continue
        files = [path] if task.endswith(_YAML) else sorted(one for one in path.iterdir() if one.suffix in _YAML)
        found = [name for file in files for name in _task_names(file)]
        if not found:
            raise UsageError(
                "this is no task of lm-eval",
                where=task,
                expected="a YAML file with task: NAME, or a folder of such files",
                remedy="look at https://github.com/EleutherAI/lm-evaluation-harness/blob/main/docs/new_task_guide.md",
            )
        names += found
        folders.append(str((path if path.is_dir() else path.parent).resolve()))
    return TaskPlan(tuple(dict.fromkeys(names)), tuple(dict.fromkeys(folders)), knows_all, limit, num_fewshot)


def run_tasks(
    plan: TaskPlan, model: Any, tokenizer: Any, *, dtype: torch.dtype = torch.float32, batch_size: int = 8
) -> dict[str, dict[str, Any]]:
    """Run the tasks of ``plan``; random states and the tokenizer stay as they are.

    Args:
        model: a transformers model in evaluation mode, on its device.
        tokenizer: its own, which puts before a text what the model expects there.
        dtype: of the products, by autocast where the model's numbers are wider.
        batch_size: requests computed together; a model that cannot be padded on the left generates one by one.

    Returns:
        Task (or group) -> ``metrics`` (name -> ``{"value", "error"}``, lm-eval's filter behind a comma where it is not
        ``none``), ``samples`` (how many were used), ``num_fewshot``, ``version``.

    Raises:
        UsageError: a task that lm-eval does not know.
        DataError: a task's data or definition cannot be used.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=list(plan.folders) or None, include_defaults=plan.knows_all)
    names = [name for asked in plan.names for name in _match(manager, asked)]
    device = next(model.parameters()).device
    own_dtype = next(model.parameters()).dtype
    state = random_state()
    try:
        wrapped = HFLM(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),  # it gets a token for padding
            batch_size=batch_size if can_pad_left(model) else 1,
            device=str(device),
            mixed_precision_dtype=None if dtype in (own_dtype, torch.float32) else dtype,
        )
        _begin_once(wrapped)
        told = {"limit": plan.limit, "num_fewshot": plan.num_fewshot, "bootstrap_iters": _BOOTSTRAPS}
        with _first_of_its_host():
            found = lm_eval.simple_evaluate(model=wrapped, tasks=names, task_manager=manager, log_samples=False, **told)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            "lm-eval cannot run the tasks",
            where=f"--tasks={','.join(plan.names)}",
            got=f"{type(error).__name__}: {first_line(error)}",
            remedy="look at the task's definition and whether its data can be had here (lm-eval fetches it from the "
            "Hugging Face hub)",
        ) from error
    finally:
        set_random_state(state)
    assert found is not None
    return {name: _plain(name, rows, found) for name, rows in found["results"].items()}


@contextlib.contextmanager
def _first_of_its_host() -> Iterator[None]:
    """Let lm-eval take this process for the first: to any other of a launcher it gives nothing, though each is asked
    about students of its own."""
    number = os.environ.get("LOCAL_RANK")
    if number is None:
        yield
        return
    os.environ["LOCAL_RANK"] = "0"
    try:
        yield
    finally:
        os.environ["LOCAL_RANK"] = number


def _begin_once(judge: Any) -> None:
    """Have texts that are scored whole begin as in training.

    lm-eval puts a begin token before such a text itself; what the tokenizer puts there would be scored as its first.
    """
    score = judge.loglikelihood_rolling

    def score_once(*given: Any, **more: Any) -> Any:
        before, judge.add_bos_token = judge.add_bos_token, False
        try:
            return score(*given, **more)
        finally:
            judge.add_bos_token = before

    judge.loglikelihood_rolling = score_once


def _task_names(file: Path) -> list[str]:
    """What a YAML file defines: a task, or a group of tasks; nothing where it is a piece that others include.

    The file is only taken apart, not built: functions that it names (``!function``) are nothing here.
    """
    try:
        root = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except FileNotFoundError as error:
        raise UsageError("no such task file", where=file) from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise UsageError("the task file cannot be read", where=file, got=first_line(error)) from error
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    named = {key.value: value.value for key, value in pairs if isinstance(value, yaml.ScalarNode)}
    return [named[key] for key in ("group", "task") if key in named][:1]


def _match(manager: Any, asked: str) -> list[str]:
    """The tasks of one name, which may hold wildcards."""
    found = sorted(manager.match_tasks([asked]))
    if not found:
        near = difflib.get_close_matches(asked, manager.all_tasks, n=3)
        raise UsageError(
            "lm-eval knows no such task",
            where=f"--tasks={asked}",
            expected="one of its names, or a YAML file" + (f"; near it are {', '.join(near)}" if near else ""),
        )
    return found


def _plain(name: str, rows: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """One task's result out of what lm-eval says of all."""
    metrics: dict[str, dict[str, float | None]] = {}
    for key, value in rows.items():
        metric, comma, kind = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            shown = metric if kind == "none" else key
            metrics[shown] = {"value": _number(value), "error": _number(rows.get(f"{metric}_stderr,{kind}"))}
    samples = (found.get("n-samples") or {}).get(name) or {}
    version = (found.get("versions") or {}).get(name)
    return {
        "metrics": metrics,
        "samples": samples.get("effective"),
        "num_fewshot": (found.get("n-shot") or {}).get(name),
        "version": None if version is None else str(version),
    }


def _number(value: Any) -> float | None:
    """A figure; lm-eval says ``N/A`` where there is none."""
    return None if value is None or isinstance(value, str) else float(value)
