"""A plain serial loop over clips, as the reference's guide encodes: decode, tiled VAE, T5, one after the other.

``python -m workshop.bench_encode.pipeline FOLDER SIZE COUNT`` prints one JSON line. It uses
our decoder, which takes only the frames that are wanted, and keeps the models loaded.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, cast

import torch

from cogcommon.libraries import quiet_libraries
from cogcommon.model.checkpoint import open_checkpoint
from cogcommon.model.device import pick_device
from cogcommon.model.families import Resolution
from cogcommon.model.text_encoder import TextEncoder
from cogprep.video.cut import Cut
from cogprep.video.decode import Clip, decode_clip

from .shape import SHAPES, Folder, Shape, Size


def serial(folder: Folder, shape: Shape, count: int) -> dict[str, object]:
    """Encode ``count`` clips after a first one that is not counted; seconds by stage, clips a minute."""
    device = pick_device()
    quiet_libraries()
    checkpoint = open_checkpoint(str(folder.model))
    vae: Any = checkpoint.load_vae(torch.bfloat16).to(device)
    vae.enable_tiling()
    text = TextEncoder(checkpoint, device, torch.bfloat16)
    text.batch = 1
    captions = (folder.clips / "prompts.txt").read_text(encoding="utf-8").splitlines()
    names = (folder.clips / "videos.txt").read_text(encoding="utf-8").splitlines()
    resolution = Resolution.parse(shape.resolution)
    seconds = {"decode": 0.0, "vae": 0.0, "text": 0.0}
    for index in range(count + 1):
        started = time.perf_counter()
        clip = decode_clip(folder.clips / names[index], resolution, Cut(), checkpoint.family.fps, "")
        assert isinstance(clip, Clip), clip
        decoded = time.perf_counter()
        with torch.inference_mode():
            frames = torch.from_numpy(clip.frames_FHWC).to(device)
            pixels = (frames.permute(3, 0, 1, 2)[None].float() / 255.0 * 2.0 - 1.0).to(vae.dtype)
            posterior = vae.encode(pixels).latent_dist
            _ = posterior.mean.cpu(), posterior.std.cpu()
        encoded = time.perf_counter()
        text.encode(captions[index])
        if index:
            seconds["decode"] += decoded - started
            seconds["vae"] += encoded - decoded
            seconds["text"] += time.perf_counter() - encoded
    total = sum(seconds.values())
    return {
        "serial": count,
        "clips_per_minute": 60 * count / total,
        "s_a_clip": {k: v / count for k, v in seconds.items()},
    }


def main(root: str, size: str, count: str) -> None:
    print(json.dumps(serial(Folder(Path(root)), SHAPES[cast(Size, size)], int(count))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
