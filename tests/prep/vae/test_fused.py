"""The fused encoder against diffusers' own: the same numbers, and diffusers' wherever it cannot be had."""

from __future__ import annotations

import math
import re
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLCogVideoX

from cogprep.vae import choice as encoder_choice
from cogprep.vae import fused
from cogprep.vae.choice import use_fused_encoder
from cogprep.vae.fused import CannotFuse, FusedEncoder
from cogprep.vae.gpu_time import GpuTime, Span

CPU = torch.device("cpu")
WIDTHS = (16, 32, 32, 64)


class PlainKernels:
    """What `cogprep.vae.kernels.TritonKernels` computes, said in plain PyTorch, in fp32."""

    def sums(self, x_THWC, bias_C):
        y_PC = (x_THWC.float() + bias_C.float()).flatten(0, 2)
        return torch.stack([y_PC.sum(0), (y_PC * y_PC).sum(0)])[None]

    def add_(self, x_THWC, bias_C, other_THWC):
        x_THWC.copy_(x_THWC.float() + bias_C.float() + (0 if other_THWC is None else other_THWC.float()))
        return self.sums(x_THWC, torch.zeros_like(bias_C))

    def norm_silu(self, x_THWC, bias_C, sums_P2C, norm, out_THWC):
        y_1CTHW = (x_THWC.float() + bias_C.float()).permute(3, 0, 1, 2)[None]
        y_1CTHW = F.group_norm(y_1CTHW, norm.num_groups, norm.weight.float(), norm.bias.float(), norm.eps)
        out_THWC.copy_(F.silu(y_1CTHW)[0].permute(1, 2, 3, 0))

    def add_pool(self, x_THWC, bias_C, other_THWC, *, halve_time):
        y_THWC = x_THWC.float() + bias_C.float() + other_THWC.float()
        if halve_time:
            odd = len(y_THWC) % 2
            rest = y_THWC[odd:]
            y_THWC = torch.cat([y_THWC[:odd], (rest[0::2] + rest[1::2]) / 2])
        return F.pad(y_THWC, (0, 0, 0, 1, 0, 1)).to(x_THWC.dtype)


def random_vae(widths=WIDTHS, **config) -> AutoencoderKLCogVideoX:
    """A VAE of random weights with everything that the real one has: deep blocks, shortcuts, biases."""
    torch.manual_seed(0)
    vae = AutoencoderKLCogVideoX(block_out_channels=widths, layers_per_block=2, norm_num_groups=8, **config)
    with torch.no_grad():
        for tensor in vae.parameters():
            tensor.copy_(torch.randn_like(tensor) / math.sqrt(tensor[0].numel() if tensor.ndim > 1 else 4))
    return vae.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def vae():
    return random_vae()


def pixels(frames: int, height: int = 32, width: int = 48) -> torch.Tensor:
    return torch.rand((1, 3, frames, height, width), generator=torch.Generator().manual_seed(1)) * 2 - 1


def moments(vae, clip: torch.Tensor, encoder=None) -> torch.Tensor:
    plain = vae.encoder
    try:
        vae.encoder = encoder or plain
        with torch.inference_mode():
            return vae.encode(clip).latent_dist.parameters
    finally:
        vae.encoder = plain


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.mark.parametrize("frames", [1, 9, 17, 25])
def test_it_gives_what_diffusers_gives(vae, frames):
    clip = pixels(frames)
    found = moments(vae, clip, FusedEncoder(vae.encoder, PlainKernels()))
    assert found.is_contiguous() and relative(found, moments(vae, clip)) < 1e-6


def test_it_gives_what_diffusers_gives_in_tiles(vae):
    clip = pixels(1, 256, 384)  # larger than a tile, which is 240x360
    whole = moments(vae, clip)
    vae.enable_tiling()
    try:
        tiled = moments(vae, clip)
        assert relative(whole, tiled) > 1e-3  # tiles are another result
        assert relative(moments(vae, clip, FusedEncoder(vae.encoder, PlainKernels())), tiled) < 1e-6
    finally:
        vae.disable_tiling()


