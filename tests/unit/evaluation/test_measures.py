"""Every measure against plain float64 softmaxes: odd sizes, soft-caps, padding, bfloat16, every kind of signal."""

import math
from dataclasses import replace

import pytest
import torch

from liquid_llm.evaluation import NUM_BINS, TextSums, compare
from liquid_llm.losses.plan import LossPlan
from liquid_llm.losses.signals import (
    DRAWS,
    HEAD,
    HEAD_AND_DRAWS,
    DenseSignal,
    LogitsSignal,
    OutputHead,
    SparseSignal,
)

VOCAB, POSITIONS = 131, 53


def head(vocab=VOCAB, hidden=7, seed=0, dtype=torch.float32, **options):
    generator = torch.Generator().manual_seed(seed)
    return OutputHead(torch.randn(vocab, hidden, generator=generator).to(dtype), **options)


def states(hidden=7, seed=1, dtype=torch.float32):
    return torch.randn(POSITIONS, hidden, generator=torch.Generator().manual_seed(seed)).to(dtype)


def labels():
    return torch.randint(0, VOCAB, (POSITIONS,), generator=torch.Generator().manual_seed(3))


def plain_probs(hidden, head):
    """Softmax in float64, with nothing of ours."""
    raw = hidden.double() @ head.weight.double().T
    if head.bias is not None:
        raw = raw + head.bias.double()
    raw = raw * head.scale
    if head.soft_cap is not None:
        raw = head.soft_cap * torch.tanh(raw / head.soft_cap)
    return torch.softmax(raw, dim=1)


def plain_measures(p, q, y):
    """The definitions, position by position, over the vocabulary that both have."""
    shared = min(p.shape[1], q.shape[1])
    rows = range(len(y))
    return {
        "ce": [-math.log(p[n, y[n]]) for n in rows],
        "confidence": [float(p[n].max()) for n in rows],
        "right": [float(p[n].argmax() == y[n]) for n in rows],
        "teacher_ce": [-math.log(q[n, y[n]]) for n in rows],
        "teacher_confidence": [float(q[n].max()) for n in rows],
        "teacher_right": [float(q[n].argmax() == y[n]) for n in rows],
        "kl": [sum(float(q[n, v] * (q[n, v] / p[n, v]).log()) for v in range(shared) if q[n, v]) for n in rows],
        "agreement": [float(p[n].argmax() == q[n].argmax()) for n in rows],
        "overlap": [float(sum(min(p[n, v], q[n, v]) for v in range(shared))) for n in rows],
    }


def assert_measures(found, expected, names, tolerance=2e-5):
    for name in names:
        got = getattr(found, name)
        assert got is not None, name
        assert got.double().tolist() == pytest.approx(expected[name], rel=tolerance, abs=tolerance), name


EVERY = tuple(plain_measures(torch.ones(1, 2) / 2, torch.ones(1, 2) / 2, [0]))


@pytest.mark.parametrize("sizes", [(7, 3), (16, 16), (100, 1), (3, 5)])
def test_all_measures_of_a_whole_signal_whatever_the_cut(sizes):
    student, teacher = head(seed=0), head(hidden=5, seed=5, bias=torch.linspace(-1, 1, VOCAB))
    mine, theirs, y = states(), states(5, seed=6), labels()
    plan = LossPlan(*sizes, product="widen", looks=True)
    (found,) = compare([(mine, student)], y, DenseSignal(theirs, teacher), plan=plan)
    assert_measures(found, plain_measures(plain_probs(mine, student), plain_probs(theirs, teacher), y), EVERY)
    assert found.has_signal.all()


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_soft_caps_and_scales(whose):
    capped = head(seed=0, scale=1.7, soft_cap=2.5)
    student, teacher = (capped, head(seed=5)) if whose == "student" else (head(seed=5), capped)
    (found,) = compare([(states(), student)], labels(), DenseSignal(states(seed=6), teacher))
    expected = plain_measures(plain_probs(states(), student), plain_probs(states(seed=6), teacher), labels())
    assert_measures(found, expected, EVERY)


@pytest.mark.parametrize(("mine", "theirs"), [(VOCAB + 9, VOCAB), (VOCAB, VOCAB + 13), (VOCAB, VOCAB)])
def test_vocabularies_that_differ_by_padding(mine, theirs):
    student, teacher = head(mine, seed=0), head(theirs, seed=5)
    (found,) = compare([(states(), student)], labels(), DenseSignal(states(seed=6), teacher))
    q = plain_probs(states(seed=6), teacher.cut(mine))
    assert_measures(found, plain_measures(plain_probs(states(), student), q, labels()), EVERY)


def test_bfloat16_states_and_heads_are_compared_in_float32():
    student, teacher = head(seed=0, dtype=torch.bfloat16), head(seed=5, dtype=torch.bfloat16)
    mine, theirs = states(dtype=torch.bfloat16), states(seed=6, dtype=torch.bfloat16)
    (found,) = compare([(mine, student)], labels(), DenseSignal(theirs, teacher))
    assert_measures(found, plain_measures(plain_probs(mine, student), plain_probs(theirs, teacher), labels()), EVERY)


