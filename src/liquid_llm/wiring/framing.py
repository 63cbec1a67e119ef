"""What stands around the texts of a job, decided once: by the option, else by its checkpoint, its stores, its teachers.

    recorded    what a checkpoint or a store says of its own texts; what goes on or is read keeps it
    expected    what a teacher wants before a text: what its tokenizer puts there, else the end of text, which parts
                documents in pre-training

``docs/framing.md`` and decision 13 give the reasons.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from liquid_llm import storage
from liquid_llm.checkpoint.metadata import CheckpointMetadata
from liquid_llm.config import Sources
from liquid_llm.errors import SignalError, UsageError
from liquid_llm.framing import Framing, Framings
from liquid_llm.models.tokenizers import begin_token_id, first_end_of_text_id, shared_end_of_text_id
from liquid_llm.signal_store.description import STORE_FILE, read_store_file
from liquid_llm.signal_store.records import SignalIdentity
from liquid_llm.wiring.start import Start

log = logging.getLogger(__name__)

AUTO, ALWAYS, NEVER = "auto", "always", "never"
_ANEW = "capture its signal again into another folder"


@dataclass(frozen=True)
class Speaker:
    """A tokenizer, by what a message calls it: ``online teacher org/model``."""

    name: str
    tokenizer: Any


def stored_framing(identity: SignalIdentity, tokenizer: Any) -> Framing:
    """How the texts of a store are framed; ``tokenizer`` says what ended them where the store is from before it did."""
    return identity.framing or _first_framing(tokenizer)


def framings_of(metadata: CheckpointMetadata, tokenizer: Any, types: Iterable[str] = ()) -> Framings:
    """How a checkpoint's texts are framed; one from before it said so put nothing before those of ``types`` either."""
    if "framing" in metadata.run:
        return Framings.from_plain(metadata.run["framing"])
    first = _first_framing(tokenizer)
    return Framings(first, dict.fromkeys(types, first))


def _first_framing(tokenizer: Any) -> Framing:
    """That of a release that put nothing before a text."""
    return Framing(None, first_end_of_text_id(tokenizer))


def framing_to_record(uri: str, framing: Framing) -> Framing | None:
    """What a store says of its texts: one from before it said anything goes on without a word."""
    if storage.exists(storage.join(uri, STORE_FILE)) and read_store_file(uri).identity.framing is None:
        return None
    return framing


def recorded_framing(start: Start, sources: Sources, tokenizer: Any) -> Framings | None:
    """The framing that a run goes on with; None where its step does not go on."""
    metadata = start.origin.metadata
    if not start.goes_on or metadata is None:
        return None
    return framings_of(metadata, tokenizer, sources.named)


def choose_framings(
    mode: str, sources: Sources, speakers: Mapping[str, Speaker], own: Speaker, recorded: Framings | None = None
) -> Framings:
    """The framing of each type of a job, with its reason in the log.

    Args:
        mode: ``--begin_token``.
        sources: how each type is taught; a store that is there is followed, or refused where ``mode`` forbids it.
        speakers: the tokenizer of each online teacher, by model.
        own: the tokenizer of whatever else is trained on.
        recorded: what a checkpoint says, where a run goes on from it.

    Raises:
        ModelError: tokenizers that agree on no end of a text, or put several tokens before it.
        SignalError: stores whose texts end differently, or are framed otherwise than ``mode`` or ``recorded`` asks.
        UsageError: ``mode`` differs from what a run goes on with.
    """
    stores = _read_stores(sources, own)
    if recorded is None:
        end_id = _choose_end(stores, {one.name: one.tokenizer for one in (own, *speakers.values())}, own.tokenizer)
        usual, usual_reason = _expected(mode, own, end_id)
    else:
        end_id, usual, usual_reason = recorded.usual.end_id, recorded.usual, "as the checkpoint has it"
        _require_mode(mode, recorded, own)
    framings: dict[str, Framing] = {}
    reasons: dict[tuple[Framing, str], list[str]] = {}
    for type, source in sources.named.items():
        store = None if source.store is None else stores.get(source.store)
        if store is not None:
            framing, reason = store, f"as the texts of {source.store} were captured"
            wanted = _wanted(mode, own, end_id) if recorded is None else recorded.by_type.get(type)
            if wanted is not None and wanted != store:
                _refuse_store(source.store, store, wanted, own, mode)
        elif recorded is not None:
            framing, reason = recorded(type), usual_reason
        else:
            framing, reason = _expected(mode, speakers.get(source.online or "", own), end_id)
        framings[type] = framing
        reasons.setdefault((framing, reason), []).append(type)
    if not framings:
        reasons[usual, usual_reason] = ["every type"]
    for (framing, reason), types in reasons.items():
        log.info("texts of %s: %s (%s)", ", ".join(types), describe(framing, own.tokenizer), reason)
    return Framings(usual, framings)


