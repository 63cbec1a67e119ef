"""``liquid memory``: words in, exit code out."""

from __future__ import annotations

from liquid_llm.cli.parse import Parser, parse, unknown_word
from liquid_llm.errors import UsageError
from liquid_llm.options import EVERY, RUN, Option

_DESCRIPTION = (
    "Say how much memory a job takes and whether it fits, before there is data, weights or a GPU: only configurations "
    "are read. Takes the options of the job itself. Ends with 6 where it does not fit."
)
_MEMORY = Option(
    "gpu_memory",
    "size",
    RUN,
    "gpu_memory",
    None,
    "what a process can have of the card: 22, 22GiB, 24GB (default: what is free on the GPU here, else an L4's 22GiB)",
    above=0,
)


def memory(words: list[str]) -> int:
    """Parse and run one ``liquid memory FACE``; returns the exit code.

    Raises:
        LiquidError: any problem a user can cause.
    """
    if not words:
        raise UsageError("no job is named", where="liquid memory", expected=f"one of {', '.join(EVERY)}")
    if words[0] in ("-h", "--help"):
        parser = Parser(prog="liquid memory", description=_DESCRIPTION, allow_abbrev=False)
        parser.add_argument("job", choices=EVERY, help="liquid memory JOB --help lists its options")
        parser.parse_args(words)
    face = words[0]
    if face not in EVERY:
        raise unknown_word("job", face, EVERY, "liquid memory")
    given = parse(face, words[1:], f"liquid memory {face}", _DESCRIPTION, [_MEMORY])
    from liquid_llm.jobs.memory import run_memory

    return run_memory(face, given)
