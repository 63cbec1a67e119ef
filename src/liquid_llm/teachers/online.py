"""A teacher that is asked while training: hidden states of the micro-batch, and its output head.

Logits are formed by the loss, chunk by chunk; here nothing of size [tokens, vocab] exists.
"""

from __future__ import annotations

import torch
from torch import Tensor

from liquid_llm.data.types import MicroBatch
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
        rows = []
        for start, stop, longest in self._parts(batch):
            part, _ = batch.rows(start, stop)
            hidden = self.hidden(part.input_ids[:, :longest])
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
