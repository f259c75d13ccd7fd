"""The contact sheets of a preview: PNG pictures, four samples each."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from cogcommon.cli.names import plain

from ..source.clip import ClipFault
from ..video.colour import Pixels
from .preview_page import (
    BOX,
    COLUMNS,
    IMAGES,
    Preview,
    PreviewSample,
    grade,
    sample_facts,
    shown_frames,
    summary,
    time_of,
    with_box,
)

_PER_SHEET = 4
_HEAD = 72  # height of the title
_WIDTH, _MARGIN, _GAP = 1600, 32, 8
_LABEL = 76  # width of the words beside the rows of frames
_WHOLE = 480  # width of the source frame
_TALLEST = 230  # of a frame
PAPER, INK, SOFT, LINE = (250, 250, 248), (28, 28, 30), (120, 120, 124), (222, 222, 218)
_GRADES = {"good": (46, 125, 50), "fair": (178, 106, 0), "poor": (179, 38, 30)}


def draw_sheets(preview: Preview) -> Iterator[bytes]:
    """The sheets, as PNG files."""
    for start in range(0, len(preview.shown), _PER_SHEET):
        blocks = [_block(shown) for shown in preview.shown[start : start + _PER_SHEET]]
        sheet = Image.new("RGB", (_WIDTH, _HEAD + sum(block.height + 1 for block in blocks)), LINE)
        sheet.paste(PAPER, (0, 0, _WIDTH, _HEAD - 1))
        draw = ImageDraw.Draw(sheet)
        words(draw, (_MARGIN, _HEAD // 2), f"{preview.out}", 24, INK, "lm")
        words(draw, (_WIDTH - _MARGIN, _HEAD // 2), summary(preview), 16, SOFT, "rm")
        top = _HEAD
        for block in blocks:
            sheet.paste(block, (0, top))
            top += block.height + 1
        data = io.BytesIO()
        sheet.save(data, "PNG")
        yield data.getvalue()


def is_sheet(path: Path) -> bool:
    """Whether a PNG is one of ours, by its size and its lines."""
    try:
        with Image.open(path, formats=["PNG"]) as sheet:
            if sheet.mode != "RGB" or sheet.width != _WIDTH or sheet.height <= _HEAD:
                return False
            lines = (sheet.crop((0, y, _WIDTH, y + 1)).getcolors() for y in (_HEAD - 1, sheet.height - 1))
            return all(line == [(_WIDTH, LINE)] for line in lines) and sheet.getpixel((0, 0)) == PAPER
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


def _block(shown: PreviewSample) -> Image.Image:
    """One sample: caption, source frame, rows of frames, facts."""
    lines = textwrap.wrap(shown.row.caption, 160)
    caption = "\n".join([*lines[:2], f"{lines[2]} ..."] if len(lines) > 3 else lines)
    rows: list[tuple[str, Pixels]] = []
    whole = Image.new("RGB", (_WHOLE, 240), PAPER)
    if isinstance(shown.source, ClipFault):
        draw = ImageDraw.Draw(whole)
        draw.rectangle((0, 0, _WHOLE - 1, 239), outline=LINE, width=2)
        words(draw, (_WHOLE // 2, 120), shown.source.reason, 16, SOFT, "mm")
    else:
        rows.append(("encoded", shown.source.frames_FHWC))
        whole = with_box(shown.source, (_WHOLE, 2 * _TALLEST))
    rows.append(("decoded", shown.decoded_FHWC))
    width, height = _frame_size(shown)
    head = _MARGIN + 24 * min(3, len(lines)) + 28
    body = max(max(len(rows), len(shown.images)) * (height + _GAP), whole.height + 30)
    block = Image.new("RGB", (_WIDTH, head + body + 20 + _MARGIN), PAPER)
    draw = ImageDraw.Draw(block)
    words(draw, (_MARGIN, _MARGIN - 8), caption, 18, INK)
    if shown.psnr is not None:
        score = f"PSNR {shown.psnr:.1f} dB"
        words(draw, (_WIDTH - _MARGIN, _MARGIN - 8), score, 20, _GRADES[grade(shown.psnr)], "ra")
    block.paste(whole, (_MARGIN, head))
    if not isinstance(shown.source, ClipFault):
        key = head + whole.height + 10
        draw.rectangle((_MARGIN, key, _MARGIN + 14, key + 12), outline=BOX, width=3)
        words(draw, (_MARGIN + 22, key - 3), "what was encoded of the source", 14, SOFT)
    left = _MARGIN + _WHOLE + 24 + _LABEL
    for column, index in enumerate(shown_frames(shown)):
        x = left + column * (width + _GAP)
        words(draw, (x + width // 2, head - 18), time_of(shown, index), 14, SOFT, "ma")
        for number, (_, frames_FHWC) in enumerate(rows):
            frame = Image.fromarray(frames_FHWC[index]).resize((width, height), Image.Resampling.LANCZOS)
            block.paste(frame, (x, head + number * (height + _GAP)))
    for number, (name, _) in enumerate(rows):
        words(draw, (left - 10, head + number * (height + _GAP) + height // 2), name, 14, SOFT, "rm")
    x = left + len(shown_frames(shown)) * (width + _GAP)
    for number, (name, picture_HWC) in enumerate(shown.images):
        y = head + number * (height + _GAP)
        block.paste(Image.fromarray(picture_HWC).resize((width, height)), (x, y))
        draw.rectangle(
            (x, y + height - 22, x + 10 + draw.textlength(name, ImageFont.load_default(14)), y + height), INK
        )
        words(draw, (x + 5, y + height - 11), name, 14, PAPER, "lm")
    if shown.images:
        words(draw, (x + width // 2, head - 18), IMAGES, 14, SOFT, "ma")
    told = "     ".join(f"{name}: {value}" for name, value in sample_facts(shown))
    words(draw, (_MARGIN, head + body + 12), told, 14, SOFT)
    return block


def _frame_size(shown: PreviewSample) -> tuple[int, int]:
    height, width = shown.decoded_FHWC.shape[1:3]
    most = (_WIDTH - 2 * _MARGIN - _WHOLE - 24 - _LABEL - (COLUMNS - 1) * _GAP) // COLUMNS
    scale = min(most / width, _TALLEST / height)
    return max(1, int(width * scale)), max(1, int(height * scale))


def words(
    draw: ImageDraw.ImageDraw,
    at: tuple[int, int],
    text: str,
    size: int,
    colour: tuple[int, int, int],
    anchor: str = "la",
) -> None:
    draw.text(at, plain(text), fill=colour, font=ImageFont.load_default(size), anchor=None if "\n" in text else anchor)
