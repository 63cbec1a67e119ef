"""A continued run is compared with its checkpoint: what would be another order is refused, what jumps is said."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from tests.support.checkpoints import metadata_of

from liquid_llm.config import build_run_config, build_schedules
from liquid_llm.errors import DataError, UsageError
from liquid_llm.wiring.course import hash_weights, require_same_order, say_changes, say_jumps

ROWS = [
    {"type": "lm", "weight": 2.0, "samples": 48, "layout": "blocks", "fingerprint": "a"},
    {"type": "code", "weight": 1.0, "samples": 30, "layout": "samples", "fingerprint": "b"},
]
ORDER: dict[str, Any] = {
    "data": ROWS,
    "seed": 1,
    "val_fraction": 0.05,
    "grad_accum": 1,
    "batch_size": 8,
    "seq_len": 512,
    "reference": "r",
}


def config(**given: object) -> Any:
    return build_run_config("train", {"lm_teacher_id": "t", "dataset_manifest": "m", "block_size": 512, **given})


def row(number: int, **changes: object) -> list[dict[str, Any]]:
    rows = copy.deepcopy(ROWS)
    rows[number] |= changes
    return rows


DATA = [
    (ROWS[:1], "code: gone, 30 samples"),
    ([*ROWS, {**ROWS[0], "type": "poems", "samples": 3}], "poems: new, 3 samples"),
    ([*ROWS, ROWS[0]], "lm: 2 entries instead of 1"),
    (row(0, weight=3.0), "lm: weight 3.0 instead of 2.0"),
    (row(1, samples=29, fingerprint="c"), "code: 29 samples instead of 30"),
    (row(1, fingerprint="c"), "code: 30 samples as before, but other texts"),
    (row(0, layout="samples"), "lm: layout samples instead of blocks"),
    (ROWS[::-1], "another order"),
]
OPTIONS = [
    ({"seed": 2}, "--seed is 2 and was 1"),
    ({"batch_size": 4}, "--batch_size is 4 and was 8"),
    ({"grad_accum": 2}, "--grad_accum is 2 and was 1"),
    ({"val_fraction": 0.1}, "--val_fraction is 0.1 and was 0.05"),
    ({"seq_len": 64}, "--seq_len is 64 and was 512"),
    ({"reference": "s"}, "--resume_gcs_uri holds other weights"),
]
CHANGES = [({"data": data}, DataError, words) for data, words in DATA]
CHANGES += [(change, UsageError, words) for change, words in OPTIONS]


@pytest.mark.parametrize(("change", "kind", "words"), CHANGES)
def test_each_thing_that_the_order_depends_on_is_compared(change: Any, kind: Any, words: str, caplog: Any) -> None:
    known = metadata_of(4, run={"order": ORDER})
    require_same_order(known, ORDER, config(), "x.pt")
    with pytest.raises(kind) as raised:
        require_same_order(known, {**ORDER, **change}, config(), "x.pt")
    assert words in str(raised.value)
    assert "--accept_changes" in str(raised.value)
    assert str(raised.value).startswith("x.pt: ")
    require_same_order(known, {**ORDER, **change}, config(accept_changes=True), "x.pt")
    assert words in caplog.text


def test_what_is_not_known_is_not_compared() -> None:
    """Of an earlier release; and the reference student where it has faded."""
    other = {**ORDER, "seed": 9, "data": []}
    require_same_order(metadata_of(4, run={"seed": 1}), other, config(), "x.pt")
    for reference in (("r", None), (None, "s")):
        known = metadata_of(4, run={"order": {**ORDER, "reference": reference[0]}})
        require_same_order(known, {**ORDER, "reference": reference[1]}, config(), "x.pt")


def test_another_context_length_may_have_another_batch() -> None:
    known = metadata_of(4, block_size=1024, run={"order": ORDER})
    require_same_order(known, {**ORDER, "batch_size": 16, "seq_len": 1024}, config(), "x.pt")
    with pytest.raises(UsageError, match="seed"):
        require_same_order(known, {**ORDER, "seed": 2}, config(), "x.pt")


def said(caplog: Any, steps: int, **given: object) -> str:
    begun = config(max_steps=20, warmup_steps=2, lr=0.1)
    values = build_schedules(begun).at(10).default
    known = metadata_of(
        10,
        lr=0.1,
        lr_peak=None,
        warmup_steps=2,
        kd_alpha=values.alpha,
        kd_temperature=values.temperature,
        run={"total_steps": 20},
    )
    now = config(**{"max_steps": steps, "warmup_steps": 2, "lr": 0.1, **given})
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        say_jumps(known, build_schedules(now), now)
    return str(caplog.text)


def test_a_schedule_that_does_not_go_on_where_it_was_is_said(caplog: Any) -> None:
    assert said(caplog, 20) == ""
    longer = said(caplog, 40)
    assert "learning rate jumps at step 10" in longer
    assert "(of 40 steps now, of 20 then)" in longer
    assert "alpha jumps" in longer  # its ramp is a share of the steps
    assert "learning rate jumps" in said(caplog, 20, lr=0.2)
    assert "temperature jumps" in said(caplog, 20, kd_temperature=3)


TAUGHT = {"lm": {"teacher": "t", "revision": "1", "codec": None, "codec_options": None}}


@pytest.mark.parametrize(
    ("given", "taught", "words"),
    [
        ({}, TAUGHT, ""),
        ({"weight_decay": 0.2}, TAUGHT, "--weight_decay is 0.2, and was 0.1 in the run so far"),
        ({"betas": (0.8, 0.9)}, TAUGHT, "--betas is 0.8,0.9, and was 0.9,0.95"),
        ({}, {"lm": {**TAUGHT["lm"], "revision": "2"}}, "what teaches lm is t (revision 2), and was t (revision 1)"),
        ({}, {"lm": {**TAUGHT["lm"], "teacher": "u"}}, "what teaches lm is u (revision 1), and was t (revision 1)"),
        ({}, {**TAUGHT, "code": {"teacher": "t", "codec": "tail"}}, "what teaches code is t (codec tail), and was"),
        ({}, {}, "what teaches lm is nothing, and was t"),
    ],
)
def test_a_run_that_goes_on_is_told_of_another_teacher_and_another_optimizer(
    given: Any, taught: Any, words: str, caplog: Any
) -> None:
    state = {"optimizer": {"param_groups": [{"weight_decay": 0.1, "betas": [0.9, 0.95]}, {"weight_decay": 0.0}]}}
    say_changes(metadata_of(4, run={"taught": TAUGHT}), state, taught, config(**given))
    assert len(caplog.records) == bool(words)
    assert words in caplog.text
    caplog.clear()
    say_changes(metadata_of(4), state, taught, config())  # an older release kept nothing of teachers
    assert not caplog.records


def test_fewer_steps_than_were_taken_are_said(caplog: Any) -> None:
    assert "step 10 is behind the 7 steps asked for: none is taken" in said(caplog, 7)


def test_weights_have_a_hash_of_names_and_values() -> None:
    weights = {"a": torch.arange(4.0).view(2, 2), "b": torch.ones(3, dtype=torch.bfloat16), "c": torch.tensor(1.0)}
    found = hash_weights(weights)
    assert found == hash_weights(dict(reversed(weights.items())))
    others = [{**weights, "a": weights["a"].t()}, {**weights, "b": torch.ones(3)}, {"x": weights["a"]}]
    assert found not in [hash_weights(other) for other in others]
