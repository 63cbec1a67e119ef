"""Configuration: precedence, combinations that cannot work, schedules taken up from a checkpoint."""

import pytest

from liquid_llm.config import build_capture_config, build_run_config, build_schedules, inherit, schedule_remarks
from liquid_llm.config_names import earlier_run_names, old_run_name, run_name
from liquid_llm.errors import UsageError
from liquid_llm.options import ANNEAL, AUTO_BATCH, TRAIN, reference_values

BASE = {"dataset_name": "wikitext"}


def anneal(metadata=None, **given):
    return build_run_config(ANNEAL, {**BASE, **given}, metadata)


def hybrid(**given):
    return build_run_config(TRAIN, {"dataset_manifest": "m.jsonl", **given})


def test_a_given_value_wins_over_metadata_and_metadata_over_the_default():
    metadata = {"alpha": 0.25, "T": 1.5, "grad_accum": 3, "block_size": 256}
    config = anneal(metadata, alpha=0.9)
    assert config.objective.alpha == 0.9
    assert config.objective.temperature == 1.5
    assert config.optimizer.grad_accum == 3
    assert config.data.block_size == 256
    assert anneal().objective.alpha == 0.5
    assert anneal().objective.temperature == 1.0
    assert anneal().data.block_size == 512
    assert hybrid().data.block_size == hybrid().data.seq_len == 1024


def test_every_problem_is_reported_at_once():
    with pytest.raises(UsageError) as caught:
        build_run_config(
            TRAIN,
            {
                "kd_alpha_start": 1.5,
                "betas": (0.9,),
                "keep_old_logit_l2": 0.1,
                "hf_token_uri": "a",
                "hf_token_file": "b",
            },
        )
    message = str(caught.value)
    for words in (
        "5 problems",
        "--dataset_manifest",
        "--kd_alpha_start",
        "--betas",
        "--resume_gcs_uri",
        "--hf_token_file",
    ):
        assert words in message


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"alpha": 1.2}, "--alpha"),
        ({"alpha_schedule": "5:0.5,1:0.2"}, "out of order"),
        ({"temp_schedule": "0:0"}, "positive"),
        ({"eval_ctx_lens": (1,)}, "--eval_ctx_lens"),
        ({"dataset_name": None}, "--dataset_name"),
        ({"batch_size": "auto"}, "needs --tokens_per_step"),
        ({"batch_size": "auto", "tokens_per_step": 4096, "grad_accum": 2}, "--grad_accum follows"),
        ({"tokens_per_step": 4096}, "goes with --batch_size=auto"),
        ({"price_per_hour": 0.7}, "goes with --dry_run"),
    ],
)
def test_annealing_refuses_what_cannot_work(given, words):
    with pytest.raises(UsageError, match=words):
        anneal(**given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"hybrid": False}, "--lm_teacher_id"),
        ({"hybrid": False, "teacher_mode": "precomputed"}, "--math_logits_dir"),
        ({"val_fraction": 1.0}, "--val_fraction"),
        ({"kd_anneal_pct": 1.5}, "--kd_anneal_pct"),
    ],
)
def test_hybrid_refuses_what_cannot_work(given, words):
    with pytest.raises(UsageError, match=words):
        hybrid(**given)


def test_capture_needs_a_teacher_a_manifest_and_a_place():
    with pytest.raises(UsageError) as caught:
        build_capture_config({})
    assert "3 problems" in str(caught.value)
    assert "--signal TYPE=URI" in str(caught.value)


def test_hybrid_schedules_follow_the_reference():
    given = {"max_steps": 1000, "resume_gcs_uri": "x", "keep_old_logit_l2": 0.1, "keep_old_logit_l2_fade_step": 200}
    config = hybrid(**reference_values(TRAIN), **given)
    schedules = build_schedules(config)
    assert schedules.alpha.value(0) == 0.7
    assert schedules.alpha.value(150) == pytest.approx(0.55)
    assert schedules.alpha.value(300) == schedules.alpha.value(999) == 0.4
    assert schedules.temperature.value(500) == 2.0
    assert schedules.gamma.value(0) == 0.1
    assert schedules.gamma.value(100) == pytest.approx(0.05)
    assert schedules.gamma.value(200) == 0.0


