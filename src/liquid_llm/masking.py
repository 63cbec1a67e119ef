"""Keeps secrets out of everything a run writes or logs (leaf).

    secret   a token, password or key: recognised by the name it is filed under, by its shape, or because an environment
             variable with such a name holds it
    mask     what stands in its place: ``***``

Masking errs on the side of hiding: a path or an ordinary word hidden by mistake costs a reader a moment, a leaked token
costs an account. Numbers filed under token-like names (``num_tokens``, ``eos_token_id``) are counts and ids, and stay.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from urllib.parse import quote

MASK = "***"

_TOKEN_ENDINGS = ("token", "tokens")
_SECRET_ENDINGS = ("secret", "password", "passwd", "key")  # names run together: HFSECRET, dbpassword, accesskey
_SECRET_WORDS = frozenset({"secret", "secrets", "password", "passwords", "passwd", "pwd", "passphrase"}) | frozenset(
    {"credential", "credentials", "key", "keys", "apikey", "authorization", "auth", "bearer", "cookie"}
)
_SECRET_WORDS |= {"signature", "sig", "pat"}  # signed URLs, personal access tokens
# A name ending in one of these says where a secret is kept, or counts or identifies something.
_PLACE_WORDS = frozenset({"path", "file", "dir", "directory", "folder", "sock", "uri", "url"})
_PLAIN_TOKEN_WORDS = frozenset({"id", "ids", "hash", "count", "type", "index", "step", "second"})
_PLACE_NAMES = frozenset({"GOOGLE_APPLICATION_CREDENTIALS", "PWD", "OLDPWD"})

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")

_SHAPES = re.compile(
    r"""
      hf_[A-Za-z0-9]{6,} | api_org_[A-Za-z0-9]{6,}                       # Hugging Face
    | (?:AKIA|ASIA|AGPA|AIDA|AROA|ANPA)[0-9A-Z]{16}                      # AWS key ids
    | AIza[0-9A-Za-z_\-]{30,} | ya29\.[0-9A-Za-z_\-.]+ | GOCSPX-[0-9A-Za-z_\-]+   # Google
    | gh[pousr]_[A-Za-z0-9]{20,} | github_pat_[A-Za-z0-9_]{20,} | glpat-[A-Za-z0-9_\-]{16,}
    | (?<![A-Za-z0-9])sk-[A-Za-z0-9_\-]{16,} | (?<![A-Za-z0-9])xox[abprs]-[A-Za-z0-9\-]{10,}
    | eyJ[A-Za-z0-9_\-]{8,}\.[A-Za-z0-9_\-]{8,}(?:\.[A-Za-z0-9_\-]*)?    # JSON web tokens
    | -----BEGIN\ [A-Z ]*PRIVATE\ KEY-----.*?(?:-----END\ [A-Z ]*PRIVATE\ KEY-----|\Z)
    """,
    re.VERBOSE | re.DOTALL,
)
# An AWS secret access key has no mark of its own: 40 characters of base64 with all three kinds. Git and SHA-1 names are
# lower-case hexadecimal and do not match.
_AWS_SECRET = re.compile(
    r"(?<![A-Za-z0-9/+=])(?=[^\s]{0,39}[A-Z])(?=[^\s]{0,39}[a-z])(?=[^\s]{0,39}[0-9])[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+=])"
)
_SCHEME_WORD = re.compile(r"\b(Bearer|Basic)\s+[A-Za-z0-9._~+/=\-]{6,}", re.IGNORECASE)
_USERINFO = re.compile(r"(?<=://)[^/?#\s\"'<>]+@")
# `name=value`, `name: value` and `"name": "value"` inside a longer text (URL queries, JSON in a string, log lines).
_ASSIGNED = re.compile(r"""(?P<name>[A-Za-z][A-Za-z0-9_.\-]*)["']?\s*[=:]\s*""")
_ASSIGNED_VALUE = re.compile(
    r"""(?P<quote>["'])(?P<quoted>(?:\\.|(?!(?P=quote)).)*)(?:(?P=quote)|\Z) | (?P<bare>[^\s"'&]+)""",
    re.VERBOSE | re.DOTALL,
)
_OPTION = re.compile(r"(?P<name>--?[A-Za-z][A-Za-z0-9_.\-]*)(?P<value>=.*)?", re.DOTALL)

_MIN_INNER_LITERAL = 8  # a shorter value is hidden only where it stands alone: it may be an ordinary word
_NOT_SECRET = frozenset(["true", "false", "yes", "no", "on", "off", "none", "null", "auto", "default"])


def looks_secret(name: str) -> bool:
    """Whether a value filed under ``name`` (snake, kebab, dotted or camel case) is to be hidden."""
    words = _words(name)
    if not words or words[-1] in _PLACE_WORDS or name in _PLACE_NAMES:
        return False
    return _has_secret_word(name) or (_has_token_word(words) and words[-1] not in _PLAIN_TOKEN_WORDS)


def _words(name: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(name)]


def _has_secret_word(name: str) -> bool:
    words = _words(name)
    return not _SECRET_WORDS.isdisjoint(words) or any(word.endswith(_SECRET_ENDINGS) for word in words)


def _has_token_word(words: list[str]) -> bool:
    return any(word.endswith(_TOKEN_ENDINGS) for word in words)


