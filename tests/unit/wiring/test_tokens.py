"""Where the Hugging Face token comes from; ``integration/test_hf_token.py`` follows it through whole commands."""

from dataclasses import replace

import fsspec
import pytest

from liquid_llm.config import TeacherConfig, build_run_config
from liquid_llm.errors import StorageError, UsageError
from liquid_llm.options import ANNEAL
from liquid_llm.wiring.tokens import read_token


@pytest.fixture
def teacher(monkeypatch) -> TeacherConfig:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return build_run_config(ANNEAL, {"dataset_name": "d"}).teacher


def test_none_is_needed_and_the_environment_gives_one(teacher, monkeypatch):
    assert read_token(teacher) is None
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "hf_old")
    assert read_token(teacher) == "hf_old"
    monkeypatch.setenv("HF_TOKEN", "hf_new")
    assert read_token(teacher) == "hf_new"


def test_what_is_named_comes_before_the_environment(teacher, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_environment")
    (tmp_path / "token").write_text("  hf_file\n")
    fsspec.filesystem("memory").pipe_file("/tokens/one", b"hf_object\n")
    assert read_token(replace(teacher, token_file=str(tmp_path / "token"))) == "hf_file"
    assert read_token(replace(teacher, token_uri="memory://tokens/one")) == "hf_object"


@pytest.mark.parametrize("content", [b"", b"\n", b"hf_a hf_b", b"hf_a\nhf_b", b"\xff\xfe"])
def test_what_is_no_token_is_refused_without_being_shown(teacher, tmp_path, content):
    (tmp_path / "token").write_bytes(content)
    with pytest.raises(UsageError, match="--hf_token_file") as caught:
        read_token(replace(teacher, token_file=str(tmp_path / "token")))
    assert "hf_a" not in str(caught.value)


def test_a_place_without_one_is_named(teacher, tmp_path):
    with pytest.raises(UsageError, match="cannot read the token file"):
        read_token(replace(teacher, token_file=str(tmp_path / "nowhere")))
    with pytest.raises(StorageError, match="memory://tokens/nowhere"):
        read_token(replace(teacher, token_uri="memory://tokens/nowhere"))
    with pytest.raises(UsageError, match="projects/PROJECT/secrets/NAME"):
        read_token(replace(teacher, token_secret="a-secret"))
