"""Videos from stored captions and images, while training goes on: no text encoder, no pipeline.

The steps are those of diffusers' CogVideoX pipelines; what the transformer is
fed is what it is trained with (`Objective.model_inputs`). One forward pass at a
time, so that guidance costs no memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cogcommon.files.memory import free_gpu_memory
from cogcommon.media.video import Frames
from cogcommon.model.checkpoint import Checkpoint

from ..model.objective import Objective
from ..settings.results import GUIDANCE, STEPS

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKLCogVideoX

# Peak of an untiled decode in half precision over the pixels of a frame; it works on two or three latent
# frames at a time, so their number hardly matters. Measured 46,000 (bf16, CPU, the published VAE's shape).
DECODE_BYTES_PER_PIXEL = 50_000
# Height and width; in latents a sixth and a fifth of them, by which they overlap, are whole numbers. The first is the
# VAE's own and takes 4 GiB, the last 0.6.
_TILES = ((240, 360), (144, 200), (96, 120))


def scheduler_of(checkpoint: Checkpoint) -> Any:
    """The published sampler: DDIM for 2B, DPM for the others.

    With trailing spacing the first step is at the last timestep, where training
    has abar = 0 and the input is pure noise.
    """
    import diffusers

    cls = diffusers.CogVideoXDDIMScheduler if checkpoint.family.ddim else diffusers.CogVideoXDPMScheduler
    return cls.from_config(dict(checkpoint.scheduler_config), timestep_spacing="trailing")


@dataclass(frozen=True)
class Conditions:
    """What a video is drawn from. Latents fp32."""

    noise_BFCHW: torch.Tensor  # F padded for the temporal patch
    text_BLD: torch.Tensor
    empty_BLD: torch.Tensor  # text embedding of the empty caption
    named: Mapping[str, torch.Tensor]  # as of a `Batch`

    def to(self, device: torch.device) -> Conditions:
        named = {name: tensor.to(device) for name, tensor in self.named.items()}
        return Conditions(self.noise_BFCHW.to(device), self.text_BLD.to(device), self.empty_BLD.to(device), named)


def denoise(
    transformer: torch.nn.Module,
    objective: Objective,
    checkpoint: Checkpoint,
    conditions: Conditions,
    generator: torch.Generator,
    dtype: torch.dtype,
    *,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    each: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Scaled latents (B, F, C, h, w), fp32, with the padding frames still at the front.

    Args:
        generator: of the noise that DPM adds at each step.
        dtype: the type the transformer computes in.
        each: is called after each step; what it raises ends the sampling.
    """
    import torch

    dynamic = not checkpoint.family.ddim
    scheduler = scheduler_of(checkpoint)
    latent_BFCHW = conditions.noise_BFCHW
    scheduler.set_timesteps(steps, device=latent_BFCHW.device)

    def predict(latent_BFCHW: torch.Tensor, text_BLD: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        inputs = objective.model_inputs(latent_BFCHW, conditions.named, text_BLD, t[None], dtype)
        return transformer(**inputs, return_dict=False)[0].float()

    clean = None  # what DPM made of the step before
    with torch.no_grad():
        for index, t in enumerate(scheduler.timesteps):
            scale = guidance
            if dynamic:  # as the pipelines have it
                scale = 1 + guidance * (1 - math.cos(math.pi * ((steps - t.item()) / steps) ** 5)) / 2
            plain = predict(latent_BFCHW, conditions.empty_BLD, t)
            velocity = plain + scale * (predict(latent_BFCHW, conditions.text_BLD, t) - plain)
            if dynamic:
                last = scheduler.timesteps[index - 1] if index else None
                latent_BFCHW, clean = scheduler.step(
                    velocity, clean, t, last, latent_BFCHW, generator=generator, return_dict=False
                )
            else:
                latent_BFCHW = scheduler.step(velocity, t, latent_BFCHW, return_dict=False)[0]
            each()
    return latent_BFCHW


def load_decoder(checkpoint: Checkpoint, dtype: torch.dtype) -> AutoencoderKLCogVideoX:
    """The VAE without its encoder, on the CPU."""
    vae = checkpoint.load_vae(dtype)
    vae.encoder = None
    return vae


def decode_latents(vae: AutoencoderKLCogVideoX, latent_BFCHW: torch.Tensor, frames: int) -> Frames:
    """The video (F, H, W, 3) uint8 of one scaled latent. The VAE is on the GPU only meanwhile.

    Args:
        frames: latent frames of the video; more than that are padding at the front.
    """
    import torch

    device = latent_BFCHW.device
    if device.type == "cuda":  # whole frames would pass training's own peak
        vae.enable_tiling(
            *tile_within(free_gpu_memory(device) - sum(parameter.nbytes for parameter in vae.parameters()))
        )
    vae.to(device)
    try:
        latent_BCFHW = latent_BFCHW[:, -frames:].permute(0, 2, 1, 3, 4) / vae.config.scaling_factor
        with torch.no_grad():
            video_CFHW = vae.decode(latent_BCFHW.to(vae.dtype), return_dict=False)[0][0].float()
        pixels = ((video_CFHW / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        result: Frames = np.ascontiguousarray(pixels.permute(1, 2, 3, 0).cpu().numpy())
        return result
    finally:
        vae.to("cpu")


def tile_within(room: int) -> tuple[int, int]:
    """Height and width of the largest tiles that a decode has room for, in bytes; the smallest where it has none."""
    fitting = (tile for tile in _TILES if tile[0] * tile[1] * DECODE_BYTES_PER_PIXEL <= room)
    return next(fitting, _TILES[-1])
