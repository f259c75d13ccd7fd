"""FlashAttention 4 (``pip install flash-attn-4``: Hopper and Blackwell) as an operation that can be compiled and kept.

It has the functions that PyTorch's own ``torch.nn.attention.activate_flash_attention_impl`` calls, but those of
torch 2.11 expect another number of results than the package gives. On a CPU the same is said in PyTorch.
"""

from __future__ import annotations

import warnings
from functools import cache
from importlib import import_module
from typing import Any

import torch


@torch.library.custom_op("cogtrain::flash4", mutates_args=())
def flash4(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over all tokens.

    Args:
        q, k, v: (B, S, H, D).

    Returns:
        The same, and the logarithm of each row's sum of exponentials, (B, H, S), fp32.
    """
    scores_BHST = _scores(q, k)
    sums_BHS = scores_BHST.logsumexp(-1)
    out = torch.einsum("bhst,bthd->bshd", (scores_BHST - sums_BHS[..., None]).exp(), v)
    return out.contiguous(), sums_BHS.float()


@torch.library.custom_op("cogtrain::flash4_backward", mutates_args=())
def flash4_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, sums: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v (FlashAttention-2, arXiv 2307.08691, section 2.2)."""
    weights_BHST = (_scores(q, k) - sums[..., None]).exp()
    of_weights = torch.einsum("bshd,bthd->bhst", grad, v)
    along_BHS = (grad * out).sum(-1).transpose(1, 2)
    of_scores = (weights_BHST * (of_weights - along_BHS[..., None]) * q.shape[-1] ** -0.5).to(q.dtype)
    return (
        torch.einsum("bhst,bthd->bshd", of_scores, k).contiguous(),
        torch.einsum("bhst,bshd->bthd", of_scores, q).contiguous(),
        torch.einsum("bhst,bshd->bthd", weights_BHST.to(grad.dtype), grad).contiguous(),
    )


def _scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return torch.einsum("bshd,bthd->bhst", q, k) * q.shape[-1] ** -0.5


@cache
def _kernels() -> Any:
    """The package's own functions; their compiler tells of an argument of theirs, ten lines at each first call."""
    warnings.filterwarnings("ignore", "Argument .* cannot be converted to a JitArgument")
    return import_module("flash_attn.cute.interface")


@flash4.register_kernel("cuda")
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out, sums, *_ = _kernels()._flash_attn_fwd(q, k, v, return_lse=True)
    return out, sums


@flash4_backward.register_kernel("cuda")
def _(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, sums: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    of_q, of_k, of_v, *_ = _kernels()._flash_attn_bwd(q, k, v, out, grad.contiguous(), sums)
    return of_q, of_k, of_v


@flash4.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    batch, tokens, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, tokens), dtype=torch.float32)


@flash4_backward.register_fake
def _(grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _remember(ctx: Any, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, grad: torch.Tensor, _of_sums: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return flash4_backward(grad, *ctx.saved_tensors)


flash4.register_autograd(_backward, setup_context=_remember)
