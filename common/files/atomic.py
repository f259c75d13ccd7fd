"""Atomic file writes: a file is there whole, or not at all."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from .locks import Busy, NoLocks, lock, open_locked

# What is being written, .NAME.HOST-RANDOM.tmp: no two writers share a name, in whatever containers they run.
# The guard keeps writers of one name apart where the file system cannot.
TEMPORARY = re.compile(r"\..+\.([A-Za-z0-9-]{1,24}-[0-9a-f]{16}|guard)\.tmp", re.ASCII | re.DOTALL)

# How file systems without hard links answer (exFAT, FAT, some FUSE drivers and network shares).
_NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK})

_HERE, _EXCHANGE = -100, 2  # AT_FDCWD, RENAME_EXCHANGE


def temporary_beside(path: Path) -> Path:
    """A name in the same folder that nobody else takes; `TEMPORARY` knows it as ours."""
    host = re.sub(r"[^A-Za-z0-9]+", "-", socket.gethostname())[:24].strip("-") or "host"
    return path.with_name(f".{path.name}.{host}-{secrets.token_hex(8)}.tmp")


def fsync_folder(folder: Path) -> None:
    """Make renames and removals in a folder durable, where the file system knows how."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):  # some know it for files only
            raise
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Make a folder and all that is in it durable."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        else:
            fsync_folder(path)
    fsync_folder(folder)


def honour_umask(path: Path) -> None:
    """Give a file the permissions of every other new file; safetensors makes its own for their owner alone."""
    mask = _umask()
    with suppress(OSError):  # file systems without permissions
        path.chmod(0o666 & ~mask)


def _umask() -> int:
    """What the process takes away of each new file's permissions."""
    with suppress(OSError, StopIteration, ValueError):  # Linux; nothing changes for a moment, as it does below
        lines = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines()
        return int(next(line for line in lines if line.startswith("Umask:")).split()[1], 8)
    mask = os.umask(0o077)  # there is no other way to ask
    os.umask(mask)
    return mask


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

    Raises:
        NoLocks: for ``exclusive``, where there are neither hard links nor locks.
    """
    temporary, stream = _open_temporary(path)
    try:
        with stream:  # locked until it has its name, so that clean-cache knows that we live
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
            if exclusive:
                return _commit_first(temporary, path)
            commit(temporary, path)
            return True
    finally:
        temporary.unlink(missing_ok=True)


def _open_temporary(path: Path) -> tuple[Path, IO[bytes]]:
    """A new temporary file, locked where the file system keeps locks."""
    while True:
        temporary = temporary_beside(path)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        stream = os.fdopen(descriptor, "wb")
        try:
            lock(stream, temporary)
            if os.path.lexists(temporary):
                return temporary, stream
        except NoLocks:
            return temporary, stream
        except Busy:
            pass  # clean-cache came between, took it for a dead writer's, and removes it
        stream.close()


def _commit_first(temporary: Path, final: Path) -> bool:
    """Give a finished file its name unless that is taken; returns whether it was free."""
    try:
        os.link(temporary, final)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with alone_with(final):
            if os.path.lexists(final):
                return False
            commit(temporary, final)
            return True
    fsync_folder(final.parent)
    return True


def guard_of(path: Path) -> Path:
    """The file whose lock `alone_with` holds."""
    return path.with_name(f".{path.name}.guard.tmp")


@contextmanager
def alone_with(path: Path) -> Iterator[None]:
    """Keep others who ask the same waiting; nothing need lie at the path.

    Raises:
        NoLocks: the file system keeps no locks.
    """
    guard = guard_of(path)
    while True:
        try:
            stream = open_locked(guard)
            break
        except Busy:
            time.sleep(0.01)
        except NoLocks:
            guard.unlink(missing_ok=True)
            raise
    with stream:
        try:
            yield
        finally:
            guard.unlink(missing_ok=True)


def exchange(one: Path, other: Path) -> bool:
    """Let two files take each other's name in one step; False where the system or the file system cannot.

    What was under a name is then still there, under the other: whoever would have overwritten it can look at it.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # Linux
    if rename is None:
        return False
    rename.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    if rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    error = ctypes.get_errno()
    if error in _NO_LINKS or error == errno.EINVAL:
        return False
    raise OSError(error, os.strerror(error), str(other))


@contextmanager
def scratch_file(folder: Path) -> Iterator[Path]:
    """A temporary name in a folder; what is left under it goes with the block."""
    temporary = temporary_beside(folder / "scratch")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary name to write a file under; the file gets its own when the block has ended well."""
    with scratch_file(path.parent) as temporary:
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        commit(temporary, path)
