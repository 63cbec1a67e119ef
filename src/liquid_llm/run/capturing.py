"""A capture job from options to exit code (Stage A)."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping

import torch

from liquid_llm.config import CaptureConfig, build_capture_config
from liquid_llm.data.tokens import TokenDataset
from liquid_llm.data.types import STORED_TYPES
from liquid_llm.errors import UsageError
from liquid_llm.models.loading import load_tokenizer
from liquid_llm.run.inputs import TextTools, read_manifest_inputs
from liquid_llm.run.teachers import STORE_OPTIONS, load_online, text_tools
from liquid_llm.run.tokens import read_token
from liquid_llm.run.unavailable import refuse_unavailable
from liquid_llm.runtime import choose_device
from liquid_llm.teachers.capture import CaptureSummary, capture
from liquid_llm.teachers.codecs import get_codec
from liquid_llm.teachers.store import StoreWriter
from liquid_llm.terminal import Stage, setup_logging

log = logging.getLogger(__name__)


def run_capture(given: Mapping[str, object]) -> int:
    """Run one capture job; prints its summary as one JSON line on stdout and returns the exit code.

    Raises:
        LiquidError: any problem a user can cause.
    """
    setup_logging("INFO")
    config = build_capture_config(given)
    refuse_unavailable(given)
    summary = capture_signal(config)
    print(json.dumps(summary.as_dict(), sort_keys=True))
    return 3 if summary.failed else 0


def capture_signal(config: CaptureConfig) -> CaptureSummary:
    """Score the maths and code samples of the manifest that have no complete record yet."""
    teacher_id = config.teacher.stored_id
    assert teacher_id is not None
    token = read_token(config.teacher)
    text = text_tools(load_tokenizer(teacher_id, token=token))
    datasets = _datasets(config, text)
    device = torch.device(choose_device().value)
    loaded, _ = load_online(teacher_id, config.teacher, device, token)
    options = {"k": config.store.topk} if config.store.codec == "topk" else {}
    codec = get_codec(config.store.codec, options=options)
    vocab_size = min(text.vocab_size, loaded.model.config.vocab_size)
    writers = {
        kind: StoreWriter(_folder(config, kind), loaded.identity, codec, vocab_size=vocab_size) for kind in datasets
    }
    windows = sum(
        int(dataset.lengths.clip(max=config.data.seq_len).sum()) for parts in datasets.values() for dataset in parts
    )
    with Stage("capture", unit="tokens", total=windows) as stage:
        return capture(
            datasets,
            writers,
            loaded,
            seq_len=config.data.seq_len,
            batch_size=config.data.batch_size,
            num_workers=config.data.num_workers,
            overwrite=config.store.overwrite,
            progress=stage.advance,
        )


def _datasets(config: CaptureConfig, text: TextTools) -> dict[str, list[TokenDataset]]:
    with Stage("tokenise", unit="tokens", total=None) as stage:
        inputs = read_manifest_inputs(
            config.data, text, only=STORED_TYPES, progress=lambda _, tokens: stage.advance(tokens)
        )
    datasets: dict[str, list[TokenDataset]] = {}
    for dataset in inputs.everything:
        _folder(config, dataset.type)
        datasets.setdefault(dataset.type, []).append(dataset)
    return datasets


def _folder(config: CaptureConfig, kind: str) -> str:
    folder = getattr(config.teacher, STORE_OPTIONS[kind])
    if folder is None:
        option = f"--{STORE_OPTIONS[kind].replace('_dir', '')}_logits_dir"
        raise UsageError(f"the manifest has {kind} samples but {option} is not given", where=option)
    return str(folder)
