"""Evaluation: every figure against one computed by transformers alone, token by token."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.support.models import tiny_model

from liquid_llm.data.loader import collate
from liquid_llm.errors import DeviceError
from liquid_llm.evaluation import Evaluator
from liquid_llm.models.loading import LoadedModel
from liquid_llm.teachers.online import OnlineTeacher
from liquid_llm.teachers.router import TeacherRouter
from liquid_llm.training import Student

VOCAB_SIZE = 512
LENGTHS = (8, 16, 50)


def text():
    return torch.randint(0, VOCAB_SIZE, (150,), generator=torch.Generator().manual_seed(2))


def cut(length, per_batch):
    """The text in blocks of ``length``, the last one shorter, ``per_batch`` a micro-batch."""
    blocks = [block.numpy() for block in text().split(length) if len(block) > 1]
    return [collate("lm", blocks[n : n + per_batch]) for n in range(0, len(blocks), per_batch)]


def by_hand(model, length):
    """Log-probabilities [positions, vocab] of every labelled position, and the labels, one block at a time."""
    logits, labels = [], []
    with torch.no_grad():
        for block in text().split(length):
            if len(block) > 1:
                logits.append(model(block[None]).logits[0, :-1].double().log_softmax(-1))
                labels.append(block[1:])
    return torch.cat(logits), torch.cat(labels)


@pytest.fixture(scope="module")
def models():
    return tiny_model("llama", seed=1).train(), tiny_model("gpt2", seed=2)


@pytest.fixture(scope="module")
def row(models):
    student, teacher = models
    sets = {length: {"lm": cut(length, 3)} for length in LENGTHS}
    return Evaluator(sets, 16, LENGTHS, router_of(teacher))(Student(student, torch.float32))


def router_of(teacher):
    loaded = LoadedModel(model=teacher, tokenizer=None, identity=None)
    return TeacherRouter({"lm": OnlineTeacher(loaded, VOCAB_SIZE)})


@pytest.mark.parametrize("length", LENGTHS)
def test_losses_are_means_over_tokens_not_over_batches(models, row, length):
    student, teacher = models
    ours, labels = by_hand(student, length)
    theirs, _ = by_hand(teacher, length)
    picked = labels.unsqueeze(1)
    assert row[f"val_loss_student@{length}"] == pytest.approx(-ours.gather(1, picked).mean().item(), rel=1e-5)
    assert row[f"val_loss_teacher@{length}"] == pytest.approx(-theirs.gather(1, picked).mean().item(), rel=1e-5)
    divergence = (theirs.exp() * (theirs - ours)).sum(1).mean().item()
    assert row[f"val_kd@{length}"] == pytest.approx(divergence, rel=1e-4)
    assert row[f"val_ppl_student@{length}"] == pytest.approx(math.exp(row[f"val_loss_student@{length}"]))


def test_the_mean_of_batch_means_would_be_another_number(models):
    # 150 tokens in blocks of 50: the cuts below have a last batch of another size, so weighting shows
    means = [by_batch(models[0], batch) for batch in cut(16, 3)]
    ours, labels = by_hand(models[0], 16)
    assert abs(sum(means) / len(means) + ours.gather(1, labels.unsqueeze(1)).mean().item()) > 1e-4


def by_batch(model, batch):
    with torch.no_grad():
        logits = model(batch.input_ids).logits.flatten(0, 1).double()
    return torch.nn.functional.cross_entropy(logits, batch.labels.flatten(), ignore_index=-100).item()


def test_plain_keys_are_those_of_the_training_length(row):
    for name in ("val_loss_student", "val_loss_teacher", "val_kd", "val_ppl_student"):
        assert row[name] == row[f"{name}@16"]
    assert row["by_type"] == {
        "lm": {
            "val_loss": row["val_loss_student"],
            "val_kd": row["val_kd"],
            "val_kd_codec": "online",
            "val_loss_teacher": row["val_loss_teacher"],
            "positions": 150 - 10,
        }
    }
    assert "val_loss_student_with_teacher" not in row


def test_teacher_and_student_are_compared_on_the_same_text(models):
    """Code has no model to ask: the student's loss over both types is no pair of the teacher's over one."""
    student, teacher = models
    code = [replace(batch, type="code", input_ids=batch.input_ids.flip(1)) for batch in cut(16, 3)]
    evaluate = Evaluator({16: {"lm": cut(16, 3), "code": code}}, 16, (16,), router_of(teacher))
    row = evaluate(Student(student, torch.float32))
    alone = Evaluator({16: {"lm": cut(16, 3)}}, 16, (16,), router_of(teacher))(Student(student, torch.float32))
    for suffix in ("", "@16"):
        assert row[f"val_loss_teacher{suffix}"] == alone["val_loss_teacher"]
        assert row[f"val_loss_student_with_teacher{suffix}"] == alone["val_loss_student"]
    assert row["val_loss_student"] != alone["val_loss_student"]
    assert row["by_type"]["lm"]["val_loss_teacher"] == alone["val_loss_teacher"]
    assert "val_loss_teacher" not in row["by_type"]["code"]


def test_without_a_teacher_there_are_no_teacher_keys(models):
    row = Evaluator({16: {"lm": cut(16, 3)}}, 16, (16,), TeacherRouter({}))(Student(models[0], torch.float32))
    assert {key for key in row if "teacher" in key or "kd" in key} == set()
    assert row["val_loss_student"] == row["val_loss_student@16"]


def test_it_is_repeatable_and_leaves_student_and_generators_as_they_were(models, row):
    student, teacher = models
    before, state = {name: p.clone() for name, p in student.state_dict().items()}, torch.get_rng_state()
    evaluator = Evaluator({length: {"lm": cut(length, 3)} for length in LENGTHS}, 16, LENGTHS, router_of(teacher))
    first = evaluator(Student(student, torch.float32))
    again = evaluator(Student(student, torch.float32))  # the teacher's part comes from the cache now
    assert first == again == row
    assert student.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, student.state_dict()[name]) for name, value in before.items())
    assert all(parameter.grad is None for parameter in student.parameters())


def test_a_probe_scores_the_largest_batch_of_each_type_and_length_and_changes_nothing(models, row):
    student, teacher = models
    evaluator = Evaluator({length: {"lm": cut(length, 3)} for length in LENGTHS}, 16, LENGTHS, router_of(teacher))
    seen = []
    handle = student.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    evaluator.probe(Student(student, torch.float32))
    handle.remove()
    assert seen == [(3, 8), (3, 16), (3, 50)]
    assert student.training
    assert evaluator(Student(student, torch.float32)) == row


def test_what_the_teacher_said_is_kept_on_the_cpu(models):
    student, teacher = models
    evaluator = Evaluator({16: {"lm": cut(16, 3)}}, 16, (), router_of(teacher))
    evaluator(Student(student, torch.float32))
    assert len(evaluator._kept) == len(evaluator.sets[16]["lm"])
    assert {signal.hidden.device.type for signal in evaluator._kept.values()} == {"cpu"}


def test_no_more_of_it_is_kept_than_the_bound_and_the_rest_is_asked_again(models, row):
    student, teacher = models
    asked = []
    handle = teacher.base_model.register_forward_pre_hook(lambda *_: asked.append(1))
    sets = {length: {"lm": cut(length, 3)} for length in LENGTHS}
    batches = sum(len(one["lm"]) for one in sets.values())
    one_row = 16 * teacher.config.hidden_size * 4
    evaluator = Evaluator(sets, 16, LENGTHS, router_of(teacher), cache_bytes=10 * one_row)
    try:
        found = [evaluator(Student(student, torch.float32)) for _ in range(2)]
    finally:
        handle.remove()
    held = sum(signal.nbytes for signal in evaluator._kept.values())
    assert 8 * one_row < held <= 10 * one_row
    assert 0 < len(evaluator._kept) < batches
    assert len(asked) == 2 * batches - len(evaluator._kept)
    assert found == [row, row]


def test_a_batch_that_does_not_fit_is_scored_in_parts_with_the_same_figures(models, row):
    student, teacher = models
    sizes = []

    def hold(_module, _args, kwargs):
        sizes.append(kwargs["input_ids"].numel())
        if sizes[-1] > 60:
            raise torch.OutOfMemoryError("CUDA out of memory")

    evaluator = Evaluator({length: {"lm": cut(length, 3)} for length in LENGTHS}, 16, LENGTHS, router_of(teacher))
    handle = student.base_model.register_forward_pre_hook(hold, with_kwargs=True)
    try:
        found = [evaluator(Student(student, torch.float32)) for _ in range(2)]
    finally:
        handle.remove()
    for one in found:
        assert one.keys() == row.keys()
        for key in ("val_loss_student", "val_kd", "val_loss_teacher@50", "val_kd@8"):
            assert one[key] == pytest.approx(row[key], rel=1e-5)
    assert sum(size > 60 for size in sizes) == 2  # 3 x 50, then 2 x 50; then it is known


def test_one_row_that_does_not_fit_ends_the_evaluation_in_words(models):
    def hold(_module, _args, kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    student = models[0]
    handle = student.base_model.register_forward_pre_hook(hold, with_kwargs=True)
    evaluator = Evaluator(
        {16: {"lm": cut(16, 3)}}, 16, (), TeacherRouter({}), consumers=lambda: "teacher weights 6.0 GiB"
    )
    try:
        with pytest.raises(DeviceError, match=r"evaluation: a single row of 16 tokens.*teacher weights"):
            evaluator(Student(student, torch.float32))
    finally:
        handle.remove()
    assert student.training


def test_what_a_batch_is_answered_from_is_read_once_however_many_passes_it_takes(models):
    student, teacher = models
    prepared = []

    class Counting(OnlineTeacher):
        def prepare(self, batch, temperature):
            prepared.append(id(batch))
            return super().prepare(batch, temperature)

    loaded = LoadedModel(model=teacher, tokenizer=None, identity=None)
    evaluator = Evaluator({16: {"lm": cut(16, 3)}}, 16, (), TeacherRouter({"lm": Counting(loaded, VOCAB_SIZE)}))
    evaluator.passes.max_tokens = 16  # a row at a time
    evaluator(Student(student, torch.float32))
    assert len(evaluator._kept) > len(evaluator.sets[16]["lm"])  # else this shows nothing
    assert prepared == [id(batch) for batch in evaluator.sets[16]["lm"]]


def test_what_is_not_learnt_does_not_count(models):
    """Every figure is a mean over the labelled positions, whatever their share of a batch."""
    student, teacher = models
    blocks = [block.numpy() for block in text().split(50)]
    masks = [np.arange(len(block)) >= start for start, block in zip((40, 3, 20), blocks, strict=True)]
    sets = {50: {"lm": [collate("lm", [block], learnt=[mask]) for block, mask in zip(blocks, masks, strict=True)]}}
    row = Evaluator(sets, 50, (), router_of(teacher))(Student(student, torch.float32))
    keep = torch.from_numpy(np.concatenate([mask[1:] for mask in masks]))
    mine, theirs = (by_hand(model.eval(), 50) for model in models)
    student.train()
    (p, labels), (q, _) = ((logits[keep], labels[keep]) for logits, labels in (mine, theirs))
    assert row["by_type"]["lm"]["positions"] == len(labels) == 10 + 47 + 30
    assert row["val_loss_student"] == pytest.approx(-float(p.gather(1, labels[:, None]).mean()), rel=1e-5)
    assert row["val_loss_teacher"] == pytest.approx(-float(q.gather(1, labels[:, None]).mean()), rel=1e-5)
    assert row["val_kd"] == pytest.approx(float((q.exp() * (q - p)).sum(1).mean()), rel=1e-4)


def test_further_measures_are_added_and_the_others_are_the_same_bits(models, row):
    student, teacher = models
    sets = {length: {"lm": cut(length, 3)} for length in LENGTHS}
    sizes = torch.arange(VOCAB_SIZE) % 5
    evaluator = Evaluator(sets, 16, LENGTHS, router_of(teacher), measures=True, token_bytes=sizes)
    found = evaluator(Student(student, torch.float32))
    assert found == evaluator(Student(student, torch.float32)), "nothing is left of the evaluation before"
    new = {key for key in found if key not in row}
    assert {key: found[key] for key in row if key != "by_type"} == {key: row[key] for key in row if key != "by_type"}
    assert {key.partition("@")[0] for key in new} == {
        *("val_agreement", "val_overlap", "val_calibration", "val_calibration_teacher"),
        *("val_bits_per_byte", "val_bits_per_byte_teacher"),
    }
    for length in LENGTHS:
        ours, labels = by_hand(student.eval(), length)
        theirs, _ = by_hand(teacher, length)
        student.train()
        agreed = (ours.argmax(1) == theirs.argmax(1)).double().mean().item()
        overlap = torch.minimum(ours.exp(), theirs.exp()).sum(1).mean().item()
        bits = -ours.gather(1, labels[:, None]).sum().item() / math.log(2) / sizes[labels].sum().item()
        assert found[f"val_agreement@{length}"] == pytest.approx(agreed)
        assert found[f"val_overlap@{length}"] == pytest.approx(overlap, rel=1e-5)
        assert found[f"val_bits_per_byte@{length}"] == pytest.approx(bits, rel=1e-5)
        assert found[f"val_calibration@{length}"] == pytest.approx(plain_calibration(ours, labels), rel=1e-4)
        assert found[f"val_calibration_teacher@{length}"] == pytest.approx(plain_calibration(theirs, labels), rel=1e-4)
    assert found["by_type"]["lm"]["val_agreement"] == found["val_agreement"] == found["val_agreement@16"]
    evaluator.probe(Student(student, torch.float32))
    assert found == evaluator(Student(student, torch.float32))


def plain_calibration(log_probs, labels):
    """Guo et al. 2017, equation 3, with fifteen bins."""
    confidence, best = log_probs.exp().max(1)
    total = 0.0
    for n in range(15):
        held = (confidence >= n / 15) & (confidence < (n + 1) / 15)
        if held.any():
            gap = confidence[held].mean() - (best == labels)[held].double().mean()
            total += float(gap.abs()) * int(held.sum())
    return total / len(labels)


def test_measures_of_a_batch_in_parts_are_those_of_the_whole(models):
    student, teacher = models
    sets = {50: {"lm": cut(50, 3)}}
    whole = Evaluator(sets, 50, (), router_of(teacher), measures=True)
    parts = Evaluator(sets, 50, (), router_of(teacher), measures=True)
    parts.passes.max_tokens = 50
    expected, found = (one(Student(student, torch.float32)) for one in (whole, parts))
    for key in ("val_agreement", "val_overlap", "val_calibration", "val_calibration_teacher"):
        assert found[key] == pytest.approx(expected[key], rel=1e-4)
