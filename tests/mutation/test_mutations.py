"""The script that breaks the sources breaks what it should, and knows where the tests lie."""

import ast
import json
import subprocess
import sys

import pytest
from tests.mutation import subjects
from tests.mutation.mutations import mutants, sample
from tests.mutation.run import ROOT

MADE = {
    "if a == b: pass": {"if (a != b): pass"},
    "x = a < b": {"x = (a >= b)", "x = (a <= b)"},
    "x = a in b": {"x = (a not in b)"},
    "x = a + b": {"x = (a - b)"},
    "x = a @ b": set(),
    "x = a | b": set(),  # types, where no function is
    "def f(a, b): return a | b": {"def f(a, b): return (a & b)"},
    "x = 3": {"x = 4"},
    "x = 0.5": {"x = 1.0"},
    "x = True": {"x = False"},
    "x = a and b": {"x = (a or b)"},
    "x = not a": {"x = (a)"},
    "if a: pass": {"if (not a): pass"},
    "f()": {"pass"},
    "a.b = c": {"pass"},
    "a = c": set(),
    "raise E(1 + 2)": {"pass"},
    "f(a, b)": {"pass", "f(b, a)"},
    "x = f(a, a)": set(),
    "x = f(*a, b)": set(),
    "x = f(a, 'b')": set(),
    "x = max(a, b)": set(),
    "x = a + '.pt'": set(),
    "logger.info('%d', a + b)": set(),
    "self._say(a, b)": set(),
    "x = math.log(a + b)": {"x = math.log((a - b))"},
    "x = f'{a + b}'": set(),
    "'words'": set(),
    "assert a == b": set(),
    "x: Literal[1]": set(),
}


def test_each_mistake_is_made_and_nothing_that_is_only_words():
    assert {code: {mutant.apply(code) for mutant in mutants("m.py", code)} for code in MADE} == MADE


def test_annotations_decorators_and_representations_are_left_alone():
    code = "@d(1)\ndef f(a: L[1] = 2) -> L[3]:\n    '''4'''\n\nclass A:\n    def __repr__(self):\n        return 5\n"
    assert [mutant.before for mutant in mutants("m.py", code)] == ["2"]


def test_a_sample_does_not_move_with_what_changes_elsewhere():
    code = "def f(a):\n    return a + 1 < 2 * a\n"
    before = mutants("m.py", code)
    after = mutants("m.py", f"import os\n\n\ndef g():\n    '''é'''\n    return 7\n\n\n{code}")
    assert [m.key for m in sample(before, 3, seed=1)] == [m.key for m in sample(after, 9, seed=1) if m.function == "f"][
        :3
    ]
    assert sample(before, 5, seed=1) != sample(before, 5, seed=2)


def test_alike_mutants_of_a_function_have_names_of_their_own():
    found = mutants("m.py", "def f():\n    return [1, 1, 1]\n")
    assert len({mutant.name for mutant in found}) == 3


def test_every_subject_has_modules_and_tests_and_each_mutant_can_be_read_by_python():
    for subject, (sources, tests) in subjects.SUBJECTS.items():
        for pattern in (*sources, *tests):
            assert subjects.files(ROOT, pattern), f"{subject}: nothing lies at {pattern}"
    for path in subjects.modules(ROOT):
        source = (ROOT / path).read_text(encoding="utf-8")
        for mutant in mutants(path, source)[::25]:
            ast.parse(mutant.apply(source))


def test_a_modules_own_tests_come_first():
    near = subjects.modules(ROOT)
    assert near["src/liquid_llm/data/loader.py"][0] == "tests/unit/data/test_loader.py"
    assert near["src/liquid_llm/losses/fused.py"][0] == "tests/unit/losses/test_fused.py"


PROJECT = {
    "pyproject.toml": "[tool.pytest.ini_options]\npythonpath = ['src', '.']\n",
    "src/m.py": (
        "def double(a):\n    return 2 * a\n\n\ndef count(n):\n    while n > 0:\n        n -= 1\n    return n\n\n\n"
        "def unseen(a):\n    return a + a\n"
    ),
    "tests/test_m.py": (
        "import m, pytest\n\ndef test_double():\n    assert m.double(2) == 4\n\n"
        "@pytest.mark.parametrize('n', [3, 5])\ndef test_count(n):\n    assert m.count(n) == 0\n"
    ),
}
TRY_ALL = """
import json, sys
from pathlib import Path
from tests.mutation.mutations import read
from tests.mutation.run import Bench

root, folder = map(Path, sys.argv[1:])
bench, path = Bench(root, folder), "src/m.py"
walks = bench.baseline([path], ["tests/test_m.py"])
tried = {f"{m.before} -> {m.after}": bench.try_mutant(m, ["tests/test_m.py"], walks, 1) for m in read(root, path)}
print(json.dumps([{test: sorted(walk.lines[path]) for test, walk in walks.items()}, tried]))
"""


@pytest.mark.slow
def test_mutants_meet_the_tests_that_reach_them_and_one_without_end_is_ended(tmp_path):
    root = tmp_path / "project"
    for name, text in PROJECT.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    subprocess.run(["git", "init", "-q", root], check=True)
    script = [sys.executable, "-c", TRY_ALL, str(root), str(tmp_path / "bench")]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    walked, tried = json.loads(done.stdout.splitlines()[-1])
    assert walked["tests/test_m.py::test_double"] == [2]
    assert set(walked["tests/test_m.py::test_count[3]"]) == {6, 7, 8}
    assert tried["2 * a -> (2 / a)"] == "FAILED tests/test_m.py::test_double"
    assert tried["n -= 1 -> pass"] == "time ran out"
    assert tried["n > 0 -> (n >= 0)"].startswith("FAILED tests/test_m.py::test_count")
    assert tried["a + a -> (a - a)"] is None
    assert (root / "src/m.py").read_text() == (tmp_path / "bench/tree/src/m.py").read_text() == PROJECT["src/m.py"]
