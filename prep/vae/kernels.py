"""The work between the VAE encoder's convolutions, on channels-last video, in Triton (the kernels: `steps`).

PyTorch runs group norm, SiLU, bias, residual and padding as a kernel each, and
group norm copies channels-last tensors first. Here a tensor is read once for its
sums and once to be normalised, activated and laid into the next convolution's
input. Everything is computed in fp32 and rounded once, when stored.

Tensors are contiguous (T, H, W, C) with C a power of two. A kernel runs on the
current CUDA device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from .chunks import Chunks
from .steps import add_pool_kernel, affine_kernel, first_kernel, norm_silu_kernel, sum_kernel


@dataclass(frozen=True)
class TritonKernels:
    """The steps that `fused.FusedEncoder` needs beside convolutions.

    Attributes:
        block: values that a program holds at once; 4096 by 4 warps are 4 loads of 16 bytes a thread in bf16.
        warps: of 32 threads, of a program.
        per_sm: programs a multiprocessor that share a sum.
        backwards: norms begin with the last pixels, which the sums before them have left in the L2 cache.
        first_rows, first_warps: pixels and warps of a program of the first convolution.
    """

    block: int = 4096
    warps: int = 4
    per_sm: int = 4
    backwards: bool = True
    first_rows: int = 32  # 128 registers a thread on Hopper
    first_warps: int = 4

    def sums(self, x_THWC: torch.Tensor, bias_C: torch.Tensor, chunks: Chunks) -> torch.Tensor:
        """Sums and sums of squares of x + bias, by chunk and channel, in parts: (chunks, programs, 2, C) fp32."""
        return self._sums(x_THWC, bias_C, None, chunks, store=False)

    def add_(
        self, x_THWC: torch.Tensor, bias_C: torch.Tensor, other_THWC: torch.Tensor | None, chunks: Chunks
    ) -> torch.Tensor:
        """x += bias + other, in place; returns the sums of the result as `sums` does."""
        return self._sums(x_THWC, bias_C, other_THWC, chunks, store=True)

    def _sums(
        self,
        x_THWC: torch.Tensor,
        bias_C: torch.Tensor,
        other_THWC: torch.Tensor | None,
        chunks: Chunks,
        *,
        store: bool,
    ) -> torch.Tensor:
        channels, first, rest = x_THWC.shape[-1], *_pixels(x_THWC, chunks)
        rows = max(1, self.block // channels)
        programs = self._programs(triton.cdiv(max(first, rest), rows), chunks, x_THWC.device)
        parts_NP2C = torch.empty((chunks.count, programs, 2, channels), dtype=torch.float32, device=x_THWC.device)
        sum_kernel[(programs, chunks.count)](
            x_THWC,
            x_THWC if other_THWC is None else other_THWC,
            bias_C,
            parts_NP2C,
            first,
            rest,
            C=channels,
            ROWS=rows,
            OTHER=other_THWC is not None,
            STORE=store,
            num_warps=self.warps,
        )
        return parts_NP2C

    def _programs(self, blocks: int, chunks: Chunks, device: torch.device) -> int:
        """Programs a chunk that share its sums."""
        return min(blocks, triton.cdiv(self.per_sm * _multiprocessors(device), chunks.count))

    def norm_silu(
        self,
        x_THWC: torch.Tensor,
        bias_C: torch.Tensor,
        sums_NP2C: torch.Tensor,
        norm: torch.nn.GroupNorm,
        out_THWC: torch.Tensor,
        chunks: Chunks,
    ) -> None:
        """out = silu(group_norm(x + bias)), each chunk by itself, given the sums of x + bias."""
        _, programs, _, channels = sums_NP2C.shape
        first, rest = _pixels(x_THWC, chunks)
        affine_N2C = torch.empty((chunks.count, 2, channels), dtype=torch.float32, device=x_THWC.device)
        affine_kernel[(norm.num_groups, chunks.count)](
            sums_NP2C,
            norm.weight,
            norm.bias,
            bias_C,
            affine_N2C,
            programs,
            first,
            rest,
            norm.eps,
            C=channels,
            WIDTH=channels // norm.num_groups,
            BLOCK=128,
        )
        rows = max(1, self.block // channels)
        blocks = triton.cdiv(first, rows) + chunks.more * triton.cdiv(rest, rows)
        norm_silu_kernel[(blocks,)](
            x_THWC,
            affine_N2C,
            out_THWC,
            first,
            max(1, rest),
            C=channels,
            ROWS=rows,
            BACKWARDS=self.backwards,
            num_warps=self.warps,
        )

    def first(
        self, pixels_CTHW: torch.Tensor, weight_3KC: torch.Tensor, bias_C: torch.Tensor, chunks: Chunks
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A causal 3x3x3 convolution of few channels, without its bias, and the sums of what it is with its bias.

        Args:
            pixels_CTHW: with the two frames before them.
            weight_3KC: by frame; K = 9 x channels in the order height, width, channel, then zeros up to a power of two.

        Returns:
            (T, H, W, C), and the sums as `sums` has them.
        """
        inputs, frames, height, width = pixels_CTHW.shape
        _, taps, channels = weight_3KC.shape
        x_THWC = pixels_CTHW.new_empty((frames - 2, height, width, channels))
        first, rest = _pixels(x_THWC, chunks)
        programs = self._programs(triton.cdiv(max(first, rest), self.first_rows), chunks, x_THWC.device)
        parts_NP2C = torch.empty((chunks.count, programs, 2, channels), dtype=torch.float32, device=x_THWC.device)
        first_kernel[(programs, chunks.count)](
            pixels_CTHW.contiguous(),
            weight_3KC,
            bias_C,
            x_THWC,
            parts_NP2C,
            first,
            rest,
            frames,
            height,
            width,
            C=channels,
            INPUTS=inputs,
            TAPS=taps,
            ROWS=self.first_rows,
            num_warps=self.first_warps,
            num_stages=1,
        )
        return x_THWC, parts_NP2C

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
        rows = max(1, self.block // channels)
        pixels = frames_out * (height + 1) * (width + 1)
        add_pool_kernel[(triton.cdiv(pixels, rows),)](
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
            num_warps=self.warps,
        )
        return out_THWC


def _pixels(x_THWC: torch.Tensor, chunks: Chunks) -> tuple[int, int]:
    """Of the first chunk, and of each other one."""
    frames, height, width, _ = x_THWC.shape
    assert frames == chunks.frames, f"{frames} frames are not {chunks}"
    return chunks.first * height * width, chunks.rest * height * width


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
