"""Fixtures of several files of tests, made once by each process that runs some of them; only read after that."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.annealing import make_world, short_run
from tests.support.tiny import QUICK, Tiny, run
from tests.support.undisturbed import Undisturbed


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A teacher, students' configurations and texts to anneal on."""
    return make_world(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Such a world of its own, with the stored signal of its maths and code."""
    made = make_world(tmp_path_factory.mktemp("scored"))
    done = run("stage1_hybrid.precompute_hybrid_logits", made.capture_words(**QUICK))
    assert done.returncode == 0, done.stderr
    return made


@pytest.fixture(scope="session")
def short(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of eight steps at 32 tokens, whose schedules reach past its end."""
    return short_run(tiny, tmp_path_factory.mktemp("short"))


@pytest.fixture(scope="session")
def undisturbed(scored: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Small jobs of every kind, and what each leaves where nothing disturbs it."""
    return Undisturbed(scored, tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture
def demo_folder(scored: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder for the test, with ``runs/demo`` as `liquid demo` leaves it; what lies there is ``scored``."""
    demo = tmp_path / "runs" / "demo"
    (demo / "signal").mkdir(parents=True)
    (demo / "data").symlink_to(scored.root)
    (demo / "teacher").symlink_to(scored.teacher)
    for type, store in (("math_tool", "math"), ("code", "code")):
        (demo / "signal" / type).symlink_to(scored.root / "signal" / store)
    monkeypatch.chdir(tmp_path)
    return tmp_path
