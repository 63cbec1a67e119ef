"""Opening teachers and students, whatever form they come in.

    model id    a Hugging Face id, a folder, a ``.gguf`` file or ``package:NAME`` (see ``sources``)
    identity    what a stored teacher signal is bound to: id, revision and tokenizer hash

Every model that is opened here has passed two checks: all its weights were there, and its output head is understood
(``heads.check_output_head``). No code from a model's repository is ever run.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from liquid_llm import storage
from liquid_llm.device import device_error
from liquid_llm.errors import LiquidError, ModelError
from liquid_llm.identity import ModelIdentity
from liquid_llm.models.folder import WRAPPERS, check_folder, refuse_quantised
from liquid_llm.models.gguf import gguf_model, gguf_tokenizer
from liquid_llm.models.heads import check_causality, check_output_head
from liquid_llm.models.quantised import (
    check_own,
    keep_own_plainly,
    keep_plainly,
    load_options,
    quantise_plain,
    require_torchao,
)
from liquid_llm.models.sources import Source, holds_origin, read_origin, resolve, write_origin
from liquid_llm.models.tokenizers import tokenizer_hash

logger = logging.getLogger(__name__)

CANNOT_RUN = "transformers cannot run this model"
_MOST_LAYERS = 10_000
HEAD_NAMES = ("lm_head", "embed_out", "output")
HEAD_REMEDY = (
    "an output head is not made up: save the model with it, or with tie_word_embeddings: true in config.json where its "
    "head is its embedding"
)


@dataclass(frozen=True)
class LoadedModel:
    """An opened model in evaluation mode, its tokenizer and its identity."""

    model: Any
    tokenizer: Any
    identity: ModelIdentity

    @property
    def vocab_size(self) -> int:
        """Rows of its output head: those of the tokenizer and what pads them; a nested configuration has the number."""
        return int(self.model.get_output_embeddings().weight.shape[0])


def load_tokenizer(model_id: str, *, token: str | None = None) -> Any:
    """The tokenizer of ``model_id``, which may be a folder with a tokenizer alone, as a run keeps it.

    Raises:
        ModelError: not found, not reachable, or no usable tokenizer in it.
    """
    folder = Path(model_id).expanduser()
    if (folder / "tokenizer_config.json").is_file() and not (folder / "config.json").is_file():
        return _open_tokenizer(Source(folder.name, "", str(folder.resolve())), model_id, token)
    return _open_tokenizer(resolve(model_id, token=token), model_id, token)


def identify(
    model_id: str, hash_of_tokenizer: str, *, token: str | None = None, quantise: str | None = None
) -> ModelIdentity:
    """Which model ``model_id`` is, before its weights are loaded; the hash is that of its own tokenizer.

    Raises:
        ModelError: not found or not reachable.
    """
    source = resolve(model_id, token=token)
    return ModelIdentity(source.id, source.revision, hash_of_tokenizer, quantise)


def load_teacher(
    model_id: str,
    *,
    dtype: torch.dtype,
    device: str | torch.device,
    attention: str = "sdpa",
    token: str | None = None,
    quantise: str | None = None,
) -> LoadedModel:
    """Open a model with its tokenizer, in evaluation mode and with every parameter frozen.

    Args:
        quantise: ``int8`` keeps its linear maps in 8 bits (``models.quantised``).

    Raises:
        ModelError: not found, not reachable, damaged, incomplete, or of an architecture that cannot be distilled.
    """
    source = resolve(model_id, token=token)
    tokenizer = _open_tokenizer(source, model_id, token)
    model = open_weights(
        source, model_id, dtype=dtype, device=device, attention=attention, token=token, quantise=quantise
    )
    problem = CANNOT_RUN if quantise is None else f"it cannot be computed with its linear maps in {quantise}"
    with as_model_error(model_id, problem), quiet_transformers():
        keep_own_plainly(model)
        check_causality(model)
        check_output_head(model)
    vocab_size, num_tokens = model.get_output_embeddings().weight.shape[0], len(tokenizer)
    if num_tokens > vocab_size:
        raise ModelError(
            "the tokenizer has more tokens than the model",
            where=model_id,
            got=num_tokens,
            expected=f"at most {vocab_size}",
        )
    model.requires_grad_(False)
    return LoadedModel(model, tokenizer, ModelIdentity(source.id, source.revision, tokenizer_hash(tokenizer), quantise))


def unpack(model_id: str, folder: str | Path, dtype: torch.dtype) -> Path:
    """Convert a model once into a Hugging Face folder with weights in ``dtype``; a second call finds it done.

    The folder keeps the identity of what it was made from, so a signal captured from one serves the other. A folder
    left from another model, revision or dtype, or damaged since, is made anew; it appears complete or not at all.

    Raises:
        ModelError: as ``load_teacher``; or ``folder`` holds something that this function did not make.
    """
    folder = Path(folder)
    source = resolve(model_id)
    name = str(dtype).removeprefix("torch.")
    origin = read_origin(folder)
    if (
        origin is not None
        and (origin["id"], origin["revision"], origin["dtype"]) == (source.id, source.revision, name)
        and holds_origin(folder, origin)
    ):
        return folder
    if origin is None and folder.exists() and any(folder.iterdir()):
        raise ModelError(
            "the folder for the unpacked model holds something else",
            where=folder,
            remedy="name a new or empty folder",
        )
    tokenizer = _open_tokenizer(source, model_id, None)
    model = open_weights(source, model_id, dtype=dtype, device="cpu", attention="sdpa")

    with quiet_transformers(), storage.publish_folder(folder) as fresh:
        model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        write_origin(fresh, source, name)
    return folder


def open_weights(
    source: Source,
    model_id: str,
    *,
    dtype: torch.dtype,
    device: str | torch.device,
    attention: str,
    token: str | None = None,
    config: Any = None,
    quantise: str | None = None,
) -> Any:
    """The causal language model at ``source``, in evaluation mode; ``config`` replaces the one beside the weights.

    Raises:
        ModelError: it cannot be opened, or some of its weights are missing.
        UsageError: it is quantised, and what that needs is not here; or ``quantise`` cannot be had.
    """
    from transformers import AutoModelForCausalLM

    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # else a thread asks the hub to convert what is a .bin
    if quantise is not None:
        require_torchao(f"--teacher_quantize={quantise}")
    if source.gguf_file is None and config is None:
        config = open_config(source, model_id, token)
    check_own(config, model_id, device, quantise)
    _refuse_bombs(source, model_id)
    names = {}
    if source.gguf_file is None and source.commit is None and check_folder(Path(source.place), model_id):
        names = {"key_mapping": {WRAPPERS: ""}}
    with as_model_error(model_id, "the model cannot be opened"), quiet_transformers():
        if source.gguf_file is not None:
            model, report = gguf_model(source, dtype=dtype, attention=choose_attention(attention))
            if quantise is not None:
                quantise_plain(model)
                keep_plainly(model)
            model.to(device)
        else:
            model, report = AutoModelForCausalLM.from_pretrained(
                source.place,
                config=config,
                dtype=dtype,
                device_map={"": device},
                attn_implementation=choose_attention(attention),
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # told below, in words
                **names,
                **load_options(quantise),
                **source.load_arguments(token),
                # Where peft is installed an adapter is looked for, and not by the arguments above.
                adapter_kwargs={"local_files_only": source.offline},
            )
            if quantise is not None:
                keep_plainly(model)
    _check_loaded(model, report, model_id)
    return model.eval()


def _refuse_bombs(source: Source, model_id: str) -> None:
    """Raise ModelError where a ``.bin`` of a folder unpacks to far more than weights do."""
    for path in sorted(Path(source.place).glob("*.bin")) if Path(source.place).is_dir() else ():
        if storage.unpacks_far(path):
            raise ModelError(
                "this file unpacks to far more than it should; it was not opened", where=model_id, got=path.name
            )


def fill_model(config: Any, weights: Mapping[str, torch.Tensor], where: str) -> Any:
    """The causal language model of ``config`` with ``weights`` in float32, under whatever names its kind is saved with.

    What ``open_weights`` does to the files of a folder, for weights that were read already: both end with the same.

    Raises:
        ModelError: no such model can be built, or some of its weights are missing or of another shape.
    """
    from transformers import AutoModelForCausalLM

    if not getattr(config, "quantization_config", None):
        refuse_quantised({name: str(one.dtype).removeprefix("torch.") for name, one in weights.items()}, where)
    with as_model_error(where, "the weights cannot be put into the model"), quiet_transformers():
        with torch.device("meta"):
            kind: Any = type(AutoModelForCausalLM.from_config(config))
        model, report = kind.from_pretrained(
            None,
            config=config,
            state_dict=dict(weights),
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, in words
        )
    _check_loaded(model, report, where)
    return model.eval()


def _check_loaded(model: Any, report: Mapping[str, Any], where: str) -> None:
    """Refuse a model whose weights were not all there; say what else its files hold."""
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would leave them at random values
        head = all(name.rsplit(".", 1)[0] in HEAD_NAMES for name in missing)
        raise ModelError(
            f"{len(missing)} of the model's weights are missing",
            where=where,
            got=f"no {', '.join(missing[:3])}",
            remedy=HEAD_REMEDY if head else None,
        )
    if report["mismatched_keys"]:
        name, got, expected = sorted(report["mismatched_keys"])[0]
        raise ModelError(
            "a weight has another shape than config.json says",
            where=f"{where}, {name}",
            got=tuple(got),
            expected=tuple(expected),
        )
    if report["unexpected_keys"]:
        names = sorted(report["unexpected_keys"])
        logger.warning("%s: %d weights have no place in the model, such as %s", where, len(names), names[0])
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if getattr(model.config, "tie_word_embeddings", False) and head is not None and head.weight is not embedding.weight:
        # Two tensors that differ are kept, and what is saved says that they are two.
        logger.warning("%s: its head is not its embedding, though config.json says so: both are kept", where)
        for config in {id(one): one for one in (model.config, model.config.get_text_config(decoder=True))}.values():
            config.tie_word_embeddings = False


def choose_attention(asked: str) -> str | None:
    """``sdpa`` as transformers chooses it by itself: where a model has none (Gemma 2), it takes eager attention."""
    return None if asked == "sdpa" else asked


def open_config(source: Source, model_id: str, token: str | None = None) -> Any:
    """The configuration at ``source``. Raises ``ModelError`` if it cannot be read."""
    from transformers import AutoConfig

    with as_model_error(model_id, "the configuration cannot be read"), quiet_transformers():
        gguf = {} if source.gguf_file is None else {"gguf_file": source.gguf_file}
        config = AutoConfig.from_pretrained(source.place, **gguf, **source.load_arguments(token))
        refuse_kernels(config, model_id)
        require_layers(config, model_id)
        return config


def refuse_kernels(config: Any, where: object) -> None:
    """Refuse a configuration that names a repository of a hub for its attention.

    Where the package ``kernels`` is installed, transformers runs what lies there, whatever ``trust_remote_code`` says.

    Raises:
        ModelError: it does, or one nested in it.
    """
    nested = [getattr(config, name, None) for name in getattr(config, "sub_configs", ())]
    for one in (config, *nested):
        asked = getattr(one, "_attn_implementation", None)
        if "/" in str(asked):
            raise ModelError(
                "the configuration names code of a hub for its attention, and no code of a model's is ever run",
                where=where,
                got=f"_attn_implementation {asked}",
                remedy="take _attn_implementation out of config.json",
            )


def require_layers(config: Any, where: str) -> None:
    """Raise ModelError where a configuration has a number of layers that would be built for hours, or none at all."""
    layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    if isinstance(layers, int) and not 0 <= layers <= _MOST_LAYERS:
        raise ModelError(
            "no model has so many layers", where=where, got=f"{layers:,}", expected=f"0 to {_MOST_LAYERS:,}"
        )


def _open_tokenizer(source: Source, model_id: str, token: str | None) -> Any:
    from transformers import AutoTokenizer

    with as_model_error(model_id, "no usable tokenizer"), quiet_transformers():
        if source.gguf_file is not None:
            return gguf_tokenizer(source)
        tokenizer = AutoTokenizer.from_pretrained(source.place, **source.load_arguments(token))
        if not isinstance(tokenizer.model_max_length, int | float):  # each text is compared with it
            raise ValueError(f"model_max_length is {tokenizer.model_max_length!r:.80}")
        return tokenizer


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' progress bars and warnings; its settings return afterwards. Download bars stay."""
    import huggingface_hub
    from transformers.utils import logging as transformers_logging

    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    hub: Any = huggingface_hub.utils
    hub_bars_off = hub.are_progress_bars_disabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if not hub_bars_off:
        hub.enable_progress_bars()  # disabled together with the former
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
        if hub_bars_off:
            hub.disable_progress_bars()


