"""Fixtures shared by all tests."""

from __future__ import annotations

import gc
import logging
import os
import random
import shutil
import signal
import tempfile
from collections.abc import Iterator
from multiprocessing.util import Finalize
from pathlib import Path
from typing import IO

import pytest
from filelock import FileLock
from hypothesis import settings
from tests.support import predictions
from tests.support.accelerator import Accelerator, install
from tests.support.costs import Costs
from tests.support.files import begin_folder, place_for_files
from tests.support.gcs import Bucket, FakeGcs, running_server
from tests.support.processes import end_all
from tests.support.shared import FOLDER
from tests.support.tiny import end_started
from tests.support.world import World, build, served

# Before the first product: where a processor has bfloat16 tiles, `auto` is another precision and rounding another. One
# test asks for them where they are there: unit/losses/test_tiles.py.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

# No deadline: the cores are shared, an example's time says nothing. `make test` tries the same 50 examples:
# only a change can make it fail. `make soak` looks at many more, and at others each time.
settings.register_profile("soak", settings.default, deadline=None, max_examples=20 * settings.default.max_examples)
settings.register_profile("steady", settings.default, deadline=None, derandomize=True, max_examples=50)
settings.load_profile("steady")


def pytest_addoption(parser: pytest.Parser) -> None:
    say = "files, and the tests of each file, in an order drawn from this number"
    parser.addoption("--shuffle", type=int, metavar="SEED", help=say)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "soak: too long for `make test`; run by `make soak`")
    # Google's libraries say on import that they will not be updated for Python 3.10; the pinned ones run on it.
    unsupported = "ignore:You are using a non-supported Python version:FutureWarning"
    config.addinivalue_line("filterwarnings", unsupported)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # `nohup make test` would have no run hear it
    config.pluginmanager.register(Costs())
    if not hasattr(config, "workerinput"):
        _begin_a_folder_of_our_own()
    install()  # before any backward pass: autograd has a queue only for devices that are there when it is first used


def pytest_collection_finish(session: pytest.Session) -> None:
    """What torch, transformers and the tests are made of lives to the end: no collection looks at it again."""
    predictions.share()
    gc.collect()
    gc.freeze()


# What a test kills leaves its temporary folders behind: gigabytes in a day. They lie in one, which goes at the end.
def _begin_a_folder_of_our_own() -> None:
    """For temporary files of the tests and of what they start; pytest's own folders and torch's cache stay outside."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/liquid-tests-torchinductor")
    outside = place_for_files()
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", outside)
    folder, holding = begin_folder(outside)
    os.environ["TMPDIR"] = os.environ[FOLDER] = folder
    tempfile.tempdir = None
    # After multiprocessing has removed its own folder, which lies in this one.
    Finalize(None, _end_folder, args=(folder, holding), exitpriority=-200)


def _end_folder(folder: str, holding: IO[str]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    holding.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if (seed := terminalreporter.config.option.shuffle) is not None:
        terminalreporter.write_line(f"the order was that of --shuffle={seed}")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The tests of a file stay together, for its fixtures' sake; no test may count on what another left behind."""
    seed = config.option.shuffle
    if seed is not None:
        order = random.Random(seed)
        keys = {file: order.random() for file in sorted({item.path for item in items})}
        order.shuffle(items)
        items.sort(key=lambda item: keys[item.path])


@pytest.fixture(scope="session")
def gcs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeGcs]:
    """One real fake-gcs-server for the whole session."""
    with running_server(tmp_path_factory.mktemp("gcs")) as server:
        yield server


@pytest.fixture
def gcs(gcs_server: FakeGcs, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A fresh bucket; ``gs://`` URIs go to the fake server for the length of the test, in child processes too."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_server.base)
    return Bucket(gcs_server, gcs_server.new_bucket())


@pytest.fixture(scope="session")
def built_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The offline world's files, built by whichever worker comes first and only read after that."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # pytest gives each worker a folder of its own below the session's
    with FileLock(shared / "world.lock"):
        complete = shared / "world" / "complete"
        if not complete.exists():
            shutil.rmtree(complete.parent, ignore_errors=True)
            build(complete.parent)
            complete.touch()
    return complete.parent


@pytest.fixture(autouse=True)
def usual_log_level() -> Iterator[None]:
    """A command that says little (``--json``) leaves the package's logger so; the next test hears all."""
    package = logging.getLogger("liquid_llm")
    level = package.level
    yield
    package.setLevel(level)


@pytest.fixture(autouse=True)
def no_process_left() -> Iterator[None]:
    """What a failed test started does not run into the next one."""
    yield
    end_started()
    end_all()


@pytest.fixture(autouse=True)
def settled_streams() -> Iterator[None]:
    """What a failed test has left on the pretend device's streams is refused to none that comes after it."""
    yield
    install().streams.settle()


@pytest.fixture(scope="session")
def world(built_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """The offline world, one a worker. Its bucket is shared: write below a URI of your own, or use ``fresh_world``."""
    with served(built_world, tmp_path_factory.mktemp("world")) as running:
        yield running


@pytest.fixture
def fresh_world(built_world: Path, tmp_path: Path) -> Iterator[World]:
    """The offline world with a bucket nobody has written to."""
    with served(built_world, tmp_path / "world") as running:
        yield running


@pytest.fixture(scope="session")
def accelerator() -> Accelerator:
    """The pretend device ``pretend:0``; it cannot be taken out of the process again, and disturbs nothing there."""
    return install()


@pytest.fixture(scope="module")
def few_to_collect() -> None:
    """What is alive when the module begins is left out of its garbage collections, which then cost a hundredth."""
    gc.collect()
    gc.freeze()
