"""Where a run starts from.

continue   the run directory (or its mirror) already holds a complete checkpoint of this run
resume     ``--resume_gcs_uri`` names a checkpoint, Hugging Face folder or zip
fresh      neither: the student is built from ``--student``

What goes on and what starts afresh is decided here, once, and said in words.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from liquid_llm import storage
from liquid_llm.checkpoint.discovery import SIDECAR_SUFFIX, is_known
from liquid_llm.checkpoint.mending import remains
from liquid_llm.checkpoint.metadata import IN_PIECES, CheckpointMetadata
from liquid_llm.checkpoint.resume import ResumeSource
from liquid_llm.checkpoint.store import CheckpointInfo, CheckpointStore, fetch_latest
from liquid_llm.config import RunConfig
from liquid_llm.distributed import Engine
from liquid_llm.errors import CheckpointError, UsageError
from liquid_llm.parsing import parse_json
from liquid_llm.runtime import choose_device, choose_dtype
from liquid_llm.schedules import level_from
from liquid_llm.versions import changes_since, find_newer
from liquid_llm.wiring.course import changes_of_course, optimizer_of
from liquid_llm.wiring.origins import open_origin
from liquid_llm.wiring.places import Place

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """What a run starts from.

    Attributes:
        kind: ``continue``, ``resume`` or ``fresh``.
        origin: the student's weights and what came with them; no weights when fresh, a checkpoint's whole state only
            where it goes on.
    """

    kind: str
    origin: ResumeSource

    @property
    def goes_on(self) -> bool:
        """Whether optimizer, random states and step go on; else they start afresh."""
        return self.origin.state is not None

    @property
    def step(self) -> int:
        """The step training goes on from."""
        return self.origin.metadata.step if self.goes_on and self.origin.metadata is not None else 0

    @property
    def run_so_far(self) -> Mapping[str, Any] | None:
        """What a checkpoint says of the run that goes on; None where none does."""
        return self.origin.metadata.run if self.goes_on and self.origin.metadata is not None else None

    def in_words(self) -> str:
        """What is gone on with, as a sentence."""
        if self.kind == "fresh":
            return f"a new run: the student is {self.origin.description}"
        if self.kind == "continue" and self.goes_on:
            return f"this run goes on from step {self.step}: {self.origin.description}"
        if self.goes_on:
            return f"weights, optimizer and step {self.step} are taken from {self.origin.description}"
        return f"weights are taken from {self.origin.description}; optimizer and step begin anew"

    def options(self, config: RunConfig) -> dict[str, object]:
        """Option values the checkpoint stands for; they rank behind those given and before defaults."""
        metadata = self.origin.metadata
        if metadata is None:
            return {}
        values: dict[str, object] = {"rope_scale": metadata.rope_scale}
        if config.continues_resumed or self.kind == "continue":
            values["block_size"] = metadata.block_size
        if self.kind == "continue" and not config.continues_resumed:
            values["kd_temperature"] = metadata.kd_temperature  # an earlier release had another default
            if config.optimizer.tokens_per_step is None:
                values["grad_accum"] = metadata.grad_accum  # of several ranks it was their number
        if config.continues_resumed:
            values |= {
                "alpha": metadata.kd_alpha,
                "T": metadata.kd_temperature,
                "grad_accum": metadata.grad_accum,
                "warmup_steps": metadata.warmup_steps,
                "lr": metadata.lr,
                "lr_peak": metadata.lr_peak,
                "eval_ctx_lens": tuple(metadata.eval_ctx_lens),
            }
        if config.continues_resumed and self.origin.state is not None:
            # Steps of an inherited schedule count from the old step 0: it is taken up only where the step goes on.
            values |= {
                "alpha_schedule": self._schedule(metadata.alpha_schedule, "alpha", config.given),
                "temp_schedule": self._schedule(metadata.temp_schedule, "T", config.given),
            }
            decayed = self.origin.state["optimizer"]["param_groups"][0]
            values |= {"weight_decay": decayed["weight_decay"], "betas": tuple(decayed["betas"])}
            values["optimizer"] = optimizer_of(metadata)
            if (adapter := metadata.student.get("lora")) is not None:
                values |= {"lora_r": adapter["rank"], "lora_alpha": float(adapter["alpha"])}
                values["lora_target_modules"] = adapter["target_modules"]
        return {name: value for name, value in values.items() if value is not None}

    @property
    def group_size(self) -> int | None:
        """Micro-batches in a row that are drawn from one dataset, where the order of a run goes on."""
        return None if self.run_so_far is None else int(self.run_so_far.get("group_size", 1))

    @property
    def window_tokens(self) -> dict[str, int] | None:
        """Type -> tokens that are shuffled together, where the order of a run goes on."""
        return None if self.run_so_far is None else dict(self.run_so_far.get("window_tokens", {}))

    @property
    def blocks_by_file(self) -> bool:
        """Whether blocks end with their data file where texts are shuffled a few files at a time: not in a run that
        goes on and was begun before they did."""
        return self.run_so_far is None or bool(self.run_so_far.get("blocks_by_file", False))

    def plain(self) -> dict[str, Any]:
        """As values and tensors that ``of_plain`` reads on another rank."""
        origin, folder = self.origin, self.origin.tokenizer_folder
        files = (
            {} if folder is None else {one.name: one.read_bytes() for one in Path(folder).iterdir() if one.is_file()}
        )
        return {
            "kind": self.kind,
            "description": origin.description,
            "metadata": None if origin.metadata is None else origin.metadata.to_dict(),
            "config": None if origin.config is None else json.dumps(dict(origin.config)),
            "state": None if origin.state is None else dict(origin.state),
            "weights": {} if origin.state is not None else dict(origin.state_dict),
            "tokenizer": None if folder is None else files,
        }

    @classmethod
    def of_plain(cls, values: Mapping[str, Any], folder: Path) -> Start:
        """The start of the main rank; ``folder`` takes the files of a tokenizer that came along."""
        given, state, config = values["metadata"], values["state"], values["config"]
        description = values["description"]
        for name, content in (values["tokenizer"] or {}).items():
            (folder / Path(name).name).write_bytes(content)
        origin = ResumeSource(
            values["weights"] if state is None else state["student"],
            description,
            None if given is None else CheckpointMetadata.from_dict(given, description),
            None if config is None else json.loads(config),
            None if values["tokenizer"] is None else str(folder),
            state,
        )
        return cls(values["kind"], origin)

    def _schedule(self, text: str | None, level: str, given: Mapping[str, object]) -> str | None:
        """A checkpoint's schedule, with what it has reached replaced by a newly given level.

        A command that is run again to continue gives the level it gave before: that is not given anew.
        """
        metadata = self.origin.metadata
        known = metadata.run.get("given_levels", {}) if metadata is not None and self.kind == "continue" else {}
        if text is None or level not in given or given[level] == known.get(level):
            return text
        return level_from(text, self.step, float(str(given[level])))


def describe_metadata(metadata: CheckpointMetadata) -> str:
    """Checkpoint metadata for the log: what a later job needs, on one line, without the model's configuration."""
    values = metadata.to_dict()
    values["student"] = metadata.student.get("spec")
    return json.dumps({name: value for name, value in values.items() if name not in ("sha256", "run")})


