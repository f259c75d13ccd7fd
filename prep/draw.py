"""Draws a small data set: moving shapes with captions, as real H.264 files.

``python -m cogprep.draw ds/`` makes a folder in the layout that ``cogprep``
reads (prompts.txt, videos.txt, videos/), for the demo and for trying things
out. The same seed draws the same pixels.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from cogcommon.video import Frames, write_mp4

HEIGHT, WIDTH, FPS, SECONDS = 128, 192, 16, 3

Plane = np.ndarray[Any, np.dtype[np.float64]]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 48, 49),
    "green": (38, 166, 91),
    "blue": (41, 98, 255),
    "yellow": (250, 204, 21),
    "purple": (142, 68, 173),
    "orange": (243, 119, 34),
}

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

# A motion gives the centre (in half-widths and half-heights, -1..1) and the scale at time t in 0..1.
MOTIONS: dict[str, Callable[[float], tuple[float, float, float]]] = {
    "moves from left to right": lambda t: (1.3 * t - 0.65, 0.0, 1.0),
    "moves from right to left": lambda t: (0.65 - 1.3 * t, 0.0, 1.0),
    "falls from top to bottom": lambda t: (0.0, 1.1 * t - 0.55, 1.0),
    "rises from bottom to top": lambda t: (0.0, 0.55 - 1.1 * t, 1.0),
    "grows slowly": lambda t: (0.0, 0.0, 0.5 + t),
    "circles around the centre": lambda t: (0.5 * np.cos(2 * np.pi * t), 0.5 * np.sin(2 * np.pi * t), 1.0),
}

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
        return f"{article} {self.colour} {self.shape} {self.motion} on {self.background}."


def draw(scene: Scene, frames: int = FPS * SECONDS, height: int = HEIGHT, width: int = WIDTH) -> Frames:
    """Draw a scene with smooth edges.

    Returns:
        uint8 RGB of shape (frames, height, width, 3).
    """
    top, bottom = (np.array(colour, dtype=np.float64) for colour in BACKGROUNDS[scene.background])
    blend = np.linspace(0, 1, height)[:, None, None]
    background_HWC = np.broadcast_to(top * (1 - blend) + bottom * blend, (height, width, 3))
    colour = np.array(COLOURS[scene.colour], dtype=np.float64)
    rows, columns = np.mgrid[0:height, 0:width] + 0.5
    video = np.empty((frames, height, width, 3), dtype=np.uint8)
    for index in range(frames):
        across, down, scale = MOTIONS[scene.motion](index / max(1, frames - 1))
        radius = scale * height / 5
        x = (columns - width / 2 * (1 + across)) / radius
        y = (rows - height / 2 * (1 + down)) / radius
        cover = np.clip(0.5 - SHAPES[scene.shape](x, y) * radius, 0, 1)[..., None]
        video[index] = np.rint(background_HWC * (1 - cover) + colour * cover)
    return video


def scenes(count: int, seed: int) -> list[Scene]:
    """The first scenes of a shuffled list of all; repeats only when all were used."""
    every = [Scene(*parts) for parts in itertools.product(SHAPES, COLOURS, MOTIONS, BACKGROUNDS)]
    random.Random(seed).shuffle(every)
    return list(itertools.islice(itertools.cycle(every), count))


def write_data_set(folder: Path, count: int, seed: int) -> None:
    """Draw ``count`` clips into ``folder`` with prompts.txt and videos.txt."""
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    names = [f"videos/{index:03d}.mp4" for index in range(count)]
    chosen = scenes(count, seed)
    for name, scene in zip(names, chosen, strict=True):
        write_mp4(folder / name, draw(scene), FPS)
    (folder / "prompts.txt").write_text("".join(f"{scene.caption}\n" for scene in chosen), encoding="utf-8")
    (folder / "videos.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


def main(
    folder: Annotated[Path, typer.Argument(help="Where to draw; made if missing.")],
    clips: Annotated[int, typer.Option(min=1, help="How many clips.")] = 25,
    seed: Annotated[int, typer.Option(help="Which scenes, in which order.")] = 0,
) -> None:
    """Draw a small data set of moving shapes with captions."""
    write_data_set(folder, clips, seed)
    typer.echo(f"drew {clips} clips ({SECONDS} s, {WIDTH}x{HEIGHT}, {FPS} fps) with captions in {folder}")


if __name__ == "__main__":
    typer.run(main)
