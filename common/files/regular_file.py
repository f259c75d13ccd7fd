"""Opens a file that a person named, before any decoder sees it."""

from __future__ import annotations

import stat
from io import FileIO
from pathlib import Path


class Unreadable(Exception):
    """The file cannot be read; the message says why, without its name."""


class Missing(Unreadable):
    """There is nothing of that name."""


class Empty(Unreadable):
    """There is a file of that name, and nothing in it."""


def open_regular(path: Path) -> FileIO:
    """Open a file to read it. What is not a regular file is refused: opening a pipe or a device could block for ever.

    Raises:
        Unreadable: missing, unreadable, empty, or no regular file.
    """
    try:
        info = path.stat()
        if stat.S_ISDIR(info.st_mode):
            raise Unreadable("a folder, not a file")
        if not stat.S_ISREG(info.st_mode):
            raise Unreadable("not a regular file (a pipe, socket or device)")
        if info.st_size == 0:
            raise Empty("the file is empty (0 bytes)")
        return path.open("rb", buffering=0)
    except FileNotFoundError:
        if path.is_symlink():
            raise Unreadable("a link that points nowhere") from None
        raise Missing("the file is missing") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        raise Unreadable(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
