"""Stores of signal in both layouts: the bytes decide how a valid one is changed.

A change of bytes is noticed: what can still be used is what was written. A change of what the bytes say, with checksums
made anew, can come from a hostile store alone: it ends in the project's words.
"""

from __future__ import annotations

import io
import json
import tempfile
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tests.fuzz.bytes_to_choices import Choices, edit_bytes, edit_value
from tests.fuzz.driver import attempt
from tests.support.stores import SAMPLES, VOCAB, write

from liquid_llm.jobs.doctor import examine
from liquid_llm.losses.signals import SparseSignal
from liquid_llm.signal_store.codecs import get_codec
from liquid_llm.signal_store.pt import _checksum
from liquid_llm.signal_store.records import RecordError
from liquid_llm.signal_store.shards.file import sample_key, save_safetensors
from liquid_llm.signal_store.shards.pack import pack
from liquid_llm.signal_store.store import StoreReader, open_store
from liquid_llm.signal_store.survey import survey

FEW = SAMPLES[:4]
CODECS = ("topk", "sampled", "tail", "full")


def seeds() -> Iterator[bytes]:
    for layout in range(2):
        for codec in range(len(CODECS)):
            yield bytes([layout, codec])
            yield from (bytes([layout, codec, kind, 1, 3, 7, 2, 9, 4, 1, 1, 2]) for kind in range(5))


@cache
def base(layout: str, codec: str) -> dict[str, bytes]:
    """The files of a valid store."""
    with tempfile.TemporaryDirectory() as folder:
        write(folder, FEW, layout=layout, codec=get_codec(codec))
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}


@cache
def _signals(layout: str, codec: str) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        _put(base(layout, codec), Path(folder))
        store = open_store(folder)
        found = [store.get(sample, 1024, 1.0).signal for sample in FEW]
        store.close()
        return found


def _put(files: dict[str, bytes], folder: Path) -> None:
    for name, data in files.items():
        (folder / name).write_bytes(data)


def check(data: bytes, folder: Path) -> None:
    choices = Choices(data)
    layout, codec = choices.one(("pt", "shards")), choices.one(CODECS)
    files, honest = dict(base(layout, codec)), True
    while choices:
        name = choices.one(sorted(files))
        kind = choices.below(8)
        if kind < 3:
            files[name] = edit_bytes(files[name], choices)
            honest = honest and name != "store.json"
        elif name == "store.json":
            files[name], honest = _edit_json(files[name], choices), False
        elif name.endswith(".pt"):
            files[name], honest = _edit_pt(files[name], choices), False
        else:
            files[name], honest = _edit_safetensors(files[name], choices), False
    _put(files, folder)
    store = attempt(lambda: open_store(str(folder)))
    if store is not None:
        try:
            _read(store, _signals(layout, codec) if honest else None)
            pack(store, str(folder / "packed"))
        finally:
            store.close()
    examine(str(folder))


def _read(store: StoreReader, expected: list[Any] | None) -> None:
    store.describe()
    for number, sample in enumerate(FEW):
        for window in (1024, 10):
            store.check(sample, window)
            signal = store.get(sample, window, 1.0).signal
            if signal is None:
                continue
            assert signal.num_positions == len(sample.learnt_positions(window)) or store.identity.positions
            if isinstance(signal, SparseSignal):
                assert signal.ids.numel() == 0 or 0 <= int(signal.ids.min()) <= int(signal.ids.max()) < max(
                    VOCAB, store.identity.vocab_size
                )
            if expected is not None and window == 1024:
                assert _same(signal, expected[number])
    for _, record in store.layout.records():
        assert isinstance(record, RecordError) or record.header.positions().size >= 0
    survey(store, samples=3, temperature=1.0, seed=0)


def _same(one: Any, other: Any) -> bool:
    tensors = [
        {name: value for name, value in vars(each).items() if isinstance(value, torch.Tensor)} for each in (one, other)
    ]
    return all(torch.equal(value, tensors[1][name]) for name, value in tensors[0].items())


def _edit_json(data: bytes, choices: Choices) -> bytes:
    try:
        return json.dumps(edit_value(json.loads(data), choices)).encode()
    except (ValueError, RecursionError):
        return data


