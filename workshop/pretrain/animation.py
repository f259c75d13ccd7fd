"""What was asked for, what the base model drew and what the tuned one drew, as one animation of three rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cogcommon.media.video import Frames
from cogtrain.report.sheet import FAINT, GAP, INK, MARGIN, PAPER, font, wrapped

if TYPE_CHECKING:
    from PIL.Image import Image

CELL = 192  # pixels across one clip
_CAPTION, _LINES, _LABEL = 18, 3, 34  # pixels a line of a caption, its lines, and the label above a row
_HOLD = 900  # ms that the last picture stays
_QUALITY = 82  # of WebP


@dataclass(frozen=True)
class Row:
    """Clips of one origin. ``label`` names it and ``facts`` says what is to be seen in it; clips are uint8 RGB."""

    label: str
    facts: str
    clips_NFHWC: Frames


@dataclass(frozen=True)
class Animation:
    """Pictures to be shown one after the other."""

    pictures: list[Image]
    fps: float

    def save(self, file: Path) -> None:
        """Write an animated WebP that plays for ever and rests at its end: browsers and GitHub show it as an image."""
        times = [round(1000 / self.fps)] * (len(self.pictures) - 1) + [_HOLD]
        first, *rest = self.pictures
        first.save(file, save_all=True, append_images=rest, duration=times, loop=0, quality=_QUALITY, method=6)


def animate(title: str, captions: Sequence[str], rows: Sequence[Row], fps: float) -> Animation:
    """Play the clips beside each other, in the type and margins of the contact sheets.

    Args:
        captions: one a column; each row has a clip for each.
        fps: of the clips.
    """
    from PIL import Image, ImageDraw

    count, length, height, width, _ = rows[0].clips_NFHWC.shape
    cell = (CELL, round(CELL * height / width))
    top = MARGIN + 44 + _CAPTION * _LINES
    step = _LABEL + cell[1] + GAP
    page = Image.new("RGB", (2 * MARGIN + count * (CELL + GAP) - GAP, top + step * len(rows) - GAP + MARGIN), PAPER)
    pen = ImageDraw.Draw(page)
    pen.text((MARGIN, MARGIN - 8), title, fill=INK, font=font(24))
    lefts = [MARGIN + column * (CELL + GAP) for column in range(count)]
    for x, caption in zip(lefts, captions, strict=True):
        for number, line in enumerate(wrapped(pen, caption, font(14), CELL, most=_LINES)):
            pen.text((x, MARGIN + 36 + _CAPTION * number), line, fill=FAINT, font=font(14))
    for index, row in enumerate(rows):
        middle = top + step * index + _LABEL // 2
        pen.text((MARGIN, middle), row.label, fill=INK, font=font(18), anchor="lm")
        pen.text((page.width - MARGIN, middle), row.facts, fill=FAINT, font=font(16), anchor="rm")
    pictures = []
    for moment in range(length):
        picture = page.copy()
        for index, row in enumerate(rows):
            for x, frame_HWC in zip(lefts, row.clips_NFHWC[:, moment], strict=True):
                enlarged = Image.fromarray(np.ascontiguousarray(frame_HWC)).resize(cell, Image.Resampling.LANCZOS)
                picture.paste(enlarged, (x, top + step * index + _LABEL))
        pictures.append(picture)
    return Animation(pictures, fps)
