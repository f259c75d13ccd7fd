"""The VAE's encoder on channels-last frames, with nothing but convolutions and fused steps.

The same weights, the same order and the same chunks of frames as diffusers'
CogVideoXEncoder3D, which it stands in for (`vae.encoder`). What it leaves out:

* group norm, SiLU, bias, residual and pooling as kernels of their own (`kernels`);
* the concatenation before each causal convolution: what comes before writes
  straight into the frames behind the two frames of context, which the convolution
  takes as one tensor (channels-last keeps whole frames in a row);
* the padding before each downsampling.

The floor is the convolutions: 149 TFLOP for 49x480x720, 0.20 s on an H200 channels-last with
kernels chosen by benchmark. The fused steps move about 150 GB beside them, 0.04 s at 4.3 TB/s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

FrameCache = dict[str, torch.Tensor]  # of each causal convolution, the last two frames it saw: (1, 2, H, W, C)

_CONTEXT = 2  # frames that a causal 3x3x3 convolution looks back
_LARGEST = 2**30  # values of a convolution's input; diffusers cuts larger ones for cuDNN's sake (2 GB in bf16)


class CannotFuse(Exception):
    """This encoder, or this machine, is not what the fused one was made for."""


class Kernels(Protocol):
    """The steps between convolutions; see `kernels.TritonKernels`."""

    def sums(self, x_THWC: torch.Tensor, bias_C: torch.Tensor) -> torch.Tensor: ...

    def add_(self, x_THWC: torch.Tensor, bias_C: torch.Tensor, other_THWC: torch.Tensor | None) -> torch.Tensor: ...

    def norm_silu(
        self,
        x_THWC: torch.Tensor,
        bias_C: torch.Tensor,
        sums_P2C: torch.Tensor,
        norm: nn.GroupNorm,
        out_THWC: torch.Tensor,
    ) -> None: ...

    def add_pool(
        self, x_THWC: torch.Tensor, bias_C: torch.Tensor, other_THWC: torch.Tensor, *, halve_time: bool
    ) -> torch.Tensor: ...


@dataclass(frozen=True)
class _Conv:
    """A convolution's weight, channels-last, and its bias, which the next fused step adds."""

    weight: torch.Tensor
    bias: torch.Tensor


@dataclass(frozen=True)
class _Resnet:
    name: str
    norm1: nn.GroupNorm
    conv1: _Conv
    norm2: nn.GroupNorm
    conv2: _Conv
    shortcut: torch.Tensor | None  # (C_out, C_in): a 1x1x1 convolution is a matrix product a pixel
    bias: torch.Tensor  # of conv2 and the shortcut


@dataclass(frozen=True)
class _Down:
    conv: _Conv
    halve_time: bool


@dataclass(frozen=True)
class _Flow:
    """What flows from step to step: activations, and the sums that the next norm needs."""

    x_THWC: torch.Tensor
    sums_P2C: torch.Tensor


class FusedEncoder(nn.Module):
    """Takes the place of ``vae.encoder``; works for one clip at a time.

    Args:
        encoder: diffusers' CogVideoXEncoder3D; its weights are copied (0.2 GB in bf16).
        kernels: the steps between convolutions.

    Raises:
        CannotFuse: the encoder is not built as CogVideoX's are.
    """

    def __init__(self, encoder: Any, kernels: Kernels) -> None:
        super().__init__()
        _check(encoder)
        self._kernels = kernels
        self._conv_in = _causal(encoder.conv_in, pad_to=8)
        self._blocks = [
            (
                [_resnet(f"down {index} {place}", resnet) for place, resnet in enumerate(block.resnets)],
                None if block.downsamplers is None else _down(block.downsamplers[0]),
            )
            for index, block in enumerate(encoder.down_blocks)
        ]
        self._middle = [_resnet(f"middle {place}", resnet) for place, resnet in enumerate(encoder.mid_block.resnets)]
        self._norm_out: nn.GroupNorm = encoder.norm_out
        self._conv_out = _causal(encoder.conv_out)

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
        assert sample_1CTHW.shape[0] == 1, "one clip at a time: a norm's sums are over all that is given"
        old, new = conv_cache or {}, FrameCache()
        flow = self._first(sample_1CTHW, old, new)
        for resnets, down in self._blocks:
            for resnet in resnets[:-1]:
                flow = self._resnet(resnet, flow, old, new)
            flow = self._resnet(resnets[-1], flow, old, new, down)
        for resnet in self._middle:
            flow = self._resnet(resnet, flow, old, new)
        no_bias = torch.zeros_like(self._norm_out.weight)
        moments_THWC = self._norm_silu_conv("conv_out", self._norm_out, self._conv_out, flow, no_bias, old, new)
        return (moments_THWC + self._conv_out.bias).permute(3, 0, 1, 2)[None].contiguous(), new

    def _first(self, sample_1CTHW: torch.Tensor, old: FrameCache, new: FrameCache) -> _Flow:
        conv = self._conv_in
        _, channels, frames, height, width = sample_1CTHW.shape

        def fill(inside_THWC: torch.Tensor) -> None:
            inside_THWC[..., channels:] = 0
            inside_THWC[..., :channels] = sample_1CTHW[0].permute(1, 2, 3, 0)

        x_THWC = _convolve("conv_in", conv, fill, (frames, height, width), old, new)
        return _Flow(x_THWC, self._kernels.add_(x_THWC, conv.bias, None))

    def _resnet(
        self, block: _Resnet, flow: _Flow, old: FrameCache, new: FrameCache, down: _Down | None = None
    ) -> _Flow:
        """x + shortcut of a residual block; and the downsampling after it, if there is one."""
        kernels, name = self._kernels, block.name
        x_THWC = flow.x_THWC
        no_bias = torch.zeros_like(block.norm1.weight)
        y_THWC = self._norm_silu_conv(f"{name} conv1", block.norm1, block.conv1, flow, no_bias, old, new)
        middle = _Flow(y_THWC, kernels.sums(y_THWC, block.conv1.bias))
        y_THWC = self._norm_silu_conv(f"{name} conv2", block.norm2, block.conv2, middle, block.conv1.bias, old, new)
        if block.shortcut is not None:
            x_THWC = F.linear(x_THWC, block.shortcut)
        if down is None:
            return _Flow(y_THWC, kernels.add_(y_THWC, block.bias, x_THWC))
        padded_THWC = kernels.add_pool(y_THWC, block.bias, x_THWC, halve_time=down.halve_time)
        y_THWC = F.conv2d(padded_THWC.permute(0, 3, 1, 2), down.conv.weight, stride=2).permute(0, 2, 3, 1).contiguous()
        return _Flow(y_THWC, kernels.add_(y_THWC, down.conv.bias, None))

    def _norm_silu_conv(
        self,
        name: str,
        norm: nn.GroupNorm,
        conv: _Conv,
        flow: _Flow,
        bias_C: torch.Tensor,
        old: FrameCache,
        new: FrameCache,
    ) -> torch.Tensor:
        def fill(inside_THWC: torch.Tensor) -> None:
            self._kernels.norm_silu(flow.x_THWC, bias_C, flow.sums_P2C, norm, inside_THWC)

        frames, height, width, _ = flow.x_THWC.shape
        return _convolve(name, conv, fill, (frames, height, width), old, new)