def test_float64_states_are_compared_in_float64():
    student, teacher = head(dtype=torch.float64), head(seed=5, dtype=torch.float64)
    mine, theirs = states(dtype=torch.float64), states(seed=6, dtype=torch.float64)
    (found,) = compare([(mine, student)], labels(), DenseSignal(theirs, teacher))
    expected = plain_measures(plain_probs(mine, student), plain_probs(theirs, teacher), labels())
    assert_measures(found, expected, EVERY, tolerance=1e-12)


def test_several_students_are_each_what_they_are_alone():
    signal = DenseSignal(states(seed=6), head(seed=5))
    pairs = [(states(seed=n), head(VOCAB + n, seed=n)) for n in (1, 2, 3)]
    together = compare(pairs, labels(), signal)
    for pair, found in zip(pairs, together, strict=True):
        (alone,) = compare([pair], labels(), signal)
        for name in EVERY:
            assert torch.allclose(getattr(found, name).double(), getattr(alone, name).double(), atol=1e-6), name


def test_a_student_that_is_its_teacher():
    (found,) = compare([(states(), head())], labels(), DenseSignal(states(), head()))
    assert found.kl.abs().max() < 1e-6
    assert found.agreement.all()
    assert (found.overlap - 1).abs().max() < 1e-5


def test_stored_logits_answer_where_there_are_any():
    q = plain_probs(states(seed=6), head(seed=5))
    mask = torch.arange(POSITIONS) % 3 > 0
    rows = q.log().float()
    rows[~mask] = math.nan
    (found,) = compare([(states(), head())], labels(), LogitsSignal(rows, mask))
    expected = plain_measures(plain_probs(states(), head()), q, labels())
    assert torch.equal(found.has_signal, mask)
    for name in ("kl", "agreement", "overlap", "teacher_ce"):
        assert getattr(found, name)[~mask].sum() == 0
        got = getattr(found, name)[mask].double().tolist()
        assert got == pytest.approx([x for x, held in zip(expected[name], mask, strict=True) if held], rel=1e-4)


def sparse(form, k=9, temperature=1.0):
    q = plain_probs(states(seed=6), head(seed=5)).float()
    top, ids = q.topk(k, dim=1)
    exact = None if form == DRAWS else torch.full((POSITIONS,), k)
    tail = 1 - top.sum(dim=1) if form == HEAD else torch.zeros(POSITIONS)
    mask = torch.arange(POSITIONS) % 4 > 0
    return SparseSignal(ids, top, top.log(), tail, mask, temperature, form=form, num_exact=exact), q


@pytest.mark.parametrize("form", [HEAD, HEAD_AND_DRAWS, DRAWS])
def test_a_sparse_signal_answers_what_it_tells_and_no_more(form):
    signal, q = sparse(form)
    (found,) = compare([(states(), head())], labels(), signal)
    p = plain_probs(states(), head())
    expected = plain_measures(p, q.double(), labels())
    mask = signal.mask
    assert found.teacher_ce is None
    assert found.overlap is None
    kl = (signal.weights.double() * (signal.log_probs.double() - p.gather(1, signal.ids).log())).sum(dim=1)
    if form == HEAD:
        rest = 1 - p.gather(1, signal.ids).sum(dim=1)
        kl += signal.tail_mass.double() * (signal.tail_mass.double() / rest).log()
    assert found.kl[mask].double().tolist() == pytest.approx(kl[mask].tolist(), rel=1e-4)
    assert found.kl[~mask].abs().sum() == 0
    if form == DRAWS:
        assert found.agreement is None
        assert found.teacher_confidence is None
        return
    held = [n for n in range(POSITIONS) if mask[n]]
    assert found.agreement[mask].double().tolist() == [expected["agreement"][n] for n in held]
    assert found.teacher_confidence[mask].tolist() == pytest.approx([expected["teacher_confidence"][n] for n in held])
    assert found.teacher_right[mask].double().tolist() == [expected["teacher_right"][n] for n in held]


def test_a_row_without_exact_ids_tells_no_likeliest_token():
    signal, _ = sparse(HEAD_AND_DRAWS)
    signal = replace(signal, num_exact=torch.arange(POSITIONS) % 2 * 9)
    (found,) = compare([(states(), head())], labels(), signal)
    assert torch.equal(found.tells_best, signal.mask & (torch.arange(POSITIONS) % 2 > 0))


def test_a_signal_at_another_temperature_is_refused():
    with pytest.raises(ValueError, match="temperature 2"):
        compare([(states(), head())], labels(), sparse(HEAD, temperature=2.0)[0])


def test_without_a_teacher_there_is_the_student_alone():
    (found,) = compare([(states(), head())], labels(), None)
    assert found.has_signal is None
    assert found.kl is None
    sums = TextSums(["a"])
    sums.add(torch.zeros(POSITIONS, dtype=torch.int64), found)
    assert set(sums.estimates()) == {"ce", "calibration"}
    assert len(sums.plain()["bins"]) == NUM_BINS
