"""The VAE of the built-in model: trained on drawn clips, in diffusers' own class."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cogcommon.media.video import Frames
from cogcommon.model.families import FAMILIES
from cogcommon.model.tiny import NATIVE, VAE_CONFIG

from .clips import SIZE, WILD, draw_all, mixed_clip, named_clip, to_tensor, unseen_clips, wild_clip
from .fit import Inputs, Losses, fit, name_of

# Frames of a clip, and clips of a step beside those of the last stage, by the share of the run at which they
# begin. A still costs an eleventh of a whole clip; the whole clips bring 17 frames, which the class encodes as
# 9 + 8 with the caches of the first chunk.
STAGES = ((0.0, 1, 8), (0.1, 9, 2), (0.35, NATIVE.frames, 1))
# A nat of a latent element costs as much as this L1 error (of 2): enough to keep the latents
# near a unit Gaussian, too little to switch any channel off.
KL_WEIGHT = 2e-4
# All forms share these weights, as the published families do. Their scaling factors, 0.7 and 1.15,
# make the root mean square of each latent channel 0.78 and 1.28.
LATENT_RMS = 1.11

CARD = """\
# The VAE of the built-in model

`AutoencoderKLCogVideoX`, channels 16-32-32-32, one layer a block, 16 latent channels; bf16. Trained from nothing on
{pool} drawn clips, of them {wild:.0%} wild ones:

    {command}

{steps} steps of {batch} clips of 17x64x96 (stills and 9 frames first) in {minutes:.1f} minutes on {device}: Muon, bf16
autocast, the average of the last weights. Loss: L1, squared error and a little KL. Each latent channel is scaled to
a root mean square of {rms} over such clips, between what the scaling factors 0.7 and 1.15258426 of the families would
ask for.

PSNR of decode(encode(x)) in fp32, through the posterior's mean, {clips} clips each of 17x64x96, never trained on:

| clips | mean dB | worst dB |
|---|---|---|
{rows}
"""


def stage_at(progress: float) -> tuple[int, int]:
    """Frames of the clips at this share of the run, and how many times the batch they are."""
    return next(stage[1:] for stage in reversed(STAGES) if stage[0] <= progress)


def inputs_at(pool_NFHWC: torch.Tensor, step: int, progress: float, *, batch: int, seed: int) -> Inputs:
    """The clips of a step, fp32 (B, 3, F, H, W) in -1..1, and the noise of their latents, from the seed and the step.

    Args:
        pool_NFHWC: uint8 clips on the device that trains.
        batch: whole clips of a step; shorter ones are more.
    """
    frames, times_as_many = stage_at(progress)
    generator = torch.Generator(pool_NFHWC.device).manual_seed(seed * 10_000_000 + step)
    chosen = torch.randint(len(pool_NFHWC), (batch * times_as_many,), generator=generator, device=pool_NFHWC.device)
    first = step % (NATIVE.frames - frames + 1)
    clip_BCFHW = pool_NFHWC[chosen, first : first + frames].permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1)
    latent_size = (len(chosen), VAE_CONFIG["latent_channels"], _FAMILY.latent_frames(frames), *_LATENT)
    noise = torch.randn(latent_size, generator=generator, device=pool_NFHWC.device)
    return clip_BCFHW.contiguous(), noise


_FAMILY = FAMILIES[0]  # all of them share the VAE
_LATENT = _FAMILY.latent(NATIVE)[2:]


def train_vae(
    folder: Path,
    *,
    steps: int | None,
    minutes: float | None,
    lr: float,
    seed: int,
    device: torch.device,
    batch: int,
    pool: int,
    workers: int = 0,
    graphs: bool = False,
    command: str = "",
) -> None:
    """Train, or continue to train, the VAE in ``folder``; write weights and card there at the end.

    Args:
        batch: whole clips of a step.
        pool: clips to draw before the first step; the batches are taken from them.
        workers: processes that draw them.
        command: for the card.
    """
    import diffusers

    torch.manual_seed(seed)
    vae = diffusers.AutoencoderKLCogVideoX(**VAE_CONFIG)
    start_as_thumbnail(vae)
    vae.to(device)
    clips_NFHWC = torch.from_numpy(draw_all(mixed_clip, [(seed, index) for index in range(pool)], workers)).to(device)

    def losses_of(clip_BCFHW: torch.Tensor, noise: torch.Tensor) -> Losses:
        # On a CPU with AVX-512 bf16 takes a fifth of fp32's time: 0.24 s against 1.1 s for 9x64x96.
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(clip_BCFHW).latent_dist
            decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        error = decoded.float() - clip_BCFHW
        kl = 0.5 * (posterior.mean.float().square() + posterior.logvar.float().exp() - 1 - posterior.logvar.float())
        # L1 for flat colours, squares for the edges, which are most of the PSNR.
        return {"l1": error.abs().mean(), "mse": 4 * error.square().mean(), "kl": KL_WEIGHT * kl.mean()}

    taken, seconds = fit(
        vae,
        lambda step, progress: inputs_at(clips_NFHWC, step, progress, batch=batch, seed=seed),
        losses_of,
        folder,
        steps=steps,
        minutes=minutes,
        lr=lr,
        graphs=graphs,
    )
    made = {"steps": taken, "minutes": seconds / 60, "batch": batch, "pool": pool, "command": command}
    export_vae(vae, folder, seed=seed, made=made)


def start_as_thumbnail(vae: Any) -> None:
    """Weights with which the VAE is a blurred 8x thumbnail of each frame, before any training.

    300 steps of stills bring the L1 error to 0.095, from torch's own start to
    0.127. The first eight channels carry +-R, +-G, +-B and +-1/2 through the
    network (silu(x) - silu(-x) = x, so pairs pass the last nonlinearity
    unchanged); every residual branch starts at zero, and the other channels are
    left random, to learn with.
    """
    pairs = torch.eye(3).repeat_interleave(2, 0) * torch.tensor([1.0, -1.0]).repeat(3)[:, None]  # (6, 3)

    def carry(convolution: Any, rows: int, matrix: torch.Tensor, taps: torch.Tensor) -> None:
        """The first ``rows`` outputs become ``matrix`` times the first inputs, seen through ``taps``."""
        weight, bias = convolution.weight, convolution.bias
        weight[:rows] = 0
        weight[: matrix.shape[0], : matrix.shape[1]] = matrix[..., *[None] * taps.ndim] * taps
        bias[:rows] = 0

    here = torch.zeros(3, 3, 3)  # the pixel itself; the last tap in time is the present
    here[2, 1, 1] = 1
    mean = torch.zeros(3, 3)  # of the 2x2 pixels under a stride
    mean[:2, :2] = 0.25
    smooth = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16  # after nearest-neighbour enlargement: bilinear
    with torch.no_grad():
        module: Any
        for name, module in vae.named_modules():
            if name.endswith("conv_in.conv"):
                carry(module, 8, pairs, here)
                module.bias[6:8] = torch.tensor([0.5, -0.5])
            elif name.endswith("conv_out.conv"):
                carry(module, 3, pairs.T * 0.5, here)
            elif name.endswith("conv_shortcut"):
                carry(module, 8, torch.eye(8), torch.ones(1, 1, 1))
            elif ".downsamplers." in name and isinstance(module, torch.nn.Conv2d):
                carry(module, 8, torch.eye(8), mean)
            elif ".upsamplers." in name and isinstance(module, torch.nn.Conv2d):
                carry(module, 8, torch.eye(8), smooth)
            elif name.endswith("conv2.conv"):
                module.weight.zero_()
                module.bias.zero_()
            elif name.endswith("conv_y.conv"):  # the decoder's norms start as ordinary ones
                module.weight.zero_()
                module.bias.fill_(1)
            elif name.endswith("conv_b.conv"):
                module.weight.zero_()
                module.bias.zero_()
        vae.encoder.conv_out.conv.bias[vae.config.latent_channels :] = -6  # log variance: std 0.05


def psnr(vae: Any, clip_FHWC: Frames) -> float:
    """dB of decode(encode(clip)), through the posterior's mean."""
    device = next(vae.parameters()).device
    clip = to_tensor(clip_FHWC[None]).to(device)
    with torch.no_grad():
        decoded = vae.decode(vae.encode(clip).latent_dist.mean).sample.clamp(-1, 1)
    return -10 * float(torch.log10((decoded - clip).square().mean() / 4))


