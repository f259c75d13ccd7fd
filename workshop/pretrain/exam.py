"""What the judge says of the clips that a form generates for captions it was not trained on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cogcommon.media.video import Frames
from cogcommon.model.checkpoint import Checkpoint
from cogcommon.model.families import Family
from cogcommon.model.tiny import NATIVE

from ..judge import judge
from ..scenes import NEW_MOTIONS, Scene, draw, every_scene, split_scenes
from .transformer import weights_of
from .world import times

SHOWN, SHOWN_NEW = 8, 4  # clips in the picture: of the held-out captions, and of a motion that no form knows
RESULTS, PICTURE = "exam.jsonl", "exam.png"
_JUDGES = 3


@dataclass(frozen=True)
class Marks:
    """Shares of clips named as captioned, 0..1, and means over the clips.

    ``error`` is the judge's distance to the template it chose, of 255;
    ``first_frame`` the PSNR to the image that an I2V form was given, in dB.
    """

    shape: float
    colour: float
    motion: float
    shape_and_colour: float
    all_three: float
    error: float
    first_frame: float | None


def take_exam(
    folder: Path,
    checkpoint: Checkpoint,
    *,
    clips: int,
    steps: int,
    guidance: Sequence[float],
    seed: int,
    batch: int,
    device: torch.device,
) -> list[str]:
    """Examine the transformer in ``folder``, a line a guidance; add them to exam.jsonl.

    exam.png shows the first clips, with the first guidance. Its last ones have captions of a motion that
    no form knows: what a base model makes of it.
    """
    import diffusers
    import safetensors.torch

    from cogtrain.validation.pipeline import pipeline_of

    model = diffusers.CogVideoXTransformer3DModel.from_config(dict(checkpoint.transformer_config))
    model.load_state_dict(safetensors.torch.load_file(weights_of(folder, checkpoint.family)))
    pipeline = pipeline_of(checkpoint, model, torch.float32).to(device)
    pipeline.set_progress_bar_config(disable=True)
    known, new = split_scenes()[1][:clips], every_scene(0, [motion_for(checkpoint.family)])[-SHOWN_NEW:]
    lines = []
    for scale in guidance:
        marks, shown = examine(pipeline, checkpoint, known, steps=steps, guidance=scale, seed=seed, batch=batch)
        found = {name: mark and round(mark, 3) for name, mark in dataclasses.asdict(marks).items()}
        facts = {"form": checkpoint.family.builtin, "guidance": scale, "steps": steps, "clips": len(known)}
        lines.append(json.dumps(facts | found))
        with (folder / RESULTS).open("a", encoding="utf-8") as out:
            out.write(lines[-1] + "\n")
        if len(lines) == 1:
            _, unknown = examine(pipeline, checkpoint, new, steps=steps, guidance=scale, seed=seed, batch=batch)
            picture = sheet([*known[: len(shown)], *new], np.concatenate([shown, unknown]))
            picture.save(folder / PICTURE)
    return lines


def motion_for(family: Family) -> str:
    """The new motion that a form of this family is taught."""
    shrinks, circles_back = NEW_MOTIONS
    return circles_back if family.task == "i2v" else shrinks


def examine(
    pipeline: Any,
    checkpoint: Checkpoint,
    scenes: list[Scene],
    *,
    steps: int,
    guidance: float,
    seed: int,
    batch: int = 10,
    drawn: Callable[[int], None] = lambda count: None,
) -> tuple[Marks, Frames]:
    """Generate a clip for each caption (and first frame, for I2V) and let the judge name it.

    Args:
        drawn: is told how many more clips there are, batch after batch.

    Returns:
        The marks, and the clips of the first few captions, uint8 (N, F, H, W, 3).
    """
    from PIL import Image

    moments = times(checkpoint.family)
    rows, first_frames = [], []
    shown: list[Frames] = []
    for start in range(0, len(scenes), batch):
        some = scenes[start : start + batch]
        firsts = [draw(scene, moments[:1], NATIVE.height, NATIVE.width)[0] for scene in some]
        i2v = checkpoint.family.task == "i2v"
        with torch.no_grad():
            videos = pipeline(
                prompt=[scene.caption for scene in some],
                num_frames=NATIVE.frames,
                height=NATIVE.height,
                width=NATIVE.width,
                num_inference_steps=steps,
                guidance_scale=guidance,
                max_sequence_length=checkpoint.family.text_tokens,
                generator=torch.Generator().manual_seed(seed + start),
                output_type="np",
                **({"image": [Image.fromarray(frame) for frame in firsts]} if i2v else {}),
            ).frames
        clips = [(np.asarray(video) * 255).round().astype(np.uint8) for video in videos]
        shown += clips[: SHOWN - len(shown)]
        with ThreadPoolExecutor(_JUDGES) as threads:  # most of it is matrix products, outside Python's lock
            verdicts = list(threads.map(lambda clip_FHWC: judge(clip_FHWC, moments), clips))
        for scene, clip_FHWC, first_HWC, verdict in zip(some, clips, firsts, verdicts, strict=True):
            seen = verdict.scene
            right = [seen.shape == scene.shape, seen.colour == scene.colour, seen.motion == scene.motion]
            rows.append([*right, all(right[:2]), all(right), verdict.error])
            if i2v:
                error = np.mean((clip_FHWC[0] / 255 - first_HWC / 255) ** 2)
                first_frames.append(-10 * np.log10(max(error, 1e-6)))
        drawn(len(some))
    shape, colour, motion, both, every, distance = (float(mean) for mean in np.mean(np.array(rows, dtype=float), 0))
    kept = float(np.mean(first_frames)) if first_frames else None
    return Marks(shape, colour, motion, both, every, distance, kept), np.stack(shown)


def sheet(scenes: Sequence[Scene], clips_NFHWC: Frames, frames: int = 5) -> Any:
    """A picture of a few frames of each clip, a row a clip, under its caption."""
    from PIL import Image, ImageDraw

    count, length, height, width, _ = clips_NFHWC.shape
    picture = Image.new("RGB", (width * frames, (height + 14) * count), "white")
    pen = ImageDraw.Draw(picture)
    for row, (scene, clip_FHWC) in enumerate(zip(scenes, clips_NFHWC, strict=False)):
        pen.text((2, row * (height + 14)), scene.caption, fill="black")
        for column, moment in enumerate(np.linspace(0, length - 1, frames).round().astype(int)):
            picture.paste(Image.fromarray(clip_FHWC[moment]), (column * width, row * (height + 14) + 13))
    return picture
