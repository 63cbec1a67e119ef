"""A causal language model taken apart: its body up to the last hidden states, and its output head.

    body          everything before the output head; gives hidden states [batch, time, hidden]
    output head   the linear map to the vocabulary, with the factor and soft cap some architectures put behind it

The loss needs the two apart so that logits are never formed for a whole batch. What an architecture does between hidden
states and logits is told by its configuration; ``check_output_head`` compares the result with the model's own
logits, so that an architecture this module does not know is refused and never silently wrong. ``check_causality``
does the same for the promise that padding on the right cannot reach a real position.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from liquid_llm.device import find_not_finite
from liquid_llm.errors import ModelError
from liquid_llm.losses.signals import OutputHead
from liquid_llm.models.documents import extra_arguments, number_documents, tell_rows

# How far two computations of the same thing may be apart, relative to the largest value.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}

_COHERE = ("cohere", "cohere2", "cohere2_moe", "cohere_compass")
_GRANITE = ("granite", "granite_swa", "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared")
_BODY_AND_HEAD: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
_SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def hidden_states(model: Any, input_ids: Tensor, places: Tensor | None = None) -> Tensor:
    """The hidden states right before the output head, in the head's dtype.

    Args:
        model: any transformers causal language model.
        input_ids: [batch, time], padded on the right or not at all.
        places: [batch, time] int64, of each token in its document, where rows join several (``models.documents``); None
            where a row is one sequence.

    Returns:
        [batch, time, hidden]; ``output_head(model).logits`` of it are the model's logits.
    """
    batch, time = input_ids.shape
    hidden: Tensor
    arguments: dict[str, Tensor] = {}
    if places is not None:
        if "flash" in str(model.config._attn_implementation):  # it tells documents apart in a single row alone
            input_ids, places = input_ids.reshape(1, -1), places.reshape(1, -1)
        arguments = {"position_ids": places, **extra_arguments(model, places)}
    arguments |= {"input_ids": input_ids}
    with tell_rows(joined=places is not None):
        if not is_body_and_head(model):
            hidden = _head_input(model, arguments)
        else:
            hidden = body_of(model)(**arguments, use_cache=False, return_dict=True)[0]
    return hidden.view(batch, time, -1).to(_head_module(model).weight.dtype)


def body_of(model: Any) -> Any:
    """The module before the output head; called, it gives hidden states."""
    body = model.base_model if model.base_model is not model else model.get_decoder()
    return model.model if body is model else body  # Llama 4 alone names its body as the multimodal model around it does


def is_body_and_head(model: Any) -> bool:
    """Whether there is nothing but body and head: BERT's kind has a layer and a norm of its own between them.

    That is how a model is built and does not change: it is looked at once, as each pass asks.
    """
    if (found := _BODY_AND_HEAD.get(model)) is not None:
        return found
    parts = (body_of(model), _head_module(model))
    known = {id(parameter) for part in parts for parameter in part.parameters()}
    _BODY_AND_HEAD[model] = all(id(parameter) in known for parameter in model.parameters())
    return _BODY_AND_HEAD[model]


class _Reached(Exception):
    """A pass has come to the output head, with what it gives to it."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


def _head_input(model: Any, arguments: dict[str, Tensor]) -> Tensor:
    """What the model gives to its output head, by a pass that ends there; passes of other threads go on."""
    thread = threading.get_ident()

    def end(_module: Any, given: tuple[Tensor, ...]) -> None:
        if threading.get_ident() == thread:
            raise _Reached(given[0])

    handle = _head_module(model).register_forward_pre_hook(end)
    try:
        model(**arguments, use_cache=False, return_dict=True)
    except _Reached as reached:
        return reached.hidden
    finally:
        handle.remove()
    raise ModelError("the output head is never asked", where=architecture(model), remedy="use another model")


