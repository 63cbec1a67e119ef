"""A stored signal in the loss against the online teacher that it was captured from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.support.distillation import fused_loss, reference_loss
from tests.support.models import tiny_model
from tests.support.teachers import VOCAB, ListSource, batch_of, make_samples, tiny_teacher, with_prompts
from torch import Tensor

from liquid_llm.capture.job import capture
from liquid_llm.data.types import IGNORE_INDEX
from liquid_llm.losses import DenseSignal, Objective
from liquid_llm.losses.signals import OutputHead, Signal
from liquid_llm.signal_store.codecs import Codec, get_codec
from liquid_llm.signal_store.codecs.full import FullCodec
from liquid_llm.signal_store.codecs.topk import TopKCodec
from liquid_llm.signal_store.store import StoreWriter, open_store
from liquid_llm.teachers.online import OnlineTeacher
from liquid_llm.teachers.stored import StoredTeacher
from liquid_llm.training import Student

BATCH = batch_of(make_samples(6, low=10, high=60), 48)


def signals(folder: Path, codec: Codec, temperature: float) -> tuple[Signal, Signal]:
    """What the online teacher says of the batch, and what was stored of it."""
    teacher = tiny_teacher()
    writer = StoreWriter(str(folder), teacher.identity, codec, vocab_size=VOCAB)
    capture({"math_tool": [ListSource(BATCH.samples)]}, {"math_tool": writer}, teacher, seq_len=64, batch_size=2)
    reader = StoredTeacher(open_store(str(folder)), strict=True)
    prepared = reader.prepare(BATCH, temperature)
    assert prepared is not None
    stored = reader.signal(BATCH, prepared)
    assert stored is not None
    return OnlineTeacher(teacher, VOCAB).signal(BATCH), stored


def scored(signal: Signal, temperature: float, loss: str) -> tuple[float, torch.Tensor]:
    """Mean KL and the gradient of the composite loss on a student's hidden states."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(BATCH.num_positions, 24, generator=generator).requires_grad_()
    head = OutputHead(torch.randn(VOCAB, 24, generator=generator) * 0.5)
    labels = BATCH.labels[BATCH.labels != IGNORE_INDEX]
    function = reference_loss if loss == "reference" else fused_loss
    output = function(hidden, head, labels, signal=signal, alpha=0.7, temperature=temperature)
    output.loss.backward()
    assert output.num_signal == BATCH.num_positions
    assert hidden.grad is not None
    return float(output.kd) / BATCH.num_positions, hidden.grad


