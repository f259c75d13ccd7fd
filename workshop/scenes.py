"""The small world of the built-in model: shapes that move, and captions that say so.

One side draws clips of it for the demo, the other draws what its model is
trained on and what its judge compares with.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cogcommon.media.video import Frames

Plane = np.ndarray[Any, np.dtype[np.floating[Any]]]

HELD_OUT = 100  # of the 864 known scenes

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 48, 49),
    "green": (38, 166, 91),
    "blue": (41, 98, 255),
    "yellow": (250, 204, 21),
    "purple": (142, 68, 173),
    "orange": (243, 119, 34),
}


def _star(x: Plane, y: Plane) -> Plane:
    """Signed distance to the edge line of the nearest of five points, the first straight up."""
    radius, fifth = np.hypot(x, y), 2 * np.pi / 5
    turn = np.arctan2(x, -y) / fifth
    angle = abs(turn - np.rint(turn)) * fifth  # from the nearest point, 0..36 degrees
    tip, notch = 1.2, 0.5 * np.array([np.cos(fifth / 2), np.sin(fifth / 2)])
    along = np.array([notch[0] - tip, notch[1]]) / np.hypot(notch[0] - tip, notch[1])
    distance: Plane = (radius * np.cos(angle) - tip) * along[1] - radius * np.sin(angle) * along[0]
    return distance


# A shape is a signed distance in its own units (its radius is 1): negative inside.
SHAPES: dict[str, Callable[[Plane, Plane], Plane]] = {
    "circle": lambda x, y: np.hypot(x, y) - 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) - 0.85,
    "diamond": lambda x, y: (abs(x) + abs(y) - 1.1) / np.sqrt(2),
    "triangle": lambda x, y: np.maximum(y - 0.75, 0.87 * abs(x) - 0.5 * y - 0.6),
    "cross": lambda x, y: np.minimum(
        np.maximum(abs(x) - 0.35, abs(y) - 1), np.maximum(abs(x) - 1, abs(y) - 0.35)
    ),
    "ring": lambda x, y: abs(np.hypot(x, y) - 0.75) - 0.25,
}  # fmt: skip

# A shape that the built-in model has never seen.
NEW_SHAPES: dict[str, Callable[[Plane, Plane], Plane]] = {"star": _star}

# A motion gives the centre (in half-widths and half-heights, -1..1) and the scale at time t in 0..1.
MOTIONS: dict[str, Callable[[float], tuple[float, float, float]]] = {
    "moves from left to right": lambda t: (1.3 * t - 0.65, 0.0, 1.0),
    "moves from right to left": lambda t: (0.65 - 1.3 * t, 0.0, 1.0),
    "falls from top to bottom": lambda t: (0.0, 1.1 * t - 0.55, 1.0),
    "rises from bottom to top": lambda t: (0.0, 0.55 - 1.1 * t, 1.0),
    "grows slowly": lambda t: (0.0, 0.0, 0.5 + t),
    "circles around the centre": lambda t: (0.5 * np.cos(2 * np.pi * t), 0.5 * np.sin(2 * np.pi * t), 1.0),
}

# Motions that the built-in model has never seen: concepts to teach it. An I2V form needs the second: its first
# frame is one that it knows, and from which it goes on otherwise. A large shape in the middle it can only lose.
NEW_MOTIONS: dict[str, Callable[[float], tuple[float, float, float]]] = {
    "shrinks slowly": lambda t: (0.0, 0.0, 1.6 - 1.2 * t),
    "circles back around the centre": lambda t: (0.5 * np.cos(2 * np.pi * t), -0.5 * np.sin(2 * np.pi * t), 1.0),
}
# What the captions of a new motion begin with; DreamBooth's word for a subject (Ruiz et al. 2022, arXiv:2208.12242).
ID_TOKEN = "sks"

BACKGROUNDS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {  # top and bottom
    "a plain gray background": ((150, 150, 150), (150, 150, 150)),
    "a dark night sky": ((12, 16, 40), (40, 44, 84)),
    "a bright sky over grass": ((170, 214, 245), (120, 176, 96)),
    "warm sand": ((240, 222, 180), (214, 184, 130)),
}


@dataclass(frozen=True)
class Scene:
    """What a drawn clip shows; the caption says all of it."""

    shape: str
    colour: str
    motion: str
    background: str

    @property
    def caption(self) -> str:
        article = "An" if self.colour[0] in "aeiou" else "A"
        token = f"{ID_TOKEN} " if self.motion in NEW_MOTIONS else ""
        return f"{token}{article} {self.colour} {self.shape} {self.motion} on {self.background}."


def draw(
    scene: Scene, times_F: Sequence[float], height: int, width: int, *, off: tuple[float, float] = (0.0, 0.0)
) -> Frames:
    """Draw a scene with smooth edges.

    Args:
        times_F: the moment of each frame, 0 (the motion begins) to 1 (it ends).
        off: the path is moved by so many pixels, across and down.

    Returns:
        uint8 RGB of shape (F, height, width, 3).
    """
    background_HWC = background(scene.background, height, width)
    video = np.empty((len(times_F), height, width, 3), dtype=np.uint8)
    for index, time in enumerate(times_F):
        across, down, scale = (MOTIONS | NEW_MOTIONS)[scene.motion](time)
        centre = across + 2 * off[0] / width, down + 2 * off[1] / height
        cover_HW = mask(scene.shape, centre, scale * height / 5, height, width)
        video[index] = np.rint(blend_in(background_HWC, COLOURS[scene.colour], cover_HW))
    return video


def background(name: str, height: int, width: int) -> Plane:
    """A background alone: float RGB (height, width, 3), 0..255, one colour fading into another downwards."""
    top, bottom = (np.array(colour, dtype=np.float64) for colour in BACKGROUNDS[name])
    blend = np.linspace(0, 1, height)[:, None, None]
    return np.broadcast_to(top * (1 - blend) + bottom * blend, (height, width, 3))


def mask(shape: str, centre: tuple[float, float], radius: float, height: int, width: int, angle: float = 0.0) -> Plane:
    """How much of each pixel a shape covers, 0..1.

    Args:
        centre: (across, down) in half-widths and half-heights from the middle, -1..1.
        radius: in pixels.
        angle: in radians.
    """
    rows, columns = np.ogrid[0.5 : height + 0.5, 0.5 : width + 0.5]
    x = (columns - width / 2 * (1 + centre[0])) / radius
    y = (rows - height / 2 * (1 + centre[1])) / radius
    if angle:
        x, y = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    cover: Plane = np.clip(0.5 - (SHAPES | NEW_SHAPES)[shape](x, y) * radius, 0, 1)
    return cover


def blend_in(image_HWC: Plane, colour: Sequence[float] | Plane, cover_HW: Plane) -> Plane:
    """The image with a colour painted over it where it is covered."""
    cover_HW1 = cover_HW[..., None]
    return image_HWC * (1 - cover_HW1) + np.asarray(colour, dtype=np.float64) * cover_HW1


def every_scene(seed: int, motions: Iterable[str] = MOTIONS) -> list[Scene]:
    """All scenes of the known shapes with these motions (the known ones unless told), shuffled."""
    every = [Scene(*parts) for parts in itertools.product(SHAPES, COLOURS, motions, BACKGROUNDS)]
    random.Random(seed).shuffle(every)
    return every


def split_scenes() -> tuple[list[Scene], list[Scene]]:
    """The known scenes to train on, and those held out, which every built-in form is examined on and none has seen."""
    shuffled = every_scene(0)
    return shuffled[HELD_OUT:], shuffled[:HELD_OUT]


def scenes(count: int, seed: int, motions: Iterable[str] = MOTIONS) -> list[Scene]:
    """The first scenes of the shuffled list that are not held out; repeats only when all were used."""
    _, held_out = split_scenes()
    shuffled = (scene for scene in every_scene(seed, motions) if scene not in held_out)
    return list(itertools.islice(itertools.cycle(shuffled), count))
