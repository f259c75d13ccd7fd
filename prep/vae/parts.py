"""The parts of a VAE's encoder as the fused one takes them: weights channels-last, and biases in fp32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class CannotFuse(Exception):
    """This encoder, or this machine, is not what the fused one was made for."""


@dataclass(frozen=True)
class Conv:
    """A convolution's weight, channels-last, and its bias, which the next fused step adds."""

    weight: torch.Tensor
    bias: torch.Tensor


@dataclass(frozen=True)
class Down:
    """A downsampling: a pool over pairs of frames, maybe, and a convolution of stride 2."""

    conv: Conv
    halve_time: bool


@dataclass(frozen=True)
class Resnet:
    """A residual block, and the downsampling behind it, if there is one.

    Attributes:
        before: bias that its input still lacks, which norm1 adds and ``bias`` has.
        shortcut: (C_out, C_in): a 1x1x1 convolution is a matrix product a pixel.
        bias: of conv2 and the shortcut, and what the input lacks behind the shortcut.
    """

    name: str
    norm1: nn.GroupNorm
    conv1: Conv
    norm2: nn.GroupNorm
    conv2: Conv
    shortcut: torch.Tensor | None
    before: torch.Tensor
    bias: torch.Tensor
    down: Down | None


def check(encoder: Any) -> None:
    """Raise CannotFuse if an encoder is not built as CogVideoX's are."""
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


def resnets_of(encoder: Any, before: torch.Tensor | None) -> list[Resnet]:
    """The residual blocks of an encoder in their order.

    Args:
        before: bias of conv_in, if steps behind it add that; those of the downsamplings are added so, too. None: each
            is added at once.
    """
    found: list[Resnet] = []
    later = before is not None
    for index, block in enumerate(encoder.down_blocks):
        down = None if block.downsamplers is None else _down(block.downsamplers[0])
        for place, resnet in enumerate(block.resnets):
            last = place == len(block.resnets) - 1
            found.append(_resnet(f"down {index} {place}", resnet, before, down if last else None))
            before = None
        before = down.conv.bias if later and down is not None else None
    for place, resnet in enumerate(encoder.mid_block.resnets):
        found.append(_resnet(f"middle {place}", resnet, before, None))
        before = None
    return found


def _resnet(name: str, resnet: Any, before: torch.Tensor | None, down: Down | None) -> Resnet:
    conv1, conv2 = causal(resnet.conv1), causal(resnet.conv2)
    lacks = torch.zeros_like(resnet.norm1.weight, dtype=torch.float32) if before is None else before
    shortcut, bias = None, conv2.bias
    if resnet.in_channels == resnet.out_channels:
        bias = bias + lacks
    else:
        shortcut = resnet.conv_shortcut.weight.flatten(1).clone()
        bias = bias + resnet.conv_shortcut.bias.float() + shortcut.float() @ lacks
    return Resnet(name, resnet.norm1, conv1, resnet.norm2, conv2, shortcut, lacks, bias, down)


def causal(causal: Any, pad_to: int = 1) -> Conv:
    """A causal 3x3x3 convolution.

    Args:
        pad_to: input channels are filled up with zeros to a multiple; tensor cores take 8 bf16 at a time.
    """
    conv = causal.conv
    if conv.kernel_size != (3, 3, 3) or conv.stride != (1, 1, 1) or causal.pad_mode == "replicate":
        raise CannotFuse("its causal convolutions are not those of CogVideoX")
    missing = -conv.in_channels % pad_to
    weight = F.pad(conv.weight, (0, 0, 0, 0, 0, 0, 0, missing))
    return Conv(weight.clone(memory_format=torch.channels_last_3d), conv.bias.float())


def first_weight(causal: Any) -> torch.Tensor:
    """Of a convolution of few channels, as matrices: (3, K, C), taps and input channels in a row, then zeros."""
    weight_3KC = causal.conv.weight.permute(2, 3, 4, 1, 0).flatten(1, 3)
    taps = weight_3KC.shape[1]
    return F.pad(weight_3KC, (0, 0, 0, (1 << (taps - 1).bit_length()) - taps)).contiguous()


def _down(down: Any) -> Down:
    conv = down.conv
    if conv.kernel_size != (3, 3) or conv.stride != (2, 2) or conv.padding != (0, 0):
        raise CannotFuse("its downsampling is not that of CogVideoX")
    return Down(Conv(conv.weight.clone(memory_format=torch.channels_last), conv.bias.float()), down.compress_time)
