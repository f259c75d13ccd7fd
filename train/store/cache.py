"""Samples of remote shards on this host's disk, by the hash of their content.

Everything lies in ``DIR/cogtrain-cache/``, and nothing else there or beside it is ever touched:

    ab/ab12...     a sample, or a whole tar where its server gives no parts (`cached_tar`); named by its sha256
    lock           held by whoever counts, and their bytes in all
    fetching       held by whoever fetches a whole tar

Any number of processes share it. A name answers for the content, so what a crash, a disk or another program leaves
there is at worst fetched again. What this run will read again is never removed to make room: where
samples are read in another order each epoch, what stays serves more of them than what was last used.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cogcommon.cli.names import plain
from cogcommon.errors import SettingError
from cogcommon.store import store
from cogcommon.words import in_bytes

_FOLDER = "cogtrain-cache"
_SPARE = 0.05  # share of the disk that is left free: the run's own checkpoints need room, too
_ABANDONED = 3600  # seconds after which a half-written file is nobody's
_TEMPORARY = re.compile(r"\.[0-9a-f]{64}\..+\.tmp")


class SampleCache:
    """See the module.

    Args:
        folder: made if missing.
        size: bytes that all runs on this host may keep there together.

    Raises:
        SettingError: it cannot be written.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self.root = folder / _FOLDER
        self.size = size
        self._kept: list[pa.ChunkedArray] = []
        self.closed = ""  # why nothing more is added
        self.shown = f"--cache {folder}"
        self._say_lock = threading.Lock()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            if self.root.is_symlink():
                raise OSError(errno.ELOOP, "it is a link")
            with self._counted() as count:
                count.total = sum(entry.size for entry in self._entries())
        except OSError as error:
            raise SettingError(
                f"the cache cannot be kept there: {error.strerror}",
                where=self.shown,
                fix="a folder on a local disk, or leave --cache out",
            ) from error

    def protect(self, hashes: pa.ChunkedArray) -> None:
        """Never remove the samples of these sha256 to make room."""
        self._kept.append(hashes)

    def has(self, sha256: bytes) -> bool:
        return self.path(sha256.hex()).exists()

    def takes(self, size: int) -> bool:
        """Whether more is likely to be kept; `put` finds out."""
        return not self.closed and size <= self.size

    def get(self, sha256: bytes) -> bytearray | None:
        """The bytes of this hash, if they are here and whole."""
        path = self.path(sha256.hex())
        try:
            data = bytearray(path.stat().st_size)
            with path.open("rb", buffering=0) as stream:
                whole = stream.readinto(data) == len(data)
        except OSError as error:
            if error.errno != errno.EIO:  # not here, removed meanwhile, another user's: the store has it
                return None
            data, whole = bytearray(), False
        if whole and hashlib.sha256(data).digest() == sha256:
            self.used(path)
            return data
        self.drop(path)
        store.FAULTS.add("a sample's copy was damaged", self.shown, None)
        return None

    def put(self, sha256: bytes, data: bytearray) -> None:
        """Keep bytes if there is room; where there is none, the run goes on without."""
        try:
            if not self.closed and not self.has(sha256) and self.disk_has(len(data)):
                with self.writing(sha256.hex()) as (stream, temporary):
                    write(stream, data)
                    self.commit(temporary, sha256.hex(), len(data))
        except OSError as error:
            self._close(error.strerror or str(error))

    def used(self, path: Path) -> None:
        """Note that a file is needed still."""
        with contextlib.suppress(OSError):  # another user's, for one
            os.utime(path)

    def drop(self, path: Path) -> None:
        """Remove a file that is not what its name says."""
        with contextlib.suppress(OSError):
            size = path.stat().st_size
            path.unlink()
            with self._counted() as count:
                count.total -= size

    @contextmanager
    def writing(self, name: str) -> Iterator[tuple[BinaryIO, Path]]:
        """A file to write in, which is gone afterwards unless it was committed."""
        path = self.path(name)
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_name(f".{name}.{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
        try:
            with temporary.open("wb", buffering=0) as stream:
                yield stream, temporary
        finally:
            temporary.unlink(missing_ok=True)

    def commit(self, temporary: Path, name: str, size: int) -> bool:
        """Give a written file its name, after making room for it; whether there is any."""
        path = self.path(name)
        with self._counted() as count:
            if path.exists() and path.stat().st_size == size:
                return True  # somebody else was faster
            if count.total + size > self.size:
                count.total = self._make_room(size)
            if count.total + size > self.size:
                self._close(f"its {in_bytes(self.size)} are full of what this run reads")
                return False
            temporary.replace(path)
            count.total += size
        return True

    def disk_has(self, size: int) -> bool:
        """Whether the disk has room for so many bytes more; nothing is added to the cache any more where it has not."""
        disk = os.statvfs(self.root)
        free = disk.f_bavail * disk.f_frsize
        if free - size >= _SPARE * disk.f_blocks * disk.f_frsize:
            return True
        self._close(f"the disk is nearly full ({in_bytes(free)} left)")
        return False

    def _make_room(self, size: int) -> int:
        """Remove what this run does not read, what was longest unused first; bytes that are left."""
        entries = sorted(self._entries(), key=lambda entry: entry.used)
        total = sum(entry.size for entry in entries)
        ours = self._ours()
        for entry in entries:
            if total + size <= 0.95 * self.size:  # more than is needed, so that not every sample makes room
                break
            if int(entry.name[:16], 16) not in ours:
                with contextlib.suppress(OSError):
                    self.path(entry.name).unlink()
                    total -= entry.size
        return total

    def _ours(self) -> set[int]:
        """The first eight bytes of the hash of each sample that this run reads."""
        return {
            int(prefix)
            for hashes in self._kept
            for prefix in np.frombuffer(b"".join(pc.binary_slice(hashes, 0, 8).to_pylist()), ">u8")
        }

    def _entries(self) -> Iterator[_Entry]:
        """The files that are ours by name; half-written ones that nobody writes any more are removed on the way."""
        for folder in self.root.iterdir():
            if folder.is_symlink() or not re.fullmatch("[0-9a-f]{2}", folder.name) or not folder.is_dir():
                continue
            with os.scandir(folder) as found:
                for one in found:
                    if not one.is_file(follow_symlinks=False):
                        continue
                    status = one.stat(follow_symlinks=False)
                    if re.fullmatch(folder.name + "[0-9a-f]{62}", one.name):
                        yield _Entry(one.name, status.st_size, status.st_mtime)
                    elif _TEMPORARY.fullmatch(one.name) and status.st_mtime < time.time() - _ABANDONED:
                        Path(one.path).unlink(missing_ok=True)

    @contextmanager
    def _counted(self) -> Iterator[_Count]:
        """The number of bytes kept, locked against other processes."""
        with open(self.root / "lock", "a+b") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            lock.seek(0)
            told = lock.read(20)
            count = _Count(int(told) if told.isdigit() else 0)
            yield count
            lock.truncate(0)  # opened to append, so it is written at the beginning
            lock.write(b"%d" % max(0, count.total))

    def path(self, name: str) -> Path:
        """Where the bytes of a sha256 lie, or would."""
        return self.root / name[:2] / name

    def _close(self, reason: str) -> None:
        with self._say_lock:
            first, self.closed = not self.closed, reason
        if first:
            print(plain(f"{self.shown}: {reason}; what is there is used, nothing is added"), file=sys.stderr)


def write(stream: BinaryIO, data: bytes | bytearray) -> None:
    """All of it, to a file without a buffer."""
    view = memoryview(data)
    while view:
        view = view[stream.write(view) :]


@dataclass(frozen=True)
class _Entry:
    name: str
    size: int
    used: float


@dataclass
class _Count:
    total: int
