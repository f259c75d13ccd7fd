"""Checks and hashes a file of the lists before a decoder opens it."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from .clip import BadClip
from .near import near


def hash_file(path: Path) -> bytes:
    """sha256 of a file's content.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def refuse_special(path: Path) -> os.stat_result:
    """Refuse what is not a regular, readable file: opening a pipe or a device could block for ever.

    Raises:
        BadClip: missing, unreadable, empty, or no regular file.
    """
    try:
        info = path.stat()
        if stat.S_ISDIR(info.st_mode):
            raise BadClip("a folder, not a file")
        if not stat.S_ISREG(info.st_mode):
            raise BadClip("not a regular file (a pipe, socket or device)")
        if info.st_size == 0:
            raise BadClip("the file is empty (0 bytes)")
        with path.open("rb"):
            return info
    except FileNotFoundError:
        if path.is_symlink():
            raise BadClip("a link that points nowhere") from None
        raise BadClip("; ".join(filter(None, ["the file is missing", near(path)]))) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        raise BadClip(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
