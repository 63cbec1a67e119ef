"""``liquid evaluate``: students on held-out text, beside their teacher, with the uncertainty of each figure.

Of several processes (torchrun) each opens all students and teachers, takes every so manieth batch of texts and of
prompts and every so manieth student's benchmarks; what they find is put together, and the main one tells it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch

from liquid_llm import storage
from liquid_llm.answers import MAX_NEW_TOKENS
from liquid_llm.config import DataConfig, RunConfig
from liquid_llm.data.types import ManifestEntry
from liquid_llm.distributed import Engine, deal, join_engine, read_rank
from liquid_llm.errors import UsageError
from liquid_llm.evaluation import Evaluation, Judge
from liquid_llm.evaluation.result import FILE_NAME, list_texts, summarise
from liquid_llm.evaluation.sums import TextSums
from liquid_llm.jobs.evaluate_answers import answer_all, choose_questions, tally
from liquid_llm.jobs.evaluation_table import print_evaluations
from liquid_llm.jobs.prepare import find_run_data
from liquid_llm.lm_eval_tasks import TaskPlan, plan_tasks, run_tasks
from liquid_llm.masking import process_masker
from liquid_llm.models.token_bytes import token_bytes
from liquid_llm.provenance import mask_words
from liquid_llm.runtime import choose_device, choose_dtype, torch_dtype
from liquid_llm.study.results import pair_evaluations
from liquid_llm.study.verdict import compare
from liquid_llm.terminal import Stage, setup_logging
from liquid_llm.training import Student
from liquid_llm.wiring.judging import (
    Judgement,
    evaluation_config,
    hold_out,
    judge_on,
    plain_config,
    planned_evaluation,
    records_entries,
    require_same_students,
)
from liquid_llm.wiring.opening import OpenedStudent, open_student
from liquid_llm.wiring.start import begin
from liquid_llm.wiring.tokenizers import choose_tokenizer
from liquid_llm.wiring.tokens import read_token

log = logging.getLogger(__name__)


def run_evaluate(students: Sequence[str], given: Mapping[str, Any]) -> int:
    """Evaluate, print a table, write ``evaluation.json`` beside each run and where ``json`` says; the exit code.

    Raises:
        LiquidError: any problem a user can cause.
    """
    setup_logging("INFO" if read_rank()[0] == 0 else "WARNING")
    with join_engine(torch.device(choose_device(plain_config(given).device).value)) as engine:
        found = evaluate_students(students, given, engine)
        engine.share(lambda: _tell(compare_with_first(found), given.get("json")))
    return 0


def _tell(found: Sequence[Evaluation], json_file: object) -> None:
    print_evaluations(found)
    for one in found:
        if one.about["run"] is not None:
            storage.write_bytes(storage.join(one.about["run"], FILE_NAME), _as_json(one.plain()))
    if json_file:
        storage.write_bytes(str(json_file), _as_json([one.plain() for one in found]))


def evaluate_students(
    students: Sequence[str],
    given: Mapping[str, Any] | None = None,
    engine: Engine | None = None,
    *,
    measuring: bool = True,
) -> list[Evaluation]:
    """Evaluate students on the same texts; the teacher is asked once a batch for all of them.

    Args:
        students: see ``wiring.opening.open_student``. All have one tokenizer.
        given: options of ``liquid evaluate`` by name (``cli/evaluate.py``); without any texts named, those that the
            first run among the students has held out, and without a teacher named that run's own.
        engine: the processes that do it together, each of which is given the whole.
        measuring: False leaves the measures and ``texts`` out: nothing but answers is found.

    Raises:
        LiquidError: any problem a user can cause.
    """
    given, engine = given or {}, engine or Engine()
    plan = _plan_tasks(given)
    which, tokenizer = given.get("which"), given.get("tokenizer")
    plain = plain_config(given)
    token, device = read_token(plain.teacher), torch.device(choose_device(plain.device).value)
    # What is fetched lies in a folder of the host, and is the same for all of its processes.
    opened = engine.host_first(
        lambda: [open_student(one, which=which, tokenizer=tokenizer, token=token) for one in students]
    )
    if which is not None and not any(one.is_run for one in opened):
        raise UsageError("--which chooses from run directories, and no student is one", got=", ".join(students))
    config = evaluation_config(given, opened)
    entries = engine.host_first(lambda: _find_entries(given, config.data))
    judgement = engine.together(lambda: judge_on(config, opened, entries, device, token, engine))
    with closing(judgement.teachers.router):
        told = given.get("answers"), given.get("answer_tokens") or MAX_NEW_TOKENS, token
        found = _judge(opened, judgement, device, engine, *told, measuring=measuring)
    if plan is None:
        return found
    own = {number: _run_tasks(plan, opened[number], judgement) for number in deal(range(len(opened)), engine)}
    tasks = {number: results for part in engine.collect(own) for number, results in part.items()}
    return [replace(one, tasks=tasks[number]) for number, one in enumerate(found)]


def compare_with_first(found: Sequence[Evaluation]) -> list[Evaluation]:
    """The same, with the paired differences of all but the first from it, as a study judges them."""
    first, *others = found
    compared = [first]
    for one in others:
        remarks: list[str] = []
        pair = ({"texts": one.texts, "answers": one.answers}, {"texts": first.texts, "answers": first.answers})
        verdicts = [
            {"type": type, **compare(*sums, measure, of_students=True).as_dict()}
            for type, measure, sums in pair_evaluations([pair], f"{one.student} and {first.student}", remarks)
        ]
        told = {"with": first.student, "verdicts": verdicts, "remarks": list(dict.fromkeys(remarks))}
        compared.append(replace(one, compared=told))
    return compared


def _find_entries(given: Mapping[str, Any], data: DataConfig) -> Sequence[ManifestEntry]:
    return records_entries(str(given["records"])) if given.get("records") else find_run_data(data).entries


def check_evaluation(run: RunConfig, given: Mapping[str, Any]) -> None:
    """Refuse what an evaluation of a run will refuse, before that run is begun: its texts are read, as the run will.

    Args:
        given: as for ``evaluate_students``.

    Raises:
        LiquidError: as ``evaluate_students``; no text is held out, or nothing in it can be marked where answers are
            asked for.
    """
    config = planned_evaluation(given, run)
    token = read_token(plain_config(given).teacher)
    text = choose_tokenizer(run, begin(run), token).learn(config.data, token)
    inputs, _ = hold_out(config, text, token, _find_entries(given, config.data))
    choose_questions(inputs, text.tokenizer, given.get("answers"))


def _plan_tasks(given: Mapping[str, Any]) -> TaskPlan | None:
    """The benchmarks that are asked for, found out to be there before anything is opened."""
    names = [one.strip() for one in str(given.get("tasks") or "").split(",")]
    if not any(names):
        return None
    told = {"limit": given.get("task_limit"), "num_fewshot": given.get("task_fewshot")}
    return plan_tasks([one for one in names if one], **told)


def _run_tasks(plan: TaskPlan, student: OpenedStudent, on: Judgement) -> dict[str, Any]:
    log.info("lm-eval: %s on %s", ", ".join(plan.names), student.name)
    tokenizer = student.tokenizer if student.text is None else student.text.student_tokenizer()
    device = next(student.model.parameters()).device.type
    dtype = torch_dtype(choose_dtype(on.config.student.precision, device).value)
    return run_tasks(plan, student.model, tokenizer, dtype=dtype)


def _judge(
    opened: Sequence[OpenedStudent],
    on: Judgement,
    device: torch.device,
    engine: Engine,
    num_answers: int | None,
    answer_tokens: int,
    token: str | None,
    *,
    measuring: bool,
) -> list[Evaluation]:
    dtype = choose_dtype(on.config.student.precision, device.type)
    log.info("students in %s: %s", dtype.value, dtype.reason)
    students = [Student(one.model.to(device), torch_dtype(dtype.value)) for one in opened]
    engine.together(lambda: require_same_students(opened, engine))
    questions = choose_questions(on.inputs, on.text.tokenizer, num_answers)  # before the measures, which may take long
    found = _measure(students, on, engine) if measuring else [None] * len(students)
    models = [one.model for one in students]
    told = torch_dtype(dtype.value), questions, answer_tokens, token
    answers, of_teacher = answer_all(on, models, *told, engine=engine)
    return [
        Evaluation(
            student=one.name,
            teacher={type: name for type, name in on.teachers.names.items() if type in on.sets[on.length]},
            measures={**({} if sums is None else summarise(sums, on.length)), **_tallies(answered, of_teacher)},
            texts=[] if sums is None else list_texts(sums[on.length]),
            length=on.length,
            answers=answered,
            teacher_answers=of_teacher,
            about=_describe(one, on, dtype.value),
        )
        for one, sums, answered in zip(opened, found, answers, strict=True)
    ]


def _measure(students: Sequence[Student], on: Judgement, engine: Engine) -> list[dict[int, dict[str, TextSums]]]:
    """The sums of each student, by length and type."""
    each = [batches for by_type in on.sets.values() for batches in by_type.values()]
    total = sum(one.num_tokens for batches in each for one in deal(batches, engine))
    sizes = token_bytes(on.text.tokenizer, max(on.text.vocab_size, *(one.head.vocab_size for one in students)))
    with Stage("evaluate", unit="tokens", total=total) as stage:
        return Judge(on.sets, on.teachers.evaluation, sizes, engine=engine, advance=stage.advance)(students)


def _tallies(answers: Sequence[Mapping[str, Any]], of_teacher: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The answers' part of the measures; nothing without any."""
    told = {"answers": answers, "teacher_answers": of_teacher}
    return {name: tally(rows) for name, rows in told.items() if rows}


def _describe(student: OpenedStudent, on: Judgement, dtype: str) -> dict[str, Any]:
    """What the figures were worked out from."""
    data, read = on.config.data, [entry.plain() for entry in on.inputs.entries]
    return {
        "student": student.description,
        "step": None if student.metadata is None else student.metadata.step,
        "run": student.run if student.is_run else None,
        "parameters": sum(one.numel() for one in student.model.parameters()),
        "dtype": dtype,
        "data": mask_words(read or {"name": data.dataset_name}, process_masker()),
        "val_fraction": data.val_fraction,
        "max_tokens": on.config.evaluation.max_tokens,
        "learn": data.learn,
        "tokenizer_hash": on.text.hash,
        "teachers": on.teachers.identities,
        "version": version("liquid-llm"),
    }


def _as_json(value: object) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=False, ensure_ascii=False, default=str) + "\n").encode()
