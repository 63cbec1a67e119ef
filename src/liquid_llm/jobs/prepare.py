"""Data preparation: which datasets a command needs, their state, the work, and what a manifest line stands for.

auto    what lacks complete shards of the present inputs is prepared
force   everything needed is prepared anew
skip    nothing is prepared; complete shards are used

A dataset is needed by a run if its manifest is the run's, or if a line of the run's manifest names its shards or one of
its raw inputs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from liquid_llm import storage
from liquid_llm.config import DataConfig, PrepareConfig, build_prepare_config
from liquid_llm.data.manifest import read_manifest
from liquid_llm.data.types import TYPES, ManifestEntry
from liquid_llm.errors import DataError, StorageError, UsageError
from liquid_llm.preparation.catalog import TOOLKIT, Catalog, Dataset, absolute, chosen, read_catalog
from liquid_llm.preparation.dataset import (
    REJECTS,
    Progress,
    Source,
    fingerprints,
    folded,
    input_files,
    prepare,
    read_complete,
    sources_of,
)
from liquid_llm.preparation.manifest_lines import write_line
from liquid_llm.preparation.toolkit import ToolkitOptions, converted, fetched
from liquid_llm.runtime import launched_as
from liquid_llm.storage import FileInfo
from liquid_llm.terminal import Stage, setup_logging
from liquid_llm.wiring.places import cache_dir

log = logging.getLogger(__name__)

BESIDE_MANIFEST = "datasets.yaml"
_MEGABYTE = 1e6
_READY = ("complete", "prepared")


@dataclass(frozen=True)
class State:
    """How a dataset stands.

    Attributes:
        kind: ``complete``; ``changed``: its shards are whole but made from other inputs or settings; ``incomplete``.
        marker: the completion marker, unless incomplete.
        files: the raw inputs as they are now; empty where a complete dataset's inputs are gone.
    """

    kind: str
    marker: dict[str, Any] | None
    files: list[FileInfo]


def run_prepare(given: Mapping[str, object]) -> int:
    """``liquid prepare``: prints what was done as one JSON line on stdout and returns the exit code.

    Raises:
        LiquidError: any problem a user can cause; with ``skip``, a dataset that lacks complete shards.
    """
    setup_logging("INFO")
    config = build_prepare_config(given)
    catalog = read_catalog(config.datasets_yaml)
    names = [name.strip() for name in (config.only or "").split(",") if name.strip()]
    done = prepare_datasets(chosen(catalog, names), config.prepare, toolkit_options(config))
    print(json.dumps(done, sort_keys=True))
    lacking = [f"{name} is {one['status']}" for name, one in done.items() if one["status"] not in _READY]
    if lacking:
        raise DataError(", ".join(lacking), where=catalog.uri, remedy="run this command with --prepare_data=auto")
    return 0


@dataclass(frozen=True)
class RunData:
    """What a run reads.

    Attributes:
        entries: the manifest's lines, each raw input replaced by its dataset's shards; empty without a manifest.
        readiness: what was prepared, by dataset, for provenance.
        datasets: the catalog and its location, for provenance; empty without one.
    """

    entries: list[ManifestEntry] = field(default_factory=list)
    readiness: dict[str, Any] = field(default_factory=dict)
    datasets: dict[str, Any] = field(default_factory=dict)


def prepare_run_data(config: DataConfig, types: Sequence[str] = TYPES) -> RunData:
    """Prepare what a run needs of its types, then read its manifest.

    Raises:
        LiquidError: any problem a user can cause.
    """
    if config.manifest is None:
        return RunData()
    if config.prepare == "force" and launched_as()[1] > 1:
        raise UsageError(
            "several processes cannot prepare anew at once",
            where="--prepare_data=force",
            remedy="run liquid prepare --prepare_data=force first, and these with auto",
        )
    catalog = find_catalog(config)
    if catalog is None:
        asked = (("prepare_data=force", config.prepare == "force"), ("prep_toolkit_zip_uri", config.toolkit_uri))
        for option, given in asked:
            if given:
                raise UsageError("no datasets are known", where=f"--{option}", remedy="give --datasets_yaml")
        return RunData(_entries(config.manifest, types, None))
    manifest = absolute(config.manifest)
    paths = [entry.path for entry in read_manifest(manifest)] if storage.stat(manifest) is not None else []
    needed = [
        dataset
        for dataset in catalog.datasets.values()
        if dataset.type in types
        and (dataset.manifest == manifest or any(dataset.names_input(p) or dataset.names_shards(p) for p in paths))
    ]
    done = prepare_datasets(needed, config.prepare, toolkit_options(config))
    return RunData(
        _entries(config.manifest, types, catalog),
        {"preparation": done},
        {"datasets_yaml": catalog.uri, "datasets": catalog.plain},
    )


def find_run_data(config: DataConfig, types: Sequence[str] = TYPES) -> RunData:
    """What a run reads as it stands: nothing is prepared.

    Raises:
        DataError: as ``prepare_run_data``; a dataset that is named has no complete shards.
    """
    if config.manifest is None:
        return RunData()
    return RunData(_entries(config.manifest, types, find_catalog(config)))


def find_catalog(config: DataConfig) -> Catalog | None:
    """The catalog named by ``--datasets_yaml``, else ``datasets.yaml`` beside the manifest, else None.

    Raises:
        UsageError: it cannot be used.
        StorageError: the one that was named cannot be read.
    """
    if config.datasets_yaml is not None:
        return read_catalog(config.datasets_yaml)
    beside = storage.join(posixpath.dirname(str(config.manifest)), BESIDE_MANIFEST)
    try:
        if storage.stat(beside) is None:
            return None
    except StorageError as error:
        log.warning("no --datasets_yaml is given and the place beside the manifest cannot be asked: %s", error)
        return None
    return read_catalog(beside)


def toolkit_options(config: DataConfig | PrepareConfig) -> ToolkitOptions | None:
    if config.toolkit_uri is None:
        return None
    folder = Path(config.toolkit_dir) if config.toolkit_dir else cache_dir() / "toolkits"
    return ToolkitOptions(config.toolkit_uri, config.toolkit_sha256, folder, config.toolkit_timeout_seconds)


def _entries(manifest: str, types: Sequence[str], catalog: Catalog | None) -> list[ManifestEntry]:
    """The manifest's entries of ``types``, every raw input of a known dataset replaced by that dataset's shards.

    Lines of one dataset are merged.

    Raises:
        DataError: nothing of the types is named; a dataset that is named has no complete shards, or is of another type
            than the line says.
    """
    entries = [entry for entry in read_manifest(manifest) if entry.type in types]
    if not entries:
        raise DataError("no entry of the types needed", where=manifest, expected=f"a line of {' or '.join(types)}")
    if catalog is None:
        return entries
    resolved: dict[str, ManifestEntry] = {}
    checked: set[str] = set()
    for entry in entries:
        raw = next((one for one in catalog.datasets.values() if one.names_input(entry.path)), None)
        named = [raw] if raw else [one for one in catalog.datasets.values() if one.names_shards(entry.path)]
        for dataset in named:
            _require_type(dataset, entry)
            if dataset.name not in checked:
                _require_complete(dataset, catalog, entry)
                checked.add(dataset.name)
        if raw is not None:
            log.info("%s: %s stands for %s", entry.where, entry.path, raw.shards)
        path = raw.shards if raw is not None else entry.path
        key = absolute(path) if named else entry.where
        known = resolved.get(key)
        weight = entry.weight + (known.weight if known is not None else 0.0)
        resolved[key] = replace(known or entry, path=path, weight=weight)
    return list(resolved.values())


def _require_type(dataset: Dataset, entry: ManifestEntry) -> None:
    if entry.type != dataset.type:
        raise DataError(
            f"the line's type is not that of the dataset {dataset.name}",
            where=entry.where,
            got=entry.type,
            expected=dataset.type,
        )


def _require_complete(dataset: Dataset, catalog: Catalog, entry: ManifestEntry) -> None:
    state = state_of(dataset, None)
    if state.kind == "incomplete":
        raise DataError(
            f"the dataset {dataset.name} is not prepared",
            where=entry.where,
            got=f"no complete shards at {dataset.shards}",
            remedy=f"run liquid prepare --datasets_yaml={catalog.uri} or train with --prepare_data=auto",
        )
    if state.kind == "changed":
        log.warning("%s: its inputs or settings have changed since its shards were made; they are used", dataset.name)


def state_of(dataset: Dataset, toolkit_sha256: str | None) -> State:
    """How a dataset stands; ``toolkit_sha256``: of the toolkit at hand, None to accept the one its marker names.

    Raises:
        DataError: neither complete shards nor inputs are there.
    """
    marker, files = read_complete(dataset), input_files(dataset)
    if not files:
        if marker is None:
            raise DataError(
                "neither inputs nor complete shards are there",
                where=f"dataset {dataset.name}",
                got=f"no file matches {', '.join(dataset.inputs)}",
                remedy="correct in: of the dataset",
            )
        log.info("%s: the inputs are gone; its shards are complete", dataset.name)
        return State("complete", marker, files)
    if marker is None:
        return State("incomplete", None, files)
    toolkit = toolkit_sha256 or marker.get("toolkit_sha256")
    current = fingerprints(dataset, sources_of(files), toolkit=toolkit)[-1]
    return State("complete" if marker["fingerprint"] == current else "changed", marker, files)


def prepare_datasets(
    datasets: Sequence[Dataset], mode: str, toolkit: ToolkitOptions | None
) -> dict[str, dict[str, Any]]:
    """Prepare ``datasets`` as ``mode`` says and have their manifests name them; gives what was done, by name.

    Raises:
        LiquidError: any problem a user can cause.
    """
    if toolkit is not None and not any(dataset.format == TOOLKIT for dataset in datasets):
        raise UsageError(
            "no dataset needs the toolkit",
            where="--prep_toolkit_zip_uri",
            expected=f"a dataset that states format: {TOOLKIT}",
        )
    done: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        stack.enter_context(_alone(datasets))
        archive, sha256 = stack.enter_context(fetched(toolkit)) if toolkit is not None else (None, None)
        states = {one.name: state_of(one, sha256 if one.format == TOOLKIT else None) for one in datasets}
        to_do = [one for one in datasets if mode == "force" or (mode == "auto" and states[one.name].kind != "complete")]
        for dataset in to_do:
            _require_inputs(dataset, states[dataset.name])
        outputs = _convert(stack, toolkit, archive, sha256, [one for one in to_do if one.format == TOOLKIT], states)
        for dataset in datasets:
            state = states[dataset.name]
            if dataset in to_do:
                own = outputs.get(dataset.name)
                marker = _prepare_one(dataset, state.files, own, sha256, force=mode == "force")
                state = State("prepared", marker, state.files)
            if dataset.manifest is not None and state.marker is not None and mode != "skip" and write_line(dataset):
                log.info("%s: %s names its shards", dataset.name, dataset.manifest)
            done[dataset.name] = _described(dataset, state)
    return done


@contextlib.contextmanager
def _alone(datasets: Sequence[Dataset]) -> Iterator[None]:
    """While entered, no other process of this user on this machine prepares one of ``datasets``: it waits its turn.

    Processes on several machines do the same work twice, which ends with the same shards.
    """
    folder = cache_dir() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        for shards in sorted(dataset.shards for dataset in datasets):  # one order for all: nobody waits in a circle
            stack.enter_context(storage.locked(folder / hashlib.sha256(shards.encode()).hexdigest()[:16]))
        yield


def _convert(
    stack: ExitStack,
    toolkit: ToolkitOptions | None,
    archive: Path | None,
    sha256: str | None,
    datasets: list[Dataset],
    states: Mapping[str, State],
) -> dict[str, list[FileInfo]]:
    """What the toolkit makes of ``datasets``, by name; it is not run where there are none."""
    if not datasets:
        return {}
    if toolkit is None or archive is None or sha256 is None:
        raise UsageError(
            f"{', '.join(one.name for one in datasets)} can only be prepared by a toolkit",
            where="--prep_toolkit_zip_uri",
            remedy="name the toolkit",
        )
    inputs = {one.name: (one, states[one.name].files) for one in datasets}
    return stack.enter_context(converted(toolkit, archive, sha256, inputs))


def _require_inputs(dataset: Dataset, state: State) -> None:
    if not state.files:
        raise DataError(
            "there is nothing to prepare from",
            where=f"dataset {dataset.name}",
            got=f"no file matches {', '.join(dataset.inputs)}",
            remedy="use --prepare_data=auto: its shards are complete",
        )


def _prepare_one(
    dataset: Dataset, files: Sequence[FileInfo], outputs: list[FileInfo] | None, sha256: str | None, *, force: bool
) -> dict[str, Any]:
    toolkit = sha256 if dataset.format == TOOLKIT else None
    sources = sources_of(files)
    chain = fingerprints(dataset, sources, toolkit=toolkit)
    fingerprint, extra, reader = chain[-1], {}, dataset
    if outputs is not None:
        # The toolkit's files have new times at every run: they are known by name and size.
        sources = [Source(one.uri, one.size, (one.name, one.size, "")) for one in outputs]
        chain = [fingerprint]
        for source in sources:
            chain.append(folded(chain[-1], source.identity))
        extra, reader = {"toolkit_sha256": toolkit}, replace(dataset, format="jsonl")
    total = sum(source.size for source in sources) / _MEGABYTE
    with Stage(f"prepare {dataset.name}", unit="MB", total=total) as stage:
        progress = Progress(lambda amount: stage.advance(amount / _MEGABYTE), stage.note)
        marker = prepare(reader, sources, chain, fingerprint=fingerprint, force=force, extra=extra, progress=progress)
    counts = marker["counts"]
    log.info("%s: %s", dataset.name, ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items()))
    if counts["rejected"]:
        log.warning("%s: %d malformed records, see %s", dataset.name, counts["rejected"], _rejects_uri(dataset))
    return marker


def _rejects_uri(dataset: Dataset) -> str:
    return storage.join(dataset.out, dataset.state_name, REJECTS)


def _described(dataset: Dataset, state: State) -> dict[str, Any]:
    described: dict[str, Any] = {"status": state.kind, "type": dataset.type, "shards": dataset.shards}
    if state.marker is not None:
        described |= {key: state.marker[key] for key in ("fingerprint", "counts", "inputs")}
        described |= {"num_shards": len(state.marker["shards"])}
        described |= {key: state.marker[key] for key in ("toolkit_sha256",) if key in state.marker}
        if state.marker["counts"]["rejected"]:
            described["rejects"] = _rejects_uri(dataset)
    return described
