"""A setting is one dataclass field: its type, its default and one sentence.

Help texts, command lines (`command`), TOML files and the tables in the README
all derive from the field. A command's options start as "not given", so that the
order "default, then file, then command line" needs no special case anywhere.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ..errors import SettingError
from ..words import bytes_of
from .settings_file import read_file

S = TypeVar("S")


def setting(
    default: Any,
    help: str,
    *,
    shown: str | None = None,
    flag: str | None = None,
    section: str | None = None,
    positional: bool = False,
    instead_of: str | None = None,
    only_with: tuple[str, ...] = (),
    prose: bool = False,
    one_word: bool = False,
    commas: bool = False,
    after_dashes: bool = False,
    beside: str = "",
    file_of: type[Any] | None = None,
) -> Any:
    """Declare a setting.

    Args:
        default: the value when neither file nor command line gives one.
        help: one sentence.
        shown: what help prints as the default, where the value alone would not say it.
        flag: the option's name if it is not the field's.
        section: heading under which ``--help`` lists it.
        positional: a bare word on the command line (``cogprep inspect OUT``), not an option. A list only where no
            option takes several words: those after that one would land in it without a sound.
        instead_of: another setting that says the same in another way: given as an option, this one takes the place of
            that one's value in a file.
        only_with: options, as typed, without one of which this one changes nothing; then it is refused, given as one.
        prose: a text for the model, which may have line breaks.
        one_word: of a list: the option takes one value each time it is given, not all words that follow: those of a
            sentence without quotes would each become a value.
        commas: of a list: its values are names that hold no comma, so commas may stand between them, too.
        after_dashes: of a positional list: it is all that follows ``--``, the command line of another command.
        beside: of the folder to write: a file that each of those has which the program has made. The settings file that
            it writes into one means the folder where it lies, wherever that was when it was written.
        file_of: of ``config``: the settings of another command, whose file may be given; what only those have is
            checked, and left out.
    """
    metadata = {
        "help": help, "shown": shown, "flag": flag, "section": section, "positional": positional,
        "instead_of": instead_of, "only_with": only_with, "prose": prose, "one_word": one_word,
        "commas": commas, "after_dashes": after_dashes, "beside": beside,
        "file_of": file_of,
    }  # fmt: skip
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def flag_of(field: dataclasses.Field[Any]) -> str:
    """What a field is set with, as typed: ``--data-root``, or ``OUT`` where it is positional."""
    if field.metadata.get("positional"):
        return field.name.upper()
    return field.metadata.get("flag") or "--" + field.name.replace("_", "-")


def default_of(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if callable(field.default_factory) else field.default


def shown_default(field: dataclasses.Field[Any]) -> str:
    """The default as help and README print it."""
    if field.metadata.get("shown") is not None:
        return str(field.metadata["shown"])
    value = default_of(field)
    if value is None or value == []:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def check_least(settings: Any, **least: float) -> None:
    """Refuse settings that are smaller than they may be, by name, and what is no finite number; None is no number.

    Raises:
        SettingError: names the option.
    """
    for field in dataclasses.fields(settings):
        value, lowest, flag = getattr(settings, field.name), least.get(field.name), flag_of(field)
        if value is None or lowest is None:
            continue
        if not value >= lowest:  # a NaN too
            raise SettingError(f"{value} is too small", where=flag, fix=f"{flag} {lowest} or more")
        if not math.isfinite(value):
            raise SettingError(f"{value} is not a finite number", where=flag, fix="a number")


def size_of(settings: Any, name: str, example: str) -> int:
    """The bytes of a setting that is a size, as 500MB or 2GB.

    Raises:
        SettingError: it is none; names the option.
    """
    text = getattr(settings, name)
    size = bytes_of(text)
    if size is None:
        flag = next(flag_of(field) for field in dataclasses.fields(settings) if field.name == name)
        raise SettingError(f"{text!r} is not a size", where=flag, fix=f"for example {flag} {example}")
    return size


def resolve(cls: type[S], given: Mapping[str, Any], config: Path | None = None, *, command: str = "") -> S:
    """Defaults, then the TOML file, then what the command line gave (not None).

    Args:
        command: whose settings they are, as typed, where that is known: ``cogtrain lora``.

    Raises:
        SettingError: the file cannot be read, or names a setting that does not exist; an option would change nothing.
    """
    known = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values, lines = read_file(cls, config, command) if config is not None else ({}, {})
    options = {name: value for name, value in given.items() if value is not None}
    for name in options:
        if other := known[name].metadata.get("instead_of"):
            values.pop(other, None)
    in_file = {flag_of(known[name]): lines[name] for name in values if name not in options}
    values |= options
    for name in values:
        if known[name].metadata.get("commas"):
            values[name] = [word.strip() for text in values[name] for word in text.split(",") if word.strip()]
    try:
        for name, value in values.items():
            if not known[name].metadata.get("prose"):
                _check_text(value, flag_of(known[name]))
        for name in options:
            _check_counts(known[name], {field for field in values if values[field] != default_of(known[field])})
        return cls(**values)
    except SettingError as error:
        flags = re.findall(r"--[\w-]+", error.where or "")
        if numbers := [in_file[flag] for flag in flags if flag in in_file]:
            error.where = ", ".join([f"{error.where}; set in {config}", *(f"line {line}" for line in numbers if line)])
        raise


def _check_counts(field: dataclasses.Field[Any], changed: Collection[str]) -> None:
    """Refuse an option that has no effect beside the others.

    Args:
        changed: names of the settings that are not as they are by default.

    Raises:
        SettingError: names what it needs.
    """
    needed = field.metadata.get("only_with")
    if needed and not any(word.split()[0][2:].replace("-", "_") in changed for word in needed):
        one, flag = " or ".join(needed), flag_of(field)
        raise SettingError(f"{flag} changes nothing without {one}", where=flag, fix=f"{one}, too; or leave {flag} out")


def _check_text(value: Any, flag: str) -> None:
    """Refuse what no path, name or pattern has, before hours of work end in a file that cannot be read again.

    Raises:
        SettingError: names the option.
    """
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str | Path) and (found := re.search("[\x00-\x1f\x7f]", str(text))):
            raise SettingError(
                f"a control character (U+{ord(found[0]):04X}) in {json.dumps(str(text))}",
                where=flag,
                fix=r'in a TOML file "\n" in a path is a line break: write / between folders, as on the command line',
            )
        if isinstance(text, str) and not text.isascii() and any("\ud800" <= mark <= "\udfff" for mark in text):
            raise SettingError("this is not UTF-8", where=f"{flag} {text}", fix="rename it, or type it in UTF-8")
