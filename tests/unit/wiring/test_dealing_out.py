"""How a step's micro-batches come to the processes of a run."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.checkpoints import metadata_of

from liquid_llm.checkpoint.resume import ResumeSource
from liquid_llm.config import RunConfig, build_run_config
from liquid_llm.errors import UsageError
from liquid_llm.wiring.start import Start, choose_group, deal_out

FRESH = Start("fresh", ResumeSource({}, "--student=x"))
CONTINUED = Start("continue", ResumeSource({}, "run"))


def config(**given: Any) -> RunConfig:
    return build_run_config("train", {"dataset_manifest": "m.jsonl", "lm_teacher_id": "t", **given})


def test_where_nobody_said_how_many_it_is_one_a_process(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert deal_out(config(), FRESH, 3).optimizer.grad_accum == 3
    assert "--grad_accum=3: a micro-batch of each step for each of 3 processes" in caplog.text
    assert deal_out(config(), FRESH, 1) == config()
    assert deal_out(config(grad_accum=6), FRESH, 3).optimizer.grad_accum == 6


def test_a_number_that_was_given_is_kept_or_refused() -> None:
    with pytest.raises(UsageError, match=r"--grad_accum=4.*got 4 micro-batches a step, 3 processes.*1, 2 or 4"):
        deal_out(config(grad_accum=4), FRESH, 3)


def test_a_run_that_is_continued_keeps_its_steps() -> None:
    with pytest.raises(UsageError, match=r"grad_accum of the run that is continued.*--restart"):
        deal_out(config(), CONTINUED, 2)


def test_types_are_drawn_for_as_many_as_was_said_or_as_there_are_ranks() -> None:
    assert choose_group(config(), FRESH, 3) == 3
    assert choose_group(config(draw_group=2), FRESH, 1) == 2


def test_the_group_of_a_run_that_goes_on_is_kept_and_another_refused(caplog: pytest.LogCaptureFixture) -> None:
    metadata = replace(metadata_of(3), run={"group_size": 2})
    started = Start("continue", ResumeSource({}, "run/last.pt", metadata, state={"optimizer": {}}))
    assert choose_group(config(), started, 4) == choose_group(config(draw_group=2), started, 4) == 2
    with pytest.raises(UsageError, match=r"--draw_group=4.*got groups of 2 in run/last\.pt.*--restart") as caught:
        deal_out(config(draw_group=4, grad_accum=4), started, 4)
    assert caught.value.exit_code == 2
    with caplog.at_level(logging.INFO):
        deal_out(config(grad_accum=4), started, 4)
    assert "--draw_group is no multiple of 4 processes" in caplog.text
    old = replace(started, origin=replace(started.origin, metadata=metadata_of(3)))
    assert choose_group(config(), old, 1) == 1


def test_a_start_reaches_another_rank_as_values(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "here").mkdir()
    (tmp_path / "there" / "tokenizer.json").write_text("{}")
    state = {"student": {"w": torch.ones(2)}, "optimizer": {"state": {}}}
    metadata = metadata_of(3)
    origin = ResumeSource(state["student"], "a run", metadata, {"a": 1}, str(tmp_path / "there"), state)
    found = Start.of_plain(Start("continue", origin).plain(), tmp_path / "here")
    assert (found.kind, found.step, found.group_size) == ("continue", 3, 1)
    assert found.origin.metadata == metadata.as_read_back()
    assert torch.equal(found.origin.state_dict["w"], torch.ones(2))
    assert dict(found.origin.config or {}) == {"a": 1}
    assert Path(str(found.origin.tokenizer_folder), "tokenizer.json").read_text() == "{}"
    weights = Start.of_plain(Start("resume", ResumeSource({"w": torch.ones(1)}, "x")).plain(), tmp_path / "here")
    assert (weights.goes_on, weights.origin.tokenizer_folder) == (False, None)
