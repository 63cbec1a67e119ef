"""Messages between ranks that train and ranks that hold the teacher alone (``--teacher_ranks``).

    training rank   one of the first M processes: they take the steps, and their engine knows nobody else
    teacher rank    one of the last N: it answers what training ranks ask, and takes part in nothing else
    question        plain values and tensors, from a training rank to a teacher rank
    answer          one tensor whose shape the asker knows, or plain values

Messages go from one process to another over gloo, through the memory of their hosts, whatever the devices are. A
training rank says goodbye with its exit code; teacher ranks end when all have. Whoever ends without a word closes its
connections, on which the others end too, as in ``distributed``.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore

from liquid_llm.distributed import (
    MEETING_TIME,
    START_TIME,
    STEP_TIME,
    Engine,
    ProcessEngine,
    Ranks,
    join_engine,
    pack,
    unpack,
)
from liquid_llm.errors import RankError, UsageError

_SIZE, _QUESTION, _WORDS_SIZE, _WORDS, _NUMBERED = range(5)  # what a message is; answers have numbers from the last on
_NUMBERS = 2**16  # more than are ever under way at a time
_LOOK_SECONDS = 0.2
_GOODBYE = timedelta(seconds=30)
_EVER = timedelta(days=365)  # texts without a teacher may be trained on for long


def join_ranks(device: torch.device, teacher_ranks: int) -> Engine:
    """As ``join_engine``; of so many teacher ranks, with the link to or from them.

    Raises:
        UsageError: as ``join_engine``; too few processes for so many teacher ranks.
        RankError: the ranks do not find each other.
    """
    if not teacher_ranks:
        return join_engine(device)
    require_training_ranks(teacher_ranks, Ranks.read().world_size)
    engine, ranks = join_engine(device, teacher_ranks), Ranks.read()
    assert isinstance(engine, ProcessEngine)
    link = TrainingLink if ranks.rank < ranks.world_size - teacher_ranks else TeacherLink
    engine.link = link(engine, ranks, teacher_ranks)
    return engine


def require_training_ranks(teacher_ranks: int, processes: int) -> None:
    """Raise UsageError unless, of so many processes, one is left to train."""
    if teacher_ranks < processes:
        return
    raise UsageError(
        "too few processes: the last of them hold the teacher, and none is left to train",
        where=f"--teacher_ranks={teacher_ranks}",
        got=processes,
        expected=f"at least {teacher_ranks + 1}",
        remedy="start more of them (torchrun --nproc-per-node), or leave --teacher_ranks out",
    )


class _Link:
    def __init__(self, engine: ProcessEngine, ranks: Ranks, teacher_ranks: int) -> None:
        self.training_ranks, self.teacher_ranks = ranks.world_size - teacher_ranks, teacher_ranks
        self._engine, self._rank = engine, ranks.rank
        with engine.exchange():
            store = PrefixStore("link", engine.store)
            self._group: Any = dist.ProcessGroupGloo(store, ranks.rank, ranks.world_size, MEETING_TIME)

    def _send(self, rank: int, tensor: Tensor, tag: int, within: timedelta = STEP_TIME) -> None:
        self._group.send([tensor], rank, tag).wait(within)

    def _receive(self, rank: int, tensor: Tensor, tag: int, within: timedelta = START_TIME) -> Tensor:
        self._group.recv([tensor], rank, tag).wait(within)
        return tensor

    def _send_packed(self, rank: int, packed: Tensor, size_tag: int, tag: int) -> None:
        self._send(rank, torch.tensor([len(packed)]), size_tag)
        self._send(rank, packed, tag)


class TrainingLink(_Link):
    """What a training rank asks teacher ranks; from any thread."""

    def __init__(self, engine: ProcessEngine, ranks: Ranks, teacher_ranks: int) -> None:
        super().__init__(engine, ranks, teacher_ranks)
        self._turn = threading.Lock()  # one message after another
        self._numbers = itertools.count()

    def ask_all(self, question: Mapping[str, Any]) -> Any:
        """Ask every teacher rank; the words of the one that answers this rank."""
        with self._engine.exchange():
            for teacher in range(self.teacher_ranks):
                self._ask(teacher, {**question, "answers": self._teacher_of(0) == teacher})
            answering = self.training_ranks + self._teacher_of(0)
            size = self._receive(answering, torch.zeros(1, dtype=torch.int64), _WORDS_SIZE)
            return unpack(self._receive(answering, torch.empty(int(size), dtype=torch.uint8), _WORDS))

    def ask(self, question: Mapping[str, Any], answer: Tensor) -> None:
        """Ask the teacher rank whose turn it is; what it says is written into ``answer``, which lies on the CPU.

        Raises:
            RankError: a teacher rank has ended, or does not answer within half an hour.
        """
        number = next(self._numbers)
        teacher, tag = self._teacher_of(number), _NUMBERED + number % _NUMBERS
        with self._engine.exchange():
            # Expected before it is asked for: then it comes as soon as it is there.
            coming = self._group.recv([answer.view(-1).view(torch.uint8)], self.training_ranks + teacher, tag)
            self._ask(teacher, {**question, "number": number})
            coming.wait(STEP_TIME)

    def stop_asked(self) -> bool:
        """Whether a teacher rank was asked to stop."""
        with self._engine.exchange():
            return bool(self._engine.store.check(["stop"]))

    def close(self, exit_code: int) -> None:
        """Say goodbye; a teacher rank that is gone does not hear it."""
        for teacher in range(self.teacher_ranks):
            with contextlib.suppress(RuntimeError), self._turn:
                self._send(self.training_ranks + teacher, torch.tensor([-1 - exit_code]), _SIZE, _GOODBYE)

    def _teacher_of(self, number: int) -> int:
        """Which teacher rank this rank's question of that number goes to: all have as many of all ranks together."""
        return (self._rank + number * self.training_ranks) % self.teacher_ranks

    def _ask(self, teacher: int, question: Mapping[str, Any]) -> None:
        packed = pack(question)
        with self._turn:
            self._send_packed(self.training_ranks + teacher, packed, _SIZE, _QUESTION)