@pytest.mark.parametrize(("steps", "share", "first"), [(1, 0.5, 0.7), (3, 0.1, 0.7), (1, 0.0, 0.4), (2, 1.0, 0.7)])
def test_however_short_a_run_its_first_step_has_the_first_weight(steps, share, first):
    given = {"kd_alpha_start": 0.7, "kd_alpha_end": 0.4, "kd_anneal_pct": share, "max_steps": steps}
    assert build_schedules(hybrid(**given)).alpha.value(0) == first


def test_schedules_come_from_the_command_line_then_from_metadata():
    metadata = {"alpha": 0.5, "alpha_schedule": "0:0.7,400:0.5,800:0.3", "T": 1.5}
    inherited = build_schedules(anneal(metadata))
    assert [inherited.alpha.value(step) for step in (500, 799, 800)] == [0.5, 0.5, 0.3]
    assert inherited.temperature.value(500) == 1.5
    given = build_schedules(anneal(metadata, alpha=0.6, alpha_schedule="5:0.1"))
    assert [given.alpha.value(step) for step in (0, 4, 5, 900)] == [0.6, 0.6, 0.1, 0.1]
    nothing = build_schedules(anneal())
    assert (nothing.alpha.value(0), nothing.temperature.value(0)) == (0.5, 1.0)


@pytest.mark.parametrize(
    ("given", "first_step", "parts"),
    [
        ({"alpha_schedule": "0:0.7,400:0.5,1000:0.3", "train_steps": 1000}, 0, ["--alpha_schedule", ": 1000:0.3"]),
        (
            {"temp_schedule": "5:0.5,6:0.25", "train_steps": 5, "warmup_steps": 1},
            0,
            ["--temp_schedule", "5:0.5, 6:0.25", "=5"],
        ),
        ({"alpha": 0.9, "alpha_schedule": "0:0.7"}, 0, ["--alpha=0.9", "never used", "0.7"]),
        ({"alpha": 0.9, "alpha_schedule": "4:0.7"}, 4, ["--alpha=0.9"]),
        ({"alpha": 0.7, "alpha_schedule": "0:0.7", "T": 1.5, "temp_schedule": "1:2"}, 0, []),
        ({"alpha_schedule": "0:0.7,999:0.1", "train_steps": 1000}, 0, []),
    ],
)
def test_what_a_schedule_says_in_vain_is_allowed_and_said(given, first_step, parts):
    remarks = schedule_remarks(anneal(**given), first_step)
    assert len(remarks) == bool(parts)
    assert all(part in remarks[0] for part in parts)


def test_a_warm_up_that_outlasts_the_run_is_said_with_whose_it_is():
    def remarks(first_step=0, **given):
        return [one for one in schedule_remarks(hybrid(**given), first_step) if "warmup" in one]

    [said] = remarks(max_steps=4, lr=1e-3)
    assert "--warmup_steps=100 (by default) reaches past the 4 steps of this run" in said
    assert "0.001" in said
    [said] = remarks(max_steps=4, warmup_steps=5)
    assert "--warmup_steps=5 reaches" in said
    assert not remarks(max_steps=100)
    assert not remarks(max_steps=4, warmup_steps=4)
    assert not remarks(first_step=4, max_steps=4), "nothing is left to take"


def test_a_kd_weight_that_begins_low_and_rises_by_default_is_pointed_at():
    def remarks(**given):
        return schedule_remarks(hybrid(max_steps=100, **given), 0)

    [said] = remarks(kd_alpha_start=0.0)
    assert "--kd_alpha_start=0 alone: the KD weight rises to 0.4 over the first 30 steps" in said
    for given in (
        {},
        {"kd_alpha_start": 0.0, "kd_alpha_end": 0.0},
        {"kd_alpha_start": 0.0, "kd_alpha_end": 0.4},
        {"kd_alpha_start": 0.7},
    ):
        assert not remarks(**given), given
    [said] = remarks(kd_alpha_start=0.0, kd_anneal_pct=0.0)
    assert "the KD weight is 0.4 at all steps" in said


def test_a_problem_ends_in_one_full_stop():
    with pytest.raises(UsageError) as caught:
        anneal(alpha_schedule="0:0.7,400")
    assert str(caught.value).endswith("such as 400:0.5.")


