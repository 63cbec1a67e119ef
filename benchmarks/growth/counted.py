"""What is counted on tensors that have shapes and no memory: bytes to the last one, and every product's operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from liquid_llm.losses import DenseSignal, Objective, OutputHead, fused_loss
from liquid_llm.losses.signals import Signal
from liquid_llm.memory.counter import StorageCounter
from liquid_llm.memory.fake import build, fake_tensors
from liquid_llm.memory.shapes import BatchShape, ModelShape
from liquid_llm.memory.training import loss_plan, make_batch, stored_signal
from liquid_llm.models.student import student_config
from liquid_llm.training import Student

DEVICE = "cuda"  # whose plan is taken: there a chunk is computed at once
_aten: Any = torch.ops.aten


@dataclass(frozen=True)
class Counted:
    """What a piece of work took.

    Attributes:
        product_operations: floating-point operations of matrix products and attention.
        calls: operations that torch was asked for, each a kernel on a GPU.
        peak_bytes: the most beyond what was there before and what is left afterwards.
    """

    product_operations: float
    calls: int
    peak_bytes: int


class _Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def _attention(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))


def _added(_total: Any, first: Any, second: Any, *_: Any, **__: Any) -> int:
    return 2 * int(first[0]) * int(first[1]) * int(second[1])


# torch counts the attention of GPUs, and products that are added to nothing; a CPU's attention is another operation.
_MORE = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _aten.addmm_: _added,
}


def count(work: Callable[[], Any]) -> Counted:
    """``work`` gives what it leaves behind, which is not counted as taken meanwhile."""
    flops = FlopCounterMode(display=False, custom_mapping=_MORE)
    with flops, _Calls() as calls, StorageCounter() as counter:
        kept = work()
        left = counter.total
        peak = sum(counter.peak.values())
    del kept
    return Counted(float(flops.get_total_flops()), calls.count, max(0, peak - left))


def loss_of(positions: int, vocab_size: int, *, chunk_bytes: int, stored: bool = False, hidden: int = 64) -> Counted:
    """Forward and backward of the loss at T = 2, with a teacher beside it or its stored signal.

    Args:
        chunk_bytes: of a chunk's logits, as ``choose_plan`` has it: so many that all sizes take several chunks.
    """
    with fake_tensors():
        states = torch.randn(positions, hidden, requires_grad=True)
        weight = torch.randn(vocab_size, hidden, requires_grad=True)
        labels = torch.zeros(positions, dtype=torch.int64)
        signal: Signal | None = DenseSignal(torch.randn(positions, hidden), OutputHead(torch.randn(vocab_size, hidden)))
        if stored:
            signal = stored_signal(BatchShape(1, positions + 1, "sparse", 16), positions, vocab_size, 2.0)

        def work() -> object:
            chunk = chunk_bytes // (4 * vocab_size)
            # Where memory is worked out three chunks stand for all; here every one is counted.
            plan = replace(loss_plan(DEVICE, vocab_size), chunk_tokens=chunk, slice_tokens=chunk, every=True)
            output = fused_loss(
                states,
                OutputHead(weight),
                labels,
                signal=signal,
                objective=Objective(0.5, 2.0),
                plan=plan,
                all_labelled=True,
            )
            output.loss.backward()  # type: ignore[no-untyped-call]
            return output

        return count(work)


def body_of(length: int, rows: int = 1, student: str = "llama-test") -> Counted:
    """Forward and backward of a student's body over ``rows`` texts of ``length`` tokens."""
    config = student_config(student, vocab_size=64, bos_id=0, eos_id=0)
    config.max_position_embeddings = max(length, config.max_position_embeddings)
    with fake_tensors():
        model = Student(build(ModelShape.of(config)).train(), torch.float32, plan=loss_plan(DEVICE, 64))
        batch = make_batch(BatchShape(rows, length, "none"))

        def work() -> object:
            states = model.states(batch)
            states.sum().backward()  # type: ignore[no-untyped-call]
            return states

        return count(work)
