"""Bringing a folder to the hub: the hub's real client against a hub on this machine, which also fails."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.hub import TOKEN, FakeHub, running_hub

from liquid_llm.errors import LiquidError, StorageError, UsageError
from liquid_llm.models import publishing
from liquid_llm.models.publishing import Hub

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of the hub's client

WEIGHTS = bytes(range(256)) * 4


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setattr(publishing, "_PAUSES", (0.0, 0.0, 0.0))
    with running_hub(monkeypatch) as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "student"
    made.mkdir()
    (made / "config.json").write_text("{}")
    (made / "model.safetensors").write_bytes(WEIGHTS)
    return made


def test_a_folder_arrives_whole_and_what_is_left_of_an_earlier_model_goes(
    hub: FakeHub, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    address = Hub("owner/small", TOKEN).push(folder, "first", True, [tmp_path / "small.gguf"])
    assert address == f"{hub.base}/owner/small"
    assert hub.private["owner/small"] in (True, "private")
    expected = {"config.json": b"{}", "model.safetensors": WEIGHTS, "small.gguf": b"GGUF"}
    assert hub.files["owner/small"] == expected
    hub.files["owner/small"] |= {"model-00001-of-00002.safetensors": b"old", "LICENSE": b"mine"}
    (folder / "config.json").write_text('{"a": 1}')
    Hub("small", TOKEN).push(folder, "second")
    assert hub.files["owner/small"] == {**expected, "config.json": b'{"a": 1}', "LICENSE": b"mine"}


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_busy_hub_is_asked_again(hub: FakeHub, folder: Path, status: int) -> None:
    hub.faults = [status, 0, status]
    target = Hub("owner/small", TOKEN)
    target.look()
    target.push(folder, "first")
    assert hub.files["owner/small"]["model.safetensors"] == WEIGHTS


def test_a_hub_that_stays_busy_is_given_up_on(hub: FakeHub, folder: Path) -> None:
    hub.faults = [503] * 99
    with pytest.raises(StorageError, match="503"):
        Hub("owner/small", TOKEN).push(folder, "first")
    assert hub.files == {}
    assert len(hub.asked) == 1 + len(publishing._PAUSES)


def test_refusals_are_said_in_words_once_and_without_the_token(
    hub: FakeHub, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    unknown, reader = "hf_" + "zZyY9876" * 4, "hf_" + "rReE5678" * 4
    hub.readers.add(reader)
    for token, said in ((unknown, "does not know this token"), (reader, "may not write")):
        before = len(hub.asked)
        with pytest.raises(UsageError, match=said) as caught:
            Hub("owner/small", token).push(folder, "first")
        assert 1 <= len(hub.asked) - before <= 2, "not again"  # the client looks whether it is there
        assert token not in f"{caught.value} {caught.value!r} {caplog.text}"
        assert caught.value.__cause__ is None
    with pytest.raises(UsageError, match="does not know this token"):
        Hub("owner/small", unknown).look()
    assert hub.files == {}


def test_what_cannot_be_sent_is_refused_before_anything_is(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/b/c", "", "../up", "owner/with space", "owner/", "a--b"):
        with pytest.raises(UsageError, match="no name of a repository"):
            Hub(name, TOKEN)
    with pytest.raises(UsageError, match=r"no Hugging Face token.*HF_TOKEN"):
        Hub("owner/small", None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE"):
        Hub("owner/small", TOKEN)
    assert hub.asked == []


def test_a_hub_that_is_away(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(LiquidError, match="does not answer") as caught:
        Hub("owner/small", TOKEN).look()
    assert caught.value.exit_code == 4
