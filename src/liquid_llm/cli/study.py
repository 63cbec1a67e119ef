"""``liquid study``: words in, exit code out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liquid_llm.cli.evaluate import options_of_evaluate
from liquid_llm.cli.parse import HELP, load_yaml, normalise, parse, read_options, unknown_option
from liquid_llm.errors import UsageError
from liquid_llm.options import ANNEAL, CAPTURE, OUTPUT, RUN, TRAIN, Option, options_of
from liquid_llm.sources import overlay
from liquid_llm.study.plan import AT, Arm, Study, make_arms

_DESCRIPTION = (
    "Train with options varied over values and seeds, and say whether the arms are better than the first, by how much, "
    "and how sure that is. Takes every option of liquid train beside these (of liquid anneal, with the word anneal "
    "first). liquid study FOLDER shows a study's result again from its files."
)

_EXAMPLES = ("--config=run.yaml --vary kd_alpha_start=0,0.7 --seeds=0,1,2 --study_dir=studies/alpha",)
_FOLDER = "the study's folder, on this machine or shared by several; --output_gcs_uri is the same"
_VARY = (
    "OPTION=VALUE,VALUE: an arm for each value (values with commas in them: separated by ;); given several times: each "
    "combination"
)
_LEAST = "a gain below this does not matter: nats a token, or share of tokens or answers"
_PROCESSES = "runs at a time; the same command may also be started in several places"
_DRY_RUN = "say what would be run and how long it takes: two steps of each arm are tried, nothing is kept"
_OWN = (
    Option("study_dir", "str", OUTPUT, "study_dir", None, _FOLDER),
    Option("vary", "texts", RUN, "vary", (), _VARY),
    Option("seeds", "ints", RUN, "seeds", (0, 1, 2), "seeds that every arm is trained with", minimum=0),
    Option("at", "names", RUN, "at", AT, "compare at equal tokens, at equal seconds, or both", choices=AT),
    Option("least_gain", "float", RUN, "least_gain", 0.01, _LEAST, minimum=0),
    Option("processes", "int", RUN, "processes", 1, _PROCESSES, minimum=1),
    Option("dry_run", "bool", RUN, "dry_run", False, _DRY_RUN),
)
_STUDY = "study_dir"
_TAKEN = {
    **dict.fromkeys(("run_id", "local_workdir", "tensorboard_uri", "model_uri"), _STUDY),
    "seed": "seeds",
    "restart": _STUDY,
    "accept_changes": _STUDY,
    "dry_run": "dry_run",
}
"""Options of training that a study sets itself, and the one of its own to give in their place."""

_SHARED_WITH_CAPTURE = """
    mc_teacher_id teacher_precision teacher_quantize hf_token_file hf_token_uri hf_token_secret dataset_manifest seq_len
    begin_token num_workers data_cache learn chat_template device