def _convolve(
    name: str,
    conv: _Conv,
    fill: Callable[[torch.Tensor], None],
    shape: tuple[int, int, int],
    old: FrameCache,
    new: FrameCache,
) -> torch.Tensor:
    """A causal convolution without its bias, of frames that ``fill`` writes behind their context.

    Returns:
        (T, H, W, C_out), contiguous.
    """
    frames, height, width = shape
    # Five dimensions from the start: a batch axis put in later has a stride that hides the format from PyTorch.
    input_1THWC = conv.weight.new_empty((1, frames + _CONTEXT, height, width, conv.weight.shape[1]))
    fill(input_1THWC[0, _CONTEXT:])
    input_1THWC[:, :_CONTEXT] = old.get(name, input_1THWC[:, _CONTEXT : _CONTEXT + 1])
    new[name] = input_1THWC[:, -_CONTEXT:].clone()
    parts = [
        F.conv3d(part.permute(0, 4, 1, 2, 3), conv.weight, padding=(0, 1, 1)) for part in _overlapping(input_1THWC)
    ]
    output_1CTHW = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    return output_1CTHW.permute(0, 2, 3, 4, 1)[0].contiguous()


def _overlapping(input_1THWC: torch.Tensor) -> list[torch.Tensor]:
    """Pieces in time that one convolution can take, each with its context."""
    frames = input_1THWC.shape[1]
    most = max(_CONTEXT + 1, _LARGEST * frames // input_1THWC.numel())
    step = most - _CONTEXT
    return [input_1THWC[:, start : start + most] for start in range(0, frames - _CONTEXT, step)]


def _check(encoder: Any) -> None:
    blocks = [*encoder.down_blocks, encoder.mid_block]
    resnets = [resnet for block in blocks for resnet in block.resnets]
    for resnet in resnets:
        if not isinstance(resnet.nonlinearity, nn.SiLU):
            raise CannotFuse(f"its activation is {type(resnet.nonlinearity).__name__}, not SiLU")
        if resnet.spatial_norm_dim is not None or resnet.use_conv_shortcut or hasattr(resnet, "temb_proj"):
            raise CannotFuse("its residual blocks are not those of CogVideoX")
    for norm in [encoder.norm_out, *(norm for resnet in resnets for norm in (resnet.norm1, resnet.norm2))]:
        if norm.num_channels & (norm.num_channels - 1):
            raise CannotFuse(f"{norm.num_channels} channels are no power of two")


def _resnet(name: str, resnet: Any) -> _Resnet:
    conv1, conv2 = _causal(resnet.conv1), _causal(resnet.conv2)
    shortcut, bias = None, conv2.bias
    if resnet.in_channels != resnet.out_channels:
        shortcut = resnet.conv_shortcut.weight.flatten(1).clone()
        bias = bias + resnet.conv_shortcut.bias
    return _Resnet(name, resnet.norm1, conv1, resnet.norm2, conv2, shortcut, bias)


def _causal(causal: Any, pad_to: int = 1) -> _Conv:
    """``pad_to``: input channels are filled up with zeros to a multiple; tensor cores take 8 bf16 at a time."""
    conv = causal.conv
    if conv.kernel_size != (3, 3, 3) or conv.stride != (1, 1, 1) or causal.pad_mode == "replicate":
        raise CannotFuse("its causal convolutions are not those of CogVideoX")
    missing = -conv.in_channels % pad_to
    weight = F.pad(conv.weight, (0, 0, 0, 0, 0, 0, 0, missing))
    return _Conv(weight.clone(memory_format=torch.channels_last_3d), conv.bias)


def _down(down: Any) -> _Down:
    conv = down.conv
    if conv.kernel_size != (3, 3) or conv.stride != (2, 2) or conv.padding != (0, 0):
        raise CannotFuse("its downsampling is not that of CogVideoX")
    return _Down(_Conv(conv.weight.clone(memory_format=torch.channels_last), conv.bias), down.compress_time)
