"""Language models in GGUF files, opened as ordinary transformers models.

    GGUF          llama.cpp's one-file format: metadata, tokenizer, and weights in quantised blocks
    dequantise    turn the blocks back into plain numbers, once, while loading

The reading is transformers' own. What it returns still counts as quantised and refuses to be saved, so the weights are
moved into a plain model of the same configuration.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch

from liquid_llm.models.sources import Source


def gguf_tokenizer(source: Source) -> Any:
    """The tokenizer inside a GGUF file."""
    from transformers import PreTrainedTokenizerFast

    # AutoTokenizer gives the same object after reading the whole configuration first, which takes ten times as long.
    return PreTrainedTokenizerFast.from_pretrained(source.place, gguf_file=source.gguf_file)


def gguf_model(source: Source, *, dtype: torch.dtype, attention: str | None) -> tuple[Any, dict[str, Any]]:
    """A plain model with the file's weights in ``dtype``, and transformers' report on missing or unexpected weights."""
    import transformers
    from accelerate import init_empty_weights

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
