"""``liquid evaluate``: words in, exit code out."""

from __future__ import annotations

from liquid_llm.cli.parse import Positional, parse
from liquid_llm.options import ANNEAL, DATA, EVALUATION, OUTPUT, RUN, STUDENT, TEACHER, TRAIN, Option, options_of

_DESCRIPTION = (
    "Say how good students are on held-out text, beside their teacher: loss, bits a byte, KL at T=1, agreement, "
    "overlap, calibration, each with its standard error over texts. Of several students "
    "those after the first are compared with it, text by text: differences with 95 % intervals, and one sentence. "
    "A run is evaluated on what it held out itself, beside its own teachers, unless others are named."
)
_EXAMPLES = ("runs/first", "runs/plain runs/distilled", "my-student --teacher=big/model --records=notes.jsonl")
_STUDENTS = Positional(
    "students",
    "STUDENT",
    "run directory (its best checkpoint, else its last), .pt file of a run, Hugging Face folder, zip or id, .gguf; "
    "paths may be URLs",
    many=True,
)
_RECORDS = (
    "files of records in place of a manifest, all of which is evaluated on: FILE (texts of type lm) or TYPE=FILE, "
    "comma-separated"
)
_TEACHER = "teacher of every type: Hugging Face id or folder, store:URI, or none (default: the run's own)"
_WHICH = "of run directories: best, last, final, step-N or time-..."
_TOKENIZER = "a model with the students' tokenizer, where none came along"
_ANSWERS = "held-out prompts that are answered greedily and marked by #### n [20 where there are any; 0: none]"
_JSON = "file or URL for all that was found, as JSON; evaluation.json of a run has it too"
_TASKS = (
    "benchmarks of lm-eval to run too, comma-separated: names it knows, YAML files of one's own, folders of them; "
    "needs the extra: pip install 'liquid-llm[lm-eval]'"
)
_TASK_LIMIT = "most samples of each of these tasks"
_TASK_FEWSHOT = "examples before each question of these tasks (default: as the task says)"
_OWN = (
    Option("which", "str", STUDENT, "which", None, _WHICH),
    Option("tokenizer", "str", STUDENT, "tokenizer", None, _TOKENIZER),
    Option("teacher", "str", TEACHER, "teacher", None, _TEACHER),
    Option("records", "str", DATA, "records", None, _RECORDS),
    Option("answers", "int", EVALUATION, "answers", None, _ANSWERS, minimum=0),
    Option("answer_tokens", "int", EVALUATION, "answer_tokens", 256, "most tokens of an answer", minimum=1),
    Option("tasks", "str", RUN, "tasks", None, _TASKS),
    Option("task_limit", "int", RUN, "task_limit", None, _TASK_LIMIT, minimum=1),
    Option("task_fewshot", "int", RUN, "task_fewshot", None, _TASK_FEWSHOT, minimum=0),
    Option("json", "str", OUTPUT, "json", None, _JSON),
)
_SHARED = """
    precision signal teacher_precision teacher_quantize hf_token_file hf_token_uri hf_token_secret dataset_name
    dataset_config dataset_manifest block_size seq_len batch_size document_mask val_fraction begin_token num_workers
    data_cache learn chat_template eval_ctx_lens eval_tokens device
"""


def options_of_evaluate() -> tuple[Option, ...]:
    """Its own and those that mean the same as in training, which runs have their values of."""
    shared = {one.name: one for face in (ANNEAL, TRAIN) for one in options_of(face) if one.name in _SHARED.split()}
    return (*_OWN, *shared.values())


def evaluate(words: list[str]) -> int:
    """Parse and run one ``liquid evaluate``; returns the exit code.

    Raises:
        LiquidError: any problem a user can cause.
    """
    given = parse(
        options_of_evaluate(), words, "liquid evaluate", _DESCRIPTION, positionals=(_STUDENTS,), examples=_EXAMPLES
    )
    students = given.pop("students")
    from liquid_llm.jobs.evaluate import run_evaluate

    return run_evaluate(students, given)  # type: ignore[arg-type]
