"""The Triton kernels that `kernels.TritonKernels` launches.

Video is (T, H, W, C), contiguous. Pixel numbers fit into 32 bits; a pixel number times C does not at 81x768x1360 and
beyond. Of ``first`` and ``rest`` pixels are the first chunk and each other one.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sum_kernel(
    x, other, bias, parts, first, rest, C: tl.constexpr, ROWS: tl.constexpr, OTHER: tl.constexpr, STORE: tl.constexpr
):
    chunk = tl.program_id(1)
    start = tl.where(chunk == 0, 0, first + (chunk - 1) * rest)
    end = tl.where(chunk == 0, first, start + rest)
    channel = tl.arange(0, C)
    bias_C = tl.load(bias + channel).to(tl.float32)
    total = tl.zeros((ROWS, C), tl.float32)
    squares = tl.zeros((ROWS, C), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(end - start, ROWS), tl.num_programs(0)):
        row = start + block * ROWS + tl.arange(0, ROWS)
        inside = (row < end)[:, None]
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
    part = parts + (chunk * tl.num_programs(0) + tl.program_id(0)) * 2 * C + channel
    tl.store(part, tl.sum(total, axis=0))
    tl.store(part + C, tl.sum(squares, axis=0))


@triton.jit
def affine_kernel(
    parts, weight, norm_bias, bias, affine, programs, first, rest, eps,
    C: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Group g's norm of a chunk as a scale and a shift of each of its channels; the bias goes into the shift."""
    chunk = tl.program_id(1)
    pixels = tl.where(chunk == 0, first, rest)
    channel = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((BLOCK, WIDTH), tl.float32)
    squares = tl.zeros((BLOCK, WIDTH), tl.float32)
    for start in range(0, programs, BLOCK):
        row = start + tl.arange(0, BLOCK)
        inside = (row < programs)[:, None]
        at = (chunk * programs + row)[:, None] * (2 * C) + channel[None, :]
        total += tl.load(parts + at, mask=inside, other=0.0)
        squares += tl.load(parts + at + C, mask=inside, other=0.0)
    count = pixels.to(tl.float32) * WIDTH
    mean = tl.sum(tl.sum(total, axis=0), axis=0) / count
    variance = tl.sum(tl.sum(squares, axis=0), axis=0) / count - mean * mean
    scale = tl.load(weight + channel).to(tl.float32) / tl.sqrt(tl.maximum(variance, 0.0) + eps)
    shift = tl.load(norm_bias + channel).to(tl.float32) + scale * (tl.load(bias + channel).to(tl.float32) - mean)
    tl.store(affine + chunk * 2 * C + channel, scale)
    tl.store(affine + chunk * 2 * C + C + channel, shift)


@triton.jit
def norm_silu_kernel(
    x, affine, out, first, rest, C: tl.constexpr, ROWS: tl.constexpr, BACKWARDS: tl.constexpr
):  # fmt: skip
    """No block of pixels has two chunks; ``rest`` is 1 where there is one chunk."""
    block = tl.program_id(0)
    if BACKWARDS:
        block = tl.num_programs(0) - 1 - block
    behind = block - tl.cdiv(first, ROWS)  # the first chunk's blocks
    chunk = tl.where(behind < 0, 0, 1 + behind // tl.cdiv(rest, ROWS))
    start = tl.where(chunk == 0, 0, first + (chunk - 1) * rest)
    end = tl.where(chunk == 0, first, start + rest)
    block = tl.where(chunk == 0, block, behind % tl.cdiv(rest, ROWS))
    channel = tl.arange(0, C)
    row = start + block * ROWS + tl.arange(0, ROWS)
    inside = (row < end)[:, None]
    at = row.to(tl.int64)[:, None] * C + channel[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    scale, shift = affine + chunk * 2 * C + channel, affine + chunk * 2 * C + C + channel
    value = value * tl.load(scale)[None, :] + tl.load(shift)[None, :]
    tl.store(out + at, (value * tl.sigmoid(value)).to(out.dtype.element_ty), mask=inside)


@triton.jit
def first_kernel(
    video, weight, bias, out, parts, first, rest, frames, height, width,
    C: tl.constexpr, INPUTS: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of each of three frames a block of pixels gathers its taps, (ROWS, TAPS), for a product with (TAPS, C)."""
    chunk = tl.program_id(1)
    start = tl.where(chunk == 0, 0, first + (chunk - 1) * rest)
    end = tl.where(chunk == 0, first, start + rest)
    tap = tl.arange(0, TAPS)
    right, below = tap // INPUTS % 3 - 1, tap // (3 * INPUTS) - 1
    shift = (tap % INPUTS * frames * height + below) * width + right
    channel = tl.arange(0, C)
    weight += tap[:, None] * C + channel[None, :]
    first_KC, second_KC, third_KC = tl.load(weight), tl.load(weight + TAPS * C), tl.load(weight + 2 * TAPS * C)
    frame = height * width
    bias_C = tl.load(bias + channel).to(tl.float32)
    total = tl.zeros((C,), tl.float32)
    squares = tl.zeros((C,), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(end - start, ROWS), tl.num_programs(0)):
        row = start + block * ROWS + tl.arange(0, ROWS)
        across, down = (row % width)[:, None] + right[None, :], (row // width % height)[:, None] + below[None, :]
        inside = (row < end)[:, None]
        there = inside & (tap < 9 * INPUTS)[None, :] & (across >= 0) & (across < width) & (down >= 0) & (down < height)
        at = video + row[:, None] + shift[None, :]
        value = tl.dot(tl.load(at, mask=there, other=0.0), first_KC)
        value = tl.dot(tl.load(at + frame, mask=there, other=0.0), second_KC, value)
        value = tl.dot(tl.load(at + 2 * frame, mask=there, other=0.0), third_KC, value)
        rounded = value.to(out.dtype.element_ty)
        tl.store(out + row.to(tl.int64)[:, None] * C + channel[None, :], rounded, mask=inside)
        value = tl.where(inside, rounded.to(tl.float32) + bias_C[None, :], 0.0)
        total += tl.sum(value, axis=0)
        squares += tl.sum(value * value, axis=0)
    part = parts + (chunk * tl.num_programs(0) + tl.program_id(0)) * 2 * C + channel
    tl.store(part, total)
    tl.store(part + C, squares)


@triton.jit
def add_pool_kernel(
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
