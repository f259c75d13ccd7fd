import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch

from cogcommon.tiny import VAE_CONFIG
from cogtrain.pretrain.vae import batch_at, export_vae, psnr, scale_latents, start_as_thumbnail, unseen_clips, wild_clip


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return diffusers.AutoencoderKLCogVideoX(**VAE_CONFIG)


def test_the_start_is_a_thumbnail_that_keeps_place_and_colour(vae):
    still = torch.full((1, 3, 1, 64, 96), -0.5)
    still[:, 0, :, 16:48, 48:80] = 1  # a red square
    with torch.no_grad():
        torch_default = vae.decode(vae.encode(still).latent_dist.mean).sample
        start_as_thumbnail(vae)
        decoded = vae.decode(vae.encode(still).latent_dist.mean).sample

    def likeness(image):
        return float(torch.corrcoef(torch.stack([image.flatten(), still.flatten()]))[0, 1])

    assert likeness(decoded) > 0.85
    assert abs(likeness(torch_default)) < 0.5


def test_the_clips_of_a_step_come_from_seed_and_step_alone():
    assert torch.equal(batch_at(0.9, 4, 3), batch_at(0.9, 4, 3))
    assert not torch.equal(batch_at(0.9, 4, 3), batch_at(0.9, 4, 4))
    clip = wild_clip(np.random.default_rng(0), 5, 32, 48)
    assert clip.shape == (5, 32, 48, 3) and (clip[0] != clip[-1]).any()
    assert batch_at(0.5, 0, 0).abs().max() <= 1


def test_the_file_holds_even_latents_and_shows_the_same_frames(vae, tmp_path):
    start_as_thumbnail(vae)
    clip = unseen_clips(1, 0)[0]
    before = psnr(vae, clip)
    export_vae(vae, tmp_path, steps=1, lr=0.1, seed=0, clips=1)
    assert "| the unseen shape |" in (tmp_path / "tiny_vae.md").read_text()
    read = diffusers.AutoencoderKLCogVideoX(**VAE_CONFIG)
    read.load_state_dict(safetensors.torch.load_file(tmp_path / "tiny_vae.safetensors"))
    assert abs(psnr(read, clip) - before) < 0.2
    with torch.no_grad():
        latent = read.encode(batch_at(0.9, 1, 5)).latent_dist.mean
    assert 0.7 < latent.square().mean() < 2


def test_scaled_latents_decode_to_the_same_frames(vae):
    start_as_thumbnail(vae)
    clip = batch_at(0.5, 1, 0)
    scale = torch.linspace(0.5, 2, 16)
    with torch.no_grad():
        before = vae.encode(clip).latent_dist
        shown = vae.decode(before.mean).sample
        scale_latents(vae, scale)
        after = vae.encode(clip).latent_dist
        assert torch.allclose(after.mean, before.mean * scale[:, None, None, None], atol=1e-4)
        assert torch.allclose(after.std, before.std * scale[:, None, None, None], rtol=1e-3)
        assert torch.allclose(vae.decode(after.mean).sample, shown, atol=1e-3)
