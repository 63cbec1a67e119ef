"""What the card of an exported student says, out of its checkpoint and of what its run has kept about itself.

Nothing of this machine is named: of a local path its last part. What a run has not kept is not said.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liquid_llm import storage
from liquid_llm.checkpoint.metadata import CheckpointMetadata
from liquid_llm.errors import StorageError
from liquid_llm.metrics import FILE_NAME
from liquid_llm.models.card import Card, Section
from liquid_llm.models.positions import max_positions
from liquid_llm.models.spec import parse_student
from liquid_llm.models.student import PRESETS
from liquid_llm.parsing import MAX_JSON_BYTES, parse_json, parse_yaml
from liquid_llm.provenance import CONFIG, DATASETS, ENVIRONMENT, FOLDER, MANIFEST, READINESS
from liquid_llm.storage.streams import lines
from liquid_llm.wiring.students import describe_taken

log = logging.getLogger(__name__)

_COMMIT = re.compile(r"[0-9a-f]{40}")
_MOST_SOURCES = 8
_NO_LICENCE = (
    "None is stated. Whoever passes this student on says which: the terms of the model that it began with, of its "
    "teachers and of its data may reach it."
)


def declared_context(model: Any, metadata: CheckpointMetadata) -> int:
    """The longest text, in tokens, that the student is meant for.

    A student whose blocks came with weights of a model keeps what that model declares; one that began at random has
    seen no more than its training.
    """
    trained = int(metadata.student.get("trained_positions") or metadata.block_size)
    possible = max_positions(model)
    if possible is None:
        return trained
    return possible if _has_known_blocks(metadata.student) else min(trained, possible)


def _has_known_blocks(student: Mapping[str, Any]) -> bool:
    taken = student.get("taken")
    if taken is not None:
        return "embedding" not in taken
    base = parse_student(str(student.get("spec", ""))).base
    return "base" in student or not (base in PRESETS or base.endswith(".json") or base == "")


def make_card(model: Any, metadata: CheckpointMetadata, run: str | None, license: str | None = None) -> str:
    """The text of the card.

    Args:
        run: the run directory of the checkpoint, path or URL; None where there is none.
        license: the student's, as the hub names it (``apache-2.0``), where a person states one.
    """
    kept = _Kept(run)
    base = _base(metadata.student)
    data = kept.data()
    scores = [] if run is None else _scores(run, metadata.step)
    title = name_student(metadata.student)
    front = {
        "base_model": base["model"] if base is not None and base.get("on_hub") else None,
        "datasets": data.hub_ids,
        "license": license,
        "model-index": _model_index(title, data.hub_ids, scores, metadata.step),
    }
    sections = [
        _about(model, metadata, base, title),
        _teachers(metadata),
        Section("Data", data.rows, ("type", "tokens learnt from", "tokens held out", "out of", "licence")),
        Section(
            "Held-out text",
            [[one["type"], *(_figure(one[key]) for key in ("loss", "perplexity", "teacher", "kl"))] for one in scores],
            ("type", "loss", "perplexity", "loss of the teacher", "KL from the teacher"),
            f"At step {metadata.step:,}; in nats a token of the tokenizer above." if scores else "",
        ),
        _training(metadata, kept),
        Section("Licence", text=license or _NO_LICENCE),
    ]
    return Card(title, front, sections).render()


def name_student(student: Mapping[str, Any]) -> str:
    """What a student is called, without a folder of this machine."""
    taken, asked = student.get("taken"), str(student.get("spec", "student"))
    if taken is None:
        return _last_part(asked)
    parsed = parse_student(asked)
    return f"a cut of {taken['model']}" if parsed.cut is not None else _last_part(parsed.base)


def _last_part(name: str) -> str:
    return Path(name).name.removesuffix(".json")


def _base(student: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The model whose weights it began with."""
    found = student.get("taken") or student.get("base")
    return found if isinstance(found, Mapping) and "model" in found else None


