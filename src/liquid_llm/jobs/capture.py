"""A capture job from options to exit code (Stage A)."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from liquid_llm import storage
from liquid_llm.capture.held_out import SHARE, choose_held_out, open_held_out, say_held_out
from liquid_llm.capture.job import CaptureSummary, capture
from liquid_llm.capture.served import ServedTeacher
from liquid_llm.capture.units import UnitsSummary
from liquid_llm.config import CaptureConfig, StoreConfig, as_plain, build_capture_config
from liquid_llm.data.tokens import TokenDataset
from liquid_llm.data.types import ManifestEntry
from liquid_llm.distributed import read_rank
from liquid_llm.errors import DataError, DeviceError, Interrupted, SignalError, UsageError
from liquid_llm.framing import Framing
from liquid_llm.identity import ModelIdentity
from liquid_llm.jobs.prepare import RunData, describe_datasets, prepare_run_data, require_manifest
from liquid_llm.losses.signals import WHOLE
from liquid_llm.models.loading import LoadedModel, identify, load_tokenizer
from liquid_llm.provenance import write_provenance
from liquid_llm.runtime import Choice, StopSignal, choose_device, keep_freed_memory
from liquid_llm.signal_store.codecs import Codec, get_codec, usual_codec
from liquid_llm.signal_store.description import present_layout, read_store_file, require_own
from liquid_llm.signal_store.records import SignalIdentity
from liquid_llm.signal_store.store import StoreWriter
from liquid_llm.sources import SAMPLES, SPELLINGS, WINDOWS
from liquid_llm.terminal import Stage, setup_logging
from liquid_llm.wiring.fitting import Fit, check_capture_fit, say_fit
from liquid_llm.wiring.framing import Speaker, choose_framings, framing_to_record
from liquid_llm.wiring.inputs import Inputs, read_dataset_inputs, read_manifest_inputs
from liquid_llm.wiring.repeat import begin_choice, options_to_repeat
from liquid_llm.wiring.served import find_served, try_served
from liquid_llm.wiring.teachers import check_quantised, load_online
from liquid_llm.wiring.tokenizers import TextTools
from liquid_llm.wiring.tokens import read_token

log = logging.getLogger(__name__)


def run_capture(given: Mapping[str, object], new_layout: str) -> int:
    """Run one capture job; prints its summary as one JSON line on stdout and returns the exit code.

    Args:
        given: option name -> value.
        new_layout: of stores that are not there yet, where no option says so.

    Raises:
        LiquidError: any problem a user can cause.
        Interrupted: the process was asked to stop; everything begun is written.
    """
    setup_logging("INFO")
    config = build_capture_config(given)
    summary = capture_signal(config, new_layout)
    print(json.dumps(summary.as_dict(), sort_keys=True), flush=True)
    return exit_code(summary)


def exit_code(summary: CaptureSummary) -> int:
    """What the job's process ends with.

    Raises:
        Interrupted: it was asked to stop.
        DeviceError: samples are too large for the device's memory.
    """
    if summary.interrupted:
        raise Interrupted(
            f"stopped with {summary.written + summary.skipped:,} records complete",
            remedy="run the same command again to go on",
        )
    if summary.too_large:
        raise DeviceError(
            f"{summary.too_large:,} samples do not fit into the device's memory even alone; the rest is captured",
            got=summary.consumers,
            remedy="shorten --seq_len, use a smaller teacher or a larger device, and run the same command again",
        )
    broken = isinstance(summary, UnitsSummary) and summary.broken
    return DataError.exit_code if summary.failed or broken else 0


class _Store(NamedTuple):
    """A store that is written to; ``codec``: of one that was begun already."""

    layout: str
    framing: Framing | None
    codec: Codec | None


class Asked(NamedTuple):
    """What a capture needs beside data and the teacher's weights.

    Attributes:
        model: what the teacher is.
        stores: by folder.
        served: a teacher behind a server, which has answered, and the choices made for it; None: a model here.
    """

    model: ModelIdentity
    codec: Codec
    device: Choice
    token: str | None
    text: TextTools
    stores: dict[str, _Store]
    served: tuple[ServedTeacher, dict[str, Choice]] | None


def check_capture(config: CaptureConfig, new_layout: str = "pt") -> Asked:
    """Find out, before data is read or a teacher is loaded, what a capture can be refused for without them.

    Raises:
        LiquidError: any problem a user can cause.
    """
    teacher_id = config.teacher.stored_id
    assert teacher_id is not None
    asked = codec_of(config.store)
    device = choose_device(config.device)
    require_manifest(config.data)
    for source in config.source.named.values():
        if source.store is not None and not storage.is_remote(source.store):
            storage.check_writable(source.store)
    token = read_token(config.teacher)
    text = _text_tools(config, teacher_id, token)
    _check_num_ids(asked, text.vocab_size)
    model = find_served(config, text, token)
    if model is None:
        check_quantised(teacher_id, config.teacher, device, token)
        identity = identify(teacher_id, text.hash, token=token, quantise=config.teacher.quantisation)
    else:
        identity = model.identity
    stores = _choose_stores(config, text, asked, identity, new_layout)
    served = None
    if model is not None:
        codecs = [store.codec or asked for store in stores.values()]
        served = try_served(config, model, text, codecs, torch.device(device.value), token)
    return Asked(identity, asked, device, token, text, stores, served)


def capture_signal(config: CaptureConfig, new_layout: str = "pt") -> CaptureSummary:
    """Score the samples of the manifest that have no complete record yet, each type's into the store named for it.

    What can be refused without the data or the teacher's weights is refused before: both may take long.
    """
    from liquid_llm.jobs.capture_units import capture_units, is_of_units  # which goes on with what is here

    asked = check_capture(config, new_layout)
    return capture_units(config, asked) if is_of_units(config, asked) else _capture_at_once(config, asked)


def _capture_at_once(config: CaptureConfig, found: Asked) -> CaptureSummary:
    """Score what is missing of all samples, or of this process's share of them."""
    _, asked, device_choice, token, text, stores, _ = found
    device = torch.device(device_choice.value)
    data = prepare_run_data(config.data, lambda type: is_captured(config, type))
    inputs = _read_inputs(config, text, data.entries, token)
    datasets: dict[str, list[TokenDataset]] = {}
    for dataset in inputs.everything:
        datasets.setdefault(dataset.type, []).append(dataset)
    codecs = _choose_codecs(config, datasets, stores)
    loaded, choices, vocab_size = open_teacher(config, found)
    rank, world_size = read_rank()
    writers = {}
    for type in datasets:
        folder = choose_folder(config, type)
        layout, framing = stores[folder].layout, stores[folder].framing
        open_writer = partial(StoreWriter, vocab_size=vocab_size, positions=config.store.positions)
        writers[type] = open_writer(folder, loaded.identity, codecs[folder], layout=layout, framing=framing)
        log.info("%s goes to %s, layout %s", type, folder, layout)
    held_out = _choose_held_out(config, inputs)
    held_out = {type: parts for type, parts in held_out.items() if writers[type].codec.form != WHOLE}
    judged = {type: stores[choose_folder(config, type)].framing for type in held_out}
    judging = open_held_out({type: writers[type].uri for type in held_out}, judged, loaded.identity, vocab_size)
    lengths = [dataset.lengths.clip(max=config.data.seq_len) for parts in datasets.values() for dataset in parts]
    longest = max((int(one.max()) for one in lengths if one.size), default=0)
    largest = max(codecs.values(), key=lambda codec: codec.most_ids, default=asked)
    fit = find_fit(config, loaded, largest, longest, vocab_size, device)
    windows = sum(int(one.sum()) for one in lengths)
    with StopSignal() as stop:
        score = partial(
            capture,
            teacher=loaded,
            seq_len=config.data.seq_len,
            batch_size=config.data.batch_size,
            num_workers=max(1, config.data.num_workers),
            overwrite=config.store.overwrite,
            stopping=lambda: stop.requested,
            rank=rank,
            world_size=world_size,
        )
        with Stage("capture", unit="tokens", total=windows // world_size) as stage:
            summary = score(datasets, writers, progress=stage.advance)
        if judging and not summary.interrupted:
            also = score(held_out, judging)
            summary.interrupted = also.interrupted
            say_held_out(also, judging)
    if summary.too_large:
        summary.consumers = fit.largest()
    if summary.written and rank == 0:
        layouts = {stores[folder].layout for folder in codecs}
        given = {**config.given, "logits_format": layouts.pop()} if len(layouts) == 1 else config.given
        choices |= {"device": device_choice, **begin_choice(text.framings, datasets)}
        readiness = {"types": inputs.readiness(), **data.readiness}
        record_capture(codecs, config, given, inputs.entries, readiness, data, choices, loaded.identity)
    return summary


def open_teacher(config: CaptureConfig, found: Asked) -> tuple[LoadedModel | ServedTeacher, dict[str, Choice], int]:
    """The teacher on its device, or behind its server; the choices made for it; how many ids its signal is over."""
    teacher_id, device = config.teacher.stored_id, torch.device(found.device.value)
    assert teacher_id is not None
    if device.type == "cpu":
        keep_freed_memory()
    loaded, choices = found.served or load_online(teacher_id, config.teacher, device, found.token)
    return loaded, choices, min(found.text.vocab_size, loaded.vocab_size)


def find_fit(
    config: CaptureConfig,
    teacher: LoadedModel | ServedTeacher,
    codec: Codec,
    longest: int,
    vocab_size: int,
    device: torch.device,
) -> Fit:
    """Whether the capture fits, which is said; not known where a server runs the teacher: there is little here."""
    if not isinstance(teacher, LoadedModel):
        return Fit(None, None, None)
    fit = check_capture_fit(config, teacher.model, codec, longest, vocab_size)
    say_fit(fit, device)
    return fit


def _choose_held_out(config: CaptureConfig, inputs: Inputs) -> dict[str, list[TokenDataset]]:
    """Type -> the samples whose signal is stored for evaluation too."""
    tokens = config.store.held_out_tokens
    if not tokens:
        return {}
    if config.data.manifest is None:
        return choose_held_out({"lm": inputs.everything[1:]}, 1.0, tokens)
    # Of windows the documents are held out, and a window does not say which it is of.
    whole = [one for one in inputs.everything if one.type not in inputs.windowed]
    return choose_held_out({one.type: [two for two in whole if two.type == one.type] for one in whole}, SHARE, tokens)


def _choose_stores(
    config: CaptureConfig, text: TextTools, asked: Codec, teacher: ModelIdentity, new_layout: str
) -> dict[str, _Store]:
    """Folder -> its store. Raises SignalError where one is there that cannot take this signal."""
    found = {}
    for type, source in config.source.named.items():
        if source.store is not None:
            framing = framing_to_record(source.store, text.framings(type))
            begun = _codec_of_begun(config.store, asked, source.store)
            identity = SignalIdentity.of(begun or asked, teacher, text.vocab_size, framing, config.store.positions)
            layout = _choose_layout(config, source.store, identity, new_layout)
            found[source.store] = _Store(layout, framing, begun)
    return found


def record_capture(
    stores: Iterable[str],
    config: CaptureConfig,
    given: Mapping[str, object],
    entries: Sequence[ManifestEntry],
    readiness: Mapping[str, Any],
    data: RunData,
    choices: Mapping[str, Choice],
    teacher: ModelIdentity,
) -> None:
    """Write beside the records of each of ``stores`` what would make them again: the options ``given``, and more."""
    for store in stores:
        write_provenance(
            store,
            options=options_to_repeat(given, choices),
            config=as_plain(config),
            manifest=[entry.plain() for entry in entries],
            readiness=readiness,
            datasets=describe_datasets(config.data, data),
            choices={name: vars(choice) for name, choice in choices.items()},
            extra={"teacher": teacher.plain()},
        )


def _text_tools(config: CaptureConfig, teacher_id: str, token: str | None) -> TextTools:
    own = Speaker(f"teacher {teacher_id}", load_tokenizer(teacher_id, token=token))
    framings = choose_framings(config.data.begin_token, config.source, {}, own)
    return TextTools.of(own.tokenizer, framings).learn(config.data, token)


def _check_num_ids(codec: Codec, vocab_size: int) -> None:
    if int(codec.options.get("k", 0)) > vocab_size:
        expected = f"at most {vocab_size}, the size of the vocabulary; --codec=full stores them all"
        raise UsageError("more ids than there are", where="--topk", got=codec.options["k"], expected=expected)


def _codec_of_begun(store: StoreConfig, asked: Codec, folder: str) -> Codec | None:
    """How the store that ``folder`` holds goes on: in the version it was begun with, and with its settings where none
    are given; None where there is no store.

    Raises:
        SignalError: this program does not have that codec's version.
    """
    if present_layout(folder) is None:
        return None
    there = read_store_file(folder).identity
    if there.codec != asked.name:
        return asked  # which is refused in a moment, in words
    return get_codec(asked.name, there.codec_version, {**there.codec_options, **_settings(store)})


def _choose_codecs(
    config: CaptureConfig, datasets: Mapping[str, Sequence[TokenDataset]], stores: Mapping[str, _Store]
) -> dict[str, Codec]:
    """The codec of each folder that something is captured into; says of a new one what was chosen, and why."""
    chosen = {}
    for folder in dict.fromkeys(choose_folder(config, type) for type in datasets):
        codec = stores[folder].codec
        if codec is None:
            held = [part for type, parts in datasets.items() if choose_folder(config, type) == folder for part in parts]
            count = sum(_count_stored(part, config) for part in held)
            codec = codec_of(config.store, count)
            settings = ", ".join(f"{name} {value}" for name, value in codec.options.items())
            why = "as asked" if config.store.codec_options else f"for the {count:,} positions it will hold"
            log.info("%s is begun with codec %s (%s), %s", folder, codec.name, settings or "no settings", why)
        chosen[folder] = codec
    return chosen


def _count_stored(dataset: TokenDataset, config: CaptureConfig) -> int:
    """The positions that get a row: of each sample's learnt ones the share kept, as ``SignalIdentity.num_chosen``."""
    return int(np.ceil(config.store.distilled_share * dataset.count_learnt(config.data.seq_len)).sum())


def codec_of(store: StoreConfig, num_positions: int = 0) -> Codec:
    """The codec asked for; what is not set suits a store of about ``num_positions`` stored ones.

    Raises:
        UsageError: a setting is not a name and a number, is given twice, or is not one that this codec has.
    """
    values = _settings(store)
    try:
        return get_codec(store.codec, options={**usual_codec(store.codec, num_positions).options, **values})
    except SignalError as error:
        raise UsageError(error.problem, where="--codec_options", got=error.got, expected=error.expected) from error


def _settings(store: StoreConfig) -> dict[str, int | float]:
    """The settings of the codec that are given."""
    values = _read_settings(store.codec_options or "")
    if store.topk is not None:
        if store.codec != "topk" or "k" in values:
            raise UsageError(
                "a setting of codec 'topk' only, to be given once",
                where="--topk",
                got=f"--codec={store.codec}" + (f" --codec_options={store.codec_options}" if values else ""),
                remedy="leave --topk out, or give --codec=topk",
            )
        values["k"] = store.topk
    return values


def _read_settings(text: str) -> dict[str, int | float]:
    """``name=number,name=number`` as a mapping."""
    values: dict[str, int | float] = {}
    for part in filter(None, text.split(",")):
        name, _, number = (word.strip() for word in part.partition("="))
        try:
            value: int | float = int(number) if number.lstrip("-").isdigit() else float(number)
        except ValueError:
            value = math.nan
        if not name or name in values or not math.isfinite(value):
            raise UsageError(
                f"the setting {name!r} is there twice" if name in values else "a setting is not a name and a number",
                where="--codec_options",
                got=repr(part),
                expected="name=number,name=number, such as draws_t1=48,draws_t2=30",
            )
        values[name] = value
    return values


def _read_inputs(config: CaptureConfig, text: TextTools, entries: Sequence[ManifestEntry], token: str | None) -> Inputs:
    for type in [entry.type for entry in entries] or ["lm"]:
        choose_folder(config, type)

    layout_of = partial(find_layout, config)
    with Stage("tokenise", unit="tokens", total=None) as stage:

        def progress(_: float, tokens: int) -> None:
            stage.advance(tokens)

        if config.data.manifest is None:
            return read_dataset_inputs(config.data, text, layout_of("lm"), token=token, progress=progress)
        return read_manifest_inputs(config.data, text, entries, layout_of, progress=progress)


def find_layout(config: CaptureConfig, type: str) -> str:
    """How the texts of a type are cut."""
    return WINDOWS if config.source(type).layout == WINDOWS else SAMPLES


def is_captured(config: CaptureConfig, type: str) -> bool:
    """Whether a type's signal is stored: where a place for it is named, and by itself for every type but plain text."""
    source = config.source(type)
    return source.store is not None if source.teacher is not None else type != "lm"


def _choose_layout(config: CaptureConfig, folder: str, identity: SignalIdentity, new_layout: str) -> str:
    """The layout of a store. Raises SignalError where one is there that is not of this identity."""
    there = present_layout(folder)
    layout = config.store.layout or there or new_layout
    if there is not None:
        require_own(folder, identity, layout)
    return layout


def choose_folder(config: CaptureConfig, type: str) -> str:
    """Where a type's signal goes. Raises UsageError where nothing says so."""
    folder = config.source(type).store
    if folder is None:
        named = [f"--{option}" for option, of in SPELLINGS.items() if of == type] + [f"--signal {type}=URI"]
        what = "manifest" if config.data.manifest else "dataset"
        raise UsageError(
            f"the {what} has {type} samples but {' or '.join(named)} is not given",
            where=named[0],
            remedy=f"name a folder or URL for their signal, or leave them out with --signal {type}=none",
        )
    return folder