def test_convolutions_in_pieces_give_the_same(vae, monkeypatch):
    monkeypatch.setattr(fused, "_LARGEST", 4 * 32 * 48 * 16)  # four frames of the widest
    asked = []
    convolve = fused.F.conv3d
    monkeypatch.setattr(fused.F, "conv3d", lambda x, *a, **k: asked.append(x.shape[2]) or convolve(x, *a, **k))
    found = moments(vae, pixels(17), FusedEncoder(vae.encoder, PlainKernels()))
    assert 4 in asked and 3 in asked
    assert relative(found, moments(vae, pixels(17))) < 1e-6


def test_in_bf16_it_is_as_near_to_fp32_as_diffusers_is(vae):
    clip = pixels(17)
    exact = moments(vae, clip)
    half = random_vae().to(torch.bfloat16)
    plain = relative(moments(half, clip.bfloat16()), exact)
    found = relative(moments(half, clip.bfloat16(), FusedEncoder(half.encoder, PlainKernels())), exact)
    assert 0 < found < 1.2 * plain


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda: random_vae((16, 24, 24, 24)), "no power of two"),
        (lambda: random_vae(act_fn="gelu"), "not SiLU"),
    ],
)
def test_another_architecture_is_refused(change, why):
    with pytest.raises(CannotFuse, match=why):
        FusedEncoder(change().encoder, PlainKernels())


@pytest.fixture
def short_trial(monkeypatch):
    monkeypatch.setattr(encoder_choice, "_trial_clip", lambda dtype, _device: pixels(9).to(dtype))


def test_it_is_used_where_it_proves_right(monkeypatch, short_trial):
    vae = random_vae()
    wanted = moments(vae, pixels(9))
    monkeypatch.setitem(sys.modules, "cogprep.vae.kernels", SimpleNamespace(TritonKernels=PlainKernels))
    choice = use_fused_encoder(vae, CPU)
    assert choice.encoder == "fused" and choice.difference < 1e-6 and not choice.why
    assert isinstance(vae.encoder, FusedEncoder) and relative(moments(vae, pixels(9)), wanted) < 1e-6


class WrongKernels(PlainKernels):
    def norm_silu(self, x_THWC, bias_C, sums_P2C, norm, out_THWC):
        super().norm_silu(x_THWC, bias_C, sums_P2C, norm, out_THWC)
        out_THWC[0, 0] += 1  # one row of one frame


class NotANumber(PlainKernels):
    def add_(self, x_THWC, bias_C, other_THWC):
        return super().add_(x_THWC, bias_C * math.nan, other_THWC)


class NoCompiler(PlainKernels):
    def sums(self, x_THWC, bias_C):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")


@pytest.mark.parametrize(
    "kernels, why",
    [
        (WrongKernels, r"% off on this GPU"),
        (NotANumber, "nan% off on this GPU"),
        (NoCompiler, r"^RuntimeError: Failed to find C compiler\.$"),
    ],
)
def test_diffusers_encoder_stays_where_it_does_not(monkeypatch, short_trial, kernels, why):
    vae = random_vae()
    plain = vae.encoder
    monkeypatch.setitem(sys.modules, "cogprep.vae.kernels", SimpleNamespace(TritonKernels=kernels))
    choice = use_fused_encoder(vae, CPU)
    assert choice.encoder == "diffusers" and vae.encoder is plain
    assert re.search(why, choice.why)


class At:
    """An event at a time in ms, on a GPU's clock."""

    def __init__(self, ms: float) -> None:
        self.ms = ms

    def elapsed_time(self, end: At) -> float:
        return end.ms - self.ms


def test_the_gpus_time_is_counted_between_clips_that_follow_each_other():
    time = GpuTime()
    assert time.share is None
    time.add(None)  # a CPU
    for begin, end, follows in [(1000, 1300, False), (1310, 1600, True), (5000, 5300, False), (5400, 5510, True)]:
        time.add(Span(At(begin), At(end), follows))
    assert time.busy_s == pytest.approx(1.0) and time.idle_s == pytest.approx(0.11)
    assert time.share == pytest.approx(1 / 1.11)
    time.pause()
    time.add(Span(At(9000), At(9100), True))
    assert time.idle_s == pytest.approx(0.11)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, most", [(torch.float32, 2e-3), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_triton_kernels_give_what_diffusers_gives(dtype, most):
    """On a GPU, Triton compiles for it; fp32 convolutions run in tf32 there."""
    vae = random_vae((128, 256, 256, 512)).cuda().to(dtype)
    choice = use_fused_encoder(vae, torch.device("cuda"))
    assert choice.encoder == "fused", choice.why
    assert choice.difference < most
