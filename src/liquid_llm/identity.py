"""Which model something is of: the same words where models are opened and where their signal is stored."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelIdentity:
    """Which model it is: hub id or file name, commit or content fingerprint, and the tokenizer's hash."""

    id: str
    revision: str
    tokenizer_hash: str
