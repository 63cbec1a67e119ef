"""Which types are shuffled a few data files at a time: chosen once, and kept."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.checkpoints import metadata_of
from tests.support.gcs import Bucket

from liquid_llm import storage
from liquid_llm.checkpoint.resume import ResumeSource
from liquid_llm.config import RunConfig, build_run_config
from liquid_llm.data.two_levels import MAX_SHARDS, WINDOW_TOKENS
from liquid_llm.data.types import ManifestEntry
from liquid_llm.errors import UsageError
from liquid_llm.identity import ModelIdentity
from liquid_llm.signal_store.codecs import get_codec
from liquid_llm.signal_store.description import write_store_file
from liquid_llm.signal_store.records import SignalIdentity
from liquid_llm.wiring.order import choose_apart, choose_windows, needs_files, order_version, say_scattered
from liquid_llm.wiring.start import Start

FRESH = Start("fresh", ResumeSource({}, "--student=x"))
TYPES = ["lm", "math_tool", "code"]


def config(**given: Any) -> RunConfig:
    return build_run_config("train", {"dataset_manifest": "m.jsonl", "lm_teacher_id": "t", **given})


def going_on(**run: Any) -> Start:
    metadata = replace(metadata_of(3), run=run)
    return Start("continue", ResumeSource({}, "run/last.pt", metadata, state={"optimizer": {}}))


def begin(uri: str, layout: str) -> str:
    identity = SignalIdentity.of(get_codec("topk"), ModelIdentity("t", "r", "h"), 100)
    write_store_file(uri, identity, layout)
    return uri


def test_units_in_a_bucket_are_read_by_file_and_nothing_else_is(gcs: Bucket, tmp_path: Path) -> None:
    far, near = begin(f"{gcs.uri}/far", "units"), begin(str(tmp_path), "units")
    packed = begin(f"{gcs.uri}/packed", "shards")
    windows, choices = choose_windows(config(math_logits_dir=far, code_logits_dir=near), FRESH, TYPES)
    assert windows == {"math_tool": WINDOW_TOKENS}
    assert choices["order"].value == "shards"
    assert "math_tool" in choices["order"].reason
    assert choose_windows(config(math_logits_dir=packed), FRESH, TYPES) == ({}, {})
    asked = config(math_logits_dir=far, order="whole")
    assert choose_windows(asked, FRESH, TYPES)[0] == {}
    assert choose_windows(config(order="shards"), FRESH, TYPES)[0] == dict.fromkeys(TYPES, WINDOW_TOKENS)
    assert [needs_files(asked, type) for type in TYPES] == [False, True, False], (
        "records are found by file all the same"
    )
    assert needs_files(config(order="shards"), "lm")
    assert storage.exists(far)


def test_a_run_that_goes_on_keeps_its_order() -> None:
    kept = going_on(window_tokens={"code": 1000})
    assert choose_windows(config(), kept, TYPES)[0] == {"code": 1000}
    assert choose_windows(config(), going_on(), TYPES) == ({}, {}), "what was begun before there was another one"
    assert choose_windows(config(order="whole"), going_on(), TYPES) == ({}, {})
    for asked, start in (("whole", kept), ("shards", kept), ("shards", going_on())):
        with pytest.raises(UsageError, match=rf"--order={asked}.*run/last\.pt.*--restart"):
            choose_windows(config(order=asked), start, TYPES)
    assert choose_windows(config(order="shards"), going_on(window_tokens={"code": 9}), ["code"])[0] == {"code": 9}


def test_many_lines_of_a_manifest_are_no_way_to_list_files(caplog: pytest.LogCaptureFixture) -> None:
    entries = [ManifestEntry(f"part-{number}.jsonl", "code", 1.0, "") for number in range(MAX_SHARDS)]
    with caplog.at_level(logging.WARNING):
        say_scattered({"code": 5}, [*entries, ManifestEntry("x.jsonl", "lm", 1.0, "")])
        assert caplog.text == ""
        say_scattered({"code": 5}, [*entries, entries[0]])
    assert f"code: {MAX_SHARDS + 1} lines" in caplog.text
    assert "one pattern" in caplog.text


def test_only_another_order_has_another_version() -> None:
    assert [order_version(size, {}) for size in (1, 2)] == [1, 2]
    assert [order_version(size, {"lm": 5}) for size in (1, 2)] == [3, 3]
    assert [order_version(size, {"lm": 5}, blocks_by_file=True) for size in (1, 2)] == [4, 4]


def test_blocks_end_with_their_file_but_for_a_run_that_was_begun_before() -> None:
    windows = dict.fromkeys(TYPES, 9)
    assert choose_apart(config(), FRESH, windows) == TYPES
    assert choose_apart(config(), going_on(window_tokens=windows, blocks_by_file=True), windows) == TYPES
    assert choose_apart(config(), going_on(window_tokens=windows), windows) == ["math_tool", "code"]
