"""The loop: ``Trainer.train`` and ``Trainer.step``.

A step draws ``grad_accum`` micro-batches, each with its teacher signal, adds up the gradients of their *summed* losses
divided by the number of labelled positions of the whole step, and updates the weights once. What happens now and then
(metrics, evaluation, checkpoints) is a hook ``(fn, every)`` run after the step.

The host waits for the device once a step, to see whether loss and gradient are finite. A micro-batch that does not fit
into the device's memory is computed in parts (``passes``).
"""

from __future__ import annotations

import contextlib
import logging
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from liquid_llm.data.types import MicroBatch
from liquid_llm.device import is_out_of_memory
from liquid_llm.distributed import Engine
from liquid_llm.errors import DeviceError, NumericalError
from liquid_llm.losses.fused import fused_loss
from liquid_llm.losses.objective import Objective
from liquid_llm.losses.plan import LossPlan
from liquid_llm.losses.signals import DenseSignal, LossOutput, OutputHead, Signal
from liquid_llm.models.compiled import CompiledBlocks
from liquid_llm.models.heads import evaluating, hidden_states, output_head
from liquid_llm.models.lora import without_adapter
from liquid_llm.passes import PassLimit, SignalOf
from liquid_llm.schedules import StepSchedules, StepValues
from liquid_llm.selection import PositionSelection
from liquid_llm.sharding import make_whole
from liquid_llm.step_sums import Tally, make_step_sums
from liquid_llm.streams import SideStream

T = TypeVar("T")
_log = logging.getLogger(__name__)
_NAMED = 32  # sample ids in a message


@dataclass
class SkippedSteps:
    """Steps that were left out because their loss or gradient was no number: weights and moments stayed as they were.

    Attributes:
        most_in_a_row: how many may follow each other; one more ends the run.
        count: so far.
        in_a_row: up to the last step.
    """

    most_in_a_row: int = 0
    count: int = 0
    in_a_row: int = 0

    def leave_out(self, error: NumericalError) -> None:
        """Count a step that ``error`` is about, and say it; raises it where it is one too many."""
        if self.in_a_row >= self.most_in_a_row:
            raise error
        self.in_a_row, self.count = self.in_a_row + 1, self.count + 1
        if error.speaks:
            _log.warning("%s; got %s: the step is left out (%d so far)", error.where, error.got, self.count)


@dataclass
class Progress:
    """Where a run is: what a checkpoint needs, beside tensors, to go on exactly.

    Attributes:
        step: finished optimizer steps.
        tokens_seen: real tokens trained on, of all ranks; padding does not count.
        data_position: micro-batches drawn by all ranks together.
        best_val_loss: of the evaluations so far.
        passes: how much of a micro-batch one pass takes.
        selection: which positions are distilled; None where all with a signal are.
        skipped: which steps were left out.
    """

    step: int = 0
    tokens_seen: int = 0
    data_position: int = 0
    best_val_loss: float = math.inf
    passes: PassLimit = field(default_factory=PassLimit)
    selection: PositionSelection | None = None
    skipped: SkippedSteps = field(default_factory=SkippedSteps)


@dataclass(frozen=True)
class ScoredBatch:
    """A micro-batch, or the part of one that was computed in one pass, and its loss."""

    batch: MicroBatch
    output: LossOutput


@dataclass(frozen=True)
class StepResult:
    """One optimizer step: the sums of this rank's micro-batches, what was applied, and what the ranks agreed on.

    Attributes:
        scored: empty where the step was left out.
        grad_norm: NaN where it was.
        stop: a rank was asked to stop before the step ended.
        save: a rank asks for a checkpoint.
    """

    step: int
    values: StepValues
    scored: tuple[ScoredBatch, ...]
    grad_norm: float
    stop: bool = False
    save: bool = False


