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
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from cogcommon import __version__
from cogcommon.files.atomic import commit_bytes
from cogcommon.files.ownership import is_folder
from cogcommon.files.readers import read_in_order
from cogcommon.model.families import Resolution

from ..dataset.probe import Probed
from ..processes.by_file import TOGETHER, run_by_file
from ..processes.pool import Pool
from ..source.clip import ClipFault, Hashed
from ..source.part import file_named
from ..source.source_file import file_state
from ..store.proof import SURVEY, is_surveyed
from .slice import Slice

_GROUP = TOGETHER  # clips a file, at most about; 8 kB
_MOST_GROUPS = 1 << 14  # of 600 clips for 10,000,000


@dataclass
class _Group:
    """Clips that one file of the cache holds."""

    path: Path | None
    known: dict[str, Probed]
    missing: set[str]  # still to be probed


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
        wanted: Set[str],
        sources: Collection[str],
        probe: Callable[[Sequence[Path]], list[Probed | ClipFault]],
        pool: Pool,
        advance: Callable[[], None],
    ) -> dict[str, Probed | ClipFault]:
        """The wanted clips, read from the cache or else probed.

        Args:
            wanted: some of ``sources``.
            sources: every clip of the lists, as they name it.
            probe: probes clips; runs in the pool.
            advance: called for each wanted clip.
        """
        results: dict[str, Probed | ClipFault] = {}
        if not wanted:
            return results
        groups_of: dict[str, _Group] = {}  # by a clip that is being probed

        def missing() -> Iterator[str]:
            """Clips to probe, group by group, as the pool comes to them."""
            groups = self._groups(sources)
            asked = (group for group in groups if not wanted.isdisjoint(group))
            for group in read_in_order(lambda members: self._look(members, wanted), asked):
                if not group.missing <= group.known.keys():  # another worker may have been faster since
                    group.known = _read(group.path)
                for source in group.known.keys() & group.missing:
                    results[source] = group.known[source]
                    advance()
                group.missing -= group.known.keys()
                groups_of.update(dict.fromkeys(group.missing, group))
                yield from sorted(group.missing, key=file_named)

        for source, found in run_by_file(pool, probe, self._root, missing()):
            results[source] = found
            group = groups_of.pop(source)
            group.missing.discard(source)
            if isinstance(found, Probed):  # faults are not cached: an unmounted disk may be mounted again
                group.known[source] = found
            if not group.missing:
                _write(group.path, group.known)
            advance()
        return results

    def _look(self, members: Sequence[str], wanted: Set[str]) -> _Group:
        """A group as it is now; it is looked at in a thread, some groups ahead of the pool."""
        path = self._path(members)
        return _Group(path, _read(path), {source for source in members if source in wanted})

    def _groups(self, sources: Collection[str]) -> list[list[str]]:
        """All clips in groups, in the order in which this worker should probe them."""
        # By name, and a power of two: a line added to the lists changes one group, not all after it.
        count = min(_MOST_GROUPS, 1 << max(0, (len(sources) - 1) // _GROUP).bit_length())
        groups: list[list[str]] = [[] for _ in range(count)]
        parts = Counter(map(file_named, sources))
        for source in sources:
            file = file_named(source)
            # The parts of a film together, to open it once; those of a very long one are shared out.
            digest = hashlib.sha256(os.fsencode(file if parts[file] <= _GROUP else source)).digest()
            groups[int.from_bytes(digest[:8], "big") % count].append(source)
        begin, share = (self._part.index - 1) * count // self._part.count, -(-count // self._part.count)
        around = groups[begin:] + groups[:begin]
        # Its own share first, then the other workers' from the end: a fast worker helps a slow one from behind.
        return around[:share] + around[share:][::-1]

    def _path(self, group: Collection[str]) -> Path | None:
        """The file of a group as it is now."""
        if self._folder is None:
            return None
        state = [(source, *file_state(self._root / source)) for source in sorted(group)]
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
        source: Probed(Hashed(size, mtime_ns, bytes.fromhex(sha256)), _resolution(bucket))
        for source, (size, mtime_ns, sha256, bucket) in json.loads(text).items()
    }


_resolution = lru_cache(maxsize=256)(Resolution.parse)  # a set of clips has few


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
