"""Distil small language models from larger ones: online and stored teachers in one run.

What programs may count on is ``__all__``; ``docs/api.md`` shows each at work. Names are looked up when they are first
used, so that ``import liquid_llm`` brings in neither torch nor anything else.

    distill        one training run from a mapping or a YAML file of options
    losses         the distillation loss, for a training loop of one's own
    open_capture   the data files of a capture, one by one, for a scheduler of one's own
    open_store     the records of a signal store: tensors, arrays, pandas
    codecs         how logits become few bytes and come back
    errors         what goes wrong, by kind; ``LiquidError`` is all of it
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from liquid_llm import errors as errors
    from liquid_llm import losses as losses
    from liquid_llm.api import Capture as Capture
    from liquid_llm.api import Run as Run
    from liquid_llm.api import distill as distill
    from liquid_llm.api import open_capture as open_capture
    from liquid_llm.errors import LiquidError as LiquidError
    from liquid_llm.signal_store import codecs as codecs
    from liquid_llm.signal_store.reading import Store as Store
    from liquid_llm.signal_store.reading import StoredRecord as StoredRecord
    from liquid_llm.signal_store.reading import open_store as open_store

    __version__: str

__all__ = [
    "Capture",
    "LiquidError",
    "Run",
    "Store",
    "StoredRecord",
    "__version__",
    "codecs",
    "distill",
    "errors",
    "losses",
    "open_capture",
    "open_store",
]

_HOMES = {  # name -> the module it lies in; of a module itself, "" after the colon
    "Capture": "liquid_llm.api:Capture",
    "LiquidError": "liquid_llm.errors:LiquidError",
    "Run": "liquid_llm.api:Run",
    "Store": "liquid_llm.signal_store.reading:Store",
    "StoredRecord": "liquid_llm.signal_store.reading:StoredRecord",
    "codecs": "liquid_llm.signal_store.codecs:",
    "distill": "liquid_llm.api:distill",
    "errors": "liquid_llm.errors:",
    "losses": "liquid_llm.losses:",
    "open_capture": "liquid_llm.api:open_capture",
    "open_store": "liquid_llm.signal_store.reading:open_store",
}


def __getattr__(name: str) -> object:
    """A public name, when it is first used (PEP 562)."""
    if name == "__version__":
        from importlib.metadata import version

        return version("liquid-llm")
    if name not in _HOMES:
        raise AttributeError(f"module 'liquid_llm' has no attribute {name!r}")
    from importlib import import_module

    module, _, inside = _HOMES[name].partition(":")
    found: object = import_module(module)
    value = getattr(found, inside) if inside else found
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
