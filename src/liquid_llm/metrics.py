"""What a run says about its course: rows of ``metrics.jsonl`` and TensorBoard events.

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

import itertools
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from liquid_llm.storage.local import published, translated

if TYPE_CHECKING:
    from torch import Tensor

    from liquid_llm.losses.signals import LossOutput

FILE_NAME = "metrics.jsonl"
TENSORBOARD_FOLDER = "tb"
_OF_MEMORY = ("peak_memory_bytes", "device_peak_memory_bytes", "device_reserved_bytes", "rss_bytes")  # the first: host
TIMING_KEYS = frozenset({"seconds", "tokens_per_second", "signal_wait_seconds", "eval_seconds", "time", *_OF_MEMORY})

_BLOCK_LINES = 32
_MAX_WAIT_SECONDS = 5.0

_log = logging.getLogger(__name__)

Row = dict[str, Any]


# ------------------------------------------------------------------------------------------------------------- reading


def iter_metrics(run_dir: str | Path) -> Iterator[tuple[int, Row | None]]:
    """Yield ``(line number, row)`` of a run's metrics; the row is None where a line is torn or no JSON object.

    Nothing is yielded when the file does not exist.
    """
    path = Path(run_dir) / FILE_NAME
    if not path.exists():
        return
    number = 0
    with path.open("rb") as lines:
        while block := list(itertools.islice(lines, _BLOCK_LINES)):
            for row in _parse_block(block):
                number += 1
                yield number, row


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


def _parse_block(lines: list[bytes]) -> list[Row | None]:
    """Several lines at once: a fifth faster to parse and, as their keys are then shared, to work on."""
    # With a zero between them, two broken lines do not complete each other to one object; only a forged file could.
    try:
        values = json.loads(b"[" + b",0,".join(lines) + b"]")
    except ValueError:
        return [_parse(line) for line in lines]
    rows = values[::2]
    whole = len(values) == 2 * len(lines) - 1 and lines[-1].endswith(b"\n")
    return [_checked(row) for row in rows] if whole else [_parse(line) for line in lines]


def _parse(line: bytes) -> Row | None:
    """A row, or None for a torn line: one without its newline, or one that is no JSON object with a step."""
    if not line.endswith(b"\n"):
        return None
    try:
        return _checked(json.loads(line))
    except ValueError:  # also undecodable bytes
        return None


def _checked(row: object) -> Row | None:
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


# ------------------------------------------------------------------------------------------------------------- writing


class MetricsWriter:
    """Appends rows to ``metrics.jsonl`` and to TensorBoard events; one writer a run directory, on rank 0.

    Args:
        run_dir: the run directory; made if absent.
        resume_step: finished steps of the checkpoint being continued: rows after it are dropped, atomically.
            None starts the file afresh.
        tensorboard: whether events are written too.

    Raises:
        StorageError: the files cannot be written (full disk, no permission).
    """

    def __init__(self, run_dir: str | Path, *, resume_step: int | None, tensorboard: bool = True) -> None:
        self._path = Path(run_dir) / FILE_NAME
        with translated(self._path, writing=True):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _rewrite(self._path, -1 if resume_step is None else resume_step)
            self._file = self._path.open("ab", buffering=0)
        self._events = _event_writer(Path(run_dir) / TENSORBOARD_FOLDER, resume_step) if tensorboard else None

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
        line = json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"
        with translated(self._path, writing=True):
            _write_all(self._file.fileno(), line.encode())
            if self._events is not None:
                for tag, value in _scalars(row, kind):
                    self._events.add_scalar(tag, value, step)
                self._events.flush()
        return row

    def sync(self) -> None:
        """Force what was written to the disk; called before a checkpoint, so that none outlives its rows."""
        with translated(self._path, writing=True):
            os.fsync(self._file.fileno())
            if self._events is not None:
                self._events.flush()

    def close(self) -> None:
        """Write what is pending and let go of the files."""
        with translated(self._path, writing=True):
            self._file.close()
            if self._events is not None:
                self._events.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _event_writer(folder: Path, resume_step: int | None) -> Any:
    # TensorBoard costs a second to import, and reading metrics must not pay for it.
    from torch.utils.tensorboard import SummaryWriter

    first_step = 0 if resume_step is None else resume_step + 1
    with translated(folder, writing=True):
        if resume_step is None:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            _wait_until_later(folder)
        # Readers drop earlier events from the purge step on: those are about to be written again.
        return SummaryWriter(str(folder), purge_step=first_step)


def _wait_until_later(folder: Path) -> None:
    """Wait for the second after that in which the newest event file was begun.

    Readers take event files in the order of their names, which begin with that second; what follows it within the same
    second is the process id, which orders nothing.
    """
    begun = [name.name.split(".")[3] for name in folder.glob("events.out.tfevents.*")]
    newest = max((int(second) for second in begun if second.isdigit()), default=0)
    ahead = newest + 1 - time.time()
    if ahead > _MAX_WAIT_SECONDS:
        _log.warning("%s: earlier events are dated %.0f s ahead of this clock and will hide new ones", folder, ahead)
    elif ahead > 0:
        time.sleep(ahead)


def _rewrite(path: Path, last_step: int) -> None:
    """Keep, byte for byte, the whole rows up to ``last_step``."""
    if not path.exists():
        return
    with published(path) as temporary, path.open("rb") as old, temporary.open("wb") as new:
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


def _scalars(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    """TensorBoard tags of all numbers in a row: ``train/loss``, ``train/by_type/lm/ce``."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}/{key}")
        elif isinstance(value, int | float) and not isinstance(value, bool) and key != "step":
            yield f"{prefix}/{key}", float(value)


