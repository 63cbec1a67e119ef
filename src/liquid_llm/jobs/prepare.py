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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from liquid_llm import storage
from liquid_llm.config import DataConfig, PrepareConfig, build_prepare_config
from liquid_llm.data.manifest import read_manifest
from liquid_llm.data.types import ManifestEntry
from liquid_llm.distributed import read_rank
from liquid_llm.errors import DataError, StorageError, UsageError
from liquid_llm.formatting import format_counts
from liquid_llm.preparation.catalog import TOOLKIT, Catalog, Dataset, choose, read_catalog, to_absolute
from liquid_llm.preparation.dataset import fingerprints, input_files, prepare, read_complete, rejects_uri
from liquid_llm.preparation.manifest_lines import write_line
from liquid_llm.preparation.toolkit import Toolkit, ToolkitOptions, fetch
from liquid_llm.sources import order_types
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
        status: ``complete``; ``prepared`` just now; ``changed``: its shards are whole but made from other inputs or
            settings; ``incomplete``.
        marker: the completion marker, unless incomplete.
        files: the raw inputs as they are now; empty where a complete dataset's inputs are gone.
    """

    status: str
    marker: dict[str, Any] | None
    files: list[FileInfo]


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


def describe_datasets(config: DataConfig, data: RunData) -> dict[str, Any]:
    """What a job's data is called, for provenance: a named dataset, or the catalog behind a manifest."""
    known = {"name": config.dataset_name, "config": config.dataset_config, **data.datasets}
    name = config.dataset_name
    return known if name is None else {**known, "on_hub": not Path(name).exists()}


def run_prepare(given: Mapping[str, object]) -> int:
    """``liquid prepare``: prints what was done as one JSON line on stdout and returns the exit code.

    Raises:
        LiquidError: any problem a user can cause; with ``skip``, a dataset that lacks complete shards.
    """
    setup_logging("INFO")
    config = build_prepare_config(given)
    catalog = read_catalog(config.datasets_yaml)
    names = [name.strip() for name in (config.only or "").split(",") if name.strip()]
    datasets = choose(catalog, names)
    states = prepare_datasets(datasets, config.prepare, _toolkit_options(config))
    print(json.dumps({one.name: _describe(one, states[one.name]) for one in datasets}, sort_keys=True))
    lacking = [f"{name} is {state.status}" for name, state in states.items() if state.status not in _READY]
    if lacking:
        raise DataError(", ".join(lacking), where=catalog.uri, remedy="run this command with --prepare_data=auto")
    return 0


def prepare_run_data(config: DataConfig, wanted: Callable[[str], bool] = lambda type: True) -> RunData:
    """Prepare what a run needs of the types it wants, then read its manifest.

    Raises:
        LiquidError: any problem a user can cause.
    """
    if config.manifest is None:
        return RunData()
    if config.prepare == "force" and read_rank()[1] > 1:
        raise UsageError(
            "several processes cannot prepare anew at once",
            where="--prepare_data=force",
            remedy="run liquid prepare --prepare_data=force first, and these with auto",
        )
    catalog = _find_catalog(config)
    if catalog is None:
        if config.prepare == "force" or config.toolkit_uri is not None:
            option = "prepare_data=force" if config.prepare == "force" else "prep_toolkit_zip_uri"
            raise UsageError("no datasets are known", where=f"--{option}", remedy="give --datasets_yaml")
        return RunData(_read_entries(config.manifest, wanted, None, {}))
    manifest = to_absolute(config.manifest)
    paths = [entry.path for entry in read_manifest(manifest)] if storage.exists(manifest) else []
    needed = [
        dataset
        for dataset in catalog.datasets.values()
        if wanted(dataset.type)
        and (dataset.manifest == manifest or any(dataset.names_input(p) or dataset.names_shards(p) for p in paths))
    ]
    states = prepare_datasets(needed, config.prepare, _toolkit_options(config))
    return RunData(
        _read_entries(config.manifest, wanted, catalog, states),
        {"preparation": {one.name: _describe(one, states[one.name]) for one in needed}},
        {"datasets_yaml": catalog.uri, "datasets": catalog.plain},
    )


def require_manifest(config: DataConfig) -> None:
    """Find out at the cost of a request whether ``prepare_run_data`` will have a manifest, wherever it is.

    Of its paths nothing is looked at, as ``check_run_data`` does: a task of a capture never lists the whole corpus.

    Raises:
        StorageError: there is none, and no catalog of datasets that may make it.
    """
    if config.manifest is not None and _find_catalog(config) is None:
        with storage.open_read(config.manifest):
            return


