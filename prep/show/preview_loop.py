"""The loop of a preview: what went into the VAE beside what comes out of it, moving, as an mp4."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from cogcommon.media.video import write_mp4

from ..video.colour import Pixels

GAP = 4  # pixels between the two
_TALLEST, _LARGER = 360, 4.0  # pixels; and how much larger a small clip is shown at most
_CRF = 12  # x264's own losses must not be taken for the VAE's


def loop_of(sides: list[Pixels], fps: float) -> bytes:
    """An mp4 of one or two clips, uint8 RGB (F, H, W, 3), beside each other; of the frames that all have."""
    count = min(len(side) for side in sides)
    height, width = sides[0].shape[1:3]
    scale = min(_LARGER, _TALLEST / height)
    size = _even(width * scale), _even(height * scale)
    film = np.full((count, size[1], len(sides) * (size[0] + GAP) - GAP, 3), 255, np.uint8)
    for column, side in enumerate(sides):
        left = column * (size[0] + GAP)
        for frame, frame_HWC in zip(film, side, strict=False):
            enlarged = Image.fromarray(frame_HWC).resize(size, Image.Resampling.LANCZOS)
            frame[:, left : left + size[0]] = np.asarray(enlarged)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "loop.mp4"
        write_mp4(file, film, fps, crf=_CRF)
        return file.read_bytes()


def _even(length: float) -> int:
    return max(2, 2 * round(length / 2))
