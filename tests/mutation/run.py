"""``make mutants``: how many small mistakes in the numbers the tests notice.

    python -m tests.mutation.run --number 200 --seed 1

A copy of the working tree is mutated, one place at a time, and the tests nearest to it run until one fails. First they
run once on the unmutated copy, which must pass, and what lines each of them walks over is written down: a mutant meets
the quickest of the tests that reach its lines first, and the rest of the nearest files only if those let it live.
Each run is a fork of one process that has the large libraries loaded, bounded in processor time, so that a loop
without end is noticed too. What no test noticed is printed with its difference.

Written here because mutmut 3 mutates functions alone (no tables, no defaults), takes no sample, and wants all its
mutants in one file of the package at once.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from tests.mutation import mutations, subjects
from tests.mutation.mutations import Mutant

ROOT = Path(__file__).resolve().parents[2]
PASSED, BROKEN = 0, 70
ODD = "it ended oddly"


@dataclass
class Walk:
    """One test: what it took, and the lines of the mutated modules it walked over."""

    seconds: float = 0.0
    lines: dict[str, set[int]] = field(default_factory=dict)

    def reaches(self, mutant: Mutant) -> bool:
        return not self.lines.get(mutant.path, set()).isdisjoint(range(mutant.line, mutant.last_line + 1))


class Recorder:
    """A pytest plugin: the walk of each test; what a shared fixture walks over counts for every test of its file."""

    def __init__(self, tree: Path, sources: list[str]) -> None:
        self.sources = {str(tree / source): source for source in sources}
        self.walks: dict[str, Walk] = {}
        self.shared: dict[str, Walk] = {}
        self.current = Walk()

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.current = self.walks[item.nodeid] = Walk()
        began = time.process_time()
        with self._tracing():
            yield
        self.current.seconds = time.process_time() - began

    @pytest.hookimpl(hookwrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Iterator[None]:
        if fixturedef.scope == "function":
            yield
            return
        alone, self.current = self.current, self.shared.setdefault(request.node.nodeid.split("::")[0], Walk())
        yield
        self.current = alone

    @contextlib.contextmanager
    def _tracing(self) -> Iterator[None]:
        sys.settrace(self._call)
        threading.settrace(self._call)
        try:
            yield
        finally:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]

    def _call(self, frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
        return self._line if frame.f_code.co_filename in self.sources else None

    def _line(self, frame: FrameType, event: str, argument: object) -> Callable[..., Any]:
        self.current.lines.setdefault(self.sources[frame.f_code.co_filename], set()).add(frame.f_lineno)
        return self._line

    def dump(self) -> str:
        for test, walk in self.walks.items():
            for prefix in {"", test.split("::")[0]}:  # a session's fixtures have no file of their own
                for source, lines in self.shared.get(prefix, Walk()).lines.items():
                    walk.lines.setdefault(source, set()).update(lines)
        return json.dumps({test: [walk.seconds, walk.lines] for test, walk in self.walks.items()}, default=sorted)


class Bench:
    """A copy of a working tree, and the forks that run tests in it."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.tree, self.scratch = root, folder / "tree", folder / "scratch"
        listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listing, cwd=root, capture_output=True, check=True, text=True).stdout
        for name in filter(None, names.split("\0")):
            if (root / name).is_file():
                (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / name, self.tree / name)
        self.output = folder / "output.txt"
        # Compiled by content, not by time: a file that was changed and put back within a second is read as it is.
        compile_all = [sys.executable, "-m", "compileall", "-q", "--invalidation-mode", "checked-hash"]
        subprocess.run([*compile_all, self.tree / "src"], check=True)

    def run(self, tests: list[str], cpu_seconds: float, recorder: Recorder | None = None) -> int | None:
        """Pytest's exit code, or None when it took more processor time than it may, or waited far longer than that."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            try:
                os._exit(self._child(tests, cpu_seconds, recorder))
            finally:  # reached by an exception alone, which must not go on up into the parent's code
                traceback.print_exc()
                os._exit(BROKEN)
        deadline = time.monotonic() + 600 + 20 * cpu_seconds  # on a busy machine, and a test may hang
        try:
            while not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                if time.monotonic() > deadline:
                    return None
                time.sleep(0.02)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)  # with what the tests themselves started
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == BROKEN:
            sys.exit(f"Running tests failed, which says nothing of a mutant:\n{self.output.read_text()}")
        return None if code in (-signal.SIGXCPU, -signal.SIGKILL) else code

    def _child(self, tests: list[str], cpu_seconds: float, recorder: Recorder | None) -> int:
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_CPU, (int(cpu_seconds) + 1, int(cpu_seconds) + 5))
        log = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(self.tree)
        os.environ["PYTHONPATH"] = str(self.tree / "src")
        ours = (self.root, self.root / "src")
        sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() not in ours]
        for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "liquid_llm")]:
            del sys.modules[name]
        arguments = [f"--rootdir={self.tree}", f"--basetemp={self.scratch}", "--timeout=0", "-x"]
        arguments += ["-p", "no:cacheprovider", "-p", "no:xdist"]
        arguments += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # plugins came in with what is loaded already
        code = int(pytest.main([*arguments, *tests], plugins=[recorder] if recorder else None))
        if recorder:
            (self.tree / "walks.json").write_text(recorder.dump())
        return code

    def baseline(self, sources: list[str], tests: list[str]) -> dict[str, Walk]:
        """What each test walks over on the unmutated tree."""
        code = self.run(tests, 4 * 3600, Recorder(self.tree, sources))
        if code != PASSED:
            sys.exit(f"The tests fail without a mutant (exit {code}):\n{self.output.read_text()[-4000:]}")
        found = json.loads((self.tree / "walks.json").read_text())
        return {
            test: Walk(seconds, {source: set(lines) for source, lines in walked.items()})
            for test, (seconds, walked) in found.items()
        }

    def try_mutant(
        self, mutant: Mutant, near: list[str], walks: dict[str, Walk], least_seconds: float = 30
    ) -> str | None:
        """What noticed the mutant; None when nothing did. Tests get five times the processor time they took before."""
        reaching = sorted((test for test in walks if walks[test].reaches(mutant)), key=lambda test: walks[test].seconds)
        rest = sorted(
            (test for test in walks if test.split("::")[0] in near and test not in reaching),
            key=lambda test: near.index(test.split("::")[0]),
        )
        file = self.tree / mutant.path
        source = file.read_text(encoding="utf-8")
        file.write_text(mutant.apply(source), encoding="utf-8")
        try:
            for tests in filter(None, (reaching, rest)):
                code = self.run(tests, least_seconds + 5 * sum(walks[test].seconds for test in tests))
                if code != PASSED:
                    return "time ran out" if code is None else self._first_failure()
        finally:
            file.write_text(source, encoding="utf-8")
        return None

    def _first_failure(self) -> str:
        lines = self.output.read_text(errors="replace").splitlines()
        return next((line.split(" - ")[0] for line in lines if line.startswith(("FAILED ", "ERROR "))), ODD)


def choose(arguments: argparse.Namespace) -> tuple[list[Mutant], dict[str, list[str]]]:
    near = subjects.modules(ROOT)
    everything = [mutant for source in near for mutant in mutations.read(ROOT, source)]
    wanted = arguments.only
    if wanted:
        everything = [m for m in everything if any(part in m.path or part == m.name for part in wanted)]
    print(f"{len(everything):,} mutants in {len({m.path for m in everything})} files, seed {arguments.seed}")
    return mutations.sample(everything, arguments.number, arguments.seed), near


def difference(mutant: Mutant) -> str:
    source = (ROOT / mutant.path).read_text(encoding="utf-8")
    before, after = source.splitlines(), mutant.apply(source).splitlines()
    return "\n".join(difflib.unified_diff(before, after, mutant.path, mutant.function or "module", n=1, lineterm=""))


def main() -> int:
    parser = argparse.ArgumentParser(description="Make small mistakes in the sources; count those the tests notice.")
    parser.add_argument("--number", type=int, default=200, help="mutants to try")
    parser.add_argument("--seed", type=int, default=1, help="another seed, another sample")
    parser.add_argument("--only", action="append", default=[], help="a part of a file's path, or a mutant's name")
    parser.add_argument("--least", type=float, default=0.9, help="the share to notice; fewer is exit code 1")
    parser.add_argument("--workers", type=int, default=1, help="mutants tried at a time")
    parser.add_argument("--list", action="store_true", help="show the mutants and try none")
    arguments = parser.parse_args()
    chosen, near = choose(arguments)
    if arguments.list:
        for mutant in chosen:
            print(f"{mutant.name} {mutant.path}:{mutant.line} {mutant.operator}: {mutant.before} -> {mutant.after}")
        return 0
    import torch  # noqa: F401  # what each fork would load again
    import transformers  # noqa: F401

    began = time.monotonic()
    differences = {mutant: difference(mutant) for mutant in chosen}  # now: somebody may go on writing meanwhile
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        alive = _try_all(Path(folder), chosen, near, arguments.workers)
    killed = len(chosen) - len(alive)
    print(f"\n{killed} of {len(chosen)} noticed ({killed / len(chosen):.1%}), {time.monotonic() - began:.0f} s")
    for mutant in alive:
        print(f"\n{mutant.name} survived: {mutant.operator}\n{differences[mutant]}")
    return 0 if killed >= arguments.least * len(chosen) else 1


def _try_all(folder: Path, chosen: list[Mutant], near: dict[str, list[str]], workers: int) -> list[Mutant]:
    """Those that no test notices."""
    sources = sorted({mutant.path for mutant in chosen})
    tests = list(dict.fromkeys(test for source in sources for test in near[source]))
    with ProcessPoolExecutor(workers, get_context("fork"), _set_up, (folder,)) as pool:
        walks: dict[str, Walk] = {}
        for part in pool.map(_baseline, repeat(sources), [tests[n::workers] for n in range(workers)]):
            walks |= part
        print(f"{len(walks)} tests pass without a mutant", flush=True)
        alive = []
        tried = pool.map(_try, chosen, [near[mutant.path] for mutant in chosen], repeat(walks))
        for number, (mutant, noticed) in enumerate(zip(chosen, tried, strict=True), start=1):
            if noticed is None:
                reached = any(walk.reaches(mutant) for walk in walks.values())
                noticed = "SURVIVED" if reached else "SURVIVED, no test reaches it"
                alive.append(mutant)
            place = f"{mutant.path.removeprefix('src/')}:{mutant.line}"
            print(f"{number:4d} {mutant.name} {place} {mutant.operator}: {noticed}", flush=True)
    return alive


_bench: Bench  # each worker's own


def _set_up(folder: Path) -> None:
    global _bench
    _bench = Bench(ROOT, folder / str(os.getpid()))


def _baseline(sources: list[str], tests: list[str]) -> dict[str, Walk]:
    return _bench.baseline(sources, tests)


def _try(mutant: Mutant, near: list[str], walks: dict[str, Walk]) -> str | None:
    return _bench.try_mutant(mutant, near, walks)


if __name__ == "__main__":
    sys.exit(main())
