"""What a captioner sees of a line of videos.txt: frames spread over the clip or its part, or a picture. In the pool."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..source.clip import BadClip, ClipFault
from ..source.source_file import ClipSource
from ..video.colour import Pixels
from ..video.still import Still, open_clip


@dataclass(frozen=True)
class Seen:
    """Frames in the order of time, upright, as a player shows them; of a picture one."""

    frames_FHWC: Pixels
    fps: float  # of these frames, in the clip's own time
    still: bool


def see(path: Path, count: int, size: int) -> Seen | ClipFault:
    """Frames of a clip, or a picture.

    Args:
        path: of the data root and the line, which may name a part of a clip.
        count: frames, at most: the middles of as many stretches of the same length.
        size: pixels of the long side, at most.
    """
    try:
        with ClipSource(path) as source, open_clip(source) as video:
            still = isinstance(video, Still)
            indices, fps = ([0], 1.0) if still else spread(video.times_s, video.last_s, count)
            width, height = _within(*video.display_size, size)
            return Seen(np.stack(list(video.frames(indices, width, height))), fps, still)
    except BadClip as bad:
        return bad.fault()


def spread(times_s: tuple[float, ...], last_s: float, count: int) -> tuple[list[int], float]:
    """The pictures that are on screen in the middle of each of ``count`` stretches, each once, and their rate.

    Args:
        times_s: when each picture is shown, ascending.
        last_s: how long the last one stays.
    """
    length_s = times_s[-1] - times_s[0] + last_s
    middles = [times_s[0] + (place + 0.5) * length_s / count for place in range(count)]
    indices = sorted({max(0, bisect_right(times_s, middle) - 1) for middle in middles})
    return indices, len(indices) / length_s


def _within(width: int, height: int, size: int) -> tuple[int, int]:
    scale = min(1.0, size / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))
