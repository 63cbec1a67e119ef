"""JSON and YAML that others have written, each parsed in one place, with bounds (leaf).

What a manifest, record, sidecar, catalog or configuration says is looked at by whoever reads it. Here it is made sure
that reading one ends: neither nesting nor a number's digits nor YAML's aliases make it fail in another way than by
``ParseError``, whose words a message can take over.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

MAX_DEPTH = 200
MAX_JSON_BYTES = 64 * 2**20  # of what is read whole; in memory a text takes up to twenty times as much
MAX_YAML_BYTES = 16 * 2**20
MAX_DIGITS = 4300  # what Python reads of a whole number; YAML's in base 60 have no bound there, and take for ever
MAX_YAML_NODES = 1_000_000  # with every alias written out, as it is wherever such a value is saved again
_BRACKETS = ("[", "{")


class ParseError(ValueError):
    """A text that is not JSON or YAML, or more of it than anybody means."""


def parse_json(text: bytes | str, encoding: str = "utf-8-sig", most: int = MAX_JSON_BYTES) -> Any:
    """The value of a JSON text.

    Args:
        most: bytes (or characters) that are read; more where another bound has let the text through.

    Raises:
        ParseError: it is too large, not in ``encoding``, not JSON, nested more than ``MAX_DEPTH`` deep, or has a whole
            number of more digits than Python reads (4300).
    """
    if len(text) > most:
        raise ParseError(f"more than {most:,} bytes")
    try:
        text = text if isinstance(text, str) else text.decode(encoding)
        value = json.loads(text)
    except RecursionError:
        raise ParseError(f"nested more than {MAX_DEPTH} deep") from None
    except json.JSONDecodeError as error:
        raise ParseError(str(error)) from error
    except UnicodeDecodeError as error:
        raise ParseError(str(error)) from error
    except ValueError as error:
        raise ParseError("a number of thousands of digits") from error
    # A text with fewer brackets than that is not looked at again.
    if sum(map(text.count, _BRACKETS)) > MAX_DEPTH and _is_deep(value):
        raise ParseError(f"nested more than {MAX_DEPTH} deep")
    return value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [one for outer in level if isinstance(outer, (list, dict)) for one in _inside(outer)]
    return bool(level)


def _inside(value: list[Any] | dict[str, Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def parse_yaml(text: bytes | str, loader: Any = None) -> Any:
    """The value of a YAML text.

    Args:
        loader: the class that makes values of it, ``yaml.SafeLoader`` unless another one like it is given.

    Raises:
        ParseError: it is not UTF-8, not YAML, too large, nested more than ``MAX_DEPTH`` deep, or an alias in it stands
            for millions of values.
    """
    import yaml

    if len(text) > MAX_YAML_BYTES:
        raise ParseError(f"more than {MAX_YAML_BYTES:,} bytes")
    try:
        one = (loader or yaml.SafeLoader)(text if isinstance(text, str) else text.decode("utf-8"))
        try:
            node = one.get_single_node()
            if node is None:
                return None
            if _count_nodes(node, 0, {}) > MAX_YAML_NODES:
                raise ParseError("aliases in it stand for millions of values")
            return one.construct_document(node)
        finally:
            one.dispose()
    except RecursionError:
        raise ParseError(f"nested more than {MAX_DEPTH} deep") from None
    except UnicodeDecodeError as error:
        raise ParseError(str(error)) from error
    except yaml.YAMLError as error:
        raise ParseError(" ".join(str(error).split())) from error
    except ParseError:
        raise
    except (ValueError, OverflowError) as error:  # a date or a number that there is not
        raise ParseError(" ".join(str(error).split())) from error


def _count_nodes(node: Any, depth: int, known: dict[int, int]) -> int:
    """Nodes below and with ``node``, an alias counted as what it stands for."""
    import yaml

    if depth > MAX_DEPTH:  # also an alias that stands for something around it
        raise ParseError(f"nested more than {MAX_DEPTH} deep")
    if isinstance(node, yaml.ScalarNode):
        if len(node.value) > MAX_DIGITS and node.tag.endswith((":int", ":float")):
            raise ParseError("a number of thousands of digits")
        return 1
    if id(node) not in known:
        parts = [one for pair in node.value for one in pair] if isinstance(node, yaml.MappingNode) else node.value
        known[id(node)] = 1 + sum(_count_nodes(one, depth + 1, known) for one in parts)
    return known[id(node)]
