"""Memory of a capture job: the teacher's pass and a chunk of logits on tensors without memory, and the codec's encoder.

Encoders look at what they encode, which tensors without memory cannot answer. So the real encoder runs on a few real
rows on the CPU, cut as on the device meant, and what it took is extended to all rows of a chunk.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from liquid_llm.capture.fetching import side_by_side
from liquid_llm.capture.scoring import Scratch, chunk_rows
from liquid_llm.memory.counter import StorageCounter
from liquid_llm.memory.fake import build, fake_tensors
from liquid_llm.memory.prediction import BATCH, CODEC, LOSS, TEACHER, TEACHER_WORK, MemoryPrediction
from liquid_llm.memory.shapes import BatchShape, CaptureShape
from liquid_llm.memory.training import combine, make_batch, online_teacher, take_peaks
from liquid_llm.signal_store.codecs import Codec, get_codec
from liquid_llm.signal_store.codecs.base import Run, encode_as_on

# Of the logits encoded to see what the encoder takes. No codec has a scratch buffer of fixed size for more rows.
_MEASURED_BYTES = (68 * 2**20, 100 * 2**20)


def work_out_capture(shape: CaptureShape) -> MemoryPrediction:
    """Memory of a capture job.

    Raises:
        ModelError: a configuration that no model can be built from.
        SignalError: a codec or an option that there is not.
    """
    options = tuple(sorted(get_codec(shape.codec, options=shape.options).options.items()))
    batch = BatchShape(shape.rows, shape.time)
    chunk = min(chunk_rows(shape.vocab_size, shape.device), max(1, shape.rows * (shape.time - 1)))
    encoder_bytes, num_rows = encoder_cost(shape.codec, options, chunk, shape.vocab_size, shape.device)
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
                scratch.logits(teacher.head, hidden.reshape(-1, hidden.shape[-1])[:chunk].clone())
            found = [take_peaks(counter, batch)]
            with counter.stage("encode", CODEC):
                encoded = torch.empty(encoder_bytes, dtype=torch.uint8)
            found.append(take_peaks(counter, batch))
            del encoded
    words = f"{shape.rows} x {shape.time} tokens"
    measured = f"the encoder {shape.codec!r} was measured on {num_rows} rows of {chunk}"
    return replace(combine(found, rest_bytes, shape.device, measured), peak_batch=words)


def encode_for_the_host(codec: Codec, logits: Tensor, device: str) -> object:
    """What capture makes of a chunk of logits on ``device``: its rows, and their bytes in one tensor to be copied."""
    rows = codec.encode_runs(logits, [Run(0, 0, logits.shape[0])])
    return rows if torch.device(device).type == "cpu" else (rows, side_by_side(list(rows.values())))


@functools.cache
def encoder_cost(
    name: str, options: tuple[tuple[str, int | float | str], ...], rows: int, vocab_size: int, device: str
) -> tuple[int, int]:
    """Most bytes that encoding ``rows`` rows on ``device`` takes beside the logits, and the rows that were measured.

    What an encoder makes is a part that is fixed or bounded, and a part in proportion to its rows: two sizes, beyond
    the bounds that there are, tell the one from the other.
    """
    codec = get_codec(name, options=dict(options))
    first, second = (max(1, min(rows, size // (4 * vocab_size))) for size in _MEASURED_BYTES)
    least, most = (_measure(codec, count, vocab_size, device) for count in (first, second))
    more = (rows - second) * max(0, most - least) // (second - first) if second > first else 0
    return most + more, second


def _measure(codec: Codec, rows: int, vocab_size: int, device: str) -> int:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, vocab_size, generator=generator).mul_(4)
    counter = StorageCounter(block_bytes=1)
    with encode_as_on(device):
        codec.encode(logits[:1].clone(), 0, 0)  # what is kept for ever, such as tables, is made now
        counter.hold([logits], LOSS)
        with counter, counter.stage("encode", CODEC):
            encode_for_the_host(codec, logits, device)
    return counter.peak.get(CODEC, 0)
