"""A folder of weights, looked at before any is read: which files there are, and what they call their numbers.

What transformers says of a folder that is not whole is about its own files and functions, and some it opens that are no
weights: whole numbers of a quantised model, taken as they stand, are a model of zeros.

    adapter    what PEFT trains beside a model, a folder of ``adapter_config.json`` and its weights; no model by itself
    wrapper    what put a prefix before all names of weights: DistributedDataParallel, torch.compile, FSDP
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from liquid_llm import storage
from liquid_llm.errors import ModelError
from liquid_llm.parsing import parse_json
from liquid_llm.weight_files import find_weight_files

WRAPPERS = r"^(?:(?:module|_orig_mod|_fsdp_wrapped_module)\.)+"

_INTEGERS = re.compile(r"U?I\d+|u?int\d+")
_FLOAT8 = re.compile(r"F8_\w+|float8_\w+")


def check_folder(folder: Path, where: str) -> bool:
    """Refuse a folder whose weights are not all there, or are no numbers; one of a hub's cache is left to transformers.

    Returns:
        Whether a wrapper's prefix stands before all names of its weights.

    Raises:
        ModelError: an adapter alone, no weights, a shard or its index that is missing or damaged, or quantised weights
            of which ``config.json`` does not say how they were made.
    """
    names = {one.name for one in folder.iterdir()}
    files = find_weight_files(folder, names, where, ModelError)
    if files is None:
        _refuse_without_weights(names, where)
    kinds: dict[str, str] = {}
    for name in files:
        if name.endswith(".safetensors"):
            kinds |= _read_header(folder / name, where)
    try:
        config = parse_json(storage.read_small(str(folder / "config.json")))
    except ValueError:
        config = None  # it is opened, and refused, by itself
    if isinstance(config, dict) and not config.get("quantization_config"):
        refuse_quantised(kinds, where)
    return bool(kinds) and all(re.match(WRAPPERS, name) for name in kinds)


def _refuse_without_weights(names: set[str], where: str) -> NoReturn:
    if "adapter_config.json" in names:
        raise ModelError(
            "this folder holds an adapter (PEFT) and no model",
            where=where,
            got=", ".join(sorted(name for name in names if name.startswith("adapter_"))),
            remedy="merge it into its base model (merge_and_unload) and save that with save_pretrained",
        )
    raise ModelError(
        "there are no weights in this folder",
        where=where,
        got=", ".join(sorted(names)[:6]) or "no files",
        expected="model.safetensors or pytorch_model.bin, whole or in shards",
        remedy="copy the folder again",
    )


def _read_header(path: Path, where: str) -> dict[str, str]:
    """Of each tensor in a file, its kind of number."""
    from safetensors import SafetensorError, safe_open

    try:
        with storage.translate_errors(path), safe_open(path, "pt") as opened:
            return {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise ModelError(
            "this file is truncated, damaged or not safetensors",
            where=f"{where}/{path.name}",
            got=f"{path.stat().st_size} bytes",
            remedy="copy it again",
        ) from error


def refuse_quantised(kinds: Mapping[str, str], where: str) -> None:
    """Raise ModelError for weights that are whole numbers, or of 8 bits with a scale that nothing would apply.

    Args:
        kinds: name -> kind of number, as safetensors or torch call it.
    """
    for name, kind in kinds.items():
        stem, _, last = name.rpartition(".")
        if last != "weight":
            continue  # masks and positions that older versions saved are whole numbers
        scaled = any(other != name and other.startswith(f"{stem}.") and "scale" in other for other in kinds)
        if _INTEGERS.fullmatch(kind) or (_FLOAT8.fullmatch(kind) and scaled):
            raise ModelError(
                "the weights are quantised, and config.json does not say how",
                where=f"{where}, {name}",
                got=kind,
                expected="floating point numbers, or a quantization_config that transformers knows",
                remedy="use the model as it was before, or a .gguf file of it",
            )
