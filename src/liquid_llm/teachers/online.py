"""A teacher that is asked while training: hidden states of the micro-batch, and its output head.

Logits are formed by the loss, chunk by chunk; here nothing of size [tokens, vocab] exists.
"""

from __future__ import annotations

import torch
from torch import Tensor

from liquid_llm.data.types import IGNORE_INDEX, MicroBatch
from liquid_llm.losses.signals import DenseSignal, OutputHead
from liquid_llm.models.heads import hidden_states, output_head
from liquid_llm.models.loading import LoadedModel


class OnlineTeacher:
    """A frozen causal language model.

    Args:
        loaded: the model with its tokenizer and identity; put into evaluation mode, gradients off.
        vocab_size: the shared vocabulary; the padding of the teacher's embedding beyond it is cut off.
        max_tokens: most padded tokens in one forward pass, so that activations stay bounded whatever the batch; None
            takes the batch as it comes. Rows are never split: a longer row gets a pass of its own.

    Attributes:
        identity: what the model is.
        head: its output head over ``vocab_size`` entries.
    """

    def __init__(self, loaded: LoadedModel, vocab_size: int, *, max_tokens: int | None = None) -> None:
        self._model = loaded.model.eval().requires_grad_(False)
        self._max_tokens = max_tokens
        self.identity = loaded.identity
        self.head: OutputHead = output_head(self._model).cut(vocab_size)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def hidden(self, input_ids: Tensor) -> Tensor:
        """Hidden states right before the output head, [batch, time, hidden], no gradient.

        Args:
            input_ids: [batch, time] int64, padded on the right.
        """
        with torch.no_grad():
            return hidden_states(self._model, input_ids.to(self.device))

    def signal(self, batch: MicroBatch) -> DenseSignal:
        """One row for each labelled position of ``batch``, in row-major order."""
        labelled = batch.labels != IGNORE_INDEX
        rows = [
            self.hidden(batch.input_ids[part, :longest])[labelled[part, :longest].to(self.device)]
            for part, longest in self._parts(batch)
        ]
        return DenseSignal(rows[0] if len(rows) == 1 else torch.cat(rows), self.head)

    def _parts(self, batch: MicroBatch) -> list[tuple[slice, int]]:
        """Consecutive rows that fit one pass, and the longest of each."""
        rows, time = batch.input_ids.shape
        if self._max_tokens is None or rows * time <= self._max_tokens:
            return [(slice(0, rows), time)]
        step = max(1, self._max_tokens // time)
        return [
            (slice(start, start + step), int(batch.lengths[start : start + step].max()))
            for start in range(0, rows, step)
        ]
