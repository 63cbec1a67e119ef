"""The teachers of a run: what each type's source names, built once and looked at before the first step."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from liquid_llm.config import RunConfig, TeacherConfig
from liquid_llm.config_checks import parse_schedule
from liquid_llm.distributed_link import TrainingLink
from liquid_llm.errors import UsageError
from liquid_llm.flash_attention import provide
from liquid_llm.losses.divergences import check_form, get_divergence
from liquid_llm.models.heads import check_documents
from liquid_llm.models.loading import LoadedModel, open_config
from liquid_llm.models.positions import configured_positions
from liquid_llm.models.quantised import check_own
from liquid_llm.models.sources import PACKAGE_PREFIX, resolve, spell_package
from liquid_llm.registry import TEACHERS, load
from liquid_llm.runtime import Choice, choose_attention, choose_device
from liquid_llm.sources import NONE, SPELLINGS, WINDOWS
from liquid_llm.streams import has_streams
from liquid_llm.teachers import online
from liquid_llm.teachers.remote import RemoteTeacher
from liquid_llm.teachers.router import TeacherRouter
from liquid_llm.teachers.stored import StoredTeacher
from liquid_llm.teachers.teacher import Coverage, Teacher, TeacherSetup
from liquid_llm.wiring.inputs import Inputs
from liquid_llm.wiring.places import cache_dir
from liquid_llm.wiring.tokenizers import TextTools

log = logging.getLogger(__name__)

LOW_COVERAGE = 0.9  # below it the run says so

ONLINE = "online:"


@dataclass(frozen=True)
class RunTeachers:
    """What gives a run its teacher signal.

    Attributes:
        router: the teacher of each type; empty for plain cross-entropy.
        coverage: what stored signal there is by type, for provenance.
        identities: what each teacher is, for provenance.
        judges: type -> what is asked in its teacher's place in evaluation: a store's records of held-out samples.
    """

    router: TeacherRouter
    coverage: dict[str, Coverage]
    identities: dict[str, Any]
    judges: Mapping[str, Teacher] = field(default_factory=dict)

    @property
    def evaluation(self) -> TeacherRouter:
        """The teacher of each type in evaluation."""
        return TeacherRouter({**self.router, **self.judges})

    @property
    def names(self) -> dict[str, str]:
        """Type -> which model its signal is of, as far as its teacher tells."""
        told = {key: one.get("id") or one.get("teacher_id") for key, one in self.identities.items()}
        return {
            type: str(name) for key, name in told.items() if name for type in self.identities[key].get("types", [key])
        }

    @property
    def taught(self) -> dict[str, dict[str, Any]]:
        """Type -> what its signal is of, as plain values: model, its content, codec of what is stored."""
        return {
            type: {
                "teacher": one.get("id") or one.get("teacher_id"),
                "revision": one.get("revision") or one.get("teacher_revision"),
                **({"quantisation": one["quantisation"]} if one.get("quantisation") else {}),
                "codec": one.get("codec"),
                "codec_options": one.get("codec_options"),
            }
            for key, one in self.identities.items()
            for type in one.get("types", [key])
        }

    @property
    def models(self) -> list[nn.Module]:
        """What teachers hold on the device."""
        return [teacher.model for teacher in dict.fromkeys(self.router.values()) if teacher.model is not None]

    @property
    def head_bytes(self) -> int:
        """What the output heads of teachers on ranks of their own take on the device."""
        heads = [one.head.weight for one in dict.fromkeys(self.router.values()) if isinstance(one, RemoteTeacher)]
        return sum(weight.nbytes for weight in heads)

    @property
    def choices(self) -> dict[str, Choice]:
        """Arithmetic and attention of the online teacher, each with its reason."""
        return {name: choice for teacher in self.router.values() for name, choice in teacher.choices.items()}


def load_online(
    model_id: str, teacher: TeacherConfig, device: torch.device, token: str | None
) -> tuple[LoadedModel, dict[str, Choice]]:
    """A teacher in inference mode, and the choices made for it."""
    attention = partial(choose_attention_of, teacher)
    return online.load_online(model_id, teacher.precision, device, attention, token, quantise=teacher.quantisation)


def choose_attention_of(teacher: TeacherConfig, device: torch.device, dtype: str) -> Choice:
    """The attention of a teacher; where a FlashAttention wheel was named and cannot be used, the reason says why."""
    if teacher.fa_wheel_uri is None:
        return choose_attention(device, dtype=dtype)
    obstacle = provide(teacher.fa_wheel_uri, teacher.fa_wheel_sha256, cache_dir() / "wheels")
    choice = choose_attention(device, dtype=dtype)
    return choice if obstacle is None else Choice(choice.value, f"--fa_wheel_gcs is not used: {obstacle}")


def check_teachers(config: RunConfig, token: str | None) -> None:
    """Refuse an online teacher that is not there or cannot see so long a context, from its configuration alone; ranks
    for one where none is asked, and a stream for one where the device has none.

    Raises:
        LiquidError: as ``make_teachers``, which comes after the data and loads the weights.
    """
    if config.teacher.ranks and not config.asked_online:
        raise _nothing_to_hold(config)
    device = torch.device(choose_device(config.device).value)
    if config.teacher.stream and not has_streams(device):
        raise no_stream(f"{device.type} does one thing after another")
    for model_id in config.asked_online:
        source = resolve(model_id, token=token)
        if source.gguf_file is not None:
            continue  # a packed file's configuration takes seconds to read
        found = open_config(source, model_id, token)
        check_own(found, model_id, device, config.teacher.quantisation)
        limit = configured_positions(found)
        longest = config.longest_context
        block = config.data.block_size
        lengths = ",".join(map(str, config.evaluation.context_lengths))
        where = f"--block_size={block}" if longest == block else f"--eval_ctx_lens={lengths}"
        online.require_context(limit, longest, model_id, where)


def check_quantised(model_id: str, teacher: TeacherConfig, device: Choice, token: str | None) -> None:
    """Refuse a teacher that comes quantised and cannot be opened here, from its configuration alone.

    Raises:
        LiquidError: as ``load_online``, which comes after the data.
    """
    source = resolve(model_id, token=token)
    if source.gguf_file is None:
        check_own(open_config(source, model_id, token), model_id, device.value, teacher.quantisation)


def _nothing_to_hold(config: RunConfig) -> UsageError:
    return UsageError(
        "no teacher is asked while training, so that ranks of its own would have nothing to do",
        where=f"--teacher_ranks={config.teacher.ranks}",
        expected="an online teacher of a type that the texts have",
        remedy="leave --teacher_ranks out, or name a teacher (--lm_teacher_id, --teacher_name, --signal TYPE=online:X)",
    )


def no_stream(obstacle: str) -> UsageError:
    """What is told who asks for a stream that there cannot be, or that nothing would stand in."""
    return UsageError(
        "the teacher cannot have a stream of its own", where="--teacher_stream", got=obstacle, remedy="leave it out"
    )


def make_teachers(
    config: RunConfig,
    inputs: Inputs,
    text: TextTools,
    device: torch.device,
    token: str | None,
    link: TrainingLink | None = None,
) -> RunTeachers:
    """Build the teacher of each type that the data has; types that name the same one share it.

    Args:
        link: to the ranks that hold the online ones, where there are such ranks.

    Raises:
        UsageError: a type that needs a teacher names none, or a teacher cannot see so long a context.
        DataError: a whole run would have no stored signal.
        SignalError: a store is missing, empty or of another teacher, tokenizer or vocabulary, or cannot be read at the
            run's temperature.
    """
    setup = TeacherSetup(
        tokenizer=text.tokenizer,
        tokenizer_hash=text.hash,
        vocab_size=text.vocab_size,
        context=config.longest_context,
        device=device,
        cache=cache_dir(),
        precision=config.teacher.precision,
        attention=partial(choose_attention_of, config.teacher),
        token=token,
        strict=config.teacher.hybrid_strict,
        deterministic=config.deterministic,
        dealt_out=config.teacher.is_dealt_out,
        quantise=config.teacher.quantisation,
    )
    specs = _asked_specs(config, inputs.types)
    keys = {type: (spec, _stored_id(config, type)) for type, spec in specs.items()}
    made = {key: _make_or_reach(config, *key, setup, link) for key in dict.fromkeys(keys.values())}
    router = TeacherRouter({type: made[key] for type, key in keys.items()})
    if config.data.document_mask:
        for model in [teacher.model for teacher in made.values() if teacher.model is not None]:
            check_documents(model)
    for type in router:
        for temperature in _temperatures(config, type):
            router.check_temperature(type, temperature)
        check_form(divergence_of(config, type), router[type].form, type, router[type].most_ids)
    _say_untaught(config, inputs.types)
    datasets = {type: [one.dataset for one in inputs.mixture if one.dataset.type == type] for type in router}
    coverage = router.coverage(datasets, config.data.seq_len)
    _say_coverage(config, coverage)
    if config.objective.distilled_share < 1.0 and not router:
        log.warning("--kd_positions changes nothing here: no teacher is asked")
    if config.teacher.quantisation is not None and not any(spec.startswith(ONLINE) for spec in specs.values()):
        log.warning("--teacher_quantize changes nothing here: no online teacher is asked")
    judges = {type: judge for type in router if (judge := _judge(type, router[type], inputs, config)) is not None}
    made_all = RunTeachers(router, coverage, _identities(specs, router), judges)
    for type in router:
        if not made_all.evaluation.answers(type, 1.0):
            log.warning("%s: its teacher cannot be asked at T=1: no val_kd for this type", type)
    return made_all


def _judge(type: str, teacher: Teacher, inputs: Inputs, config: RunConfig) -> Teacher | None:
    """What is asked in evaluation in the place of a store's teacher; None where it has nothing of what is held out."""
    if not isinstance(teacher, StoredTeacher) or teacher.judge is None:
        return None
    window = config.data.seq_len
    held = [one.windows(window) if type in inputs.windowed else one for one in inputs.validation.get(type, [])]
    found = teacher.judge.coverage(held, window)
    if not found.usable:
        return None
    said = "%s: KL from the teacher is measured on %d of %d held-out samples, whose signal is stored nearly whole"
    log.info(said, type, found.listed, found.samples)
    return teacher.judge


