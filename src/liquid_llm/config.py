"""What a command is to do, as frozen values; checked in one place that reports every problem at once.

The option table (``options.py``) knows each value's name, meaning and default; this module knows which values belong
together and which combinations cannot work. Precedence: command line, configuration file, checkpoint metadata, default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from liquid_llm.config_checks import capture_problems, parse_schedule, parse_share, run_problems, toolkit_problems
from liquid_llm.errors import UsageError
from liquid_llm.models.lora import LoraSpec
from liquid_llm.options import ANNEAL, AUTO, AUTO_BATCH, CAPTURE, OPTIONS, PREPARE, TRAIN
from liquid_llm.schedules import Constant, Piecewise, Ramp, Schedule, StepSchedules, WarmupCosine
from liquid_llm.sources import SPELLINGS, SourceConfig, default_layout, read_given, spellings

T = TypeVar("T")

BARE = ANNEAL  # whose options name texts and a teacher and nothing else, for a job that trains nothing
NOWHERE = "-"  # for a file that a job needs and its memory does not depend on


@dataclass(frozen=True)
class StudentConfig:
    """``grad_checkpoint``: yes, no, or ``auto`` until it is decided by what fits; ``compile``: or by what gains."""

    spec: str
    resume_uri: str | None
    rope_scale: float | None
    grad_checkpoint: bool | str
    precision: str
    compile: bool | str
    shard: str
    lora_rank: int
    lora_alpha: float | None
    lora_target_modules: str

    @property
    def is_dealt_out(self) -> bool:
        """Whether each of several processes holds a part of the student alone."""
        return self.shard == "full"

    @property
    def lora(self) -> LoraSpec | None:
        """The adapter that is trained; None where all of the student is."""
        if not self.lora_rank:
            return None
        return LoraSpec(self.lora_rank, self.lora_alpha or 2.0 * self.lora_rank, self.lora_target_modules)


@dataclass(frozen=True)
class TeacherConfig:
    precision: str
    ranks: int
    token_file: str | None
    token_uri: str | None
    token_secret: str | None
    online_id: str | None
    stored_id: str | None
    hybrid: bool
    hybrid_strict: bool
    mode: str
    fa_wheel_uri: str | None
    fa_wheel_sha256: str | None
    shard: str
    stream: bool
    quantize: str

    @property
    def is_dealt_out(self) -> bool:
        """Whether each of several processes holds a part of an online teacher alone."""
        return self.shard == "full"

    @property
    def quantisation(self) -> str | None:
        """What is done to the weights of a teacher that is opened here; None: nothing."""
        return None if self.quantize == "none" else self.quantize


@dataclass(frozen=True)
class DataConfig:
    """``batch_size``: ``AUTO_BATCH`` until it is decided by what fits."""

    batch_size: int
    num_workers: int
    cache_dir: str | None
    begin_token: str
    block_size: int
    seq_len: int
    draw_group: int | None
    order: str
    document_mask: bool
    val_fraction: float
    manifest: str | None
    dataset_name: str | None
    dataset_config: str | None
    learn: str
    chat_template: str | None
    prepare: str
    datasets_yaml: str | None
    toolkit_uri: str | None
    toolkit_sha256: str | None
    toolkit_dir: str | None
    toolkit_timeout_seconds: int


@dataclass(frozen=True)
class ObjectiveConfig:
    temperature: float
    alpha: float
    alpha_schedule: str | None
    temp_schedule: str | None
    alpha_start: float
    alpha_end: float
    anneal_share: float
    gamma: float
    gamma_fade_step: int
    divergence: str
    distilled_share: float


@dataclass(frozen=True)
class OptimizerConfig:
    kind: str
    steps: int
    grad_accum: int
    lr: float
    lr_peak: float | None
    warmup_steps: int
    weight_decay: float
    betas: tuple[float, ...]
    grad_clip: float
    reset: bool
    reset_on_context_change: bool
    tokens_per_step: int | None
    skip_bad_steps: int

    @property
    def peak(self) -> float:
        """The learning rate reached at the end of warm-up."""
        return self.lr if self.lr_peak is None else self.lr_peak


@dataclass(frozen=True)
class EvaluationConfig:
    """``teacher``: whether it is asked in evaluation, or ``auto``."""

    every_steps: int
    context_lengths: tuple[int, ...]
    max_tokens: int
    measures: bool
    teacher: bool | str
    answers: int
    answer_tokens: int
    sample_prompts: str | None
    sample_tokens: int


@dataclass(frozen=True)
class OutputConfig:
    uri: str | None
    workdir: str | None
    restart: bool
    accept_changes: bool
    save_every_steps: int
    save_every_minutes: float
    keep_last: int
    metrics_every_steps: int
    upload_every_seconds: float
    tensorboard_uri: str | None
    model_uri: str | None
    trackers: tuple[str, ...]
    run_id: str | None


@dataclass(frozen=True)
class Sources:
    """How each type of text is taught: ``named`` types, and the teacher of any other."""

    named: Mapping[str, SourceConfig]
    other_teacher: str | None = None

    def __call__(self, type: str) -> SourceConfig:
        return self.named.get(type) or SourceConfig(self.other_teacher, default_layout(type))

    @property
    def online(self) -> list[str]:
        """The models that are asked while training."""
        every = [*self.named.values(), SourceConfig(self.other_teacher)]
        return list(dict.fromkeys(one.online for one in every if one.online is not None))

    @property
    def stores(self) -> list[str]:
        """The stores that signal is read from, or captured into."""
        return list(dict.fromkeys(one.store for one in self.named.values() if one.store is not None))


@dataclass(frozen=True)
class RunConfig:
    """One training job.

    Attributes:
        face: the command it was asked for with, for messages and checkpoints; what differs between the two is below.
        continues_resumed: what is resumed goes on: optimizer, schedules and step, and its options rank before defaults.
        below_output: the run has a folder of its own, by its name, in the output.
        source: how each type of text is taught.
        given: option name -> value, as a person set them.
    """

    face: str
    continues_resumed: bool
    below_output: bool
    seed: int
    device: str
    deterministic: bool
    dry_run: bool
    price_per_hour: float | None
    student: StudentConfig
    teacher: TeacherConfig
    data: DataConfig
    objective: ObjectiveConfig
    optimizer: OptimizerConfig
    evaluation: EvaluationConfig
    output: OutputConfig
    source: Sources
    given: Mapping[str, object]

    @property
    def teacher_option(self) -> str:
        """The option of the command that names its online teacher, for messages."""
        return "teacher_name" if self.face == ANNEAL else "lm_teacher_id"

    @property
    def steps_option(self) -> str:
        """The option of the command that says how many steps a run has, for messages."""
        return "train_steps" if self.face == ANNEAL else "max_steps"

    def asks_teacher(self, type: str) -> bool:
        """Whether the teacher of ``type`` is asked at all: its KD term weighs something at some step, or evaluation
        asks for it. One that is not is never loaded."""
        return self.weighs(type) or self.evaluation.teacher is True

    def weighs(self, type: str) -> bool:
        """Whether the KD term of ``type`` weighs something at some step."""
        own = self.source.named[type].alpha if type in self.source.named else None
        return self._weighs if own is None else own > 0

    @property
    def asked_online(self) -> list[str]:
        """The models that are asked, of those that are named."""
        named = [one.online for type, one in self.source.named.items() if self.asks_teacher(type)]
        other = self._weighs or self.evaluation.teacher is True
        named += [SourceConfig(self.source.other_teacher).online] * other
        return list(dict.fromkeys(one for one in named if one is not None))

    @property
    def _weighs(self) -> bool:
        """Whether the run's own alpha is above 0 at some step."""
        objective = self.objective
        if self.face == TRAIN:
            return objective.alpha_end > 0 or (objective.alpha_start > 0 and objective.anneal_share > 0)
        entries = dict(parse_schedule(objective.alpha_schedule, "--alpha_schedule", 1.0))
        return any(level > 0 for level in {0: objective.alpha, **entries}.values())

    @property
    def longest_context(self) -> int:
        """Tokens of the longest row that is trained or evaluated on."""
        return max(self.data.block_size, *self.evaluation.context_lengths, 0)


