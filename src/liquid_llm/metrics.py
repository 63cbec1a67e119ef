"""What a run says about its course: rows of ``metrics.jsonl``, which trackers get too.

    row       one JSON object: ``{"kind": "train" | "eval", "step": n, ...}``; ``step`` counts finished optimizer steps
    torn line a last line cut off by a kill; it never counts as a row
    timings   the keys in ``TIMING_KEYS``: all that may differ between a continued run's rows and an uninterrupted one's

Resuming at step s drops the rows after s, so a continued run's file equals that of a run that was never interrupted,
apart from timings. That holds when rows are written before the checkpoint of the same step, and when the checkpoint
carries ``StepAccumulator.state_dict()`` wherever a row covers several steps.

JSON knows no nan and no infinity. A row holds ``null`` in place of such a value and says so under ``not_finite``:
``{"loss": null, "not_finite": {"loss": "nan"}}``.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liquid_llm.parsing import ParseError, parse_json
from liquid_llm.storage import publish, translate_errors
from liquid_llm.trackers import Tracker

if TYPE_CHECKING:
    from torch import Tensor

    from liquid_llm.distributed import Engine
    from liquid_llm.losses.signals import LossOutput

FILE_NAME = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"  # rows of what a student says to given prompts
_OF_MEMORY = ("peak_memory_bytes", "device_peak_memory_bytes", "device_reserved_bytes", "rss_bytes")  # the first: host
TIMING_KEYS = frozenset({"seconds", "tokens_per_second", "signal_wait_seconds", "eval_seconds", "time", *_OF_MEMORY})

_log = logging.getLogger(__name__)

Row = dict[str, Any]


# ------------------------------------------------------------------------------------------------------------- reading


def iter_metrics(run_dir: str | Path, name: str = FILE_NAME) -> Iterator[tuple[int, Row | None]]:
    """Yield ``(line number, row)`` of a run's metrics, or of another file of rows; the row is
    None where a line is torn or no JSON object.

    Nothing is yielded when the file does not exist.

    Raises:
        StorageError: it cannot be read.
    """
    path = Path(run_dir) / name
    if not path.exists():
        return
    with translate_errors(path), path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            yield number, _parse(line)


def read_metrics(run_dir: str | Path) -> list[Row]:
    """All rows of a run's ``metrics.jsonl`` in file order; unreadable lines are left out with one warning."""
    rows = []
    bad = []
    for number, row in iter_metrics(run_dir):
        if row is None:
            bad.append(number)
        else:
            rows.append(row)
    if bad:
        _log.warning(
            "%s: %d unreadable line(s) left out, first at line %d", Path(run_dir) / FILE_NAME, len(bad), bad[0]
        )
    return rows


def without_timings(row: Mapping[str, Any]) -> Row:
    """A row as an uninterrupted run would have written it: all keys but ``TIMING_KEYS``."""
    return {key: value for key, value in row.items() if key not in TIMING_KEYS}


def _parse(line: bytes) -> Row | None:
    """A row, or None for a torn line: one without its newline, or one that is no JSON object with a step."""
    try:
        row = parse_json(line) if line.endswith(b"\n") else None
    except ParseError:  # also undecodable bytes
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def seconds_of(row: Mapping[str, Any]) -> float | None:
    """What the steps of a ``train`` row took; None where it does not tell.

    A row of a continued run may hold steps of the process before, whose seconds it does not know; its rate is of its
    own, so the rate is what counts.
    """
    rate = row.get("tokens_per_second")
    return row["positions"] / rate if rate else None


# ------------------------------------------------------------------------------------------------------------- writing


