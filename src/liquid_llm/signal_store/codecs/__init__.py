"""Codecs by name; see ``base`` for the words."""

from __future__ import annotations

import inspect
from collections.abc import Callable

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
from liquid_llm.signal_store.codecs.full import FullCodec
from liquid_llm.signal_store.codecs.sampled import SampledCodec
from liquid_llm.signal_store.codecs.tail import TailCodec
from liquid_llm.signal_store.codecs.topk import TopKCodec

__all__ = [
    "CODECS",
    "Codec",
    "FullCodec",
    "Options",
    "Payload",
    "PayloadError",
    "Rows",
    "SampledCodec",
    "StoredSignal",
    "TailCodec",
    "TopKCodec",
    "check_temperature",
    "get_codec",
]

CODECS: dict[str, tuple[int, Callable[..., Codec]]] = {
    FullCodec.name: (FullCodec.version, FullCodec),
    TailCodec.name: (TailCodec.version, TailCodec),
    TopKCodec.name: (TopKCodec.version, TopKCodec),
    SampledCodec.name: (SampledCodec.version, SampledCodec),
}


def get_codec(name: str, version: int | None = None, options: Options | None = None) -> Codec:
    """The codec ``name``.

    Args:
        version: as stored with a record; None for the newest.
        options: the codec's own, such as ``{"k": 64}``; defaults where left out.

    Raises:
        SignalError: an unknown name, option or value, or a version that this program does not have.
    """
    if name not in CODECS:
        raise SignalError("unknown codec", got=repr(name), expected=f"one of {', '.join(CODECS)}")
    newest, make = CODECS[name]
    if version is not None and version != newest:
        raise SignalError(
            f"codec {name!r} of another version",
            got=f"version {version}",
            expected=f"version {newest}",
            remedy="install the newer liquid-llm" if version > newest else "capture the signal again",
        )
    given, known = dict(options or {}), inspect.signature(make).parameters
    if not given.keys() <= known.keys():
        expected = f"some of {', '.join(known)}" if known else "none"
        raise SignalError(f"options that codec {name!r} does not have", got=given, expected=expected)
    return make(**given)
