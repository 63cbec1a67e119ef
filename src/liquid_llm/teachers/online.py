"""A teacher that is asked while training: hidden states of the micro-batch, and its output head.

Logits are formed by the loss, chunk by chunk; here nothing of size [tokens, vocab] exists.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from liquid_llm.data.types import MicroBatch
from liquid_llm.errors import UsageError
from liquid_llm.losses.fused import fused_loss
from liquid_llm.losses.signals import DenseSignal, OutputHead, Signal
from liquid_llm.models.heads import blocks_of, body_of, hidden_states, output_head
from liquid_llm.models.loading import LoadedModel, load_teacher
from liquid_llm.models.positions import max_positions
from liquid_llm.models.quantised import explain
from liquid_llm.runtime import Choice, choose_dtype, torch_dtype
from liquid_llm.sharding import deal_out_frozen
from liquid_llm.teachers.teacher import Prepared, Teacher, TeacherSetup

log = logging.getLogger(__name__)

PASS_TOKENS = 8192  # on a GPU: longer passes are no faster, and their activations would be the largest thing there


class OnlineTeacher(Teacher):
    """A frozen causal language model.

    Args:
        loaded: the model with its tokenizer and identity; put into evaluation mode, gradients off.
        vocab_size: the shared vocabulary; the padding of the teacher's embedding beyond it is cut off.
        max_tokens: most padded tokens in one forward pass, so that activations stay bounded whatever the batch; None
            takes the batch as it comes. Rows are never split: a longer row gets a pass of its own.
        choices: its arithmetic and attention, each with its reason.

    Attributes:
        identity: what the model is.
        head: its output head over ``vocab_size`` entries.
    """

    dear = True

    def __init__(
        self,
        loaded: LoadedModel,
        vocab_size: int,
        *,
        max_tokens: int | None = None,
        choices: Mapping[str, Choice] | None = None,
    ) -> None:
        self.model: nn.Module = loaded.model.eval().requires_grad_(False)
        self.choices = choices or {}
        self._max_tokens = max_tokens
        self._vocab_size = vocab_size
        self.identity = loaded.identity
        self.head: OutputHead = output_head(self.model).cut(vocab_size)

    def deal_out(self, device: torch.device) -> None:
        """As ``Teacher`` has it; a batch is asked in one pass from now on, as every rank asks as often as every other.

        Raises:
            ModelError: its weights do not lie in blocks.
        """
        deal_out_frozen(self.model, body_of(self.model), blocks_of(self.model), device)
        self.head = output_head(self.model).cut(self._vocab_size)
        self._max_tokens = None

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def hidden(self, input_ids: Tensor, places: Tensor | None = None) -> Tensor:
        """Hidden states right before the output head, [batch, time, hidden], no gradient.

        Args:
            input_ids: [batch, time] int64, padded on the right.
            places: as for ``hidden_states``.
        """
        with torch.no_grad():
            places = None if places is None else places.to(self.device)
            return hidden_states(self.model, input_ids.to(self.device), places)

    def prepare(self, batch: MicroBatch, temperature: float) -> Prepared:
        """Nothing: a model on the device is asked when its answer is needed."""
        return Prepared()

    def describe(self) -> dict[str, Any]:
        """Which model it is."""
        told = self.identity.plain()
        return {name: told[name] for name in ("id", "revision", "quantisation") if name in told}

    def own_loss(self, batch: MicroBatch, signal: Signal) -> float:
        """Of the same hidden states that ``signal`` was made of."""
        return own_loss(batch, signal)

    def signal(self, batch: MicroBatch, prepared: Prepared | None = None) -> DenseSignal:
        """One row for each labelled position of ``batch``, in row-major order."""
        rows = []
        for start, stop, longest in self._parts(batch):
            part, _ = batch.rows(start, stop)
            places_in = None if part.places is None else part.places[:, :longest]
            hidden = self.hidden(part.input_ids[:, :longest], places_in)
            time = part.input_ids.shape[1]
            places = part.positions.to(self.device)
            if longest < time:  # the same positions in a narrower grid
                places = places.div(time, rounding_mode="floor") * longest + places.remainder(time)
            rows.append(hidden.reshape(-1, hidden.shape[-1]).index_select(0, places))
        return DenseSignal(rows[0] if len(rows) == 1 else torch.cat(rows), self.head)

    def _parts(self, batch: MicroBatch) -> list[tuple[int, int, int]]:
        """Runs of rows that fit one pass, as (first, end, longest of them)."""
        rows, time = batch.input_ids.shape
        if self._max_tokens is None or rows * time <= self._max_tokens:
            return [(0, rows, time)]
        step = max(1, self._max_tokens // time)
        return [
            (start, min(start + step, rows), int(batch.lengths[start : start + step].max()))
            for start in range(0, rows, step)
        ]


def own_loss(batch: MicroBatch, signal: Signal) -> float:
    """The summed cross-entropy on ``batch`` of the model whose hidden states and head ``signal`` has, nats."""
    assert isinstance(signal, DenseSignal)
    return float(fused_loss(signal.hidden, signal.head, batch.targets, all_labelled=True).ce)


def load_online(
    model_id: str,
    precision: str,
    device: torch.device,
    attention: Callable[[torch.device, str], Choice],
    token: str | None,
    place: torch.device | None = None,
    quantise: str | None = None,
) -> tuple[LoadedModel, dict[str, Choice]]:
    """A model in inference mode on ``device``, and the choices made for it; see ``TeacherSetup`` for the arguments.

    Args:
        place: where it is until it is moved to ``device``, if not there.

    Raises:
        ModelError: it cannot be opened.
        UsageError: it is quantised or is to be, and what that needs is not here.
    """
    dtype = choose_dtype(precision, device.type)
    place = place or device
    kernel = attention(place, dtype.value)  # it is tried where it lies
    log.info("teacher %s in %s (%s), attention %s (%s)", model_id, *vars(dtype).values(), *vars(kernel).values())
    loaded = load_teacher(
        model_id,
        dtype=torch_dtype(dtype.value),
        device=place,
        attention=kernel.value,
        token=token,
        quantise=quantise,
    )
    used = loaded.model.config._attn_implementation
    if used != kernel.value:  # transformers has no other for Gemma 2, whose scores are capped
        kernel = Choice(used, f"{loaded.model.config.model_type} has no {kernel.value}")
    choices = {"teacher_dtype": dtype, "attention": kernel}
    narrow = explain(loaded.model, quantise, dtype.value)
    if narrow is not None:
        choices["teacher_quantisation"] = narrow
        log.info("teacher %s quantised: %s (%s)", model_id, *vars(narrow).values())
    return loaded, choices


def require_context(limit: int | None, context: int, model_id: str, where: str) -> None:
    """Raise UsageError where a teacher that sees ``limit`` tokens is to see ``context``."""
    if limit is not None and context > limit:
        raise UsageError(
            "the teacher cannot see so long a context",
            where=where,
            got=context,
            expected=f"at most {limit}, the limit of {model_id}",
            remedy="use a shorter length or another teacher",
        )


def open_online(model_id: str, setup: TeacherSetup) -> OnlineTeacher:
    """The maker of ``online:MODEL_ID``.

    Raises:
        ModelError: the model cannot be opened.
        UsageError: it cannot see so long a context.
    """
    place = torch.device("cpu") if setup.dealt_out else setup.device
    asked = (setup.precision, setup.device, setup.attention, setup.token, place, setup.quantise)
    loaded, choices = load_online(model_id, *asked)
    require_context(max_positions(loaded.model), setup.context, model_id, "--block_size or --eval_ctx_lens")
    vocab_size = min(setup.vocab_size, loaded.vocab_size)
    max_tokens = None if setup.device.type == "cpu" else PASS_TOKENS
    return OnlineTeacher(loaded, vocab_size, max_tokens=max_tokens, choices=choices)