class RowFile:
    """JSON objects appended to a file, a line each, flushed; each has a ``step``.

    Args:
        path: the file; it and its folder are made if absent.
        resume_step: finished steps of what is gone on with: rows after it are dropped, atomically. None starts the
            file afresh.

    Raises:
        StorageError: the file cannot be written (full disk, no permission).
    """

    def __init__(self, path: Path, *, resume_step: int | None) -> None:
        self._path = path
        with translate_errors(path, writing=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            _rewrite(path, -1 if resume_step is None else resume_step)
            self._file = path.open("ab", buffering=0)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row. Raises StorageError where it could not be written: the file then ends in a torn line."""
        line = json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"
        with translate_errors(self._path, writing=True):
            _write_all(self._file.fileno(), line.encode())

    def sync(self) -> None:
        """Force what was written to the disk; called before a checkpoint, so that none outlives its rows."""
        with translate_errors(self._path, writing=True):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let go of the file."""
        with translate_errors(self._path, writing=True):
            self._file.close()

    def __enter__(self) -> RowFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class MetricsWriter:
    """Appends rows to ``metrics.jsonl`` and hands them to trackers; one writer a run directory, on the main process.

    Args:
        run_dir: the run directory; made if absent.
        resume_step: finished steps of the checkpoint being continued: rows after it are dropped, atomically.
            None starts the file afresh.
        trackers: who gets the rows too, closed with the writer.

    Raises:
        StorageError: the file cannot be written (full disk, no permission).
    """

    def __init__(self, run_dir: str | Path, *, resume_step: int | None, trackers: Sequence[Tracker] = ()) -> None:
        self._file = RowFile(Path(run_dir) / FILE_NAME, resume_step=resume_step)
        self._trackers = trackers

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> Row:
        """Append one row and flush it; returns the row as written.

        Args:
            kind: ``train`` or ``eval``.
            step: finished optimizer steps.
            values: numbers, strings, None, zero-dimensional tensors, and mappings or lists of these.

        Raises:
            StorageError: the row could not be written; the file then ends in a torn line, which readers leave out.
            TypeError: a value is none of the above.
        """
        not_finite: dict[str, str] = {}
        row: Row = {"kind": kind, "step": int(step)}
        row.update({str(key): _plain(value, str(key), not_finite) for key, value in values.items()})
        if not_finite:
            row["not_finite"] = not_finite
        self._file.write(row)
        for tracker in self._trackers:
            tracker.log(row)
        return row

    def log_sample(self, row: Mapping[str, Any]) -> None:
        """Hand a row of ``samples.jsonl`` to the trackers."""
        for tracker in self._trackers:
            tracker.log_sample(row)

    def sync(self) -> None:
        """Force what was written to the disk; called before a checkpoint, so that none outlives its rows."""
        self._file.sync()

    def close(self) -> None:
        """Let go of the file and of the trackers."""
        self._file.close()
        for tracker in self._trackers:
            tracker.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _rewrite(path: Path, last_step: int) -> None:
    """Keep, byte for byte, the whole rows up to ``last_step``."""
    if not path.exists():
        return
    with publish(path) as temporary, path.open("rb") as old, temporary.open("wb") as new:
        for line in old:
            row = _parse(line)
            if row is not None and row["step"] <= last_step:
                new.write(line)


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _plain(value: Any, name: str, not_finite: dict[str, str]) -> Any:
    """A JSON-ready copy; names of values that are not finite are added to ``not_finite``."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()  # a zero-dimensional tensor or array
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        not_finite[name] = str(value)
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{name}.{key}", not_finite) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{name}.{index}", not_finite) for index, item in enumerate(value)]
    raise TypeError(f"metric {name}: {type(value).__name__} is not a plain value")


# -------------------------------------------------------------------------------------------------------- accumulating


_LOSSES = ("loss", "ce", "kd", "l2")
# labelled and signal: positions with a label, and with a teacher's row too; tokens: those that are learnt
_SUMS = (*_LOSSES, "labelled", "signal", "tokens", "padded_tokens", "timed_tokens", "positions")
_NUM_OLD_SUMS = len(_SUMS) - 1  # of a checkpoint from when all tokens were learnt: there are as many positions
_OF_TYPE = ("ce", "kd", "tokens", "positions", "kd_coverage")  # what a row says of one type

_Sums = dict[str, float]


class StepAccumulator:
    """Adds up micro-batch sums and divides once, by global counts, when a ``train`` row is due.

    Loss tensors are only held, not read, until then: counting a micro-batch never waits for the device. Sums are taken
    in float64 in the order of ``add``, whether or not a checkpoint came between: a continued run's rows agree.

    Args:
        types: all types the run draws from, in the order in which rows name them; the same on every rank.
        engine: adds the sums up over all ranks; None: this process is alone.
    """

    def __init__(self, types: Iterable[str], engine: Engine | None = None) -> None:
        self._engine = engine
        self._sums = {type: dict.fromkeys(_SUMS, 0.0) for type in types}
        self._pending: list[tuple[str, Tensor]] = []

    def add(
        self,
        type: str,
        output: LossOutput,
        *,
        tokens: int,
        positions: int | None = None,
        padded_tokens: int | None = None,
    ) -> None:
        """Count one micro-batch.

        Args:
            type: the micro-batch's type.
            output: its summed loss.
            tokens: those of its tokens that are learnt.
            positions: its real tokens, learnt or not; as many as ``tokens`` by default.
            padded_tokens: its tokens with padding, if the share of padding is wanted.
        """
        import torch  # here and below: readers of metrics do without

        sums = self._sums[type]
        positions = tokens if positions is None else positions
        sums["labelled"] += output.num_positions
        if output.num_distilled is None:
            sums["signal"] += output.num_signal
        sums["tokens"] += tokens
        sums["positions"] += positions
        sums["timed_tokens"] += positions
        sums["padded_tokens"] += positions if padded_tokens is None else padded_tokens
        # detached: the graph of a finished backward pass must not live on
        exact = torch.float32 if output.loss.device.type == "mps" else torch.float64
        values = [getattr(output, name).detach().reshape(()).to(exact) for name in _LOSSES]
        if output.num_distilled is not None:
            values.append(output.num_distilled.to(exact))
        self._pending.append((type, torch.stack(values)))

    def is_empty(self) -> bool:
        """Whether nothing was added since the last row, on any rank: each step since was left out. All ranks ask."""
        import torch

        own = sum(one["labelled"] for one in self._sums.values())
        return not (own if self._engine is None else float(self._engine.sum(torch.tensor(own))))

    def row(self, *, seconds: float, **values: Any) -> Row:
        """The values of a ``train`` row over all that was added since the last one; starts anew.

        Means of ``loss``, ``ce`` and ``l2`` are over labelled positions; ``kd`` is over positions that are distilled
        (those with a signal, or of these the chosen ones) and None without any; ``kd_coverage`` is their share of the
        labelled positions. ``tokens`` counts those that are learnt, ``positions`` all but padding, and
        ``tokens_per_second`` is of these.

        Args:
            seconds: wall time the micro-batches added by this process took.
            values: what else the row says (``kd_alpha``, ``kd_temperature``, ``lr``, ``grad_norm``, ...).

        Raises:
            ValueError: nothing was added on any rank.
        """
        sums = self._over_ranks()
        self._sums = {type: dict.fromkeys(_SUMS, 0.0) for type in sums}
        total = {name: sum(one[name] for one in sums.values()) for name in _SUMS}
        if total["labelled"] == 0:
            raise ValueError("a train row needs at least one labelled position")
        row = {**_means(total), **values, "seconds": seconds}
        row["tokens_per_second"] = total["timed_tokens"] / seconds if seconds > 0 else None
        if total["padded_tokens"] > row["positions"]:
            row["padding_share"] = 1.0 - row["positions"] / total["padded_tokens"]
        seen = {type: _means(one) for type, one in sums.items() if one["labelled"] > 0}
        row["by_type"] = {type: {key: one[key] for key in _OF_TYPE} for type, one in seen.items()}
        return row

    def _over_ranks(self) -> dict[str, _Sums]:
        """The sums of all ranks so far."""
        self._read_pending()
        if self._engine is None:
            return self._sums
        import torch

        own = torch.tensor([list(one.values()) for one in self._sums.values()], dtype=torch.float64)
        total = self._engine.sum(own).tolist()
        return {type: dict(zip(_SUMS, one, strict=True)) for type, one in zip(self._sums, total, strict=True)}

    def _read_pending(self) -> None:
        if self._pending:
            import torch

            values = iter(torch.cat([one for _, one in self._pending]).cpu().tolist())
            for type, one in self._pending:
                for name in (*_LOSSES, "signal")[: len(one)]:
                    self._sums[type][name] += next(values)
            self._pending.clear()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, as plain values: the sums of all ranks, which each of them asks for."""
        # The seconds of the tokens so far are not the next process's.
        sums = {type: {**one, "timed_tokens": 0.0} for type, one in self._over_ranks().items()}
        return {"types": list(sums), "sums": [list(one.values()) for one in sums.values()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict()``; types that this run does not draw from keep what was counted of them."""
        share = 1.0 if self._engine is None or self._engine.is_main else 0.0  # the main rank has what all had
        for type, kept in zip(state["types"], state["sums"], strict=True):
            sums = [*kept, kept[_SUMS.index("tokens")]] if len(kept) == _NUM_OLD_SUMS else kept
            if type in self._sums or any(sums):
                self._sums[type] = {name: share * float(one) for name, one in zip(_SUMS, sums, strict=True)}
        self._pending.clear()


def _means(sums: _Sums) -> Row:
    labelled, with_signal = sums["labelled"], sums["signal"]
    return {
        "loss": sums["loss"] / labelled,
        "ce": sums["ce"] / labelled,
        "kd": sums["kd"] / with_signal if with_signal else None,
        "l2": sums["l2"] / labelled,
        "tokens": int(sums["tokens"]),
        "positions": int(sums["positions"]),
        "kd_coverage": with_signal / labelled,
    }
