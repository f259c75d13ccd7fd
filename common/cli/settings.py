"""A setting is one dataclass field: its type, its default and one sentence.

Help texts, command lines (`command`), TOML files and the tables in the README
all derive from the field. A command's options start as "not given", so that the
order "default, then file, then command line" needs no special case anywhere.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from ..errors import SettingError
from ..files.near import files_like
from ..files.ownership import Made, is_file
from ..words import bytes_of, did_you_mean
from .names import command_line

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
    values, lines = _of_file(cls, config, command) if config is not None else ({}, {})
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


def _of_file(cls: type[Any], config: Path, command: str) -> tuple[dict[str, Any], dict[str, int]]:
    """The settings of a TOML file and their lines; those that only the command has whose file it may be are left out.

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
    fields = {field.name: field for field in dataclasses.fields(cls)}
    types = get_type_hints(cls)
    also = fields["config"].metadata.get("file_of") if "config" in fields else None
    known = (get_type_hints(also) if also else {}) | types
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    faults: list[tuple[int, str]] = []
    fixes: list[str] = []

    def like(key: str) -> list[str]:
        return difflib.get_close_matches(key.replace("-", "_"), known, n=1)

    def take(key: str, value: Any) -> None:
        name = key.replace("-", "_")
        if name == "config":
            fault, fix = "a settings file names no other", f"leave {key} out"
        elif name in known:
            try:
                found = _coerced(value, known[name])
            except SettingError as error:
                fault, fix = f"{key}: {error.what}", ""
            else:
                if name in types:
                    beside = fields[name].metadata.get("beside")
                    values[name] = _where_it_lies(config, data, found, beside) if beside else found
                    lines[name] = _line_of(key, data)
                return
        elif isinstance(value, dict):
            fault, fix = f"[{key}] is a table, and settings stand in none", f"take the line [{key}] out"
            if value and not any(map(like, value)):
                fix = f"take [{key}] out, and all that stands in it: none of that is a setting"
            else:
                for inner in value.items():
                    take(*inner)
        else:
            near = like(key)
            fault = "; ".join(filter(None, [f"there is no setting {key!r}", did_you_mean(map(repr, near))]))
            fix = "" if near else f"settings are called like the options: {f'{command} --help'.strip()} lists them"
        faults.append((_line_of(key, data), fault))
        if fix and fix not in fixes:
            fixes.append(fix)

    for item in loaded.items():
        take(*item)
    if not faults:
        return values, lines
    faults.sort(key=lambda fault: fault[0])
    (line, what), *more = faults
    where = f"--config {config}" + f", line {line}" * (line > 0 and not more)
    if more:
        what = f"{len(faults)} mistakes" + "".join(
            f"\n  line {line}: {fault}" if line else f"\n  {fault}" for line, fault in faults
        )
    raise SettingError(what, where=where, fix="; ".join(fixes) or None)


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
