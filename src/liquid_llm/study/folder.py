"""A study's folder: what is planned, who works on what, what is finished.

plan.json              arms, seeds and captures as they were asked for so far
runs/ARM/seed-N/       run directories of ``liquid train`` or ``liquid anneal``
done/ARM/seed-N.json   the run is finished
evaluations/ARM/...    what its student was found to do on held-out text
claims/...             locks: who holds one works on that run; they go with the process, however that ends
captures.json          what captures took
pace.json              seconds a step of each arm, and how long the baseline trains to take another arm's seconds
study.json study.html study.md  the result
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liquid_llm import storage
from liquid_llm.errors import UsageError
from liquid_llm.parsing import parse_json
from liquid_llm.study.plan import Unit

VERSION = 1
PLAN, PACE, CAPTURES = "plan.json", "pace.json", "captures.json"
RESULT, PAGE, TABLES = "study.json", "study.html", "study.md"


class Busy(Exception):
    """Another process holds the lock."""


@dataclass(frozen=True)
class StudyFolder:
    """Reads and writes what a study keeps in ``root``."""

    root: Path

    def run_dir(self, unit: Unit) -> Path:
        """Where a unit trains."""
        return self.root / "runs" / unit.folder

    def is_done(self, unit: Unit) -> bool:
        """Whether its run is finished."""
        return (self.root / "done" / f"{unit.folder}.json").is_file()

    def mark_done(self, unit: Unit) -> None:
        """Say that its run is finished."""
        self.write(f"done/{unit.folder}.json", {"arm": unit.arm, "seed": unit.seed, "steps": unit.steps})

    def evaluation(self, unit: Unit) -> dict[str, Any] | None:
        """What was found of its student; None where it is not evaluated yet."""
        found: dict[str, Any] | None = self.read(f"evaluations/{unit.folder}.json")
        return found

    def keep_evaluation(self, unit: Unit, found: Mapping[str, Any]) -> None:
        """Keep what was found of its student."""
        self.write(f"evaluations/{unit.folder}.json", found)

    @contextlib.contextmanager
    def claim(self, what: str) -> Iterator[None]:
        """Hold the lock of a unit's folder, or of another name, while entered.

        Raises:
            Busy: another process has it.
        """

        def refuse(holder: str) -> None:
            raise Busy(holder)

        path = self.root / "claims" / f"{what.replace('/', '.')}.lock"
        with storage.translate_errors(path, writing=True):
            path.parent.mkdir(parents=True, exist_ok=True)
        with storage.locked(path, on_wait=refuse):
            yield

    @contextlib.contextmanager
    def change(self) -> Iterator[None]:
        """Hold the lock under which small files are read and written again; others wait a moment."""
        path = self.root / "claims" / "files.lock"
        with storage.translate_errors(path, writing=True):
            path.parent.mkdir(parents=True, exist_ok=True)
        with storage.locked(path):
            yield

    def read(self, name: str) -> Any:
        """A JSON file's value; None where it is not there.

        Raises:
            UsageError: it is no JSON.
        """
        path = self.root / name
        if not path.is_file():
            return None
        try:
            return parse_json(storage.read_small(str(path)))
        except ValueError:
            raise UsageError("not a JSON file", where=path, remedy="remove it: it is made again") from None

    def write(self, name: str, value: Any) -> None:
        """Publish a JSON file."""
        text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
        storage.write_bytes(str(self.root / name), (text + "\n").encode("utf-8", errors="backslashreplace"))

    def plan(self) -> dict[str, Any]:
        """What is planned.

        Raises:
            UsageError: this is no study's folder, or one of a newer release.
        """
        found = self.read(PLAN)
        if not isinstance(found, dict):
            raise UsageError("this is no study's folder", where=self.root, expected=f"{PLAN} in it")
        if found.get("version") != VERSION:
            raise UsageError(
                "this study was made by a newer release",
                where=self.root / PLAN,
                got=f"version {found.get('version')}",
                expected=VERSION,
                remedy="update liquid-llm",
            )
        return found

    def merge_plan(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """What is planned and what is asked for together; nothing is written. See ``add_to_plan``."""
        if not (self.root / PLAN).exists():
            return {"version": VERSION, **asked}
        return _merge(self.plan(), asked, self.root)

    def add_to_plan(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Add what is asked for to what is planned, and return both together.

        Args:
            asked: ``face``, ``arms`` (each with ``name`` and ``counts``: all that changes its numbers), ``seeds``, and
                what else is to be kept as it was asked last.

        Raises:
            UsageError: it contradicts what is planned.
        """
        with self.change():
            merged = self.merge_plan(asked)
            if merged != self.read(PLAN):
                self.write(PLAN, merged)
        return merged


def _merge(there: Mapping[str, Any], asked: Mapping[str, Any], root: Path) -> dict[str, Any]:
    known = {arm["name"]: arm for arm in there["arms"]}
    new = {arm["name"]: arm for arm in asked["arms"]}
    problems = []
    if there["face"] != asked["face"]:
        problems.append(f"it was begun with liquid {there['face']}, and now it is liquid {asked['face']}")
    if next(iter(known)) != next(iter(new)):
        problems.append(f"its first arm, the baseline, was {next(iter(known))!r}, and now it is {next(iter(new))!r}")
    for name in known.keys() & new.keys():
        was, now = known[name]["counts"], new[name]["counts"]
        changed = [key for key in dict.fromkeys([*was, *now]) if was.get(key) != now.get(key)]
        problems += [f"arm {name!r}: {key} was {_say(was, key)}, and now it is {_say(now, key)}" for key in changed]
    if problems:
        raise UsageError(
            "the study in this folder is another",
            where=root,
            got="; ".join(problems),
            remedy="give changed arms another name, or use another --study_dir; new arms and seeds may be added",
        )
    return {
        **there,
        **asked,
        "arms": [{**arm, **new.get(name, {})} for name, arm in known.items()]
        + [arm for name, arm in new.items() if name not in known],
        "seeds": _union(there["seeds"], asked["seeds"]),
    }


def _say(values: Mapping[str, Any], key: str) -> str:
    return str(values[key]) if key in values else "not given"


def _union(first: Sequence[int], second: Sequence[int]) -> list[int]:
    return list(dict.fromkeys([*first, *second]))
