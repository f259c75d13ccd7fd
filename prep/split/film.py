"""Looks at a film, a stretch of it at a time. Runs in the pool."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..source.clip import BadClip, ClipFault
from ..source.part import Part
from ..source.source_file import ClipSource
from ..video.colour import Pixels
from ..video.media import Video
from .cuts import LEAST_CUT, REACH_S, Cells, Cuts, differences, find_cuts

_SIDE = 192  # pixels of a sketch's long side, and of a picture on the sheet
_CELL = 4  # pixels of a sketch that make a cell
_EVERY_S = 0.5  # a picture is kept for the sheet
_QUALITY = 80
_JUMP = 2.0  # times the change before, that of a picture which may begin a shot


@dataclass(frozen=True, slots=True)
class Film:
    """When the pictures of a film are shown, in seconds from its first one, ascending."""

    times_s: tuple[float, ...]
    interval_s: float  # the usual one
    length_s: float  # to the end of the last picture
    seekable: bool  # decoding may begin in its middle


@dataclass(frozen=True)
class Stretch:
    """What was seen of the pictures from ``first`` on."""

    first: int
    cuts: Cuts
    pictures: Mapping[int, bytes]  # JPEG of some, for the sheet, by their place in the film


def open_film(path: Path) -> Film | ClipFault:
    """Read the times of a film; its pictures are not decoded, but for the first."""
    try:
        with ClipSource(path) as source, Video(source) as video:
            _ = video.colour, video.turn  # what `encode` would refuse is refused here
            times_s = tuple(time_s - video.times_s[0] for time_s in video.times_s)
            return Film(times_s, video.interval_s, times_s[-1] + video.last_s, video.seekable)
    except (BadClip, OSError) as bad:
        return ClipFault(str(bad))


def look_at_stretch(path: Path, film: Film, pictures: range) -> Stretch | ClipFault:
    """Decode some pictures of a film, and so many around them that each is judged in its place.

    Args:
        path: of the film, a whole file.
    """
    count = len(film.times_s)
    reach = round(REACH_S / film.interval_s)
    begin, end = max(0, pictures.start - reach), min(count, pictures.stop + reach)
    cells: list[Cells] = []
    kept: dict[int, bytes] = {}
    last_HWC: Pixels = np.zeros((1, 1, 3), np.uint8)
    last_change, next_s = 0.0, 0.0
    try:
        with ClipSource(_part(path, film, begin, end)) as source, Video(source) as video:
            for index, sketch_HWC in enumerate(video.sketches(_SIDE), begin):
                cells.append(_cells(sketch_HWC))
                change = float(differences(cells[-1], cells[-2])) if len(cells) > 1 else 0.0
                if change >= LEAST_CUT and change > _JUMP * last_change:  # perhaps a cut: both sides of it are kept
                    kept |= {index - 1: _jpeg(last_HWC), index: _jpeg(sketch_HWC)}
                elif film.times_s[index] >= next_s:
                    kept[index] = _jpeg(sketch_HWC)
                    next_s = film.times_s[index] + _EVERY_S
                last_HWC, last_change = sketch_HWC, change
    except (BadClip, OSError) as bad:
        return ClipFault(str(bad))
    found = find_cuts(np.stack(cells), 1 / film.interval_s)
    return Stretch(
        pictures.start,
        found[pictures.start - begin : pictures.stop - begin],
        {place: picture for place, picture in kept.items() if place in pictures},
    )


def _part(path: Path, film: Film, begin: int, end: int) -> Path:
    """How a list would name these pictures."""
    count = len(film.times_s)
    if (begin, end) == (0, count):
        return path
    part = Part(film.times_s[begin], film.times_s[end] if end < count else math.inf)
    return path.with_name(f"{path.name}{part}")


def _cells(sketch_HWC: Pixels) -> Cells:
    """The means of small squares."""
    height, width = (size // _CELL for size in sketch_HWC.shape[:2])
    squares = sketch_HWC[: height * _CELL, : width * _CELL].reshape(height, _CELL, width, _CELL, 3)
    return (squares.sum(axis=(1, 3), dtype=np.uint16) // _CELL**2).astype(np.uint8)


def _jpeg(picture_HWC: Pixels) -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture_HWC)).save(data, "JPEG", quality=_QUALITY)
    return data.getvalue()
