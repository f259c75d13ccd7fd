"""The blank lines of a list of captions, and how one is filled while others may write the list.

Each line that is there stays byte for byte as it is. The list is replaced as a whole (`dataset.list_file`); where a
person has changed it since it was read, it is read again.
"""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cogcommon.cli.names import command_line
from cogcommon.errors import DataRootError
from cogcommon.files.atomic import guard_of
from cogcommon.files.failures import disk_errors
from cogcommon.files.locks import Busy, NoLocks, open_locked

from ..dataset.list_file import alone, replace_list, split_lines, state_of
from ..dataset.lists import ListFault, check_root, read_list, refuse_address

_BOM = b"\xef\xbb\xbf"
_SETTLES_S = 3.0  # an editor that writes a list is done by then
_TOGETHER = 64  # captioners on one list


@dataclass(frozen=True)
class Blank:
    """A caption that is not written yet."""

    line: int  # from 1
    entry: str  # its line of the list of clips
    before: int  # lines above that name the same clip


class CaptionList:
    """The list of captions of a data root, beside the list of its clips.

    Args:
        root: the data root.
        prompts: name of the list of captions.
        videos: name of the list of clips.

    Raises:
        DataRootError: from every method, where one of the lists is missing or they do not pair up.
    """

    def __init__(self, root: Path, prompts: str, videos: str) -> None:
        refuse_address(root, "caption", "DS")
        check_root(root, prompts, videos, named="DS")
        self._root, self._prompts, self._videos = root, prompts, videos
        self._path = Path(os.path.realpath(root / prompts))  # a link stays one
        self.lines = len(self._read()[0])

    def blanks(self) -> list[Blank]:
        """In the order of the lines."""
        clips, captions = self._read()
        before: Counter[str] = Counter()
        found = []
        for line, (entry, caption) in enumerate(zip(clips, captions, strict=True), 1):
            if not caption:
                found.append(Blank(line, entry, before[entry]))
            before[entry] += 1
        return found

    def is_blank(self, blank: Blank) -> bool:
        """Whether there is still a line to fill."""
        return _place(blank, *self._read_when_settled()) is not None

    def fill(self, blank: Blank, caption: str) -> bool:
        """Write a caption into its line, wherever that is by now; False if somebody else has written there.

        Raises:
            DataRootError: also where the lists have changed and no longer pair up.
            DiskError: the disk refuses.
        """
        assert caption and caption == caption.strip() and not re.search(r"[\r\n]", caption), caption
        while True:
            with disk_errors(self._path), alone(self._path):
                seen = state_of(self._path)
                clips, captions = self._read_when_settled()
                index = _place(blank, clips, captions)
                if index is None:
                    return False
                data = _with_line(self._path.read_bytes(), index, caption, len(clips))
                if replace_list(self._path, data, seen):
                    return True

    def _read_when_settled(self) -> tuple[Sequence[str], Sequence[str]]:
        """The lists; where they do not pair up, once more: somebody may just be writing them."""
        until = time.monotonic() + _SETTLES_S
        while True:
            try:
                return self._read()
            except DataRootError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)

    def _read(self) -> tuple[Sequence[str], Sequence[str]]:
        """Clips and captions, as many of both; an empty list of captions is one of blank lines."""
        faults: list[ListFault] = []
        clips = read_list(self._root, self._videos, True, faults) or []
        captions = read_list(self._root, self._prompts, False, faults) or []
        while clips and not clips[-1]:
            clips.pop()
        while len(captions) > len(clips) and not captions[-1]:
            captions.pop()
        if not any(captions):
            captions += [""] * (len(clips) - len(captions))
        faults += [
            ListFault(self._videos, line, "blank line", "blank") for line, clip in enumerate(clips, 1) if not clip
        ]
        if not faults and not clips:
            faults.append(ListFault(self._videos, 0, "the list is empty", "no list"))
        if not faults and len(clips) != len(captions):
            said = f"{self._videos} has {len(clips)} lines, and this list {len(captions)}"
            faults.append(
                ListFault(
                    self._prompts,
                    min(len(clips), len(captions)) + 1,
                    f"unpaired from here, or from an earlier line: {said}",
                    "unpaired",
                )
            )
        if faults:
            raise DataRootError(
                "the lists do not pair up, so nobody can tell which clip a blank line belongs to",
                where="\n       ".join([str(self._root), *map(str, faults)]),
                fix="line n of both lists is one clip; a caption that is to be written is a blank line. Then the same "
                f"command again, or for new lists `{command_line('cogprep', 'init', self._root)}`",
            )
        return clips, captions

    @contextmanager
    def working(self) -> Iterator[int]:
        """The number of this captioner among those at work on the list, from 0."""
        for number in range(_TOGETHER):
            guard = guard_of(self._path.with_name(f"{self._path.name}.{number}"))
            try:
                stream = open_locked(guard)
            except Busy:
                continue
            except (NoLocks, OSError):
                break
            with stream:
                try:
                    yield number
                finally:
                    guard.unlink(missing_ok=True)
            return
        yield 0


def shared_out(blanks: Sequence[Blank], number: int) -> list[Blank]:
    """The order in which a captioner takes the lines, so that several meet seldom: each begins elsewhere."""
    begin, step = 0.0, 0.5
    while number:  # 0, 1/2, 1/4, 3/4, 1/8, ...
        begin, step, number = begin + step * (number & 1), step / 2, number >> 1
    first = int(begin * len(blanks))
    return [*blanks[first:], *blanks[:first]]


def _place(blank: Blank, clips: Sequence[str], captions: Sequence[str]) -> int | None:
    """The index of the line, which may have moved; None if it is written, or gone."""
    index = blank.line - 1
    if index < len(clips) and clips[index] == blank.entry:
        return None if captions[index] else index
    free = (at for at, clip in enumerate(clips) if clip == blank.entry and not captions[at])
    return next(free, None)


def _with_line(data: bytes, index: int, caption: str, lines: int) -> bytes:
    """A list with a blank line filled, and all other bytes as they were.

    Args:
        lines: that the list must have then: blank ones at its end may be missing in the bytes.
    """
    parts, line_break = split_lines(data)
    while len(parts) < 2 * index + 1:
        parts += [line_break, b""]
    mark = _BOM if parts[2 * index].startswith(_BOM) else b""
    parts[2 * index] = mark + caption.encode()
    while len(parts) // 2 + bool(parts[-1]) < lines:
        parts += [line_break, b""]
    return b"".join(parts)
