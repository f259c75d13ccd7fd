"""Names what a clip of the small world shows, without a neural network.

Every known scene is drawn as a template; the clip is named after the nearest
one. A model is judged by what comes out of it, so nothing learned may judge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from cogcommon.media.video import Frames

from .scenes import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    NEW_MOTIONS,
    NEW_SHAPES,
    SHAPES,
    Plane,
    Scene,
    background,
    mask,
)

_OFF = 3  # pixels; each frame's shape is also looked for this far up, down, left and right


@dataclass(frozen=True)
class Verdict:
    """The nearest scene, and how near: root mean square difference from its template, of 255."""

    scene: Scene
    error: float


def judge(clip_FHWC: Frames, times_F: Sequence[float] | None = None) -> Verdict:
    """Name the shape, colour, motion and background of a clip by the template with the least squared error.

    In each frame the shape may be up to about four pixels off its path.

    Args:
        clip_FHWC: uint8 RGB.
        times_F: the moment of the motion that each frame shows; from 0 to 1 unless told.
    """
    frames, height, width, _ = clip_FHWC.shape
    times = tuple(np.linspace(0, 1, frames) if times_F is None else times_F)
    names, cover_FNP = _covers(times, height, width)
    lengths = _lengths(times, height, width)
    colours_K3 = np.array(list(COLOURS.values()), dtype=np.float32)
    best: tuple[float, Scene] | None = None
    for place in BACKGROUNDS:
        flat_HW3 = background(place, height, width).astype(np.float32)
        off_FHW3 = clip_FHWC - flat_HW3
        # A template is flat + cover * (colour - flat). |clip - template|^2, multiplied out, takes
        # two matrix products for all shapes, motions and offsets, and the colours come almost free.
        along_FNS4 = _products(cover_FNP, np.concatenate([off_FHW3, (off_FHW3 * flat_HW3).sum(-1)[..., None]], -1))
        length_FNS5 = lengths[place]
        error_FNSK = (
            (off_FHW3**2).sum((1, 2, 3))[:, None, None, None]
            - 2 * (along_FNS4[..., :3] @ colours_K3.T - along_FNS4[..., 3:])
            + (length_FNS5[..., 4:] * (colours_K3**2).sum(1) - 2 * length_FNS5[..., :3] @ colours_K3.T)
            + length_FNS5[..., 3:4]
        )
        error_NK = error_FNSK.min(2).sum(0)
        row, column = np.unravel_index(int(error_NK.argmin()), error_NK.shape)
        if best is None or error_NK[row, column] < best[0]:
            shape, motion = names[row]
            best = float(error_NK[row, column]), Scene(shape, list(COLOURS)[column], motion, place)
    assert best is not None
    return Verdict(best[1], float(np.sqrt(max(best[0], 0.0) / clip_FHWC.size)))


def _products(masks_FNP: Plane, image_FHWC: Plane) -> Plane:
    """Sums of the image's channels under each mask at each offset, (F, N, S, C); one image may serve all frames."""
    count, height, width, channels = image_FHWC.shape
    padded = np.pad(image_FHWC, ((0, 0), (_OFF, _OFF), (_OFF, _OFF), (0, 0)), mode="edge")
    moved = [
        padded[:, down : down + height, across : across + width].reshape(count, -1, 1, channels)
        for down in (0, _OFF, 2 * _OFF)
        for across in (0, _OFF, 2 * _OFF)
    ]
    moved_FPX = np.concatenate(moved, axis=2).reshape(count, height * width, -1)
    sums: Plane = (masks_FNP @ moved_FPX).reshape(*masks_FNP.shape[:2], len(moved), channels)
    return sums


@lru_cache(maxsize=4)
def _lengths(times_F: tuple[float, ...], height: int, width: int) -> dict[str, Plane]:
    """The half that no clip changes: sums over the square of each mask, by background, (F, N, S, 5)."""
    square_FNP = _covers(times_F, height, width)[1] ** 2
    lengths = {}
    for place in BACKGROUNDS:
        flat_HW3 = background(place, height, width).astype(np.float32)
        flats_HW5 = np.concatenate([flat_HW3, (flat_HW3**2).sum(-1)[..., None], np.ones_like(flat_HW3[..., :1])], -1)
        lengths[place] = _products(square_FNP, flats_HW5[None])
    return lengths


@lru_cache(maxsize=4)  # 49 x 104,448 pixels at 17x64x96: 20 MB an entry
def _covers(times_F: tuple[float, ...], height: int, width: int) -> tuple[list[tuple[str, str]], Plane]:
    """Shapes and motions by name, and the mask of each in each frame, fp32 (F, N, H*W)."""
    names = [(shape, motion) for shape in SHAPES | NEW_SHAPES for motion in MOTIONS | NEW_MOTIONS]
    cover_FNP = np.empty((len(times_F), len(names), height * width), dtype=np.float32)
    for frame, time in enumerate(times_F):
        for row, (shape, motion) in enumerate(names):
            across, down, scale = (MOTIONS | NEW_MOTIONS)[motion](time)
            cover_FNP[frame, row] = mask(shape, (across, down), scale * height / 5, height, width).reshape(-1)
    return names, cover_FNP
