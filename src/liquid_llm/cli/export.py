"""``liquid export``: words in, exit code out."""

from __future__ import annotations

from liquid_llm.cli.parse import Positional, parse
from liquid_llm.options import OUTPUT, Option

_DESCRIPTION = (
    "Write the student of a run as a Hugging Face folder: of its best checkpoint, of any snapshot, of a run that was "
    "interrupted. Folders may be local or URLs."
)
_POSITIONALS = (
    Positional("source", "RUN|CHECKPOINT", "run directory, or a .pt file in one"),
    Positional("folder", "FOLDER", "where to; not there yet, or empty"),
)
_NEWEST = "best, last, final, step-N or time-... [best where there is one, else the newest]"
_TOKENIZER = "a model with the run's tokenizer, where the run has not kept it"
_OPTIONS = (
    Option("which", "str", OUTPUT, "which", None, _NEWEST),
    Option("dtype", "str", OUTPUT, "dtype", "float32", "of the weights", choices=("float32", "bfloat16")),
    Option("tokenizer", "str", OUTPUT, "tokenizer", None, _TOKENIZER),
    Option("force", "bool", OUTPUT, "force", False, "replace the model that FOLDER holds"),
)


def export(words: list[str]) -> int:
    """Parse and run one ``liquid export``; returns the exit code.

    Raises:
        LiquidError: any problem a user can cause.
    """
    given = parse(_OPTIONS, words, "liquid export", _DESCRIPTION, positionals=_POSITIONALS)
    values = {option.name: given.get(option.name, option.default) for option in _OPTIONS}
    from liquid_llm.jobs.export import run_export

    return run_export(str(given["source"]), str(given["folder"]), **values)  # type: ignore[arg-type]
