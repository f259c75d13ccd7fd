"""Locks on shards, and one clear message for a full disk or a refusal of the file system."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO

from cogcommon.files import failures, locks
from cogcommon.files.atomic import TEMPORARY, alone_with, guard_of, temporary_beside
from cogcommon.files.ownership import is_file
from cogcommon.shards.records import tar_name
from cogcommon.words import in_bytes

_MARK = "encode"  # .encode.HOST-RANDOM.tmp
_REMOVAL = "clean-cache"  # .clean-cache.guard.tmp


class ShardBusy(Exception):
    """Another live process writes this shard."""


def temporary_name(number: int) -> str:
    return f".{number:06d}.tar.tmp"


def open_temporary_tar(folder: Path, number: int) -> IO[bytes]:
    """Open a shard's temporary tar for this process alone. The lock goes with the process, however it ends.

    Raises:
        ShardBusy: another live process writes the shard.
        NoLocks: the file system keeps no locks.
    """
    temporary, tar = folder / temporary_name(number), folder / tar_name(number)
    try:
        stream = locks.open_locked(temporary)
    except locks.Busy:
        raise ShardBusy from None
    # A writer renames its tar, locked still, before it writes the record; the temporary name is free by then.
    if is_file(tar) and locks.locked_elsewhere(tar):
        with stream:
            _let_go(stream, temporary)
        raise ShardBusy
    return stream


def _let_go(stream: IO[bytes], temporary: Path) -> None:
    """Remove a lock that is nothing else. A killed writer's work may lie in it; that is for the next one."""
    if os.fstat(stream.fileno()).st_size == 0:
        temporary.unlink(missing_ok=True)


@contextmanager
def lock_shard(folder: Path, number: int) -> Iterator[None]:
    """Hold a shard that is not being written but for its record or its rewrite.

    Raises:
        ShardBusy: another live process writes it.
    """
    with open_temporary_tar(folder, number) as stream:
        try:
            yield
        finally:
            _let_go(stream, folder / temporary_name(number))


@contextmanager
def at_work(out: Path) -> Iterator[None]:
    """Hold a locked file in a folder, by which clean-cache knows that a run lives there. The folder is made, too.

    While clean-cache removes what runs share, this waits. What a folder holds is looked at inside, not before.

    Raises:
        NoLocks: the file system keeps no locks, and writers could not be told apart.
        DiskError: the folder cannot be written.
    """
    mark = temporary_beside(out / _MARK)
    with shard_disk_errors(out):
        stream = _put(mark)
    try:
        with stream:
            with shard_disk_errors(out):
                for left in _marks(out):
                    if left != mark:
                        locks.remove_unless_held(left)
                while locks.locked_elsewhere(guard_of(out / _REMOVAL)):
                    time.sleep(0.01)
            yield
    finally:
        mark.unlink(missing_ok=True)


def _put(mark: Path) -> IO[bytes]:
    # Whoever looks whether we live holds it for a moment, and before it lies there clean-cache may remove the folder.
    while True:
        mark.parent.mkdir(parents=True, exist_ok=True)
        try:
            return locks.open_locked(mark)
        except (locks.Busy, FileNotFoundError):
            continue
        except locks.NoLocks:
            mark.unlink(missing_ok=True)
            raise


def _marks(out: Path) -> list[Path]:
    """The files by which runs that live in a folder, or lived there, are known."""
    return [path for path in out.glob(f".{_MARK}.*.tmp") if TEMPORARY.fullmatch(path.name)]


@contextmanager
def removing(out: Path) -> Iterator[bool]:
    """Keep runs that begin in a folder waiting while what runs share is removed.

    Of a run's mark and this lock each side sets its own before it looks for the other's, so one of them sees it.

    Yields:
        Whether a run lives there already.
    """
    with alone_with(out / _REMOVAL):
        yield is_at_work(out)


def is_at_work(out: Path) -> bool:
    """Whether a run lives in a folder (`at_work`)."""
    return any(map(locks.locked_elsewhere, _marks(out)))


def is_lock_of_removing(path: Path) -> bool:
    """Whether a file is the lock of `removing`."""
    return path == guard_of(path.with_name(_REMOVAL))


def lack_of_room(folder: Path, needed: int) -> str:
    """What to tell whoever starts a work of ``needed`` bytes on a disk that is too full for it; else empty."""
    free = failures.room_of(folder)
    if free is None or needed <= free:
        return ""
    return f"this takes {in_bytes(needed)}, and the disk of {folder} has {in_bytes(free)} free: it will run full"


def shard_disk_errors(path: Path) -> AbstractContextManager[None]:
    """What the file system refuses while shards, or what belongs to them, are written: one clear message.

    Raises:
        DiskError: in place of the system's or the library's own error.
    """
    return failures.disk_errors(path, go_on="run the command again: finished shards are kept")