"""


def study(words: list[str]) -> int:
    """Parse and run one ``liquid study``; returns the exit code.

    Raises:
        LiquidError: any problem a user can cause.
    """
    face = words[0] if words[:1] in ([ANNEAL], [TRAIN]) else None
    if face is None and len(words) == 1 and not words[0].startswith("-") and words[0] not in HELP:
        from liquid_llm.jobs.study_result import show_study

        return show_study(words[0])
    asked, folder = read_study(face or TRAIN, words if face is None else words[1:])
    from liquid_llm.jobs.study import run_study

    return run_study(asked, folder)


_OF_FILE = ("arms", "captures", "vary", "evaluation")


@dataclass
class _File:
    """What of a configuration file is no option of training."""

    where: object = "liquid study"
    arms: Any = None
    captures: Any = None
    vary: Any = None
    evaluation: Any = None


def read_study(face: str, words: Sequence[str]) -> tuple[Study, str]:
    """What is asked for, and the study's folder.

    Raises:
        UsageError: an unknown option, a value that cannot be used, or no two arms.
    """
    training = tuple(option for option in options_of(face) if option.name not in _TAKEN)
    table, file = (*_OWN, *training), _File()

    def read_file(path: Path) -> Mapping[str, object]:
        loaded = load_yaml(path)
        file.where = path
        if isinstance(loaded, Mapping):
            _refuse_taken(_not_own(loaded), path)
            for name in _OF_FILE:
                setattr(file, name, loaded.get(name))
            loaded = {name: one for name, one in loaded.items() if name not in _OF_FILE}
        return read_options(loaded, table, path)

    named = (word[2:].partition("=")[0] for word in normalise(words) if word.startswith("--"))
    _refuse_taken(_not_own(named), "liquid study")
    given = parse(table, words, "liquid study", _DESCRIPTION, face=face, examples=_EXAMPLES, read_file=read_file)
    own: dict[str, Any] = {option.name: given.pop(option.name, option.default) for option in _OWN}
    folder = given.pop("output_gcs_uri", None)
    if folder is not None and own[_STUDY] is not None:
        raise UsageError("--study_dir and --output_gcs_uri are the same: leave one out", where="liquid study")
    if folder is None and own[_STUDY] is None:
        raise UsageError("the study's folder is missing", where="liquid study", expected="--study_dir=FOLDER")
    arms = [_read_arm(one, number, training, file.where) for number, one in enumerate(_listed(file.arms, "arms", file))]
    varied = [_split(text) for text in own["vary"]] or _varied_in_file(file)
    evaluation = read_options(file.evaluation or {}, options_of_evaluate(), f"{file.where}: evaluation")
    _refuse_in_evaluation(evaluation, file.where)
    shared = {name: given[name] for name in _SHARED_WITH_CAPTURE.split() if name in given}
    captures = [
        overlay(shared, read_options(one, options_of(CAPTURE), f"{file.where}: captures"))
        for one in _listed(file.captures, "captures", file)
    ]
    asked = Study(
        face,
        make_arms(arms, [_vary(name, values, training) for name, values in varied]),
        own["seeds"],
        given,
        captures,
        own["at"],
        own["least_gain"],
        own["processes"],
        evaluation,
        own["dry_run"],
    )
    return asked, str(folder or own[_STUDY])


def _not_own(names: Iterable[object]) -> list[object]:
    """Those that do not name an option of the study itself, which one of training has the name of too."""
    own = {option.name for option in _OWN}
    return [name for name in names if str(name).replace("-", "_").removeprefix("no_") not in own]


def _refuse_taken(names: Iterable[object], where: object) -> None:
    for name in (str(one).replace("-", "_") for one in names):
        if name.removeprefix("no_") in _TAKEN or name in _TAKEN:
            instead = _TAKEN[name if name in _TAKEN else name.removeprefix("no_")]
            raise UsageError("a study sets this option itself", where=f"{where}: --{name}", remedy=f"give --{instead}")


def _refuse_in_evaluation(given: Mapping[str, object], where: object) -> None:
    remedies = {"which": "leave it out: a run's last student is evaluated", "json": "look into evaluations/ afterwards"}
    for name in remedies.keys() & given.keys():
        raise UsageError("a study sets this option itself", where=f"{where}: evaluation: {name}", remedy=remedies[name])


def _listed(value: Any, name: str, file: _File) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise UsageError(
            "not a list", where=f"{file.where}: {name}", got=type(value).__name__, expected="- name: value lines"
        )
    return value


def _read_arm(value: Any, number: int, training: Sequence[Option], where: object) -> Arm:
    """An arm of the list: its name and the options that are its own."""
    where = f"{where}: arm {number + 1}"
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str) or not value["name"].strip():
        raise UsageError("an arm without a name", where=where, got=f"{value!r:.80}", expected="name: and options")
    rest = {name: one for name, one in value.items() if name != "name"}
    _refuse_taken(rest, where)
    return Arm(value["name"].strip(), read_options(rest, training, f"{where}, {value['name']}"))


def _split(text: str) -> tuple[str, list[str]]:
    """``OPTION=VALUE,VALUE`` as name and values."""
    name, equals, values = text.partition("=")
    if not equals or not name.strip() or not values.strip():
        raise UsageError("nothing to vary", where="--vary", got=repr(text), expected="OPTION=VALUE,VALUE,...")
    return name.strip().replace("-", "_"), values.split(";") if ";" in values else values.split(",")


def _varied_in_file(file: _File) -> list[tuple[str, list[str]]]:
    """The same from the file: a mapping ``option: [value, value]``."""
    if file.vary is None:
        return []
    if not isinstance(file.vary, Mapping) or not all(isinstance(one, list) and one for one in file.vary.values()):
        raise UsageError("nothing to vary", where=f"{file.where}: vary", expected="option: [value, value] lines")
    return [
        (str(name).replace("-", "_"), [",".join(map(str, v)) if isinstance(v, list) else str(v) for v in values])
        for name, values in file.vary.items()
    ]


def _vary(name: str, values: Sequence[str], training: Sequence[Option]) -> list[Arm]:
    """An arm for each value of an option."""
    _refuse_taken([name], "--vary")
    option = next((one for one in training if one.name == name), None)
    if option is None:
        raise unknown_option(f"--{name}", training, "--vary")
    return [Arm(f"{name}={one.strip()}", read_options({name: one.strip()}, training, "--vary")) for one in values]
