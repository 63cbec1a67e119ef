"""Answers kept: in the process, and on disk as a few hundred bytes of JSON each, named by question and sources.

A file that cannot be read, or does not add up, is made again. Where the folder cannot be written the answer is worked
out each time.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from liquid_llm import storage
from liquid_llm.errors import StorageError
from liquid_llm.memory.prediction import MemoryPrediction
from liquid_llm.runtime import has_amx

T = TypeVar("T")

log = logging.getLogger(__name__)

# What is asked decides together with these sources of ours; of torch and transformers the version does.
_SOURCES = (
    "memory",
    "losses",
    "training.py",
    "models",
    "teachers/online.py",
    "capture/scoring.py",
    "signal_store/codecs",
)
_SAID: dict[tuple[Path | None, str], MemoryPrediction] = {}


def remember(
    folder: Path | None, kind: str, question: Mapping[str, Any], answer: Callable[[], MemoryPrediction]
) -> MemoryPrediction:
    """``answer()``, or what it said to the same question before; ``folder`` of None keeps nothing on disk."""
    name = f"{kind}-{_key(question)}.json"
    if (folder, name) not in _SAID:
        path = None if folder is None else folder / name
        _SAID[folder, name] = _keep(path, answer, MemoryPrediction.from_dict, MemoryPrediction.as_dict)
    return _SAID[folder, name]


def remember_config(folder: Path | None, revision: str, read: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    """A model's configuration that is slow to read (a GGUF file holds it beside its tokenizer), kept by revision."""

    def check(found: Any) -> Mapping[str, Any]:
        return {**found, "model_type": found["model_type"]}

    path = None if folder is None else folder / f"config-{_key({'revision': revision})}.json"
    return _keep(path, read, check, dict)


def forget() -> None:
    """Drop what this process remembers; what is on disk stays."""
    _SAID.clear()


def _keep(
    path: Path | None, answer: Callable[[], T], parse: Callable[[Any], T], as_plain: Callable[[T], dict[str, Any]]
) -> T:
    """What ``path`` holds, or else the answer, which it then holds where it can be written."""
    if path is None:
        return answer()
    try:
        return parse(json.loads(path.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.debug("%s is made: %s", path, error)
    found = answer()
    try:
        storage.write_bytes(str(path), json.dumps(as_plain(found)).encode())
    except (StorageError, TypeError) as error:
        log.debug("%s is not kept: %s", path, error)
    return found


def _key(question: Mapping[str, Any]) -> str:
    asked = json.dumps([question, _versions()], sort_keys=True, default=str)
    return hashlib.sha256(asked.encode()).hexdigest()[:32]


@functools.cache
def _versions() -> list[str]:
    import torch
    import transformers

    machine = f"{torch.get_num_threads()} threads, {'AMX' if has_amx() else 'no AMX'}"  # a cache may be shared
    return [str(torch.__version__), transformers.__version__, machine, _sources_digest()]


def _sources_digest() -> str:
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for name in _SOURCES:
        place = root / name
        for file in [place] if place.is_file() else sorted(place.rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()
