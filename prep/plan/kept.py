"""Committed samples that stay although their clip cannot be read now.

A sample goes when its line goes. Where the line is there and the file is not (a disk that is not
mounted, a copy that is not finished), what was encoded from it is as good as it was.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from cogcommon.files.readers import read_in_order
from cogcommon.shards.records import read_table

from .folder import Committed, records_in
from .plan import Rejected

_COLUMNS = ["key", "status", "source", "caption", "image", "source_sha256"]


@dataclass(frozen=True, slots=True)
class Kept:
    """A committed sample, and its line that cannot be used now."""

    key: str
    status: str  # as it was recorded
    clip_sha256: bytes
    line: Rejected


def find_kept(
    committed: Committed, unusable: Sequence[Rejected], claimed: Collection[str], sources: Collection[str]
) -> list[Kept]:
    """The committed samples of lines that cannot be used now, each line's own.

    A sample belongs to a line of the same clip, caption and image, by name. A clip that was renamed
    after it was encoded has its old name in the record: then caption and image decide, among the
    samples whose name no line has any more.

    Args:
        committed: what the folder holds.
        unusable: the lines.
        claimed: keys of the samples whose clips could be read.
        sources: every clip that the lists name.

    Raises:
        ShardError: a record is damaged.
    """
    if not unusable:
        return []
    by_name: dict[tuple[str, ...], list[Rejected]] = defaultdict(list)
    for line in reversed(unusable):
        by_name[line.sample.source, line.sample.caption, line.sample.image].append(line)
    kept: list[Kept] = []
    renamed: list[tuple[str, str, str, str, bytes]] = []
    for key, status, source, caption, image, sha256 in _rows(committed):
        if key in claimed:
            continue
        if lines := by_name.get((source, caption, image)):
            kept.append(Kept(key, status, sha256, lines.pop()))
        elif source not in sources:
            renamed.append((key, status, caption, image, sha256))
    by_caption: dict[tuple[str, str], list[Rejected]] = defaultdict(list)
    for lines in by_name.values():
        for line in lines:
            by_caption[line.sample.caption, line.sample.image].append(line)
    for key, status, caption, image, sha256 in renamed:
        if lines := by_caption.get((caption, image)):
            kept.append(Kept(key, status, sha256, lines.pop()))
    return kept


def _rows(committed: Committed) -> Iterator[tuple[str, str, str, str, str, bytes]]:
    if committed.out is None:
        return
    paths = (path for _split, _number, path in records_in(committed.out))
    for _header, table in read_in_order(lambda path: read_table(path, _COLUMNS), paths):
        yield from zip(*(table.column(name).to_pylist() for name in _COLUMNS), strict=True)
