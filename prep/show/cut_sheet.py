"""The contact sheets of a split: the first and the last picture of each part, so that every cut can be seen."""

from __future__ import annotations

import io
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from .preview_sheet import INK, LINE, PAPER, SOFT, words

_COLUMNS, _ROWS = 4, 15
_PICTURE = (188, 106)  # width and height that a picture must fit into
_WIDTH, _MARGIN, _GAP, _HEAD, _LABEL = 1600, 16, 2, 56, 26
_CELL = (_WIDTH - 2 * _MARGIN) // _COLUMNS, _PICTURE[1] + _LABEL + 8


@dataclass(frozen=True)
class ShownPart:
    """A part of a film: its line in the list, its pictures, and its times in seconds."""

    line: int
    pictures: range
    begin_s: float
    end_s: float


def draw_cut_sheets(title: str, parts: Sequence[ShownPart], pictures: Mapping[int, bytes]) -> Iterator[bytes]:
    """PNG files of 60 parts each.

    Args:
        pictures: JPEG of some pictures of the film, by their place in it. Of a part the outermost ones are shown.
    """
    places = sorted(pictures)
    per_sheet = _COLUMNS * _ROWS
    sheets = -(-len(parts) // per_sheet)
    for sheet in range(sheets):
        shown = parts[sheet * per_sheet : (sheet + 1) * per_sheet]
        image = Image.new("RGB", (_WIDTH, _HEAD + _CELL[1] * -(-len(shown) // _COLUMNS) + _MARGIN), PAPER)
        draw = ImageDraw.Draw(image)
        words(draw, (_MARGIN, _HEAD // 2), title, 20, INK, "lm")
        of = f"sheet {sheet + 1} of {sheets}; " if sheets > 1 else ""
        words(draw, (_WIDTH - _MARGIN, _HEAD // 2), f"{of}first and last picture of each part", 14, SOFT, "rm")
        for place, part in enumerate(shown):
            left = _MARGIN + _CELL[0] * (place % _COLUMNS)
            _draw_part(image, (left, _HEAD + _CELL[1] * (place // _COLUMNS)), part, places, pictures)
        data = io.BytesIO()
        image.save(data, "PNG")
        yield data.getvalue()


def _draw_part(
    image: Image.Image, at: tuple[int, int], part: ShownPart, places: Sequence[int], pictures: Mapping[int, bytes]
) -> None:
    draw = ImageDraw.Draw(image)
    left, top = at
    first = places[min(bisect_left(places, part.pictures.start), len(places) - 1)]
    last = places[max(bisect_right(places, part.pictures.stop - 1) - 1, 0)]
    for column, place in enumerate((first, last)):
        x = left + column * (_PICTURE[0] + _GAP)
        draw.rectangle((x, top, x + _PICTURE[0] - 1, top + _PICTURE[1] - 1), LINE)
        if place in part.pictures:
            with Image.open(io.BytesIO(pictures[place])) as picture:
                picture.thumbnail(_PICTURE, Image.Resampling.LANCZOS)
                corner = x + (_PICTURE[0] - picture.width) // 2, top + (_PICTURE[1] - picture.height) // 2
                image.paste(picture, corner)
    under = top + _PICTURE[1] + 4
    words(draw, (left, under), f"line {part.line}:  {_clock(part.begin_s)} to {_clock(part.end_s)}", 14, INK)
    across = left + 2 * _PICTURE[0] + _GAP
    words(draw, (across, under), f"{part.end_s - part.begin_s:.1f} s", 14, SOFT, "ra")


def _clock(time_s: float) -> str:
    """A time as players show it, with tenths: 1:02:03.5."""
    minutes, seconds = divmod(round(time_s, 1), 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02}:{seconds:04.1f}" if hours else f"{minutes}:{seconds:04.1f}"
