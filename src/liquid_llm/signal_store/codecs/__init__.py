"""Codecs by name; see ``base`` for the words. A new one is a file here and a line in ``registry.CODECS``."""

from __future__ import annotations

import inspect

from torch import Tensor

from liquid_llm import registry
from liquid_llm.errors import SignalError
from liquid_llm.signal_store.codecs.base import (
    Codec,
    Options,
    Payload,
    PayloadError,
    Rows,
    StoredSignal,
    check_temperature,
)
from liquid_llm.signal_store.codecs.encoded import Encoded, encode_with

__all__ = [
    "Codec",
    "Encoded",
    "Options",
    "Payload",
    "PayloadError",
    "Rows",
    "StoredSignal",
    "check_temperature",
    "codec_names",
    "encode",
    "get_codec",
    "usual_codec",
]


def codec_names() -> list[str]:
    """The codecs that there are, the usual one first."""
    return list(registry.CODECS)


def encode(logits: Tensor, codec: str | Codec = "tail", *, seed: int = 0, **options: int | float | str) -> Encoded:
    """Encode what a teacher says of some positions; ``.decode(temperature)`` of the result is a signal again.

    Args:
        logits: [positions, vocab], any floating type and device; minus infinity masks a token.
        codec: its name, or one from ``get_codec``.
        seed: of a codec that draws, at least 0 and below 2**63.
        options: of the codec that is named, such as ``k=64``; its defaults where left out.

    Raises:
        SignalError: an unknown codec, option or value, or a logit that is NaN or plus infinity.
        ValueError: logits of another shape, or options for a codec that is made already.
    """
    if logits.ndim != 2:
        raise ValueError(f"logits must be [positions, vocab], got {list(logits.shape)}")
    if isinstance(codec, str):
        return encode_with(get_codec(codec, options=options), logits, seed)
    if options:
        raise ValueError(f"options go with a codec's name, got {options} beside {codec.name!r}")
    return encode_with(codec, logits, seed)


def get_codec(name: str, version: int | None = None, options: Options | None = None) -> Codec:
    """The codec ``name``.

    Args:
        version: as stored with a record; None for the newest.
        options: the codec's own, such as ``{"k": 64}``; defaults where left out.

    Raises:
        SignalError: an unknown name, option or value, or a version that this program does not have.
    """
    if name not in registry.CODECS:
        raise SignalError("unknown codec", got=repr(name), expected=f"one of {', '.join(registry.CODECS)}")
    make = registry.load(registry.CODECS, name)
    versions = getattr(make, "versions", (make.version,))
    if version is not None and version not in versions:
        raise SignalError(
            f"codec {name!r} of another version",
            got=f"version {version}",
            expected=f"version {' or '.join(map(str, versions))}",
            remedy="install the newer liquid-llm" if version > make.version else "capture the signal again",
        )
    parameters = inspect.signature(make).parameters.values()
    given = dict(options or {})
    known = [one.name for one in parameters if one.kind is not one.KEYWORD_ONLY]
    if not given.keys() <= set(known):
        expected = f"some of {', '.join(known)}" if known else "none"
        raise SignalError(f"options that codec {name!r} does not have", got=given, expected=expected)
    codec: Codec = make(**given, **({"version": version} if version in versions[:-1] else {}))
    return codec


def usual_codec(name: str, num_positions: int) -> Codec:
    """The codec ``name`` as it suits a new store of about ``num_positions``. Raises SignalError: an unknown name."""
    codec = get_codec(name)
    return get_codec(name, options=codec.usual_options(num_positions))
