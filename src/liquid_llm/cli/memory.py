"""``liquid memory``: words in, exit code out."""

from __future__ import annotations

from liquid_llm.cli.parse import choose, parse
from liquid_llm.options import ANNEAL, CAPTURE, EVERY, RUN, TRAIN, Option, options_of

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

_EXAMPLES = {
    TRAIN: ("--student=liquid-350m --lm_teacher_id=meta-llama/Llama-3.2-3B --block_size=1024 --gpu_memory=22GiB",),
    ANNEAL: ("--student=liquid-350m --teacher_name=meta-llama/Llama-3.2-3B --block_size=1024 --gpu_memory=22GiB",),
    CAPTURE: ("--mc_teacher_id=meta-llama/Llama-3.1-8B --seq_len=1024 --batch_size=4 --gpu_memory=22GiB",),
}


def memory(words: list[str]) -> int:
    """Parse and run one ``liquid memory JOB``; returns the exit code.

    Raises:
        LiquidError: any problem a user can cause.
    """
    jobs = {face: f"of liquid {face}" for face in EVERY}
    face = choose("job", jobs, words, "liquid memory", _DESCRIPTION)
    own = (_MEMORY,) if face == CAPTURE else (_MEMORY, _RANKS)
    given = parse(
        (*own, *options_of(face)), words[1:], f"liquid memory {face}", _DESCRIPTION, face=face, examples=_EXAMPLES[face]
    )
    from liquid_llm.jobs.memory import run_memory

    return run_memory(face, given)
