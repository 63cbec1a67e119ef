"""The name of a run whose command gives none: the student's, and a digest of what changes the run's numbers.

The same command always gets the same name, so that running it again continues the run; so does one that differs only in
where it runs and writes, or in how often it saves and logs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from liquid_llm.config import RunConfig, build_schedules
from liquid_llm.models.spec import parse_student
from liquid_llm.options import AUTO, AUTO_BATCH, OBJECTIVE, OPTIONS, OUTPUT, options_of
from liquid_llm.sources import NONE

# Those that name teachers are counted as what they come to, in ``config.source``.
_UNCOUNTED = """
    num_workers data_cache prepare_data datasets_yaml prep_toolkit_zip_uri prep_toolkit_sha256 prep_extract_dir
    prep_timeout_s hf_token_file hf_token_uri hf_token_secret fa_wheel_gcs fa_wheel_sha256 device dry_run price_per_hour
    grad_checkpoint compile eval_every teacher_name lm_teacher_id hybrid teacher_mode math_logits_dir code_logits_dir
    shard teacher_shard teacher_ranks teacher_stream eval_measures eval_teacher eval_answers answer_tokens
    sample_prompts sample_tokens
"""


def counted_options(config: RunConfig) -> dict[str, Any]:
    """What changes a run's numbers, as plain values: options that are not at their first default, and its teachers."""
    uncounted = _UNCOUNTED.split()
    options = {option.name: option for option in options_of(config.face) if option.group != OUTPUT}
    moved = {name: one.default_for(config.face) for name, one in options.items() if one.reference is not None}
    counted = {
        name: value
        for name, value in {**moved, **config.given}.items()
        if name in options and name not in uncounted and value != options[name].first_default(config.face)
    }
    return {"face": config.face, "options": counted, "source": dataclasses.asdict(config.source)}


def without_effect() -> list[str]:
    """The values of a configuration that change no step, by dotted name: where a run is, how it is carried out."""
    uncounted = _UNCOUNTED.split()
    return [
        f"{option.group}.{option.field}" if option.group in _OLD_FIELDS or option.group == OUTPUT else option.field
        for option in OPTIONS
        if option.group == OUTPUT or option.name in uncounted
    ]


def training_key(config: RunConfig) -> dict[str, Any]:
    """What of ``counted_options`` plays a part: equal for two runs whose every step is the same.

    The objective is what it comes to at each step. Where its weight is 0, or nothing teaches a type, neither the
    temperature nor the divergence is looked at.
    """
    counted, schedules, course = counted_options(config), build_schedules(config), hashlib.sha256()
    taught: dict[str | None, bool] = {None: config.source.other_teacher not in (None, NONE)}
    taught |= {type: one.teacher not in (None, NONE) for type, one in config.source.named.items()}
    weighs = False
    for step in range(config.optimizer.steps):
        values = schedules.at(step)
        for type, has_teacher in taught.items():
            one = values.objective(type)
            told = (one.alpha, one.temperature, one.divergence) if has_teacher and one.alpha > 0 else ()
            course.update(repr((type, one.gamma, told)).encode())
            weighs = weighs or bool(told)
    objective = {option.name for option in options_of(config.face) if option.group == OBJECTIVE}
    return {
        "options": {name: value for name, value in counted["options"].items() if name not in objective | {"sources"}},
        "sources": {type: (one.teacher, one.layout) for type, one in config.source.named.items()},
        "other_teacher": config.source.other_teacher,
        "course": course.hexdigest(),
        "distilled_share": config.objective.distilled_share if weighs else 1.0,
    }


def run_name(config: RunConfig) -> str:
    """This release's name: of what differs from the defaults, so that a new option leaves all names as they are."""
    return _name(counted_options(config), _resumed_name(config) or _student_name(config))


def earlier_run_names(config: RunConfig) -> list[str]:
    """The names that the same command has had before, by which runs that were begun then are found."""
    return [_name(counted_options(config), _student_name(config)), old_run_name(config)]


