"""Keeps secrets out of everything a run writes or logs (leaf).

A secret is a token, password or key: recognised by the name it is filed under, by its shape, or because an environment
variable with such a name holds it. ``***`` stands in its place. Masking errs on the side of hiding: an ordinary word
hidden by mistake costs a reader a moment, a leaked token costs an account. But counts, ids and special tokens of models
(``num_tokens``, ``num_key_value_heads``, ``eos_token``) are no secrets, and stay.

Every pattern below either begins where the one before it ended, or fails within a fixed number of characters: the time
is linear in the text, whatever it holds.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from types import TracebackType
from typing import Any
from urllib.parse import quote

from liquid_llm.formatting import escape_controls

MASK = "***"

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
# matched against the words of a name, in lower case and joined by _
_STRONG = re.compile(
    r"(?:^|_)(?:secrets|passwords?|pwd|passphrase|credentials?|keys|authorization|auth|bearer|cookie|signature|sig|pat"
    r"|[a-z]*(?:secret|passwd|password)"
    # not every word that ends in key: turkey and monkey are types of text
    r"|(?:access|account|api|app|application|auth|aws|azure|client|deploy|encrypt|encryption|gcp|hf|license|master|my"
    r"|openai|private|root|rsa|secret|service|session|shared|signing|ssh|storage|user|wandb)?key)(?:_|$)"
)
_TOKEN = re.compile(r"tokens?(?:_|$)")
_PLACES = frozenset({"GOOGLE_APPLICATION_CREDENTIALS", "PWD", "OLDPWD"})
_ORDINARY = re.compile(
    r"(?:.*_)?(?:path|file|dir|directory|folder|sock|uri|url)"  # where a secret is kept
    r"|(?:dict|foreign|partition|primary|public|sort)_keys?|key_error"
    # of attention, as configurations of models have them
    r"|(?:.*_)?(?:num_)?key_(?:value_)?(?:attention_)?(?:heads|groups|head_dim|dim|length|bias|multiplier|proj)"
    r"(?:_per_layer)?|(?:.*_)?query_key_value|key_query_.*|share_att_key"
)
_TENSOR_OR_FILE = (".weight", ".bias", ".json", ".jsonl", ".model", ".pt", ".safetensors", ".txt", ".yaml", ".yml")
_ORDINARY_TOKEN = re.compile(
    r".*_(?:id|ids|hash|count|type|index|step|second|class|config|length|bias|dim)"  # ``eos_token_id``
    r"|(?:answer|eval|sample)_tokens"  # options that count
    r"|(?:max|min|num)_(?:(?:new|input|output|prompt|total|image|special)_)?tokens"
    r"|(?:begin|bos|eos|pad|unk|sep|cls|mask)_token|(?:.*_)?embed_tokens"
    r"|(?:(?:additional|all|extra)_)?special_tokens(?:_map)?|added_tokens(?:_decoder|_encoder)?"
)
_SHAPES = re.compile(
    r"""
      hf_[A-Za-z0-9]{6,} | api_org_[A-Za-z0-9]{6,}                       # Hugging Face
    | (?:AKIA|ASIA|AGPA|AIDA|AROA|ANPA)[0-9A-Z]{16}                      # AWS key ids
    | AIza[0-9A-Za-z_\-]{30,} | ya29\.[0-9A-Za-z_\-.]+ | GOCSPX-[0-9A-Za-z_\-]+   # Google
    | gh[pousr]_[A-Za-z0-9]{20,} | github_pat_[A-Za-z0-9_]{20,} | glpat-[A-Za-z0-9_\-]{16,}
    | (?<![A-Za-z0-9])sk-[A-Za-z0-9_\-]{16,} | (?<![A-Za-z0-9])xox[abprs]-[A-Za-z0-9\-]{10,}
    | npm_[A-Za-z0-9]{30,} | pypi-[A-Za-z0-9_\-]{16,} | dapi[0-9a-f]{32}
    | -----BEGIN\ [A-Z ]{0,40}PRIVATE\ KEY-----.*?(?:-----END\ [A-Z ]{0,40}PRIVATE\ KEY-----|\Z)
    """,
    re.VERBOSE | re.DOTALL,
)
_WEB_TOKEN = re.compile(r"eyJ[A-Za-z0-9_\-]{8,}(?P<rest>\.[A-Za-z0-9_\-]{8,}(?:\.[A-Za-z0-9_\-]*)?)?")
# An AWS secret access key has no mark of its own: 40 characters of base64 with all three kinds. Git and SHA-1 names are
# lower-case hexadecimal and do not match.
_AWS_SECRET = re.compile(
    r"(?<![A-Za-z0-9/+=])(?=[^\s]{0,39}[A-Z])(?=[^\s]{0,39}[a-z])(?=[^\s]{0,39}[0-9])[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+=])"
)
_SCHEME_WORD = re.compile(
    r"\b(Bearer|Basic|authorization[\"']?\s{0,2}[:=]\s{0,2}[\"']?[A-Za-z\-]{1,20})\s+[A-Za-z0-9._~+/=\-]{6,}",
    re.IGNORECASE,
)
_USERINFO = re.compile(
    r"(?<=://)[^/?#\s\"'<>]+(?=@)|(?<=//)[^/?#\s\"'<>:@]+:[^/?#\s\"'<>]+(?=@)"
    r"|(?<=%3A%2F%2F)(?:(?!%40|%2F)[^/?#&\s\"'<>])+(?=%40)",  # a URL that is part of another
    re.IGNORECASE,
)
# names that say so only where they stand in a URL
_QUERY = re.compile(
    r"(?<=[?&#])(code|jwt|pass|passcode|pw|sas|session|sessionid|sid|ticket)=[^&#\s\"'<>]+", re.IGNORECASE
)
# `name=value`, `name: value` and `"name": "value"` inside a longer text (URL queries, JSON in a string, log lines)
_ASSIGNED = re.compile(r"""(?<![A-Za-z0-9_.\-])(?P<name>[A-Za-z0-9_.\-]+)["']?\s*[=:]\s*""")
_VALUE = re.compile(r""""(?:\\.|[^"\\])*"?|'(?:\\.|[^'\\])*'?|[^\s"'&]+""", re.DOTALL)
_AFTER_SCHEME = re.compile(r"://[^\s\"'<>]+")
_NUMBER = re.compile(r"[+-]?\d[\d,_]*(\.\d+)?([eE][+-]?\d+)?[%kMG]?")
_SPECIAL = re.compile(r"<[^<>\s]{0,40}>|\[[A-Z0-9_]{1,40}\]")  # as vocabularies spell tokens of theirs
_OPTION = re.compile(r"(?P<name>--?[A-Za-z][A-Za-z0-9_.\-]*)(?P<value>=.*)?", re.DOTALL)

