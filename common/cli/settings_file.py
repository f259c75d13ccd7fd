"""A settings file: TOML whose keys are called like the options of a command."""

from __future__ import annotations

import dataclasses
import difflib
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from ..errors import SettingError
from ..files.near import files_like
from ..files.ownership import Made, is_file
from ..words import did_you_mean
from .names import command_line


def read_file(cls: type[Any], config: Path, command: str) -> tuple[dict[str, Any], dict[str, int]]:
    """The settings of a file and their lines; those that only the command has whose file it may be are left out.

    Args:
        cls: a dataclass of `setting`.
        command: as `resolve`.

    Raises:
        SettingError: names all that is wrong with it.
    """
    try:
        data = config.read_bytes()
        loaded = parse_toml(data)
    except OSError as error:
        raise SettingError(
            f"cannot read the settings file: {error.strerror}",
            where=f"--config {config}",
            fix=did_you_mean(files_like(config), "--config takes a TOML file; a run's own is its config.toml"),
        ) from error
    except ValueError as error:
        fix = 'one option a line, as in steps = 500 or strategy = "zero2"; a run\'s config.toml has all of its own'
        raise SettingError(f"not TOML: {error}", where=f"--config {config}", fix=fix) from error
    reading = _Reading(cls, config, data, command)
    for item in loaded.items():
        reading.take(*item)
    reading.check()
    return reading.values, reading.lines


class _Reading:
    """Takes the settings of a file one by one, and what is wrong with them.

    Attributes:
        values: settings of the command, by name.
        lines: where they are set, counted from 1; 0: not known.
    """

    def __init__(self, cls: type[Any], config: Path, data: bytes, command: str) -> None:
        self._config, self._data, self._command = config, data, command
        self._fields = {field.name: field for field in dataclasses.fields(cls)}
        self._own: Mapping[str, Any] = get_type_hints(cls)
        also = self._fields["config"].metadata.get("file_of") if "config" in self._fields else None
        self._known = (get_type_hints(also) if also else {}) | self._own
        self.values: dict[str, Any] = {}
        self.lines: dict[str, int] = {}
        self._faults: list[tuple[int, str]] = []
        self._fixes: list[str] = []

    def take(self, key: str, value: Any) -> None:
        """Take a key of the file, or of a table in it."""
        name = _name_of(key)
        if name == "config":
            self._refuse(key, "a settings file names no other", f"leave {key} out")
        elif name in self._known:
            try:
                found = _coerced(value, self._known[name])
            except SettingError as error:
                self._refuse(key, f"{key}: {error.what}")
                return
            if name in self._own:
                beside = self._fields[name].metadata.get("beside")
                self.values[name] = _where_it_lies(self._config, self._data, found, beside) if beside else found
                self.lines[name] = _line_of(key, self._data)
        elif isinstance(value, dict):
            what = f"[{key}] is a table, and settings stand in none"
            if value and not any(map(self._like, value)):
                self._refuse(key, what, f"take [{key}] out, and all that stands in it: none of that is a setting")
                return
            for inner in value.items():
                self.take(*inner)
            self._refuse(key, what, f"take the line [{key}] out")
        else:
            near = self._like(key)
            what = "; ".join(filter(None, [f"there is no setting {key!r}", did_you_mean(map(repr, near))]))
            lists = f"{self._command} --help".strip()
            self._refuse(key, what, "" if near else f"settings are called like the options: {lists} lists them")

    def check(self) -> None:
        """Raise what is wrong, in the order of the file."""
        if not self._faults:
            return
        self._faults.sort(key=lambda fault: fault[0])
        (line, what), *more = self._faults
        where = f"--config {self._config}" + f", line {line}" * (line > 0 and not more)
        if more:
            each = (f"  line {line}: {fault}" if line else f"  {fault}" for line, fault in self._faults)
            what = "\n".join([f"{len(self._faults)} mistakes", *each])
        raise SettingError(what, where=where, fix="; ".join(self._fixes) or None)

    def _like(self, key: str) -> list[str]:
        return difflib.get_close_matches(_name_of(key), self._known, n=1)

    def _refuse(self, key: str, what: str, fix: str = "") -> None:
        self._faults.append((_line_of(key, self._data), what))
        if fix and fix not in self._fixes:
            self._fixes.append(fix)


def _name_of(key: str) -> str:
    return key.replace("-", "_")


def _line_of(key: str, data: bytes) -> int:
    """The line of a TOML file that sets a key, or begins a table of its name; 0: it is written in another way."""
    word = rf"[\"']?{re.escape(key)}[\"']?\s*"
    lines = data.decode("utf-8-sig").splitlines()
    numbers = (number for number, line in enumerate(lines, 1) if re.match(rf"\s*(\[+\s*{word}[].]|{word}[=.])", line))
    return next(numbers, 0)


def _where_it_lies(config: Path, text: bytes, folder: Path, beside: str) -> Path:
    """The folder that a settings file means: its own, if the program wrote it into that; else the one that it names.

    Args:
        text: of the file. Its heading says where it was written; one that names another folder by now is somebody's.
        folder: that it names.
        beside: as `setting`.
    """
    here, heading = config.absolute().parent, text.partition(b"\n")[0].decode("utf-8-sig", "replace").rstrip()
    ours = heading.endswith(command_line("--config", folder / config.name))
    if not ours or here.resolve() == folder.resolve():
        return folder
    if not is_file(here / beside) and Made.read(here) is None:  # only the file was copied
        return folder
    return here.resolve() if ".." in here.parts else here


def parse_toml(data: bytes) -> dict[str, Any]:
    """TOML, with or without a byte order mark.

    Raises:
        ValueError: it is none, whatever is wrong with it.
    """
    try:
        return tomllib.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError("it is no UTF-8; save the file as UTF-8") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _coerced(value: Any, annotation: Any) -> Any:
    """A TOML value as the field's type; the command line's own checks are Typer's."""
    options = [option for option in (get_args(annotation) or (annotation,)) if option is not type(None)]
    if get_origin(annotation) is list:
        inner = options[0]
        items = value if isinstance(value, list) else [value]
        return [_coerced(item, inner) for item in items]
    for option in options:
        if option in (str, int, float, bool, Path):
            if option is Path and isinstance(value, str):
                return Path(value)
            if option is float and isinstance(value, int) and not isinstance(value, bool):
                return float(value)
            if type(value) is option:
                return value
        elif get_origin(option) is list and isinstance(value, list):
            return _coerced(value, option)
        elif (get_args(option) and value in get_args(option)) or value == option:
            return value
    raise SettingError(f"{value!r} is not {_wanted(options)}")


_IN_WORDS = {
    str: "a text in quotes",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    Path: "a path in quotes",
}


def _wanted(options: list[Any]) -> str:
    """What a TOML value may be, for people."""
    return " or ".join(
        dict.fromkeys(
            _IN_WORDS.get(option) or " or ".join(repr(choice) for choice in get_args(option) or (option,))
            for option in options
        )
    )