class TeacherLink(_Link):
    """What a teacher rank is asked, and its answers."""

    def __init__(self, engine: ProcessEngine, ranks: Ranks, teacher_ranks: int) -> None:
        super().__init__(engine, ranks, teacher_ranks)
        self._heard: queue.Queue[tuple[int, Tensor | int | RuntimeError]] = queue.Queue()
        self._sending: tuple[Any, Tensor] | None = None
        for rank in range(self.training_ranks):
            threading.Thread(target=self._listen, args=(rank,), name=f"rank {rank}", daemon=True).start()

    def questions(self, stopping: Callable[[], bool]) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Who asks, and what, as it comes; until all training ranks have said goodbye.

        Args:
            stopping: whether this process was asked to stop: the training ranks are told, and end it in their time.

        Raises:
            RankError: the training ranks end otherwise than well, or one is gone.
        """
        left, told = self.training_ranks, False
        while left:
            if stopping() and not told:
                with self._engine.exchange():
                    self._engine.store.set("stop", "1")
                told = True
            try:
                rank, heard = self._heard.get(timeout=_LOOK_SECONDS)
            except queue.Empty:
                continue
            if isinstance(heard, RuntimeError):
                with self._engine.exchange():
                    raise heard
            if isinstance(heard, Tensor):
                yield rank, unpack(heard)
            elif heard:
                raise RankError("the ranks that train have ended", exit_code=heard, speaks=False)
            else:
                left -= 1

    def tell(self, rank: int, words: Mapping[str, Any]) -> None:
        """Answer ``TrainingLink.ask_all``."""
        with self._engine.exchange():
            self._send_packed(rank, pack(words), _WORDS_SIZE, _WORDS)

    def answer(self, rank: int, number: int, tensor: Tensor) -> None:
        """Answer the question of that number; it is on its way while the next is worked on."""
        with self._engine.exchange():
            if self._sending is not None:
                self._sending[0].wait(STEP_TIME)
            sent = tensor.contiguous().view(-1).view(torch.uint8)
            self._sending = self._group.send([sent], rank, _NUMBERED + number % _NUMBERS), sent

    def close(self, exit_code: int) -> None:
        """Training ranks find out by themselves, from the exit code that is left or the connection."""

    def _listen(self, rank: int) -> None:
        """Hear what one rank says until it says goodbye or is gone."""
        try:
            while True:
                size = int(self._receive(rank, torch.zeros(1, dtype=torch.int64), _SIZE, _EVER))
                if size < 0:
                    self._heard.put((rank, -1 - size))
                    return
                self._heard.put((rank, self._receive(rank, torch.empty(size, dtype=torch.uint8), _QUESTION)))
        except RuntimeError as error:
            self._heard.put((rank, error))