_MIN_INNER_LITERAL = 8  # a shorter value is hidden only where it stands alone: it may be an ordinary word
_NOT_SECRET = frozenset(["true", "false", "yes", "no", "on", "off", "none", "null", "auto", "default"])


def looks_secret(name: str) -> bool:
    """Whether a value filed under ``name`` (snake, kebab, dotted or camel case) is to be hidden."""
    return _secrecy(name) > 0


def _secrecy(name: str) -> int:
    """2 for a secret whatever it is, 1 for one unless it is a number (a token, or how many of them), 0 for none."""
    words = "_".join(_WORD.findall(name)).lower()
    if name in _PLACES or _ORDINARY.fullmatch(words) or name.endswith(_TENSOR_OR_FILE):
        return 0
    if _STRONG.search(words):
        return 2
    return int(_TOKEN.search(words) is not None and _ORDINARY_TOKEN.fullmatch(words) is None)


def secret_values(environ: Mapping[str, str]) -> tuple[str, ...]:
    """The values of ``environ``'s variables that look secret, longest first."""
    values = {value.strip() for name, value in environ.items() if looks_secret(name)}
    found = {value for value in values if len(value) >= 4 and value.lower() not in _NOT_SECRET}
    return tuple(sorted(found, key=lambda value: (-len(value), value)))


def process_masker() -> Masker:
    """What hides the secrets of this process's environment."""
    return Masker(secret_values(os.environ))


def mask_tracebacks() -> None:
    """Have what ends this process, or a thread of it, without being foreseen be printed with secrets masked."""
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _print_masked
    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = lambda args: _print_masked(args.exc_type, args.exc_value, args.exc_traceback)


def _print_masked(kind: type[BaseException], error: BaseException | None, at: TracebackType | None) -> None:
    if not issubclass(kind, SystemExit):
        print(process_masker().text("".join(traceback.format_exception(kind, error, at))), end="", file=sys.stderr)


