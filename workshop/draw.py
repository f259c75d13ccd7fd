"""Draws a small data set: moving shapes with captions, as real H.264 files.

``python -m workshop.draw ds/`` makes a folder in the layout that ``cogprep``
reads (prompts.txt, videos.txt, videos/), for the demo and for trying things
out. The same seed draws the same pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cogcommon.media.video import write_mp4

from .scenes import NEW_MOTIONS, draw, scenes

# 33 frames at 16 fps last as long as the 17 at 8 fps that the built-in model sees: the whole motion.
HEIGHT, WIDTH, FPS, FRAMES = 128, 192, 16, 33
TIMES = [index / (FRAMES - 1) for index in range(FRAMES)]


def write_data_set(folder: Path, count: int, seed: int, *, new: str | None = None) -> None:
    """Draw ``count`` clips into ``folder`` with prompts.txt and videos.txt.

    Args:
        new: a motion that the built-in model has never seen: every clip shows it, and its caption begins with the
            id token. The known motions unless told.
    """
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    names = [f"videos/{index:03d}.mp4" for index in range(count)]
    chosen = scenes(count, seed, [new]) if new else scenes(count, seed)
    for name, scene in zip(names, chosen, strict=True):
        write_mp4(folder / name, draw(scene, TIMES, HEIGHT, WIDTH), FPS)
    (folder / "prompts.txt").write_text("".join(f"{scene.caption}\n" for scene in chosen), encoding="utf-8")
    (folder / "videos.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


def main(
    folder: Annotated[Path, typer.Argument(help="Where to draw; made if missing.")],
    clips: Annotated[int, typer.Option(min=1, help="How many clips.")] = 25,
    seed: Annotated[int, typer.Option(help="Which scenes, in which order.")] = 0,
    new: Annotated[
        str | None,
        typer.Option(help=f"A motion that the built-in model has never seen: {', '.join(NEW_MOTIONS)}."),
    ] = None,
) -> None:
    """Draw a small data set of moving shapes with captions."""
    if new not in (None, *NEW_MOTIONS):
        raise typer.BadParameter(f"no such motion: {new}", param_hint="--new")
    write_data_set(folder, clips, seed, new=new)
    typer.echo(f"drew {clips} clips ({FRAMES} frames, {WIDTH}x{HEIGHT}, {FPS} fps) with captions in {folder}")


if __name__ == "__main__":
    typer.run(main)