@dataclass(frozen=True)
class StoreConfig:
    format: str | None
    codec: str
    codec_options: str | None
    topk: int | None
    overwrite: bool
    distilled_share: float
    held_out_tokens: int
    unit: str | None
    keep_tokens: bool

    @property
    def layout(self) -> str | None:
        """How the records are to lie; None: as they do, or as is usual."""
        return self.format or (None if self.unit is None else "units")

    @property
    def share(self) -> tuple[int, int] | None:
        """Which units are this task's: index and count; None: nobody says."""
        return None if self.unit is None else parse_share(self.unit)

    @property
    def positions(self) -> float | None:
        """The share of the positions that is kept; None: all."""
        return None if self.distilled_share == 1.0 else self.distilled_share


@dataclass(frozen=True)
class ServedConfig:
    """A teacher behind a server; ``url`` is None where there is none."""

    url: str | None
    model: str | None
    words: str | None
    requests: int
    states_dir: str | None

    @property
    def tells_states(self) -> bool:
        """Whether any codec can be had: of a teacher here, or of hidden states."""
        return self.url is None or self.states_dir is not None


@dataclass(frozen=True)
class CaptureConfig:
    """One capture job (Stage A). ``given``: option name -> value, as a person set them."""

    seed: int
    device: str
    teacher: TeacherConfig
    served: ServedConfig
    data: DataConfig
    store: StoreConfig
    source: Sources
    given: Mapping[str, object]


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


