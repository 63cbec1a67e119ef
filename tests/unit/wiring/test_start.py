"""What a checkpoint stands for, what starts afresh, and what ranks before it: the table behind the annealing stages."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from typing import Any

import pytest
from tests.support.checkpoints import metadata_of

from liquid_llm.checkpoint.resume import ResumeSource
from liquid_llm.config import RunConfig, build_run_config
from liquid_llm.errors import CheckpointError
from liquid_llm.options import ANNEAL, TRAIN
from liquid_llm.versions import CURRENT
from liquid_llm.wiring.course import course_of
from liquid_llm.wiring.start import Start, settle_context

STATE = {"student": {}, "optimizer": {"param_groups": [{"weight_decay": 0.25, "betas": (0.5, 0.75)}]}}
KNOWN = {"block_size": 512, "kd_alpha": 0.9, "kd_temperature": 2.0, "alpha_schedule": "0:0.9,20:0.1", "lr": 3e-4}


def config(face: str = ANNEAL, **given: object) -> RunConfig:
    needed = {"dataset_name": "d"} if face == ANNEAL else {"dataset_manifest": "m.jsonl"}
    return build_run_config(face, {**needed, **given})


def start(kind: str = "resume", **changes: Any) -> Start:
    return Start(kind, ResumeSource.of_checkpoint(STATE, metadata_of(10, **{**KNOWN, **changes}), "x.pt"))


def test_a_fresh_start_stands_for_nothing() -> None:
    fresh = Start("fresh", ResumeSource({}, "new"))
    assert (fresh.goes_on, fresh.step, fresh.options(config())) == (False, 0, {})
    assert settle_context(fresh, config(block_size=64)) is fresh


def test_what_an_annealing_run_takes_from_its_checkpoint() -> None:
    values = start(lr_peak=None).options(config())
    expected = {
        "block_size": 512,
        "alpha": 0.9,
        "T": 2.0,
        "alpha_schedule": "0:0.9,20:0.1",
        "lr": 3e-4,
        "weight_decay": 0.25,
        "betas": (0.5, 0.75),
    }
    assert {name: values.get(name) for name in expected} == expected
    assert not {"lr_peak", "temp_schedule"} & set(values), "what it does not have, it does not stand for"


@pytest.mark.parametrize(
    ("kind", "expected"), [("resume", set()), ("continue", {"block_size", "kd_temperature", "grad_accum"})]
)
def test_a_hybrid_run_takes_no_more_than_its_own_length_temperature_and_step(kind: str, expected: set[str]) -> None:
    assert set(start(kind, rope_scale=None).options(config(TRAIN))) == expected


@pytest.mark.parametrize(
    ("kind", "given", "goes_on", "said"),
    [
        ("resume", {}, True, ""),
        ("resume", {"block_size": 512}, True, ""),
        ("resume", {"block_size": 1024}, True, "optimizer and step 10 go on"),
        ("resume", {"block_size": 1024, "reset_optim_on_ctx_change": True}, False, "weights are kept"),
        ("resume", {"reset_optim_on_ctx_change": True}, True, ""),
        ("resume", {"reset_optim": True}, False, "its steps have ended"),
        ("continue", {"reset_optim": True}, True, ""),
    ],
)
def test_what_goes_on(
    kind: str, given: dict[str, object], goes_on: bool, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        settled = settle_context(start(kind), config(**given))
    assert (settled.goes_on, settled.step) == (goes_on, 10 if goes_on else 0)
    assert said in caplog.text
    assert ("alpha_schedule" in settled.options(config(**given))) == goes_on, "its steps count from the old step 0"


def test_a_level_given_anew_holds_until_the_schedules_next_entry() -> None:
    assert start().options(config(alpha=0.5))["alpha_schedule"] == "10:0.5,20:0.1"
    again = start("continue", run={"given_levels": {"alpha": 0.5}})
    assert again.options(config(alpha=0.5))["alpha_schedule"] == "0:0.9,20:0.1", "run again, it is not given anew"


@pytest.mark.parametrize("face", [ANNEAL, TRAIN])
def test_a_run_of_a_newer_release_does_not_go_on(face: str) -> None:
    newer = {**CURRENT, "order": CURRENT["order"] + 1}
    with pytest.raises(CheckpointError, match="newer release"):
        settle_context(start("continue", versions=newer), config(face))


COURSE = {"document_mask": True, "kd_positions": 0.25, "divergence": "jsd:beta=0.3", "grad_clip": 0.5}
SOURCES = {
    "sources": {
        "math_tool": {"teacher": "none", "alpha": 0.5, "temperature": 1.5, "divergence": "reverse_kl"},
        "code": {"teacher": "none"},
    }
}


@pytest.mark.parametrize(("face", "kind"), [(ANNEAL, "resume"), (ANNEAL, "continue"), (TRAIN, "continue")])
def test_a_run_that_goes_on_is_told_of_each_option_that_changes_its_course(
    face: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    known = json.loads(json.dumps({"course": course_of(config(face, **COURSE, **SOURCES))}))
    settle_context(start(kind, run=known), config(face, **COURSE, **SOURCES))
    settle_context(start(kind), config(face))  # an older release kept nothing to be compared
    settle_context(replace(start(kind, run=known), origin=ResumeSource({}, "weights")), config(face))
    assert not caplog.records
    settle_context(start(kind, run=known), config(face))
    said = [(one.levelname, one.getMessage().partition(": the run")[0]) for one in caplog.records]
    assert said == [
        ("WARNING", f"--{option} is {value}, and was {was} in the run so far")
        for option, was, value in (
            ("document_mask", "true", "false"),
            ("kd_positions", "0.25", "1.0"),
            ("divergence", "jsd:beta=0.3", "forward_kl"),
            ("grad_clip", "0.5", "1.0"),
            ("divergence_by_type", "math_tool=reverse_kl", "not given"),
            ("alpha_by_type", "math_tool=0.5", "not given"),
            ("temperature_by_type", "math_tool=1.5", "not given"),
        )
    ]
