"""This project's steps and what they consist of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import torch
from benchmarks.speed.setting import BETAS, CLIP, DECAY, LR, Setting
from torch import Tensor

from liquid_llm.capture.scoring import record_seed
from liquid_llm.data.loader import collate
from liquid_llm.data.types import MicroBatch
from liquid_llm.losses.plan import choose_plan
from liquid_llm.losses.signals import DenseSignal, Signal, SparseSignal
from liquid_llm.models.heads import output_head
from liquid_llm.optimizers import build_optimizer
from liquid_llm.passes import SignalOf
from liquid_llm.runtime import keep_freed_memory
from liquid_llm.schedules import Constant, StepSchedules
from liquid_llm.signal_store.codecs import usual_codec
from liquid_llm.teachers.online import OnlineTeacher
from liquid_llm.training import Progress, Student, Trainer

ALPHA, TEMPERATURE = 0.5, 2.0
CODEC = "tail"


class Ours:
    """Steps of one student each, so that none finds weights that another has moved far."""

    def __init__(self, setting: Setting) -> None:
        if setting.device == "cpu":
            keep_freed_memory()  # as `liquid train` does
        self.setting = setting
        loaded = setting.load_teacher()
        self._tokenizer = loaded.tokenizer
        self.vocab_size = len(loaded.tokenizer)
        self.teacher = OnlineTeacher(loaded, self.vocab_size)
        self._ids = setting.token_ids()
        self._as_they_come, self._own = setting.batches(), setting.own_batches()
        self._codec = usual_codec(CODEC, num_positions=1)  # as a small store has it
        self._payloads = self._capture()
        self._at: dict[str, int] = {}
        self._batch = self._collate(self._as_they_come[0])
        self._signal: Signal = self._decode(self._as_they_come[0])
        self._trainers: dict[str, Trainer] = {}
        self._hidden: Tensor | None = None
        self._dense: DenseSignal | None = None

    def works(self) -> dict[str, Callable[[], None]]:
        """Name -> what is timed. A name that ends in ``*`` takes this project's own batches."""
        found: dict[str, Callable[[], None]] = {
            "teacher": self._ask_teacher,
            "teacher body": lambda: self.teacher.signal(self._batch) and None,
            "student body": self._body,
            "decode": lambda: self._decode(self._numbers) and None,
            "loss online": lambda: self._loss(self._dense),
            "loss stored": lambda: self._loss(self._signal),
            "loss CE": lambda: self._loss(None),
            "products online": lambda: self._products(self._dense),
            "products CE": lambda: self._products(None),
        }
        for kind in ("CE", "online", "stored"):
            for name in (kind, f"{kind}*"):
                found[name] = lambda kind=kind: self._trainer(kind).step() and None  # type: ignore[misc, assignment]
        return found

    def prepare(self) -> dict[str, Callable[[], None]]:
        """Name -> what comes before it and is not timed: the next batch, and what a run has ready ahead of the step."""
        found = {name: (lambda name=name: self._next(name)) for name in self.works()}  # type: ignore[misc]
        for name in found:
            if name.startswith(("loss", "products")):
                found[name] = lambda name=name: self._next_states(name)  # type: ignore[misc]
        return found

    # ---------------------------------------------------------------------------------------------------- batches

    def _collate(self, numbers: list[int]) -> MicroBatch:
        return collate("math_tool", [self._ids[number] for number in numbers]).to(self.teacher.device)

    def _next(self, name: str) -> None:
        batches = self._own if name.endswith("*") else self._as_they_come
        turn = self._at[name] = self._at.get(name, -1) + 1
        self._numbers = batches[turn % len(batches)]
        self._batch = self._collate(self._numbers)
        if name.startswith("stored"):
            self._signal = self._decode(self._numbers).to(self.teacher.device)

    def _next_states(self, name: str) -> None:
        self._next(name)
        self._hidden = self._student.states(self._batch).detach().requires_grad_()
        self._dense = self.teacher.signal(self._batch) if name.endswith("online") else None
        if name.endswith("stored"):
            self._signal = self._decode(self._numbers).to(self.teacher.device)

    def _endless(self, signal_of: SignalOf | None) -> Iterator[tuple[MicroBatch, SignalOf | None]]:
        while True:
            yield self._batch, signal_of

    # ------------------------------------------------------------------------------------------------------ steps

    def _trainer(self, kind: str) -> Trainer:
        if kind not in self._trainers:
            signal_of: dict[str, SignalOf | None] = {
                "CE": None,
                "online": lambda part, _: self.teacher.signal(part),
                "stored": lambda part, positions: self._signal.part(positions),
            }
            model = self.setting.build_student(self._tokenizer)
            alpha = 0.0 if kind == "CE" else ALPHA
            schedules = StepSchedules(Constant(alpha), Constant(TEMPERATURE), Constant(0.0), Constant(LR))
            optimizer = build_optimizer(model, lr=LR, weight_decay=DECAY, betas=BETAS)
            batches = self._endless(signal_of[kind])
            student = Student(model, self.setting.dtype)
            self._trainers[kind] = Trainer(student, optimizer, schedules, batches, Progress(), 10**9, 1, CLIP)
        return self._trainers[kind]

    @cached_property
    def _student(self) -> Student:
        return Student(self.setting.build_student(self._tokenizer), self.setting.dtype)

    def _body(self) -> None:
        self._student.states(self._batch).sum().backward()  # type: ignore[no-untyped-call]
        self._student.zero_grad()

    def _ask_teacher(self) -> None:
        """Its forward pass as one would write it, all logits and all, which nobody wants: chunk by chunk."""
        signal, chunk = self.teacher.signal(self._batch), self._chunk
        with torch.no_grad():
            for start in range(0, signal.num_positions, chunk):
                signal.head.logits(signal.hidden[start : start + chunk])

    # ------------------------------------------------------------------------------------------------------- loss

    @property
    def _chunk(self) -> int:
        return choose_plan(self.teacher.device, self.vocab_size).chunk_tokens

    def _loss(self, signal: Signal | None) -> None:
        assert self._hidden is not None
        values = self._trainer("CE" if signal is None else "online").schedules.at(0)
        output = self._student.loss(self._hidden, self._batch, signal, values.objective("math_tool"))
        output.loss.backward()  # type: ignore[no-untyped-call]
        self._hidden.grad = None
        self._student.zero_grad()

    def _products(self, dense: DenseSignal | None) -> None:
        """The matrix products of the loss in its own chunks, and nothing else."""
        assert self._hidden is not None
        hidden, weight = self._hidden.detach(), output_head(self._student.model).weight.detach()
        if hidden.dtype != weight.dtype:
            weight = weight.to(hidden.dtype)
        total = torch.zeros_like(weight)
        for start in range(0, hidden.shape[0], self._chunk):
            part = hidden[start : start + self._chunk]
            logits = torch.mm(part, weight.t())
            if dense is not None:
                torch.mm(dense.hidden[start : start + self._chunk], dense.head.weight.t())
            torch.mm(logits, weight)
            total.addmm_(logits.t(), part)

    # ----------------------------------------------------------------------------------------------------- signal

    def _capture(self) -> list[dict[str, Tensor]]:
        """The stored signal of all texts; kept in a file for the next run in the same folder."""
        path = Path(self.setting.folder) / "signal.pt"
        if path.exists():
            found: list[dict[str, Tensor]] = torch.load(path)
            return found
        found = []
        with torch.inference_mode():
            for number, row in enumerate(self._ids):
                ids = torch.from_numpy(row.astype("int64"))[None]
                hidden = self.teacher.hidden(ids)[0, :-1]
                rows = self._codec.encode(self.teacher.head.logits(hidden).float(), record_seed(str(number)), 0)
                found.append(self._codec.pack(rows))
        torch.save(found, path)
        return found

    def _decode(self, numbers: list[int]) -> SparseSignal:
        counts = [len(self._ids[number]) - 1 for number in numbers]
        parts = [
            self._codec.decode(self._payloads[number], 0, count, TEMPERATURE, self.vocab_size)
            for number, count in zip(numbers, counts, strict=True)
        ]
        return SparseSignal.join(parts, counts)  # type: ignore[arg-type]