def _resumed_name(config: RunConfig) -> str | None:
    """What a student that is taken from a checkpoint is called: --student has its default there, which it is not."""
    uri = config.student.resume_uri
    if uri is None or "student" in config.given:
        return None
    *folders, file = [part for part in uri.partition("?")[0].split("/") if part] or [""]
    stem = re.sub(r"\.(pt|zip)$", "", file)
    own = stem in ("best", "last", "final") or stem.startswith(("step-", "time-"))
    return re.sub(r"[^A-Za-z0-9._-]+", "-", folders[-1] if own and folders else stem).strip("-.") or None


_OLD_FIELDS = {
    "student": "spec resume_uri rope_scale grad_checkpoint precision",
    "teacher": (
        "precision token_file token_uri token_secret online_id stored_id hybrid hybrid_strict mode math_dir code_dir "
        "fa_wheel_uri fa_wheel_sha256"
    ),
    "data": (
        "batch_size num_workers cache_dir block_size seq_len val_fraction manifest dataset_name dataset_config prepare "
        "datasets_yaml toolkit_uri toolkit_sha256 toolkit_dir toolkit_timeout_seconds"
    ),
    "objective": ("temperature alpha alpha_schedule temp_schedule alpha_start alpha_end anneal_share l2 l2_fade_step"),
    "optimizer": (
        "steps grad_accum lr lr_peak warmup_steps weight_decay betas grad_clip reset reset_on_context_change "
        "tokens_per_step"
    ),
    "evaluation": "every_steps context_lengths max_tokens",
}
_OLD_NAMES = {("objective", "l2"): "gamma", ("objective", "l2_fade_step"): "gamma_fade_step"}
# What stood for an option that the command does not have, where that is not None.
_OLD_ABSENT: Mapping[tuple[str, str], object] = {
    ("teacher", "hybrid"): False,
    ("teacher", "hybrid_strict"): False,
    ("teacher", "mode"): "online",
    ("data", "val_fraction"): 0.0,
    ("data", "prepare"): "skip",
    ("data", "toolkit_timeout_seconds"): 3600,
    ("objective", "alpha"): 0.5,
    ("objective", "alpha_start"): 0.0,
    ("objective", "alpha_end"): 0.0,
    ("objective", "anneal_share"): 0.0,
    ("objective", "l2"): 0.0,
    ("objective", "l2_fade_step"): 1,
    ("optimizer", "reset"): False,
    ("optimizer", "reset_on_context_change"): False,
}


def old_run_name(config: RunConfig) -> str:
    """The name that release 0.1.0 gave, by which a run that was begun then is found; it counted nearly every option."""
    there = {(option.group, option.field): option for option in OPTIONS if config.face in option.faces}
    plain: dict[str, Any] = {"face": config.face}
    for group, fields in _OLD_FIELDS.items():
        plain[group] = {}
        for field in fields.split():
            option = there.get((group, _OLD_NAMES.get((group, field), field)))
            plain[group][field] = (
                _OLD_ABSENT.get((group, field))
                if option is None
                else config.given.get(option.name, option.first_default(config.face))
            )
    student, data, optimizer = plain["student"], plain["data"], plain["optimizer"]
    data["seq_len"] = data["seq_len"] or data["block_size"]
    if data["batch_size"] == AUTO:
        data["batch_size"] = AUTO_BATCH
    if student["grad_checkpoint"] == AUTO:
        student["grad_checkpoint"] = False
    if optimizer["tokens_per_step"] is None:
        optimizer.pop("tokens_per_step")
    plain["seed"] = config.seed
    if config.deterministic:
        plain["deterministic"] = True
    return _name(plain, _student_name(config))


def _name(counted: Mapping[str, Any], student: str) -> str:
    return f"{student}-{hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()[:10]}"


def _student_name(config: RunConfig) -> str:
    student = parse_student(config.student.spec)
    name = (student.base or str(student.teacher)).rstrip("/").rsplit("/", 1)[-1]
    return name if student.base else f"{name}-cut"
