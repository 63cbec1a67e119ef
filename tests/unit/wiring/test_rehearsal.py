"""Time to the end of a run, from what a dry run measured."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.support.tokenizers import tiny_tokenizer

from liquid_llm.answers import Question
from liquid_llm.config import build_run_config
from liquid_llm.framing import Framing
from liquid_llm.options import ANNEAL
from liquid_llm.wiring.rehearsal import Rehearsal, speaking_seconds, time_to_the_end, write_seconds
from liquid_llm.wiring.speech import Prompt, Speech

ANY: Any = None


def measured(step: float = 1.0, evaluation: float | None = 10.0, save: float = 100.0) -> Rehearsal:
    return Rehearsal(ANY, ANY, step, evaluation, save, None)


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 9), st.integers(0, 9), st.booleans())
def test_steps_evaluations_and_saves_are_as_many_as_the_run_will_have(
    first: int, total: int, eval_every: int, save_every: int, fresh: bool
) -> None:
    given = {"dataset_name": "d", "train_steps": total, "eval_every": eval_every, "save_every": save_every}
    found = time_to_the_end(build_run_config(ANNEAL, given), first, fresh, measured())
    steps = range(first + 1, total + 1)
    ends = int(bool(steps))
    # As the hooks do it: every so many steps, and at the end unless that was just done; before a fresh run's first.
    evaluations = {step for step in steps if eval_every and step % eval_every == 0} | set(steps[-1:])
    saves = {step for step in steps if save_every and step % save_every == 0} | set(steps[-1:])
    assert found["steps"] == len(steps)
    assert found["evaluations"] == len(evaluations) + fresh
    assert found["saves"] == len(saves) >= ends
    assert found["seconds"] == len(steps) + 10 * (len(evaluations) + fresh) + found["saving_seconds"]


@pytest.mark.parametrize(("save_seconds", "waited"), [(3.0, 3.0), (5.0, 5.0), (7.0, 7.0 + 3 * 2.0)])
def test_a_save_is_waited_for_only_where_the_next_one_comes_before_it_is_whole(
    save_seconds: float, waited: float
) -> None:
    config = build_run_config(ANNEAL, {"dataset_name": "d", "train_steps": 20, "eval_every": 0, "save_every": 5})
    assert time_to_the_end(config, 0, True, measured(save=save_seconds))["saving_seconds"] == waited
    config = build_run_config(ANNEAL, {"dataset_name": "d", "train_steps": 20, "eval_every": 0, "save_every": 0})
    assert time_to_the_end(config, 0, True, measured(save=save_seconds))["saving_seconds"] == save_seconds
    assert time_to_the_end(config, 20, True, measured(save=save_seconds))["saving_seconds"] == 0


def test_without_anything_held_out_nothing_is_evaluated() -> None:
    config = build_run_config(ANNEAL, {"dataset_name": "d", "train_steps": 10, "eval_every": 2})
    found = time_to_the_end(config, 0, True, measured(evaluation=None))
    assert found["evaluations"] == found["evaluation_seconds"] == 0


@pytest.mark.parametrize("size", [0, 1, 3 * 2**20 + 7, 500 * 2**20])
def test_writing_is_scaled_to_the_size_and_leaves_nothing(tmp_path: Path, size: int) -> None:
    times = iter((5.0, 7.0))
    seconds = write_seconds(tmp_path, size, lambda: next(times))
    written = min(size, 128 * 2**20)
    assert seconds == (0 if size == 0 else pytest.approx(2.0 * size / written))
    assert not list(tmp_path.iterdir())


def test_what_is_said_at_an_evaluation_counts_by_its_first_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[int] = []

    def generate(model: Any, prompts: list[list[int]], **told: Any) -> list[list[int]]:
        said.append(len(prompts))
        return [[1] for _ in prompts]

    monkeypatch.setattr("liquid_llm.wiring.speech.generate", generate)
    monkeypatch.setattr("liquid_llm.answers.generate", generate)
    questions = [Question("t", str(n), (0, 1), "q", "#### 1") for n in range(33)]
    speech = Speech(tiny_tokenizer(), Framing(0, 0), (0,), [Prompt("x", (5,))] * 40, questions)
    student = SimpleNamespace(model=None, compute_dtype=torch.float32, device=torch.device("cpu"), is_dealt_out=False)
    student.ask = lambda work: work(None)
    times = iter((0.0, 2.0, 10.0, 13.0))
    assert speaking_seconds(student, speech, lambda: next(times)) == pytest.approx(2 * 40 / 16 + 3 * 33 / 16)  # type: ignore[arg-type]
    assert said == [16, 16]
    assert speaking_seconds(student, Speech(None, Framing(0, 0), (0,)), lambda: next(times)) == 0.0  # type: ignore[arg-type]