def _edit_pt(data: bytes, choices: Choices) -> bytes:
    """Another header, or another tensor, with the checksum of both."""
    try:
        record = torch.load(io.BytesIO(data), weights_only=True)
        header, payload = dict(record["header"]), dict(record["payload"])
        header.pop("checksum", None)
        if choices.below(3):
            header = edit_value(header, choices)
        elif payload:
            name = choices.one(sorted(payload))
            payload[name] = _edit_tensor(payload[name], choices)
        try:
            header["checksum"] = _checksum(header, payload)
        except Exception:  # noqa: BLE001 - a header that has none is one more that must be refused
            header = header if isinstance(header, dict) else {"checksum": 0}
        stream = io.BytesIO()
        torch.save({"header": header, "payload": payload}, stream)
        return stream.getvalue()
    except Exception:  # noqa: BLE001 - it was changed before and is no archive any more
        return data


def _edit_tensor(tensor: torch.Tensor, choices: Choices) -> torch.Tensor:
    kind = choices.below(6)
    if kind == 0:
        return tensor[: choices.below(max(1, len(tensor)))] if tensor.dim() else tensor
    if kind == 1:
        return tensor.to(choices.one((torch.uint8, torch.int64, torch.float32, torch.bool)))
    if kind == 2:
        return tensor.unsqueeze(choices.below(2))
    raw = bytearray(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    for _ in range(1 + choices.below(4)):
        if raw:
            raw[choices.below(len(raw))] = choices.below(256)
    return torch.frombuffer(raw, dtype=tensor.dtype).reshape(tensor.shape) if raw else tensor


def _edit_safetensors(data: bytes, choices: Choices) -> bytes:
    """Another value in a shard's or an index's header, other arrays, or another record, with all checksums."""
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        values = json.loads(header["__metadata__"]["liquid_llm"].partition(" ")[2])
        arrays = {
            name: np.frombuffer(
                data[8 + length :][slice(*one["data_offsets"])], {"U8": "u1", "U32": "<u4", "U64": "<u8"}[one["dtype"]]
            ).copy()
            for name, one in header.items()
            if name != "__metadata__"
        }
        kind = choices.below(4)
        if kind == 0:
            values = edit_value(values, choices)
        elif kind == 1:
            name = choices.one(sorted(arrays))
            if arrays[name].size:
                arrays[name][choices.below(arrays[name].size)] = choices.one((0, 1, 200, 255, choices.below(256)))
        elif kind == 2 and "ids" in arrays:
            ids = json.loads(zlib.decompress(arrays["ids"].tobytes()))
            packed = zlib.compress(json.dumps(edit_value(ids, choices)).encode())
            arrays["ids"] = np.frombuffer(packed, np.uint8)
        elif "records" in arrays:
            arrays["records"] = _edit_record(arrays, choices)
        if isinstance(values, dict) and "ids" in arrays and "ids_crc" in values and choices.below(8):
            values["ids_crc"] = zlib.crc32(arrays["ids"].tobytes())
        if isinstance(values, dict) and "arrays_crc" in values:
            running = 0
            for name in ("high", "low", "rows"):
                running = zlib.crc32(arrays[name].data, running)
            values["arrays_crc"] = running
        return save_safetensors(arrays, values)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, zlib.error, IndexError):
        return data


def _edit_record(arrays: dict[str, Any], choices: Choices) -> Any:
    ids = json.loads(zlib.decompress(arrays["ids"].tobytes()))
    row = choices.below(len(ids))
    begin = int(arrays["ends"][row - 1]) if row else 0
    record = arrays["records"].tobytes()[begin : int(arrays["ends"][row])]
    body = bytearray(record[4:])
    for _ in range(1 + choices.below(3)):
        body[(8 + choices.below(12)) if choices.below(2) else choices.below(len(body))] = choices.below(256)
    packed = zlib.crc32(body, zlib.crc32(sample_key(ids[row]))).to_bytes(4, "little") + bytes(body)
    found = bytearray(arrays["records"].tobytes())
    found[begin : begin + len(record)] = packed
    return np.frombuffer(found, np.uint8)
