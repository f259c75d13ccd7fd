"""Videos beside each other: one labelled video, and one still picture of frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cogcommon.cli.names import plain
from cogcommon.media.video import Frames

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont

PAPER, INK, FAINT = (250, 250, 247), (32, 33, 36), (122, 124, 128)
_FRAMES = 6  # of a video, in the still picture
_CELL = 256  # pixels across one frame there
MARGIN = 32
GAP = 12


@dataclass(frozen=True)
class Column:
    """A video and what to call it. Frames are uint8 RGB (F, H, W, 3)."""

    label: str
    frames_FHWC: Frames


def side_by_side(columns: Sequence[Column]) -> Frames:
    """One video of several of the same size, left to right, each under its label.

    Returns:
        uint8 RGB (F, H + strip, W * n + gaps, 3), height and width even.
    """
    from PIL import Image, ImageDraw

    count, height, width, _ = columns[0].frames_FHWC.shape
    strip = max(20, height // 14) // 2 * 2
    gap = max(4, width // 60) // 2 * 2
    size = (len(columns) * (width + gap) - gap, height + strip)
    head = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(head)
    for index, column in enumerate(columns):
        left = index * (width + gap)
        draw.text((left + gap, strip // 2), column.label, fill=INK, font=font(round(strip * 0.6)), anchor="lm")
    sheet_FHWC = np.repeat(np.asarray(head)[None], count, axis=0)
    for index, column in enumerate(columns):
        left = index * (width + gap)
        sheet_FHWC[:, strip:, left : left + width] = column.frames_FHWC
    return sheet_FHWC


def grid(rows: Sequence[Sequence[Column | None]]) -> Frames:
    """One video of several of the same size, in rows, each under its label; None leaves a cell empty.

    The videos are scaled so that the whole is about 1280 pixels wide, or 1920 where they are many, and the labels so
    that they can be read on a telephone.

    Returns:
        uint8 RGB (F, H, W, 3), height and width even.
    """
    from PIL import Image, ImageDraw

    first = next(column for row in rows for column in row if column)
    count, height, width, _ = first.frames_FHWC.shape
    across = max(len(row) for row in rows)
    cell = (1920 if across > 4 else 1280) // across // 2 * 2
    tall = round(cell * height / width / 2) * 2
    labels = [column.label for row in rows for column in row if column]
    letters = min(cell * across // 36, *(_fitting(label, cell - GAP) for label in labels))
    strip = round(letters * 1.7 / 2) * 2
    page = Image.new("RGB", (across * (cell + GAP) + GAP, len(rows) * (tall + strip) + GAP), PAPER)
    draw = ImageDraw.Draw(page)
    places = [
        (GAP + x * (cell + GAP), y * (tall + strip) + strip, column)
        for y, row in enumerate(rows)
        for x, column in enumerate(row)
        if column
    ]
    for left, top, column in places:
        draw.text((left, top - strip // 2), column.label, fill=INK, font=font(letters), anchor="lm")
    frames_FHWC = np.repeat(np.asarray(page)[None], count, axis=0)
    for left, top, column in places:
        for index, picture in enumerate(column.frames_FHWC):
            scaled = Image.fromarray(picture).resize((cell, tall), Image.Resampling.LANCZOS)
            frames_FHWC[index, top : top + tall, left : left + cell] = np.asarray(scaled)
    return frames_FHWC


def _fitting(label: str, width: int) -> int:
    """The size in which a label is at most so wide."""
    from PIL import Image, ImageDraw

    return int(100 * width / ImageDraw.Draw(Image.new("RGB", (1, 1))).textlength(label, font=font(100)))


def contact_sheet(title: str, facts: str, columns: Sequence[Column], fps: float) -> Image:
    """Six frames of each video in rows, under a title (the caption) and a line of facts."""
    from PIL import Image, ImageDraw

    times = [round(float(t)) for t in np.linspace(0, len(columns[0].frames_FHWC) - 1, _FRAMES)]
    cell_height = round(_CELL * columns[0].frames_FHWC.shape[1] / columns[0].frames_FHWC.shape[2])
    width = 2 * MARGIN + _FRAMES * (_CELL + GAP) - GAP
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    lines = wrapped(measure, plain(title), font(24), width - 2 * MARGIN, most=3)
    top = MARGIN + 32 * len(lines) + 40
    row = cell_height + 34 + 24
    sheet = Image.new("RGB", (width, top + row * len(columns) + MARGIN - 16), PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, line in enumerate(lines):
        draw.text((MARGIN, MARGIN + 32 * index), line, fill=INK, font=font(24))
    draw.text((MARGIN, MARGIN + 32 * len(lines) + 4), plain(facts), fill=FAINT, font=font(16))
    for row_index, column in enumerate(columns):
        y = top + row * row_index
        draw.text((MARGIN, y + 13), column.label, fill=INK, font=font(18), anchor="lm")
        for cell_index, frame in enumerate(times):
            x = MARGIN + cell_index * (_CELL + GAP)
            picture = Image.fromarray(column.frames_FHWC[frame])
            sheet.paste(picture.resize((_CELL, cell_height), Image.Resampling.LANCZOS), (x, y + 30))
            draw.text(
                (x + _CELL, y + 13), f"{frame / fps:.1f} s", fill=FAINT, font=font(14), anchor="rm"
            )  # fmt: skip
    return sheet


def font(size: int) -> FreeTypeFont:
    from PIL import ImageFont

    return ImageFont.load_default(size)  # type: ignore[return-value]


def wrapped(draw: ImageDraw, text: str, font: FreeTypeFont, width: int, *, most: int) -> list[str]:
    """The text in at most ``most`` lines, cut with an ellipsis."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or draw.textlength(longer, font=font) <= width:
            lines[-1] = longer
        elif len(lines) < most:
            lines.append(word)
        else:
            while draw.textlength(lines[-1] + " …", font=font) > width:
                lines[-1] = lines[-1].rpartition(" ")[0]
            lines[-1] += " …"
            break
    return lines