def build_run_config(
    face: str, given: Mapping[str, object], inherited: Mapping[str, object] | None = None
) -> RunConfig:
    """The configuration of a training face.

    Args:
        face: ``anneal`` or ``train``.
        given: option name -> value, as a person set them.
        inherited: the same, as a checkpoint stands for them; behind ``given``, before the defaults. None while it is
            not known whether there is a checkpoint: what it may yet say is not compared with what is given.

    Raises:
        UsageError: every problem found, one a line.
    """
    values = _by_group(face, {**(inherited or {}), **given})
    data = values["data"]
    if data["batch_size"] == AUTO:
        data["batch_size"] = AUTO_BATCH
    data["seq_len"] = data["seq_len"] or data["block_size"]
    teacher = _make(TeacherConfig, values["teacher"])
    config = RunConfig(
        face=face,
        continues_resumed=face == ANNEAL,
        below_output=face == TRAIN,
        student=_make(StudentConfig, values["student"]),
        teacher=teacher,
        data=_make(DataConfig, data),
        objective=_make(ObjectiveConfig, values["objective"]),
        optimizer=_make(OptimizerConfig, values["optimizer"]),
        evaluation=_make(EvaluationConfig, values["evaluation"]),
        output=_make(OutputConfig, values["output"]),
        source=_build_sources(given, teacher),
        given=dict(given),
        **values["run"],
    )
    _raise_all(run_problems(config, block_size_known="block_size" in given or inherited is not None))
    return config


def inherit(config: RunConfig, options: Mapping[str, object]) -> RunConfig:
    """The configuration with a checkpoint's options, name -> value, where a person gave none."""
    return build_run_config(config.face, config.given, options)


