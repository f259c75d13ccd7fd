"""Queries and keys: the adapter's product added, a layer norm over each head, turned by position; one kernel each way.

Left to the compiler these steps take about 70 of the 2,074 ms of a LoRA step on 5B (H200, only norms and
activations recomputed), because a rotation mixes neighbours; here 26. It computes in fp32, whatever it is given.
On a CPU the same is said in PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch


@torch.library.custom_op("cogtrain::qk_norm", mutates_args=())
def qk_norm(
    x: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor,
    cos: torch.Tensor | None, sin: torch.Tensor | None, skip: int, eps: float,
) -> torch.Tensor:  # fmt: skip
    """rotation(layer_norm(x + added)), contiguous.

    Args:
        x: (B, S, H, D), as ``added``.
        weight: of the norm, (D,), as ``bias``.
        cos: (S - skip, D), as ``sin``, fp32; None: nothing is turned.
        skip: first tokens that are not turned.
    """
    value = _normalised(x, added, eps)[0] * weight + bias
    if cos is not None and sin is not None:
        cosine, sine = (table_SD[:, None] for table_SD in angles(cos, sin, skip))
        value = value * cosine + turned(value) * sine
    return value.to(x.dtype).contiguous()


@torch.library.custom_op("cogtrain::qk_norm_backward", mutates_args=())
def qk_norm_backward(
    grad: torch.Tensor, x: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor,
    cos: torch.Tensor | None, sin: torch.Tensor | None, skip: int, eps: float, sums: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The gradient of x, which is that of ``added`` too, and with ``sums`` those of weight and bias, (2, D).

    With g the gradient of the norm's output times its weight, n the normalised numbers and s
    their scale: dx = s (g - mean(g) - n mean(g n)).
    """
    normalised, scale = _normalised(x, added, eps)
    value = _wide(grad)
    if cos is not None and sin is not None:
        cosine, sine = (table_SD[:, None] for table_SD in angles(cos, sin, skip))
        value = value * cosine - turned(value * sine)
    of_weights = torch.stack([(value * normalised).sum((0, 1, 2)), value.sum((0, 1, 2))])
    value = value * weight
    along = (value * normalised).mean(-1, keepdim=True)
    value = (value - value.mean(-1, keepdim=True) - normalised * along) * scale
    return value.to(x.dtype).contiguous(), of_weights


def _normalised(x: torch.Tensor, added: torch.Tensor | None, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    value = _wide(x) if added is None else _wide(x) + _wide(added)
    value = value - value.mean(-1, keepdim=True)
    scale = (value.square().mean(-1, keepdim=True) + eps).rsqrt()
    return value * scale, scale


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(_wide_dtype(x))


def _wide_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def angles(cos: torch.Tensor, sin: torch.Tensor, skip: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of all tokens, (S, D): the first ``skip`` are turned by zero."""
    pad = torch.nn.functional.pad
    return pad(cos, (0, 0, skip, 0), value=1.0), pad(sin, (0, 0, skip, 0))


def turned(value: torch.Tensor) -> torch.Tensor:
    """Each pair (a, b) of the last dimension a quarter on: (-b, a)."""
    real, imaginary = value.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([-imaginary, real], dim=-1).flatten(-2)


@qk_norm.register_kernel("cuda")
def _(*arguments: Any) -> torch.Tensor:
    from . import qk_kernels

    return qk_kernels.forward(*arguments)


@qk_norm_backward.register_kernel("cuda")
def _(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    from . import qk_kernels

    return qk_kernels.backward(*arguments)


@qk_norm.register_fake
def _(x: torch.Tensor, *_arguments: Any) -> torch.Tensor:
    return x.new_empty(x.shape)


@qk_norm_backward.register_fake
def _(_grad: torch.Tensor, x: torch.Tensor, *_arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty((2, x.shape[-1]), dtype=_wide_dtype(x))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, added, weight, bias, cos, sin, ctx.skip, ctx.eps = inputs
    ctx.save_for_backward(x, added, weight, cos, sin)
    ctx.bias_dtype = bias.dtype


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, added, weight, cos, sin = ctx.saved_tensors
    wanted = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    of_x, of_weights = qk_norm_backward(grad, x, added, weight, cos, sin, ctx.skip, ctx.eps, wanted)
    of_weight, of_bias = (of_weights[0].to(weight.dtype), of_weights[1].to(ctx.bias_dtype)) if wanted else (None, None)
    return of_x, None if added is None else of_x, of_weight, of_bias, None, None, None, None


qk_norm.register_autograd(_backward, setup_context=_remember)
