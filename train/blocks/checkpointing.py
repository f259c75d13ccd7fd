"""Selective activation checkpointing: what a block keeps for its backward pass, and what it recomputes.

In units of one activation (all tokens by the width; 0.10 GiB for 5B at
49x480x720, 0.26 GiB for 1.5 at 81x768x1360) a block keeps

* ``all``: whatever autograd or the compiler likes, about 14;
* ``matmuls``: its input and what matrix products and attention give, about 10; norms,
  rotations and the activation are computed again, which costs next to nothing;
* ``feedforward``: its input, the attention's output and the feed-forward's middle, 6: half of what
  ``attention`` has to multiply again, and still few enough to be copied to the host while a block computes;
* ``attention``: its input and the attention's output, 2; matrix products run again;
* ``inputs``: its input, 1; everything runs again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .block import BlockFunction

if TYPE_CHECKING:
    import torch

Checkpointing = Literal["all", "matmuls", "feedforward", "attention", "inputs"]

# Kept by a block, in activations; compiled, at rank 128.
ACTIVATIONS: Mapping[Checkpointing, float] = {
    "all": 14.0, "matmuls": 10.1, "feedforward": 6.05, "attention": 2.05, "inputs": 1.0,
}  # fmt: skip
ALL_UNCOMPILED = 17.0


def with_checkpointing(function: BlockFunction, policy: Checkpointing, *, dropout: bool = False) -> BlockFunction:
    """The block's function with checkpointing inside, to be compiled as one region.

    With the checkpoint inside, the compiler drops from the recomputation what the
    backward pass does not ask for: the last matrix product, and all that only it needs.

    Args:
        dropout: draws random numbers, which must be the same again.
    """
    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    if policy == "all":
        return function
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": dropout}
    if policy != "inputs":
        contexts = partial(create_selective_checkpoint_contexts, partial(_policy, policy))
        # The compiler keeps what it has made for the next run only if it can tell what decides here what is kept.
        contexts.cache_hash = f"{policy} {_this_file()}"  # type: ignore[attr-defined]
        options["context_fn"] = contexts

    def checkpointed(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return checkpoint(function, *tensors, **options)

    return checkpointed


@cache
def _this_file() -> str:
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


# Which matrix products are kept, by the lengths of a row that goes in and of one that comes out. A product over a
# short row, as an adapter's second, is cheaper to repeat than to keep.
_KEPT_PRODUCTS: Mapping[Checkpointing, Callable[[int, int], bool]] = {
    "matmuls": lambda into, out: into * 4 >= out,
    "feedforward": lambda into, out: into * 4 == out,  # its middle is four times as wide as a token
    "attention": lambda into, out: False,
}
_ATTENTION = (
    "flash4",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
)
_PRODUCTS = {"mm": 0, "addmm": 1, "bmm": 0}  # and which argument is the left factor


def _policy(policy: Checkpointing, context: Any, operation: Any, *arguments: Any, **options: Any) -> Any:
    """What becomes of an operation's result. The compiler pickles what it is called with: no function of no name."""
    from torch.utils.checkpoint import CheckpointPolicy

    name = operation.__name__.split(".")[0]
    kept = name in _ATTENTION
    if name in _PRODUCTS:
        left, right = arguments[_PRODUCTS[name]], arguments[_PRODUCTS[name] + 1]
        kept = _KEPT_PRODUCTS[policy](left.shape[-1], right.shape[-1])
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
