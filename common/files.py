"""Atomic file writes: a file is there whole, or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def fsync_folder(folder: Path) -> None:
    """Make renames and removals in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def commit(temporary: Path, final: Path) -> None:
    """Give a finished, fsynced file its name: rename, then fsync the folder."""
    temporary.replace(final)
    fsync_folder(final.parent)


def commit_bytes(path: Path, data: bytes, *, exclusive: bool = False) -> bool:
    """Write a file so that a crash leaves the old one or the new one, never a part.

    Args:
        exclusive: leave an existing file alone (the first of several writers wins).

    Returns:
        Whether the file is ours; always true unless ``exclusive``.
    """
    # The process id keeps two writers apart; a leftover is what clean-cache calls half-written.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        if exclusive:
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            fsync_folder(path.parent)
        else:
            commit(temporary, path)
        return True
    finally:
        temporary.unlink(missing_ok=True)