def test_a_run_is_named_after_what_changes_its_numbers():
    assert run_name(hybrid()) == run_name(hybrid())
    assert run_name(hybrid(seed=1234, max_steps=1000)) == run_name(hybrid()), "defaults that are spelled out"
    for option, value in NO_NUMBERS.items():
        assert run_name(hybrid(**{option: value})) == run_name(hybrid()), option
    assert run_name(inherit(anneal(), {"lr": 1.0})) == run_name(anneal()), "whatever checkpoint it goes on from"
    named = [run_name(hybrid(**given)) for given in ({}, *NUMBERS)]
    assert len(set(named)) == len(named)
    by_signal = hybrid(sources={"code": {"teacher": "store:u"}})
    assert run_name(by_signal) == run_name(hybrid(code_logits_dir="u"))


NO_NUMBERS = {
    "num_workers": 7,
    "data_cache": "elsewhere",
    "hf_token_file": "token",
    "device": "cpu",
    "output_gcs_uri": "elsewhere",
    "save_every": 1,
    "metrics_interval": 1,
    "eval_every": 1,
    "restart": True,
    "dry_run": True,
    "grad_checkpoint": True,
    "prepare_data": "force",
    "trackers": (),
    "math_logits_dir": None,
}
NUMBERS = (
    {"seed": 1},
    {"lr": 1e-3},
    {"max_steps": 7},
    {"dataset_manifest": "other.jsonl"},
    {"lm_teacher_id": "m"},
    {"code_logits_dir": "u"},
    {"math_logits_dir": "u"},
    {"sources": {"code": {"alpha": 0.5}}},
    {"sources": {"lm": {"layout": "samples"}}},
    {"block_size": 64, "seq_len": 64},
    {"batch_size": "auto", "tokens_per_step": 8192},
    {"batch_size": "auto", "tokens_per_step": 4096},
)


def test_what_is_decided_by_memory_is_open_until_then():
    config = anneal(batch_size="auto", tokens_per_step=4096)
    assert config.data.batch_size == AUTO_BATCH
    assert config.student.grad_checkpoint == "auto"
    assert config.optimizer.tokens_per_step == 4096
    assert anneal(dry_run=True, price_per_hour=0.7).price_per_hour == 0.7


def test_runs_of_the_reference_command_keep_their_names_when_our_defaults_move():
    assert hybrid().objective.temperature == 1.0
    assert hybrid(**reference_values(TRAIN)).objective.temperature == 2.0
    assert run_name(hybrid(kd_temperature=2.0)) == "liquid-16m-a2820d6829", "as when 2 was the default of both"
    assert run_name(hybrid()) == run_name(hybrid(kd_temperature=1.0)) != run_name(hybrid(kd_temperature=2.0))


def test_the_names_of_release_0_1_0_are_still_known():
    assert old_run_name(hybrid()) == "liquid-16m-e36f2b8d8b"
    assert old_run_name(anneal(seed=7)) == "liquid-16m-33b2ad9e4b"
    for checkpointing in (False, "auto"):
        assert old_run_name(hybrid(grad_checkpoint=checkpointing)) == "liquid-16m-e36f2b8d8b"
    given = {
        "batch_size": 3, "deterministic": True, "num_workers": 5, "hf_token_file": "t", "alpha_schedule": "0:0.7",
        "betas": (0.8, 0.9), "eval_ctx_lens": (32,), "grad_checkpoint": True, "reset_optim": True,
    }  # fmt: skip
    assert old_run_name(anneal(**given)) == "liquid-16m-76fc6949ad"
    given = {
        "batch_size": "auto", "tokens_per_step": 8192, "hybrid": False, "lm_teacher_id": "m", "seq_len": 512,
        "math_logits_dir": "u", "keep_old_logit_l2": 0.1, "resume_gcs_uri": "x", "prepare_data": "skip",
        "price_per_hour": 1, "dry_run": True,
    }  # fmt: skip
    assert old_run_name(hybrid(**given)) == "liquid-16m-39f67836ac"


def test_each_type_is_taught_by_what_names_it():
    both = hybrid(lm_teacher_id="m", math_logits_dir="u", sources={"essays": {"teacher": "none", "alpha": 0.3}})
    found = {type: both.source(type) for type in ("lm", "math_tool", "code", "essays")}
    assert {type: one.teacher for type, one in found.items()} == {
        "lm": "online:m",
        "math_tool": "store:u",
        "code": None,
        "essays": "none",
    }
    assert {type: one.layout for type, one in found.items()} == {
        "lm": "blocks",
        "math_tool": "samples",
        "code": "samples",
        "essays": "samples",
    }
    assert (found["lm"].online, found["math_tool"].store, found["math_tool"].online) == ("m", "u", None)
    assert (found["essays"].alpha, found["lm"].alpha) == (0.3, None)