@pytest.mark.parametrize("loss", ["reference", "fused"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("codec", [FullCodec(), TopKCodec(VOCAB)], ids=lambda codec: codec.name)
def test_a_whole_distribution_in_16_bits(tmp_path: Path, codec: Codec, temperature: float, loss: str) -> None:
    online, stored = signals(tmp_path, codec, temperature)
    exact, exact_grad = scored(online, temperature, loss)
    found, found_grad = scored(stored, temperature, loss)
    assert found == pytest.approx(exact, rel=1e-3)
    assert float((found_grad - exact_grad).norm() / exact_grad.norm()) < 1e-3


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_coarse_grained_kl_is_smaller_and_grows_with_k(tmp_path: Path, temperature: float) -> None:
    """Lumping ids into a bucket can only lose divergence (the data-processing inequality)."""
    found = []
    for k in (4, 16, 64, 256):
        online, stored = signals(tmp_path / str(k), TopKCodec(k), temperature)
        exact, _ = scored(online, temperature, "reference")
        found.append(scored(stored, temperature, "reference")[0])
    assert found == sorted(found)
    assert 0.0 < found[0] < found[-1] <= exact * 1.001


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(
    ("codec", "spec"),
    [
        ("tail", "forward_kl"),
        ("tail", "decoupled_topk:k=4"),
        ("tail", "tail_aware:k=4"),
        ("topk", "decoupled_topk:k=4"),
    ],
)
def test_the_gradient_of_what_is_stored_is_right_on_average(codec: str, spec: str, temperature: float) -> None:
    """3,000 encodings of one position: their mean gradient by the logits is that of the whole distribution."""
    count, vocab = 3000, 400
    numbers = torch.Generator().manual_seed(0)
    row = 2.0 * torch.randn(vocab, generator=numbers)
    row[:6] += torch.tensor([9.0, 8.0, 8.0, 7.0, 7.0, 6.0])
    student = (0.7 * row + torch.randn(vocab, generator=numbers)).double()
    objective = Objective(1.0, temperature, divergence=spec)
    identity = OutputHead(torch.eye(vocab, dtype=torch.float64))

    def average(signal: Signal) -> tuple[Tensor, float]:
        rows = signal.num_positions
        hidden = student.expand(rows, vocab).clone().requires_grad_()
        output = fused_loss(hidden, identity, torch.zeros(rows, dtype=torch.int64), signal=signal, objective=objective)
        return torch.autograd.grad(output.loss, [hidden])[0].mean(dim=0), float(output.kd) / rows

    encoder = get_codec(codec)
    payload = encoder.pack(encoder.encode(row.expand(count, vocab).clone(), 7, 0))
    stored = encoder.decode(payload, 0, count, objective.signal_temperature, vocab)
    got, value = average(stored)
    expected, exact = average(DenseSignal(row.double().unsqueeze(0), identity))
    assert float((got - expected).norm() / expected.norm()) < 0.04
    assert value == pytest.approx(exact, rel=0.03)


def test_a_prompt_teaches_nothing_from_the_store_nor_online(tmp_path: Path) -> None:
    """Loss and gradients of a batch with prompts are those of its learnt positions alone, stored as online."""
    whole = make_samples(6, low=10, high=60)
    batch = batch_of(with_prompts(whole), 48)
    teacher = tiny_teacher()
    writer = StoreWriter(str(tmp_path), teacher.identity, FullCodec(), vocab_size=VOCAB)
    capture({"math_tool": [ListSource(batch.samples)]}, {"math_tool": writer}, teacher, seq_len=64, batch_size=2)
    reader = StoredTeacher(open_store(str(tmp_path)), strict=True)
    prepared = reader.prepare(batch, 2.0)
    assert prepared is not None
    signals = {"stored": reader.signal(batch, prepared), "online": OnlineTeacher(teacher, VOCAB).signal(batch)}
    student = Student(tiny_model("gpt2", vocab_size=VOCAB), torch.float32)
    objective = Objective(alpha=0.7, temperature=2.0)
    found = {name: student(batch, signal, objective) for name, signal in signals.items()}
    assert found["stored"].num_signal == found["stored"].num_positions == batch.num_positions
    for name in ("loss", "kd", "ce"):
        online, stored = (float(getattr(found[source], name).detach()) for source in ("online", "stored"))
        assert stored == pytest.approx(online, rel=7e-6), name
    weights = list(student.model.parameters())
    grads = {name: torch.autograd.grad(output.loss, weights) for name, output in found.items()}
    for one, other in zip(grads["stored"], grads["online"], strict=True):
        assert float((one - other).norm()) <= 2e-5 * float(other.norm())

    # the reference on the whole texts, position by position, of which the learnt ones are picked out by hand
    logits = student.model(input_ids=batch.input_ids).logits.detach()
    teaching = OnlineTeacher(teacher, VOCAB)
    said = teaching.head.logits(teaching.hidden(batch.input_ids))
    kd = ce = 0.0
    for row, sample in enumerate(batch.samples):
        assert sample.learnt is not None
        for t in range(min(48, len(sample.input_ids)) - 1):
            if sample.learnt[t + 1]:
                q, p = (one[row, t].double() / 2 for one in (said, logits))
                kd += float((q.softmax(0) * (q.log_softmax(0) - p.log_softmax(0))).sum())
                ce -= float(logits[row, t].double().log_softmax(0)[int(sample.input_ids[t + 1])])
    assert float(found["online"].kd) == pytest.approx(kd, rel=1e-5)
    assert float(found["online"].ce) == pytest.approx(ce, rel=1e-5)
    assert float(found["online"].loss.detach()) == pytest.approx(0.7 * 4 * kd + 0.3 * ce, rel=1e-5)
