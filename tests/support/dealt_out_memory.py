"""What a rank of a job takes whose models are dealt out; on two of them."""

from __future__ import annotations

import json
from dataclasses import replace

from tests.support.memory import CPU, TEACHER, profiled_step, shape_of

from liquid_llm.distributed import join_engine
from liquid_llm.memory.shapes import BatchShape

LARGE = {"hidden_size": 256, "intermediate_size": 700, "num_hidden_layers": 5}
SMALL = BatchShape(2, 32, "dense")
_STUDENT = replace(shape_of("llama-test", SMALL, teacher=TEACHER, **LARGE), ranks=2, student_dealt_out=True)
CASES = {
    "checkpointing, reference": replace(_STUDENT, grad_checkpoint=True, reference=True),
    "both": replace(_STUDENT, teacher=_STUDENT.student, teacher_dealt_out=True),
    "gpt2": replace(
        shape_of("gpt2-test", SMALL, teacher=TEACHER, n_embd=256, n_layer=5, n_head=4), ranks=2, student_dealt_out=True
    ),
}


def main(names: list[str]) -> int:
    with join_engine(CPU) as engine:
        for name in names or list(CASES):
            found = profiled_step(CASES[name], engine)
            if engine.is_main:
                print(json.dumps([name, found.peak_bytes]), flush=True)
        engine.wait_for_all()
    return 0