class Student(nn.Module):
    """The student and its loss as one module: a micro-batch goes in, its summed loss comes out.

    Its parameters are the student's; those of the frozen reference student are not among them.

    Args:
        model: the student; its parameters stay float32, products run in ``compute_dtype``.
        compute_dtype: float32, or bfloat16 by autocast.
        reference: the frozen student of the keep-old-logits term, or None; ``model`` itself where that has an adapter,
            which is then left out.
        plan: how the loss goes about its work; None takes what suits the device.

    Attributes:
        compiled: the model's blocks, compiled for micro-batches of some shapes; None where they are not.
        is_dealt_out: whether each rank has a part of the weights only (``sharding``); then each backward sums the
            gradients over the ranks itself.
    """

    reference: nn.Module | None
    compiled: CompiledBlocks | None

    def __init__(
        self,
        model: nn.Module,
        compute_dtype: torch.dtype,
        reference: nn.Module | None = None,
        plan: LossPlan | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        object.__setattr__(self, "reference", reference)  # beside the modules: no part of what is trained
        self.compute_dtype = compute_dtype
        self.plan = plan
        self.is_dealt_out = False
        self.compiled = None

    @property
    def device(self) -> torch.device:
        """Where the model is, and what is computed with it."""
        return next(self.model.parameters()).device

    def forward(
        self, batch: MicroBatch, signal: Signal | Callable[[], Signal | None] | None, objective: Objective
    ) -> LossOutput:
        """The summed loss of a micro-batch; see ``losses/reference.py`` for the terms.

        Args:
            signal: the teacher's, or what gives it once the student's own states are on their way.

        Raises:
            ValueError: a gamma above zero without a reference student.
        """
        with self._arithmetic():
            hidden = self._states(self.model, batch)
            output = self._loss(hidden, batch, signal() if callable(signal) else signal, objective)
        # What runs before backward is hung onto the loss, which must be no view of another tensor for that.
        return replace(output, loss=output.loss.clone()) if self.is_dealt_out else output

    def passing(self, batch: MicroBatch) -> contextlib.AbstractContextManager[object]:
        """What forward and backward of a pass over ``batch`` are computed in; all else is computed outside of it."""
        return contextlib.nullcontext() if self.compiled is None else self.compiled.during(tuple(batch.input_ids.shape))

    def states(self, batch: MicroBatch) -> Tensor:
        """Hidden states of the labelled positions [labelled, hidden], in the dtype that products take."""
        with self._arithmetic():
            return self._states(self.model, batch)

    def ask(self, work: Callable[[Any], T]) -> T:
        """What ``work`` gives of the model, which it calls as it likes, without gradients.

        Of one that is dealt out what lies in no block is whole meanwhile: all ranks do the same work.
        """
        return work(self.model)

    @property
    def head(self) -> OutputHead:
        """The output head, with the parameters themselves."""
        return output_head(self.model)

    def loss(self, hidden: Tensor, batch: MicroBatch, signal: Signal | None, objective: Objective) -> LossOutput:
        """As ``forward``, of ``states`` that are there already."""
        with self._arithmetic():
            return self._loss(hidden, batch, signal, objective)

    def _loss(self, hidden: Tensor, batch: MicroBatch, signal: Signal | None, objective: Objective) -> LossOutput:
        return fused_loss(
            hidden,
            self.head,
            batch.targets,
            signal=signal,
            objective=objective,
            reference=self._reference_signal(batch) if objective.gamma > 0 else None,
            plan=self.plan,
            all_labelled=True,
        )

    def _reference_signal(self, batch: MicroBatch) -> DenseSignal:
        if self.reference is None:
            raise ValueError("a gamma above zero needs a reference student")
        # One that is the student itself is what its adapter leaves as it was.
        own = self.reference is self.model
        with contextlib.ExitStack() as stack:
            stack.enter_context(evaluating(self.reference))
            if own:
                stack.enter_context(without_adapter(self.model))
            if own and self.compiled is not None:
                stack.enter_context(self.compiled.during(None))
            return DenseSignal(self._states(self.reference, batch), output_head(self.reference))

    def _states(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        """As ``states``, of either model.

        Under autocast the last norm hands out float32, and the product with the head would follow it.
        """
        hidden = hidden_states(model, batch.input_ids, batch.places)
        return hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch.positions).to(self.compute_dtype)

    def _arithmetic(self) -> contextlib.AbstractContextManager[object]:
        if self.compute_dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)


