"""What is the same for all parts of a file, read once: a film of two hours may have a thousand parts.

Each decode process remembers the last few files, as they were: a file that has changed since is read again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ..source.source_file import Source
from .times import FrameTimes

T = TypeVar("T")

_FILES = 3  # the times of two hours take 8 MB
_times: dict[tuple[int | str, ...], FrameTimes] = {}
_hashes: dict[tuple[int | str, ...], bytes] = {}


def times(source: Source, read: Callable[[], FrameTimes]) -> FrameTimes:
    """When the pictures of a whole file are shown.

    Args:
        read: reads the file for them.

    Raises:
        BadClip: the file is damaged.
    """
    return _remembered(_times, source, read)


def sha256(source: Source) -> bytes:
    """The hash of a whole file. Raises OSError."""
    return _remembered(_hashes, source, lambda: source.sha256)


def _remembered(known: dict[tuple[int | str, ...], T], source: Source, read: Callable[[], T]) -> T:
    info = source.info
    state = str(source.path), info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns
    if state not in known:
        found = read()  # a fault is not remembered: a disk may have been out of reach
        while len(known) >= _FILES:
            known.pop(next(iter(known)))
        known[state] = found
    return known[state]
