"""Whether fine-tuning learns: the judge names what a tuned built-in model draws, and what the base drew before.

The whole chain is asked at once, by what comes out of it: crop, VAE, T5, noise, schedule,
positions, adapters and their scale, the exported file, and diffusers' own pipeline that loads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cogcommon.media.video import Frames
from cogcommon.model.families import Family
from cogcommon.model.tiny import NATIVE
from cogtrain.runs.folder import METRICS_FILE, read_metrics
from cogtrain.validation.pipeline import load_pipeline, to_base
from cogtrain.validation.tuned import find_tuned

from ..scenes import NEW_MOTIONS, Scene, draw, every_scene, split_scenes
from .exam import examine
from .transformer import times

if TYPE_CHECKING:
    from PIL.Image import Image

_ROWS, _FRAMES = 5, 4  # of the picture
_SLIT, _GAP, _LINE, _LETTER = 2, 14, 20, 12  # pixels: between frames, between columns, of text
_RIGHT, _WRONG = "#15803d", "#b91c1c"


@dataclass(frozen=True)
class Proof:
    """Shares of clips, 0..1, and mean losses over the held-out samples; each (base, tuned)."""

    recognised: tuple[float, float]  # clips captioned with the new motion that show it
    kept: tuple[float, float]  # known scenes, never trained on, in the right shape and colour
    held_out_loss: tuple[float, float] | None  # None: the run validated nothing


def examine_run(run: Path, *, clips: int, steps: int, guidance: float, seed: int) -> tuple[Proof, Image]:
    """Generate new and known scenes, tuned and base with the same seeds, and let the judge name them.

    The new scenes are the last of their list, of which `workshop.draw` takes the first; the known
    ones are held out, from the form and from `workshop.draw`.

    Args:
        run: folder of a finished run, LoRA or SFT.
        clips: of each kind.
        steps: of the sampler.

    Returns:
        The figures, and a picture: what was asked for, the base model's clips, the tuned one's.

    Raises:
        RunError, ModelError: no weights there, or not of a model that can be had.
    """
    tuned = find_tuned(run, [], None, None)
    pipeline = load_pipeline(tuned, torch.float32)
    new, known = every_scene(0, [motion_for(tuned.checkpoint.family)])[-clips:], split_scenes()[1][-clips:]

    def ask(scenes: list[Scene]) -> Any:
        return examine(pipeline, tuned.checkpoint, scenes, steps=steps, guidance=guidance, seed=seed)

    (new_after, *drawn_after), (known_after, *_) = ask(new), ask(known)
    to_base(pipeline, tuned, torch.float32)
    (new_before, *drawn_before), (known_before, *_) = ask(new), ask(known)
    proof = Proof(
        recognised=(new_before.motion, new_after.motion),
        kept=(known_before.shape_and_colour, known_after.shape_and_colour),
        held_out_loss=_held_out_loss(run),
    )
    moments = times(tuned.checkpoint.family)
    asked_NFHWC = np.stack([draw(scene, moments, NATIVE.height, NATIVE.width) for scene in new[:_ROWS]])
    columns = [("asked for", asked_NFHWC, new), ("base model", *drawn_before), ("after fine-tuning", *drawn_after)]
    return proof, _beside(new, columns)


def motion_for(family: Family) -> str:
    """The new motion that a form of this family is taught."""
    shrinks, circles_back = NEW_MOTIONS
    return circles_back if family.task == "i2v" else shrinks


def tell(proof: Proof) -> str:
    """The figures as a small table."""
    rows = [
        f"{'':<42}{'base':>7}{'tuned':>7}",
        f"{'the new motion is recognised':<42}{proof.recognised[0]:>7.0%}{proof.recognised[1]:>7.0%}",
        f"{'known scenes in the right shape and colour':<42}{proof.kept[0]:>7.0%}{proof.kept[1]:>7.0%}",
    ]
    if proof.held_out_loss:
        base, tuned = proof.held_out_loss
        rows.append(f"{'held-out loss':<42}{base:>7.3f}{tuned:>7.3f}  ({tuned / base - 1:+.0%})")
    return "\n".join(rows)


def _held_out_loss(run: Path) -> tuple[float, float] | None:
    _, validations = read_metrics(run / METRICS_FILE)
    if not validations:
        return None
    base, tuned = validations[-1].base_val_loss, validations[-1].val_loss
    return None if base is None or tuned is None else (base, tuned)


def _beside(scenes: Sequence[Scene], columns: Sequence[tuple[str, Frames, Sequence[Scene]]]) -> Image:
    """A row a caption; in each column a few frames of a clip, and above them the motion that the judge saw."""
    from PIL import Image, ImageDraw, ImageFont

    _, length, height, width, _ = columns[0][1].shape
    width += _SLIT
    row, column = height + _LINE, width * _FRAMES + _GAP
    picture = Image.new("RGB", (len(columns) * column - _GAP, _LINE + row * min(_ROWS, len(scenes))), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(_LETTER)
    for x, (label, clips_NFHWC, named) in zip(range(0, picture.width, column), columns, strict=True):
        pen.text((x, 2), label.upper(), fill="black", font=font)
        for index, (scene, clip_FHWC, seen) in enumerate(zip(scenes[:_ROWS], clips_NFHWC, named, strict=False)):
            top = _LINE + index * row
            if not x:
                pen.text((x, top + 4), scene.caption, fill="black", font=font)
            else:
                colour = _RIGHT if seen.motion == scene.motion else _WRONG
                pen.text((x, top + 4), f"the judge sees: {seen.motion}", fill=colour, font=font)
            for place, moment in enumerate(np.linspace(0, length - 1, _FRAMES).round().astype(int)):
                picture.paste(Image.fromarray(clip_FHWC[moment]), (x + place * width, top + _LINE))
    return picture
