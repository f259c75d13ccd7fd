"""Makes what is measured: a checkpoint of random weights, and 1080p H.264 clips.

``python -m workshop.bench_encode.make model|clips FOLDER SIZE COUNT``; COUNT is T5's layers or the clips.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np

from cogcommon.media.video import Frames, write_mp4
from cogprep.processes.pool import default_workers

from .shape import SHAPES, Folder, Shape, Size


def make_checkpoint(folder: Path, shape: Shape, text_layers: int) -> None:
    """A diffusers folder of the 5B family: a true VAE and T5, and the tiny transformer, which no encode reads."""
    import torch
    from diffusers import AutoencoderKLCogVideoX
    from transformers import T5Config, T5EncoderModel

    from cogcommon.libraries import quiet_libraries
    from cogcommon.model.checkpoint import open_checkpoint
    from cogcommon.model.device import pick_device
    from cogcommon.model.families import Resolution

    device = pick_device()
    quiet_libraries()
    tiny = open_checkpoint("tiny")
    shutil.copytree(tiny.root, folder, ignore=shutil.ignore_patterns("vae", "text_encoder"))
    config_file = folder / "transformer" / "config.json"
    _, _, height, width = tiny.family.latent(Resolution.parse(shape.resolution))
    positions = {"sample_frames": shape.frames, "sample_height": height, "sample_width": width}
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | positions))
    torch.manual_seed(0)
    layers = min(text_layers, shape.t5["num_layers"])
    t5 = T5Config(**(shape.t5 | {"num_layers": layers}), feed_forward_proj="gated-gelu")
    config = {name: value for name, value in tiny.vae_config.items() if not name.startswith("_")}
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # T5 in fp32 would be 19 GB
    try:
        with torch.device(device):
            _fill(AutoencoderKLCogVideoX(**(config | shape.vae))).save_pretrained(folder / "vae")
            _fill(T5EncoderModel(t5)).save_pretrained(folder / "text_encoder")
    finally:
        torch.set_default_dtype(usual)


def _fill(model: Any) -> Any:
    """Matrices and kernels of variance 1/fan_in, so that activations stay finite; norms one, biases zero."""
    import torch

    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.ndim >= 2:
                tensor.normal_(0, tensor[0].numel() ** -0.5)
            else:
                tensor.fill_(0.0 if name.endswith("bias") else 1.0)
    return model


def make_data_set(folder: Path, shape: Shape, count: int) -> None:
    """Draw clips with every core. Each stands in the lists twice, with two captions."""
    (folder / "videos").mkdir(parents=True)
    names = [f"videos/{index:03d}.mp4" for index in range(count)]
    with multiprocessing.get_context("spawn").Pool(min(count, default_workers())) as pool:
        pool.starmap(_draw, [(folder / name, index, shape) for index, name in enumerate(names)], chunksize=1)
    again = [*names, *names]
    (folder / "videos.txt").write_text("".join(f"{name}\n" for name in again), encoding="utf-8")
    caption = (
        "A camera glides over coloured hills of noise, clip {} of many, in soft light, while nothing else moves at all."
    )
    (folder / "prompts.txt").write_text(
        "".join(caption.format(number) + "\n" for number in range(len(again))), encoding="utf-8"
    )


def _draw(path: Path, seed: int, shape: Shape) -> None:
    write_mp4(path, glide(seed, shape.source_frames, *shape.source), shape.source_fps, preset="veryfast")


def glide(seed: int, frames: int, height: int, width: int) -> Frames:
    """A window that glides over soft hills with some grain: detail and motion as a filmed clip has them."""
    generator = np.random.default_rng(seed)
    room = frames + 8
    coarse = generator.uniform(30, 225, ((height + room) // 64 + 2, (width + room) // 64 + 2, 3))
    hills_HWC = np.kron(coarse, np.ones((64, 64, 1)))[: height + room, : width + room]
    for _ in range(2):  # soft edges
        hills_HWC = (
            hills_HWC + np.roll(hills_HWC, 16, 0) + np.roll(hills_HWC, 16, 1) + np.roll(hills_HWC, 8, (0, 1))
        ) / 4
    ground_HWC = np.clip(hills_HWC + generator.normal(0, 6, hills_HWC.shape), 0, 255).astype(np.uint8)
    clip_FHWC = np.empty((frames, height, width, 3), np.uint8)
    for index in range(frames):
        clip_FHWC[index] = ground_HWC[index // 2 : index // 2 + height, index : index + width]
    return clip_FHWC


def main(what: str, root: str, size: str, count: str) -> None:
    folder, shape = Folder(Path(root)), SHAPES[cast(Size, size)]
    if what == "model":
        make_checkpoint(folder.model, shape, int(count))
    else:
        make_data_set(folder.clips, shape, int(count))


if __name__ == "__main__":
    main(*sys.argv[1:])
