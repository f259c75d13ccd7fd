"""The VAE wrapper: tiles only when memory asks for them, and noise of a sample's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cogcommon.errors import SettingError
from cogcommon.model.checkpoint import open_checkpoint
from cogprep.vae.encoder import LatentEncoder, generator_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vae():
    return open_checkpoint("tiny").load_vae(torch.float32)


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    """One frame, as of an image: larger than a tile (240x360), and quick."""
    return np.random.default_rng(0).integers(0, 255, (1, 256, 384, 3), np.uint8)


def encoder(vae, tiling: str, **options) -> LatentEncoder:
    return LatentEncoder(
        vae, CPU, **({"posterior": "moments", "tiling": tiling, "image_variants": 2, "seed": 1} | options)
    )


class ShortOfMemory:
    """The real VAE on a machine whose memory ends at a given number of pixels a frame."""

    def __init__(self, vae, pixels: int) -> None:
        self._vae, self._pixels = vae, pixels
        self.refused = 0

    def __getattr__(self, name: str):
        return getattr(self._vae, name)

    def encode(self, pixels: torch.Tensor):
        tile = 240 * 360 if self._vae.use_tiling else pixels.shape[-1] * pixels.shape[-2]
        if tile > self._pixels:
            self.refused += 1
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        return self._vae.encode(pixels)


def test_tiles_change_the_latents_and_say_so(vae, frames):
    whole = encoder(vae, "off").encode("k", frames, None)
    auto = encoder(vae, "auto").encode("k", frames, None)
    tiled = encoder(vae, "on").encode("k", frames, None)
    assert not whole.tiled and not auto.tiled and tiled.tiled
    assert torch.equal(whole.tensors["latent_mean"], auto.tensors["latent_mean"])
    assert whole.tensors["latent_mean"].shape == tiled.tensors["latent_mean"].shape
    assert not torch.equal(whole.tensors["latent_mean"], tiled.tensors["latent_mean"])
    small = encoder(vae, "on").encode("k", frames[:, :64, :96], None)
    assert not small.tiled  # one tile is no tiling


def test_auto_falls_back_to_tiles_once_a_size(vae, frames):
    short = ShortOfMemory(vae, 90_000)
    fallback = encoder(short, "auto")
    tiled = encoder(vae, "on").encode("k", frames, None)
    for _ in range(2):
        found = fallback.encode("k", frames, None)
        assert found.tiled and torch.equal(found.tensors["latent_mean"], tiled.tensors["latent_mean"])
    assert short.refused == 1
    assert not fallback.encode("k", frames[:, :64, :96], None).tiled


@pytest.mark.parametrize("tiling, pixels, fix", [("off", 90_000, "--tiling auto"), ("auto", 1, "smaller --resolution")])
def test_too_little_memory_is_one_message(vae, frames, tiling, pixels, fix):
    with pytest.raises(SettingError, match="too little memory for 1x256x384") as caught:
        encoder(ShortOfMemory(vae, pixels), tiling).encode("k", frames, None)
    assert fix in str(caught.value)


def test_another_error_is_no_shortage_of_memory(vae, frames):
    class Broken(ShortOfMemory):
        def encode(self, pixels):
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        encoder(Broken(vae, 1), "auto").encode("k", frames, None)


def test_noise_depends_on_seed_key_and_purpose_alone(vae, frames):
    small = frames[:, :32, :48]
    one = encoder(vae, "off").encode("k", small, small[0]).tensors
    assert torch.equal(one["image_mean"], encoder(vae, "off").encode("k", small, small[0]).tensors["image_mean"])
    for other in (
        encoder(vae, "off").encode("l", small, small[0]).tensors,
        encoder(vae, "off", seed=2).encode("k", small, small[0]).tensors,
    ):
        assert not torch.equal(one["image_mean"], other["image_mean"])
        assert torch.equal(one["image_clean_mean"], other["image_clean_mean"])
    assert not torch.equal(one["image_mean"][0], one["image_mean"][1])


def test_sigma_is_log_normal_around_exp_minus_three():
    sigmas = torch.stack(
        [torch.randn((), generator=generator_of(0, str(n), "image noise")) * 0.5 - 3.0 for n in range(2000)]
    )
    assert abs(sigmas.mean() + 3) < 0.04 and abs(sigmas.std() - 0.5) < 0.03


@pytest.mark.gpu
def test_clips_in_flight_are_what_they_are_alone(vae):
    """On a GPU: uploads, encodes and downloads of three clips overlap, images and their noise among them."""
    gpu = torch.device("cuda")
    options = {"posterior": "moments", "tiling": "auto", "image_variants": 2, "seed": 1}
    there = LatentEncoder(open_checkpoint("tiny").load_vae(torch.float32).to(gpu), gpu, **options)
    assert there.choice.encoder == "fused", there.choice.why
    generator = np.random.default_rng(0)
    clips = [generator.integers(0, 255, (17, 256, 384, 3), np.uint8) for _ in range(3)]
    pending = [there.start(str(index), clip, clip[0]) for index, clip in enumerate(clips)]
    found = [one.latents().tensors for one in pending]
    assert pending[0].warm_up_s > 0 and pending[1].warm_up_s == 0
    assert pending[0].span.begin.elapsed_time(pending[2].span.end) > 0
    plain = encoder(vae, "off")
    for index, (clip, tensors) in enumerate(zip(clips, found, strict=True)):
        wanted = plain.encode(str(index), clip, clip[0]).tensors
        assert wanted.keys() == tensors.keys()
        for name, tensor in wanted.items():
            error = (tensors[name] - tensor).norm() / tensor.norm()
            assert error < 5e-3, (index, name, error)  # convolutions in fp32 run in tf32 on a GPU