def export_vae(vae: Any, folder: Path, *, seed: int, made: Mapping[str, object], clips: int = 24) -> None:
    """Write ``vae.safetensors`` and its card, ``vae.md``: bf16, all latent channels equally strong.

    Args:
        made: what the card says of the training.
        clips: of each kind to measure on.
    """
    import safetensors.torch

    with torch.no_grad():
        seen = [to_tensor(mixed_clip((seed + 1, index))[None]) for index in range(clips)]
        device = next(vae.parameters()).device
        latents_CN = torch.cat(
            [vae.encode(clip.to(device)).latent_dist.mean.transpose(0, 1).flatten(1) for clip in seen], 1
        )
    scale_latents(vae, LATENT_RMS * latents_CN.square().mean(1).rsqrt())
    weights = {name: tensor.to("cpu", torch.bfloat16).contiguous() for name, tensor in vae.state_dict().items()}
    vae.load_state_dict(weights)  # the figures are of what is written
    named, wild = np.random.default_rng((seed, 1 << 41)), np.random.default_rng((seed, 1 << 42))
    sets = {
        "the unseen shape": unseen_clips(clips, seed),
        "known shapes": [named_clip(named, *SIZE) for _ in range(clips)],
        "wild clips (textures, any colour, several turning shapes)": [wild_clip(wild, *SIZE) for _ in range(clips)],
    }
    rows = []
    for name, drawn in sets.items():
        found = [psnr(vae, clip) for clip in drawn]
        rows.append(f"| {name} | {np.mean(found):.1f} | {min(found):.1f} |")
    safetensors.torch.save_file(weights, folder / "vae.safetensors")
    (folder / "vae.md").write_text(
        CARD.format(wild=WILD, rms=LATENT_RMS, clips=clips, device=name_of(device), rows="\n".join(rows), **made),
        encoding="utf-8",
    )


def scale_latents(vae: Any, scale_C: torch.Tensor) -> None:
    """Multiply what the encoder gives, and divide what the decoder takes, so that the images stay the same.

    Only scales can be moved into the weights exactly: a shift would meet the
    zeros that the decoder's convolutions see around the latent.
    """
    with torch.no_grad():
        last = vae.encoder.conv_out.conv  # means, then log variances
        last.weight[: len(scale_C)] *= scale_C[:, None, None, None, None]
        last.bias *= torch.cat([scale_C, torch.ones_like(scale_C)])
        last.bias[len(scale_C) :] += 2 * scale_C.log()
        for name, module in vae.decoder.named_modules():
            if name == "conv_in.conv" or name.endswith(("conv_y.conv", "conv_b.conv")):  # the norms see the latent
                module.weight /= scale_C[:, None, None, None]