def find_run_data(config: DataConfig, wanted: Callable[[str], bool] = lambda type: True) -> RunData:
    """What a run reads as it stands: nothing is prepared. Raises as ``prepare_run_data`` does."""
    return prepare_run_data(replace(config, prepare="skip", toolkit_uri=None), wanted)


def check_run_data(config: DataConfig, require: Callable[[str], object] = lambda type: None) -> None:
    """Look at what options say of the data, before models are read: a slip there is said at once.

    ``require`` is told each type of the manifest, and raises where the options do not do for it. What is wrong with
    the data itself is said later, when the other options are known to be usable. A manifest that a preparation is to
    write is left alone, and so is one at a URL.

    Raises:
        StorageError: the manifest cannot be read.
    """
    if config.manifest is None or storage.is_remote(config.manifest):
        return
    if config.toolkit_uri is not None or _find_catalog(config) is not None:
        return
    with contextlib.suppress(DataError):
        for type in order_types(entry.type for entry in read_manifest(config.manifest)):
            require(type)


def _find_catalog(config: DataConfig) -> Catalog | None:
    """The catalog named by ``--datasets_yaml``, else ``datasets.yaml`` beside the manifest, else None."""
    if config.datasets_yaml is not None:
        return read_catalog(config.datasets_yaml)
    beside = storage.join(posixpath.dirname(str(config.manifest)), BESIDE_MANIFEST)
    try:
        if not storage.exists(beside):
            return None
    except StorageError as error:
        log.warning("no --datasets_yaml is given and the place beside the manifest cannot be asked: %s", error)
        return None
    return read_catalog(beside)


def _toolkit_options(config: DataConfig | PrepareConfig) -> ToolkitOptions | None:
    if config.toolkit_uri is None:
        return None
    folder = Path(config.toolkit_dir) if config.toolkit_dir else cache_dir() / "toolkits"
    return ToolkitOptions(config.toolkit_uri, config.toolkit_sha256, folder, config.toolkit_timeout_seconds)


# -------------------------------------------------------------------------------------------------------------- entries


def _read_entries(
    manifest: str, wanted: Callable[[str], bool], catalog: Catalog | None, states: Mapping[str, State]
) -> list[ManifestEntry]:
    """The manifest's entries of wanted types, every raw input of a known dataset replaced by that dataset's shards.

    Lines of one dataset are merged.

    Raises:
        DataError: none is wanted; a dataset that is named has no complete shards, or is of another type
            than the line says.
    """
    listed = read_manifest(manifest)
    entries = [entry for entry in listed if wanted(entry.type)]
    if not entries:
        got = f"lines of {', '.join(order_types(entry.type for entry in listed))}"
        raise DataError("no entry of the types needed", where=manifest, got=got)
    if catalog is None:
        return entries
    found: dict[str, ManifestEntry] = {}
    states = dict(states)
    for entry in entries:
        raw = next((one for one in catalog.datasets.values() if one.names_input(entry.path)), None)
        named = [raw] if raw else [one for one in catalog.datasets.values() if one.names_shards(entry.path)]
        for dataset in named:
            if dataset.name not in states:
                states[dataset.name] = _find_state(dataset, None)
            _require_usable(dataset, states[dataset.name], catalog, entry)
        if raw is not None:
            log.info("%s: %s stands for %s", entry.where, entry.path, raw.shards)
        path = raw.shards if raw is not None else entry.path
        key = to_absolute(path) if named else entry.where
        known = found.get(key)
        weight = entry.weight + (known.weight if known is not None else 0.0)
        found[key] = replace(known or entry, path=path, weight=weight)
    return list(found.values())


def _require_usable(dataset: Dataset, state: State, catalog: Catalog, entry: ManifestEntry) -> None:
    if entry.type != dataset.type:
        problem = f"the line's type is not that of the dataset {dataset.name}"
        raise DataError(problem, where=entry.where, got=entry.type, expected=dataset.type)
    if state.status == "incomplete":
        raise DataError(
            f"the dataset {dataset.name} is not prepared",
            where=entry.where,
            got=f"no complete shards at {dataset.shards}",
            remedy=f"run liquid prepare --datasets_yaml={catalog.uri} or train with --prepare_data=auto",
        )
    if state.status == "changed":
        log.warning("%s: its inputs or settings have changed since its shards were made; they are used", dataset.name)


# ----------------------------------------------------------------------------------------------------------------- work


