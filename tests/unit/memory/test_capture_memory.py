"""Memory of a capture job, against what is counted when the real parts score and encode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.memory import preset, real_model
from tests.support.models import tiny_config
from transformers import LlamaConfig

from liquid_llm import registry
from liquid_llm.capture.scoring import Scratch
from liquid_llm.errors import ModelError, SignalError
from liquid_llm.memory import predict_capture
from liquid_llm.memory.capture import encode_for_the_host, encoder_cost
from liquid_llm.memory.counter import StorageCounter
from liquid_llm.memory.prediction import CODEC, LOSS, TEACHER, TEACHER_WORK
from liquid_llm.memory.shapes import CaptureShape, ModelShape
from liquid_llm.memory.training import online_teacher
from liquid_llm.signal_store.codecs import get_codec
from liquid_llm.signal_store.codecs.base import encode_as_on

GIB = 2**30
VOCAB_SIZE = 2048


def shape(codec: str, **changes: Any) -> CaptureShape:
    values = {"teacher": preset("llama-16m", VOCAB_SIZE), "rows": 4, "time": 256, "vocab_size": VOCAB_SIZE, **changes}
    return CaptureShape(codec=codec, **{"device": "cpu", **values})


@pytest.mark.parametrize("codec", registry.CODECS)
def test_the_prediction_is_what_is_counted_when_a_batch_is_scored(codec: str) -> None:
    asked = shape(codec)
    teacher = online_teacher(real_model(asked.teacher), VOCAB_SIZE)
    encoder, scratch = get_codec(codec), Scratch("cpu")
    logits = 4.0 * torch.randn(asked.rows * (asked.time - 1), VOCAB_SIZE)
    encoder.encode(logits.clone(), 0, 0)
    counter = StorageCounter()
    counter.hold_model(teacher.model, "")
    scratch.logits(teacher.head, torch.zeros(1, teacher.head.weight.shape[1]))
    counter.hold([scratch._memory], "")
    with counter, torch.no_grad():
        hidden = teacher.hidden(torch.zeros(asked.rows, asked.time, dtype=torch.int64))
        made = scratch.logits(teacher.head, hidden.reshape(-1, hidden.shape[-1])[: len(logits)].clone())
        encoder.encode(made.copy_(logits), 0, 0)
    assert predict_capture(asked).peak_bytes == pytest.approx(sum(counter.peak.values()), rel=0.05)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("codec", registry.CODECS)
def test_what_an_encoder_takes_for_many_rows_follows_from_few(codec: str, device: str) -> None:
    vocab_size, rows = 100_000, 400
    encoder = get_codec(codec)
    predicted, measured = encoder_cost(codec, (), rows, vocab_size, device)
    assert measured < rows
    logits = torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(0)).mul_(4)
    counter = StorageCounter(block_bytes=1)
    counter.hold([logits], LOSS)
    with encode_as_on(device), counter, counter.stage("encode", CODEC):
        encode_for_the_host(encoder, logits, device)
    assert predicted == pytest.approx(counter.peak[CODEC], rel=0.03)


def test_the_encoder_is_cut_as_on_the_device_meant() -> None:
    on_cuda, on_cpu = (encoder_cost("tail", (), 300, 50_000, device)[0] for device in ("cuda", "cpu"))
    assert on_cuda > 2 * on_cpu


def test_consumers_and_stages() -> None:
    found = predict_capture(shape("tail"))
    assert sum(found.consumers.values()) == found.peak_bytes == max(found.stages.values())
    assert set(found.stages) == {"teacher", "encode"}
    larger = predict_capture(shape("tail", rows=512))
    assert larger.peak_stage == "teacher"
    assert larger.consumers[TEACHER_WORK] > found.consumers.get(TEACHER_WORK, 0)
    assert larger.consumers[TEACHER] == found.consumers[TEACHER]
    assert larger.rest_bytes == pytest.approx(found.rest_bytes, rel=0.02)
    assert "measured on" in found.measured_part


def test_memory_at_real_sizes() -> None:
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128_256,
        tie_word_embeddings=False,
    )
    teacher = ModelShape.of(config, "bfloat16")
    for rows, gib in ((4, 15.9), (16, 17.3)):
        found = predict_capture(CaptureShape(teacher, rows, 1024, 128_256))
        assert found.consumers[TEACHER] / GIB == pytest.approx(14.96, rel=0.01)
        assert found.peak_bytes / GIB == pytest.approx(gib, rel=0.03)


def test_an_unknown_codec_is_refused() -> None:
    with pytest.raises(SignalError, match="unknown codec"):
        predict_capture(shape("zip"))


def test_no_record_has_more_ids_than_are_said(tmp_path: Path) -> None:
    for name in ("tail", "topk", "sampled"):
        codec = get_codec(name)
        wide = torch.zeros(40, 5000)  # as flat as can be: every codec keeps as many as it may
        temperature = codec.temperature_range[0] if name == "sampled" else 1.0
        signal = codec.decode(codec.pack(codec.encode(wide, 1, 0)), 0, 40, temperature, 5000)
        assert 0 < signal.ids.shape[1] <= codec.most_ids  # type: ignore[union-attr]
    assert get_codec("topk", options={"k": 7}).most_ids == 7
    assert get_codec("full").most_ids == 0


def test_shapes_of_other_architectures() -> None:
    for name in ("gemma3", "phi", "opt", "gpt_neox"):
        teacher = ModelShape.of(tiny_config(name, VOCAB_SIZE))
        assert predict_capture(shape("topk", teacher=teacher, time=48)).peak_bytes > 0


def test_a_model_that_needs_numbers_is_refused_in_words(caplog: pytest.LogCaptureFixture) -> None:
    # Its experts are chosen by a product that torch has in bfloat16 only.
    teacher = ModelShape.of(tiny_config("mixtral", VOCAB_SIZE))
    with pytest.raises(ModelError, match="cannot be worked out without its weights"):
        predict_capture(shape("topk", teacher=teacher, time=48))
    assert not caplog.records
