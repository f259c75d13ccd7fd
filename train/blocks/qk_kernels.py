"""`qk_norm` as Triton kernels: each number is read once and written once, in both directions.

A row is one head of one token. Everything is computed in fp32 and rounded once, when stored.
A kernel runs on the current CUDA device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 4096  # numbers that a program holds of each tensor at once
_PER_SM = 8  # programs of a multiprocessor that share a sum


def forward(
    x_BSHD: torch.Tensor, added_BSHD: torch.Tensor | None, weight_D: torch.Tensor, bias_D: torch.Tensor,
    cos_SD: torch.Tensor | None, sin_SD: torch.Tensor | None, skip: int, eps: float,
) -> torch.Tensor:  # fmt: skip
    """See `qk_norm.qk_norm`."""
    x, added = x_BSHD.contiguous(), x_BSHD if added_BSHD is None else added_BSHD.contiguous()
    out = torch.empty_like(x)
    _, tokens, heads, width = x.shape
    rows = x.numel() // width
    block = max(1, _BLOCK // width)
    _forward_kernel[(triton.cdiv(rows, block),)](
        x, added, weight_D, bias_D, *_tables(cos_SD, sin_SD, x), out, rows, tokens, skip, eps,
        HEADS=heads, D=width, ROWS=block, ADDED=added_BSHD is not None, ROTARY=cos_SD is not None,
    )  # fmt: skip
    return out


def backward(
    grad_BSHD: torch.Tensor, x_BSHD: torch.Tensor, added_BSHD: torch.Tensor | None, weight_D: torch.Tensor,
    cos_SD: torch.Tensor | None, sin_SD: torch.Tensor | None, skip: int, eps: float, sums: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """See `qk_norm.qk_norm_backward`."""
    grad, x = grad_BSHD.contiguous(), x_BSHD.contiguous()
    added = x if added_BSHD is None else added_BSHD.contiguous()
    out = torch.empty_like(x)
    _, tokens, heads, width = x.shape
    rows = x.numel() // width
    block = max(1, _BLOCK // width)
    programs = triton.cdiv(rows, block)
    if sums:
        programs = min(programs, _PER_SM * torch.cuda.get_device_properties(x.device).multi_processor_count)
    parts_P2D = x.new_empty((programs if sums else 1, 2, width), dtype=torch.float32)
    _backward_kernel[(programs,)](
        grad, x, added, weight_D, *_tables(cos_SD, sin_SD, x), out, parts_P2D, rows, tokens, skip, eps,
        HEADS=heads, D=width, ROWS=block, ADDED=added_BSHD is not None, ROTARY=cos_SD is not None, SUMS=sums,
    )  # fmt: skip
    return out, parts_P2D.sum(0) if sums else parts_P2D[0]


def _tables(
    cos_SD: torch.Tensor | None, sin_SD: torch.Tensor | None, instead: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    if cos_SD is None or sin_SD is None:
        return instead, instead  # never read
    return cos_SD.contiguous(), sin_SD.contiguous()


# Row numbers fit into 32 bits; a row number times D does not at 81x768x1360 and a batch of some samples.


@triton.jit
def _normalised(x, added, at, inside, eps, D: tl.constexpr, ADDED: tl.constexpr):
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if ADDED:
        value += tl.load(added + at, mask=inside, other=0.0).to(tl.float32)
    value = value - (tl.sum(value, axis=1) / D)[:, None]
    scale = 1.0 / tl.sqrt(tl.sum(value * value, axis=1) / D + eps)
    return value * scale[:, None], scale


@triton.jit
def _turned(value, D: tl.constexpr, ROWS: tl.constexpr, SIGN: tl.constexpr):
    """Each pair (a, b) of the first, turned a quarter: (-b, a); the other way round for a sign of -1."""
    real, imaginary = tl.split(tl.reshape(value, (ROWS, D // 2, 2)))
    return tl.reshape(tl.join(-SIGN * imaginary, SIGN * real), (ROWS, D))


@triton.jit
def _angles(cos, sin, row, inside, tokens, skip, HEADS: tl.constexpr, D: tl.constexpr):
    place = (row // HEADS) % tokens - skip
    at = place[:, None] * D + tl.arange(0, D)[None, :]
    there = inside & (place >= 0)[:, None]
    return tl.load(cos + at, mask=there, other=1.0), tl.load(sin + at, mask=there, other=0.0)


@triton.jit
def _forward_kernel(
    x, added, weight, bias, cos, sin, out, rows, tokens, skip, eps,
    HEADS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, ADDED: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, D)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None]
    at = row.to(tl.int64)[:, None] * D + column[None, :]
    value, _ = _normalised(x, added, at, inside, eps, D, ADDED)
    value = value * tl.load(weight + column).to(tl.float32)[None, :] + tl.load(bias + column).to(tl.float32)[None, :]
    if ROTARY:
        cosine, sine = _angles(cos, sin, row, inside, tokens, skip, HEADS, D)
        value = value * cosine + _turned(value, D, ROWS, 1) * sine
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grad, x, added, weight, cos, sin, out, parts, rows, tokens, skip, eps,
    HEADS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, ADDED: tl.constexpr, ROTARY: tl.constexpr,
    SUMS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, D)
    scale_D = tl.load(weight + column).to(tl.float32)[None, :]
    of_weight = tl.zeros((ROWS, D), tl.float32)
    of_bias = tl.zeros((ROWS, D), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = block * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None]
        at = row.to(tl.int64)[:, None] * D + column[None, :]
        normalised, scale = _normalised(x, added, at, inside, eps, D, ADDED)
        value = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        if ROTARY:  # the transposed rotation; sine first, as each entry of a pair had its own
            cosine, sine = _angles(cos, sin, row, inside, tokens, skip, HEADS, D)
            value = value * cosine + _turned(value * sine, D, ROWS, -1)
        if SUMS:
            of_weight += value * normalised
            of_bias += value
        value = value * scale_D
        mean = tl.sum(value, axis=1) / D
        along = tl.sum(value * normalised, axis=1) / D
        value = (value - mean[:, None] - normalised * along[:, None]) * scale[:, None]
        tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)
    if SUMS:
        part = parts + tl.program_id(0) * 2 * D + column
        tl.store(part, tl.sum(of_weight, axis=0))
        tl.store(part + D, tl.sum(of_bias, axis=0))