def _about(model: Any, metadata: CheckpointMetadata, base: Mapping[str, Any] | None, title: str) -> Section:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    begun = "random" if not _has_known_blocks(metadata.student) else None
    if base is not None:
        taken = "taken" in metadata.student
        begun = describe_taken(base) if taken else f"{base['model']} ({_short(base.get('revision'))})"
    facts = {
        "student": title,
        "weights to begin with": begun,
        "parameters": f"{parameters:,}, {next(model.parameters()).dtype}".replace("torch.", ""),
        "context": f"{declared_context(model, metadata):,} tokens",
        "conversations": "as its chat template writes them"
        if metadata.run.get("chat_template")
        else "none in training",
        "tokenizer": f"sha256 {metadata.tokenizer_hash}",
    }
    return Section.of_facts("What it is", facts)


def _teachers(metadata: CheckpointMetadata) -> Section:
    rows: list[list[object]] = []
    taught = metadata.run.get("taught") or {type: {"teacher": name} for type, name in _teacher_names(metadata).items()}
    for type, one in taught.items():
        codec = one.get("codec")
        options = one.get("codec_options") or {}
        said = (
            "asked while training"
            if codec is None
            else " ".join([str(codec), *(f"{k}={v}" for k, v in options.items())])
        )
        rows.append([type, one.get("teacher"), _short(one.get("revision")), said])
    return Section("Teachers", rows, ("type", "teacher", "revision", "signal"))


def _teacher_names(metadata: CheckpointMetadata) -> Mapping[str, Any]:
    return metadata.run.get("teachers") or {}


def _short(revision: object) -> str | None:
    """A commit whole, since the hub finds it so; a fingerprint by its beginning."""
    text = None if revision is None else str(revision)
    return text if text is None or _COMMIT.fullmatch(text) else text[:19]


def _training(metadata: CheckpointMetadata, kept: _Kept) -> Section:
    environment, objective = kept.mapping(ENVIRONMENT), _inner(kept.mapping(CONFIG), "objective")
    packages, git = _inner(environment, "packages"), _inner(environment, "git")
    software = ", ".join(
        f"{name} {packages[name]}" for name in ("liquid-llm", "torch", "transformers") if packages.get(name)
    )
    peak = metadata.lr if metadata.lr_peak is None else metadata.lr_peak
    best = metadata.best_val_loss
    facts = {
        "optimizer steps": f"{metadata.step:,}",
        "tokens seen": f"{metadata.tokens_seen:,}",
        "context in training": f"{metadata.block_size:,} tokens",
        "share of the teacher in the loss (alpha)": metadata.alpha_schedule or f"{metadata.kd_alpha:g} at the end",
        "temperature": metadata.temp_schedule or f"{metadata.kd_temperature:g}",
        "divergence": objective.get("divergence"),
        "highest learning rate": f"{peak:g}",
        "seed": metadata.run.get("seed"),
        "lowest validation loss so far": None if best is None else f"{best:.4f} nats a token",
        "software": software or None,
        "code": git.get("commit"),
    }
    return Section.of_facts("Training", facts)


@dataclass(frozen=True)
class _Data:
    """Rows of the table of data, and the hub's datasets among it."""

    rows: list[list[object]]
    hub_ids: list[str]