def build_capture_config(given: Mapping[str, object]) -> CaptureConfig:
    """The configuration of the capture face.

    Raises:
        UsageError: every problem found, one a line.
    """
    values = _by_group(CAPTURE, given)
    data = values["data"]
    teacher = _make(TeacherConfig, values["teacher"])
    config = CaptureConfig(
        seed=values["run"]["seed"],
        device=values["run"]["device"],
        teacher=teacher,
        served=_make(ServedConfig, values["served"]),
        data=_make(DataConfig, {**data, "block_size": data["seq_len"]}),
        store=_make(StoreConfig, values["store"]),
        source=_build_sources(given, teacher),
        given=dict(given),
    )
    _raise_all(capture_problems(config))
    return config if config.served.tells_states else dataclasses.replace(config, store=_told_store(config))


def _told_store(config: CaptureConfig) -> StoreConfig:
    """How a server's log-probabilities are stored: with the one codec that they suffice for, and nothing for
    evaluation, which needs more."""
    settings = [word for word in (config.store.codec_options or "").split(",") if word]
    if not any(word.partition("=")[0].strip() == "temperature" for word in settings):
        settings.append("temperature=1")
    return dataclasses.replace(config.store, codec="topk", codec_options=",".join(settings), held_out_tokens=0)


def build_config_to_measure(face: str, given: Mapping[str, object]) -> RunConfig | CaptureConfig:
    """The configuration of a job that is not going to be run: files and folders that it needs may be left out.

    Raises:
        UsageError: every other problem found, one a line.
    """
    if face == CAPTURE:
        named = any(given.get(name) for name in (*SPELLINGS, "sources"))
        needed = [*([] if given.get("dataset_name") else ["dataset_manifest"]), *([] if named else SPELLINGS)]
    else:
        named = face == ANNEAL and not given.get("dataset_manifest")
        needed = ["dataset_name" if named else "dataset_manifest"]
        needed += ["resume_gcs_uri"] if given.get("keep_old_logit_l2") else []
    options = {**dict.fromkeys(needed, NOWHERE), **given}
    return build_capture_config(options) if face == CAPTURE else build_run_config(face, options)


def build_prepare_config(given: Mapping[str, object]) -> PrepareConfig:
    """The configuration of a data preparation.

    Raises:
        UsageError: every problem found, one a line.
    """
    config = _make(PrepareConfig, _by_group(PREPARE, given)["data"])
    missing = [] if config.datasets_yaml else ["--datasets_yaml is missing: name the file that lists the datasets"]
    _raise_all(missing + toolkit_problems(config))
    return config


def _build_sources(given: Mapping[str, object], teacher: TeacherConfig) -> Sources:
    """What each type is taught by.

    In a hybrid run lm is scored by the online teacher and the reference options name the other two types' stores;
    without, everything is scored online, or (``--teacher_mode=precomputed``) what has a store is read from it.

    Raises:
        UsageError: one type's teacher is named twice, differently.
    """
    online = f"online:{teacher.online_id}" if teacher.online_id is not None else None
    stored = {type: f"store:{given[option]}" for option, type in SPELLINGS.items() if given.get(option) is not None}
    if teacher.mode == "online" and not teacher.hybrid:
        spelled, other = {}, online
    else:
        spelled, other = ({"lm": online} if teacher.hybrid and online else {}) | stored, None
    read = read_given(given)
    twice = [
        f"--{option} and --signal {type}=... name different teachers for {type}: leave one out"
        for option, type in spellings({"hybrid": teacher.hybrid}).items()
        if type in spelled and read.get(type, {}).get("teacher", spelled[type]) != spelled[type]
    ]
    _raise_all(twice)
    return Sources(
        {
            type: _source(type, {"teacher": spelled.get(type, other), **read.get(type, {})})
            for type in [*spelled, *(type for type in read if type not in spelled)]
        },
        other,
    )


def _source(type: str, values: Mapping[str, Any]) -> SourceConfig:
    return SourceConfig(**{"layout": default_layout(type, values["teacher"]), **values})


def _by_group(face: str, given: Mapping[str, object]) -> dict[str, dict[str, Any]]:
    """group -> field -> value, of every option there is: one that the command does not take has its default."""
    values: dict[str, dict[str, Any]] = {}
    for option in sorted(OPTIONS, key=lambda one: face in one.faces):  # of two that set one field, the command's own
        if option.kind != "sources":
            values.setdefault(option.group, {})[option.field] = given.get(option.name, option.default_for(face))
    return values


