"""The VAE's encoder on channels-last frames, with nothing but convolutions and fused steps.

The same weights, the same order and the same chunks of frames as diffusers'
CogVideoXEncoder3D, which it stands in for (`vae.encoder`). What it leaves out:

* group norm, SiLU, bias, residual and pooling as kernels of their own (`kernels`);
* the concatenation before each causal convolution: what comes before writes
  straight into the frames behind the two frames of context, which the convolution
  takes as one tensor (channels-last keeps whole frames in a row);
* the padding before each downsampling.

A chunk is what diffusers encodes at a time, and what its norms are over. Several chunks can go through a layer together
(`clip`): each is normalised by itself, and a convolution finds the frames before a chunk where they are.

The floor is the convolutions: 149 TFLOP for 49x480x720, 0.20 s on an H200 channels-last with kernels chosen by
benchmark. Beside them the fused steps move 184 GB one chunk after the other, and 138 with all of `Ways`: 0.044 and
0.033 s at 4.2 TB/s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from .chunks import Chunks, Together, chunks_of
from .convolve import CONTEXT, convolve, halve
from .parts import CannotFuse, Conv, Resnet, causal, check, first_weight, resnets_of

__all__ = ["WAYS", "CannotFuse", "FrameCache", "FusedEncoder", "Kernels", "Ways"]

FrameCache = dict[str, torch.Tensor]  # of each causal convolution, the last two frames it saw: (1, 2, H, W, C)


@dataclass(frozen=True)
class Ways:
    """Which of two ways a step goes; the same numbers but for rounding.

    Attributes:
        together: as many chunks as memory has room for go through a layer together; see `chunks.Together`.
        bias_later: the bias of conv_in and of the downsamplings is added by the steps behind them, not by one more.
        first_kernel: conv_in is a kernel of ours with the sums of its result, not cuDNN's on 8 channels.
    """

    together: bool = False
    bias_later: bool = False
    first_kernel: bool = False


# The fastest that was measured (`python -m workshop.bench_encode --ways`).
WAYS = Ways(together=True, bias_later=True, first_kernel=True)


class Kernels(Protocol):
    """The steps between convolutions; see `kernels.TritonKernels`."""

    def sums(self, x_THWC: torch.Tensor, bias_C: torch.Tensor, chunks: Chunks) -> torch.Tensor: ...

    def add_(
        self, x_THWC: torch.Tensor, bias_C: torch.Tensor, other_THWC: torch.Tensor | None, chunks: Chunks
    ) -> torch.Tensor: ...

    def norm_silu(
        self,
        x_THWC: torch.Tensor,
        bias_C: torch.Tensor,
        sums_NP2C: torch.Tensor,
        norm: nn.GroupNorm,
        out_THWC: torch.Tensor,
        chunks: Chunks,
    ) -> None: ...

    def add_pool(
        self, x_THWC: torch.Tensor, bias_C: torch.Tensor, other_THWC: torch.Tensor, *, halve_time: bool
    ) -> torch.Tensor: ...

    def first(
        self, pixels_CTHW: torch.Tensor, weight_3KC: torch.Tensor, bias_C: torch.Tensor, chunks: Chunks
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


@dataclass(frozen=True)
class _Cache:
    """The frames before the chunks at hand, by convolution, and where their last ones go, if any chunk comes next."""

    old: FrameCache
    new: FrameCache | None


@dataclass(frozen=True)
class _Flow:
    """What flows from step to step: activations, in chunks, and the sums that the next norm needs."""

    x_THWC: torch.Tensor
    sums_NP2C: torch.Tensor
    chunks: Chunks


class FusedEncoder(nn.Module):
    """Takes the place of ``vae.encoder``; works for one clip at a time.

    Args:
        encoder: diffusers' CogVideoXEncoder3D; its weights are copied (0.2 GB in bf16).
        kernels: the steps between convolutions.
        ways: other than `WAYS`.

    Raises:
        CannotFuse: the encoder is not built as CogVideoX's are.
    """

    def __init__(self, encoder: Any, kernels: Kernels, ways: Ways | None = None) -> None:
        super().__init__()
        check(encoder)
        self.ways = ways or WAYS
        self._kernels = kernels
        self._conv_in = causal(encoder.conv_in, pad_to=8)
        self._first_3KC = first_weight(encoder.conv_in)
        self._resnets = resnets_of(encoder, self._conv_in.bias if self.ways.bias_later else None)
        # Behind the first downsampling there are a quarter of the pixels, or an eighth.
        self._deep = 1 + next(place for place, resnet in enumerate(self._resnets) if resnet.down is not None)
        self._norm_out: nn.GroupNorm = encoder.norm_out
        self._no_bias = torch.zeros_like(encoder.norm_out.weight, dtype=torch.float32)
        self._conv_out = causal(encoder.conv_out)

    def forward(
        self, sample_1CTHW: torch.Tensor, temb: None = None, conv_cache: FrameCache | None = None
    ) -> tuple[torch.Tensor, FrameCache]:
        """Encode a chunk of frames, as CogVideoXEncoder3D.forward.

        Args:
            sample_1CTHW: RGB in [-1, 1].
            conv_cache: what the call for the chunk before gave, or None for a clip's first.

        Returns:
            Mean and log-variance (1, 2 C, T', H/8, W/8), and the cache for the next chunk.
        """
        old, new = conv_cache or {}, FrameCache()
        return self._chunks(sample_1CTHW, Chunks(sample_1CTHW.shape[2]), 1, _Cache(old, new)), new

    def clip(self, sample_1CTHW: torch.Tensor, frames: int, together: Together) -> torch.Tensor:
        """Encode a clip, several chunks at a time.

        Args:
            sample_1CTHW: RGB in [-1, 1].
            frames: of a chunk, diffusers' `num_sample_frames_batch_size`; the first has what is left over, too.
            together: chunks that go through a layer together.

        Returns:
            Mean and log-variance (1, 2 C, T', H/8, W/8).
        """
        found = []
        for part_1CTHW, chunks, cache in _passes(sample_1CTHW, chunks_of(sample_1CTHW.shape[2], frames), together.deep):
            found.append(self._chunks(part_1CTHW, chunks, together.wide, cache))
        return found[0] if len(found) == 1 else torch.cat(found, dim=2)

    def _chunks(self, sample_1CTHW: torch.Tensor, chunks: Chunks, wide: int, cache: _Cache) -> torch.Tensor:
        """Chunks through all layers: so many at a time up to the first downsampling, then all."""
        assert sample_1CTHW.shape[0] == 1, "one clip at a time: a norm's sums are over all that is given"
        halves = [
            self._wide(part_1CTHW, part, part_cache)
            for part_1CTHW, part, part_cache in _passes(sample_1CTHW, chunks, wide, cache)
        ]
        down = self._resnets[self._deep - 1].down
        assert down is not None
        chunks = chunks.halved() if down.halve_time else chunks
        flow = self._biased(halves[0] if len(halves) == 1 else torch.cat(halves), down.conv, chunks)
        del halves
        for resnet in self._resnets[self._deep :]:
            flow = self._resnet(resnet, flow, cache)
        input_1THWC = self._norm_silu("conv_out", self._norm_out, self._conv_out, flow, self._no_bias, cache)
        moments_THWC = convolve(input_1THWC, self._conv_out.weight) + self._conv_out.bias.to(sample_1CTHW.dtype)
        return moments_THWC.permute(3, 0, 1, 2)[None].contiguous()

    def _wide(self, sample_1CTHW: torch.Tensor, chunks: Chunks, cache: _Cache) -> torch.Tensor:
        """The layers that see every pixel; (T', H/2, W/2, C), without the bias of the downsampling."""
        flow = self._first(sample_1CTHW, chunks, cache)
        for resnet in self._resnets[: self._deep - 1]:
            flow = self._resnet(resnet, flow, cache)
        return self._pooled(self._resnets[self._deep - 1], flow, cache)

    def _first(self, sample_1CTHW: torch.Tensor, chunks: Chunks, cache: _Cache) -> _Flow:
        conv = self._conv_in
        _, channels, frames, height, width = sample_1CTHW.shape
        if self.ways.first_kernel:
            before_1CTHW = cache.old.get("conv_in", sample_1CTHW[:, :, :1].expand(-1, -1, CONTEXT, -1, -1))
            pixels_1CTHW = torch.cat([before_1CTHW, sample_1CTHW], dim=2)
            if cache.new is not None:
                cache.new["conv_in"] = pixels_1CTHW[:, :, -CONTEXT:].clone()
            x_THWC, sums_NP2C = self._kernels.first(pixels_1CTHW[0], self._first_3KC, conv.bias, chunks)
            return _Flow(x_THWC, sums_NP2C, chunks) if self.ways.bias_later else self._biased(x_THWC, conv, chunks)

        def fill(inside_THWC: torch.Tensor) -> None:
            inside_THWC[..., channels:] = 0
            inside_THWC[..., :channels] = sample_1CTHW[0].permute(1, 2, 3, 0)

        input_1THWC = _input("conv_in", conv, fill, (frames, height, width), cache)
        return self._biased(convolve(input_1THWC, conv.weight), conv, chunks)

    def _biased(self, x_THWC: torch.Tensor, conv: Conv, chunks: Chunks) -> _Flow:
        """What a convolution gave, with the sums of what it is with its bias."""
        kernels = self._kernels
        sums = kernels.sums(x_THWC, conv.bias, chunks) if self.ways.bias_later else None
        return _Flow(x_THWC, kernels.add_(x_THWC, conv.bias, None, chunks) if sums is None else sums, chunks)

    def _resnet(self, block: Resnet, flow: _Flow, cache: _Cache) -> _Flow:
        """x + shortcut of a residual block; and the downsampling after it, if there is one."""
        if block.down is not None:
            chunks = flow.chunks.halved() if block.down.halve_time else flow.chunks
            return self._biased(self._pooled(block, flow, cache), block.down.conv, chunks)
        y_THWC, x_THWC = self._residual(block, flow, cache)
        return _Flow(y_THWC, self._kernels.add_(y_THWC, block.bias, x_THWC, flow.chunks), flow.chunks)

    def _pooled(self, block: Resnet, flow: _Flow, cache: _Cache) -> torch.Tensor:
        """A residual block and the downsampling after it, without its bias."""
        assert block.down is not None
        y_THWC, x_THWC = self._residual(block, flow, cache)
        padded_THWC = self._kernels.add_pool(y_THWC, block.bias, x_THWC, halve_time=block.down.halve_time)
        del x_THWC, y_THWC
        return halve(padded_THWC, block.down.conv.weight)

    def _residual(self, block: Resnet, flow: _Flow, cache: _Cache) -> tuple[torch.Tensor, torch.Tensor]:
        """The two that make a residual block's result with its bias: of its convolutions, and of its input."""
        name, chunks = block.name, flow.chunks
        input_1THWC = self._norm_silu(f"{name} conv1", block.norm1, block.conv1, flow, block.before, cache)
        y_THWC = convolve(input_1THWC, block.conv1.weight)
        middle = _Flow(y_THWC, self._kernels.sums(y_THWC, block.conv1.bias, chunks), chunks)
        input_1THWC = self._norm_silu(f"{name} conv2", block.norm2, block.conv2, middle, block.conv1.bias, cache)
        del y_THWC, middle  # conv2 writes where conv1 did
        x_THWC = flow.x_THWC if block.shortcut is None else F.linear(flow.x_THWC, block.shortcut)
        return convolve(input_1THWC, block.conv2.weight), x_THWC

    def _norm_silu(
        self, name: str, norm: nn.GroupNorm, conv: Conv, flow: _Flow, bias_C: torch.Tensor, cache: _Cache
    ) -> torch.Tensor:
        """A convolution's input: activations behind the frames before them."""

        def fill(inside_THWC: torch.Tensor) -> None:
            self._kernels.norm_silu(flow.x_THWC, bias_C, flow.sums_NP2C, norm, inside_THWC, flow.chunks)

        frames, height, width, _ = flow.x_THWC.shape
        return _input(name, conv, fill, (frames, height, width), cache)


def _passes(
    sample_1CTHW: torch.Tensor, chunks: Chunks, at_once: int, cache: _Cache | None = None
) -> Iterator[tuple[torch.Tensor, Chunks, _Cache]]:
    """A clip's chunks, so many at a time, each with the frames before it, and where its last ones go.

    Args:
        cache: for the frames before the first, and those behind the last.
    """
    old = {} if cache is None else cache.old
    for start, part in chunks.passes(at_once):
        end = start + part.frames
        new = FrameCache() if end < chunks.frames else None if cache is None else cache.new
        yield sample_1CTHW[:, :, start:end], part, _Cache(old, new)
        old = {} if new is None else new


def _input(
    name: str, conv: Conv, fill: Callable[[torch.Tensor], None], shape: tuple[int, int, int], cache: _Cache
) -> torch.Tensor:
    """What ``fill`` writes, of so many frames, behind two frames of context: (1, 2 + T, H, W, C)."""
    frames, height, width = shape
    # Five dimensions from the start: a batch axis put in later has a stride that hides the format from PyTorch.
    input_1THWC = conv.weight.new_empty((1, CONTEXT + frames, height, width, conv.weight.shape[1]))
    fill(input_1THWC[0, CONTEXT:])
    input_1THWC[:, :CONTEXT] = cache.old.get(name, input_1THWC[:, CONTEXT : CONTEXT + 1])
    if cache.new is not None:
        cache.new[name] = input_1THWC[:, -CONTEXT:].clone()
    return input_1THWC
