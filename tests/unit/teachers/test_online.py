"""The online teacher: one row a labelled position, the model's own logits, no gradient, bounded passes."""

from __future__ import annotations

import pytest
import torch
from tests.support.models import CAUSAL
from tests.support.teachers import IDENTITY, VOCAB, batch_of, make_samples, tiny_teacher

from liquid_llm.data.types import IGNORE_INDEX, Sample
from liquid_llm.teachers.online import OnlineTeacher


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "lfm2", "phi"])
def test_rows_are_the_models_logits_at_labelled_positions(name: str) -> None:
    assert name in CAUSAL
    loaded = tiny_teacher(name, **({"n_positions": 256} if name == "gpt2" else {}))
    batch = batch_of(make_samples(4, high=40))
    signal = OnlineTeacher(loaded, VOCAB).signal(batch)
    with torch.no_grad():
        expected = loaded.model(batch.input_ids).logits[batch.labels != IGNORE_INDEX][:, :VOCAB]
    assert signal.num_positions == batch.num_positions
    assert signal.head.vocab_size == VOCAB
    torch.testing.assert_close(signal.head.logits(signal.hidden), expected, rtol=1e-4, atol=1e-3)


def test_a_padded_row_says_what_it_says_alone() -> None:
    teacher = OnlineTeacher(tiny_teacher(), VOCAB)
    samples = make_samples(5, high=60)
    together = teacher.signal(batch_of(samples)).hidden
    alone = torch.cat([teacher.signal(batch_of([sample])).hidden for sample in samples])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("max_tokens", [1, 64, 150, 100_000])
def test_passes_are_bounded_and_do_not_change_the_signal(max_tokens: int) -> None:
    loaded = tiny_teacher()
    batch = batch_of(make_samples(6, low=5, high=60))
    whole = OnlineTeacher(loaded, VOCAB).signal(batch)
    seen: list[int] = []
    handle = loaded.model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    parts = OnlineTeacher(loaded, VOCAB, max_tokens=max_tokens).signal(batch)
    handle.remove()
    torch.testing.assert_close(parts.hidden, whole.hidden, rtol=1e-4, atol=1e-5)
    longest = batch.input_ids.shape[1]
    assert max(seen) <= max(max_tokens, longest)
    assert len(seen) == (1 if max_tokens == 100_000 else -(-6 // max(1, max_tokens // longest)))


def test_a_row_without_labels_has_no_rows() -> None:
    samples = [*make_samples(1, low=9, high=9), Sample("one", "math_tool", make_samples(1, low=1, high=1)[0].input_ids)]
    assert OnlineTeacher(tiny_teacher(), VOCAB).signal(batch_of(samples)).num_positions == 8


def test_frozen_and_in_evaluation_mode() -> None:
    loaded = tiny_teacher()
    loaded.model.train().requires_grad_(True)
    teacher = OnlineTeacher(loaded, VOCAB)
    signal = teacher.signal(batch_of(make_samples(2)))
    assert teacher.identity == IDENTITY
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert not signal.hidden.requires_grad
    # a tensor made under inference_mode could not take part in the loss's graph
    assert not signal.hidden.is_inference()
