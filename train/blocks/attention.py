"""The attention kernel: FlashAttention 4 or cuDNN's where they run (``trial`` asks), else torch's own choice.

On Hopper cuDNN's forward and backward take about two thirds of the time of the
FlashAttention-2 that torch picks by itself. The kernel is called by name, so
that what is compiled, what is recomputed and what is kept all mean the same one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Kernel = Literal["flash4", "cudnn", "flash", "torch"]


def attend(kernel: Kernel, q_BHSD: torch.Tensor, k_BHSD: torch.Tensor, v_BHSD: torch.Tensor) -> torch.Tensor:
    """Softmax attention over all tokens, (B, H, S, D)."""
    import torch
    import torch.nn.functional as F

    if kernel == "flash4":
        from .flash4 import flash4

        return flash4(q_BHSD.transpose(1, 2), k_BHSD.transpose(1, 2), v_BHSD.transpose(1, 2))[0].transpose(1, 2)
    if kernel == "cudnn":
        return torch.ops.aten._scaled_dot_product_cudnn_attention(q_BHSD, k_BHSD, v_BHSD, None, True)[0]
    if kernel == "flash":
        return torch.ops.aten._scaled_dot_product_flash_attention(q_BHSD, k_BHSD, v_BHSD)[0]
    return F.scaled_dot_product_attention(q_BHSD, k_BHSD, v_BHSD)
