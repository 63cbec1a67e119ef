"""What is left to memory, how it is decided, and that a run that goes on keeps what it decided."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.memory import VOCAB_SIZE, preset, real_model

from liquid_llm.config import RunConfig, build_run_config
from liquid_llm.errors import ModelError, UsageError
from liquid_llm.losses.plan import CHUNK_BYTES
from liquid_llm.memory import predict_training
from liquid_llm.memory.prediction import MemoryPrediction
from liquid_llm.memory.shapes import BatchShape, ModelShape, TrainingShape
from liquid_llm.models.student import build_student, student_config
from liquid_llm.options import ANNEAL, TRAIN
from liquid_llm.signal_store.codecs import get_codec
from liquid_llm.signal_store.description import write_store_file
from liquid_llm.signal_store.records import SignalIdentity
from liquid_llm.wiring import fitting
from liquid_llm.wiring.fitting import Fit, choose_chunk, decisions, judge, resolve_auto
from liquid_llm.wiring.shapes import Models, nominal_shape, stored_batch, stored_codec, with_positions

GIB = 2**30
# Deep enough for checkpointing to save something.
STUDENT = preset("llama-test", num_hidden_layers=4)
LONG = BatchShape(1024, 1024)  # enough positions for the largest chunk of so small a vocabulary
MODELS = Models(STUDENT, preset("llama-test"), "float32", VOCAB_SIZE)


def config(face: str = ANNEAL, **given: object) -> RunConfig:
    needed = {"dataset_name": "d"} if face == ANNEAL else {"dataset_manifest": "m"}
    return build_run_config(face, {**needed, "block_size": 64, "batch_size": 8, **given})


def needed(asked: RunConfig, **changes: Any) -> int:
    return predict_training(replace(nominal_shape(asked, MODELS, "cpu"), **changes)).needed_bytes


@pytest.fixture(scope="module")
def without() -> int:
    return needed(config(), grad_checkpoint=False)


@pytest.fixture(scope="module")
def with_it() -> int:
    return needed(config(), grad_checkpoint=True)


# ------------------------------------------------------------------------------------------------------- checkpointing


def test_checkpointing_is_taken_only_where_it_is_needed(without: int, with_it: int) -> None:
    assert with_it < without
    for available, expected in ((without, False), (without - 1, True), (with_it - 1, True), (None, False)):
        settled, choices = resolve_auto(config(), MODELS, available, "cpu")
        assert settled.student.grad_checkpoint is expected
        assert choices["grad_checkpoint"].value == str(expected).lower()
        assert choices["grad_checkpoint"].reason
        assert decisions(config(), settled) == {"grad_checkpoint": expected}


@pytest.mark.parametrize("given", [True, False])
def test_what_a_person_says_is_not_decided_again(given: bool) -> None:
    asked = config(grad_checkpoint=given)
    assert resolve_auto(asked, MODELS, 1, "cpu") == (asked, {})
    assert decisions(asked, asked) == {}


def test_a_run_that_goes_on_keeps_its_choice_on_any_card(without: int) -> None:
    for decided in (True, False):
        settled, choices = resolve_auto(config(), MODELS, without, "cpu", decided={"grad_checkpoint": decided})
        assert settled.student.grad_checkpoint is decided
        assert choices["grad_checkpoint"].reason == "as the run began"


def test_checkpointing_that_saves_nothing_or_that_there_is_not_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def same(shape: TrainingShape) -> MemoryPrediction:
        return predict_training(replace(shape, grad_checkpoint=False))

    def unsupported(shape: TrainingShape) -> MemoryPrediction:
        if shape.grad_checkpoint:
            raise ModelError("this architecture does not support gradient checkpointing")
        return predict_training(shape)

    for predict, words in ((same, "save nothing"), (unsupported, "does not support")):
        monkeypatch.setattr(fitting, "predict_training", predict)
        settled, choices = resolve_auto(config(), MODELS, 1, "cpu")
        assert settled.student.grad_checkpoint is False
        assert words in choices["grad_checkpoint"].reason


def test_a_model_whose_memory_is_not_known_ends_no_run() -> None:
    unknown = replace(MODELS, teacher=ModelShape({"model_type": "no-such"}))
    settled, choices = resolve_auto(config(), unknown, GIB, "cpu")
    assert settled.student.grad_checkpoint is False
    assert "not known" in choices["grad_checkpoint"].reason


# --------------------------------------------------------------------------------------------------------------- batch


def automatic(**given: object) -> RunConfig:
    return config(**{"batch_size": "auto", "tokens_per_step": 16 * 64, **given})


def test_the_batch_fills_what_there_is_and_a_step_keeps_its_tokens() -> None:
    sizes = []
    for mib in (1, 2, 3, 4, 8, 64):
        try:
            settled, choices = resolve_auto(automatic(), MODELS, mib * 2**20, "cpu")
        except UsageError:
            sizes.append(0)
            continue
        size, accumulation = settled.data.batch_size, settled.optimizer.grad_accum
        assert size * accumulation * settled.data.block_size == 16 * 64
        assert needed(settled) <= mib * 2**20
        assert choices["batch_size"].value == str(size)
        assert choices["grad_accum"].value == str(accumulation)
        assert decisions(automatic(), settled) == {
            "batch_size": size,
            "grad_accum": accumulation,
            "grad_checkpoint": settled.student.grad_checkpoint,
        }
        sizes.append(size)
    assert sizes == sorted(sizes)
    assert sizes[0] == 0
    assert sizes[-1] == 16
    assert len(set(sizes)) > 3


def test_checkpointing_that_is_asked_for_stays_asked_for() -> None:
    enough = 64 * 2**20
    settled, choices = resolve_auto(automatic(grad_checkpoint=True), MODELS, enough, "cpu")
    assert settled.student.grad_checkpoint is True
    assert "grad_checkpoint" not in choices
    assert resolve_auto(automatic(), MODELS, enough, "cpu")[0].student.grad_checkpoint is False


def test_a_batch_that_was_decided_is_kept_while_the_step_has_as_many_tokens() -> None:
    decided = {"batch_size": 2, "grad_accum": 8, "grad_checkpoint": True}
    settled, choices = resolve_auto(automatic(), MODELS, 64 * 2**20, "cpu", decided=decided)
    assert (settled.data.batch_size, settled.optimizer.grad_accum) == (2, 8)
    assert settled.student.grad_checkpoint is True
    assert decisions(automatic(), settled) == decided
    assert set(choices) == set(decided)
    more = automatic(tokens_per_step=32 * 64)
    assert resolve_auto(more, MODELS, 64 * 2**20, "cpu", decided=decided)[0].data.batch_size == 32


def test_what_gives_no_batch_is_refused_in_words() -> None:
    with pytest.raises(UsageError, match=r"multiple of --block_size=64, such as 1024"):
        resolve_auto(automatic(tokens_per_step=1000), MODELS, GIB, "cpu")
    with pytest.raises(UsageError, match="Give a number"):
        resolve_auto(automatic(), MODELS, None, "cpu")
    with pytest.raises(UsageError, match=r"not even a single block fits.*most is taken by"):
        resolve_auto(automatic(), MODELS, 1000, "cpu")


# -------------------------------------------------------------------------------------------------------------- shapes


def test_the_nominal_shape_has_every_kind_of_signal_that_is_named() -> None:
    assert [one.signal for one in nominal_shape(config(), MODELS, "cpu").batches] == ["dense"]
    alone = replace(MODELS, teacher=None)
    assert [one.signal for one in nominal_shape(config(), alone, "cpu").batches] == ["none"]
    stored = config(TRAIN, math_logits_dir="x", seq_len=32)
    dense, sparse = nominal_shape(stored, MODELS, "cpu").batches
    assert (dense.rows, dense.time, sparse.rows, sparse.time) == (8, 64, 16, 32)
    assert sparse.slots == 772  # of the default codec for a store that is yet to be made
    assert stored_batch(2, 8, get_codec("full").most_ids).signal == "logits"


def test_the_nominal_shape_has_the_signal_that_the_store_holds(tmp_path: Path) -> None:
    identity = SignalIdentity("t", "r", "h", 300, "full", 1, {})
    write_store_file(str(tmp_path), identity, "shards")
    stored = config(TRAIN, math_logits_dir=str(tmp_path), seq_len=32)
    models = replace(MODELS, codec=stored_codec(stored))
    assert [one.signal for one in nominal_shape(stored, models, "cpu").batches] == ["dense", "logits"]


def test_an_evaluation_counts_where_it_has_more_tokens_than_a_micro_batch() -> None:
    assert nominal_shape(config(eval_ctx_lens=(32, 512)), MODELS, "cpu").evaluations == ()
    (longer,) = nominal_shape(config(eval_ctx_lens=(32, 600)), MODELS, "cpu").evaluations
    assert (longer.rows, longer.time) == (1, 600)


@pytest.mark.parametrize(("student", "longer"), [("gpt2-test", True), ("llama-test", False)])
def test_a_learned_table_gets_a_row_for_each_position(student: str, longer: bool) -> None:
    made = build_student(student, vocab_size=VOCAB_SIZE, bos_id=0, eos_id=0, block_size=6000, seed=0)
    known = student_config(student, vocab_size=VOCAB_SIZE, bos_id=0, eos_id=0)
    shape = ModelShape.of(with_positions(known, config(block_size=4000, eval_ctx_lens=(6000,))))
    fitted, bare = (sum(one.numel() for one in real_model(one).parameters()) for one in (shape, preset(student)))
    assert fitted == sum(one.numel() for one in made.parameters())
    assert (fitted > bare) == longer


def test_a_temperature_that_is_scheduled_is_not_one() -> None:
    assert nominal_shape(config(), MODELS, "cpu").temperature == 1.0
    assert nominal_shape(config(temp_schedule="0:1,5:2"), MODELS, "cpu").temperature != 1.0


# ----------------------------------------------------------------------------------------------------------- the words


def test_the_line_says_yes_no_or_not_known(without: int) -> None:
    asked = config(grad_checkpoint=False)
    shape = nominal_shape(asked, MODELS, "cpu")
    yes = judge(asked, shape, without)
    no = judge(asked, shape, without - 1)
    assert "8 x 64 tokens, online teacher take" in yes.line
    assert "worked out, not measured" in yes.line
    assert "yes, it fits" in yes.line
    assert "no, it does not fit" in no.line
    assert "with --grad_checkpoint=true it does" in no.line
    assert no.verdict is not None
    assert [one.change for one in no.verdict.options] == [
        "--grad_checkpoint=true",
        "--batch_size=4 --grad_accum=2",
    ]
    assert "not known" in judge(asked, shape, None).line
    unknown = Fit(None, GIB, None, "because")
    assert unknown.line.endswith("because")
    assert unknown.largest() == ""
    assert unknown.as_dict() == {"obstacle": "because", "available_bytes": GIB, "verdict": None}
    assert yes.as_dict()["verdict"]["fits"] is True


# --------------------------------------------------------------------------------------------------- chunk of the loss


def test_the_chunk_of_the_loss_is_the_largest_that_leaves_a_tenth_free() -> None:
    """Kernels take fewer buffers than torch's own operations, which the model of memory knows."""
    shape = replace(nominal_shape(config(), replace(MODELS, vocab_size=VOCAB_SIZE), "cuda"), batches=(LONG,))
    sizes = {size: predict_training(replace(shape, chunk_bytes=size)).needed_bytes for size in CHUNK_BYTES}
    assert sizes[CHUNK_BYTES[0]] > sizes[CHUNK_BYTES[1]] > sizes[CHUNK_BYTES[2]]
    eager = predict_training(replace(shape, chunk_bytes=CHUNK_BYTES[0], loss_rows="eager"))
    assert eager.needed_bytes > sizes[CHUNK_BYTES[0]]
    for size in CHUNK_BYTES[:2]:
        assert choose_chunk(shape, sizes[size] * 10 // 9 + 10).value == str(size >> 20)
    for free in (sizes[CHUNK_BYTES[1]], None):
        choice = choose_chunk(shape, free)
        assert choice.value == "256"
        assert choice.reason