def _say_untaught(config: RunConfig, types: Sequence[str]) -> None:
    """Name the types that train on cross-entropy alone though nobody has said so."""
    left = [type for type in types if config.source(type).teacher is None]
    if config.teacher.mode == "precomputed" and not config.teacher.hybrid:
        for type in left:
            log.warning("%s: no store is named (--signal %s=URI): plain cross-entropy", type, type)
    elif any(teacher_spec(config, type) != NONE for type in types):  # else it is said of all together
        for type in [one for one in left if teacher_spec(config, one) == NONE]:
            named = f"--{config.teacher_option}=MODEL or --signal {type}=..."
            log.warning("%s: no teacher is named (%s): plain cross-entropy", type, named)


def _say_coverage(config: RunConfig, coverage: Mapping[str, Coverage]) -> None:
    """Say what stored signal there is, and where there is too little of it."""
    for type, row in coverage.items():
        log.info(
            "stored signal for %s: %d of %d samples have a record, %d of %d looked at are usable",
            type,
            row.listed,
            row.samples,
            row.usable,
            row.checked,
        )
        if config.source(type).layout == WINDOWS and row.listed < row.samples:
            log.warning(
                "%s: %d windows of documents have no record and train on cross-entropy; a record is of a window as its "
                "capture cut it, which may be of another length than --seq_len=%d (by default the block size)",
                type,
                row.samples - row.listed,
                config.data.seq_len,
            )
        elif remark := _low_coverage(config, type, row):
            log.warning("%s", remark)


