"""The options that run a job again, bit for bit on the same kind of machine: those given, and what was chosen for them.

What says where a run goes stays as it was given, and what the environment says of that (``places``) stays out: an
environment's places are another job's next time. ``--restart`` stays out too: it would set aside the very run that is
repeated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from liquid_llm import storage
from liquid_llm.config import RunConfig
from liquid_llm.framing import Framings
from liquid_llm.models.spec import parse_student
from liquid_llm.models.student import PRESETS
from liquid_llm.options import AUTO
from liquid_llm.runtime import Choice
from liquid_llm.sources import read_spec
from liquid_llm.wiring.framing import ALWAYS, NEVER

_CHOSEN = {  # choice -> option
    "device": "device",
    "student_dtype": "precision",
    "teacher_dtype": "teacher_precision",
    "begin_token": "begin_token",
}
_PATHS = """
    resume_gcs_uri teacher_name lm_teacher_id mc_teacher_id math_logits_dir code_logits_dir hf_token_file
    fa_wheel_gcs dataset_name dataset_manifest data_cache datasets_yaml prep_toolkit_zip_uri prep_extract_dir
    chat_template sample_prompts hidden_states_dir
"""
_WORDS = {"chat_template": ("chatml",)}  # never paths, whatever lies there


def options_to_repeat(given: Mapping[str, object], choices: Mapping[str, Choice], **settled: object) -> dict[str, Any]:
    """Option name -> value, as a configuration file gives it.

    Args:
        given: option name -> value, as a person set them.
        choices: automatic decisions; those that change numbers take their option's place.
        settled: further options and what they came to.
    """
    chosen = {option: choices[name].value for name, option in _CHOSEN.items() if name in choices}
    values = {**given, **chosen, **settled}
    for name in ("restart", "accept_changes"):
        values.pop(name, None)
    return {name: _plain(name, value) for name, value in values.items() if value is not None}


def begin_choice(framings: Framings, captured: Iterable[str] | None = None) -> dict[str, Choice]:
    """``--begin_token`` as it came out, where that says it of all texts; else nothing, and ``auto`` finds it again.

    ``always`` says that texts begin as the job's own tokenizer has it, which a store that is followed may not.

    Args:
        captured: the types whose texts the job reads; None: those of ``framings``, and any other.
    """
    found = {framings.usual, *framings.by_type.values()} if captured is None else {framings(one) for one in captured}
    if all(one.begin_id is None for one in found):
        return {"begin_token": Choice(NEVER, "as all texts of this job have it")}
    return {"begin_token": Choice(ALWAYS, "as all texts of this job have it")} if found == {framings.usual} else {}


def run_options_to_repeat(config: RunConfig, choices: Mapping[str, Choice]) -> dict[str, Any]:
    """The same of a training job whose ``auto`` is decided."""
    settled: dict[str, object] = {}
    if config.given.get("batch_size") == AUTO:
        settled |= {"batch_size": config.data.batch_size, "grad_accum": config.optimizer.grad_accum}
        settled["tokens_per_step"] = None  # it goes with auto alone
    if config.given.get("grad_checkpoint", AUTO) == AUTO:
        settled["grad_checkpoint"] = config.student.grad_checkpoint
    if "compile" in choices and config.given.get("compile", AUTO) == AUTO:
        settled["compile"] = choices["compile"].value == "true"
    return options_to_repeat(config.given, choices, **settled)


def _plain(name: str, value: object) -> object:
    if value == ():
        return "none"
    if name == "sources":
        assert isinstance(value, Mapping)
        return {type: {key: _in_source(key, one) for key, one in fields.items()} for type, fields in value.items()}
    if name == "student":
        return str(parse_student(str(value)).with_names(lambda one: one if one in PRESETS else str(_absolute(one))))
    return _absolute(value) if name in _PATHS.split() and value not in _WORDS.get(name, ()) else value


def _in_source(key: str, value: object) -> object:
    if key != "teacher":
        return value
    kind, colon, rest = read_spec(str(value)).partition(":")
    return f"{kind}{colon}{_absolute(rest)}"


def _absolute(value: object) -> object:
    """A path of this machine as it is known from everywhere; any other value as it is."""
    if not isinstance(value, str) or not value or storage.is_remote(value) or not Path(value).exists():
        return value
    return str(Path(value).absolute())
