"""What a person may have meant by the name of a folder or file that is not there."""

from __future__ import annotations

import os
from collections.abc import Callable
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

_MOST = 20_000  # names of a folder that are looked at


def folders_like(path: Path, fits: Callable[[Path], bool] = lambda folder: True) -> list[Path]:
    """Folders beside one with names like its, at most three.

    Args:
        path: of the folder that is missing, or is not what was asked for; it is never named itself.
        fits: whether a folder is what was asked for.
    """
    return _like(path, os.DirEntry.is_dir, "", fits)


def files_like(path: Path) -> list[Path]:
    """The same of a missing file, and of files with its suffix."""
    end = path.suffix
    return _like(path, lambda entry: entry.is_file() and Path(entry.name).suffix == end, end, lambda file: True)


def _like(
    path: Path, wanted: Callable[[os.DirEntry[str]], bool], end: str, fits: Callable[[Path], bool]
) -> list[Path]:  # fmt: skip
    """
    Args:
        end: of all names that are wanted; what stands before it is compared.
        fits: is asked of the nearest ones, until there are three.
    """
    try:
        with os.scandir(path.parent) as entries:
            names = [entry.name for entry in islice(entries, _MOST) if entry.name != path.name and wanted(entry)]
    except (OSError, ValueError):
        return []
    stems = [name.removesuffix(end) for name in names]
    near = get_close_matches(path.name.removesuffix(end), stems, n=len(stems) or 1)
    return [*islice(filter(fits, (path.with_name(stem + end) for stem in near)), 3)]