@contextmanager
def as_model_error(model_id: str, problem: str) -> Iterator[None]:
    """Turn what libraries raise for a damaged, foreign or unsupported model into a ``ModelError``."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except LiquidError:
        raise
    except Exception as error:
        if not _about_the_model(error):
            raise
        if isinstance(error, pickle.UnpicklingError):  # its own words say how to run what is in it all the same
            raise ModelError(
                "the weights hold more than tensors, or are damaged; they were not opened",
                where=model_id,
                remedy="get the model as safetensors, or save it again from where it is trusted",
            ) from error
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # A configuration that contradicts itself says why in its last line.
        strict = isinstance(error, StrictDataclassError)
        told = (lines[-1:] if strict else lines[:1]) or ["no message"]
        message = told[0].removeprefix("ValueError: ") if strict else f"{type(error).__name__}: {told[0]}"
        raise ModelError(problem, where=model_id, got=message[:300].rstrip(".")) from error


def _about_the_model(error: Exception) -> bool:
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    if isinstance(error, MemoryError) or device_error(error) is not None:
        return False
    kinds = (*storage.TORCH_DAMAGE, ArithmeticError, ImportError)
    # tokenizers raises plain Exception for a file it cannot parse.
    return isinstance(error, (*kinds, SafetensorError, StrictDataclassError)) or type(error) is Exception