def prepare_datasets(datasets: Sequence[Dataset], mode: str, options: ToolkitOptions | None) -> dict[str, State]:
    """Prepare ``datasets`` as ``mode`` says and have their manifests name them; gives how each stands, by name.

    Raises:
        LiquidError: any problem a user can cause.
    """
    if options is not None and not any(dataset.format == TOOLKIT for dataset in datasets):
        raise UsageError(
            "no dataset needs the toolkit",
            where="--prep_toolkit_zip_uri",
            expected=f"a dataset that states format: {TOOLKIT}",
        )
    with ExitStack() as stack:
        stack.enter_context(_lock(datasets))
        toolkit = stack.enter_context(fetch(options)) if options is not None else None
        of_toolkit = toolkit.sha256 if toolkit is not None else None
        states = {one.name: _find_state(one, of_toolkit if one.format == TOOLKIT else None) for one in datasets}
        to_do = [one for one in datasets if _is_to_do(one, states[one.name], mode)]
        outputs = _convert([one for one in to_do if one.format == TOOLKIT], states, toolkit, stack)
        failures: list[DataError] = []
        for dataset in datasets:
            if dataset in to_do:
                files = states[dataset.name].files
                try:
                    marker = _prepare_one(dataset, files, outputs.get(dataset.name), of_toolkit, force=mode == "force")
                except DataError as error:  # what is wrong with one dataset keeps no other from being prepared
                    failures.append(error)
                    log.warning("%s cannot be prepared, the datasets after it are: %s", dataset.name, error)
                    continue
                states[dataset.name] = State("prepared", marker, files)
            complete = states[dataset.name].marker is not None and mode != "skip"
            if dataset.manifest is not None and complete and write_line(dataset):
                log.info("%s: %s names its shards", dataset.name, dataset.manifest)
        if failures:
            raise failures[0]
    return states


@contextlib.contextmanager
def _lock(datasets: Sequence[Dataset]) -> Iterator[None]:
    """While entered, no other process of this user on this machine prepares one of ``datasets``: it waits its turn.

    Processes on several machines do the same work twice, which ends with the same shards.
    """
    folder = cache_dir() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        for shards in sorted(dataset.shards for dataset in datasets):  # one order for all: nobody waits in a circle
            path = folder / hashlib.sha256(shards.encode()).hexdigest()[:16]
            stack.enter_context(storage.locked(path, on_wait=partial(log.info, "waiting for process %s to prepare")))
        yield


def _find_state(dataset: Dataset, toolkit_sha256: str | None) -> State:
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
    is_current = marker["fingerprint"] == fingerprints(dataset, files, toolkit=toolkit)[-1]
    return State("complete" if is_current else "changed", marker, files)


def _is_to_do(dataset: Dataset, state: State, mode: str) -> bool:
    to_do = mode == "force" or (mode == "auto" and state.status != "complete")
    if to_do and not state.files:
        raise DataError(
            "there is nothing to prepare from",
            where=f"dataset {dataset.name}",
            got=f"no file matches {', '.join(dataset.inputs)}",
            remedy="use --prepare_data=auto: its shards are complete",
        )
    return to_do


def _convert(
    datasets: list[Dataset], states: Mapping[str, State], toolkit: Toolkit | None, stack: ExitStack
) -> dict[str, list[FileInfo]]:
    """What the toolkit makes of ``datasets``, by name, while the stack is open; it is not run where there are none."""
    if not datasets:
        return {}
    if toolkit is None:
        raise UsageError(
            f"{', '.join(one.name for one in datasets)} can only be prepared by a toolkit",
            where="--prep_toolkit_zip_uri",
            remedy="name the toolkit",
        )
    return stack.enter_context(toolkit.convert({one.name: (one, states[one.name].files) for one in datasets}))


def _prepare_one(
    dataset: Dataset, files: Sequence[FileInfo], outputs: list[FileInfo] | None, of_toolkit: str | None, *, force: bool
) -> dict[str, Any]:
    total = sum(one.size for one in outputs or files) / _MEGABYTE
    with Stage(f"prepare {dataset.name}", unit="MB", total=total) as stage:
        marker = prepare(
            dataset,
            files,
            toolkit=None if outputs is None else of_toolkit,
            outputs=outputs,
            force=force,
            advance=lambda amount: stage.advance(amount / _MEGABYTE),
            note=stage.note,
        )
    counts = marker["counts"]
    log.info("%s: %s", dataset.name, format_counts(counts))
    if counts["rejected"]:
        log.warning("%s: %d malformed records, see %s", dataset.name, counts["rejected"], rejects_uri(dataset))
    return marker


def _describe(dataset: Dataset, state: State) -> dict[str, Any]:
    described: dict[str, Any] = {"status": state.status, "type": dataset.type, "shards": dataset.shards}
    if state.marker is not None:
        wanted = ("fingerprint", "counts", "inputs", "toolkit_sha256")
        described |= {key: state.marker[key] for key in wanted if key in state.marker}
        described["num_shards"] = len(state.marker["shards"])
        if state.marker["counts"]["rejected"]:
            described["rejects"] = rejects_uri(dataset)
    return described
