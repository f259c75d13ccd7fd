"""What a person may have meant by the name of a folder or file that is not there."""

from __future__ import annotations

import os
from collections.abc import Callable
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

_MOST = 20_000  # names of a folder that are looked at


def folders_like(path: Path) -> str:
    """What folders beside a missing one have names like its: ``did you mean holiday?``; empty where none has."""
    return _like(path, os.DirEntry.is_dir)


def files_like(path: Path) -> str:
    """The same of a missing file, and of files with its suffix."""
    return _like(path, lambda entry: entry.is_file() and Path(entry.name).suffix == path.suffix)


def _like(path: Path, wanted: Callable[[os.DirEntry[str]], bool]) -> str:
    try:
        with os.scandir(path.parent) as entries:
            names = [entry.name for entry in islice(entries, _MOST) if wanted(entry)]
    except (OSError, ValueError):
        return ""
    end = path.suffix  # which all files share
    stems = [name.removesuffix(end) for name in names]
    meant = [str(path.with_name(stem + end)) for stem in get_close_matches(path.name.removesuffix(end), stems)]
    return f"did you mean {' or '.join(meant)}?" if meant else ""
