import numpy as np
import pytest
import torch

from cogcommon.model.checkpoint import open_checkpoint
from cogcommon.model.families import BY_NAME
from cogcommon.model.tiny import NATIVE
from workshop.scenes import BACKGROUNDS, Scene, draw


@pytest.fixture(scope="module")
def clips():
    """Stars, which the VAE was never shown."""
    times = [index / 16 for index in range(17)]
    motions = ["moves from left to right", "falls from top to bottom", "grows slowly", "circles around the centre"]
    chosen = zip(["red", "yellow", "blue", "purple"], motions, BACKGROUNDS, strict=True)
    return torch.cat([as_input(draw(Scene("star", *parts), times, NATIVE.height, NATIVE.width)) for parts in chosen])


def as_input(clip_FHWC):
    return torch.from_numpy(clip_FHWC).permute(3, 0, 1, 2)[None].float() / 127.5 - 1


@torch.no_grad()
def psnr(vae, clips):
    found = []
    for clip in clips:
        decoded = vae.decode(vae.encode(clip[None]).latent_dist.mean).sample.clamp(-1, 1)
        found.append(-10 * np.log10(float((decoded[0] - clip).square().mean()) / 4))
    return found


def test_the_trained_vae_keeps_clips_it_has_never_seen(clips):
    assert np.mean(psnr(open_checkpoint("tiny").load_vae(torch.float32), clips)) >= 27.5
    assert psnr(open_checkpoint("random-tiny").load_vae(torch.float32), clips[:1])[0] < 15


@pytest.mark.parametrize("name", ["5b", "2b"])
def test_the_factor_of_the_family_makes_latents_of_about_unit_variance(clips, name):
    vae = open_checkpoint(BY_NAME[name].builtin).load_vae(torch.float32)
    with torch.no_grad():
        posterior = vae.encode(clips[:2]).latent_dist
    scaled = posterior.mean * BY_NAME[name].scaling_factor
    assert 0.7 < scaled.square().mean().sqrt() < 1.4
    assert posterior.std.mean() * BY_NAME[name].scaling_factor < 0.5  # most of a latent is signal


def test_random_forms_open_by_name():
    checkpoint = open_checkpoint("random-tiny-2b")
    assert checkpoint.family.builtin == "tiny-2b"
    assert checkpoint.native == NATIVE