class _Kept:
    """The files about itself that a run has kept; one that is absent or damaged says nothing."""

    def __init__(self, run: str | None) -> None:
        self.run = run

    def mapping(self, name: str, parse: Callable[[bytes], Any] = parse_json) -> Mapping[str, Any]:
        found = self._read(name, parse)
        return found if isinstance(found, Mapping) else {}

    def data(self) -> _Data:
        """By type what it was trained on, and the hub's datasets among it."""
        datasets = self.mapping(DATASETS, parse_yaml)
        named, on_hub = datasets.get("name"), datasets.get("on_hub") is True
        entries = [one for one in self._read(MANIFEST, _json_lines) or [] if isinstance(one, Mapping)]
        rows: list[list[object]] = []
        for type, counts in _inner(self.mapping(READINESS), "types").items():
            own = [one for one in entries if one.get("type") == type]
            sources = [_source(str(one.get("path", ""))) for one in own]
            if not own and isinstance(named, str):
                sources = [named if on_hub else _source(named)]
            licences = sorted({str(one["license"]) for one in own if one.get("license")})
            numbers = counts if isinstance(counts, Mapping) else {}
            tokens = [_count(numbers.get(f"{part}_tokens")) for part in ("train", "validation")]
            shown = [*sources[:_MOST_SOURCES], *(["..."] if len(sources) > _MOST_SOURCES else [])]
            rows.append([type, *tokens, ", ".join(dict.fromkeys(shown)) or None, ", ".join(licences) or None])
        hub_id = named.partition("@")[0] if isinstance(named, str) and on_hub and not entries else None
        return _Data(rows, [] if hub_id is None else [hub_id])

    def _read(self, name: str, parse: Callable[[bytes], Any]) -> Any:
        if self.run is None:
            return None
        uri = storage.join(self.run, FOLDER, name)
        try:
            return parse(storage.read_small(uri)) if storage.exists(uri) else None
        except (StorageError, ValueError) as error:
            log.warning("%s cannot be read, so the card does not say what is in it: %s", uri, error)
            return None


def _json_lines(content: bytes) -> list[Any]:
    return [parse_json(line) for line in content.splitlines() if line.strip()]


def _inner(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = values.get(name)
    return found if isinstance(found, Mapping) else {}


def _source(path: str) -> str:
    """What data is called without the folders or the bucket it lies in: its file, and of a pattern its folder too."""
    *folders, last = path.rstrip("/").split("/")
    return f"{folders[-1]}/{last}" if "*" in last and folders and folders[-1] else last


def _count(value: object) -> str | None:
    return f"{value:,}" if isinstance(value, int) else None


def _figure(value: object) -> str | None:
    return f"{value:.4g}" if isinstance(value, float) else None


def _scores(run: str, step: int) -> list[dict[str, Any]]:
    """What the evaluation at ``step`` found, for all and by type; nothing where there was none at that step."""
    row = _evaluation(storage.join(run, FILE_NAME), step)
    if row is None:
        return []
    by_type = _inner(row, "by_type")
    found = [("all", row, "val_loss_student")] if len(by_type) != 1 else []
    found += [(type, one, "val_loss") for type, one in by_type.items() if isinstance(one, Mapping)]
    scores = []
    for type, one, name in found:
        loss = one.get(name)
        if isinstance(loss, float):
            perplexity = math.exp(loss) if loss < 700 else None  # beyond that no float has it
            known = {"teacher": one.get("val_loss_teacher"), "kl": one.get("val_kd")}
            scores.append({"type": type, "loss": loss, "perplexity": perplexity, **known})
    return scores


def _evaluation(uri: str, step: int) -> Mapping[str, Any] | None:
    found = None
    try:
        if not storage.exists(uri):
            return None
        with storage.open_read(uri) as stream:
            for line in lines(stream, MAX_JSON_BYTES):
                if line is None or b'"eval"' not in line[:64]:
                    continue
                row = _row(line)
                if row.get("kind") == "eval" and row.get("step") == step:
                    found = row
    except StorageError as error:
        log.warning("%s cannot be read, so the card names no figures: %s", uri, error)
    return found


def _row(line: bytes) -> Mapping[str, Any]:
    try:
        row = parse_json(line)
    except ValueError:  # torn by a kill
        return {}
    return row if isinstance(row, Mapping) else {}


def _model_index(
    title: str, hub_ids: Sequence[str], scores: Sequence[Mapping[str, Any]], step: int
) -> list[dict[str, Any]] | None:
    """Figures in the hub's own form, where their text is a dataset that the hub has: others can look them up."""
    if len(hub_ids) != 1:
        return None
    metrics = [
        {
            "type": "perplexity",
            "value": round(one["perplexity"], 4),
            "name": f"perplexity of held-out text, step {step}",
        }
        for one in scores[:1]
        if one["perplexity"] is not None
    ]
    if not metrics:
        return None
    dataset = {"name": hub_ids[0], "type": hub_ids[0]}
    return [{"name": title, "results": [{"task": {"type": "text-generation"}, "dataset": dataset, "metrics": metrics}]}]