def blocks_of(model: Any) -> list[nn.Module]:
    """The blocks of a model's body in order: its largest list of modules.

    Raises:
        ModelError: there is none, or a weight is used in a block and elsewhere.
    """
    lists = [one for one in body_of(model).modules() if isinstance(one, nn.ModuleList)]
    sizes = [sum(parameter.numel() for parameter in one.parameters()) for one in lists]
    blocks = list(lists[sizes.index(max(sizes))]) if lists else []
    uses = Counter(id(one) for _, one in model.named_parameters(remove_duplicate=False))
    owned = [id(one) for block in blocks for one in block.parameters()]
    if not owned or any(uses[one] > 1 for one in owned):
        raise ModelError(
            "the weights of this architecture do not lie in blocks of their own",
            where=architecture(model),
            remedy="leave out --shard=full and --teacher_shard=full",
        )
    return blocks


def output_head(model: Any) -> OutputHead:
    """The model's output head; its weight is the parameter itself, so gradients reach it (and a tied embedding).

    Raises:
        ModelError: the model has no linear output head.
    """
    module = _head_module(model)
    config = _text_config(model)
    caps = [getattr(config, name, None) for name in _SOFT_CAPS]
    soft_cap = next((float(cap) for cap in caps if cap), None)
    return OutputHead(module.weight, getattr(module, "bias", None), _scale(config), soft_cap)


def _head_module(model: Any) -> Any:
    module = model.get_output_embeddings()
    weight = getattr(module, "weight", None)
    if weight is None or weight.dim() != 2:
        raise ModelError(
            "the model has no linear output head",
            where=architecture(model),
            got=type(module).__name__,
            remedy="use a causal language model",
        )
    return module


def architecture(model: Any) -> str:
    """The model's class and where it came from, for messages."""
    name = getattr(model.config, "name_or_path", "")
    return f"{type(model).__name__} ({name})" if name else type(model).__name__


def _text_config(model: Any) -> Any:
    return model.config.get_text_config(decoder=True)


def _scale(config: Any) -> float:
    """The factor on the logits. Who multiplies and who divides by a configured number differs between architectures."""
    model_type = config.model_type
    if model_type in _COHERE:
        return float(config.logit_scale)
    if model_type in _GRANITE:
        return 1.0 / float(config.logits_scaling)
    if model_type == "minicpm3":  # divides the hidden states: the same, as its head has no bias
        return 1.0 / float(config.logits_scaling)
    if model_type == "inkling_text":  # the same
        return 1.0 / float(config.logits_mup_width_multiplier)
    if model_type == "hyperclovax":
        return float(config.logits_scaling)
    if model_type == "falcon_h1":
        return float(config.lm_head_multiplier)
    return 1.0


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients, and the former mode of every module afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _random_ids(model: Any, batch: int, time: int) -> Tensor:
    """Ids that do not depend on, or disturb, the global generators."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, output_head(model).vocab_size, (batch, time), generator=generator)
    return ids.to(_head_module(model).weight.device)


def _tolerance(*tensors: Tensor) -> float:
    return max(_TOLERANCE.get(tensor.dtype, 1e-4) for tensor in tensors)


def _distance(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value of ``b``; infinite where anything is not finite."""
    a, b = a.double(), b.double()
    distance = float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
    return math.inf if math.isnan(distance) else distance


def check_output_head(model: Any) -> None:
    """Compare ``output_head(model).logits(hidden_states(model, ids))`` with the model's own logits on random ids.

    It is done twice: as the model is, and with the head's input enlarged until its logits are in the hundreds, where a
    soft cap this module does not know of would show (near zero it is the identity).

    Raises:
        ModelError: they differ, naming the architecture; such a model must not be distilled with this head.
    """
    module, ids = _head_module(model), _random_ids(model, 2, 8)
    problem = None
    with evaluating(model):
        head, hidden = output_head(model), hidden_states(model, ids)
        size = float(nn.functional.linear(hidden, head.weight, head.bias).abs().max())
        for gain in (1.0, 300.0 / max(size, 1e-6)):
            logits, calls = _logits_with_gain(model, module, ids, gain)
            expected = head.logits(hidden * gain)
            if calls != 1:
                problem = f"its head was called {calls} times in one forward pass"
            elif logits.shape != expected.shape:
                problem = f"its logits are {list(logits.shape)} and its head gives {list(expected.shape)}"
            elif (distance := _distance(expected, logits)) > _tolerance(hidden, logits):
                problem = f"its logits differ from those of its head by {distance:.2g} of the largest"
            if problem is not None:
                break
    poisoned = None if problem is None else find_not_finite(dict(model.named_parameters()))
    if poisoned is not None:
        raise ModelError(
            "the model's weights are not finite",
            where=architecture(model),
            got=f"NaN or infinity in {poisoned}",
            remedy="copy the model again, or use another one",
        )
    if problem is not None:
        raise ModelError(
            f"this architecture does something unknown between hidden states and logits: {problem}",
            where=architecture(model),
            remedy="use another model: distilling this one would be silently wrong",
        )


