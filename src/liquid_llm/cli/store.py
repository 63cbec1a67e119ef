"""``liquid store``: words in, exit code out."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from liquid_llm.cli.parse import Parser, normalise, unknown_option, unknown_word, value_of
from liquid_llm.errors import UsageError
from liquid_llm.options import PRECISIONS

_EPILOG = "Folders may be local or URLs. diff, verify and pack end with 3 where something is not as it should be."
_ACTIONS = ("pack", "verify", "stats", "diff")
_MOVED = "; the nearest that the codec is read at"
_TEACHER_OPTIONS = (
    "mc_teacher_id",
    "dataset_manifest",
    "seed",
    "teacher_precision",
    "data_cache",
    "hf_token_file",
    "device",
)


def store(words: list[str]) -> int:
    """Parse and run one ``liquid store ACTION``; returns the exit code.

    Raises:
        LiquidError: any problem a user can cause.
    """
    if words and not words[0].startswith("-") and words[0] not in _ACTIONS:
        raise unknown_word("action", words[0], _ACTIONS, "liquid store")
    parser, actions = _parser()
    options, unknown = parser.parse_known_args(normalise(words))
    if unknown:
        known = [option.lstrip("-") for option in actions[options.action]._option_string_actions]
        raise unknown_option(unknown[0], known, f"liquid store {options.action}")
    from liquid_llm.jobs import store as storing

    if options.action == "pack":
        return storing.run_pack(options.source, options.target, as_json=options.json)
    if options.action == "diff":
        return storing.run_diff(options.first, options.second, temperature=options.temperature, as_json=options.json)
    given = {name: getattr(options, name) for name in _TEACHER_OPTIONS if getattr(options, name) is not None}
    for kind in ("math", "code"):
        given[f"{kind}_logits_dir"] = options.store
    if options.action == "verify":
        return storing.run_verify(
            options.store, given, samples=options.samples, temperatures=options.temperatures, as_json=options.json
        )
    if ("mc_teacher_id" in given) != ("dataset_manifest" in given):
        raise UsageError("--teacher and --manifest go together: fidelity is measured on the manifest's texts")
    return storing.run_stats(
        options.store, given, samples=options.samples, temperature=options.temperature, as_json=options.json
    )


def _parser() -> tuple[Parser, Mapping[str, Parser]]:
    """The parser, and that of each action."""
    parser = Parser(prog="liquid store", description="Look after stores of teacher signal.", epilog=_EPILOG)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=Parser)
    packing = _action(
        actions,
        "pack",
        "copy a store's records into full shards; shards also in place, when SRC and DST are the same",
    )
    packing.add_argument("source", type=_folder, metavar="SRC", help="store of any layout")
    packing.add_argument("target", type=_folder, metavar="DST", help="folder for the shards; not that of a .pt store")
    verifying = _action(actions, "verify", "score a random sample again and compare it with what is stored")
    _teacher(verifying, required=True)
    verifying.add_argument("--samples", type=value_of("int", minimum=1), default=32, help="records to score again [32]")
    verifying.add_argument("--temperatures", type=_temperatures, help=f"to compare at [1,2{_MOVED}]")
    stats = _action(actions, "stats", "bytes a token by part, mass covered, tail share; with a teacher also fidelity")
    _teacher(stats, required=False)
    stats.add_argument("--samples", type=value_of("int", minimum=1), default=200, help="records to look at [200]")
    differing = _action(actions, "diff", "which records differ, are missing or were made from other tokens")
    differing.add_argument("first", type=_folder, metavar="A", help="a store")
    differing.add_argument("second", type=_folder, metavar="B", help="another")
    for one in (stats, differing):
        one.add_argument("--temperature", type=_temperature, help=f"to decode at [2{_MOVED}]")
    return parser, actions.choices


def _action(actions: argparse._SubParsersAction[Parser], name: str, words: str) -> Parser:
    action: Parser = actions.add_parser(name, help=words, description=words, allow_abbrev=False)
    action.add_argument("--json", action="store_true", help="print one JSON object")
    return action


def _teacher(parser: Parser, *, required: bool) -> None:
    parser.add_argument("store", type=_folder, metavar="STORE", help="the store")
    parser.add_argument("--teacher", dest="mc_teacher_id", required=required, help="the teacher it was captured from")
    parser.add_argument("--manifest", dest="dataset_manifest", required=required, help="manifest with its texts")
    parser.add_argument("--teacher_precision", choices=PRECISIONS, help="teacher's arithmetic [auto]")
    parser.add_argument("--data_cache", help="folder for tokenised data")
    parser.add_argument("--device", help="where the teacher runs: cpu, cuda, cuda:1, ... [auto]")
    parser.add_argument("--hf_token_file", help="file with a Hugging Face token (else HF_TOKEN)")
    parser.add_argument("--seed", type=value_of("int", minimum=0), default=1234, help="which records [1234]")


def _folder(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a folder or URL")
    return text


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number") from None
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text}, expected more than 0")
    return value


def _temperatures(text: str) -> Sequence[float]:
    return tuple(_temperature(part) for part in text.split(","))
