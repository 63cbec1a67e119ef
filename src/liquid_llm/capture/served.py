"""Samples scored by a teacher behind a server: many are asked about at once, and encoded as their turn comes.

    log-probabilities   of each position the likeliest ids and what their probabilities leave of 1: codec ``topk`` at
                        T = 1 and nothing else, as ``topk`` says
    hidden states       after the last block, from files; final norm, head and codec are run here, so that any codec
                        can be had

Samples that come later are asked about while earlier ones are encoded and written, a bounded number at a time. The
threads that ask are daemons: a process that was told to end does not wait for a server.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from liquid_llm.capture.plan import Window
from liquid_llm.capture.scoring import NOWHERE, Scored, Scratch, score
from liquid_llm.errors import SignalError, StorageError
from liquid_llm.identity import ModelIdentity
from liquid_llm.losses.signals import OutputHead
from liquid_llm.models.final_part import FinalPart
from liquid_llm.served.client import Abandoned, Refused, Server, ServerFailed
from liquid_llm.served.protocol import Answer, BadAnswer, OtherServer, ask_log_probs, most_bytes, read_answer
from liquid_llm.served.states import read_states
from liquid_llm.signal_store.codecs import Codec
from liquid_llm.signal_store.codecs.topk import TopKCodec

_SPARE_IDS = 8  # rows that pad an embedding are hardly ever more of the likeliest
_LOOK_SECONDS = 0.1  # how often one who waits for an answer asks whether to stop
_MOST_IN_A_ROW = 3  # samples that a server which says it is well has failed on, before it is taken for not well


class Stopped(Exception):
    """The job was asked to stop while it waited for the server."""


@dataclass(frozen=True)
class ServedModel:
    """A model of a server, as it was in the beginning.

    Attributes:
        server: where it is asked.
        name: what the server calls it.
        identity: what its signal is stored under.
        vocab_size: ids that the tokenizer has.
        max_tokens: of a text that it can be asked about; None where the server does not say.
        fingerprint: the server's own word for its version and settings; None where it has none.
        requests: texts that it is asked about at a time.
        num_rows: of its embedding; ids from ``vocab_size`` on only pad it, and what they weigh is of the rest.
    """

    server: Server
    name: str
    identity: ModelIdentity
    vocab_size: int
    max_tokens: int | None
    fingerprint: str | None
    requests: int
    num_rows: int = 0

    def num_asked(self, k: int) -> int:
        """How many ids are asked for, so that k of them are tokens: some more where others may be among them."""
        return k + min(_SPARE_IDS, max(0, self.num_rows - self.vocab_size)) if k else 0

    def ask(self, ids: list[int], k: int, *, states: bool = False) -> Answer:
        """What it says of one text.

        Raises:
            BadAnswer, OtherServer: as ``read_answer``.
            Refused, StorageError, Abandoned: as ``Server.post``.
        """
        return self.read(self.post(ids, k, states=states), ids, k)

    def post(self, ids: list[int], k: int, *, states: bool = False) -> Any:
        """Its answer as it came. Raises as ``Server.post``."""
        asked = self.num_asked(k)
        question = ask_log_probs(self.name, ids, asked, states=states)
        return self.server.post("/v1/completions", question, most_bytes(len(ids), asked))

    def read(self, told: Any, ids: list[int], k: int) -> Answer:
        """An answer to ``post``. Raises as ``read_answer``."""
        return read_answer(told, self.name, self.fingerprint, ids, k, self.vocab_size, self.num_rows)


class ServedTeacher:
    """Scores samples as ``scoring.score`` does, with a server's help.

    Args:
        model: who is asked.
        k: ids of a position, where log-probabilities are what is stored.
        states: the folder in which the server leaves its hidden states, and the model's end; None for
            log-probabilities.
    """

    def __init__(self, model: ServedModel, k: int, states: tuple[Path, FinalPart] | None = None) -> None:
        self.model, self._k, self._states = model, k, states
        self.identity = model.identity
        self.max_tokens = model.max_tokens
        self.device = torch.device("cpu") if states is None else states[1].head.weight.device
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._asked: dict[Window, Future[Any]] = {}
        self._stopping: Callable[[], bool] = lambda: False
        self._in_a_row = 0
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    @property
    def vocab_size(self) -> int:
        """Ids that its distributions are over."""
        return self.model.vocab_size

    @property
    def head(self) -> OutputHead | None:
        """The output head that is run here, if one is."""
        return None if self._states is None else self._states[1].head

    def ahead(
        self, work: Sequence[Sequence[Window]], stopping: Callable[[], bool] = lambda: False
    ) -> Iterator[Sequence[Window]]:
        """The batches of ``work``, each when the server has been asked about its samples and some of those after."""
        self._stopping = stopping
        self.model.server.resume()  # an earlier unit may have been given up
        self._start()
        coming = iter(work)
        waiting: list[Sequence[Window]] = []
        while True:
            while len(self._asked) < 2 * self.model.requests and (batch := next(coming, None)) is not None:
                waiting.append(batch)
                for window in batch:
                    self._ask(window)
            if not waiting:
                return
            yield waiting.pop(0)

    def end(self, *, abandon: bool) -> None:
        """Let the threads that ask end, with what they are at; nobody waits for them.

        Args:
            abandon: end pauses between attempts as well: nobody wants what is still asked.
        """
        if abandon:
            self.model.server.give_up()
        for future in self._asked.values():
            future.cancel()  # else threads that go on with the next piece of work would ask about this one first
        for _ in self._threads:
            self._tasks.put(None)
        self._threads = []
        self._asked.clear()

    def score(
        self,
        batch: Sequence[Window],
        codecs: Mapping[str, Codec],
        scratch: Scratch,
        count: Callable[[Window, int], int],
    ) -> Iterator[Scored]:
        """As ``scoring.score``.

        Raises:
            StorageError: the server is lost, or is not the one it was.
            Stopped: the job was asked to stop while an answer was not there.
        """
        good: list[tuple[Window, Any]] = []
        for window in batch:
            try:
                good.append((window, self._take(window)))
            except SignalError as error:
                yield window, error, NOWHERE
        if self._states is not None:
            told = _ToldStates(self._states[1], self.model.vocab_size, good)
            yield from score(told, [window for window, _ in good], codecs, scratch, count)
            return
        for window, answer in good:
            codec, vocab_size = codecs[window.type], self.model.vocab_size
            assert isinstance(codec, TopKCodec)
            places = window.sample().learnt_positions(window.num_tokens)
            width = min(codec.k, vocab_size)
            ids, values = (torch.from_numpy(one[places][:, :width]) for one in (answer.ids, answer.log_probs))
            yield window, codec.encode_told(ids, values, vocab_size), places

    def _start(self) -> None:
        for number in range(self.model.requests):
            thread = threading.Thread(target=self._work, name=f"ask-{number}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()

    def _ask(self, window: Window) -> Future[Any]:
        future: Future[Any] = Future()

        def task() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(self._answer(window))
            except Exception as error:  # noqa: BLE001 whatever it is, who waits for the answer raises it
                future.set_exception(error)

        self._asked[window] = future
        self._tasks.put(task)
        return future

    def _take(self, window: Window) -> Any:
        """The answer about a sample; asked now where it has been taken before. Raises SignalError for it alone."""
        future = self._asked.pop(window, None) or self._ask(window)
        self._asked.pop(window, None)
        while True:
            try:
                return future.result(_LOOK_SECONDS)
            except NotYet:
                if self._stopping():
                    raise Stopped from None
            except Abandoned:
                raise Stopped from None

    def _answer(self, window: Window) -> Answer | Tensor:
        """What the server says of one sample.

        Raises:
            SignalError: it cannot be captured, and others may be.
            StorageError: no other could be either.
        """
        ids = window.sample().input_ids[: window.num_tokens].tolist()
        if not ids:
            raise SignalError("the sample has no tokens")
        if max(ids) >= self.model.vocab_size:
            raise SignalError("a token outside the vocabulary", got=max(ids), expected=f"under {self.model.vocab_size}")
        try:
            found = self._answer_about(ids)
        except BadAnswer as error:
            raise SignalError("what the server says of this sample cannot be", got=error) from error
        except Refused as error:
            if error.status == 404:  # the model is gone
                remedy = "see what the server serves, and run the same command again to go on"
                raise StorageError(
                    "the server refuses", where=self.model.server.url, got=error, remedy=remedy
                ) from error
            raise SignalError("the server refuses this sample", got=error) from error
        except OtherServer as error:
            raise StorageError(
                "the server is no longer the one that was asked in the beginning",
                where=self.model.server.url,
                got=error,
                remedy="see what runs there, and run the same command again to go on",
            ) from error
        except ServerFailed as error:
            raise self._failed(error) from error
        with self._lock:
            self._in_a_row = 0
        return found

    def _answer_about(self, ids: list[int]) -> Answer | Tensor:
        if self._states is None:
            if len(ids) == 1:  # nothing is predicted of it, and servers say nothing
                return Answer(np.zeros((0, self._k), np.int64), np.zeros((0, self._k)), np.zeros(0), None)
            return self.model.ask(ids, self._k)
        folder, end = self._states
        answer = self.model.ask(ids, 0, states=True)
        states: Tensor = read_states(folder, answer.path, ids, end.hidden_size, stopping=self._stopping)
        return states

    def _failed(self, error: ServerFailed) -> Exception:
        """A server that fails with 500 on one sample and is well otherwise has failed on the sample."""
        with self._lock:
            self._in_a_row += 1
            many = self._in_a_row >= _MOST_IN_A_ROW
        if error.status == 500 and not many and self.model.server.is_healthy():
            return SignalError("the server fails on this sample each time", got=error.got)
        return error


class _ToldStates:
    """What stands for a teacher in ``score``: the hidden states of a batch's samples are there already."""

    def __init__(self, end: FinalPart, vocab_size: int, told: Sequence[tuple[Window, Tensor]]) -> None:
        self._end = end
        self._told = [states for _, states in told]
        self.head = end.head.cut(vocab_size)
        self.device = self.head.weight.device

    def hidden(self, input_ids: Tensor, places: Tensor | None = None) -> Tensor:
        """What the head takes [batch, time, hidden], zeros behind each sample."""
        batch, time = input_ids.shape
        if len(self._told) != batch:
            raise ValueError(f"{batch} rows, and the states of {len(self._told)}")
        made = self.head.weight.new_zeros(batch, time, self._end.hidden_size)
        for row, states in zip(made, self._told, strict=True):
            row[: len(states)] = self._end.head_input(states.to(self.device))
        return made