# -------------------------------------------------------------------------------------------------------- accumulating


_SUMS = ("loss", "ce", "kd", "l2", "positions", "signal_positions", "tokens", "padded_tokens", "timed_tokens")
_FIELD = {name: index for index, name in enumerate(_SUMS)}

Sums = list[list[float]]  # [types, sums]


class StepAccumulator:
    """Adds up micro-batch sums and divides once, by global counts, when a ``train`` row is due.

    Loss tensors are only held, not read, until then, so that a GPU is not waited for after every micro-batch. Sums are
    taken in float64 in the order of ``add``, whether or not a checkpoint came between: a continued run's rows agree.

    Args:
        types: all types a run may see, those of ``data.types`` if None; ranks agree on them.
    """

    def __init__(self, types: Iterable[str] | None = None) -> None:
        from liquid_llm.data.types import TYPES  # brings torch, which readers of metrics do without

        self._types = TYPES if types is None else tuple(types)
        self._sums = _zeros(len(self._types))
        self._pending: list[tuple[int, Tensor]] = []

    def add(self, type: str, output: LossOutput, *, tokens: int, padded_tokens: int | None = None) -> None:
        """Count one micro-batch.

        Args:
            type: the micro-batch's type.
            output: its summed loss.
            tokens: its real tokens.
            padded_tokens: its tokens with padding, if the share of padding is wanted.
        """
        import torch

        index = self._types.index(type)
        sums = self._sums[index]
        sums[_FIELD["positions"]] += output.num_positions
        sums[_FIELD["signal_positions"]] += output.num_signal
        sums[_FIELD["tokens"]] += tokens
        sums[_FIELD["timed_tokens"]] += tokens
        sums[_FIELD["padded_tokens"]] += tokens if padded_tokens is None else padded_tokens
        # detached: the graph of a finished backward pass must not live on
        exact = torch.float32 if output.loss.device.type == "mps" else torch.float64
        values = [value.detach().reshape(()).to(exact) for value in (output.loss, output.ce, output.kd, output.l2)]
        self._pending.append((index, torch.stack(values)))

    def row(
        self,
        *,
        seconds: float,
        reduce: Callable[[Sums], Sums] | None = None,
        **values: Any,
    ) -> Row:
        """The values of a ``train`` row over all that was added since the last one; starts anew.

        Means of ``loss``, ``ce`` and ``l2`` are over labelled positions; ``kd`` is over positions with a signal and
        None without any; ``kd_coverage`` is the share of labelled positions with a signal.

        Args:
            seconds: wall time the micro-batches added by this process took.
            reduce: adds the sums [types, sums] of all ranks; None on a single process.
            values: what else the row says (``kd_alpha``, ``kd_temperature``, ``lr``, ``grad_norm``, ...).

        Raises:
            ValueError: nothing was added on any rank.
        """
        sums = self.sums()
        self._sums = _zeros(len(self._types))
        if reduce is not None:
            sums = reduce(sums)
        total = [sum(column) for column in zip(*sums, strict=True)]
        if total[_FIELD["positions"]] == 0:
            raise ValueError("a train row needs at least one labelled position")
        row = _means(total)
        row.update(values)
        row["seconds"] = seconds
        row["tokens_per_second"] = total[_FIELD["timed_tokens"]] / seconds if seconds > 0 else None
        if total[_FIELD["padded_tokens"]] > row["tokens"]:
            row["padding_share"] = 1.0 - row["tokens"] / total[_FIELD["padded_tokens"]]
        seen = [(name, one) for name, one in zip(self._types, sums, strict=True) if one[_FIELD["positions"]] > 0]
        row["by_type"] = {name: _of_type(one) for name, one in seen}
        return row

    def sums(self) -> Sums:
        """This rank's sums since the last row, [types, sums] in the order of the types given."""
        if self._pending:
            import torch

            values = torch.stack([one for _, one in self._pending]).cpu().tolist()
            for (index, _), one in zip(self._pending, values, strict=True):
                for field, value in enumerate(one):
                    self._sums[index][field] += value
            self._pending.clear()
        return [list(one) for one in self._sums]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, as plain values."""
        sums = self.sums()
        for one in sums:
            one[_FIELD["timed_tokens"]] = 0.0  # their seconds are not the next process's
        return {"types": list(self._types), "sums": sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict()``.

        Raises:
            ValueError: the state is of other types.
        """
        if tuple(state["types"]) != self._types:
            raise ValueError(f"accumulated metrics are of types {state['types']}, this run's are {list(self._types)}")
        self._pending.clear()
        self._sums = [[float(value) for value in one] for one in state["sums"]]


def _zeros(num_types: int) -> Sums:
    return [[0.0] * len(_SUMS) for _ in range(num_types)]


def _means(sums: list[float]) -> Row:
    value = dict(zip(_SUMS, sums, strict=True))
    positions, with_signal = value["positions"], value["signal_positions"]
    return {
        "loss": value["loss"] / positions,
        "ce": value["ce"] / positions,
        "kd": value["kd"] / with_signal if with_signal else None,
        "l2": value["l2"] / positions,
        "tokens": int(value["tokens"]),
        "kd_coverage": with_signal / positions,
    }


def _of_type(sums: list[float]) -> Row:
    row = _means(sums)
    return {key: row[key] for key in ("ce", "kd", "tokens", "kd_coverage")}