def describe(framing: Framing, tokenizer: Any) -> str:
    """A framing in words: ``'<s>' (1) before each, '</s>' (2) behind``."""
    end = _name(framing.end_id, tokenizer)
    begin = "nothing" if framing.begin_id is None else _name(framing.begin_id, tokenizer)
    return f"{begin} before each, {end} behind"


def _name(token_id: int, tokenizer: Any) -> str:
    return f"{tokenizer.convert_ids_to_tokens(token_id)!r} ({token_id})"


def _read_stores(sources: Sources, own: Speaker) -> dict[str, Framing]:
    """The framing of each store that is there; one that is missing is spoken of where it is opened."""
    there = [uri for uri in sources.stores if storage.exists(storage.join(uri, STORE_FILE))]
    return {uri: stored_framing(read_store_file(uri).identity, own.tokenizer) for uri in there}


def _choose_end(stores: Mapping[str, Framing], tokenizers: Mapping[str, Any], own: Any) -> int:
    """The one end token of all texts: that of the stores, else the one that all tokenizers know as the end of text."""
    ends = {framing.end_id: uri for uri, framing in stores.items()}
    if len(ends) > 1:
        raise SignalError(
            "the stores of one run end their texts with different tokens",
            where=", ".join(ends.values()),
            got=", ".join(f"{_name(end, own)} in {uri}" for end, uri in ends.items()),
            expected="one end token, which the student learns to stop with",
            remedy="capture one of them again into another folder, or train on one of them",
        )
    if not ends:
        return shared_end_of_text_id(tokenizers)
    (end_id,) = ends
    others = {name: first_end_of_text_id(one) for name, one in tokenizers.items() if one.eos_token_id is not None}
    differing = [f"{name} {_name(end, own)}" for name, end in others.items() if end != end_id]
    if differing:
        log.info("texts end with %s, as in the store; %s", _name(end_id, own), ", ".join(differing))
    return end_id


def _expected(mode: str, speaker: Speaker, end_id: int) -> tuple[Framing, str]:
    """What a teacher expects around a text, and why."""
    if mode == NEVER:
        return Framing(None, end_id), "--begin_token=never"
    begin_id = begin_token_id(speaker.tokenizer)
    if begin_id is not None:
        return Framing(begin_id, end_id), f"the tokenizer of {speaker.name} puts it there"
    return Framing(end_id, end_id), f"the tokenizer of {speaker.name} puts nothing there: what parts documents does"


def _wanted(mode: str, own: Speaker, end_id: int) -> Framing | None:
    """What ``mode`` asks of a store; None takes it as it is."""
    return None if mode == AUTO else _expected(mode, own, end_id)[0]


def _require_mode(mode: str, recorded: Framings, own: Speaker) -> None:
    begins = {one.begin_id is not None for one in (recorded.usual, *recorded.by_type.values())}
    if (mode == NEVER and True in begins) or (mode == ALWAYS and False in begins):
        raise UsageError(
            "the run goes on from a checkpoint whose texts are framed otherwise",
            where=f"--begin_token={mode}",
            got=describe(recorded.usual, own.tokenizer),
            remedy="leave --begin_token out, or begin another run from its weights alone, in another output",
        )


def _refuse_store(uri: str | None, store: Framing, wanted: Framing, own: Speaker, mode: str) -> None:
    asked = "the run's checkpoint has" if mode == AUTO else f"--begin_token={mode} asks for"
    raise SignalError(
        f"the texts of this store are framed otherwise than {asked}",
        where=uri,
        got=describe(store, own.tokenizer),
        expected=describe(wanted, own.tokenizer),
        remedy=f"leave --begin_token out, which follows the store, or {_ANEW}" if mode != AUTO else _ANEW,
    )