@dataclass(frozen=True)
class _Drawn:
    """This rank's micro-batches of a step; labelled positions and real tokens of all ranks' together."""

    batches: list[tuple[MicroBatch, SignalOf | None]]
    positions: int
    tokens: int


def _count(drawn: list[tuple[MicroBatch, SignalOf | None]]) -> tuple[int, int]:
    """Labelled positions and real tokens."""
    return sum(batch.num_positions for batch, _ in drawn), sum(batch.num_tokens for batch, _ in drawn)


@dataclass
class Trainer:
    """Takes optimizer steps from ``progress.step`` to ``total_steps``.

    Attributes:
        student: gives the loss.
        optimizer: its parameter groups take the scheduled learning rate.
        schedules: applied before each step.
        batches: micro-batches from ``progress.data_position`` on, each with what gives its teacher signal (None: no
            teacher is asked). A signal is formed right before its loss, so that only one exists at a time.
        grad_accum: micro-batches a step, of all ranks.
        grad_clip: largest gradient norm, 0 for none.
        engine: the ranks that take each step together; ``grad_accum`` micro-batches are dealt out among them.
        hooks: ``(fn, every)``: ``fn(result)`` after every ``every``-th step, in order.
        stopping: says that the process was asked to stop.
        saving: says that it is time for a checkpoint.
        consumers: says what takes most of the device's memory, for the message that it does not suffice.
        names: the sample ids of a micro-batch by its number among those of all ranks, for the message of one that is
            no number.
        teacher_stream: where a signal is formed, beside the student's forward pass; None: before it.
    """

    student: Student
    optimizer: torch.optim.Optimizer
    schedules: StepSchedules
    batches: Iterator[tuple[MicroBatch, SignalOf | None]]
    progress: Progress
    total_steps: int
    grad_accum: int
    grad_clip: float
    engine: Engine = field(default_factory=Engine)
    hooks: Sequence[tuple[Callable[[StepResult], None], int]] = ()
    stopping: Callable[[], bool] = lambda: False
    saving: Callable[[], bool] = lambda: False
    consumers: Callable[[], str] = lambda: ""
    names: Callable[[int], Sequence[str]] = lambda number: ()
    teacher_stream: SideStream | None = None

    def __post_init__(self) -> None:
        if self.grad_accum % self.engine.world_size:
            ranks = self.engine.world_size
            raise ValueError(f"{self.grad_accum} micro-batches cannot be dealt out among {ranks} ranks")
        trained = [one for one in self.student.parameters() if one.requires_grad]  # in the order of the model
        self._sums = make_step_sums(self.engine, trained, dealt_out=self.student.is_dealt_out)
        self._ahead: _Drawn | None = None

    def train(self) -> bool:
        """Run to the end; False when it stopped early because the process was asked to."""
        while self.progress.step < self.total_steps:
            result = self.step()
            for hook, every in self.hooks:
                if self.progress.step % every == 0:
                    hook(result)
            # One process heeds a wish to stop at once; several have agreed on it in the step.
            if self.stopping() if self.engine.world_size == 1 else result.stop:
                return self.progress.step >= self.total_steps
        return True

    def step(self) -> StepResult:
        """One optimizer step; one whose loss or gradient is no number is left out where ``progress.skipped`` lets it.

        Raises:
            NumericalError: the loss or the gradient norm is not finite; the weights are as before the step.
            DeviceError: not even one row of a micro-batch fits into the device's memory; likewise.
        """
        values = self.schedules.at(self.progress.step)
        if self.progress.selection is not None:
            values = replace(values, min_entropies=self.progress.selection.thresholds())
        self._release_reference(values)
        for group in self.optimizer.param_groups:
            group["lr"] = values.lr
        drawn = self._ahead or self._draw_first()
        scored = self._add_gradients(drawn, values)
        losses = torch.stack([one.output.loss.detach() for one in scored])
        loss, stop, save = self._sum_over_ranks(losses.sum())
        try:
            grad_norm = self._clip(scored, losses, loss)
        except NumericalError as error:
            batches = [batch for batch, _ in drawn.batches]
            self.progress.skipped.leave_out(self._with_texts(error, batches, scored, losses))
            scored, grad_norm = [], math.nan
        else:
            self._update()
            self.progress.skipped.in_a_row = 0
            self.progress.tokens_seen += drawn.tokens
        self.progress.step += 1
        self.progress.data_position += self.grad_accum
        return StepResult(self.progress.step, values, tuple(scored), grad_norm, stop, save)

    def _draw(self) -> list[tuple[MicroBatch, SignalOf | None]]:
        """This rank's micro-batches of a step."""
        return [next(self.batches) for _ in range(self.grad_accum // self.engine.world_size)]

    def _draw_first(self) -> _Drawn:
        """Those of a step that no rank has drawn ahead; one process never does."""
        own = self._draw()
        positions, tokens = self.engine.sum(torch.tensor(_count(own))).tolist()
        return _Drawn(own, positions, tokens)

    def _sum_over_ranks(self, loss: Tensor) -> tuple[Tensor, bool, bool]:
        """Sum the gradients; the summed loss, whether to stop, and to save. The next step is drawn and counted."""
        has_next = self.engine.world_size > 1 and self.progress.step + 1 < self.total_steps
        ahead = self._draw() if has_next else []
        own = Tally(*_count(ahead), self.progress.passes.max_tokens, self.stopping(), self.saving())
        told, loss = self._sums.sum(own, loss)
        self._ahead = _Drawn(ahead, told.positions, told.tokens) if has_next else None
        # A cut that one rank had to make is made by all from here on, and is in the checkpoint of this step.
        self.progress.passes.max_tokens = told.max_tokens
        return loss, told.stop, told.save

    def _add_gradients(self, drawn: _Drawn, values: StepValues) -> list[ScoredBatch]:
        """Losses of this rank's micro-batches, their gradients added up."""

        def compute(part: MicroBatch, positions: slice, signal_of: SignalOf | None) -> ScoredBatch:
            on_device = part.to(self.student.device)
            objective = values.objective(part.type)
            with self.student.passing(on_device):
                output: LossOutput
                if signal_of is None or self.teacher_stream is None:
                    signal = None if signal_of is None else signal_of(on_device, positions)
                    output = self.student(on_device, signal, objective)
                else:
                    with self.teacher_stream.beside(lambda: signal_of(on_device, positions)) as take:
                        output = self.student(on_device, take, objective)
                (output.loss / drawn.positions).backward()  # type: ignore[no-untyped-call]
            # Its graph is done with; where an adapter is trained, that would keep what the first blocks were given.
            return ScoredBatch(part, replace(output, loss=output.loss.detach()))

        return self.progress.passes.run(
            drawn.batches,
            compute,
            lambda: self.optimizer.zero_grad(set_to_none=True),
            device=self.student.device,
            where=f"step {self.progress.step}",
            consumers=self.consumers,
            last_pass=self._sums.last_pass,
        )

    def _count_entropies(self, scored: list[ScoredBatch], device: torch.device) -> Tensor:
        """The student's entropies in this rank's passes, counted; nothing where all positions are distilled."""
        if self.progress.selection is None:
            return torch.empty(0, device=device)
        seen = [(one.batch.type, one.output.entropies) for one in scored]
        return self.progress.selection.count([(type, one) for type, one in seen if one is not None], device)

    def _update(self) -> None:
        try:
            self.optimizer.step()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            # Some weights may be updated already: the step cannot be taken again from here.
            raise DeviceError(
                "the optimizer's moments do not fit into memory",
                where=f"step {self.progress.step}",
                got=self.consumers() or None,
                remedy="use a smaller student, --grad_checkpoint or a larger device; the last checkpoint is intact",
            ) from error
        self.optimizer.zero_grad(set_to_none=True)

    def _release_reference(self, values: StepValues) -> None:
        # Gamma only falls: at zero the reference student is never needed again and its memory is given back.
        if values.default.gamma == 0:
            self.student.reference = None

    def _clip(self, scored: list[ScoredBatch], losses: Tensor, loss: Tensor) -> float:
        """Clip the gradients of the step; their norm before.

        Args:
            losses: of the passes of this rank.
            loss: their sum over all ranks.

        Raises:
            NumericalError: it, or the norm, is not finite: no rank updates its weights when one cannot.
        """
        every = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        parameters = [parameter for parameter in every if parameter.grad is not None]
        limit = self.grad_clip if self.grad_clip > 0 else math.inf
        norm = nn.utils.clip_grad_norm_(parameters, limit)
        if self.student.is_dealt_out:
            norm = make_whole(norm)
        # The one wait of a step: norm and losses come to the host together, and what positions were counted.
        found = torch.cat([one.reshape(-1).to(norm) for one in (norm, loss, losses)])
        counted = self._count_entropies(scored, norm.device)
        on_host = torch.cat([found, counted.flatten().to(found)]).cpu()
        grad_norm, total, *own = on_host[: len(found)].tolist()
        if not (math.isfinite(grad_norm) and math.isfinite(total)):
            self.optimizer.zero_grad(set_to_none=True)
            raise self._not_finite(grad_norm, own, [one.batch.type for one in scored])
        if self.progress.selection is not None:
            self.progress.selection.update(self.engine.sum(on_host[len(found) :].view_as(counted)))
        return float(grad_norm)

    def _not_finite(self, grad_norm: float, losses: list[float], types: list[str]) -> NumericalError:
        """What all ranks end with; one that it comes from says it."""
        error = NumericalError(
            "the loss or its gradient is not finite",
            where=f"step {self.progress.step}",
            got=f"loss sums {losses} of types {types}, gradient norm {grad_norm}",
            remedy="lower --lr, lengthen --warmup_steps or use --precision=float32, or leave such steps out with "
            "--skip_bad_steps; the last checkpoint is intact",
        )
        bad = self.engine.gather(not all(map(math.isfinite, losses)))
        error.speaks = self.engine.rank == bad.index(max(bad))
        return error

    def _with_texts(
        self, error: NumericalError, drawn: list[MicroBatch], scored: list[ScoredBatch], losses: Tensor
    ) -> NumericalError:
        """The same with the sample ids of this rank's micro-batches whose loss is no number; of all if none is."""
        # Passes come in the order of their micro-batches, whose positions they share out.
        ends = list(accumulate(batch.num_positions for batch in drawn))
        before = [0, *accumulate(one.batch.num_positions for one in scored)]
        own = [bisect_right(ends, at) for at in before[:-1]]
        bad = [index for index, loss in zip(own, losses.tolist(), strict=True) if not math.isfinite(loss)]
        texts = []
        for index in dict.fromkeys(bad or range(len(drawn))):
            number = self.progress.data_position + index * self.engine.world_size + self.engine.rank
            names = list(self.names(number))
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            if names:
                texts.append(f"{drawn[index].type} samples {', '.join(names[:_NAMED])}{more}")
        found = NumericalError(
            error.problem, where=error.where, got="; ".join([str(error.got), *texts]), remedy=error.remedy
        )
        found.speaks = error.speaks
        return found
