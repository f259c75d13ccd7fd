"""Checks and hashes a file of the lists before a decoder opens it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from cogcommon.files.regular_file import Missing, Unreadable, check_regular

from .clip import BadClip, ClipFault, Hashed
from .heartbeat import beat
from .near import near
from .part import locate


def hash_file(path: Path) -> bytes:
    """sha256 of a file's content.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    block = memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(block[:size])
            beat()
    return digest.digest()


def hash_whole(path: Path) -> Hashed | ClipFault:
    """A clip's content hash, without a decoder; a fault if it cannot be read."""
    try:
        info = refuse_special(locate(path).file)
        return Hashed(info.st_size, info.st_mtime_ns, hash_clip(path))
    except (BadClip, OSError) as error:
        return ClipFault(str(error), passing=True)


def hash_clip(path: Path) -> bytes:
    """The content hash of a clip, whole or a part: what a line of videos.txt names.

    Raises:
        OSError: it cannot be read.
        BadClip: its fragment says no part.
    """
    place = locate(path)
    return place.identity(hash_file(place.file))


def unchanged(path: Path, before: Hashed) -> bool:
    """Whether a clip's file still has the size and time that it had when it was hashed."""
    try:
        now = locate(path).file.stat()
    except (OSError, ValueError, BadClip):  # ValueError: a NUL byte in the name
        return False
    return (now.st_size, now.st_mtime_ns) == (before.size, before.mtime_ns)


def refuse_special(path: Path) -> os.stat_result:
    """See `check_regular`; of a missing file, what lies near it is named.

    Raises:
        BadClip: missing, unreadable, empty, or no regular file.
    """
    try:
        return check_regular(path)
    except Missing as error:
        raise BadClip("; ".join(filter(None, [str(error), near(path)]))) from None
    except Unreadable as error:
        raise BadClip(str(error)) from error