def _logits_with_gain(model: Any, module: Any, ids: Tensor, gain: float) -> tuple[Tensor, int]:
    """The model's logits when the input of its output head is multiplied by ``gain``; how often the head was called."""
    calls = 0

    def enlarge(_module: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal calls
        calls += 1
        return (arguments[0] * gain, *arguments[1:])

    handle = module.register_forward_pre_hook(enlarge)
    try:
        logits: Tensor = model(input_ids=ids, use_cache=False, return_dict=True).logits
    finally:
        handle.remove()
    return logits, calls


def check_causality(model: Any, num_tokens: int = 24) -> None:
    """Check that what stands to the right of a position, padding included, cannot change its hidden state.

    Batches are padded on the right with token 0 and no attention mask is passed; this is what makes that sound.

    Raises:
        ModelError: a position sees later ones, naming the architecture.
    """
    ids = _random_ids(model, 1, num_tokens)
    kept = num_tokens // 2
    padded = ids.clone()
    padded[:, kept:] = 0
    with evaluating(model):
        alone = hidden_states(model, ids[:, :kept])
        batch = hidden_states(model, torch.cat((ids, padded)))[:, :kept]
    distance = _distance(batch, alone.expand_as(batch))
    if distance > 10 * _tolerance(alone):  # sums of other lengths and batch sizes round differently
        raise ModelError(
            f"a position's hidden state depends on later tokens (by {distance:.2g} of the largest value)",
            where=architecture(model),
            expected="a causal model",
            remedy="use a decoder-only language model",
        )


def check_documents(model: Any, num_tokens: int = 12) -> None:
    """Check that documents joined in a row have the hidden states that each has alone.

    What stands in another document must not be felt at all, whatever the arithmetic; that positions start again shows
    in each document alone, which other kernels may compute.

    Raises:
        ModelError: they differ, naming the architecture: something mixes neighbours that was not told where they end.
    """
    ids = _random_ids(model, 2, num_tokens)
    cuts = ((0, 5, num_tokens - 1, num_tokens), (0, 3, 8, num_tokens))
    rows = [torch.cat([torch.arange(stop - start) for start, stop in pairwise(row)]) for row in cuts]
    places = torch.stack(rows).to(ids.device)
    others = torch.where(number_documents(places) == 1, ids, ids.flip(0))
    try:
        with evaluating(model):
            joined, beside_others = hidden_states(model, ids, places), hidden_states(model, others, places)
            alone = [
                hidden_states(model, ids[row : row + 1, start:stop])[0]
                for row, each in enumerate(cuts)
                for start, stop in pairwise(each)
            ]
    except TypeError as error:
        raise _mixes(model, f"its forward pass takes no positions ({error})") from error
    kept, tolerance = number_documents(places) == 1, _tolerance(joined)
    if (distance := _distance(beside_others[kept], joined[kept])) > tolerance / 10:
        raise _mixes(model, f"a document's hidden states depend on its neighbours, by {distance:.2g} of the largest")
    if (distance := _distance(joined.flatten(0, 1), torch.cat(alone))) > 10 * tolerance:
        raise _mixes(model, f"a document is not as it is alone, by {distance:.2g} of the largest hidden state")


def _mixes(model: Any, problem: str) -> ModelError:
    return ModelError(
        f"this architecture cannot keep the documents of a block apart: {problem}",
        where=architecture(model),
        remedy="leave --document_mask out, or use another model",
    )
