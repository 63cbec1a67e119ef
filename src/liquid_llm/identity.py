"""Which model something is of: the same words where models are opened and where their signal is stored."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class ModelIdentity:
    """Which model it is: hub id or file name, commit or content fingerprint, and the tokenizer's hash.

    Attributes:
        quantisation: what was done to its weights here (``int8``); None: nothing. How a checkpoint itself is quantised
            is part of its revision, which is of its configuration too.
    """

    id: str
    revision: str
    tokenizer_hash: str
    quantisation: str | None = None

    def plain(self) -> dict[str, str]:
        """Plain values; a model that nothing was done to is written as it always was."""
        return {name: value for name, value in asdict(self).items() if value is not None}
