"""Where the clips of samples are now: a record keeps the names that the lists had when it was written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from cogcommon.errors import DataRootError
from cogcommon.files.readers import read_in_order
from cogcommon.files.regular_file import Unreadable
from cogcommon.model.families import Task
from cogcommon.shards.records import SampleRow

from ..dataset.lists import Sample
from ..source.addresses import remote_address
from ..source.clip import BadClip, Hashed, toned
from ..source.part import locate
from ..source.source_file import file_state, hash_file, unchanged
from .origin import Origin


def named_now(origin: Origin, task: Task, rows: Sequence[SampleRow]) -> list[SampleRow]:
    """Samples with the names that their clips and pictures have now.

    A clip that was moved or renamed, and its line with it, is found by its content among the lists that the folder
    was encoded from. Nothing but sizes is read of clips that are where they were.

    Returns:
        The rows, in their order. One whose clip is found nowhere is as it was recorded.
    """
    return _Search(origin, task).run(rows)


class _Search:
    def __init__(self, origin: Origin, task: Task) -> None:
        self._origin, self._task = origin, task
        self._root = Path(origin.data_root)
        self._hash = lru_cache(maxsize=None)(_hash_of)  # of a film once, whatever the number of its parts

    def run(self, rows: Sequence[SampleRow]) -> list[SampleRow]:
        lost = [row for row in rows if not (self._is_here(row) and self._is_picture(row.image, row))]
        if not lost:
            return list(rows)
        try:
            samples = self._origin.read_lists(self._task).paired
        except DataRootError:
            return list(rows)
        found = dict(self._find([row for row in lost if not self._is_here(row)], samples))
        now = {row.key: self._renamed(row, found.get(row.source_sha256, row.source), samples) for row in lost}
        return [now.get(row.key, row) for row in rows]

    def _is_here(self, row: SampleRow) -> bool:
        path = self._root / row.source
        as_it_was = Hashed(row.source_size, row.source_mtime_ns, row.source_sha256)
        return unchanged(path, as_it_was) or row.source_sha256 in self._identities(row.source)

    def _is_picture(self, name: str, row: SampleRow) -> bool:
        return not row.image or self._hash(self._root / name) == row.image_sha256

    def _find(self, rows: Sequence[SampleRow], samples: Sequence[Sample]) -> Iterator[tuple[bytes, str]]:
        """The clips of some rows, by content hash: those with their captions first, and only files of their sizes.

        Behind an address each size is a request, so there only lines with their captions are asked after.
        """
        if not rows:
            return
        wanted, sizes = {row.source_sha256 for row in rows}, {row.source_size for row in rows}
        captions = {row.caption for row in rows}
        ordered = sorted(samples, key=lambda sample: sample.caption not in captions)
        entries = list(
            dict.fromkeys(
                sample.source
                for sample in ordered
                if sample.caption in captions or remote_address(self._root / sample.source) is None
            )
        )
        for entry, size in zip(entries, read_in_order(self._size, entries), strict=True):
            for identity in self._identities(entry) & wanted if size in sizes else ():
                wanted.remove(identity)
                yield identity, entry
            if not wanted:
                return

    def _renamed(self, row: SampleRow, source: str, samples: Sequence[Sample]) -> SampleRow:
        """The row with the clip's name of now, and the line and the picture that go with it."""
        theirs = [sample for sample in samples if sample.source == source and self._is_picture(sample.image, row)]
        line = next((sample for sample in theirs if sample.caption == row.caption), theirs[0] if theirs else None)
        if line is None:
            return replace(row, source=source)
        return replace(row, source=source, source_line=line.line, image=line.image if row.image else "")

    def _size(self, entry: str) -> int:
        return file_state(self._root / entry)[0]

    def _identities(self, entry: str) -> Set[bytes]:
        """The content hashes that a record may have of what a line names; none where it cannot be read."""
        try:
            place = locate(self._root / entry)
        except BadClip:
            return set()
        content = self._hash(place.file)
        return {place.identity(content), toned(place.identity(content))} if content else set()


def _hash_of(file: Path) -> bytes:
    try:
        return hash_file(file)
    except (OSError, ValueError, BadClip, Unreadable):  # ValueError: a NUL byte in the name
        return b""
