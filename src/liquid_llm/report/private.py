"""What a page that is passed on does not tell: where on whose machine files lay, and what the machine is called.

A path of this machine keeps its last part: ``/home/me/runs/demo/teacher`` is ``…/teacher``. URLs stay: they name what
others can be given. The run's own ``provenance/`` has all of it as it was.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

LEFT_OUT = "(left out)"

# at the beginning of a word, after = or : or a bracket; of a URL neither slash is
_PATH = re.compile(r"(?:(?<=[\s=:,'\"(\[{])|^)(?:file://)?(?:/(?!/)|~/|[A-Za-z]:[\\/])[^\s'\",;)\]}]*[^\s'\",;:.)\]}]")
_WHOLE = re.compile(r"(?P<before>(?:--?[\w-]+=|[a-z]+:)?)(?P<path>(?:file://)?(?:/(?!/)|~/|[A-Za-z]:\\)[^\n]*)")
_NAMES_MACHINE = re.compile(r"(^|_)(host(name)?|addr(ess)?|node(list|name)?|submit_dir)(_|$)", re.IGNORECASE)
_SHORTEST = 4  # a shorter name of a machine is part of other words


def without_places(value: Any, hosts: frozenset[str] = frozenset()) -> Any:
    """A copy of nested plain values in which no path or name of a machine is told.

    Args:
        hosts: names of machines, which are left out of texts too.
    """
    if isinstance(value, Mapping):
        return {
            key: LEFT_OUT if _NAMES_MACHINE.search(str(key)) and isinstance(one, str) else without_places(one, hosts)
            for key, one in value.items()
        }
    if isinstance(value, list):
        return [without_places(one, hosts) for one in value]
    return shorten(value, hosts) if isinstance(value, str) else value


def shorten(text: str, hosts: frozenset[str] = frozenset()) -> str:
    """A text without paths and names of machines."""
    for host in hosts:
        if len(host) >= _SHORTEST:
            text = text.replace(host, LEFT_OUT)
    whole = _WHOLE.fullmatch(text)
    if whole is not None:
        return whole["before"] + _last(whole["path"])
    return _PATH.sub(lambda found: _last(found[0]), text)


def _last(path: str) -> str:
    parts = [part for part in re.split(r"[\\/]", path.removeprefix("file://")) if part]
    return path if len(parts) < 2 else f"…/{parts[-1]}"


def hosts_of(environment: Any) -> frozenset[str]:
    """The names of the machines that a run's sessions were on."""
    if not isinstance(environment, Mapping):
        return frozenset()
    earlier = environment.get("earlier_sessions")
    found = set()
    for session in (environment, *(earlier if isinstance(earlier, list) else ())):
        hardware = session.get("hardware") if isinstance(session, Mapping) else None
        host = hardware.get("host") if isinstance(hardware, Mapping) else None
        found |= {host} if isinstance(host, str) and host else set()
    return frozenset(found)