def test_without_hybrid_everything_is_taught_one_way_but_what_is_named():
    named = {"code": {"teacher": "store:u"}, "lm": {"layout": "samples"}}
    online = hybrid(hybrid=False, lm_teacher_id="m", math_logits_dir="left aside", sources=named)
    assert [online.source(type).teacher for type in ("lm", "math_tool", "code", "essays")] == [
        "online:m",
        "online:m",
        "store:u",
        "online:m",
    ]
    assert online.source("lm").layout == "samples"
    stored = hybrid(hybrid=False, teacher_mode="precomputed", sources={"essays": {"teacher": "store:u"}})
    assert [stored.source(type).teacher for type in ("lm", "code", "essays")] == [None, None, "store:u"]
    assert anneal(teacher_name="m").source("lm").teacher == "online:m"


@pytest.mark.parametrize(
    ("option", "type"), [("math_logits_dir", "math_tool"), ("code_logits_dir", "code"), ("lm_teacher_id", "lm")]
)
def test_a_type_has_one_teacher_however_it_is_spelled(option, type):
    same = f"{'online' if type == 'lm' else 'store'}:u"
    assert hybrid(**{option: "u", "sources": {type: {"teacher": same}}}).source(type).teacher == same
    with pytest.raises(UsageError, match=f"--{option} and --signal {type}="):
        hybrid(**{option: "u", "sources": {type: {"teacher": "none"}}})


def test_capture_writes_where_a_source_says():
    given = {"mc_teacher_id": "m", "dataset_manifest": "m.jsonl", "sources": {"essays": {"teacher": "store:u"}}}
    assert build_capture_config({**given, "code_logits_dir": "c"}).source("code").store == "c"
    assert build_capture_config(given).source("essays").store == "u"


@pytest.mark.parametrize(
    ("config", "asked"),
    [
        (hybrid(lm_teacher_id="t"), ["lm", "code"]),
        (hybrid(lm_teacher_id="t", kd_alpha_start=0, kd_alpha_end=0), []),
        (hybrid(lm_teacher_id="t", kd_alpha_start=0), ["lm", "code"]),
        (hybrid(lm_teacher_id="t", kd_alpha_end=0), ["lm", "code"]),
        (hybrid(lm_teacher_id="t", kd_alpha_end=0, kd_anneal_pct=0), []),
        (hybrid(lm_teacher_id="t", kd_alpha_start=0, kd_alpha_end=0, eval_teacher=True), ["lm", "code"]),
        (hybrid(lm_teacher_id="t", kd_alpha_start=0, kd_alpha_end=0, sources={"code": {"alpha": 0.5}}), ["code"]),
        (hybrid(lm_teacher_id="t", sources={"lm": {"alpha": 0.0}}), ["code"]),
        (anneal(teacher_name="t"), ["lm", "code"]),
        (anneal(teacher_name="t", alpha=0), []),
        (anneal(teacher_name="t", alpha=0, alpha_schedule="5:0.3"), ["lm", "code"]),
        (anneal(teacher_name="t", alpha=0.5, alpha_schedule="0:0"), []),
    ],
)
def test_a_teacher_that_never_weighs_is_not_asked(config, asked):
    assert [type for type in ("lm", "code") if config.asks_teacher(type)] == asked
    assert config.asked_online == (["t"] if "lm" in asked else [])


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("gs://b/stage1/stage1.pt", "stage1"),
        ("runs/20251007-174419/best.pt", "20251007-174419"),
        ("runs/a b/step-00000012.pt", "a-b"),
        ("https://x/model.zip?sig=secret", "model"),
        ("best.pt", "best"),
        ("hf/folder/", "folder"),
    ],
)
def test_a_run_from_a_checkpoint_is_called_after_it_and_found_under_what_it_was_called(uri, name):
    """It was called after --student's default, which it is not: only the digest told two of them apart."""
    config = hybrid(resume_gcs_uri=uri)
    assert run_name(config).startswith(f"{name}-")
    earlier, _ = earlier_run_names(config)
    assert earlier == f"liquid-16m-{run_name(config).rpartition('-')[2]}"
    assert run_name(hybrid(resume_gcs_uri=uri, student="liquid-80m")).startswith("liquid-80m-"), "who names it knows"
