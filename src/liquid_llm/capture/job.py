"""The capture job: score samples with a teacher once and store its signal.

    window      the first ``seq_len`` tokens of a sample: what is scored and stored
    chunk       positions whose logits exist at the same time
    complete    said of a record that is whole and serves the window wanted; such samples are skipped, so a job that
                was stopped anywhere goes on where it was

The main thread runs the teacher and encodes; other threads check existing records, pack and write. (With a teacher on
the CPU the main thread packs too.) A sample that fails is reported and the rest goes on. A batch that does not fit into
the device's memory is cut, and so are those after it. Several processes may capture into one folder: records are equal
and appear whole.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from liquid_llm.capture.plan import Window, batches, plan
from liquid_llm.capture.scoring import LocalTeacher, Scratch
from liquid_llm.capture.served import ServedTeacher, Stopped
from liquid_llm.data.types import SampleSource
from liquid_llm.device import is_lost, is_out_of_memory, release_memory
from liquid_llm.errors import SignalError, StorageError
from liquid_llm.models.loading import LoadedModel
from liquid_llm.models.positions import max_positions
from liquid_llm.signal_store.codecs import Rows
from liquid_llm.signal_store.store import StoreWriter
from liquid_llm.teachers.online import OnlineTeacher, require_context

log = logging.getLogger(__name__)

_KEPT_FAILURES = 20  # each with its reason; of all others the count, whatever a store loses
_KEPT_REASONS, _OTHER_REASONS = 50, "other reasons"
_WRITE_FAILURES = 3  # in a row: storage has retried each already, so the rest would fail too
_PENDING_BYTES = 256 * 2**20  # encoded but not yet written; a slow store makes the teacher wait


class Failure(NamedTuple):
    """A sample that could not be captured, and why."""

    sample_id: str
    type: str
    reason: str


@dataclass
class CaptureSummary:
    """What a capture job did.

    Attributes:
        written, skipped: samples captured; samples that needed none (complete already, or given twice).
        failures: the first samples that could not be captured.
        reasons: how many have failed for what, without the values that differ from one to the next.
        too_large: how many of them do not fit into the device's memory even alone.
        consumers: what takes most of that memory, in words; filled in by who knows.
        tokens: real tokens scored and written.
        positions: rows stored: one for each learnt position, or for the share of these that is kept
            (``--kd_positions``, rounded up in each sample); where all are, one fewer a sample than its tokens.
        padded_tokens: tokens computed, padding included.
        bytes: of the files written.
        seconds: of the whole job.
        interrupted: it was asked to stop before the end; run again to go on.
    """

    written: int = 0
    skipped: int = 0
    failures: list[Failure] = field(default_factory=list)
    reasons: dict[str, int] = field(default_factory=dict)
    too_large: int = 0
    consumers: str = ""
    tokens: int = 0
    positions: int = 0
    padded_tokens: int = 0
    bytes: int = 0
    seconds: float = 0.0
    interrupted: bool = False

    def fail(self, failure: Failure) -> bool:
        """Count in a sample that could not be captured; whether it is one of the first, which are kept."""
        self._count(failure.reason.partition("; got ")[0], 1)
        if self.failed > _KEPT_FAILURES:
            return False
        self.failures.append(failure)
        return True

    def add_failures(self, other: CaptureSummary) -> None:
        """Count in those of another job."""
        self.failures = [*self.failures, *other.failures][:_KEPT_FAILURES]
        for reason, count in other.reasons.items():
            self._count(reason, count)

    def _count(self, reason: str, count: int) -> None:
        known = reason in self.reasons or len(self.reasons) < _KEPT_REASONS
        reason = reason if known else _OTHER_REASONS
        self.reasons[reason] = self.reasons.get(reason, 0) + count

    @property
    def failed(self) -> int:
        """Samples that could not be captured."""
        return sum(self.reasons.values())

    @property
    def bytes_per_token(self) -> float | None:
        """File bytes for each stored position, not for each of ``tokens``; None when nothing was written."""
        return self.bytes / self.positions if self.positions else None

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.seconds if self.tokens and self.seconds else None

    @property
    def is_whole(self) -> bool:
        """Whether all that was to be captured is there."""
        return not (self.interrupted or self.failed)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for the summary line."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "consumers"}
        return {
            **values,
            "failed": self.failed,
            "bytes_per_token": self.bytes_per_token,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": self.tokens_per_second,
            "failures": [failure._asdict() for failure in self.failures],
        }


def capture(
    datasets: Mapping[str, Sequence[SampleSource]],
    writers: Mapping[str, StoreWriter],
    teacher: LoadedModel | ServedTeacher,
    *,
    seq_len: int,
    batch_size: int,
    num_workers: int = 4,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
    stopping: Callable[[], bool] = lambda: False,
    rank: int = 0,
    world_size: int = 1,
) -> CaptureSummary:
    """Store the teacher's signal of every sample that has no complete record yet.

    Args:
        datasets: type -> its datasets.
        writers: type -> the store to write to, one for each type; all with one vocabulary.
        seq_len: tokens of a window.
        batch_size: times ``seq_len`` the padded tokens of one forward pass.
        num_workers: threads that check existing records and write new ones.
        overwrite: replace complete records too.
        progress: called with a number of tokens whenever so many are done: written, skipped or given up.
        stopping: asked between batches; true ends the job early, with everything begun written.
        rank, world_size: this process's share of the samples, decided by their ids alone.

    Returns:
        the summary, failed samples included.

    Raises:
        UsageError: the teacher cannot see ``seq_len`` tokens.
        StorageError: existing records cannot be read, or writing failed three times in a row or for every sample; or
            a teacher's server is lost.
    """
    started = time.monotonic()
    limit = teacher.max_tokens if isinstance(teacher, ServedTeacher) else max_positions(teacher.model)
    require_context(limit, seq_len, teacher.identity.id, "--seq_len")
    (vocab_size,) = {writer.identity.vocab_size for writer in writers.values()}
    asked = teacher if isinstance(teacher, ServedTeacher) else LocalTeacher(OnlineTeacher(teacher, vocab_size))
    with ThreadPoolExecutor(num_workers, "capture") as threads:
        job = _Job(asked, writers, threads, progress or (lambda tokens: None))
        found = plan(datasets, writers, seq_len, overwrite=overwrite, share=(rank, world_size), threads=threads)
        job.summary.skipped = found.skipped
        job.progress(found.skipped_tokens)
        for one, reason in found.refused:
            job.fail(one, reason)
        try:
            job.run(batches(found.todo, batch_size * seq_len), stopping)
        finally:
            job.finish()
    job.summary.seconds = time.monotonic() - started
    return job.summary


class _Job:
    """The running state of one capture: records under way to storage, and what came of them."""

    def __init__(
        self,
        teacher: LocalTeacher | ServedTeacher,
        writers: Mapping[str, StoreWriter],
        threads: ThreadPoolExecutor,
        progress: Callable[[int], None],
    ) -> None:
        self.summary = CaptureSummary()
        self.progress = progress
        self._teacher = teacher
        self._scratch = Scratch()
        self._writers = writers
        self._threads = threads
        self._pending: dict[Future[int], tuple[Window, int, int]] = {}  # bytes and rows
        self._pending_bytes = 0
        self._write_failures = 0  # in a row
        self._storage_error: StorageError | None = None
        self._max_tokens: int | None = None  # of a batch, padded; None until one did not fit

    def run(self, work: Sequence[Sequence[Window]], stopping: Callable[[], bool]) -> None:
        """Score all batches and wait for the last record to be written."""
        whole = False
        try:
            for batch in self._teacher.ahead(work, stopping):
                if stopping():
                    self.summary.interrupted = True
                    break
                for part in self._parts(batch):
                    self._score(part)
            whole = not self.summary.interrupted
        except Stopped:
            self.summary.interrupted = True
        finally:
            self._teacher.end(abandon=not whole)
            while self._pending:
                self._collect(FIRST_COMPLETED)
        if self._storage_error is not None and not self.summary.written:
            raise self._storage_error

    def finish(self) -> None:
        """Publish what the writers hold back. All are finished, though one fails; then the first error is raised."""
        errors: list[StorageError] = []
        for writer in dict.fromkeys(self._writers.values()):
            try:
                self.summary.bytes += writer.finish()
            except StorageError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def fail(self, window: Window, reason: str) -> None:
        """Count a sample that cannot be captured."""
        failure = Failure(window.sample_id, window.type, reason)
        if self.summary.fail(failure):
            log.warning("%s sample %r is not captured: %s", failure.type, failure.sample_id, failure.reason)
        self.progress(window.num_tokens)

    def _parts(self, batch: Sequence[Window]) -> list[list[Window]]:
        """A batch in runs of samples that hold at most as many padded tokens as have been found to fit."""
        parts: list[list[Window]] = [[]]
        longest = 0
        for window in batch:
            longest = max(longest, window.num_tokens)
            if parts[-1] and self._max_tokens is not None and (len(parts[-1]) + 1) * longest > self._max_tokens:
                parts.append([])
                longest = window.num_tokens
            parts[-1].append(window)
        return parts

    def _score(self, batch: Sequence[Window]) -> None:
        """Score a batch; should the teacher fail on it, what is left in halves or sample by sample."""
        left = list(batch)
        padded_tokens = len(batch) * max(window.num_tokens for window in batch)
        try:
            codec = {window.type: self._writers[window.type].codec for window in batch}
            self.summary.padded_tokens += padded_tokens
            for window, outcome, positions in self._teacher.score(batch, codec, self._scratch, self._num_kept):
                left.remove(window)
                if isinstance(outcome, SignalError):
                    self.fail(window, str(outcome))
                else:
                    self._write(window, outcome, positions)
        except (RuntimeError, IndexError) as error:  # what torch raises: out of memory, a kernel that refuses
            no_room = is_out_of_memory(error)
            if not no_room and is_lost(error):
                raise  # every later sample would fail as well
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__
        else:
            return
        # Only here is the failed batch let go of: the traceback held it.
        release_memory(self._teacher.device)
        if no_room and len(batch) == 1 and self._halve():
            self._score(left)  # with fewer logits at a time
        elif len(batch) == 1:
            self.summary.too_large += no_room
            self.fail(batch[0], f"{'it does not fit into memory' if no_room else 'the teacher failed'}: {reason}")
        elif no_room:
            self._max_tokens = max(1, padded_tokens // 2)
            self._halve()
            log.warning(
                "out of memory with %d samples: at most %d tokens a batch from now on (%s)",
                len(batch),
                self._max_tokens,
                reason,
            )
            for part in self._parts(left):
                self._score(part)
        else:
            log.warning("the teacher failed on a batch of %d samples: one by one now (%s)", len(batch), reason)
            for window in left:
                self._score([window])

    def _halve(self) -> bool:
        """Have fewer logits at a time; False where that is not possible."""
        head = self._teacher.head
        return head is not None and self._scratch.halve(head, self._teacher.device)

    def _num_kept(self, window: Window, num_learnt: int) -> int:
        return self._writers[window.type].identity.num_chosen(num_learnt)

    def _write(self, window: Window, rows: Rows, positions: NDArray[np.bool_]) -> None:
        size = sum(tensor.nbytes for tensor in rows.values())
        while self._pending and self._pending_bytes + size > _PENDING_BYTES:
            self._collect(FIRST_COMPLETED)
        writer = self._writers[window.type]
        # A teacher on the CPU needs all cores: packing beside it would stop it more than packing takes.
        packed = writer.codec.pack(rows) if self._teacher.device.type == "cpu" else None

        def work() -> int:
            return writer.write(window.sample(), window.num_tokens, packed or writer.codec.pack(rows), positions)

        self._pending[self._threads.submit(work)] = (window, size, len(next(iter(rows.values()))))
        self._pending_bytes += size
        self._collect(None)

    def _collect(self, until: str | None) -> None:
        """Take the outcome of finished writes; with ``until``, wait for one first."""
        done, _ = wait(self._pending, timeout=None if until else 0, return_when=until or FIRST_COMPLETED)
        for future in done:
            window, size, num_rows = self._pending.pop(future)
            self._pending_bytes -= size
            try:
                num_bytes = future.result()
            except StorageError as error:
                self._write_failures += 1
                self._storage_error = error
                if self._write_failures >= _WRITE_FAILURES:
                    raise
                self.fail(window, str(error))
                continue
            self._write_failures = 0
            self.summary.written += 1
            self.summary.tokens += window.num_tokens
            self.summary.positions += num_rows
            self.summary.bytes += num_bytes
            self.progress(window.num_tokens)
