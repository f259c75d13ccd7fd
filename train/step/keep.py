"""Selective activation checkpointing: what a block keeps for its backward pass, and what it recomputes.

In units of one activation (all tokens by the width; 0.10 GiB for 5B at
49x480x720, 0.26 GiB for 1.5 at 81x768x1360) a block keeps

* ``all``: whatever autograd or the compiler likes, about 14;
* ``matmuls``: its input and what matrix products and attention give, about 10; norms,
  rotations and the activation are computed again, which costs next to nothing;
* ``attention``: its input and the attention's output, 2; matrix products run again;
* ``inputs``: its input, 1; everything runs again.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from .block import BlockFunction

if TYPE_CHECKING:
    import torch

Keep = Literal["all", "matmuls", "attention", "inputs"]

# Kept by a block, in activations; compiled, at rank 128.
ACTIVATIONS: Mapping[Keep, float] = {"all": 14.0, "matmuls": 10.2, "attention": 2.05, "inputs": 1.0}
ALL_UNCOMPILED = 17.0  # diffusers' own block under autocast, as ZeRO-3 runs it (counted on a CPU: 16.4)


def keeping(function: BlockFunction, keep: Keep, *, dropout: bool = False) -> BlockFunction:
    """The block's function with checkpointing inside, to be compiled as one region.

    With the checkpoint inside, the compiler drops from the recomputation what the
    backward pass does not ask for: the last matrix product, and all that only it needs.

    Args:
        dropout: draws random numbers, which must be the same again.
    """
    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    if keep == "all":
        return function
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": dropout}
    if keep != "inputs":
        policy = _keep_matmuls if keep == "matmuls" else _keep_attention
        options["context_fn"] = partial(create_selective_checkpoint_contexts, policy)

    def checkpointed(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return checkpoint(function, *tensors, **options)

    return checkpointed


_ATTENTION = (
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
)
_PRODUCTS = {"mm": 0, "addmm": 1, "bmm": 0}  # and which argument is the left factor


def _keep_attention(context: Any, operation: Any, *arguments: Any, **options: Any) -> Any:
    from torch.utils.checkpoint import CheckpointPolicy

    name = operation.__name__.split(".")[0]
    return CheckpointPolicy.MUST_SAVE if name in _ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE


def _keep_matmuls(context: Any, operation: Any, *arguments: Any, **options: Any) -> Any:
    from torch.utils.checkpoint import CheckpointPolicy

    name = operation.__name__.split(".")[0]
    kept = name in _ATTENTION
    if name in _PRODUCTS:
        left, right = arguments[_PRODUCTS[name]], arguments[_PRODUCTS[name] + 1]
        # A product over a short dimension, as an adapter's second, is cheaper to repeat than to keep.
        kept = left.shape[-1] * 4 >= right.shape[-1]
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
