"""The convolutions of the fused encoder, by cuDNN; inputs that are too large for it go in parts.

A part is a view of the frames at hand, and its result is written to its place: nothing is copied.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

CONTEXT = 2  # frames that a causal 3x3x3 convolution looks back
_LARGEST = 2**30  # values of a convolution's input; diffusers cuts larger ones for cuDNN's sake (2 GB in bf16)


def convolve(input_1THWC: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A causal convolution without its bias: (T, H, W, C_out), contiguous."""
    _, frames, height, width, _ = input_1THWC.shape
    frames -= CONTEXT
    most = max(1, _LARGEST * (frames + CONTEXT) // input_1THWC.numel() - CONTEXT)
    if frames <= most:
        output_1CTHW = F.conv3d(input_1THWC.permute(0, 4, 1, 2, 3), weight, padding=(0, 1, 1))
        return output_1CTHW.permute(0, 2, 3, 4, 1)[0].contiguous()
    output_1THWC = input_1THWC.new_empty((1, frames, height, width, len(weight)))
    for start, stop in _even_parts(frames, most):
        part_1CTHW = input_1THWC[:, start : stop + CONTEXT].permute(0, 4, 1, 2, 3)
        _into(output_1THWC[:, start:stop].permute(0, 4, 1, 2, 3), part_1CTHW, weight, (0, 1, 1), (1, 1, 1))
    return output_1THWC[0]


def halve(padded_THWC: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A convolution of stride 2 of frames with a row and a column at the end: (T, H/2, W/2, C), contiguous."""
    frames, height, width, channels = padded_THWC.shape
    most = max(1, _LARGEST * frames // padded_THWC.numel())
    if frames <= most:
        return F.conv2d(padded_THWC.permute(0, 3, 1, 2), weight, stride=2).permute(0, 2, 3, 1).contiguous()
    output_THWC = padded_THWC.new_empty((frames, (height - 1) // 2, (width - 1) // 2, channels))
    for start, stop in _even_parts(frames, most):
        part_TCHW = padded_THWC[start:stop].permute(0, 3, 1, 2)
        _into(output_THWC[start:stop].permute(0, 3, 1, 2), part_TCHW, weight, (0, 0), (2, 2))
    return output_THWC


def _into(
    output: torch.Tensor, part: torch.Tensor, weight: torch.Tensor, padding: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    """A convolution of a part, written to its place: parts that are put together are read and written once more."""
    if part.is_cuda and torch.version.cuda is not None and torch.backends.cudnn.is_available():
        cudnn = torch.backends.cudnn
        torch.ops.aten.cudnn_convolution.out(
            part, weight, padding, stride, [1] * len(stride), 1, cudnn.benchmark, False, cudnn.allow_tf32, out=output
        )
    else:
        convolve = F.conv3d if len(stride) == 3 else F.conv2d
        output.copy_(convolve(part, weight, padding=padding, stride=stride))


def _even_parts(count: int, most: int) -> list[tuple[int, int]]:
    """Begin and end of parts of ``count`` things, of at most ``most``, as few and as even as it goes."""
    parts = -(-count // most)
    size = -(-count // parts)
    return [(start, min(start + size, count)) for start in range(0, count, size)]
