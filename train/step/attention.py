"""The attention kernel: cuDNN's where it runs, else torch's own choice.

On Hopper cuDNN's forward and backward take about two thirds of the time of the
FlashAttention-2 that torch picks by itself. The kernel is called by name, so
that what is compiled, what is recomputed and what is kept all mean the same one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Kernel = Literal["cudnn", "flash", "torch"]
_HEAD_DIM = 64  # of every published CogVideoX


def attend(kernel: Kernel, q_BHSD: torch.Tensor, k_BHSD: torch.Tensor, v_BHSD: torch.Tensor) -> torch.Tensor:
    """Softmax attention over all tokens, (B, H, S, D)."""
    import torch
    import torch.nn.functional as F

    if kernel == "cudnn":
        return torch.ops.aten._scaled_dot_product_cudnn_attention(q_BHSD, k_BHSD, v_BHSD, None, True)[0]
    if kernel == "flash":
        return torch.ops.aten._scaled_dot_product_flash_attention(q_BHSD, k_BHSD, v_BHSD)[0]
    return F.scaled_dot_product_attention(q_BHSD, k_BHSD, v_BHSD)


@lru_cache
def choose(device: torch.device, dtype: torch.dtype) -> Kernel:
    """The first kernel that runs forward and backward on the device."""
    import torch

    if device.type != "cuda" or dtype == torch.float32:
        return "torch"
    candidates: tuple[Kernel, ...] = ("cudnn", "flash")
    for kernel in candidates:
        if _works(lambda q, k, v, kernel=kernel: attend(kernel, q, k, v), device, dtype):  # type: ignore[misc]
            return kernel
    return "torch"


def _works(kernel: Callable[..., torch.Tensor], device: torch.device, dtype: torch.dtype) -> bool:
    """Whether it answers to a small input, and rightly."""
    import torch
    import torch.nn.functional as F

    generator = torch.Generator(device).manual_seed(0)
    # Strided as in a block: (B, S, H, D) seen as (B, H, S, D).
    inputs = [
        torch.randn((1, 144, 4, _HEAD_DIM), device=device, generator=generator, dtype=torch.float32).transpose(1, 2)
        for _ in range(3)
    ]
    half = [tensor.to(dtype).detach().requires_grad_() for tensor in inputs]
    try:
        answer = kernel(*half)
        answer.float().square().mean().backward()
    except RuntimeError:
        return False
    expected = F.scaled_dot_product_attention(inputs[0], inputs[1], inputs[2])
    gradients = [tensor.grad for tensor in half]
    return bool((answer.float() - expected).abs().max() < 0.05) and all(
        gradient is not None and bool(gradient.isfinite().all()) for gradient in gradients
    )
