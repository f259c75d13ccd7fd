"""What is known of one clip, and why a clip was refused. Plain data, no reader needed."""

from __future__ import annotations

import hashlib
from copy import copy
from dataclasses import dataclass
from typing import Literal

# How the names of clips end.
CLIPS = frozenset(
    {
        ".3g2", ".3gp", ".asf", ".avi", ".divx", ".dv", ".flv", ".gif", ".m2ts", ".m2v", ".m4v", ".mkv", ".mov", ".mp4",
        ".mpeg", ".mpg", ".mts", ".mxf", ".ogv", ".ts", ".webm", ".wmv", ".y4m",
    }
)  # fmt: skip
TONED = "tone-mapped to SDR"  # in what is recorded of the colours of a clip that is HDR


# What may be done about a fault (`cogprep.dataset.remedies`); of one that is "told" the reason itself says it.
Kind = Literal[
    "missing", "empty", "unreached", "no video", "damaged", "shape", "short", "thinned", "brief", "slow", "start",
    "part", "told", "other",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class ClipFault:
    """Why one clip cannot be used, in words for its owner. It travels to the report as a value.

    A fault that may be gone the next time (a decoder that was killed, a file that went out of reach)
    is ``passing``: it says nothing of the clip, so it is never recorded, and the next run tries again.
    """

    reason: str
    passing: bool = False
    refused: bool = False  # it could be read, but a setting is against it: what was encoded of it goes
    kind: Kind = "other"
    frames: int = 0  # of a clip that has too few: how many it has


@dataclass(frozen=True, slots=True)
class Hashed:
    """A file as it was when its content was hashed."""

    size: int
    mtime_ns: int
    sha256: bytes


class BadClip(Exception):
    """Inside the reader only: unwinds to `look` or `decode_clip`, which return a `ClipFault`.

    Args:
        reason, kind, frames: see `ClipFault`.
    """

    def __init__(self, reason: str, kind: Kind = "other", frames: int = 0) -> None:
        super().__init__(reason)
        self.kind = kind
        self.frames = frames

    def fault(self) -> ClipFault:
        """As a value."""
        return ClipFault(str(self), kind=self.kind, frames=self.frames)

    def named(self, what: str) -> BadClip:
        """The same, with what it is about in front."""
        named = copy(self)
        named.args = (f"{what}: {self}",)
        return named


class Refused(BadClip):
    """A clip that could be read, but that a setting is against; the reason says which, and what to do."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, "told")

    def fault(self) -> ClipFault:
        return ClipFault(str(self), refused=True, kind=self.kind)


@dataclass(frozen=True, slots=True)
class ClipFacts:
    """What a file says of itself without being decoded (but for its first frame).

    ``width`` and ``height`` are those a player shows: cropped, upright, with square pixels.
    Times are seconds, ``sha256`` is of the file's whole content; of a part see `Place.identity`, of HDR `toned`.
    """

    width: int
    height: int
    frames: int
    duration_s: float  # from the first frame's start to the last one's end
    fps: float  # mean over the clip
    variable_rate: bool
    interlaced: bool
    rotation: int  # degrees that a player turns the picture clockwise: 0, 90, 180, 270
    sar: float  # width of a stored pixel over its height
    colour: str  # matrix, range, and how we know: "bt709 limited (tagged)"
    size: int
    mtime_ns: int
    sha256: bytes
    videos: int = 1  # video streams in the file; one of them is used
    tone_mapped: bool = False  # it is HDR, and is made SDR
    cropped: bool = False  # the container has a player cut off a part of the stored picture
    picture: bool = False  # not a video: one frame, which takes no time
    profile_fault: str = ""  # of a picture: why its colours are taken for sRGB, whatever its profile says


def toned(identity: bytes) -> bytes:
    """The content hash of a clip that is tone-mapped, by the method that we have; another one would be another clip."""
    return hashlib.sha256(b"BT.2390 to 203 cd/m2 " + identity).digest()
