"""Texts with secrets in them: masked in time that is linear in the text, and once for all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tests.fuzz.bytes_to_choices import mutate_bytes as mutate

from liquid_llm.masking import Masker

__all__ = ["check", "mutate", "seeds"]

SECRET = "s3cr3t-Value-0815"


def seeds() -> Iterator[bytes]:
    yield b'https://u:p@host/x?sig=abc&X-Amz-Signature=abc {"api_key": "x\\"y", "a": {"token": 3}} --hf_token=a'
    yield b"Authorization: Bearer abcdefgh eyJhbGciOiJI.eyJzdWIiOi.abc hf_abcdefghijk -----BEGIN PRIVATE KEY-----x"
    yield b"a=" * 500 + b"'" * 500 + b'"' * 500
    yield b"num_key_value_heads=3 eos_token_id=2 " + SECRET.encode()


def check(data: bytes, folder: Path) -> None:
    text, masker = data.decode("utf-8", "replace"), Masker([SECRET])
    for words in (text, text * 20, f"{text} {SECRET} {text}"):
        masked = masker.text(words)
        assert SECRET not in masked
    masker.argv(text.split())
    masker.value({"a": text, text: [text, {"password": text}]})
