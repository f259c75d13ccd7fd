"""Parts of clips: a line of videos.txt may end in a media fragment of the W3C, ``videos/a.mp4#t=12.5,18``.

Times are seconds from the clip's first picture, or ``h:mm:ss``. The first is where the part begins, the second where
it ends: a picture that begins there is no longer in it. Either may be left out. A file whose very name holds ``#t=``
is that file.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .clip import BadClip

FRAGMENT = "#t="
_SLACK_S = 0.0005  # times are typed, and stored by Matroska, in thousandths of a second
_TIME = re.compile(r"(?:(?:(\d{1,6}):)?([0-5]?\d):(?=[0-5]?\d(?:\.|$)))?(\d{1,12}(?:\.\d{0,12})?)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Part:
    """From ``begin_s`` up to ``end_s``, without the picture that begins there; the end may be infinite."""

    begin_s: float
    end_s: float

    def __str__(self) -> str:
        return f"{FRAGMENT}{self.begin_s:.12g}" + ("" if math.isinf(self.end_s) else f",{self.end_s:.12g}")

    def of(self, times_s: Sequence[float], interval_s: float) -> range:
        """The pictures of the part among those of the clip.

        Args:
            times_s: when each picture of the clip is shown, ascending.
            interval_s: how long its last one stays.

        Raises:
            BadClip: the part lies outside, or between two pictures.
        """
        length_s = times_s[-1] - times_s[0] + interval_s
        if self.begin_s > times_s[-1] - times_s[0] + _SLACK_S:
            raise BadClip(f"{self} begins at or past the end of the clip, which is {length_s:.3f} s long", "part")
        if not math.isinf(self.end_s) and self.end_s > length_s + max(interval_s, 0.1):
            raise BadClip(
                f"{self} ends past the end of the clip, which is {length_s:.3f} s long; "
                f"{Part(self.begin_s, math.inf)} is all from there",
                "part",
            )
        first, end = (bisect_left(times_s, times_s[0] + time - _SLACK_S) for time in (self.begin_s, self.end_s))
        if first >= end:
            raise BadClip(f"{self} holds no picture: the clip has one every {interval_s:.3g} s", "part")
        return range(first, end)


@dataclass(frozen=True, slots=True)
class Place:
    """What a line of videos.txt names: a file, or a part of it."""

    file: Path
    part: Part | None = None

    def identity(self, file_sha256: bytes) -> bytes:
        """The content hash of what is named; of a whole file its own.

        Two ways to write the same part are the same; another part of the file is another clip.
        """
        if self.part is None:
            return file_sha256
        told = f"{self.part.begin_s!r},{self.part.end_s!r}"
        return hashlib.sha256(b"part of " + file_sha256 + told.encode()).digest()


def locate(path: Path) -> Place:
    """What a line names.

    Args:
        path: of the data root and the line.

    Raises:
        BadClip: its fragment says no part.
    """
    name, mark, text = path.name.rpartition(FRAGMENT)
    if not (mark and name) or _is_there(path):
        return Place(path)
    part = read_part(text)
    return Place(path.parent / name, None if part == Part(0.0, math.inf) else part)


def file_named(entry: str) -> str:
    """The file that a line names if there is none of its whole name: ``a.mp4`` of ``a.mp4#t=1,2``."""
    folder, slash, last = entry.rpartition("/")
    name, mark, _ = last.rpartition(FRAGMENT)
    return f"{folder}{slash}{name}" if mark and name else entry


def read_part(text: str) -> Part:
    """The part that a fragment says, from what follows ``#t=``.

    Raises:
        BadClip: none; the message says what to type.
    """
    first, comma, second = text.removeprefix("npt:").partition(",")
    begin_s = _seconds(first) if first else 0.0
    end_s = _seconds(second) if second else math.inf
    if begin_s is None or end_s is None or not (first or second) or (comma and not second):
        raise BadClip(
            f"{FRAGMENT}{text} is no part of a clip: type {FRAGMENT}12.5,18 for 12.5 s to 18 s, "
            f"{FRAGMENT}12.5 for all from there, {FRAGMENT},18 for all up to there; 1:02:03.5 is a time, too",
            "part",
        )
    if end_s <= begin_s:
        turned = f"; the other way round it is {Part(end_s, begin_s)}" if end_s < begin_s else ""
        raise BadClip(f"{FRAGMENT}{text} ends {'before' if turned else 'where'} it begins{turned}", "part")
    return Part(begin_s, end_s)


def _seconds(text: str) -> float | None:
    """A time as the W3C writes it: 12.5, 1:02.5 or 1:02:03.5."""
    match = _TIME.fullmatch(text)
    if match is None:
        return None
    hours, minutes, seconds = (float(part or 0) for part in match.groups())
    return hours * 3600 + minutes * 60 + seconds


def _is_there(path: Path) -> bool:
    try:
        return os.path.lexists(path)
    except ValueError:  # a NUL byte in the name
        return False
