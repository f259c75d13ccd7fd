"""`cogtrain launch` and `cogprep launch`: write a job file, check it, and with --submit hand it over."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..cli.command import parse
from ..cli.mistyped import no_such_command
from ..cli.names import command_line
from ..cli.progress import say
from ..errors import SettingError
from ..files.atomic import commit_bytes
from .job import Job, Program, refuse_own_disk
from .settings import LaunchSettings
from .targets import TARGETS, Target, check_options, check_text, submit

# The line that proves a file to be ours, and as we wrote it: a hash of the other lines.
_MARK = "# Written by launch, which writes it anew as long as nobody has changed it: "


def launch(settings: LaunchSettings, program: Program) -> None:
    """Write the job file of a command, and say what takes it.

    Raises:
        SettingError: the command is not one to launch, or would be refused; the scheduler does not know an option; the
            file is somebody's.
    """
    assert settings.on is not None  # __post_init__
    target = TARGETS[settings.on]
    check_options(target, settings)
    words = settings.command
    what = _checked_command(settings, program, target)
    job = Job(
        program.name, words, program.together, settings.name or _name(words[0], str(what.out)), Path.cwd(), settings
    )
    if not target.ours:
        mirror = getattr(what, "mirror", None) if settings.nodes == 1 else None  # from which a bare machine goes on
        refuse_own_disk(str(mirror or what.out), settings.mount)
    text = target.render(job)
    checked = check_text(target, text)
    file = settings.file or Path(f"{job.name}{target.suffix}")
    _write(file, text)
    takes = command_line(*target.submit, file)
    if settings.json:
        print(json.dumps({"file": str(file), "checked": checked, "submit": takes, "submitted": settings.submit}))
    else:
        print(f"{file}: {program.name} {words[0]} on {job.machines}, for {target.title} (checked: {checked})")
    if settings.submit:
        submit(target, file)
    elif not settings.json:
        print(f"start it: {takes}")


def _name(command: str, out: str) -> str:
    """A name for the job: ``lora-mine`` of ``--out runs/mine``."""
    last = re.sub(r"[^a-z0-9]+", "-", Path(out).name.lower()).strip("-")
    return f"{command}-{last}"[:40].strip("-")


def _checked_command(settings: LaunchSettings, program: Program, target: Target) -> Any:
    """The settings of the command that is to run, checked as it would check them."""
    words = settings.command
    names = " or ".join(program.commands)
    if not words:
        raise SettingError(
            "nothing to run", where=f"{program.name} launch --", fix=f"behind --: {names}, and its options"
        )
    if words[0] not in program.commands:
        if words[0] == program.name and words[1:2] and words[1] in program.commands:
            raise SettingError(
                f"{program.name} itself is meant already", where="--", fix=f"-- {command_line(*words[1:])}"
            )
        raise no_such_command(f"{program.name} launch --", words[0], list(program.commands))
    options = _without_unseen_file(words[1:], target)
    what = parse(program.name, words[0], program.commands[words[0]], options)
    program.check(what, target.ours)
    if options == list(words[1:]):
        program.check_all(what)
    return what


def _without_unseen_file(words: Sequence[str], target: Target) -> list[str]:
    """The options without --config, where that names a file of the job's machines that this one does not have."""
    options = list(words)
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == "--config" and not target.ours:
            file = value if equals else (words[index + 1] if index + 1 < len(words) else "")
            if file and not os.path.exists(file):  # noqa: PTH110, a name of another machine
                say(f"note: {file} is not on this machine, so what it sets was not checked")
                del options[index : index + (1 if equals else 2)]
                break
    return options


def _write(file: Path, text: str) -> None:
    """Write the file, marked as ours; a file of that name that is somebody's stays.

    Raises:
        SettingError: there is such a file.
    """
    marked = _marked(text)
    file.parent.mkdir(parents=True, exist_ok=True)
    if commit_bytes(file, marked.encode(), exclusive=True):
        return
    if not file.is_file() or file.is_symlink() or not _is_ours(file.read_bytes()):
        raise SettingError(
            "there is a file of this name that launch has not written, or that was changed since; it stays as it is",
            where=str(file),
            fix="--file with another name",
        )
    commit_bytes(file, marked.encode())


def _marked(text: str) -> str:
    """A text with our mark behind the comment that it begins with."""
    lines = text.split("\n")
    at = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join([*lines[:at], _MARK + _hash(lines), *lines[at:]])


def _hash(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _is_ours(data: bytes) -> bool:
    """Whether a file bears our mark, and is as it was when it got it."""
    lines = data.decode("utf-8", "replace").split("\n")
    found = [line for line in lines if re.fullmatch(re.escape(_MARK) + "[0-9a-f]{16}", line)]
    return len(found) == 1 and found[0] == _MARK + _hash([line for line in lines if line != found[0]])
