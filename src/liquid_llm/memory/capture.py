"""Memory of a capture job: the teacher's pass and a chunk of logits on tensors without memory, and the codec's encoder.

Encoders look at what they encode, which tensors without memory cannot answer. So the real encoder runs on a few real
rows on the CPU, as few as it takes in one piece there, and what it took is multiplied: what an encoder makes is
proportional to its rows.
"""

from __future__ import annotations

import torch

from liquid_llm.memory.counter import StorageCounter
from liquid_llm.memory.fake import build, fake_tensors
from liquid_llm.memory.prediction import BATCH, CODEC, LOSS, TEACHER, TEACHER_WORK, MemoryPrediction
from liquid_llm.memory.shapes import BatchShape, CaptureShape
from liquid_llm.memory.training import Peaks, combine, make_batch, online_teacher
from liquid_llm.teachers.codecs import Codec, get_codec
from liquid_llm.teachers.scoring import Scratch, chunks

_MEASURED_BYTES = 2**20  # of logits encoded to see what the encoder takes: codecs cut larger pieces on a CPU
_LONGEST = 2**40  # positions, more than any chunk has


def work_out_capture(shape: CaptureShape) -> MemoryPrediction:
    """Memory of a capture job.

    Raises:
        ModelError: a configuration that no model can be built from.
        SignalError: a codec or an option that there is not.
    """
    codec = get_codec(shape.codec, options=shape.options)
    ((_, _, chunk_rows),) = next(chunks([_LONGEST], shape.vocab_size, shape.device))
    batch = BatchShape(shape.rows, shape.time)
    chunk_rows = min(chunk_rows, max(1, shape.rows * (shape.time - 1)))
    # Rows of one sample are encoded at a time.
    encoder_bytes, num_rows = encoder_cost(codec, min(chunk_rows, max(1, shape.time - 1)), shape.vocab_size)
    counter = StorageCounter()
    with fake_tensors():
        model = build(shape.teacher)
        counter.hold_model(model, TEACHER)
        teacher, scratch = online_teacher(model, shape.vocab_size), Scratch(shape.device)
        with counter, torch.no_grad():
            with counter.stage("teacher", BATCH):
                ids = make_batch(batch).input_ids
            with counter.stage("encode", LOSS):  # memory for logits is kept from one batch to the next
                scratch.logits(teacher.head, teacher.head.weight.new_empty(1, teacher.head.weight.shape[1]))
            rest_bytes = counter.total
            counter.restart()
            with counter.stage("teacher", TEACHER_WORK):
                hidden = teacher.hidden(ids)
            with counter.stage("encode", LOSS):
                scratch.logits(teacher.head, hidden.reshape(-1, hidden.shape[-1])[:chunk_rows].clone())
            found = [Peaks(batch, dict(counter.stages), dict(counter.peak), counter.peak_stage)]
            counter.restart()
            with counter.stage("encode", CODEC):
                encoded = torch.empty(encoder_bytes, dtype=torch.uint8)
            found.append(Peaks(batch, dict(counter.stages), dict(counter.peak), counter.peak_stage))
            del encoded
    measured = f"the encoder {shape.codec!r} was measured on {num_rows} rows and multiplied" if num_rows else ""
    return combine(found, rest_bytes, shape.device, measured)


def encoder_cost(codec: Codec, rows: int, vocab_size: int) -> tuple[int, int]:
    """Most bytes that encoding ``rows`` rows takes beside the logits, and the number of rows it was measured on."""
    measured = max(1, min(rows, _MEASURED_BYTES // (4 * vocab_size)))
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(measured, vocab_size, generator=generator)
    codec.encode(logits.clone(), 0, 0)  # what is kept for ever, such as tables, is made now
    counter = StorageCounter(block_bytes=1)
    counter.hold([logits], LOSS)
    held = counter.total
    with counter, counter.stage("encode", CODEC):
        codec.encode(logits, 0, 0)
    return -(-(sum(counter.peak.values()) - held) * rows // measured), measured
