"""Triton kernels for the work between the VAE encoder's convolutions, on channels-last video.

PyTorch runs group norm, SiLU, bias, residual and padding as a kernel each, and
group norm copies channels-last tensors first. Here a tensor is read once for its
sums and once to be normalised, activated and laid into the next convolution's
input. Everything is computed in fp32 and rounded once, when stored.

Tensors are contiguous (T, H, W, C) with C a power of two. A kernel runs on the
current CUDA device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 4096  # values a program holds at once: 4 loads of 16 bytes a thread in bf16
_PER_SM = 4  # programs a multiprocessor that share a sum: 32 KB in flight each


class TritonKernels:
    """The four steps that `fused.FusedEncoder` needs beside convolutions."""

    def sums(self, x_THWC: torch.Tensor, bias_C: torch.Tensor) -> torch.Tensor:
        """Sums and sums of squares of x + bias, by channel, in parts: (programs, 2, C) fp32."""
        return self._sums(x_THWC, bias_C, None, store=False)

    def add_(self, x_THWC: torch.Tensor, bias_C: torch.Tensor, other_THWC: torch.Tensor | None) -> torch.Tensor:
        """x += bias + other, in place; returns the sums of the result as `sums` does."""
        return self._sums(x_THWC, bias_C, other_THWC, store=True)

    def _sums(
        self, x_THWC: torch.Tensor, bias_C: torch.Tensor, other_THWC: torch.Tensor | None, *, store: bool
    ) -> torch.Tensor:
        channels = x_THWC.shape[-1]
        pixels = x_THWC.numel() // channels
        rows = max(1, _BLOCK // channels)
        programs = min(triton.cdiv(pixels, rows), _PER_SM * _multiprocessors(x_THWC.device))
        parts_P2C = torch.empty((programs, 2, channels), dtype=torch.float32, device=x_THWC.device)
        _sum_kernel[(programs,)](
            x_THWC,
            x_THWC if other_THWC is None else other_THWC,
            bias_C,
            parts_P2C,
            pixels,
            C=channels,
            ROWS=rows,
            OTHER=other_THWC is not None,
            STORE=store,
        )
        return parts_P2C

    def norm_silu(
        self,
        x_THWC: torch.Tensor,
        bias_C: torch.Tensor,
        sums_P2C: torch.Tensor,
        norm: torch.nn.GroupNorm,
        out_THWC: torch.Tensor,
    ) -> None:
        """out = silu(group_norm(x + bias)), given the sums of x + bias."""
        programs, _, channels = sums_P2C.shape
        pixels = x_THWC.numel() // channels
        width = channels // norm.num_groups
        affine_2C = torch.empty((2, channels), dtype=torch.float32, device=x_THWC.device)
        _affine_kernel[(norm.num_groups,)](
            sums_P2C,
            norm.weight,
            norm.bias,
            bias_C,
            affine_2C,
            programs,
            1.0 / (pixels * width),
            norm.eps,
            C=channels,
            WIDTH=width,
            BLOCK=128,
        )
        rows = max(1, _BLOCK // channels)
        _norm_silu_kernel[(triton.cdiv(pixels, rows),)](x_THWC, affine_2C, out_THWC, pixels, C=channels, ROWS=rows)

    def add_pool(
        self, x_THWC: torch.Tensor, bias_C: torch.Tensor, other_THWC: torch.Tensor, *, halve_time: bool
    ) -> torch.Tensor:
        """x + bias + other, averaged over pairs of frames, with a row and a column of zeros at the end.

        An odd first frame stays alone, as in diffusers' CogVideoXDownsample3D.

        Returns:
            (T', H+1, W+1, C), T' = ceil(T / 2) if ``halve_time`` else T.
        """
        frames, height, width, channels = x_THWC.shape
        frames_out = (frames + 1) // 2 if halve_time else frames
        out_THWC = x_THWC.new_empty((frames_out, height + 1, width + 1, channels))
        rows = max(1, _BLOCK // channels)
        pixels = frames_out * (height + 1) * (width + 1)
        _add_pool_kernel[(triton.cdiv(pixels, rows),)](
            x_THWC,
            other_THWC,
            bias_C,
            out_THWC,
            pixels,
            height,
            width,
            C=channels,
            ROWS=rows,
            HALVE=halve_time,
            ODD=frames % 2 == 1,
        )
        return out_THWC


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


# Pixel numbers fit into 32 bits; a pixel number times C does not at 81x768x1360 and beyond.


@triton.jit
def _sum_kernel(
    x, other, bias, parts, pixels, C: tl.constexpr, ROWS: tl.constexpr, OTHER: tl.constexpr, STORE: tl.constexpr
):
    channel = tl.arange(0, C)
    bias_C = tl.load(bias + channel).to(tl.float32)
    total = tl.zeros((ROWS, C), tl.float32)
    squares = tl.zeros((ROWS, C), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(pixels, ROWS), tl.num_programs(0)):
        row = block * ROWS + tl.arange(0, ROWS)
        inside = (row < pixels)[:, None]
        at = row.to(tl.int64)[:, None] * C + channel[None, :]
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + bias_C[None, :]
        if OTHER:
            value += tl.load(other + at, mask=inside, other=0.0).to(tl.float32)
        if STORE:
            rounded = value.to(x.dtype.element_ty)
            tl.store(x + at, rounded, mask=inside)
            value = rounded.to(tl.float32)
        value = tl.where(inside, value, 0.0)
        total += value
        squares += value * value
    part = parts + tl.program_id(0) * 2 * C + channel
    tl.store(part, tl.sum(total, axis=0))
    tl.store(part + C, tl.sum(squares, axis=0))


@triton.jit
def _affine_kernel(
    parts, weight, norm_bias, bias, affine, programs, share, eps,
    C: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Group g's norm as a scale and a shift of each of its channels; the pending bias goes into the shift."""
    channel = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((BLOCK, WIDTH), tl.float32)
    squares = tl.zeros((BLOCK, WIDTH), tl.float32)
    for start in range(0, programs, BLOCK):
        row = start + tl.arange(0, BLOCK)
        inside = (row < programs)[:, None]
        at = row[:, None] * (2 * C) + channel[None, :]
        total += tl.load(parts + at, mask=inside, other=0.0)
        squares += tl.load(parts + at + C, mask=inside, other=0.0)
    mean = tl.sum(tl.sum(total, axis=0), axis=0) * share
    variance = tl.sum(tl.sum(squares, axis=0), axis=0) * share - mean * mean
    scale = tl.load(weight + channel).to(tl.float32) / tl.sqrt(tl.maximum(variance, 0.0) + eps)
    shift = tl.load(norm_bias + channel).to(tl.float32) + scale * (tl.load(bias + channel).to(tl.float32) - mean)
    tl.store(affine + channel, scale)
    tl.store(affine + C + channel, shift)


@triton.jit
def _norm_silu_kernel(x, affine, out, pixels, C: tl.constexpr, ROWS: tl.constexpr):
    channel = tl.arange(0, C)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (row < pixels)[:, None]
    at = row.to(tl.int64)[:, None] * C + channel[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    value = value * tl.load(affine + channel)[None, :] + tl.load(affine + C + channel)[None, :]
    tl.store(out + at, (value * tl.sigmoid(value)).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_pool_kernel(
    x, other, bias, out, pixels, height, width,
    C: tl.constexpr, ROWS: tl.constexpr, HALVE: tl.constexpr, ODD: tl.constexpr,
):  # fmt: skip
    channel = tl.arange(0, C)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    across = row % (width + 1)
    down = (row // (width + 1)) % (height + 1)
    frame = row // ((width + 1) * (height + 1))
    inside = ((row < pixels) & (across < width) & (down < height))[:, None]
    first = frame
    if HALVE:
        first = tl.maximum(2 * frame - 1, 0) if ODD else 2 * frame
    place = (first * height + down) * width + across
    at = place.to(tl.int64)[:, None] * C + channel[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(other + at, mask=inside, other=0.0).to(tl.float32)
    if HALVE:
        second = 2 * frame if ODD else 2 * frame + 1  # the odd first frame is averaged with itself
        place = (second * height + down) * width + across
        at = place.to(tl.int64)[:, None] * C + channel[None, :]
        twin = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        twin += tl.load(other + at, mask=inside, other=0.0).to(tl.float32)
        value = 0.5 * (value + twin)
    value = tl.where(inside, value + tl.load(bias + channel).to(tl.float32)[None, :], 0.0)
    at = row.to(tl.int64)[:, None] * C + channel[None, :]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=(row < pixels)[:, None])
