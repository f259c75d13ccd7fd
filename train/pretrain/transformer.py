"""The transformers of the built-in model: trained on every scene but a few held out, with the project's own loss."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from cogcommon.checkpoint import Checkpoint
from cogcommon.families import Family
from cogcommon.scenes import Scene, draw, every_scene
from cogcommon.tiny import NATIVE

from ..data import Batch
from ..inputs import Objective
from .fit import Losses, fit
from .vae import to_tensor

HELD_OUT = 100  # of 864 scenes
CAPTION_DROPOUT = 0.1  # what guidance is measured from


@dataclass(frozen=True)
class World:
    """Every scene to train on, as the VAE and the text encoder see it."""

    latent_mean_NCFHW: torch.Tensor
    latent_std_NCFHW: torch.Tensor
    image_NCFHW: torch.Tensor | None  # the first frame; None for T2V
    text_NLD: torch.Tensor
    empty_text_LD: torch.Tensor


def times(family: Family) -> list[float]:
    """The moment of each frame: a motion lasts 2 s, 17 frames at the family's own rate may see only its start."""
    return [min(1.0, 8 / family.fps) * index / (NATIVE.frames - 1) for index in range(NATIVE.frames)]


def split_scenes(seed: int) -> tuple[list[Scene], list[Scene]]:
    """Those to train on, and those held out."""
    shuffled = every_scene(seed)
    return shuffled[HELD_OUT:], shuffled[:HELD_OUT]


def encode_world(checkpoint: Checkpoint, scenes: list[Scene], device: torch.device, text_tokens: int) -> World:
    """Draw and encode every scene."""
    vae = checkpoint.load_vae(torch.float32).to(device)
    text_encoder = checkpoint.load_text_encoder(torch.float32).to(device)
    tokenizer = checkpoint.load_tokenizer()
    means, stds, images, texts = [], [], [], []

    @torch.no_grad()
    def embed(caption: str) -> torch.Tensor:
        tokens = tokenizer(
            caption, padding="max_length", max_length=text_tokens, truncation=True, return_tensors="pt"
        ).input_ids
        embedded: torch.Tensor = text_encoder(tokens.to(device))[0][0]
        return embedded.cpu()

    for scene in scenes:
        clip_BCFHW = to_tensor(draw(scene, times(checkpoint.family), NATIVE.height, NATIVE.width)[None]).to(device)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(clip_BCFHW).latent_dist
            means.append(posterior.mean[0].float().cpu())
            stds.append(posterior.std[0].float().cpu())
            if checkpoint.family.task == "i2v":
                images.append(vae.encode(clip_BCFHW[:, :, :1]).latent_dist.mean[0].float().cpu())
        texts.append(embed(scene.caption))
    return World(
        torch.stack(means), torch.stack(stds), torch.stack(images) if images else None, torch.stack(texts), embed("")
    )


def batch_at(world: World, objective: Objective, step: int, *, size: int, seed: int) -> Batch:
    """The samples of a step and all that is drawn for them, from the seed and the step alone."""
    generator = torch.Generator().manual_seed(int(hashlib.sha256(f"{seed} {step}".encode()).hexdigest()[:15], 16))
    chosen = torch.randint(len(world.text_NLD), (size,), generator=generator)
    mean = world.latent_mean_NCFHW[chosen]
    latent = mean + world.latent_std_NCFHW[chosen] * torch.randn(mean.shape, generator=generator)
    latent_BFCHW = latent.transpose(1, 2)
    frames = objective.padded_frames(latent_BFCHW.shape[1])
    text_BLD = world.text_NLD[chosen]
    text_BLD[torch.rand(size, generator=generator) < CAPTION_DROPOUT] = world.empty_text_LD
    # One timestep from each of as many equal stretches: the loss of a step jumps less.
    stretch = (torch.randperm(size, generator=generator) + torch.rand(size, generator=generator)) / size
    return Batch(
        keys=("",) * size,
        shards=("",) * size,
        latent_BFCHW=latent_BFCHW,
        noise_BFCHW=torch.randn(size, frames, *latent_BFCHW.shape[2:], generator=generator),
        timestep_B=(stretch * len(objective.schedule)).long(),
        text_BLD=text_BLD,
        image_BFCHW=None if world.image_NCFHW is None else world.image_NCFHW[chosen].transpose(1, 2),
    )


def train_transformer(
    checkpoint: Checkpoint,
    scenes: list[Scene],
    folder: Path,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    device: torch.device,
    text_tokens: int | None = None,
) -> None:
    """Train, or continue to train, a form's transformer in ``folder``; write ``<form>.safetensors`` there, bf16.

    Args:
        text_tokens: of each caption, padding included; the family's unless told. Captions of the
            named world have at most 23, and short texts make a step of `tiny` three times as fast.
    """
    import diffusers
    import safetensors.torch

    torch.manual_seed(seed)
    transformer = diffusers.CogVideoXTransformer3DModel.from_config(dict(checkpoint.transformer_config)).to(device)
    objective = Objective.of(checkpoint)
    world = encode_world(checkpoint, scenes, device, text_tokens or checkpoint.family.text_tokens)

    def losses_of(batch: Batch, step: int) -> Losses:
        batch = batch.to(device)
        with torch.autocast(device.type, torch.bfloat16):
            return {"loss": objective.losses(transformer, batch, torch.float32).mean()}

    fit(
        transformer,
        lambda step: batch_at(world, objective, step, size=batch_size, seed=seed),
        losses_of,
        folder,
        steps=steps,
        lr=lr,
    )
    weights = {name: tensor.to("cpu", torch.bfloat16).contiguous() for name, tensor in transformer.state_dict().items()}
    safetensors.torch.save_file(weights, folder / f"{checkpoint.family.builtin}.safetensors")
