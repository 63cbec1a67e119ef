"""What keeps the card busy in a step: compiled blocks, a stream for the teacher, both; launches and waits of each.

The student is the one of the part that calls this, so each is compared with the step that was timed before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from benchmarks.gpu.context import Context
from benchmarks.gpu.shapes import online_signal

from liquid_llm.models.compiled import CompiledBlocks
from liquid_llm.models.heads import blocks_of
from liquid_llm.streams import SideStream

if TYPE_CHECKING:
    from benchmarks.gpu.timing import Bench

_LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")


def measure(bench: Bench) -> None:
    """Rows of the variants; the student is left as it was."""
    context, online = bench.context, online_signal(bench.teacher)
    bench.time("step, online, teacher's stream", variant(bench, online, stream=True))
    bench.ratio("online, teacher's stream / online", "step, online, teacher's stream", ["step, online"])
    if not context.on_gpu:
        for name in ("step, CE only, compiled", "step, online, compiled", "launches by kind of step"):
            context.skip(name)  # the compiler has no code for the pretend device
        return
    rows, time = bench.batch.input_ids.shape
    blocks, is_compiled = CompiledBlocks(blocks_of(bench.student), [(rows, time)]), False
    with context.attempt("compiling the student's blocks", seconds=30.0):
        began = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began[0].record()
        variant(bench, None, blocks)()
        began[1].record()
        torch.cuda.synchronize()
        context.row("compiling the student's blocks", began[0].elapsed_time(began[1]) / 1e3, "s", note="the first step")
        is_compiled = True
    if not is_compiled:  # no time, or no compiler: without this each step below would try anew
        blocks.release()
        return
    bench.time("step, CE only, compiled", variant(bench, None, blocks), note="predicted 0.6 to 0.8 of CE only")
    bench.time("step, online, compiled", variant(bench, online, blocks))
    bench.time("step, online, compiled, teacher's stream", variant(bench, online, blocks, stream=True))
    bench.ratio("CE only, compiled / CE only", "step, CE only, compiled", ["step, CE only"])
    bench.ratio(
        "online / (teacher + CE only), both compiled",
        "step, online, compiled",
        ["teacher alone", "step, CE only, compiled"],
    )
    for name, work in {
        "CE only": bench.step(None),
        "CE only, compiled": variant(bench, None, blocks),
        "online": bench.step(online),
    }.items():
        with context.attempt(f"launches, {name}", seconds=3.0):
            record_launches(context, name, work)
    blocks.release()


def variant(
    bench: Bench, signal_of: Any, blocks: CompiledBlocks | None = None, *, stream: bool = False
) -> Callable[[], object]:
    """A step of the bench's student with its blocks compiled, or its teacher on a stream of its own."""
    job = bench.trainer(signal_of)
    job.student.compiled = blocks
    job.teacher_stream = SideStream(bench.device) if stream else None
    return job.step


def record_launches(context: Context, name: str, work: Callable[[], object]) -> None:
    """Launches of one call, and what it waits for: each call of CUDA that synchronises, and the operation around it.

    Whether a step waits once, as CUDA's sync debug mode has it, or three times, as the profiler had it, shows here.
    """
    from torch.profiler import ProfilerActivity, profile

    work()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        work()
    launches, waits = 0, Counter[str]()
    for event in found.events() or ():
        launches += event.name in _LAUNCHES
        if "Synchronize" in event.name:
            around = getattr(event.cpu_parent, "name", "no operation: the profiler's own, or the allocator's")
            waits[f"{event.name} in {around}"] += 1
    said = "; ".join(f"{count} x {where}" for where, count in waits.most_common())
    context.row(f"launches, {name}", launches, "launches", note=f"waits: {said or 'none'}")