def _low_coverage(config: RunConfig, type: str, row: Coverage) -> str:
    """What it means that few samples of a type have a usable record; "" where enough have."""
    share = row.listed / row.samples * (row.usable / row.checked) if row.samples and row.checked else 0.0
    if share >= LOW_COVERAGE:
        return ""
    told = f"{type}: about {share:.0%} of its samples have usable signal, and the others train on cross-entropy"
    if config.teacher.hybrid_strict and config.data.batch_size:
        of_batches = share**config.data.batch_size
        told += f"; with --hybrid_strict about {of_batches:.1%} of its micro-batches are distilled"
    return f"{told}; liquid capture stores what is missing"


def _asked_specs(config: RunConfig, types: Sequence[str]) -> dict[str, str]:
    """What names the teacher of each type that has one which is asked; says of which others there is none."""
    named = {type: spec for type in types if (spec := teacher_spec(config, type)) != NONE}
    if not named:
        log.warning("no teacher is named: plain cross-entropy")
    asked = {type: spec for type, spec in named.items() if config.asks_teacher(type)}
    if len(asked) < len(named):
        said = (
            "%s: the teacher is not asked, as its weight is 0 at every step (in evaluation it is with --eval_teacher)"
        )
        log.info(said, ", ".join(type for type in named if type not in asked))
    if config.teacher.ranks and not any(spec.startswith(ONLINE) for spec in asked.values()):
        raise _nothing_to_hold(config)
    return asked


