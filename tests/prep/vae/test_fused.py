"""The fused encoder against diffusers' own: the same numbers, and diffusers' wherever it cannot be had."""

from __future__ import annotations

import math
import re
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLCogVideoX

from cogprep.vae import choice as encoder_choice
from cogprep.vae import convolve, fused
from cogprep.vae import encoder as encoder_module
from cogprep.vae.choice import Choice, use_fused_encoder
from cogprep.vae.chunks import Chunks, Together, bytes_together, chunks_of, together
from cogprep.vae.encoder import LatentEncoder
from cogprep.vae.fused import CannotFuse, FusedEncoder, Ways
from cogprep.vae.gpu_time import GpuTime, Span

CPU = torch.device("cpu")
WIDTHS = (16, 32, 32, 64)


def frames_of(chunks: Chunks) -> list[slice]:
    starts = [0, *(chunks.first + number * chunks.rest for number in range(chunks.more + 1))]
    return [slice(start, end) for start, end in pairwise(starts)]


class PlainKernels:
    """What `cogprep.vae.kernels.TritonKernels` computes, said in plain PyTorch, in fp32."""

    def sums(self, x_THWC, bias_C, chunks):
        y_PC = [(x_THWC[of].float() + bias_C).flatten(0, 2) for of in frames_of(chunks)]
        return torch.stack([torch.stack([y.sum(0), (y * y).sum(0)])[None] for y in y_PC])

    def add_(self, x_THWC, bias_C, other_THWC, chunks):
        x_THWC.copy_(x_THWC.float() + bias_C + (0 if other_THWC is None else other_THWC.float()))
        return self.sums(x_THWC, torch.zeros_like(bias_C), chunks)

    def norm_silu(self, x_THWC, bias_C, sums_NP2C, norm, out_THWC, chunks):
        for of in frames_of(chunks):
            y_1CTHW = (x_THWC[of].float() + bias_C).permute(3, 0, 1, 2)[None]
            y_1CTHW = F.group_norm(y_1CTHW, norm.num_groups, norm.weight.float(), norm.bias.float(), norm.eps)
            out_THWC[of] = F.silu(y_1CTHW)[0].permute(1, 2, 3, 0)

    def first(self, pixels_CTHW, weight_3KC, bias_C, chunks):
        weight = weight_3KC[:, : 9 * len(pixels_CTHW)].unflatten(1, (3, 3, -1)).permute(4, 3, 0, 1, 2)
        x_THWC = F.conv3d(pixels_CTHW[None], weight, padding=(0, 1, 1))[0].permute(1, 2, 3, 0).contiguous()
        return x_THWC, self.sums(x_THWC, bias_C, chunks)

    def add_pool(self, x_THWC, bias_C, other_THWC, *, halve_time):
        y_THWC = x_THWC.float() + bias_C + other_THWC.float()
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


@pytest.mark.parametrize("ways", [Ways(), Ways(bias_later=True), Ways(bias_later=True, first_kernel=True)], ids=str)
@pytest.mark.parametrize("wide, deep", [(1, 3), (2, 2), (2, 3), (3, 3)])
def test_chunks_that_go_together_give_what_diffusers_gives_of_one_after_the_other(vae, ways, wide, deep, monkeypatch):
    clip, encoder = pixels(25), FusedEncoder(vae.encoder, PlainKernels(), ways)
    with torch.inference_mode():
        found = encoder.clip(clip, vae.num_sample_frames_batch_size, Together(wide, deep))
        monkeypatch.setattr(convolve, "_LARGEST", 10 * 32 * 48 * 16)  # ten frames of the widest
        parts = encoder.clip(clip, vae.num_sample_frames_batch_size, Together(wide, deep))
    assert relative(found, moments(vae, clip)) < 1e-6 and relative(parts, moments(vae, clip)) < 1e-6


