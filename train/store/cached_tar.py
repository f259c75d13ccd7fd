"""Whole tars in the cache: those of servers that give no parts of files."""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import BinaryIO

import pyarrow as pa

from cogcommon.errors import ShardError, StoreError
from cogcommon.files.hashes import sha256_of
from cogcommon.store import store
from cogcommon.store.http_store import HttpStore
from cogcommon.store.network import ANOTHER_SERVER
from cogcommon.store.store import OPENING, TRAINING, ReadPart, StoredFile, StoreFault, patiently
from cogcommon.words import in_bytes

from .cache import SampleCache, write
from .local_store import LocalStore

# What helps a damaged file behind an address.
UPLOAD_AGAIN = "compare it with the copy that `cogprep encode` wrote (`cogprep verify` there), and upload it again"

_DISK = LocalStore()


class CachedTar(HttpStore):
    """A tar's server, whose parts are read from the cache's copy of the whole; it is fetched when it is first read.

    A sample's hash tells whether the copy is what was fetched. Where it is not, `check` fetches it again: a disk that
    fails, or another program that writes there, is no fault of the shard's.

    Args:
        file: the tar behind its address.
        sha256: what its record says of it.
        size: likewise, bytes.
    """

    def __init__(self, cache: SampleCache, file: StoredFile, sha256: str, size: int) -> None:
        self._cache, self._file, self._sha256, self._size = cache, file, sha256, size
        self._copy = cache.path(sha256)
        self.where = f"{cache.shown}, {file.shown}"  # for messages
        self._was_read = False
        cache.protect(pa.chunked_array([pa.array([bytes.fromhex(sha256)], pa.binary())]))
        cache.used(self._copy)

    def read(self, path: str, start: int, end: int) -> ReadPart:
        """As any store.

        Raises:
            StoreError, ShardError: as `check`.
        """
        try:
            part = _DISK.read(str(self._copy), start, end)
        except (FileNotFoundError, StoreFault) as fault:
            if isinstance(fault, StoreFault) and fault.passing:
                raise
            self.check()
            try:
                part = _DISK.read(str(self._copy), start, end)
            except FileNotFoundError:  # another run made room at this moment
                raise StoreFault("the cache's copy was removed") from None
        self._was_read = True
        return part

    def check(self) -> None:
        """Fetch the copy where it is not there, and again where it is damaged.

        Raises:
            StoreError: it does not come, or there is no room for it.
            ShardError: what comes, twice the same, is not what its record says.
        """
        with self._alone():
            try:
                if sha256_of(self._copy) == self._sha256:
                    return  # another process, or thread, was faster
                damaged = True
            except FileNotFoundError:
                damaged = False
            except OSError:  # a disk that fails
                damaged = True
            if damaged:
                store.FAULTS.add("the cache's copy was damaged", self.where, None)
                self._cache.drop(self._copy)
            elif self._was_read:
                store.FAULTS.add("the cache's copy was removed: is --cache-size enough for all runs?", self.where, None)
            self._fetch()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One process fetches, the others find it."""
        try:
            self._cache.root.mkdir(parents=True, exist_ok=True)
            with open(self._cache.root / "fetching", "a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield
        except OSError as error:
            raise StoreError(
                f"the cache cannot be written: {error.strerror}",
                where=self.where,
                fix="another disk",
            ) from error

    def _fetch(self) -> None:
        cache = self._cache
        came = set()
        for _ in range(2):
            with cache.writing(self._sha256) as (stream, temporary):
                room = self._size <= cache.size and cache.disk_has(self._size)
                patience = TRAINING if self._was_read else OPENING
                digest = patiently(partial(self._download, stream), self._file.shown, patience) if room else ""
                if digest == self._sha256 and cache.commit(temporary, self._sha256, self._size):
                    return
                if not room or digest == self._sha256:
                    raise StoreError(
                        "the server gives whole files only, and there is no room in the cache for this one "
                        f"({in_bytes(self._size)}{'; ' if cache.closed else ''}{cache.closed})",
                        where=self.where,
                        fix="a larger --cache-size, or another disk",
                    )
                came.add(digest)
        if len(came) > 1:
            raise StoreError(
                "cannot be read: the server gives other bytes each time", where=self._file.shown, fix=ANOTHER_SERVER
            )
        raise ShardError(
            "a damaged shard: the tar is not what its record says",
            where=self._file.shown,
            fix=UPLOAD_AGAIN,
        )

    def _download(self, stream: BinaryIO) -> str:
        """One attempt to fetch the whole; its sha256."""
        digest = hashlib.sha256()
        stream.seek(0)
        stream.truncate()
        try:
            for piece in self.download(self._file.path):
                digest.update(piece)
                write(stream, piece)
        except FileNotFoundError:
            raise StoreFault("the server no longer has it (404)", passing=False) from None
        return digest.hexdigest()
