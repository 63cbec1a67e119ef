"""Logits in a codec and back, in two calls: to look at what a codec keeps, or to keep signal elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from liquid_llm.signal_store.codecs.base import Codec, Payload, StoredSignal


@dataclass(frozen=True)
class Encoded:
    """Some positions of a teacher in a codec.

    Attributes:
        codec: what encoded them.
        payload: tensors by name, on the CPU: all that would be stored.
        num_positions: rows that were encoded.
        vocab_size: entries of each.
    """

    codec: Codec
    payload: Payload
    num_positions: int
    vocab_size: int

    @property
    def nbytes(self) -> int:
        """Bytes of the payload."""
        return sum(tensor.nbytes for tensor in self.payload.values())

    def decode(self, temperature: float = 1.0) -> StoredSignal:
        """The signal of all positions, as ``losses.fused_loss`` takes it.

        Raises:
            SignalError: the codec cannot answer at this temperature.
        """
        return self.codec.decode(self.payload, 0, self.num_positions, temperature, self.vocab_size)


def encode_with(codec: Codec, logits: Tensor, seed: int) -> Encoded:
    """Encode logits [positions, vocab]; they are left as they are."""
    rows = codec.encode(logits.detach().float().clone(), seed, 0)
    return Encoded(codec, codec.pack(rows), logits.shape[0], logits.shape[1])