def test_as_many_chunks_go_together_as_memory_has_room_for():
    chunks = chunks_of(49, 8)
    assert chunks == Chunks(9, 8, 5) and chunks.halved().halved() == Chunks(3, 2, 5)
    assert list(chunks.passes(4)) == [(0, Chunks(9, 8, 3)), (33, Chunks(8, 8, 1))]
    assert chunks_of(1, 8) == Chunks(1) and chunks_of(10, 8) == Chunks(10)
    frame = 3 * 480 * 720 * 128 * 2
    assert together(chunks, 480, 720, 128, 2, 35 * frame) == Together(4, 6)
    assert together(chunks, 480, 720, 128, 2, 35 * frame - 1) == Together(3, 6)
    assert together(chunks, 480, 720, 128, 2, 10 * frame) == Together(1, 4)
    assert together(chunks, 480, 720, 128, 2, 0) == Together(1, 1)
    all_of_them = bytes_together(49, 480, 720, 128, 2)
    assert together(chunks, 480, 720, 128, 2, all_of_them) == together(chunks, 480, 720, 128, 2, 1e15) == Together(6, 6)
    assert together(chunks, 480, 720, 128, 2, all_of_them - 1) != Together(6, 6)


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
    monkeypatch.setattr(convolve, "_LARGEST", 4 * 32 * 48 * 16)  # four frames of the widest
    asked = []
    plain = convolve.F.conv3d
    monkeypatch.setattr(convolve.F, "conv3d", lambda x, *a, **k: asked.append(x.shape[2]) or plain(x, *a, **k))
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
    def norm_silu(self, x_THWC, bias_C, sums_NP2C, norm, out_THWC, chunks):
        super().norm_silu(x_THWC, bias_C, sums_NP2C, norm, out_THWC, chunks)
        out_THWC[0, 0] += 1  # one row of one frame


class NotANumber(PlainKernels):
    def add_(self, x_THWC, bias_C, other_THWC, chunks):
        return super().add_(x_THWC, bias_C * math.nan, other_THWC, chunks)


class NoCompiler(PlainKernels):
    def sums(self, x_THWC, bias_C, chunks):
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


class WrongFirst(PlainKernels):
    def first(self, pixels_CTHW, weight_3KC, bias_C, chunks):
        return super().first(pixels_CTHW, weight_3KC.flip(0), bias_C, chunks)


def test_the_plain_ways_are_used_where_others_are_not_right(monkeypatch, short_trial):
    vae = random_vae()
    wanted = moments(vae, pixels(9))
    monkeypatch.setitem(sys.modules, "cogprep.vae.kernels", SimpleNamespace(TritonKernels=WrongFirst))
    monkeypatch.setattr(fused, "WAYS", Ways(together=True, bias_later=True, first_kernel=True))
    assert use_fused_encoder(vae, CPU).encoder == "fused" and vae.encoder.ways == Ways()
    assert relative(moments(vae, pixels(9)), wanted) < 1e-6


class WrongPicture(PlainKernels):
    def first(self, pixels_CTHW, weight_3KC, bias_C, chunks):
        wrong = 2 * weight_3KC if chunks.frames == 1 else weight_3KC
        return super().first(pixels_CTHW, wrong, bias_C, chunks)


def test_a_picture_is_tried_as_well_as_a_clip(monkeypatch, short_trial):
    vae = random_vae()
    monkeypatch.setitem(sys.modules, "cogprep.vae.kernels", SimpleNamespace(TritonKernels=WrongPicture))
    assert use_fused_encoder(vae, CPU).encoder == "fused" and vae.encoder.ways == Ways()


def test_chunks_go_one_by_one_where_memory_is_too_short_for_more(monkeypatch):
    vae, asked = random_vae(), []
    frames_FHWC = (pixels(25)[0].permute(1, 2, 3, 0) * 127 + 128).to(torch.uint8).numpy()
    options = {"posterior": "moments", "tiling": "auto", "image_variants": 0, "seed": 0}
    encoder = LatentEncoder(vae, CPU, **options)
    wanted = encoder.encode("a", frames_FHWC, None).tensors
    encoder.choice, vae.encoder = Choice("fused"), FusedEncoder(vae.encoder, PlainKernels(), Ways(together=True))
    monkeypatch.setattr(encoder_module, "free_gpu_memory", lambda _device: 1e9)
    clip = FusedEncoder.clip

    def short(self, pixels, frames, together):
        asked.append(together)
        if together.wide > 1:
            raise torch.OutOfMemoryError
        return clip(self, pixels, frames, together)

    monkeypatch.setattr(FusedEncoder, "clip", short)
    for _ in range(2):
        found = encoder.encode("a", frames_FHWC, None)
    assert asked == [Together(3, 3), Together(), Together()] and not found.tiled
    assert all(relative(found.tensors[name], wanted[name]) < 1e-5 for name in wanted)


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
@pytest.mark.parametrize("ways", [Ways(), Ways(together=True, bias_later=True, first_kernel=True)], ids=str)
@pytest.mark.parametrize("dtype, most", [(torch.float32, 2e-3), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_triton_kernels_give_what_diffusers_gives(dtype, most, ways, monkeypatch):
    """On a GPU, Triton compiles for it; fp32 convolutions run in tf32 there."""
    monkeypatch.setattr(fused, "WAYS", ways)
    vae = random_vae((128, 256, 256, 512)).cuda().to(dtype)
    choice = use_fused_encoder(vae, torch.device("cuda"))
    assert choice.encoder == "fused" and vae.encoder.ways == ways, choice.why
    assert choice.difference < most
