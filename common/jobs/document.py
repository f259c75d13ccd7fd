"""YAML out of dataclasses, each field with its comment; read back and held against them.

The dataclasses are the schema: a field that is not there, or a value of another type, cannot be written, and what is
read back must be the same document.
"""

from __future__ import annotations

import dataclasses
import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from ..files.typed import build

T = TypeVar("T")

_WIDTH = 100
# Texts that need no quotes: they begin with a letter or a slash, and are nothing else in YAML.
_PLAIN = re.compile(r"[A-Za-z/][\w./-]*", re.ASCII)
_NOT_TEXT = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null", "none", "nan", "inf"})


def said(comment: str, default: Any = dataclasses.MISSING) -> Any:
    """A field with a comment above it in the file.

    Args:
        default: as of any field; None and what is empty are not written.
    """
    if isinstance(default, dict | list):
        return dataclasses.field(default_factory=lambda: default.copy(), metadata={"said": comment})
    return dataclasses.field(default=default, metadata={"said": comment})


def to_yaml(document: Any) -> str:
    """A dataclass as YAML, its fields in their order."""
    return "\n".join(_lines(document)) + "\n"


def from_yaml(cls: type[T], text: str) -> T:
    """The document that a text holds.

    Raises:
        ValueError: it is no YAML; a field is missing, unknown, or of another type.
    """
    import yaml

    try:
        return build(cls, yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ValueError(f"it is no YAML: {error}") from error


def _lines(value: Any) -> list[str]:
    """The lines of a mapping or a list."""
    lines: list[str] = []
    if isinstance(value, list):
        for item in value:
            first, *rest = _lines(item) if _nests(item) else _text(item)
            lines += [f"- {first}", *_inside(rest)]
        return lines
    for key, inner, comment in _entries(value):
        lines += textwrap.wrap(comment, _WIDTH, initial_indent="# ", subsequent_indent="# ")
        first, *rest = ["", *_lines(inner)] if _nests(inner) else _text(inner)
        lines += [f"{key}: {first}".rstrip(), *_inside(rest)]
    return lines


def _inside(lines: list[str]) -> list[str]:
    return [f"  {line}" if line else "" for line in lines]


def _text(value: Any) -> list[str]:
    """What stands behind a key or a dash, and the lines below: of a text of several lines, all."""
    return ["|-", *value.split("\n")] if isinstance(value, str) and "\n" in value else [_scalar(value)]


def _nests(value: Any) -> bool:
    return dataclasses.is_dataclass(value) or (isinstance(value, list | dict) and bool(value))


def _entries(value: Any) -> Iterator[tuple[str, Any, str]]:
    """Key, value and comment of what a mapping holds."""
    if isinstance(value, Mapping):
        yield from ((_scalar(key), inner, "") for key, inner in value.items())
        return
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        if inner is not None and inner not in ([], {}):
            yield field.name, inner, field.metadata.get("said", "")


def _scalar(value: Any) -> str:
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _NOT_TEXT:
        return value
    return json.dumps(value, ensure_ascii=False)
