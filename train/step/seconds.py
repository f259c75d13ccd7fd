"""Seconds of a step, by arithmetic, on GPUs that we have measured."""

from __future__ import annotations

from collections.abc import Mapping

from .attention import Kernel
from .keep import Keep
from .plan import Load, Plan

# What an H200 gives here, from profiles of a LoRA step on 5B (torch 2.11, cuDNN 9.19, FlashAttention 4).
_ATTENTION: Mapping[Kernel, float] = {"cudnn": 405e12, "flash4": 490e12}  # FLOP/s; head dimension 64, bf16
_PRODUCTS = 785e12
_MEMORY = 4.3e12  # bytes/s, read and written
# Norms, rotations, adapters: how often a block reads or writes an activation, without and with recomputing.
_PASSES, _PASSES_AGAIN = 150, 200
# Forward, and a backward pass that recomputes attention's weights: 1 + 2.5 times its two products.
_ATTENTION_PASSES = 3.5
# What of a block's twelve products the backward pass makes again; nothing asks for the last, the feed-forward's second.
_AGAIN: Mapping[Keep, float] = {"all": 0, "matmuls": 0, "feedforward": 4 / 12, "attention": 8 / 12, "inputs": 8 / 12}
# Bytes read and written for each that a trained weight takes: master, gradient and two moments in the update, and
# before it, where all are trained, the gradient's norm and the copies in half precision.
_OPTIMIZER, _CASTS = 40 / 16, 30 / 16
# Times an H200, by the names that the driver gives them.
RELATIVE: Mapping[str, float] = {"H200": 1.0, "H100 80 GB": 1.02, "H100 80GB HBM3": 1.02}


def seconds(load: Load, plan: Plan, gpu: str = "H200", kernel: Kernel = "cudnn") -> float | None:
    """Seconds of a step, one accumulation; None for what no measurement stands behind.

    That is a GPU that is not in `RELATIVE`, an attention kernel that is not in `_ATTENTION`, blocks that are not
    compiled, and weights trained in host memory: how fast is the host's matter.
    Copies to the host and back take no time of their own: they are made beside the computation.
    """
    if gpu not in RELATIVE or kernel not in _ATTENTION or not plan.compiled or plan.train_on_host:
        return None
    full = not load.block
    backward = 2 if full else 1  # the gradient of what went in; of the weights, too, where they are trained
    total = load.trained * (_OPTIMIZER + (_CASTS if full else 0)) / _MEMORY
    for keep in plan.keep:
        attention = _ATTENTION_PASSES + (keep == "inputs")
        products = 1 + backward + _AGAIN[keep]
        passes = _PASSES_AGAIN if _AGAIN[keep] else _PASSES
        total += load.attention * attention / _ATTENTION[kernel] + load.products * products / _PRODUCTS
        total += load.activation * passes / _MEMORY
    return total * RELATIVE[gpu]
