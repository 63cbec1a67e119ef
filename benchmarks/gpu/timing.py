"""Part 3: how long steps of the reference's shape take, and what they consist of.

Predictions are operations over the rates the session measured, a floor that no step goes below; the earlier forecast
for an H100 stands in the notes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from benchmarks.gpu import stepping
from benchmarks.gpu.context import Context
from benchmarks.gpu.shapes import (
    ALPHA,
    TEMPERATURE,
    build_student,
    build_teacher,
    compute_dtype,
    endless,
    lm_batch,
    new_optimizer,
    online_signal,
    scale_for,
    sparse_signal,
    stored_signal,
    trainer,
)
from benchmarks.gpu.timing_tools import at_rate, matrix_parameters, rate, seconds
from torch import Tensor

from liquid_llm.device import prepare_allocator
from liquid_llm.losses._sources import DenseRows
from liquid_llm.losses.fused import fused_loss
from liquid_llm.losses.objective import Objective
from liquid_llm.losses.plan import choose_plan
from liquid_llm.losses.products import HeadProducts
from liquid_llm.losses.rows.choice import COMPILED, EAGER, TRITON, choose_rows, kernel_error
from liquid_llm.losses.rows.two_passes import TwoPassRows
from liquid_llm.losses.signals import DenseSignal, OutputHead, Signal
from liquid_llm.models.heads import hidden_states, output_head
from liquid_llm.models.quantised import Int8Linear, linear_maps, replace_module
from liquid_llm.models.student import enable_gradient_checkpointing
from liquid_llm.training import Trainer

CHUNK_MIB = (96, 256, 512, 1024)
FLOOR = "operations at the measured bf16 rate"


def run(context: Context) -> None:
    prepare_allocator()
    bench = Bench(context)
    # What is asked for first; compiled blocks, which nobody has timed on a card, when the ratios are there;
    # last what an earlier session has measured.
    bench.steps()
    bench.pieces()
    bench.narrow_teacher()
    bench.forms()
    stepping.measure(bench)
    bench.profile()
    bench.chunks()


class Bench:
    """Models, a batch, and the times found."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.device = context.device
        self.scale = scale_for(context.device)
        self.dtype = compute_dtype(context.device)
        self.teacher = build_teacher(self.scale.teacher, self.scale, self.device)
        self.student = build_student(self.scale, self.device)
        enable_gradient_checkpointing(self.student)
        self.optimizer = new_optimizer(self.student)
        self.batch = lm_batch(self.scale, self.device)
        self.sparse = sparse_signal(self.batch.num_positions, self.scale.vocab_size, self.device)
        self.times: dict[str, float] = {}

    # ------------------------------------------------------------------------------------------------- operations

    @property
    def tokens(self) -> int:
        return self.batch.input_ids.numel()

    def head_operations(self, weight: Tensor, products: int) -> float:
        return 2.0 * products * self.batch.num_positions * weight.numel()

    @property
    def student_operations(self) -> float:
        """Forward, the same again for checkpointing, and twice that backward."""
        return 8.0 * self.tokens * matrix_parameters(self.student)

    @property
    def teacher_operations(self) -> float:
        return 2.0 * self.tokens * matrix_parameters(self.teacher.model)

    # ------------------------------------------------------------------------------------------------------- rows

    def time(
        self,
        name: str,
        work: Callable[[], object],
        operations: float | None = None,
        note: str = "",
        least: float = 2.0,
    ) -> None:
        """Time ``work`` and record it beside its floor; not where fewer than ``least`` seconds are left."""
        with self.context.attempt(name, seconds=least):
            if not self.context.on_gpu:
                work()
                self.context.ran(name)
                return
            took = self.times[name] = seconds(work, self.device)
            floor = None if operations is None else at_rate(operations, rate(self.context, "bf16"))
            per_second = f"{self.tokens / took:,.0f} tokens/s"
            self.context.row(
                name,
                1e3 * took,
                "ms",
                predicted=None if floor is None else 1e3 * floor,
                basis=FLOOR if floor else "",
                note=f"{per_second}{'; ' + note if note else ''}",
                more={"tokens_per_second": self.tokens / took},
            )

    def ratio(self, name: str, over: str, under: list[str], note: str = "") -> None:
        """Record how one time compares with the sum of others."""
        if over in self.times and all(one in self.times for one in under):
            total = sum(self.times[one] for one in under)
            self.context.row(name, self.times[over] / total, "times", note=note)

    def steps(self) -> None:
        head = output_head(self.student).weight
        body, three = self.student_operations, self.head_operations(head, 3)
        with_teacher = body + three + self.teacher_operations + self.head_operations(self.teacher.head.weight, 1)
        self.time("step, online", self.step(online_signal(self.teacher)), with_teacher, "H100 forecast 170 to 360 ms")
        stored = self.step(stored_signal(self.sparse))
        self.time("step, stored", stored, body + three, "H100 forecast 60 to 210 ms")
        self.time("step, CE only", self.step(None), body + three)
        self.time("teacher alone", lambda: self.teacher.signal(self.batch), self.teacher_operations)
        self.ratio("online / (teacher + CE only)", "step, online", ["teacher alone", "step, CE only"])
        self.ratio("stored / CE only", "step, stored", ["step, CE only"])

    def step(self, signal_of: Any, plan: Any = None) -> Callable[[], object]:
        return self.trainer(signal_of, plan).step

    def trainer(self, signal_of: Any, plan: Any = None) -> Trainer:
        """A trainer of the student, on the one batch."""
        return trainer(self.student, endless(self.batch, signal_of), self.dtype, optimizer=self.optimizer, plan=plan)

    def pieces(self) -> None:
        head = output_head(self.student)
        self.time("student body, forward and backward", self._body, self.student_operations)
        self.time("optimizer and clipping", self._update)
        hidden = self._states()
        dense = self.teacher.signal(self.batch)
        three, four = self.head_operations(head.weight, 3), self.head_operations(dense.head.weight, 1)
        for name, signal, operations in (
            ("loss, online T=2", dense, three + four),
            ("loss, stored T=2", self.sparse, three),
            ("loss, CE only", None, three),
        ):
            self.time(name, self.loss(hidden, head, signal), operations)
        self.time("loss, online T=2, no gradient", self.loss(hidden, head, dense, grad=False))
        self.time("matrix products of the online loss", self._products(hidden, head, dense), three + four)
        self.ratio("online loss / its products", "loss, online T=2", ["matrix products of the online loss"])

    def narrow_teacher(self) -> None:
        """Pass and bytes of such a teacher with its linear maps in 8 bits.

        The numbers are made here as torchao makes them, which need not be there.
        """
        teacher = build_teacher(self.scale.teacher, self.scale, self.device)
        model: Any = teacher.model
        before = _weight_bytes(model)
        for name, module in list(linear_maps(model)):
            scale = module.weight.detach().float().abs().amax(1, keepdim=True) / 127.5
            numbers = (module.weight.detach() / scale).round().clamp(-128, 127).to(torch.int8)
            replace_module(model, name, Int8Linear(numbers, scale, module.bias))
        self.context.row("teacher weights in 8 bits", _weight_bytes(model) / 2**30, "GiB", note=f"{before / 2**30:.2f}")
        self.time("teacher in 8 bits", lambda: teacher.signal(self.batch), self.teacher_operations)
        self.ratio("teacher in 8 bits / as it was", "teacher in 8 bits", ["teacher alone"], "predicted 1.03")

    def _body(self) -> None:
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            hidden = hidden_states(self.student, self.batch.input_ids)
        hidden.backward(torch.ones_like(hidden))
        self.optimizer.zero_grad(set_to_none=True)

    def _update(self) -> None:
        for parameter in self.student.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()

    def _states(self) -> Tensor:
        with torch.no_grad(), torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            hidden = hidden_states(self.student, self.batch.input_ids)
        rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, self.batch.positions)
        self.optimizer.zero_grad(set_to_none=True)
        return rows.to(self.dtype).requires_grad_()

    def loss(
        self,
        hidden: Tensor,
        head: OutputHead,
        signal: Signal | None,
        *,
        grad: bool = True,
        plan: Any = None,
        divergence: str = "forward_kl",
    ) -> Callable[[], None]:
        """The fused loss of the batch's positions, forward and backward."""

        def work() -> None:
            with torch.set_grad_enabled(grad):
                found = fused_loss(
                    hidden,
                    head,
                    self.batch.targets,
                    signal=signal,
                    objective=Objective(ALPHA, TEMPERATURE, divergence=divergence),
                    plan=plan,
                    all_labelled=True,
                ).loss
            if grad:
                found.backward()
            hidden.grad = head.weight.grad = None

        return work

    def _products(self, hidden: Tensor, head: OutputHead, signal: DenseSignal | None) -> Callable[[], None]:
        """The loss's own products in its own chunks and nothing else: logits of one or two heads, two gradients."""
        plan = choose_plan(self.device, self.scale.vocab_size)
        chunk = min(plan.chunk_tokens, hidden.shape[0])
        student = HeadProducts(OutputHead(head.weight.detach()), self.dtype, plan.product)
        raw = torch.empty(chunk, self.scale.vocab_size, device=self.device)
        operand = student.operand(raw.zero_())
        teacher = None if signal is None else HeadProducts(signal.head, signal.hidden.dtype, plan.product)
        states, weight_gradient = hidden.detach(), torch.zeros_like(head.weight, dtype=torch.float32)

        def work() -> None:
            for start in range(0, states.shape[0], chunk):
                part = states[start : start + chunk]
                rows = part.shape[0]
                student.raw_logits(part, raw[:rows])
                if teacher is not None and signal is not None:
                    teacher.raw_logits(signal.hidden[start : start + chunk], raw[:rows])
                student.hidden_gradient(operand[:rows])
                student.head_gradient(operand[:rows], part, weight_gradient, add=True)

        return work

    def forms(self) -> None:
        """The loss by each form of row arithmetic, in each size of chunk, beside its products; blocks of kernels."""
        head, hidden, dense = output_head(self.student), self._states(), self.teacher.signal(self.batch)
        usual = choose_plan(self.device, self.scale.vocab_size)
        chosen = choose_rows(self.device)
        reason = {"reason": chosen.reason} if self.context.on_gpu else {}
        if chosen.value == TRITON:
            for vocab_size in (10_000, self.scale.vocab_size):
                error = kernel_error(self.device, vocab_size)
                self.context.row(f"kernels against plain torch, {vocab_size} entries", error, "relative")
        signals = (("online T=2", dense, dense), ("stored T=2", self.sparse, None), ("CE only", None, None))
        for words, signal, taught in signals:
            products = f"products of the loss, {words}"
            self.time(products, self._products(hidden, head, taught))
            for form, size in itertools.product((EAGER, TRITON), (256, 512, 1024)):
                name = f"loss, {words}, {form}, chunk {size} MiB"
                if form == TRITON and chosen.value != TRITON:
                    self.context.skip(name, **reason)
                    continue
                plan = choose_plan(self.device, self.scale.vocab_size, chunk_bytes=size << 20)
                self.time(name, self.loss(hidden, head, signal, plan=replace(plan, rows=form)))
                self.ratio(f"{name} / its products", name, [products], "aim: 1.5")
        for form in (EAGER, COMPILED) if chosen.value == TRITON else (EAGER,):
            plan = replace(usual, rows=form)
            work = self.loss(hidden, head, dense, plan=plan, divergence="jsd")
            self.time(f"loss, online, jsd, {form}", work, least=25.0 if form == COMPILED else 2.0)
        for measured, filled in itertools.product((4096, 8192, 16384), (2048, 4096, 8192)):
            name = f"rows of a chunk by kernels, blocks {measured} and {filled}"
            if chosen.value != TRITON:
                self.context.skip(name, **reason)
                continue
            self.time(name, self._kernel_rows(usual.chunk_tokens, measured, filled))

    def _kernel_rows(self, rows: int, measured: int, filled: int) -> Callable[[], object]:
        """Kernels alone, on a chunk of logits."""
        from liquid_llm.losses.rows.triton_passes import TritonPasses

        raw, teacher = (torch.randn(rows, self.scale.vocab_size, device=self.device) for _ in range(2))
        out = torch.empty_like(raw, dtype=self.dtype)
        head = OutputHead(raw[:1].t())
        passes = TritonPasses(measured, filled)
        two = TwoPassRows(head, Objective(ALPHA, TEMPERATURE), passes, with_grad=True)
        labels = torch.zeros(rows, dtype=torch.int64, device=self.device)
        return lambda: two(raw, labels, DenseRows(teacher, None, None), into=out)

    def chunks(self) -> None:
        usual = choose_plan(self.device, self.scale.vocab_size)
        head, hidden, dense = output_head(self.student), self._states(), self.teacher.signal(self.batch)
        sizes = CHUNK_MIB if self.context.on_gpu else CHUNK_MIB[:1]
        for size in sizes:
            tokens = max(1, (size << 20) // (4 * self.scale.vocab_size))
            plan = replace(usual, chunk_tokens=tokens, slice_tokens=max(tokens, usual.slice_tokens))
            name = f"loss, online T=2, chunk {size} MiB"
            self.time(name, self.loss(hidden, head, dense, plan=plan), note="usual" if plan == usual else "")
        del hidden, dense
        for size in sizes:
            tokens = max(1, (size << 20) // (4 * self.scale.vocab_size))
            plan = replace(usual, chunk_tokens=tokens, slice_tokens=max(tokens, usual.slice_tokens))
            self.time(f"step, online, chunk {size} MiB", self.step(online_signal(self.teacher), plan))

    def profile(self) -> None:
        """One online step seen by torch's profiler: launches, host waits, the kernels that take longest."""
        if not self.context.on_gpu:
            for name in ("launches of a step", "time on the device of a step"):
                self.context.skip(name)
            return
        with self.context.attempt("launches of a step", seconds=6.0):
            work = self.step(online_signal(self.teacher))
            work()
            record_profile(self.context, work)


def wide_product(first: Tensor, second: Tensor) -> Tensor:
    """A product with a float32 result, as the device does it fastest."""
    if first.device.type != "cpu" and first.dtype == torch.bfloat16:
        return torch.mm(first, second, out_dtype=torch.float32)
    return torch.mm(first.float(), second.float())


def record_profile(context: Context, work: Callable[[], object]) -> None:
    """Rows for one call of ``work``."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        work()
        torch.cuda.synchronize()
    events = found.key_averages()
    launches = sum(
        one.count for one in events if one.key in ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel")
    )
    waits = sum(one.count for one in events if "Synchronize" in one.key)
    kernels = sorted(
        (one for one in events if str(one.device_type).endswith("CUDA")), key=lambda one: -one.self_device_time_total
    )
    total = sum(one.self_device_time_total for one in kernels)
    context.row("launches of a step", launches, "launches", note=f"{waits} host waits, one of them the profiler's own")
    context.row("time on the device of a step", total / 1e3, "ms")
    for number, one in enumerate(kernels[:15], start=1):
        share = one.self_device_time_total / total if total else 0.0
        context.row(
            f"kernel {number:2}",
            one.self_device_time_total / 1e3,
            "ms",
            note=f"{share:.1%}, {one.count} times: {one.key[:90]}",
            more={"kernel": one.key, "count": one.count},
        )


def _weight_bytes(model: Any) -> int:
    return sum(one.nbytes for one in model.parameters())
