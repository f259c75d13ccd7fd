"""Lists that are written for a person: never over one that is there, and not where shards lie."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePath

from cogcommon.cli.names import command_line
from cogcommon.errors import DataRootError
from cogcommon.files.atomic import commit_bytes
from cogcommon.files.failures import disk_errors
from cogcommon.files.ownership import RECORD_FILE
from cogcommon.shards.contract import CONTRACT_FILE

from ..source.part import file_named

PROMPTS, VIDEOS, IMAGES = "prompts.txt", "videos.txt", "images.txt"
SHEETS = "cuts"  # folder of the contact sheets of `cogprep split`


def refuse_output(root: Path) -> None:
    """Refuse a folder of shards or of a run.

    Raises:
        DataRootError: it is one.
    """
    for name in (RECORD_FILE, CONTRACT_FILE):
        if os.path.lexists(root / name):
            raise DataRootError(
                "this folder was made by cogprep or cogtrain; it is no folder of clips",
                where=str(root / name),
                fix="name the folder that your clips are in",
            )


def set_aside(root: Path, names: Sequence[str], *again: object) -> str:
    """A command that moves lists out of the way, and then runs ``again``."""
    moves = [command_line("mv", "-n", root / name, root / f"{name}.old") for name in names]
    return f"`{' && '.join([*moves, command_line(*again)])}`"


def sheet_of(film: str, number: int) -> str:
    """The name of a contact sheet of a film's parts, below the folder of the lists; the number is from 1."""
    return f"{SHEETS}/{PurePath(film).stem}-{number}.png"


def sheets_among(pictures: Sequence[str], listed: Sequence[str]) -> set[str]:
    """The pictures that are contact sheets of films of which lines name parts."""
    films = {PurePath(file_named(entry)).stem for entry in listed if file_named(entry) != entry}
    sheets = (re.fullmatch(rf"{SHEETS}/(.*)-[0-9]+\.png", picture, re.DOTALL) for picture in pictures)
    return {sheet[0] for sheet in sheets if sheet and sheet[1] in films}


def entry_of(name: str) -> str:
    """A name as a line of a list, which ends where no white space is."""
    return name if name == name.strip() else f"./{name}"


def write_list(path: Path, entries: Sequence[str]) -> bool:
    """Write a list unless there is one; whether it was written."""
    with disk_errors(path):
        return commit_bytes(path, "".join(f"{entry}\n" for entry in entries).encode(), exclusive=True)
