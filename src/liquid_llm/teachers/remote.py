"""A teacher on ranks of its own: they hold the model, training ranks its output head alone.

A training rank sends the token ids of a micro-batch and gets the hidden states of its labelled positions back, from
which it forms logits as if the model were its own. It asks ahead of need, in the threads that prepare micro-batches, so
that teacher and student compute at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from liquid_llm.data.types import MicroBatch
from liquid_llm.distributed_link import TeacherLink, TrainingLink
from liquid_llm.losses.signals import DenseSignal, OutputHead, Signal
from liquid_llm.passes import PassLimit
from liquid_llm.runtime import Choice
from liquid_llm.teachers.online import OnlineTeacher, own_loss
from liquid_llm.teachers.teacher import Prepared, Teacher


class RemoteTeacher(Teacher):
    """An online teacher that teacher ranks hold.

    Args:
        link: to them.
        spec: which teacher, as they know it.
        device: where its output head is to be.
        wanted: what they need to open it, see ``serve``.

    Attributes:
        head: its output head over the shared vocabulary.

    Raises:
        RankError: it cannot be opened there; the rank that tried says why.
    """

    dear = True

    def __init__(self, link: TrainingLink, spec: str, device: torch.device, wanted: Mapping[str, Any]) -> None:
        self._link, self._spec = link, spec
        told = link.ask_all({"spec": spec, "wanted": dict(wanted)})
        head: OutputHead = OutputHead(**told["head"])
        bias = None if head.bias is None else head.bias.to(device)
        self.head = replace(head, weight=head.weight.to(device), bias=bias)
        self.choices = {name: Choice(*choice) for name, choice in told["choices"].items()}
        self._dtype = getattr(torch, told["dtype"])
        self._description: dict[str, Any] = told["description"]

    def prepare(self, batch: MicroBatch, temperature: float) -> Prepared:
        """Its answer, waited for: to be called ahead of need."""
        return Prepared(self._ask(batch))

    def describe(self) -> dict[str, Any]:
        """Which model it is."""
        return self._description

    def signal(self, batch: MicroBatch, prepared: Prepared) -> Signal:
        """What was prepared; asked for now where nothing was."""
        signal = self._ask(batch) if prepared.signal is None else prepared.signal
        return signal.to(batch.input_ids.device)

    def own_loss(self, batch: MicroBatch, signal: Signal) -> float:
        """As of a model that is here."""
        return own_loss(batch, signal)

    def _ask(self, batch: MicroBatch) -> DenseSignal:
        hidden = torch.empty(batch.num_positions, self.head.weight.shape[1], dtype=self._dtype)
        self._link.ask({"spec": self._spec, "batch": _plain(batch)}, hidden)
        return DenseSignal(hidden, self.head)


def serve(
    link: TeacherLink, open_teacher: Callable[[str, Mapping[str, Any]], OnlineTeacher], stopping: Callable[[], bool]
) -> None:
    """Answer training ranks until they are done.

    Args:
        open_teacher: from its spec and what the run wants of it: ``vocab_size``, ``context``, ``documents`` (whether
            it must keep documents of a block apart).
        stopping: whether this process was asked to stop.

    Raises:
        DeviceError: not even one row of a micro-batch fits into this rank's memory.
        LiquidError: a teacher cannot be opened; training ranks have ended.
    """
    opened: dict[str, OnlineTeacher] = {}
    limits: dict[str, PassLimit] = {}
    for rank, question in link.questions(stopping):
        spec = question["spec"]
        if "wanted" in question:
            if spec not in opened:
                opened[spec], limits[spec] = open_teacher(spec, question["wanted"]), PassLimit()
            if question["answers"]:
                link.tell(rank, _describe(opened[spec]))
            continue
        link.answer(rank, question["number"], _compute(opened[spec], limits[spec], _batch(question["batch"])))


def _describe(teacher: OnlineTeacher) -> dict[str, Any]:
    head = {name: one.cpu() if isinstance(one, torch.Tensor) else one for name, one in vars(teacher.head).items()}
    choices = {name: (choice.value, choice.reason) for name, choice in teacher.choices.items()}
    dtype = str(teacher.hidden(torch.zeros(1, 2, dtype=torch.int64)).dtype).removeprefix("torch.")
    return {"head": head, "choices": choices, "dtype": dtype, "description": teacher.describe()}


def _compute(teacher: OnlineTeacher, limit: PassLimit, batch: MicroBatch) -> torch.Tensor:
    """Hidden states of the labelled positions, on the CPU."""
    parts = limit.run(
        [(batch, None)],
        lambda part, _, __: teacher.signal(part.to(teacher.device)).hidden.cpu(),
        lambda: None,
        device=teacher.device,
        where="the teacher",
        consumers=lambda: "",
    )
    return parts[0] if len(parts) == 1 else torch.cat(parts)


_SENT = ("input_ids", "positions", "lengths", "row_positions", "places")


def _plain(batch: MicroBatch) -> dict[str, Any]:
    """What a teacher reads of a micro-batch; numbers of four bytes suffice."""
    found = {name: getattr(batch, name) for name in _SENT}
    return {name: None if one is None else one.to("cpu", torch.int32) for name, one in found.items()}


def _batch(values: Mapping[str, Any]) -> MicroBatch:
    """The micro-batch of ``_plain``; its labels are nobody's business here."""
    found: dict[str, Any] = {name: None if one is None else one.to(torch.int64) for name, one in values.items()}
    return MicroBatch("", labels=found["input_ids"], targets=found["positions"], **found)
