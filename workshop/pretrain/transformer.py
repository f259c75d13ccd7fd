"""The transformers of the built-in model: trained on every scene but a few held out, with the project's own loss."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cogcommon.media.video import Frames
from cogcommon.model.checkpoint import Checkpoint
from cogcommon.model.families import Family
from cogcommon.model.tiny import NATIVE
from cogcommon.shards.records import IMAGE
from cogtrain.model.batch import Batch
from cogtrain.model.diffusion import Schedule
from cogtrain.model.objective import Objective

from ..scenes import Scene, draw
from .clips import draw_all, to_tensor
from .fit import Inputs, Losses, fit

CAPTION_DROPOUT = 0.1  # what guidance is measured from
# Clips of each scene, each on a path moved by up to so many pixels: a world that cannot be learned by heart.
# The judge looks as far.
VARIANTS, OFF = 4, 3.0
_ENCODED_AT_ONCE = 32


@dataclass(frozen=True)
class World:
    """Every scene to train on, as the VAE and the text encoder see it; ``VARIANTS`` clips to a text."""

    latent_mean_NCFHW: torch.Tensor
    latent_std_NCFHW: torch.Tensor
    image_NCFHW: torch.Tensor | None  # the first frame; None for T2V
    text_NLD: torch.Tensor
    empty_text_LD: torch.Tensor


def times(family: Family) -> list[float]:
    """The moment of each frame: a motion lasts 2 s, 17 frames at the family's own rate may see only its start."""
    return [min(1.0, 8 / family.fps) * index / (NATIVE.frames - 1) for index in range(NATIVE.frames)]


def encode_world(
    checkpoint: Checkpoint, scenes: Sequence[Scene], device: torch.device, text_tokens: int, *, workers: int = 0
) -> World:
    """Draw and encode every scene, ``VARIANTS`` times each; all of it stays on the device."""
    vae = checkpoint.load_vae(torch.float32).to(device)
    text_encoder = checkpoint.load_text_encoder(torch.float32).to(device)
    tokenizer = checkpoint.load_tokenizer()
    rng = np.random.default_rng(0)
    items = [
        (scene, times(checkpoint.family), tuple(rng.uniform(-OFF, OFF, 2))) for scene in scenes for _ in range(VARIANTS)
    ]
    clips_NFHWC = draw_all(_drawn, items, workers)
    means, stds, images, texts = [], [], [], []
    with torch.no_grad():
        for start in range(0, len(clips_NFHWC), _ENCODED_AT_ONCE):
            clip_BCFHW = to_tensor(clips_NFHWC[start : start + _ENCODED_AT_ONCE]).to(device)
            posterior = vae.encode(clip_BCFHW).latent_dist
            means.append(posterior.mean)
            stds.append(posterior.std)
            if checkpoint.family.task == "i2v":
                images.append(vae.encode(clip_BCFHW[:, :, :1]).latent_dist.mean)
        for caption in [*(scene.caption for scene in scenes), ""]:
            tokens = tokenizer(
                caption, padding="max_length", max_length=text_tokens, truncation=True, return_tensors="pt"
            ).input_ids
            texts.append(text_encoder(tokens.to(device))[0][0])
    return World(
        latent_mean_NCFHW=torch.cat(means),
        latent_std_NCFHW=torch.cat(stds),
        image_NCFHW=torch.cat(images) if images else None,
        text_NLD=torch.stack(texts[:-1]),
        empty_text_LD=texts[-1],
    )


def _drawn(item: tuple[Scene, list[float], tuple[float, float]]) -> Frames:
    scene, moments, off = item
    return draw(scene, moments, NATIVE.height, NATIVE.width, off=off)


def batch_at(world: World, objective: Objective, step: int, *, size: int, seed: int) -> Batch:
    """The samples of a step and all that is drawn for them, from the seed and the step alone, on the world's device."""
    device = world.text_NLD.device
    digest = hashlib.sha256(f"{seed} {step}".encode()).hexdigest()
    generator = torch.Generator(device).manual_seed(int(digest[:15], 16))
    draws: dict[str, Any] = {"generator": generator, "device": device}
    chosen = torch.randint(len(world.latent_mean_NCFHW), (size,), **draws)
    mean = world.latent_mean_NCFHW[chosen]
    latent = mean + world.latent_std_NCFHW[chosen] * torch.randn(mean.shape, **draws)
    latent_BFCHW = latent.transpose(1, 2)
    frames = objective.family.padded_frames(latent_BFCHW.shape[1])
    dropped_B = torch.rand(size, **draws) < CAPTION_DROPOUT
    text_BLD = torch.where(dropped_B[:, None, None], world.empty_text_LD, world.text_NLD[chosen // VARIANTS])
    # One timestep from each of as many equal stretches: the loss of a step jumps less.
    stretch = (torch.randperm(size, **draws) + torch.rand(size, **draws)) / size
    return Batch(
        keys=("",) * size,
        shards=("",) * size,
        latent_BFCHW=latent_BFCHW,
        noise_BFCHW=torch.randn(size, frames, *latent_BFCHW.shape[2:], **draws),
        timestep_B=(stretch * len(objective.schedule)).long(),
        text_BLD=text_BLD,
        conditions={} if world.image_NCFHW is None else {IMAGE: world.image_NCFHW[chosen].transpose(1, 2)},
    )


def train_transformer(
    checkpoint: Checkpoint,
    scenes: Sequence[Scene],
    folder: Path,
    *,
    steps: int | None,
    minutes: float | None,
    batch_size: int,
    lr: float,
    seed: int,
    device: torch.device,
    text_tokens: int | None = None,
    workers: int = 0,
    graphs: bool = False,
) -> None:
    """Train, or continue to train, a form's transformer in ``folder``; write ``<form>.safetensors`` there, bf16.

    Args:
        text_tokens: of each caption, padding included; the family's unless told. Captions of the
            named world have at most 23, and short texts make a step of `tiny` three times as fast.
        workers: processes that draw the clips before the first step.
    """
    import diffusers
    import safetensors.torch

    torch.manual_seed(seed)
    transformer = diffusers.CogVideoXTransformer3DModel.from_config(dict(checkpoint.transformer_config)).to(device)
    objective = Objective.of(checkpoint)
    # On the device, or every step waits for its timesteps to come to the CPU.
    objective = dataclasses.replace(objective, schedule=Schedule(objective.schedule.abar_T.to(device)))
    world = encode_world(checkpoint, scenes, device, text_tokens or checkpoint.family.text_tokens, workers=workers)

    def inputs_at(step: int, _: float) -> Inputs:
        batch = batch_at(world, objective, step, size=batch_size, seed=seed)
        given = (batch.latent_BFCHW, batch.noise_BFCHW, batch.timestep_B, batch.text_BLD)
        return (*given, *batch.conditions.values())

    def losses_of(*inputs: torch.Tensor) -> Losses:
        latent, noise, timestep, text, *image = inputs
        conditions = dict(zip(checkpoint.family.conditions, image, strict=True))
        batch = Batch(("",) * batch_size, ("",) * batch_size, latent, noise, timestep, text, conditions)
        with torch.autocast(device.type, torch.bfloat16):
            return {"loss": objective.losses(transformer, batch, torch.float32).mean()}

    fit(transformer, inputs_at, losses_of, folder, steps=steps, minutes=minutes, lr=lr, graphs=graphs)
    weights = {name: tensor.to("cpu", torch.bfloat16).contiguous() for name, tensor in transformer.state_dict().items()}
    safetensors.torch.save_file(weights, folder / f"{checkpoint.family.builtin}.safetensors")
