"""The small world as the VAE and the text encoder see it: what a form learns from."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cogcommon.media.video import Frames
from cogcommon.model.checkpoint import Checkpoint
from cogcommon.model.families import Family
from cogcommon.model.tiny import NATIVE

from ..scenes import MOTIONS, Scene, draw
from .captions import strange_caption, unknown_words
from .clips import draw_all, to_tensor

# Clips of each scene, each on a path moved by up to so many pixels: a world that cannot be learned by heart.
# The judge looks as far.
VARIANTS, OFF = 16, 3.0
_ENCODED_AT_ONCE = 32


@dataclass(frozen=True)
class World:
    """Every scene to train on. The clips of one scene (N / S of them) follow one another, and so do its T texts.

    The first text of a scene is its caption, the others are strange ones (`captions`).
    """

    latent_mean_NCFHW: torch.Tensor
    latent_std_NCFHW: torch.Tensor
    image_NCFHW: torch.Tensor | None  # the first frame; None for T2V
    text_STLD: torch.Tensor
    empty_text_LD: torch.Tensor


def times(family: Family) -> list[float]:
    """The moment of each frame: a motion lasts 2 s, 17 frames at the family's own rate may see only its start."""
    return [min(1.0, 8 / family.fps) * index / (NATIVE.frames - 1) for index in range(NATIVE.frames)]


def encode_world(
    checkpoint: Checkpoint,
    scenes: Sequence[Scene],
    device: torch.device,
    *,
    variants: int = VARIANTS,
    elsewhere: bool = False,
    strange: int = 0,
    workers: int = 0,
    cache: Path | None = None,
) -> World:
    """Draw and encode the scenes; all of it stays on the device.

    Args:
        variants: clips of each scene.
        elsewhere: whether every second clip of a scene begins where any motion begins, not only its own.
        strange: captions with unknown words for each scene, beside its own.
        workers: processes that draw.
        cache: folder where forms of one frame rate share what the VAE, which is theirs too, makes of the clips.
    """
    mean, std, image = _shared(
        lambda: _latents(checkpoint, scenes, device, variants, elsewhere, workers),
        cache and cache / f"world-{checkpoint.family.fps}fps-{len(scenes)}x{variants}{'-elsewhere' * elsewhere}.pt",
    )
    rng, tokenizer = np.random.default_rng(1), checkpoint.load_tokenizer()
    words = unknown_words(frozenset(tokenizer.get_vocab()))
    captions = [""]
    for scene in scenes:
        captions += [scene.caption, *(strange_caption(scene, rng, words) for _ in range(strange))]
    text_encoder = checkpoint.load_text_encoder(torch.float32).to(device)
    texts = []
    for start in range(0, len(captions), _ENCODED_AT_ONCE):
        tokens = tokenizer(
            captions[start : start + _ENCODED_AT_ONCE],
            padding="max_length",
            max_length=checkpoint.family.text_tokens,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        with torch.no_grad():
            texts.append(text_encoder(tokens.to(device))[0])
    empty_text_LD, *text = torch.cat(texts)
    return World(
        latent_mean_NCFHW=mean.to(device),
        latent_std_NCFHW=std.to(device),
        image_NCFHW=image.to(device) if checkpoint.family.task == "i2v" else None,
        text_STLD=torch.stack(text).unflatten(0, (len(scenes), 1 + strange)),
        empty_text_LD=empty_text_LD,
    )


Latents = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _latents(
    checkpoint: Checkpoint, scenes: Sequence[Scene], device: torch.device, variants: int, elsewhere: bool, workers: int
) -> Latents:
    """Means and deviations of the clips' latents, and the latents of their first frames."""
    vae, rng = checkpoint.load_vae(torch.float32).to(device), np.random.default_rng(0)
    moments = times(checkpoint.family)
    items = [
        (scene, moments, path_off(scene, rng, elsewhere=elsewhere and bool(variant % 2)))
        for scene in scenes
        for variant in range(variants)
    ]
    clips_NFHWC = draw_all(_drawn, items, workers)
    made: list[Latents] = []
    with torch.no_grad():
        for start in range(0, len(clips_NFHWC), _ENCODED_AT_ONCE):
            clip_BCFHW = to_tensor(clips_NFHWC[start : start + _ENCODED_AT_ONCE]).to(device)
            posterior = vae.encode(clip_BCFHW).latent_dist
            made.append((posterior.mean, posterior.std, vae.encode(clip_BCFHW[:, :, :1]).latent_dist.mean))
    mean, std, image = (torch.cat(parts) for parts in zip(*made, strict=True))
    return mean, std, image


def path_off(scene: Scene, rng: np.random.Generator, *, elsewhere: bool) -> tuple[float, float]:
    """By how many pixels, across and down, the path of a clip is moved: a few; elsewhere, to where any motion begins.

    Each motion begins at a place of its own. Were that always so, an I2V form would know the motion from the first
    frame, and in the end not listen to its caption at all: no LoRA could teach it another motion by a word.
    """
    across, down = rng.uniform(-OFF, OFF, 2)
    if elsewhere:
        (mine_x, mine_y, _), (x, y, _) = MOTIONS[scene.motion](0), MOTIONS[str(rng.choice([*MOTIONS]))](0)
        across, down = across + (x - mine_x) * NATIVE.width / 2, down + (y - mine_y) * NATIVE.height / 2
    return float(across), float(down)


def _shared(make: Callable[[], Latents], file: Path | None) -> Latents:
    """What ``make`` gives, made by the first of the processes that share the file."""
    if file is None:
        return make()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            made = make()
            scratch = file.with_suffix(f".{os.getpid()}")
            torch.save(tuple(tensor.cpu() for tensor in made), scratch)
            scratch.rename(file)
            return made
    mean, std, image = torch.load(file, map_location="cpu", weights_only=True)
    return mean, std, image


def _drawn(item: tuple[Scene, list[float], tuple[float, float]]) -> Frames:
    scene, moments, off = item
    return draw(scene, moments, NATIVE.height, NATIVE.width, off=off)