def continue_from(store: CheckpointStore, found: CheckpointInfo) -> Start:
    """The start that goes on from a complete checkpoint.

    Raises:
        CheckpointError: it is damaged.
    """
    state, metadata = store.load(found)
    return Start("continue", ResumeSource.of_checkpoint(state, metadata, str(found.path)))


def find_start(config: RunConfig, place: Place, store: CheckpointStore) -> Start:
    """Look for a checkpoint in the run directory, then its mirror, then at ``--resume_gcs_uri``.

    Raises:
        CheckpointError: what is there cannot be used, or is of a newer release.
        StorageError: a place cannot be read.
    """
    if not config.output.restart:
        # A checkpoint of a newer format would be passed over like a damaged one, and the run go on from an older step.
        _require_known_format(str(place.run_dir))
        found = store.latest()
        remote = place.remote if config.optimizer.steps > 0 else None
        if remote is not None:
            # Another machine may have gone on since this one's checkpoint: the mirror is asked even when there is one.
            fetched = fetch_latest(remote, place.run_dir, newer_than=-1 if found is None else found.step)
            found = fetched or found
            if found is None:
                _require_known_format(remote)
        if found is not None:
            return continue_from(store, found)
        require_nothing_lost(place.run_dir, remote)
    return begin(config)


def require_nothing_lost(run_dir: Path, remote: str | None) -> None:
    """Raise CheckpointError where checkpoints are, and none that is whole: a run does not begin again over them."""
    for folder in filter(None, (str(run_dir), remote)):
        left = remains(info.name for info in storage.list_files(folder))
        if left:
            raise CheckpointError(
                "none of this run's checkpoints can be used: each is damaged, or its data or sidecar is lost",
                where=folder,
                got=", ".join(left[:6]) + (f" and {len(left) - 6} more" if len(left) > 6 else ""),
                remedy="copy whole ones back (liquid inspect says what each is), or begin again with --restart, "
                "which keeps these aside; nothing was changed",
            )


