"""Training and capture from a program: options in, a finished run or a unit's signal out.

options   those of ``liquid train``, ``anneal`` and ``capture``, by their names; docs/options says what each means
run       the folder that a training job has written, and what it came to
unit      a data file of a manifest, whose signal is captured, and marked as complete, by itself
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from liquid_llm.cli.parse import expand_dates, load_yaml, read_options
from liquid_llm.errors import LiquidError, UsageError
from liquid_llm.masking import process_masker
from liquid_llm.options import TRAINING, options_of
from liquid_llm.verbosity import CHATTY

if TYPE_CHECKING:
    from liquid_llm.jobs.capture_units import UnitCapture
    from liquid_llm.wiring.places import Place

Command = Literal["train", "anneal"]
_LOGGERS = ("", "liquid_llm", "gcsfs", *CHATTY)  # those whose level a run sets; "" is the root


@dataclass(frozen=True)
class Run:
    """A run that has come to its end.

    Attributes:
        folder: its directory on this machine.
        output: what it is called by its user: that folder, or the URL that it is mirrored to.
        summary: what ``summary.json`` says: ``rows`` (held-out loss for all text and by type: ``type``, ``before``,
            ``after``, ``teacher``, ``gap_closed``, ``kl``; nats a token), ``sentences``, ``samples``, ``steps``,
            ``tokens`` and what it took.
    """

    folder: Path
    output: str
    summary: Mapping[str, Any]

    @property
    def student(self) -> Path:
        """The finished student with its tokenizer, a folder for ``AutoModelForCausalLM.from_pretrained``."""
        return self.folder / "student"

    @property
    def report(self) -> Path:
        """The page to open in a browser."""
        return self.folder / "report.html"

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of ``metrics.jsonl`` in order: ``kind`` says which are of training and which of evaluation.

        Raises:
            DataError: the file is damaged.
        """
        from liquid_llm.metrics import read_metrics

        return list(read_metrics(self.folder))


def distill(config: Mapping[str, object] | str | os.PathLike[str], *, command: Command = "train") -> Run:
    """Train a student to its end, as ``liquid train`` and ``liquid anneal`` do; go on where such a run was stopped.

    Progress goes to standard error. Signals are heard while it trains, where it is called from the main thread: Ctrl-C
    saves the state and raises ``Interrupted``. Afterwards signal handlers, loggers, environment variables and the
    global random generators are what they were before.

    Args:
        config: options by name, values as Python or as the command line has them (``{"max_steps": 200, "betas": (0.9,
            0.95), "student": "liquid-16m"}``); or the path of a YAML file of them. None is not given.
        command: whose options and defaults hold: ``train`` (a manifest, several types of text) or ``anneal`` (one text
            dataset, schedules).

    Raises:
        UsageError: options that cannot work, ``dry_run``, no step to take, or a process that is one of several
            (``torchrun -m liquid_llm train`` is for those).
        Interrupted: the process was asked to stop, and the state is saved.
        LiquidError: anything else that a user can cause; see ``liquid_llm.errors``.
    """
    if command not in TRAINING:
        raise UsageError("no command that trains", where="distill", got=repr(command), expected=" or ".join(TRAINING))
    given = _read(config, command)
    if given.get("dry_run"):
        remedy = f"use liquid {command} --dry_run for what it would take"
        raise UsageError("a dry run trains nothing that could be returned", where="distill: dry_run", remedy=remedy)
    if os.environ.get("WORLD_SIZE", "1").strip() not in ("", "1"):
        raise UsageError(
            "distill trains in this process alone",
            where="WORLD_SIZE",
            got=os.environ["WORLD_SIZE"],
            remedy=f"start several with torchrun -m -- liquid_llm {command} --config=FILE",
        )
    from liquid_llm.jobs.train import run_training
    from liquid_llm.report.data import read_run
    from liquid_llm.report.summary import summarise

    places: list[Place] = []
    with _as_before(), _in_words():
        run_training(command, given, ended=places.append)
        if not places:
            raise UsageError(
                "no step was left to take, so there is no finished run",
                where=f"distill: {'max_steps' if command == 'train' else 'train_steps'}",
                remedy="give more steps, or another output",
            )
        place = places[0]
        return Run(place.run_dir, place.shown, summarise(read_run(place.run_dir)))


