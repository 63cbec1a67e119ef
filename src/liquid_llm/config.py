"""What a command is to do, as frozen values; checked in one place that reports every problem at once.

The option table (``options.py``) knows each value's name, meaning and default; this module knows which values belong
together and which combinations cannot work. Precedence: command line, configuration file, checkpoint metadata, default.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from liquid_llm.errors import UsageError
from liquid_llm.options import ANNEAL, CAPTURE, PREPARE, TRAIN, options_of
from liquid_llm.schedules import Constant, Piecewise, Ramp, Schedule, parse_piecewise

DEFAULT_BLOCK_SIZE = {ANNEAL: 512, TRAIN: 1024, CAPTURE: 1024}


@dataclass(frozen=True)
class StudentConfig:
    spec: str
    resume_uri: str | None
    rope_scale: float | None
    grad_checkpoint: bool
    precision: str


@dataclass(frozen=True)
class TeacherConfig:
    precision: str
    token_file: str | None
    token_uri: str | None
    token_secret: str | None
    online_id: str | None = None
    stored_id: str | None = None
    hybrid: bool = False
    hybrid_strict: bool = False
    mode: str = "online"
    math_dir: str | None = None
    code_dir: str | None = None
    fa_wheel_uri: str | None = None
    fa_wheel_sha256: str | None = None


@dataclass(frozen=True)
class DataConfig:
    batch_size: int
    num_workers: int
    cache_dir: str | None
    block_size: int = 0
    seq_len: int = 0
    val_fraction: float = 0.0
    manifest: str | None = None
    dataset_name: str | None = None
    dataset_config: str | None = None
    prepare: str = "skip"
    datasets_yaml: str | None = None
    toolkit_uri: str | None = None
    toolkit_sha256: str | None = None
    toolkit_dir: str | None = None
    toolkit_timeout_seconds: int = 3600


@dataclass(frozen=True)
class ObjectiveConfig:
    temperature: float
    alpha: float = 0.5
    alpha_schedule: str | None = None
    temp_schedule: str | None = None
    alpha_start: float = 0.0
    alpha_end: float = 0.0
    anneal_share: float = 0.0
    l2: float = 0.0
    l2_fade_step: int = 1


@dataclass(frozen=True)
class OptimizerConfig:
    steps: int
    grad_accum: int
    lr: float
    lr_peak: float | None
    warmup_steps: int
    weight_decay: float
    betas: tuple[float, ...]
    grad_clip: float
    reset: bool = False
    reset_on_context_change: bool = False

    @property
    def peak(self) -> float:
        """The learning rate reached at the end of warm-up."""
        return self.lr if self.lr_peak is None else self.lr_peak


@dataclass(frozen=True)
class EvaluationConfig:
    every_steps: int
    context_lengths: tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True)
class OutputConfig:
    uri: str | None
    workdir: str | None
    restart: bool
    save_every_steps: int
    save_every_minutes: float
    keep_last: int
    metrics_every_steps: int
    upload_every_seconds: float
    tensorboard_uri: str | None
    model_uri: str | None
    run_id: str | None = None


@dataclass(frozen=True)
class RunConfig:
    """One training job. ``given`` names the options a person set, which win over checkpoint metadata."""

    face: str
    seed: int
    device: str
    deterministic: bool
    dry_run: bool
    student: StudentConfig
    teacher: TeacherConfig
    data: DataConfig
    objective: ObjectiveConfig
    optimizer: OptimizerConfig
    evaluation: EvaluationConfig
    output: OutputConfig
    given: frozenset[str]


@dataclass(frozen=True)
class StoreConfig:
    format: str | None
    codec: str
    codec_options: str | None
    topk: int | None
    overwrite: bool


@dataclass(frozen=True)
class CaptureConfig:
    """One capture job (Stage A)."""

    seed: int
    device: str
    teacher: TeacherConfig
    data: DataConfig
    store: StoreConfig


@dataclass(frozen=True)
class PrepareConfig:
    """One data preparation; see ``DataConfig`` for the names both have. ``only``: comma-separated names, or None."""

    prepare: str
    datasets_yaml: str
    only: str | None
    toolkit_uri: str | None
    toolkit_sha256: str | None
    toolkit_dir: str | None
    toolkit_timeout_seconds: int


def build_run_config(face: str, given: Mapping[str, object], metadata: Mapping[str, object] | None = None) -> RunConfig:
    """The configuration of a training face.

    Args:
        face: ``anneal`` or ``train``.
        given: option name -> value, as a person set them.
        metadata: option name -> value, as checkpoint metadata has them; behind ``given``, before the defaults.

    Raises:
        UsageError: every problem found, one a line.
    """
    values = _by_group(face, {**(metadata or {}), **given})
    block_size = values["data"].pop("block_size") or DEFAULT_BLOCK_SIZE[face]
    seq_len = values["data"].pop("seq_len", None) or block_size
    config = RunConfig(
        face=face,
        given=frozenset(given),
        student=StudentConfig(**values["student"]),
        teacher=TeacherConfig(**values["teacher"]),
        data=DataConfig(block_size=block_size, seq_len=seq_len, **values["data"]),
        objective=ObjectiveConfig(**values["objective"]),
        optimizer=OptimizerConfig(**values["optimizer"]),
        evaluation=EvaluationConfig(**values["evaluation"]),
        output=OutputConfig(**values["output"]),
        **values["run"],
    )
    _raise_all(run_problems(config))
    return config


def build_capture_config(given: Mapping[str, object]) -> CaptureConfig:
    """The configuration of the capture face.

    Raises:
        UsageError: every problem found, one a line.
    """
    values = _by_group(CAPTURE, given)
    data = values["data"]
    block_size = data.pop("block_size", None)
    seq_len = data.pop("seq_len") or block_size or DEFAULT_BLOCK_SIZE[CAPTURE]
    config = CaptureConfig(
        teacher=TeacherConfig(**values["teacher"]),
        data=DataConfig(block_size=seq_len, seq_len=seq_len, **data),
        store=StoreConfig(**values["store"]),
        **values["run"],
    )
    _raise_all(capture_problems(config))
    return config


def build_prepare_config(given: Mapping[str, object]) -> PrepareConfig:
    """The configuration of a data preparation.

    Raises:
        UsageError: every problem found, one a line.
    """
    config = PrepareConfig(**_by_group(PREPARE, given)["data"])
    missing = [] if config.datasets_yaml else ["--datasets_yaml is missing: name the file that lists the datasets"]
    _raise_all(missing + _toolkit_problems(config))
    return config


def _toolkit_problems(data: DataConfig | PrepareConfig) -> list[str]:
    if data.toolkit_uri is not None:
        skipped = data.prepare == "skip"
        return ["--prep_toolkit_zip_uri is never run with --prepare_data=skip: leave one out"] if skipped else []
    given = (("prep_toolkit_sha256", data.toolkit_sha256), ("prep_extract_dir", data.toolkit_dir))
    return [f"--{name} is of no use without --prep_toolkit_zip_uri" for name, value in given if value is not None]


def _by_group(face: str, given: Mapping[str, object]) -> dict[str, dict[str, Any]]:
    values: dict[str, dict[str, Any]] = {}
    for option in options_of(face):
        values.setdefault(option.group, {})[option.field] = given.get(option.name, option.default_for(face))
    return values


def _raise_all(problems: list[str]) -> None:
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UsageError(f"{count} in the options:" + "".join(f"\n  - {line}" for line in problems))


def run_problems(config: RunConfig) -> list[str]:
    """Every combination of values that cannot work, in words."""
    problems: list[str] = []
    data, teacher, objective, optimizer = config.data, config.teacher, config.objective, config.optimizer
    if config.face == ANNEAL and not data.dataset_name:
        problems.append("--dataset_name is missing: name a dataset or a local folder")
    if config.face == TRAIN:
        if not data.manifest:
            problems.append("--dataset_manifest is missing: name a JSONL manifest")
        problems += _teacher_problems(teacher)
        if data.seq_len > data.block_size:
            problems.append(
                f"--seq_len={data.seq_len} is longer than --block_size={data.block_size}: raise --block_size"
            )
        if objective.l2 > 0 and config.student.resume_uri is None:
            problems.append(
                "--keep_old_logit_l2 needs --resume_gcs_uri: without it there are no old logits to stay near"
            )
        if not 0 <= objective.anneal_share <= 1:
            problems.append(f"--kd_anneal_pct must lie between 0 and 1; got {objective.anneal_share}")
        if not 0 <= data.val_fraction < 1:
            problems.append(f"--val_fraction must be at least 0 and below 1; got {data.val_fraction}")
    for name, alpha in (
        ("alpha", objective.alpha),
        ("kd_alpha_start", objective.alpha_start),
        ("kd_alpha_end", objective.alpha_end),
    ):
        if not 0 <= alpha <= 1:
            problems.append(f"--{name} must lie between 0 and 1; got {alpha}")
    if len(optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in optimizer.betas):
        problems.append(f"--betas takes two numbers from 0 to below 1; got {','.join(map(str, optimizer.betas))}")
    if any(length < 2 for length in config.evaluation.context_lengths):
        problems.append(
            f"--eval_ctx_lens takes lengths of at least 2; got {','.join(map(str, config.evaluation.context_lengths))}"
        )
    problems += _collect(lambda: _parsed(objective.alpha_schedule, "--alpha_schedule", 1.0))
    problems += _collect(lambda: _parsed(objective.temp_schedule, "--temp_schedule", None))
    return problems + _token_problems(teacher) + _toolkit_problems(data)


def _teacher_problems(teacher: TeacherConfig) -> list[str]:
    if not teacher.hybrid:
        if teacher.mode == "online" and not teacher.online_id:
            return ["--lm_teacher_id is missing: --hybrid=false with --teacher_mode=online scores everything with it"]
        if teacher.mode == "precomputed" and not (teacher.math_dir or teacher.code_dir):
            return [
                "--math_logits_dir or --code_logits_dir is missing: --teacher_mode=precomputed reads its signal there"
            ]
    return []


def _token_problems(teacher: TeacherConfig) -> list[str]:
    sources = [name for name in ("token_file", "token_uri", "token_secret") if getattr(teacher, name)]
    if len(sources) > 1:
        return ["give one of --hf_token_file, --hf_token_uri and --hf_token_secret, not several"]
    return []


def capture_problems(config: CaptureConfig) -> list[str]:
    """Every combination of values that cannot work, in words."""
    problems = []
    if not config.teacher.stored_id:
        problems.append("--mc_teacher_id is missing: name the teacher to capture")
    if not config.data.manifest:
        problems.append("--dataset_manifest is missing: name a JSONL manifest")
    if not (config.teacher.math_dir or config.teacher.code_dir):
        problems.append("--math_logits_dir and --code_logits_dir are both missing: say where the signal goes")
    return problems + _token_problems(config.teacher) + _toolkit_problems(config.data)


def _collect(parse: Callable[[], object]) -> list[str]:
    try:
        parse()
    except UsageError as error:
        return [str(error).removesuffix(".")]
    return []


def _parsed(text: str | None, option: str, maximum: float | None) -> tuple[tuple[int, float], ...]:
    return parse_piecewise(text, option=option, maximum=maximum) if text is not None else ()


@dataclass(frozen=True)
class Schedules:
    """What changes over a run."""

    alpha: Schedule
    temperature: Schedule
    l2: Schedule


def build_schedules(config: RunConfig) -> Schedules:
    """The schedules of alpha, temperature and the L2 weight."""
    objective = config.objective
    if config.face == ANNEAL:
        return Schedules(
            Piecewise(objective.alpha, _parsed(objective.alpha_schedule, "--alpha_schedule", 1.0)),
            Piecewise(objective.temperature, _parsed(objective.temp_schedule, "--temp_schedule", None)),
            Constant(0.0),
        )
    over_steps = round(objective.anneal_share * config.optimizer.steps)
    return Schedules(
        Ramp(objective.alpha_start, objective.alpha_end, over_steps),
        Constant(objective.temperature),
        Ramp(objective.l2, 0.0, objective.l2_fade_step),
    )


def schedule_remarks(config: RunConfig, first_step: int) -> list[str]:
    """What of the schedules has no effect from ``first_step`` to the end, in words; allowed, but seldom meant."""
    objective, steps = config.objective, config.optimizer.steps
    remarks = []
    for level, name, value, text in (
        ("alpha", "alpha_schedule", objective.alpha, objective.alpha_schedule),
        ("T", "temp_schedule", objective.temperature, objective.temp_schedule),
    ):
        entries = _parsed(text, f"--{name}", None) if text is not None else ()
        late = [f"{step}:{entry:g}" for step, entry in entries if step >= steps]
        if late:
            remarks.append(f"--{name} has entries that are never reached with --train_steps={steps}: {', '.join(late)}")
        begun = [entry for step, entry in entries if step <= first_step]
        if begun and level in config.given and name in config.given and begun[-1] != value:
            remarks.append(f"--{level}={value:g} is never used: --{name} says {begun[-1]:g} from the first step on")
    return remarks


def as_plain(config: RunConfig | CaptureConfig) -> dict[str, Any]:
    """The configuration as nested plain values, for provenance."""
    plain = dataclasses.asdict(config)
    if "given" in plain:
        plain["given"] = sorted(plain["given"])
    return plain


def run_name(config: RunConfig) -> str:
    """A run directory's name that the same command always gets, so that running it again continues the run."""
    plain = as_plain(config)
    for volatile in ("output", "given", "dry_run", "device"):
        plain.pop(volatile)
    if not plain["deterministic"]:  # as it was hashed before there was such an option
        plain.pop("deterministic")
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:10]
    student = config.student.spec.rstrip("/").rsplit("/", 1)[-1]
    return f"{student}-{digest}"
