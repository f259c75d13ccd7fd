"""Locks on shards, and one clear message for a full disk or a refusal of the file system."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO

from cogcommon import failures
from cogcommon.words import in_bytes


class ShardBusy(Exception):
    """Another live process writes this shard."""


def temporary_name(number: int) -> str:
    return f".{number:06d}.tar.tmp"


def open_locked(path: Path) -> IO[bytes]:
    """Open a temporary tar for this process alone. The lock goes with the process, however it ends."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between opening and locking, its writer may have renamed or removed it.
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                return os.fdopen(descriptor, "r+b", buffering=1 << 20)
        except FileNotFoundError:
            pass
        except BlockingIOError:
            os.close(descriptor)
            raise ShardBusy from None
        os.close(descriptor)


def locked_elsewhere(path: Path) -> bool:
    """Whether a live process holds a temporary tar."""
    try:
        with path.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False


@contextmanager
def lock_shard(folder: Path, number: int) -> Iterator[None]:
    """Hold a shard that is not being written but for its record or its rewrite.

    Raises:
        ShardBusy: another live process writes it.
    """
    path = folder / temporary_name(number)
    with open_locked(path) as stream:
        try:
            yield
        finally:
            # A killed writer's work may lie in it; that is for the next one.
            if os.fstat(stream.fileno()).st_size == 0:
                path.unlink(missing_ok=True)


def lack_of_room(folder: Path, needed: int) -> str:
    """What to tell whoever starts a work of ``needed`` bytes on a disk that is too full for it; else empty."""
    free = failures.room_of(folder)
    if free is None or needed <= free:
        return ""
    return f"this takes {in_bytes(needed)}, and the disk of {folder} has {in_bytes(free)} free: it will run full"


def disk_errors(path: Path) -> AbstractContextManager[None]:
    """What the file system refuses while shards, or what belongs to them, are written: one clear message.

    Raises:
        DiskError: in place of the system's or the library's own error.
    """
    return failures.disk_errors(path, go_on="run the command again: finished shards are kept")
