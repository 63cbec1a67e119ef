"""``make fuzz``: look for inputs that a target must not be able to tell from others, and is.

    python -m tests.fuzz.search [TARGET ...] [--seconds 60] [--list]

Each target is searched in a process of its own with atheris (libFuzzer, led by which lines are reached). What is found
is put into ``corpus/TARGET``, where ``test_corpus.py`` fails until it is mended; ``python -m tests.fuzz.driver FILE``
shows one. Inputs that reach something new are kept in ``build/fuzz/TARGET``, from where the next search goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import re
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import ModuleType

from tests.fuzz.driver import CORPUS, NAMES, Finding, check, inputs_of, load, quiet

REPOSITORY = Path(__file__).parents[2]
_ONE = "--one"  # how a search of all starts that of each
_LAST = re.compile(r"#(\d+)\s+DONE\s+cov: (\d+) ft: (\d+) corp: (\d+)")
_EXECUTIONS = re.compile(r"stat::number_of_executed_units: (\d+)")
_MEMORY = re.compile(r"stat::peak_rss_mb: +(\d+)")


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="make fuzz ARGS=...", description="look for inputs that break a reader")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"all of them by default: {', '.join(NAMES)}")
    parser.add_argument("--seconds", type=int, default=60, help="for each target (default 60)")
    parser.add_argument("--list", action="store_true", help="name the targets and end")
    given = parser.parse_args(words)
    unknown = [name for name in given.targets if name not in NAMES]
    if unknown:
        parser.error(f"no target {unknown[0]!r}, there are {', '.join(NAMES)}")
    if given.list:
        print("\n".join(NAMES))
        return 0
    print(f"{'target':14}{'executions':>12}{'coverage':>10}{'peak MB':>9}{'seconds':>9}  findings")
    found = [_search_apart(name, given.seconds) for name in given.targets or NAMES]
    return 1 if sum(found) else 0


def _search_apart(name: str, seconds: int) -> int:
    """Search one target in another process and print a row; how many findings are new, at least 1 if it died."""
    before, begun = _files(name), time.monotonic()
    words = [sys.executable, "-m", "tests.fuzz.search", _ONE, name, str(seconds)]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, errors="replace", check=False)
    last, executions = _LAST.findall(done.stderr), _EXECUTIONS.findall(done.stderr)
    new = sorted(_files(name) - before)
    coverage = last[-1][1] if last else "?"
    memory = (_MEMORY.findall(done.stderr) or ["?"])[-1]
    row = f"{name:14}{(executions or ['?'])[-1]:>12}{coverage:>10}{memory:>9}{time.monotonic() - begun:>9.0f}"
    print(f"{row}  {len(new)}", flush=True)
    for one in new:
        print(f"    {CORPUS.relative_to(REPOSITORY)}/{name}/{one}")
    if not executions:
        print("\n".join(done.stderr.splitlines()[-15:]))
    for line in done.stderr.splitlines():
        if line.startswith("finding: "):
            print(f"    {line}")
    return len(new) if executions else max(1, len(new))


def _files(name: str) -> set[str]:
    return {path.name for path in (CORPUS / name).glob("*")}


def _search(name: str, seconds: int) -> None:
    """Search one target in this process, which ends with it."""
    import atheris

    quiet()
    with atheris.instrument_imports(include=["liquid_llm", "yaml"], enable_loader_override=False):
        target = load(name)
        inputs = inputs_of(name, target)
        places: set[str] = set()
        for data in inputs.values():  # imports what is imported late
            _look(name, target, data, places)
    folder = REPOSITORY / "build" / "fuzz" / name
    folder.mkdir(parents=True, exist_ok=True)
    for data in inputs.values():
        (folder / _name_of(data)).write_bytes(data)

    def mutate(data: bytes, most: int, number: int) -> bytes:
        if random.Random(number).random() < 0.5:
            return bytes(target.mutate(data, number)[:most])
        return bytes(atheris.Mutate(data, most))

    options = [f"-max_total_time={seconds}", "-timeout=120", "-rss_limit_mb=6000", "-max_len=20000"]
    options += ["-print_final_stats=1", "-verbosity=1", f"-artifact_prefix={CORPUS / name}/", "-use_value_profile=1"]
    more = {"custom_mutator": mutate} if hasattr(target, "mutate") else {}
    (CORPUS / name).mkdir(parents=True, exist_ok=True)
    atheris.Setup([name, str(folder), *options], lambda data: _look(name, target, data, places), **more)
    atheris.Fuzz()


def _look(name: str, target: ModuleType, data: bytes, places: set[str]) -> None:
    try:
        check(target, data)
    except Finding as finding:
        if finding.place in places:
            return
        places.add(finding.place)
        (CORPUS / name).mkdir(parents=True, exist_ok=True)
        (CORPUS / name / _name_of(data)).write_bytes(data)
        print(f"finding: {finding}", file=sys.stderr, flush=True)
        traceback.print_exception(finding)


def _name_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if sys.argv[1:2] == [_ONE]:
        _search(sys.argv[2], int(sys.argv[3]))
    sys.exit(main(sys.argv[1:]))