def secret_values(environ: Mapping[str, str]) -> tuple[str, ...]:
    """The values of ``environ``'s variables that look secret, longest first."""
    found = {
        value.strip()
        for name, value in environ.items()
        if looks_secret(name) and len(value.strip()) >= 4 and value.strip().lower() not in _NOT_SECRET
    }
    return tuple(sorted(found, key=lambda value: (-len(value), value)))


class Masker:
    """Hides secrets in text and in plain nested values.

    Args:
        secrets: literal values to hide wherever they appear, usually ``secret_values(os.environ)``.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._whole = frozenset(secrets)
        inner = {form for secret in self._whole if len(secret) >= _MIN_INNER_LITERAL for form in _forms(secret)}
        longest_first = sorted(inner, key=lambda form: (-len(form), form))
        self._inner = re.compile("|".join(map(re.escape, longest_first))) if inner else None

    def text(self, text: str) -> str:
        """``text`` with every secret in it replaced by ``***``."""
        if text in self._whole:
            return MASK
        if self._inner is not None:
            text = self._inner.sub(MASK, text)
        text = _SHAPES.sub(MASK, text)
        text = _SCHEME_WORD.sub(rf"\1 {MASK}", text)
        text = _USERINFO.sub(f"{MASK}@", text)
        return _AWS_SECRET.sub(_hide_aws_secret, _hide_assigned(text))

    def argv(self, argv: Iterable[str]) -> list[str]:
        """A command line: the value of an option with a secret name is hidden, joined by ``=`` or following it."""
        masked: list[str] = []
        hides = ""  # the option with a secret name whose value comes next
        for word in argv:
            option = _OPTION.fullmatch(word)
            if hides and option is None:
                masked.append(self.text(word) if _is_count(word, hides) else MASK)
                hides = ""
                continue
            name, value = (option["name"], option["value"]) if option is not None else ("", None)
            secret = looks_secret(name) and not (value and _is_count(value[1:], name))
            hides = name if secret and value is None else ""
            masked.append(f"{name}={MASK}" if secret and value is not None else self.text(word))
        return masked

    def value(self, value: object, name: str = "") -> object:
        """A JSON-ready copy of a nested plain value (mappings, sequences, numbers, strings, paths) without secrets.

        Raises:
            TypeError: something else lies in it; objects have no place in what a run writes about itself.
        """
        if looks_secret(name) and not _harmless(value, name):
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
            if _is_command_line(value):
                return self.argv(value)
            return [self.value(item) for item in value]
        raise TypeError(f"{name or 'value'}: plain values only, got {type(value).__name__}")

    def _mapping(self, mapping: Mapping[object, object]) -> dict[str, object]:
        masked: dict[str, object] = {}
        for key, item in mapping.items():
            name = shown = self.text(str(key))
            copies = 1
            while name in masked:  # two names that were both secrets
                copies += 1
                name = f"{shown}#{copies}"
            masked[name] = self.value(item, str(key))
        return masked


class MaskingFilter(logging.Filter):
    """A logging filter that hides secrets in the finished message; it never drops a record."""

    def __init__(self, masker: Masker) -> None:
        super().__init__()
        self._masker = masker

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        hidden = self._masker.text(message)
        if hidden != message:
            record.msg, record.args = hidden, None
        if record.exc_info and not record.exc_text:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        if record.exc_text:
            record.exc_text = self._masker.text(record.exc_text)
        return True


def _forms(secret: str) -> set[str]:
    """The spellings a value may take inside a URL or a JSON string."""
    return {secret, quote(secret, safe=""), quote(secret), json.dumps(secret)[1:-1]}


def _is_command_line(items: list[object] | tuple[object, ...]) -> bool:
    return all(isinstance(item, str) for item in items) and any(str(item).startswith("-") for item in items)


def _harmless(value: object, name: str) -> bool:
    """Nothing at all, a switch, a count or an id under a token-like name, or a container of such values."""
    if value is None or isinstance(value, bool) or value == "":
        return True
    if _has_secret_word(name):
        return False
    if isinstance(value, int | float):
        return True
    if isinstance(value, Mapping):
        return all(_harmless(item, name) for item in value.values())
    if isinstance(value, list | tuple):
        return all(_harmless(item, name) for item in value)
    return False


def _hide_assigned(text: str) -> str:
    """Hide what is assigned to secret names; a value may hold further names, so all names are looked at."""
    parts: list[str] = []
    done = 0
    for found in _ASSIGNED.finditer(text):
        value = _ASSIGNED_VALUE.match(text, found.end())
        if found.start() < done or value is None or not looks_secret(found["name"]):
            continue
        bare = value["bare"] or value["quoted"] or ""
        if not bare or bare.startswith(MASK) or _is_count(bare, found["name"]):
            continue
        quote_mark = value["quote"] or ""
        parts += [text[done : found.end()], quote_mark, MASK, quote_mark]
        done = value.end()
    return "".join([*parts, text[done:]])


def _hide_aws_secret(match: re.Match[str]) -> str:
    return match[0] if match[0].count("/") > 3 else MASK  # more slashes than chance gives: a path


def _is_count(text: str, name: str) -> bool:
    """A number under a name that is secret-looking only for its ``token``: how many, or which."""
    is_number = re.fullmatch(r"[+-]?\d[\d,_]*(\.\d+)?([eE][+-]?\d+)?", text) is not None
    return is_number and not _has_secret_word(name)