def _stored_id(config: RunConfig, type: str) -> str | None:
    """What a store of the type must call its teacher, None for any. lm has an option of its own for whom to ask."""
    if teacher_spec(config, type).startswith(ONLINE):
        return None  # no store is read: types that ask one model share it
    if type != "lm":
        return name_in_store(config.teacher.stored_id)
    return name_in_store(config.teacher.online_id) if config.teacher.mode == "precomputed" else None


def _make_or_reach(
    config: RunConfig, spec: str, stored_id: str | None, setup: TeacherSetup, link: TrainingLink | None
) -> Teacher:
    """A teacher that is made here, or an online one that ranks of its own hold."""
    if link is None or not spec.startswith(ONLINE):
        return make_teacher(spec, replace(setup, stored_id=stored_id))
    wanted = {"vocab_size": setup.vocab_size, "context": setup.context, "documents": config.data.document_mask}
    teacher = RemoteTeacher(link, spec, setup.device, wanted)
    choices = [f"{name} {choice.value} ({choice.reason})" for name, choice in teacher.choices.items()]
    count = link.teacher_ranks
    where = "a process of its own" if count == 1 else f"{count} processes of its own"
    log.info("teacher %s on %s: %s", spec.partition(":")[2], where, ", ".join(choices))
    return teacher


def make_teacher(spec: str, setup: TeacherSetup) -> Teacher:
    """The teacher that ``spec`` names, ``KIND:REST``.

    Raises:
        UsageError: there is no such kind.
        LiquidError: whatever its maker finds wrong.
    """
    name, _, rest = spec.partition(":")
    if name not in TEACHERS:
        raise UsageError(
            "unknown kind of teacher", got=repr(spec), expected=" or ".join(f"{one}:..." for one in TEACHERS)
        )
    teacher: Teacher = load(TEACHERS, name)(rest, setup)
    return teacher


def divergence_of(config: RunConfig, type: str) -> str:
    """The divergence that texts of ``type`` are distilled by, a spec."""
    return config.source(type).divergence or config.objective.divergence


def _temperatures(config: RunConfig, type: str) -> set[float]:
    """Those that the teacher of ``type`` is asked at in the course of the run."""
    if get_divergence(divergence_of(config, type)).tempers:
        return {1.0}
    own = config.source(type).temperature
    if own is not None:
        return {own}
    scheduled = dict(parse_schedule(config.objective.temp_schedule, "--temp_schedule", None))
    return {*scheduled.values(), scheduled.get(0, config.objective.temperature)}


def _identities(specs: Mapping[str, str], router: TeacherRouter) -> dict[str, Any]:
    """What each teacher is: a store under its type, any other under its kind with the types it answers for."""
    found: dict[str, Any] = {}
    for type, spec in specs.items():
        name = spec.partition(":")[0]
        if name == "store":
            found[type] = router[type].describe()
            continue
        if name in found and found[name]["spec"] != spec:
            name = spec
        entry = found.setdefault(name, {**router[type].describe(), "spec": spec, "types": []})
        entry["types"].append(type)
    return found


def teacher_spec(config: RunConfig, type: str) -> str:
    """What names the teacher of ``type``; a type beside plain text is not left without one in silence."""
    spec = config.source(type).teacher
    if spec is not None:
        return spec
    if type == "lm" or (config.teacher.mode == "online" and not config.teacher.hybrid):
        return NONE
    own = [f"--{option}=URI" for option, of in SPELLINGS.items() if of == type]
    raise UsageError(
        f"the manifest has {type} samples but nothing names their signal",
        where=" or ".join([*own, f"--signal {type}=URI"]),
        remedy=f"name its teacher with --signal {type}=online:MODEL, name the folder of a capture, ask one teacher for "
        f"all with --hybrid=false --teacher_mode=online, or say --signal {type}=none for plain cross-entropy",
    )


def name_in_store(model_id: str | None) -> str | None:
    """What a store calls the teacher named by an option; a hub is not asked, for the teacher itself is not needed."""
    if model_id is None:
        return None
    if model_id.startswith(PACKAGE_PREFIX):
        return spell_package(model_id)
    return resolve(model_id).id if Path(model_id).expanduser().exists() else model_id.partition("@")[0]
