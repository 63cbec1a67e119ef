"""``liquid memory``: words in, exit code out."""

from __future__ import annotations

from liquid_llm.cli.parse import choose, parse
from liquid_llm.options import CAPTURE, EVERY, RUN, Option, options_of

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
_RANKS = Option(
    "ranks",
    "int",
    RUN,
    "ranks",
    None,
    "processes of the run; --shard=full and --teacher_shard=full divide by them (default: as torchrun says, else 1)",
    minimum=1,
)


def memory(words: list[str]) -> int:
    """Parse and run one ``liquid memory JOB``; returns the exit code.

    Raises:
        LiquidError: any problem a user can cause.
    """
    jobs = {face: f"of liquid {face}" for face in EVERY}
    face = choose("job", jobs, words, "liquid memory", _DESCRIPTION)
    own = (_MEMORY,) if face == CAPTURE else (_MEMORY, _RANKS)
    given = parse((*own, *options_of(face)), words[1:], f"liquid memory {face}", _DESCRIPTION, face=face)
    from liquid_llm.jobs.memory import run_memory

    return run_memory(face, given)
