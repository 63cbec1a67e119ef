"""Language models in GGUF files, opened as ordinary transformers models.

    GGUF          llama.cpp's one-file format: metadata, tokenizer, and weights in quantised blocks
    dequantise    turn the blocks back into plain numbers, once, while loading

The reading is transformers' own. What it returns still counts as quantised and refuses to be saved, so the weights are
moved into a plain model of the same configuration.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import re
import struct
from pathlib import Path
from typing import Any

import torch

from liquid_llm.errors import ModelError
from liquid_llm.models.sources import Source

_STRING, _LIST = 8, 9
_FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_UNREADABLE = (OSError, ValueError, KeyError, OverflowError, struct.error, RecursionError)


def gguf_tokenizer(source: Source) -> Any:
    """The tokenizer inside a GGUF file."""
    from transformers import PreTrainedTokenizerFast

    # AutoTokenizer gives the same object after reading the whole configuration first, which takes ten times as long.
    return PreTrainedTokenizerFast.from_pretrained(source.place, gguf_file=source.gguf_file)


def gguf_model(source: Source, *, dtype: torch.dtype, attention: str | None) -> tuple[Any, dict[str, Any]]:
    """A plain model with the file's weights in ``dtype``, and transformers' report on missing or unexpected weights."""
    import transformers
    from accelerate import init_empty_weights

    _require_sizes(Path(source.place) / str(source.gguf_file))
    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # without it transformers always dequantises
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with contextlib.redirect_stderr(io.StringIO()):  # its conversion bar heeds no setting; errors are raised
        loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
            source.place,
            gguf_file=source.gguf_file,
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [type(loaded).__name__]
    with init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    return model, report


def _require_sizes(path: Path) -> None:
    """Raise ModelError where a file tells of more layers than it has tensors of, or of another width, or of none.

    Where a key is lost transformers takes its own default, 32 layers 4096 wide, and fills what is missing at random
    before anybody can say so: 28 GB for a file of one. What cannot be read here is for transformers to refuse.
    """
    try:
        values, shapes = _read_header(path)
    except _UNREADABLE:  # of the hub, another version, or cut
        return
    kind = values.get("general.architecture")
    numbers = [int(found[1]) for found in map(re.compile(r"blk\.(\d{1,9})\.").match, shapes) if found]
    layers, there = values.get(f"{kind}.block_count"), max(numbers, default=-1) + 1
    if not isinstance(layers, int) or not 0 < layers <= there:
        raise ModelError("its layers are not those of its tensors", where=path, got=layers, expected=there)
    width, wide = values.get(f"{kind}.embedding_length"), shapes.get("token_embd.weight", (None,))[0]
    if width != wide:
        raise ModelError("its width is not that of its tensors", where=path, got=width, expected=wide)


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Single values by key, and shapes of tensors by name, the innermost first; lists are passed over, so that it takes
    a hundredth of what the ``gguf`` package takes. By the specification in ggml (docs/gguf.md), versions 2 and 3.

    Raises:
        _UNREADABLE: it cannot be read as one.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = 0

        def take(form: str) -> Any:
            nonlocal at
            found = struct.unpack_from(f"<{form}", data, at)
            at += struct.calcsize(f"<{form}")
            return found[0] if len(found) == 1 else found

        def text() -> str:
            nonlocal at
            length = take("Q")
            at += length
            return data[at - length : at].decode(errors="replace")

        def value(kind: int) -> Any:
            nonlocal at
            if kind == _STRING:
                return text()
            if kind != _LIST:
                return take(_FORMS[kind])
            kind, count = take("IQ")
            if kind in (_STRING, _LIST):
                for _ in range(count):
                    if kind == _LIST:
                        value(kind)
                    else:
                        at += 8 + struct.unpack_from("<Q", data, at)[0]
            else:
                at += count * struct.calcsize(f"<{_FORMS[kind]}")
            return None

        magic, version, num_tensors, num_values = take("4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"version {version}")
        values = {text(): value(take("I")) for _ in range(num_values)}
        shapes = {}
        for _ in range(num_tensors):
            name, num_dimensions = text(), take("I")
            shapes[name] = tuple(take("Q") for _ in range(min(num_dimensions, 8)))
            take("IQ")  # type and place
    return values, shapes
