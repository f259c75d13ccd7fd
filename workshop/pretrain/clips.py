"""Drawn clips: what the VAE learns from, and what it and the transformers are measured on."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from cogcommon.media.video import Frames
from cogcommon.model.tiny import NATIVE

from ..scenes import BACKGROUNDS, COLOURS, MOTIONS, NEW_SHAPES, SHAPES, Plane, Scene, blend_in, draw, mask

WILD = 0.3  # of the VAE's clips
SIZE = (NATIVE.frames, NATIVE.height, NATIVE.width)


def mixed_clip(seed: tuple[int, int]) -> Frames:
    """A clip for the VAE: wild or of the named world, at the native size."""
    rng = np.random.default_rng(seed)
    return (wild_clip if rng.random() < WILD else named_clip)(rng, *SIZE)


def draw_all(of: Callable[[Any], Frames], items: Iterable[Any], workers: int) -> Frames:
    """The clips of these items, uint8 (N, F, H, W, 3), drawn by so many processes; 0 draws them here."""
    items = list(items)
    clips = np.empty((len(items), *SIZE, 3), dtype=np.uint8)
    if not workers:
        for index, item in enumerate(items):
            clips[index] = of(item)
        return clips
    # 7 ms a clip of the named world on one core, 19 a wild one.
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for index, clip in enumerate(pool.imap(of, items, chunksize=16)):
            clips[index] = clip
    return clips


def to_tensor(clips_BFHWC: np.ndarray[Any, Any]) -> torch.Tensor:
    """uint8 clips as the VAE takes them: fp32 (B, 3, F, H, W), -1..1."""
    return torch.from_numpy(clips_BFHWC).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def unseen_clips(count: int, seed: int) -> list[Frames]:
    """Clips of a shape that no training clip has, at the native size."""
    rng = np.random.default_rng((seed, 1 << 40))
    world = ([*NEW_SHAPES], [*COLOURS], [*MOTIONS], [*BACKGROUNDS])
    every = [Scene(*(str(rng.choice(names)) for names in world)) for _ in range(count)]
    moments = [float(time) for time in np.linspace(0, 1, NATIVE.frames)]
    return [draw(scene, moments, NATIVE.height, NATIVE.width) for scene in every]


def wild_clip(rng: np.random.Generator, frames: int, height: int, width: int) -> Frames:
    """One to three shapes of any colour, size and straight motion over a textured slope of colours.

    The VAE must carry what the demo's new concepts look like, so it sees more
    than the named world.
    """
    corners = rng.uniform(0, 255) + rng.uniform(-1, 1, (2, 2, 3)) * rng.uniform(0, 160)
    image_HWC = _enlarge(corners, height, width)
    if rng.random() < 0.5:
        grain = rng.integers(2, 10)
        image_HWC = image_HWC + _enlarge(
            rng.normal(0, rng.uniform(2, 40), (height // grain + 2, width // grain + 2, 1)), height, width
        )
    layers = [
        (
            str(rng.choice(list(SHAPES))),
            rng.uniform(0, 255, 3),
            rng.uniform(-0.9, 0.9, 2),
            rng.uniform(-0.09, 0.09, 2),
            height * rng.uniform(0.08, 0.4) * np.array([1, rng.uniform(0.95, 1.05)]),
            rng.uniform(0, 2 * np.pi) + np.array([0, rng.normal(0, 0.1)]),
        )
        for _ in range(rng.integers(1, 4))
    ]
    video = np.empty((frames, height, width, 3), dtype=np.uint8)
    for index in range(frames):
        frame_HWC = image_HWC
        for shape, colour, start, velocity, (radius, growth), (angle, spin) in layers:
            across, down = start + velocity * index
            size = radius * (growth / radius) ** index
            cover_HW = mask(shape, (across, down), size, height, width, angle + spin * index)
            frame_HWC = blend_in(frame_HWC, colour, cover_HW)
        video[index] = np.clip(np.rint(frame_HWC), 0, 255)
    return video


def named_clip(rng: np.random.Generator, frames: int, height: int, width: int) -> Frames:
    """A scene of the named world, some stretch of its motion."""
    scene = Scene(*(str(rng.choice(list(names))) for names in (SHAPES, COLOURS, MOTIONS, BACKGROUNDS)))
    start, end = sorted(rng.uniform(0, 1, 2)) if rng.random() < 0.5 else (0.0, 1.0)
    return draw(scene, [float(time) for time in np.linspace(start, end, frames)], height, width)


def _enlarge(image_HWC: Plane, height: int, width: int) -> Plane:
    """Bilinear, corner to corner."""
    rows, columns = np.linspace(0, image_HWC.shape[0] - 1, height), np.linspace(0, image_HWC.shape[1] - 1, width)
    top, left = np.floor(rows).astype(int), np.floor(columns).astype(int)
    below, right = np.minimum(top + 1, image_HWC.shape[0] - 1), np.minimum(left + 1, image_HWC.shape[1] - 1)
    down, across = (rows - top)[:, None, None], (columns - left)[None, :, None]
    upper = image_HWC[top][:, left] * (1 - across) + image_HWC[top][:, right] * across
    lower = image_HWC[below][:, left] * (1 - across) + image_HWC[below][:, right] * across
    blended: Plane = upper * (1 - down) + lower * down
    return blended
