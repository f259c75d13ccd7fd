"""A cache of probed clips, shared by all workers of an output folder: each clip's content hash and bucket.

Every worker must know every clip, or their plans would differ; but if each probed all of them,
a data set of 10 TB would be read a hundred times. So clips are probed in groups, each group's
results are kept in one small file of ``OUT/.survey``, and every worker starts with a different
group. Workers that start together probe about an equal share each, and none waits for another.
A run that resumes after a kill reads these files, too.

A file is named by a hash of everything its contents depend on: the settings, and the name,
size, time and inode of every clip of the group. Any change gives another name, so nothing stale
is ever read, and two workers that write the same file write the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path

from cogcommon import __version__
from cogcommon.files.atomic import commit_bytes
from cogcommon.files.ownership import is_folder
from cogcommon.model.families import Resolution

from ..dataset.probe import Probed
from ..processes.pool import Pool
from ..source.clip import BadClip, ClipFault, Hashed
from ..source.part import locate
from ..store.proof import SURVEY, is_surveyed
from .slice import Slice

_GROUP = 64  # clips a file, at most about; 8 kB
_MOST_GROUPS = 1 << 14  # of 600 clips for 10,000,000


class SurveyCache:
    """The cache as one worker uses it.

    Args:
        out: the output folder, which holds the cache. None keeps nothing.
        root: the data root.
        depend_on: the settings that decide whether a clip can be used, and its bucket.
        part: this worker's slice.
    """

    def __init__(self, out: Path | None, root: Path, depend_on: str, part: Slice) -> None:
        self._folder = None if out is None else out / SURVEY
        self._root = root
        self._settings = f"{__version__} {depend_on}"
        self._part = part

    def find(
        self,
        wanted: Collection[str],
        sources: Collection[str],
        look: Callable[[Path], Probed | ClipFault],
        pool: Pool,
        advance: Callable[[], None],
    ) -> dict[str, Probed | ClipFault]:
        """The wanted clips, read from the cache or else probed.

        Args:
            wanted: some of ``sources``.
            sources: every clip of the lists, as they name it.
            look: probes one clip; runs in the pool.
            advance: called for each wanted clip.
        """
        results: dict[str, Probed | ClipFault] = {}
        for group in self._groups(sources):
            asked = [source for source in group if source in wanted]
            if not asked:
                continue
            path = self._path(group)
            known = _read(path)
            missing = [source for source in asked if source not in known]
            looks = pool.run(look, ((self._root / source,) for source in missing))
            for source, found in zip(missing, looks, strict=True):
                results[source] = found
                advance()
            for source in known.keys() & asked:
                results[source] = known[source]
                advance()
            if missing:  # faults are not cached: an unmounted disk may be mounted again
                probed = {source: found for source in missing if isinstance(found := results[source], Probed)}
                _write(path, known | probed)
        return results

    def _groups(self, sources: Collection[str]) -> list[list[str]]:
        """All clips in groups, in the order in which this worker should probe them."""
        # By name, and a power of two: a line added to the lists changes one group, not all after it.
        count = min(_MOST_GROUPS, 1 << max(0, (len(sources) - 1) // _GROUP).bit_length())
        groups: list[list[str]] = [[] for _ in range(count)]
        for source in sources:
            digest = hashlib.sha256(os.fsencode(source)).digest()
            groups[int.from_bytes(digest[:8], "big") % count].append(source)
        begin, share = (self._part.index - 1) * count // self._part.count, -(-count // self._part.count)
        around = groups[begin:] + groups[:begin]
        # Its own share first, then the other workers' from the end: a fast worker helps a slow one from behind.
        return around[:share] + around[share:][::-1]

    def _path(self, group: Collection[str]) -> Path | None:
        """The file of a group as it is now."""
        if self._folder is None:
            return None
        state = [(source, *_state(self._root / source)) for source in sorted(group)]
        digest = hashlib.sha256(json.dumps([self._settings, state]).encode())
        return self._folder / f"{digest.hexdigest()[:32]}.json"

    def discard(self) -> None:
        """Remove the cache: the shards' records know the clips now."""
        if self._folder is not None and is_folder(self._folder):
            with suppress(OSError):
                for path in self._folder.iterdir():
                    if is_surveyed(path):
                        path.unlink(missing_ok=True)
                self._folder.rmdir()


def _read(path: Path | None) -> dict[str, Probed]:
    """The cached clips of a group; empty without a file."""
    if path is None:
        return {}
    try:
        digest, _, text = path.read_bytes().partition(b"\n")
    except OSError:
        return {}
    if hashlib.sha256(text).hexdigest().encode() != digest:
        return {}
    return {
        source: Probed(Hashed(size, mtime_ns, bytes.fromhex(sha256)), Resolution.parse(bucket))
        for source, (size, mtime_ns, sha256, bucket) in json.loads(text).items()
    }


def _write(path: Path | None, probed: Mapping[str, Probed]) -> None:
    """Write a group; where that fails, the clips are probed again next time."""
    if path is None or not probed:
        return
    lines = {
        source: (one.clip.size, one.clip.mtime_ns, one.clip.sha256.hex(), str(one.bucket))
        for source, one in probed.items()
    }
    text = json.dumps(lines).encode()
    with suppress(OSError):
        path.parent.mkdir(exist_ok=True)
        commit_bytes(path, hashlib.sha256(text).hexdigest().encode() + b"\n" + text)


def _state(path: Path) -> tuple[int, int, int]:
    try:
        info = locate(path).file.stat()
    except (OSError, ValueError, BadClip):  # a NUL byte in the name
        return -1, -1, -1
    return info.st_size, info.st_mtime_ns, info.st_ino
