import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch

from cogcommon.model.tiny import VAE_CONFIG
from workshop.pretrain.clips import draw_all, mixed_clip, to_tensor, unseen_clips, wild_clip
from workshop.pretrain.vae import STAGES, export_vae, inputs_at, psnr, scale_latents, start_as_thumbnail


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
    pool = torch.from_numpy(draw_all(mixed_clip, [(0, index) for index in range(3)], workers=0))
    step = {"batch": 2, "seed": 3}
    for progress, frames, times_as_many in STAGES:
        clip, noise = inputs_at(pool, 4, progress, **step)
        assert clip.shape == (2 * times_as_many, 3, frames, 64, 96) and clip.abs().max() <= 1
        assert noise.shape == (2 * times_as_many, 16, (frames + 3) // 4, 8, 12)
        assert all(map(torch.equal, (clip, noise), inputs_at(pool, 4, progress, **step)))
        assert not torch.equal(noise, inputs_at(pool, 5, progress, **step)[1])
    assert any(torch.equal(clip[0], to_tensor(whole[None].numpy())[0]) for whole in pool)
    clip = wild_clip(np.random.default_rng(0), 5, 32, 48)
    assert clip.shape == (5, 32, 48, 3) and (clip[0] != clip[-1]).any()


def test_processes_draw_what_one_draws():
    seeds = [(1, index) for index in range(3)]
    assert (draw_all(mixed_clip, seeds, workers=1) == draw_all(mixed_clip, seeds, workers=0)).all()


def test_the_file_holds_even_latents_and_shows_the_same_frames(vae, tmp_path):
    start_as_thumbnail(vae)
    clip = unseen_clips(1, 0)[0]
    before = psnr(vae, clip)
    made = {"steps": 1, "minutes": 0.1, "batch": 1, "pool": 1, "command": "python -m workshop.pretrain vae"}
    export_vae(vae, tmp_path, seed=0, made=made, clips=1)
    assert "| the unseen shape |" in (tmp_path / "vae.md").read_text()
    read = diffusers.AutoencoderKLCogVideoX(**VAE_CONFIG)
    read.load_state_dict(safetensors.torch.load_file(tmp_path / "vae.safetensors"))
    assert abs(psnr(read, clip) - before) < 0.2
    with torch.no_grad():
        latent = read.encode(to_tensor(mixed_clip((5, 1))[None])).latent_dist.mean
    assert 0.7 < latent.square().mean() < 2


def test_scaled_latents_decode_to_the_same_frames(vae):
    start_as_thumbnail(vae)
    clip = to_tensor(mixed_clip((0, 1))[None, :9])
    scale = torch.linspace(0.5, 2, 16)
    with torch.no_grad():
        before = vae.encode(clip).latent_dist
        shown = vae.decode(before.mean).sample
        scale_latents(vae, scale)
        after = vae.encode(clip).latent_dist
        assert torch.allclose(after.mean, before.mean * scale[:, None, None, None], atol=1e-4)
        assert torch.allclose(after.std, before.std * scale[:, None, None, None], rtol=1e-3)
        assert torch.allclose(vae.decode(after.mean).sample, shown, atol=1e-3)
