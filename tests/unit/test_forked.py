"""A program that is forked from a server is, to those who look at it, what `subprocess` would have started."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support import forked
from tests.support.forked import Forked
from tests.support.pythons import Pythons
from tests.support.servers import EVERYTHING, LIBRARIES

# Each ends in another way, and none needs a library: both kinds are quick.
PROGRAMS = {
    "streams, words, folder and environment": (
        "import os, sys; print(os.getcwd(), sys.argv, __name__, os.environ['GIVEN'], sorted(os.environ) > [])\n"
        "print('wrong', file=sys.stderr)"
    ),
    "a status in words": "import sys; sys.exit('in words')",
    "a status": "import sys; sys.exit(75)",
    "an exception": "1 / 0",
    "threads and what is left for the end": (
        "import atexit, threading, time; atexit.register(print, 'last')\n"
        "threading.Thread(target=lambda: (time.sleep(0.05), print('thread'))).start()"
    ),
    "nothing to be read": "import sys; print(repr(sys.stdin.read()))",
    "an interrupt": "import os, signal; os.kill(os.getpid(), signal.SIGINT); input()",
}
WAIT = "import time; print('here', flush=True); time.sleep(600)"


@pytest.mark.parametrize("name", PROGRAMS)
def test_it_says_and_ends_as_one_of_subprocess(name: str, tmp_path: Path) -> None:
    words, environment = ["-c", PROGRAMS[name], "a", "--b"], {"GIVEN": "this", "PATH": "/bin"}
    mine = forked.run(words, env=environment, cwd=tmp_path)
    real = subprocess.run(
        [sys.executable, *words],
        env=environment,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert (mine.returncode, mine.stdout) == (real.returncode, real.stdout)
    assert mine.stderr.splitlines()[-1:] == real.stderr.splitlines()[-1:]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_it_as_it_ends_another(number: int) -> None:
    with Forked(["-c", WAIT], stderr=False) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "here\n"
        assert program.poll() is None
        program.send_signal(number)
        assert program.wait(60) == -number


def test_one_that_takes_too_long_is_killed() -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        forked.run(["-c", WAIT], timeout=0.2)


def test_it_begins_with_what_its_server_has_loaded_and_nothing_else_of_this_process() -> None:
    code = "import sys; print(*('torch' in sys.modules, 'liquid_llm' in sys.modules, 'hypothesis' in sys.modules))"
    found = [forked.run(["-c", code], server=server).stdout.split() for server in (EVERYTHING, LIBRARIES)]
    assert found == [["True", "True", "False"], ["True", "False", "False"]]


def test_a_script_s_python_says_and_ends_as_the_interpreter_does(tmp_path: Path) -> None:
    """A status, a signal from inside, one that comes to what the script started, streams and words."""
    slow = 'import time; print("here", flush=True); time.sleep(600)'
    script = f"""
        python -c 'import sys; print(sys.argv[1:], sys.stdin.read()); sys.exit(3)' 'a b' <<< in; echo $?
        python -c 'import os; os.kill(os.getpid(), 9)'; echo $?
        python -c '{slow}' > said & sleep 0.1; until grep -q here said; do sleep 0.1; done; kill %1; wait %1; echo $?
        GIVEN=this python -c 'import os; print(os.environ["GIVEN"], os.getcwd())' 2>&1
    """
    said = []
    with Pythons(tmp_path / "bin") as programs:
        for path in (programs.folder, Path(sys.executable).parent):
            env = {"PATH": f"{path}:/usr/bin:/bin"}
            done = subprocess.run(
                ["bash", "-c", script], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120
            )
            said.append(done.stdout)
    assert said[0] == said[1]
    assert said[0].splitlines() == ["['a b'] in", "", "3", "137", "143", f"this {tmp_path}"]
