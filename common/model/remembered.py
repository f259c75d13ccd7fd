"""What was found out about the weight files of a folder, kept in the user's cache: nobody waits for it twice.

A file counts as the same while its path, size and times are. ``$COGTUNE_CACHE/weights/`` (`cache_root`) has a small
file for each folder of weights; without them everything is found out anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files.atomic import commit_bytes
from ..files.typed import parse_object
from .tiny import cache_root

# A file that has just been written may be written again within one tick of its file system's clock (FAT: 2 s).
_YOUNG_NS = 3_000_000_000
_ADDING = threading.Lock()  # one thread at a time adds to what is remembered


class CacheFile:
    """A small file of JSON in the user's cache; it may be removed at any time.

    Args:
        kind: of what it remembers: its folder there.
        about: tells it from others of its kind.
    """

    def __init__(self, kind: str, about: str) -> None:
        self.path = cache_root() / kind / f"{hashlib.sha256(about.encode()).hexdigest()[:24]}.json"

    def read(self) -> dict[str, Any]:
        """What it holds; nothing where it is not there, or damaged."""
        with contextlib.suppress(OSError, ValueError):
            return dict(parse_object(self.path.read_bytes()))
        return {}

    def write(self, known: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):  # no room, no permission: found out again the next time
            self.path.parent.mkdir(parents=True, exist_ok=True)
            commit_bytes(self.path, json.dumps(dict(known)).encode())

    def remove(self) -> None:
        with contextlib.suppress(OSError):
            self.path.unlink()


class Remembered:
    """What is known of the files in one folder.

    Args:
        folder: of a part of a checkpoint; what is remembered lies elsewhere.
    """

    def __init__(self, folder: Path) -> None:
        self._path = str(folder.resolve())
        self._file = CacheFile("weights", self._path)
        self._known = self._read()

    def _read(self) -> dict[str, Any]:
        known = self._file.read()
        return known if known.get("folder") == self._path else {"folder": self._path}

    def recall(self, what: str, files: Sequence[Path], find: Callable[[], str]) -> str:
        """What ``find`` gives, without calling it where it was called before and no file has changed since.

        Args:
            what: is found out.
            files: that it depends on, all of them there.
            find: finds it out. What it raises is raised, and nothing is kept.
        """
        before = _facts_of(files)
        kept = self._known.get(what)
        if isinstance(kept, dict) and kept.get("files") == before and isinstance(kept.get("found"), str):
            return str(kept["found"])
        found = find()
        newest = max((max(times) for _, *times in before.values()), default=0)
        if _facts_of(files) == before and newest < time.time_ns() - _YOUNG_NS:
            with _ADDING:  # to what others may have written meanwhile
                self._known = self._read() | {what: {"files": before, "found": found}}
                self._file.write(self._known)
        return found


def _facts_of(files: Sequence[Path]) -> dict[str, list[int]]:
    """Size and times of each file, by name; a link's are those of what it leads to."""
    stats = {file.name: file.stat() for file in files}
    return {name: [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for name, stat in stats.items()}
