"""``store.json``: whose signal a folder holds, in which layout, and with which framing and numerics it was made.

A store keeps what it was begun with: records that a later release adds do not make its first ones younger.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple

from liquid_llm import storage
from liquid_llm.errors import SignalError
from liquid_llm.parsing import parse_json
from liquid_llm.signal_store.records import SignalIdentity, difference_in_words
from liquid_llm.versions import CURRENT, FRAMING, find_newer, read_versions

STORE_FILE = "store.json"
# A store in the store: some samples that training holds out, in a codec that says nearly all, for evaluation alone.
HELD_OUT = "held_out"
# 1 had no versions, which stands for the first of each; 2 no framing; 3 no quantisation; all are read.
STORE_VERSION = 4


class StoreFile(NamedTuple):
    """What ``store.json`` says; ``versions``: of framing and numerics, those that the store was begun with."""

    identity: SignalIdentity
    layout: str
    versions: dict[str, int]


def write_store_file(
    uri: str, identity: SignalIdentity, layout: str, versions: Mapping[str, int] | None = None
) -> None:
    """Publish the file in folder ``uri``; ``versions`` are those of the records to come, this release's if None.

    The file of an identity that names no quantisation, or no framing, is written as format 3 or 2 was, so that earlier
    releases read it.
    """
    numerics = (CURRENT if versions is None else versions).get("numerics", 1)
    # Nothing in a store depends on order; a framing that is named is not that of the first version.
    kept = {"framing": 1 if identity.framing is None else FRAMING, "numerics": numerics}
    version = 2 if identity.framing is None else 3
    if identity.quantisation is not None:
        version = STORE_VERSION
    contents = {"format_version": version, "layout": layout, **identity.plain(), "versions": kept}
    storage.write_bytes(storage.join(uri, STORE_FILE), json.dumps(contents, indent=1).encode())


def read_store_file(uri: str) -> StoreFile:
    """What the file in folder ``uri`` says.

    Raises:
        SignalError: it is damaged, or of a newer program.
    """
    where = storage.join(uri, STORE_FILE)
    try:
        values = parse_json(storage.read_small(where))
        version, layout = int(values.pop("format_version")), str(values.pop("layout"))
        versions = read_versions(values.pop("versions", None)) if version <= STORE_VERSION else {}
        identity = None if version > STORE_VERSION else SignalIdentity(**values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SignalError(
            "not a description of a signal store",
            where=where,
            got=f"{type(error).__name__}: {error}",
            remedy="copy it again from where it is whole; a new capture goes into an empty folder",
        ) from error
    if identity is None:
        raise SignalError(
            "the store was written by a newer program",
            where=where,
            got=f"format {version}",
            expected=f"at most {STORE_VERSION}",
            remedy="install a newer liquid-llm",
        )
    newer = find_newer(versions)
    if newer is not None:
        raise SignalError(
            "the store was captured by a newer program, which works in another way",
            where=where,
            got=newer,
            remedy="install a newer liquid-llm, or capture again into another folder",
        )
    return StoreFile(identity, layout, versions)


def present_layout(uri: str) -> str | None:
    """The layout of the store in folder ``uri``; None where there is none."""
    return read_store_file(uri).layout if storage.exists(storage.join(uri, STORE_FILE)) else None


def require_own(uri: str, identity: SignalIdentity, layout: str) -> None:
    """Refuse the store in folder ``uri`` if records of this identity and layout do not belong there.

    Raises:
        SignalError: it holds another teacher's signal, or signal in another codec or layout.
    """
    there, present, _ = read_store_file(uri)
    difference = there.difference(identity)
    if difference is not None:
        name, theirs, ours = difference_in_words(*difference)
        differs = "differ" if name == "codec options" else "differs"
        raise SignalError(
            f"this folder holds the signal of {there.teacher}, codec {there.codec!r}: the {name} {differs}",
            where=uri,
            got=ours,
            expected=theirs,
            remedy="write to another folder, or remove this one first",
        )
    if present != layout:
        raise SignalError(
            "this folder holds a store in another layout",
            where=uri,
            got=layout,
            expected=present,
            remedy=f"go on with --logits_format={present}, or pack it: liquid store pack {uri} FOLDER",
        )
