"""What ``liquid inspect`` says of a model's folder: its shape and size, its tokenizer, where it comes from.

Weights are not read: their files begin with a list of what is in them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from liquid_llm import storage
from liquid_llm.errors import LiquidError
from liquid_llm.parsing import ParseError, parse_json
from liquid_llm.storage import FileInfo

_CONFIG, _ADAPTER = "config.json", "adapter_config.json"
_WEIGHTS = (".safetensors", ".bin")
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 64 * 2**20
_SHAPE = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
_TOKENS = ("bos_token", "eos_token", "pad_token")


def is_model(names: Collection[str]) -> bool:
    """Whether a folder with files of these names is a model, or an adapter of one."""
    described = _CONFIG in names or _ADAPTER in names
    return described and any(name.endswith(_WEIGHTS) for name in names)


def describe_model(uri: str, infos: Mapping[str, FileInfo]) -> dict[str, Any]:
    """Shape, size, tokenizer and origin of a model; ``infos``: the files below its folder."""
    config = _json(infos, _CONFIG)
    tokenizer, generation = _json(infos, "tokenizer_config.json"), _json(infos, "generation_config.json")
    files = [info for name, info in infos.items() if name.endswith(_WEIGHTS) and "/" not in name]
    counted = [_parameters(info) for info in files]
    kinds = sorted({kind for _, of_file in counted for kind in of_file})
    limit, named = tokenizer.get("model_max_length"), config.get("architectures")
    return {
        "kind": "adapter" if _ADAPTER in infos and _CONFIG not in infos else "model",
        "architecture": named[0] if isinstance(named, list) and named else config.get("model_type"),
        "parameters": sum(count for count, _ in counted) or None,
        "weights": ", ".join(kinds) or None,
        "bytes": sum(info.size for info in files),
        **{name: config[name] for name in _SHAPE if name in config},
        "tokenizer": tokenizer.get("tokenizer_class"),
        **{name: tokenizer[name] for name in _TOKENS if isinstance(tokenizer.get(name), str)},
        "model_max_length": limit if isinstance(limit, int) and limit < 2**40 else None,
        "chat_template": "chat_template" in tokenizer or "chat_template.jinja" in infos,
        "generation": {key: value for key, value in generation.items() if not key.startswith(("_", "transformers"))},
        "adapter": {
            key: value for key, value in _json(infos, _ADAPTER).items() if isinstance(value, str | int | float)
        },
        "card": "README.md" in infos,
        "origin": _json(infos, "liquid_origin.json"),
    }


def _parameters(info: FileInfo) -> tuple[int, set[str]]:
    """Numbers in a file of weights, and their kinds; of a file that is no safetensors none are known."""
    if not info.name.endswith(".safetensors"):
        return 0, set()
    try:
        length = int.from_bytes(storage.read_bytes(info.uri, 0, _LENGTH_BYTES), "little")
        if length > _MAX_HEADER_BYTES:
            return 0, set()
        header = parse_json(storage.read_bytes(info.uri, _LENGTH_BYTES, _LENGTH_BYTES + length))
        tensors = [one for name, one in header.items() if name != "__metadata__"]
        return sum(math.prod(one["shape"]) for one in tensors), {str(one["dtype"]) for one in tensors}
    except (ParseError, LiquidError, TypeError, KeyError, AttributeError):
        return 0, {"damaged"}


def _json(infos: Mapping[str, FileInfo], name: str) -> dict[str, Any]:
    try:
        value = parse_json(storage.read_small(infos[name].uri)) if name in infos else {}
    except (ParseError, LiquidError):
        return {}
    return value if isinstance(value, dict) else {}
