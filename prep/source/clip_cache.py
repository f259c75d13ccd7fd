"""The cache of clips that lie behind addresses: whole objects on a disk of this machine, shared by its processes.

An object is two files there, named by the hash of its address. One is its content, whose time of change stands for the
etag. The other ends in ``.asked``, is empty, and its time of change is when the store was last asked and said that
this content is still the object's: for a moment after that the store is believed, however often the content is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from cogcommon.files.atomic import TEMPORARY

_MOMENT_NS = 60 * 10**9  # for which what a store has said of an object is believed
_SPARE = 1 << 30  # bytes of the disk that are left to others
_PROCESSES = 16  # which may fill the cache at once
_CACHE = "COGPREP_CLIP_CACHE"  # of the environment: decode processes inherit it
_ASKED = ".asked"
_CONTENT = re.compile("[0-9a-f]{32}")


@dataclass(frozen=True)
class ObjectState:
    """An object as it is now; ``time_ns`` stands for its etag where a file has its time."""

    size: int
    time_ns: int

    @classmethod
    def of(cls, size: int, etag: str) -> ObjectState:
        """Whole, even seconds, which every file system keeps."""
        digest = hashlib.sha256(etag.encode()).digest()
        return cls(size, int.from_bytes(digest[:8], "big") % 1_000_000_000 * 2_000_000_000)

    @classmethod
    def kept(cls, info: os.stat_result) -> ObjectState:
        """The state of the object that a file of the cache is the content of."""
        return cls(info.st_size, info.st_mtime_ns)


def default_cache() -> Path:
    """Where cogprep keeps scratch of its own on this machine."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cogprep"


def use_cache(folder: Path, size: int) -> None:
    """Where clips behind addresses are kept on this machine, and how many bytes of them at most.

    Set once, for this process and those that it starts. What a store has said before that is asked again.
    """
    os.environ[_CACHE] = json.dumps([str(folder), size, time.time_ns()])


def _cache() -> tuple[Path, int, int]:
    """The cache, its size, and since when this run uses it."""
    if told := os.environ.get(_CACHE):
        folder, size, since = json.loads(told)
        return Path(folder), size, since
    return default_cache(), 50 * 10**9, time.time_ns()


def place_of(address: str) -> Path:
    """Where an object's content lies in the cache, if it is there."""
    return _cache()[0] / "clips" / hashlib.sha256(address.encode()).hexdigest()[:32]


def believed(content: Path) -> ObjectState | None:
    """The state of an object whose content is there, where this run has asked the store a moment ago."""
    with suppress(OSError):
        if _asked(content).stat().st_mtime_ns >= max(_cache()[2], time.time_ns() - _MOMENT_NS):
            return ObjectState.kept(content.stat())
    return None


def believe(content: Path, state: ObjectState, asked_ns: int) -> None:
    """Note what a store has said of an object, if it is what is there.

    Args:
        asked_ns: when it was asked.
    """
    with suppress(OSError):  # then it is asked again, which costs little
        if ObjectState.kept(content.stat()) == state:
            asked = _asked(content)
            asked.touch()
            os.utime(asked, ns=(asked_ns, asked_ns))


def open_kept(content: Path, state: ObjectState) -> FileIO | None:
    """The content of an object in this state; None where it is not there."""
    with suppress(FileNotFoundError):
        opened = content.open("rb", buffering=0)
        if ObjectState.kept(os.fstat(opened.fileno())) == state:
            return opened
        opened.close()
    return None


def keep(temporary: Path, content: Path, state: ObjectState) -> None:
    """Give an object's content, which is whole, its name."""
    os.utime(temporary, ns=(state.time_ns, state.time_ns))
    temporary.replace(content)


class _Allowance:
    """How many more bytes this process may bring before it lists the cache again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left = 0
        self._of: object = None

    def take(self, needed: int) -> None:
        """See `make_room`."""
        cache = _cache()
        folder, most, _ = cache
        with self._lock:
            if cache != self._of or needed > self._left or shutil.disk_usage(folder).free < needed + _SPARE:
                self._left = needed + _clear(folder / "clips", most, needed) // _PROCESSES
                self._of = cache
            self._left -= needed


_allowance = _Allowance()


def make_room(needed: int) -> None:
    """Remove what was longest unused, for so much more to be kept. One who has it open reads on.

    The cache is listed only now and then: what it has room for is divided among processes, and some is left free.

    Args:
        needed: bytes. Fewer are kept in all than were allowed where the disk has not so much room.
    """
    _allowance.take(needed)


def _clear(folder: Path, most: int, needed: int) -> int:
    """List the cache, and remove what is too much; the bytes that may still come beside those needed."""
    found = _listed(folder)
    total = sum(entry[1] for entry in found)
    most = min(most, total + shutil.disk_usage(folder).free - _SPARE)
    room = most - needed
    if total > max(room - most // 16, 0):
        for _, length, path in sorted(found):
            if total <= max(room - most // 8, 0):
                break
            path.unlink(missing_ok=True)
            _asked(path).unlink(missing_ok=True)
            total -= length
    return max(room - total, 0)


def _listed(folder: Path) -> list[tuple[int, int, Path]]:
    """When each content was last asked after, its bytes, and where it is; what a kill has left half-brought goes."""
    found = []
    for path in folder.iterdir():
        with suppress(OSError):
            if TEMPORARY.fullmatch(path.name):
                if path.stat().st_ctime < time.time() - 3600:
                    path.unlink()
            elif _CONTENT.fullmatch(path.name):
                found.append((_last_asked(path), path.stat().st_size, path))
    return found


def _asked(content: Path) -> Path:
    return content.with_name(content.name + _ASKED)


def _last_asked(content: Path) -> int:
    """When it was last used, to the moment; where it was only brought, or by an older version, when it was changed."""
    try:
        return _asked(content).stat().st_mtime_ns
    except FileNotFoundError:
        return content.stat().st_ctime_ns