def share_start(engine: Engine, find: Callable[[], Start], folder: Path) -> Start:
    """What ``find`` gives on the main rank, on every rank, wherever they are; raises as it does.

    Args:
        folder: takes a tokenizer that came along, on the other ranks.
    """
    if engine.world_size == 1:
        return find()
    found: list[Start] = []

    def look() -> dict[str, Any]:
        found.append(find())
        return found[0].plain()

    values = engine.share(look)
    return found[0] if engine.is_main else Start.of_plain(values, folder)


def begin(config: RunConfig) -> Start:
    """Where a run starts that has no checkpoint of its own; raises as ``find_start``."""
    if config.student.resume_uri is None:
        return Start("fresh", ResumeSource({}, f"--student={config.student.spec}"))
    origin = open_origin(config.student.resume_uri)
    return Start("resume", origin if config.continues_resumed else replace(origin, state=None))


def deal_out(config: RunConfig, start: Start, ranks: int) -> RunConfig:
    """The configuration with a step's micro-batches as ranks can share them.

    Where nobody said how many they are it is one a rank, so that a command works with any number of them.

    Raises:
        UsageError: their number was given, or is that of the run that is continued, and cannot be dealt out; or the
            group in which types are drawn was given and is another than that of the run that goes on.
    """
    if choose_group(config, start, ranks) % ranks:
        log.info("--draw_group is no multiple of %d processes: they wait for one another at unlike types", ranks)
    count = config.optimizer.grad_accum
    if config.optimizer.tokens_per_step is not None or count % ranks == 0:
        return config
    if "grad_accum" in config.given or start.kind == "continue":
        require_division(config, ranks)
    settled = -(-count // ranks) * ranks
    log.info("--grad_accum=%d: a micro-batch of each step for each of %d processes", settled, ranks)
    return replace(config, optimizer=replace(config.optimizer, grad_accum=settled))


def choose_group(config: RunConfig, start: Start, ranks: int) -> int:
    """Micro-batches in a row that are drawn from one dataset: what the run so far has, what was given, or the ranks.

    Raises:
        UsageError: another number was given than the run so far has.
    """
    kept, given = start.group_size, config.data.draw_group
    if kept is not None and given is not None and given != kept:
        raise UsageError(
            "the run so far has drawn its micro-batches in groups of another size",
            where=f"--draw_group={given}",
            got=f"groups of {kept} in {start.origin.description}",
            remedy="leave the option out; another size is another order of the data: start with --restart for that",
        )
    return kept or given or ranks


def require_division(config: RunConfig, ranks: int) -> None:
    """Raise UsageError unless a step's micro-batches can be dealt out among the ranks."""
    count = config.optimizer.grad_accum
    if count % ranks == 0:
        return
    given = "grad_accum" in config.given
    divisors = [str(one) for one in range(1, count + 1) if count % one == 0]
    raise UsageError(
        "the micro-batches of a step cannot be dealt out among the processes",
        where=f"--grad_accum={count}" if given else "grad_accum of the run that is continued",
        got=f"{count} micro-batches a step, {ranks} processes",
        expected=f"{_either(divisors)} processes" + (f", or a multiple of {ranks}" if given else ""),
        remedy=None if given else "another number would be another run: start it with --restart for that",
    )


def _either(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def settle_context(start: Start, config: RunConfig) -> Start:
    """Decide whether optimizer, LR schedule and step go on at this block size, and say so.

    Resuming with another ``block_size`` and ``--reset_optim_on_ctx_change``, or with ``--reset_optim``, keeps the
    weights and starts the rest afresh. An interrupted run that is continued is never reset again: its checkpoint
    already has the new length.

    Args:
        config: as given, without what the checkpoint stands for.

    Raises:
        CheckpointError: the step would go on from order, framing or numerics of a newer release.
    """
    metadata = start.origin.metadata
    if not start.goes_on or metadata is None:
        return start
    block_size = config.data.block_size if "block_size" in config.given else metadata.block_size
    changed = metadata.block_size != block_size
    if changed:  # a directory that is continued would have gone on with its own
        said = log.warning if start.kind == "continue" else log.info
        said("context length changes from %d to %d tokens", metadata.block_size, block_size)
    if (changed and config.optimizer.reset_on_context_change) or (config.optimizer.reset and start.kind == "resume"):
        log.info("optimizer, LR schedule and step start afresh; weights are kept")
        for name, text in (("alpha", metadata.alpha_schedule), ("temp", metadata.temp_schedule)):
            if text is not None and f"{name}_schedule" not in config.given:
                log.info("the checkpoint's %s schedule %s is not taken up: its steps have ended", name, text)
        return replace(start, origin=replace(start.origin, state=None))
    if changed:
        log.info("optimizer and step %d go on (give --reset_optim_on_ctx_change to start them afresh)", metadata.step)
    _require_known_versions(metadata, config, start.origin.description)
    for option, was, value in changes_of_course(metadata, config):
        log.warning("--%s is %s, and was %s in the run so far: the run changes its course", option, value, was)
    return start


_NEWER = "update liquid-llm to the release that wrote it, or start afresh with --restart in another output"


def _require_known_format(folder: str) -> None:
    """Refuse a folder with a checkpoint whose format is newer than this release's."""
    for info in storage.list_files(folder):
        if not info.name.endswith(SIDECAR_SUFFIX) or not is_known(info.name.removesuffix(SIDECAR_SUFFIX)):
            continue
        try:
            version = parse_json(storage.read_small(info.uri))["format_version"]
        except (ValueError, TypeError, KeyError):
            continue  # damaged: reported where checkpoints are compared
        if isinstance(version, int) and version > IN_PIECES:
            raise CheckpointError(
                "this checkpoint was written by a newer release",
                where=info.uri,
                got=f"format version {version}",
                expected=f"at most {IN_PIECES}",
                remedy=_NEWER,
            )


def _require_known_versions(metadata: CheckpointMetadata, config: RunConfig, source: str) -> None:
    """Refuse what a newer release counts or computes in another way; say what has changed since an older one."""
    newer = find_newer(metadata.versions)
    if newer is not None:
        raise CheckpointError(
            "this run was trained by a newer release, which works in another way",
            where=source,
            got=newer,
            remedy=_NEWER,
        )
    device = choose_device(config.device).value
    precisions = (config.student.precision, config.teacher.precision)
    bfloat16 = any(choose_dtype(one, device).value == "bfloat16" for one in precisions)
    for change in changes_since(metadata.versions, bfloat16=bfloat16):
        log.info("%s %d since this checkpoint: %s (%s)", change.name, change.version, change.what, change.before)
