"""What the model of memory says, against what is counted when the real trainer takes the same steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.support.memory import TEACHER, counted_evaluation, counted_step, shape_of

from liquid_llm.memory import BatchShape, predict_training

DENSE, SPARSE = BatchShape(4, 48, "dense"), BatchShape(3, 40, "sparse", slots=20)
CASES = {
    "llama, dense": shape_of("llama-test", DENSE, teacher=TEACHER),
    "llama, dense, checkpointing": shape_of("llama-test", DENSE, teacher=TEACHER, grad_checkpoint=True),
    "liquid, dense, reference": shape_of("liquid-test", DENSE, teacher=TEACHER, reference=True),
    "liquid, sparse, reference, accumulates": shape_of("liquid-test", SPARSE, reference=True, accumulates=True),
    "gpt2, no teacher": shape_of("gpt2-test", BatchShape(4, 64)),
    "gpt2, logits, accumulates": shape_of("gpt2-test", BatchShape(2, 33, "logits"), accumulates=True),
    "llama, dense, T=1": shape_of("llama-test", DENSE, teacher=TEACHER, temperature=1.0),
    "llama, dense, bfloat16": shape_of("llama-test", DENSE, teacher=TEACHER, compute_dtype="bfloat16"),
    "liquid, bfloat16, checkpointing, reference": shape_of(
        "liquid-test", DENSE, teacher=TEACHER, compute_dtype="bfloat16", grad_checkpoint=True, reference=True
    ),
    "deep llama, checkpointing": shape_of("llama-test", BatchShape(8, 64), grad_checkpoint=True, num_hidden_layers=8),
}


@pytest.mark.parametrize("name", CASES)
def test_the_prediction_is_what_is_counted_when_the_trainer_steps(name: str) -> None:
    shape = CASES[name]
    prediction = predict_training(shape)
    counted = counted_step(shape)
    assert prediction.peak_bytes == pytest.approx(counted.peak_bytes, rel=0.01)
    assert prediction.rest_bytes == pytest.approx(counted.rest_bytes, rel=0.02)  # which holds its batch too


@pytest.mark.parametrize("reference", [False, True])
def test_evaluation_counts_where_it_is_larger(reference: bool) -> None:
    long = BatchShape(1, 512, "dense")
    shape = shape_of("llama-test", BatchShape(1, 4, "dense"), teacher=TEACHER, reference=reference)
    shape = replace(shape, evaluations=(long,))
    prediction = predict_training(shape)
    assert prediction.peak_stage == "evaluation"
    assert prediction.peak_batch == str(long)
    assert prediction.peak_bytes == pytest.approx(counted_evaluation(shape, long), rel=0.01)
    assert predict_training(replace(shape, evaluations=())).peak_bytes < prediction.peak_bytes
