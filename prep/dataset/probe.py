"""Examine clips before they are encoded: can they be used, and which part of them would be? Runs in the pool."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from cogcommon.model.families import Resolution

from ..source.clip import BadClip, ClipFacts, ClipFault, Hashed
from ..source.source_file import ClipSource
from ..video.colour import Pixels
from ..video.cut import Cut, HdrMode, Picked, Placement, best_bucket, buckets_for, pick_frames, placement_of
from ..video.media import Video
from ..video.still import Still, open_clip

T = TypeVar("T")
Box = tuple[int, int, int, int]  # left, top, right, bottom

_GLIMPSES = 3  # key frames that a clip is judged by
_BLACK = 20  # 8-bit RGB; a coded black bar stays below 10, a night sky seldom does
_LEAST_BAR = 0.02  # of the width or height, on each side


@dataclass(frozen=True, slots=True)
class Look:
    """What `encode` would take of a clip."""

    facts: ClipFacts
    bucket: Resolution
    picked: Picked
    placement: Placement
    picture: Box | None  # inside black bars, in the upright source; None without bars

    @property
    def loss(self) -> float:
        """The share of the picture that is cut away, 0 to 1."""
        return self.placement.loss(self.facts.width, self.facts.height)

    @property
    def enlarged(self) -> float:
        """How many times larger the clip is made, per side; below 1 it shrinks."""
        return max(self.placement.width / self.facts.width, self.placement.height / self.facts.height)

    @property
    def bars_used(self) -> bool:
        """Whether any black bar would be encoded."""
        if self.picture is None:
            return False
        left, top, right, bottom = self.placement.box
        inner_left, inner_top, inner_right, inner_bottom = self.picture
        return left < inner_left or top < inner_top or right > inner_right or bottom > inner_bottom


@dataclass(frozen=True, slots=True)
class Probed:
    """What the plan needs to know of a usable clip: its content and its bucket."""

    clip: Hashed
    bucket: Resolution


def probe_clips(
    paths: Sequence[Path], buckets: Sequence[Resolution], cut: Cut, family_fps: float
) -> list[Probed | ClipFault]:
    """Hash clips and choose their buckets; one too short for its bucket is a fault, as in `look_at`.

    Reads every packet but decodes only one frame: this finds a file that ends early, but not
    damage inside a picture, which only decoding finds.

    Args:
        paths: parts of one file, one after the other, are read from one opening of it.
    """

    def probe(video: Video | Still) -> Probed:
        facts, bucket, _ = _choose(video, buckets, cut, family_fps)
        return Probed(Hashed(facts.size, facts.mtime_ns, facts.sha256), bucket)

    return list(_examine(paths, cut.hdr, probe))


def look_at(
    paths: Sequence[Path], buckets: Sequence[Resolution], cut: Cut, family_fps: float
) -> list[Look | ClipFault]:
    """Probe clips, choose their buckets, pick their frames by their real times, look for black bars.

    Args:
        paths: as in `probe_clips`.
    """

    def look(video: Video | Still) -> Look:
        facts, bucket, picked = _choose(video, buckets, cut, family_fps)
        placement = placement_of(facts.width, facts.height, bucket, cut, "")
        picture = inside_bars(video.glimpses(_GLIMPSES), facts.width, facts.height)
        return Look(facts, bucket, picked, placement, picture)

    return list(_examine(paths, cut.hdr, look))


def _examine(paths: Sequence[Path], hdr: HdrMode, examine: Callable[[Video | Still], T]) -> Iterator[T | ClipFault]:
    """Open clips and examine each; the fault of one says nothing of another."""
    with ExitStack() as opened:
        source: ClipSource | None = None
        for path in paths:
            try:
                if source is None or not source.turn_to(path):
                    opened.close()
                    source = None
                    source = opened.enter_context(ClipSource(path, hashing=True))
                with open_clip(source, hdr) as video:
                    yield examine(video)
            except BadClip as bad:
                yield bad.fault()


def _choose(
    video: Video | Still, buckets: Sequence[Resolution], cut: Cut, family_fps: float
) -> tuple[ClipFacts, Resolution, Picked]:
    facts = video.facts()
    bucket = best_bucket(facts, buckets_for(buckets, picture=facts.picture), cut, family_fps)
    picked = pick_frames(video.times_s, bucket.frames, cut, family_fps, video.last_s)
    if isinstance(picked, ClipFault):
        raise BadClip(picked.reason, picked.kind, picked.frames)
    return facts, bucket, picked


def inside_bars(pictures: Sequence[Pixels], width: int, height: int) -> Box | None:
    """The picture inside black bars.

    Bars lie on two opposite sides, about equally wide, and are black in every picture.

    Args:
        pictures: frames of one clip, all of one size.
        width, height: of the source; the box is in its pixels, on even ones, a little inside.
    """
    brightest = np.stack(pictures).max(axis=(0, 3))
    left, right = _bars(np.percentile(brightest, 99, axis=0))
    top, bottom = _bars(np.percentile(brightest, 99, axis=1))
    if not (left or top):
        return None
    across, down = width / brightest.shape[1], height / brightest.shape[0]
    inner = (
        _even_up(left * across),
        _even_up(top * down),
        width - _even_up(right * across),
        height - _even_up(bottom * down),
    )
    return inner if inner[2] - inner[0] > width // 4 and inner[3] - inner[1] > height // 4 else None


def _bars(levels: np.ndarray[tuple[int], np.dtype[np.float64]]) -> tuple[int, int]:
    """Widths of the bars at both ends of a row of levels; zeros unless there is one at each."""
    bright = np.flatnonzero(levels > _BLACK)
    if not len(bright):
        return 0, 0
    first, last = int(bright[0]), len(levels) - 1 - int(bright[-1])
    if min(first, last) < _LEAST_BAR * len(levels) or abs(first - last) > max(4, 0.25 * max(first, last)):
        return 0, 0
    return first, last


def _even_up(size: float) -> int:
    return int(np.ceil(size / 2)) * 2 + 2 if size else 0
