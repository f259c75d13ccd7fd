"""The VAE of the built-in model: trained on drawn clips, in diffusers' own class."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cogcommon.scenes import BACKGROUNDS, COLOURS, MOTIONS, NEW_SHAPES, SHAPES, Plane, Scene, blend_in, draw, mask
from cogcommon.tiny import NATIVE, VAE_CONFIG
from cogcommon.video import Frames

from .fit import Losses, fit

# (clips, frames, height, width) of a step, by the share of the run at which they begin. Stills cost a
# ninth of a clip, and cuts from clips a quarter; the whole clips bring the statistics that the group
# norms will meet, and 17 frames, which the class encodes as 9 + 8 with the caches of the first chunk.
STAGES = (
    (0.0, ((4, 1, 64, 96),)),
    (0.2, ((1, 9, 32, 48), (1, 9, 48, 64), (1, 9, 32, 48), (4, 1, 64, 96))),
    (0.7, ((1, 9, 64, 96), (1, 9, 64, 96), (4, 1, 64, 96), (1, 17, 64, 96))),
)
WILD = 0.15  # of the clips
# A nat of a latent element costs as much as this L1 error (of 2): enough to keep the latents
# near a unit Gaussian, too little to switch any channel off.
KL_WEIGHT = 2e-4
# All forms share these weights, as the published families do. Their scaling factors, 0.7 and 1.15,
# make the root mean square of each latent channel 0.78 and 1.28.
LATENT_RMS = 1.11

CARD = """\
# The VAE of the built-in model

`AutoencoderKLCogVideoX`, channels 16-32-32-32, one layer a block, 16 latent channels; bf16. Trained on drawn
clips alone, nothing else went in:

    python -m cogtrain.pretrain vae FOLDER --steps {steps} --lr {lr} --seed {seed}

Muon on the CPU, bf16 autocast: first stills, then cuts of clips, then clips of 9 and 17 frames of 64x96. Loss: L1,
squared error and a little KL. Each latent channel is scaled to a root mean square of {rms} over such clips, between
what the scaling factors 0.7 and 1.15258426 of the families would ask for.

PSNR of decode(encode(x)) in fp32, through the posterior's mean, {clips} clips each of 17x64x96, never trained on:

| clips | mean dB | worst dB |
|---|---|---|
{rows}
"""


def wild_clip(rng: np.random.Generator, frames: int, height: int, width: int) -> Frames:
    """One to three shapes of any colour, size and straight motion over a textured slope of colours.

    The VAE must carry what the demo's new concepts look like, so it sees more
    than the named world.
    """
    corners = rng.uniform(0, 255) + rng.uniform(-1, 1, (2, 2, 3)) * rng.uniform(0, 160)
    image_HWC = _enlarge(corners, height, width)
    if rng.random() < 0.5:
        grain = rng.integers(2, 10)
        image_HWC = image_HWC + _enlarge(
            rng.normal(0, rng.uniform(2, 40), (height // grain + 2, width // grain + 2, 1)), height, width
        )
    layers = [
        (
            str(rng.choice(list(SHAPES))),
            rng.uniform(0, 255, 3),
            rng.uniform(-0.9, 0.9, 2),
            rng.uniform(-0.09, 0.09, 2),
            height * rng.uniform(0.08, 0.4) * np.array([1, rng.uniform(0.95, 1.05)]),
            rng.uniform(0, 2 * np.pi) + np.array([0, rng.normal(0, 0.1)]),
        )
        for _ in range(rng.integers(1, 4))
    ]
    video = np.empty((frames, height, width, 3), dtype=np.uint8)
    for index in range(frames):
        frame_HWC = image_HWC
        for shape, colour, start, velocity, (radius, growth), (angle, spin) in layers:
            across, down = start + velocity * index
            size = radius * (growth / radius) ** index
            cover_HW = mask(shape, (across, down), size, height, width, angle + spin * index)
            frame_HWC = blend_in(frame_HWC, colour, cover_HW)
        video[index] = np.clip(np.rint(frame_HWC), 0, 255)
    return video


def named_clip(rng: np.random.Generator, frames: int, height: int, width: int) -> Frames:
    """A scene of the named world, some stretch of its motion."""
    scene = Scene(*(str(rng.choice(list(names))) for names in (SHAPES, COLOURS, MOTIONS, BACKGROUNDS)))
    start, end = sorted(rng.uniform(0, 1, 2)) if rng.random() < 0.5 else (0.0, 1.0)
    return draw(scene, [float(time) for time in np.linspace(start, end, frames)], height, width)


def _batch_of_run(step: int, *, steps: int, seed: int, scale: int) -> torch.Tensor:
    return batch_at(step / steps, step, seed, scale)


def batch_at(progress: float, step: int, seed: int, scale: int = 1) -> torch.Tensor:
    """The clips of a step, fp32 (B, 3, F, H, W) in -1..1: some of them wild, some cut from larger ones.

    Args:
        progress: step over steps.
        scale: times as many clips as a CPU takes.
    """
    rng = np.random.default_rng((seed, step))
    sizes = [sizes for start, sizes in STAGES if start <= progress][-1]
    count, frames, height, width = sizes[step % len(sizes)]
    clips = []
    for _ in range(count * scale):
        whole = (wild_clip if rng.random() < WILD else named_clip)(rng, frames, NATIVE.height, NATIVE.width)
        corners = rng.integers(0, (NATIVE.height - height + 1, NATIVE.width - width + 1), (4, 2))
        cuts = [whole[:, top : top + height, left : left + width] for top, left in corners]
        clips.append(max(cuts, key=lambda cut: float(cut.std((0, 1, 2)).sum())))  # where there is something to see
    return to_tensor(np.stack(clips))


def to_tensor(clips_BFHWC: np.ndarray[Any, Any]) -> torch.Tensor:
    """uint8 clips as the VAE takes them: fp32 (B, 3, F, H, W), -1..1."""
    return torch.from_numpy(clips_BFHWC).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def train_vae(
    folder: Path, *, steps: int, lr: float, seed: int, device: torch.device, scale: int = 1, workers: int = 0
) -> None:
    """Train, or continue to train, the VAE in ``folder``; write weights and card there at the end.

    Args:
        scale: times as many clips a step; a GPU has room for 16.
        workers: processes that draw clips ahead.
    """
    import diffusers

    torch.manual_seed(seed)
    vae = diffusers.AutoencoderKLCogVideoX(**VAE_CONFIG)
    start_as_thumbnail(vae)
    vae.to(device)

    def losses_of(clip_BCFHW: torch.Tensor, step: int) -> Losses:
        clip_BCFHW = clip_BCFHW.to(device)
        generator = torch.Generator(device).manual_seed(seed * 10_000_000 + step)
        # On a CPU with AVX-512 bf16 takes a fifth of fp32's time: 0.24 s against 1.1 s for 9x64x96.
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(clip_BCFHW).latent_dist
            decoded = vae.decode(posterior.sample(generator)).sample
        error = decoded.float() - clip_BCFHW
        kl = 0.5 * (posterior.mean.float().square() + posterior.logvar.float().exp() - 1 - posterior.logvar.float())
        # L1 for flat colours, squares for the edges, which are most of the PSNR.
        return {"l1": error.abs().mean(), "mse": 4 * error.square().mean(), "kl": KL_WEIGHT * kl.mean()}

    batches = partial(_batch_of_run, steps=steps, seed=seed, scale=scale)
    fit(vae, batches, losses_of, folder, steps=steps, lr=lr, workers=workers)
    export_vae(vae, folder, steps=steps, lr=lr, seed=seed)


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


def unseen_clips(count: int, seed: int) -> list[Frames]:
    """Clips of a shape that no training clip has, at the native size."""
    rng = np.random.default_rng((seed, 1 << 40))
    world = ([*NEW_SHAPES], [*COLOURS], [*MOTIONS], [*BACKGROUNDS])
    every = [Scene(*(str(rng.choice(names)) for names in world)) for _ in range(count)]
    moments = [float(time) for time in np.linspace(0, 1, NATIVE.frames)]
    return [draw(scene, moments, NATIVE.height, NATIVE.width) for scene in every]


def export_vae(vae: Any, folder: Path, *, steps: int, lr: float, seed: int, clips: int = 24) -> None:
    """Write ``tiny_vae.safetensors`` and its card, ``tiny_vae.md``: bf16, all latent channels equally strong."""
    import safetensors.torch

    with torch.no_grad():
        seen = [batch_at(1, step, seed + 1) for step in range(clips)]
        device = next(vae.parameters()).device
        latents_CN = torch.cat(
            [vae.encode(clip.to(device)).latent_dist.mean.transpose(0, 1).flatten(1) for clip in seen], 1
        )
    scale_latents(vae, LATENT_RMS * latents_CN.square().mean(1).rsqrt())
    weights = {name: tensor.to("cpu", torch.bfloat16).contiguous() for name, tensor in vae.state_dict().items()}
    vae.load_state_dict(weights)  # the figures are of what is written
    named, wild = np.random.default_rng((seed, 1 << 41)), np.random.default_rng((seed, 1 << 42))
    size = (NATIVE.frames, NATIVE.height, NATIVE.width)
    sets = {
        "the unseen shape": unseen_clips(clips, seed),
        "known shapes": [named_clip(named, *size) for _ in range(clips)],
        "wild clips (textures, any colour, several turning shapes)": [wild_clip(wild, *size) for _ in range(clips)],
    }
    rows = []
    for name, drawn in sets.items():
        found = [psnr(vae, clip) for clip in drawn]
        rows.append(f"| {name} | {np.mean(found):.1f} | {min(found):.1f} |")
    safetensors.torch.save_file(weights, folder / "tiny_vae.safetensors")
    (folder / "tiny_vae.md").write_text(
        CARD.format(steps=steps, lr=lr, seed=seed, rms=LATENT_RMS, clips=clips, rows="\n".join(rows)),
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


def _enlarge(image_HWC: Plane, height: int, width: int) -> Plane:
    """Bilinear, corner to corner."""
    rows, columns = np.linspace(0, image_HWC.shape[0] - 1, height), np.linspace(0, image_HWC.shape[1] - 1, width)
    top, left = np.floor(rows).astype(int), np.floor(columns).astype(int)
    below, right = np.minimum(top + 1, image_HWC.shape[0] - 1), np.minimum(left + 1, image_HWC.shape[1] - 1)
    down, across = (rows - top)[:, None, None], (columns - left)[None, :, None]
    upper = image_HWC[top][:, left] * (1 - across) + image_HWC[top][:, right] * across
    lower = image_HWC[below][:, left] * (1 - across) + image_HWC[below][:, right] * across
    blended: Plane = upper * (1 - down) + lower * down
    return blended
