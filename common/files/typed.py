"""JSON of a file as values that can be trusted: an object, or a dataclass whose fields have their types."""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def parse_object(text: str | bytes) -> dict[str, Any]:
    """A JSON object; bytes may start with a byte order mark.

    Raises:
        ValueError: it is none, whatever is wrong with it.
    """
    try:
        loaded = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(loaded, dict):
        raise ValueError("it is no JSON object")
    return loaded


def build(cls: type[T], values: Any) -> T:
    """A dataclass out of JSON values; every field of the type that it is declared with.

    Raises:
        ValueError: a field is missing, unknown, or of another type; names it.
    """
    if not isinstance(values, dict):
        raise ValueError("it is no JSON object")
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(values.keys() - fields.keys()):
        raise ValueError(f"there is no {unknown[0]!r} in it")
    given = {}
    for name, field in fields.items():
        if name in values:
            try:
                given[name] = _value(values[name], hints[name])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{name} is missing")
    return cls(**given)


def _value(value: Any, hint: Any) -> Any:
    """The value, if it is of the type; numbers without a fraction are floats too."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        for one in inner:
            try:
                return _value(value, one)
            except ValueError:
                continue
    elif origin is Literal:
        if any(value == one and type(value) is type(one) for one in inner):
            return value
    elif dataclasses.is_dataclass(hint):
        return build(hint, value)  # type: ignore[arg-type]
    elif origin in (dict, Mapping) or hint is dict:
        if isinstance(value, dict):
            return {key: _value(item, inner[1] if inner else Any) for key, item in value.items()}
    elif origin in (list, Sequence) or hint is list:
        if isinstance(value, list):
            return [_value(item, inner[0] if inner else Any) for item in value]
    elif hint is float and type(value) is int:
        return float(value)
    elif hint is type(None):
        if value is None:
            return None
    elif type(value) is hint:
        return value
    raise ValueError(f"{json.dumps(value)[:60]} is not {_in_words(hint)}")


def _in_words(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(map(json.dumps, get_args(hint)))
    names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
    return names.get(hint, "what belongs there")
