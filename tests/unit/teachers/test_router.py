"""The table from type to teacher: who is asked, at which temperature, and what a whole run must have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.support.teachers import ListSource, batch_of, make_samples

from liquid_llm.data.types import MicroBatch, Samples
from liquid_llm.errors import DataError, SignalError
from liquid_llm.losses.signals import DenseSignal, OutputHead, Signal
from liquid_llm.teachers.router import TeacherRouter
from liquid_llm.teachers.teacher import Coverage, Prepared, Teacher

HEAD = OutputHead(torch.zeros(5, 2))


class Saying(Teacher):
    """Says the same number of every position; has something for the samples whose name it is given."""

    def __init__(self, number: float = 0.0, *, names: Sequence[str] | None = None, highest: float = 4.0) -> None:
        self.number, self.names, self.temperature_range, self.closed = number, names, (1.0, highest), 0

    def prepare(self, batch: MicroBatch, temperature: float) -> Prepared | None:
        return Prepared()

    def signal(self, batch: MicroBatch, prepared: Prepared) -> Signal:
        return DenseSignal(torch.full((batch.num_positions, 2), self.number), HEAD)

    def describe(self) -> dict[str, Any]:
        return {}

    def coverage(self, datasets: Sequence[Samples], window: int, *, every: bool = False) -> Coverage | None:
        if self.names is None:
            return None
        ids = [one.sample_id(n) for one in datasets for n in range(len(one))]
        usable = sum(one in self.names for one in ids)
        return Coverage(f"the store of {self.number:g}", len(ids), usable, usable, {"usable": usable}, {})

    def close(self) -> None:
        self.closed += 1


def test_each_type_is_answered_by_its_teacher_and_others_by_none() -> None:
    router = TeacherRouter({"lm": Saying(1.0), "chat": Saying(2.0)})
    assert list(router) == ["lm", "chat"]
    for type, number in (("lm", 1.0), ("chat", 2.0)):
        batch = batch_of(make_samples(2, type=type))
        signal = router.signal(batch, router.prepare(batch, 2.0))
        assert isinstance(signal, DenseSignal)
        assert signal.hidden.unique().tolist() == [number]
    batch = batch_of(make_samples(2, type="code"))
    assert router.prepare(batch, 2.0) is None
    assert router.signal(batch, None) is None


def test_temperatures_are_checked_before_a_run() -> None:
    router = TeacherRouter({"lm": Saying(highest=2.5)})
    router.check_temperature("lm", 2.5)
    router.check_temperature("code", 9.0)  # nobody is asked
    with pytest.raises(SignalError, match=r"teacher of lm cannot answer at this temperature; got 3; expected 1"):
        router.check_temperature("lm", 3.0)
    assert [router.answers(type, 3.0) for type in ("lm", "code")] == [False, False]


SAMPLES = make_samples(4)


def test_coverage_is_asked_of_those_that_have_only_some_texts(caplog: pytest.LogCaptureFixture) -> None:
    router = TeacherRouter({"lm": Saying(), "math_tool": Saying(names=["s/0", "s/2"]), "code": Saying(names=[])})
    data = {"lm": [ListSource(SAMPLES)], "math_tool": [ListSource(SAMPLES[:3]), ListSource(SAMPLES[3:])]}
    assert {type: row.usable for type, row in router.coverage(data, 64).items()} == {"math_tool": 2}
    assert not caplog.records
    found = router.coverage({**data, "code": [ListSource(SAMPLES)], "other": [ListSource(SAMPLES)]}, 64)
    assert {type: row.usable for type, row in found.items()} == {"math_tool": 2, "code": 0}
    assert [one.getMessage() for one in caplog.records] == [
        (
            "code: no sample has usable stored signal (none has a record): plain cross-entropy; to mend it, "
            "name the store that was captured of this manifest, or capture it"
        )
    ]
    assert router.coverage({"code": [ListSource([])]}, 64) == {}


def test_no_record_in_a_whole_run_is_an_error() -> None:
    router = TeacherRouter({"lm": Saying(), "math_tool": Saying(1.0, names=[]), "code": Saying(2.0, names=[])})
    data = {type: [ListSource(SAMPLES)] for type in ("lm", "math_tool", "code")}
    with pytest.raises(DataError, match="no sample of this run has usable stored signal") as failure:
        router.coverage(data, 64)
    assert "the store of 1, the store of 2" in str(failure.value)
    assert "math_tool: 4 samples, none has a record; code: 4 samples" in str(failure.value)


def test_a_teacher_of_several_types_is_closed_once() -> None:
    one, other = Saying(), Saying()
    TeacherRouter({"lm": one, "code": one, "chat": other}).close()
    assert (one.closed, other.closed) == (1, 1)
