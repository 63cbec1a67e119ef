"""``liquid store``: words in, exit code out."""

from __future__ import annotations

from typing import Any

from liquid_llm.cli.parse import AS_JSON, Positional, choose, parse
from liquid_llm.errors import UsageError
from liquid_llm.options import CAPTURE, RUN, Option, options_of

_DESCRIPTION = (
    "Look after stores of teacher signal. Folders may be local or URLs. diff, verify and pack end with 3 where "
    "something is not as it should be."
)
_MOVED = "; the nearest that the codec is read at"
_TEMPERATURE = Option("temperature", "float", RUN, "temperature", None, f"to decode at [2{_MOVED}]", above=0)
_TEMPERATURES = Option("temperatures", "floats", RUN, "temperatures", None, f"to compare at [1,2{_MOVED}]", above=0)
_SHARED = "seq_len teacher_precision data_cache learn chat_template device hf_token_file seed"
_TEACHER = (
    Option("teacher", "str", RUN, "teacher", None, "the teacher it was captured from"),
    Option("manifest", "str", RUN, "manifest", None, "manifest with its texts"),
    *(option for option in options_of(CAPTURE) if option.name in _SHARED.split()),
)
_STORE = Positional("store", "STORE", "the store")


def _samples(default: int) -> Option:
    return Option("samples", "int", RUN, "samples", default, "records to look at", minimum=1)


# action -> what it does, its folders, its options
_ACTIONS: dict[str, tuple[str, tuple[Positional, ...], tuple[Option, ...]]] = {
    "pack": (
        "copy a store's records into full shards; shards also in place, when SRC and DST are the same",
        (
            Positional("source", "SRC", "store of any layout"),
            Positional("target", "DST", "folder for the shards; not that of a .pt store"),
        ),
        (AS_JSON,),
    ),
    "verify": (
        "score a random sample again and compare it with what is stored",
        (_STORE,),
        (*_TEACHER, _samples(32), _TEMPERATURES, AS_JSON),
    ),
    "stats": (
        "bytes a stored position by part, shares learnt and kept, mass, tail share; with a teacher also fidelity",
        (_STORE,),
        (*_TEACHER, _samples(200), _TEMPERATURE, AS_JSON),
    ),
    "diff": (
        "which records are missing, hold other signal (payload) or are of another text or length (tokens)",
        (Positional("first", "A", "a store"), Positional("second", "B", "another")),
        (_TEMPERATURE, AS_JSON),
    ),
}


def store(words: list[str]) -> int:
    """Parse and run one ``liquid store ACTION``; returns the exit code.

    Raises:
        LiquidError: any problem a user can cause.
    """
    known = {name: text for name, (text, _, _) in _ACTIONS.items()}
    action = choose("action", known, words, "liquid store", _DESCRIPTION)
    text, positionals, options = _ACTIONS[action]
    given = parse(options, words[1:], f"liquid store {action}", text, positionals=positionals)
    values: dict[str, Any] = {option.name: given.get(option.name, option.default) for option in options} | given
    from liquid_llm.jobs import store as storing

    if action == "pack":
        return storing.run_pack(values["source"], values["target"], as_json=values["json"])
    if action == "diff":
        first, second = values["first"], values["second"]
        return storing.run_diff(first, second, temperature=values["temperature"], as_json=values["json"])
    missing = [name for name in ("teacher", "manifest") if values[name] is None]
    if missing and (action == "verify" or len(missing) == 1):
        raise UsageError(
            "--teacher and --manifest go together: fidelity is measured on the manifest's texts",
            where=f"liquid store {action}",
            got=f"no --{' and no --'.join(missing)}",
        )
    uri = values["store"]
    job: dict[str, object] = {name: given[name] for name in _SHARED.split() if name in given}
    if not missing:
        job |= {"mc_teacher_id": values["teacher"], "dataset_manifest": values["manifest"]}
    job |= {"math_logits_dir": uri, "code_logits_dir": uri}
    common = {"samples": values["samples"], "as_json": values["json"]}
    if action == "verify":
        return storing.run_verify(uri, job, temperatures=values["temperatures"], **common)
    return storing.run_stats(uri, job, temperature=values["temperature"], **common)
