"""What the judge says of the clips that a form generates for captions it was not trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cogcommon.checkpoint import Checkpoint
from cogcommon.scenes import Scene, draw
from cogcommon.tiny import NATIVE

from ..judge import judge
from .transformer import times


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


def load_pipeline(checkpoint: Checkpoint, transformer: torch.nn.Module, device: torch.device) -> Any:
    """The diffusers pipeline of a form with this transformer, fp32."""
    import diffusers

    i2v = checkpoint.family.task == "i2v"
    pipeline = (diffusers.CogVideoXImageToVideoPipeline if i2v else diffusers.CogVideoXPipeline)(
        tokenizer=checkpoint.load_tokenizer(),
        text_encoder=checkpoint.load_text_encoder(torch.float32),
        vae=checkpoint.load_vae(torch.float32),
        transformer=transformer.eval(),
        scheduler=checkpoint.load_scheduler(),
    ).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def examine(
    pipeline: Any,
    checkpoint: Checkpoint,
    scenes: list[Scene],
    *,
    steps: int,
    guidance: float,
    seed: int,
    batch: int = 10,
) -> Marks:
    """Generate a clip for each caption (and first frame, for I2V) and let the judge name it."""
    from PIL import Image

    moments = times(checkpoint.family)
    rows, first_frames = [], []
    for start in range(0, len(scenes), batch):
        some = scenes[start : start + batch]
        drawn = [draw(scene, moments[:1], NATIVE.height, NATIVE.width)[0] for scene in some]
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
                **({"image": [Image.fromarray(frame) for frame in drawn]} if i2v else {}),
            ).frames
        for scene, video, first_HWC in zip(some, videos, drawn, strict=True):
            clip_FHWC = (np.asarray(video) * 255).round().astype(np.uint8)
            verdict = judge(clip_FHWC, moments)
            seen = verdict.scene
            right = [seen.shape == scene.shape, seen.colour == scene.colour, seen.motion == scene.motion]
            rows.append([*right, all(right[:2]), all(right), verdict.error])
            if i2v:
                error = np.mean((clip_FHWC[0] / 255 - first_HWC / 255) ** 2)
                first_frames.append(-10 * np.log10(max(error, 1e-6)))
    shape, colour, motion, both, every, distance = (float(mean) for mean in np.mean(np.array(rows, dtype=float), 0))
    kept = float(np.mean(first_frames)) if first_frames else None
    return Marks(shape, colour, motion, both, every, distance, kept)