class Masker:
    """Hides secrets in text and in plain nested values.

    Args:
        secrets: literal values to hide wherever they appear, usually ``secret_values(os.environ)``.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._whole = frozenset(secrets)
        long = [secret for secret in self._whole if len(secret) >= _MIN_INNER_LITERAL]
        # the spellings a value may take inside a URL or a JSON string too
        forms = {form for one in long for form in (one, quote(one, safe=""), quote(one), json.dumps(one)[1:-1])}
        longest_first = sorted(forms, key=lambda form: (-len(form), form))
        self._inner = re.compile("|".join(map(re.escape, longest_first))) if forms else None

    def text(self, text: str) -> str:
        """``text`` with every secret in it replaced by ``***``."""
        if text in self._whole:
            return MASK
        if self._inner is not None:
            text = self._inner.sub(MASK, text)
        text = _WEB_TOKEN.sub(lambda found: MASK if found["rest"] else found[0], text)
        text = _SHAPES.sub(MASK, text)
        text = _SCHEME_WORD.sub(rf"\1 {MASK}", text)
        text = _USERINFO.sub(MASK, text)
        text = _QUERY.sub(rf"\1={MASK}", text)
        # more slashes than chance gives: a path
        return _AWS_SECRET.sub(lambda found: found[0] if found[0].count("/") > 3 else MASK, _hide_assigned(text))

    def urls(self, value: Any) -> Any:
        """A copy of nested plain values in which only literal secrets, and those inside URLs, are hidden.

        For what is read again and must stay what it is: a template or a configuration with names like secrets' in it.
        """
        if isinstance(value, Mapping):
            return {name: self.urls(one) for name, one in value.items()}
        if isinstance(value, list | tuple):
            return [self.urls(one) for one in value]
        if not isinstance(value, str):
            return value
        known = MASK if value in self._whole else value if self._inner is None else self._inner.sub(MASK, value)
        return _AFTER_SCHEME.sub(lambda found: self.text(found[0]), known)

    def argv(self, argv: Iterable[str]) -> list[str]:
        """A command line: the value of an option with a secret name is hidden, joined by ``=`` or following it."""
        masked: list[str] = []
        before = ""  # the option whose value may come next
        for word in argv:
            option = _OPTION.fullmatch(word)
            name, value = (before, word) if option is None else (option["name"], (option["value"] or "")[1:])
            if value and _hides(name, value):
                masked.append(MASK if option is None else f"{name}={MASK}")
            else:
                masked.append(self.text(word))
            before = name if option is not None and option["value"] is None else ""
        return masked

    def value(self, value: object, name: str = "") -> object:
        """A JSON-ready copy of a nested plain value (mappings, sequences, numbers, strings, paths) without secrets.

        Raises:
            TypeError: something else lies in it; objects have no place in what a run writes about itself.
        """
        secrecy = _secrecy(name)
        if secrecy and not _harmless(value, secrecy):
            return MASK
        if value is None or isinstance(value, bool | int):
            return value
        if isinstance(value, float):
            return value if value - value == 0 else str(value)  # JSON has no nan and no infinity
        if isinstance(value, str | PurePath):
            return self.text(str(value))
        if isinstance(value, Mapping):
            return self._mapping(value)
        if isinstance(value, set | frozenset):
            return [self.value(item) for item in sorted(value, key=str)]
        if isinstance(value, list | tuple):
            texts = [item for item in value if isinstance(item, str)]
            if len(texts) == len(value) and any(item.startswith("-") for item in texts):
                return self.argv(texts)
            return [self.value(item) for item in value]
        raise TypeError(f"{name or 'value'}: plain values only, got {type(value).__name__}")

    def _mapping(self, mapping: Mapping[object, object]) -> dict[str, object]:
        masked: dict[str, object] = {}
        copies: dict[str, int] = {}
        for key, item in mapping.items():
            shown = self.text(str(key))
            copies[shown] = copies.get(shown, 0) + 1  # two names that were both secrets
            masked[shown if copies[shown] == 1 else f"{shown}#{copies[shown]}"] = self.value(item, str(key))
        return masked


class MaskingFilter(logging.Filter):
    """A logging filter that hides secrets, and what moves a terminal, in the finished message; it drops no record."""

    def __init__(self, masker: Masker) -> None:
        super().__init__()
        self._masker = masker

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        hidden = escape_controls(self._masker.text(message))
        if hidden != message:
            record.msg, record.args = hidden, None
        if record.exc_info and not record.exc_text:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        if record.exc_text:
            record.exc_text = escape_controls(self._masker.text(record.exc_text))
        return True


def _hides(name: str, value: str) -> bool:
    """Whether ``value`` under ``name`` is a secret. Under a token-like name a number says how many, or which, and
    something in angle brackets is a token of a vocabulary.
    """
    secrecy, value = _secrecy(name), value.rstrip(",;")
    ordinary = _NUMBER.fullmatch(value) or _SPECIAL.fullmatch(value)
    return value.lower() not in _NOT_SECRET and (secrecy == 2 or (secrecy == 1 and ordinary is None))


def _harmless(value: object, secrecy: int) -> bool:
    """Nothing at all, a switch, a number under a token-like name, or a container of such values."""
    if value is None or isinstance(value, bool) or value == "":
        return True
    if isinstance(value, str) and (value.lower() in _NOT_SECRET or (secrecy == 1 and _SPECIAL.fullmatch(value))):
        return True
    if secrecy == 2:
        return False
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else None
    return isinstance(value, int | float) if items is None else all(_harmless(item, secrecy) for item in items)


def _hide_assigned(text: str) -> str:
    """Hide what is assigned to secret names; what is assigned to another may hold further names."""
    parts: list[str] = []
    done = 0
    for found in _ASSIGNED.finditer(text):
        is_path = text[found.start() - 1 : found.start()] == "/" and text[found.end() - 2 : found.end()] == ": "
        sought = found.start() >= done and not is_path and looks_secret(found["name"])
        value = _VALUE.match(text, found.end()) if sought else None
        mark = value[0][0] if value and value[0][0] in "\"'" else ""
        if value is None or not value[0].strip(mark) or not _hides(found["name"], value[0].strip(mark)):
            continue
        parts += [text[done : found.end()], mark, MASK, mark]
        done = value.end()
    return "".join([*parts, text[done:]])
