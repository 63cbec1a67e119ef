"""The teachers of a run: which are built, which signal is read from a store, and that all share one tokenizer."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from liquid_llm.config import RunConfig, TeacherConfig
from liquid_llm.errors import ModelError, UsageError
from liquid_llm.flash_attention import provide
from liquid_llm.models.loading import LoadedModel, load_teacher, load_tokenizer
from liquid_llm.models.positions import max_positions
from liquid_llm.models.sources import PACKAGE_PREFIX, resolve
from liquid_llm.models.student import PRESETS
from liquid_llm.models.tokenizers import end_of_text_id, require_same_tokenizer, tokenizer_hash
from liquid_llm.options import ANNEAL
from liquid_llm.runtime import Choice, choose_attention, choose_dtype, torch_dtype
from liquid_llm.signal_store.shards.remote import ShardCache
from liquid_llm.signal_store.store import StoreReader, open_store
from liquid_llm.teachers.online import OnlineTeacher
from liquid_llm.teachers.router import TeacherRouter
from liquid_llm.wiring.inputs import Inputs, TextTools
from liquid_llm.wiring.places import cache_dir
from liquid_llm.wiring.start import Start

log = logging.getLogger(__name__)

TEACHER_PASS_TOKENS = 8192  # of an online teacher on a GPU
STORE_OPTIONS = {"math_tool": "math_dir", "code": "code_dir"}


@dataclass(frozen=True)
class RunTeachers:
    """What gives a run its teacher signal.

    Attributes:
        router: routes a micro-batch to its teacher; None for plain cross-entropy.
        stores: the signal store of each type that has one.
        online_model: the online teacher's model, or None.
        coverage: stored signal found by type, for provenance.
        identities: what each teacher is, for provenance.
        choices: arithmetic and attention, each with its reason.
    """

    router: TeacherRouter | None
    stores: dict[str, StoreReader] = field(default_factory=dict)
    online_model: Any = None
    coverage: dict[str, Any] = field(default_factory=dict)
    identities: dict[str, Any] = field(default_factory=dict)
    choices: dict[str, Any] = field(default_factory=dict)


def text_tools(tokenizer: Any) -> TextTools:
    """What a run needs of a tokenizer."""
    return TextTools(tokenizer, tokenizer_hash(tokenizer), end_of_text_id(tokenizer), len(tokenizer))


def choose_tokenizer(config: RunConfig, start: Start, token: str | None) -> TextTools:
    """The one tokenizer of a run: the student's own if it came with one, else the online teacher's or the stored one's.

    Raises:
        ModelError: two of them differ (naming both), or none can be found.
    """
    sources: list[tuple[str, str]] = []
    if start.tokenizer_folder is not None:
        sources.append((start.source, start.tokenizer_folder))
    if config.teacher.online_id is not None:
        sources.append((f"online teacher {config.teacher.online_id}", config.teacher.online_id))
    if not sources and config.teacher.stored_id is not None:
        # Otherwise it is not needed here: the store itself says which tokenizer its signal is of.
        sources.append((f"stored teacher {config.teacher.stored_id}", config.teacher.stored_id))
    if not sources:
        if config.student.spec in PRESETS or config.student.spec.endswith(".json"):
            option = "--teacher_name" if config.face == ANNEAL else "--lm_teacher_id"
            raise UsageError(
                "nothing says which tokenizer to use",
                where=f"--student={config.student.spec}",
                got="a shape without a tokenizer, and no teacher",
                remedy=f"give {option}, or a Hugging Face model or folder as --student",
            )
        sources.append((f"--student={config.student.spec}", config.student.spec))
    first_name, first_id = sources[0]
    tokenizer = load_tokenizer(first_id, token=token)
    for name, other in sources[1:]:
        require_same_tokenizer(tokenizer, first_name, load_tokenizer(other, token=token), name)
    text = text_tools(tokenizer)
    known = start.metadata.tokenizer_hash if start.metadata is not None else None
    if known is not None and known != text.hash:
        raise ModelError(
            "the checkpoint was trained with another tokenizer",
            where=start.source,
            got=known[:16],
            expected=f"{text.hash[:16]} of {first_name}",
            remedy="use a teacher with the student's tokenizer",
        )
    return text


def load_online(
    model_id: str, teacher: TeacherConfig, device: torch.device, token: str | None
) -> tuple[LoadedModel, dict[str, Any]]:
    """A teacher in inference mode, and the choices made for it."""
    dtype = choose_dtype(teacher.precision, device.type)
    attention = _attention(teacher, device, dtype.value)
    log.info(
        "teacher %s in %s (%s), attention %s (%s)",
        model_id,
        dtype.value,
        dtype.reason,
        attention.value,
        attention.reason,
    )
    loaded = load_teacher(
        model_id, dtype=torch_dtype(dtype.value), device=device, attention=attention.value, token=token
    )
    return loaded, {"teacher_dtype": dtype, "attention": attention}


def _attention(teacher: TeacherConfig, device: torch.device, dtype: str) -> Choice:
    """The attention of the teacher; where a FlashAttention wheel was named and cannot be used, the reason says why."""
    if teacher.fa_wheel_uri is None:
        return choose_attention(device, dtype=dtype)
    obstacle = provide(teacher.fa_wheel_uri, teacher.fa_wheel_sha256, cache_dir() / "wheels")
    choice = choose_attention(device, dtype=dtype)
    return choice if obstacle is None else Choice(choice.value, f"--fa_wheel_gcs is not used: {obstacle}")


def make_teachers(
    config: RunConfig, inputs: Inputs, text: TextTools, device: torch.device, token: str | None
) -> RunTeachers:
    """Build what the configuration routes to. The online teacher is built only when samples for it are present.

    Raises:
        UsageError: a type that needs a store has no folder named, or a teacher cannot see so long a context.
        DataError: a whole run would have no stored signal.
        SignalError: a store is missing, empty or of another teacher, tokenizer or vocabulary, or cannot be read at the
            run's temperature.
    """
    teacher = config.teacher
    online_types = _online_types(config, inputs)
    stores = _open_stores(config, inputs, text, online_types)
    identities: dict[str, Any] = {kind: store.describe() for kind, store in stores.items()}
    loaded: LoadedModel | None = None
    online: OnlineTeacher | None = None
    choices: dict[str, Any] = {}
    if online_types and teacher.online_id is not None:
        loaded, choices = load_online(teacher.online_id, teacher, device, token)
        _require_context(loaded, config)
        # On a GPU longer passes are no faster, and their activations would be the largest thing beside the weights.
        max_tokens = None if device.type == "cpu" else TEACHER_PASS_TOKENS
        vocab_size = min(text.vocab_size, loaded.model.config.vocab_size)
        online = OnlineTeacher(loaded, vocab_size, max_tokens=max_tokens)
        identities["online"] = {"id": loaded.identity.id, "revision": loaded.identity.revision, "types": online_types}
    if online is None and not stores:
        if teacher.online_id is None:
            log.warning("no teacher is named: plain cross-entropy")
        return RunTeachers(None)
    router = TeacherRouter(
        online, stores, strict=teacher.hybrid_strict, online_types=online_types, merge_repeats=config.deterministic
    )
    router.check_temperatures({config.objective.temperature})
    for kind, store in stores.items():
        if not router.answers(kind, 1.0):
            log.warning("%s: codec %r is not read at T=1: no val_kd for this type", kind, store.codec.name)
    datasets = {kind: [source.dataset for source in inputs.sources if source.dataset.type == kind] for kind in stores}
    coverage = router.coverage(datasets, window=config.data.seq_len)
    for kind, row in coverage.items():
        log.info(
            "stored signal for %s: %d of %d samples have a record, %d of %d looked at are usable",
            kind,
            row.listed,
            row.samples,
            row.usable,
            row.checked,
        )
    return RunTeachers(
        router,
        stores,
        None if loaded is None else loaded.model,
        {kind: row.as_dict() for kind, row in coverage.items()},
        identities,
        choices,
    )


def _online_types(config: RunConfig, inputs: Inputs) -> list[str]:
    if config.face == ANNEAL:
        return ["lm"]
    if config.teacher.hybrid:
        return ["lm"] if "lm" in inputs.types else []
    return inputs.types if config.teacher.mode == "online" else []


def _open_stores(config: RunConfig, inputs: Inputs, text: TextTools, online_types: list[str]) -> dict[str, StoreReader]:
    if config.face == ANNEAL:
        return {}
    stores = {}
    for kind, name in STORE_OPTIONS.items():
        if kind not in inputs.types or kind in online_types:
            continue
        folder = getattr(config.teacher, name)
        if folder is None:
            raise UsageError(
                f"the manifest has {kind} samples but no folder of stored signal is named",
                where=f"--{name.replace('_dir', '')}_logits_dir",
                remedy="capture them first and name the folder, or use --hybrid=false --teacher_mode=online",
            )
        stores[kind] = open_store(
            folder,
            teacher_id=stored_name(config.teacher.stored_id),
            tokenizer_hash=text.hash,
            vocab_size=text.vocab_size,
            cache=ShardCache(cache_dir() / "signal"),
        )
    return stores


def stored_name(model_id: str | None) -> str | None:
    """What a store calls the teacher named by an option; a hub is not asked, for the teacher itself is not needed."""
    if model_id is None or model_id.startswith(PACKAGE_PREFIX):
        return model_id
    return resolve(model_id).id if Path(model_id).expanduser().exists() else model_id.partition("@")[0]


def _require_context(loaded: LoadedModel, config: RunConfig) -> None:
    limit = max_positions(loaded.model)
    longest = max(config.data.block_size, *config.evaluation.context_lengths, 0)
    if limit is not None and longest > limit:
        raise UsageError(
            "the teacher cannot see so long a context",
            where=f"--block_size={config.data.block_size}",
            got=longest,
            expected=f"at most {limit}, the limit of {loaded.identity.id}",
            remedy="use a shorter length or another teacher",
        )