class Capture:
    """The units of a capture, each captured when somebody asks for it; made by ``open_capture``.

    Whoever schedules them may be anything that can call a function: docs/capture.md says what a unit is, and
    ``examples/capture_ray.py`` has Ray do it. One process takes one unit at a time and keeps the teacher.
    """

    def __init__(self, job: UnitCapture) -> None:
        self._job = job

    def units(self) -> Iterator[dict[str, Any]]:
        """All units of the manifest, in their order.

        Returns:
            Plain values: ``number``, ``type``, ``file``, ``name`` in a store, and ``where`` the manifest names it.

        Raises:
            DataError: a pattern of the manifest matches no file.
            StorageError: a place cannot be asked.
        """
        return (asdict(unit) for unit in self._job.units())

    def run(self, unit: Mapping[str, Any]) -> dict[str, Any]:
        """Capture a unit unless it is complete; the teacher is loaded for the first that is not.

        Returns:
            What ``liquid capture`` says at its end (``written``, ``skipped``, ``failures``, ``tokens``, ``seconds`` and
            so on), whether the unit is ``complete`` now, and ``was_complete`` before.

        Raises:
            DataError: its file is not there, or cannot be used: others can.
            LiquidError: any other problem a user can cause.
        """
        from liquid_llm.capture.units import Unit

        with _in_words():
            summary, was_complete = self._job.run(Unit(**unit))
        return {**summary.as_dict(), "complete": summary.is_whole, "was_complete": was_complete}


def open_capture(config: Mapping[str, object] | str | os.PathLike[str]) -> Capture:
    """The units of a capture into stores of units. Nothing is loaded or written yet; loggers are left as they are.

    Args:
        config: options of ``liquid capture`` by name, or the path of a YAML file of them.

    Raises:
        UsageError: options that cannot work; ``unit``, as whoever calls ``run`` says which it is.
        LiquidError: a store of another teacher, codec or layout, a teacher that cannot be found, and the like.
    """
    from liquid_llm.jobs.capture_units import open_units

    return Capture(open_units(_read(config, "capture")))


def _read(config: Mapping[str, object] | str | os.PathLike[str], command: str) -> dict[str, object]:
    """Options by name, each as its kind wants it; dates in places are expanded as on the command line."""
    options = options_of(command)
    if not isinstance(config, Mapping):
        path = Path(config)
        given = read_options(load_yaml(path), options, path)
    else:
        given = read_options({name: _plain(value) for name, value in config.items()}, options, "distill")
    return {name: expand_dates(value) for name, value in given.items()}


def _plain(value: object) -> object:
    """A Python value as a YAML file would hold it."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


@contextmanager
def _in_words() -> Iterator[None]:
    """Errors as a command says them: memory and devices in words, and no secret of the environment in a message."""
    try:
        yield
    except LiquidError as error:
        error.args = (process_masker().text(str(error)),)
        raise
    except (RuntimeError, MemoryError) as error:
        from liquid_llm.device import device_error

        problem = device_error(error)
        if problem is None:
            raise
        raise problem from error


@contextmanager
def _as_before() -> Iterator[None]:
    """Put back what a command of its own process need not: loggers, environment, global random generators."""
    import torch

    from liquid_llm.runtime import random_state, set_random_state

    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels, handlers = [one.level for one in loggers], [list(one.handlers) for one in loggers]
    environment, drawn = dict(os.environ), random_state(gpus=torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        set_random_state(drawn)
        for name in os.environ.keys() | environment.keys():
            if name not in environment:
                del os.environ[name]
            elif os.environ.get(name) != environment[name]:
                os.environ[name] = environment[name]
        for logger, level, before in zip(loggers, levels, handlers, strict=True):
            logger.setLevel(level)
            logger.handlers[:] = before
