"""Videos made during training are those of diffusers' pipelines."""

import numpy as np
import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline

from cogcommon.model.checkpoint import open_checkpoint
from cogcommon.model.families import BUILTIN_NAMES
from cogtrain.model.objective import Objective
from cogtrain.validation.videos import (
    DECODE_BYTES_PER_PIXEL,
    Conditions,
    decode_latents,
    denoise,
    load_decoder,
    scheduler_of,
    tile_within,
)


@pytest.mark.parametrize("name", BUILTIN_NAMES)
def test_the_video_is_the_pipelines(name):
    checkpoint = open_checkpoint(name)
    i2v = checkpoint.family.task == "i2v"
    cls = CogVideoXImageToVideoPipeline if i2v else CogVideoXPipeline
    pipeline = cls.from_pretrained(checkpoint.root)
    pipeline.scheduler = scheduler_of(checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.enable_slicing()
    objective = Objective.of(checkpoint)

    tokens, width = checkpoint.family.text_tokens, checkpoint.transformer_config["text_embed_dim"]
    draw = torch.Generator().manual_seed(0)
    text, empty = torch.randn(2, 1, tokens, width, generator=draw)
    noise = torch.randn(1, objective.family.padded_frames(5), 16, 8, 12, generator=draw)
    mine, theirs = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    conditions, options = {}, {}
    if i2v:
        picture = torch.rand(1, 3, 64, 96, generator=draw)
        options["image"] = picture
        with torch.no_grad():
            encoded = pipeline.vae.encode((picture * 2 - 1)[:, :, None]).latent_dist.sample(mine)
        conditions["image"] = encoded.transpose(1, 2)  # the pipeline draws it from the same generator, first
    expected = pipeline(
        prompt_embeds=text, negative_prompt_embeds=empty, latents=noise, num_frames=17, height=64, width=96,
        num_inference_steps=4, guidance_scale=6.0, use_dynamic_cfg=not checkpoint.family.ddim, generator=theirs,
        max_sequence_length=tokens, output_type="np", **options,
    ).frames[0]  # fmt: skip

    given = Conditions(noise, text, empty, conditions)
    latent = denoise(pipeline.transformer, objective, checkpoint, given, mine, torch.float32, steps=4)
    video = decode_latents(load_decoder(checkpoint, torch.float32), latent, 5)
    assert video.shape == (17, 64, 96, 3)
    assert np.abs(video.astype(int) - (expected * 255).round()).max() <= 1


def test_guidance_and_the_caption_matter():
    checkpoint = open_checkpoint("tiny")
    transformer, objective = checkpoint.load_transformer(torch.float32), Objective.of(checkpoint)
    draw = torch.Generator().manual_seed(0)
    text, other, empty = torch.randn(3, 1, 226, 64, generator=draw)
    noise = torch.randn(1, 5, 16, 8, 12, generator=draw)

    def drawn(text, guidance):
        conditions = Conditions(noise, text, empty, {})
        generator = torch.Generator().manual_seed(1)
        return denoise(
            transformer, objective, checkpoint, conditions, generator, torch.float32, steps=2, guidance=guidance
        )

    assert (drawn(text, 6.0) - drawn(text, 1.0)).abs().max() > 1e-3
    assert (drawn(text, 6.0) - drawn(other, 6.0)).abs().max() > 1e-3
    assert torch.equal(drawn(text, 6.0), drawn(text, 6.0))


def test_tiles_are_as_large_as_there_is_room_for_and_fit_together():
    """Tiles whose overlap is no whole number of latents come out shifted, and of another size together."""
    tiles = [tile_within(room) for room in (10**10, 2 * 10**9, 10**9, 0)]
    assert tiles[0] == (240, 360) and tiles[2] == tiles[3]  # diffusers' own; none smaller
    for tile, room in zip(tiles[:3], (10**10, 2 * 10**9, 10**9), strict=True):
        assert tile[0] * tile[1] * DECODE_BYTES_PER_PIXEL <= room
    vae = load_decoder(open_checkpoint("tiny"), torch.float32)
    small = torch.randn(1, 16, 3, 4, generator=torch.Generator().manual_seed(0))
    latent_BCFHW = torch.nn.functional.interpolate(small, (13, 26))[:, :, None]
    with torch.no_grad():
        whole = vae.decode(latent_BCFHW).sample
        for tile in tiles[1:3]:  # two and four of them
            vae.enable_tiling(*tile)
            tiled = vae.decode(latent_BCFHW).sample
            assert tiled.shape == whole.shape
            assert (tiled - whole).square().mean() < 0.05 * whole.var()
