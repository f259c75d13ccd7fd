"""Locks on files: whether a writer still lives is told by its lock, on whatever host or container it runs.

A process id says nothing of another host, and every container has a process 1. A lock goes with its
process, however that ends.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

from ..errors import CogError

# How file systems without locks answer: Lustre without -o flock, NFS without lockd, some FUSE drivers.
_NO_LOCKS = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK})


class Busy(Exception):
    """Another live process holds the lock."""


class NoLocks(CogError):
    """The file system keeps no locks, so nobody can tell whether a writer lives."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(
            f"the file system keeps no locks (flock: {error.strerror})",
            where=str(path.parent),
            fix="name a folder on another file system; or mount this one with locks (Lustre: -o flock; NFS: version 4, "
            "or with lockd)",
        )


def lock(stream: IO[bytes] | int, path: Path) -> None:
    """Lock an open file for this process alone, until it is closed. NFS wants it opened for writing.

    Args:
        path: of the file, for the message.

    Raises:
        Busy: another live process holds it.
        NoLocks: the file system keeps none.
    """
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Busy from None
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise NoLocks(path, error) from error
        raise


def open_locked(path: Path) -> IO[bytes]:
    """Open a file, made if there is none, for this process alone.

    Raises:
        Busy: another live process holds it.
        NoLocks: the file system keeps no locks.
        OSError: a link, for one.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        stream = os.fdopen(descriptor, "r+b", buffering=1 << 20)
        try:
            lock(stream, path)
            # Between opening and locking, its writer may have renamed or removed it.
            if os.fstat(descriptor).st_ino == path.lstat().st_ino:
                return stream
        except FileNotFoundError:
            pass
        except BaseException:
            stream.close()
            raise
        stream.close()


def remove_unless_held(path: Path) -> bool:
    """Remove a file that no live process holds; returns whether it is gone.

    It goes under its lock, so that whoever was about to lock it finds that out (`open_locked`).

    Raises:
        NoLocks: the file system keeps no locks.
    """
    return not _is_held(path, lambda: path.unlink(missing_ok=True))


def locked_elsewhere(path: Path) -> bool:
    """Whether a live process holds a file; also where that cannot be told, for it is not ours to write.

    Raises:
        NoLocks: the file system keeps no locks.
    """
    return _is_held(path, lambda: None)


def may_lock(path: Path) -> bool:
    """Whether we may read and write a file, as its lock takes. One that is not there would be ours to make."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW))
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS)
    return True


def _is_held(path: Path, otherwise: Callable[[], None]) -> bool:
    """Whether a live process holds a file, or may hold it: a link, and what we may not write, cannot be locked.

    Args:
        otherwise: called under the file's lock, where nobody holds it. A file that is not there is held by nobody.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    with os.fdopen(descriptor, "r+b") as stream:
        try:
            lock(stream, path)
        except Busy:
            return True
        otherwise()
    return False
