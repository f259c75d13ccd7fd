"""A list that is there, replaced as a whole while others may write it.

The list is replaced by a rename: whoever reads it sees the old one or the new one. Other commands are kept waiting by
a lock; of a person, who knows of no lock, it is seen that the list has changed since it was read.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from cogcommon.files.atomic import alone_with, commit, exchange, fsync_folder, scratch_file
from cogcommon.files.locks import NoLocks

_BREAK = re.compile(rb"(\r\n|\r|\n)")


@contextmanager
def alone(captions: Path) -> Iterator[None]:
    """Keep other commands that write lists waiting, where the file system can.

    Args:
        captions: the list of captions, whose lock stands for all lists beside it.
    """
    with ExitStack() as stack:
        with suppress(NoLocks):
            stack.enter_context(alone_with(captions))
        yield


def state_of(path: Path) -> object:
    """What is another one once somebody has written the list."""
    info = path.stat()
    return info.st_ino, info.st_size, info.st_mtime_ns


def replace_list(path: Path, data: bytes, seen: object) -> bool:
    """Replace the list unless it is another one by now; whether it was replaced.

    Args:
        path: no link.
        seen: its `state_of` before it was read.
    """
    with scratch_file(path.parent) as temporary:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        with suppress(OSError):  # file systems without permissions
            shutil.copymode(path, temporary)
        if state_of(path) != seen:
            return False
        if not exchange(temporary, path):
            commit(temporary, path)
        elif state_of(temporary) != seen:  # somebody was quicker by a hair: theirs goes back
            exchange(temporary, path)
            return False
        fsync_folder(path.parent)
        return True


def split_lines(data: bytes) -> tuple[list[bytes], bytes]:
    """A list as a line, its break, a line, ...; and the break that its lines end in."""
    parts = _BREAK.split(data)
    return parts, parts[1] if len(parts) > 1 else b"\n"
