"""The transformers of the built-in model: trained on every scene but a few held out, with the project's own loss."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from cogcommon.model.checkpoint import Checkpoint
from cogcommon.model.families import Family
from cogcommon.shards.records import IMAGE
from cogtrain.blocks.checkpointing import Checkpointing
from cogtrain.blocks.engine import BlockEngine
from cogtrain.blocks.plan import BlockPlan
from cogtrain.model.batch import Batch
from cogtrain.model.diffusion import Schedule
from cogtrain.model.objective import Objective

from ..scenes import Scene
from .fit import Inputs, Losses, fit
from .world import VARIANTS, World, encode_world

CAPTION_DROPOUT = 0.1  # what guidance is measured from
STRANGE, STRANGE_SHARE = 7, 0.25  # captions with unknown words: of each scene, and of the samples
# A step with this many text tokens takes less than half the time; captions have 23 or fewer. They must be as many as
# the family's at the end, because the padding is attended to.
SHORT_TEXT, SHORT_UNTIL = 40, 0.5
DECAY = 0.1  # of the weights, for each unit of the learning rate


def batch_at(
    world: World, objective: Objective, step: int, *, size: int, seed: int, text_tokens: int | None = None
) -> Batch:
    """The samples of a step and all that is drawn for them, from the seed and the step alone, on the world's device.

    Args:
        text_tokens: of each text, the first; all of them unless told.
    """
    device = world.text_STLD.device
    digest = hashlib.sha256(f"{seed} {step}".encode()).hexdigest()
    generator = torch.Generator(device).manual_seed(int(digest[:15], 16))
    draws: dict[str, Any] = {"generator": generator, "device": device}
    clips, (scenes, texts) = len(world.latent_mean_NCFHW), world.text_STLD.shape[:2]
    chosen = torch.randint(clips, (size,), **draws)
    mean = world.latent_mean_NCFHW[chosen]
    latent = mean + world.latent_std_NCFHW[chosen] * torch.randn(mean.shape, **draws)
    latent_BFCHW = latent.transpose(1, 2)
    frames = objective.family.padded_frames(latent_BFCHW.shape[1])
    strange_B = torch.randint(1, texts, (size,), **draws) if texts > 1 else torch.zeros_like(chosen)
    text = torch.where(torch.rand(size, **draws) < STRANGE_SHARE, strange_B, 0)
    dropped_B = torch.rand(size, **draws) < CAPTION_DROPOUT
    text_BLD = world.text_STLD[chosen * scenes // clips, text, :text_tokens]
    text_BLD = torch.where(dropped_B[:, None, None], world.empty_text_LD[:text_tokens], text_BLD)
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
    batch_size: int,
    lr: float,
    seed: int,
    device: torch.device,
    steps: int | None = None,
    minutes: float | None = None,
    until: float | None = None,
    calls: float = 1.0,
    decay: float = DECAY,
    variants: int = VARIANTS,
    cache: Path | None = None,
    first: Path | None = None,
    workers: int = 0,
    compiled: bool = False,
    graphs: bool = False,
) -> None:
    """Train, or continue to train, a form's transformer in ``folder``; write ``<form>.safetensors`` there, bf16.

    Args:
        steps, minutes, until, calls, decay, graphs: as `fit` has them.
        variants, cache, workers: as `encode_world` has them.
        first: weights to begin with where the folder has none.
        compiled: on a GPU, run the blocks in the project's own way, compiled and in bf16.
    """
    import diffusers
    import safetensors.torch

    torch.manual_seed(seed)
    transformer = diffusers.CogVideoXTransformer3DModel.from_config(dict(checkpoint.transformer_config)).to(device)
    if first:
        transformer.load_state_dict(safetensors.torch.load_file(first))
    objective = Objective.of(checkpoint)
    # On the device, or every step waits for its timesteps to come to the CPU.
    objective = dataclasses.replace(objective, schedule=Schedule(objective.schedule.abar_T.to(device)))
    world = encode_world(
        checkpoint,
        scenes,
        device,
        variants=variants,
        elsewhere=checkpoint.family.task == "i2v",
        strange=STRANGE,
        workers=workers,
        cache=cache,
    )
    if compiled and device.type == "cuda":
        every: Checkpointing = "all"
        plan = BlockPlan((every,) * len(transformer.transformer_blocks), compiled=True)
        BlockEngine(transformer, plan, device, torch.bfloat16)

    def inputs_at(step: int, progress: float) -> Inputs:
        tokens = SHORT_TEXT if progress < SHORT_UNTIL else None
        batch = batch_at(world, objective, step, size=batch_size, seed=seed, text_tokens=tokens)
        given = (batch.latent_BFCHW, batch.noise_BFCHW, batch.timestep_B, batch.text_BLD)
        return (*given, *batch.conditions.values())

    def losses_of(*inputs: torch.Tensor) -> Losses:
        latent, noise, timestep, text, *image = inputs
        conditions = dict(zip(checkpoint.family.conditions, image, strict=True))
        batch = Batch(("",) * batch_size, ("",) * batch_size, latent, noise, timestep, text, conditions)
        with torch.autocast(device.type, torch.bfloat16), _positions_for(transformer, text.shape[1]):
            return {"loss": objective.losses(transformer, batch, torch.float32).mean()}

    fit(
        transformer,
        inputs_at,
        losses_of,
        folder,
        steps=steps,
        minutes=minutes,
        until=until,
        calls=calls,
        lr=lr,
        decay=decay,
        graphs=graphs,
    )
    weights = {name: tensor.to("cpu", torch.bfloat16).contiguous() for name, tensor in transformer.state_dict().items()}
    scratch = folder / ".weights.tmp"
    safetensors.torch.save_file(weights, scratch)
    scratch.rename(weights_of(folder, checkpoint.family))


def weights_of(folder: Path, family: Family) -> Path:
    """Where the form's weights are, as exported at the end of a training, or of a call of it."""
    return folder / f"{family.builtin}.safetensors"


@contextlib.contextmanager
def _positions_for(transformer: Any, text_tokens: int) -> Iterator[None]:
    """The table of positions that a form adds to its tokens, if it has one, for a text of so many tokens.

    It is computed, not learned. The text's rows come first; all are zero.
    """
    whole = getattr(transformer.patch_embed, "pos_embedding", None)
    if whole is None:
        yield
        return
    transformer.patch_embed.pos_embedding = whole[:, transformer.config.max_text_seq_length - text_tokens :]
    try:
        yield
    finally:
        transformer.patch_embed.pos_embedding = whole