def _make(cls: type[T], values: Mapping[str, Any]) -> T:
    return cls(**{one.name: values[one.name] for one in dataclasses.fields(cls)})  # type: ignore[arg-type]


def _raise_all(problems: list[str]) -> None:
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UsageError(f"{count} in the options:" + "".join(f"\n  - {line}" for line in problems))


def build_schedules(config: RunConfig) -> StepSchedules:
    """What changes from step to step, with what the sources have for themselves."""
    objective, optimizer = config.objective, config.optimizer
    if config.face == ANNEAL:
        alpha: Schedule = Piecewise(objective.alpha, parse_schedule(objective.alpha_schedule, "--alpha_schedule", 1.0))
        temperature: Schedule = Piecewise(
            objective.temperature, parse_schedule(objective.temp_schedule, "--temp_schedule", None)
        )
        gamma: Schedule = Constant(0.0)
    else:
        alpha = Ramp(objective.alpha_start, objective.alpha_end, _anneal_steps(config))
        temperature = Constant(objective.temperature)
        gamma = Ramp(objective.gamma, 0.0, objective.gamma_fade_step)
    return StepSchedules(
        alpha,
        temperature,
        gamma,
        WarmupCosine(optimizer.peak, optimizer.warmup_steps, optimizer.steps),
        objective.divergence,
        {type: source.objective for type, source in config.source.named.items()},
    )


def _anneal_steps(config: RunConfig) -> int:
    """Steps over which alpha changes."""
    share = config.objective.anneal_share
    # Step 0 begins where the ramp does, however short the run.
    return max(1, round(share * config.optimizer.steps)) if share > 0 else 0


def schedule_remarks(config: RunConfig, first_step: int) -> list[str]:
    """What of the schedules has no effect from ``first_step`` to the end, in words; allowed, but seldom meant."""
    objective, steps = config.objective, config.optimizer.steps
    remarks = []
    for level, name, value, text in (
        ("alpha", "alpha_schedule", objective.alpha, objective.alpha_schedule),
        ("T", "temp_schedule", objective.temperature, objective.temp_schedule),
    ):
        entries = parse_schedule(text, f"--{name}", None) if text is not None else ()
        late = [f"{step}:{entry:g}" for step, entry in entries if step >= steps]
        if late:
            remarks.append(f"--{name} has entries that are never reached with --train_steps={steps}: {', '.join(late)}")
        begun = [entry for step, entry in entries if step <= first_step]
        if begun and level in config.given and name in config.given and begun[-1] != value:
            remarks.append(f"--{level}={value:g} is never used: --{name} says {begun[-1]:g} from the first step on")
    if "kd_alpha_start" in config.given and "kd_alpha_end" not in config.given:
        first, last, over = objective.alpha_start, objective.alpha_end, _anneal_steps(config)
        if first < last:
            how = f"rises to {last:g} over the first {over:,} steps and stays" if over else f"is {last:g} at all steps"
            given = f"--kd_alpha_start={first:g} alone"
            remarks.append(f"{given}: the KD weight {how}, as --kd_alpha_end has it by default; give that too")
    warmup = config.optimizer.warmup_steps
    if first_step < steps < warmup:
        default = "" if "warmup_steps" in config.given else " (by default)"
        remarks.append(
            f"--warmup_steps={warmup}{default} reaches past the {steps} steps of this run: its learning rate never "
            f"gets to {config.optimizer.peak:g}; give fewer"
        )
    return remarks


def as_plain(config: RunConfig | CaptureConfig) -> dict[str, Any]:
    """The configuration as nested plain values, for provenance."""
    plain = dataclasses.asdict(config)
    plain["given"] = sorted(plain["given"])
    return plain
