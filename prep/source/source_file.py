"""Opens a file of the lists, and reads its bytes as few times as can be: on a network disk they are what one waits for.

A small file is read into memory once, where it is hashed, demuxed and decoded as often as need be. A large one is
read through the system's cache, and hashed while the demuxer goes through it, where that is wanted.
"""

from __future__ import annotations

import hashlib
import io
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from cogcommon.files.regular_file import Empty, Missing, Unreadable, open_regular

from .addresses import remote_address
from .clip import BadClip, ClipFault, Hashed, toned
from .clip_cache import ObjectState
from .heartbeat import beat
from .near import clip_of_pictures, near
from .part import locate
from .remote import open_object, state_of

IN_MEMORY = 64 << 20  # bytes of a file that is held whole; a decode process holds a clip and its first frame
_BLOCK = 1 << 20
_GAP = 1 << 20  # bytes that a demuxer steps over, and the hash reads at once; beyond lies an index


class Source:
    """A file of the lists, opened once. Use as a context manager.

    Args:
        path: opened as by `open_named`.
        hashing: whether its hash will be wanted: a large file's is then taken as it is read.

    Raises:
        BadClip: it cannot be opened. Where it is read, an OSError.
    """

    def __init__(self, path: Path, *, hashing: bool = False) -> None:
        self.path = path
        self._file = open_named(path)
        self.info = os.fstat(self._file.fileno())
        self._content: memoryview | None = None
        self._hashing = hashing
        self._digest = hashlib.sha256()
        self._hashed = 0  # bytes from the start

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._file.close()

    @property
    def size(self) -> int:
        """Bytes, as it was opened; what is appended later is not seen."""
        return self.info.st_size

    @property
    def sha256(self) -> bytes:
        """Of the content; of the very bytes that `read` gave, where the file is held in memory."""
        while (start := self._hashed) < self.size and (block := self.read(start, _BLOCK)):
            self._hash(start, block)
        return self._digest.digest()

    def read(self, start: int, size: int) -> memoryview:
        """At most ``size`` bytes from ``start``; fewer only at the end."""
        size = max(0, min(size, self.size - start))
        if self.size <= IN_MEMORY:
            if self._content is None:
                self._content = memoryview(self._read_whole())
            return self._content[start : start + size]
        if self._hashing and 0 < start - self._hashed <= _GAP:
            self._hash(self._hashed, self._read_file(self._hashed, start - self._hashed))
        data = self._read_file(start, size)
        if self._hashing:
            self._hash(start, data)
        return data

    def stream(self) -> Stream:
        """The content as a file object of its own place, named as FFmpeg wants it."""
        return Stream(self)

    def _hash(self, start: int, data: memoryview) -> None:
        """Take what lies at ``start`` into the hash, so far as it goes on where the hash has come to."""
        if start <= self._hashed < start + len(data):
            self._digest.update(data[self._hashed - start :])
            self._hashed = start + len(data)

    def _read_whole(self) -> memoryview:
        content = memoryview(bytearray(self.size))
        at = 0
        while at < self.size and (count := self._file.readinto(content[at : at + _BLOCK])):
            at += count
            beat()
        return content[:at]

    def _read_file(self, start: int, size: int) -> memoryview:
        parts = []
        while size and (part := os.pread(self._file.fileno(), size, start)):
            parts.append(part)
            start, size = start + len(part), size - len(part)
            beat()
        return memoryview(parts[0] if len(parts) == 1 else b"".join(parts))


class ClipSource(Source):
    """What a line of videos.txt names, opened: a file, or one of which only a part is meant. As `Source`.

    Raises:
        BadClip: also where its fragment says no part.
    """

    def __init__(self, path: Path, *, hashing: bool = False) -> None:
        self.place = locate(path)
        super().__init__(self.place.file, hashing=hashing)

    def __enter__(self) -> ClipSource:
        return self

    def turn_to(self, path: Path) -> bool:
        """Mean another part of the same file from now on; false, and nothing done, where the line names another file.

        Raises:
            BadClip: its fragment says no part.
        """
        place = locate(path)
        if place.file == self.path:
            self.place = place
        return place.file == self.path

    @property
    def identity(self) -> bytes:
        """The content hash of what is named: of a whole file its own, of a part see `Place.identity`."""
        return self.place.identity(self.sha256)

    def is_clip(self, sha256: bytes) -> bool:
        """Whether this is the clip of a recorded content hash, tone-mapped or not."""
        return sha256 in (self.identity, toned(self.identity))


class Stream(io.RawIOBase):
    """See `Source.stream`."""

    def __init__(self, source: Source) -> None:
        self.name = f"file:{source.path}"  # by its ending FFmpeg tells some formats
        self._source = source
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._source.size}[whence]
        if start + offset < 0:
            raise ValueError("a place before the start of a file")
        self._at = start + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._source.read(self._at, len(buffer))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def hash_file(path: Path) -> bytes:
    """sha256 of a file's content.

    Raises:
        BadClip: as `open_named`.
        OSError: it cannot be read.
    """
    with Source(path) as source:
        return source.sha256


def hash_whole(path: Path) -> Hashed | ClipFault:
    """A clip's content hash, without a decoder; a fault if it cannot be read."""
    try:
        with ClipSource(path) as source:
            return Hashed(source.size, source.info.st_mtime_ns, source.identity)
    except BadClip as bad:
        return replace(bad.fault(), passing=True)
    except OSError as error:
        return ClipFault(str(error), passing=True, kind="unreached")


def file_state(path: Path) -> tuple[int, int, int]:
    """Size, time and inode of a clip's file as it is now; of an object behind an address, what stands for its etag.

    All are -1 where it cannot be told.
    """
    try:
        file = locate(path).file
        if (address := remote_address(file)) is not None:
            found: ObjectState = state_of(address)
            return found.size, found.time_ns, 0
        now = file.stat()
    except (OSError, ValueError, BadClip, Unreadable):  # ValueError: a NUL byte in the name
        return -1, -1, -1
    return now.st_size, now.st_mtime_ns, now.st_ino


def unchanged(path: Path, before: Hashed) -> bool:
    """Whether a clip's file still has the size and time that it had when it was hashed."""
    return file_state(path)[:2] == (before.size, before.mtime_ns)


def open_named(path: Path) -> io.FileIO:
    """See `open_regular`; of a missing file, what lies near it is named. One behind an address is brought here.

    Raises:
        BadClip: missing, unreadable, empty, or no regular file; `Unreached` where a store does not give it.
    """
    address = remote_address(path)
    try:
        return open_regular(path) if address is None else open_object(address)
    except Missing as error:
        if address is not None:
            raise BadClip(str(error), "missing") from None
        raise BadClip("; ".join(filter(None, [str(error), near(path)])), "missing") from None
    except Empty as error:
        raise BadClip(str(error), "empty") from error
    except Unreadable as error:
        if address is None and os.path.isdir(path) and (command := clip_of_pictures(path)):  # noqa: PTH112  as it is
            raise BadClip(f"a folder of pictures, not a file; to make a clip of them: {command}", "told") from error
        raise BadClip(str(error), "unreached" if isinstance(error.__cause__, OSError) else "other") from error
